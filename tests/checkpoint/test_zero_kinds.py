"""Checkpoints with frozen bases, float buffers, Muon and states of ranks' parts: made and loaded by DeepSpeed in `zero_kinds_cases.py`."""

from pathlib import Path

import pytest
import torch
from helpers import assert_passed, launch_ranks
from zero_kinds_tables import ALL, QUICK

from anon_dist.checkpoint.torchfiles import rank_local

pytest.importorskip("deepspeed")
RANKS = 3


SCRIPT = Path(__file__).with_name("zero_kinds_cases.py")
REST = [case for case in ALL if case not in QUICK]


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    """The folder with what came of every quick case."""
    return launch_ranks(SCRIPT, RANKS, tmp_path_factory.mktemp("kinds"), *QUICK)


@pytest.fixture(scope="module")
def launched_all(tmp_path_factory):
    """The folder with what came of every case."""
    return launch_ranks(SCRIPT, RANKS, tmp_path_factory.mktemp("all_kinds"), *ALL)


@pytest.mark.parametrize("case", QUICK)
def test_case(case, launched):
    assert_passed(f"case_{case}", launched, RANKS)


@pytest.mark.slow
@pytest.mark.parametrize("case", REST)
def test_further_case(case, launched_all):
    assert_passed(f"case_{case}", launched_all, RANKS)


@pytest.mark.parametrize(
    ("key", "values", "common"),
    [
        ("step", [1.0, 2.0], True),  # of files of different steps, which is said
        ("RMS", [torch.tensor(0.5)], False),  # one rank tells nothing
        ("RMS", [torch.tensor(0.5), torch.tensor(0.6)], False),
        ("RMS", [torch.tensor(0.0), torch.tensor(0.0)], False),
        ("decay", [torch.tensor(0.5), torch.tensor(0.5)], True),
        ("mu_product", [torch.tensor(0.5)], True),
        ("count", [7], True),
        ("count", [torch.tensor(7)], True),
    ],
)
def test_which_numbers_are_of_all_parameters(key, values, common):
    assert rank_local.is_common(key, values) == common
