"""Anon as a `torch.optim.Optimizer`: torch's contract of param groups, state and `step`.

What a step does is said by the group's `Regime`, on which tensors by `gather`; a backend does it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from anon_dist.optim import update
from anon_dist.optim.backends import choice
from anon_dist.optim.gather import Bucket, Gathered, gather
from anon_dist.optim.host_copy import HostCopy, known_to_the_host
from anon_dist.optim.hyper import is_plain, normalise, state_dtypes, validate
from anon_dist.optim.plan import StepPlan
from anon_dist.optim.regime import HISTORY, Regime, Turn
from anon_dist.optim.schedule import Window
from anon_dist.optim.state import AsIs, LazyState, checked_state, decoded, fresh_state, local, named_parameters

_UNSET: Any = object()


@dataclass
class _Work:
    """The update of a bucket, to be run once."""

    bucket: Bucket
    plans: list[StepPlan]
    backend: choice.Backend

    @torch.no_grad()
    def run(self) -> None:
        self.backend(self.bucket.lists, self.plans, self.bucket.exponents, self.bucket.addresses)
        self.bucket.count()


class Anon(Optimizer):
    """Anon: adaptivity as a dial γ, made safe by the incremental delayed update (IDU) of the preconditioner.

    arXiv 2605.02317, "Anon: Extrapolating Adaptivity Beyond SGD and Adam"; the recurrence is written out in `anon_dist.optim.update`.
    γ = 1 adapts like Adam, γ = 0 is debiased momentum SGD exactly, γ > 1 goes beyond Adam, and γ < 0 slows quiet coordinates down. The
    defaults are the paper's; every extension is off.

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
        gamma: adaptivity γ, any real number (tested for |γ| ≤ 4). Edited in `param_groups` between steps, as a scheduler edits lr, it
            takes effect at a refresh; see `next_gammas`.
        weight_decay: decoupled weight decay λ ≥ 0.
        refresh_ratio: ρ > 1; refreshes are at a_0 = 1, a_{k+1} = max(a_k + 1, ⌈ρ a_k⌉). 2 is the paper's.
        beta3: weight in [0, 1) of the old preconditioner at a refresh. 0.5 is the paper's.
        update_clip: c > 0: each element of v · m̂ is kept in [−c, c]. Like lr it depends on γ: 1 does next to nothing at γ = 0. A clip
            that cuts off rare large gradients loses Anon's convergence where those alone say where to go (tools/claims).
        window: the second moment is read and written only in the last so many steps before a refresh; "auto" is the shortest window
            that leaves out less than 2^-24 of the weight. None: always, as in the paper. A coordinate that was active before a
            window and silent inside it gets a larger step than the paper's.
        hold_silent: an element whose squared gradients since the last refresh are all 0 keeps its preconditioner (1 at first)
            instead of being refreshed from ε alone; meant for γ < 0, where ε^γ would turn such elements off for a long time.
        maximize: ascend instead of descend.
        foreach: update all tensors at once (True) or one after the other (False). None: at once on accelerators only, since one after
            the other is kinder to a CPU's caches. The results are the same bits.
        fused: update in one pass over memory, by a kernel that is compiled for this machine at the first step (True; an error where it
            is not possible) or never (False): C on the CPU, Triton on NVIDIA GPUs. None: if `foreach` is None and all ranks can: at
            its first step the optimizer waits up to a minute for the other ranks' (see `backends.choice`). Within the same bounds of
            rounding as the other path, but not the same bits.
        state_dtype: dtype of exp_avg, exp_avg_sq and precond: float32 (None), float64 or bfloat16; or by state, as in
            `{"exp_avg": "int8", "exp_avg_sq": "bfloat16", "precond": "bfloat16"}`, float32 where nothing is said. int8 is for exp_avg
            alone: blocks of 32 elements of the local shard share a power of two (5.03 bytes per parameter in all, here); state dicts
            have it in bfloat16, exactly. Means are rounded stochastically, precond to nearest (see `rounding`). All bits but
            int8's are independent of the sharding.
        stochastic_rounding: round bfloat16 parameters stochastically, instead of to nearest, which loses updates smaller than about
            1/500 of a parameter: for training without a float32 master copy. Parameters of other dtypes are rounded to nearest.

    Raises:
        ValueError: an argument is out of its range.
    """

    grad_scale: Tensor
    """If it is set: gradients are divided by this number in the next step, inside its one pass over memory. A loss scale, or
    max(norm / limit, 1) to clip gradients by their norm; on the parameters' device. torch's GradScaler sets it, as for fused optimizers."""
    found_inf: Tensor
    """If it is set and not 0, the next step writes nothing, and no step count moves. It may live on a GPU, which is not waited for."""
    _step_supports_amp_scaling = True  # tells torch's GradScaler of the two

    _kernel_agreed: bool | None = None
    """Whether all ranks can use the fused kernel; None before the first step."""
    _last: Sequence[Gathered] = ()
    """What each group's tensors were when they were last gathered."""
    _unsettled: tuple[HostCopy, list[Bucket]] | None = None
    """The flag of the last step, where the host does not know it yet, and what was counted."""

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
        fused: bool | None = None,
        state_dtype: torch.dtype | str | Mapping[str, torch.dtype | str] | None = None,
        stochastic_rounding: bool = False,
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
            "fused": fused,
            "state_dtype": state_dtype,
            "stochastic_rounding": stochastic_rounding,
        }
        normalise(defaults)
        validate(defaults)
        super().__init__(params, defaults)
        self.state = LazyState()

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
            normalise(group)
            validate(group)
            if any(p.is_complex() for p in group["params"]):
                raise TypeError("Anon: complex parameters are not supported; optimize torch.view_as_real(parameter)")
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise
        group[HISTORY] = Regime(group).fresh()
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

        The others (lr, weight_decay, eps, update_clip, β1, maximize, hold_silent) can be set in `param_groups` at any time and act at
        once; so can gamma, which acts from a refresh on (see `next_gammas`). Here:

        - gamma: the preconditioner is converted, d ← d^(γ'/γ), at once;
        - beta3: from the next refresh on;
        - refresh_ratio, beta2, window: after the largest step count in the group, keeping the age of the second moment (see
          `schedule.Schedule`). A parameter that is behind, for want of gradients, keeps the old values until its own count is there.

        Every rank must make the same call between the same two steps.

        Args:
            group: index of the param group; None for all.

        Raises:
            ValueError: a value is out of range, or γ is left from 0, where v = 1 says nothing about the gradient's scale.
            RuntimeError: another of these hyperparameters was edited in `param_groups`, or the engine shows the optimizer only some of
                its parameters at a time (DeepSpeed), so that not all state could be converted.
        """
        self.settle()
        if self._has_absent_state():
            raise RuntimeError("Anon: rebase() needs all parameters in param_groups, and some with state are not there")
        given = {"gamma": gamma, "refresh_ratio": refresh_ratio, "beta3": beta3}
        changes: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        if window is not _UNSET:
            changes["window"] = window
        names = {*changes, *(["beta2"] if beta2 is not None else [])}
        changed = []
        for index in range(len(self.param_groups)) if group is None else [group]:
            old = self.param_groups[index]
            new = {**old, **changes}
            if beta2 is not None:
                new["betas"] = (old["betas"][0], beta2)
            normalise(new)
            validate(new)
            new[HISTORY], ratio = Regime(old).rebased(index, new, self._steps_taken(old), names)
            changed.append((old, new, ratio))
        for old, new, ratio in changed:
            if ratio != 1.0:
                self._convert([self.state[p] for p in old["params"] if p in self.state], ratio)
            old.update(new)

    def next_gammas(self) -> list[float]:
        """For each group, the γ in force in the next step's update.

        It is `group["gamma"]`, but where that has been edited: then the γ before stays until a step refreshes the group's foremost
        parameters, those with the most steps. In that step their preconditioners are converted, d ← d^(γ'/γ), as a part of the refresh.
        Parameters that are not refreshed in it, being behind for want of gradients, are converted alongside: a group has one γ. From
        γ = 0, where v = 1 says nothing, refreshed preconditioners are d = σ^γ' alone, as at first, and others cannot be converted: the
        step refuses that.

        Everything whose unit depends on γ (lr, update_clip, weight_decay) is to follow this γ. Foremost parameters are taken to get
        gradients.
        """
        self.settle()
        return [Regime(group).next_gamma(self._steps_taken(group)) for group in self.param_groups]

    @staticmethod
    def _convert(states: list[dict[str, Tensor]], ratio: float) -> None:
        update.convert_exponent([local(s["precond"]) for s in states], ratio)

    def _steps_taken(self, group: dict[str, Any]) -> int:
        """The largest step count of the group's parameters."""
        return max((int(self.state[p]["step"]) for p in group["params"] if p in self.state), default=0)

    def _has_absent_state(self) -> bool:
        """Whether there is state of parameters that are not in the groups at the moment."""
        return len(self.state) > sum(p in self.state for group in self.param_groups for p in group["params"])

    # -- state -------------------------------------------------------------------------------------

    def init_state(self) -> None:
        """Allocate the state of every parameter that has none, at step 0, and drop the state of tensors that are no parameters any more.

        Idempotent. Call it when the engine has wrapped the parameters, and before a checkpoint library looks at the optimizer: torch's
        makes missing states with a step on zero gradients, which would count as Anon's first refresh.
        """
        self._ensure_state()
        current = {p for group in self.param_groups for p in group["params"]}
        for key in [k for k in self.state if isinstance(k, Tensor) and k not in current]:
            del self.state[key]

    def _ensure_state(self) -> None:
        """`init_state`, but state of absent parameters is dropped only where it has not been stepped and others have taken their place.

        DeepSpeed shows the optimizer one param group, or in stage 3 one sub-group, at a time; and it holds on to the state's tensors.
        """
        state, present, replaced = self.state, 0, False
        for group in self.param_groups:
            dtypes = state_dtypes(group)
            for p in group["params"]:
                known = state.get(p)
                if known and known["exp_avg"].device != p.device and int(known["step"]) == 0:
                    known = None  # the model was moved since
                if not known and (p.requires_grad or p.grad is not None):
                    state[p] = fresh_state(p, dtypes)
                    replaced = True
                present += p in state
        if replaced and len(state) != present:
            current = {p for group in self.param_groups for p in group["params"]}
            absent = [k for k in state if isinstance(k, Tensor) and k not in current]
            for key in [k for k in absent if int(state[k].get("step", 0)) == 0]:
                del state[key]

    def state_dict(self) -> dict[str, Any]:
        """The state as torch has it, with the state of every trainable parameter in it, also before the first step.

        An 8-bit exp_avg is in it as bfloat16 (a copy, 2 bytes per parameter), so that any checkpoint library can reshard it.
        """
        self.settle()
        self._ensure_state()
        found = super().state_dict()
        return {**found, "state": {index: decoded(state) for index, state in found["state"].items()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict()` gave: states in the loaded group's `state_dtype` whatever they come in, `step` on the CPU.

        Parameters that have no state in it start afresh, with a warning if others have some.

        Raises:
            ValueError: another optimizer's state, a state of another shape or sharding, or hyperparameters out of range.
        """

        # torch casts state to the parameter's dtype. Behind `_AsIs` it passes untouched, and __setstate__ takes it out again before
        # any post-hook runs. A pre-hook, the last one, so that the user's own see plain tensors.
        def protect(_: Optimizer, loaded: dict[str, Any]) -> dict[str, Any]:
            states = {p: {k: AsIs(v) for k, v in s.items()} for p, s in loaded["state"].items()}
            return {**loaded, "state": states}

        self.settle()
        handle = self.register_load_state_dict_pre_hook(protect)
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()
        missing = [name for p, name in named_parameters(self.param_groups) if p.requires_grad and p not in self.state]
        if missing and len(self.state):
            warnings.warn(
                f"Anon: the loaded state has nothing for {', '.join(missing)}: it starts afresh there", stacklevel=2
            )
        self._ensure_state()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take over param groups and states (from `load_state_dict`, `copy` or `pickle`), checked before anything is replaced."""
        defaults = self.__dict__.get("defaults", state.get("defaults", {}))
        groups = [{**defaults, **g} for g in state.get("param_groups", self.__dict__.get("param_groups", []))]
        for group in groups:
            normalise(group)
            validate(group)
            group.setdefault(HISTORY, Regime(group).fresh())
        checked = LazyState()
        names = dict(named_parameters(groups))
        dtypes = {p: state_dtypes(g) for g in groups for p in g["params"]}
        for key, values in state.get("state", self.__dict__.get("state", {})).items():
            if key in names:
                checked[key] = checked_state(names[key], key, values, dtypes[key])
        super().__setstate__({**state, "param_groups": groups, "state": checked})
        self.defaults.pop("differentiable", None)  # torch adds it; here it would be an option without effect

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
            RuntimeError: sparse gradients, a gradient sharded otherwise than its parameter, a hyperparameter that the state depends on
                was changed without `rebase`, γ leaves 0 (see `next_gammas`), or `fused=True` where it is not possible. Nothing has been
                updated then.
            ValueError: a hyperparameter was set out of its range.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for work in self._work(())[0]:
            work.run()
        return loss

    def settle(self) -> None:
        """Know whether the last step was taken, where `found_inf` is on a GPU; until then it counts as taken.

        Everything here that needs to know calls it. What reads `state[p]["step"]` itself should, before.
        """
        if self._unsettled is not None:
            (flag, buckets), self._unsettled = self._unsettled, None
            if flag.value():
                for bucket in buckets:
                    bucket.count(-1.0)

    @torch.no_grad()
    def split_step(self, parts: Sequence[Iterable[Tensor]]) -> list[Callable[[], None]]:
        """The step that `step()` would take, in parts that are run later, all of them, one after the other: the same bits.

        What `step()` refuses is refused here, before anything is updated. The parts go by the gradients and hyperparameters of this moment;
        until a part has been run, its gradients must not be written to (they may be let go of), and its parameters and their state not be
        touched. `engines.overlap` sees to that.

        Args:
            parts: the parameters of each part.

        Returns:
            What to call for each part, and last for the parameters that are in none.

        Raises:
            RuntimeError, ValueError: as `step`.
        """
        return [partial(_run_all, work) for work in self._work(parts)]

    def _work(self, parts: Sequence[Iterable[Tensor]]) -> list[list[_Work]]:
        """The updates of a step, checked, of each part and of the parameters that are in none."""
        _refuse_capture()
        self.settle()
        if self._kernel_agreed is None and (kinds := choice.kinds(self.param_groups)):
            self._kernel_agreed = choice.agree(kinds)  # before anything that could keep a rank from it
        work: list[list[_Work]] = [[] for _ in range(len(parts) + 1)]
        found = self._buckets()
        if not any(found) and self._has_no_gradient():
            warnings.warn(
                "Anon: step() found no gradient in any parameter and did nothing. If the model was sharded after the optimizer was made "
                "(torch's fully_shard), the optimizer holds parameters that are not trained: make it afterwards",
                stacklevel=3,
            )
            return work
        for index, group in enumerate(self.param_groups):
            self._check_group(index, group)
        flag = getattr(self, "found_inf", None)
        if flag is not None and known_to_the_host(flag) and bool(flag):
            return work
        part_of = {p: i for i, part in enumerate(parts) for p in part}
        turns = [self._turn(i, group, b) for i, (group, b) in enumerate(zip(self.param_groups, found, strict=True))]
        if any(turns) and flag is not None and bool(flag):  # rare enough to wait for a GPU
            return work
        for group, buckets, turn in zip(self.param_groups, found, turns, strict=True):
            for bucket in buckets:
                backend = choice.choose(bucket.lists, group, bool(self._kernel_agreed))
                plans = self._plans(group, bucket, turn[0] if turn else None, bool(parts))
                for part, indices in _by_part(bucket, part_of).items():
                    chosen = bucket if len(indices) == len(bucket.params) else bucket.of(indices)
                    work[part].append(_Work(chosen, [plans[i] for i in indices], backend))
        for group, turn in zip(self.param_groups, turns, strict=True):
            if turn:
                self._convert(turn[1], 1.0 if turn[0].ratio is None else turn[0].ratio)
                group[HISTORY] = Regime(group).turned(turn[0], self._has_absent_state())
        if flag is not None and not known_to_the_host(flag) and not any(turns):
            self._unsettled = HostCopy(flag), [x.bucket for one in work for x in one]
        return work

    def _buckets(self) -> list[list[Bucket]]:
        """The buckets of each group."""
        groups = self.param_groups
        known = self._last if len(self._last) == len(groups) else [None] * len(groups)
        found = [k.buckets(group, self.state) if k else None for k, group in zip(known, groups, strict=True)]
        renewed = [buckets for buckets in found if buckets is not None]
        if any(renewed) and len(renewed) == len(groups):
            return renewed
        if self._has_no_gradient():
            return [[] for _ in groups]
        self._ensure_state()
        gathered = [gather(index, group, self.state) for index, group in enumerate(groups)]
        self._last = [remembered for _, remembered in gathered]
        return [buckets for buckets, _ in gathered]

    def _plans(self, group: dict[str, Any], bucket: Bucket, turn: Turn | None, later: bool) -> list[StepPlan]:
        """The plan of each parameter; `later`: when `lr` may have changed."""
        regime, lr, device = Regime(group), group["lr"], bucket.lists[0][0].device
        if isinstance(lr, Tensor):
            on_gpu = device.type != "cpu" and lr.device.type != "cpu"
            lr = (lr.detach().clone() if later else lr.detach()).to(device) if on_gpu else float(lr)
        scale, flag = (getattr(self, name, None) for name in ("grad_scale", "found_inf"))
        scale, flag = (None if x is None else x.to(device) for x in (scale, flag))
        made = {step: regime.plan(step, turn, lr=lr, grad_scale=scale, found_inf=flag) for step in set(bucket.steps)}
        return [made[step] for step in bucket.steps]

    def _turn(
        self, index: int, group: dict[str, Any], buckets: list[Bucket]
    ) -> tuple[Turn, list[dict[str, Tensor]]] | None:
        """If a pending γ comes into force in this step: the turn, and the states that are converted alongside, not being refreshed."""
        regime = Regime(group)
        steps = {step for bucket in buckets for step in bucket.steps}
        turn = regime.turn(steps, self._steps_taken(group)) if regime.is_pending else None
        if turn is None:
            return None
        refreshed = {
            id(counter)
            for bucket in buckets
            for counter, step in zip(bucket.counters, bucket.steps, strict=True)
            if regime.schedule.at(step).refresh
        }
        states = [self.state[p] for p in group["params"] if p in self.state]
        left = [s for s in states if int(s["step"]) and id(s["step"]) not in refreshed]
        absent = self._has_absent_state()
        if left and (turn.ratio is None or absent):
            raise RuntimeError(
                f"Anon: gamma of param group {index} was changed from {turn.old!r} to {turn.new!r}, and {len(left)} of its parameters have "
                "taken fewer steps than the others, for want of gradients: they cannot be converted, since "
                f"{'not all parameters are in it' if absent else regime.why_not(turn)}. Put them in a param group of their own, or set "
                f"{turn.old!r} again"
            )
        return turn, left

    def _has_no_gradient(self) -> bool:
        """Whether there are parameters, and none of them has a gradient."""
        parameters = [p for group in self.param_groups for p in group["params"] if p.numel()]
        return bool(parameters) and all(p.grad is None for p in parameters)

    def _check_group(self, index: int, group: dict[str, Any]) -> None:
        """Refuse values out of range and, once steps were taken, values that the state was not made with; an edited γ waits."""
        if not is_plain(group):
            normalise(group)
        validate(group)
        regime = Regime(group)
        if regime.drift():
            if self._steps_taken(group) or self._has_absent_state():
                regime.check_drift(index)
            else:
                group[HISTORY] = regime.fresh()


def _run_all(work: Iterable[_Work]) -> None:
    for one in work:
        one.run()


def _by_part(bucket: Bucket, part_of: Mapping[Tensor, int]) -> dict[int, Sequence[int]]:
    """Indices of the bucket's parameters by the part of the step that they are in; -1 for those in none."""
    if not part_of:
        return {-1: range(len(bucket.params))}
    found: dict[int, list[int]] = {}
    for i, p in enumerate(bucket.params):
        found.setdefault(part_of.get(p, -1), []).append(i)
    return dict(found)


def _refuse_capture() -> None:
    """A CUDA graph would replay one step's variant and numbers for ever."""
    if torch.cuda.is_available() and not torch.compiler.is_compiling() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "Anon: step() cannot be captured in a CUDA graph, since the host chooses what each step does (refresh, window, counts). "
            "Capture forward and backward, and call step() outside"
        )
