"""lm-eval's tasks (EleutherAI's lm-evaluation-harness): found, run on a model, and their scores as metrics. Imports lm-eval when called."""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anon_dist.train.config.errors import HarnessError
from anon_dist.train.reports.metrics import TASK, Record
from anon_dist.train.tasks.known import no_task, not_installed


def check_installed() -> None:
    """That lm-eval is here, with what it needs.

    Raises:
        HarnessError: it is not; with the command that installs it.
    """
    for module in ("lm_eval.evaluator", "lm_eval.tasks", "lm_eval.models.huggingface"):
        try:
            importlib.import_module(module)
        except ImportError as error:
            missing = (error.name or "lm_eval").partition(".")[0]
            raise HarnessError(not_installed(missing)) from None


@dataclass(frozen=True)
class Tasks:
    """Tasks with their data, to be run any number of times."""

    names: tuple[str, ...]
    items: tuple[Any, ...]
    """lm-eval's tasks and groups."""
    manager: Any
    generating: tuple[str, ...]
    """Those in which the model writes text."""


def find_tasks(names: Sequence[str], include_path: str | None) -> Tasks:
    """Tasks by name (of a task, group or tag of lm-eval's or of the folder), or by their YAML file, with their data sets.

    lm-eval's own 14,000 files are looked through only where a name is not in the folder.

    Args:
        include_path: a folder of task files.

    Raises:
        HarnessError: lm-eval or a task is missing, or a task's data cannot be loaded.
    """
    check_installed()
    from lm_eval.tasks import TaskManager

    if include_path is not None and not Path(include_path).is_dir():
        raise HarnessError(f"the folder of task files {include_path} does not exist")
    names = tuple(dict.fromkeys(names))
    with quiet():
        manager = TaskManager(include_path=include_path, include_defaults=False)
        if any(not Path(name).is_file() and name not in manager.all_tasks for name in names):
            manager = TaskManager(include_path=include_path)
        for name in names:
            if name not in manager.all_tasks and not Path(name).is_file():
                raise HarnessError(_missing(name, manager.all_tasks, include_path))
        items = [item for name in names for item in _load(manager, name)]
    tasks = [task for item in items for task in getattr(item, "get_all_tasks", lambda item=item: [item])()]
    generating = tuple(t.task_name for t in tasks if t.OUTPUT_TYPE == "generate_until")
    return Tasks(names, tuple(items), manager, generating)


def _missing(name: str, known: Sequence[str], include_path: str | None) -> str:
    """What to say of a task that there is not: perhaps its file is one that lm-eval left out without a word."""
    from lm_eval.tasks._yaml_loader import load_yaml

    for path in sorted(Path(include_path).rglob("*.yaml")) if include_path else ():
        try:
            load_yaml(path, resolve_func=False)
        except Exception as error:  # whatever YAML, and lm-eval's extensions of it, raise
            return f"there is no task {name}, and {path} cannot be read: {_line(error)}"
    return no_task(name, known)


def _load(manager: Any, name: str) -> list[Any]:
    """The task or the group of that name, or the tasks of that tag."""
    try:
        loaded = manager.load([name])
    except Exception as error:  # of YAML, of the task's own functions, of `datasets`, of the network
        raise HarnessError(_unreached(name, error) or f"task {name} cannot be loaded: {_line(error)}") from error
    groups = loaded.get("groups") or {}
    return [next(iter(groups.values()))] if groups else list(loaded["tasks"].values())


def _unreached(name: str, error: Exception) -> str | None:
    """What to say of a task whose data set lies on a hub that is not reached; None: that is not what is wrong."""
    found = re.search(r"reach '([^']+)' on the Hub", str(error))
    if found is None or not isinstance(error, ConnectionError):
        return None
    return (
        f"task {name}: its data set {found[1]} is on the Hugging Face hub, which cannot be reached from here. Where it can, "
        f"`python -c \"import datasets; datasets.load_dataset('{found[1]}')\"` fetches it into ~/.cache/huggingface (HF_HOME): copy that "
        "here, or name task files of your own"
    )


def run_tasks(
    tasks: Tasks, model: Any, *, limit: int | None = None, fewshot: int | None = None, errors: bool = True
) -> dict[str, Any]:
    """lm-eval's results, without the single documents. Every generator of random numbers is set by it.

    Args:
        model: one of lm-eval's.
        limit: documents of each task; None: all.
        fewshot: worked examples before each question; None: as the task says.
        errors: whether to estimate standard errors; of some metrics by a bootstrap, in processes of its own.

    Raises:
        HarnessError: a task does not go with the model.
    """
    from lm_eval.evaluator import simple_evaluate

    more = {} if errors else {"bootstrap_iters": 0}
    try:
        with quiet(), _quiet_git():
            found: dict[str, Any] | None = simple_evaluate(
                model=model,
                tasks=list(tasks.items),
                task_manager=tasks.manager,
                num_fewshot=fewshot,
                batch_size=model.batch_size,
                limit=limit,
                log_samples=False,
                **more,
            )
    except (HarnessError, RuntimeError):  # the latter are the device's
        raise
    except Exception as error:
        raise HarnessError(f"tasks {', '.join(tasks.names)}: {_line(error)}") from error
    return found or {}


def scores(results: dict[str, Any]) -> Record:
    """Metrics by name: task/NAME/METRIC, with the filter of the answers behind it if there is one; also METRIC_stderr."""
    record: Record = {}
    for task, values in results.get("results", {}).items():
        for key, value in values.items():
            metric, comma, chosen = key.partition(",")
            if comma and isinstance(value, int | float):
                record[f"{TASK}{task}/{metric}{'' if chosen == 'none' else f'/{chosen}'}"] = value
    return record


@contextlib.contextmanager
def quiet(bars: bool = True) -> Iterator[None]:
    """Without lm-eval's remarks, and without its bars but on a terminal.

    Args:
        bars: whether a terminal sees them.
    """
    loggers = [logging.getLogger(name) for name in ("lm_eval", "datasets", "huggingface_hub")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with contextlib.nullcontext() if bars and sys.stderr.isatty() else contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextlib.contextmanager
def _quiet_git() -> Iterator[None]:
    """lm-eval asks git for the commit of the working folder, for its results, and outside of a repository git complains to the terminal."""
    from lm_eval import evaluator

    def commit() -> str | None:
        try:
            done = subprocess.run(["git", "describe", "--always"], capture_output=True, text=True, check=True)
        except (OSError, subprocess.CalledProcessError):
            return None
        return done.stdout.strip()

    asked = getattr(evaluator, "get_git_commit_hash", None)
    if asked is not None:
        evaluator.get_git_commit_hash = commit
    try:
        yield
    finally:
        if asked is not None:
            evaluator.get_git_commit_hash = asked


def _line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__
