"""The race's peers step as their makers' do, and its page shows what was collected."""

import csv
from pathlib import Path

import pytest
import race
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from anon_dist.train.config.parsing import OptimConfig
from anon_dist.train.optimizer.gamma import GammaRules

STUDY = Path(__file__).parents[2] / "configs" / "study"


@pytest.fixture
def model():
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=16, n_embd=16, n_layer=2, n_head=2))


def gradients(model, seed):
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator)


def test_muon_steps_hidden_matrices_as_torchs_own_does_and_the_rest_as_nadam(model):
    optimizer = race.muon(OptimConfig(lr=1e-2, betas=(0.9, 0.99)), model)
    copies = {n: p.detach().clone().requires_grad_() for n, p in model.named_parameters()}
    hidden = [p for n, p in copies.items() if p.ndim == 2 and ".h." in n]
    assert len(hidden) == 8
    decayed, plain = (
        [copies["transformer.wte.weight"], copies["transformer.wpe.weight"]],
        [p for p in copies.values() if p.ndim == 1],
    )
    alone = [
        torch.optim.Muon(hidden, 1e-2, 0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.NAdam(
            [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}],
            lr=1e-2,
            betas=(0.9, 0.99),
            momentum_decay=1.0,
            decoupled_weight_decay=True,
        ),
    ]
    for step in range(6):
        if step == 3:  # as at a resume, and by a schedule
            optimizer.load_state_dict(optimizer.state_dict())
        rate = 1e-2 / (1 + step)
        for group in [*optimizer.param_groups, *(g for o in alone for g in o.param_groups)]:
            group["lr"] = rate
        gradients(model, step)
        for name, p in model.named_parameters():
            copies[name].grad = p.grad.clone()
        optimizer.step()
        for o in alone:
            o.step()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p, copies[name], rtol=1e-6, atol=1e-7, msg=name)


def test_rates_by_name_hold_for_nadam_and_are_refused_where_a_group_mixes_them(model):
    config = OptimConfig(lr=1e-2, betas=(0.9, 0.99), lr_by_name={"*wte*": 3.0})
    optimizer = race.nadamw(config, model)
    rules = GammaRules(config, optimizer, model, None)
    for rule, group in zip(rules.groups, optimizer.param_groups, strict=True):
        tied = any(p is model.transformer.wte.weight for p in group["params"])
        assert (rule.lr_factor, group["lr"]) == ((3.0, pytest.approx(3e-2)) if tied else (1.0, 1e-2))
        assert len(group["params"]) == 1 or not tied
    with pytest.raises(ValueError, match=r"transformer\.wte\.weight the factor 3 and .* 1, .* in one param group"):
        GammaRules(config, race.nadamw(OptimConfig(lr=1e-2), model), model, None)


def test_muon_in_float32_is_muon_but_for_rounding():
    for shape in ((24, 40), (40, 24)):
        ours, torchs = (torch.nn.Parameter(torch.zeros(shape)) for _ in range(2))
        for step in range(3):
            ours.grad = torch.randn(shape, generator=torch.Generator().manual_seed(step))
            torchs.grad = ours.grad.clone()
            for p, of in ((ours, race.Muon32), (torchs, torch.optim.Muon)):
                of([p], 1e-2, 0.0, adjust_lr_fn="match_rms_adamw").step()
            away = torch.linalg.vector_norm(ours - torchs) / torch.linalg.vector_norm(torchs)
            assert 0.0 < away < 0.02  # bfloat16 has 8 bits


def rows_of(text):
    return [line.rstrip() for line in text.splitlines() if line.startswith(("| A", "| M", "| S"))]


def test_the_tables_of_the_pages_are_those_of_the_collected_runs(capsys):
    race.summary(STUDY / "race")
    short = rows_of(capsys.readouterr().out)
    assert len(short) > 5
    assert rows_of((STUDY / "README.md").read_text()) == short
    race.table(STUDY / "race")
    whole = rows_of(capsys.readouterr().out)
    assert whole[: len(short)] == short
    assert rows_of((STUDY / "race" / "README.md").read_text()) == whole[len(short) :]


def test_a_row_is_the_mean_over_seeds_and_its_distance_from_the_best_adamw_of_its_batch_and_length(tmp_path, capsys):
    rows = [
        ("x", "2.5", "nadamw", 1024, 2000, 0.1, 0, 3.0, 1.0),
        ("x", "2.5", "nadamw", 1024, 2000, 0.1, 1, 3.5, 1.0),
        ("x", "2.5", "nadamw", 1024, 2000, 0.2, 0, 3.5, 1.0),
        ("x", "2.5", "nadamw3", 1024, 2000, 0.2, 0, 2.75, 1.0),
        ("x", "2.5", "nadamw3", 1024, 2000, 0.2, 1, 3.25, 1.0),
        ("x", "2.5", "columns", 1024, 2000, 0.1, 0, 2.5, 1.0),
        ("x", "2.5", "columns", 1024, 2000, 0.1, 1, 3.0, 1.0),
        ("x", "2.6", "nadamw", 1024, 2000, 0.2, 2, 9.0, 1.0),  # on another edition, which is not compared
        ("x", "2.5", "nadamw", 1024, 8000, 0.1, 0, 2.0, 1.0),  # no peer of a run of 2,000 steps
        ("x", "2.5", "nadamw", 4096, 500, 0.1, 0, 1.0, 1.0),
    ]
    with (tmp_path / "runs.csv").open("w", newline="") as f:
        csv.writer(f).writerows([race.FIELDS, *rows])
    race.table(tmp_path)
    _, line = [x for x in capsys.readouterr().out.splitlines() if "columns" in x]  # the first is the summary's
    assert [c.strip() for c in line.strip("|").split("|")] == [
        "Anon, columns",
        "1,024",
        "2000",
        "2.750 ± 0.250 (2)",
        "",
        "-0.250 ± 0.000",
    ]
