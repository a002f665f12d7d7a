"""Checkpoints with frozen bases, float buffers, Muon and states of ranks' parts: made and loaded by DeepSpeed in `zero_kinds_cases.py`."""

from pathlib import Path

import pytest
from helpers import assert_passed, launch_ranks
from zero_kinds_tables import ALL, QUICK

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
