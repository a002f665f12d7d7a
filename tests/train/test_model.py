"""Shapes, document masks and operation counts."""

import copy

import pytest
import torch
from torch.nn import functional as F

from anon_dist.train.config.parsing import ConfigError, ModelConfig
from anon_dist.train.loss.attach import attach
from anon_dist.train.loss.batch import Batch
from anon_dist.train.model.build import blocks, build_model
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
    with pytest.raises(ConfigError, match=r"longer than the pretrained model's context, 64"):
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
