"""`anon-dist runs`: what it shows of runs that are finished, under way, begun, and damaged."""

import json
from html.parser import HTMLParser

import numpy as np
import pytest
from helpers import browse
from matplotlib import colormaps
from PIL import Image

from anon_dist.cli import main
from anon_dist.trained import runs


def make(folder, records, config="optim: {lr: 1.0e-3}\ntrain: {steps: 4}\n", result=None):
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(config)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    if result:
        (folder / "result.json").write_text(json.dumps(result))


@pytest.fixture
def folder(tmp_path):
    runs = tmp_path / "runs"
    several = {"slowest_rank": 1, "slowest_host": "node-2"}  # as of several ranks
    steps = [{"step": t, "loss": 4 - t / 2, "tokens_per_s": 100.0 * t, **several} for t in (1, 2, 3, 4)]
    val = {"step": 4, "val_loss": 2.5, "val_bits_per_byte": 1.5}
    final = {"step": 4, "final_loss": 2.4567, "final_bits_per_byte": 1.25}
    make(runs / "a <b> & $c$", [*steps, val, final], result=final)
    make(runs / "deep" / "er", [*steps[:2]], "optim: {lr: 6e-4, betas: [0.9, 0.95]}\ntrain: {steps: 4}\nrun_dir: x\n")
    make(runs / "begun", [])
    make(runs / "deep" / "er" / "checkpoints" / "step-1", steps)  # of another, put there
    return runs


def cells(line):
    return [cell.strip() for cell in line.strip()[1:-1].split("│")]


def test_runs_are_listed_with_how_far_and_how_good_they_are(folder, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    main(["runs", str(folder), "--sort", "loss", "--no-pictures"])
    head, *rows = [cells(line) for line in capsys.readouterr().out.splitlines() if line.startswith(("│", "┃"))]
    head = [cell.strip() for cell in head[0].split("┃")]
    assert head[:7] == ["run", "step", "state", "loss", "val loss", "bits/byte", "tokens/s"]
    assert head[8:] == ["optim.lr", "optim.betas"]
    assert [row[:7] + row[8:] for row in rows] == [
        ["a <b> & $c$", "4", "finished", "2.0000", "2.4567", "1.2500", "250", "0.001", ""],
        ["begun", "0", "0%", "", "", "", "", "0.001", ""],
        ["deep/er", "2", "50%", "3.0000", "", "", "150", "0.0006", "[0.9, 0.95]"],
    ]
    assert sorted(p.name for p in folder.iterdir()) == ["a <b> & $c$", "begun", "deep"]


class Page(HTMLParser):
    """What a browser would load, and show in the table."""

    def __init__(self):
        super().__init__()
        self.open, self.loaded, self.shown = [], [], []

    def handle_starttag(self, tag, attributes):
        self.loaded += [v for k, v in attributes if k in ("src", "href")]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("td", "th"):
            self.shown.append(data)


def test_the_page_is_one_file_and_says_what_the_table_does(folder, tmp_path):
    main(["runs", str(folder), "--out", str(tmp_path / "out"), "--sort", "name"])
    text = (tmp_path / "out" / "runs.html").read_text()
    page = Page()
    page.feed(text)
    page.close()
    assert page.open == []
    assert len(page.loaded) == 1
    assert page.loaded[0].startswith("data:image/png;base64,")
    assert "http" not in text
    assert "a <b> & $c$" in page.shown
    assert {"2.4567", "deep/er", "50%", "optim.lr"} <= set(page.shown)
    with Image.open(tmp_path / "out" / "runs.png") as picture:
        assert picture.format == "PNG"
        assert len(picture.convert("RGB").getcolors(1 << 24)) > 50  # lines, not an empty sheet


def test_a_browser_shows_the_page(folder, tmp_path):
    make(
        folder / ("long" * 12), [{"step": 4, "loss": 1.0, "task/hellaswag/acc": 0.25, "task/hellaswag/acc_stderr": 0.1}]
    )
    folder = folder.rename(folder.with_name("folder" * 20))  # the page's title
    main(["runs", str(folder), "--out", str(tmp_path / "out")])
    shown = browse(tmp_path / "out" / "runs.html", tmp_path)
    assert shown["pictures"] == [1200]
    assert shown["asked"] == []
    assert shown["tables"] == [5]
    assert shown["wide"] <= shown["window"]  # a wide table scrolls by itself


def test_scores_on_tasks_are_columns(folder, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    make(
        folder / "scored",
        [{"step": 4, "task/mine/acc": 0.25, "task/mine/acc_stderr": 0.1}, {"step": 4, "task/mine/acc": 0.5}],
    )
    main(["runs", str(folder), "--no-pictures", "--sort", "name"])
    head, *rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith(("│", "┃"))]
    place = [cell.strip() for cell in head.split("┃")[1:-1]].index("mine/acc")
    assert [cells(row)[place] for row in rows] == ["", "", "", "0.5000"]


@pytest.mark.parametrize("columns", [None, 80, 40])
def test_numbers_are_never_cut_off(folder, capsys, monkeypatch, columns):
    make(folder / ("long" * 12), [{"step": 1234, "loss": 1.0}])
    if columns:
        monkeypatch.setenv("COLUMNS", str(columns))
    else:
        monkeypatch.delenv("COLUMNS", raising=False)  # and no terminal: a file, another program
    main(["runs", str(folder), "--no-pictures"])
    shown = capsys.readouterr().out
    assert "…" not in shown
    assert ("2.4567" in shown) == (columns != 40)
    assert {"1,234", "finished", "deep/er"} <= {cell for line in shown.splitlines() for cell in cells(line)}
    assert ("not shown, as the terminal is narrow: " in shown) == (columns is not None)
    assert ("optim.betas" in shown.splitlines()[1]) == (columns is None)
    if columns:
        assert max(map(len, shown.splitlines()[:-1])) <= columns


def test_a_run_at_work_is_told_from_one_that_stopped(folder, capsys):
    (folder / "begun" / "run.lock").write_text('{"host": "here"}')
    (folder / "deep" / "er" / "run.lock").write_text("")
    main(["runs", str(folder), "--no-pictures"])
    states = {row[0]: row[2] for row in map(cells, capsys.readouterr().out.splitlines()) if len(row) > 2}
    assert (states["begun"], states["deep/er"]) == ("0%, running", "50%")


def test_names_of_many_runs_are_all_in_the_picture(folder, tmp_path, recwarn):
    names = ["_hidden", "\N{CJK UNIFIED IDEOGRAPH-4E2D}", *map(str, range(12))]
    for name in names:
        make(folder / name, [{"step": 1, "loss": 2.0}])
    found, _ = runs.collect(folder)
    figures = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("matplotlib.pyplot.close", figures.append)
        runs.draw(found, tmp_path / "runs.png")
    labels = [text.get_text().strip() for text in figures[0].legends[0].get_texts()]
    assert set(names) <= set(labels)
    assert not recwarn.list


def test_a_run_that_cannot_be_read_does_not_hide_the_others(folder, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    (folder / "begun" / "config.yaml").write_text("a: [")
    make(folder / "odd", [{"step": 1, "loss": "low"}])
    make(folder / "list", [], "- a")
    main(["runs", str(folder), "--no-pictures"])
    shown = capsys.readouterr()
    assert "WARNING: " in shown.err
    assert "begun/config.yaml cannot be read: " in shown.err
    assert "odd/metrics.jsonl cannot be read: loss = 'low' is no number" in shown.err
    assert "list/config.yaml cannot be read: it is no mapping of sections" in shown.err
    assert len([line for line in shown.out.splitlines() if line.startswith("│")]) == 2


def test_what_cannot_be_listed_is_said_in_a_line(folder, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit, match=r"^error: there is no run in or below .*empty: no folder with config\.yaml"):
        main(["runs", str(tmp_path / "empty")])
    with pytest.raises(SystemExit, match="nowhere does not exist"):
        main(["runs", str(tmp_path / "nowhere")])
    make(tmp_path / "one" / "bad", [], "a: [")
    with pytest.raises(SystemExit, match=r"^error: .*bad/config\.yaml cannot be read: "):
        main(["runs", str(tmp_path / "one")])


def test_of_runs_with_equal_curves_each_is_seen(tmp_path):
    """In the picture, by the pixels of its colour; a third as well as a second, and one that has gone on further than another."""
    curve = [{"step": t, "loss": 4 - t / 20} for t in range(1, 41)]
    val = [{"step": 20, "val_loss": 3.1}, {"step": 40, "val_loss": 2.1}]
    for name, records in (("a", curve + val), ("b", curve + val), ("c", curve + val), ("d", curve[:30] + val[:1])):
        make(tmp_path / name, records)
    found, _ = runs.collect(tmp_path)
    runs.draw(found, tmp_path / "runs.png")
    pixels = np.asarray(Image.open(tmp_path / "runs.png").convert("RGB")).reshape(-1, 3).astype(int)
    alone = {}
    for run in found:
        runs.draw([run], tmp_path / "one.png")
        alone[run.name] = (
            (np.asarray(Image.open(tmp_path / "one.png").convert("RGB")).reshape(-1, 3) == [31, 119, 180]).all(1).sum()
        )
    seen = [(pixels == [round(255 * x) for x in colormaps["tab10"](i)[:3]]).all(1).sum() for i in range(4)]
    assert min(seen) > min(alone.values()) / 10, seen
    assert runs.alike([(1, 2.0)], [(1, 2.001), (2, 1.0)])
    assert not runs.alike([(1, 2.0), (2, 1.0)], [(1, 2.0), (2, 1.01)])
    assert not runs.alike([(1, 2.0)], [(2, 2.0)])
