"""DeepSpeed, as a user calls it, with Anon: what it and accelerate would do to an optimizer they do not know, and the remedy of each.

After `register()`, called before or after `import deepspeed`, `"optimizer": {"type": "Anon", …}` works in DeepSpeed's JSON, and so does
a client `Anon(…)` given to `deepspeed.initialize` or `Accelerator.prepare`. `from anon_dist import Anon` calls it, and so does this
package's own training; `from anon_dist.optim import Anon` does not.

The traps, as of DeepSpeed 0.19 and accelerate 1.15:

| trap | remedy |
|---|---|
| ZeRO refuses optimizers it was not tested with | Anon is among those it takes |
| offload refuses a client optimizer, unless `zero_force_ds_cpu_optimizer` is off | it is off where the optimizer is Anon |
| with offload, accelerate replaces the optimizer by DeepSpeedCPUAdam, without a word | not Anon |
| stage 0 with bf16 or fp16 makes the state by a step on zero gradients, Anon's first refresh | by `init_state()` instead |
| partial offload (ratio < 1) steps the rest with AdamW | refused |
| ZeRO's stages 1 and 2 and BF16_Optimizer cut matrices within rows, which have no basis then | refused with `basis` |
| stage 3 hides the matrices in flat tensors | Anon is told where they lie, for its `basis` (see `bases`) |
| DeepSpeed's loader of universal checkpoints takes exp_avg and exp_avg_sq alone | refused with `basis` |
| SuperOffload and ZenFlow step an Adam of their own, with the optimizer's param groups | refused |
| an optimizer swapped to NVMe does not resume where it was (seen by the loss) | loading a checkpoint is refused |
| stage 3 and offload step a parameter without gradient with that of an earlier step | a warning (see `stale`) |
| it compiles an operator of its inference, on CPUs, without a word; after a build that was killed it waits for ever | both are said |
| accelerate reads and reloads the state before it shards the parameters: all of it, on every rank | not Anon's |
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import torch

from anon_dist.engines.bases import place, refuse_universal
from anon_dist.engines.builds import announce
from anon_dist.engines.errors import EngineError
from anon_dist.engines.imports import when_imported
from anon_dist.engines.stale import GradientWatch, explain, keeps_old_gradients
from anon_dist.optim import Anon
from anon_dist.optim.hyper import state_dtypes

NAME = "Anon"
"""The optimizer's type in a DeepSpeed configuration: DeepSpeed takes what it does not know from torch.optim."""

NVME = "DeepSpeed does not resume state that was swapped to NVMe where it was; offload the optimizer to cpu (parameters may go to nvme)"


def register() -> None:
    """Make Anon known to DeepSpeed and accelerate: now, or when they are imported. A second call changes nothing."""
    if hasattr(torch.optim, NAME):
        return
    setattr(torch.optim, NAME, Anon)
    when_imported("deepspeed.comm.torch", announce)
    when_imported("deepspeed.runtime.zero.utils", _allow)
    when_imported("deepspeed.runtime.engine", _watch_engine)
    when_imported("deepspeed.runtime.fp16.unfused_optimizer", _spare_first_refresh)
    when_imported("accelerate.accelerator", _keep_under_accelerate)
    when_imported("accelerate.optimizer", _allocate_late)


def _allow(zero_utils: ModuleType) -> None:
    zero_utils.ZERO_SUPPORTED_OPTIMIZERS.append(Anon)


def _watch_engine(engine_module: ModuleType) -> None:
    engine_class: Any = engine_module.DeepSpeedEngine
    force_cpu_optimizer, configure = engine_class.zero_force_ds_cpu_optimizer, engine_class._configure_optimizer
    run_backward, run_load_checkpoint = engine_class.backward, engine_class.load_checkpoint

    def zero_force_ds_cpu_optimizer(self: Any) -> bool:
        """Off where the optimizer is Anon."""
        return not _is_asked_for(self) and bool(force_cpu_optimizer(self))

    def _configure_optimizer(self: Any, client_optimizer: Any, model_parameters: Any) -> None:
        asked = _is_asked_for(self)
        if asked:
            _refuse_partial_offload(self)
            refuse_other_steppers(self._config.zero_config.model_dump(), "the DeepSpeed configuration")
        configure(self, client_optimizer, model_parameters)
        if asked and isinstance(self.basic_optimizer, Anon):
            place(self)
        if asked and keeps_old_gradients(self):
            self._anon_dist_watch = GradientWatch(self.module)
        if asked and not isinstance(self.basic_optimizer, Anon):
            raise EngineError(f"Anon was asked for, and DeepSpeed steps {type(self.basic_optimizer).__name__}")
        if asked and self.zero_optimization():
            _refuse_eight_bits(self.basic_optimizer)

    def backward(self: Any, *args: Any, **kwargs: Any) -> Any:
        """DeepSpeed's, with a warning where a parameter got no gradient and would be stepped with an older one."""
        result = run_backward(self, *args, **kwargs)
        watch = getattr(self, "_anon_dist_watch", None)
        if watch is not None and (missing := watch.missing()):
            warnings.warn(explain(missing), stacklevel=2)
        return result

    def load_checkpoint(self: Any, *args: Any, **kwargs: Any) -> Any:
        """DeepSpeed's; refused where an Anon's state is swapped to NVMe, or would lose its bases."""
        if isinstance(self.basic_optimizer, Anon) and self.zero_nvme_offload_optimizer():
            raise EngineError(f"Anon: {NVME}")
        if isinstance(self.basic_optimizer, Anon) and self.load_universal_checkpoint():
            refuse_universal(self.basic_optimizer)
        return run_load_checkpoint(self, *args, **kwargs)

    engine_class.backward, engine_class.load_checkpoint = backward, load_checkpoint
    engine_class.zero_force_ds_cpu_optimizer = zero_force_ds_cpu_optimizer
    engine_class._configure_optimizer = _configure_optimizer


def _is_asked_for(engine: Any) -> bool:
    """Whether an engine was given Anon, by its configuration or as an object."""
    return isinstance(engine.client_optimizer, Anon) or (
        engine.client_optimizer is None and engine.optimizer_name() == NAME
    )


def _refuse_partial_offload(engine: Any) -> None:
    offload = engine.zero_offload_optimizer()
    if offload is not None and offload.ratio != 1.0:
        raise EngineError(
            f"zero_optimization.offload_optimizer.ratio is {offload.ratio}: DeepSpeed would step the other parameters with AdamW. "
            "Set it to 1"
        )


def refuse_other_steppers(zero: Mapping[str, Any], where: str) -> None:
    """Refuse what steps an Adam of its own in place of the optimizer, whichever that is, without a word.

    Args:
        zero: the section `zero_optimization`.
        where: the configuration's name, for the message.

    Raises:
        EngineError: SuperOffload or ZenFlow is asked for.
    """
    offload = zero.get("offload_optimizer") or {}
    for asked, name, key in (
        (offload.get("super_offload"), "SuperOffload", "offload_optimizer.super_offload"),
        (zero.get("zenflow") is not None, "ZenFlow", "zenflow"),
    ):
        if asked:
            raise EngineError(
                f"{where}: zero_optimization.{key}: DeepSpeed's {name} steps an Adam of its own in place of the optimizer. Remove the "
                "key: offload_optimizer with device cpu alone steps the optimizer itself"
            )


def _refuse_eight_bits(optimizer: Anon) -> None:
    """ZeRO saves each rank's state as it lies in memory, from which no one could tell the blocks of another number of ranks."""
    if any(state_dtypes(group)["exp_avg"] == torch.int8 for group in optimizer.param_groups):
        raise EngineError("an int8 exp_avg is not supported under DeepSpeed's ZeRO; use state_dtype=bfloat16, or FSDP2")


def _spare_first_refresh(unfused: ModuleType) -> None:
    optimizer_class: Any = unfused.FP16_UnfusedOptimizer
    by_a_step = optimizer_class.initialize_optimizer_states

    def initialize_optimizer_states(self: Any) -> None:
        """Anon's without a step."""
        if isinstance(self.optimizer, Anon):
            self.optimizer.init_state()
        else:
            by_a_step(self)

    optimizer_class.initialize_optimizer_states = initialize_optimizer_states


def _keep_under_accelerate(accelerator: Any) -> None:
    replace = getattr(accelerator, "map_pytorch_optim_to_deepspeed", None)
    if replace is None:  # DeepSpeed is not installed
        return

    def map_pytorch_optim_to_deepspeed(optimizer: Any) -> Any:
        return optimizer if isinstance(optimizer, Anon) else replace(optimizer)

    accelerator.map_pytorch_optim_to_deepspeed = map_pytorch_optim_to_deepspeed


def _allocate_late(optimizer_module: Any) -> None:
    wrapper = optimizer_module.AcceleratedOptimizer
    construct = wrapper.__init__

    def construct_without_state(self: Any, optimizer: Any, device_placement: bool = True, scaler: Any = None) -> None:
        fresh = isinstance(optimizer, Anon) and len(optimizer.state) == 0
        construct(self, optimizer, device_placement=device_placement and not fresh, scaler=scaler)

    wrapper.__init__ = construct_without_state
