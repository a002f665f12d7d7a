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

from anon_dist.checkpoint.checksums import unsealed
from anon_dist.checkpoint.errors import CheckpointError
from anon_dist.checkpoint.json_values import loads
from anon_dist.checkpoint.keeping.names import PROGRESS
from anon_dist.checkpoint.optimizers.schedules import schedule_key
from anon_dist.checkpoint.schema import OutFile
from anon_dist.checkpoint.torchfiles.torchfile import lay_out, open_torch

EXTRAS = "extras.pt"
RAW = "files"
"""Extra under which files are kept as bytes that cannot be read without running code."""
TRAINER, _ARGUMENTS = "trainer_state.json", "training_args.bin"
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
            _check_new(name, extras, path)
            _read_pickle(path, name, extras, unsafe)
        elif match := _RANDOM.fullmatch(path.name):
            rank = int(match[1] or 0)
            _check_new(rank, extras.setdefault("rng", {}), path)
            extras["rng"][rank] = _random(open_torch(path, unsafe), rank)
        elif path.name == EXTRAS:
            extras.update(open_torch(path, unsafe))
        elif path.name in (PROGRESS, TRAINER, "config.json"):
            value = unsealed(path)[0] if path.name == PROGRESS else _json(path)
            extras[{PROGRESS: "progress", "config.json": "model_config"}.get(path.name, path.stem)] = value
        elif path.name == _ARGUMENTS:
            extras.setdefault(RAW, {})[path.name] = path.read_bytes()
    progress = extras.get("progress")
    if isinstance(progress, dict) and isinstance(progress.get("model"), dict):
        extras.setdefault("model_config", progress["model"])
    return extras


def _check_new(key: Any, extras: Mapping[Any, Any], path: Path) -> None:
    if key in extras:
        what = f"the random state of rank {key}" if isinstance(key, int) else key
        raise CheckpointError(
            f"{path} holds {what}, and so does another file beside it; remove the one that is not meant"
        )


def _read_pickle(path: Path, name: str, extras: dict[str, Any], unsafe: bool) -> None:
    try:
        extras[name] = open_torch(path, unsafe)
    except CheckpointError as error:
        if "--unsafe" not in str(error):
            raise
        extras.setdefault(RAW, {})[path.name] = path.read_bytes()


def _json(path: Path) -> Any:
    try:
        return loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None


def _random(state: Any, rank: int) -> Any:
    """A rank's random state in the training loop's form: torch, accelerator, python, numpy; whatever else there is under its name."""
    if not isinstance(state, Mapping) or "torch" in state:
        return state
    names = _TRAINER_RANDOM if "cpu" in state else _ACCELERATE_RANDOM
    found = {names.get(k, k): v for k, v in state.items()}
    numpy_state = found.get("numpy")
    if isinstance(numpy_state, tuple) and isinstance(numpy_state[1], np.ndarray):
        found["numpy"] = (str(numpy_state[0]), torch.from_numpy(numpy_state[1].astype(np.int64)), *numpy_state[2:])
    cuda = found.pop("torch_cuda_manual_seed", found.pop("cuda", None))
    several = isinstance(cuda, list | tuple) and len(cuda) > 0  # of all devices that the rank sees
    found["accelerator"] = cuda[rank % len(cuda)] if several else cuda
    if several:
        found["accelerators"] = list(cuda)
    return found


def _accelerate_random(state: Any) -> Any:
    if not isinstance(state, Mapping) or "torch" not in state:
        return state
    found, devices = _foreign_random(state, _ACCELERATE_RANDOM)
    return {"step": 0, **found, **({"torch_cuda_manual_seed": devices} if devices else {})}


def _trainer_random(state: Any, world_size: int) -> Any:
    if not isinstance(state, Mapping) or "torch" not in state:
        return state
    found, devices = _foreign_random(state, _TRAINER_RANDOM)
    return {**found, **({"cuda": devices if world_size > 1 else devices[0]} if devices else {})}


def _foreign_random(state: Mapping[str, Any], names: Mapping[str, str]) -> tuple[dict[str, Any], list[Tensor]]:
    """The state with others' names and numpy's own arrays; and those of the devices."""
    back = {v: k for k, v in names.items()}
    found = {back.get(k, k): v for k, v in state.items() if k not in ("accelerator", "accelerators")}
    if isinstance((numpy_state := state.get("numpy")), tuple) and isinstance(numpy_state[1], Tensor):
        array = numpy_state[1].numpy().astype(np.uint32)
        found[back.get("numpy", "numpy")] = (numpy_state[0], array, *numpy_state[2:])
    one = state.get("accelerator")
    return found, list(state.get("accelerators") or ([] if one is None else [one]))


def write_beside(extras: Mapping[str, Any], layout: str, world_size: int, step: int | None = None) -> list[OutFile]:
    """The files that hold these extras, in the layout's own way; what it has no file for goes to `extras.pt`.

    Random states of ranks that the new world does not have are left out.

    Args:
        step: of training, for the Trainer, which asks for it.
    """
    rest, files = dict(extras), list[OutFile]()

    def add(name: str, value: Any) -> None:
        files.append(lay_out(PurePosixPath(name), value))

    ranks = rest.pop("rng") if _by_rank(rest.get("rng")) else {}
    for rank, state in sorted(ranks.items()):
        if rank >= world_size:
            continue
        if layout == "accelerate":
            add(f"random_states_{rank}.pkl", _accelerate_random(state))
        elif layout == "trainer":
            add(f"rng_state_{rank}.pth" if world_size > 1 else "rng_state.pth", _trainer_random(state, world_size))
        else:
            add(f"random-{rank:05d}.pt", state)
    if layout in ("accelerate", "trainer"):
        files += _engine_files(rest, layout)
        if layout == "trainer":
            files.append(_trainer_state(rest, step))
    elif "progress" in rest:
        progress = {**rest.pop("progress"), "world_size": world_size}
        files.append(json_file(PROGRESS, progress))
        if rest.get("model_config") == progress.get("model"):
            rest.pop("model_config", None)
    if rest:
        add(EXTRAS, rest)
    return files


def _engine_files(rest: dict[str, Any], layout: str) -> list[OutFile]:
    """What accelerate and the Trainer have files for, each under its name there; it is taken out of `rest`."""
    files, names = list[OutFile](), {v: k for k, v in _STEMS.items()}
    schedule = schedule_key(rest)
    if schedule is not None and "lr_scheduler" not in rest:
        rest["lr_scheduler"] = rest.pop(schedule)
    for key in list(rest):
        stem, number = re.fullmatch(r"(.*?)((?:_\d+)?)", key).groups()  # type: ignore[union-attr]
        name = f"{names.get(stem, stem)}{number}"
        ending = ".pkl" if stem == "custom_checkpoint" else ".pt" if stem == "loss_scaler" else ".bin"
        if layout == "trainer":
            ending = ".pt" if key in ("lr_scheduler", "loss_scaler") else ""
        foreign = stem == "loss_scaler" and not (isinstance(rest[key], Mapping) and "_growth_tracker" in rest[key])
        if _PICKLES.fullmatch(name + ending) and not foreign:  # DeepSpeed's scaler is not torch's
            files.append(lay_out(PurePosixPath(name + ending), rest.pop(key)))
    for name, data in rest.pop(RAW, {}).items():
        files.append(OutFile(PurePosixPath(name), len(data), [(0, data)], []))
    if layout == "trainer" and rest.get("model_config"):
        files.append(json_file("config.json", rest.pop("model_config")))
    return files


def _trainer_state(rest: dict[str, Any], step: int | None) -> OutFile:
    """The Trainer's own record; of another's checkpoint the step alone, from which it computes the rest."""
    state = rest.pop("trainer_state", None)
    if state is None and step is None:
        raise CheckpointError(
            "the checkpoint does not say how many steps it has trained, which transformers' Trainer wants to know"
        )
    made: dict[str, Any] = {
        "global_step": step,
        "train_batch_size": 0,
        "stateful_callbacks": {"TrainerControl": [], "EarlyStoppingCallback": []},
    }
    return json_file(TRAINER, made if state is None else state)


def _by_rank(value: Any) -> bool:
    return isinstance(value, dict) and bool(value) and all(type(rank) is int for rank in value)


def json_file(name: str, value: Any) -> OutFile:
    """A JSON file."""
    data = (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode()
    return OutFile(PurePosixPath(name), len(data), [(0, data)], [])
