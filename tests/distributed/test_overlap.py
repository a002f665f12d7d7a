"""The step in the background, on two ranks, launched once; each case of `overlap_cases.py` is a test."""

import re
from pathlib import Path

import pytest
from helpers import assert_passed, launch_ranks

SCRIPT = Path(__file__).with_name("overlap_cases.py")
CASES = re.findall(r"^def (case_\w+)", SCRIPT.read_text(), re.MULTILINE)
RANKS = 2


@pytest.fixture(scope="module")
def launched(tmp_path_factory, prepared):
    """The folder of the results, by rank."""
    return launch_ranks(SCRIPT, RANKS, tmp_path_factory.mktemp("overlap"), str(prepared))


@pytest.mark.parametrize("case", CASES)
def test_case(case, launched):
    assert_passed(case, launched, RANKS)
