"""A run that hangs: found by each rank's own thread, explained by all of them together, and ended.

Each rank watches its own `Pulse`. When it has made no progress for longer than its limit, the rank writes where it is (see
`whereabouts`) and raises an alarm, on which all others do so. Of ranks that do not answer, others of their host say what the kernel and
their pulse tell. The first rank that lives sums up, and all that live end: a launcher kills what is left.

Reports go into the run's folder, and small ones through the store too: either may be what hangs. Neither is waited for.
"""

from __future__ import annotations

import faulthandler
import json
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

from anon_dist.engines import peers
from anon_dist.files import write_text
from anon_dist.launcher import tell_launcher
from anon_dist.train.config.parsing import Config
from anon_dist.train.health import whereabouts
from anon_dist.train.health.hang_report import summary
from anon_dist.train.health.pulse import Pulse, read_pulse

log = logging.getLogger(__name__)

FOLDER = "hangs"
"""In the run's folder."""
HUNG = 70
"""Exit code of a rank that ends so (EX_SOFTWARE of sysexits.h)."""
POLL = 0.5
"""Seconds between two looks at the pulse."""
ASK = 1.5
"""Seconds between two questions to the store whether another has raised an alarm."""
ANSWER = 4.0
"""Seconds in which the others are to answer an alarm."""
PROXY = 1.5
"""Seconds for what is seen of those that do not."""
SUMMING = (2, 16)
"""So many ranks of so many hosts read what all have told, and may sum up: if every rank did, the store would answer each for all."""
GRACE = timedelta(seconds=60)
"""By how much longer torch's own timeouts are: they know less."""
STILL = 5.0
"""Of two looks that lie further apart, the process was not running in between."""
ASKS = signal.SIGURG
"""On it a process writes its stacks, even where no Python can run. Without a handler it is ignored."""


def limits(config: Config) -> tuple[float, float]:
    """Seconds without progress, usually and at the most; see `Pulse`."""
    usual = config.train.timeout_minutes * 60
    return usual, max(usual, 60 * (config.train.first_timeout_minutes or 30.0))


def patience(config: Config) -> timedelta:
    """What process groups wait: longer than the watch, which knows more."""
    return timedelta(seconds=limits(config)[1]) + GRACE


@contextmanager
def watched(config: Config, folder: Path) -> Iterator[Pulse]:
    """A block in which a thread watches this rank's progress. Every rank enters it, after it has joined the others."""
    pulse = Pulse(*limits(config))
    with pulse.shared() as descriptor:
        watch = _Watch(pulse, descriptor, folder)
        watch.start()
        try:
            yield pulse
        finally:
            watch.stop()


class _Watch:
    def __init__(self, pulse: Pulse, descriptor: int, folder: Path) -> None:
        self._pulse, self._descriptor = pulse, descriptor
        self._rank, self._ranks = whereabouts.world()
        own = {**whereabouts.own(), "pulse": descriptor, "begun": time.strftime("%Y-%m-%dT%H-%M-%S")}
        self._places: list[dict[str, Any]] = [own] * self._ranks
        if self._ranks > 1:
            dist.all_gather_object(self._places, own)
        self._name = str(self._places[0]["begun"])
        self._folder = folder.absolute() / FOLDER / self._name
        self._several = self._ranks > 1 and peers.several()
        self._stopped, self._asked = threading.Event(), threading.Event()
        self._told = False
        self._heard: dict[int, Any] = {}
        """What ranks told, this one too."""
        self._seen_of: dict[int, Any] = {}
        """What others saw of ranks that did not answer."""
        self._in_store: set[int] = set()
        place = self._places[self._rank]
        self._near = [
            r for r, p in enumerate(self._places) if (p["host"], p["space"]) == (place["host"], place["space"])
        ]
        hosts = list(dict.fromkeys(str(p["host"]) for p in self._places))
        may = self._near.index(self._rank) < SUMMING[0] and hosts.index(place["host"]) < SUMMING[1]
        self._asks = range(self._ranks) if may else self._near
        self._threads = [threading.Thread(target=self._watch, name="hang-watch", daemon=True)]
        if self._several:
            self._threads.append(threading.Thread(target=self._listen, name="hang-listen", daemon=True))
            self._threads.append(threading.Thread(target=self._look, name="hang-look", daemon=True))

    def start(self) -> None:
        faulthandler.register(ASKS, file=self._descriptor, all_threads=True)
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        self._stopped.set()
        self._threads[0].join()  # the others may be waiting for a store or a folder that does not answer
        faulthandler.unregister(ASKS)

    # -- finding ----------------------------------------------------------------------------------

    def _watch(self) -> None:
        looked = time.monotonic()
        while not self._stopped.wait(POLL):
            gap, looked = time.monotonic() - looked, time.monotonic()
            if gap > STILL:  # it was stopped itself: what the others did meanwhile is to be seen first
                self._pulse.pardon(gap)
            late = self._pulse.age > self._pulse.limit
            if late and self._ranks == 1:
                self._tell_alone()
            elif late or self._asked.is_set():
                self._alarm()
            elif not late:
                self._told = False

    def _listen(self) -> None:
        """Whether another rank has raised an alarm, by the store."""
        with suppress(Exception):  # the store is gone: the run is ending, or the folder says it
            store = peers.store(peers.WAIT_SECONDS)
            while not self._stopped.wait(ASK):
                if store.check([f"hang/{self._name}"]):
                    self._asked.set()
                    return

    def _look(self) -> None:
        """The same, by the folder."""
        with suppress(OSError):
            while not self._stopped.wait(ASK):
                if self._folder.exists():
                    self._asked.set()
                    return

    # -- explaining -------------------------------------------------------------------------------

    def _report(self) -> tuple[dict[str, Any], str]:
        """What this rank tells, and its stacks."""
        text, where = whereabouts.stacks(without={t.ident for t in self._threads if t.ident is not None})
        pulse = self._pulse
        told = {
            "step": pulse.step,
            "doing": pulse.doing,
            "age": pulse.age,
            "late": 2 * pulse.age > pulse.limit,
            "where": where,
        }
        return {**told, "collectives": whereabouts.collectives()}, text

    def _tell_alone(self) -> None:
        """There is nobody who waits: it may go on yet."""
        if not self._told:
            self._told = True
            report, text = self._report()
            log.warning("no progress for %.0f s, after step %d: in %s", report["age"], report["step"], report["where"])
            _soon(lambda: self._write(report, text))

    def _alarm(self) -> None:
        """Tell, hear, sum up, end."""
        begun, late = time.monotonic(), self._pulse.age > self._pulse.limit
        if told := _soon_value(self._summed_up, 1.0):  # while this process was stopped
            _end(told)
        report, text = self._report()
        written = _soon(lambda: self._write(report, text))
        if self._several:
            _soon(lambda: self._post(self._rank, _brief(report)))
        heard, seen = self._heard, self._seen_of
        heard[self._rank] = report
        self._hear(begun + ANSWER, lambda: all(rank in heard for rank in self._asks))
        for rank, words in self._look_after().items():
            seen[rank] = words
            _soon(lambda rank=rank, words=words: self._write_seen(rank, words))
            if self._several:
                _soon(lambda rank=rank, words=words: self._post(rank, {"seen": words}))
        self._hear(time.monotonic() + PROXY, lambda: all(rank in heard or rank in seen for rank in self._asks))
        if self._stopped.is_set() and not late:
            return  # the others hang, and this one has ended well, or by an error of its own
        sums_up = self._rank == min(heard) and len(self._asks) == self._ranks
        cut = self._not_in_store() if sums_up else []
        longest = report if late else max(heard.values(), key=lambda told: told["age"])  # this one was stopped itself
        limit = f"No progress for {longest['age']:.0f} s, after step {longest['step']}."
        lines = summary(heard, seen, self._places, self._folder, limit, cut, os.environ.get("MASTER_ADDR", ""))
        if sums_up:
            if not written.is_set():
                lines[-1] = f"  {self._folder} does not answer"
            _soon(lambda: print("\n".join(lines), file=sys.stderr, flush=True)).wait(1.0)
            _soon(lambda: write_text(self._folder / "summary.txt", "\n".join(lines) + "\n")).wait(1.0)
        else:
            self._until(self._summed_up, 2 * PROXY + 1.0)  # who sums up may wait so long for the store
        _end(_soon_value(self._summed_up, 0.5) or lines[0])

    def _summed_up(self) -> str:
        """What the others have come to; "" so far."""
        path = self._folder / "summary.txt"
        return path.read_text().splitlines()[0] if path.exists() else ""

    def _hear(self, end: float, done: Any) -> None:
        """What the others have told, by either way, until `end` or all is there."""
        while not done() and time.monotonic() < end:
            for read in (self._read_files, self._read_store):
                _soon(read).wait(1.0)
            time.sleep(0.1)

    def _not_in_store(self) -> list[int]:
        """Ranks that were heard by the folder alone, where others' words are in the store."""
        end = time.monotonic() + 2 * PROXY
        while self._several and (lost := [r for r in self._heard if r not in self._in_store]):
            if time.monotonic() > end:  # of a store that nobody reaches there is nothing to say
                return lost if self._in_store else []
            _soon(self._read_store).wait(1.0)
            time.sleep(0.1)
        return []

    def _look_after(self) -> dict[int, Any]:
        """What there is to see of this host's ranks that do not answer, if this is the first that does."""
        if min(rank for rank in self._near if rank in self._heard) != self._rank:
            return {}
        return {rank: self._seen(self._places[rank]) for rank in self._near if rank not in self._heard}

    def _seen(self, place: dict[str, Any]) -> dict[str, Any]:
        state = whereabouts.of_process(place["pid"], place["began"])
        found: dict[str, Any] = {"state": state}
        process, descriptor = Path(f"/proc/{place['pid']}"), place["pulse"]
        with suppress(OSError, ValueError):
            beat, _ = read_pulse(process, descriptor)
            found |= {"step": beat.step, "doing": beat.doing, "age": time.monotonic() - beat.at}
            if not state.startswith("gone"):
                os.kill(place["pid"], ASKS)
                time.sleep(0.3)
            found["stacks"] = read_pulse(process, descriptor)[1]
            found["where"] = whereabouts.of_faulthandler(found["stacks"])
        return found

    # -- the two ways of telling ------------------------------------------------------------------

    def _write(self, report: dict[str, Any], text: str) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        name = self._folder / f"rank-{self._rank:05d}"
        place = self._places[self._rank]
        head = (
            f"rank {self._rank} on {place['host']}, pid {place['pid']}: after step {report['step']}, {report['doing']}"
        )
        calls = "\n".join(json.dumps(entry) for entry in report["collectives"])
        name.with_suffix(".txt").write_text(f"{head}; {report['where']}\n\n{text}\nlast collectives:\n{calls}\n")
        _write_json(name.with_suffix(".json"), report)

    def _write_seen(self, rank: int, words: dict[str, Any]) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        _write_json(self._folder / f"rank-{rank:05d}.seen.json", words)

    def _read_files(self) -> None:
        there = {path.name for path in self._folder.glob("rank-*.json")}
        for rank in self._asks:
            for name, known in ((f"rank-{rank:05d}.json", self._heard), (f"rank-{rank:05d}.seen.json", self._seen_of)):
                if name in there and rank not in known:
                    known[rank] = json.loads((self._folder / name).read_text())

    def _post(self, rank: int, told: dict[str, Any]) -> None:
        store = peers.store(peers.WAIT_SECONDS)
        store.set(f"hang/{self._name}/{rank}", json.dumps(told))
        store.set(f"hang/{self._name}", "")

    def _read_store(self) -> None:
        if not self._several:
            return
        store = peers.store(1.0)
        for rank in self._asks:
            key = f"hang/{self._name}/{rank}"
            if rank not in self._in_store and store.check([key]):
                told = json.loads(store.get(key))
                if "seen" in told:
                    self._seen_of.setdefault(rank, told["seen"])
                else:
                    self._in_store.add(rank)
                    self._heard.setdefault(rank, told)

    def _until(self, done: Any, seconds: float) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end and not _soon_value(done, 0.5):
            time.sleep(0.1)


def _brief(report: dict[str, Any]) -> dict[str, Any]:
    """With what is running, and the last of each group: less for the store to carry."""
    last = {entry["group"]: entry["number"] for entry in report["collectives"]}
    kept = [e for e in report["collectives"] if e["running"] or e["number"] == last[e["group"]]]
    return {**report, "collectives": kept}


def _write_json(path: Path, value: Any) -> None:
    """In one step, so that nobody reads half of it."""
    temporary = path.with_name(path.name + f".{os.getpid()}")
    temporary.write_text(json.dumps(value))
    temporary.replace(path)


def _soon(action: Any) -> threading.Event:
    """Have a thread do it that may be left behind; set when it is done."""
    done = threading.Event()

    def run() -> None:
        with suppress(Exception):
            action()
            done.set()

    threading.Thread(target=run, daemon=True).start()
    return done


def _soon_value(action: Any, seconds: float) -> Any:
    """What the action returns, if it does so in time; else None."""
    box: list[Any] = []
    _soon(lambda: box.append(action())).wait(seconds)
    return box[0] if box else None


def _end(line: str) -> None:
    """This process, at once: its main thread is where nothing ends it. Launchers show the line as the cause."""
    with suppress(Exception):
        tell_launcher(line)
    with suppress(Exception):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(HUNG)
