"""A save in the background that takes one rank longer than the others wait."""

from pathlib import Path

from helpers import assert_passed, launch_ranks


def test_a_slow_rank_costs_one_background_save(tmp_path):
    out = launch_ranks(Path(__file__).with_name("slow_saves.py"), 2, tmp_path)
    assert_passed("case_a_slow_rank_costs_one_background_save", out, 2)
