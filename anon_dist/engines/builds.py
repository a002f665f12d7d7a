"""Operators that DeepSpeed compiles as it starts: one that it need not, and what a build that was killed leaves behind."""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path
from types import ModuleType
from typing import Any

log = logging.getLogger(__name__)


def warn_of_waiting() -> None:
    """Name each lock of torch's builder that is older than this process: a start that needs its operator waits for it, without a word.

    The lock is a file that exists while somebody builds (`torch.utils.file_baton`): one that was killed leaves it, and whoever waits for
    it waits for ever. Whether its builder lives cannot be told, on a shared file system least of all, so that it is left where it is.
    """
    now, began = time.time(), _began()
    for lock in _locks():
        try:
            changed = lock.stat().st_mtime
        except OSError:  # just released
            continue
        if changed < began:
            log.warning(
                "%s has been there for %.0f s: whoever needs the operator %s waits until its build has ended. If nobody builds it any "
                "more (a build was killed), this start waits for ever: remove that file",
                lock,
                now - changed,
                lock.parent.name,
            )


def spare_inference_operator() -> None:
    """Have DeepSpeed not compile, on CPUs, what only its tensor-parallel inference uses: minutes on a busy machine, without a word.

    To be called before DeepSpeed joins the ranks; its own switch for operators that a machine cannot build.
    """
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def announce(backend: ModuleType) -> None:
    """Say before DeepSpeed compiles that operator in somebody's own script that it does, or what it waits for. It says nothing itself.

    Args:
        backend: `deepspeed.comm.torch`.
    """
    build = backend.build_shm_op

    def build_shm_op() -> Any:
        """DeepSpeed's."""
        import deepspeed.ops

        builder = backend.get_accelerator().create_op_builder("ShareMemCommBuilder")
        wanted = builder is not None and deepspeed.ops.__compatible_ops__.get(builder.NAME, False)
        if wanted and os.environ.get("LOCAL_RANK", "0") == "0":
            warn_of_waiting()
            _say_if_new(builder.NAME)
        return build()

    backend.build_shm_op = build_shm_op  # type: ignore[attr-defined]


def _say_if_new(name: str) -> None:
    from torch.utils.cpp_extension import _get_build_directory

    folder = Path(_get_build_directory(name, False))
    if not (folder / f"{name}.so").exists() and not (folder / "lock").exists():
        log.warning(
            "DeepSpeed compiles %s for this machine, up to a minute, once: %s. A build that is killed leaves a file `lock` there: remove "
            "it then",
            name,
            folder,
        )


def _locks() -> list[Path]:
    """Where torch builds extensions; by default there is a folder for each version of Python and kind of device."""
    root = os.environ.get("TORCH_EXTENSIONS_DIR")
    if root is not None:
        return sorted(Path(root).glob("*/lock"))
    from torch.utils.cpp_extension import get_default_build_root

    return sorted(Path(get_default_build_root()).glob("*/*/lock"))


def _began() -> float:
    """When this process did, as files tell time."""
    try:
        ticks = int(Path("/proc/self/stat").read_bytes().rpartition(b")")[2].split()[19])
        up = float(Path("/proc/uptime").read_text().split()[0])
        return time.time() - up + ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError):
        return time.time() - 60.0
