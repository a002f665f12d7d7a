"""Matrices in flat tensors, as DeepSpeed's stage 3 lays them: what each does by itself, to the bit but for rows' products, whose order of
sums follows where a matrix lies in memory."""

import copy
import math

import pytest
import torch
from torch import nn

from anon_dist.optim import Anon, flat
from anon_dist.optim.flat import Layout, Share
from anon_dist.optim.frame import BASIS_KEYS

LM = {"lr": 0.02, "betas": (0.9, 0.95), "refresh_ratio": 1.3, "beta3": 0.8, "weight_decay": 0.1, "nesterov": True}
SHAPES = {"square": (32, 32), "vector": (33,), "wide": (7, 40), "tall": (130, 4), "cube": (6, 4, 5), "bias": (3,)}
PADDING = 5


def gradient(name, t):
    return torch.randn(SHAPES[name], generator=torch.Generator().manual_seed(100 * t + len(name) * ord(name[0])))


def laid(tensors):
    """One after the other; vectors with padding behind them."""
    return torch.cat([torch.cat([x.reshape(-1), x.new_zeros(PADDING * (x.dim() == 1))]) for x in tensors])


def shares():
    found, offset = [], 0
    for name, shape in SHAPES.items():
        numel = math.prod(shape) + PADDING * (len(shape) == 1)
        found.append(Share(name, shape, offset, numel))
        offset += numel
    return tuple(found)


def both(**hyper):
    """Parameters by themselves, and the same ones flat."""
    own = {name: nn.Parameter(gradient(name, 999)) for name in SHAPES}
    whole = nn.Parameter(laid(own.values()))
    flat.lay_out(whole, Layout(shares()))
    return (own, Anon(own.values(), **{**LM, **hyper})), (whole, Anon([whole], **{**LM, **hyper}))


def step(own, separate, whole, together, t):
    for name, p in own.items():
        p.grad = gradient(name, t)
    whole.grad = laid(p.grad for p in own.values())
    separate.step(), together.step()


def assert_same(own, separate, whole, together, exact=True):
    separate.settle(), together.settle()
    bounds = {"rtol": 0, "atol": 0} if exact else {"rtol": 0, "atol": 1e-4}
    torch.testing.assert_close(whole, laid(own.values()), **bounds)
    states, state = [separate.state[p] for p in own.values()], together.state[whole]
    for key in ("exp_avg", "exp_avg_sq"):
        torch.testing.assert_close(state[key], laid(s[key] for s in states), **bounds)
    assert int(state["step"]) == int(states[0]["step"])
    for key in BASIS_KEYS:
        bases = [s[key].reshape(-1) for s in states if key in s]
        assert (key in state) == bool(bases)
        if bases:
            assert state[key].shape == (sum(map(torch.numel, bases)),)
            assert not exact or torch.equal(state[key], torch.cat(bases))


@pytest.mark.parametrize(
    "hyper",
    [
        {"basis": "columns", "basis_block": 16},
        {"basis": "both", "basis_block": 16, "update_clip": 1.0, "gamma": 1.2},
        {"basis": "rows", "basis_block": 6},
        {"basis": "columns", "basis_block": 16, "state_dtype": {"exp_avg_sq": "bfloat16", "precond": "bfloat16"}},
        {"basis": "both", "cautious_decay": True, "fused": False, "max_interval": 3},
    ],
)
def test_the_same_as_each_by_itself(hyper):
    (own, separate), (whole, together) = both(**hyper)
    for t in range(20):
        step(own, separate, whole, together, t)
    assert_same(own, separate, whole, together, exact=hyper["basis"] == "columns")


def test_bases_begin_change_and_end_in_the_middle_of_a_run():
    (own, separate), (whole, together) = both()
    changes = {3: {"basis": "columns", "basis_block": 16}, 8: {"basis": "both"}, 11: {"basis_block": 5}}
    changes |= {14: {"basis": "rows", "gamma": 0.9}, 17: {"basis": None}}
    for t in range(20):
        for optimizer in (separate, together) if t in changes else ():
            optimizer.rebase(**changes[t])
        step(own, separate, whole, together, t)
        assert_same(own, separate, whole, together, exact=t < 8)


def test_an_engine_may_move_the_state_after_a_step():
    """As DeepSpeed's `offload_states` does, while bases wait to be renewed."""
    (own, separate), (whole, together) = both(basis="columns", basis_block=16)
    for t in range(6):
        step(own, separate, whole, together, t)
        for value in together.state[whole].values():
            value.data = value.data.clone()
    assert_same(own, separate, whole, together)


def test_a_state_dict_goes_on_to_the_bit():
    (own, separate), (whole, together) = both(basis="columns", basis_block=16)
    for t in range(7):
        step(own, separate, whole, together, t)
    other = nn.Parameter(whole.detach().clone())
    flat.lay_out(other, Layout(shares()))
    resumed = Anon([other], **LM, basis="columns", basis_block=16)
    resumed.load_state_dict(copy.deepcopy(together.state_dict()))
    for t in range(7, 12):
        step(own, separate, other, resumed, t)
    assert_same(own, separate, other, resumed)
    damaged = copy.deepcopy(together.state_dict())
    damaged["state"][0]["basis_columns"][-1] += 1.0
    with pytest.warns(UserWarning, match=r"basis_columns of parameter 0 \(.*\) is not orthogonal: the file is damaged"):
        resumed.load_state_dict(damaged)
    with pytest.raises(ValueError, match="should be a Tensor"):
        Anon([other], **LM).load_state_dict(
            {
                **(saved := together.state_dict()),
                "param_groups": [
                    {**group, "basis_block": 8, "history": group["history"].replace("16", "8")}
                    for group in saved["param_groups"]
                ],
            }
        )


def test_what_is_cut_within_a_row_is_refused_by_name():
    p = nn.Parameter(torch.zeros(50))
    flat.lay_out(p, Layout((Share("a.weight", (7, 10), 0, 35), Share("b.weight", (3, 10), 35, 15))))
    optimizer = Anon([p], basis="columns")
    with pytest.raises(
        RuntimeError, match=r"the 7 rows of a.weight and 1 more do not divide among 1 ranks. Take basis=None"
    ):
        optimizer.init_state()
    plain = Anon([p])
    p.grad = torch.ones(50)
    plain.step()
    with pytest.raises(RuntimeError, match=r"a\.weight and 1 more"):
        plain.rebase(basis="columns")
    plain.step()
    assert plain.param_groups[0]["basis"] is None
