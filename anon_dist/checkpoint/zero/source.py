"""A checkpoint, seen as DeepSpeed's writers need it: groups of parameters, each with a master, equal states and common numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch

from anon_dist.checkpoint.assemble import refs, stub, with_stubs
from anon_dist.checkpoint.errors import CheckpointError
from anon_dist.checkpoint.optimizers.frames import REMEDY, check_whole
from anon_dist.checkpoint.recognise import BASIS_STATES
from anon_dist.checkpoint.schema import EXTRA, MASTER, WEIGHT, Checkpoint, Key, Part, Stub, TensorInfo
from anon_dist.checkpoint.torchfiles import rank_local
from anon_dist.checkpoint.zero.flat import Cut
from anon_dist.checkpoint.zero.header import fresh, is_number, same_number
from anon_dist.optim.frame import KEYS
from anon_dist.optim.state import NEUTRAL


@dataclass
class Group:
    """A param group, or some of its members that are stored together."""

    members: list[str]
    hyperparameters: dict[str, Any]
    states: dict[str, torch.dtype] = field(default_factory=dict)
    """Of the members' shapes."""
    numbers: dict[str, Any] = field(default_factory=dict)
    """States that are one number for all members."""


MuonOrder = Literal["size", "model"]


class Source:
    """A checkpoint and what of it can be laid flat.

    Args:
        allow_loss: leave out what flat buffers cannot hold, and say so in `lost`; else refuse.
        precision: of the model's weights; None: as the recorded configuration says, else as they are.
        buffers: patterns of the buffers among what the source does not tell from frozen parameters; None: not known.

    Raises:
        CheckpointError: there is no optimizer state, or a state cannot be laid flat; naming it.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        allow_loss: bool = False,
        precision: torch.dtype | None = None,
        buffers: Sequence[str] | None = None,
    ) -> None:
        self.checkpoint = checkpoint
        self.manifest = checkpoint.manifest
        self.lost: list[str] = []
        self._allow_loss = allow_loss
        recorded = self.manifest.extras.get("buffer_names")
        self.buffers = list(dict.fromkeys([*self.manifest.buffers, *(recorded if isinstance(recorded, list) else [])]))
        self.unsure = [n for n in self.manifest.unsure if n not in self.buffers]
        if buffers is not None:
            self.buffers += [n for n in self.unsure if any(fnmatchcase(n, pattern) for pattern in buffers)]
            self.unsure = []
        shared = self.manifest.extras.get("shared_params")
        shared = {a: n for a, n in shared.items() if n in self.manifest.order} if isinstance(shared, dict) else {}
        self.tied: dict[str, str] = self.manifest.tied or shared
        self.order = [n for n in self.manifest.order if n not in self.buffers and n not in self.tied]
        self.tied = {a: n for a, n in self.tied.items() if n in self.order}  # not those of weights that were left out
        self.trained = {m for group in self.manifest.groups for m in group.members} - set(self.manifest.frozen)
        if not self.trained:
            raise CheckpointError(
                f"there is no optimizer state in this checkpoint ({self.manifest.format}): DeepSpeed's formats need it"
            )
        if unknown := sorted(self.trained - set(self.order)):
            raise CheckpointError(f"{unknown[0]} is in a param group, and there is no such parameter")
        self.trained = {name for name in self.trained if self.numel(name)}  # DeepSpeed keeps empty ones with the frozen
        self.frozen = [name for name in self.order if name not in self.trained]
        self.dtypes = {name: checkpoint.tensors[self._key(name)].dtype for name in self.order}
        self.dtype = precision or self._recorded() or self._prevailing()
        if precision or self._recorded():
            fixed = set(self.unsure)  # buffers stay in float32
            self.dtypes = {
                n: self.dtype if d.is_floating_point and n not in fixed else d for n, d in self.dtypes.items()
            }
        self._nested = {ref.key for own in self.manifest.scalars.values() for ref in refs(list(own.values()))}
        self._states: dict[str, dict[str, TensorInfo]] = {}
        for key, info in checkpoint.tensors.items():
            if key.state not in (WEIGHT, MASTER, EXTRA) and key not in self._nested:
                self._states.setdefault(key.parameter, {})[key.state] = info

    def check_sure(self) -> None:
        """Raises `CheckpointError` where it is not known what is a buffer and what is frozen, which stage 3 lays in different ways."""
        if names := [n for n in self.unsure if n in self.frozen]:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise CheckpointError(
                f"{', '.join(names[:3])}{more}: in no param group, and the source does not tell whether these are frozen parameters "
                "or buffers, which stage 3 lays in different ways. Say which are buffers: --buffers PATTERN …, or --buffers '' if none "
                "is (in the script that made it: dict(model.named_buffers())); zero0 to zero2 hold both alike"
            )

    def _lose(self, what: str, remedy: str = "zero0 holds it, having none") -> None:
        if not self._allow_loss:
            raise CheckpointError(
                f"{what}: DeepSpeed's flat buffers cannot hold it ({remedy}); left out only when loss is allowed (--allow-loss)"
            )
        self.lost.append(what)

    def _key(self, name: str) -> Key:
        """Of a parameter's or buffer's weight, else of its master."""
        for state in (WEIGHT, MASTER):
            if Key(name, state) in self.checkpoint.tensors:
                return Key(name, state)
        raise CheckpointError(f"{name}: neither its weight nor its master is in the checkpoint")

    def _recorded(self) -> torch.dtype | None:
        """The precision in which DeepSpeed ran, by the configuration it recorded."""
        for key, dtype in (("bf16", torch.bfloat16), ("bfloat16", torch.bfloat16), ("fp16", torch.float16)):
            section = self.config.get(key)
            if isinstance(section, dict) and section.get("enabled") is True:
                return dtype
        return None

    def _prevailing(self) -> torch.dtype:
        """Of most elements of the trained weights."""
        counts: dict[torch.dtype, int] = {}
        for name in self.trained:
            counts[self.dtypes[name]] = counts.get(self.dtypes[name], 0) + self.numel(name)
        return max(counts, key=lambda dtype: counts[dtype])

    @property
    def config(self) -> dict[str, Any]:
        """DeepSpeed's configuration of the run that wrote the source; empty where it was not DeepSpeed."""
        found = self.manifest.extras.get("ds_config")
        return found if isinstance(found, dict) else {}

    @property
    def zero_config(self) -> dict[str, Any]:
        """Its `zero_optimization`."""
        found = self.config.get("zero_optimization")
        return found if isinstance(found, dict) else {}

    @property
    def clip(self) -> dict[str, float]:
        """The gradient norm that is clipped to, 0: none. The loader takes it over from the file: where it is not known, no word of it,
        and the loading engine's own configuration holds."""
        found = self.config.get("gradient_clipping")
        return {"clip_grad": float(found)} if isinstance(found, (int, float)) else {}

    def shape(self, name: str) -> tuple[int, ...]:
        """A parameter's or buffer's."""
        return self.checkpoint.tensors[self._key(name)].shape

    def numel(self, name: str) -> int:
        """Elements of a parameter or buffer."""
        return self.checkpoint.tensors[self._key(name)].numel

    def part(self, name: str, state: str, start: int, stop: int) -> Part:
        """Elements of a state; of the master where there is no weight of the dtype asked for, and the other way round."""
        tensors, key = self.checkpoint.tensors, Key(name, state)
        if state == WEIGHT and Key(name, MASTER) in tensors:
            rounded = key in tensors and tensors[key].dtype != self.dtypes.get(name)
            key = Key(name, MASTER) if rounded or key not in tensors else key
        if state == MASTER and key not in tensors:
            key = Key(name, WEIGHT)
        # None: a member without this state.
        return Part(key if key in tensors else None, start, stop, NEUTRAL.get(state, 0.0))

    def weight(self, name: str) -> Stub:
        """A parameter or buffer as the model has it."""
        dtype = self.dtypes.get(name, self.checkpoint.tensors[self._key(name)].dtype)
        return Stub(self.shape(name), dtype, [self.part(name, WEIGHT, 0, self.numel(name))])

    def master(self, name: str) -> Stub:
        """What the optimizer steps, in float32."""
        return Stub(self.shape(name), torch.float32, [self.part(name, MASTER, 0, self.numel(name))])

    def state(self, name: str, key: str) -> Stub:
        """A state, as it is."""
        return stub(self.checkpoint, Key(name, key))

    def own(self, name: str) -> dict[str, Any]:
        """All states of a parameter: stubs, numbers, and nested ones."""
        states = with_stubs(self.checkpoint, {k: fresh(v) for k, v in self.manifest.scalars.get(name, {}).items()})
        return {**states, **{key: self.state(name, key) for key in self._states.get(name, {})}}

    def laid(self, members: list[str], state: str, dtype: torch.dtype, cuts: list[Cut], length: int) -> Stub:
        """A flat buffer of `length` elements: the cuts at their offsets, and padding between and after."""
        parts: list[Part] = []
        reached, padding = 0, NEUTRAL.get(state, 0.0)
        for cut in cuts:
            if cut.offset > reached:
                parts.append(Part(None, 0, cut.offset - reached, padding))
            parts.append(self.part(members[cut.member], state, cut.start, cut.stop))
            reached = cut.offset + cut.stop - cut.start
        if length > reached:
            parts.append(Part(None, 0, length - reached, padding))
        return Stub((length,), dtype, parts)

    def groups(self, frozen: bool = False, muon: MuonOrder | None = None) -> list[tuple[list[str], dict[str, Any]]]:
        """Members and hyperparameters of the param groups, with or without what is frozen.

        Args:
            muon: the order of DeepSpeed's Muon's matrices: the largest first, as it sorts them, or as in the model, which is how it leaves
                them where `zero.Init` hides their sizes. None: as recorded.
        """
        found = []
        for group in self.manifest.groups:
            members = [m for m in group.members if frozen or m in self.trained]
            if muon and group.hyperparameters.get("use_muon") and "ns_method" in group.hyperparameters:
                members = sorted(members, key=self.order.index)
                members = sorted(members, key=self.shape, reverse=True) if muon == "size" else members
            found.append(
                (members, {k: v for k, v in group.hyperparameters.items() if k not in ("params", "param_names")})
            )
        return found

    def sure_groups(self, muon: MuonOrder | None) -> list[tuple[list[str], dict[str, Any]]]:
        """The groups of stage 3.

        Raises:
            CheckpointError: `muon` is not given, and it would make a difference.
        """
        if muon is None and self.groups(muon="size") != self.groups(muon="model"):
            raise CheckpointError(
                "DeepSpeed's Muon sorts its matrices by size, but not those of a model made under zero.Init; at stage 3 DeepSpeed compares "
                "lengths alone, and would give a matrix another's numbers. Say how the engine that will load makes its model: "
                "--muon-order model (under zero.Init) or --muon-order size (otherwise). anon_dist.engines.zero_restore.restore goes by the "
                "names, from any format"
            )
        return self.groups(muon=muon or "size")

    def flat_groups(self, where: str = "the flat buffers of DeepSpeed's stages 1 and 2") -> list[Group]:
        """The groups of stages 1 and 2, whose engines have none without trained members.

        Raises:
            CheckpointError: a matrix has a basis, which `where` has no place for.
        """
        found = []
        for members, hyperparameters in self.groups(muon="size"):
            for name in members:
                check_whole(self._states.get(name, {}), name, where)
            if members:
                found.append(self.common(members, hyperparameters))
            else:
                self.lost.append("A param group of frozen parameters alone is left out: stages 1 and 2 refuse one.")
        return found

    def local(self, layout: str, world_size: int, buffers: list[list[str]]) -> list[dict[str, list[Any]]]:
        """For each buffer, the states of ranks' parts as such; see `rank_local`."""
        found, why = rank_local.laid(self.manifest, layout, world_size, buffers)
        if why:
            self._lose(why, "nothing is lost with an optimizer that makes it anew at each step, as Adafactor does")
        return [with_stubs(self.checkpoint, own) for own in found]

    @property
    def muon(self) -> bool:
        """Whether DeepSpeed's Muon steps some of the groups."""
        return any(hyperparameters.get("use_muon") for _, hyperparameters in self.groups())

    def muon_in_parts(self, stage: int, asked: str | None) -> bool:
        """Whether the engine of stage 1 or 2 that will load keeps Muon's momentum cut as it cuts the masters, not in whole matrices.

        Source: deepspeed/runtime/engine.py, `_do_optimizer_sanity_check`, for when BF16_Optimizer is taken.
        """
        offload, types = self.zero_config.get("offload_optimizer"), self.config.get("data_types")
        offloads = isinstance(offload, dict) and offload.get("device") not in (None, "none")
        sums = types.get("grad_accum_dtype") if isinstance(types, dict) else None
        accumulates = stage == 1 and self.dtype == torch.bfloat16 and sums in ("fp32", "float32")
        parts = asked == "parts" or (asked is None and (offloads or accumulates))
        if self.muon and not parts and self.zero_config.get("parameter_alignment") is True:
            raise CheckpointError(
                "the recorded configuration has parameter_alignment, under which DeepSpeed lays buffers anew as it loads, but not Muon's "
                "momentum; write zero3, or call anon_dist.engines.zero_restore.restore"
            )
        if self.muon:
            engine = (
                "that offloads the optimizer, or sums bf16 gradients in float32 at stage 1"
                if parts
                else ("that neither offloads the optimizer nor sums bf16 gradients in float32 at stage 1")
            )
            self.lost.append(
                f"Muon's momentum is laid for an engine {engine}; another would lose it (--muon-momentum)."
            )
        return parts

    def common(self, members: list[str], hyperparameters: dict[str, Any]) -> Group:
        """Members that are stored together, with states of one dtype and numbers that are equal."""
        group = Group(members, hyperparameters)
        for name in members:
            for key, info in self._states.get(name, {}).items():
                if key in BASIS_STATES:
                    continue
                if info.shape != self.shape(name):
                    self._lose(f"{name}: {key} has shape {info.shape}, the parameter {self.shape(name)}")
                elif group.states.setdefault(key, info.dtype) != info.dtype:
                    raise CheckpointError(f"{name}: {key} is {info.dtype}, of others in its group {group.states[key]}")
            for key, value in self.manifest.scalars.get(name, {}).items():
                if not is_number(value):
                    self._lose(f"{name}: {key} is a {type(value).__name__}")
                elif key in group.numbers and not same_number(value, group.numbers[key]):
                    self._lose(f"{name}: {key} is {float(value)}, of others in its group {float(group.numbers[key])}")
                else:
                    group.numbers.setdefault(key, fresh(value))
        for name in members:
            if missing := [key for key in group.states if key not in self._states.get(name, {})]:
                self._lose(f"{name}: no {missing[0]}, which others in its group have; zeros in its place")
        return group

    def bases(self, members: list[str], world_size: int) -> dict[str, list[int]]:
        """Of members of a sub-group of stage 3, for each state of a basis that some have, its elements; 0: none.

        Raises:
            CheckpointError: rows, or their blocks, do not divide among so many ranks; naming the remedy.
        """
        found: dict[str, list[int]] = {}
        for i, name in enumerate(members):
            for key, info in self._states.get(name, {}).items():
                if key not in BASIS_STATES:
                    continue
                block = info.shape[1] if key in KEYS["rows"] and world_size > 1 else 1
                if self.shape(name)[0] % (world_size * block):
                    blocks = f" in blocks of {block}" if block > 1 else ""
                    raise CheckpointError(
                        f"{name} has {key}, and its {self.shape(name)[0]} rows{blocks} do not divide among {world_size} ranks, as stage 3 "
                        f"would cut them: take another --world-size, or {REMEDY}"
                    )
                found.setdefault(key, [0] * len(members))[i] = info.numel
        return found
