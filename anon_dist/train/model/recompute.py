"""Activations: which of a block's are kept for the backward pass, and which are computed again in it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

Recompute = Literal["none", "full", "selective", "budget"]

_aten: Any = torch.ops.aten
ATTENTION = {
    getattr(_aten, name).default
    for name in (
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_cudnn_attention",
        "_scaled_dot_product_fused_attention_overrideable",
    )
    if hasattr(_aten, name)
}
PRODUCTS = {_aten.mm.default, _aten.addmm.default, _aten.bmm.default}


def recompute(blocks: list[nn.Module], how: Recompute) -> None:
    """Have blocks keep less, in place: their forward is wrapped, inside of what engines hook onto the module.

    full: a block keeps its input. selective: and the results of attention and of every second matrix product, which costs the most to
    compute again for what it takes (as in torchtitan). budget is torch.compile's (`set_budget`).
    """
    if how in ("full", "selective"):
        contexts = {"context_fn": _selective} if how == "selective" else {}
        for block in blocks:
            block.forward = partial(_forward, block.forward, contexts)


def set_budget(share: float) -> None:
    """What blocks that are compiled after this may keep, of what they would: torch.compile chooses what."""
    import torch._functorch.config as functorch

    functorch.activation_memory_budget = share


def _forward(forward: Callable[..., Any], contexts: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, **contexts, **kwargs)


def _selective() -> Any:
    """For one forward pass of a block, and its repetition."""
    seen = {False: 0, True: 0}

    def policy(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        """Attention and every second product are kept; both passes count them alike."""
        if operation in ATTENTION:
            return CheckpointPolicy.MUST_SAVE
        if operation in PRODUCTS:
            seen[context.is_recompute] += 1
            if seen[context.is_recompute] % 2:
                return CheckpointPolicy.MUST_SAVE
        return CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)
