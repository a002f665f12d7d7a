"""What the log says of an optimizer: exact sums, in bounded memory, one transfer."""

import math

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from anon_dist import Anon
from anon_dist.optim import monitor

CPU = torch.device("cpu")


def stepped(sizes, state_dtype="float32", clip=0.5):
    generator = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(n, generator=generator)) for n in sizes]
    optimizer = Anon(params, lr=0.01, betas=(0.9, 0.95), update_clip=clip, state_dtype=state_dtype, refresh_ratio=1.5)
    for _ in range(7):
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator)
            p.grad.view(-1)[::7] = 0.0
        optimizer.step()
    return params, optimizer


@pytest.mark.parametrize("state_dtype", ["float32", "bfloat16", "exp_avg=int8"])
@pytest.mark.parametrize("clip", [0.5, None])
def test_sums_are_those_of_the_definition(state_dtype, clip, monkeypatch):
    monkeypatch.setitem(monitor.PIECE, "cpu", 64)
    params, optimizer = stepped([(3, 5), (1000,), (33, 7), (0,), ()], state_dtype, clip)
    (found,) = monitor.read(monitor.measure(optimizer, CPU))
    states = optimizer.state_dict()["state"].values()
    m = torch.cat([s["exp_avg"].double().reshape(-1) for s in states]) / (1 - 0.9**7)
    v = torch.cat([s["precond"].double().reshape(-1) for s in states])
    size, logs = (v * m).abs(), v[m != 0].log2()
    assert found.elements == len(m) == sum(p.numel() for p in params)
    assert found.largest == pytest.approx(float(size.max()), rel=1e-6)
    assert found.size_sum == pytest.approx(float(size.sum()), rel=1e-5)
    assert found.square_sum == pytest.approx(float(size.clamp(max=clip or math.inf).square().sum()), rel=1e-5)
    assert found.clipped == (0 if clip is None else int((size > clip).sum()))
    assert found.moving == len(logs)
    assert found.log_sum == pytest.approx(float(logs.sum()), rel=1e-5)
    assert found.log_square_sum == pytest.approx(float(logs.square().sum()), rel=1e-5)
    assert (found.age, found.gamma) == (2, 1.0)  # refreshes at 1, 2, 3, 5
    assert monitor.refreshes(optimizer) == 4


def test_before_the_first_step_nothing_is_known():
    optimizer = Anon([nn.Parameter(torch.ones(3))])
    (found,) = monitor.read(monitor.measure(optimizer, CPU))
    assert (found.elements, found.age, found.gamma) == (0.0, 0, None)
    assert math.isfinite(found.square_sum)


class Watched(TorchDispatchMode):
    """Numbers that the host asked for, and the largest tensor that was made."""

    asked, largest = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.asked += func is torch.ops.aten._local_scalar_dense.default
        read, made = (
            {t.untyped_storage().data_ptr(): t for t in tree_leaves(x) if isinstance(t, torch.Tensor)}
            for x in (args, result)
        )
        new = [t.untyped_storage().nbytes() for place, t in made.items() if place not in read]
        self.largest = max([self.largest, *new])
        return result


def test_memory_is_bounded_and_the_host_does_not_wait():
    params, optimizer = stepped([(1 << 21,), (300, 5000), (7,)])
    for state in optimizer.state.values():
        state["step"] = torch.tensor(float(state["step"]))
    with Watched() as watched:
        found = monitor.measure(optimizer, CPU)
    counted = sum(int(p.numel() > 0) for p in params)
    assert watched.asked == counted  # the step counts, which live on the host
    assert watched.largest <= 4 * (monitor.PIECE["cpu"] + 5000)
    assert len(monitor.read(found)) == 1


@pytest.mark.parametrize("nesterov", [False, True])
def test_the_update_of_a_matrix_in_a_basis(nesterov):
    """Its root mean square is that of the step, which is turned back and so as large; with Nesterov momentum on noise 14% below it."""
    p = nn.Parameter(torch.zeros(200, 48))
    hyper = {"betas": (0.9, 0.99), "basis": "columns", "basis_block": 16, "nesterov": nesterov, "max_interval": 30}
    optimizer = Anon([p], lr=1.0, **hyper)
    generator = torch.Generator().manual_seed(3)
    mix = torch.randn(48, 48, generator=generator)
    moved = measured = 0.0
    for t in range(1, 101):
        p.grad, before = torch.randn(200, 48, generator=generator) @ mix, p.detach().clone()
        optimizer.step()
        if t > 94:  # the last refresh is at 94
            (found,) = monitor.read(monitor.measure(optimizer, CPU))
            moved += float((p.detach() - before).square().sum())
            measured += found.square_sum
    assert math.sqrt(measured / moved) == pytest.approx(0.864 if nesterov else 1.0, rel=0.02 if nesterov else 1e-5)
