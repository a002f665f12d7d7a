"""Sharded checkpoints that torch and accelerate write on four ranks, read and converted; and what is converted, loaded by them.

Launched by `test_dcp.py`; each `case_…` function runs on every rank.
"""

import shutil
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
)
from torch.distributed.fsdp import FullyShardedDataParallel, ShardedStateDictConfig, StateDictType, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor, init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "distributed"))
sys.path.insert(0, str(Path(__file__).parents[1] / "users"))
from helpers import forget_accelerate
from launch_cases import run_cases, shared_folder

from anon_dist import Anon
from anon_dist.checkpoint import CheckpointError, load_sharded
from anon_dist.checkpoint.convert import convert
from anon_dist.checkpoint.formats import open_checkpoint
from anon_dist.checkpoint.options import WriteOptions
from anon_dist.checkpoint.schema import Key
from anon_dist.checkpoint.verify import verify
from anon_dist.engines.restore import restore

RANKS = 4


class Blocks(nn.Module):
    """Sizes that four ranks do not divide, and fewer rows than ranks."""

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 7)
        self.odd = nn.Parameter(torch.randn(3, 5))

    def forward(self, x):
        return self.down(self.up(x).tanh()).sum() * self.odd.sum()


def groups(model):
    matrices = [p for p in model.parameters() if p.ndim > 1]
    return [{"params": matrices, "lr": 1e-2}, {"params": [p for p in model.parameters() if p.ndim == 1], "lr": 2e-2}]


def train(model, optimizer, steps=3):
    for i in range(steps):
        model(torch.randn(4, 8, generator=torch.Generator().manual_seed(i))).backward()
        optimizer.step()
        optimizer.zero_grad()


def on_first(action):
    """Once, for all ranks; an error is raised on each."""
    errors = [None]
    if dist.get_rank() == 0:
        try:
            action()
        except Exception as error:
            errors = [repr(error)]
    dist.broadcast_object_list(errors)
    assert errors[0] is None, errors[0]


def save_both(model, optimizer):
    """The folder of DCP, and torch's own gathering of the same into one file."""
    folder = Path(shared_folder(OUT))
    weights, states = get_state_dict(model, optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save({"model": weights, "optimizer": states}, storage_writer=dcp.FileSystemWriter(folder / "dcp"))
    full = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights, states = get_state_dict(model, optimizer, options=full)
    on_first(lambda: torch.save({"model": weights, "optimizer": states}, folder / "full.pt"))
    return folder


def save_by_rank(model, optimizer, folder):
    """accelerate's own `use_dcp=False`: a file of pickled DTensors for each rank."""
    from accelerate.utils import fsdp_utils

    kind = {"state_dict_type": StateDictType.SHARDED_STATE_DICT, "fsdp_version": 2, "cpu_ram_efficient_loading": False}
    plugin = SimpleNamespace(**kind, state_dict_config=SimpleNamespace(offload_to_cpu=False))
    here = SimpleNamespace(process_index=dist.get_rank(), num_processes=RANKS)
    with mock.patch.object(fsdp_utils, "logger"):  # it wants an Accelerator
        fsdp_utils.save_fsdp_model(plugin, here, model, folder, use_dcp=False)
        fsdp_utils.save_fsdp_optimizer(plugin, here, optimizer, model, folder, use_dcp=False)
    dist.barrier()


def refused(folder, match):
    with pytest.raises(CheckpointError, match=match):
        open_checkpoint(folder)


class Payload:
    """Leaves a file behind, if it is run."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def check_rank_files(folder):
    def check():
        same(folder / "ranks", folder / "full.pt")
        assert open_checkpoint(folder / "ranks").manifest.world_size == RANKS
        convert(folder / "ranks", folder / "of_ranks", "dcp", WriteOptions(world_size=3))
        same(folder / "of_ranks", folder / "full.pt")
        held, moved = folder / "ranks" / "optimizer_0_rank1.bin", folder / "moved"
        held.rename(moved)
        refused(folder / "ranks", r"optimizer_0_rank1.bin is missing")
        torch.save({"state": Payload(folder / "ran"), "param_groups": []}, held)
        refused(folder / "ranks", r"optimizer_0_rank1.bin holds an object of .*which could run code when read$")
        assert not (folder / "ran").exists()

    on_first(check)


def same(a, b):
    found = verify(a, b)
    assert not found, found


def check_reading(folder, world_size=RANKS):
    def check():
        same(folder / "dcp", folder / "full.pt")
        assert open_checkpoint(folder / "dcp").manifest.world_size == world_size
        convert(folder / "dcp", folder / "again", "dcp", WriteOptions(world_size=3))
        same(folder / "again", folder / "full.pt")

    on_first(check)


def case_fsdp2():
    model = fully_shard(Blocks())
    optimizer = torch.optim.AdamW(groups(model))
    train(model, optimizer)
    folder = save_both(model, optimizer)
    save_by_rank(model, optimizer, folder / "ranks")
    check_reading(folder)
    check_rank_files(folder)


def case_hsdp():
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    model = fully_shard(Blocks(), mesh=mesh)
    optimizer = Anon(groups(model))
    optimizer.init_state()
    train(model, optimizer)
    folder = save_both(model, optimizer)
    save_by_rank(model, optimizer, folder / "ranks")
    on_first(lambda: same(folder / "dcp", folder / "full.pt"))
    check_rank_files(folder)


def case_tensor_parallel():
    """Columns and rows: boxes that are not whole rows."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    model = Blocks()
    parallelize_module(model, mesh["tp"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
    for part in (model.up, model.down):
        fully_shard(part, mesh=mesh["dp"])
    matrices = [p for p in model.parameters() if isinstance(p, DTensor)]
    optimizer = torch.optim.AdamW(matrices, lr=1e-2, foreach=False)
    train(model, optimizer)
    folder = save_both(model, optimizer)
    on_first(lambda: same(folder / "dcp", folder / "full.pt"))
    save_by_rank(model, optimizer, folder / "ranks")
    on_first(lambda: refused(folder / "ranks", r"rank\*.bin: up.*_StridedShard .*use_dcp=True"))


def case_fsdp1():
    """Sharded, through ShardedTensor; against what each rank holds.

    (torch 2.13 gathers a *full* state wrongly on CPU: exp_avg comes out as exp_avg_sq. So that is read, not compared.)
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = FullyShardedDataParallel(Blocks(), use_orig_params=True, device_id=torch.device("cpu"))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        train(model, optimizer)
        folder = Path(shared_folder(OUT))
        with FullyShardedDataParallel.state_dict_type(
            model, StateDictType.SHARDED_STATE_DICT, ShardedStateDictConfig(offload_to_cpu=True)
        ):
            state = {
                "model": model.state_dict(),
                "optimizer": FullyShardedDataParallel.optim_state_dict(model, optimizer),
            }
            dcp.save(state, storage_writer=dcp.FileSystemWriter(folder / "dcp"))
        with FullyShardedDataParallel.state_dict_type(model, StateDictType.FULL_STATE_DICT):
            full = FullyShardedDataParallel.full_optim_state_dict(model, optimizer)
            weights = model.state_dict()
    names = [n.replace("_fsdp_wrapped_module.", "") for n, _ in model.named_parameters()]
    held = {n: optimizer.state[p].get("exp_avg") for n, p in zip(names, model.parameters(), strict=True) if p.numel()}
    everyone = [None] * RANKS
    dist.all_gather_object(everyone, held)

    def check():
        found = open_checkpoint(folder / "dcp")
        assert found.manifest.groups[0].members == names
        for name in names:
            value = torch.cat([own[name] for own in everyone if name in own])
            assert torch.equal(found.read(Key(name, "exp_avg"), 0, value.numel()), value), name
            assert torch.equal(found.read(Key(name, "weight"), 0, value.numel()), weights[name].flatten()), name
        torch.save({"model": weights, "optimizer": full}, folder / "full.pt")
        convert(folder / "full.pt", folder / "again", "dcp", WriteOptions(world_size=3))
        same(folder / "full.pt", folder / "again")

    on_first(check)


def frame_state(whole, dim):
    """A parameter cut along `dim`, its Anon's state with both bases, placed as Anon places them; and its param group."""
    mesh = init_device_mesh("cpu", (RANKS,))

    def placed(key):
        own = (
            Shard(dim) if whole[key].shape == whole["w"].shape and not key.startswith(("basis", "covariance")) else None
        )
        side = {"columns": 1, "rows": 0}.get(key.rpartition("_")[2])
        return distribute_tensor(whole[key].clone(), mesh, [own or (Shard(0) if side == dim else Replicate())])

    state = {key: placed(key) for key in whole if key != "w"} | {"step": torch.tensor(3.0)}
    group = {"lr": 0.1, "basis": "both", "basis_block": 4}
    return placed("w"), state, group


def case_states_of_another_shape_follow_their_own_placement():
    """Bases of a matrix's sides, whole where the other side is cut: from either cut into the other, and refused by FSDP1."""
    torch.manual_seed(0)
    shapes = {"w": (16, 24), "exp_avg": (16, 24), "exp_avg_sq": (16, 24), "precond": (16, 24)}
    shapes |= {
        "basis_columns": (24, 4),
        "covariance_columns": (24, 4),
        "basis_rows": (16, 4),
        "covariance_rows": (16, 4),
    }
    whole = {key: torch.randn(shape) for key, shape in shapes.items()}
    folder = Path(shared_folder(OUT))

    def tree(tensors, dim):
        w, state, group = frame_state(tensors, dim)
        return {"model": {"w": w}, "optimizer": {"state": {"w": state}, "param_groups": [{**group, "params": ["w"]}]}}

    def model_of(dim):
        w, state, group = frame_state({key: torch.zeros_like(x) for key, x in whole.items()}, dim)
        model = nn.Module()
        model.w = nn.Parameter(w)
        optimizer = Anon(model.named_parameters(), lr=1e-3)
        optimizer.state[model.w] = state
        optimizer.param_groups[0].update(group)
        return model, optimizer

    for dim in (0, 1):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dcp.save(tree(whole, dim), storage_writer=dcp.FileSystemWriter(folder / f"dcp-{dim}"))
        (folder / f"ranks-{dim}").mkdir(exist_ok=True)
        for name, part in zip(("pytorch_model_fsdp_0", "optimizer_0"), tree(whole, dim).values(), strict=True):
            torch.save(part, folder / f"ranks-{dim}" / f"{name}_rank{dist.get_rank()}.bin")
        dist.barrier()

    def write():
        for dim in (0, 1):
            same(folder / "dcp-0", folder / f"ranks-{dim}")
            found = open_checkpoint(folder / f"dcp-{dim}")
            for key, x in whole.items():
                name = Key("w", "weight" if key == "w" else key)
                assert torch.equal(found.read(name, 0, x.numel()).view(x.shape), x)
            convert(folder / f"dcp-{dim}", folder / f"c-{dim}", "canonical")
            convert(folder / f"c-{dim}", folder / f"again-{dim}", "dcp", WriteOptions(world_size=3))

    on_first(write)
    for dim in (0, 1):
        loaded = tree({key: torch.zeros_like(x) for key, x in whole.items()}, 1 - dim)
        dcp.load(loaded, storage_reader=dcp.FileSystemReader(folder / f"again-{dim}"))
        model, optimizer = model_of(1 - dim)
        restore(model, optimizer, open_checkpoint(folder / f"c-{dim}"))
        for own in (loaded["optimizer"]["state"]["w"], optimizer.state[model.w]):
            assert all(torch.equal(own[key].full_tensor(), whole[key]) for key in whole if key != "w")
        assert torch.equal(model.w.full_tensor(), whole["w"])
    plain = nn.Linear(24, 16, bias=False)
    plain.w = plain.weight
    del plain.weight
    wrapped = FullyShardedDataParallel(plain, use_orig_params=True, device_id=torch.device("cpu"))
    flat = Anon(wrapped.named_parameters(), lr=1e-3)
    flat.init_state()
    with pytest.raises(CheckpointError, match=r"w has basis_rows, .*--anon.drop-basis"):
        restore(wrapped, flat, open_checkpoint(folder / "c-0"))


def case_fsdp2_loads_what_is_converted():
    """From one process's file to four ranks; the training goes on as it would have."""
    folder = Path(shared_folder(OUT))
    whole = Blocks()
    reference = Anon(groups(whole), refresh_ratio=1.5)
    train(whole, reference)

    def write():
        torch.save({"model": whole.state_dict(), "optimizer": reference.state_dict()}, folder / "one.pt")
        convert(folder / "one.pt", folder / "dcp", "dcp", WriteOptions(world_size=2))

    on_first(write)
    model = fully_shard(Blocks(seed=1))
    optimizer = Anon(groups(model), refresh_ratio=1.5)
    load_sharded(folder / "dcp", model, optimizer)
    options = StateDictOptions(full_state_dict=True)
    loaded = get_optimizer_state_dict(model, optimizer, options=options)
    numbers = {n: i for i, n in enumerate(["up.weight", "down.weight", "odd", "up.bias", "down.bias"])}
    names = [n for n, p in whole.named_parameters() if p.ndim > 1] + [
        n for n, p in whole.named_parameters() if p.ndim == 1
    ]
    assert set(numbers) == set(names)
    for i, name in enumerate(names):
        for key, value in reference.state_dict()["state"][i].items():
            if dist.get_rank() == 0 or loaded["state"]:
                assert torch.equal(loaded["state"][name][key], value), (name, key)
    for p, q in zip(model.parameters(), whole.parameters(), strict=True):
        assert torch.equal(p.full_tensor(), q)
    train(model, optimizer)
    train(whole, reference)
    for p, q in zip(model.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(p.full_tensor(), q, rtol=1e-5, atol=1e-6)


def case_accelerate_goes_on_from_what_is_converted():
    """`Accelerator.save_state` under FSDP2 → canonical → accelerate's layout → `load_state`: the same losses, to the bit."""
    import accelerate_fsdp2

    folder = Path(shared_folder(OUT))
    forget_accelerate()
    accelerate_fsdp2.train(str(folder / "a"), stop_at=5)

    def write():
        (folder / "b").mkdir()
        convert(folder / "a" / "step-000005", folder / "canonical", "canonical")
        convert(
            folder / "canonical",
            folder / "b" / "step-000005",
            "dcp",
            WriteOptions(world_size=RANKS, layout="accelerate"),
        )
        assert verify(folder / "a" / "step-000005", folder / "b" / "step-000005") == []
        own, theirs = ({p.name for p in (folder / x / "step-000005").iterdir()} for x in "ab")
        assert own == theirs, own ^ theirs

    on_first(write)
    losses = []
    for name in "ab":
        forget_accelerate()
        losses.append(accelerate_fsdp2.train(str(folder / name))[-1])
    assert losses[0] == losses[1], losses
    assert len(losses[0]) == accelerate_fsdp2.STEPS - 5
    forget_accelerate()
    on_first(lambda: shutil.rmtree(folder))


def case_the_trainer_goes_on_from_what_is_converted():
    """transformers' Trainer under FSDP2 → canonical → its layout → `resume_from_checkpoint`: the same losses, to the bit."""
    import trainer

    folder = Path(shared_folder(OUT))
    forget_accelerate()
    losses = trainer.train(str(folder / "a"), fsdp=True)[-1]

    def write():
        (folder / "b").mkdir()
        convert(folder / "a" / "checkpoint-5", folder / "canonical", "canonical")
        options = WriteOptions(world_size=RANKS, layout="trainer")
        convert(folder / "canonical", folder / "b" / "checkpoint-5", "dcp", options)
        own, theirs = ({p.name for p in (folder / x / "checkpoint-5").iterdir()} for x in "ab")
        assert own == theirs, own ^ theirs

    on_first(write)
    forget_accelerate()
    assert trainer.train(str(folder / "b"), fsdp=True)[-1] == losses
    forget_accelerate()
    on_first(lambda: shutil.rmtree(folder))


if __name__ == "__main__":
    OUT = sys.argv[1]
    run_cases(globals())
