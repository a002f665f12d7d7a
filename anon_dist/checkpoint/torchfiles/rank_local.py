"""States that belong to one rank's part of a buffer, not to any parameter.

ZeRO shows an optimizer flat buffers, each rank its part of them. A state as long as such a part has an element for each of its
parameters'; a number or a tensor of another length (Adafactor's RMS, LAMB's ratios, the scales of 8-bit states) is of the part as a whole,
and of no use where the parts are cut elsewhere. They are carried among the extras, to be laid back by writers and engines that cut alike.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from anon_dist.checkpoint.errors import CheckpointError
from anon_dist.checkpoint.schema import EXTRA, Checkpoint, Key, Manifest, Ref, TensorInfo

KEY = "rank_local"
"""Extra with them: layout, world_size, and for each buffer its members in order and its states, key → value of every rank."""
CARRIERS = ("canonical", "hf", "zero1", "zero2", "zero3")
"""Formats that carry them, lay them back or refuse them themselves, or hold no optimizer."""
FLAT, ALIGNED, SHARDS = "stages 1 and 2", "stages 1 and 2 with parameter_alignment", "stage 3"
WHOLE = "FP16_Optimizer"
"""Layouts: how buffers are cut."""
FLAT_STATES = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "precond", "momentum_buffer")
"""States that have an element for each of a parameter's: of another length they are damaged."""
_COMMON = ("mu_product", "mu", "eta")
"""Numbers of torch's optimizers (NAdam, ASGD) that follow from the step."""


def is_common(key: str, values: Sequence[Any]) -> bool:
    """Whether a number that every rank has is one for all parameters: a count, or equal on several ranks and not for being zero.

    `step` always is; where ranks differ in it, their files are of different steps.
    """
    if "step" in key:
        return True
    first = values[0]
    if any(float(v) != float(first) for v in values):
        return False
    counts = not first.dtype.is_floating_point if isinstance(first, Tensor) else isinstance(first, int)
    return counts or key in _COMMON or (len(values) > 1 and float(first) != 0)


def keep(
    manifest: Manifest, layout: str, world_size: int, members: Sequence[str], states: Mapping[str, list[Any]]
) -> None:
    """Add those of a buffer: key → value of every rank, tensors as `Ref`s where they are large."""
    found = manifest.extras.setdefault(KEY, {"layout": layout, "world_size": world_size, "buffers": []})
    if layout == ALIGNED:  # of one group is of all
        found["layout"] = layout
    if states:
        found["buffers"].append({"members": list(members), "states": dict(states)})
    if not found["buffers"]:
        del manifest.extras[KEY]


def keys(manifest: Manifest) -> set[str]:
    """Of the states."""
    return {key for buffer in _buffers(manifest) for key in buffer["states"]}


def laid(
    manifest: Manifest, layout: str, world_size: int, buffers: Sequence[Sequence[str]]
) -> tuple[list[dict[str, list[Any]]], str | None]:
    """The states for buffers that are cut so: for each, key → value of every rank. And why they have no place there, if they have none."""
    known = _buffers(manifest)
    nothing: list[dict[str, list[Any]]] = [{} for _ in buffers]
    if not known:
        return nothing, None
    found = manifest.extras[KEY]
    by_members = {tuple(buffer["members"]): buffer["states"] for buffer in known}
    alike = found["layout"] == layout and found["world_size"] == world_size
    if alike and by_members.keys() <= {tuple(members) for members in buffers}:
        return [dict(by_members.get(tuple(members), {})) for members in buffers], None
    buffer = known[0]
    what = " and ".join(sorted(buffer["states"]))
    return nothing, (
        f"{what} of {buffer['members'][0]} … is of each rank's part of a buffer, as {found['layout']} on "
        f"{found['world_size']} rank{'s' if found['world_size'] > 1 else ''} cut it, and of no parameter: it goes "
        "where parameters are cut alike (the same stage, ranks, param groups and sub-groups)"
    )


def prepared(checkpoint: Checkpoint, to: str, allow_loss: bool) -> Checkpoint:
    """The checkpoint without them, for a format that has no place for them.

    Raises:
        CheckpointError: it has some, and loss is not allowed; naming state and remedy.
    """
    if to in CARRIERS or not keys(checkpoint.manifest):
        return checkpoint
    _, why = laid(checkpoint.manifest, to, 0, [])
    if not allow_loss:
        raise CheckpointError(
            f"{why}; --to {to} is not so. Left out only when loss is allowed (--allow-loss): for an optimizer that makes it "
            "anew at each step, as Adafactor does, nothing is lost"
        )
    return _Without(checkpoint, f"{why}; left out.")


class _Without(Checkpoint):
    """A checkpoint without them."""

    def __init__(self, checkpoint: Checkpoint, note: str) -> None:
        manifest = checkpoint.manifest
        self._whole = checkpoint
        manifest.notes.append(note)
        self.manifest = replace(manifest, extras={k: v for k, v in manifest.extras.items() if k != KEY})
        gone = {ref.key for ref in _refs(manifest)}
        self.tensors: dict[Key, TensorInfo] = {k: v for k, v in checkpoint.tensors.items() if k not in gone}

    def read(self, key: Key, start: int, stop: int) -> Tensor:
        """See `Checkpoint`."""
        return self._whole.read(key, start, stop)

    def close(self) -> None:
        """See `Checkpoint`."""
        self._whole.close()


def _refs(manifest: Manifest) -> list[Ref]:
    values = [v for b in _buffers(manifest) for ranks in b["states"].values() for v in ranks]
    return [v for v in values if isinstance(v, Ref) and v.key.state == EXTRA]


def _buffers(manifest: Manifest) -> list[dict[str, Any]]:
    found = manifest.extras.get(KEY)
    known: list[dict[str, Any]] = found["buffers"] if isinstance(found, dict) else []
    return known
