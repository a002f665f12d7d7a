"""The GPU kernel without a GPU: run in Triton's interpreter, and compiled for one."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from anon_dist.optim.backends import choice, gpu
from anon_dist.optim.backends.gpu_layout import TILE, WARPS
from anon_dist.optim.plan import Variant

pytest.importorskip("triton")
PLAIN, ACCUMULATE, REFRESH = Variant


@pytest.mark.parametrize("interpreted", ["1", "0"])
def test_in_the_interpreter_and_on_a_gpu(interpreted):
    """In a process of its own: Triton decides when a kernel is defined whether it is interpreted."""
    if interpreted == "0" and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    cases = [Path(__file__).with_name("gpu_cases.py")]
    if interpreted == "1":
        cases.append(Path(__file__).with_name("test_oracle.py::test_random_runs_of_the_gpu_kernel"))
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-W", "ignore::RuntimeWarning", *map(str, cases)],
        env={**os.environ, "TRITON_INTERPRET": interpreted},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=2000,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout


F32, BF16 = ("float32",) * 5, ("bfloat16",) * 5


@pytest.mark.parametrize(
    ("variant", "dtypes", "stochastic"),
    [
        (PLAIN, F32, False),
        (PLAIN, BF16, True),
        (ACCUMULATE, ("bfloat16", "bfloat16", "int8", "bfloat16", "bfloat16"), True),
        (REFRESH, F32, False),
    ],
)
def test_compiled_for_an_h100(variant, dtypes, stochastic, monkeypatch, tmp_path):
    """No operation but those that IEEE 754 defines: nothing fused, flushed or approximate; and float32 is moved 16 bytes at a time."""
    import triton
    import triton.language as tl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from anon_dist.optim.backends import gpu_step

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    numbers = dict.fromkeys(("steps", "lr", "grad_scale", "found_inf"), "*fp64")
    signature = {"table": "*i64", "chunks": "*i32", **numbers}
    constants = {
        "VARIANT": int(variant),
        "TYPES": tuple(getattr(tl, dtype) for dtype in dtypes),
        "STOCHASTIC": (stochastic,) * 4,
        "LR_APART": False,
    }
    source = ASTSource(
        gpu_step.step,
        {**signature, **dict.fromkeys(constants, "constexpr")},
        constants,
        {(i,): [["tt.divisibility", 16]] for i in range(len(signature))},
    )
    options = {"num_warps": WARPS, "enable_fp_fusion": False}
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    ptx = compiled.asm["ptx"]
    assert not re.search(r"\bfma\b|\.ftz|\.approx|\.full\b", ptx)
    read = [d for i, d in enumerate(dtypes) if i != 3 or variant != PLAIN]
    read = [getattr(torch, d).itemsize * TILE // (WARPS * 32) for d in read]  # bytes, by a thread
    for size, load in ((16, "v4.b32"), (8, "v2.b32")):
        assert len(re.findall(rf"ld\.global\.{re.escape(load)}", ptx)) == read.count(size), load


def test_where_there_is_no_gpu_the_reason_is_said():
    if torch.cuda.is_available():
        pytest.skip("there is one")
    choice._warn.cache_clear()
    with pytest.warns(UserWarning, match=r"fused kernel is not available, the slower foreach path is used: \w+"):
        assert not choice.agree({"cuda"})
    assert choice.kernel_for(torch.device("cuda")) is gpu


@pytest.mark.parametrize(
    ("role", "dtype", "reason"),
    [(2, torch.float16, "a tensor is float16"), (0, torch.float64, "a tensor is float64"), (4, torch.int8, "int8")],
)
def test_dtypes_that_the_kernel_does_not_take_are_named(role, dtype, reason, monkeypatch):
    class OnGpu(torch.Tensor):
        device = torch.device("cuda")

    monkeypatch.setattr(OnGpu, "__torch_dispatch__", torch.Tensor.__torch_dispatch__)
    lists = [[torch.ones(2).as_subclass(OnGpu)] for _ in range(5)]
    assert gpu.obstacle(lists) is None
    lists[role] = [torch.ones(2, dtype=dtype).as_subclass(OnGpu)]
    assert reason in gpu.obstacle(lists)
    lists[role] = [torch.ones(2)]
    assert gpu.obstacle(lists) == "a tensor is on cpu"
