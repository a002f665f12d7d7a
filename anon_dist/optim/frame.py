"""The frame of a matrix: which of its sides have a basis, and the state that belongs to a basis.

A parameter of two or more dimensions is a matrix. Its first dimension makes the rows, all others together make the columns. A side that has
a basis has two states, the basis and a covariance (see `basis.py`). exp_avg, exp_avg_sq and precond are then those of the turned matrix.
Ranks that hold different rows of a matrix all have the same basis of its columns.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Container, Iterable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from anon_dist.optim import basis, update
from anon_dist.optim.basis import Side
from anon_dist.optim.rounding import EXP_AVG, PRECOND, decode_blocks, encode_blocks, salt_of, to_bfloat16_stochastically

KEYS: dict[Side, tuple[str, str]] = {
    "columns": ("basis_columns", "covariance_columns"),
    "rows": ("basis_rows", "covariance_rows"),
}
"""The states of a side that has a basis: the basis and the covariance, both (length of the side, b), b = min(basis_block, length)."""
BASIS_KEYS = tuple(key for keys in KEYS.values() for key in keys)

FORMER_KEYS = {
    "column_basis": "basis_columns",
    "column_cov": "covariance_columns",
    "row_basis": "basis_rows",
    "row_cov": "covariance_rows",
}
"""What these states were called before → what they are called. Every reader of checkpoints goes by it; written are the present keys."""

MOST_ROWS = 16
"""A matrix with more than so many rows to a column is taken for an embedding. Its rows stand for tokens, and get no basis."""

LEAST_GAMMA = 0.25
"""To turn a preconditioner is to turn σ = d^(1/γ). Where |γ| is below this, σ could be out of float64's range, and d is turned instead."""

Group = Mapping[str, Any]
T = TypeVar("T")


def present_key(key: str, beside: Container[str]) -> str:
    """What a saved state is called today; itself unless it is one of `FORMER_KEYS`.

    Args:
        beside: the keys that the same parameter's state was saved with. They tell whether it is Anon's.
    """
    present = FORMER_KEYS.get(key, key)
    return present if "precond" in beside and present not in beside else key


def with_present_keys(state: Mapping[str, T]) -> dict[str, T]:
    """A parameter's saved state, its keys as they are called today."""
    return {present_key(key, state): value for key, value in state.items()}


def sides(p: Tensor, group: Group) -> tuple[Side, ...]:
    """The sides of a parameter that have a basis."""
    return sides_of(p.shape, group)


def sides_of(shape: Sequence[int], group: Group) -> tuple[Side, ...]:
    """The same, by the parameter's whole shape."""
    wanted = group["basis"]
    if wanted is None or len(shape) < 2 or math.prod(shape) == 0:
        return ()
    rows, columns = shape[0], math.prod(shape[1:])
    found: list[Side] = []
    if wanted in ("columns", "both") and columns > 1:
        found.append("columns")
    if wanted in ("rows", "both") and 1 < rows <= MOST_ROWS * columns:
        found.append("rows")
    return tuple(found)


def length(p: Tensor, side: Side) -> int:
    """The number of columns, or of rows."""
    return length_of(p.shape, side)


def length_of(shape: Sequence[int], side: Side) -> int:
    """The same, by the parameter's whole shape."""
    return shape[0] if side == "rows" else math.prod(shape[1:])


def initial(p: Tensor, side: Side, group: Group, dtype: torch.dtype) -> dict[str, Tensor]:
    """The first states of a side: the basis is the identity, the covariance 0. They are DTensors if p is one.

    Args:
        dtype: the preconditioner's. If it is float64 these states are float64, else float32.

    Raises:
        RuntimeError: p is sharded in a way that allows no basis of this side: a block would lie on two ranks, say.
    """
    n = length(p, side)
    block_size = min(group["basis_block"], n)
    if not isinstance(p, DTensor):
        return dict(zip(KEYS[side], initial_of(n, block_size, dtype, p.device), strict=True))
    placements = _placements(p, side, group)
    own = p.to_local()
    here = own.shape[0] if side == "rows" else math.prod(own.shape[1:])
    own_bases = initial_of(here, block_size, dtype, own.device)
    whole = torch.Size((n, block_size))
    return {
        key: DTensor.from_local(x, p.device_mesh, placements, run_check=False, shape=whole, stride=(block_size, 1))
        for key, x in zip(KEYS[side], own_bases, strict=True)
    }


def initial_of(n: int, block_size: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """The first basis and covariance of a side of n elements, for a preconditioner of this dtype (see `initial`)."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return basis.identity(n, block_size, device).to(wide), torch.zeros(n, block_size, dtype=wide, device=device)


def check(p: Tensor, group: Group) -> None:
    """Refuse a basis of a parameter that is sharded in a way that allows none.

    Raises:
        RuntimeError: naming the remedy; on every rank alike.
    """
    for side in sides(p, group) if isinstance(p, DTensor) else ():
        _placements(p, side, group)  # type: ignore[arg-type]


def _placements(p: DTensor, side: Side, group: Group) -> list[Placement]:
    """How the states of a side are placed; see `initial` for what is refused."""
    placements = [_placement(p, x, side) for x in p.placements]
    check_cut(_cut(p, side, placements), group["basis_block"], lambda: _cuts(group))
    return placements


def _cut(p: DTensor, side: Side, placements: Sequence[Placement]) -> Cut:
    sizes = zip(p.device_mesh.shape, placements, strict=True)
    return Cut(tuple(p.shape), side, tuple(s for s, x in sizes if not x.is_replicate() and s > 1))


def _cuts(group: Group) -> list[Cut]:
    """How the sides of all of a group's parameters are cut, but for those that allow no basis at all."""
    found = []
    for p in group.get("params", ()):
        for side in sides(p, group) if isinstance(p, DTensor) else ():
            with suppress(RuntimeError):
                found.append(_cut(p, side, [_placement(p, x, side) for x in p.placements]))
    return found


def _placement(p: DTensor, placement: Placement, side: Side) -> Placement:
    """How the states of a side are placed in a mesh dimension in which the parameter is placed so."""
    if placement.is_replicate():
        return Replicate()
    cut = getattr(placement, "dim", None)
    if cut == 0 and not placement.is_partial():
        return placement if side == "rows" else Replicate()
    if cut == 1 and p.dim() == 2 and isinstance(placement, Shard):
        return Shard(0) if side == "columns" else Replicate()
    raise RuntimeError(
        f"Anon: basis={side!r} is not possible for a parameter of shape {tuple(p.shape)} that is placed {placement}: a matrix can be cut "
        "by its rows or its columns. Give its param group basis=None"
    )


@dataclass(frozen=True)
class Cut:
    """How a side of a parameter is cut into shards."""

    shape: tuple[int, ...]
    """Of the whole parameter."""
    side: Side
    over: tuple[int, ...]
    """Over how many ranks each mesh dimension shards the side; more than one number where shards are sharded again."""

    @property
    def ranks(self) -> int:
        return math.prod(self.over)

    @property
    def share(self) -> int:
        """The length of the largest shard."""
        return -(-length_of(self.shape, self.side) // self.ranks)

    def fits(self, basis_block: int) -> bool:
        """Whether no block lies on two ranks."""
        n = length_of(self.shape, self.side)
        even = len(self.over) == 1 or n % self.ranks == 0
        return self.ranks == 1 or (self.share % min(basis_block, n) == 0 and even)


def check_cut(cut: Cut, basis_block: int, every: Callable[[], Iterable[Cut]]) -> None:
    """Refuse blocks of a side that would lie on two ranks; on every rank alike.

    Args:
        every: gives the cuts of all parameters in the param group.

    Raises:
        RuntimeError: naming the block size that fits all of the param group.
    """
    if cut.fits(basis_block):
        return
    others = set(every()) - {cut}
    wrong = sorted(str(other.shape) for other in others if not other.fits(basis_block))
    more = f" (nor do blocks fit those of shape {', '.join(wrong[:4])}{', …' if wrong[4:] else ''})" if wrong else ""
    own = "'columns'" if cut.side == "rows" else "'rows'"
    raise RuntimeError(
        f"Anon: the {cut.side} of a parameter of shape {cut.shape} are cut into {cut.ranks} shards of {cut.share}, across the basis's "
        f"blocks of {min(basis_block, length_of(cut.shape, cut.side))}{more}: {_remedy({cut, *others}, basis_block)}, or basis={own} for "
        "its param group"
    )


def _remedy(cuts: Collection[Cut], most: int) -> str:
    """A `basis_block` that fits all of these. Blocks of 1 turn nothing, and count as none."""
    sizes = (*range(most, 1, -1), *range(most + 1, max(cut.share for cut in cuts) + 1))
    if (common := next((b for b in sizes if all(cut.fits(b) for cut in cuts)), None)) is not None:
        return f"basis_block={common} would fit" + (" all of its param group" if len(cuts) > 1 else "")
    single = {cut.shape: next((b for b in sizes if cut.fits(b)), None) for cut in sorted(cuts, key=str)}
    if none := [str(shape) for shape, size in single.items() if size is None]:
        return f"no basis_block fits {', '.join(none[:4])}{', …' if none[4:] else ''}: basis=None in a param group of their own"
    listed = ", ".join(f"{size} for {shape}" for shape, size in list(single.items())[:4])
    return f"no basis_block fits all of its param group ({listed}{', …' if len(single) > 4 else ''}): param groups of their own"


def rebase(
    p: Tensor,
    state: MutableMapping[str, Tensor],
    after: Group,
    gamma: float,
    exponents: str,
    wanted: tuple[Side, ...] | None = None,
) -> None:
    """Bring a state to the `basis` and `basis_block` of a group.

    A side that loses its basis is turned back. m is turned back exactly. d and s are only the diagonals of matrices that are not known, and
    are turned back as if these were diagonal. A side that gets a basis starts with the identity, which changes nothing.

    Args:
        after: the group as it will be.
        gamma: γ°, of the preconditioner.
        exponents: the key under which the state has the exponents of an 8-bit exp_avg.
        wanted: the sides that are to have a basis; None: those that p's shape and the group say.

    Raises:
        RuntimeError: as `initial`; the state is as it was then.
    """
    old = {side: state[keys[0]].shape[1] for side, keys in KEYS.items() if keys[0] in state}
    wanted = sides(p, after) if wanted is None else wanted
    new = {side: min(after["basis_block"], length(p, side)) for side in wanted}
    left = [side for side in old if new.get(side) != old[side]]
    added: dict[str, Tensor] = {}
    for side in new:
        if old.get(side) != new[side]:
            added |= initial(p, side, after, state["precond"].dtype)
    if new and p.dim() > 2:  # to be seen as a matrix
        state.update({key: state[key].contiguous() for key in ("exp_avg", "exp_avg_sq", "precond")})
    if left:
        moved, s = Moved(state, exponents), matrix(_local(state["exp_avg_sq"]))
        for side in left:
            q = basis.transposed(_local(state.pop(KEYS[side][0]))).double()
            moved.by(side, q, gamma)
            s.copy_(basis.turn(s.float(), q.square(), side))
            del state[KEYS[side][1]]
        moved.store(int(state["step"]), frozenset())
    state.update(added)


def cut_over(p: Tensor, side: Side) -> tuple[dist.ProcessGroup, ...]:
    """The process groups over which the side's covariance is a sum.

    The covariance of the columns is a sum over rows, so these are the groups whose ranks hold other rows; and the other way round.
    """
    if not isinstance(p, DTensor):
        return ()
    across = 0 if side == "columns" else 1
    return tuple(
        p.device_mesh.get_group(i)
        for i, (size, x) in enumerate(zip(p.device_mesh.shape, p.placements, strict=True))
        if size > 1 and not x.is_replicate() and getattr(x, "dim", None) == across
    )


def device_of(p: Tensor) -> torch.device:
    """The device of this rank's part of p."""
    return _local(p).device


# -- of local tensors ----------------------------------------------------------------------------------------------------------


def matrix(x: Tensor) -> Tensor:
    """A local tensor of two or more dimensions as a matrix."""
    return x if x.dim() == 2 else x.flatten(1)


def turn(x: Tensor, state: Mapping[str, Tensor], *, back: bool = False) -> Tensor:
    """A local matrix turned into the state's frame, or back from it; a new tensor."""
    if (columns := state.get(KEYS["columns"][0])) is not None:
        x = basis.turn(x, _local(columns), "columns", back=back, denoise=not back)
    if (rows := state.get(KEYS["rows"][0])) is not None:
        x = basis.turn(x, _local(rows), "rows", back=back, denoise=not back)
    return x


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


class Moved:
    """exp_avg and precond of a matrix on their way to another frame.

    `by` turns them, one side after the other, in float32 or more. `store` writes them to the state, rounded as a step rounds.
    """

    def __init__(self, state: MutableMapping[str, Tensor], exponents: str) -> None:
        self._m, self._v, self._exponents = _local(state["exp_avg"]), _local(state["precond"]), state.get(exponents)
        m = self._m if self._exponents is None else decode_blocks(self._m, self._exponents)
        self.m, self.v = (matrix(x).to(torch.promote_types(x.dtype, torch.float32)) for x in (m, self._v))

    def by(self, side: Side, turning: Tensor, gamma: float) -> None:
        """Turn a side by R = `turning`, (length of the side, b).

        m is turned exactly. Of v only the diagonal is known: σ = d^(1/γ), with d = v^(−2), is turned as the diagonal of a diagonal matrix,
        σ'_j = Σ_i R_ij² σ_i.
        """
        for m_i, v_i in zip(_pieces(self.m, side), _pieces(self.v, side), strict=True):
            m_i.copy_(basis.turn(m_i, turning.to(m_i.dtype), side, denoise=True))
            if gamma != 0.0:
                v_i.copy_(_spread(v_i, turning, side, gamma).clamp_(update.V_MIN, update.V_MAX))

    def store(self, step: int, stochastic: frozenset[str]) -> None:
        """Write m and v to the state, in place.

        Args:
            step: the step count, with which stochastic rounding is salted.
            stochastic: which of "m" and "v" are rounded stochastically.
        """
        salt_m, salt_v = (
            salt_of(step, x) if role in stochastic else None for role, x in (("m", EXP_AVG), ("v", PRECOND))
        )
        if self._exponents is None:
            _put(self._m, self.m, salt_m)
        else:
            codes, exponents = encode_blocks(self.m.contiguous().view(self._m.shape), salt_m)
            self._m.copy_(codes)
            self._exponents.copy_(exponents)
        _put(self._v, self.v, salt_v)


def _spread(v: Tensor, turning: Tensor, side: Side, gamma: float) -> Tensor:
    """The preconditioner of the turned σ (see `Moved.by`). It takes float64, but for γ = 1, which needs no power."""
    if gamma == 1.0:
        return basis.turn(v.square().reciprocal_(), turning.to(v.dtype).square(), side).rsqrt_()
    power = -2.0 / gamma if abs(gamma) >= LEAST_GAMMA else -2.0
    return basis.turn(v.double().log_().mul_(power).exp_(), turning.square(), side).log_().mul_(1.0 / power).exp_()


def _pieces(x: Tensor, side: Side) -> Iterator[Tensor]:
    """Views of a matrix, cut across the other side, so that turning one in float64 takes about 100 MB at most."""
    of_side, others = (1, 0) if side == "columns" else (0, 1)
    yield from x.split(max(1, update.REFRESH_ELEMENTS // max(1, x.shape[of_side])), others)


def _put(stored: Tensor, computed: Tensor, salt: int | None) -> None:
    """Copy to the stored tensor; stochastically rounded if that is bfloat16 and there is a salt."""
    if computed.data_ptr() == stored.data_ptr():
        return  # float32, changed in place
    if salt is not None and stored.dtype == torch.bfloat16:
        computed = to_bfloat16_stochastically(computed.float(), salt)
    stored.copy_(computed.reshape(stored.shape))
