"""Every engine against one process, on 2 and on 4 ranks: the rows of `table.py`, pairwise; all combinations with `tests/run.sh --all`."""

from pathlib import Path

import pytest
from helpers import assert_passed, launch_ranks
from table import rows

pytest.importorskip("deepspeed")


def launch(tmp_path_factory, complete):
    """Number of ranks → folder of the results."""
    folders = {ranks: tmp_path_factory.mktemp(f"table-{ranks}") for ranks in (2, 4)}
    for ranks, folder in folders.items():
        launch_ranks(Path(__file__).with_name("table.py"), ranks, folder, "all" if complete else "pairwise", "")
    return folders


@pytest.fixture(scope="module")
def pairwise(tmp_path_factory):
    return launch(tmp_path_factory, complete=False)


@pytest.fixture(scope="module")
def complete(tmp_path_factory):
    return launch(tmp_path_factory, complete=True)


@pytest.mark.parametrize("row", rows(complete=False))
def test_row(row, pairwise):
    ranks = rows(complete=False)[row][-1]
    assert_passed(f"case_{row}", pairwise[ranks], ranks)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
def test_all_rows(ranks, complete):
    for row in (name for name, values in rows(complete=True).items() if values[-1] == ranks):
        assert_passed(f"case_{row}", complete[ranks], ranks)
