"""The small files beside a checkpoint's tensors: schedulers, scalers, random states, the training loop's progress."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from torch import Tensor

from anon_dist.checkpoint.checksums import PROGRESS, unsealed
from anon_dist.checkpoint.errors import CheckpointError
from anon_dist.checkpoint.schema import OutFile
from anon_dist.checkpoint.torchfile import lay_out, open_torch

EXTRAS = "extras.pt"
RAW = "files"
"""Extra under which files are kept as bytes that cannot be read without running code."""
_STEMS = {"scheduler": "lr_scheduler", "scaler": "loss_scaler"}
_PICKLES = re.compile(r"(scheduler|scaler|sampler|dl_state_dict|custom_checkpoint)(_\d+)?\.(bin|pt|pkl)")
_RANDOM = re.compile(r"(?:random-|random_states_|rng_state_?)(\d*)\.(?:pt|pkl|pth)")
_ACCELERATE_RANDOM = {"random_state": "python", "numpy_random_seed": "numpy", "torch_manual_seed": "torch"}
_TRAINER_RANDOM = {"cpu": "torch"}


def read_beside(folder: Path, unsafe: bool = False) -> dict[str, Any]:
    """Extras by their usual names: lr_scheduler, loss_scaler, sampler, rng (rank → state), progress, model_config, ….

    Raises:
        CheckpointError: a file is damaged.
    """
    extras: dict[str, Any] = {}
    for path in sorted(folder.iterdir()):
        if match := _PICKLES.fullmatch(path.name):
            name = _STEMS.get(match[1], match[1]) + (match[2] or "")
            _read_pickle(path, name, extras, unsafe)
        elif match := _RANDOM.fullmatch(path.name):
            extras.setdefault("rng", {})[int(match[1] or 0)] = _random(open_torch(path, unsafe))
        elif path.name == EXTRAS:
            extras.update(open_torch(path, unsafe))
        elif path.name in (PROGRESS, "trainer_state.json", "config.json"):
            value = unsealed(path)[0] if path.name == PROGRESS else _json(path)
            extras[{PROGRESS: "progress", "config.json": "model_config"}.get(path.name, path.stem)] = value
    progress = extras.get("progress")
    if isinstance(progress, dict) and isinstance(progress.get("model"), dict):
        extras.setdefault("model_config", progress["model"])
    return extras


def _read_pickle(path: Path, name: str, extras: dict[str, Any], unsafe: bool) -> None:
    try:
        extras[name] = open_torch(path, unsafe)
    except CheckpointError as error:
        if "--unsafe" not in str(error):
            raise
        extras.setdefault(RAW, {})[path.name] = path.read_bytes()


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None


def _random(state: Any) -> Any:
    """A rank's random state in the training loop's form: torch, accelerator, python, numpy; whatever else there is under its name."""
    if not isinstance(state, Mapping) or "torch" in state:
        return state
    names = _TRAINER_RANDOM if "cpu" in state else _ACCELERATE_RANDOM
    found = {names.get(k, k): v for k, v in state.items()}
    numpy_state = found.get("numpy")
    if isinstance(numpy_state, tuple) and isinstance(numpy_state[1], np.ndarray):
        found["numpy"] = (str(numpy_state[0]), torch.from_numpy(numpy_state[1].astype(np.int64)), *numpy_state[2:])
    cuda = found.pop("torch_cuda_manual_seed", found.pop("cuda", None))
    found["accelerator"] = cuda[0] if isinstance(cuda, list | tuple) and cuda else cuda
    return found


def _accelerate_random(state: Any) -> Any:
    if not isinstance(state, Mapping) or "torch" not in state:
        return state
    back = {v: k for k, v in _ACCELERATE_RANDOM.items()}
    found = {back.get(k, k): v for k, v in state.items() if k != "accelerator"}
    if isinstance((numpy_state := state.get("numpy")), tuple) and isinstance(numpy_state[1], Tensor):
        found["numpy_random_seed"] = (numpy_state[0], numpy_state[1].numpy().astype(np.uint32), *numpy_state[2:])
    if state.get("accelerator") is not None:
        found["torch_cuda_manual_seed"] = [state["accelerator"]]
    return {"step": 0, **found}


def write_beside(extras: Mapping[str, Any], layout: str, world_size: int) -> list[OutFile]:
    """The files that hold these extras, in the layout's own way; what it has no file for goes to `extras.pt`.

    Random states of ranks that the new world does not have are left out.
    """
    rest, files = dict(extras), list[OutFile]()

    def add(name: str, value: Any) -> None:
        files.append(lay_out(PurePosixPath(name), value))

    ranks = rest.pop("rng") if _by_rank(rest.get("rng")) else {}
    for rank, state in sorted(ranks.items()):
        if rank < world_size and layout == "accelerate":
            add(f"random_states_{rank}.pkl", _accelerate_random(state))
        elif rank < world_size:
            add(f"random-{rank:05d}.pt", state)
    if layout == "accelerate":
        names = {v: k for k, v in _STEMS.items()}
        for key in list(rest):
            stem, number = re.fullmatch(r"(.*?)((?:_\d+)?)", key).groups()  # type: ignore[union-attr]
            name = f"{names.get(stem, stem)}{number}"
            ending = ".pkl" if stem == "custom_checkpoint" else ".pt" if stem == "loss_scaler" else ".bin"
            if _PICKLES.fullmatch(name + ending):
                add(name + ending, rest.pop(key))
        for name, data in rest.pop(RAW, {}).items():
            files.append(OutFile(PurePosixPath(name), len(data), [(0, data)], []))
    elif "progress" in rest:
        progress = {**rest.pop("progress"), "world_size": world_size}
        files.append(json_file(PROGRESS, progress))
        if rest.get("model_config") == progress.get("model"):
            rest.pop("model_config", None)
    if rest:
        add(EXTRAS, rest)
    return files


def _by_rank(value: Any) -> bool:
    return isinstance(value, dict) and bool(value) and all(type(rank) is int for rank in value)


def json_file(name: str, value: Any) -> OutFile:
    """A JSON file."""
    data = (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode()
    return OutFile(PurePosixPath(name), len(data), [(0, data)], [])
