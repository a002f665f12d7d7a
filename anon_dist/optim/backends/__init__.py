"""Backends, which carry out a step on lists of tensors: `foreach.py` (torch's operations), `cpu.py` (the C kernel `anon.c`, compiled by
`build.py`) and `gpu.py` (the Triton kernel `gpu_step.py`). `layout.py` says how tensors come to them; `choice.py` chooses."""
