"""Types of configuration fields with their ranges, which pydantic checks, and what is said of a value that is out of them."""

from __future__ import annotations

import dataclasses
import re
import types
import typing
from collections.abc import Callable
from typing import Annotated, Any, Literal

from annotated_types import Interval, MinLen

MOST_STEPS = 1 << 24
"""The optimizer's step count is a float32, as torch's, and goes no further."""


_FLOATS = "(float32|float64|bfloat16)"
_STATES = rf"(exp_avg=({_FLOATS}|int8)|exp_avg_sq={_FLOATS}|precond={_FLOATS})"
_STATE_DTYPE = re.compile(rf"{_FLOATS}|{_STATES}(, *{_STATES})*")
"""What the optimizer takes, without asking it: that would import torch."""


class Checked:
    """A check after that of the type: pydantic's AfterValidator, without importing pydantic, for which a command's help would wait.

    Args:
        check: gives the value, or raises ValueError.
    """

    def __init__(self, check: Callable[[str], str]) -> None:
        self._check = check

    def __get_pydantic_core_schema__(self, source: Any, handler: Callable[[Any], Any]) -> Any:
        from pydantic_core import core_schema

        return core_schema.no_info_after_validator_function(self._check, handler(source))


class Instead:
    """Values of former versions, each with what stands for it now: pydantic's BeforeValidator, without importing pydantic."""

    def __init__(self, values: dict[bool, str]) -> None:
        self._values = values

    def of_text(self, text: str) -> str:
        """For a value on the command line."""
        return {str(former): now for former, now in self._values.items()}.get(text.capitalize(), text)

    def __get_pydantic_core_schema__(self, source: Any, handler: Callable[[Any], Any]) -> Any:
        from pydantic_core import core_schema

        def replaced(value: Any) -> Any:
            return self._values[value] if isinstance(value, bool) else value

        return core_schema.no_info_before_validator_function(replaced, handler(source))


def _no_nul(text: str) -> str:
    if "\0" in text:
        raise ValueError(f"must be text without a NUL character, not {text!r}")
    return text


def _state_dtype(text: str) -> str:
    if _STATE_DTYPE.fullmatch(text):
        return text
    from anon_dist.optim.hyper import state_dtypes

    try:
        state_dtypes({"state_dtype": text})
    except ValueError as error:
        raise ValueError(str(error).removeprefix("Anon: state_dtype ")) from None
    return text


Steps = Annotated[int, Interval(ge=1, le=MOST_STEPS)]
StepsOrZero = Annotated[int, Interval(ge=0, le=MOST_STEPS)]
Size = Annotated[int, Interval(ge=1, le=1 << 24)]
"""Of a model, of a batch, of a group of ranks."""
Whole = Annotated[int, Interval(ge=0, le=1 << 48)]
Seed = Annotated[int, Interval(ge=0, le=(1 << 63) - 1)]
Layers = Annotated[int, Interval(ge=1, le=10_000)]
Minutes = Annotated[float, Interval(ge=0.01, le=525_600)]
"""Up to a year."""
Positive = Annotated[float, Interval(gt=0)]
NotNegative = Annotated[float, Interval(ge=0)]
Below1 = Annotated[float, Interval(ge=0, lt=1)]
"""A decay rate; a dropout rate."""
Share = Annotated[float, Interval(ge=0, le=1)]
PositiveShare = Annotated[float, Interval(gt=0, le=1)]
LearningRate = Annotated[float, Interval(ge=0, le=1e6)]
Epsilon = Annotated[float, Interval(ge=1e-37, le=1)]
"""A normal float32: less would be 0 there."""
RefreshRatio = Annotated[float, Interval(gt=1, le=1e6)]
Gamma = Annotated[float, Interval(ge=-100, le=100)]
Text = Annotated[str, MinLen(1)]
Place = Annotated[str, MinLen(1), Checked(_no_nul)]
"""A path, or the name of something."""
StateDtype = Annotated[str, Checked(_state_dtype)]


def spell(hint: Any) -> str:
    """What a field of this annotated type takes, for a person: "a finite number > 0, or None"."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        return " ".join([spell(inner[0]), *(_limits(m) for m in inner[1:] if isinstance(m, Interval | MinLen))])
    if origin in (typing.Union, types.UnionType):
        return ", or ".join(map(spell, inner))
    if origin is Literal:
        return ("one of " if len(inner) > 1 else "") + ", ".join(map(str, inner))
    if origin is tuple:
        several = "any number of values" if inner[-1] is Ellipsis else f"{len(inner)} values"
        return f"{several}, each {spell(inner[0])}"
    if dataclasses.is_dataclass(hint):
        return f"{{{', '.join(field.name for field in dataclasses.fields(hint))}}}"
    if origin is dict:
        return f"a mapping from {spell(inner[0])} to {spell(inner[1])}"
    return {int: "a whole number", float: "a finite number", str: "text", bool: "true or false"}.get(hint, "None")


def _limits(limit: Interval | MinLen) -> str:
    if isinstance(limit, MinLen):
        return "that is not empty"
    bounds = ((limit.gt, ">"), (limit.ge, "≥"), (limit.lt, "<"), (limit.le, "≤"))
    return " and ".join(f"{sign} {_number(bound)}" for bound, sign in bounds if bound is not None)


def _number(bound: Any) -> str:
    return f"{bound:,}" if isinstance(bound, int) else f"{bound:g}"
