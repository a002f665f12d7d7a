"""Whether a step was taken, where only the device knows."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def known_to_the_host(flag: Tensor) -> bool:
    """Whether reading the flag waits for nothing."""
    return flag.device.type == "cpu"


class Outcome:
    """Of a step that a GPU takes or not, by a flag in its memory. The host counts it as taken, and learns of the flag later without waiting
    longer than the GPU has been at work on that step."""

    def __init__(self, found_inf: Tensor, undo: Callable[[], None]) -> None:
        """`undo`: takes back what the host counted."""
        self._flag = torch.empty(1, dtype=found_inf.dtype, pin_memory=found_inf.is_cuda)
        self._flag.copy_(found_inf.detach().reshape(1), non_blocking=True)
        self._arrived = torch.cuda.Event() if found_inf.is_cuda else None
        if self._arrived is not None:
            self._arrived.record(torch.cuda.current_stream(found_inf.device))
        self._undo = undo

    def settle(self) -> None:
        """Take the step back if it was not taken."""
        if self._arrived is not None:
            self._arrived.synchronize()
        if bool(self._flag):
            self._undo()
