"""Models and optimizers that DeepSpeed's files hold in ways of their own: frozen bases, float buffers, Muon, numbers of one rank's.

Needs a process group. What an engine holds is asked of the engine's own tables of where its parameters lie.
"""

import math
from contextlib import nullcontext

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.zero.muon.muon_optimizer import MuonWithAuxAdam
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state
from torch import nn
from zero_kinds_tables import OFFLOAD
from zero_tables import BF16, BF16_OPTIMIZER

LOCAL = ("RMS", "trust_ratio", "norms")
"""States that are a rank's part's as such."""
__all__ = ["BF16", "BF16_OPTIMIZER", "OFFLOAD"]
SAVED, MORE, ROWS = 3, 2, 12
"""Steps until the checkpoint and after it; rows of a step over all ranks."""


class Lora(nn.Module):
    """A frozen layer and two small matrices beside it."""

    def __init__(self, inputs, outputs, rank=2):
        super().__init__()
        self.base_layer = nn.Linear(inputs, outputs).requires_grad_(False)
        self.lora_A, self.lora_B = nn.Linear(inputs, rank, bias=False), nn.Linear(rank, outputs, bias=False)

    def forward(self, x):
        return self.base_layer(x) + self.lora_B(torch.tanh(self.lora_A(x)))


class Adapted(nn.Module):
    """Odd sizes, a frozen tied pair, buffers of every kind, a parameter without elements, a layer that trains whole."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(11, 7, bias=False).requires_grad_(False)
        self.tied = nn.Linear(11, 7, bias=False)
        self.tied.weight = self.embed.weight
        self.norm = nn.BatchNorm1d(7)
        self.first, self.second = Lora(7, 9), Lora(9, 5)
        self.head = nn.Linear(5, 3)
        self.register_buffer("inv_freq", torch.rand(7))
        self.register_buffer("bias", torch.rand(1, 7))
        self.register_buffer("cache", torch.rand(7), persistent=False)
        self.register_buffer("count", torch.tensor(4))
        self.norm.running_mean.copy_(torch.rand(7))
        self.norm.running_var.copy_(torch.rand(7) + 0.5)

    def forward(self, x):
        x, norm = self.embed(x) + self.tied(x), self.norm
        buffers = (norm.running_mean, norm.running_var, self.inv_freq, self.bias, self.cache)
        mean, var, scale, shift, cache = (b.to(x.dtype) for b in buffers)  # the engine leaves them in float32
        x = (x - mean) / var.sqrt() * norm.weight * scale + norm.bias + shift * cache
        return self.head(torch.tanh(self.second(torch.tanh(self.first(x)))))


class Matrices(nn.Module):
    """Matrices of other and of equal sizes, cut by every number of ranks, and vectors."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(11, 7), nn.Linear(7, 9), nn.Linear(9, 9)
        self.d, self.e, self.head = nn.Linear(9, 9), nn.Linear(9, 5), nn.Linear(5, 3)

    def forward(self, x):
        for layer in (self.a, self.b, self.c, self.d, self.e):
            x = torch.tanh(layer(x))
        return self.head(x)


class Even(Matrices):
    """Of sizes that two ranks share without padding, which DeepSpeed leaves uninitialised at stage 3, and a norm would see."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(11, 8), nn.Linear(8, 10), nn.Linear(10, 10)
        self.d, self.e, self.head = nn.Linear(10, 10), nn.Linear(10, 6), nn.Linear(6, 4)


class Lamb(torch.optim.Optimizer):
    """LAMB: the ratio of the norms of what it is given, which under ZeRO is a rank's part of a buffer, kept as it was at the last step."""

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.95), eps=1e-6):
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in [p for p in group["params"] if p.grad is not None]:
                state = self.state[p]
                if not state:
                    state |= {
                        "step": torch.zeros(()),
                        "exp_avg": torch.zeros_like(p),
                        "exp_avg_sq": torch.zeros_like(p),
                    }
                    state |= {"trust_ratio": torch.ones(()), "norms": torch.ones(3)}
                state["step"] += 1
                state["exp_avg"].lerp_(p.grad, 1 - group["betas"][0])
                state["exp_avg_sq"].lerp_(p.grad.square(), 1 - group["betas"][1])
                update = state["exp_avg"] / (state["exp_avg_sq"].sqrt() + group["eps"])
                ratio = p.norm().clamp(0.01, 10) / update.norm().clamp_min(1e-6)
                state["trust_ratio"].lerp_(ratio, 0.5)
                state["norms"].copy_(torch.stack([p.norm(), update.norm(), ratio]))
                p.add_(update * state["trust_ratio"], alpha=-group["lr"])


def _by_dim(model):
    trained = [p for p in model.parameters() if p.requires_grad and p.numel()]
    matrices, vectors = [p for p in trained if p.dim() > 1], [p for p in trained if p.dim() == 1]
    return [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "lr": 1e-3, "weight_decay": 0.0}]


def _frozen_group(model):
    """A group of frozen parameters alone before, and some in the others."""
    frozen = [p for p in model.parameters() if not p.requires_grad]
    groups = _by_dim(model)
    groups[0]["params"] = [frozen[1], *groups[0]["params"]]
    return [{"params": [frozen[0], *frozen[2:]], "lr": 5e-4, "weight_decay": 0.3}, *groups]


def _mixed(model):
    return _frozen_group(model)[1:]


def _muon(model):
    dims = {p: len(getattr(p, "ds_shape", p.shape)) for p in model.parameters()}  # zero.Init leaves vectors
    matrices = [p for n, p in model.named_parameters() if dims[p] > 1 and "head" not in n]
    rest = [p for n, p in model.named_parameters() if dims[p] < 2 or "head" in n]
    for p in model.parameters():
        p.use_muon = any(p is m for m in matrices)
    return [
        {"params": rest, "use_muon": False, "lr": 3e-3},
        {"params": matrices, "use_muon": True, "lr": 0.02, "weight_decay": 0.1},
    ]


def _adafactor(groups):
    from transformers.optimization import Adafactor  # which takes its time

    return Adafactor(groups, lr=1e-3, relative_step=False, beta1=0.9)


KINDS = {
    "lora": (Adapted, _by_dim, lambda groups: torch.optim.AdamW(groups, lr=3e-3)),
    "frozen_group": (Adapted, _frozen_group, lambda groups: torch.optim.AdamW(groups, lr=3e-3)),
    "mixed": (Adapted, _mixed, lambda groups: torch.optim.AdamW(groups, lr=3e-3)),
    "muon": (Matrices, _muon, lambda groups: MuonWithAuxAdam(groups)),
    "muon_torch": (
        Matrices,
        _muon,
        lambda groups: MuonWithAuxAdam(groups, torch.optim.AdamW, {"foreach": False}),
    ),
    "adafactor": (Even, _by_dim, _adafactor),
    "lamb": (Even, _by_dim, lambda groups: Lamb([{**g, "lr": 1e-2} for g in groups])),
}
"""Name → model, its param groups, the optimizer."""


def make_engine(kind, stage, config, seed=0, init=False):
    """A DeepSpeed engine, trained by nobody yet; `init`: its model is made under `zero.Init`."""
    build, split, optimizer = KINDS[kind]
    torch.manual_seed(seed)
    plain = {
        "train_micro_batch_size_per_gpu": 1
    }  # without it DeepSpeed makes half-precision weights, whatever dtype is asked for
    with deepspeed.zero.Init(config_dict_or_path=plain) if init else nullcontext():
        model = build()
    built = optimizer(split(model))
    names = {p: n for n, p in model.named_parameters()}
    members = [[names[p] for p in g["params"]] for g in built.param_groups]
    config = {
        "train_micro_batch_size_per_gpu": ROWS // dist.get_world_size(),
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        **config,
        "zero_optimization": {"stage": stage, "reduce_scatter": False, **config.get("zero_optimization", {})},
    }
    engine, *_ = deepspeed.initialize(model=model, config=config, optimizer=built)
    engine.members, engine.kind = members, kind
    return engine


def train(engine, start, stop):
    """Steps [start, stop)."""
    world, rank = dist.get_world_size(), dist.get_rank()
    dtype = next(engine.module.parameters()).dtype
    for t in range(start, stop):
        rows = torch.randn(ROWS, 11, generator=torch.Generator().manual_seed(t)).split(ROWS // world)[rank]
        engine.backward(engine(rows.to(dtype)).float().square().mean())
        engine.step()


def _gathered(engine, p):
    with deepspeed.zero.GatheredParameters([p], enabled=hasattr(p, "ds_id")):
        return p.detach().clone()


def _agreed(parts):
    """Of what ranks say of the same thing: one value, the same on all that say it."""
    found = {}
    ranks = [None] * dist.get_world_size()
    dist.all_gather_object(ranks, parts)
    for part in ranks:
        for key, value in part.items():
            assert torch.equal(found.setdefault(key, value), value), key
    return found


def _whole_momentum(engine):
    """Name → Muon's momentum at stages 1 and 2, where a rank holds whole each matrix of which it has a part."""
    wrapper, names = engine.optimizer, {p: n for n, p in engine.module.named_parameters()}
    mine = {}
    for held, group in zip(wrapper.params_in_partition, wrapper.optimizer.param_groups, strict=True):
        buffer = wrapper.optimizer.state.get(group["params"][0], {}).get("momentum_buffer")
        if buffer is None or engine.zero_cpu_offload():
            continue
        for p in held:
            mine[names[p]], buffer = buffer[: p.numel()].view(p.shape).clone(), buffer[p.numel() :]
        assert buffer.numel() == 0
    return _agreed(mine)


def oracle(engine):
    """What the engine holds, whole, by name: weights, buffers, masters, states; and the numbers of every rank."""
    optimizer = getattr(engine, "basic_optimizer", engine.optimizer)
    wrapper, stage = engine.optimizer, engine.zero_optimization_stage()
    if hasattr(wrapper, "_hp_optimizer_states_linked"):
        wrapper._hp_optimizer_states_linked = False
        wrapper._lazy_init_hp_params_optimizer_state()
    found = {"weights": {}, "masters": {}, "states": {}}
    for name, p in engine.module.named_parameters():
        found["weights"][name] = _gathered(engine, p)
    found["buffers"] = {n: b.clone() for n, b in engine.module.named_buffers()}
    trained = [
        n for n, p in engine.module.named_parameters() if p.requires_grad and math.prod(getattr(p, "ds_shape", p.shape))
    ]
    by_name = dict(engine.module.named_parameters())
    if stage == 0:
        held = [p for g in optimizer.param_groups for p in g["params"]]
        names = [n for group in engine.members for n in group]
        if wrapper is not optimizer:
            names = [n for n in names if n in trained]
        for name, p in zip(names, held, strict=True):
            if name in trained:
                found["masters"][name] = p.detach().float().clone()
                own = optimizer.state.get(p, {})
                found["states"][name] = {k: v.clone() for k, v in own.items() if torch.is_tensor(v) and v.dim()}
    else:
        whole = _whole_momentum(engine) if hasattr(wrapper, "params_in_partition") else {}
        for name in trained:
            p = by_name[name]
            shape = getattr(p, "ds_shape", p.shape)
            found["masters"][name] = safe_get_full_fp32_param(p).detach().float().clone().view(shape)
            keys = {"exp_avg", "exp_avg_sq"} if "muon" not in engine.kind or not p.use_muon else {"momentum_buffer"}
            found["states"][name] = {}
            for key in sorted(keys):
                value = whole[name] if name in whole else safe_get_full_optimizer_state(p, key)
                found["states"][name][key] = value.detach().float().clone().view(shape)
    return {**found, **_rest(optimizer)}


def _rest(optimizer):
    """Hyperparameters of the groups, and of every rank the states that are not as long as what the optimizer steps."""
    mine = [
        {k: float(v) if not torch.is_tensor(v) or v.dim() == 0 else v.tolist() for k, v in own.items() if k in LOCAL}
        for own in optimizer.state.values()
    ]
    ranks = [None] * dist.get_world_size()
    dist.all_gather_object(ranks, mine)
    steps = sorted({float(own["step"]) for own in optimizer.state.values() if "step" in own})
    groups = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    return {"numbers": ranks, "steps": steps, "groups": groups}
