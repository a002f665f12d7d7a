"""What leaves no trace: two optimizers take the same steps, and one of them is saved, copied, looked at, shown in parts, refused … in
between. Their bits stay the same. `test_oracle.py` says that a step is right; this, that nothing between steps changes the next ones."""

import copy
import io
import json
import pickle
import random
import warnings

import pytest
import torch
from torch import nn

from anon_dist import Anon
from anon_dist.optim import monitor
from anon_dist.optim.state import decoded

SETTINGS = {
    "gamma": (1.0, 0.0, 0.5, 0.004, -1.0, 1.5),
    "weight_decay": (0.0, 0.1),
    "update_clip": (None, 1.0),
    "eps": (1e-16, 1e-8),
    **dict.fromkeys(("hold_silent", "nesterov", "cautious_decay", "maximize"), (False, True)),
    "beta3": (0.0, 0.5, 0.9),
    "refresh_ratio": (2.0, 1.1, 1.5),
    "window": (None, "auto", 1, 3),
    "max_interval": (None, 4),
}
EDITED = ("gamma", "weight_decay", "update_clip", "eps", "hold_silent", "nesterov", "cautious_decay", "maximize")
REBASED = ("gamma", "beta3", "refresh_ratio", "window", "max_interval")
WRONG = {"lr": -1.0, "eps": 0.0, "refresh_ratio": 7.0, "window": 9, "state_dtype": "float16", "update_clip": -1.0}
STATE_DTYPES = (None, "bfloat16", "exp_avg_sq=bfloat16, precond=bfloat16", "exp_avg=int8, precond=bfloat16", "float64")


class Pair:
    """Two optimizers over the same parameters; those of the other may be cut into pieces."""

    def __init__(self, seed, fused):
        self.draw, self.noise = random.Random(seed), torch.Generator().manual_seed(seed)
        pick, self.fused = self.draw.choice, fused
        self.dtype = pick((torch.float32, torch.bfloat16, torch.float16, torch.float32 if fused else torch.float64))
        self.cut = pick((False, True))
        settings = {name: pick(values) for name, values in SETTINGS.items()}
        settings["state_dtype"] = pick(STATE_DTYPES[: 4 if fused else 5] if not self.cut else STATE_DTYPES[:3])
        settings["basis"] = None if self.cut else pick((None, "columns", "both"))
        settings |= {"basis_block": 3, "stochastic_rounding": pick((False, True)), "fused": fused}
        self.plain, self.pieces, self.starts = [], [], []
        groups = [self.made(shapes) for shapes in (((5, 4), (7,), ()), ((2, 3, 2), (40,)))]
        self.hyper = {"lr": 0.01, "betas": (pick((0.0, 0.9)), pick((0.5, 0.95))), **settings}
        self.one, self.other = (Anon([{"params": group[i]} for group in groups], **self.hyper) for i in (0, 1))
        self.t = 0

    def made(self, shapes):
        """The parameters of a group, whole and in pieces."""
        for shape in shapes:
            x = torch.randn(shape, generator=self.noise).to(self.dtype)
            self.plain.append(nn.Parameter(x))
            self.pieces.append([nn.Parameter(piece) for piece in self.in_pieces(x)])
            self.starts.append(self.draw.choice((0, 0, 4)))
        count = len(shapes)
        return self.plain[-count:], [piece for pieces in self.pieces[-count:] for piece in pieces]

    def in_pieces(self, x):
        return [piece.clone() for piece in x.reshape(-1).split(3)] if self.cut else [x.clone()]

    def go(self, steps):
        for _ in range(steps):
            if self.draw.random() < 0.5:
                self.change()
            for _ in range(self.draw.randrange(3)):
                self.disturb()
            self.step()
            self.t += 1
            self.compare()

    # -- to both ---------------------------------------------------------------------------------------------------------

    def change(self):
        index, pick = self.draw.randrange(len(self.one.param_groups)), self.draw.choice
        kind = pick(("edit", "edit", "rebase", "basis", "add"))
        if kind == "add" and len(self.plain) < 8:
            one, other = self.made([pick(((3, 3), (6,)))])
            self.one.add_param_group({"params": one})
            self.other.add_param_group({"params": other})
            return
        name = pick(EDITED if kind == "edit" else REBASED)
        values = {name: pick(SETTINGS[name])}
        if kind == "basis" and not self.cut:
            values = {"basis": pick((None, "columns", "both"))}
        if kind == "edit":
            for optimizer in (self.one, self.other):
                optimizer.param_groups[index].update(values)
            return
        answers = []
        for optimizer in (self.one, self.other):
            try:
                answers.append(optimizer.rebase(**values, group=index))
            except ValueError as error:
                answers.append(str(error))
        assert answers[0] == answers[1]

    def step(self):
        """One step of both; an edit that is refused is taken back."""
        scale = self.draw.choice((None, 1.0, 64.0))
        self.gradients(lambda i: self.draw.random() < 0.85 and self.t >= self.starts[i])
        refused = []
        for optimizer in (self.one, self.other):
            optimizer.found_inf, optimizer.grad_scale = None, None if scale is None else torch.tensor(scale)
            try:
                self.take(optimizer)
                refused.append(False)
            except RuntimeError as error:
                assert "cannot be converted" in str(error)  # noqa: PT017
                refused.append(True)
                for group in optimizer.param_groups:
                    group["gamma"] = json.loads(group["history"])[-1]["gamma"]
        assert refused[0] == refused[1]

    def gradients(self, has):
        for i, (p, pieces) in enumerate(zip(self.plain, self.pieces, strict=True)):
            g = torch.randn(p.shape, generator=self.noise) * self.draw.choice((0.01, 1.0))
            g = (g * (torch.rand(p.shape, generator=self.noise) < self.draw.choice((0.5, 1.0)))).to(self.dtype)
            there = has(i)
            p.grad = g if there else None
            for piece, part in zip(pieces, self.in_pieces(g), strict=True):
                piece.grad = part.reshape(piece.shape) if there else None

    def take(self, optimizer):
        pending = any(group["gamma"] != json.loads(group["history"])[-1]["gamma"] for group in optimizer.param_groups)
        how = (
            "whole"
            if optimizer is self.one
            else self.draw.choice(("whole", "split", "shown" if not pending else "whole"))
        )
        if how == "whole":
            optimizer.step()
        elif how == "split":
            some = [p for group in optimizer.param_groups for p in group["params"]]
            for run in optimizer.split_step([some[::3], some[1::3]]):
                run()
        else:
            self.shown(optimizer)

    def shown(self, optimizer):
        groups = optimizer.param_groups
        members = [group["params"] for group in groups]
        for i, own in enumerate(members):
            for part in (own[:2], own[2:]):
                for j, group in enumerate(groups):
                    group["params"] = part if i == j else []
                if part:
                    optimizer.step()
        for group, own in zip(groups, members, strict=True):
            group["params"] = own

    # -- to the other ----------------------------------------------------------------------------------------------------

    def disturb(self):
        kinds = (self.reload, self.copied, self.looked_at, self.refused, self.skipped, self.moved, self.edited_back)
        self.draw.choice(kinds)()

    def reload(self):
        file = io.BytesIO()
        torch.save(self.other.state_dict(), file)
        file.seek(0)
        groups = [{key: group[key] for key in ("params", "state_dtype")} for group in self.other.param_groups]
        self.other = Anon(groups, **self.hyper)
        self.other.load_state_dict(torch.load(file, weights_only=True))
        if not self.fused:
            for group in self.other.param_groups:
                group["foreach"] = self.draw.choice((None, True, False))

    def copied(self):
        how = self.draw.choice((copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))))
        self.pieces, self.other = how((self.pieces, self.other))

    def looked_at(self):
        self.other.next_gammas()
        self.other.init_state()
        monitor.read(monitor.measure(self.other, torch.device("cpu")))
        self.other.settle()
        self.other.state_dict()
        assert repr(self.other)

    def refused(self):
        group = self.other.param_groups[self.draw.randrange(len(self.other.param_groups))]
        taken = any(
            self.other.state[p] and self.other.state[p]["step"] for p in group["params"] if p in self.other.state
        )
        name = self.draw.choice(
            ("lr", "eps", "update_clip", "state_dtype", *(("refresh_ratio", "window") if taken else ()))
        )
        before, group[name] = group[name], WRONG[name]
        self.gradients(lambda i: True)
        with pytest.raises((ValueError, RuntimeError), match=name):
            self.other.step()
        group[name] = before
        for wrong in ({"gamma": float("nan")}, {"beta3": 1.0}, {"beta3": 0.1, "group": 99}, {"basis_block": 0}):
            with pytest.raises(ValueError, match="Anon: "):
                self.other.rebase(**wrong)
        with pytest.raises(ValueError, match="some parameters appear in more than one"):
            self.other.add_param_group({"params": [group["params"][0]]})

    def skipped(self):
        self.gradients(lambda i: True)
        self.other.found_inf = torch.tensor(1.0)
        self.other.step()
        self.other.found_inf = None
        self.gradients(lambda i: False)
        self.other.step()

    def moved(self):
        """Parameters and states get other memory, and a group another order."""
        for p, state in self.other.state.items():
            p.data = p.data.clone()
            for key in state:
                state[key] = state[key].clone()
        self.other.param_groups[0]["params"].reverse()

    def edited_back(self):
        for group in self.other.param_groups:
            before = dict(group)
            group.update(gamma=0.3, state_dtype="float64", betas=(0.1, 0.2), beta3=0.77)
            self.other.next_gammas()
            group.update(before)

    def compare(self):
        self.one.settle()
        self.other.settle()
        for group, other in zip(self.one.param_groups, self.other.param_groups, strict=True):
            differ = {k: (v, other[k]) for k, v in group.items() if k not in ("params", "foreach") and v != other[k]}
            assert not differ, differ
        for p, pieces in zip(self.plain, self.pieces, strict=True):
            assert torch.equal(p.reshape(-1), torch.cat([piece.reshape(-1) for piece in pieces]))
            states = [decoded(self.other.state[piece]) for piece in pieces if piece in self.other.state]
            if len(states) < len(pieces) or p not in self.one.state:
                continue  # without a step, it may be dropped while its parameter is not shown
            for key, x in decoded(self.one.state[p]).items():
                found = [state[key].reshape(-1) for state in states]
                assert torch.equal(x.reshape(-1), found[0] if key == "step" else torch.cat(found)), key


def run(seed, fused, steps):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            Pair(seed, fused).go(steps)
        except Exception as error:
            error.add_note(f"seed {seed}")
            raise


@pytest.mark.parametrize("fused", [False, True])
def test_what_happens_between_steps_leaves_no_trace(fused):
    for seed in range(4):
        run(seed, fused, steps=15)


@pytest.mark.slow
@pytest.mark.parametrize("fused", [False, True])
def test_much_of_what_happens_between_steps_leaves_no_trace(fused):
    for seed in range(100, 400):
        run(seed, fused, steps=40)
