"""Checkpoints with the keys that earlier versions gave to the states of a basis."""

from pathlib import Path
from unittest import mock

import torch

from anon_dist.checkpoint import formats
from anon_dist.checkpoint.convert import convert
from anon_dist.checkpoint.schema import Checkpoint, Key

FORMER = {
    "basis_columns": "column_basis",
    "covariance_columns": "column_cov",
    "basis_rows": "row_basis",
    "covariance_rows": "row_cov",
}
_PRESENT = {old: new for new, old in FORMER.items()}


def renamed(value):
    """A nested dictionary with the former keys in place of the present ones."""
    if isinstance(value, dict):
        return {FORMER.get(k, k) if isinstance(k, str) else k: renamed(v) for k, v in value.items()}
    return [renamed(v) for v in value] if isinstance(value, list) else value


class _Former(Checkpoint):
    def __init__(self, checkpoint):
        self._checkpoint, self.manifest = checkpoint, checkpoint.manifest
        self.tensors = {Key(k.parameter, FORMER.get(k.state, k.state)): v for k, v in checkpoint.tensors.items()}

    def read(self, key, start, stop):
        return self._checkpoint.read(Key(key.parameter, _PRESENT.get(key.state, key.state)), start, stop)


def convert_to_former(source, target, to, options=None, **how):
    """As `convert`, with the former keys in what is written. DeepSpeed's stage 3: written as ever, then its files changed."""
    if to != "zero3":
        opened = formats.open_checkpoint
        with mock.patch.object(formats, "open_checkpoint", lambda *args: _Former(opened(*args))):
            convert(source, target, to, options, **how)
        return
    convert(source, target, to, options, **how)
    change_zero3(target)


def change_zero3(folder):
    """Give the states of a checkpoint of DeepSpeed's stage 3 their former keys."""
    for file in Path(folder).rglob("*optim_states.pt"):
        torch.save(renamed(torch.load(file, weights_only=False)), file)
