"""The parts of `tools/gpu_check.sh`, one process after the other, each with its share of the time; and the table of what they found.

What has been found is in the files after each part, and each part writes its rows as it finds them, so whatever ends early leaves the rest.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
COLUMNS = ("part", "what", "this package", "beside it", "remark")
LEAST = 8.0
"""Seconds without which a part is not begun."""


@dataclass(frozen=True)
class Part:
    """A function of `parts.py`, by its name."""

    name: str
    seconds: float
    """Its weight: of the time that is left it may take as much as this is of all parts that have not begun; on a GPU about twice what it
    should take, in seconds."""
    timed: bool = True
    """Whether it measures time, and so wants the machine to itself."""


PARTS = (
    Part("machine", 60),
    Part("gpt2-small", 50),
    Part("qwen3-1b", 75),
    Part("kernel", 110, timed=False),
    Part("settings", 110, timed=False),
    Part("resume", 110, timed=False),
    Part("qwen3-1b-compiled", 90),
    Part("gpt2-small-compiled", 70),
    Part("optimizer", 50),
    Part("memory", 60),
    Part("context", 40),
)
"""Those come first that say most. Neighbours that measure no time run beside each other, where there are cores for that."""
CORES = 8
ENDING = 4.0
"""Seconds that are kept for the end: for parts to be killed, and the table to be written."""
KILLED = 5.0
"""Seconds that a killed part is waited for; one that is in a driver's hands may stay longer."""

Row = dict[str, str]


def last_line(text: str) -> str:
    """What an error ends with: the last line that says something."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][-300:] if lines else "nothing was printed"


def groups(parts: list[Part]) -> list[list[Part]]:
    """What runs beside each other."""
    found: list[list[Part]] = []
    together = (os.cpu_count() or 1) >= CORES
    for part in parts:
        if together and found and not part.timed and not found[-1][-1].timed:
            found[-1].append(part)
        else:
            found.append([part])
    return found


def shares(groups: list[list[Part]], left: float) -> list[float]:
    """Seconds of the parts of the first of these groups, so that what comes after has its share of those that are left too."""
    after = sum(max(part.seconds for part in group) for group in groups)
    return [max(0.0, left) * part.seconds / after for part in groups[0]]


RUNNING: list[subprocess.Popen[Any]] = []
"""Parts that have not ended."""


def run_part(part: Part, seconds: float, device: str, work: Path, log: Path) -> tuple[list[Row], dict[str, Any]]:
    """The rows of a part, one of them about its end if that was none; and its numbers."""
    name, begun = part.name, time.monotonic()
    out = work / f"{name}.json"
    command = [sys.executable, str(HERE / "parts.py"), name, "--device", device, "--work", str(work), "--out", str(out)]
    command += ["--seconds", f"{seconds:.1f}"]
    own = work / f"{name}.log"
    with own.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
        RUNNING.append(process)
        try:
            code: int | None = process.wait(seconds)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            RUNNING.remove(process)
            end(process)
    printed = own.read_text(errors="replace")
    with log.open("a") as file:
        file.write(f"\n==== {name}\n{printed}")
    found = json.loads(out.read_text()) if out.exists() else {"rows": [], "numbers": {}}
    rows = [{"part": name, **row} for row in found["rows"]]
    if code != 0:
        why = f"stopped after {seconds:.0f} s; last:" if code is None else f"FAILED (code {code}):"
        rows.append({"part": name, "what": "the rest of it", "remark": f"{why} {last_line(printed)}"})
    return rows, {**found["numbers"], "seconds": round(time.monotonic() - begun, 1)}


def end(process: subprocess.Popen[Any]) -> None:
    """It, and all that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(KILLED)


def passed() -> float:
    """Seconds since the script began that started this one."""
    begun = os.environ.get("GPU_CHECK_BEGUN")
    return max(0.0, time.time() - float(begun)) if begun else 0.0


def table(rows: list[Row]) -> str:
    """In Markdown."""
    lines = [COLUMNS, tuple("---" for _ in COLUMNS)]
    previous = None
    for row in rows:
        cells = [" ".join(str(row.get(key, "")).split()).replace("|", "\\|") for key in ("part", *KEYS)]
        cells[0] = "" if cells[0] == previous else cells[0]
        previous = row["part"]
        lines.append(tuple(cells))
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


KEYS = ("what", "ours", "beside", "remark")


def write(out: Path, rows: list[Row], numbers: dict[str, Any]) -> None:
    """Both files, whole."""
    for name, text in (("table.md", table(rows)), ("numbers.json", json.dumps({"rows": rows, **numbers}, indent=1))):
        path = out / name
        path.with_suffix(".new").write_text(text)
        path.with_suffix(".new").replace(path)


def main() -> None:
    arguments = argparse.ArgumentParser(description="What only a GPU can show: a table.", prog="tools/gpu_check.sh")
    arguments.add_argument(
        "--out", type=Path, default=Path("runs/gpu-check"), help="folder of table.md, numbers.json, log.txt"
    )
    arguments.add_argument("--seconds", type=float, default=480.0, help="longest that all may take")
    arguments.add_argument(
        "--device", choices=("auto", "cuda", "cpu"), default="auto", help="auto: a GPU if there is one"
    )
    arguments.add_argument(
        "--only", nargs="+", choices=[p.name for p in PARTS], help="parts to run; machine runs always"
    )
    args = arguments.parse_args()
    begun, rows, numbers = time.monotonic() - passed(), list[Row](), dict[str, Any]()
    args.out.mkdir(parents=True, exist_ok=True)
    log = args.out / "log.txt"
    log.write_text(f"tools/gpu_check.sh {' '.join(sys.argv[1:])}\n")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends a part, and leaves what there is
    work = Path(tempfile.mkdtemp(prefix="gpu-check-"))
    try:
        ahead = groups([p for p in PARTS if not args.only or p.name in ("machine", *args.only)])
        for i, group in enumerate(ahead):
            limits = shares(ahead[i:], args.seconds - ENDING - (time.monotonic() - begun))
            if max(limits) < LEAST:
                rows += [{"part": p.name, "what": "all of it", "remark": "not run: no time was left"} for p in group]
                continue
            names = ", ".join(part.name for part in group)
            print(f"{time.monotonic() - begun:5.0f} s  {names}", file=sys.stderr, flush=True)
            with ThreadPoolExecutor(len(group)) as pool:
                run = partial(run_part, device=args.device, work=work, log=log)
                try:
                    for part, (found, own) in zip(group, pool.map(run, group, limits), strict=True):
                        rows += found
                        numbers[part.name] = own
                except KeyboardInterrupt:  # which the threads, being waited for, would not hear of
                    for process in tuple(RUNNING):
                        end(process)
                    raise
            write(args.out, rows, numbers)
    except KeyboardInterrupt:
        rows.append({"part": "all", "what": "the rest of it", "remark": "interrupted"})
    finally:
        shutil.rmtree(work, ignore_errors=True)
        write(args.out, rows, numbers)
    print(table(rows))
    print(
        f"{time.monotonic() - begun:.0f} s. {args.out / 'table.md'}, {args.out / 'numbers.json'}, {args.out / 'log.txt'}"
    )


if __name__ == "__main__":
    main()
