"""Orthogonal bases of matrices, in blocks: to turn a matrix into one, and to renew it.

A side of n elements is cut into blocks of b; the last one may be smaller, and b is its own size there. Each block has an orthogonal b × b
matrix Q. The *basis* of the side is a tensor (n, b) of these matrices, one below the other; columns that a smaller last block does not have
are 0. The covariances C and the rotations R are laid out in the same way. Every function here treats each block for itself, so a side may
be sharded between any two blocks.

For the columns of a matrix; for rows all is transposed. g is the gradient, m the momentum (exp_avg), ' means turned. At first Q is the
identity and C is 0. In every step:

    g' = g Q                                         turn, then denoise; m', s and v are made of g', element by element
    u = u' Qᵀ                                        turn back: the update, not denoised

and after a step that refreshes:

    y = Λ^(−1/2) m', Λ = λ / mean λ + δ              whitened: where the rows have a basis too, λ = diag(C) of these; else y = m'
    C ← κ C + (1 − κ) b yᵀy / tr(yᵀy)                rotation: mix the covariance of the side, in the basis, into the mean C
    R = qr(C + δ tr(C)/b)                            rotation: a step of orthogonal iteration; the diagonal of qr's triangle is positive
    Q ← Q R,  C ← Rᵀ C R                             renew, in float64
    m' ← m' R                                        then denoise; v is turned too, see `turned.py`

- κ = min(β3, 0.8): directions change sooner than sizes do, so C is a mean of some five refreshes where the preconditioner is one of more.
- κ is 0 at the first refresh, and wherever a refresh keeps nothing of the old preconditioner (γ has left 0, say): C is the latest alone.
- δ is 1e-3. mean λ is that of the block. δ is added to the ratio, which is 1 in a block whose C is 0.
- Denoise: an element is made 0 if it is below 8 ε of the norm of its vector, a row's part in one block; ε = 2^-23 in float32.
- Of two sides the columns are turned first, and denoised, then the rows.
- A block whose yᵀy is 0 or not finite stays as it is: R is the identity there.

After some steps C is nearly diagonal, largest first, and Q holds its eigenvectors (SOAP, arXiv 2409.11321, does the same). C is kept in the
basis, and not in the coordinates of m: then small eigenvalues are as exact as large ones. δ leaves directions in which nothing moves
as they are. Where both sides have a basis, each is made of a matrix that the other side has whitened: else a few strong rows would say
alone what the columns' basis is. It is the estimate that minimises the Kullback-Leibler divergence (KL-SOAP, arXiv 2509.03378).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor

RIDGE = 1e-3
"""δ, which is added to eigenvalues, as a share of their mean in a block."""

MOST_KEPT = 0.8
"""The largest weight of the old C at a refresh: κ = min(β3, 0.8)."""

Side = Literal["columns", "rows"]

NOISE = 8.0
"""An element of a product is taken for rounding if it is below so many units of rounding of the norm of its vector, within a block. The
rounding of a sum of a hundred products is about 2 units."""
LEAST_ORTHOGONAL = 1e-3
"""A basis is damaged where the norm of QᵀQ − I is larger than this in a block. Rounding to float32 leaves about 1e-5 at b = 1,024."""
SILENCED_AT_ONCE = 1 << 14
"""Elements, on a CPU: they stay in its caches."""


def identity(n: int, block_size: int, device: torch.device | str | None = None) -> Tensor:
    """The basis whose blocks are identity matrices; float32 (n, b)."""
    rows = torch.arange(n, device=device)
    return (rows.unsqueeze(1) % block_size == torch.arange(block_size, device=device)).float()


def squares(blocked: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """The blocks of an (n, b) tensor: the k whole ones as a view (k, b, b), then a smaller last one as a view (1, r, r). Each comes with
    the part of the side that it belongs to."""
    n, block_size = blocked.shape
    whole = n - n % block_size
    if whole:
        yield slice(0, whole), blocked[:whole].view(-1, block_size, block_size)
    if rest := n - whole:
        yield slice(whole, n), blocked[whole:, :rest].unsqueeze(0)


def transposed(blocked: Tensor) -> Tensor:
    """A new tensor with each block transposed."""
    found = torch.zeros_like(blocked)
    for (_, block), (_, out) in zip(squares(blocked), squares(found), strict=True):
        out.copy_(block.mT)
    return found


def turn(x: Tensor, basis: Tensor, side: Side, *, back: bool = False, denoise: bool = False) -> Tensor:
    """An m × n matrix turned: x Q if the basis is of its columns, Qᵀ x if it is of its rows. A new tensor of x's dtype.

    Args:
        back: the inverse, x Qᵀ or Q x.
        denoise: make elements 0 that are no larger than the product's rounding. In a direction without gradient (a layer norm's output has
            one) there is nothing else, and the optimizer would divide it by its own size and move by noise.
    """
    turned = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    for where, q in squares(basis.to(x.dtype)):
        source, target = blocks(x, side, where, len(q)), blocks(turned, side, where, len(q))
        if side == "columns":
            torch.bmm(source, q.mT if back else q, out=target)
        else:
            torch.bmm(q if back else q.mT, source, out=target)
        if denoise:
            _silence(target, side)
    return turned


def _silence(product: Tensor, side: Side) -> None:
    """Make elements 0 that are rounding alone (see `NOISE`), in place.

    On a CPU the vectors that may have such elements are found first: usually they are few, and of the others no element is compared.
    """
    vectors = product if side == "columns" else product.mT  # (count, vectors, b)
    if product.device.type != "cpu":
        _silence_all(vectors)
        return
    many = max(1, SILENCED_AT_ONCE // max(1, vectors.shape[2]))
    chosen = _may_have_noise(vectors, many)
    if int(chosen.count_nonzero()) * 8 < chosen.numel():
        few = vectors[chosen]
        _silence_all(few)
        vectors[chosen] = few
        return
    for part in _parts(vectors, many):
        _silence_all(part)


def _silence_all(vectors: Tensor) -> None:
    noise = torch.linalg.vector_norm(vectors, dim=-1, keepdim=True).mul_(NOISE * torch.finfo(vectors.dtype).eps)
    vectors.masked_fill_(vectors.abs() < noise, 0.0)  # infinities stay


def _may_have_noise(vectors: Tensor, many: int) -> Tensor:
    """Which vectors `_silence_all` may change, (count, vectors); by squares, with a factor of 2 for their rounding."""
    least, total = (torch.empty(vectors.shape[:2], dtype=vectors.dtype) for _ in range(2))
    for part, smallest, sums in zip(*(_parts(x, many) for x in (vectors, least, total)), strict=True):
        squares = part * part
        torch.amin(squares, -1, out=smallest)
        torch.sum(squares, -1, out=sums)
    return least.mul_(0.5 / (NOISE * torch.finfo(vectors.dtype).eps) ** 2) < total


def _parts(x: Tensor, many: int) -> Iterator[Tensor]:
    """So many vectors at once: they stay in a CPU's caches."""
    for of_block in x:
        yield from of_block.split(many)


def blocks(x: Tensor, side: Side, where: slice, count: int) -> Tensor:
    """A part of an m × n matrix, cut into `count` blocks of a side: a view (count, m, b) of columns, (count, b, n) of rows.

    Args:
        where: the columns, or rows, of the part.
    """
    view: Tensor = (
        x[:, where].unflatten(1, (count, -1)).transpose(0, 1)
        if side == "columns"
        else x[where].unflatten(0, (count, -1))
    )
    return view


def covariance(x: Tensor, block_size: int, side: Side) -> Tensor:
    """The blocks on the diagonal of xᵀx, for the columns of x, or of x xᵀ, for its rows: (length of the side, b), in x's dtype."""
    found = x.new_zeros(x.shape[1 if side == "columns" else 0], block_size)
    for where, c in squares(found):
        part = blocks(x, side, where, len(c))
        torch.bmm(*((part.mT, part) if side == "columns" else (part, part.mT)), out=c)
    return found


def whitened(x: Tensor, mean: Tensor, side: Side) -> Tensor:
    """An m × n matrix, turned, with each direction of a side divided by √Λ, Λ = λ / mean λ + δ; mean λ is of its block. A new tensor.

    Args:
        mean: C of that side; λ is its diagonal. λ / mean λ is 1 in a block whose C is 0.
    """
    scales = torch.ones(mean.shape[0], dtype=torch.float64, device=mean.device)
    for where, c in squares(mean):
        eigenvalues = c.diagonal(dim1=-2, dim2=-1).double()
        average = eigenvalues.mean(-1, keepdim=True)
        ratios = torch.where(average > 0.0, eigenvalues / average.clamp_min(torch.finfo(c.dtype).tiny), 1.0)
        scales[where] = ratios.add_(RIDGE).rsqrt_().flatten()
    scales = scales.to(x.dtype)
    return x * (scales if side == "columns" else scales.unsqueeze(1))


def rotation(mean: Tensor, latest: Tensor, keep: float) -> tuple[Tensor, Tensor]:
    """Mix the momentum's covariance into C, and find the rotation R by which the basis moves.

    Where the momentum's covariance is 0 or not finite in a block, C stays as it is there and R is the identity.

    Args:
        mean: C.
        latest: x'ᵀx', as `covariance` gives it.
        keep: β3; C's weight is `MOST_KEPT` at most.

    Returns:
        R, and the new C in the basis that R makes; both (n, b) float64.
    """
    keep = min(keep, MOST_KEPT)
    turning, turned = torch.zeros_like(mean, dtype=torch.float64), torch.zeros_like(mean, dtype=torch.float64)
    parts = (squares(x) for x in (mean.double(), latest.double(), turning, turned))
    for (_, old), (_, new), (_, r), (_, c) in zip(*parts, strict=True):
        trace = _mean_eigenvalue(new)
        usable = (trace > 0.0) & torch.isfinite(trace)
        mixed = torch.where(usable, keep * old + (1.0 - keep) * new / torch.where(usable, trace, 1.0), old)
        trace = _mean_eigenvalue(mixed)
        identity_block = torch.eye(old.shape[-1], dtype=torch.float64, device=old.device)
        regularised = mixed + torch.where(trace > 0.0, RIDGE * trace, 1.0) * identity_block
        q = torch.where(usable, _orthogonal(regularised), identity_block)
        r.copy_(q)
        c.copy_(q.mT @ mixed @ q)
    return turning, turned


def renewed(basis: Tensor, turning: Tensor) -> Tensor:
    """Q R, made orthogonal again; float64 (n, b)."""
    product = torch.zeros_like(turning)
    for (_, q), (_, r), (_, out) in zip(squares(basis.double()), squares(turning), squares(product), strict=True):
        x = q @ r
        # A step of Newton's: Q was rounded to float32, to 1e-7; this leaves the square of that.
        out.copy_(1.5 * x - 0.5 * x @ (x.mT @ x))
    return product


def is_basis(blocked: Tensor) -> Tensor:
    """Whether each block is orthogonal, and 0 where a smaller last block has no columns; a 0-dim bool on the tensor's device."""
    fine = _padding(blocked).count_nonzero() == 0
    with true_float32(blocked.device):
        for _, q in squares(blocked):
            error = q.mT @ q - torch.eye(q.shape[-1], dtype=q.dtype, device=q.device)
            fine &= (torch.linalg.vector_norm(error, dim=(-2, -1)) <= LEAST_ORTHOGONAL).all()  # not so for NaN
    return fine


def is_covariance(blocked: Tensor) -> Tensor:
    """Whether all is finite, no diagonal is negative, and it is 0 where a smaller last block has no columns; a 0-dim bool.

    Where there are fewer momentum vectors than directions, rounding leaves eigenvalues just below 0. What δ outweighs is fine.
    """
    fine = blocked.isfinite().all() & (_padding(blocked).count_nonzero() == 0)
    for _, c in squares(blocked):
        fine &= (c.diagonal(dim1=-2, dim2=-1) >= -RIDGE * _mean_eigenvalue(c)[..., 0]).all()
    return fine


def _padding(blocked: Tensor) -> Tensor:
    """The columns that a smaller last block does not have; a view."""
    n, block_size = blocked.shape
    rest = n % block_size
    return blocked[n - rest :, rest:]


def _mean_eigenvalue(c: Tensor) -> Tensor:
    return c.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]


def _orthogonal(a: Tensor) -> Tensor:
    """Q of the QR factorisation of each block, with a positive diagonal of the triangle."""
    if a.is_cuda:
        return by_cholesky(a)
    q, r = torch.linalg.qr(a)
    signed: Tensor = q * torch.where(r.diagonal(dim1=-2, dim2=-1) < 0.0, -1.0, 1.0).unsqueeze(-2)
    return signed


def by_cholesky(a: Tensor) -> Tensor:
    """What `_orthogonal` gives, by Cholesky's factorisation of aᵀa: it is made of products, which are fast on a GPU.

    The blocks are float64, and δ keeps them from being singular. aᵀa squares the condition number, so the result is only nearly orthogonal;
    a second pass makes it so (Yamamoto et al. 2015, "Roundoff error analysis of the CholeskyQR2 algorithm").
    """
    a = a / torch.linalg.vector_norm(a, dim=-2, keepdim=True)
    for _ in range(2):
        triangle, _info = torch.linalg.cholesky_ex(a.mT @ a)
        a = torch.linalg.solve_triangular(triangle, a.mT, upper=False).mT
    return a


@contextmanager
def true_float32(device: torch.device) -> Iterator[None]:
    """Within it products of float32 matrices on this device have float32's precision, whatever precision was set elsewhere.

    With TF32 or bfloat16 products, a basis keeps turning where gradients are large (NVIDIA's emerging-optimizers, "SOAP").
    """
    # Only this device's: a step on the host may run beside a forward pass on a GPU.
    matmul: Any = torch.backends.cuda.matmul if device.type == "cuda" else torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = matmul.fp32_precision
    try:
        matmul.fp32_precision = "ieee"
        yield
    finally:
        matmul.fp32_precision = before
