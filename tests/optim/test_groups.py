"""The decay split and overrides by pattern."""

import re
from pathlib import Path

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


class Named(nn.Module):
    """Embeddings of tokens and of positions, blocks whose matrices have as many rows as there are positions, and a head."""

    def __init__(self):
        super().__init__()
        self.wte, self.wpe = nn.Embedding(11, 4), nn.Embedding(16, 4)
        self.blocks = nn.ModuleList(nn.ModuleDict({"fc": nn.Linear(4, 16), "proj": nn.Linear(16, 4)}) for _ in range(2))
        self.head = nn.Linear(4, 11, bias=False)


MATRICES = [f"blocks.{i}.{name}.weight" for i in (0, 1) for name in ("fc", "proj")]
VECTORS = [name.replace("weight", "bias") for name in MATRICES]


def values(net, groups, key):
    return {n: g.get(key, "-") for g in groups for n in names(net, g)}


def test_rates_and_decay_by_pattern():
    """The first pattern counts, an override more; parameters that differ in nothing are together as before."""
    net = Named()
    groups = param_groups(
        net,
        0.1,
        lr={"w?e.*": 3e-3, "*": 1e-3},
        decay={"*.bias": 0.02, "wte.*": 0.0, "*": 0.1, "w?e.*": 7.0},  # the last two in another order than in lr
        overrides={"head.*": {"lr": 5e-4, "eps": 1e-8}},
    )
    assert values(net, groups, "lr") == {
        **dict.fromkeys(["wte.weight", "wpe.weight"], 3e-3),
        **dict.fromkeys([*MATRICES, *VECTORS], 1e-3),
        "head.weight": 5e-4,
    }
    assert values(net, groups, "weight_decay") == {
        "wte.weight": 0.0,
        **dict.fromkeys(["wpe.weight", *MATRICES, "head.weight"], 0.1),
        **dict.fromkeys(VECTORS, 0.02),
    }
    assert [names(net, g) for g in groups] == [["wte.weight"], ["wpe.weight"], MATRICES, VECTORS, ["head.weight"]]
    with pytest.raises(ValueError, match=r"\['wpx\*'\] match no trainable parameter"):
        param_groups(net, lr={"wpx*": 1e-3})


def test_rows_of_tokens_are_never_turned():
    """Embeddings and the output head, tied to one or not, but no block's matrix, whatever rows it has."""
    net = Named()
    of_tokens = ["wte.weight", "wpe.weight", "head.weight"]
    for tied in (False, True):
        if tied:
            net.head.weight = net.wte.weight
            of_tokens = of_tokens[:-1]
        for basis in ("both", "rows"):
            groups = param_groups(net, basis=basis)
            found = values(net, groups, "basis")
            assert found == {**dict.fromkeys(of_tokens, None), **dict.fromkeys([*MATRICES, *VECTORS], basis)}
            assert sorted(of_tokens) in [sorted(names(net, g)) for g in groups]
    net = Named()
    # As many outputs as there are positions, or tokens, of another width.
    net.pool, net.wide = nn.Linear(9, 16), nn.Linear(9, 11)
    found = values(net, param_groups(net, basis="both"), "basis")
    assert {name for name, basis in found.items() if basis is None} == {"wte.weight", "wpe.weight", "head.weight"}
    net = Named()
    columns = param_groups(net, basis="columns")
    assert [names(net, g) for g in columns] == [
        names(net, g) for g in param_groups(net)
    ]  # so that a run can go over to it
    assert set(values(net, columns, "basis").values()) == {"columns"}
    with pytest.raises(ValueError, match="basis must be None, 'columns', 'rows' or 'both', not 'all'"):
        param_groups(net, basis="all")


def test_embeddings_have_hyperparameters_of_their_own():
    """In the groups that a basis makes, so that a run can take one on or leave it; patterns count for more."""
    net, of_tokens = Named(), ["wte.weight", "wpe.weight", "head.weight"]
    groups = param_groups(net, embeddings={"betas": (0.9, 0.95), "lr": 2e-3}, lr={"wpe*": 1e-3})
    others = dict.fromkeys([*MATRICES, *VECTORS], "-")
    assert values(net, groups, "betas") == {**dict.fromkeys(of_tokens, (0.9, 0.95)), **others}
    assert values(net, groups, "lr") == {"wte.weight": 2e-3, "wpe.weight": 1e-3, "head.weight": 2e-3, **others}
    plain = param_groups(net, embeddings={"betas": (0.9, 0.95)})
    turned = param_groups(net, embeddings={"betas": (0.9, 0.95)}, basis="both")
    assert [names(net, g) for g in plain] == [names(net, g) for g in turned]
    turned = param_groups(net, embeddings={"basis": "columns"}, basis="both")
    for wrong in (0.9, [0.9, 0.95], {"params": [net.wte.weight]}):
        with pytest.raises(TypeError, match="param_groups: embeddings are hyperparameters, such as"):
            param_groups(net, embeddings=wrong)
    with pytest.raises(ValueError, match="and the model has no embeddings"):
        param_groups(nn.Linear(2, 2), embeddings={"lr": 1e-3})
    assert len(param_groups(net, embeddings={})) == len(param_groups(net)) == 2
    others = dict.fromkeys([*MATRICES, *VECTORS], "both")
    assert values(net, turned, "basis") == {**dict.fromkeys(of_tokens, "columns"), **others}


def test_a_wrapped_model_has_the_groups_that_it_has_alone():
    """BERT's transform has as many outputs as there are positions, and lies in no numbered block."""
    from transformers import BertConfig, BertForMaskedLM

    shape = BertConfig(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
    )
    net = BertForMaskedLM(shape)
    wrapped = nn.Module()
    wrapped.module = net
    groups = [param_groups(m, basis="both") for m in (net, wrapped)]
    known = {p: n for n, p in net.named_parameters()}
    alone, within = ([sorted(known[p] for p in g["params"]) for g in found] for found in groups)
    assert alone == within
    dense = "cls.predictions.transform.dense.weight"
    assert [g["basis"] for g, members in zip(groups[0], alone, strict=True) if dense in members] == ["both"]


def test_the_head_of_a_transformers_model():
    from transformers import GPT2Config, GPT2LMHeadModel

    shape = GPT2Config(n_layer=1, n_embd=4, n_head=1, n_positions=16, vocab_size=16, tie_word_embeddings=False)
    net = GPT2LMHeadModel(shape)
    optimizer = Anon(param_groups(net, basis="both"), basis_block=8)
    optimizer.init_state()
    known = dict(net.named_parameters())
    sides = {
        n: sorted(k for k in optimizer.state[p] if k.startswith("basis")) for n, p in known.items() if p.dim() == 2
    }
    assert {n for n, found in sides.items() if found == []} == {
        "transformer.wte.weight",
        "transformer.wpe.weight",
        "lm_head.weight",
    }
    assert {n for n, found in sides.items() if found == ["basis_columns", "basis_rows"]} == {
        f"transformer.h.0.{name}.weight" for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    }


def test_the_bases_of_the_readme():
    """Its line for all engines, and the param groups that it has for one GPU."""
    text = (Path(__file__).parents[2] / "README.md").read_text()
    anon = {"lr": 1e-3, "betas": (0.9, 0.95)}
    exec(re.search(r"^Their basis: `(anon \|= \{.*\})`", text, re.MULTILINE).group(1))
    net = nn.Sequential(nn.Embedding(64, 8), nn.Linear(8, 8))
    assert Anon(param_groups(net), **anon).param_groups[0]["basis"] == "columns"
    groups = eval(
        re.search(r"`(param_groups\(model, .*\))` gains", text).group(1), {"param_groups": param_groups, "model": net}
    )
    found = [(g["basis"], g["betas"], g["beta3"]) for g in Anon(groups, beta3=0.93, **anon).param_groups]
    assert found == [(None, (0.9, 0.95), 0.97), ("both", (0.95, 0.95), 0.93), ("both", (0.95, 0.95), 0.93)]
