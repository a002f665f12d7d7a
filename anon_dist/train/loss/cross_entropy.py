"""Cross-entropy of an output layer, a piece of the tokens at a time: logits exist for one piece, in float32, and never as a whole.

The gradient is computed with the loss, so no logits are computed twice, and summed in float32. It is that of a sum over tokens: its numbers
stay far from the ends of float16, whatever the mean divides by and the loss scale multiplies by, both of which come in the backward pass.

Tensor parallelism: where ranks hold some rows of the output matrix each, they keep their part of the vocabulary's logits, and exchange a
token's maximum, sum and target, three numbers, in place of the logits (Megatron-LM, arXiv 1909.08053, section 3).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from anon_dist.data.samples.packing import IGNORED

PIECE_BYTES = {"cpu": 4 << 20, "cuda": 256 << 20}
"""Of a piece's float32 logits, which there are two buffers of. On CPUs they should stay in the cache; on GPUs the output matrix and its
gradient are read again for each piece, which should cost little beside its arithmetic."""
FEWEST_ROWS = 128
"""Tokens of a piece, however large the vocabulary."""


def piece_rows(tokens: int, vocabulary: int, device: str) -> int:
    """Tokens of a piece: of so many on one kind of device, of a vocabulary or a rank's part of it. All pieces have about one size."""
    most = PIECE_BYTES.get(device, PIECE_BYTES["cuda"]) // (4 * max(1, vocabulary))
    count = -(-tokens // max(FEWEST_ROWS, most))
    return -(-tokens // max(1, count))


@dataclass(frozen=True)
class Head:
    """How logits are made of a = h Wᵀ + b, and what they cost."""

    scale: float = 1.0
    """They are a · scale,"""
    cap: float | None = None
    """and then cap · tanh(· / cap)."""
    z_loss: float = 0.0
    """Weight of logsumexp(logits)² beside the cross-entropy."""


@dataclass(frozen=True)
class Split:
    """Ranks of which each has some rows of the output matrix."""

    group: Any
    """Their process group."""
    first: int
    """The first row of this rank."""


def summed_loss(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, head: Head, split: Split | None = None
) -> Tensor:
    """Sums over tokens.

    Args:
        hidden: (N, H), of any float dtype; under autocast it is computed in autocast's.
        weight: (V, H), or this rank's rows of it.
        bias: (V,), or this rank's part.
        targets: (N,) int64, in [0, V) of the whole vocabulary, or `IGNORED`.
        split: the ranks that have rows each; None: the rows are all here. The gradient of `hidden` is then this rank's part of a sum.

    Returns:
        (3,) float32: cross-entropy + `head.z_loss` · z; cross-entropy; z, the sum of squared logsumexps. The first alone has a gradient,
        which can be taken once.
    """
    return _SummedLoss.apply(hidden, weight, bias, targets, head, split)  # type: ignore[no-any-return]


@torch.no_grad()
def token_losses(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, head: Head, split: Split | None = None
) -> Tensor:
    """The cross-entropy of each token, (N,) float32, without gradient; 0 where ignored. Arguments as of `summed_loss`."""
    pieces = _Pieces(hidden, weight, bias, targets, head, split)
    return torch.cat([piece.losses for piece in pieces])


class _SummedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, head: Head, split: Split | None
    ) -> Tensor:
        """See `summed_loss`. The gradients of the first sum are computed here, where pieces of the logits exist."""
        gradients = _Gradients(ctx.needs_input_grad, hidden, weight, bias)
        sums = torch.zeros(2, dtype=torch.float64, device=hidden.device)
        for piece in _Pieces(hidden, weight, bias, targets, head, split):
            sums += torch.stack([piece.losses.sum(), piece.squares.sum()])
            if any(ctx.needs_input_grad):
                gradients.add(piece)
        ctx.gradients = gradients
        total = torch.stack([sums[0] + head.z_loss * sums[1], *sums])
        return total.to(torch.promote_types(hidden.dtype, torch.float32))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Those gradients, times that of the first sum."""
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RuntimeError("the gradient of this loss has been taken before")
        return (*gradients.times(grad[0]), None, None, None)


class _Pieces:
    """The tokens, a piece at a time. A piece is good until the next one."""

    def __init__(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, head: Head, split: Split | None
    ) -> None:
        device = hidden.device.type
        half = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        # CPUs multiply in float32: many of them emulate half precision, and none returns its sums in float32.
        dtype = half if device == "cuda" else torch.promote_types(hidden.dtype, torch.float32)
        self.hidden, self.weight = hidden.detach().to(dtype), weight.detach().to(dtype)
        self.bias = None if bias is None else bias.detach()
        self.targets, self.head = targets, head
        self.group: Any = None if split is None else split.group
        self.first = 0 if split is None else split.first
        self.rows = piece_rows(len(hidden), len(weight), device)
        wide = torch.promote_types(dtype, torch.float32)
        self.buffers = torch.empty(2, self.rows, len(weight), dtype=wide, device=hidden.device)

    def __iter__(self) -> Iterator[_Piece]:
        with torch.autocast(self.hidden.device.type, enabled=False):
            for start in range(0, len(self.hidden), max(1, self.rows)):
                yield _Piece(self, slice(start, start + self.rows))


class _Piece:
    """Some tokens: their losses, (n,), and the probabilities of their vocabulary's words, or of this rank's."""

    def __init__(self, whole: _Pieces, rows: slice) -> None:
        self.whole, self.rows, self.hidden = whole, rows, whole.hidden[rows]
        targets = whole.targets[rows]
        logits, self.probabilities = whole.buffers[:, : len(targets)].unbind(0)
        _multiply(self.hidden, whole.weight.t(), logits)
        if whole.bias is not None:
            logits += whole.bias
        if whole.head.scale != 1.0:
            logits *= whole.head.scale
        if whole.head.cap is not None:
            logits.div_(whole.head.cap).tanh_().mul_(whole.head.cap)
        self.logits = logits
        self.counted = targets != IGNORED
        self.own = self.counted & (targets >= whole.first) & (targets < whole.first + len(whole.weight))
        self.columns = torch.where(self.own, targets - whole.first, 0)[:, None]
        at_target = torch.where(self.own, logits.gather(1, self.columns)[:, 0], 0.0)
        self.lse = self._softmax()
        if whole.group is not None:
            dist.all_reduce(at_target, group=whole.group)
        self.losses = torch.where(self.counted, self.lse - at_target, 0.0)
        self.squares = torch.where(self.counted, self.lse.square(), 0.0)

    def _softmax(self) -> Tensor:
        """Make the probabilities of the logits. Returns logsumexp, (n,), over the whole vocabulary."""
        logits, group = self.logits, self.whole.group
        highest = logits.amax(1)
        if group is None:
            torch.softmax(logits, 1, out=self.probabilities)
            # The most probable word has at least 1/V: its logarithm is as exact as that of a sum.
            return highest - self.probabilities.amax(1).log()
        dist.all_reduce(highest, dist.ReduceOp.MAX, group)
        torch.sub(logits, highest[:, None], out=self.probabilities).exp_()
        total = self.probabilities.sum(1)
        dist.all_reduce(total, group=group)
        self.probabilities /= total[:, None]
        return highest + total.log()

    def gradient(self) -> Tensor:
        """Of the sum, by the numbers a that logits are made of, (n, V); in place of the probabilities."""
        head, gradient = self.whole.head, self.probabilities
        if head.z_loss:
            gradient *= (1.0 + 2.0 * head.z_loss * self.lse)[:, None]
        gradient.scatter_(1, self.columns, gradient.gather(1, self.columns) - self.own[:, None].to(gradient.dtype))
        gradient *= torch.where(self.counted, head.scale, 0.0)[:, None]
        if head.cap is not None:
            gradient *= self.logits.div_(head.cap).square_().neg_().add_(1.0)
        return gradient


class _Gradients:
    """Of hidden states, weight and bias, summed over pieces; each None where it is not wanted."""

    def __init__(self, wanted: tuple[bool, ...], hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
        wide = torch.promote_types(weight.dtype, torch.float32)
        self.hidden = torch.empty_like(hidden) if wanted[0] else None
        self.weight = torch.zeros_like(weight, dtype=wide) if wanted[1] else None
        self.bias = torch.zeros_like(bias, dtype=wide) if bias is not None and wanted[2] else None
        self._dtypes = weight.dtype, None if bias is None else bias.dtype

    def add(self, piece: _Piece) -> None:
        """A piece's; its probabilities are spent."""
        gradient = piece.gradient()
        if self.bias is not None:
            self.bias += gradient.sum(0)
        narrow = gradient.to(piece.hidden.dtype)
        if self.hidden is not None:
            self.hidden[piece.rows] = narrow @ piece.whole.weight
        if self.weight is not None:
            _multiply(narrow.t(), piece.hidden, self.weight, added=True)

    def times(self, factor: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """All of them times a number, in the dtypes of what they belong to."""
        for gradient in (self.hidden, self.weight, self.bias):
            if gradient is not None:
                gradient *= factor
        weight, bias = (
            None if gradient is None else gradient.to(dtype)
            for gradient, dtype in zip((self.weight, self.bias), self._dtypes, strict=True)
        )
        return self.hidden, weight, bias


def _multiply(a: Tensor, b: Tensor, out: Tensor, added: bool = False) -> None:
    """out = a b, or with `added` out += a b. Half precision is multiplied into a float32 `out`, without rounding in between."""
    if a.dtype == out.dtype:
        torch.addmm(out, a, b, beta=float(added), out=out)
    else:
        torch.addmm(out, a, b, beta=float(added), out_dtype=out.dtype, out=out)
