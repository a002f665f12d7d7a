"""What must be alike on all ranks, compared at start, before anything in which a difference could make them wait for each other.

The ranks meet at the store, as in `peers`: a collective needs a process group, and how that is made is part of what may differ. Each leaves
a digest there; only if those differ do they read each other's values.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import platform
import socket
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from anon_dist.engines import peers
from anon_dist.engines.errors import EngineError
from anon_dist.exits import may_pass

LIBRARIES = ("torch", "accelerate", "transformers", "deepspeed", "numpy", "triton")
PREFIXES = ("ACCELERATE_", "FSDP_", "PARALLELISM_CONFIG_")
"""Environment variables in which `accelerate launch` passes on its configuration."""
OF_A_NODE = (
    "CONFIG_FILE",
    "TORCH_DEVICE",
    "CPU_AFFINITY",
    "NVME_PATH",
    "nvme_path",
    "LOG_LEVEL",
    "DEBUG_MODE",
    "DEBUG_RDV_FILE",
)
"""How settings end that may differ: devices, paths (of DeepSpeed's file the content is compared), and what only shows more."""
SHOWN = 5
"""Of more differences than this, the rest is counted only."""
LONGEST = 80
"""Of a value, so many characters are shown."""
_TURN = itertools.count()


def check_alike(values: Mapping[str, Any], seconds: float) -> bool:
    """Compare with the other ranks' values. Every rank must call it, as often as the others.

    Args:
        values: name → what must be the same on every rank, as JSON has it.
        seconds: how long to wait for the others.

    Returns:
        Whether they were compared; not where the ranks have no store to meet at yet.

    Raises:
        EngineError: they differ, in a line that names the values and the ranks; or a rank has failed, or did not come.
    """
    if not peers.several():
        return False
    rank, ranks, turn = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), next(_TURN)
    texts = {name: json.dumps(value, sort_keys=True, default=str) for name, value in values.items()}
    whole = json.dumps([socket.gethostname(), texts])
    digest = hashlib.sha256(json.dumps(texts, sort_keys=True).encode()).hexdigest()
    store = peers.store(seconds)
    store.set(f"alike/{turn}/values/{rank}", whole)  # before the digest: who has seen that may ask for it
    store.set(f"alike/{turn}/digest/{rank}", digest)
    keys = [f"alike/{turn}/digest/{r}" for r in range(ranks)]
    if missing := peers.wait_for(store, keys, seconds):
        names = ", ".join(key.rpartition("/")[2] for key in missing[: peers.NAMES])
        raise may_pass(
            EngineError(
                f"{len(missing)} of {ranks} ranks did not come within {seconds:.0f} s (rank {names}); see what their nodes say"
                f"{peers.restarts_remedy()}"
            )
        )
    digests = [found.decode() for found in store.multi_get(keys)]
    if len(set(digests)) > 1:
        one_of_each = {digest: r for r, digest in reversed(list(enumerate(digests)))}
        read = {d: json.loads(store.get(f"alike/{turn}/values/{r}")) for d, r in one_of_each.items()}
        raise EngineError(_explain([read[d][1] for d in digests], {one_of_each[d]: read[d][0] for d in read}))
    return True


def _explain(by_rank: Sequence[Mapping[str, str]], hosts: Mapping[int, str]) -> str:
    """The differences, in a line. `hosts`: of one rank for each set of values."""
    names = list(dict.fromkeys(name for texts in by_rank for name in texts))
    found = []
    for name in names:
        ranks_of: dict[str, list[int]] = defaultdict(list)
        for rank, texts in enumerate(by_rank):
            ranks_of[texts.get(name, "not set")].append(rank)
        if len(ranks_of) > 1:
            found.append(f"{name} is {_who_has_what(ranks_of, len(by_rank), hosts)}")
    more = f"; and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
    return f"the ranks were not started alike: {'; '.join(found[:SHOWN])}{more}. Start all with the same"


def _who_has_what(ranks_of: Mapping[str, list[int]], ranks: int, hosts: Mapping[int, str]) -> str:
    """Values and their ranks, the odd ones first."""
    by_number = sorted(ranks_of.items(), key=lambda item: (len(item[1]), item[1]))
    parts = [f"{_shortened(value)} on {named(held, hosts)}" for value, held in by_number]
    if len(by_number[-1][1]) > ranks / 2:
        parts[-1] = f"{_shortened(by_number[-1][0])} on the others"
    if len(parts) > SHOWN:
        parts[SHOWN - 1 : -1] = [f"{len(parts) - SHOWN} other values"]
    return ", ".join(parts[:-1]) + f" and {parts[-1]}"


def _shortened(value: str) -> str:
    return value if len(value) <= LONGEST else f"{value[:LONGEST]}…"


def named(ranks: Sequence[int], hosts: Mapping[int, str]) -> str:
    """The ranks, ascending, in words: "rank 3 (node7)", "ranks 0 to 3 and 7". `hosts`: of some ranks; not said if there is only one."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    parts = [part for run in runs for part in ([f"{run[0]} to {run[-1]}"] if len(run) > 2 else map(str, run))]
    if len(parts) > peers.NAMES:
        parts = [*parts[: peers.NAMES], "others"]
    text = f"{', '.join(parts[:-1])} and {parts[-1]}" if len(parts) > 1 else parts[0]
    on = dict.fromkeys(hosts[rank] for rank in ranks if rank in hosts) if len(set(hosts.values())) > 1 else {}
    where = f" ({', '.join([*on][:SHOWN])})" if on else ""
    return f"rank{'s' if len(ranks) > 1 else ''} {text}{where}"


# -- what is compared -------------------------------------------------------------------------------------------------


def surroundings(deepspeed_file: str | None) -> dict[str, Any]:
    """What `accelerate launch` and DeepSpeed are configured with, and the versions of what computes, this package's sources among them.

    Args:
        deepspeed_file: DeepSpeed's JSON, of which the content counts; one that cannot be read is passed over, to be refused later.
    """
    found = {
        f"accelerate's setting {name}": value
        for name, value in sorted(os.environ.items())
        if name.startswith(PREFIXES) and not name.endswith(OF_A_NODE)
    }
    with contextlib.suppress(OSError, ValueError):
        content = json.loads(Path(deepspeed_file).read_text()) if deepspeed_file else {}
        found |= _flattened(content, "the DeepSpeed configuration's ") if isinstance(content, dict) else {}
    found["the version of python"] = platform.python_version()
    found |= {f"the version of {name}": _version(name) for name in LIBRARIES}
    found["the hash of anon_dist's sources"] = _source_hash()
    return found


def _flattened(content: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in content.items():
        if isinstance(value, dict) and value:
            yield from _flattened(value, f"{prefix}{key}.")
        elif not key.endswith(OF_A_NODE):
            yield f"{prefix}{key}", value


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


@cache
def _source_hash() -> str:
    """Of all Python and C files, the kernels' among them: what runs, whatever its version is called."""
    package = Path(__file__).resolve().parents[1]
    digest = hashlib.sha256()
    for path in sorted(p for p in package.rglob("*") if p.suffix in (".py", ".c")):
        digest.update(hashlib.sha256(f"{path.relative_to(package)}".encode()).digest())
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:16]
