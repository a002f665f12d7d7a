"""Matrices in bases of their own on several ranks of this machine; each case of `basis_cases.py`, and of `zero_basis_cases.py` for
DeepSpeed's stage 3, is a test, at every number of ranks."""

import re
from importlib.util import find_spec
from pathlib import Path

import pytest
from helpers import assert_passed, launch_ranks


def cases(script):
    return re.findall(r"^def (case_\w+)", Path(__file__).with_name(script).read_text(), re.MULTILINE)


@pytest.fixture(scope="module")
def launched(request, tmp_path_factory):
    """The folder of the results, by rank, and the number of ranks."""
    script, ranks = request.param
    return launch_ranks(Path(__file__).with_name(script), ranks, tmp_path_factory.mktemp("basis")), ranks


@pytest.mark.parametrize("launched", [("basis_cases.py", n) for n in (2, 3, 4)], indirect=True)
@pytest.mark.parametrize("case", cases("basis_cases.py"))
def test_case(case, launched):
    assert_passed(case, *launched)


@pytest.mark.skipif(find_spec("deepspeed") is None, reason="DeepSpeed is not installed")
@pytest.mark.parametrize("launched", [("zero_basis_cases.py", n) for n in (1, 2, 3, 4)], indirect=True)
@pytest.mark.parametrize("case", cases("zero_basis_cases.py"))
def test_stage_3(case, launched):
    assert_passed(case, *launched)
