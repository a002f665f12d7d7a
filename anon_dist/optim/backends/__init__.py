"""What carries out a step on lists of tensors: `foreach.py` (torch's operations), `cpu.py` (`anon.c`, built by `build.py`), `gpu.py`
(`gpu_step.py`, Triton). `layout.py` says how tensors come to them, `choice.py` which one takes a step."""
