"""The real thing, small: the command, the loop, a calibration, the report."""

import csv
import json

import pytest
import torch
import yaml

from anon_dist.checkpoint import CheckpointError
from anon_dist.cli import main
from anon_dist.sweep.cells import CellFolder
from anon_dist.train.config.parsing import to_yaml
from anon_dist.train.optimizer.spectrum import load_spectra, spectra_of


def table(page, title):
    """The rows of the table under a heading of a Markdown page."""
    lines = iter(page.split(f"## {title}\n", 1)[1].strip().splitlines())
    rows = []
    for line in lines:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    head, _, *body = rows
    return [dict(zip(head, row, strict=True)) for row in body]


def test_a_sweep_of_the_real_loop(base, tmp_path, capsys):
    config = base(optim__update_clip=1.0, optim__embedding_beta1=0.8, optim__embedding_beta3=0.97)
    config.eval.sets = {"held": config.data.path}  # its validation split, once more
    config.checkpoint.remote = f"file://{tmp_path}/store"
    (tmp_path / "base.yaml").write_text(to_yaml(config))
    out = tmp_path / "sweep"
    command = ["sweep", "--config", str(tmp_path / "base.yaml"), "--out", str(out), "--match-rms", "--parallel", "2"]
    command += ["--grid", "optim.gamma=0,1", "optim.lr=1e-3", "--train.steps", "16"]
    main(command)
    said = capsys.readouterr().out
    assert "γ = 1: learning rates are multiplied by 1\n" in said

    folders = {(f.cell.gamma, f.cell.lr): f for f in CellFolder.all(out)}
    assert set(folders) == {(0.0, 1e-3), (1.0, 1e-3)}
    assert {f.cell.name for f in folders.values()} < {p.name for p in (tmp_path / "store").iterdir()}
    page = (out / "report.md").read_text()
    rows = table(page, "All settings")
    assert len(rows) == 2
    for (gamma, lr), folder in folders.items():
        result = json.loads((folder.path / "result.json").read_text())
        assert result["step"] == 16
        (row,) = [r for r in rows if float(r["gamma"]) == gamma and r["lr"].split(" ")[0] == f"{lr:g}"]
        assert row["loss"] == f"{result['final_loss']:.4f}"
        assert row["cells"] == "1 finished"
        assert row["loss, held"] == row["loss"]
    best = {float(r["γ"]): r["loss"].strip("*") for r in table(page, "Best")}
    for gamma, loss in best.items():
        assert float(loss) == min(round(f.outcome.loss, 4) for (g, _), f in folders.items() if g == gamma)
    assert yaml.safe_load(page.split("```yaml\n")[1].split("```")[0])["train"]["steps"] == 16
    with (out / "cells.csv").open() as file:
        found = {(float(r["optim.gamma"]), float(r["optim.lr"])): r for r in csv.DictReader(file)}
    assert {k: (float(r["loss"]), int(r["seed"]), r["state"]) for k, r in found.items()} == {
        k: (f.outcome.loss, 0, "finished") for k, f in folders.items()
    }
    assert all(float(r["loss/held"]) == float(r["loss"]) for r in found.values())

    def step_size(gamma):
        """Root mean square of the steps of a cell, over its records but the first, divided by the schedule's learning rate at γ = 1."""
        folder = folders[gamma, 1e-3]
        records = [r for r in folder.metrics() if "update_rms" in r][4:]
        return folder.cell.factor * (sum(r["update_rms"] ** 2 for r in records) / len(records)) ** 0.5

    assert folders[0.0, 1e-3].cell.factor > 20.0
    assert step_size(0.0) == pytest.approx(step_size(1.0), rel=0.3)

    main(command)  # nothing is run twice
    assert "2 cells" in capsys.readouterr().out
    check_factors_by_group(tmp_path, out / "calibration" / "spectrum.json", capsys)
    main(["sweep", "report", str(out)])
    assert capsys.readouterr().out.startswith("Report: ")


def check_factors_by_group(tmp_path, measured, capsys):
    """Where γ differs by parameter and step, each param group has its factor, from the spectra that the calibration kept by name."""
    out = tmp_path / "own"
    command = ["sweep", "--config", str(tmp_path / "base.yaml"), "--out", str(out), "--match-from", str(measured)]
    command += ["--grid", "optim.gamma_schedule={0: 0.5, 8: 1.0}", "--optim.gamma-by-name", "*wte*", "0.0"]
    main(command)
    assert "learning rates are multiplied group by group" in capsys.readouterr().out
    (folder,) = CellFolder.all(out)
    records = [r for r in folder.metrics() if "update_rms" in r]
    factor = load_spectra(measured).of(["transformer.wte.weight"]).lr_factor(0.0, 1.0)
    assert {r["gamma/0"] for r in records} == {0.0}
    assert [r["lr_factor/0"] for r in records] == pytest.approx([factor] * 12, rel=1e-6)
    assert [r["gamma/1"] for r in records] == [min(1.0, 0.5 + t / 16) for t in (*range(1, 12), 11)]
    assert records[-1]["lr_factor/1"] == 1.0
    page = (out / "report.md").read_text()
    assert "gamma_schedule={0: 0.5,8: 1}" in page
    assert "Learning rates are multiplied by a factor for each param group" in page


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--config", "quickstart", "--grid", "optim.gama=1"], "did you mean 'optim.gamma'"),
        (
            ["--config", "quickstart", "--grid", "optim.gamma=1", "--sed", "3"],
            "--sed is no option; did you mean --seeds",
        ),
        (["--config", "nowhere", "--grid", "optim.gamma=1"], "nowhere: no such file"),
        (["--config", "quickstart", "--grid", "optim.gamma=1", "--data.path", "nowhere"], "nowhere"),
    ],
)
def test_errors_are_one_line(args, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as error:
        main(["sweep", *args, "--out", str(tmp_path / "out")])
    assert str(error.value).startswith("error: ")
    assert message in str(error.value)
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_of_adamw_has_the_spectrum_of_its_moments(tmp_path):
    torch.manual_seed(0)
    model = torch.nn.Linear(40, 30)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), eps=1e-8)
    for _ in range(7):
        optimizer.zero_grad()
        (model(torch.randn(8, 40) * torch.logspace(-3, 0, 40)) ** 2).mean().backward()
        optimizer.step()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "adamw.pt")
    spectra = spectra_of(tmp_path / "adamw.pt")
    spectrum = spectra.whole()
    states = [optimizer.state[p] for p in model.parameters()]
    m = torch.cat([s["exp_avg"].flatten() for s in states]).double() / (1 - 0.9**7)
    v = torch.cat([s["exp_avg_sq"].flatten() for s in states]).double() / (1 - 0.95**7)
    for gamma in (-0.5, 0.0, 1.0, 1.5):
        expected = float((m**2 * v**-gamma).mean()) ** 0.5
        assert spectrum.rms(gamma) == pytest.approx(expected, rel=0.02)
    bias = optimizer.state[model.bias]
    expected = float(((bias["exp_avg"].double() / (1 - 0.9**7)) ** 2).mean()) ** 0.5
    assert spectra.of(["bias"]).rms(0.0) == pytest.approx(expected, rel=0.05)
    (tmp_path / "spectrum.json").write_text(json.dumps(spectra.to_json()))
    assert load_spectra(tmp_path / "spectrum.json").of(["bias"]).rms(0.5) == spectra.of(["bias"]).rms(0.5)
    (tmp_path / "spectrum.json").write_text(json.dumps(spectrum.to_json()))  # as it was before there were names
    assert load_spectra(tmp_path / "spectrum.json").of(["bias"]).rms(0.5) == spectrum.rms(0.5)

    torch.save({"model": model.state_dict()}, tmp_path / "weights.pt")
    with pytest.raises(CheckpointError, match="no optimizer"):
        spectra_of(tmp_path / "weights.pt")
    for value in ("{", "[]", '{"elements": 1}'):
        (tmp_path / "other.json").write_text(value)
        with pytest.raises(CheckpointError, match=r"other\.json holds no spectrum"):
            load_spectra(tmp_path / "other.json")
