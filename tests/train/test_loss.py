"""The loss inside the model against plain transformers code: whole logits, torch's cross-entropy, torch's own gradients."""

import copy

import pytest
import torch
import torch.distributed as dist
import transformers as hf
from torch.distributed import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from anon_dist.data.samples.packing import IGNORED
from anon_dist.train.config.parsing import ConfigError
from anon_dist.train.loss import cross_entropy
from anon_dist.train.loss.attach import attach
from anon_dist.train.loss.cross_entropy import Head, summed_loss, token_losses

V, Z = 211, 1e-3
SIZES = {
    "vocab_size": V,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 1,
}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "bos_token_id": 1, "eos_token_id": 1}
PHI = {key: value for key, value in SIZES.items() if key != "head_dim"}
MODELS = {
    "gpt2": lambda: hf.GPT2Config(vocab_size=V, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **GPT2),
    "llama": lambda: hf.LlamaConfig(**SIZES),
    "qwen3, tied": lambda: hf.Qwen3Config(**SIZES, tie_word_embeddings=True),
    "gemma2, capped": lambda: hf.Gemma2Config(**SIZES, final_logit_softcapping=0.3),
    "gemma3, not capped": lambda: hf.Gemma3TextConfig(**SIZES),
    "cohere, multiplied": lambda: hf.CohereConfig(**SIZES, logit_scale=0.3),
    "granite, divided": lambda: hf.GraniteConfig(**SIZES, logits_scaling=0.3),
    "mixtral, balanced": lambda: hf.MixtralConfig(**SIZES, num_local_experts=4, router_aux_loss_coef=0.5),
    "phi, with a bias": lambda: hf.PhiConfig(**PHI, resid_pdrop=0.0),
}


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    monkeypatch.setitem(cross_entropy.PIECE_BYTES, "cpu", 0)
    monkeypatch.setattr(cross_entropy, "FEWEST_ROWS", 20)


def built(config):
    torch.manual_seed(0)
    model = hf.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():  # logits of a size at which caps and squares tell
        for p in model.parameters():
            p += 0.1 * torch.randn_like(p)
    return model.train()


def batch():
    tokens = torch.randint(2, V, (3, 33), generator=torch.Generator().manual_seed(1))
    targets = tokens[:, 1:].clone()
    targets[0, 3:9] = targets[2, -1] = IGNORED
    return tokens[:, :-1], targets


def plain(model, inputs, targets):
    """Cross-entropy of each token, squared logsumexps, load-balancing loss."""
    balanced = {"output_router_logits": True} if hasattr(model, "router_aux_loss_coef") else {}
    output = model(input_ids=inputs, use_cache=False, **balanced)
    logits = output.logits.flatten(0, 1)
    losses = F.cross_entropy(logits, targets.flatten(), reduction="none", ignore_index=IGNORED)
    squares = logits.logsumexp(1).square() * (targets.flatten() != IGNORED)
    return losses, squares, output.aux_loss * (targets != IGNORED).sum() if balanced else torch.zeros(())


@pytest.mark.parametrize("name", MODELS)
def test_losses_and_gradients_are_those_of_plain_code(name):
    model = built(MODELS[name]())
    reference, keys = copy.deepcopy(model), list(model.state_dict())
    inputs, targets = batch()
    losses, squares, balance = plain(reference, inputs, targets)
    total = losses.sum() + Z * squares.sum() + getattr(reference, "router_aux_loss_coef", 0.0) * balance
    (total / 64).backward()

    loss = attach(model, z_loss=Z)
    assert loss.kind == "chunked"
    assert loss.why_whole is None
    sums = model(input_ids=inputs, use_cache=False, targets=targets)
    (sums[0] / 64).backward()
    expected = torch.stack([total, losses.sum(), squares.sum(), balance])
    torch.testing.assert_close(sums, expected.detach(), rtol=1e-6, atol=1e-6)
    for (key, p), q in zip(model.named_parameters(), reference.named_parameters(), strict=True):
        assert (p.grad is None) == (q[1].grad is None), key
        if p.grad is not None:
            torch.testing.assert_close(p.grad, q[1].grad, rtol=1e-4, atol=3e-6 * float(q[1].grad.abs().max()), msg=key)
    each = model(input_ids=inputs, use_cache=False, targets=targets, per_token=True)
    torch.testing.assert_close(each.flatten(), losses.detach(), rtol=1e-6, atol=2e-6)
    assert not each.requires_grad
    assert list(model.state_dict()) == keys
    assert torch.equal(model(input_ids=inputs).logits, reference(input_ids=inputs).logits)


def test_experts_are_balanced_in_shards():
    """FSDP2 gives a model a class of its own, in a module of torch's."""
    model = built(MODELS["mixtral, balanced"]())
    inputs, targets = torch.randint(SIZES["vocab_size"], (2, 2, 8))
    attach(model)
    expected = model(input_ids=inputs, targets=targets)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
        found = model(input_ids=inputs, targets=targets)
    finally:
        dist.destroy_process_group()
    assert expected[3] > 0
    torch.testing.assert_close(found, expected)


def test_a_model_none_of_whose_layers_has_experts_balances_none():
    model = hf.Qwen2MoeForCausalLM(hf.Qwen2MoeConfig(**SIZES, num_experts=4, mlp_only_layers=[0, 1]))
    inputs, targets = torch.randint(SIZES["vocab_size"], (2, 2, 8))
    assert attach(model).balance > 0
    assert model(input_ids=inputs, targets=targets)[3] == 0


def test_models_that_are_not_understood_take_whole_logits():
    sizes = {"vocab_size": V, "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = built(hf.OPTConfig(**sizes, dropout=0.0, word_embed_proj_dim=32, bos_token_id=1, eos_token_id=1))
    reference = copy.deepcopy(model)
    loss = attach(model, z_loss=Z)
    assert loss.kind == "whole"
    assert "OPTForCausalLM" in loss.why_whole
    inputs, targets = batch()
    losses, squares, _ = plain(reference, inputs, targets)
    sums = model(input_ids=inputs, use_cache=False, targets=targets)
    torch.testing.assert_close(sums[0], losses.sum() + Z * squares.sum(), rtol=1e-6, atol=0)
    with pytest.raises(ConfigError, match=r"train.loss is chunked, and OPTForCausalLM .*; set it to auto"):
        attach(copy.deepcopy(reference), "chunked")


class Noisy(hf.LlamaForCausalLM):
    """Does to its logits what no scale and no cap does."""

    def forward(self, *args, **kwargs):
        output = hf.LlamaForCausalLM.forward(self, *args, **kwargs)
        output.logits[..., 7] = -1e4
        return output


def test_a_model_whose_tokens_have_another_name_is_refused():
    class Renamed(hf.LlamaForCausalLM):
        main_input_name = "tokens"

        def forward(self, tokens, **kwargs):
            return super().forward(input_ids=tokens, **kwargs)

    with pytest.raises(ConfigError, match="Renamed takes its tokens as tokens, not as input_ids"):
        attach(Renamed(hf.LlamaConfig(**SIZES)))


def test_what_a_model_does_to_single_logits_is_seen():
    model = Noisy(hf.LlamaConfig(**SIZES))
    assert attach(model).why_whole == "Noisy changes its logits by more than a scale and a soft cap"


def test_the_ways_to_compute_it_agree(monkeypatch):
    inputs, targets = batch()
    found = {}
    for kind in ("chunked", "torch", "whole"):
        if kind == "torch" and not hasattr(F, "linear_cross_entropy"):
            continue
        model = built(MODELS["granite, divided"]())
        assert attach(model, kind).kind == kind
        sums = model(input_ids=inputs, use_cache=False, targets=targets)
        sums[0].backward()
        found[kind] = [sums[0].detach(), *(p.grad for p in model.parameters())]
    for kind, values in found.items():
        for a, b in zip(values, found["whole"], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * float(b.abs().max()), msg=kind)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "liger"}, r"train.loss is liger, whose kernels run on GPUs, and there is none here; set it to auto"),
        ({"kind": "torch", "z_loss": Z}, r"train.loss is torch, which has no z-loss"),
        ({"kind": "torch", "half": True}, r"train.loss is torch, whose loss comes back in half precision"),
    ],
)
def test_what_cannot_be_is_refused(options, message, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(F, "linear_cross_entropy", None, raising=False)  # as if torch had it
    with pytest.raises(ConfigError, match=message):
        attach(built(MODELS["llama"]()), **options)


def test_torch_without_the_function_is_named(monkeypatch):
    monkeypatch.delattr(F, "linear_cross_entropy", raising=False)
    with pytest.raises(ConfigError, match=r"train.loss is torch, which needs torch 2.13"):
        attach(built(MODELS["llama"]()), "torch")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_summed_in_float32(dtype):
    """The loss of what was rounded, to float32's precision; gradients to that of a last rounding, scaled by what would end float16."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(500, 16, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(V, 16, generator=generator).to(dtype).requires_grad_()
    targets = torch.randint(0, V, (500,), generator=generator)
    sums = summed_loss(hidden, weight, None, targets, Head())
    (sums[0] * (2.0**14 / 500)).backward()
    h, w = (t.detach().double().requires_grad_() for t in (hidden, weight))
    expected = F.cross_entropy(h @ w.T, targets, reduction="sum")
    (expected * (2.0**14 / 500)).backward()
    assert sums.dtype == torch.float32
    assert sums[0].item() == pytest.approx(expected.item(), rel=1e-6)
    for grad, exact in ((hidden.grad, h.grad), (weight.grad, w.grad)):
        assert grad.dtype == dtype
        error = (grad.double() - exact).norm() / exact.norm()
        assert error < torch.finfo(dtype).eps, error
    with pytest.raises(RuntimeError, match="has been taken before"):
        sums[0].backward()


def test_the_loss_of_a_hopeless_token_is_exact():
    """Whose probability is none in float32."""
    hidden, weight = torch.eye(4)[:2], torch.tensor([[300.0, 0.0], [0.0, -400.0], [1.0, 1.0]]) @ torch.eye(4)[:2]
    losses = token_losses(hidden, weight, None, torch.tensor([1, 1]), Head())
    torch.testing.assert_close(losses, torch.tensor([300.0, 401.313262]), rtol=1e-6, atol=0)


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that is made."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for t in result if isinstance(result, tuple | list) else (result,):
            self.elements = max(self.elements, t.numel() if isinstance(t, torch.Tensor) else 0)
        return result


def test_whole_logits_are_never_made():
    sizes = {**SIZES, "vocab_size": 4096, "num_hidden_layers": 1}
    tokens = torch.randint(2, V, (8, 65))
    for kind, made in (("chunked", 2 * 20 * 4096), ("whole", 512 * 4096)):
        model = built(hf.LlamaConfig(**sizes))
        attach(model, kind, Z)
        with Largest() as largest:
            model(input_ids=tokens[:, :-1], use_cache=False, targets=tokens[:, 1:])[0].backward()
            model(input_ids=tokens[:, :-1], use_cache=False, targets=tokens[:, 1:], per_token=True)
        assert largest.elements == made, kind
