"""The table: every engine against one process. `test_table.py` launches it on 2 and on 4 ranks, and each row is a test.

Rows of two kinds. "bits": all ranks get the same gradients, whose mean is exact, so parameters and states must be those of one process
to the last bit, wherever the shards are cut. "training": gradients differ and are averaged, in another order than one process adds them
up, so that float32 rounding differs; γ = −1, 0.5 and 1 would show a wrong scale of the gradient, which Adam's invariance hides.
"""

import itertools
import os
import sys
from datetime import timedelta
from functools import cache, partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parents[1]))
from family_cases import check_family
from helpers import forget_accelerate
from launch_cases import raises, run_cases
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode

from anon_dist import Anon
from anon_dist.engines.errors import EngineError
from anon_dist.engines.start import Wanted, start, wrap
from anon_dist.optim import STATE_KEYS, param_groups
from anon_dist.train.config import parsing as c
from anon_dist.train.loss import cross_entropy
from anon_dist.train.loss.attach import attach
from anon_dist.train.loss.batch import mean_loss
from anon_dist.train.model.build import build_model

CONFIGS = Path(__file__).parents[2] / "configs" / "deepspeed"
TORCH = ("ddp", "zero1", "fsdp2", "hsdp", "fsdp1")
DEEPSPEED = ("zero0", "zero1-deepspeed", "zero2", "zero3")
OFFLOAD = ("zero2-offload", "zero3-offload", "zero3-offload-params")
FLATTENS = ("fsdp1", *DEEPSPEED, *OFFLOAD)
"""Engines that flatten parameters, or fill in what is missing: a parameter without gradient sees zeros there."""
STEPS = 24
LM = {"betas": (0.9, 0.95), "beta3": 0.8, "weight_decay": 0.1}
HYPER = {
    "paper": {},
    "language": {"refresh_ratio": 1.1, "update_clip": 1.0, "window": "auto"},
    "half": {"gamma": 0.5, "refresh_ratio": 1.5, "window": 3},
    "negative": {"gamma": -1.0, "hold_silent": True, "refresh_ratio": 1.1},
    "gamma schedule": {"gamma": 0.4, "refresh_ratio": 1.5},
    "compact": {"state_dtype": "bfloat16", "refresh_ratio": 1.1},
}
Z_LOSS, END = 1e-3, 0
cross_entropy.PIECE_BYTES["cpu"], cross_entropy.FEWEST_ROWS = 0, 20  # tokens at a time
MODELS = ("plain", "frozen and tied", "gradients missing")


def pairwise(*factors):
    """Rows in which every pair of values of two factors is together at least once; greedily, and always the same."""
    columns = list(itertools.combinations(range(len(factors)), 2))
    left = {(i, j, a, b) for i, j in columns for a in factors[i] for b in factors[j]}
    rows, candidates = [], list(itertools.product(*factors))
    while left:
        best = max(candidates, key=lambda row: sum((i, j, row[i], row[j]) in left for i, j in columns))
        rows.append(best)
        left -= {(i, j, best[i], best[j]) for i, j in columns}
    return rows


@cache
def rows(complete):
    """(kind, engine, …, ranks) → name of the row."""
    bits = (TORCH + DEEPSPEED + OFFLOAD, tuple(HYPER), MODELS, (1, 2), (2, 4))
    training = ((*TORCH, "fsdp2+tp", *DEEPSPEED, *OFFLOAD), (-1.0, 0.5, 1.0), (2, 4))
    choose = itertools.product if complete else pairwise
    found = [("bits", *row) for row in choose(*bits)] + [("training", *row) for row in choose(*training)]
    found.append(("bits", "fsdp2", "gamma schedule", "gradients missing", 1, 2))  # parameters that are behind
    found += [
        ("bytes and collectives", engine, ranks)
        for engine in (*TORCH, "fsdp2+tp", *DEEPSPEED, *OFFLOAD)
        for ranks in (2, 4)
    ]
    found += [("shared sequences", "fsdp2", 4, 4), ("shared sequences", "hsdp", 2, 4)]
    return {", ".join(map(str, row)): row for row in found if row[1] != "hsdp" or row[-1] == 4}


# -- models -----------------------------------------------------------------------------------------------------------


class Values(nn.Module):
    """Parameters, and a loss whose gradient for each is one that a seed gives."""

    def __init__(self, **shapes):
        super().__init__()
        for name, shape in shapes.items():
            setattr(self, name, nn.Parameter(torch.randn(shape, generator=seeded(name, 0))))

    def forward(self, t, skip=()):
        terms = [
            (p * torch.randn(p.shape, generator=seeded(name, t + 1))).sum()
            for name, p in self.named_parameters(recurse=False)
            if name not in skip
        ]
        return torch.stack(terms).sum()


class Part(Values):
    """A unit of sharding."""


class Bag(nn.Module):
    """Odd sizes, a single element, on some rank an empty shard; and what a row asks for."""

    _no_split_modules = ("Part",)

    def __init__(self, variant):
        super().__init__()
        self.missing = variant == "gradients missing"
        self.first = Part(square=(63, 63), one=(1,), row=(1, 7))
        self.second = Part(vector=(128,), cube=(3, 4, 5), long=(1001,))
        self.leaf, self.twin = Values(shared=(9, 5)), Values(shared=(9, 5), own=(3,))
        if variant == "frozen and tied":
            self.twin.shared = self.leaf.shared
            self.first.square.requires_grad_(False)

    def forward(self, t):
        skip = ("vector", "one") if self.missing and t % 3 == 0 else ()
        return self.first(t, skip) + self.second(t, skip) + self.leaf(t) + self.twin(-t)


def seeded(name, t):
    return torch.Generator().manual_seed(1000 * sum(map(ord, name)) + 100 + t)


def transformer():
    """A Llama, with tied embeddings and a frozen norm. (GPT-2's key biases have a gradient of 0 but for rounding: what becomes of them is
    noise on any engine.)"""
    torch.manual_seed(0)
    model = build_model(c.ModelConfig(family="llama", layers=2, width=64, heads=4, kv_heads=2, context=32), 100, 0, 32)
    model.model.layers[0].input_layernorm.weight.requires_grad_(False)
    return model


# -- engines ----------------------------------------------------------------------------------------------------------


def launch(engine, model, optimizer, accumulation=1):
    """The engine, as the training loop brings it up."""
    forget_accelerate()
    deepspeed = CONFIGS / f"{engine.removesuffix('-deepspeed')}.json" if engine in DEEPSPEED + OFFLOAD else None
    wanted = Wanted(
        "deepspeed" if deepspeed else engine.removesuffix("+tp"),
        "fp32",
        timedelta(minutes=1),
        micro_batch=2,
        accumulation=lambda ranks: accumulation,
        clip=None,
        shard_ranks=2 if engine == "hsdp" else None,
        tensor_parallel=2 if engine == "fsdp2+tp" else None,
        deepspeed_config=str(deepspeed) if deepspeed else None,
    )
    accelerator, name = start(wanted)
    if engine in ("ddp", "zero1"):
        from accelerate import DistributedDataParallelKwargs

        accelerator.ddp_handler = DistributedDataParallelKwargs(find_unused_parameters=True)
    return wrap(name, accelerator, model, optimizer, wanted.tensor_parallel or 1)


def unsharded(engine, name):
    """Parameter name → its value and its states, whole; of ZeroRedundancyOptimizer's, those that this rank keeps."""
    found = {}
    if name in DEEPSPEED + OFFLOAD:
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        for key, p in engine.model.module.named_parameters():
            if p.requires_grad and name == "zero0":
                found[key] = {"value": p.detach(), **engine.optimizer.state[p]}
            elif p.requires_grad:
                values = {k: safe_get_full_optimizer_state(p, k) for k in STATE_KEYS[1:]}
                found[key] = {"value": safe_get_full_fp32_param(p), **values}
                found[key] = {k: v.view(getattr(p, "ds_shape", p.shape)) for k, v in found[key].items()}
        return found
    if name == "fsdp1":
        states = get_optimizer_state_dict(
            engine.model, engine.optimizer, options=StateDictOptions(full_state_dict=True)
        )["state"]
        from torch.distributed.fsdp import FullyShardedDataParallel

        with FullyShardedDataParallel.summon_full_params(engine.model, writeback=False):
            values = {
                k.replace("_fsdp_wrapped_module.", ""): p.detach().clone() for k, p in engine.model.named_parameters()
            }
        return {k: {"value": values[k], **s} for k, s in states.items()}
    for key, p in engine.model.named_parameters():
        if p in engine.optimizer.state:
            values = {"value": p.detach(), **engine.optimizer.state[p]}
            found[key.removeprefix("module.")] = {
                k: v.full_tensor() if isinstance(v, DTensor) else v for k, v in values.items()
            }
    return found


def check_all_are_there(found, reference, name):
    """Every parameter that the reference trains, on this rank; under zero1, on exactly one."""
    trained = {k for k, p in reference.named_parameters() if p.requires_grad}
    if name != "zero1":
        assert set(found) == trained, set(found) ^ trained
        return
    count = torch.tensor(len(found))
    dist.all_reduce(count)
    assert set(found) <= trained
    assert int(count) == len(trained)


def compared(engine, name, alone, reference):
    """(where, what the engine has, what one process has) for every parameter and state."""
    found = unsharded(engine, name)
    check_all_are_there(found, alone, name)
    for key, p in alone.named_parameters():
        for k, v in found.get(key, {}).items():
            yield (key, k), v, p.detach() if k == "value" else reference.state[p][k]


# -- rows -------------------------------------------------------------------------------------------------------------


def gamma_at(hyper, t):
    """γ of step t, where a schedule has one."""
    return 0.4 + 0.05 * t if hyper == "gamma schedule" else None


@cache
def one_process(hyper, variant, flattens):
    """Trained without an engine: the model and its optimizer."""
    alone = Bag(variant)
    reference = Anon([p for p in alone.parameters() if p.requires_grad], **{**LM, **HYPER[hyper]})
    for t in range(STEPS):
        for group in reference.param_groups:
            group["gamma"] = gamma_at(hyper, t) or group["gamma"]
        alone(t).backward()
        for p in alone.parameters():
            if p.grad is None and p.requires_grad and flattens:
                p.grad = torch.zeros_like(p)
        reference.step()
        reference.zero_grad()
    return alone, reference


def check_bits(name, hyper, variant, accumulation, ranks):
    model = Bag(variant)
    optimizer = Anon([p for p in model.parameters() if p.requires_grad], **{**LM, **HYPER[hyper]})
    engine = launch(name, model, optimizer, accumulation)
    if variant == "gradients missing" and name in ("zero3", *OFFLOAD):  # where DeepSpeed would take an older gradient
        raises(EngineError, "got no gradient", lambda: engine.backward(engine.model(0), last=True))
        return
    if variant == "gradients missing" and name == "zero1" and hyper == "gamma schedule":
        return  # see cases.case_ranks_with_their_own_gammas_are_noticed
    for t in range(STEPS):
        if hyper == "gamma schedule":
            with engine.whole_optimizer() as optimizer:
                for group in optimizer.param_groups:
                    group["gamma"] = gamma_at(hyper, t)
        for i in range(accumulation):
            engine.backward(engine.model(t) / accumulation, last=i + 1 == accumulation)
        engine.step(1e-3, None)
    for where, v, expected in compared(engine, name, *one_process(hyper, variant, name in FLATTENS)):
        assert torch.equal(v, expected), (where, (v - expected).abs().max())


def language(gamma):
    """Hyperparameters of a language model's training."""
    lr = 3e-3 if gamma == 1.0 else 1e-2
    return {**LM, "gamma": gamma, "lr": lr, "refresh_ratio": 1.1, "hold_silent": gamma < 0, "eps": 1e-8}


def batch_of(t, readers):
    """Documents of 8 tokens on the average."""
    tokens = torch.randint(0, 100, (4 * readers, 33), generator=torch.Generator().manual_seed(t))
    return tokens.where(tokens % 8 > 0, END)


def plain_loss(model, tokens, end):
    """Of whole logits and a dense mask that keeps documents apart, without this package's code."""
    starts = F.pad(tokens[:, :-2] == end, (1, 0), value=True)
    document, index = starts.cumsum(1), torch.arange(tokens.shape[1] - 1)
    mask = (document[:, :, None] == document[:, None, :]).tril()[:, None]
    positions = index - torch.where(starts, index, 0).cummax(1).values
    output = model(input_ids=tokens[:, :-1], attention_mask=mask, position_ids=positions)
    logits, targets = output.logits.flatten(0, 1), tokens[:, 1:].flatten()
    return F.cross_entropy(logits, targets) + Z_LOSS * logits.logsumexp(1).square().mean()


@cache
def one_process_on_text(gamma, readers):
    """Trained without an engine on what all readers read: the model, its optimizer, the gradients' norms. With γ < 0, where an element
    whose first gradient is all rounding keeps it for long, by the loss of this package, which rounds as the engines' does."""
    alone, norms = transformer(), []
    if gamma < 0:
        attach(alone, z_loss=Z_LOSS)
    reference = Anon(param_groups(alone, 0.1), **language(gamma))
    for t in range(12):
        (plain_loss if gamma > 0 else mean_loss)(alone, batch_of(t, readers), END).backward()
        grads = [p.grad.double() for p in alone.parameters() if p.grad is not None]
        norms.append(float(torch.nn.utils.get_total_norm(grads)))
        reference.step()
        reference.zero_grad()
    return alone, reference, norms


def check_training(name, gamma, ranks):
    hyper, model = language(gamma), transformer()
    attach(model, z_loss=Z_LOSS)
    engine = launch(name, model, Anon(param_groups(model, 0.1), **hyper), accumulation=2)
    split = 2 if name == "fsdp2+tp" else 1
    reader, readers = dist.get_rank() // split, ranks // split
    alone, reference, norms = one_process_on_text(gamma, readers)
    for t, norm in enumerate(norms):
        for i, rows in enumerate(batch_of(t, readers)[4 * reader : 4 * reader + 4].split(2)):
            engine.backward(mean_loss(engine.model, rows, END) / 2, last=i == 1)
        assert abs(engine.step(hyper["lr"], None) / norm - 1) < 1e-5
    for where, v, expected in compared(engine, name, alone, reference):
        # A gradient's rounding, 6e-8 of the largest summand, is up to 1e-5 of a small element after 12 steps and a power of γ.
        largest = float(expected.abs().max())
        torch.testing.assert_close(v, expected, rtol=1e-4, atol=1e-4 * largest, msg=lambda m, w=where: f"{w}: {m}")


def check_bytes_and_collectives(name, ranks):
    counts, sizes = {}, None
    for optimizer_class in (torch.optim.AdamW, Anon):
        if optimizer_class is torch.optim.AdamW and name in OFFLOAD:
            continue  # there accelerate would put DeepSpeedCPUAdam in its place
        model = transformer()
        attach(model)
        engine = launch(name, model, optimizer_class(param_groups(model, 0.1)))
        tokens = torch.randint(0, 100, (2, 33), generator=torch.Generator().manual_seed(0))
        for _ in range(2):  # the first step may set up communication
            with CommDebugMode() as communication:
                engine.backward(mean_loss(engine.model, tokens), last=True)
                engine.step(1e-3, None)
            counts[optimizer_class.__name__] = {str(k): n for k, n in communication.get_comm_counts().items()}
        sizes = engine.state_bytes()
    trained = [p for p in transformer().parameters() if p.requires_grad]
    whole = 12 * sum(p.numel() for p in trained)
    if "AdamW" in counts:
        assert counts["Anon"] == counts["AdamW"], counts
        assert sum(counts["Anon"].values()) > 0
    shards = {"ddp": 1, "zero0": 1, "hsdp": 2}.get(name, ranks)
    if name == "zero1":  # whole parameters
        slack = 12 * max(p.numel() for p in trained)
    elif name == "fsdp2+tp":  # norms and tied embeddings are not split
        slack = whole
        split = 12 * sum(p.numel() for n, p in transformer().named_parameters() if "_proj" in n)
        expected = split / ranks + (whole - split) / (ranks // 2)
        assert abs(sizes.local / expected - 1) < 0.02, sizes
    else:  # partitions are padded to the same length, DeepSpeed's and FSDP1's by the flat group, FSDP2's by the row
        slack = 0.02 * whole / shards + (0 if name in ("ddp", "zero0") else 12 * 2 * len(trained))
    assert abs(sizes.local - whole / shards) <= slack, (sizes, whole, shards)


def check_shared_sequences(name, context, ranks):
    """Of so many ranks each, hsdp's shards among two: the gradients of one process."""
    layout = {"engine": name, "context": context, "shard_ranks": 2 if name == "hsdp" else None}
    for family in ("gpt2", "qwen3"):
        check_family(family, layout)


CHECKS = {
    "bits": check_bits,
    "training": check_training,
    "bytes and collectives": check_bytes_and_collectives,
    "shared sequences": check_shared_sequences,
}

if __name__ == "__main__":
    ranks, complete = int(os.environ["WORLD_SIZE"]), sys.argv[2] == "all"
    chosen = {name: row for name, row in rows(complete).items() if row[-1] == ranks and sys.argv[3] in name}
    run_cases({f"case_{name}": partial(CHECKS[row[0]], *row[1:]) for name, row in chosen.items()})
