"""How an optimizer's state goes into state dicts, copies and pickles, and comes back."""

from __future__ import annotations

from typing import Any

from torch.optim import Optimizer

from anon_dist.optim.hyper import normalise, validate, warn_of_replaced
from anon_dist.optim.members import allocate, checked, complete
from anon_dist.optim.regime import HISTORY, Regime, check_history
from anon_dist.optim.state import decoded, in_own_dtypes
from anon_dist.optim.stepper import Stepper


class Saved(Optimizer):
    """What `Anon` is derived from. torch's `load_state_dict`, `copy` and `pickle` all end in `__setstate__`, which checks everything."""

    _stepper: Stepper

    def settle(self) -> None:
        """Finish the last step: the renewal of its bases; and where `found_inf` is on a GPU, whether it was taken (till then it counts as
        taken).

        Everything here that reads the state calls it. What reads `state[p]` itself should, before. After `step` one rank may call it alone:
        the sums of all ranks are under way. After `split_step` they begin here, so with a basis all ranks must call it.
        """
        self._stepper.settle()

    def state_dict(self) -> dict[str, Any]:
        """The state as torch has it, with the state of every trainable parameter in it, also before the first step.

        An 8-bit exp_avg is in it as bfloat16 (a copy, 2 bytes per parameter), so that any checkpoint library can reshard it.
        """
        self.settle()
        self._stepper.hidden.convert(self.state)
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
            ValueError: another optimizer's state, a state of another shape or sharding, one that is damaged, or hyperparameters out of
                range. Nothing has been replaced then.
        """
        self.settle()
        before = [dict(group) for group in self.param_groups]
        with in_own_dtypes(self):
            super().load_state_dict(state_dict)
        warn_of_replaced(before, self.param_groups)
        complete(self.param_groups, self.state)

    def __getstate__(self) -> dict[str, Any]:
        self.settle()
        self._stepper.hidden.convert(self.state)
        return super().__getstate__()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take over param groups and states (from `load_state_dict`, `copy` or `pickle`), checked before anything is replaced."""
        known = {**self.__dict__, **state}
        groups = [{**known.get("defaults", {}), **group} for group in known.get("param_groups", [])]
        for index, group in enumerate(groups):
            normalise(group)
            validate(group)
            if HISTORY in group:
                check_history(index, group)
            else:
                group[HISTORY] = Regime(group).fresh()
        super().__setstate__({**state, "param_groups": groups, "state": checked(groups, known.get("state", {}))})
        if "_stepper" not in self.__dict__:  # copied, or from a pickle
            self._stepper = Stepper()
        self._stepper.hidden.start_from(self.param_groups, self.state)
        self._stepper.silence.start_from(self.param_groups)
        self.defaults.pop("differentiable", None)  # torch adds it; here it would be an option without effect
