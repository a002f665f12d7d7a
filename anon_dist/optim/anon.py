"""Anon as a `torch.optim.Optimizer`: torch's contract of param groups, state and `step`.

A step goes through `Stepper.ready`: the group's `Regime` says what is done (a `StepPlan` for each parameter), `gather` to which tensors (a
`Bucket`), and a backend does it. How state is saved, copied and loaded: `saving.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Never, overload

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from anon_dist.optim.hyper import meant, no_argument, normalise, validate
from anon_dist.optim.members import absent, allocate
from anon_dist.optim.rebase import UNSET, change, chosen, given
from anon_dist.optim.regime import HISTORY, Regime
from anon_dist.optim.saving import Saved
from anon_dist.optim.scaling import GradScaling
from anon_dist.optim.schedule import Window
from anon_dist.optim.state import LazyState
from anon_dist.optim.stepper import Stepper


class Anon(Saved):
    """Anon: adaptivity as a dial γ, made safe by the incremental delayed update (IDU) of the preconditioner (arXiv 2605.02317).

    γ = 1 adapts like Adam, γ = 0 is debiased momentum SGD exactly, γ > 1 goes beyond Adam, and γ < 0 slows quiet coordinates down. The
    recurrence and its symbols are written out in `anon_dist.optim.update`. The defaults are the paper's; every extension is off.

    State is made by `init_state()` or the first step and never at construction (engines swap the parameters after it); `state` lists its
    keys.

    Parameters may be DTensors (FSDP2, tensor parallelism): each rank updates its local shard, without communication.

    Args:
        params: parameters, `(name, parameter)` pairs, or param groups; every argument below may differ by group.
        lr: learning rate η ≥ 0; a float, or a tensor of one element. The step is η · v · m̂, and v's unit depends on γ: rescale η with γ.
        betas: decay of the gradient's mean and of the squared gradient's, each in [0, 1).
        eps: ε > 0, added to the second moment before it is raised to γ.
        gamma: adaptivity γ, any real number (tested for |γ| ≤ 4). An edit in `param_groups` acts from a refresh on; see `next_gammas`.
        weight_decay: decoupled weight decay λ ≥ 0.
        refresh_ratio: ρ > 1; refreshes are at a_0 = 1, a_{k+1} = max(a_k + 1, ⌈ρ a_k⌉). 2 is the paper's.
        beta3: weight in [0, 1) of the old preconditioner at a refresh. 0.5 is the paper's.
        update_clip: c > 0: each element of v · m̂ is kept in [−c, c]. Its unit depends on γ as lr's does: 1 does next to nothing at γ = 0.
            An element whose m is not finite, after an infinite gradient, becomes NaN, with a clip and without one.
            A clip that cuts off rare large gradients loses Anon's convergence where those alone say where to go (tools/claims).
        window: the second moment is read and written only in the last so many steps before a refresh. "auto": the fewest that leave out
            less than 2^-24 of the weight. None: always, as in the paper. A coordinate that was active before a window and silent inside
            it gets a larger step than the paper's.
        hold_silent: for γ < 0: an element whose gradients since the last refresh are all 0 keeps its preconditioner (1 at first), instead
            of being refreshed from ε alone, which would turn it off for a long time.
        max_interval: the most steps between two refreshes, whatever ρ says; None: no limit. Of use with a basis, which ages sooner than v.
        nesterov: move by (β1 m + (1 − β1) g) / (1 − β1^(t+1)) in place of m̂ (Dozat 2016).
        cautious_decay: decay an element only where that moves it as the update does (arXiv 2510.12402).
        basis: turn the gradients of matrices into a basis in which their "columns", their "rows" or "both" are uncorrelated, and be Anon
            there. Parameters of more dimensions are matrices of their first against the others; vectors are as without. Matrices with
            more than 16 rows to a column are taken for embeddings, whose rows are not turned. Each rank needs whole rows, or whole blocks
            of them: engines that cut within rows are refused. See `basis` and `turned` for
            the method, `flat` for DeepSpeed's stage 3.
        basis_block: the basis is made of blocks of so many neighbours: 8 bytes of state for each of them and each column or row.
        maximize: ascend instead of descend.
        foreach: update all tensors at once (True) or one after the other (False): the same bits. None: at once on accelerators only.
        fused: one pass over memory, by a kernel that is compiled at the first step: C on the CPU, Triton on NVIDIA GPUs. True: always, or
            an error. False: never. None: if `foreach` is None and all ranks can, for which the first step waits up to a minute (see
            `backends.choice`). The kernels' bits are not those of `foreach`; both keep the same bounds of rounding.
        state_dtype: dtype of exp_avg, exp_avg_sq and precond: float32 (None), float64 or bfloat16; or by state, as in
            `{"exp_avg": "int8", "precond": "bfloat16"}`, float32 where nothing is said. int8 is for exp_avg alone: blocks of 32 elements
            of the local shard share a power of two. Fewer bits are rounded stochastically (see `rounding`).
        stochastic_rounding: round bfloat16 parameters stochastically: for training without a float32 master copy. To nearest, updates
            smaller than about 1/500 of a parameter are lost.

    Raises:
        ValueError: an argument is out of its range.
        TypeError: there is no such argument; naming those that are near.
    """

    grad_scale: Tensor
    """If set: the next step divides gradients by this number, inside its one pass over memory. A loss scale, or max(norm / limit, 1) to
    clip gradients by their norm; on the parameters' device. torch's GradScaler sets it, as for fused optimizers."""
    found_inf: Tensor
    """If set and not 0: the next step writes nothing, and no step count moves. It may live on a GPU, which is not waited for."""
    _step_supports_amp_scaling = True  # tells torch's GradScaler of the two

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
        max_interval: int | None = None,
        nesterov: bool = False,
        cautious_decay: bool = False,
        basis: str | None = None,
        basis_block: int = 128,
        maximize: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
        state_dtype: torch.dtype | str | Mapping[str, torch.dtype | str] | None = None,
        stochastic_rounding: bool = False,
        **unknown: Never,
    ) -> None:
        defaults = {k: v for k, v in locals().items() if k not in ("self", "params", "unknown", "__class__")}
        for name in unknown:
            raise TypeError(f"Anon: {no_argument(name, defaults)}")
        normalise(defaults)
        validate(defaults)
        self._stepper = Stepper()
        super().__init__(params, defaults)
        self.state = LazyState()

    # -- param groups ------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a param group; values it does not give are the defaults.

        Keys that Anon does not know are kept, as torch keeps them, for who put them there (schedulers, say).

        Raises:
            ValueError: a hyperparameter is out of its range, or a parameter appears twice.
            TypeError: a parameter is complex, or a key is a hyperparameter's but for a mistake in writing.
        """
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            for name in group:
                if meant(name, self.defaults):
                    raise TypeError(f"Anon: in a param group: {no_argument(name, self.defaults)}")
            normalise(group)
            validate(group)
            if len(set(group["params"])) < len(group["params"]):
                raise ValueError("Anon: a parameter appears more than once in a param group; give each once")
            if any(p.is_complex() for p in group["params"]):
                raise TypeError("Anon: complex parameters are not supported; optimize torch.view_as_real(parameter)")
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise
        group[HISTORY] = Regime(group).fresh()
        self._stepper.silence.check(group)

    def rebase(
        self,
        *,
        gamma: float | None = None,
        refresh_ratio: float | None = None,
        beta2: float | None = None,
        beta3: float | None = None,
        window: Window = UNSET,
        max_interval: int | None = UNSET,
        basis: str | None = UNSET,
        basis_block: int | None = None,
        group: int | None = None,
    ) -> None:
        """Change, in the middle of a run, hyperparameters that the state depends on. optim/README.md says what may be edited instead.

        - gamma: at once; the preconditioner is converted, d ← d^(γ'/γ).
        - beta3: from the next refresh on.
        - basis, basis_block: at once. A new basis starts at I, so that the next step is as it would have been. From one that is left the
          momentum is turned back exactly, the preconditioner approximately (see `frame.rebase`).
        - refresh_ratio, beta2, window, max_interval: after the largest step count in the group, keeping the age of the second moment (see
          `schedule.Schedule`). A parameter that is behind, for want of gradients, keeps the old values until its own count is there.

        Every rank must make the same call between the same two steps.

        Args:
            group: index of the param group; None for all.

        Raises:
            ValueError: a value is out of range, there is no such group, or the preconditioner cannot be converted (from γ = 0, say).
            RuntimeError: another hyperparameter that the state depends on was edited in `param_groups`, or not all parameters with state
                are in there (as DeepSpeed has it in a step).
        """
        values = given(locals())
        self.settle()
        indices = chosen(self.param_groups, group)
        change(self.param_groups, self.state, self._stepper.hidden, values, indices)
        self._stepper.known = ()
        for index in indices if gamma is not None else ():
            self._stepper.silence.check(self.param_groups[index])

    def next_gammas(self) -> list[float]:
        """For each group, the γ in force in the next step's update. What has a unit that depends on γ (lr, update_clip) is to follow it.

        An edited `group["gamma"]` is pending. It comes into force in the step that refreshes the parameters with the most steps, and all
        preconditioners of the group are converted then, d ← d^(γ'/γ). From γ = 0 they cannot be: a refresh makes d anew, d = σ^γ', and a
        step that would have to convert a parameter without refreshing it is refused.
        """
        self.settle()
        taken, groups = self._stepper.hidden.taken, self.param_groups
        return [Regime(group).next_gamma(taken(group, groups, self.state)) for group in groups]

    # -- state -------------------------------------------------------------------------------------

    def init_state(self) -> None:
        """Allocate the state of every parameter that has none, at step 0, and drop the state of tensors that are no parameters any more.

        Call it when the engine has wrapped the parameters, and before a checkpoint library looks at the optimizer: torch's makes missing
        states with a step on zero gradients, which would count as Anon's first refresh.
        """
        allocate(self.param_groups, self.state)
        for p in absent(self.param_groups, self.state):
            del self.state[p]
        self._stepper.hidden.meet(self.param_groups, self.state)
        self._stepper.let_go(self.param_groups)

    # -- step --------------------------------------------------------------------------------------

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One step of every parameter that has a gradient, or no elements; the others' step counts stay.

        Args:
            closure: re-evaluates the model and returns the loss, which is returned then.

        Raises:
            RuntimeError: a gradient is sparse or sharded otherwise than its parameter, a hyperparameter that the state depends on was
                changed without `rebase`, γ leaves 0 (see `next_gammas`), or `fused=True` is not possible. Nothing has been updated then.
            ValueError: a hyperparameter was set out of its range.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for run in self._stepper.ready(self.param_groups, self.state, GradScaling.of(self), ()):
            run()
        self._stepper.start_renewals()
        return loss

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
        """
        runs = self._stepper.ready(self.param_groups, self.state, GradScaling.of(self), parts)
        return [torch.no_grad()(run) for run in runs]
