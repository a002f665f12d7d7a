"""What tests of checkpoints share."""

import os
from pathlib import Path

import torch
from torch import nn

from anon_dist import Anon


def fill(path: Path, file, source) -> None:
    """Write a laid out file, tensors taken from a dictionary of `Key`."""
    with path.open("wb") as out:
        out.truncate(file.size)
        for offset, data in file.literals:
            os.pwrite(out.fileno(), data, offset)
        for region in file.regions:
            piece = source[region.part.key].flatten()[region.part.start : region.part.stop].to(region.dtype)
            os.pwrite(out.fileno(), piece.contiguous().view(torch.uint8).numpy().tobytes(), region.offset)


class Net(nn.Module):
    """Tied weights, a frozen part, buffers, a 0-dim parameter, sizes that no number of ranks divides."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.frozen = nn.Linear(6, 6, bias=False)
        self.norm = nn.BatchNorm1d(6)
        self.inner = nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 6, bias=False))
        self.scale = nn.Parameter(torch.tensor(0.5))
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embedding.weight
        self.frozen.requires_grad_(False)

    def forward(self, tokens):
        return self.head(self.inner(self.norm(self.frozen(self.embedding(tokens)))) * self.scale)


class Lion(torch.optim.Optimizer):
    """One state and no step, as published."""

    def __init__(self, params, lr=1e-3):
        super().__init__(params, {"lr": lr, "betas": (0.9, 0.99)})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    state = self.state[p]
                    m = state.setdefault("exp_avg", torch.zeros_like(p))
                    p.sub_(m.lerp(p.grad, 0.1).sign() * group["lr"])
                    m.lerp_(p.grad, 0.01)


class Shampooish(torch.optim.Optimizer):
    """States of other shapes than the parameter's, nested, integers, strings."""

    def __init__(self, params, lr=1e-3):
        super().__init__(params, {"lr": lr, "nested": {"a": (1, 2.5), "b": [None, True]}})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    sides = p.shape if p.ndim > 1 else ()
                    state.update(count=0, kind=None, factors={i: torch.eye(n) for i, n in enumerate(sides)})
                    state["roots"] = [torch.zeros(n, n + 1, dtype=torch.float64) for n in sides]
                    state["momentum"] = torch.zeros_like(p, dtype=torch.bfloat16)
                state["count"] += 1
                for i in state["factors"]:
                    flat = p.grad.movedim(i, 0).flatten(1)
                    state["factors"][i] += flat @ flat.T
                state["momentum"].add_(p.grad.bfloat16())
                p.sub_(p.grad, alpha=group["lr"])


def adamw(groups):
    return torch.optim.AdamW(groups, lr=1e-2, amsgrad=True)


def anon(groups):
    return Anon(groups, lr=1e-2, refresh_ratio=1.5)


OPTIMIZERS = {"anon": anon, "adamw": adamw, "lion": Lion, "shampoo": Shampooish}


def groups_of(model):
    """Two, of different hyperparameters: matrices and the rest; with their names, which an optimizer that numbers them then records."""
    own = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    return [
        {"params": [(n, p) for n, p in own if p.ndim > 1], "lr": 3e-3},
        {"params": [(n, p) for n, p in own if p.ndim <= 1], "lr": 7e-3},
    ]


def step(model, optimizer, seed):
    """A step on data that the seed gives."""
    tokens = torch.randint(0, 11, (5,), generator=torch.Generator().manual_seed(seed))
    optimizer.zero_grad()
    model(tokens).logsumexp(-1).square().sum().backward()
    optimizer.step()


def trained(kind, steps=3):
    """A model and its optimizer after a few steps."""
    torch.manual_seed(0)
    model = Net()
    optimizer = with_schedule(OPTIMIZERS[kind](groups_of(model)))
    for i in range(steps):
        step(model, optimizer, i)
    return model, optimizer


def fresh(kind):
    """The same kind, other values, no state."""
    torch.manual_seed(1)
    model = Net()
    return model, with_schedule(OPTIMIZERS[kind](groups_of(model)))


def with_schedule(optimizer):
    """A scheduler leaves `initial_lr` in each group, which loaders have lost before."""
    torch.optim.lr_scheduler.StepLR(optimizer, 2)
    return optimizer


def assert_same(model, optimizer, other, reference):
    """Weights, buffers, states and groups, bit for bit."""
    for (name, a), b in zip(model.state_dict().items(), other.state_dict().values(), strict=True):
        assert_equal(a, b, name)
    a, b = optimizer.state_dict(), reference.state_dict()
    assert_equal(a["state"], b["state"], "state")
    assert_equal(a["param_groups"], b["param_groups"], "groups")


def assert_equal(a, b, where):
    """Nested values, types included; tensors bit for bit."""
    assert type(a) is type(b), (where, a, b)
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype, where
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_equal(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_equal(x, y, f"{where}.{i}")
    else:
        assert a == b, where
