"""Anon's step in the background, under FSDP2 with `CPUOffloadPolicy`: the CPU updates the host's shards while the device goes on.

`step()` checks the step, starts it in a thread, and returns. The thread updates the parameters in the order in which the last forward
wanted them; the forward of a `fully_shard` module waits for its own before it reads them. The results are the same bits as without overlap:

- What a forward reads. FSDP2 reads a host shard where it gathers: in a module's pre-forward hook, in that of a module that prefetches it
  (`set_modules_to_forward_prefetch`), in `unshard()`, and in the backward pass. The first three wait here, in hooks that come before
  FSDP2's. The model's forward ends by waiting for all, modules that were not called included, so a backward pass finds the step complete.
- What a backward writes. Gradients of the next step are new host tensors, or are added in place to old ones: after the forward, so after
  the step. `zero_grad()` only lets go of gradients, and does not wait; with `set_to_none=False` it writes to them, and waits.
- Hyperparameters are those of the moment of `step()`; a learning rate schedule may go on at once.
- State dicts, loads, `rebase`, `init_state` and `optimizer.step()` wait. A process that ends ends after the step.
- Bases are renewed when the next step begins or the state is read, not in the thread, whose all-reduces would come between those of a
  forward. So with a basis no rank may read `optimizer.state_dict()` alone.

DeepSpeed's ZeRO-Offload cannot be overlapped so: within its own `step()` it copies each master to the device as soon as the optimizer has
returned (stage 3: each sub-group), and gathers the weights after the last. An optimizer that returned early would have old weights copied.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.optim import Optimizer
from torch.optim import optimizer as global_hooks

from anon_dist.engines.errors import EngineError
from anon_dist.optim import Anon
from anon_dist.optim.state import local

log = logging.getLogger(__name__)

OUTSIDE, REST = "outside of fully_shard modules", "not the model's"
"""Parts of a step besides the parameters of each `fully_shard` group, which go by the group's state."""


class OverlappedStep:
    """Steps of an Anon in the background. Make it after `fully_shard` and the optimizer, and call its `step()` instead of the optimizer's.

    What reads or writes parameters, gradients or the optimizer's state in another way than through the model's and the optimizer's
    methods (`p.copy_(…)`, `optimizer.state[p]`, an average of the weights) must call `wait()` before. A failure of the update is logged,
    and raised by all that waits, until `optimizer.load_state_dict`.

    Args:
        model: the whole model, with `fully_shard` modules in it.
        optimizer: over its parameters, which are on the CPU.

    Raises:
        EngineError: the optimizer is none, or has parameters of another model; or there is nothing to overlap with.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer) -> None:
        if not isinstance(optimizer, Anon):
            raise EngineError(f"a {type(optimizer).__name__} cannot be stepped in the background, only an Anon")
        self._optimizer = optimizer
        self._parts: dict[Any, list[Tensor]] = {OUTSIDE: []}
        self._collect(model, OUTSIDE)
        if len(self._parts) == 1:
            raise EngineError("the model has no fully_shard modules to step in the background; call fully_shard before")
        known = {p for part in self._parts.values() for p in part}
        if any(p not in known for group in optimizer.param_groups for p in group["params"]):
            raise EngineError(
                "the optimizer has parameters that the model has not; make it after fully_shard, and not between forward and backward"
            )
        self._done: dict[Any, Future[None]] = {}
        self._called: dict[Any, None] = {}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="anon-step")
        self._hook_model(model)
        self._hook_optimizer(optimizer)

    def step(self) -> None:
        """Start a step, when the one before is complete.

        Raises:
            RuntimeError, ValueError: as `Anon.step`; nothing has been updated then.
            EngineError: a parameter is not on the CPU, or hooks want to know when a step is made.
        """
        self.wait()
        optimizer = self._optimizer
        for p in (p for group in optimizer.param_groups for p in group["params"]):
            if local(p).device.type != "cpu":
                raise EngineError(
                    f"a parameter is on {local(p).device}: only a step on the CPU can run in the background; give fully_shard "
                    "offload_policy=CPUOffloadPolicy()"
                )
        of_all = (*global_hooks._global_optimizer_pre_hooks, *global_hooks._global_optimizer_post_hooks)
        if len(optimizer._optimizer_step_pre_hooks) > 1 or optimizer._optimizer_step_post_hooks or of_all:
            raise EngineError(
                "hooks of optimizer.step(), or torch's of every optimizer's, would run before the update or not at all; remove them, or "
                "step without overlap"
            )
        keys = [*self._called, *(key for key in self._parts if key not in self._called)]
        updates = optimizer.split_step([self._parts[key] for key in keys])
        self._called = {}
        self._done = {key: Future() for key in (*keys, REST)}
        optimizer._opt_called = True  # type: ignore[attr-defined] # for torch's schedulers, which warn where no step was made
        self._thread.submit(_run, updates, list(self._done.values()))

    def wait(self) -> None:
        """Until the step that was started is complete.

        Raises:
            Exception: what the update raised. The parameters that came after are then as before the step.
        """
        self._wait_for(self._done)

    def _wait_for(self, keys: Iterable[Any]) -> None:
        for key in keys:
            if key in self._done:
                self._done[key].result()

    def _settle(self, *_: Any) -> None:
        """Wait, and leave a failure for others to raise."""
        for future in self._done.values():
            future.exception()

    def _forget(self, *_: Any) -> None:
        """Wait, and let go of a failure: what it spoilt is being replaced."""
        self._settle()
        self._done = {}

    # -- hooks -------------------------------------------------------------------------------------

    def _collect(self, module: nn.Module, part: Any) -> None:
        """The parameters under a module, by the innermost `fully_shard` group that they are in."""
        part = _state(module) if isinstance(module, FSDPModule) else part
        self._parts.setdefault(part, []).extend(module.parameters(recurse=False))
        for child in module.children():
            self._collect(child, part)

    def _hook_model(self, model: nn.Module) -> None:
        def waits(*_: Any) -> None:
            self.wait()

        for module in model.modules():
            module.register_state_dict_pre_hook(waits)
            module.register_load_state_dict_pre_hook(self._settle)
            if isinstance(module, FSDPModule):
                module.register_forward_pre_hook(torch.compiler.disable(self._before_forward), prepend=True)
                module.unshard = self._waiting(module.unshard, (_state(module),))  # type: ignore[method-assign]
        model.register_forward_pre_hook(torch.compiler.disable(self._before_model), prepend=True)
        model.register_forward_hook(torch.compiler.disable(waits))
        model.zero_grad = self._waiting(model.zero_grad)  # type: ignore[method-assign]

    def _hook_optimizer(self, optimizer: Anon) -> None:
        optimizer.register_step_pre_hook(lambda *_: self.wait())
        optimizer.register_state_dict_pre_hook(lambda *_: self.wait())
        optimizer.register_load_state_dict_pre_hook(self._forget)
        for name in ("zero_grad", "rebase", "init_state", "add_param_group"):
            setattr(optimizer, name, self._waiting(getattr(optimizer, name)))

    def _waiting(self, method: Callable[..., Any], keys: Iterable[Any] | None = None) -> Callable[..., Any]:
        """The method, after a wait for these parts, or for all; not where `zero_grad` only lets go of the gradients."""

        @wraps(method)
        def waiting(*args: Any, **kwargs: Any) -> Any:
            lets_go = method.__name__ == "zero_grad" and (args[0] if args else kwargs.get("set_to_none", True))
            if not lets_go:
                self._wait_for(self._done if keys is None else keys)
            return method(*args, **kwargs)

        return waiting

    def _before_model(self, *_: Any) -> None:
        self._called.setdefault(OUTSIDE)
        self._wait_for([OUTSIDE])

    def _before_forward(self, module: nn.Module, *_: Any) -> None:
        """Before FSDP2's hook, which gathers the module's parameters and those that are prefetched with them."""
        state = _state(module)
        if state._is_root is None:  # FSDP2 sets itself up now, and may move shards to other memory
            self.wait()
        for key in (state, *state._states_to_forward_prefetch):
            self._called.setdefault(key)
            self._wait_for([key])


def _state(module: Any) -> Any:
    """What FSDP2 keeps of a module, or of several that were given to `fully_shard` together."""
    return module._get_fsdp_state()


def _run(updates: list[Callable[[], None]], done: list[Future[None]]) -> None:
    """In the thread: each part, until one fails, which is then the failure of all that come after."""
    failure: BaseException | None = None
    for update, future in zip(updates, done, strict=True):
        try:
            if failure is None:
                update()
        except BaseException as error:
            log.exception("Anon's step failed in the background; this is raised by what waits for it")
            failure = error
        if failure is None:
            future.set_result(None)
        else:
            future.set_exception(failure)
