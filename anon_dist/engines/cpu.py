"""What accelerate needs to run several processes on CPUs. Machines with accelerators never come here.

accelerate's own support for this is partial (seen with 1.15.0): an FSDP configuration with `ACCELERATE_USE_CPU` set turns into DDP, without
it every process comes up as `DistributedType.NO` and trains alone, neither with a word. See `check.check_world`.
"""

from __future__ import annotations

import os
from datetime import timedelta

from accelerate import PartialState
from accelerate.utils import DistributedType


def bring_up_processes(timeout: timedelta) -> None:
    """Join this process to its peers over gloo, before an `Accelerator` is made.

    accelerate then takes the CPU for a device like any other.
    """
    os.environ.pop("ACCELERATE_USE_CPU", None)
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    PartialState(backend="gloo", timeout=timeout)
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
