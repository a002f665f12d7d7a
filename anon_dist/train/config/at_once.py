"""What a start is refused for, as far as its configuration, the environment and names of files tell: before torch is imported."""

from __future__ import annotations

import json
import os
from pathlib import Path

from anon_dist.checkpoint.keeping.names import newest_of, run_problem
from anon_dist.named import need_checkpoint, need_room
from anon_dist.stores import store_problem
from anon_dist.train.config.errors import ConfigError
from anon_dist.train.config.families import check_length, read_config
from anon_dist.train.config.fields import Config
from anon_dist.train.config.parsing import accumulation
from anon_dist.train.config.phases import phases_of
from anon_dist.train.config.resumed import what_resume_comes_to
from anon_dist.train.config.sources import check_present
from anon_dist.train.tasks.known import tasks_problem
from anon_dist.usage import UsageError


def check_at_once(config: Config, data: bool = True) -> None:
    """Look at all of that.

    Args:
        data: whether the prepared folders are to be there already.

    Raises:
        ConfigError: the batch does not divide among the ranks, the engine cuts what a basis needs whole, a folder is not there, or cannot
            be, fsspec cannot open an address here, no task has a name, or samples are longer than the model's context.
        ShardError: the index of prepared data is missing or malformed.
    """
    readers = _readers(config)
    for _, phase in phases_of(config):
        accumulation(phase, readers)
    if config.optim.name == "anon" and config.optim.basis and (cutter := _cutter_of_rows(config)):
        raise ConfigError(
            f"optim.basis = {config.optim.basis} needs whole rows of matrices, and {cutter} cuts them anywhere: add --optim.basis None, or "
            "choose train.engine fsdp2, ddp or zero1, or DeepSpeed's stage 3 (configs/deepspeed/zero3.json)"
        )
    try:
        need_room(config.run_dir, "run_dir =")
    except UsageError as error:
        raise ConfigError(str(error)) from None
    if config.checkpoint.remote is not None and (unknown := store_problem(config.checkpoint.remote)):
        raise ConfigError(f"checkpoint.remote: {unknown}")
    _check_resumed(config)
    _check_model(config)
    if config.eval.tasks and (problem := tasks_problem(config.eval.tasks, config.eval.tasks_path)):
        raise ConfigError(f"eval.tasks: {problem}")
    if data:
        check_present(config)


def _readers(config: Config) -> int:
    """Ranks, or groups of them, that read samples of their own, as far as the launcher's variables tell; 1 without a launcher."""
    split = config.train.tensor_parallel or int(os.environ.get("PARALLELISM_CONFIG_TP_SIZE", "1"))
    sharing = config.train.context_parallel or int(os.environ.get("PARALLELISM_CONFIG_CP_SIZE", "1"))
    readers, left = divmod(int(os.environ.get("WORLD_SIZE", "1")), split * sharing)
    return 1 if left else readers  # what does not divide is the engine's to refuse


def _cutter_of_rows(config: Config) -> str | None:
    """The engine that was chosen, if it cuts matrices within rows, in words."""

    def uses(name: str) -> bool:
        return os.environ.get(f"ACCELERATE_USE_{name}", "false").lower() == "true"

    if uses("FSDP") or config.train.engine == "fsdp1":
        return "FSDP1" if os.environ.get("FSDP_VERSION", "1") == "1" else None
    if not uses("DEEPSPEED") and config.train.engine != "deepspeed":
        return None
    file = config.train.deepspeed_config or os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE") or "none"
    stage = 2  # of this package's own configuration
    if str(file) != "none":
        try:
            stage = json.loads(Path(file).read_text(encoding="utf-8")).get("zero_optimization", {}).get("stage", 0)
        except (OSError, ValueError, AttributeError):
            return None  # the engine's to refuse
    return f"DeepSpeed's stage {stage}" if stage in (1, 2) else None


def _check_model(config: Config) -> None:
    """The config.json of a model that is named, if it is a file here."""
    model = config.model
    if model.config is not None:
        says = read_config(Path(model.config))
    elif model.from_pretrained is not None and (Path(model.from_pretrained) / "config.json").is_file():
        says = read_config(Path(model.from_pretrained) / "config.json", "model.from_pretrained")
        says = says.get("text_config", says)
    else:
        return
    check_length(model, says, max(phase.data.seq_len for _, phase in phases_of(config)))


def _check_resumed(config: Config) -> None:
    if config.resume in ("auto", "never") or what_resume_comes_to(config.resume, Path(config.run_dir))[0] == "auto":
        return
    folder = Path(config.resume)
    try:
        need_checkpoint(folder, "a checkpoint's folder")
    except UsageError as error:
        raise ConfigError(f"resume = {error}") from None
    problem = run_problem(folder)
    if newest := newest_of(folder):
        problem = f"{folder} is a folder of checkpoints; name one of them, such as {newest}"
    if problem:
        raise ConfigError(f"resume = {problem}")
