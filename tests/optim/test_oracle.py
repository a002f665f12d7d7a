"""Runs of random settings and events, each step of which is checked against `numpy_anon`, from the optimizer's own tensors."""

import copy
import io
import os
import pickle

import numpy as np
import pytest
import torch
from numpy_anon import Clock, Frame, Refresh, array, dense, power, rounding, step
from torch import nn

from anon_dist import Anon
from anon_dist.optim.backends import choice, gpu
from anon_dist.optim.state import decoded

MEANS = ("exp_avg", "exp_avg_sq", "precond")
PHASE = ("refresh_ratio", "window", "max_interval")
LARGEST_CHANGE = {torch.float32: 256.0, torch.float64: 256.0, torch.bfloat16: 4.0}
"""Of γ, as a factor, that a preconditioner of this dtype carries."""

STATE_DTYPES = (
    *(None, "bfloat16", {"exp_avg_sq": "bfloat16", "precond": "bfloat16"}, {"precond": "bfloat16"}),
    {"exp_avg": "int8", "exp_avg_sq": "bfloat16"},
)
SHAPES = ((), (1,), (7,), (70,), (0,), (3, 0), (5, 4), (4, 9), (2, 3, 2), (1, 5), (6, 1))
SETTINGS = {
    "weight_decay": (0.0, 0.1, 1.0),
    "update_clip": (None, 1.0, 0.05),
    "eps": (1e-16, 1e-8, 1e-4),
    **dict.fromkeys(("hold_silent", "nesterov", "cautious_decay", "maximize"), (False, True)),
    "gamma": (1.0, 1.0, 0.0, 0.5, 0.1, -1.0, 2.0, 1.5, 0.002, -0.1),
    "beta3": (0.0, 0.5, 0.9),
    "refresh_ratio": (2.0, 1.1, 1.5, 1.03, 3.0),
    "window": (None, None, "auto", 1, 2, 5),
    "max_interval": (None, None, 1, 4),
}
BETA1, BETA2 = (0.0, 0.5, 0.9, 0.95), (0.0, 0.5, 0.9, 0.95, 0.999)


def close(name, found, wanted, error):
    wrong = ~((np.abs(found - wanted) <= error) | (found == wanted))
    if wrong.any():
        i = np.unravel_index(np.argmax(wrong), wrong.shape)
        raise AssertionError(f"{name}{list(map(int, i))}: {found[i]!r}, not {wanted[i]!r} ± {error[i]:.3g}")


def phase(group):
    return {"beta2": group["betas"][1], **{name: group[name] for name in PHASE}}


class Run:
    """A run of one seed. What is due, which γ is in force and which made each preconditioner is counted here, and not read from the
    optimizer. Some parameters start late; in some runs γ follows a schedule, or groups are shown in parts, as DeepSpeed's stage 3 does."""

    def __init__(self, seed, kernel):
        self.rng, self.kernel = np.random.default_rng(seed), kernel
        self.dtype = self.pick(torch.float32, torch.bfloat16, torch.float16, torch.float32 if kernel else torch.float64)
        self.params, self.clocks, self.starts, self.made_with, self.t = [], {}, {}, {}, 0
        path = {"fused": True} if kernel else self.pick({"fused": False}, {"foreach": False}, {"foreach": True})
        self.optimizer = Anon(
            [{"params": self.made(3)}, {"params": self.made(2), **self.fresh("gamma", "window")}],
            lr=self.lr(),
            betas=(self.pick(*BETA1), self.pick(*BETA2)),
            **self.fresh(*SETTINGS),
            basis=self.pick(None, None, "columns", "rows", "both"),
            basis_block=self.pick(2, 3, 4, 128),
            state_dtype=self.pick(*STATE_DTYPES, *(() if kernel else ("float64",))),
            stochastic_rounding=self.pick(False, True),
            **path,
        )
        groups = self.optimizer.param_groups
        self.phases, self.in_force = [[(0, phase(group))] for group in groups], [group["gamma"] for group in groups]
        self.members = [list(group["params"]) for group in groups]
        self.in_parts = self.pick(False, False, True)
        self.slope = self.pick(0.0, 0.0, 0.03, -0.2)

    def pick(self, *values):
        return values[self.rng.integers(len(values))]

    def fresh(self, *names):
        return {name: self.pick(*SETTINGS[name]) for name in names}

    def lr(self):
        lr = 10.0 ** self.rng.uniform(-3, -1)
        return self.pick(lr, torch.tensor(lr, dtype=torch.float64))

    def made(self, count):
        """Parameters of odd shapes and strides."""
        found = []
        for _ in range(count):
            x = torch.from_numpy(np.asarray(self.rng.standard_normal(self.pick(*SHAPES)))).to(self.dtype)
            if x.dim() == 2:
                x = self.pick(x, x.t().contiguous().t(), torch.cat([x, x], 1)[:, : x.shape[1]])
            found.append(nn.Parameter(x))
            self.clocks[found[-1]], self.starts[found[-1]] = Clock(), self.t + self.pick(0, 0, 0, 3, 9)
        self.params += found
        return found

    def gradient(self, p):
        g = self.rng.standard_normal(tuple(p.shape)) * self.pick(1e-3, 1.0, 30.0)
        g = np.asarray(g * self.pick(1.0, 1.0, 1.0, 0.0, self.rng.random(g.shape) < 0.5))
        g = torch.from_numpy(g).to(p.dtype)
        return self.pick(g, g.t().contiguous().t()) if g.dim() == 2 else g

    def states(self):
        held = self.optimizer.state
        return {p: {k: x.clone() for k, x in decoded(dict(held[p])).items()} for p in self.params if p in held}

    def go(self, steps):
        for _ in range(steps):
            if self.rng.random() < 0.35:
                event = self.pick(
                    *(self.edit, self.edit_gamma) * 2, self.rebase, self.rebase_gamma, self.reload, self.copy
                )
                index = int(self.rng.integers(len(self.optimizer.param_groups)))
                self.pick(event, event, event, self.add, self.take_on_a_basis)(index)
            for group in self.optimizer.param_groups if self.slope else ():
                group["gamma"] += self.slope
            self.step()

    # -- between steps ---------------------------------------------------------------------------------------------------

    def edit(self, index):
        group = self.optimizer.param_groups[index]
        group.update(self.fresh(self.pick("weight_decay", "update_clip", "eps", "nesterov", "cautious_decay")))
        group.update(self.fresh(self.pick("maximize", "hold_silent")))
        group["lr"], group["betas"] = self.lr(), (self.pick(*BETA1), group["betas"][1])

    def edit_gamma(self, index):
        self.optimizer.param_groups[index].update(self.fresh("gamma"))

    def rebase(self, index):
        group, values = self.optimizer.param_groups[index], self.fresh(self.pick("beta3", *PHASE))
        values = self.pick(values, {"beta2": self.pick(*BETA2)})
        if self.rebased(index, self.in_force[index], values):
            taken = self.taken(index)
            self.phases[index] = [entry for entry in self.phases[index] if entry[0] < taken] + [(taken, phase(group))]

    def rebase_gamma(self, index):
        new = self.pick(*SETTINGS["gamma"])
        self.rebased(index, new, {"gamma": new})

    def take_on_a_basis(self, index):
        if self.optimizer.param_groups[index]["basis"] is None:
            self.rebased(index, self.in_force[index], {"basis": self.pick("columns", "both"), "basis_block": 3})

    def rebased(self, index, gamma, values):
        """Whether the values could be taken on, with this γ in force then; if so, it is."""
        group, before, taken = self.optimizer.param_groups[index], self.states(), self.taken(index)
        ratios = {
            p: self.ratio(group, self.old_gamma(index, p), gamma) for p in self.members[index] if self.clocks[p].t
        }
        if None in ratios.values() or (taken and self.ratio(group, self.in_force[index], gamma) is None):
            with pytest.raises(ValueError, match=r"gamma cannot be changed|are at gamma"):
                self.optimizer.rebase(**values, group=index)
            return False
        self.optimizer.rebase(**values, group=index)
        if taken or "gamma" in values:
            self.in_force[index] = gamma
        for p, ratio in ratios.items():
            self.made_with[p] = gamma
            self.assert_converted(p, before, ratio)
        return True

    def left(self):
        """Parameters that have been stepped and whose preconditioners are not of the γ in force: the index of the group, and the power
        that converts them."""
        found = {}
        for index, (group, members) in enumerate(zip(self.optimizer.param_groups, self.members, strict=True)):
            for p in members:
                if self.clocks[p].t and self.made_with[p] != self.in_force[index]:
                    found[p] = index, self.ratio(group, self.made_with[p], self.in_force[index])
        return found

    def saved(self, save):
        """What `save` gives, with all preconditioners at the γ in force; None if it is refused, since one of them cannot be."""
        before, left = self.states(), self.left()
        if any(ratio is None for _, ratio in left.values()):
            with pytest.raises(RuntimeError, match="before the state is saved"):
                save()
            return None
        found = save()
        for p, (index, ratio) in left.items():
            self.assert_converted(p, before, ratio)
            self.made_with[p] = self.in_force[index]
        return found

    def reload(self, _):
        file = io.BytesIO()
        if (saved := self.saved(self.optimizer.state_dict)) is None:
            return
        torch.save(saved, file)
        file.seek(0)
        before = self.states()
        own = ("params", "state_dtype")  # all else is the file's
        groups = [{key: group[key] for key in own} for group in self.optimizer.param_groups]
        self.optimizer = Anon(groups, lr=0.01)
        self.optimizer.load_state_dict(torch.load(file, weights_only=True))
        for group in self.optimizer.param_groups:
            group.update(self.pick({"fused": None, "foreach": True}, {"fused": None, "foreach": None}))
        self.assert_unchanged(before)

    def copy(self, _):
        """All of the run is copied with the optimizer, whose parameters are others then."""
        names = ("params", "clocks", "starts", "members", "optimizer")
        copied = self.pick(copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x)))
        found = self.saved(lambda: copied({name: getattr(self, name) for name in names}))
        if found is not None:
            states, pairs = self.states(), list(zip(self.params, found["params"], strict=True))
            before = {new: states[old] for old, new in pairs if old in states}
            found["made_with"] = {new: self.made_with[old] for old, new in pairs if old in self.made_with}
            self.__dict__.update(found)
            self.assert_unchanged(before)

    def add(self, _):
        if len(self.params) < 8:
            self.optimizer.add_param_group({"params": self.made(1), **self.fresh("gamma")})
            group = self.optimizer.param_groups[-1]
            self.phases.append([(0, phase(group))])
            self.in_force.append(group["gamma"])
            self.members.append(list(group["params"]))

    # -- a step ----------------------------------------------------------------------------------------------------------

    def step(self):
        self.t += 1
        scale = self.pick(None, None, 0.5, 3.0, 1024.0)
        for p in self.params:
            if not p.isfinite().all():  # float16's range was left
                nn.init.normal_(p)
            p.grad = self.gradient(p) if self.rng.random() < 0.85 and self.t > self.starts[p] else None
        self.optimizer.grad_scale = None if scale is None else torch.tensor(scale)
        for shown in self.displays():
            for group, params in zip(self.optimizer.param_groups, shown, strict=True):
                group["params"] = params
            self.step_of_shown(scale)
        for group, params in zip(self.optimizer.param_groups, self.members, strict=True):
            group["params"] = list(params)

    def displays(self):
        """What the groups show, one after the other: all, or two parts of each."""
        if not self.in_parts:
            return [[list(members) for members in self.members]]
        parts = [(i, part) for i, members in enumerate(self.members) for part in (members[:2], members[2:]) if part]
        return [[part if i == index else [] for i in range(len(self.members))] for index, part in parts]

    def step_of_shown(self, scale):
        skips = self.rng.random() < 0.1
        self.optimizer.found_inf = self.pick(None, torch.tensor(0.0)) if not skips else torch.tensor(1.0)
        self.optimizer.settle()
        before, thetas = self.states(), {p: array(p) for p in self.params}
        plans, clocks, in_force, refused = self.planned()
        shown = [p for group in self.optimizer.param_groups for p in group["params"]]
        none = all(p.grad is None or not p.numel() for p in shown) and any(p.numel() for p in shown)
        if refused and not skips and not none:
            with pytest.raises(RuntimeError, match="cannot be converted"):
                self.optimizer.step()
            for group, gamma in zip(self.optimizer.param_groups, self.in_force, strict=True):
                group["gamma"] = gamma
        else:
            self.take()
        if refused or skips or none:
            self.optimizer.settle()
            self.assert_unchanged(before, thetas)
            return
        self.clocks.update(clocks)
        self.in_force = in_force
        stepped = self.states()
        self.optimizer.settle()
        after = self.states()
        for plan in plans:
            self.made_with[plan[0]] = in_force[plan[5]]
            self.check(plan, scale or 1.0, before, thetas, stepped, after)
        seen = {plan[0] for plan in plans}
        others = {p: state for p, state in before.items() if p not in seen}
        self.assert_unchanged(others, {p: thetas[p] for p in self.params if p not in seen})

    def take(self):
        if self.pick(True, False):
            assert self.optimizer.step(lambda: 3.5) == 3.5
        else:
            for run in self.optimizer.split_step([self.params[::2]]):
                run()

    def ratio(self, group, old, new):
        """The power that takes a preconditioner from γ to another; None where it says too little."""
        named = dict(part.split("=") for part in group["state_dtype"].split(", ") if "=" in part)
        dtype = getattr(torch, named.get("precond", "float32") if named else group["state_dtype"])
        if old == new:
            return 1.0
        return None if old == 0.0 or abs(new) > LARGEST_CHANGE[dtype] * abs(old) else new / old

    def taken(self, index):
        return max(self.clocks[p].t for p in self.members[index])

    def old_gamma(self, index, p):
        """γ°; a parameter without a step has no preconditioner yet."""
        return self.made_with[p] if self.clocks[p].t else self.in_force[index]

    def ticked(self, p, phases):
        clock = Clock(**vars(self.clocks[p]))
        return clock, clock.tick(phases)

    def planned(self):
        """What each parameter does: (parameter, group, Due or None, Refresh, the power that converts v, the group's index); the clocks and
        the γ in force after it; and whether the step is refused."""
        plans, clocks, in_force, refused = [], {}, [], False
        for index, (group, phases) in enumerate(zip(self.optimizer.param_groups, self.phases, strict=True)):
            taken, new, dues = self.taken(index), group["gamma"], {}
            old = new if taken == 0 and group["params"] else self.in_force[index]
            for p in group["params"]:
                if p.grad is not None or not p.numel():
                    clocks[p], dues[p] = self.ticked(p, phases)
            changes = old != new and any(due.refreshes and due.t == taken + 1 for due in dues.values())
            in_force.append(new if changes else old)
            for p in self.members[index]:
                due, moves, old_gamma = dues.get(p), self.clocks[p].t > 0, self.old_gamma(index, p)
                ratio = self.ratio(group, old_gamma, in_force[-1]) if moves else 1.0
                if not any(p is q for q in group["params"]):  # to be converted when it is shown, if not by a refresh
                    refused |= changes and moves and ratio is None and not self.ticked(p, phases)[1].refreshes
                elif due is not None and due.refreshes:
                    held = in_force[-1] / old_gamma if ratio is None and old_gamma else 1.0
                    keep = 0.0 if due.first or ratio is None else group["beta3"]
                    refresh = Refresh(in_force[-1], 1.0 if due.first else held if ratio is None else ratio, keep)
                    plans.append((p, group, due, refresh, 1.0, index))
                elif due is not None or moves:
                    refused |= ratio is None
                    plans.append((p, group, due, None, ratio, index))
        return plans, clocks, in_force, refused

    # -- checks ----------------------------------------------------------------------------------------------------------

    def assert_unchanged(self, before, thetas=None):
        after = self.states()
        for p, state in before.items():
            if not self.clocks[p].t and p not in after:
                continue  # without a step, it may be dropped while its parameter is not shown
            assert all(torch.equal(x, after[p][key]) for key, x in state.items())
        for p, theta in (thetas or {}).items():
            close("theta", array(p), theta, np.zeros_like(theta))

    def assert_converted(self, p, before, ratio):
        if p not in before:
            return
        v, found = array(before[p]["precond"]), array(self.optimizer.state[p]["precond"])
        wanted = v if ratio == 1.0 else power(v, ratio)
        error = rounding(wanted, before[p]["precond"].dtype, True) + 1e-9 * wanted
        close("converted precond", found, wanted, error * (ratio != 1.0))

    def check(self, plan, scale, before, thetas, stepped, after):
        p, group, due, refresh, ratio, _ = plan
        if due is None:
            self.assert_converted(p, before, ratio)
            return
        assert float(after[p]["step"]) == due.t
        stored = {"theta": p.dtype, **{key: self.optimizer.state[p][key].dtype for key in MEANS}}
        unit = 2.0**-53 if torch.float64 in stored.values() else 2.0**-24
        hyper, theta = {k: x for k, x in group.items() if k not in ("params", "history")}, thetas[p]
        hyper["lr"] = float(hyper["lr"])
        g = np.zeros_like(theta) if p.grad is None else array(p.grad) / scale * (-1 if group["maximize"] else 1)
        m, s, v = (array(before[p][key]) for key in MEANS) if p in before else (theta * 0, theta * 0, theta * 0 + 1)
        ev = np.zeros_like(v)
        if ratio != 1.0:
            v = power(v, ratio)
            ev = 1e-13 * v + rounding(v, stored["precond"], True)
        frame = Frame(
            p.shape, p.dtype, before.get(p, stepped[p])
        )  # the first step's is I, and still is before it is renewed
        wanted = step(frame, theta, g, m, s, v, ev, hyper, due, refresh, unit)
        for key, dtype in stored.items():
            value, error = wanted[key]
            found = array(p if key == "theta" else stepped[p][key]).reshape(value.shape)
            stays = (key == "precond" and not due.refreshes and ratio == 1.0) or (
                key == "exp_avg_sq" and not due.accumulates
            )
            error = error + rounding(np.abs(value) + error, dtype, key != "theta" or group["stochastic_rounding"])
            if dtype == torch.float16:
                found = np.where(np.isinf(found) & (np.abs(value) + error > 65500), value, found)
            close(f"{key} at {due} of {hyper}", found, value, 0 * error if stays else error)
        if frame.turns and due.refreshes:
            check_renewal(frame, stored, stepped[p], after[p], refresh)
        else:
            assert all(torch.equal(x, stepped[p][key]) for key, x in after[p].items())


def check_renewal(frame, stored, before, after, refresh):
    """Each basis is an orthogonal R further, the Q of (C + δ) = Q·triangle; m is turned by it, and σ = d^(1/γ) as a diagonal is."""
    m, v = (array(before[key]).reshape(frame.shape) for key in ("exp_avg", "precond"))
    exponent = -2.0 / (refresh.gamma if abs(refresh.gamma) >= 0.25 else 1.0)
    turned, sigma, esigma = m, v**exponent, np.zeros_like(v)
    loose = 1e-12 if all(x.dtype == torch.float64 for key, x in before.items() if "basis" in key) else 3e-6
    for side, other in (("columns", "rows"), ("rows", "columns")):
        if f"basis_{side}" not in before:
            continue
        (q, c), (new_q, new_c) = (
            [dense(array(state[f"{key}_{side}"])) for key in ("basis", "covariance")] for state in (before, after)
        )
        r, block = q.T @ new_q, before[f"basis_{side}"].shape[1]
        close(f"basis_{side}: orthogonality", new_q.T @ new_q, np.eye(len(q)), np.full_like(q, loose))
        vectors = m if side == "columns" else m.T
        if f"basis_{other}" in before:
            vectors = vectors / np.sqrt(eigenvalues(array(before[f"covariance_{other}"])) + 1e-3)[:, None]
        for i in range(0, len(q), block):
            part = slice(i, i + block)
            check_block(
                r[part, part], c[part, part], new_c[part, part], vectors[:, part], min(refresh.keep, 0.8), loose
            )
        turned, sigma, esigma = (x if side == "columns" else x.T for x in (turned, sigma, esigma))
        turned, esigma = turned @ r, esigma @ r**2 + sigma @ (loose * (2 * np.abs(r) + loose))
        sigma = sigma @ r**2
        turned, sigma, esigma = (x if side == "columns" else x.T for x in (turned, sigma, esigma))
    error = 60 * loose * frame.norms(turned) + rounding(turned, stored["exp_avg"], True)
    close("turned exp_avg", array(after["exp_avg"]).reshape(frame.shape), turned, error)
    sigmas = (sigma, np.maximum(sigma - esigma, 1e-300), sigma + esigma)
    wanted, low, high = (power(x, 1 / exponent) if refresh.gamma else v for x in sigmas)
    error = np.maximum(np.abs(wanted - low), np.abs(wanted - high)) + 20 * loose * wanted
    error += rounding(wanted, stored["precond"], True)
    close("turned precond", array(after["precond"]).reshape(frame.shape), wanted, error)


def eigenvalues(covariance):
    """As ratios to the mean one of their block; 1 where nothing is known yet."""
    n, size = covariance.shape
    found = np.array([covariance[i, i % size] for i in range(n)])
    for i in range(0, n, size):
        average = found[i : i + size].mean()
        found[i : i + size] = found[i : i + size] / average if average > 0 else 1.0
    return found


def check_block(r, c, new_c, vectors, keep, loose):
    fresh, size = vectors.T @ vectors, len(r)
    if np.trace(fresh) == 0.0:
        close("basis without momentum", r, np.eye(size), np.full_like(r, loose))
        return
    c = keep * c + (1 - keep) * size * fresh / np.trace(fresh)
    close("covariance", new_c, r.T @ c @ r, np.full_like(r, 20 * loose * np.trace(c)))
    triangle, error = r.T @ (c + 1e-3 * np.trace(c) / size * np.eye(size)), 30 * loose * np.trace(c)
    close("triangle", np.tril(triangle, -1), np.zeros_like(r), np.full_like(r, error))
    assert (np.diag(triangle) > -error).all()


@pytest.mark.filterwarnings("ignore:Anon")
@pytest.mark.parametrize("kernel", [False, True])
@pytest.mark.parametrize("seed", range(6))
def test_random_runs(seed, kernel):
    Run(seed, kernel).go(steps=25)


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="test_gpu_kernel.py runs it in the interpreter")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("seed", [0, 1])
def test_random_runs_of_the_gpu_kernel(seed, monkeypatch):
    monkeypatch.setattr(gpu, "obstacle", lambda lists: None)
    monkeypatch.setattr(gpu, "check", lambda: None)
    monkeypatch.setattr(choice, "kernel_for", lambda device: gpu)
    Run(seed, kernel=True).go(steps=8)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Anon")
@pytest.mark.parametrize("kernel", [False, True])
def test_many_random_runs(kernel):
    for seed in range(100, 400):
        try:
            Run(seed, kernel).go(steps=40)
        except Exception as error:
            error.add_note(f"seed {seed}")
            raise
