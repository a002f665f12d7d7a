"""One Anon step of many tensors on a GPU, in Triton. `gpu.py` launches it; importing this module needs triton.

It gives the bits of the CPU kernel `anon.c`. The arithmetic is the same, operation by operation: the momentum and the parameter are
computed in float32; a refresh in float64, with the same polynomials for logarithm and exponential; each operation is rounded as IEEE 754
says. It must be launched with `enable_fp_fusion=False`, which keeps LLVM and ptxas from making one operation of a product and a sum.
Conversions to bfloat16 are written in integers, since Triton's interpreter, in which the tests run this, does not round as the hardware.
"""

import triton
import triton.language as tl

from anon_dist.optim import rounding
from anon_dist.optim.backends.gpu_layout import ROW as ROW_LENGTH
from anon_dist.optim.backends.gpu_layout import TILE as TILE_LENGTH
from anon_dist.optim.backends.gpu_layout import VALUES
from anon_dist.optim.plan import Variant

PLAIN, ACCUMULATE, REFRESH = (tl.constexpr(int(variant)) for variant in Variant)
ROW, TILE, WIDTH = tl.constexpr(ROW_LENGTH), tl.constexpr(TILE_LENGTH), tl.constexpr(len(VALUES))
# the columns of a plan's row
(
    LR,
    WEIGHT_DECAY,
    DEBIAS_M,
    KEEP_M,
    ADD_M,
    KEEP_S,
    ADD_S,
    DEBIAS_S,
    KEEP_D,
    GAMMA,
    EPS,
    BOUND,
    SILENT,
    STEP,
    GAMMA_RATIO,
    NESTEROV,
    CAUTIOUS,
) = (tl.constexpr(i) for i in range(len(VALUES)))

THETA, EXP_AVG, EXP_AVG_SQ, PRECOND = (
    tl.constexpr(r) for r in (rounding.THETA, rounding.EXP_AVG, rounding.EXP_AVG_SQ, rounding.PRECOND)
)
SHARED = tl.constexpr(rounding.BLOCK)  # elements that share a scale
EXPONENT_BIAS, NOT_A_NUMBER = tl.constexpr(rounding.EXPONENT_BIAS), tl.constexpr(rounding.NOT_A_NUMBER)
GOLDEN = tl.constexpr(rounding.GOLDEN)

NAN, INFINITY, LARGEST = (
    tl.constexpr(float("nan")),
    tl.constexpr(float("inf")),
    tl.constexpr((2.0 - 2.0**-52) * 2.0**1023),
)
TINY, UP = tl.constexpr(2.0**-1000), tl.constexpr(2.0**54)
D_MIN, D_MAX = tl.constexpr(2.0**-126), tl.constexpr(2.0**127)  # as in update.py
V_MIN, V_MAX = tl.constexpr(2.0**-63.5), tl.constexpr(2.0**63)
LN2, LOG2_E = tl.constexpr(float.fromhex("0x1.62e42fefa39efp-1")), tl.constexpr(float.fromhex("0x1.71547652b82fep0"))
LN2_HIGH, LN2_LOW = tl.constexpr(float.fromhex("0x1.62e42feep-1")), tl.constexpr(float.fromhex("0x1.a39ef35793c76p-33"))
MAGNITUDE_BITS, HALF_BIT = tl.constexpr((1 << 63) - 1), tl.constexpr(1 << 51)
MOST_EXPONENT = tl.constexpr(126)  # as in cpu.py
ONE_BITS, SQRT_HALF_BITS = tl.constexpr(0x3FF0000000000000), tl.constexpr(0x3FE6A09E667F3BCD)
TWO_52, TWO_52_BITS = tl.constexpr(2.0**52), tl.constexpr(0x4330000000000000)
TO_INTEGER, TO_INTEGER_32 = tl.constexpr(1.5 * 2.0**52), tl.constexpr(1.5 * 2.0**23)  # adding and taking away rounds


@triton.jit
def step(
    table,  # int64 [parameters, ROW]: see gpu_layout.ROW
    chunks,  # int32 [programs, 2]: the parameter, and which of its runs of TILE elements
    steps,  # float64 [different plans, WIDTH]: see gpu_layout.VALUES
    lr,  # one number of any floating dtype; read if LR_APART, else the plan's is taken
    grad_scale,  # one number: gradients are divided by it
    found_inf,  # one number: if it is not 0, nothing is written
    VARIANT: tl.constexpr,
    TYPES: tl.constexpr,  # of θ, g, m, s, v
    STOCHASTIC: tl.constexpr,  # whether θ, m, s, v are rounded stochastically
    LR_APART: tl.constexpr,
):
    """Step a program's run of TILE elements of one parameter, in place."""
    chunk = chunks + 2 * tl.program_id(0)
    row = table + ROW * tl.load(chunk)
    start = tl.load(chunk + 1).to(tl.int64) * TILE
    length, aligned = tl.load(row + 6), tl.load(row + 7)
    values = steps + WIDTH * tl.load(row + 8)
    if LR_APART:
        rate = tl.load(lr).to(tl.float64)
    else:
        rate = tl.load(values + LR)
    pre, inverse = _divided(tl.load(grad_scale).to(tl.float64))
    if tl.load(found_inf) == 0.0:
        # Without a mask and with known alignment a thread moves 16 bytes at once. The arithmetic is the same.
        if (aligned != 0) & (start + TILE <= length):
            _tile(row, start, length, values, rate, pre, inverse, VARIANT, TYPES, STOCHASTIC, True)
        else:
            _tile(row, start, length, values, rate, pre, inverse, VARIANT, TYPES, STOCHASTIC, False)


@triton.jit
def _tile(
    row,
    start,
    length,
    values,
    rate,
    pre,
    inverse,
    VARIANT: tl.constexpr,
    TYPES: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    WHOLE: tl.constexpr,
):
    theta_at, g_at, m_at, s_at, v_at = (
        tl.load(row),
        tl.load(row + 1),
        tl.load(row + 2),
        tl.load(row + 3),
        tl.load(row + 4),
    )
    exponents_at = tl.load(row + 5)
    theta = _opened(theta_at, start, length, TYPES[0], WHOLE)
    g = _opened(g_at, start, length, TYPES[1], WHOLE)
    if TYPES[2] == tl.int8:
        m = _decoded(m_at, exponents_at, start, length, WHOLE)
    else:
        m = _opened(m_at, start, length, TYPES[2], WHOLE)
    v = _opened(v_at, start, length, TYPES[4], WHOLE)

    add_m, add_s = tl.load(values + ADD_M) * inverse, tl.load(values + ADD_S) * (inverse * inverse)
    scaled = g * pre.to(tl.float32)
    if VARIANT != PLAIN:
        s = _opened(s_at, start, length, TYPES[3], WHOLE)
        if VARIANT == REFRESH:
            v = _refreshed(v, s, g.to(tl.float64) * pre, add_s, values)
            s = tl.zeros_like(s)
        else:
            s = _float32(values + KEEP_S) * s + add_s.to(tl.float32) * (scaled * scaled)
    m = _float32(values + KEEP_M) * m + add_m.to(tl.float32) * scaled
    decay = (1.0 - rate * tl.load(values + WEIGHT_DECAY)).to(tl.float32)
    scale = (rate / tl.load(values + DEBIAS_M)).to(tl.float32)
    bound = _float32(values + BOUND)
    ahead = _float32(values + KEEP_M) * m + add_m.to(tl.float32) * scaled
    moving = tl.where(tl.load(values + NESTEROV) != 0.0, ahead, m)
    update = _clamped(v * tl.where(tl.abs(m) < INFINITY, moving, NAN), -bound, bound)
    decay_against = tl.where(tl.load(values + CAUTIOUS) != 0.0, 1.0, decay)
    theta = tl.where(update * theta < 0.0, decay_against, decay) * theta - scale * update

    # Stores come last: the compiler moves no load across a store.
    first = 4 * tl.load(values + STEP).to(tl.int64) + 1
    _close(theta_at, start, length, theta, _salt(first, THETA), TYPES[0], STOCHASTIC[0], WHOLE)
    if TYPES[2] == tl.int8:
        _encode(m_at, exponents_at, start, length, m, _salt(first, EXP_AVG), STOCHASTIC[1], WHOLE)
    else:
        _close(m_at, start, length, m, _salt(first, EXP_AVG), TYPES[2], STOCHASTIC[1], WHOLE)
    if VARIANT != PLAIN:
        _close(s_at, start, length, s, _salt(first, EXP_AVG_SQ), TYPES[3], STOCHASTIC[2], WHOLE)
    if VARIANT == REFRESH:
        _close(v_at, start, length, v, _salt(first, PRECOND), TYPES[4], STOCHASTIC[3], WHOLE)


@triton.jit
def _divided(scale):
    """A division by a float64 as two products, with a power of two and with a number near 1: `_divided` of cpu.py."""
    bits = scale.to(tl.int64, bitcast=True) & MAGNITUDE_BITS
    exponent = ((bits + HALF_BIT) >> 52) - 1023  # to the nearest
    exponent = tl.minimum(tl.maximum(exponent, -MOST_EXPONENT), MOST_EXPONENT)
    pre = ((1023 - exponent) << 52).to(tl.float64, bitcast=True)
    return pre, 1.0 / (scale * pre)


@triton.jit
def _float32(value):
    return tl.load(value).to(tl.float32)


@triton.jit
def _clamped(x, low, high):
    """x in [low, high]; NaN stays."""
    x = tl.where(x > high, high, x)
    return tl.where(x < low, low, x)


# -- double precision ------------------------------------------------------------------------------------------------


@triton.jit
def _refreshed(v, s, g, add_s, values):
    """The new preconditioner, float32, of the old one v, of s and of g, which is float64."""
    gamma, keep, ratio = tl.load(values + GAMMA), tl.load(values + KEEP_D), tl.load(values + GAMMA_RATIO)
    wide_v = v.to(tl.float64)
    total = tl.load(values + KEEP_S) * s.to(tl.float64) + add_s * (g * g)
    d = total * (1.0 / tl.load(values + DEBIAS_S)) + tl.load(values + EPS)
    if gamma != 1.0:  # for gamma = 1, sigma^gamma is sigma itself
        log_power = tl.where(d > 0.0, gamma * _natural_log(d), NAN)
        no_power = tl.where(gamma == 0.0, 1.0, NAN).to(tl.float64)  # sigma^gamma where sigma is no positive number
        d = tl.where(log_power == log_power, _exponential(_clamped(log_power, -100.0, 100.0)), no_power)
    no_old = tl.where(keep == 0.0, 1.0, NAN).to(tl.float64)  # in place of a v that is no positive number
    old = tl.where(v > 0.0, wide_v, no_old)
    if ratio != 1.0:  # convert it to the new gamma; v is what a held element keeps, and so is rounded
        log_old = tl.where(old > 0.0, ratio * _natural_log(old), NAN)
        power = _clamped(_exponential(_clamped(log_old, -100.0, 100.0)), V_MIN, V_MAX)
        old = tl.where(log_old == log_old, power, NAN)
        v = old.to(tl.float32)
    # 1 / sqrt(keep / v^2 + add d)
    fresh = old / tl.sqrt(keep + (1.0 - keep) * _clamped(d, D_MIN, D_MAX) * (old * old))
    return tl.where(total.to(tl.float32) <= _float32(values + SILENT), v, fresh.to(tl.float32))


@triton.jit
def _natural_log(x):
    """ln x for float64 x > 0, infinity included, to 2^-41 and a few units of 2^-53 of |ln x|."""
    tiny = x < TINY
    bits = tl.where(tiny, x * UP, x).to(tl.int64, bitcast=True)
    exponent = (bits + (ONE_BITS - SQRT_HALF_BITS)) >> 52  # biased by 1023
    z = (bits - (exponent << 52) + ONE_BITS).to(tl.float64, bitcast=True)  # in [sqrt(1/2), sqrt(2))
    k = (exponent | TWO_52_BITS).to(tl.float64, bitcast=True) - (TWO_52 + 1023.0) - tl.where(tiny, 54.0, 0.0)
    # ln z = 2 artanh q
    q = (z - 1.0) / (z + 1.0)
    q2 = q * q
    q4 = q2 * q2
    high = (1.0 / 7.0 + q2 * (1.0 / 9.0)) + q4 * (1.0 / 11.0 + q2 * (1.0 / 13.0))
    series = (1.0 / 3.0 + q2 * (1.0 / 5.0)) + q4 * high
    return tl.where(x > LARGEST, INFINITY, k * LN2 + (2.0 * q + 2.0 * q * (q2 * series)))


@triton.jit
def _exponential(x):
    """e^x for float64 |x| <= 100, to 2^-42 of it."""
    shifted = x * LOG2_E + TO_INTEGER  # its low bits hold the integer
    n = shifted - TO_INTEGER
    r = (x - n * LN2_HIGH) - n * LN2_LOW  # |r| <= ln 2 / 2
    r2 = r * r
    r4 = r2 * r2
    low = (1.0 + r) + r2 * (1.0 / 2.0 + r * (1.0 / 6.0))
    middle = (1.0 / 24.0 + r * (1.0 / 120.0)) + r2 * (1.0 / 720.0 + r * (1.0 / 5040.0))
    high = (1.0 / 40320.0 + r * (1.0 / 362880.0)) + r2 * (1.0 / 3628800.0)
    power = ((shifted.to(tl.int64, bitcast=True) << 52) + ONE_BITS).to(tl.float64, bitcast=True)
    return (low + r4 * (middle + r4 * high)) * power


# -- storage dtypes --------------------------------------------------------------------------------------------------


@triton.jit
def _pointers(address, start, TYPE: tl.constexpr, WHOLE: tl.constexpr):
    first = address.to(tl.pointer_type(TYPE))
    if WHOLE:
        first = tl.multiple_of(first, 16)
    return first + (start + tl.arange(0, TILE))


@triton.jit
def _loaded(address, start, length, TYPE: tl.constexpr, WHOLE: tl.constexpr):
    pointers = _pointers(address, start, TYPE, WHOLE)
    if WHOLE:
        x = tl.load(pointers)
    else:
        x = tl.load(pointers, mask=start + tl.arange(0, TILE) < length, other=0)
    return x


@triton.jit
def _store(address, start, length, x, TYPE: tl.constexpr, WHOLE: tl.constexpr):
    pointers = _pointers(address, start, TYPE, WHOLE)
    if WHOLE:
        tl.store(pointers, x.to(TYPE))
    else:
        tl.store(pointers, x.to(TYPE), mask=start + tl.arange(0, TILE) < length)


@triton.jit
def _opened(address, start, length, TYPE: tl.constexpr, WHOLE: tl.constexpr):
    """Load TILE elements as float32; past the end they are 0."""
    if TYPE == tl.bfloat16:
        x = (_loaded(address, start, length, tl.uint16, WHOLE).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        x = _loaded(address, start, length, TYPE, WHOLE).to(tl.float32)
    return x


@triton.jit
def _close(address, start, length, x, salt, TYPE: tl.constexpr, STOCHASTIC: tl.constexpr, WHOLE: tl.constexpr):
    """Store TILE float32 elements in a tensor of TYPE."""
    if TYPE == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        # to the nearest, ties to even; every NaN becomes torch's
        rounded = tl.where(x != x, 0x7FC0, (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16)
        if STOCHASTIC:
            finite = (bits & 0x7FFFFFFF) < 0x7F800000
            rounded = tl.where(finite, (bits + (_hashed(bits, salt) & 0xFFFF)) >> 16, rounded)
        _store(address, start, length, rounded, tl.uint16, WHOLE)
    else:
        _store(address, start, length, x, TYPE, WHOLE)


@triton.jit
def _salt(first, ROLE: tl.constexpr):
    """`rounding.salt_of` of a step whose `first` is 4 · step + 1."""
    return ((first + ROLE) * GOLDEN).to(tl.uint32)


@triton.jit
def _hashed(bits, salt):
    """`rounding.hashed`, of uint32."""
    h = bits ^ salt
    h = (h ^ (h >> 16)) * 0x7FEB352D
    h = (h ^ (h >> 15)) * 0x846CA68B
    return h ^ (h >> 16)


@triton.jit
def _decoded(codes, exponents, start, length, WHOLE: tl.constexpr):
    """Load TILE elements of an int8 m as float32: `rounding.decode_blocks`."""
    x = tl.reshape(_loaded(codes, start, length, tl.int8, WHOLE), (TILE // SHARED, SHARED))
    block = start // SHARED + tl.arange(0, TILE // SHARED)
    stored = tl.load(exponents.to(tl.pointer_type(tl.uint8)) + block, mask=block * SHARED < length, other=0)
    scaled = _times_power_of_two(x.to(tl.float32), (stored.to(tl.int32) - EXPONENT_BIAS)[:, None])
    return tl.reshape(tl.where(x == NOT_A_NUMBER, NAN, scaled), (TILE,))


@triton.jit
def _encode(codes, exponents, start, length, x, salt, STOCHASTIC: tl.constexpr, WHOLE: tl.constexpr):
    """Store TILE float32 elements in an int8 m: `rounding.encode_blocks`."""
    x = tl.reshape(x, (TILE // SHARED, SHARED))
    magnitude = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    finite = magnitude < 0x7F800000
    largest = tl.max(tl.where(finite, magnitude, 0), 1)
    stored = tl.minimum((largest + 0x1FFFF) >> 23, 254)
    block = start // SHARED + tl.arange(0, TILE // SHARED)
    tl.store(exponents.to(tl.pointer_type(tl.uint8)) + block, stored.to(tl.uint8), mask=block * SHARED < length)
    scaled = _times_power_of_two(x, -(stored - EXPONENT_BIAS)[:, None])
    if STOCHASTIC:
        noise = (_hashed(x.to(tl.uint32, bitcast=True), salt) >> 16).to(tl.float32)
        scaled = _floor(scaled + noise * (2.0**-16))
    else:
        scaled = _nearest_integer(scaled)
    code = tl.where(finite, _clamped(scaled, -127.0, 127.0), NOT_A_NUMBER).to(tl.int32)
    _store(codes, start, length, tl.reshape(code, (TILE,)), tl.int8, WHOLE)


@triton.jit
def _nearest_integer(x):
    """Of float32 |x| < 2^22; ties to even."""
    return (x + TO_INTEGER_32) - TO_INTEGER_32


@triton.jit
def _floor(x):
    """Of float32 |x| < 2^22. Triton's own takes a negative subnormal for zero."""
    nearest = _nearest_integer(x)
    return tl.where(nearest > x, nearest - 1.0, nearest)


@triton.jit
def _times_power_of_two(x, exponent):
    """x · 2^exponent; two factors, since float32 does not hold 2^133."""
    half = exponent >> 1
    rest = exponent - half
    return x * ((half + 127) << 23).to(tl.float32, bitcast=True) * ((rest + 127) << 23).to(tl.float32, bitcast=True)
