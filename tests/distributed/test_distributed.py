"""Several ranks on one machine, launched once; each case of `cases.py` is a test."""

import re
import sys
from pathlib import Path

import pytest
from helpers import assert_passed, forget_accelerate, launch_ranks, metrics

CASES = re.findall(r"^def (case_\w+)", Path(__file__).with_name("cases.py").read_text(), re.MULTILINE)
RANKS = 2


@pytest.fixture(scope="module")
def launched(tmp_path_factory, prepared):
    """The folder of the results, by rank, and the runs."""
    out = tmp_path_factory.mktemp("distributed")
    return launch_ranks(Path(__file__).with_name("cases.py"), RANKS, out, str(prepared))


@pytest.mark.parametrize("case", CASES)
def test_case(case, launched):
    assert_passed(case, launched, RANKS)


@pytest.mark.parametrize("basis", [False, True])
def test_another_world_size(basis, launched, prepared):
    """A run of two ranks, interrupted, goes on in one process: the same samples, the losses but for the order of summation."""
    import shutil

    sys.path.insert(0, str(Path(__file__).parent))
    from cases import run_config, with_a_basis

    from anon_dist.train import loop

    whole = launched / f"two-ranks{'-basis' * basis}"
    resumed = launched / f"one-rank{'-basis' * basis}"
    shutil.copytree(whole, resumed)
    for path in ("result.json", "checkpoints/step-00000012", "checkpoints/step-00000008"):
        shutil.rmtree(resumed / path) if (resumed / path).is_dir() else (resumed / path).unlink()
    forget_accelerate()
    config = (with_a_basis if basis else run_config)(data=str(prepared), folder=str(resumed), engine="auto")
    config.train.micro_batch = 8  # and another accumulation
    loop.train(config)
    a, b = metrics(whole), metrics(resumed)
    assert [(r["step"], r.get("samples")) for r in a] == [(r["step"], r.get("samples")) for r in b]
    for key in ("loss", "val_loss", "final_loss", "grad_norm"):
        assert [r[key] for r in a if key in r] == pytest.approx([r[key] for r in b if key in r], rel=1e-4)
