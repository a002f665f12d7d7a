"""The formats of this package, by name."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

import torch
from torch import Tensor

from anon_dist.checkpoint.assemble import extras_tree
from anon_dist.checkpoint.beside import read_beside, write_beside
from anon_dist.checkpoint.errors import CheckpointError, DamagedCheckpoint
from anon_dist.checkpoint.optimizers.schedules import is_schedule, schedule_key
from anon_dist.checkpoint.options import Layout, ReadOptions, WriteOptions
from anon_dist.checkpoint.recognise import recognise
from anon_dist.checkpoint.schema import EXTRA, WEIGHT, Checkpoint, Key, OutFile, TensorInfo
from anon_dist.checkpoint.torchfiles import rank_local
from anon_dist.checkpoint.torchfiles.torchfile import lay_out
from anon_dist.checkpoint.zero import stage0, stage3, stage12, universal, write
from anon_dist.checkpoint.zero.files import Files, find, tag_folder
from anon_dist.checkpoint.zero.header import KNOWN, number
from anon_dist.checkpoint.zero.pieces import Pieces, entire
from anon_dist.checkpoint.zero.source import Source

SUB_GROUP_SIZE = 1_000_000_000
"""DeepSpeed's default (runtime/zero/config.py)."""


class ZeroFormat:
    """One of DeepSpeed's formats.

    Args:
        stage: 0 to 3; None: universal.
    """

    def __init__(self, name: str, looks: str, stage: int | None) -> None:
        self.name = name
        self.looks = looks
        self.stage = stage

    def detect(self, path: Path, options: ReadOptions) -> bool:
        """Whether a folder, or the tag that `latest` in it names, is a checkpoint of this stage."""
        if tag_folder(path) is None:
            return False
        with _named(path):
            return _stage(find(path, options.unsafe)) == self.stage

    def open(self, path: Path, options: ReadOptions) -> Checkpoint:
        """The checkpoint, mapped.

        Args:
            path: the folder given to `save_checkpoint`, or a tag's folder in it.

        Raises:
            CheckpointError: files are missing, damaged, of different steps or another format; naming file and tensor.
        """
        files = find(path, options.unsafe)
        with _named(files.folder):
            if self.stage == 0:
                found = stage0.read(files, self.name, options)
            else:
                found = {None: universal, 1: stage12, 2: stage12, 3: stage3}[self.stage].read(files, self.name)
        _find_dimensionless(found, path)
        manifest = found.manifest
        if files.folder != path:  # what the training loop or accelerate wrote beside the tag's folder
            beside = {k: found.add_nested(k, v, path) for k, v in read_beside(path, options.unsafe).items()}
            manifest.extras = {**beside, **manifest.extras}
        if manifest.optimizer is None and manifest.groups:
            states = {key.state for key in found.tensors if key.state != EXTRA}
            numbers = {**manifest.scalars, rank_local.KEY: dict.fromkeys(rank_local.keys(manifest))}
            manifest.optimizer = recognise(manifest.groups, states, numbers)
        return found

    def plan(self, checkpoint: Checkpoint, options: WriteOptions) -> list[OutFile]:
        """The files, for a folder to be given to `load_checkpoint`. What is written by assumption is added to the manifest's notes.

        Raises:
            CheckpointError: something cannot be laid out; naming it.
        """
        precision = getattr(torch, options.precision) if options.precision else None
        source = Source(checkpoint, options.allow_loss, precision, options.buffers)
        if self.stage == 3:
            source.check_sure()
        if self.stage == 0:
            files = write.stage0(source, options.world_size)
        elif self.stage is None:
            if not source.muon_in_parts(1, options.muon_momentum) and source.muon:
                raise CheckpointError(
                    "DeepSpeed's loader of universal checkpoints lays Muon's momentum in parts, which only an engine that offloads "
                    "the optimizer or sums bf16 gradients in float32 at stage 1 goes on with (--muon-momentum parts, if it "
                    "is one); write zero0 to zero3, or canonical for anon_dist.engines.zero_restore.restore"
                )
            files = write.universal(source)
        elif self.stage == 3:
            limit = options.sub_group_size or int(float(source.zero_config.get("sub_group_size", SUB_GROUP_SIZE)))
            files = write.stage3(source, options.world_size, limit, options.muon_order)
        else:
            rotate = options.round_robin_gradients
            rotate = source.zero_config.get("round_robin_gradients") is True if rotate is None else rotate
            files = write.stage12(source, self.stage, options.world_size, rotate, options.muon_momentum)
        said = checkpoint.manifest.notes
        said += [note for note in (*source.lost, *self._notes(source)) if note not in said]
        tag = PurePosixPath(_tag(checkpoint, options.layout))
        laid = [lay_out(tag / name, made) for name, made in files.items()]
        latest = PurePosixPath("latest" if self.stage is not None else "latest_universal")
        return [*laid, OutFile(latest, len(str(tag)), [(0, str(tag).encode())], []), *_beside(checkpoint, options)]

    def _notes(self, source: Source) -> list[str]:
        """What the loading engine must be told, or will not do."""
        notes = []
        if not source.config:
            notes.append("The source records no DeepSpeed configuration: ds_config names the layout alone.")
        if schedule_key(source.manifest.extras) is None:
            several = [str(k) for k, v in source.manifest.extras.items() if is_schedule(v)]
            notes.append(
                f"{'Of the schedules ' + ', '.join(several) + ' none is' if several else 'There is no'} lr_scheduler state: "
                "an engine with one loads with load_lr_scheduler_states=False."
            )
        if self.stage is None:
            notes.append(
                "DeepSpeed restores neither buffers nor frozen weights from a universal checkpoint; at stage 3 only "
                "exp_avg and exp_avg_sq, and the first group's hyperparameters for all groups. "
                "anon_dist.engines.zero_restore.restore brings all."
            )
        return notes


def _find_dimensionless(found: Pieces, path: Path) -> None:
    """As `statedict` has it: a 0-dim state of a 0-dim parameter is of its shape, where other parameters have the state in theirs."""
    shaped = {key.state for key in found.tensors}
    for name, own in found.manifest.scalars.items():
        weight = found.tensors.get(Key(name, WEIGHT))
        if weight is not None and not weight.shape:
            for key in [k for k, v in own.items() if k in shaped and isinstance(v, Tensor)]:
                value = own.pop(key)
                found.add(Key(name, key), TensorInfo((), value.dtype), entire(value, path))


@contextmanager
def _named(folder: Path) -> Iterator[None]:
    """What goes wrong with a file of the right name and the wrong contents is said of its folder."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:  # damaged contents raise whatever the first wrong entry leads to
        where = traceback.extract_tb(error.__traceback__)[-1].name
        raise DamagedCheckpoint(
            f"{folder} is damaged, or not as DeepSpeed writes it: {type(error).__name__}: {error} (in {where})"
        ) from error


def _stage(files: Files) -> int | None:
    """The stage that wrote them; None: universal."""
    if files.universal:
        return None
    if not files.optimizers:
        return 0
    optimizer = files.load_optimizer(files.optimizers[0])
    if "zero_stage" in optimizer:
        return number(optimizer["zero_stage"])
    return 3 if "fp32_flat_groups" in optimizer else 1  # BF16_Optimizer writes none


def _tag(checkpoint: Checkpoint, layout: Layout) -> str:
    """The folder's name that the code which loads it looks for: accelerate's, the training loop's, else DeepSpeed's own."""
    if layout == "accelerate":
        return "pytorch_model"
    own = "progress" in checkpoint.manifest.extras and layout != "trainer"
    return "deepspeed" if own else f"global_step{checkpoint.manifest.step or 0}"


def _beside(checkpoint: Checkpoint, options: WriteOptions) -> list[OutFile]:
    """Files for the extras that DeepSpeed has no place for."""
    also = ("lr_scheduler",) if options.layout in ("accelerate", "trainer") else ()
    extras = {k: v for k, v in extras_tree(checkpoint).items() if k not in (*KNOWN, rank_local.KEY) or k in also}
    return write_beside(extras, options.layout, options.world_size, checkpoint.manifest.step)


_RANKS = "zero_pp_rank_*_optim_states.pt"
FORMATS = {
    f.name: f
    for f in (
        ZeroFormat("zero0", "mp_rank_00_model_states.pt", 0),
        ZeroFormat("zero1", f"{_RANKS} of stage 1", 1),
        ZeroFormat("zero2", f"{_RANKS} of stage 2", 2),
        ZeroFormat("zero3", f"{_RANKS} of stage 3", 3),
        ZeroFormat("universal", "*_model_states.pt beside a folder zero", None),
    )
}
"""Name → format."""
