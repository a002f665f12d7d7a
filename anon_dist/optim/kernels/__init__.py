"""Anon's step in one pass over memory. `anon.c` is the kernel for CPUs, built by `build.py`, called by `cpu.py`; `gpu_step.py` the one for
NVIDIA GPUs, launched by `gpu.py`, and from CUDA graphs by `graphs.py`; `choice.py` says when they are used."""
