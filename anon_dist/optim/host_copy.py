"""Numbers that a GPU computes and the host learns later, without stopping either."""

from __future__ import annotations

import torch
from torch import Tensor


def known_to_the_host(number: Tensor) -> bool:
    """Whether reading it waits for nothing."""
    return number.device.type == "cpu"


class HostCopy:
    """A number on its way to the host. To be read when the device is some steps on: then nobody waits."""

    def __init__(self, number: Tensor) -> None:
        """`number`: of one element. The copy is made when the device comes to it."""
        on_gpu = number.is_cuda
        self._copy = torch.empty(1, dtype=number.dtype, pin_memory=on_gpu)
        self._copy.copy_(number.detach().reshape(1), non_blocking=True)
        self._arrived = torch.cuda.Event() if on_gpu else None
        if self._arrived is not None:
            self._arrived.record(torch.cuda.current_stream(number.device))

    def value(self) -> float:
        """The number; waits until the device has computed it."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return float(self._copy)
