"""Four ranks, launched once; each case of `dcp_cases.py` is a test."""

import re
from pathlib import Path

import pytest
from helpers import assert_passed, launch_ranks

SCRIPT = Path(__file__).with_name("dcp_cases.py")
CASES = re.findall(r"^def (case_\w+)", SCRIPT.read_text(), re.MULTILINE)
RANKS = 4


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    return launch_ranks(SCRIPT, RANKS, tmp_path_factory.mktemp("dcp"))


@pytest.mark.parametrize("case", CASES)
def test_case(case, launched):
    assert_passed(case, launched, RANKS)
