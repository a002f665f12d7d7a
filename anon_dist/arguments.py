"""How every command reads its arguments: dataclasses of options, through tyro; whole numbers also as `1e3` and `10k`.

Nothing here, nor in the modules whose options it reads, imports torch: a command's `--help` is to be there at once.
"""

from __future__ import annotations

import contextlib
import difflib
import inspect
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from decimal import Decimal, InvalidOperation
from typing import Any, NoReturn, TypeVar, cast

from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from anon_dist import usage

Options = TypeVar("Options")
SUFFIXES = {"k": "e3", "M": "e6", "B": "e9"}


def whole_number(text: str) -> int:
    """The whole number that a text spells: `1000`, `1_000`, `1e3`, `1k`, `1.5M`, `2B`.

    Raises:
        ValueError: it spells none.
    """
    spelled = text[:-1] + SUFFIXES[text[-1]] if text[-1:] in SUFFIXES else text
    try:
        number = Decimal(spelled)
        whole = int(number) if abs(number.adjusted()) < 40 or not number else None
    except (InvalidOperation, OverflowError, ValueError):
        whole = None
    if whole is None or whole != number:
        raise ValueError(f"{text} is no whole number")
    return whole


REGISTRY = ConstructorRegistry()


@REGISTRY.primitive_rule
def _whole_numbers(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
    if info.type is not int:
        return None
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar="INT",
        instance_from_str=lambda words: whole_number(words[0]),
        is_instance=lambda value: isinstance(value, int) and not isinstance(value, bool),
        str_from_instance=lambda value: [str(value)],
    )


def parse(
    kind: type[Options],
    args: Sequence[str],
    prog: str,
    runs_bare: bool = False,
    default: Options | None = None,
    config: Sequence[Any] = (),
    read: Callable[..., Any] = usage.parse,
    called: Mapping[str, Mapping[str, str]] | None = None,
) -> Options:
    """The options that a command line gives; whoever calls a command without any sees what it takes.

    Args:
        runs_bare: the command means something without any.
        default: where the options' defaults come from. None: from `kind`.
        config: further of tyro's markers.
        read: `usage.parse`, or `usage.parse_or_raise` of a command that reports mistakes in its own way.
        called: see `usage.parse_or_raise`.

    Raises:
        SystemExit: after the help (code 0; 2 if there are no arguments at all), or a message on what is wrong (2).
    """
    more: dict[str, Any] = {"called": called} if called else {}
    if default is not None:
        more["default"] = default
    return cast(Options, _parse(kind, args, prog, runs_bare, config, more, read))


def parse_known(
    kind: type[Options], args: Sequence[str], prog: str, runs_bare: bool = False
) -> tuple[Options, list[str]]:
    """The same, and the arguments that are none of `kind`'s."""
    return cast(tuple[Options, list[str]], _parse(kind, args, prog, runs_bare, (), {"return_unknown_args": True}))


def _parse(
    kind: Any,
    args: Sequence[str],
    prog: str,
    runs_bare: bool,
    config: Sequence[Any],
    more: dict[str, Any],
    read: Callable[..., Any] = usage.parse,
) -> Any:
    if not args and not runs_bare:
        with contextlib.redirect_stdout(sys.stderr), contextlib.suppress(SystemExit):
            _parse(kind, ["--help"], prog, True, config, more)
        sys.exit(2)
    given: Any = {
        "description": inspect.getdoc(kind),
        "registry": REGISTRY,
        "config": tuple(config),
        **more,
    }
    return read(kind, args, prog, **given)


def unknown(prog: str, word: str, known: Iterable[str]) -> NoReturn:
    """Say that there is no such command or option, and which is nearest."""
    nearest = difflib.get_close_matches(word, list(known), n=1)
    hint = f"; did you mean '{prog} {nearest[0]}'?" if nearest else ""
    kind = "option" if word.startswith("-") else "command"
    sys.exit(_error(f"{prog}: unknown {kind} '{word}'{hint} ({prog} --help lists them)"))


def _error(text: str) -> int:
    print(text, file=sys.stderr)
    return 2
