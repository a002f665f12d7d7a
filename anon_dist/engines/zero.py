"""DeepSpeed: ZeRO stages 0 to 3, with or without offload, as a JSON configuration asks for it."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import Optimizer

from anon_dist.agreement import Group
from anon_dist.checkpoint.dcp.linking import Links
from anon_dist.checkpoint.keeping.staging import Storages, uncopied
from anon_dist.checkpoint.schema import Checkpoint
from anon_dist.engines import zero_restore
from anon_dist.engines.base import Veto, Write, never, set_learning_rates, settle
from anon_dist.engines.bases import is_stage3
from anon_dist.engines.check import StateBytes, check_optimizer, state_bytes_of_ranks
from anon_dist.engines.errors import EngineError
from anon_dist.engines.grads import square_sum
from anon_dist.engines.materialize import materialize
from anon_dist.engines.register import NVME, refuse_other_steppers
from anon_dist.engines.replicas import Copy, copies_of, states_of
from anon_dist.engines.restore import DEEPSPEED, opened, parameter_order
from anon_dist.engines.stale import GradientWatch, explain, keeps_old_gradients
from anon_dist.optim import flat
from anon_dist.optim.frame import KEYS

NOWHERE = "/nowhere"
"""Where DeepSpeed is told to save while its files are captured."""


def zero_config(
    source: str | Path | None, *, micro_batch: int, accumulation: int, clip: float | None, precision: str
) -> dict[str, Any]:
    """A DeepSpeed configuration with what the training configuration determines filled in, where it is absent or "auto".

    Args:
        source: JSON file; None: ZeRO stage 2.
        precision: "fp32", "bf16" or "fp16".

    Raises:
        EngineError: it cannot be read, or contradicts the training configuration; naming file, key and remedy.
    """
    config: dict[str, Any] = {"zero_optimization": {"stage": 2}}
    if source is not None:
        try:
            config = json.loads(Path(source).read_text())
        except (OSError, ValueError) as error:
            raise EngineError(f"DeepSpeed configuration {source}: {error}") from None
    if "optimizer" in config or "scheduler" in config:
        raise EngineError(
            f"DeepSpeed configuration {source}: remove 'optimizer' and 'scheduler'; optim and schedule say them here"
        )
    if config.get("zero_optimization", {}).get("offload_optimizer", {}).get("device") == "nvme":
        raise EngineError(f"DeepSpeed configuration {source}: zero_optimization.offload_optimizer.device: {NVME}")
    refuse_other_steppers(config.get("zero_optimization", {}), f"DeepSpeed configuration {source}")
    ours = {
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": accumulation,
        # DeepSpeed clips at 1 unless told otherwise; 0 is never.
        "gradient_clipping": 0.0 if clip is None else clip,
    }
    for key, value in ours.items():
        if config.setdefault(key, value) == "auto":
            config[key] = value
        if config[key] != value:
            raise EngineError(
                f"DeepSpeed configuration {source}: {key} is {config[key]}, and the training configuration says {value}"
            )
    for kind in ("bf16", "fp16"):
        half = config.setdefault(kind, {"enabled": "auto"})
        if half.setdefault("enabled", "auto") == "auto":
            half["enabled"] = precision == kind
        if half["enabled"] != (precision == kind):
            raise EngineError(
                f"DeepSpeed configuration {source}: {kind}.enabled is {half['enabled']}, and train.precision is {precision}; "
                "make them agree"
            )
    config.pop("train_batch_size", None)
    return config


def _build(model: nn.Module, weights: Checkpoint, accelerator: Accelerator) -> None:
    """Give a meta model its weights: in stage 3 one parameter after the other, each partitioned before the next is made."""
    asked = accelerator.state.deepspeed_plugin.hf_ds_config.config
    zero = asked["zero_optimization"]
    if zero.get("stage") != 3:
        materialize(model, weights, torch.device("cpu"))
        return
    from deepspeed.runtime.zero.partition_parameters import Init

    half = [kind for kind in ("bf16", "fp16") if asked[kind]["enabled"]]
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {key: zero[key] for key in ("stage", "offload_param") if key in zero},
        **{kind: {"enabled": True} for kind in half},
    }
    for p in model.parameters() if half else ():  # buffers stay float32, as DeepSpeed keeps them
        p.data = p.data.to(torch.bfloat16 if half == ["bf16"] else torch.float16)
    partitioner: Any = Init(module=nn.Module(), config_dict_or_path=config)
    names = {p: name for name, p in model.named_parameters()}
    for p, name in names.items():
        materialize(model, weights, torch.device("cpu"), only=name)
        partitioner._convert_to_zero_parameters([p])


class ZeroEngine:
    """A DeepSpeed engine, brought up by accelerate. See `base.Engine`."""

    _copies: Storages | None = None

    def __init__(
        self,
        name: str,
        accelerator: Accelerator,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        weights: Checkpoint | None = None,
    ) -> None:
        """`weights`: of a model on the meta device, see `start.wrap`."""
        groups = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
        self._order = parameter_order(model, optimizer)
        self.name = name
        if weights is not None:
            _build(model, weights, accelerator)
        watch = GradientWatch(model)
        self.model, _ = accelerator.prepare(model, optimizer)
        self._engine: Any = self.model
        self._wrapper: Any = self._engine.optimizer
        self._watch = watch if keeps_old_gradients(self._engine) else None
        if hasattr(self._wrapper, "check_grad_overflow"):
            self._wrapper.check_grad_overflow = True  # off for float32, where a step with NaN gradients would be taken
        self.optimizer: Optimizer = self._engine.basic_optimizer
        check_optimizer(self.optimizer, None, type(optimizer), groups)
        self._check_masters()
        self._allocate()

    def _allocate(self) -> None:
        """Make the state now, so that its size is known; DeepSpeed would have it made by the first step."""
        if not hasattr(self.optimizer, "init_state"):
            return
        with self.whole_optimizer() as optimizer:
            optimizer.init_state()  # type: ignore[attr-defined]

    def _check_masters(self) -> None:
        masters = [p for group in self.optimizer.param_groups for p in group["params"]]
        masters += list(getattr(self._wrapper, "fp32_partitioned_groups_flat", []))
        for p in masters:
            if p.dtype != torch.float32:
                raise EngineError(
                    f"DeepSpeed gave the optimizer {p.dtype} parameters; it must see float32 master weights"
                )

    def micro_batch(self, last: bool) -> AbstractContextManager[None]:
        """See `base.Engine`. DeepSpeed is told in `backward`."""
        return contextlib.nullcontext()

    def backward(self, loss: Tensor, last: bool) -> None:
        """See `base.Engine`.

        Raises:
            EngineError: a parameter got no gradient, and DeepSpeed would not notice (see `stale`).
        """
        self._engine.set_gradient_accumulation_boundary(is_boundary=last)
        # DeepSpeed divides by gradient_accumulation_steps itself, and the loop has done so.
        self._engine.backward(loss * self._engine.gradient_accumulation_steps())
        if self._watch is not None and (missing := self._watch.missing()):
            raise EngineError(explain(missing))

    def step(self, lr: float | Sequence[float], clip: float | None, veto: Veto = never) -> Tensor:
        """See `base.Engine`. DeepSpeed clips, by its configuration, and waits for the device as it likes."""
        set_learning_rates(self.optimizer.param_groups, lr)
        unchecked = self._unchecked_gradients()
        if unchecked:
            norm = square_sum(unchecked).sqrt()
            if bool(veto(norm)) or not bool(norm.isfinite()):
                self._engine.optimizer.zero_grad()
                return norm
            self._engine.step()
            return norm
        with self._asked(veto) as asked:
            self._engine.step()
            if not asked:  # DeepSpeed has left the step out itself, or this rank has nothing to step
                applied = self._engine.was_step_applied()
                veto(self._norm() if applied else torch.tensor(torch.nan, dtype=torch.float64))
        if not self._engine.was_step_applied():
            return torch.tensor(torch.nan)
        return self._norm()

    def _norm(self) -> Tensor:
        return torch.as_tensor(self._engine.get_global_grad_norm(), dtype=torch.float64)

    @contextlib.contextmanager
    def _asked(self, veto: Veto) -> Iterator[list[bool]]:
        """A block in which a step of DeepSpeed's asks, once it knows the norm, before it steps the optimizer, once or for each group.

        What it does besides then comes to nothing: gradients go, and weights are written anew from masters that have not changed.
        """
        answers: list[bool] = []
        step, patched = self.optimizer.step, "step" in vars(self.optimizer)

        def ask(*args: Any, **kwargs: Any) -> Any:
            if not answers:
                self._engine._global_grad_norm = self._wrapper._global_grad_norm
                answers.append(bool(veto(self._norm())))
            return None if answers[0] else step(*args, **kwargs)

        self.optimizer.step = ask  # type: ignore[method-assign]
        try:
            yield answers
        finally:
            if patched:
                self.optimizer.step = step  # type: ignore[method-assign]
            else:
                del self.optimizer.step

    def _unchecked_gradients(self) -> list[Tensor]:
        """The gradients, reduced and the same on every rank, where DeepSpeed does not look for NaN: stage 0 in float32, BF16_Optimizer."""
        if self._wrapper is self.optimizer:
            return [p.grad for p in self._engine.module.parameters() if p.grad is not None]
        return list(getattr(self._wrapper, "fp32_groups_gradients_flat", []))

    @contextlib.contextmanager
    def whole_optimizer(self) -> Iterator[Optimizer]:
        """See `base.Engine`. Stage 3 shows the optimizer its sub-groups one by one, and between steps none."""
        staged = is_stage3(self._wrapper)
        if staged:
            self._wrapper._set_fp32_optimizer_param_groups()
        try:
            yield self.optimizer
        finally:
            if staged:
                self._wrapper._clear_fp32_optimizer_param_groups()

    def state_bytes(self) -> StateBytes:
        """See `base.Engine`. The whole is the sum over ranks, padding and copies included."""
        return state_bytes_of_ranks(self.optimizer, self._engine.device)

    def copies(self) -> Iterator[Copy]:
        """See `base.Engine`. Up to stage 2 the weights, in stage 0 the optimizer's masters and state too; in stage 3 bases."""
        module, stage = self._engine.module, self._engine.zero_optimization_stage()
        buffers = {id(buffer) for buffer in module.buffers()}
        found = [copy for copy in copies_of(module) if stage < 3 or id(copy.tensor) in buffers]
        yield from found
        # BF16_Optimizer shares masters and state out among the ranks in stage 0 too.
        if stage == 0 and not hasattr(self._wrapper, "fp32_groups_flat_partition"):
            names: dict[Any, str] = {copy.tensor: copy.name for copy in found}
            held = [p for group in self.optimizer.param_groups for p in group["params"]]
            masters = {p: f"the float32 master of parameter {i}" for i, p in enumerate(held) if p not in names}
            yield from (Copy(name, p, p) for p, name in masters.items())
            yield from states_of(self.optimizer, names | masters)
        if is_stage3(self._wrapper):
            yield from self._bases()

    def _bases(self) -> Iterator[Copy]:
        """Of the columns of matrices, which all ranks have alike."""
        settle(self.optimizer)
        for i, master in enumerate(self._wrapper.fp32_partitioned_groups_flat):
            group = self.optimizer.param_groups[self._wrapper.sub_group_to_group_id[i]]
            if group.get("basis") is None:
                continue
            for (share, _), state in flat.matrices(master, self.optimizer.state[master], group):
                for key in (key for key in KEYS["columns"] if key in state):
                    yield Copy(f"{key} of {share.name}", state[key], state[key])

    def capture(self, copied: bool) -> Write:
        """See `base.Engine`. DeepSpeed's own files, byte for byte as it would write them.

        Its decoupled writer wants an operator to be compiled, and looks for its errors in no place; so what DeepSpeed hands to its writer
        is copied, and given to it later. Meanwhile nothing is written anywhere, its folders and scripts neither: a disk that is full is no
        matter of this rank alone.
        """
        engine, files, scripts = self._engine, dict[str, Any](), list[Callable[[str], None]]()
        if copied:
            self._copies = self._copies or Storages()
        stage = self._copies if copied and self._copies is not None else uncopied
        writer, copy_scripts = engine.checkpoint_engine, engine._copy_recovery_script
        write, make = writer.save, writer.makedirs
        writer.save = lambda state_dict, path: files.update({os.path.relpath(path, NOWHERE): state_dict})
        writer.makedirs = lambda path, exist_ok=False: None
        engine._copy_recovery_script = lambda path: scripts.append(copy_scripts)
        try:
            engine.save_checkpoint(NOWHERE, tag=DEEPSPEED, save_latest=False)
            staged = stage(files)
        finally:
            writer.save, writer.makedirs, engine._copy_recovery_script = write, make, copy_scripts
        return partial(_write, staged, scripts, write)

    def save(self, folder: Path) -> None:
        """See `base.Engine`."""
        self.capture(copied=False)(folder)

    def load(self, folder: Path) -> None:
        """See `base.Engine`. DeepSpeed's own loading runs whatever its pickles ask for, so it is never called."""
        with opened(folder, self._order) as checkpoint:
            zero_restore.restore(self._engine, checkpoint)

    def full_weights(self) -> dict[str, Tensor]:
        """See `base.Engine`. The float32 masters."""
        from deepspeed.utils import safe_get_full_fp32_param

        first = not dist.is_initialized() or dist.get_rank() == 0
        weights = {}
        for name, p in self._engine.module.named_parameters():
            value = safe_get_full_fp32_param(p)  # every rank must ask
            if first:
                whole = p if value is None else value
                weights[name] = whole.detach().to("cpu", torch.float32, copy=True).view(getattr(p, "ds_shape", p.shape))
        return weights


def _write(
    files: dict[str, Any],
    scripts: list[Callable[[str], None]],
    write: Callable[[Any, str], None],
    folder: Path,
    group: Group = None,
    links: Links | None = None,
) -> None:
    """See `base.Write`. Nothing is linked: each of DeepSpeed's files has something that changes at every step.

    Args:
        scripts: what copies DeepSpeed's scripts into a folder, on the rank that does.
    """
    for name, state in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        write(state, str(path))
    for copy in scripts:
        copy(str(folder))
