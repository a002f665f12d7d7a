"""The studies of the paper's claims: what they compute against plain trainings, and each trend at a small size."""

import json
import math
from functools import partial

import common
import diffusion
import flat_minima
import gradient_noise
import images
import landscapes
import online_convex
import pytest
import torch
import torch.nn.functional as F
from torch.optim import SGD, Adam

from anon_dist import Anon

FAST = {"fused": False}


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
    torch.set_flush_denormal(False)


# -- the machinery -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["Anon γ=0.5", "Anon γ=1, ρ=1.1, β3=0.8, clip", "SGD, momentum 0.9", "Lion", "AdaBelief", "AMSGrad"]
)
def test_many_trainings_in_one_are_each_what_a_plain_one_is(name):
    data = images.digits()
    recipe = next(r for r in common.all_recipes() if r.name == name)
    recipe, lr = recipe.fitted(images.first_gradients(data))
    steps, seeds = 12, (3, 4)
    runs = images.fit(recipe, [lr, 1e30], seeds, data, steps)  # the second learning rate diverges

    torch.manual_seed(4)
    model = images.network(8)
    optimizer = recipe.make([{"params": list(model.parameters()), "lr": lr}])
    x, y = data.train
    batch = common.batches(len(x), images.BATCH, seeds)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * (0.5 + 0.5 * math.cos(math.pi * step / steps))
        optimizer.zero_grad()
        chosen = batch(step)[1]
        F.cross_entropy(model(x[chosen]), y[chosen]).backward()
        optimizer.step()

    loss, accuracy = images.evaluate(runs, data.test)
    logits = model(data.test[0])
    assert float(loss[1]) == pytest.approx(F.cross_entropy(logits, data.test[1]).item(), rel=1e-3)
    assert float(accuracy[1]) == pytest.approx(float((logits.argmax(1) == data.test[1]).float().mean()), abs=0.005)
    assert not loss[2:].lt(10.0).any()


def test_the_best_learning_rate_is_found_beyond_the_grid_and_past_divergence():
    def values(lrs):
        return [math.log(lr / 40.0) ** 2 if lr < 500.0 else math.nan for lr in lrs]

    best, tried = common.best_lr(values, 0.01)
    assert best == pytest.approx(40.0, rel=0.34)  # half of a quarter decade's ratio
    assert tried[best] == min(tried.values())


def test_batches_are_permutations_of_each_seed():
    batch = common.batches(10, 5, (0, 1))
    first = torch.cat([batch(0), batch(1)], 1)
    assert first.sort(1).values.tolist() == [list(range(10))] * 2
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first, torch.cat([batch(2), batch(3)], 1))


# -- landscapes ----------------------------------------------------------------------------------------


def test_gamma_0_is_gradient_descent_on_the_debiased_mean_of_the_gradient():
    """torch's SGD, given m / (1 − β1^t) as its gradient."""
    surface, steps, lr = landscapes.SURFACES["Rosenbrock"], 200, 1e-3
    start = torch.tensor([surface.start])
    path = landscapes.descend(common.anon(0.0), surface, [lr], start, steps)[:, 0, 0]

    x = start[0].clone().requires_grad_()
    optimizer, m = SGD([x], lr=lr), torch.zeros(2)
    for t in range(1, steps + 1):
        optimizer.param_groups[0]["lr"] = lr * (0.5 + 0.5 * math.cos(math.pi * (t - 1) / steps))
        (gradient,) = torch.autograd.grad(surface.value(x), x)
        m = 0.9 * m + 0.1 * gradient
        x.grad = m / (1.0 - 0.9**t)
        optimizer.step()
        assert path[t].tolist() == pytest.approx(x.tolist(), abs=2e-5)
    assert (path[-1] - path[0]).norm() > 0.5


def test_adaptivity_helps_in_the_valley():
    """Rosenbrock's, from the same starts, each at its best learning rate: γ = 1 ends far lower than γ = −0.5."""
    surface = landscapes.SURFACES["Rosenbrock"]
    low, _ = landscapes.study(common.anon(-0.5), surface, 300)
    high, _ = landscapes.study(common.anon(1.0), surface, 300)
    assert high["value"] < low["value"] / 4


def test_a_sharp_minimum_is_left_at_smaller_steps_at_gamma_0_than_at_gamma_1_5():
    sizes = flat_minima.SIZES[::2]
    leaving = {
        gamma: flat_minima.threshold(sizes, flat_minima.ended_in_flat(common.anon(gamma), sizes, 256, 200))
        for gamma in (0.0, 1.0, 1.5)
    }
    assert leaving[0.0] < leaving[1.0] < leaving[1.5]
    assert leaving[1.5] > 2 * leaving[0.0]


def test_a_threshold_is_where_half_is_crossed():
    sizes = [1.0, 10.0, 100.0]
    assert flat_minima.threshold(sizes, torch.tensor([0.0, 0.25, 0.75])) == pytest.approx(10.0**1.5)
    assert flat_minima.threshold(sizes, torch.tensor([0.0, 0.25, 0.3])) == math.inf


# -- the online convex counterexample --------------------------------------------------------------------


@pytest.fixture(scope="module")
def played():
    """x and average regret at the end of 1,500 steps, by optimizer."""
    problem, unused = online_convex.counterexample(1500), ("ρ=2, β3=0", "ρ=1.1, β3=0.5")
    found, _ = online_convex.study(problem, [name for name in online_convex.variants(0.0) if name not in unused])
    return {name: (float(run["x"][0, -1]), float(run["regret"][0, -1])) for name, run in found.items()}


def test_adam_goes_to_the_worst_point_and_amsgrad_to_the_best(played):
    x, regret = played["Adam"]
    assert x > 0.9
    assert regret > 0.5  # 2/3 is that of the worst point
    x, regret = played["AMSGrad"]
    assert x < -0.9
    assert regret < 0.15


@pytest.mark.parametrize("gamma", online_convex.GAMMAS)
@pytest.mark.parametrize("refreshes", ["ρ=2, β3=0.5 (the paper)", "ρ=1.1, β3=0.8", "ρ=2, window=auto"])
def test_anon_goes_to_the_best_point_at_every_gamma(gamma, refreshes, played):
    x, regret = played[f"γ={gamma:g}, {refreshes}"]
    assert x < -0.75
    assert regret < 0.2


def test_without_the_delay_gamma_1_is_adam_and_goes_where_adam_goes(played):
    without = played["γ=1, refreshed every step"]
    assert without == pytest.approx(played["Adam"], abs=0.02)
    assert played["γ=2, refreshed every step"][0] > 0.9
    assert played["γ=0, refreshed every step"][0] < -0.75  # no preconditioner, nothing to delay


def test_a_clip_that_binds_takes_the_convergence_away(played):
    """The rare large gradients that say where to go are what it clips."""
    assert played["γ=0, ρ=2, update_clip=1"][0] > -0.25
    assert played["γ=0, ρ=2, β3=0.5 (the paper)"][0] < -0.75


# -- gradient noise ------------------------------------------------------------------------------------


def test_one_spike_lowers_amsgrads_rate_for_good_and_anons_for_a_while():
    settings = {"steps": 5000, "spike": 100.0, "at": 60}
    betas = (0.9, 0.99)
    amsgrad = gradient_noise.share_left(partial(Adam, betas=betas, amsgrad=True), **settings)
    adam = gradient_noise.share_left(partial(Adam, betas=betas), **settings)
    anon = gradient_noise.share_left(partial(Anon, betas=betas, **FAST), **settings)
    steadier = gradient_noise.share_left(partial(Anon, betas=betas, refresh_ratio=1.1, beta3=0.8, **FAST), **settings)
    assert max(float(share.min()) for share in (amsgrad, adam, anon, steadier)) < 0.25
    assert amsgrad[-1] < 0.25
    assert anon[-1] > 3 * amsgrad[-1]
    assert amsgrad[-1] < 2 * amsgrad[70]
    back = [gradient_noise.recovered(share, 0.5) for share in (adam, steadier, anon, amsgrad)]
    assert back[:3] == sorted(back[:3])  # Adam forgets first; the paper's refreshes last
    assert back[3] is None


# -- images and diffusion ------------------------------------------------------------------------------


@pytest.mark.parametrize("gamma", [0.0, 1.0])
def test_a_network_learns_the_digits(gamma):
    data = images.digits()
    recipe, lr = common.steady(gamma).fitted(images.first_gradients(data))
    runs = images.fit(recipe, [10.0 * lr], (0, 1), data, 80)
    assert images.evaluate(runs, data.test)[1].min() > 0.85
    assert images.rise_under_noise(runs, data.test, trials=1).min() > 0.0


@pytest.mark.parametrize(
    ("module", "arguments", "made"),
    [
        (landscapes, [], "landscapes"),
        (flat_minima, [], "flat_minima"),
        (online_convex, [], "online_convex"),
        (gradient_noise, [], "gradient_noise"),
        (images, ["--set", "digits"], "images-digits"),
        (diffusion, [], "diffusion"),
    ],
)
def test_each_study_writes_its_results_and_a_small_plot(module, arguments, made, tmp_path, monkeypatch):
    few = [common.anon(0.0), common.anon(1.0), common.steady(1.0), *common.torch_recipes()[:2]]
    for name, value in {
        "all_recipes": lambda: few,
        "OPTIMIZERS": {"Anon γ=1": Anon, "Adam": Adam},
        "LRS": [0.01, 0.1],
        "ADAPTIVE": {"Anon γ=1": Anon},
    }.items():
        if hasattr(module, name):
            monkeypatch.setattr(module, name, value)
    if module in (landscapes, flat_minima, online_convex):
        monkeypatch.setattr(module, "GAMMAS", (0.0, 1.0))
    monkeypatch.setattr("sys.argv", [made, "--out", str(tmp_path), "--quick", *arguments])
    module.main()
    results = json.loads((tmp_path / f"{made}.json").read_text())
    assert results["made_with"]["torch"] == torch.__version__
    assert len(results) > 1
    assert 5_000 < (tmp_path / f"{made}.png").stat().st_size < 300_000


def test_a_missing_image_set_is_named_with_its_package(tmp_path):
    with pytest.raises(FileNotFoundError, match="apt-get install dataset-fashion-mnist"):
        images.fashion(tmp_path / "nowhere")
