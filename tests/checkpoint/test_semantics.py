"""AdamW ↔ Anon and the paper's port, against the optimizers themselves: what a converted state steps, and what it forgets."""

import copy
import math

import pytest
import torch
from torch.optim import lr_scheduler
from torch.optim.swa_utils import SWALR

from anon_dist import Anon
from anon_dist.checkpoint import CheckpointError
from anon_dist.checkpoint.optimizers.semantics import to_adamw, to_anon, to_optimizer
from anon_dist.checkpoint.options import AdamWOptions, AnonOptions
from anon_dist.checkpoint.recognise import recognise
from anon_dist.checkpoint.schema import Checkpoint, Key, Manifest, ParamGroup, TensorInfo
from anon_dist.train.config.parsing import OptimConfig

SHAPES = {"matrix": (37, 11), "vector": (130,), "one": (1,)}


class Live(Checkpoint):
    """An optimizer in memory, seen as a checkpoint."""

    def __init__(self, optimizer):
        names = dict(zip(parameters(optimizer), SHAPES, strict=True))
        self._tensors, scalars = {}, {}
        for p, state in optimizer.state.items():
            for key, value in state.items():
                if isinstance(value, torch.Tensor) and value.dim():
                    self._tensors[Key(names[p], key)] = value
                else:
                    scalars.setdefault(names[p], {})[key] = value
        self.tensors = {k: TensorInfo(tuple(v.shape), v.dtype) for k, v in self._tensors.items()}
        groups = [
            ParamGroup([names[p] for p in g["params"]], {k: v for k, v in g.items() if k != "params"})
            for g in optimizer.param_groups
        ]
        found = recognise(groups, {key.state for key in self.tensors}, scalars)
        self.manifest = Manifest("live", 1, found, groups, scalars, list(SHAPES))

    def read(self, key, start, stop):
        return self._tensors[key].flatten()[start:stop]


def parameters(optimizer):
    return [p for group in optimizer.param_groups for p in group["params"]]


def made(optimizer_class, seed=0, **hyper):
    generator = torch.Generator().manual_seed(seed)
    first, *rest = (torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES.values())
    return optimizer_class([{"params": [first], "weight_decay": 0.1}, {"params": rest, "lr": 5e-4}], **hyper)


def take(optimizer, steps):
    """Steps on gradients whose scale differs by element and stays."""
    for t in steps:
        generator = torch.Generator().manual_seed(t)
        for p in parameters(optimizer):
            scale = torch.logspace(-3, 0, p.numel()).view_as(p)
            p.grad = scale * torch.randn(p.shape, generator=generator)
        optimizer.step()


def load(checkpoint, optimizer):
    """Fill a fresh optimizer from a checkpoint through its own load_state_dict."""
    own = optimizer.state_dict()
    for index, name in enumerate(SHAPES):
        state = dict(checkpoint.manifest.scalars[name])
        for key, info in checkpoint.tensors.items():
            if key.parameter == name:
                half = info.numel // 2
                parts = [checkpoint.read(key, 0, half), checkpoint.read(key, half, info.numel)]
                state[key.state] = torch.cat(parts).view(info.shape).clone()
        own["state"][index] = state
    for group, new in zip(own["param_groups"], checkpoint.manifest.groups, strict=True):
        group.update(new.hyperparameters)
    optimizer.load_state_dict(own)
    return optimizer


def twin(optimizer, optimizer_class, **hyper):
    """Another optimizer over copies of the same parameters."""
    other = made(optimizer_class, **hyper)
    for p, q in zip(parameters(optimizer), parameters(other), strict=True):
        q.data.copy_(p.data)
    return other


def flat(optimizer):
    return torch.cat([p.detach().flatten() for p in parameters(optimizer)])


@pytest.mark.parametrize("steps", [1, 7, 60, 400])
def test_the_next_step_is_adamws(steps):
    """At γ = 1, v = (v̂ + ε²)^(−1/2) against 1 / (√v̂ + ε): the next steps agree but for v̂'s change over them."""
    adamw = made(torch.optim.AdamW, lr=1e-3, betas=(0.9, 0.95))
    take(adamw, range(steps))
    anon = load(to_anon(Live(adamw), AnonOptions(update_clip=None)), twin(adamw, Anon))
    before = flat(adamw)
    take(adamw, [steps])
    take(anon, [steps])
    moved, ours = flat(adamw) - before, flat(anon) - before
    if anon.state[parameters(anon)[0]]["step"] < 3:
        return  # refreshed at once, as the schedule says
    similarity = torch.nn.functional.cosine_similarity(moved, ours, dim=0)
    assert similarity > 0.97
    assert 0.8 < float(ours.norm() / moved.norm()) < 1.2


def test_the_state_is_what_the_formulas_say():
    adamw = made(torch.optim.AdamW, lr=1e-3, betas=(0.9, 0.95), eps=1e-7)
    take(adamw, range(50))
    options = AnonOptions(gamma=0.5, eps=1e-12, refresh_ratio=2.0, window=None, keep_lr=True)
    checkpoint = to_anon(Live(adamw), options)
    for p, name in zip(parameters(adamw), SHAPES, strict=True):
        state, numel = adamw.state[p], p.numel()
        moment = state["exp_avg_sq"].double().flatten() / (1 - 0.95**50)
        v = checkpoint.read(Key(name, "precond"), 0, numel)
        torch.testing.assert_close(v, ((moment + 1e-12) ** -0.25).float(), rtol=1e-6, atol=0)
        s = checkpoint.read(Key(name, "exp_avg_sq"), 0, numel)  # refreshed at 32, so 18 steps old
        torch.testing.assert_close(s, (moment * (1 - 0.95**18)).float(), rtol=1e-6, atol=0)
        assert torch.equal(checkpoint.read(Key(name, "exp_avg"), 0, numel), state["exp_avg"].flatten())
        assert checkpoint.manifest.scalars[name]["step"] == 50
    assert "as if refreshed at step 32, and next at 64" in checkpoint.manifest.notes[0]
    assert [g.hyperparameters["lr"] for g in checkpoint.manifest.groups] == [1e-3, 5e-4]
    assert [g.hyperparameters["weight_decay"] for g in checkpoint.manifest.groups] == [0.1, 0.01]


def test_the_window_is_seeded_only_as_far_as_it_reaches():
    adamw = made(torch.optim.AdamW, betas=(0.9, 0.95))
    take(adamw, range(50))
    for window, age in ((20, 6), (10, 0), ("auto", 18)):  # refreshes at 32 and 64
        checkpoint = to_anon(Live(adamw), AnonOptions(refresh_ratio=2.0, window=window))
        moment = adamw.state[parameters(adamw)[1]]["exp_avg_sq"].double() / (1 - 0.95**50)
        s = checkpoint.read(Key("vector", "exp_avg_sq"), 0, 130)
        torch.testing.assert_close(s, (moment * (1 - 0.95**age)).float(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("gamma", [0.25, 0.5, 1.5, -0.5])
def test_the_update_keeps_its_size_and_its_decay(gamma):
    adamw = made(torch.optim.AdamW, lr=1e-3, betas=(0.9, 0.95))
    take(adamw, range(100))
    checkpoint = to_anon(Live(adamw), AnonOptions(gamma=gamma))
    for group, old in zip(checkpoint.manifest.groups, adamw.param_groups, strict=True):
        new = group.hyperparameters
        ours = theirs = 0.0
        for name in group.members:
            state = adamw.state[parameters(adamw)[list(SHAPES).index(name)]]
            m = state["exp_avg"].double().flatten() / (1 - 0.9**100)
            moment = state["exp_avg_sq"].double().flatten() / (1 - 0.95**100)
            theirs += float((m / (moment.sqrt() + 1e-8)).clamp(-1, 1).square().sum())
            v = checkpoint.read(Key(name, "precond"), 0, m.numel()).double()
            ours += float((m * v).clamp(-new["update_clip"], new["update_clip"]).square().sum())
        assert new["lr"] * math.sqrt(ours) == pytest.approx(old["lr"] * math.sqrt(theirs), rel=1e-2)
        assert new["lr"] * new["update_clip"] == pytest.approx(old["lr"], rel=1e-9)
        assert new["lr"] * new["weight_decay"] == pytest.approx(old["lr"] * old["weight_decay"], rel=1e-9)


@pytest.mark.parametrize("gamma", [0.5, 1.5])
@pytest.mark.parametrize("clip", [1.0, None])
def test_the_next_step_of_another_gamma_has_adamws_size(gamma, clip):
    """Gradients of a model's scale, far from 1: a clip that kept its number would bind everywhere, or never."""
    adamw = made(torch.optim.AdamW, lr=1e-3, betas=(0.9, 0.95))

    def steps(optimizer, numbers):
        for t in numbers:
            generator = torch.Generator().manual_seed(t)
            for p in parameters(optimizer):
                p.grad = torch.randn(p.shape, generator=generator) * 1e-4
            optimizer.step()

    steps(adamw, range(60))
    anon = load(to_anon(Live(adamw), AnonOptions(gamma=gamma, update_clip=clip)), twin(adamw, Anon))
    before = flat(adamw)
    steps(adamw, [60])
    steps(anon, [60])
    assert 0.7 < float((flat(anon) - before).norm() / (flat(adamw) - before).norm()) < 1.4


@pytest.mark.parametrize("gamma", [1.0, 0.5, -1.0])
def test_there_and_back_is_the_same_adamw(gamma):
    adamw = made(torch.optim.AdamW, lr=1e-3, betas=(0.9, 0.95))
    take(adamw, range(100))
    there = to_anon(Live(adamw), AnonOptions(gamma=gamma, eps=1e-24))
    back = to_adamw(there)
    for p, name in zip(parameters(adamw), SHAPES, strict=True):
        moment = back.read(Key(name, "exp_avg_sq"), 0, p.numel())
        # v is rounded to float32, and the moment is v to the power −2 / γ.
        torch.testing.assert_close(moment, adamw.state[p]["exp_avg_sq"].flatten(), rtol=1e-6 / abs(gamma), atol=1e-20)
    for group, old in zip(back.manifest.groups, adamw.param_groups, strict=True):
        for key in ("lr", "weight_decay"):
            assert group.hyperparameters[key] == pytest.approx(old[key], rel=1e-2)
        assert set(group.hyperparameters) == set(old) - {"params"}


def test_anon_to_adamw_loads_and_steps_alike():
    anon = made(Anon, lr=1e-3, betas=(0.9, 0.95), refresh_ratio=1.1, beta3=0.2, eps=1e-16)
    take(anon, range(300))
    checkpoint = to_adamw(Live(anon))
    assert any("update_clip" in note for note in checkpoint.manifest.notes)
    adamw = load(checkpoint, twin(anon, torch.optim.AdamW))
    before = flat(anon)
    take(anon, [300])
    take(adamw, [300])
    assert torch.nn.functional.cosine_similarity(flat(anon) - before, flat(adamw) - before, dim=0) > 0.97


def test_a_gamma_that_waits_for_its_refresh_is_not_the_states():
    anon = made(Anon, gamma=0.5)
    take(anon, range(20))
    plain = to_adamw(Live(anon)).read(Key("matrix", "exp_avg_sq"), 0, 407)
    anon.param_groups[0]["gamma"] = 1.0
    assert torch.equal(to_adamw(Live(anon)).read(Key("matrix", "exp_avg_sq"), 0, 407), plain)


def test_a_checkpoint_of_that_optimizer_already_is_itself():
    anon, adamw = made(Anon), made(torch.optim.AdamW)
    take(anon, range(3))
    take(adamw, range(3))
    for live, options in ((Live(anon), AnonOptions()), (Live(adamw), AdamWOptions())):
        assert to_optimizer(live, options) is live


SCHEDULES = {
    "lambda": lambda o: lr_scheduler.LambdaLR(o, lambda t: 1 / (1 + t)),
    "step": lambda o: lr_scheduler.StepLR(o, 4),
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, 30),
    "restarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 7),
    "one cycle": lambda o: lr_scheduler.OneCycleLR(o, [3e-3, 1e-3], total_steps=40, cycle_momentum=False),
    "cyclic": lambda o: lr_scheduler.CyclicLR(o, [1e-4, 2e-4], [3e-3, 1e-3], step_size_up=5, cycle_momentum=False),
    "plateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0, factor=0.3, min_lr=[1e-4, 2e-4], eps=0.0),
    "sequence": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, total_iters=5), lr_scheduler.CosineAnnealingLR(o, 20)], [5]
    ),
    "chain": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.LinearLR(o, total_iters=5), lr_scheduler.ExponentialLR(o, 0.9)], optimizer=o
    ),
    "swa": lambda o: SWALR(o, [1e-4, 2e-4], 12),
}


@pytest.mark.filterwarnings("ignore:Detected call of")
@pytest.mark.parametrize("kind", SCHEDULES)
@pytest.mark.parametrize("place", [("lr_scheduler",), ("schedule",), ("client_state", "train", "plan")])
def test_schedules_follow_the_learning_rate(kind, place):
    """Wherever they are: torch's own scheduler goes on from the converted state as from the other one, by the factor."""

    def go_on(schedule, count):
        for _ in range(count):
            schedule.step(*([1.0] if kind == "plateau" else []))

    adamw = made(torch.optim.AdamW, lr=1e-3)
    schedule = SCHEDULES[kind](adamw)
    take(adamw, range(10))
    go_on(schedule, 10)
    live = Live(adamw)
    saved = copy.deepcopy(schedule.state_dict())
    inner = live.manifest.extras
    for name in place[:-1]:
        inner = inner.setdefault(name, {"note": [1.5]})
    inner[place[-1]] = saved
    checkpoint = to_anon(live, AnonOptions(gamma=0.5))
    found = checkpoint.manifest.extras
    for name in place:
        assert found.keys() == live.manifest.extras.keys() or name != place[0]
        found = found[name]
    assert repr(saved) == repr(schedule.state_dict()), "the source's own is not touched"
    anon = made(Anon, lr=1e-3)
    own = SCHEDULES[kind](anon)
    anon = load(checkpoint, anon)
    own.load_state_dict(found)
    groups = [g.hyperparameters["lr"] for g in checkpoint.manifest.groups]
    factors = [new / old["lr"] for new, old in zip(groups, adamw.param_groups, strict=True)]
    assert all(abs(f - 1) > 0.1 for f in factors)
    for _ in range(12):
        for optimizer, one in ((adamw, schedule), (anon, own)):
            optimizer.step()
            go_on(one, 1)
        for f, new, old in zip(factors, anon.param_groups, adamw.param_groups, strict=True):
            assert new["lr"] == pytest.approx(f * old["lr"], rel=1e-6)


def test_a_schedule_with_one_floor_for_groups_of_two_factors_is_refused():
    adamw = made(torch.optim.AdamW, lr=1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(adamw, 30, eta_min=1e-5)
    take(adamw, range(10))
    live = Live(adamw)
    live.manifest.extras["schedule"] = schedule.state_dict()
    with pytest.raises(CheckpointError, match=r"the schedule schedule has eta_min = 1e-05 for all .*--anon.keep-lr"):
        to_anon(live, AnonOptions(gamma=0.5))
    assert to_anon(live, AnonOptions(gamma=0.5, keep_lr=True)).manifest.extras == live.manifest.extras
    assert to_anon(live).manifest.extras == live.manifest.extras


def test_a_learning_rate_of_zero_keeps_its_schedule_right():
    """At the start of a warm-up, the rates to come are in the schedule alone."""
    adamw = made(torch.optim.AdamW, lr=1e-3)
    take(adamw, range(10))
    live = Live(adamw)
    live.manifest.extras["schedule"] = {"base_lrs": [1e-3, 5e-4], "_last_lr": [0.0, 0.0], "last_epoch": 0}
    expected = to_anon(live, AnonOptions(gamma=0.5)).manifest.extras["schedule"]["base_lrs"]
    for group in adamw.param_groups:
        group["lr"] = 0.0
    zero = Live(adamw)
    zero.manifest.extras = live.manifest.extras
    assert to_anon(zero, AnonOptions(gamma=0.5)).manifest.extras["schedule"]["base_lrs"] == expected


def test_the_papers_port():
    """Its recurrence, written out here, for 20 steps; then Anon goes on as the port does."""
    hyper = {"lr": 1e-2, "betas": (0.9, 0.999), "eps": 1e-16, "gamma": 0.7}

    class Port(torch.optim.Optimizer):
        def __init__(self, params, **defaults):
            super().__init__(params, {**defaults, "weight_decay": 0.0, "buffer": [[None] * 3] * 10})

        @torch.no_grad()
        def step(self):
            for group in self.param_groups:
                for p in group["params"]:
                    state = self.state[p]
                    if not state:
                        state.update(
                            step=0, t=0, **{k: torch.zeros_like(p) for k in ("exp_avg", "exp_avg_sq", "fixed_lr")}
                        )
                    b1, b2 = group["betas"]
                    state["step"] += 1
                    state["exp_avg"].lerp_(p.grad, 1 - b1)
                    state["exp_avg_sq"].mul_(b2).addcmul_(p.grad, p.grad, value=1 - b2)
                    if state["step"] == 2 ** state["t"]:
                        age = 1 if state["t"] == 0 else state["step"] // 2
                        d = (state["exp_avg_sq"].double() / (1 - b2**age) + group["eps"]) ** group["gamma"]
                        if state["t"]:
                            d = (d + state["fixed_lr"].double() ** -2) / 2
                        state["fixed_lr"].copy_(d**-0.5)
                        state["exp_avg_sq"].zero_()
                        state["t"] += 1
                    p.addcmul_(state["exp_avg"], state["fixed_lr"], value=-group["lr"] / (1 - b1 ** state["step"]))

    port = made(Port, **hyper)
    for group in port.param_groups:
        group["weight_decay"] = 0.0
    take(port, range(20))
    anon = load(to_anon(Live(port)), twin(port, Anon))
    take(port, range(20, 70))
    take(anon, range(20, 70))
    torch.testing.assert_close(flat(anon), flat(port), rtol=1e-5, atol=1e-6)
    port.param_groups[0]["weight_decay"] = 0.1
    with pytest.raises(CheckpointError, match="does not say whether it is"):
        to_anon(Live(port))
    with pytest.raises(CheckpointError, match="does not say whether it is"):
        to_adamw(Live(port))
    to_anon(Live(port), AnonOptions(decoupled=True))
    port.state[parameters(port)[0]]["t"] += 1
    with pytest.raises(CheckpointError, match="matrix: t = 8 refreshes do not fit step 70"):
        to_anon(Live(port), AnonOptions(decoupled=True))


def test_refusals():
    sgd = made(Anon, gamma=0.0)
    take(sgd, range(5))
    with pytest.raises(CheckpointError, match="gamma = 0"):
        to_adamw(Live(sgd))
    momentum = made(torch.optim.SGD, lr=0.1, momentum=0.9)
    take(momentum, range(5))
    for convert in (to_anon, to_adamw):
        with pytest.raises(CheckpointError, match="the optimizer state is SGD, not"):
            convert(Live(momentum))
    adam = made(torch.optim.Adam, lr=0.1)
    take(adam, range(5))
    with pytest.raises(CheckpointError, match="coupled form"):
        to_anon(Live(adam))
    with pytest.raises(CheckpointError, match="gamma must be"):
        to_anon(Live(made_and_taken()), AnonOptions(gamma=math.inf))
    live = Live(made_and_taken())
    live.manifest.scalars = copy.deepcopy(live.manifest.scalars)
    del live.manifest.scalars["vector"]["step"]
    with pytest.raises(CheckpointError, match="vector has optimizer state and no step count"):
        to_anon(live)


def made_and_taken():
    adamw = made(torch.optim.AdamW)
    take(adamw, range(3))
    return adamw


def test_amsgrad_steps_with_its_largest_moment():
    adamw = made(torch.optim.AdamW, lr=1e-3, amsgrad=True)
    take(adamw, range(30))
    checkpoint = to_anon(Live(adamw))
    assert Key("vector", "max_exp_avg_sq") not in checkpoint.tensors
    state = adamw.state[parameters(adamw)[1]]
    largest = state["max_exp_avg_sq"].double() / (1 - 0.999**30)
    v = checkpoint.read(Key("vector", "precond"), 0, 130)
    torch.testing.assert_close(v, (largest + 1e-16).rsqrt().float(), rtol=1e-6, atol=0)


def test_options_reach_the_groups():
    adamw = made_and_taken()
    checkpoint = to_anon(
        Live(adamw), AnonOptions(refresh_ratio=1.5, beta3=0.3, update_clip=2.0, window=7, hold_silent=True)
    )
    load(checkpoint, twin(adamw, Anon))
    group = checkpoint.manifest.groups[0].hyperparameters
    assert (group["refresh_ratio"], group["beta3"], group["update_clip"], group["window"]) == (1.5, 0.3, 2.0, 7)
    anon = made(Anon)
    take(anon, range(3))
    assert to_adamw(Live(anon), AdamWOptions(eps=1e-6)).manifest.groups[1].hyperparameters["eps"] == 1e-6


def test_the_defaults_of_a_conversion_are_the_presets():
    options, preset = AnonOptions(), OptimConfig()
    for name in ("gamma", "refresh_ratio", "beta3", "update_clip", "window", "hold_silent"):
        assert getattr(options, name) == getattr(preset, name), name
