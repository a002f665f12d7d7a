"""Checkpoints as a plain DeepSpeed script writes them, and what DeepSpeed itself says is in them. Needs a process group."""

from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state
from torch import nn
from zero_tables import SOURCES

from anon_dist import Anon

SAVED, MORE = 4, 4
"""Steps until the checkpoint, and after it."""


class Net(nn.Module):
    """Odd sizes, a tied pair, a frozen layer, a parameter of one element, a buffer."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.frozen, self.head = nn.Linear(63, 63), nn.Linear(63, 7), nn.Linear(7, 7), nn.Linear(7, 1)
        self.a2 = nn.Linear(63, 63, bias=False)
        self.a2.weight = self.a.weight
        self.frozen.requires_grad_(False)
        self.register_buffer("scale", torch.tensor([0.9, 1.1, 1.3]))

    def forward(self, x):
        return self.head(torch.tanh(self.frozen(torch.tanh(self.b(self.a2(torch.tanh(self.a(x)))))))) * self.scale[1]


class Lion(torch.optim.Optimizer):
    """One state, and no step."""

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.99), weight_decay=0.0):
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in [p for p in group["params"] if p.grad is not None]:
                m = self.state[p].setdefault("exp_avg", torch.zeros_like(p))
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_((m * group["betas"][0] + p.grad * (1 - group["betas"][0])).tanh(), alpha=-group["lr"])
                m.mul_(group["betas"][1]).add_(p.grad, alpha=1 - group["betas"][1])


OPTIMIZERS = {
    "anon": lambda groups: Anon(groups, lr=3e-3, betas=(0.9, 0.95), eps=1e-8, refresh_ratio=1.1, beta3=0.8),
    "adamw": lambda groups: torch.optim.AdamW(groups, lr=3e-3, betas=(0.9, 0.95)),
    "lion": lambda groups: Lion(groups, lr=3e-4),
}


def groups(model):
    """Two param groups with their own rate and decay."""
    trained = [p for p in model.parameters() if p.requires_grad]
    matrices, vectors = [p for p in trained if p.dim() > 1], [p for p in trained if p.dim() == 1]
    return [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "lr": 1e-3, "weight_decay": 0.0}]


def make_engine(optimizer, stage, config, seed=0, one_group=False):
    """A DeepSpeed engine, trained by nobody yet."""
    torch.manual_seed(seed)
    model = Net()
    names = {p: n for n, p in model.named_parameters()}
    split = [{"params": [p for g in groups(model) for p in g["params"]]}] if one_group else groups(model)
    members = [[names[p] for p in g["params"]] for g in split]
    if stage == 0:  # whose files say nothing else of names
        split = [{**g, "params": [(names[p], p) for p in g["params"]]} for g in split]
    zero = {"stage": stage, **config.get("zero_optimization", {})}
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        **config,
        "zero_optimization": zero,
    }
    built = OPTIMIZERS[optimizer](split)
    schedule = torch.optim.lr_scheduler.LambdaLR(built, lambda t: 1.0)
    engine, *_ = deepspeed.initialize(model=model, config=config, optimizer=built, lr_scheduler=schedule)
    engine.members = members
    return engine


def batch(t, engine):
    """This rank's rows of step `t`."""
    world, rank = dist.get_world_size(), dist.get_rank()
    rows = torch.randn(8, 63, generator=torch.Generator().manual_seed(t)).split(8 // world)[rank]
    return rows.to(next(engine.module.parameters()).dtype)


def train(engine, start, stop):
    """Steps [start, stop)."""
    for t in range(start, stop):
        engine.backward(engine(batch(t, engine)).float().square().mean())
        engine.step()


def inner(engine):
    """The user's optimizer."""
    return getattr(engine, "basic_optimizer", engine.optimizer)


def masters(engine):
    """Name → float32 value of every trained parameter, whole. Every rank must ask."""
    found = {}
    by_name = dict(engine.module.named_parameters())
    plain = _stage0_parameters(engine)
    for name in [n for members in engine.members for n in members]:
        p = by_name[name]
        if plain is not None:
            value = plain[name]
        elif getattr(engine.optimizer, "round_robin_gradients", False):
            value = _stage12_round_robin(engine, None)[name]
        else:
            value = safe_get_full_fp32_param(p)
        found[name] = value.detach().float().clone().view(getattr(p, "ds_shape", p.shape))
    return found


def _stage0_parameters(engine):
    """Name → what the optimizer steps, at stage 0; else None."""
    if engine.zero_optimization_stage() > 0:
        return None
    held = [p for g in inner(engine).param_groups for p in g["params"]]
    return dict(zip([n for members in engine.members for n in members], held, strict=True))


def _stage12_round_robin(engine, key):
    """Name → whole state of stages 1 and 2 where DeepSpeed's own accessors ignore the order that round_robin_gradients gives the buffer."""
    wrapper, found = engine.optimizer, {}
    names = {p: n for n, p in engine.module.named_parameters()}
    for flat, members in zip(wrapper.single_partition_of_fp32_groups, wrapper.round_robin_bit16_groups, strict=True):
        mine = flat if key is None else wrapper.optimizer.state[flat][key]
        parts = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, mine.detach())
        whole = torch.cat(parts)
        for p in members:
            found[names[p]], whole = whole[: p.numel()].view(p.shape), whole[p.numel() :]
    return found


def _full_state(engine, name, key):
    """A state of a parameter, whole; every rank must ask."""
    plain = _stage0_parameters(engine)
    if plain is not None:
        return inner(engine).state[plain[name]][key]
    if getattr(engine.optimizer, "round_robin_gradients", False):
        return _stage12_round_robin(engine, key)[name]
    return safe_get_full_optimizer_state(dict(engine.module.named_parameters())[name], key)


def oracle(engine):
    """What DeepSpeed says the checkpoint holds: masters, states and scalars by name, groups with members."""
    optimizer = inner(engine)
    by_name = dict(engine.module.named_parameters())
    if hasattr(engine.optimizer, "_hp_optimizer_states_linked"):
        # DeepSpeed links the states of all groups when the first group has stepped: the others have none yet, and stay unlinked.
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()
    some = next(iter(optimizer.state.values()))
    tensor_keys = sorted(
        k for k, v in some.items() if torch.is_tensor(v) and v.dim() > 0
    )  # asked in one order on all ranks
    scalars = {k: float(v) for k, v in some.items() if k not in tensor_keys}
    weights = {}
    for name, p in by_name.items():
        with deepspeed.zero.GatheredParameters([p], enabled=hasattr(p, "ds_id")):
            weights[name] = p.detach().clone()
    values = masters(engine)
    states = {
        name: {k: _full_state(engine, name, k).detach().clone().view(value.shape) for k in tensor_keys}
        for name, value in values.items()
    }
    hyper = [{k: v for k, v in g.items() if k not in ("params", "param_names")} for g in optimizer.param_groups]
    return {
        "weights": weights,
        "buffers": {n: b.clone() for n, b in engine.module.named_buffers()},
        "masters": values,
        "states": states,
        "scalars": scalars,
        "groups": list(zip(engine.members, hyper, strict=True)),
    }


def make(name: str, folder: Path) -> None:
    """Train, save to `folder`, train on; rank 0 leaves `oracle.pt` and `after.pt`, the masters of the run that was not interrupted."""
    engine = make_engine(*SOURCES[name])
    train(engine, 0, SAVED)
    engine.save_checkpoint(str(folder), client_state={"cursor": 32, "note": name})
    told = oracle(engine)
    train(engine, SAVED, SAVED + MORE)
    after = masters(engine)
    if dist.get_rank() == 0:
        torch.save(told, folder / "oracle.pt")
        torch.save(after, folder / "after.pt")
