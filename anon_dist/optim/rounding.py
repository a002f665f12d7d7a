"""Rounding of states and parameters that are stored in fewer bits than they are computed in.

Stochastic rounding goes up with a probability equal to the fraction that is cut off: increments much smaller than a unit of the stored
number then count in the mean, where rounding to nearest loses them all. (In bfloat16 a preconditioner whose σ^γ moves by less than
2^-7 / (1 − β3) would stand still.) Its randomness is a hash of the unrounded number, the step, and
the state's role: no generator has to be saved or kept in step between ranks, replicas cannot drift apart, and the bits do not depend on
how a parameter was cut into shards. A number that does not change meets another hash at each step.

An 8-bit exp_avg is kept in blocks of 32 elements in row-major order (of the local shard), as the microscaling formats do (OCP MX, 2023):
int8 codes and one power of two for each block, so that code · 2^e is exact in bfloat16, and encoding it again finds the same values.
"""

from __future__ import annotations

import torch
from torch import Tensor

THETA, EXP_AVG, EXP_AVG_SQ, PRECOND = range(4)
"""What is rounded: each has hashes of its own."""

BLOCK = 32
"""Elements that share a scale in 8 bits."""
EXPONENT_BIAS = 133
"""A block's scale is 2^(stored exponent − bias); stored as uint8, at most 254."""
NOT_A_NUMBER = -128
"""The code of what is not finite; the others are −127 … 127."""

GOLDEN = 0x9E3779B1


def salt_of(step: int, role: int) -> int:
    """The 32 bits that make the hashes of a step and role differ from another's."""
    return ((4 * step + role + 1) * GOLDEN) & 0xFFFFFFFF


def hashed(bits: Tensor, salt: int) -> Tensor:
    """A well-mixed 32-bit hash of int32 bit patterns ("lowbias32", Wellons 2018), as int32."""
    h = bits ^ _signed(salt)
    h = (h ^ _shifted_right(h, 16)) * _signed(0x7FEB352D)
    h = (h ^ _shifted_right(h, 15)) * _signed(0x846CA68B)
    return h ^ _shifted_right(h, 16)


def to_bfloat16_stochastically(x: Tensor, salt: int) -> Tensor:
    """float32 x to one of the two nearest bfloat16, the nearer the likelier; what is not finite stays what it is."""
    bits = x.contiguous().view(torch.int32)
    rounded = ((bits + (hashed(bits, salt) & 0xFFFF)) & -0x10000).view(torch.float32)
    return torch.where(x.isfinite(), rounded.view(x.shape), x).to(torch.bfloat16)


def encode_blocks(x: Tensor, salt: int | None = None) -> tuple[Tensor, Tensor]:
    """float32 x as (int8 codes of x's shape, uint8 exponents of its blocks).

    Args:
        salt: rounds stochastically; None: to the nearest.
    """
    flat = x.reshape(-1)
    blocks = torch.nn.functional.pad(flat, (0, -flat.numel() % BLOCK)).view(-1, BLOCK)
    finite = blocks.isfinite()
    largest = torch.where(finite, blocks.abs(), 0.0).amax(1).view(torch.int32)
    # the smallest e with largest ≤ 127 · 2^e: 127 / 64 has the mantissa 0x7E0000
    exponents = ((largest + 0x1FFFF) >> 23).clamp_(max=254)
    scaled = _times_power_of_two(blocks, EXPONENT_BIAS - exponents)
    if salt is None:
        scaled.round_()
    else:
        bits = hashed(blocks.contiguous().view(torch.int32), salt)
        scaled.add_(_shifted_right(bits, 16).to(torch.float32), alpha=2.0**-16).floor_()
    codes = torch.where(finite, scaled.clamp_(-127.0, 127.0), float(NOT_A_NUMBER)).to(torch.int8)
    return codes.view(-1)[: flat.numel()].view(x.shape), exponents.to(torch.uint8)


def decode_blocks(codes: Tensor, exponents: Tensor) -> Tensor:
    """What `encode_blocks` gave, as float32; a bfloat16 holds it exactly."""
    flat = codes.reshape(-1)
    blocks = torch.nn.functional.pad(flat, (0, -flat.numel() % BLOCK)).view(-1, BLOCK)
    values = _times_power_of_two(blocks.to(torch.float32), exponents.to(torch.int32) - EXPONENT_BIAS)
    values.masked_fill_(blocks == NOT_A_NUMBER, torch.nan)
    return values.view(-1)[: flat.numel()].view(codes.shape)


def exponents_for(x: Tensor) -> Tensor:
    """Exponents of the blocks of a tensor of x's length that is all zero."""
    return torch.zeros(-(-x.numel() // BLOCK), dtype=torch.uint8, device=x.device)


def _times_power_of_two(blocks: Tensor, exponents: Tensor) -> Tensor:
    """blocks[i] · 2^exponents[i]; two factors, since float32 does not hold 2^133."""
    half = exponents >> 1
    return blocks * _power_of_two(half) * _power_of_two(exponents - half)


def _power_of_two(exponents: Tensor) -> Tensor:
    return ((exponents + 127) << 23).view(torch.float32).unsqueeze(1)


def _shifted_right(bits: Tensor, by: int) -> Tensor:
    """Zeros come in from the left, as for unsigned integers, which torch has few operations for."""
    return (bits >> by) & ((1 << (32 - by)) - 1)


def _signed(word: int) -> int:
    return word - (1 << 32) if word >= 1 << 31 else word
