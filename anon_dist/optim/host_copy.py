"""Numbers that a GPU computes and the host learns later, without stopping either."""

from __future__ import annotations

import torch
from torch import Tensor


def known_to_the_host(number: Tensor) -> bool:
    """Whether reading it waits for nothing."""
    return number.device.type == "cpu"


class HostCopy:
    """A number, or several, on the way to the host. To be read when the device is some steps on: then nobody waits."""

    def __init__(self, number: Tensor) -> None:
        """`number`: of any shape. The copy is made when the device comes to it."""
        on_gpu = number.is_cuda
        self._copy = torch.empty(number.numel(), dtype=number.dtype, pin_memory=on_gpu)
        self._copy.copy_(number.detach().reshape(-1), non_blocking=True)
        self._arrived = torch.cuda.Event() if on_gpu else None
        if self._arrived is not None:
            self._arrived.record(torch.cuda.current_stream(number.device))

    def value(self) -> float:
        """The number, if it is one; waits until the device has computed it."""
        self._wait()
        return float(self._copy)

    def values(self) -> list[float]:
        """The numbers, in their order; waits as `value`."""
        self._wait()
        found: list[float] = self._copy.tolist()
        return found

    def _wait(self) -> None:
        if self._arrived is not None:
            self._arrived.synchronize()
