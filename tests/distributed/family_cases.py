"""Models of every family under FSDP2, tensor and context parallelism: the bits that one process begins with, and its gradients."""

import ctypes
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from helpers import forget_accelerate
from launch_cases import raises
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

from anon_dist.engines.errors import EngineError
from anon_dist.engines.start import Wanted, start, wrap
from anon_dist.optim import Anon, param_groups
from anon_dist.train.config.parsing import ModelConfig
from anon_dist.train.loss.attach import attach
from anon_dist.train.loss.batch import mean_loss
from anon_dist.train.model.build import build_model, plan_model

LENGTH, VOCABULARY = 32, 100
SIZES = {"layers": 2, "width": 32, "heads": 4, "context": LENGTH}
FAMILIES = {
    "gpt2": {},
    "llama": {"kv_heads": 2, "head_dim": 6},
    "qwen3": {"kv_heads": 2, "head_dim": 16, "tie_embeddings": False},
    "gemma3": {"kv_heads": 2, "window": 8, "layers": 7},
    "olmo2": {"kv_heads": 2},
    "mixtral": {"kv_heads": 2, "experts": 3},
}


def full(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def batch_of(rows):
    return torch.randint(0, VOCABULARY, (rows, LENGTH + 1), generator=torch.Generator().manual_seed(3))


def plain_gradients(model, batch):
    """Of transformers' own model with these weights, over the whole batch."""
    plain = AutoModelForCausalLM.from_config(model.config, attn_implementation="eager")
    plain.load_state_dict(model.state_dict())
    logits = plain(input_ids=batch[:, :-1], use_cache=False).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten())
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in plain.named_parameters()}


def engine_of(planned, tensor=1, context=1, engine="fsdp2", precision="fp32", **changes):
    """The engine over a model that no rank has had whole, and what a rank makes of a batch."""
    from anon_dist.engines.context import ContextParallel

    forget_accelerate()
    wanted = Wanted(
        engine,
        precision,
        timedelta(minutes=1),
        2,
        lambda ranks: 1,
        None,
        tensor_parallel=tensor,
        context_parallel=context,
        **changes,
    )
    accelerator, name = start(wanted)
    planned.model.router_aux_loss_coef = (
        0.0  # a product of means over the tokens of a rank, and so another for each number of ranks
    )
    attach(planned.model)
    shared = ContextParallel(context, accelerator.device) if context > 1 else None
    if shared is not None:
        shared.attach(planned.model)
    optimizer = Anon(param_groups(planned.model, 0.1), lr=1e-3, stochastic_rounding=precision == "bf16-true")
    made = wrap(name, accelerator, planned.model, optimizer, tensor, weights=planned.weights)
    return made, shared


def case_every_family_has_the_bits_and_gradients_of_plain_transformers():
    for family in FAMILIES:
        others = ("hsdp", "ddp", "fsdp1") if family in ("gpt2", "mixtral") else ()
        layouts = [{"engine": engine} for engine in ("fsdp2", *others)]
        layouts += [{"tensor": 2}] * (family in ("llama", "qwen3", "gemma3"))
        layouts += [{"context": 2}] * (family not in ("gemma3",))
        check_family(family, *layouts)


def check_family(family, *layouts):
    """Under each of the layouts, arguments of `engine_of`."""
    ranks, rank = dist.get_world_size(), dist.get_rank()
    config = ModelConfig(family=family, **{**SIZES, **FAMILIES[family]})
    whole = build_model(config, VOCABULARY, 0, LENGTH, seed=5)
    parameters, batch = {name: p.detach() for name, p in whole.named_parameters()}, batch_of(2 * ranks)
    loss, expected = plain_gradients(whole, batch)
    for layout in layouts:
        engine, shared = engine_of(plan_model(config, VOCABULARY, 0, LENGTH, seed=5), **layout)
        where = (family, layout)
        flat = layout.get("engine") == "fsdp1"  # whose parameters are parts that have lost their shapes
        for name, p in {} if flat else dict(engine.model.named_parameters()).items():
            assert torch.equal(full(p.detach()), parameters[name.removeprefix("module.")]), (where, name)
        for name, value in engine.full_weights().items() if flat else ():
            assert name not in parameters or torch.equal(value, parameters[name]), (where, name)
        alike = layout.get("tensor", layout.get("context", 1))
        own = batch.chunk(ranks // alike)[rank // alike]
        found = mean_loss(engine.model, own if shared is None else shared.pieces(own))
        engine.backward(found, last=True)
        mean = found.detach().clone()
        dist.all_reduce(mean)
        torch.testing.assert_close(mean / ranks, loss, rtol=2e-6, atol=0)
        norm = torch.stack([grad.square().sum() for grad in expected.values()]).sum().sqrt()
        for name, p in {} if flat else dict(engine.model.named_parameters()).items():
            plain = name.removeprefix("module.")
            apart = (full(p.grad) - expected[plain]).abs().max()
            assert apart <= 2e-6 + 2e-5 * expected[plain].abs().max(), (where, plain, apart)
        torch.testing.assert_close(engine.step(1e-3, None).float(), norm, rtol=1e-5, atol=0)


def status(key):
    """MiB of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{key}:"))


def peak_begins():
    """MiB that this process has now; from here on its peak is counted."""
    ctypes.CDLL(None).malloc_trim(0)  # what is free counts too, and would hide what is taken from it
    Path("/proc/self/clear_refs").write_text("5")
    return status("VmRSS")


def case_no_rank_ever_has_a_whole_model():
    """The peak of resident memory is what the rank keeps, and far from the half more that the whole parameters would be."""
    config = ModelConfig(family="qwen3", layers=8, width=512, heads=8, kv_heads=4, hidden=2048, context=LENGTH)
    engine_of(plan_model(ModelConfig(**SIZES), VOCABULARY, 0, LENGTH, seed=1))  # libraries that are loaded late
    for tied in (True, False):
        config.tie_embeddings = tied
        planned = plan_model(config, 32000, 0, LENGTH, seed=1)
        whole = 4 * sum(p.numel() for p in planned.model.parameters()) / 2**20
        before = peak_begins()
        engine, _ = engine_of(planned)
        kept = whole / dist.get_world_size() + engine.state_bytes().local / 2**20
        grown = status("VmHWM") - before
        assert 0.9 * kept < grown < kept + 0.15 * whole, (tied, whole, kept, grown)


def case_an_export_takes_one_copy_of_the_weights():
    """In float32, of parameters in bfloat16, on the first rank; besides there is never more than one parameter whole, on no rank."""
    config = ModelConfig(family="qwen3", layers=8, width=512, heads=8, kv_heads=4, hidden=2048, context=LENGTH)
    planned = plan_model(config, 8000, 0, LENGTH, seed=1)
    planned.model.to(torch.bfloat16)
    whole = 4 * sum(p.numel() for p in planned.model.parameters()) / 2**20
    engine, _ = engine_of(planned, precision="bf16-true")
    before = peak_begins()
    weights = engine.full_weights()
    grown, first = status("VmHWM") - before, dist.get_rank() == 0
    assert grown < first * whole + 0.6 * whole, (whole, grown)
    assert sum(w.nbytes for w in weights.values()) == first * whole * 2**20


def case_what_sharing_sequences_cannot_do_is_refused():
    for config, words in (
        (ModelConfig(family="gemma3", **SIZES, window=8), "layers attend to everything before"),
        (ModelConfig(**SIZES, dropout=0.1), "no dropout of attention"),
    ):
        planned = plan_model(config, VOCABULARY, 0, LENGTH, seed=0)
        raises(EngineError, words, lambda planned=planned: engine_of(planned, context=2))
    planned = plan_model(ModelConfig(**SIZES), VOCABULARY, 0, LENGTH, seed=0)
    raises(EngineError, "needs engine fsdp2 or hsdp, here ddp", lambda: engine_of(planned, context=2, engine="ddp"))
    raises(EngineError, "and a multiple of 3 ranks", lambda: engine_of(planned, context=3))
