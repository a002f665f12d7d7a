"""Matrices in bases of their own under DeepSpeed's stage 3: each case against one process, and what ranks send each other counted.

`test_bases.py` launches them on 2 to 4 ranks; each `case_…` function runs on every rank, over gloo.
"""

import os
import sys
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[1]))
import deepspeed
from basis_cases import LM, gradient
from deepspeed.checkpoint import ds_to_universal
from former import change_zero3, renamed
from launch_cases import Patch, raises, run_cases, shared_folder, warned_of_damage
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.debug import CommDebugMode

from anon_dist import Anon
from anon_dist.bench.bases import cost
from anon_dist.bench.memory import Bases, Job
from anon_dist.bench.shapes import Parameter
from anon_dist.bench.traffic import bytes_sent
from anon_dist.checkpoint import CheckpointError
from anon_dist.checkpoint.convert import convert
from anon_dist.checkpoint.formats import open_checkpoint
from anon_dist.checkpoint.options import WriteOptions
from anon_dist.engines import zero_restore
from anon_dist.engines.errors import EngineError
from anon_dist.engines.restore import restore
from anon_dist.optim import flat
from anon_dist.optim.frame import BASIS_KEYS, KEYS

# Rows that divide among 2, 3 and 4 ranks, a block that is cut short, a tensor of more dimensions; vectors that do not divide.
SHAPES = {"square": (24, 24), "tall": (48, 20), "vector": (33,), "wide": (24, 40), "cube": (24, 4, 5), "bias": (5,)}
STEPS, SAVED = 14, 7
REFRESHES = {1, 2, 3, 4, 6, 8, 11}
COLUMNS, BOTH = {"basis": "columns", "basis_block": 16}, {"basis": "both", "basis_block": 2}


class Bag(nn.Module):
    """Parameters of these shapes, the same on every rank; their gradients in step t are `gradient(…, t)`."""

    def __init__(self, shapes=None):
        super().__init__()
        self.shapes = shapes or SHAPES
        for i, (name, shape) in enumerate(self.shapes.items()):
            setattr(self, name, nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(i))))

    def forward(self, t):
        return sum((getattr(self, name) * gradient(name, shape, t)).sum() for name, shape in self.shapes.items())


def groups(model):
    """Two of them, of which one has a γ of its own."""
    named = dict(model.named_parameters())
    apart = [name for name in ("tall", "bias") if name in named]
    found = [{"params": [p for name, p in named.items() if name not in apart]}]
    return [*found, {"params": [named[name] for name in apart], "gamma": 0.9}] if apart else found


def started(hyper, shapes=None, bf16=False, parted=groups, **zero):
    """An engine, several sub-groups in a group."""
    model = Bag(shapes)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 0.0,
        "bf16": {"enabled": bf16},
        "zero_optimization": {"stage": 3, "sub_group_size": 200, **zero},
    }
    engine, *_ = deepspeed.initialize(model=model, config=config, optimizer=Anon(parted(model), **{**LM, **hyper}))
    return engine


def train(engine, steps):
    for t in steps:
        engine.backward(engine(t))
        engine.step()
    engine.basic_optimizer.settle()


def train_plainly(model, optimizer, steps):
    for t in steps:
        model(t).backward()
        optimizer.step()
        optimizer.zero_grad()
    optimizer.settle()


def masters(engine):
    from deepspeed.utils import safe_get_full_fp32_param

    return {name: safe_get_full_fp32_param(p).clone() for name, p in engine.module.named_parameters()}


def assert_close(found, expected):
    for name, q in expected.items():
        # Fewer rows than columns leave directions without gradient, of which the basis knows only rounding: 1/200 of a step then.
        bound = 1e-4 if q.dim() > 1 and q.shape[0] < q[0].numel() else 1e-5
        assert (error := float((found[name] - q).detach().abs().max())) <= bound, (name, error)


def one_process(hyper, steps=STEPS, shapes=None, parted=groups):
    model = Bag(shapes)
    optimizer = Anon(parted(model), **{**LM, **hyper})
    train_plainly(model, optimizer, range(steps))
    return dict(model.named_parameters()), optimizer


def case_stage_3_is_one_process():
    for hyper, zero in (
        (COLUMNS, {}),
        ({**COLUMNS, "window": 2, "fused": False}, {"offload_optimizer": {"device": "cpu"}}),
        ({**BOTH, "update_clip": 1.0, "max_interval": 3}, {"sub_group_size": 10**9}),
    ):
        engine = started(hyper, **zero)
        train(engine, range(STEPS))
        assert_close(masters(engine), one_process(hyper)[0])
        assert any("basis_columns" in s for s in engine.basic_optimizer.state.values())
        assert_same_bases_of_columns(engine.basic_optimizer)


def assert_same_bases_of_columns(optimizer):
    """On all ranks, to the bit."""
    for state in optimizer.state.values():
        for mine in (state[key] for key in KEYS["columns"] if key in state):
            others = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
            dist.all_gather(others, mine)
            assert all(torch.equal(mine, other) for other in others)


def case_ranks_talk_only_after_a_refresh():
    """Of a sub-group once, and so many bytes as its covariances have; while the optimizer steps, nothing else is sent. `bench plan` says as
    much."""
    engine, sizes, patch = started(COLUMNS), [], Patch()
    optimizer, reduce = engine.basic_optimizer, dist.all_reduce
    step = optimizer.step

    def counted():
        with CommDebugMode() as communication:
            patch.setattr(
                dist, "all_reduce", lambda x, *args, **more: (sizes.append(x.numel()), reduce(x, *args, **more))[1]
            )
            step()
            patch.close()
        counts.append(communication.get_total_counts())

    optimizer.step = counted
    matrices = [
        sum(n * min(16, n) for s in layout.shares if len(s.shape) > 1 and (n := s.columns))
        for p in engine.optimizer.fp32_partitioned_groups_flat
        if (layout := flat.layout_of(p))
    ]
    parameters = [Parameter(shape, "block") for shape in SHAPES.values()]
    job = Job(SimpleNamespace(parameters=lambda: parameters), dist.get_world_size())
    planned = cost("zero3", job, Bases("columns", 16))
    assert planned.refresh_bytes == bytes_sent("all-reduce", 4 * sum(matrices), dist.get_world_size())
    for t in range(1, STEPS):
        counts: list[int] = []
        sizes.clear()
        train(engine, [t])
        expected = sorted(size for size in matrices if size) if t in REFRESHES and dist.get_world_size() > 1 else []
        assert sorted(sizes) == expected, (t, sizes, expected)
        assert sum(counts) == len(expected), (t, counts)
    kept = (state[key] for state in optimizer.state.values() for key in BASIS_KEYS if key in state)
    assert planned.bytes == sum(x.numel() * x.element_size() for x in kept)


def case_rows_that_do_not_divide_are_refused():
    """All ranks name them, and the remedy; without a basis for them the others are turned."""
    ranks = dist.get_world_size()
    shapes = {"fits": (4 * ranks, 8), "odd": (4 * ranks + 1, 8), "odder": (ranks + 1, 5)}
    if ranks == 1:
        return
    words = f"the {4 * ranks + 1} rows of odd and 1 more do not divide among {ranks} ranks. Take basis=None for their param group"
    raises(EngineError, words, lambda: started(COLUMNS, shapes, sub_group_size=10**9))
    raises(
        EngineError,
        "basis_block=2 would fit",
        lambda: started({"basis": "rows", "basis_block": 4}, {"a": (2 * ranks, 8)}),
    )
    for stage in (1, 2):
        words = f"DeepSpeed's stage {stage} cuts matrices into flat parts, within rows, which a basis needs whole"
        raises(EngineError, words, lambda stage=stage: started(COLUMNS, stage=stage))


def case_large_matrices_without_a_basis_beside_turned_ones():
    """DeepSpeed shows the optimizer one sub-group at a time: also one in which nothing is to be turned, such as embeddings."""
    shapes = {"square": (24, 24), "embedding": (4800, 12), "wide": (24, 40), "bias": (5,)}

    def parted(model):
        named = dict(model.named_parameters())
        return [
            {"params": [named.pop("embedding")], "basis": None, "betas": (0.9, 0.95)},
            {"params": [*named.values()]},
        ]

    for order in (parted, lambda model: parted(model)[::-1]):
        for hyper in (COLUMNS, BOTH):
            engine = started(hyper, shapes, parted=order)
            train(engine, range(STEPS))
            assert_close(masters(engine), one_process(hyper, shapes=shapes, parted=order)[0])


def case_deepspeeds_own_checkpoint_goes_on():
    """With weights in bfloat16, states as the presets have them, and the bases under the keys of earlier versions: loaded to the bit, and
    on to rounding, since a product's last bit depends on where in memory a matrix lies."""
    folder = shared_folder(sys.argv[1])
    hyper = {**BOTH, "state_dtype": {"exp_avg_sq": "bfloat16", "precond": "bfloat16"}}
    engine, other = started(hyper, bf16=True), started(hyper, bf16=True)
    train(engine, range(SAVED))
    engine.save_checkpoint(folder)
    if dist.get_rank() == 0:
        change_zero3(folder)
    dist.barrier()
    assert not warned_of_damage(lambda: other.load_checkpoint(folder))
    flat = list(zip(*(e.optimizer.fp32_partitioned_groups_flat for e in (engine, other)), strict=True))
    # DeepSpeed leaves what pads a rank's share as it was in memory: that may be no number.
    same = {"rtol": 0.0, "atol": 0.0, "equal_nan": True}
    for p, q in flat:
        torch.testing.assert_close(p, q, **same)
        assert p.dtype == torch.float32
        mine, theirs = engine.basic_optimizer.state[p], other.basic_optimizer.state[q]
        assert mine.keys() == theirs.keys()
        torch.testing.assert_close(dict(mine), dict(theirs), **same)
    for one in (engine, other):
        train(one, range(SAVED, STEPS))
    for p, q in flat:
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-4, equal_nan=True)
    other._config.load_universal_checkpoint = True
    raises(EngineError, "and no basis, without which they mean nothing", lambda: other.load_checkpoint(folder))


def case_checkpoints_go_to_and_from_fsdp2():
    """ZeRO-3 → FSDP2, and on; → torch's DCP → ZeRO-3 by DeepSpeed's own loader, and by ours, and on to the bit."""
    folder = Path(shared_folder(sys.argv[1]))
    expected, reference = one_process(BOTH)
    engine = started(BOTH)
    train(engine, range(SAVED))
    engine.save_checkpoint(str(folder / "zero3"))
    train(engine, range(SAVED, STEPS))
    checkpoint = open_checkpoint(folder / "zero3")
    if dist.get_rank() == 0:
        check_conversions(folder / "zero3", folder / "converted", checkpoint)
    dist.barrier()
    model = fully_shard(Bag())
    optimizer = Anon(groups(model), **{**LM, **BOTH})
    optimizer.init_state()
    restore(model, optimizer, checkpoint)
    train_plainly(model, optimizer, range(SAVED, STEPS))
    assert_close({name: p.full_tensor() for name, p in model.named_parameters()}, expected)
    for name, p in model.named_parameters():
        assert reference.state[expected[name]].keys() == optimizer.state[p].keys()
    loaded, restored = started(BOTH), started({"basis": None})
    loaded.load_checkpoint(str(folder / "converted" / "zero3"))
    converted = open_checkpoint(folder / "converted" / "dcp")
    assert not warned_of_damage(lambda: zero_restore.restore(restored, converted))
    for other in (loaded, restored):
        train(other, range(SAVED, STEPS))
        mine, theirs = masters(engine), masters(other)
        assert all(torch.equal(x, theirs[name]) for name, x in mine.items())


def check_conversions(source, folder, checkpoint):
    """To torch's format, and from there to stage 3 on as many ranks, and on one: bit for bit. What cuts within rows is refused."""
    convert(source, folder / "dcp", "dcp", WriteOptions())
    many = WriteOptions(world_size=dist.get_world_size(), sub_group_size=200)
    for name, options in (("zero3", many), ("one", WriteOptions(world_size=1))):
        convert(folder / "dcp", folder / name, "zero3", options)
        other = open_checkpoint(folder / name)
        assert {key for key in checkpoint.tensors if key.state in BASIS_KEYS} <= other.tensors.keys()
        for key, info in checkpoint.tensors.items():
            assert torch.equal(other.read(key, 0, info.numel), checkpoint.read(key, 0, info.numel)), key
    for to, ranks, words in (
        ("zero3", 7, "do not divide among 7 ranks, as stage 3 would cut them: take another --world-size"),
        ("zero2", 2, "a basis of the whole matrix, which the flat buffers of DeepSpeed's stages 1 and 2"),
        ("universal", 1, "a basis of the whole matrix, which DeepSpeed's loader of universal checkpoints"),
    ):
        options = WriteOptions(world_size=ranks)
        raises(CheckpointError, words, lambda to=to, o=options: convert(source, folder / "refused", to, o))
    if dist.get_world_size() == 2:
        arguments = {"num_extract_workers": 1, "num_merge_workers": 1, "keep_temp_folder": False, "strict": True}
        arguments |= {
            "input_folder": str(next(source.glob("global_step*"))),
            "output_folder": str(folder / "universal"),
        }
        ds_to_universal.main(Namespace(**arguments, inject_missing_state=True))
        dropped = folder / "universal" / "zero" / "optimizer_state.pt"
        for change in (dict, renamed):
            torch.save(change(torch.load(dropped, weights_only=False)), dropped)
            raises(
                CheckpointError,
                "has dropped basis_columns, basis_rows, cov",
                lambda: open_checkpoint(folder / "universal"),
            )


if __name__ == "__main__":
    if "RANK" not in os.environ:  # one rank, which the launcher starts without peers
        os.environ |= {
            "RANK": "0",
            "LOCAL_RANK": "0",
            "WORLD_SIZE": "1",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": "0",
        }
    run_cases(globals())
