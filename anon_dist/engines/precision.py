"""The dtype of the computation: what accelerate calls it, and what refuses it."""

from __future__ import annotations

import importlib.util
import os
from typing import Any, Literal

import torch

from anon_dist.engines.errors import EngineError

Precision = Literal["fp32", "bf16", "fp16", "bf16-true", "fp8"]


def mixed_precision(precision: Precision, name: str, on_cpu: bool, split: bool) -> str:
    """What accelerate calls the precision.

    Args:
        name: of the engine.
        split: whether ranks split matrices.

    Raises:
        EngineError: accelerate's configuration says another, or the engine or device has not this one.
    """
    configured = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    mixed = "no" if precision in ("fp32", "bf16-true") else precision
    if configured not in ("no", mixed):
        raise EngineError(
            f"accelerate's configuration says mixed_precision: {configured}, and train.precision is {precision}; make them agree"
        )
    if precision == "fp16" and (name != "deepspeed" or on_cpu):
        raise EngineError("train.precision fp16 needs engine deepspeed, which scales the loss, and a GPU; use bf16")
    if precision == "bf16-true" and (name not in ("single", "ddp", "fsdp2", "hsdp") or split):
        raise EngineError(f"train.precision bf16-true needs engine single, ddp, fsdp2 or hsdp, here {name}; use bf16")
    if precision == "fp8":
        _check_fp8(name, on_cpu, split)
    return mixed


def _check_fp8(name: str, on_cpu: bool, split: bool) -> None:
    if name not in ("single", "ddp", "fsdp2") or split:
        raise EngineError(
            f"train.precision fp8 needs engine single, ddp or fsdp2 without tensor parallelism, here {name}; use bf16"
        )
    if on_cpu or not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9):
        raise EngineError(
            "train.precision fp8 needs GPUs that multiply in 8 bits (compute capability 8.9 or more); use bf16"
        )
    if importlib.util.find_spec("torchao") is None:
        raise EngineError("train.precision fp8 needs torchao, which is not installed: pip install torchao")


def recipes(precision: Precision) -> list[Any]:
    """accelerate's handlers for the precision: torchao's usual recipe, a scale for each tensor."""
    if precision != "fp8":
        return []
    from accelerate.utils import AORecipeKwargs

    return [AORecipeKwargs()]


def use_tf32() -> None:
    """Have GPUs multiply float32 matrices in TF32, from now on; `optim.basis` takes its own products out of that."""
    torch.backends.cuda.matmul.fp32_precision = "tf32"
