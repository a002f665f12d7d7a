"""What `gpu.py` sends and `gpu_step.py` reads."""

TILE, WARPS = 512, 4
"""Elements and warps of a program: 4 elements a thread, one load of 16 bytes for each float32 tensor. The fastest of eight choices on an
H100, above all at refreshes, whose float64 arithmetic needs registers. TILE is a multiple of `rounding.BLOCK`."""

ROW = 9
"""Numbers in a parameter's row: the addresses of θ, g, m, s, v and m's exponents; the number of elements; whether all addresses are
multiples of `ALIGNMENT`; and the row of its step's values."""
ALIGNMENT = 16

VALUES = (
    *(
        "lr",
        "weight_decay",
        "debias_m",
        "keep_m",
        "add_m",
        "keep_s",
        "add_s",
        "debias_s",
        "keep_d",
        "gamma",
        "eps",
        "bound",
    ),
    *("silent", "step", "gamma_ratio", "nesterov", "cautious"),
)
"""A step's values, float64: the fields of `struct step` of anon.c, but lr, weight_decay and debias_m, from which the kernel makes `decay`
and `scale`, and `silent`, the second moment up to which an element keeps its preconditioner."""
