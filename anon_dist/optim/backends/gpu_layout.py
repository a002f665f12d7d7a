"""The layout of the tables that `gpu.py` sends and `gpu_step.py` reads."""

TILE, WARPS = 512, 4
"""Elements and warps of a program: a thread has 4 elements, and loads the 16 bytes of a float32 tensor at once. Of eight choices these were
the fastest on an H100, above all in refreshes, whose float64 arithmetic needs many registers. TILE is a multiple of `rounding.BLOCK`."""

ROW = 9
"""How many numbers a parameter's row has. These are, in order: the addresses of θ, g, m, s, v (`plan.ROLES`) and of m's exponents; the
number of elements; 1 if all addresses are multiples of `ALIGNMENT`, else 0; and the index of its plan's row."""
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
"""The numbers in a plan's row, float64. They are the fields of `struct step` in anon.c, with these differences: the kernel makes `decay`
and `scale` itself, of lr, weight_decay and debias_m; and an element whose s is no larger than `silent` keeps its preconditioner."""
