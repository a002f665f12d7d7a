"""Shapes, document masks and operation counts."""

import copy
import dataclasses
import json

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F
from torch.testing._internal.distributed.fake_pg import FakeStore

from anon_dist.engines.padding import padding_of
from anon_dist.train.config.parsing import ConfigError, ModelConfig
from anon_dist.train.introduction import padding_remarks
from anon_dist.train.loss.attach import attach, unbalanced
from anon_dist.train.loss.batch import Batch
from anon_dist.train.model.build import blocks, build_model, plan_model
from anon_dist.train.model.flops import flops_per_token, peak_of

EOD = 0


def small(**changes):
    torch.manual_seed(0)
    return build_model(ModelConfig(**{"layers": 2, "width": 32, "heads": 4, "context": 64, **changes}), 100, EOD, 64)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("tie", [True, False])
def test_shapes(family, tie):
    model = small(family=family, tie_embeddings=tie)
    assert model.get_input_embeddings().num_embeddings == 128
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tie
    assert len(blocks(model)) == 2
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert model.training


BORDERS = ((0, 0, 11), (0, 11, 31), (0, 31, 48), (1, 0, 1), (1, 1, 48))


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_masked_documents_do_not_see_each_other(family, attention):
    """Each document in a sequence has the losses and the gradients that it has alone, at positions that begin with it."""
    model = small(family=family, attention=attention)
    alone = copy.deepcopy(model)
    attach(model)
    model.activation_checkpointing_enable({"use_reentrant": False})  # which attends once more, in the backward pass
    tokens = torch.randint(1, 100, (2, 49), generator=torch.Generator().manual_seed(1))
    tokens[0, 10] = tokens[0, 30] = tokens[1, 0] = EOD
    batch = Batch.of(tokens, EOD)
    losses = batch.losses(model, torch.device("cpu"), per_token=True)
    expected = []
    for row, start, end in BORDERS:
        logits = alone(input_ids=tokens[row : row + 1, start:end]).logits[0]
        expected.append(F.cross_entropy(logits, tokens[row, start + 1 : end + 1], reduction="none"))
    torch.testing.assert_close(losses.flatten(), torch.cat(expected).detach(), rtol=1e-5, atol=1e-5)
    batch.losses(model, torch.device("cpu"))[0].backward()
    torch.cat(expected).sum().backward()
    for (name, p), q in zip(model.named_parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-5 * float(q.grad.abs().max()), msg=name)


def test_operations_per_token_are_those_that_torch_counts():
    from torch.utils.flop_counter import FlopCounterMode

    model = small(family="llama", tie_embeddings=False, attention="eager")
    tokens = torch.randint(1, 100, (1, 64))
    with FlopCounterMode(display=False) as counter:
        model(input_ids=tokens).logits.sum().backward()
    # The formula counts all of attention's products, forward and backward; so does the counter (eager attention is not causal). It
    # leaves out norms and the softmax, which are not products.
    assert counter.get_total_flops() / 64 == pytest.approx(flops_per_token(model, 64), rel=0.1)


def test_starting_from_a_pretrained_model(tmp_path):
    small().save_pretrained(tmp_path / "m")
    model = build_model(ModelConfig(from_pretrained=str(tmp_path / "m")), 100, EOD, 64)
    for a, b in zip(model.parameters(), small().parameters(), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(ConfigError, match=r"has 128 embeddings and the data 200 tokens"):
        build_model(ModelConfig(from_pretrained=str(tmp_path / "m")), 200, EOD, 64)
    with pytest.raises(
        ConfigError, match=r"longer than the context of model\.from_pretrained = \S+, n_positions = 64; lower it"
    ):
        build_model(ModelConfig(from_pretrained=str(tmp_path / "m")), 100, EOD, 65)
    path = tmp_path / "m" / "config.json"
    path.write_text(path.read_text().replace('"n_positions": 64', '"n_positions": 128'))
    with pytest.raises(
        ConfigError,
        match=r"wpe\.weight has shape \(64, \d+\) in model\.safetensors, and by config\.json \(128",
    ):
        build_model(ModelConfig(from_pretrained=str(tmp_path / "m")), 100, EOD, 65)
    with pytest.raises(ConfigError, match=r"model.from_pretrained = .*nowhere"):
        build_model(ModelConfig(from_pretrained=str(tmp_path / "nowhere")), 100, EOD, 64)


@pytest.mark.parametrize(
    ("name", "teraflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H200", 989),
        ("NVIDIA H200 NVL", 835),
        ("NVIDIA GH200 480GB", 989),
        ("NVIDIA B200", 2250),
        ("NVIDIA GB200", 2500),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA L40S", 362),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA GeForce RTX 5090", 209.5),
        ("AMD Instinct MI300X", 1307.4),
        ("NVIDIA GeForce GTX 1080", None),
    ],
)
def test_a_devices_peak_is_its_data_sheets_without_sparsity(name, teraflops):
    assert peak_of(name) == (None if teraflops is None else pytest.approx(teraflops * 1e12))


EXPERTS = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
    "num_experts_per_tok": 2,
    "n_routed_experts": 4,
    "num_local_experts": 4,
    "num_experts": 4,
}
LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
DEEPSEEK = {"n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, **LATENT}


def of_file(tmp_path, kind, **values):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"model_type": kind, **values}))
    return plan_model(ModelConfig(config=str(path)), 100, EOD, 64, seed=0).model


@pytest.mark.parametrize(
    ("kind", "values", "why"),
    [
        (
            "deepseek_v3",
            DEEPSEEK,
            "no load-balancing loss, and the bias of its routers (model.layers.1.mlp.gate.e_score",
        ),
        ("hunyuan_v1_moe", {"head_dim": 8}, "its code in transformers has no load-balancing loss. A few"),
        (
            "mixtral",
            {"router_aux_loss_coef": 0.0},
            "the weight of its load-balancing loss (router_aux_loss_coef) is 0. A",
        ),
        ("deepseek_v3", {**DEEPSEEK, "first_k_dense_replace": 2}, None),
        ("mixtral", {}, None),
        ("qwen3_moe", {"head_dim": 8}, None),
        ("llama", {}, None),
    ],
)
def test_experts_that_nothing_balances_are_told_of(kind, values, why, tmp_path):
    model = of_file(tmp_path, kind, **EXPERTS, **values)
    said = unbalanced(model, attach(model))
    assert (said is None) == (why is None)
    assert said is None or said.startswith(f"{kind}: nothing balances its 4 experts: ")
    assert (why or "") in (said or "")


def test_a_model_that_must_have_a_padding_token_gets_one_that_no_text_has(tmp_path):
    """Also where the data's vocabulary leaves no row free."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"model_type": "modernbert-decoder", "max_position_embeddings": 64, **sizes}))
    for tokens, rows in ((100, 128), (128, 192)):
        model = build_model(ModelConfig(config=str(config)), tokens, EOD, 64, seed=0)
        assert model.config.vocab_size == model.get_input_embeddings().num_embeddings == rows
        assert model.config.pad_token_id == rows - 1 >= tokens
        assert (model.config.bos_token_id, model.config.eos_token_id) == (EOD, EOD)
        loss = model(input_ids=torch.arange(64)[None], labels=torch.arange(64)[None]).loss
        assert loss.isfinite()


@pytest.fixture
def eight_ranks():
    """As rank 0 of them sees it, with nobody to talk to."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=8)
    yield init_device_mesh("cpu", (8,))
    dist.destroy_process_group()


def test_what_fsdp2_pads_is_told_by_its_share(eight_ranks):
    """Against what FSDP2 itself has allocated for each rank: experts that are fewer than ranks are mostly padding."""
    model = small(family="mixtral", experts=3)
    units = (*blocks(model), model)
    for unit in units:
        fully_shard(unit, mesh=eight_ranks)
    groups = [unit._get_fsdp_state()._fsdp_param_group for unit in units]
    moved = sum(8 * p._sharded_param_data.numel() for group in groups for p in group.fsdp_params)
    found = padding_of(model)
    assert found.share == pytest.approx(1 - sum(p.numel() for p in model.parameters()) / moved)
    assert (found.name.partition(".mlp.")[2], found.shape[0], found.ranks) == ("experts.gate_up_proj", 3, 8)
    (line,) = padding_remarks(found)
    assert line.startswith(f"WARNING: {found.share:.0%} of what the ranks gather in a step is padding: ")
    assert padding_remarks(dataclasses.replace(found, share=0.09)) == []
    assert padding_of(small(family="mixtral", experts=3)) is None
