"""Anon as a `torch.optim.Optimizer`: param groups, state, and the dispatch of a step to the arithmetic of `update.py`."""

from __future__ import annotations

import warnings
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, overload

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from anon_dist.optim import update
from anon_dist.optim.hyper import (
    HISTORY,
    STATE_DTYPES,
    append_history,
    drifted,
    new_history,
    schedule_of,
    state_dtype_name,
    validate,
)
from anon_dist.optim.schedule import Window

STATE_KEYS = ("step", "exp_avg", "exp_avg_sq", "precond")
BUCKET_ELEMENTS = 1 << 26
"""The foreach path makes temporaries as large as the tensors it is given at once; no more than this many elements."""

_UNSET: Any = object()


class Anon(Optimizer):
    """Anon: adaptivity as a dial γ, made safe by the incremental delayed update (IDU) of the preconditioner.

    arXiv 2605.02317, "Anon: Extrapolating Adaptivity Beyond SGD and Adam"; the recurrence is written out in `anon_dist.optim.update`.
    γ = 1 adapts like Adam, γ = 0 is debiased momentum SGD exactly, γ < 0 prefers flat minima, γ > 1 goes beyond Adam. The defaults are the
    paper's; every extension is off.

    State of each parameter, made by `init_state()` and never at construction (engines swap the parameters after it):

    | key | | dtype |
    |---|---|---|
    | `step` | steps taken, 0-dim, on the CPU | float32 |
    | `exp_avg` | m, the debiasable mean of the gradient | `state_dtype` |
    | `exp_avg_sq` | s, the mean of the squared gradient since the last refresh | `state_dtype` |
    | `precond` | v = d^(−1/2), the preconditioner, constant between refreshes | `state_dtype` |

    Parameters may be DTensors (FSDP2, tensor parallelism): each rank updates its local shard, without communication.

    Args:
        params: parameters, `(name, parameter)` pairs, or param groups; every argument below may differ by group.
        lr: learning rate η ≥ 0; a float, or a tensor of one element. The step is η · v · m̂, and v's unit depends on γ: rescale η with γ.
        betas: decay of the gradient's mean and of the squared gradient's, each in [0, 1).
        eps: ε > 0, added to the second moment before it is raised to γ.
        gamma: adaptivity γ, any real number (tested for |γ| ≤ 4).
        weight_decay: decoupled weight decay λ ≥ 0.
        refresh_ratio: ρ > 1; refreshes are at a_0 = 1, a_{k+1} = max(a_k + 1, ⌈ρ a_k⌉). 2 is the paper's.
        beta3: weight in [0, 1) of the old preconditioner at a refresh. 0.5 is the paper's.
        update_clip: c > 0: each element of v · m̂ is kept in [−c, c]. Like lr it depends on γ: 1 does next to nothing at γ = 0.
        window: the second moment is read and written only in the last so many steps before a refresh; "auto" is the shortest window
            that leaves out less than 2^-24 of the weight. None: always, as in the paper. A coordinate that was active before a
            window and silent inside it gets a larger step than the paper's.
        hold_silent: an element whose squared gradients since the last refresh are all 0 keeps its preconditioner (1 at first)
            instead of being refreshed from ε alone; meant for γ < 0, where ε^γ would turn such elements off for a long time.
        maximize: ascend instead of descend.
        foreach: update all tensors at once (True) or one after the other (False). None: at once on accelerators only, since one after
            the other is kinder to a CPU's caches. The results are the same bits.
        state_dtype: dtype of exp_avg, exp_avg_sq and precond: float32 (None), float64 or bfloat16 (rounded to nearest).

    Raises:
        ValueError: an argument is out of its range.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-16,
        gamma: float = 1.0,
        weight_decay: float = 0.0,
        *,
        refresh_ratio: float = 2.0,
        beta3: float = 0.5,
        update_clip: float | None = None,
        window: Window = None,
        hold_silent: bool = False,
        maximize: bool = False,
        foreach: bool | None = None,
        state_dtype: torch.dtype | str | None = None,
    ) -> None:
        defaults: dict[str, Any] = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "gamma": gamma,
            "weight_decay": weight_decay,
            "refresh_ratio": refresh_ratio,
            "beta3": beta3,
            "update_clip": update_clip,
            "window": window,
            "hold_silent": hold_silent,
            "maximize": maximize,
            "foreach": foreach,
            "state_dtype": state_dtype_name(state_dtype),
        }
        validate(defaults)
        super().__init__(params, defaults)
        self.state = _State(self)

    # -- param groups ------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a param group; values it does not give are the defaults.

        Raises:
            ValueError: a hyperparameter is out of its range.
            TypeError: a parameter is complex.
        """
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            group["state_dtype"] = state_dtype_name(group["state_dtype"])
            validate(group)
            if any(p.is_complex() for p in group["params"]):
                raise TypeError("Anon: complex parameters are not supported; optimize torch.view_as_real(parameter)")
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise
        group.setdefault(HISTORY, new_history(group))
        if group["gamma"] < 0 and not group["hold_silent"] and group["eps"] < 1e-10:
            warnings.warn(
                f"Anon: at gamma = {group['gamma']} and eps = {group['eps']} a coordinate whose gradient is exactly zero up to a "
                "refresh (rare embedding rows, zero-initialised layers) hardly moves for a long time after; hold_silent=True or a "
                "larger eps avoids it",
                stacklevel=2,
            )

    def rebase(
        self,
        *,
        gamma: float | None = None,
        refresh_ratio: float | None = None,
        beta2: float | None = None,
        beta3: float | None = None,
        window: Window = _UNSET,
        group: int | None = None,
    ) -> None:
        """Change, in the middle of a run, hyperparameters that the state depends on.

        lr, weight_decay, eps and update_clip can be set in `param_groups` at any time and act at once. These cannot, since the
        preconditioner and the second moment were made with the old values:

        - gamma: the preconditioner is converted, d ← d^(γ'/γ);
        - refresh_ratio, beta2, window: from the next step on, keeping the age of the second moment (see `schedule.Schedule`);
        - beta3: from the next refresh on.

        Every rank must make the same call between the same two steps.

        Args:
            group: index of the param group; None for all.

        Raises:
            ValueError: a value is out of range, or γ is left from 0, where v = 1 says nothing about the gradient's scale.
        """
        groups = self.param_groups if group is None else [self.param_groups[group]]
        given = {"gamma": gamma, "refresh_ratio": refresh_ratio, "beta3": beta3}
        changes: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        if window is not _UNSET:
            changes["window"] = window
        changed = []
        for old in groups:
            new = {**old, **changes}
            if beta2 is not None:
                new["betas"] = (old["betas"][0], beta2)
            validate(new)
            taken = self._steps_taken(old)
            if taken and old["gamma"] == 0.0 and new["gamma"] != 0.0:
                raise ValueError(
                    "Anon: gamma cannot be changed from 0 after steps were taken: v = 1 says nothing about the gradient's scale. Keep "
                    "the weights and start a new optimizer"
                )
            new[HISTORY] = append_history({**new, HISTORY: old[HISTORY]}, taken)
            changed.append((old, new, taken))
        for old, new, taken in changed:
            if taken and new["gamma"] != old["gamma"]:
                states = [self.state[p] for p in old["params"] if p in self.state]
                update.convert_exponent([_local(s["precond"]) for s in states], new["gamma"] / old["gamma"])
            old.update(new)

    def _steps_taken(self, group: dict[str, Any]) -> int:
        """The largest step count of the group's parameters."""
        return max((int(self.state[p]["step"]) for p in group["params"] if p in self.state), default=0)

    # -- state -------------------------------------------------------------------------------------

    def init_state(self) -> None:
        """Allocate the state of every parameter that has none, at step 0, and drop the state of tensors that are no parameters any more.

        Idempotent. Call it when the engine has wrapped the parameters, and before a checkpoint library looks at the optimizer: torch's
        makes missing states with a step on zero gradients, which would count as Anon's first refresh.
        """
        self._ensure_state()
        current = {p for group in self.param_groups for p in group["params"]}
        for key in [key for key in self.state if key not in current]:
            del self.state[key]

    def _ensure_state(self) -> None:
        """`init_state`, but for state that has been stepped and whose parameter is absent from the groups: that stays.

        DeepSpeed shows the optimizer one param group, or in stage 3 one sub-group, at a time.
        """
        state, present = self.state, 0
        for group in self.param_groups:
            dtype = STATE_DTYPES[group["state_dtype"]]
            for p in group["params"]:
                if not state.get(p) and (p.requires_grad or p.grad is not None):
                    state[p] = _fresh_state(p, dtype)
                present += p in state
        if len(state) != present:
            current = {p for group in self.param_groups for p in group["params"]}
            for key in [k for k, s in state.items() if k not in current and (not s or int(s["step"]) == 0)]:
                del state[key]

    def state_dict(self) -> dict[str, Any]:
        """The state as torch has it, with the state of every trainable parameter in it, also before the first step."""
        self._ensure_state()
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict()` gave: states in `state_dtype` whatever the parameters' dtype, `step` on the CPU.

        Raises:
            ValueError: another optimizer's state, a state of another shape or sharding, or hyperparameters out of range.
        """

        # torch casts state to the parameter's dtype. Behind `_AsIs` it passes untouched, and __setstate__ takes it out again before
        # any post-hook runs. A pre-hook, the last one, so that the user's own see plain tensors.
        def protect(_: Optimizer, loaded: dict[str, Any]) -> dict[str, Any]:
            states = {p: {k: _AsIs(v) for k, v in s.items()} for p, s in loaded["state"].items()}
            return {**loaded, "state": states}

        handle = self.register_load_state_dict_pre_hook(protect)
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()
        self._ensure_state()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take over param groups and states (from `load_state_dict`, `copy` or `pickle`), checked before anything is replaced."""
        defaults = dict(self.__dict__.get("defaults", state.get("defaults", {})))
        defaults.pop(
            "differentiable", None
        )  # torch adds it to what it restores; here it would be an option without effect
        groups = [{**defaults, **g} for g in state["param_groups"]]
        for group in groups:
            group["state_dtype"] = state_dtype_name(group["state_dtype"])
            group.setdefault(HISTORY, new_history(group))
            validate(group)
        checked = _State(self)
        names = dict(_named_params(groups))
        dtypes = {p: STATE_DTYPES[g["state_dtype"]] for g in groups for p in g["params"]}
        for key, values in state["state"].items():
            if key in names:
                checked[key] = _checked_state(names[key], key, values, dtypes[key])
        super().__setstate__({**state, "param_groups": groups, "state": checked})

    # -- step --------------------------------------------------------------------------------------

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One step of every parameter that has a gradient; the others' step counts stay.

        Args:
            closure: re-evaluates the model and returns the loss.

        Returns:
            The closure's loss, if there is one.

        Raises:
            RuntimeError: sparse gradients, or a hyperparameter that the state depends on was changed without `rebase`.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._ensure_state()
        for index, group in enumerate(self.param_groups):
            self._check_history(index, group)
            for bucket in self._buckets(index, group):
                for part in bucket.parts(group["foreach"]):
                    _update(part, group)
        return loss

    def _check_history(self, index: int, group: dict[str, Any]) -> None:
        """Refuse values that the state was not made with; before the first step there is no such state."""
        differs = drifted(group)
        if not differs:
            return
        if self._steps_taken(group) == 0:
            validate(group)
            group[HISTORY] = new_history(group)
            return
        name, (recorded, present) = next(iter(differs.items()))
        raise RuntimeError(
            f"Anon: {name} of param group {index} was changed from {recorded!r} to {present!r} after steps were taken. The state was made "
            f"with {recorded!r}: call optimizer.rebase({name}={present!r}), which converts it, or set {recorded!r} again"
        )

    def _buckets(self, index: int, group: dict[str, Any]) -> Iterator[_Bucket]:
        """The group's local tensors, those together that share step count, device and dtypes; steps counted up."""
        buckets: dict[tuple[Any, ...], _Bucket] = {}
        for position, p in enumerate(group["params"]):
            if p.grad is None:
                continue
            if p.grad.is_sparse:
                raise RuntimeError(
                    f"Anon: parameter {position} of param group {index} has a sparse gradient, which is not supported; make it dense "
                    "(nn.Embedding(sparse=False))"
                )
            state = self.state[p]
            state["step"] += 1
            step = int(state["step"])
            grad = _local_gradient(p)
            local = [_local(p), grad, *(_local(state[key]) for key in STATE_KEYS[1:])]
            key = (step, local[0].device, *(t.dtype for t in local))
            buckets.setdefault(key, _Bucket(step)).add(local)
        yield from buckets.values()


@dataclass
class _Bucket:
    """Local tensors that one call of each update function can take together."""

    step: int
    theta: list[Tensor] = field(default_factory=list)
    grad: list[Tensor] = field(default_factory=list)
    m: list[Tensor] = field(default_factory=list)
    s: list[Tensor] = field(default_factory=list)
    v: list[Tensor] = field(default_factory=list)

    def add(self, tensors: list[Tensor]) -> None:
        for members, tensor in zip((self.theta, self.grad, self.m, self.s, self.v), tensors, strict=True):
            members.append(tensor)

    def parts(self, foreach: bool | None) -> Iterator[_Bucket]:
        """The bucket in parts of bounded size, or of one tensor each (see `Anon`'s argument `foreach`)."""
        together = self.theta[0].device.type != "cpu" if foreach is None else foreach
        start, elements = 0, 0
        for i, tensor in enumerate(self.theta):
            elements += tensor.numel()
            if not together or elements >= BUCKET_ELEMENTS or i + 1 == len(self.theta):
                lists = (x[start : i + 1] for x in (self.theta, self.grad, self.m, self.s, self.v))
                yield _Bucket(self.step, *lists)
                start, elements = i + 1, 0


def _update(bucket: _Bucket, group: dict[str, Any]) -> None:
    """One Anon step of the bucket's tensors."""
    plan = schedule_of(group).plan(bucket.step)
    beta1 = group["betas"][0]
    lr = group["lr"]
    if isinstance(lr, Tensor) and lr.device.type == "cpu":
        lr = float(lr)
    compute = torch.promote_types(torch.float32, torch.promote_types(bucket.theta[0].dtype, bucket.m[0].dtype))

    grad = _in(compute, bucket.grad)
    if group["maximize"]:
        grad = list(torch._foreach_neg(grad))
    theta, m, s, v = (_in(compute, x) for x in (bucket.theta, bucket.m, bucket.s, bucket.v))
    if group["weight_decay"]:
        update.decay_weights(theta, 1.0 - lr * group["weight_decay"])
    update.update_momentum(m, grad, beta1)
    if plan.accumulate:
        update.accumulate(s, grad, plan.beta2)
    if plan.refresh:
        update.refresh(
            v,
            s,
            gamma=group["gamma"],
            beta3=group["beta3"],
            eps=group["eps"],
            debias=plan.debias,
            first=plan.first,
            hold_silent=group["hold_silent"],
        )
    update.apply_update(theta, v, m, lr=lr, debias=1.0 - beta1**bucket.step, clip=group["update_clip"])
    _write_back(bucket.theta, theta)
    _write_back(bucket.m, m)
    if plan.accumulate or plan.refresh:
        _write_back(bucket.s, s)
    if plan.refresh:
        _write_back(bucket.v, v)


def _in(dtype: torch.dtype, tensors: list[Tensor]) -> list[Tensor]:
    """The tensors themselves if they have this dtype, converted copies if not."""
    return tensors if tensors[0].dtype == dtype else [t.to(dtype) for t in tensors]


def _write_back(stored: list[Tensor], computed: list[Tensor]) -> None:
    if stored is not computed:
        torch._foreach_copy_(stored, computed)


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _local_gradient(p: Tensor) -> Tensor:
    """This rank's part of p's gradient.

    Raises:
        RuntimeError: the gradient is laid out otherwise than the parameter (a pending sum over ranks, say).
    """
    grad = p.grad
    assert grad is not None
    if isinstance(p, DTensor) != isinstance(grad, DTensor):
        raise RuntimeError(
            f"Anon: the parameter is a {type(p).__name__} and its gradient a {type(grad).__name__}; they must be sharded alike"
        )
    if isinstance(p, DTensor) and isinstance(grad, DTensor) and grad.placements != p.placements:
        raise RuntimeError(
            f"Anon: gradient placements {grad.placements} differ from the parameter's {p.placements}; redistribute it before step()"
        )
    return _local(grad)


# -- state -------------------------------------------------------------------------------------


class _State(defaultdict[Any, Any]):
    """`Optimizer.state`, which allocates itself when it is asked whether it is empty.

    torch.distributed.checkpoint asks this (`_init_optim_state`) and, told yes, makes the state with a step on zero gradients. That step
    would be Anon's first refresh, and nothing about it tells every rank alike that it is not a real one.
    """

    def __init__(self, owner: Anon) -> None:
        super().__init__(dict)
        self._owner = weakref.ref(owner)

    def __bool__(self) -> bool:
        owner = self._owner()
        if owner is not None and owner.__dict__.get("state") is self:
            owner._ensure_state()
        return len(self) > 0

    def __reduce__(self) -> Any:  # copies and pickles are plain; Anon.__setstate__ makes them its own
        return defaultdict, (dict,), None, None, iter(self.items())


class _AsIs:
    """A state value on its way through torch's `load_state_dict`, which would cast a tensor."""

    def __init__(self, value: Any) -> None:
        self.value = value


def _fresh_state(p: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """The state before the first step: sharded as the parameter is, and neutral (v = 1)."""
    p = p.detach()
    return {
        "step": torch.zeros((), dtype=torch.float32),
        "exp_avg": torch.zeros_like(p, dtype=dtype, memory_format=torch.preserve_format),
        "exp_avg_sq": torch.zeros_like(p, dtype=dtype, memory_format=torch.preserve_format),
        "precond": torch.ones_like(p, dtype=dtype, memory_format=torch.preserve_format),
    }


def _named_params(groups: Iterable[dict[str, Any]]) -> Iterator[tuple[Tensor, str]]:
    """(parameter, a name for error messages)."""
    index = 0
    for group in groups:
        for name, p in zip(group.get("param_names") or [""] * len(group["params"]), group["params"], strict=True):
            yield p, f"parameter {index}" + (f" ({name})" if name else "")
            index += 1


def _checked_state(name: str, p: Tensor, loaded: dict[str, Any], dtype: torch.dtype) -> dict[str, Tensor]:
    """A loaded state in the dtype asked for and on the parameter's device.

    Raises:
        ValueError: keys are missing or foreign, or a shape or sharding is not the parameter's.
    """
    values = {k: v.value if isinstance(v, _AsIs) else v for k, v in loaded.items()}
    missing, foreign = [k for k in STATE_KEYS if k not in values], [k for k in values if k not in STATE_KEYS]
    if missing or foreign:
        raise ValueError(
            f"Anon: the state of {name} has {sorted(map(str, values))} where Anon's has {sorted(STATE_KEYS)}: it is another optimizer's. "
            "Load the weights and start Anon's state afresh, or load the state into the optimizer that wrote it"
        )
    state = {"step": torch.tensor(float(values["step"]), dtype=torch.float32)}
    for key in STATE_KEYS[1:]:
        value = values[key]
        if (
            not isinstance(value, Tensor)
            or value.shape != p.shape
            or isinstance(value, DTensor) != isinstance(p, DTensor)
        ):
            found = f"{type(value).__name__}{tuple(getattr(value, 'shape', ()))}"
            raise ValueError(
                f"Anon: {key} of {name} is a {found}, but the parameter is a {type(p).__name__}{tuple(p.shape)}: the checkpoint is of "
                "another model, or sharded otherwise (load sharded ones with torch.distributed.checkpoint)"
            )
        state[key] = value.to(dtype=dtype, device=p.device)
    return state
