"""The decay split and overrides by pattern."""

import pytest
import torch
from torch import nn

from anon_dist import Anon
from anon_dist.optim import param_groups


def model():
    net = nn.ModuleDict(
        {"wte": nn.Embedding(5, 4), "ln": nn.LayerNorm(4), "fc": nn.Linear(4, 4), "head": nn.Linear(4, 5, bias=False)}
    )
    net["head"].weight = net["wte"].weight
    net["frozen"] = nn.Linear(2, 2).requires_grad_(False)
    return net


def names(net, group):
    known = {p: n for n, p in net.named_parameters()}
    return sorted(known[p] for p in group["params"])


def test_matrices_are_decayed_and_vectors_are_not():
    net = model()
    decayed, plain = param_groups(net, 0.1)
    assert (decayed["weight_decay"], names(net, decayed)) == (0.1, ["fc.weight", "wte.weight"])
    assert (plain["weight_decay"], names(net, plain)) == (0.0, ["fc.bias", "ln.bias", "ln.weight"])


def test_overrides_by_pattern():
    net = model()
    groups = param_groups(
        net, 0.1, gamma={"wte.*": 0.5, "ln*": 0.0}, overrides={"*.bias": {"lr": 1e-4}}, no_decay=["wte.*"]
    )
    found = {n: {k: v for k, v in g.items() if k != "params"} for g in groups for n in names(net, g)}
    assert found == {
        "wte.weight": {"weight_decay": 0.0, "gamma": 0.5},
        "ln.weight": {"weight_decay": 0.0, "gamma": 0.0},
        "ln.bias": {"weight_decay": 0.0, "gamma": 0.0, "lr": 1e-4},
        "fc.weight": {"weight_decay": 0.1},
        "fc.bias": {"weight_decay": 0.0, "lr": 1e-4},
    }
    optimizer = Anon(groups, lr=0.1, gamma=1.0)
    assert sorted(g["gamma"] for g in optimizer.param_groups) == [0.0, 0.0, 0.5, 1.0, 1.0]
    net["wte"](torch.tensor([1])).sum().backward()
    optimizer.step()


def test_a_pattern_without_a_match_is_an_error():
    with pytest.raises(ValueError, match=r"\['wpe\.\*'\] match no trainable parameter; the names are like wte.weight"):
        param_groups(model(), gamma={"wpe.*": 0.5})
