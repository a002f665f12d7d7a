"""Parameters that get no gradient, where DeepSpeed would step them with an older one.

In ZeRO stage 3, and in stages 1 to 3 with the optimizer offloaded, DeepSpeed copies each gradient into a buffer when it arrives. For a
parameter that was not part of the loss none arrives, and the optimizer is given what an earlier step left there (seen with 0.19, whatever
the optimizer).
"""

from __future__ import annotations

from typing import Any

from torch import nn


class GradientWatch:
    """Which parameters of a model have got a gradient."""

    def __init__(self, model: nn.Module) -> None:
        self._names = {name for name, p in model.named_parameters() if p.requires_grad}
        self._seen: set[str] = set()
        for name, p in model.named_parameters():
            if p.requires_grad:
                p.register_post_accumulate_grad_hook(lambda _, name=name: self._seen.add(name))

    def missing(self) -> list[str]:
        """Names of those without one since the last call."""
        names = sorted(self._names - self._seen)
        self._seen.clear()
        return names


def keeps_old_gradients(engine: Any) -> bool:
    """Whether a DeepSpeed engine's configuration is one that does so."""
    stage = engine.zero_optimization_stage()
    return bool(stage == 3 or (stage > 0 and engine.zero_cpu_offload()))


def explain(missing: list[str]) -> str:
    """The message for these names."""
    others = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
    return (
        f"{missing[0]}{others} got no gradient in a backward pass. In ZeRO stage 3 and with offload, DeepSpeed steps such parameters with "
        "the gradient of an earlier step. Freeze what is not trained, add 0 · parameter.sum() to the loss, or use a stage below 3 "
        "without offload"
    )
