"""The two attributes by which torch's GradScaler, or the user, tells a step of scaled gradients: `grad_scale` and `found_inf`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import SupportsFloat

import torch
from torch import Tensor
from torch.optim import Optimizer

from anon_dist.optim.host_copy import known_to_the_host


@dataclass(frozen=True)
class GradScaling:
    """What torch's GradScaler, or the user, has set for a step: see `Anon.grad_scale` and `Anon.found_inf`."""

    grad_scale: Tensor | None
    found_inf: Tensor | None

    @classmethod
    def of(cls, optimizer: Optimizer) -> GradScaling:
        """What has been set on the optimizer.

        Raises:
            TypeError: something that is no number.
        """
        return cls(_number(optimizer, "grad_scale"), _number(optimizer, "found_inf"))

    @property
    def skips(self) -> bool:
        """Whether nothing is to be stepped, and the host knows it without waiting."""
        return self.found_inf is not None and known_to_the_host(self.found_inf) and bool(self.found_inf)

    @property
    def is_known_late(self) -> bool:
        """Whether only the device knows if something is to be stepped."""
        return self.found_inf is not None and not known_to_the_host(self.found_inf)

    def on(self, device: torch.device) -> tuple[Tensor | None, Tensor | None]:
        """Both, on a device."""
        if self.grad_scale is None and self.found_inf is None:
            return None, None
        scale, flag = (None if x is None else x.to(device) for x in (self.grad_scale, self.found_inf))
        return scale, flag


def _number(optimizer: Optimizer, name: str) -> Tensor | None:
    """An attribute of the optimizer, as a tensor of one element."""
    value = getattr(optimizer, name, None)
    if value is None or (isinstance(value, Tensor) and value.numel() == 1):
        return value
    if isinstance(value, Tensor) or not isinstance(value, SupportsFloat):
        what = f"a tensor of {value.numel()}" if isinstance(value, Tensor) else repr(value)
        raise TypeError(f"Anon: optimizer.{name} must be a number or a tensor of one element, not {what}")
    return torch.tensor(float(value), dtype=torch.float64)
