"""run_dir: whether all nodes have the same one, can write it, how fast, and how many checkpoints it has room for."""

from __future__ import annotations

import contextlib
import os
import shutil
import statistics
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

from anon_dist.bench.bases import cost
from anon_dist.bench.memory import Bases, Job, Optimizer, memory
from anon_dist.bench.shapes import shape_of
from anon_dist.checkpoint import CheckpointError, Checkpoints
from anon_dist.checkpoint.keeping.remote import Remote
from anon_dist.checkpoint.keeping.uploads import TakenError
from anon_dist.data import DataError, Index
from anon_dist.data.samples.stretches import Stretches
from anon_dist.data.stored.blocks import AGAIN, RESTORE
from anon_dist.data.stored.remote import UPLOAD
from anon_dist.doctor.meeting import Meeting
from anon_dist.doctor.report import Folder
from anon_dist.optim.hyper import state_dtypes
from anon_dist.optim.rounding import BLOCK
from anon_dist.stores import scheme_of
from anon_dist.train.config.parsing import Config
from anon_dist.train.config.sources import all_sources, called
from anon_dist.train.inputs.corpora import first_path, split_of_set
from anon_dist.train.saves.owner import Owner
from anon_dist.train.saves.remote import checkpoints_of

WRITTEN = 1 << 26
"""Bytes, to see how fast; less where there is little room."""
SYNCS = 8
SEEN_SECONDS = 15.0
"""How long a file may take to be seen from other nodes: network file systems ask again after seconds."""
WRITE_SECONDS = 120.0
ANSWER_SECONDS = 15.0
"""For all that is asked of `checkpoint.remote`."""
UNANSWERED = "see to checkpoint.remote, to the network and to the right to write there, or leave it out"


def try_folder(path: Path, token: int, meeting: Meeting | None) -> Folder:
    """Write, sync and read as checkpoints are, on all nodes at once. Nothing is left behind.

    Args:
        path: run_dir; made where it is missing, and removed again.
        token: of this examination, in the files' names.
        meeting: with the other nodes; None: there are none.
    """
    rank = 0 if meeting is None else meeting.place.rank
    found, made = Folder(), list[Path]()
    if rank == 0:
        made = [p for p in (path, *path.parents) if not p.exists()]
        with _telling(found, path):
            path.mkdir(parents=True, exist_ok=True)
    if meeting is not None:
        meeting.all_at("the making of run_dir", WRITE_SECONDS)
    if not found.problem:
        _wait_for(path)
    own = path / f".doctor-{token}-{rank}"
    try:
        with _telling(found, path):
            own.write_text(str(rank))
            _sync(own)
        if meeting is not None:
            meeting.all_at("a file in run_dir", WRITE_SECONDS)
            found.unseen = _unseen(path, token, meeting)
        if not found.problem:
            with _telling(found, path):
                _measure(path / f"{own.name}-speed", found)
        with contextlib.suppress(OSError):
            found.free = shutil.disk_usage(path).free
            found.checkpoints = len(Checkpoints(path / "checkpoints", 1).complete())
            found.device = _mounted(path)
        if meeting is not None:
            meeting.all_at("the speed of run_dir", WRITE_SECONDS)
    finally:
        with contextlib.suppress(OSError):
            own.unlink(missing_ok=True)
        if meeting is not None:
            meeting.all_at("leaving run_dir", 30)
        for folder in made:
            with contextlib.suppress(OSError):
                folder.rmdir()
    return found


@contextlib.contextmanager
def _telling(found: Folder, path: Path) -> Iterator[None]:
    """A block whose error is the folder's first problem."""
    try:
        yield
    except OSError as error:
        found.problem = found.problem or _in_the_way(path) or error.strerror or str(error)


def _in_the_way(path: Path) -> str:
    """What stands where a folder is to be: a file, or a link that leads nowhere."""
    for each in (path, *path.parents):
        if each.is_symlink() and not each.exists():
            return f"{each} is a link to {each.readlink()}, which is not there"
        if each.exists():
            return "" if each.is_dir() else f"{each} is a file"
    return ""


def _wait_for(path: Path) -> None:
    end = time.monotonic() + SEEN_SECONDS
    while not path.is_dir() and time.monotonic() < end:
        time.sleep(0.2)


def _unseen(path: Path, token: int, meeting: Meeting) -> list[int]:
    """Nodes whose files are not here, however long one waits."""
    end, missing = time.monotonic() + SEEN_SECONDS, list[int]()
    while True:
        names = set(os.listdir(path)) if path.is_dir() else set()
        missing = [r for r in meeting.present if r != meeting.place.rank and f".doctor-{token}-{r}" not in names]
        if not missing or time.monotonic() > end:
            return missing
        time.sleep(0.2)


def _measure(scratch: Path, found: Folder) -> None:
    """A large file, and small ones, each synced; of the large one's content nothing repeats."""
    piece, pieces = os.urandom(1 << 20), max(1, min(WRITTEN, shutil.disk_usage(scratch.parent).free // 4) >> 20)
    try:
        began = time.perf_counter()
        with scratch.open("wb") as file:
            for i in range(pieces):
                file.write(i.to_bytes(8) + piece[8:])
            file.flush()
            os.fsync(file.fileno())
        found.written = pieces * len(piece) / (time.perf_counter() - began)
        seconds = []
        with scratch.open("r+b") as file:
            for _ in range(SYNCS):
                began = time.perf_counter()
                file.write(piece[:4096])
                file.flush()
                os.fsync(file.fileno())
                seconds.append(time.perf_counter() - began)
        found.sync = statistics.median(seconds)
    finally:
        scratch.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _mounted(path: Path) -> str:
    """What lies there: device and type of the nearest mount point."""
    real = str(path.resolve())
    mounts = [
        p
        for p in psutil.disk_partitions(all=True)
        if real == p.mountpoint or real.startswith(p.mountpoint.rstrip("/") + "/")
    ]
    best = max(mounts, key=lambda p: len(p.mountpoint), default=None)
    return "" if best is None else f"{best.device} ({best.fstype})"


def try_address(config: Config) -> tuple[str, str]:
    """What is wrong with `checkpoint.remote`, and what mends it: it cannot be written, does not answer in time, or is another run's; ""
    if nothing is. Nothing is left there."""
    assert config.checkpoint.remote is not None
    found = list[tuple[str, str]]()
    looking = threading.Thread(
        target=lambda: found.append(_address_problem(config)), name="checkpoint.remote", daemon=True
    )
    looking.start()
    looking.join(ANSWER_SECONDS)  # clients have attempts and limits of their own, up to minutes
    if found:
        return found[0]
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or ""
    at = f" (AWS_ENDPOINT_URL={endpoint})" if endpoint and scheme_of(config.checkpoint.remote) in ("s3", "s3a") else ""
    return f"{config.checkpoint.remote}{at} does not answer within {ANSWER_SECONDS:.0f} s", UNANSWERED


def _address_problem(config: Config) -> tuple[str, str]:
    folder = Path(config.run_dir)
    try:
        remote = Remote(str(config.checkpoint.remote), pauses=())
        Owner(config, folder).check(remote, checkpoints_of(folder, config.checkpoint))
        remote.probe()
    except TakenError as error:
        return error.what, error.remedy
    except CheckpointError as error:
        return str(error), UNANSWERED
    return "", ""


# -- what a run needs -------------------------------------------------------------------------------------------------


def data_of(config: Config) -> tuple[str, str, str]:
    """Fingerprints of all prepared folders that the run reads, what is wrong with the first that is not whole, and what mends it. Every
    shard is looked for, with its size; none is read."""
    fingerprints = list[str]()
    sources = {called(name): source.path for name, source in all_sources(config).items()}
    sets = {f"eval.sets.{name}": path for name, path in config.eval.sets.items()}
    for name, path in (sources | sets).items():
        try:
            index = Index.load(path)
            shards = index.shards if name in sources else index.split(split_of_set(config, index)).shards
            Stretches(path).check_sizes(shards)
        except (DataError, OSError) as error:
            return "", *_remedy_apart(str(error), f"have {name} there on all nodes (anon-dist data prepare)")
        fingerprints.append(index.fingerprint if len(sources | sets) == 1 else f"{name} {index.fingerprint}")
    return ", ".join(fingerprints), "", ""


def _remedy_apart(text: str, otherwise: str) -> tuple[str, str]:
    """What is wrong with a shard, and the remedy that its error ends with."""
    for remedy in (RESTORE, AGAIN, UPLOAD):
        if text.endswith(f". {remedy}"):
            return text.removesuffix(f". {remedy}"), remedy[:1].lower() + remedy[1:].rstrip(".")
    return text, otherwise


def vocabulary(config: Config) -> int | None:
    """Of the data; None: they cannot be read."""
    try:
        return Index.load(first_path(config)).vocab_size
    except (DataError, OSError):
        return None


def checkpoint_bytes(config: Config, vocab: int) -> int | None:
    """Bytes of a checkpoint: weights, masters and the optimizer's state, as `anon-dist bench plan` counts them on one rank. None: the
    model's sizes are in another file than the configuration."""
    if config.model.config is not None or config.model.from_pretrained is not None:
        return None
    optim, deepspeed = config.optim, config.train.engine == "deepspeed"
    bf16 = config.train.precision != "fp32"
    job = Job(
        shape_of(config.model, vocab),
        1,
        seq_len=config.data.seq_len,
        bf16=bf16 and deepspeed,
        pure=config.train.precision == "bf16-true",
    )
    needed = memory("zero2" if deepspeed else "fsdp2", job, _optimizer(config))
    whole = needed.parameters + needed.masters + needed.state
    if not deepspeed:
        whole += (
            job.stored * job.shape.vocab * job.shape.width * job.shape.tied
        )  # DCP has the tied matrix under both its names
    if optim.name == "anon" and optim.basis is not None:
        sides = Bases("both" if optim.basis == "both" else "columns", optim.basis_block)
        whole += cost("fsdp2", job, sides).bytes
    return int(whole)


def _optimizer(config: Config) -> Optimizer:
    if config.optim.name == "adamw":
        return Optimizer(4.0, 4.0)
    widths = {
        key: float(dtype.itemsize) for key, dtype in state_dtypes({"state_dtype": config.optim.state_dtype}).items()
    }
    mean = widths["exp_avg"] if widths["exp_avg"] > 1 else 1.0 + 1.0 / BLOCK
    return Optimizer(mean, widths["exp_avg_sq"], widths["precond"])
