"""Orthogonal bases of matrices, in blocks: to turn a matrix into one, and to renew it.

A side of n elements is cut into blocks of b, the last of which may be smaller. A *basis* of it is a tensor (n, b): row j has the row of j's
block, an orthogonal matrix Q, and zeros where a smaller block has no columns. Everything here is of one block after the other, so that a
side may be cut between any two of them.

    x' = x Q                                         turn: the columns of an m × n matrix
    C ← β3 C + (1 − β3) b x'ᵀx' / tr(x'ᵀx')          mix: the covariance of the side, in the basis
    R = qr(C + δ tr(C)/b)                            rotation: a step of orthogonal iteration; the diagonal of qr's triangle is positive
    Q ← Q R,  C ← Rᵀ C R,  x' ← x' R                 renew, in float64

After some steps C is nearly diagonal, largest first, and Q holds its eigenvectors (SOAP, arXiv 2409.11321, does the same). C is kept in the
basis, and not where x lives: then small eigenvalues are as exact as large ones. δ keeps directions in which nothing moves where they are.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor

RIDGE = 1e-3
"""δ, of the mean eigenvalue."""


Side = Literal["columns", "rows"]

NOISE = 8.0
"""An element below so many units of rounding of its vector's norm in a block is noise: a sum of a hundred products is good to about 2."""
SILENCED_AT_ONCE = 1 << 14


def identity(n: int, block: int, device: torch.device | str | None = None) -> Tensor:
    """The basis in which nothing is turned; float32 (n, block)."""
    rows = torch.arange(n, device=device)
    return (rows.unsqueeze(1) % block == torch.arange(block, device=device)).float()


def squares(blocked: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Of an (n, b) tensor the blocks (k, b, b), and the rest (1, r, r): views, each with the rows of the side that it is of."""
    n, block = blocked.shape
    whole = n - n % block
    if whole:
        yield slice(0, whole), blocked[:whole].view(-1, block, block)
    if rest := n - whole:
        yield slice(whole, n), blocked[whole:, :rest].unsqueeze(0)


def transposed(blocked: Tensor) -> Tensor:
    """Each block transposed; new."""
    found = torch.zeros_like(blocked)
    for (_, block), (_, out) in zip(squares(blocked), squares(found), strict=True):
        out.copy_(block.mT)
    return found


def turn(x: Tensor, basis: Tensor, side: Side, *, back: bool = False, denoise: bool = False) -> Tensor:
    """Of an m × n matrix x Q, a basis of its columns, or Qᵀ x, one of its rows; back, x Qᵀ or Q x. New, in x's dtype.

    Args:
        denoise: make 0 what is no more than the product's rounding. The optimizer would otherwise divide it by its own size, and move by
            noise in directions in which there is no gradient (a layer norm's output has one).
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
    """0 where an element is rounding of its vector's; in pieces that stay in a CPU's caches."""
    of_vector, others = (2, 1) if side == "columns" else (1, 2)
    unit = torch.finfo(product.dtype).eps
    length = max(1, SILENCED_AT_ONCE // max(1, product.shape[of_vector])) if product.device.type == "cpu" else 1 << 30
    for block in product.unbind() if product.device.type == "cpu" else [product]:
        for piece in block.split(length, others - 1) if block.dim() == 2 else [block]:
            noise = torch.linalg.vector_norm(piece, dim=of_vector - product.dim(), keepdim=True).mul_(NOISE * unit)
            piece.masked_fill_(piece.abs() <= noise, 0.0)


def blocks(x: Tensor, side: Side, where: slice, count: int) -> Tensor:
    """A view of the blocks of a matrix's side: (count, m, b) of its columns, (count, b, n) of its rows."""
    view: Tensor = (
        x[:, where].unflatten(1, (count, -1)).transpose(0, 1)
        if side == "columns"
        else x[where].unflatten(0, (count, -1))
    )
    return view


def covariance(x: Tensor, block: int, side: Side) -> Tensor:
    """xᵀx, or of rows x xᵀ, of an m × n matrix, in blocks: (length of the side, block), in x's dtype."""
    found = x.new_zeros(x.shape[1 if side == "columns" else 0], block)
    for where, c in squares(found):
        part = blocks(x, side, where, len(c))
        torch.bmm(*((part.mT, part) if side == "columns" else (part, part.mT)), out=c)
    return found


def rotation(mean: Tensor, fresh: Tensor, keep: float) -> tuple[Tensor, Tensor]:
    """R, and the mean covariance with `fresh` in it, turned by R: both (n, b) float64.

    A block of which nothing is known, or whose covariance is not finite, stays as it is.

    Args:
        mean, fresh: C of the steps before, and x'ᵀx' of this one, as `covariance` has it.
        keep: β3, the weight of the mean.
    """
    turning, turned = torch.zeros_like(mean, dtype=torch.float64), torch.zeros_like(mean, dtype=torch.float64)
    parts = (squares(x) for x in (mean.double(), fresh.double(), turning, turned))
    for (_, old), (_, new), (_, r), (_, c) in zip(*parts, strict=True):
        trace = _mean_eigenvalue(new)
        usable = (trace > 0.0) & torch.isfinite(trace)
        mixed = torch.where(usable, keep * old + (1.0 - keep) * new / torch.where(usable, trace, 1.0), old)
        trace = _mean_eigenvalue(mixed)
        identity_block = torch.eye(old.shape[-1], dtype=torch.float64, device=old.device)
        known = mixed + torch.where(trace > 0.0, RIDGE * trace, 1.0) * identity_block
        q = torch.where(usable, _orthogonal(known), identity_block)
        r.copy_(q)
        c.copy_(q.mT @ mixed @ q)
    return turning, turned


def renewed(basis: Tensor, turning: Tensor) -> Tensor:
    """Q R, brought back to orthogonality; float64 (n, b)."""
    product = torch.zeros_like(turning)
    for (_, q), (_, r), (_, out) in zip(squares(basis.double()), squares(turning), squares(product), strict=True):
        x = q @ r
        out.copy_(
            1.5 * x - 0.5 * x @ (x.mT @ x)
        )  # a step of Newton's: float32's rounding was 1e-7, this leaves its square
    return product


def _mean_eigenvalue(c: Tensor) -> Tensor:
    return c.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]


def _orthogonal(a: Tensor) -> Tensor:
    """Q of a = Q R with a positive diagonal of R."""
    if a.is_cuda:
        return by_cholesky(a)
    q, r = torch.linalg.qr(a)
    signed: Tensor = q * torch.where(r.diagonal(dim1=-2, dim2=-1) < 0.0, -1.0, 1.0).unsqueeze(-2)
    return signed


def by_cholesky(a: Tensor) -> Tensor:
    """The same, of float64 blocks that δ keeps from being singular: products, which a GPU is quick at. Twice, since the first time squares
    the condition number (Yamamoto et al. 2015, "Roundoff error analysis of the CholeskyQR2 algorithm")."""
    a = a / torch.linalg.vector_norm(a, dim=-2, keepdim=True)
    for _ in range(2):
        triangle, _info = torch.linalg.cholesky_ex(a.mT @ a)
        a = torch.linalg.solve_triangular(triangle, a.mT, upper=False).mT
    return a


@contextmanager
def true_float32(device: torch.device) -> Iterator[None]:
    """A block in which products of this device's float32 matrices are not rounded to TF32 or bfloat16, whatever was asked for elsewhere.

    A basis whose products are cut off spins where gradients are large (NVIDIA's emerging-optimizers, "SOAP").
    """
    # Only this device's: a step on the host may run beside a forward pass on a GPU.
    matmul: Any = torch.backends.cuda.matmul if device.type == "cuda" else torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = matmul.fp32_precision
    try:
        matmul.fp32_precision = "ieee"
        yield
    finally:
        matmul.fp32_precision = before
