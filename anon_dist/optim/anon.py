"""Anon as a `torch.optim.Optimizer`: torch's contract of param groups, state and `step`.

A `Stepper` makes each step ready: what it does is said by the group's `Regime`, to which tensors by `gather`; a backend does it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from anon_dist.optim.hyper import normalise, validate, warn_of_replaced, warn_of_silence
from anon_dist.optim.members import absent, allocate, checked, complete, steps_taken
from anon_dist.optim.rebase import UNSET, change, given
from anon_dist.optim.regime import HISTORY, Regime
from anon_dist.optim.schedule import Window
from anon_dist.optim.state import LazyState, decoded, in_own_dtypes
from anon_dist.optim.stepper import Stepper, Told


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
    | `column_basis`, `row_basis` | the basis that a side of a matrix is turned into, if it is: (length of the side, block) | float32 |
    | `column_cov`, `row_cov` | the covariance of the momentum in it, of the same shape | float32 |

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
        max_interval: no two refreshes are further apart than so many steps, whatever ρ says. None: no limit, as in the paper. Of use with a
            basis, which is out of date long before the preconditioner is.
        nesterov: move by the mean that the present gradient would make once more, (β1 m + (1 − β1) g) / (1 − β1^(t+1)), in place of m̂
            (Dozat 2016, "Incorporating Nesterov Momentum into Adam").
        cautious_decay: decay an element only where that moves it as the update does (arXiv 2510.12402).
        basis: turn the gradients of matrices into a basis in which their columns, their rows, or both are uncorrelated, and be Anon there:
            adaptivity for directions, not only for elements, as Shampoo, SOAP and Muon have it. The basis is renewed at refreshes, the only
            steps after which ranks talk: those that hold other rows of a matrix add up the covariances of its columns. Parameters of more
            dimensions are matrices of their first against the others; vectors are as without. The rows of embeddings stand for tokens and
            should not be turned: `param_groups` sees to it; a matrix with more than 16 rows to a column is taken for one. It needs whole
            rows or whole blocks of them on each rank: DDP, FSDP2, HSDP, tensor parallelism, `ZeroRedundancyOptimizer`, and DeepSpeed's
            stage 3 where the ranks divide the rows; engines that cut within rows are refused. See `basis` and `turned` for the method,
            `flat` for stage 3.
        basis_block: the basis is made of blocks of so many neighbours. State and time grow with it: 8 bytes a block's element for each
            column, or row, of a matrix.
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
            have it in bfloat16, exactly. They are rounded stochastically (see `rounding`). All bits but
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
    ) -> None:
        defaults = {k: v for k, v in locals().items() if k not in ("self", "params", "__class__")}
        normalise(defaults)
        validate(defaults)
        super().__init__(params, defaults)
        self.state = LazyState()
        self._stepper = Stepper()

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
        warn_of_silence(group)

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
        """Change, in the middle of a run, hyperparameters that the state depends on.

        The others (lr, weight_decay, eps, update_clip, β1, maximize, hold_silent, nesterov, cautious_decay) can be set in `param_groups` at
        any time and act at once; so can gamma, which acts from a refresh on (see `next_gammas`). Here:

        - gamma: the preconditioner is converted, d ← d^(γ'/γ), at once;
        - beta3: from the next refresh on;
        - basis, basis_block: at once. A new basis starts at I, so that the next step is as it would have been. From one that is left the
          momentum is turned back exactly, the preconditioner approximately (see `frame.change`);
        - refresh_ratio, beta2, window, max_interval: after the largest step count in the group, keeping the age of the second moment (see
          `schedule.Schedule`). A parameter that is behind, for want of gradients, keeps the old values until its own count is there.

        Every rank must make the same call between the same two steps.

        Args:
            group: index of the param group; None for all.

        Raises:
            ValueError: a value is out of range, or γ is left from 0, where v = 1 says nothing about the gradient's scale.
            RuntimeError: another of these hyperparameters was edited in `param_groups`, or the engine shows the optimizer only some of
                its parameters at a time (DeepSpeed), so that not all state could be converted.
        """
        values = given(locals())
        self.settle()
        change(self.param_groups, self.state, values, range(len(self.param_groups)) if group is None else [group])
        self._stepper.known = ()

    def next_gammas(self) -> list[float]:
        """For each group, the γ in force in the next step's update.

        It is `group["gamma"]`, but where that has been edited: then the γ before stays until a step refreshes the group's foremost
        parameters, those with the most steps (which are taken to get gradients). In that step the preconditioners are converted,
        d ← d^(γ'/γ); of parameters that are behind, alongside. From γ = 0, where v = 1 says nothing, a refreshed one is d = σ^γ' alone, as
        at first; the step refuses to convert others. What has a unit that depends on γ (lr, update_clip, weight_decay) is to follow it.
        """
        self.settle()
        return [Regime(group).next_gamma(steps_taken(group, self.state)) for group in self.param_groups]

    # -- state -------------------------------------------------------------------------------------

    def init_state(self) -> None:
        """Allocate the state of every parameter that has none, at step 0, and drop the state of tensors that are no parameters any more.

        Idempotent. Call it when the engine has wrapped the parameters, and before a checkpoint library looks at the optimizer: torch's
        makes missing states with a step on zero gradients, which would count as Anon's first refresh.
        """
        allocate(self.param_groups, self.state)
        for p in absent(self.param_groups, self.state):
            del self.state[p]

    def state_dict(self) -> dict[str, Any]:
        """The state as torch has it, with the state of every trainable parameter in it, also before the first step.

        An 8-bit exp_avg is in it as bfloat16 (a copy, 2 bytes per parameter), so that any checkpoint library can reshard it.
        """
        self.settle()
        allocate(self.param_groups, self.state)
        for group in self.param_groups:
            normalise(group)  # numbers that were set since the last step
        found = super().state_dict()
        return {**found, "state": {index: decoded(state) for index, state in found["state"].items() if state}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict()` gave: states in this optimizer's own `state_dtype` whatever they come in, `step` on the CPU.

        As with all of torch's optimizers, the other hyperparameters are the loaded ones from then on; a warning names those that are not
        the same (learning rates aside). Parameters that have no state in it start afresh, with a warning if others have some.

        Raises:
            ValueError: another optimizer's state, a state of another shape or sharding, or hyperparameters out of range.
        """
        self.settle()
        before = [dict(group) for group in self.param_groups]
        with in_own_dtypes(self):
            super().load_state_dict(state_dict)
        warn_of_replaced(before, self.param_groups)
        complete(self.param_groups, self.state)

    def __getstate__(self) -> dict[str, Any]:
        self.settle()
        return super().__getstate__()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take over param groups and states (from `load_state_dict`, `copy` or `pickle`), checked before anything is replaced."""
        known = {**self.__dict__, **state}
        groups = [{**known.get("defaults", {}), **group} for group in known.get("param_groups", [])]
        for group in groups:
            normalise(group)
            validate(group)
            group.setdefault(HISTORY, Regime(group).fresh())
        super().__setstate__({**state, "param_groups": groups, "state": checked(groups, known.get("state", {}))})
        if "_stepper" not in self.__dict__:  # copied, or from a pickle
            self._stepper = Stepper()
        self.defaults.pop("differentiable", None)  # torch adds it; here it would be an option without effect

    # -- step --------------------------------------------------------------------------------------

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One step of every parameter that has a gradient, or no elements; the others' step counts stay.

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
        for run in self._stepper.ready(self.param_groups, self.state, Told.of(self), ()):
            run()
        self._stepper.start_renewals()
        return loss

    def settle(self) -> None:
        """Know whether the last step was taken, where `found_inf` is on a GPU; until then it counts as taken.

        Everything here that needs to know calls it. What reads `state[p]["step"]` itself should, before.
        """
        self._stepper.settle()

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
        runs = self._stepper.ready(self.param_groups, self.state, Told.of(self), parts)
        return [torch.no_grad()(run) for run in runs]
