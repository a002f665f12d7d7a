"""The optimizer's metrics against plain arithmetic, and the warnings."""

import logging

import pytest
import torch

from anon_dist import Anon
from anon_dist.train.optimizer.watch import SETTLED, OptimizerWatch


class Whole:
    """As much of an engine as is looked at."""

    def __init__(self, optimizer):
        self._optimizer = optimizer

    def whole_optimizer(self):
        import contextlib

        return contextlib.nullcontext(self._optimizer)


def take(optimizer, gradients):
    for gradient in gradients:
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.grad = gradient(p)
        optimizer.step()


def test_metrics_are_what_they_say():
    torch.manual_seed(0)
    groups = [
        {"params": [torch.nn.Parameter(torch.randn(40, 5)), torch.nn.Parameter(torch.randn(7))], "update_clip": 0.5},
        {"params": [torch.nn.Parameter(torch.randn(100))], "update_clip": None, "refresh_ratio": 2.0},
    ]
    optimizer = Anon(groups, lr=1e-3, betas=(0.9, 0.95), refresh_ratio=1.1)
    take(optimizer, [lambda p: torch.randn_like(p) * torch.logspace(-2, 0, p.numel()).view_as(p)] * 21)
    record = OptimizerWatch(Whole(optimizer), torch.device("cpu")).read()
    squares, count, largest = 0.0, 0, 0.0
    for i, group in enumerate(optimizer.param_groups):
        states = [optimizer.state[p] for p in group["params"]]
        v = torch.cat([s["precond"].flatten() for s in states]).double()
        update = v * torch.cat([s["exp_avg"].flatten() for s in states]).double() / (1 - 0.9**21)
        largest = max(largest, float(update.abs().max()))
        assert record[f"precond_spread/{i}"] == pytest.approx(float(v.log2().std(correction=0)), rel=1e-5)
        if i == 0:
            assert record["clipped_share/0"] == pytest.approx(float((update.abs() > 0.5).double().mean()), rel=1e-6)
            update = update.clamp(-0.5, 0.5)
        squares, count = squares + float(update.square().sum()), count + update.numel()
    assert record["update_rms"] == pytest.approx((squares / count) ** 0.5, rel=1e-5)
    assert record["update_max"] == pytest.approx(largest, rel=1e-5)
    assert (record["precond_age/0"], record["precond_age/1"]) == (0, 5)  # refreshed at 21, and at 16
    assert "clipped_share/1" not in record
    assert (record["gamma/0"], record["gamma/1"]) == (1.0, 1.0)
    optimizer.param_groups[1]["gamma"] = 0.5  # not in force before a refresh
    assert OptimizerWatch(Whole(optimizer), torch.device("cpu")).read()["gamma/1"] == 1.0
    assert record["refreshes"] == 16


def quiet_then_awake(steps=3, **hyper):
    """One coordinate of a thousand has no gradient until after the refresh at step 2."""
    optimizer = Anon([torch.nn.Parameter(torch.zeros(1000))], lr=1e-3, betas=(0.9, 0.999), eps=1e-16, **hyper)

    def gradient(quiet):
        def make(p):
            g = 1e-3 * torch.randn_like(p)
            g[0] = 0.0 if quiet else 1e-4
            return g

        return make

    torch.manual_seed(0)
    take(optimizer, [gradient(True), gradient(True), *[gradient(False)] * (steps - 2)])
    return OptimizerWatch(Whole(optimizer), torch.device("cpu"))


def test_a_coordinate_that_wakes_up_is_warned_of_once(caplog):
    watch = quiet_then_awake()
    with caplog.at_level(logging.WARNING):
        record = watch.read()
        watch.read()
    assert record["update_max"] > 1000
    (message,) = [r.getMessage() for r in caplog.records]
    assert "optim.update_clip" in message
    assert "1 steps ago" in message


def test_the_remedy_helps(caplog):
    with caplog.at_level(logging.WARNING):
        record = quiet_then_awake(update_clip=1.0).read()
    assert record["clipped_share/0"] > 0
    assert record["update_rms"] <= 1.0
    assert not caplog.records


def test_a_clip_that_cuts_off_much_is_warned_of_when_the_first_steps_are_past(caplog):
    with caplog.at_level(logging.WARNING):
        assert quiet_then_awake(SETTLED - 1, update_clip=1e-3).read()["clipped_share/0"] > 0.9
        assert not caplog.records
        quiet_then_awake(SETTLED, update_clip=1e-3).read()
    assert "elements are clipped at 0.001" in caplog.records[0].getMessage()


def test_other_optimizers_have_no_metrics():
    adamw = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(3))])
    assert OptimizerWatch(Whole(adamw), torch.device("cpu")).read() == {}
