"""Initial weights: those of the model's own code, and the same bits however they are cut."""

import json

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaPreTrainedModel

from anon_dist.checkpoint.schema import WEIGHT, Key
from anon_dist.train.config.parsing import ConfigError, ModelConfig
from anon_dist.train.model import initial
from anon_dist.train.model.build import build_model, plan_model
from anon_dist.train.model.initial import BLOCK, initial_weights

FAMILIES = ("gpt2", "llama", "qwen3", "gemma3", "olmo2", "mixtral")
SIZES = {"layers": 2, "width": 64, "heads": 4, "context": 32}


def sizes(family, **changes):
    own = {"mixtral": {"experts": 3}, "gemma3": {"window": 8}}.get(family, {})
    return ModelConfig(family=family, **{**SIZES, **own, **changes})


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_are_distributed_as_the_models_own_code_draws_them(family):
    model = build_model(sizes(family), 1000, 0, 32, seed=3)
    torch.manual_seed(1)
    theirs = AutoModelForCausalLM.from_config(model.config)
    for (name, p), q in zip(model.named_parameters(), theirs.parameters(), strict=True):
        assert p.std().item() == pytest.approx(q.std().item(), rel=max(0.03, 6 / q.numel() ** 0.5)), name
        assert abs(p.mean() - q.mean()) <= 6 * q.std() * (2 / q.numel()) ** 0.5, name
        kurtosis = [((x - x.mean()) ** 4).mean() / x.var() ** 2 if x.std() else torch.zeros(()) for x in (p, q)]
        assert abs(kurtosis[0] - kurtosis[1]) < 0.3 or p.numel() < 5000, name
    for (name, buffer), other in zip(model.named_buffers(), theirs.buffers(), strict=True):
        assert torch.equal(buffer, other), name
    # Nothing is left of meta tensors: it computes what transformers' own model computes with these weights.
    theirs.load_state_dict(model.state_dict())
    tokens = torch.arange(32)[None]
    assert torch.equal(model(input_ids=tokens).logits, theirs(input_ids=tokens, use_cache=False).logits)


def test_any_range_has_the_bits_of_the_whole():
    planned = plan_model(sizes("gpt2", width=96), 3000, 0, 32, seed=5)
    key = Key("transformer.wte.weight", WEIGHT)
    whole = planned.weights.read(key, 0, planned.weights.tensors[key].numel)
    assert len(whole) > 2 * BLOCK
    for start, stop in ((0, 1), (BLOCK - 1, BLOCK + 1), (BLOCK, 2 * BLOCK), (7, len(whole)), (70_000, 70_001), (5, 5)):
        assert torch.equal(planned.weights.read(key, start, stop), whole[start:stop])
    # No two blocks are the same, in one parameter or two, nor those of another seed.
    other = plan_model(sizes("gpt2", width=96), 3000, 0, 32, seed=6).weights
    blocks = [w.read(k, 0, 100) for w in (planned.weights, other) for k in w.tensors if len(w.tensors[k].shape) == 2]
    blocks += [whole[BLOCK : BLOCK + 100], whole[2 * BLOCK : 2 * BLOCK + 100]]
    # (Scaled, since residual projections have another deviation.)
    assert len({tuple((x / x.std()).mul(1e3).round().tolist()) for x in blocks}) == len(blocks)
    assert torch.equal(
        planned.weights.read(key, 0, 9),
        plan_model(sizes("gpt2", width=96), 3000, 0, 32, seed=5).weights.read(key, 0, 9),
    )


def test_every_function_of_torchs_has_its_moments():
    """Against torch's own, on one shape; and a row set to zero, as that of a padding token is."""
    torch.manual_seed(0)
    for name, args in (
        ("normal_", (0.5, 2.0)),
        ("uniform_", (-3.0, 1.0)),
        ("trunc_normal_", (0.2, 1.0, -1.0, 2.0)),
        ("trunc_normal_", (0.0, 1.0, 1.0, 1.5)),
        ("xavier_normal_", (1.5,)),
        ("xavier_uniform_", ()),
        ("kaiming_normal_", ()),
        ("kaiming_uniform_", (5**0.5,)),
        ("kaiming_normal_", (0.0, "fan_out", "relu")),
    ):
        draw = initial._MEANING[name](torch.empty(300, 200, device="meta"), *args)
        ours = draw(torch.empty(60_000), torch.Generator().manual_seed(1))
        theirs = getattr(nn.init, name)(torch.empty(300, 200), *args).flatten()
        shares = torch.linspace(0, 1, 21)
        if not name.startswith("trunc") and "normal" in name:
            shares = shares[1:-1]  # which has no ends
        apart = (ours.quantile(shares) - theirs.quantile(shares)).abs().max()
        assert apart < 0.04 * theirs.std(), (name, args)


def test_a_padding_tokens_row_is_zero(tmp_path):
    values = {
        "model_type": "llama",
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
    }
    (tmp_path / "config.json").write_text(json.dumps(values | {"pad_token_id": 3, "vocab_size": 7}))
    planned = plan_model(ModelConfig(config=str(tmp_path / "config.json")), 10, 0, 32, seed=0)
    planned.model.model.embed_tokens.padding_idx = 3
    weights = initial_weights(planned.model, 0)
    table = weights.read(Key("model.embed_tokens.weight", WEIGHT), 0, 64 * 16).view(64, 16)
    assert table[3].eq(0).all()
    assert table[[2, 4]].ne(0).all()


def test_what_cannot_be_drawn_in_parts_is_refused(monkeypatch):
    model = plan_model(sizes("llama"), 100, 0, 32, seed=0).model
    with torch.device("meta"):
        without_buffers = AutoModelForCausalLM.from_config(model.config)

    def orthogonal(self, module):
        if isinstance(module, nn.Linear):
            nn.init.orthogonal_(module.weight)

    monkeypatch.setattr(LlamaPreTrainedModel, "_init_weights", orthogonal)
    with pytest.raises(ConfigError, match=r"model\.layers\.0\.self_attn\.q_proj\.weight is initialised by orthogonal_"):
        initial_weights(model, 0)
    monkeypatch.setattr(LlamaPreTrainedModel, "_init_weights", lambda self, module: None)
    with pytest.raises(ConfigError, match=r"does not say how model\.embed_tokens\.weight is initialised"):
        initial_weights(model, 0)
    with pytest.raises(ConfigError, match=r"does not set its buffer model\.rotary_emb\.inv_freq"):
        initial_weights(without_buffers, 0)


def test_a_config_json_is_any_model_of_transformers(tmp_path):
    """Its sizes, with the vocabulary of the data; what is no causal model, or needs what the training has not, is refused."""
    path = tmp_path / "config.json"
    values = {"model_type": "phi3", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    values |= {"num_key_value_heads": 2, "intermediate_size": 48, "max_position_embeddings": 64, "vocab_size": 9}
    path.write_text(json.dumps(values))
    model = build_model(ModelConfig(config=str(path)), 100, 5, 64, seed=0)
    assert (type(model).__name__, model.config.vocab_size, model.config.eos_token_id) == ("Phi3ForCausalLM", 128, 5)
    assert model(input_ids=torch.arange(10)[None]).logits.isfinite().all()
    for change, seq_len, words in (
        (
            {},
            65,
            r"data\.seq_len = 65 is longer than the context of model\.config = \S+, max_position_embeddings = 64; lower it, or raise",
        ),
        (
            {"model_type": "mpt", "max_seq_len": 48, "max_position_embeddings": None},
            64,
            "max_seq_len = 48; lower it, or raise max_seq_len",
        ),
        ({"model_type": "bert"}, 64, r"config\.json: model_type 'bert' is no causal language model"),
        ({"model_type": None}, 64, "model_type None is no causal"),
        ({"auto_map": {}}, 64, "brings code of its own"),
        ({"hidden_size": "x"}, 64, r"config\.json: "),
    ):
        path.write_text(json.dumps(values | change))
        with pytest.raises(ConfigError, match=words):
            build_model(ModelConfig(config=str(path)), 100, 5, seq_len, seed=0)
    path.write_text("[1]")
    with pytest.raises(ConfigError, match="expected a JSON object, found list"):
        build_model(ModelConfig(config=str(path)), 100, 5, 64, seed=0)
