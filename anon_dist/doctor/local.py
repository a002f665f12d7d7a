"""What a node is by itself: versions, devices, how fast they multiply, and which backend its optimizer has."""

from __future__ import annotations

import importlib
import subprocess
import time

import torch

from anon_dist.engines.comparison import surroundings
from anon_dist.machine import processor
from anon_dist.optim.backends.build import BuildError, cache_folder
from anon_dist.optim.backends.choice import kernel_for

NEEDED = ("accelerate", "transformers", "datasets", "safetensors", "sentencepiece")
MULTIPLY_SECONDS = 0.5
"""So long, and at least three times."""
PRODUCTS = {"cpu": 1024, "cuda": 8192}
"""Rows and columns of the matrices."""


def versions() -> dict[str, str]:
    """Of what must be alike on all ranks, as the training itself compares it; and of CUDA and NCCL."""
    alike = surroundings(None).items()
    found = {name.removeprefix("the version of "): str(v) for name, v in alike if name.startswith("the version of ")}
    found["anon_dist"] = str(surroundings(None)["the hash of anon_dist's sources"])
    if torch.cuda.is_available():
        found["CUDA"] = str(torch.version.cuda)
        found["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
    return found


def unimportable(engine: str | None) -> dict[str, str]:
    """The packages of a training that do not import, and why: an installation that was interrupted, or a file that shadows one.

    Args:
        engine: `train.engine` of the run that is meant; None: not known.
    """
    found = {}
    for name in (*NEEDED, *(["deepspeed"] if engine == "deepspeed" else [])):
        try:
            importlib.import_module(name)
        except Exception as error:  # whatever it does while it is imported
            found[name] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
    return found


def devices() -> tuple[list[str], int, str, str]:
    """Names, number of GPUs, version of their driver, and what is wrong with them."""
    listed, driver, trouble = _listed()
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        return names, len(names), driver, ""
    if listed:
        trouble = f"nvidia-smi lists {listed} GPUs, and torch {torch.__version__} sees none"
    return [processor()], 0, driver, trouble


def _listed() -> tuple[int, str, str]:
    """How many GPUs the driver has, its version, and why it does not answer."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except FileNotFoundError:
        return 0, "", ""
    except (OSError, subprocess.SubprocessError) as error:
        return 0, "", f"nvidia-smi: {error}"
    lines = done.stdout.split()
    if done.returncode:
        return 0, "", f"nvidia-smi: {(done.stdout + done.stderr).strip().splitlines()[0][:150]}"
    return len(lines), lines[0] if lines else "", ""


def multiply() -> list[float]:
    """Floating-point operations per second of a matrix product, the best of some, on each device: bfloat16 on GPUs, float32 on the CPU."""
    if not torch.cuda.is_available():
        return [_multiply(torch.device("cpu"), torch.float32, PRODUCTS["cpu"])]
    return [
        _multiply(torch.device("cuda", i), torch.bfloat16, PRODUCTS["cuda"]) for i in range(torch.cuda.device_count())
    ]


def _multiply(device: torch.device, dtype: torch.dtype, n: int) -> float:
    a, b = torch.randn(2, n, n, device=device, dtype=dtype)
    best, times, end = float("inf"), 0, time.monotonic() + MULTIPLY_SECONDS
    torch.mm(a, b)
    while times < 3 or time.monotonic() < end:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        began = time.perf_counter()
        torch.mm(a, b)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best, times = min(best, time.perf_counter() - began), times + 1
    return 2.0 * n**3 / best


def kernel() -> tuple[str, str]:
    """The backend that Anon's steps take here, and why it is not the fast one. What must be compiled for it is compiled."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    began = time.monotonic()
    try:
        kernel_for(device).check()
    except BuildError as error:
        return "foreach", str(error).splitlines()[0][:300]
    seconds = time.monotonic() - began
    ready = "ready" if seconds < 1 else f"ready after {seconds:.0f} s"
    where = "Triton" if device.type == "cuda" else f"C, {cache_folder()}"
    return f"fused ({where}), {ready}", ""
