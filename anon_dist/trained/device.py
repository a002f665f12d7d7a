"""The device that a command computes on."""

from __future__ import annotations

import torch

from anon_dist.checkpoint import CheckpointError


def device_of(name: str | None) -> torch.device:
    """The device of that name; without one, CUDA if there is one.

    Raises:
        CheckpointError: there is no such device.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise CheckpointError(f"--device {name}: {str(error).splitlines()[0]}") from None
    return device
