"""The study's tables against the cells that are committed with them."""

import csv
from pathlib import Path
from statistics import mean

import study

STUDY = Path(__file__).parents[2] / "configs" / "study"


def rows(text):
    lines = [
        [c.strip() for c in line.strip().strip("|").split("|")] for line in text.splitlines() if line.startswith("|")
    ]
    return {tuple(cells) for cells in lines if "".join(cells).strip("-") and cells[0] != "sweep"}


def test_the_tables_of_the_readme_are_those_of_the_cells(capsys):
    study.table(
        STUDY / "results",
        [
            "warm",
            "final",
            "size",
            "large",
            "untied",
            "warmup",
            "screen",
            "memory",
            "around",
            "combine",
            "rest",
            "basis",
        ],
    )
    printed, written = rows(capsys.readouterr().out), rows((STUDY / "results" / "README.md").read_text())
    assert written == printed
    assert len(written) > 60


def test_a_cell_is_the_mean_over_seeds_and_its_distance_from_the_best_adamw(capsys):
    cells = list(csv.DictReader((STUDY / "results" / "python-final-beta2.csv").open()))

    def losses(optimizer, lr):
        return [float(c["loss"]) for c in cells if (c["optimizer"], float(c["optim.lr"])) == (optimizer, lr)]

    adamw, anon = losses("adamw", 4.2e-3), losses("anon", 3e-3)
    study.table(STUDY / "results", ["final"])
    expected = f"{mean(anon):.3f} ({mean(anon) - mean(adamw):+.3f} ±"
    assert expected in capsys.readouterr().out


def test_stopped_runs_are_counted_and_never_the_best(tmp_path):
    head = "optimizer,optim.lr,seed,state,step,loss\n"
    body = (
        "adamw,0.1,0,finished,9,1.0\nadamw,0.1,1,stopped,5,\nadamw,0.2,0,finished,9,3.0\nadamw,0.2,1,finished,9,3.0\n"
    )
    path = tmp_path / "x-screen-base.csv"
    path.write_text(head + body)
    (line,) = study.lines_of([path], "screen")
    assert study.best_adamw([line]) == {0: 3.0, 1: 3.0}
    assert study._cell(line.losses[0.1], {0: 3.0}) == "1 of 2 stopped"
    assert study._cell(line.losses[0.2], {0: 3.0, 1: 4.0}) == "3.000 (-0.500 ± 0.500)"
