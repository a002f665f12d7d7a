"""Matrices in bases of their own, on several ranks: each case against one process, and what ranks send each other counted.

`test_bases.py` launches them on 2 to 4 ranks; each `case_…` function runs on every rank, over gloo.
"""

import sys
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.nn.parallel import DistributedDataParallel

from anon_dist import Anon
from anon_dist.optim.frame import BASIS_KEYS
from anon_dist.optim.state import local

sys.path.insert(0, str(Path(__file__).parents[1]))
from launch_cases import raises, run_cases, shared_folder, warned_of_damage

LM = {"lr": 0.02, "betas": (0.9, 0.95), "refresh_ratio": 1.3, "beta3": 0.8, "weight_decay": 0.1, "nesterov": True}
# Rows that do not divide, a rank without rows, a side shorter than a block, a block that is cut short, a tensor of more dimensions.
SHAPES = {"square": (32, 32), "few": (3, 20), "tall": (50, 24), "wide": (7, 40), "cube": (6, 4, 5), "vector": (33,)}
STEPS = 25


class Bag(nn.Module):
    """Parameters of these shapes, the same on every rank."""

    def __init__(self, shapes=None):
        super().__init__()
        for i, (name, shape) in enumerate((shapes or SHAPES).items()):
            setattr(self, name, nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(i))))


def gradient(name, shape, t):
    """Noise whose rows and columns are mixed, so that there is a basis to be found."""
    seed = sum(map(ord, name))
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed * 100 + t))
    if len(shape) == 1:
        return noise
    mixes = torch.Generator().manual_seed(seed)
    left, right = (torch.randn(n, n, generator=mixes) / n**0.5 for n in (shape[0], noise[0].numel()))
    return (left @ noise.flatten(1) @ right).view(shape)


def set_gradients(model, t):
    """The same gradients, however the parameters are laid out."""
    for name, p in model.named_parameters():
        grad = gradient(name.split(".")[-1], p.shape, t)
        p.grad = distribute_tensor(grad, p.device_mesh, p.placements) if isinstance(p, DTensor) else grad


def full(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def assert_like_one_process(model, optimizer, hyper, shapes=None, steps=STEPS):
    """The parameters after some steps are those that one process makes, but for sums in another order."""
    whole = Bag(shapes)
    reference = Anon(whole.parameters(), **{**LM, **hyper})
    for t in range(steps):
        for each, stepped in ((whole, reference), (model, optimizer)):
            set_gradients(each, t)
            stepped.step()
    for (name, p), q in zip(model.named_parameters(), whole.parameters(), strict=True):
        # Fewer rows than columns leave directions without gradient, of which the basis knows only rounding: 1/200 of a step then.
        bound = 1e-4 if q.dim() > 1 and q.shape[0] < q[0].numel() else 1e-5
        errors = (full(p) - q).detach().abs()
        if (
            "cautious_decay" in hyper
        ):  # where the update is next to nothing, rounding says whether an element is decayed
            errors = errors - 2 * LM["lr"] * LM["weight_decay"] * q.abs() * (errors > bound) * (errors.median() < bound)
        assert errors.max() <= bound, (name, hyper, float(errors.max()))
    return reference


def assert_same_bases(optimizer):
    """On all ranks, to the bit."""
    for state in optimizer.state.values():
        for key in BASIS_KEYS:
            if (key in state and not isinstance(state[key], DTensor)) or (
                key in state and all(x.is_replicate() for x in state[key].placements)
            ):
                mine = local(state[key])
                others = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
                dist.all_gather(others, mine)
                assert all(torch.equal(mine, other) for other in others), key


def case_fsdp2_is_one_process():
    for hyper in (
        {"basis": "columns", "basis_block": 16},
        {"basis": "columns", "basis_block": 128, "gamma": 1.2, "update_clip": 1.0, "max_interval": 3},
        {"basis": "columns", "basis_block": 16, "cautious_decay": True, "window": "auto", "fused": False},
        {"basis": "columns", "basis_block": 16, "gamma": -0.5, "hold_silent": True, "nesterov": False},
    ):
        model = fully_shard(Bag())
        optimizer = Anon(model.parameters(), **{**LM, **hyper})
        assert_like_one_process(model, optimizer, hyper)
        optimizer.settle()
        assert_same_bases(optimizer)


def case_ranks_talk_only_after_a_refresh():
    model = fully_shard(Bag())
    optimizer = Anon(model.parameters(), **LM, basis="columns", basis_block=16)
    refreshes = {1, 2, 3, 4, 6, 8, 11, 15, 20}
    for t in range(1, STEPS):
        set_gradients(model, t)
        with CommDebugMode() as communication:
            optimizer.step()
            optimizer.settle()
        sums = communication.get_total_counts()
        assert sums == (1 if t in refreshes and dist.get_world_size() > 1 else 0), (t, communication.get_comm_counts())


def case_rows_of_whole_blocks():
    """Rows are turned where shards hold whole blocks; elsewhere all ranks refuse, and say which block would fit."""
    ranks = dist.get_world_size()
    shapes = {"a": (16 * ranks, 24), "b": (8 * ranks, 40)}
    for basis in ("rows", "both"):
        model = fully_shard(Bag(shapes))
        hyper = {"basis": basis, "basis_block": 8}
        optimizer = Anon(model.parameters(), **{**LM, **hyper})
        assert_like_one_process(model, optimizer, hyper, shapes)
        row = optimizer.state[model.a]["basis_rows"]
        assert ranks == 1 or row.placements == model.a.placements
        saved = optimizer.state_dict()
        assert not warned_of_damage(lambda optimizer=optimizer, saved=saved: optimizer.load_state_dict(saved))
        if dist.get_rank() == ranks - 1:
            local(saved["state"][0]["basis_rows"])[8:] *= 2.0
        told = warned_of_damage(lambda optimizer=optimizer, saved=saved: optimizer.load_state_dict(saved))
        assert told == (dist.get_rank() == ranks - 1)
    if ranks == 4:  # the last one has no rows
        hyper = {"basis": "both", "basis_block": 3}
        model = fully_shard(Bag({"a": (9, 24)}))
        optimizer = Anon(model.parameters(), **{**LM, **hyper})
        assert_like_one_process(model, optimizer, hyper, {"a": (9, 24)})
        assert (local(model.a).numel() == 0) == (dist.get_rank() == 3)
        assert not warned_of_damage(lambda: optimizer.load_state_dict(optimizer.state_dict()))
    if ranks > 1:
        model = fully_shard(Bag(shapes))
        for words, parameters in (
            ("basis_block=16 would fit, or basis='columns'", [model.a]),
            ("basis_block=8 would fit all of its param group", model.parameters()),
        ):
            raises(RuntimeError, words, Anon(parameters, basis="rows", basis_block=128).init_state)


def case_replicas_and_shards():
    if dist.get_world_size() != 4:
        return
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replica", "shard"))
    hyper = {"basis": "columns", "basis_block": 16}
    model = fully_shard(Bag(), mesh=mesh)
    optimizer = Anon(model.parameters(), **{**LM, **hyper})
    assert_like_one_process(model, optimizer, hyper)
    optimizer.settle()
    assert_same_bases(optimizer)


def case_tensor_parallel():
    """A matrix cut by its columns, by its rows, and by both."""
    ranks = dist.get_world_size()
    shapes = {"a": (48, 16 * ranks), "b": (16 * ranks, 16)}
    mesh = init_device_mesh("cpu", (ranks,))
    for basis, cuts in (("columns", (1, 0)), ("both", (1, 0)), ("rows", (1, 1))):
        hyper = {"basis": basis, "basis_block": 8}
        model = Bag(shapes)
        for name, cut in zip(shapes, cuts, strict=True):
            setattr(model, name, nn.Parameter(distribute_tensor(getattr(model, name).detach(), mesh, [Shard(cut)])))
        assert_like_one_process(model, Anon(model.parameters(), **{**LM, **hyper}), hyper, shapes)
    if ranks == 4:
        mesh = init_device_mesh("cpu", (2, 2))
        model = Bag(shapes)
        for name in shapes:
            setattr(
                model, name, nn.Parameter(distribute_tensor(getattr(model, name).detach(), mesh, [Shard(0), Shard(1)]))
            )
        hyper = {"basis": "columns", "basis_block": 8}
        assert_like_one_process(model, Anon(model.parameters(), **{**LM, **hyper}), hyper, shapes)


def case_ddp_and_zero_redundancy():
    hyper = {"basis": "both", "basis_block": 16}
    model = DistributedDataParallel(Bag())
    assert_like_one_process(model, Anon(model.parameters(), **{**LM, **hyper}), hyper)
    model = Bag()
    optimizer = ZeroRedundancyOptimizer(model.parameters(), Anon, **{**LM, **hyper})
    assert_like_one_process(model, optimizer, hyper)


def case_a_checkpoint_goes_on_to_the_bit():
    """Saved by torch's distributed checkpoint in the middle of a window, loaded into new objects."""
    hyper = {"basis": "columns", "basis_block": 16}
    folder = shared_folder(sys.argv[1])
    model = fully_shard(Bag())
    optimizer = Anon(model.parameters(), **{**LM, **hyper})
    for t in range(STEPS):
        set_gradients(model, t)
        optimizer.step()
        if t == 9:
            weights, states = get_state_dict(model, optimizer)
            dcp.save({"model": weights, "optimizer": states}, checkpoint_id=folder)
    other = fully_shard(Bag())
    resumed = Anon(other.parameters(), **{**LM, **hyper})
    weights, states = get_state_dict(other, resumed)
    dcp.load({"model": weights, "optimizer": states}, checkpoint_id=folder)
    set_state_dict(other, resumed, model_state_dict=weights, optim_state_dict=states)
    for t in range(10, STEPS):
        set_gradients(other, t)
        resumed.step()
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(local(p), local(q))
    optimizer.settle(), resumed.settle()
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert optimizer.state[p].keys() == resumed.state[q].keys()
        assert all(torch.equal(local(x), local(resumed.state[q][key])) for key, x in optimizer.state[p].items())


def case_a_flattened_state_dict():
    """torch fills it by the state that is there; without, it says what to call."""
    hyper = {"basis": "columns", "basis_block": 16}
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    models = [fully_shard(Bag()) for _ in range(2)]
    optimizer, other = (Anon(m.parameters(), **{**LM, **hyper}) for m in models)
    for t in range(4):
        set_gradients(models[0], t)
        optimizer.step()
    saved = get_optimizer_state_dict(models[0], optimizer, options=options)
    raises(ValueError, "init_state()", lambda: set_optimizer_state_dict(models[1], other, dict(saved), options=options))
    other.init_state()
    set_optimizer_state_dict(models[1], other, saved, options=options)
    for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert all(torch.equal(local(x), local(other.state[q][key])) for key, x in optimizer.state[p].items())


def case_a_basis_in_the_middle_of_a_run():
    """It starts at the identity, so that the next step is the one without; and ends in states of the right shape."""
    with_basis, without = fully_shard(Bag()), fully_shard(Bag())
    optimizers = [Anon(m.parameters(), **LM) for m in (with_basis, without)]
    for t in range(8):
        for model, optimizer in zip((with_basis, without), optimizers, strict=True):
            if t == 7 and model is with_basis:
                optimizer.rebase(basis="columns", basis_block=16)
            set_gradients(model, t)
            optimizer.step()
    for p, q in zip(with_basis.parameters(), without.parameters(), strict=True):
        assert torch.allclose(local(p), local(q), rtol=0, atol=2e-6)
    optimizers[0].rebase(basis=None)
    assert not any(key in state for state in optimizers[0].state.values() for key in BASIS_KEYS)


def case_engines_that_flatten_are_refused():
    """FSDP1 shows the optimizer no matrix."""
    for whole in (True, False):
        model = FullyShardedDataParallel(nn.Linear(128, 600), device_id=torch.device("cpu"), use_orig_params=not whole)
        optimizer = Anon(model.parameters(), **LM, basis="columns")
        model(torch.randn(4, 128)).sum().backward()
        if dist.get_world_size() > 1:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                raises(RuntimeError, "flat", optimizer.step)
        # Small, or beside a matrix that FSDP1 leaves whole.
        model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 8))
        model[1] = FullyShardedDataParallel(model[1], device_id=torch.device("cpu"), use_orig_params=not whole)
        for params in (model.parameters(), model[1].parameters()):
            optimizer = Anon(params, **LM, basis="columns")
            model(torch.randn(4, 4)).sum().backward()
            if dist.get_world_size() > 1:
                raises(RuntimeError, "parameters that FSDP1 has flattened", optimizer.step)


if __name__ == "__main__":
    run_cases(globals())
