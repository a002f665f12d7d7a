"""ZeRO stage 1 in torch alone: DDP, with torch's ZeroRedundancyOptimizer handing each rank whole parameters to keep the state of."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.optim import Optimizer

from anon_dist.checkpoint.dcp.sharded import load_state
from anon_dist.engines.base import Write, set_learning_rates, settle
from anon_dist.engines.bases import allocate
from anon_dist.engines.check import StateBytes, check_optimizer, state_bytes_of_ranks
from anon_dist.engines.errors import EngineError
from anon_dist.engines.replicas import Copy, copies_of
from anon_dist.engines.restore import check_present, opened, parameter_order, restore
from anon_dist.engines.saved_bases import groups_in, groups_of, take_over
from anon_dist.engines.torch_native import TorchEngine, lay_out
from anon_dist.optim.frame import BASIS_KEYS, KEYS, sides
from anon_dist.optim.regime import HISTORY
from anon_dist.optim.state import decoded_states


class ZeroRedundancyEngine(TorchEngine):
    """See `base.Engine`. The checkpoint is the one that `TorchEngine` writes: either resumes the other's."""

    def __init__(self, name: str, accelerator: Accelerator, model: nn.Module, optimizer: Optimizer) -> None:
        groups = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
        self._order = parameter_order(model, optimizer)
        self.name, self._accelerator = name, accelerator
        self.model = accelerator.prepare(model)
        lay_out(self.model)
        accepted = inspect.signature(type(optimizer)).parameters  # AdamW's defaults hold more than it takes
        self._shared = ZeroRedundancyOptimizer(
            [dict(g) for g in optimizer.param_groups],
            optimizer_class=type(optimizer),
            **{k: v for k, v in optimizer.defaults.items() if k in accepted},
        )
        self.optimizer = self._shared.optim
        check_optimizer(self.optimizer, None, type(optimizer), groups)
        held = {id(p) for g in self._shared.param_groups for p in g["params"]}
        assert held == {id(p) for p in self.model.parameters() if p.requires_grad}
        allocate(self.optimizer)
        self._parameters = [p for p in self.model.parameters() if p.requires_grad]

    def _step_optimizer(self, lr: float | Sequence[float]) -> None:
        set_learning_rates(self._shared.param_groups, lr)
        self._shared.step()

    @contextmanager
    def whole_optimizer(self) -> Iterator[Optimizer]:
        """See `base.Engine`. What is changed in the groups is kept: torch's wrapper copies its own over them at each step."""
        yield self.optimizer
        for own, theirs in zip(self.optimizer.param_groups, self._shared.param_groups, strict=True):
            theirs.update({k: v for k, v in own.items() if k != "params"})

    def state_bytes(self) -> StateBytes:
        """See `base.Engine`. Whole parameters are handed out, so ranks differ by up to the largest."""
        return state_bytes_of_ranks(self.optimizer, self._accelerator.device)

    def copies(self) -> Iterator[Copy]:
        """See `base.Engine`. Not the states: of each, one rank has the only one."""
        return copies_of(self.model)

    def capture(self, copied: bool) -> Write:
        """See `base.Engine`."""
        settle(self.optimizer)
        with decoded_states(self.optimizer):
            state = self._state()
            self._agree_on_histories(state["optimizer"]["param_groups"])
            return self._written(state, copied)

    def load(self, folder: Path) -> None:
        """See `base.Engine`."""
        check_present(folder)
        names, fits = self._names(), False
        with self.whole_optimizer() as optimizer:
            if (folder / ".metadata").exists():
                fits = take_over(self.name, optimizer, names, groups_in(folder))
            if not fits:
                with opened(folder, self._order) as checkpoint:
                    take_over(self.name, optimizer, names, groups_of(checkpoint))
                    restore(self.model, optimizer, checkpoint)
                return
        with decoded_states(self.optimizer):
            state = self._state()
            load_state(folder, state, type(self.optimizer).__name__, elsewhere=self._keys_of_other_ranks())
        set_model_state_dict(self.model, state["model"])
        loaded = state["optimizer"]["param_groups"]
        for own, theirs, values in zip(self.optimizer.param_groups, self._shared.param_groups, loaded, strict=True):
            for group in (own, theirs):
                group.update({k: v for k, v in values.items() if k not in ("params", "state_dtype")})

    def _names(self) -> dict[Tensor, str]:
        return {p: name.removeprefix("module.") for name, p in self.model.named_parameters()}

    def _state(self) -> dict[str, Any]:
        """Model, and this rank's part of the optimizer's state, by parameter name; the tensors are the live ones."""
        names = self._names()
        groups = [
            {**{k: v for k, v in own.items() if k != "params"}, "params": [names[p] for p in g["params"]]}
            for own, g in zip(self.optimizer.param_groups, self._shared.param_groups, strict=True)
        ]
        state = {names[p]: values for p, values in self.optimizer.state.items()}
        return {"model": get_model_state_dict(self.model), "optimizer": {"state": state, "param_groups": groups}}

    def _agree_on_histories(self, groups: list[dict[str, Any]]) -> None:
        """Give each group the record of a rank that steps parameters of it; the checkpoint has one for all ranks.

        Raises:
            EngineError: ranks have different ones.
        """
        pairs = zip(self.optimizer.param_groups, groups, strict=True)
        mine = [group.get(HISTORY) if own["params"] else None for own, group in pairs]
        by_rank: list[list[str | None]] = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(by_rank, mine)
        for index, (group, found) in enumerate(zip(groups, zip(*by_rank, strict=True), strict=True)):
            known = {history for history in found if history is not None}
            if len(known) > 1:
                raise EngineError(
                    f"ranks changed γ or the refresh schedule of param group {index} at different steps, since parameters that a rank "
                    "keeps got no gradient in some: no checkpoint can hold that. Take engine ddp or fsdp2 (train.engine)"
                )
            if known:
                group[HISTORY] = known.pop()

    def _keys_of_other_ranks(self) -> set[str]:
        """Keys of the checkpoint that hold the state of parameters of other ranks."""
        mine, names = set(self.optimizer.state), self._names()
        keys = {key for values in self.optimizer.state.values() for key in values}.difference(BASIS_KEYS)
        found = set()
        for group in self._shared.param_groups:
            for p in (p for p in group["params"] if p not in mine):
                turned = {key for side in sides(p, group) for key in KEYS[side]} if "basis" in group else set()
                found |= {f"optimizer.state.{names[p]}.{key}" for key in keys | turned}
        return found
