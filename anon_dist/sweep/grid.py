"""From what the command line says to the cells of a sweep: every combination of settings, for every seed."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from typing import Any

import yaml

from anon_dist.train.config import fields, strict_yaml
from anon_dist.train.config.parsing import Config, ConfigError, accumulation, check, field_types, with_fields
from anon_dist.train.config.ranges import spell

Axis = tuple[str, list[Any]]
"""A field's dotted name, and its values."""

MOST_VALUES = 1000
"""Of one axis: more is a slip of the pen."""

ANON_ONLY = tuple(
    f"optim.{key}"
    for key in (
        "gamma",
        "gamma_by_name",
        "gamma_schedule",
        "match",
        "refresh_ratio",
        "beta3",
        "embedding_beta3",
        "update_clip",
        "window",
        "max_interval",
        "nesterov",
        "cautious_decay",
        "basis",
        "basis_block",
        "hold_silent",
        "state_dtype",
    )
)
"""Fields that do nothing to AdamW. Its eps, outside the square root, has another unit, and stays at its own default."""

OWN_GAMMAS = ("optim.gamma_by_name", "optim.gamma_schedule")
"""Fields that make γ differ within a cell."""

BY_NAME = tuple(f"optim.{field}" for field in fields.BY_NAME)
"""Fields whose patterns are of the model's parameters."""

OWN = {
    "optim.name": "use --baseline adamw",
    "train.seed": "use --seeds",
    "data.seed": "use --seeds",
    "run_dir": "each cell has its own, below --out",
    "resume": "a cell goes on from its own checkpoint",
    "train.engine": "a cell is one process",
    "data.path": "losses on different corpora do not compare",
    "data.sources": "losses on different corpora do not compare",
    "train.tokens": "vary train.steps",
    "train.global_batch_tokens": "vary train.global_batch",
    "data.phases": "losses on different corpora do not compare",
    "eval.sets": "losses on different corpora do not compare",
}
"""Fields that cannot be an axis, and why."""


@dataclass(frozen=True)
class Cell:
    """One training of a sweep."""

    optimizer: str
    """anon or adamw"""
    settings: Mapping[str, Any]
    """What the grid sets, by dotted name, as the user wrote it: with `factor`, in the units of γ = 1."""
    seed: int
    """Of weights, dropout and data order."""
    factor: float = 1.0
    """See `anon_dist.optim.matching`."""

    @property
    def lr(self) -> float | None:
        """The learning rate asked for; None where the grid does not set it."""
        return self.settings.get("optim.lr")

    @property
    def gamma(self) -> float | None:
        """None where the grid does not set it."""
        return self.settings.get("optim.gamma")

    @property
    def setting(self) -> str:
        """The settings without the seed, for a person."""
        return " ".join([self.optimizer, *(f"{short(k)}={show(v)}" for k, v in self.settings.items())])

    @property
    def name(self) -> str:
        """The folder's: for a person, and unique by a hash of everything."""
        everything = json.dumps([self.optimizer, sorted(self.settings.items()), self.seed, self.factor])
        readable = f"{self.setting} seed={self.seed}".replace(" ", "_").replace("/", "-")
        readable = readable.translate(dict.fromkeys(map(ord, "{}*?:'\"")))
        return f"{readable[:96]}_{hashlib.sha256(everything.encode()).hexdigest()[:8]}"

    def config(self, base: Config) -> Config:
        """The training that this cell is.

        Raises:
            ConfigError: a value is of the wrong type or out of its range, or does not go with the others.
        """
        where = f"--grid, at {self.setting}"
        values = {**self.settings, "optim.name": self.optimizer, "train.seed": self.seed, "data.seed": self.seed}
        if self.optimizer == "adamw":
            values["optim.eps"] = None
        config = with_fields(base, values, where)
        optim = config.optim
        optim.lr *= self.factor
        optim.weight_decay /= self.factor
        optim.update_clip = optim.update_clip and optim.update_clip / self.factor
        try:
            check(config)
            accumulation(config, 1)
        except ValueError as error:  # ConfigError is one
            raise ConfigError(f"{where}: {error}") from None
        return config


def short(name: str) -> str:
    """optim.lr → lr"""
    return name.rpartition(".")[2]


def show(value: Any) -> str:
    """A setting's value in few characters."""
    if isinstance(value, tuple | list):
        return "[" + ",".join(map(show, value)) + "]"
    if isinstance(value, dict):
        return "{" + ",".join(f"{k}: {show(v)}" for k, v in value.items()) + "}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


# -- axes -------------------------------------------------------------------------------------------------------------


def parse_axis(text: str, base: Config, option: str = "--grid") -> Axis:
    """`optim.gamma=-0.5:1.5:0.25`, `optim.lr=log:1e-3:1e-2:4`, `schedule.decay=cosine,wsd`, `optim.betas=[0.9,0.95],[0.9,0.99]`,
    `optim.gamma_schedule={0: 0.5, 1000: 1.0},{0: 1.0}`.

    Values are separated by commas, and each may be a range: `a:b:step` with both ends, or `log:a:b:n`, n values spaced evenly by ratio.
    A value that comes twice counts once.

    Raises:
        ConfigError: naming the field, and what it takes.
    """
    name, equals, values = text.partition("=")
    where = f"{option} {text}"
    if not equals or not values:
        raise ConfigError(f"{where}: expected FIELD=VALUES, as in optim.gamma=0:1:0.25 or optim.lr=1e-3,3e-3")
    if name in OWN:
        raise ConfigError(f"{where}: {name} cannot be swept: {OWN[name]}")
    found: list[Any] = []
    for item in _split(values, where):
        for value in _item(item, where, numeric=_numeric(name)):
            config = with_fields(base, {name: value}, where)
            for part in name.split("."):
                config = getattr(config, part)
            if config not in found:
                found.append(config)
        if len(found) > MOST_VALUES:
            raise ConfigError(f"{where}: more than {MOST_VALUES} values; take a larger step")
    return name, found


def parse_axes(texts: Sequence[str], base: Config) -> list[Axis]:
    """All of --grid.

    Raises:
        ConfigError: see `parse_axis`; or a field comes twice.
    """
    axes = [parse_axis(text, base) for text in texts]
    names = [name for name, _ in axes]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"--grid: {name} comes twice; join its values with commas")
    return axes


def parse_seeds(text: str) -> list[int]:
    """`3` is 0, 1, 2; `0,4,7` and `4,` are lists.

    Raises:
        ConfigError: it is neither.
    """
    parts = [part for part in text.split(",") if part]
    if not parts or not all(part.strip().isdecimal() for part in parts) or (parts == [text] and int(text) < 1):
        raise ConfigError(f"--seeds {text}: expected a number of seeds, at least 1, or a list such as 0,4,7")
    return list(range(int(text))) if parts == [text] else list(dict.fromkeys(map(int, parts)))


def _numeric(name: str) -> bool:
    return "number" in spell(field_types().get(name))


def _split(values: str, where: str) -> list[str]:
    """At commas outside of brackets and braces."""
    items, depth = [""], 0
    for character in values:
        depth += {"[": 1, "]": -1, "{": 1, "}": -1}.get(character, 0)
        if character == "," and depth == 0:
            items.append("")
        else:
            items[-1] += character
    if depth or not all(item.strip() for item in items):
        raise ConfigError(f"{where}: a value is empty, or a bracket is open")
    return [item.strip() for item in items]


def _item(item: str, where: str, numeric: bool) -> list[Any]:
    """One value, or the values of a range."""
    if ":" not in item or item.startswith(("[", "{")) or not numeric:
        return [_scalar(item, where)]
    parts = item.removeprefix("log:").split(":")
    try:
        if len(parts) != 3:
            raise InvalidOperation
        first, last, third = map(Decimal, parts)
        if not all(x.is_finite() for x in (first, last, third)):
            raise InvalidOperation
    except InvalidOperation:
        raise ConfigError(f"{where}: '{item}' is no range; expected a:b:step or log:a:b:n") from None
    if item.startswith("log:"):
        return _logarithmic(item, where, first, last, third)
    if not third or (last - first) / third < 0:
        raise ConfigError(f"{where}: '{item}' never gets from {first} to {last}; change the sign of the step")
    count = (last - first) / third
    if count % 1:
        near = first + third * int(count)
        raise ConfigError(f"{where}: '{item}' steps over its end; both ends count: end at {near}, say")
    if count >= MOST_VALUES:
        raise ConfigError(f"{where}: '{item}' has {int(count) + 1} values, more than {MOST_VALUES}; take a larger step")
    return [_number(first + third * i) for i in range(int(count) + 1)]


def _logarithmic(item: str, where: str, first: Decimal, last: Decimal, count: Decimal) -> list[Any]:
    """Values between the ends are rounded to 4 digits, so that they can be read and typed again."""
    if first <= 0 or last <= 0 or count % 1 or not 2 <= count <= MOST_VALUES:
        raise ConfigError(f"{where}: '{item}': log:a:b:n wants a > 0, b > 0 and a whole n from 2 to {MOST_VALUES}")
    n = int(count)
    ratio = math.log(last / first) / (n - 1)
    inner = [float(f"{float(first) * math.exp(ratio * i):.4g}") for i in range(1, n - 1)]
    return [float(first), *inner, float(last)]


def _number(value: Decimal) -> int | float:
    """A whole number written without a point stays one, for fields that count."""
    exponent = value.as_tuple().exponent
    return int(value) if isinstance(exponent, int) and exponent >= 0 else float(value)


def _scalar(item: str, where: str) -> Any:
    try:
        return strict_yaml.load("null" if item == "none" else item)
    except yaml.YAMLError:
        raise ConfigError(f"{where}: '{item}' cannot be read as a value") from None


# -- cells ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Grid:
    """What a sweep is asked to run."""

    axes: list[Axis]
    seeds: list[int]
    baseline: bool = False
    """Whether AdamW is run too, over the axes that mean something to it."""
    baseline_lr: list[float] | None = None
    """Its learning rates; None: those of the grid."""
    factor: Callable[[float, float | None], float] | None = None
    """(γ, clip) → factor on Anon's learning rate, as `Spectrum.lr_factor`; None: 1."""

    def has_own_gammas(self, base: Config) -> bool:
        """Whether γ differs within a cell, by parameter or by step; each param group then needs its own factor (`optim.match`)."""
        given = bool(base.optim.gamma_by_name or base.optim.gamma_schedule)
        return given or any(name in OWN_GAMMAS for name, _ in self.axes)

    def gammas(self, base: Config) -> list[float]:
        """Those of Anon's cells."""
        return dict(self.axes).get("optim.gamma", [base.optim.gamma])

    def cells(self, base: Config) -> list[Cell]:
        """In the order in which they are run: all settings with the first seed, then all with the second.

        Raises:
            ConfigError: a cell's settings are out of range or do not go together; all are looked at.
        """
        anon = []
        for settings in _product(self.axes):
            gamma = settings.get("optim.gamma", base.optim.gamma)
            clip = settings.get("optim.update_clip", base.optim.update_clip)
            anon.append(("anon", settings, self.factor_of(gamma, clip)))
        axes = [axis for axis in self.axes if axis[0] not in (*ANON_ONLY, "optim.eps")]
        if self.baseline_lr is not None:
            axes = [*(axis for axis in axes if axis[0] != "optim.lr"), ("optim.lr", list(self.baseline_lr))]
        adamw = [("adamw", settings, 1.0) for settings in _product(axes)] if self.baseline else []
        cells = [Cell(name, settings, seed, f) for seed in self.seeds for name, settings, f in adamw + anon]
        for cell in cells[: len(adamw) + len(anon)]:
            cell.config(base)
        return cells

    def factor_of(self, gamma: float, clip: float | None) -> float:
        """To 4 digits, so that it can be read and typed again."""
        return 1.0 if self.factor is None else float(f"{self.factor(gamma, clip):.4g}")


def _product(axes: Sequence[Axis]) -> list[dict[str, Any]]:
    names = [name for name, _ in axes]
    return [dict(zip(names, values, strict=True)) for values in itertools.product(*(v for _, v in axes))]
