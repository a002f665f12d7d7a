"""Anon's step in one pass over memory. `anon.c` is the kernel, `cpu.py` calls it, `build.py` compiles it, `choice.py` says when."""
