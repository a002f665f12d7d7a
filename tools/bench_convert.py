"""Speed and memory of `anon-dist ckpt convert`, against `cp --reflink=never` of the same bytes on the same disk in the same run.

    python tools/bench_convert.py --size 8 --folder /scratch

Makes a synthetic checkpoint (weights and three states in float32), then for each pair of formats, with the source out of the page cache
and the target synced: seconds, bytes per second as a part of cp's, and the peak of anonymous and shared memory above an idle
`import torch`. Everything it writes is deleted.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch

from anon_dist.checkpoint.copy import write_files
from anon_dist.checkpoint.formats import plan
from anon_dist.checkpoint.options import WriteOptions
from anon_dist.checkpoint.schema import WEIGHT, Checkpoint, Key, Manifest, ParamGroup, TensorInfo

STATES = (WEIGHT, "exp_avg", "exp_avg_sq", "precond")
IDLE = "import torch, time; print('ready', flush=True); time.sleep(60)"


class Synthetic(Checkpoint):
    """Pseudo-random float32 tensors of a model of that many bytes; cheap to make, and no block of zeros."""

    def __init__(self, size: int, width: int) -> None:
        count = max(1, size // (len(STATES) * 4 * 4 * width * width))
        shapes = {f"layers.{i}.weight": (4 * width, width) for i in range(count)}
        self.tensors = {Key(n, s): TensorInfo(shape, torch.float32) for n, shape in shapes.items() for s in STATES}
        group = ParamGroup(list(shapes), {"lr": 1e-3, "betas": (0.9, 0.95), "weight_decay": 0.1})
        scalars = {n: {"step": torch.tensor(100.0)} for n in shapes}
        self.manifest = Manifest("synthetic", 1, "Anon", [group], scalars, list(shapes))
        self._noise = torch.randn(1 << 22, generator=torch.Generator().manual_seed(0))

    def read(self, key: Key, start: int, stop: int) -> torch.Tensor:
        """See `Checkpoint`."""
        return self._noise[: stop - start]


def main() -> None:
    """Measure what the arguments ask for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=float, default=2.0, help="of the checkpoint, in GB")
    parser.add_argument("--width", type=int, default=1024, help="a parameter has 4 · width² elements")
    parser.add_argument("--folder", type=Path, default=Path("."), help="on the disk that is to be measured")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--pairs", nargs="+", default=["consolidated:dcp", "dcp:canonical", "canonical:consolidated"])
    parser.add_argument("--world-size", type=int, default=4, help="of DCP folders")
    args = parser.parse_args()
    scratch = args.folder / "bench-convert"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    try:
        idle = idle_memory()
        print(
            f"{args.size} GB, parameters of {16 * args.width**2 / 1e6:.0f} MB, {args.workers} workers; idle torch {idle / 1e6:.0f} MB"
        )
        synthetic = Synthetic(int(args.size * 1e9), args.width)
        for pair in args.pairs:
            measure(scratch, synthetic, *pair.split(":"), args=args, idle=idle)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def measure(scratch: Path, synthetic: Checkpoint, a: str, b: str, args: argparse.Namespace, idle: int) -> None:
    """One pair of formats: cp, convert, cp again."""
    source, target, copied = scratch / f"{a}-source", scratch / f"{b}-target", scratch / "copied"
    options = WriteOptions(world_size=args.world_size)
    write_files(plan(synthetic, a, options), synthetic, "bench", source, quiet=True)
    size = sum(p.stat().st_size for p in [source, *source.rglob("*")] if p.is_file())
    command = [sys.executable, "-m", "anon_dist.cli", "ckpt", "convert", source, target, "--to", b]
    command += ["--world-size", args.world_size, "--workers", args.workers]
    times: dict[str, list[float]] = {"cp": [], "convert": []}
    peak = 0
    for kind in ("cp", "convert", "convert", "cp"):
        drop_cache(source)
        begin = time.perf_counter()
        if kind == "cp":
            subprocess.run(["cp", "-r", "--reflink=never", source, copied], check=True)
            sync_all(copied)
        else:
            peak = max(peak, run_watched(list(map(str, command))))
            sync_all(target)
        times[kind].append(time.perf_counter() - begin)
        remove(copied if kind == "cp" else target)
    remove(source)
    cp, own = min(times["cp"]), min(times["convert"])
    print(
        f"{a:>12} → {b:<12} {size / 1e9:5.2f} GB  cp {show(times['cp'])} s  convert {show(times['convert'])} s  "
        f"{cp / own:4.0%} of cp, {size / own / 1e9:.2f} GB/s  peak {(peak - idle) / 1e6:.0f} MB over idle",
        flush=True,
    )


def show(times: list[float]) -> str:
    """All of them."""
    return "/".join(f"{t:.1f}" for t in times)


def remove(path: Path) -> None:
    """A file or folder."""
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def sync_all(path: Path) -> None:
    """Have it on the disk."""
    for file in [path, *path.rglob("*")]:
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def drop_cache(path: Path) -> None:
    """Have its pages read from the disk the next time."""
    sync_all(path)
    for file in [path, *path.rglob("*")]:
        if file.is_file():
            descriptor = os.open(file, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def memory(pid: int) -> int:
    """Anonymous and shared memory of a process, in bytes."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(("RssAnon", "RssShmem")))


def idle_memory() -> int:
    """Of a process that has imported torch and does nothing."""
    process = subprocess.Popen([sys.executable, "-c", IDLE], stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    found = memory(process.pid)
    process.kill()
    process.wait()
    return found


def run_watched(command: list[str]) -> int:
    """Run it; the peak of its memory, looked at every 20 ms."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    peak = 0
    while process.poll() is None:
        peak = max(peak, memory(process.pid))
        time.sleep(0.02)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed")
    return peak


if __name__ == "__main__":
    main()
