"""γ by step and by name in whole runs: what follows it, what is measured, and that a resume goes on bit for bit."""

import json

import pytest
from helpers import Crash, at_step, crash, metrics

from anon_dist.checkpoint.formats import open_checkpoint
from anon_dist.optim.regime import Regime
from anon_dist.train.config import parsing as c
from anon_dist.train.config.lr import lr_factor
from anon_dist.train.optimizer.gamma import gamma_at
from anon_dist.train.optimizer.spectrum import spectra_of

SCHEDULE = {3: 0.5, 11: 1.4}
BY_NAME = {"*wte*": 0.0, "*ln_*": -0.5}


def test_gamma_is_linear_between_the_knots_and_constant_outside():
    knots = {2000: 1.0, 0: 0.5, 3000: -1.0}
    values = {1: 0.50025, 1000: 0.75, 2000: 1.0, 2500: 0.0, 3000: -1.0, 9999: -1.0}
    assert {step: gamma_at(step, knots) for step in values} == pytest.approx(values)
    assert [gamma_at(step, {5: 0.3}) for step in (1, 5, 9)] == [0.3] * 3


@pytest.fixture
def measured(run_config, train, tmp_path):
    """A run at γ = 1, and the folder of its last checkpoint."""
    folder = train(run_config(run_dir=str(tmp_path / "measured")))
    return folder, folder / "checkpoints" / "step-00000014"


def records(folder):
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return {r["step"]: r for r in lines if "loss" in r}


def test_what_follows_gamma(measured, run_config, train):
    """At each step: γ is the schedule's at the last refresh; lr, clip and decay are those of γ = 1 by the group's factor."""
    config = run_config(optim__match=str(measured[1]), optim__gamma_schedule=SCHEDULE, optim__gamma_by_name=BY_NAME)
    config.optim.refresh_ratio = 2.0  # refreshes at 1, 2, 4, 8
    folder, spectra = train(config), spectra_of(measured[1])
    checkpoint = open_checkpoint(folder / "checkpoints" / "step-00000014")
    groups = checkpoint.manifest.groups
    factors = {}
    for i, group in enumerate(groups):
        own = {"wte": 0.0, "ln_": -0.5}
        fixed = next((gamma for part, gamma in own.items() if part in group.members[0]), None)
        spectrum = spectra.of(group.members)
        for step, r in records(folder).items():
            last_refresh = 2 ** (step.bit_length() - 1)
            gamma = gamma_at(last_refresh, SCHEDULE) if fixed is None else fixed
            assert r[f"gamma/{i}"] == gamma
            factors[i] = spectrum.lr_factor(gamma, 1.0)
            assert r[f"lr_factor/{i}"] == pytest.approx(factors[i], rel=1e-9)
        h = group.hyperparameters
        assert Regime(h).gamma_in_force == gamma
        lr = 3e-3 * lr_factor(14, 14, config.schedule)
        assert h["lr"] == pytest.approx(lr * factors[i])
        assert h["update_clip"] == pytest.approx(1.0 / factors[i])
        decayed = 0.1 if checkpoint_dims(checkpoint, group) >= 2 else 0.0
        assert h["weight_decay"] == pytest.approx(decayed / factors[i])
    assert len({round(f, 3) for f in factors.values()}) > 3
    checkpoint.close()


def checkpoint_dims(checkpoint, group):
    return len(next(info.shape for key, info in checkpoint.tensors.items() if key.parameter == group.members[0]))


def test_runs_at_gamma_one_stay_what_they_are(measured, run_config, train):
    matched = train(run_config(optim__match=str(measured[1]), optim__gamma_schedule={0: 1.0}))
    assert metrics(matched) == metrics(measured[0])


@pytest.mark.parametrize("schedule", [SCHEDULE, {}])
def test_a_resume_goes_on_bit_for_bit(schedule, measured, run_config, train, tmp_path, monkeypatch, capsys):
    changes = {"optim__match": str(measured[1]), "optim__gamma_schedule": schedule, "optim__gamma_by_name": BY_NAME}
    whole = train(run_config(**changes, run_dir=str(tmp_path / "whole")))
    config = run_config(**changes, run_dir=str(tmp_path / "crashed"))
    for step in (2, 6, 9, 13):
        with monkeypatch.context() as patch, pytest.raises(Crash):
            at_step(patch, step, crash)
            train(config)
    capsys.readouterr()
    assert metrics(whole) == metrics(train(config))
    assert "resuming with" not in capsys.readouterr().out
    ends = [(folder / "model" / "model.safetensors").read_bytes() for folder in (whole, tmp_path / "crashed")]
    assert ends[0] == ends[1]


def test_a_schedule_can_be_given_up_and_taken_up_on_resume(measured, run_config, train, monkeypatch, capsys):
    config = run_config(optim__match=str(measured[1]), optim__gamma_schedule=SCHEDULE)
    with monkeypatch.context() as patch, pytest.raises(Crash):
        at_step(patch, 9, crash)
        train(config)
    config.optim.gamma_schedule, config.optim.gamma = {}, 0.5
    capsys.readouterr()
    with monkeypatch.context() as patch, pytest.raises(Crash):
        at_step(patch, 13, crash)
        train(config)
    assert "resuming with gamma = 0.5 in param group 0; the checkpoint had 1.0625" in capsys.readouterr().out
    config.optim.gamma_schedule = SCHEDULE
    folder = train(config)
    gammas = {step: r["gamma/0"] for step, r in records(folder).items()}
    assert [gammas[step] for step in (9, 12, 13)] == [0.5, 0.5, 1.4]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optim__match": None}, r"set optim\.match to a checkpoint"),
        ({"optim__gamma_schedule": {-1: 0.5}}, "optim.gamma_schedule must be a mapping from a whole number"),
        ({"optim__match": "nowhere"}, r"optim\.match: nowhere"),
        ({"optim__match": "nowhere.json"}, r"optim\.match: nowhere\.json holds no spectrum"),
        ({"model__layers": 3}, r"optim: there is no spectrum of parameter 'transformer\.h\.2"),
    ],
)
def test_errors_name_the_field_and_the_remedy(changes, message, measured, run_config, train):
    with pytest.raises(c.ConfigError, match=message):
        train(run_config(**{"optim__match": str(measured[1]), "optim__gamma_schedule": SCHEDULE, **changes}))


def test_adamw_does_not_mind(measured, run_config, train, tmp_path):
    plain = train(run_config(optim__name="adamw", run_dir=str(tmp_path / "plain")))
    other = run_config(optim__name="adamw", optim__match=str(measured[1]), run_dir=str(tmp_path / "other"))
    other.optim.gamma_schedule = SCHEDULE
    assert metrics(train(other)) == metrics(plain)
