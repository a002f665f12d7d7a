"""States of Anon that are not of their parameter's shape: bases of the sides of a matrix, and what they mean for the others.

A parameter of two or more dimensions is a matrix of m rows, its first dimension, and n columns, all others. Where a side is turned, the
state has beside exp_avg, exp_avg_sq and precond, which are then those of G' = Q_Lᵀ G Q_R:

- `basis_columns`, `covariance_columns`: float32 (n, b), b = min(basis_block, n). Q_R is of blocks: row j has the row of its block; the last
  block may be smaller, and its rows are 0 behind it.
- `basis_rows`, `covariance_rows`: the same of Q_L, (m, b).

Formats that hold a parameter's states whole carry them as any other, and so does DeepSpeed's stage 3, where it cuts between rows; they
mean nothing where an engine cuts within rows (DeepSpeed's stages 1 and 2, FSDP1). To leave a basis, m is turned back, exactly. σ = d^(1/γ)
and s are the diagonals, in the basis, of what is a full matrix elsewhere: σ_ij = Σ_kl Q_L,ik² Q_R,jl² σ'_kl is its diagonal, an
approximation of it.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import replace
from math import prod
from typing import Any

import torch
from torch import Tensor

from anon_dist.checkpoint.computed import Converted, Read, power, reader
from anon_dist.checkpoint.errors import CheckpointError
from anon_dist.checkpoint.options import Basis
from anon_dist.checkpoint.recognise import BASIS_STATES
from anon_dist.checkpoint.schema import Checkpoint, Key, ParamGroup
from anon_dist.optim.basis import Side, turn
from anon_dist.optim.frame import KEYS, LEAST_GAMMA, length_of, sides_of
from anon_dist.optim.regime import HISTORY, Regime
from anon_dist.optim.update import D_MAX, D_MIN

Shape = tuple[int, ...]

REMEDY = "turn the states back first: anon-dist ckpt convert SRC DST --to … --optimizer anon --anon.drop-basis"


def check_whole(states: Collection[str], parameter: str, where: str) -> None:
    """Raises `CheckpointError` if a parameter has a basis, for an engine that cuts its rows off; naming the remedy."""
    if basis := sorted(set(states) & set(BASIS_STATES)):
        raise CheckpointError(
            f"{parameter} has {basis[0]}, a basis of the whole matrix, which {where} would cut off, and without which its exp_avg, "
            f"exp_avg_sq and precond mean nothing. {REMEDY[0].upper()}{REMEDY[1:]}"
        )


def identities(
    parameter: str, shape: Shape, basis: Basis | None, block: int
) -> tuple[dict[Key, Read], dict[Key, Shape]]:
    """The states of a basis in which nothing is turned, and their shapes."""
    made: dict[Key, Read] = {}
    shapes: dict[Key, Shape] = {}
    for side in sides_of(shape, {"basis": basis}):
        n = length_of(shape, side)
        b = min(block, n)
        own = [Key(parameter, state) for state in KEYS[side]]
        made |= dict(zip(own, (_identity(b), _zeros), strict=True))
        shapes |= dict.fromkeys(own, (n, b))
    return made, shapes


def _identity(b: int) -> Read:
    def read(start: int, stop: int) -> Tensor:
        at = torch.arange(start, stop)
        return (torch.div(at, b, rounding_mode="floor") % b == at % b).double()

    return read


def _zeros(start: int, stop: int) -> Tensor:
    return torch.zeros(stop - start, dtype=torch.float64)


def turned(checkpoint: Checkpoint) -> set[str]:
    """The parameters that have a basis."""
    return {key.parameter for key in checkpoint.tensors if key.state in BASIS_STATES}


def without_basis(checkpoint: Checkpoint) -> Checkpoint:
    """Anon's checkpoint with the states of an Anon without a basis; itself if it has none. See the module.

    Raises:
        CheckpointError: a basis is not of its parameter's shape; naming it.
    """
    found = turned(checkpoint)
    if not found:
        return checkpoint
    computed: dict[Key, Read] = {}
    groups, notes = [], []
    for index, group in enumerate(checkpoint.manifest.groups):
        gamma = Regime(group.hyperparameters).gamma_in_force
        members = [name for name in group.members if name in found]
        for name in members:
            side = _Frame(checkpoint, name)
            for state, squared in (("exp_avg", False), ("exp_avg_sq", True)):
                computed[Key(name, state)] = side.back(reader(checkpoint, Key(name, state)), squared)
            if gamma:
                computed[Key(name, "precond")] = _spread(reader(checkpoint, Key(name, "precond")), side, gamma)
        groups.append(ParamGroup(list(group.members), _plain(group.hyperparameters)))
        if members:
            notes.append(
                f"group {index}: the basis of {len(members)} matrices is left: exp_avg is turned back exactly; exp_avg_sq and precond "
                "are an approximation, the diagonal of what is diagonal in the basis alone"
            )
    manifest = replace(checkpoint.manifest, groups=groups, notes=[*checkpoint.manifest.notes, *notes])
    return Converted(checkpoint, manifest, computed, {key for key in checkpoint.tensors if key.state in BASIS_STATES})


def _plain(group: dict[str, Any]) -> dict[str, Any]:
    """A group's hyperparameters without a basis, in its history too: steps before that had one are as if they had none."""
    new = {**group, "basis": None}
    if HISTORY in group:
        records = [
            {k: v for k, v in r.items() if k not in ("basis", "basis_block")} for r in json.loads(group[HISTORY])
        ]
        new[HISTORY] = json.dumps(records)
    return new


def _spread(v: Read, frame: _Frame, gamma: float) -> Read:
    exponent = -2.0 / gamma if abs(gamma) >= LEAST_GAMMA else -2.0
    back = frame.back(power(v, exponent), squared=True)
    return lambda start, stop: back(start, stop).log_().mul_(-2.0 / exponent).exp_().clamp_(D_MIN, D_MAX).rsqrt_()


class _Frame:
    """The bases of a parameter.

    Raises:
        CheckpointError: one is not of the parameter's shape; naming it.
    """

    def __init__(self, checkpoint: Checkpoint, parameter: str) -> None:
        shape = checkpoint.tensors[Key(parameter, "exp_avg")].shape
        self._rows, self._columns = shape[0] if shape else 1, prod(shape[1:])
        self._checkpoint = checkpoint
        self._keys: dict[Side, Key] = {}
        for side, (state, _) in KEYS.items():
            key, n = Key(parameter, state), self._rows if side == "rows" else self._columns
            if key not in checkpoint.tensors:
                continue
            found = checkpoint.tensors[key].shape
            if len(found) != 2 or found[0] != n or not 1 <= found[1] <= n:
                raise CheckpointError(f"{parameter}: {key.state} has shape {found}, and {n} {side} are to be turned")
            self._keys[side] = key

    def back(self, read: Read, squared: bool = False) -> Read:
        """Q_L X Q_Rᵀ of the matrix that `read` gives; with squared elements of the bases, the diagonal of a turned one."""

        def whole_rows(first: int, last: int) -> Tensor:
            """Rows [first, last), float64, out of the columns' basis."""
            x = read(first * self._columns, last * self._columns).view(last - first, self._columns)
            return (
                x
                if "columns" not in self._keys
                else turn(x, self._basis("columns", 0, self._columns, squared), "columns", back=True)
            )

        def rows(first: int, last: int) -> Tensor:
            """The same, out of the rows' basis too, of which a block turns all of its own."""
            if "rows" not in self._keys:
                return whole_rows(first, last)
            block = self._checkpoint.tensors[self._keys["rows"]].shape[1]
            found = []
            for start in range(first - first % block, last, block):
                stop = min(self._rows, start + block)
                low, high = max(first, start), min(last, stop)
                found.append(self._basis("rows", low, high, squared)[:, : stop - start] @ whole_rows(start, stop))
            return torch.cat(found)

        def elements(start: int, stop: int) -> Tensor:
            """Elements [start, stop), row-major, 1-D."""
            if stop <= start:
                return torch.empty(0, dtype=torch.float64)
            first = start // self._columns
            flat = rows(first, -(-stop // self._columns)).reshape(-1)
            return flat[start - first * self._columns : stop - first * self._columns]

        return elements

    def _basis(self, side: Side, first: int, last: int, squared: bool) -> Tensor:
        """Rows [first, last) of it, float64."""
        key = self._keys[side]
        block = self._checkpoint.tensors[key].shape[1]
        q = reader(self._checkpoint, key)(first * block, last * block).view(last - first, block)
        return q.square_() if squared else q
