"""The spectra of second moments (see `optim.matching`) of a checkpoint, or of a file that holds some."""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from anon_dist.agreement import agree, is_first
from anon_dist.checkpoint import CheckpointError
from anon_dist.checkpoint.formats import open_checkpoint
from anon_dist.checkpoint.recognise import ADAM, ADAMW, ANON
from anon_dist.checkpoint.schema import Checkpoint, Key, ParamGroup
from anon_dist.engines.restore import state_folder
from anon_dist.optim.frame import KEYS
from anon_dist.optim.matching import Spectra, Spectrum
from anon_dist.optim.regime import Regime
from anon_dist.train.config.parsing import Config, ConfigError

BLOCK = 1 << 20
"""Elements read at once."""


def load_spectra(path: Path) -> Spectra:
    """Of a JSON file, such as a sweep's calibration/spectrum.json, or measured on a checkpoint.

    Raises:
        CheckpointError: it is neither; or see `spectra_of`.
    """
    if path.suffix != ".json":
        return spectra_of(path)
    try:
        return Spectra.from_json(json.loads(path.read_text()))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} holds no spectrum: {error}") from None


def spectra_of(path: Path) -> Spectra:
    """The spectra of a checkpoint of Anon (at γ ≠ 0) or AdamW, in any format, by parameter name; in the basis that the state is of.

    Raises:
        CheckpointError: it is another optimizer's, has γ = 0, has taken no step, or cannot be read.
    """
    with closing(open_checkpoint(state_folder(path))) as checkpoint:
        return _read(path, checkpoint)


def _read(path: Path, checkpoint: Checkpoint) -> Spectra:
    optimizer = checkpoint.manifest.optimizer
    if optimizer not in (ANON, ADAM, ADAMW):
        raise CheckpointError(
            f"{path} holds the state of {optimizer or 'no optimizer'}; second moments are read from Anon or AdamW"
        )
    by_name: dict[str, Spectrum] = {}
    frames: dict[str, str] = {}
    for group in checkpoint.manifest.groups:
        if optimizer == ANON and Regime(group.hyperparameters).gamma_in_force == 0.0:
            raise CheckpointError(
                f"{path} was made at γ = 0, where the preconditioner says nothing about the second moment"
            )
        for name in group.members:
            if Key(name, "exp_avg") in checkpoint.tensors:
                by_name[name] = _spectrum(checkpoint, group, name, optimizer == ANON)
                blocks = {side: checkpoint.tensors.get(Key(name, key)) for side, (key, _) in KEYS.items()}
                turned = [f"{side} of {info.shape[1]}" for side, info in blocks.items() if info is not None]
                if turned:
                    frames[name] = ", ".join(turned)
    spectra = Spectra(by_name, frames=frames)
    if spectra.whole().rms(1.0) == 0.0:
        raise CheckpointError(f"{path} has no optimizer state after a step")
    return spectra


def _spectrum(checkpoint: Checkpoint, group: ParamGroup, name: str, anon: bool) -> Spectrum:
    spectrum = Spectrum()
    h, step = group.hyperparameters, int(checkpoint.manifest.scalars[name]["step"])
    if step == 0:
        return spectrum
    beta1, beta2 = map(float, h["betas"])
    moment = Key(name, "precond" if anon else "exp_avg_sq")
    numel = checkpoint.tensors[moment].numel
    for start in range(0, numel, BLOCK):
        stop = min(start + BLOCK, numel)
        second = checkpoint.read(moment, start, stop).double()
        sigma: Tensor = (
            torch.exp(second.log() * (-2.0 / Regime(h).gamma_in_force))
            if anon
            else second / (1.0 - beta2**step) + float(h["eps"]) ** 2
        )
        spectrum.add(sigma, checkpoint.read(Key(name, "exp_avg"), start, stop).double() / (1.0 - beta1**step))
    return spectrum


def agreed_spectra(config: Config) -> Spectra | None:
    """What `optim.match` names, read by one process.

    Raises:
        ConfigError: it cannot be.
    """
    if config.optim.match is None or config.optim.name != "anon":
        return None
    found: Any = None
    if is_first():
        try:
            found = load_spectra(Path(config.optim.match)).to_json()
        except (CheckpointError, OSError) as error:
            found = str(error)
    found = agree(found)
    if isinstance(found, str):
        raise ConfigError(f"optim.match: {found}")
    return Spectra.from_json(found)
