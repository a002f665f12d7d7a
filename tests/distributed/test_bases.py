"""Matrices in bases of their own on several ranks of this machine; each case of `basis_cases.py` is a test, at every number of ranks."""

import re
from pathlib import Path

import pytest
from helpers import assert_passed, launch_ranks

CASES = re.findall(r"^def (case_\w+)", Path(__file__).with_name("basis_cases.py").read_text(), re.MULTILINE)


@pytest.fixture(scope="module", params=[2, 3, 4])
def launched(request, tmp_path_factory):
    """The folder of the results, by rank, and the number of ranks."""
    out = tmp_path_factory.mktemp("basis")
    return launch_ranks(Path(__file__).with_name("basis_cases.py"), request.param, out), request.param


@pytest.mark.parametrize("case", CASES)
def test_case(case, launched):
    assert_passed(case, *launched)
