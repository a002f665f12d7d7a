"""DeepSpeed makes checkpoints, and loads what is written of them, on two ranks; `test_zero.py` launches all of it at once.

The oracle is DeepSpeed's own view of its state when it saved, and the run that went on from there without an interruption.
"""

import argparse
import logging
import sys
import warnings
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[1] / "distributed"))
import zero_fixtures as fixtures
from deepspeed.checkpoint import ds_to_universal
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from launch_cases import run_cases
from zero_tables import CASES, LOADS, RESTORES, SOURCES, UNIVERSAL

from anon_dist.checkpoint import CheckpointError
from anon_dist.checkpoint.convert import convert
from anon_dist.checkpoint.formats import open_checkpoint
from anon_dist.checkpoint.options import WriteOptions
from anon_dist.engines.zero_restore import restore

OUT = Path(sys.argv[1])
NOISE = {"rtol": 1e-5, "atol": 1e-6}
"""Stages sum gradients in other orders: float32 rounding, over a few steps."""
NOISE_BF16 = {"rtol": 2e-2, "atol": 2e-3}
"""Gradients with 8 bits."""


def told(source):
    return torch.load(OUT / source / "oracle.pt", weights_only=False)


def converted(source, name, to, **options):
    """A checkpoint written by rank 0, for all."""
    target = OUT / f"written_{name}"
    if dist.get_rank() == 0:
        convert(source if isinstance(source, Path) else OUT / source, target, to, WriteOptions(**options))
    dist.barrier()
    return target


def check_state(engine, source, hyperparameters=True, fixed=True):
    """That an engine holds, bit for bit, what the source held when it was saved."""
    expected, found = told(source), fixtures.oracle(engine)
    for name, value in expected["masters"].items():
        assert torch.equal(found["masters"][name], value), name
        assert set(found["states"][name]) == set(expected["states"][name])
        for key, state in expected["states"][name].items():
            assert torch.equal(found["states"][name][key], state), (name, key)
    for name, value in expected["weights"].items():
        assert torch.equal(found["weights"][name].float(), value.float()) or not fixed, name
    assert not fixed or all(torch.equal(found["buffers"][n], b) for n, b in expected["buffers"].items())
    assert found["scalars"] == expected["scalars"]
    assert found["groups"] == expected["groups"] or not hyperparameters
    assert engine.global_steps == fixtures.SAVED


def check_trajectory(engine, source, bf16):
    """That it trains on as the run that was not interrupted."""
    fixtures.train(engine, fixtures.SAVED, fixtures.SAVED + fixtures.MORE)
    expected, before = torch.load(OUT / source / "after.pt"), told(source)["masters"]
    for name, value in fixtures.masters(engine).items():
        assert not torch.equal(value, before[name])
        torch.testing.assert_close(value, expected[name], **(NOISE_BF16 if bf16 else NOISE))


def fresh_engine(source, stage, config):
    """One with other weights and buffers."""
    engine = fixtures.make_engine(SOURCES[source][0], stage, config, seed=1)
    for buffer in engine.module.buffers():
        buffer.zero_()
    return engine


def load(source, stage, config, name, origin=None):
    options = config.get("zero_optimization", {})
    known = {k: options[k] for k in ("sub_group_size", "round_robin_gradients") if k in options}
    folder = converted(origin or source, name, f"zero{stage}", world_size=2, **known)
    engine = fresh_engine(source, stage, config)
    path, client_state = engine.load_checkpoint(str(folder))
    assert path is not None
    assert (client_state["cursor"], client_state["note"]) == (32, source)
    check_state(engine, source)
    check_trajectory(engine, source, "bf16" in config)


def restored(source, stage, config, origin=None, **checks):
    checkpoint = open_checkpoint(OUT / (origin or source))
    engine = fresh_engine(source, stage, config)
    if origin is None:
        fixtures.train(engine, 0, 2)  # there is a state already, of another step
    restore(engine, checkpoint)
    check_state(engine, source, **checks)
    check_trajectory(engine, source, "bf16" in config)


def universal(source, stage, config, name):
    """DeepSpeed's loader restores neither what is frozen nor buffers; at stage 3 it gives all groups the first one's hyperparameters."""
    folder = converted(source, f"universal_{name}", "universal")
    engine = fresh_engine(source, stage, {**config, "checkpoint": {"load_universal": True}})
    for name, p in engine.module.named_parameters():
        if not p.requires_grad:
            with fixtures.deepspeed.zero.GatheredParameters([p], modifier_rank=0, enabled=hasattr(p, "ds_id")):
                p.data.copy_(told(source)["weights"][name])
    for name, buffer in engine.module.named_buffers():
        buffer.copy_(told(source)["buffers"][name])
    engine.load_checkpoint(str(folder))
    check_state(engine, source, hyperparameters=stage != 3)
    if stage != 3:
        check_trajectory(engine, source, "bf16" in config)
    restored(source, stage, config, origin=folder)


def one_rank_on_two():
    single = converted("stage2_anon", "one_rank", "zero2", world_size=1)
    load("stage2_anon", 3, {}, "two_ranks", origin=single)


def other_groups():
    engine = fixtures.make_engine("anon", 2, {}, one_group=True)
    try:
        restore(engine, open_checkpoint(OUT / "stage3_anon"))
    except CheckpointError as error:
        if "are in one param group here" not in str(error):
            raise
    else:
        raise AssertionError("two groups with other learning rates went into one")


def universal_of_deepspeed(source, folder=None):
    """What DeepSpeed's own converter makes of a checkpoint says the same."""
    tag = OUT / (folder or source) / f"global_step{fixtures.SAVED}"
    target = OUT / f"deepspeed_{folder or source}" / "tag"
    if dist.get_rank() == 0:
        arguments = {"num_extract_workers": 1, "num_merge_workers": 1, "keep_temp_folder": False, "strict": True}
        arguments |= {"inject_missing_state": True, "input_folder": str(tag), "output_folder": str(target)}
        ds_to_universal.main(argparse.Namespace(**arguments))
    dist.barrier()
    restored(source, SOURCES[source][1], SOURCES[source][2], origin=target.parent)


def zero_to_fp32():
    for name, source in (
        ("2_to_3", "stage2_anon"),
        ("1_to_round_robin", "stage1_adamw"),
        ("bf16_2_to_3", "stage2_bf16_adamw"),
    ):
        found = get_fp32_state_dict_from_zero_checkpoint(str(OUT / f"written_{name}"))
        expected = told(source)
        for key, value in {**expected["masters"], **expected["buffers"]}.items():
            assert torch.equal(found[key], value.float()), (name, key)
        assert torch.equal(found["a2.weight"], expected["masters"]["a.weight"])
        assert torch.equal(found["frozen.weight"].float(), expected["weights"]["frozen.weight"].float())


def cases():
    """Name → function, in the order of `CASES`."""
    table = {f"make_{n}": lambda n=n: fixtures.make(n, OUT / n) for n in SOURCES}
    table |= {f"load_{n}": lambda n=n, c=c: load(*c, n) for n, c in LOADS.items()}
    table |= {f"restore_{n}": lambda c=c: restored(*c) for n, c in RESTORES.items()}
    table |= {f"universal_{n}": lambda n=n, c=c: universal(*c, n) for n, c in UNIVERSAL.items()}
    table["load_one_rank_on_two"] = one_rank_on_two
    for to in ("dcp", "canonical"):
        table[f"restore_from_{to}"] = lambda to=to: restored(
            "stage2_anon", 3, {}, origin=converted("stage2_anon", to, to)
        )
    table["restore_refuses_other_groups"] = other_groups
    table["universal_of_deepspeed_stage2"] = lambda: universal_of_deepspeed("stage1_adamw")
    table["universal_of_deepspeed_stage3"] = lambda: universal_of_deepspeed("stage3_bf16_adamw")
    written = "written_1_to_round_robin"
    table["universal_of_deepspeed_of_what_is_written"] = lambda: universal_of_deepspeed("stage1_adamw", written)
    table["zero_to_fp32_of_what_is_written"] = zero_to_fp32
    return {f"case_{name}": table[name] for name in CASES}


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    for name in SOURCES:
        (OUT / name).mkdir(exist_ok=True)
    run_cases(cases())
