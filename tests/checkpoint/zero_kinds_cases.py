"""Frozen bases, float buffers, Muon and numbers of one rank's, through DeepSpeed's own files, on three, two and one ranks of one launch.

The judge is DeepSpeed: it makes what is converted, and its `load_checkpoint` loads what is written; then every tensor has the bits that the
first engine had when it saved, and the next steps are those of the run that went on there.
"""

import json
import logging
import math
import os
import sys
import time
import traceback
import warnings
from datetime import timedelta
from importlib import reload
from pathlib import Path

import torch
import torch._dynamo
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[1] / "distributed"))
import deepspeed
import zero_kinds as kinds
from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload
from launch_cases import raises
from zero_kinds_tables import LOADS, REFUSED, SOURCES, THROUGH

from anon_dist.checkpoint import CheckpointError
from anon_dist.checkpoint.convert import convert
from anon_dist.checkpoint.formats import open_checkpoint
from anon_dist.checkpoint.options import ReadOptions, WriteOptions
from anon_dist.engines.zero_restore import restore

torch._dynamo.config.disable = True  # Muon's kernels, which each number of ranks would compile anew
OUT, RANK = Path(sys.argv[1]), int(os.environ["RANK"])
RANKS, WANTED = 3, sys.argv[2:]


def told(source):
    return torch.load(OUT / source / "oracle.pt", weights_only=False)


def make(name):
    kind, _, stage, config = SOURCES[name]
    engine = kinds.make_engine(kind, stage, config)
    kinds.train(engine, 0, kinds.SAVED)
    excluded = {"exclude_frozen_parameters": True} if "excluded" in name else {}
    engine.save_checkpoint(str(OUT / name), client_state={"note": name}, **excluded)
    found = {**kinds.oracle(engine), "members": engine.members}
    kinds.train(engine, kinds.SAVED, kinds.SAVED + kinds.MORE)
    after = kinds.oracle(engine)
    if RANK == 0:
        torch.save(found, OUT / name / "oracle.pt")
        torch.save(after, OUT / name / "after.pt")


def read(source):
    """Stage 0 in float32 numbers its parameters, and some that are alike are of one shape."""
    if source in ("adafactor_0", "frozen_group_0", "lora_0", "muon_0"):
        return ReadOptions(names=[n for group in told(source)["members"] for n in group])
    return ReadOptions()


def converted(source, name, to, origin=None, **options):
    """A checkpoint written by rank 0, for all."""
    target = OUT / f"written_{name}"
    if RANK == 0:
        options = WriteOptions(world_size=dist.get_world_size(), **options)
        convert(origin or OUT / source, target, to, options, None if origin else read(source))
    dist.barrier()
    return target


def fresh_engine(source, stage, config, init=False):
    """One with other weights; what a checkpoint without its base cannot give, it has."""
    engine = kinds.make_engine(SOURCES[source][0], stage, config, seed=1, init=init)
    expected = told(source)
    if "excluded" in source:
        for name, p in engine.module.named_parameters():
            with deepspeed.zero.GatheredParameters([p], modifier_rank=0, enabled=hasattr(p, "ds_id")):
                p.data.copy_(expected["weights"][name] if not p.requires_grad else p.data)
    for name, buffer in engine.module.named_buffers():
        buffer.copy_(expected["buffers"][name]) if name == "cache" else buffer.zero_()
    return engine


def check(engine, source, alike):
    """That the engine holds, bit for bit, what the source did, and trains on as it did.

    Args:
        alike: of the same stage, on as many ranks: the next steps have the same bits.
    """
    expected, found = told(source), kinds.oracle(engine)
    for part in ("weights", "buffers", "masters"):
        assert found[part].keys() == expected[part].keys()
        for name, value in expected[part].items():
            assert torch.equal(found[part][name].float(), value.float()), (part, name)
    for name, states in expected["states"].items():
        assert found["states"][name].keys() == states.keys(), name
        for key, value in states.items():
            assert torch.equal(found["states"][name][key].float(), value.float()), (name, key)
    assert found["steps"] == expected["steps"]
    groups = expected["groups"]
    if len(groups) > len(found["groups"]):  # stages 1 and 2 have no group of frozen parameters alone
        groups = groups[1:]
    assert found["groups"] == groups
    if alike:
        assert found["numbers"] == expected["numbers"]
    kinds.train(engine, kinds.SAVED, kinds.SAVED + kinds.MORE)
    after, now = torch.load(OUT / source / "after.pt", weights_only=False), kinds.oracle(engine)
    # Gradients are summed in another order: float32 rounding, or 8 bits in bf16. Muon makes small singular values of them as large as any.
    noise = 0.0 if alike else 0.25 if "muon" in source or "bf16" in source else 1e-3
    if "muon" in source and "bf16" in source and not alike:
        noise = 0.5
    moved = {n: after["masters"][n] - value for n, value in expected["masters"].items()}
    errors = {n: value - after["masters"][n] for n, value in now["masters"].items()}
    assert all(value.norm() > 0 for value in moved.values())
    assert _norm(errors) <= noise * _norm(moved), (_norm(errors), _norm(moved))


def _norm(values):
    return math.sqrt(sum(float(value.square().sum()) for value in values.values()))


def is_alike(source, stage, config):
    _, world, made, options = SOURCES[source]
    return (world, made, options) == (dist.get_world_size(), stage, config)


def load(name):
    source, _, stage, config = LOADS[name]
    sub_groups = config.get("zero_optimization", {}).get("sub_group_size")
    momentum = {True: "parts", False: "whole"}[config in (kinds.OFFLOAD, kinds.BF16_OPTIMIZER)]
    folder = converted(
        source, name, f"zero{stage}", sub_group_size=sub_groups, muon_momentum=momentum, muon_order="size"
    )
    engine = fresh_engine(source, stage, config)
    path, client_state = engine.load_checkpoint(str(folder), load_module_strict="excluded" not in source)
    assert path is not None
    assert client_state["note"] == source
    check(engine, source, is_alike(source, stage, config))


def restored(name):
    source, _, stage, config = LOADS[name]
    engine = fresh_engine(source, stage, config)
    kinds.train(engine, 0, 1)  # there is a state already
    restore(engine, open_checkpoint(OUT / source, read(source)), strict="excluded" not in source)
    check(engine, source, is_alike(source, stage, config))


def through(source, to):
    """Another format on the way, which may know of no masters, buffers or ranks."""
    _, _, stage, config = SOURCES[source]
    between = converted(source, f"{to}_{source}", to)
    targets = (stage,) if "lamb" in source else (2, 3)
    for target in targets:
        folder = converted(source, f"{to}_{source}_{target}", f"zero{target}", between, muon_order="size")
        engine = fresh_engine(source, target, config)
        engine.load_checkpoint(str(folder))
        check(engine, source, target == stage)
    engine = fresh_engine(source, targets[0], config)
    restore(engine, open_checkpoint(between))
    check(engine, source, targets[0] == stage)


def other_parts():
    """Numbers of a rank's part do not go where parameters are cut elsewhere, unless they may be left out."""
    for source, stage, numbers in (("adafactor_2", 3, "RMS"), ("lamb_3", 2, "norms and trust_ratio")):
        engine = kinds.make_engine(SOURCES[source][0], stage, {})
        checkpoint = open_checkpoint(OUT / source)
        raises(CheckpointError, f"{numbers} of ", lambda e=engine, c=checkpoint: restore(e, c))
        restore(engine, checkpoint, allow_loss=True)
        assert all(not set(own) & set(kinds.LOCAL) for own in engine.basic_optimizer.state.values())
    engine = kinds.make_engine("adafactor", 3, {})
    restore(engine, open_checkpoint(OUT / "adafactor_2"), allow_loss=True)
    kinds.train(engine, kinds.SAVED, kinds.SAVED + 1)  # which makes its RMS anew
    made = {source: how for source, how in REFUSED.items() if (OUT / source).is_dir()}
    for source, (to, ranks) in made.items() if RANK == 0 else ():
        numbers = "RMS of " if "adafactor" in source else "norms and trust_ratio of "
        target, origin = OUT / f"refused_{source}", OUT / source
        plain, lossy = WriteOptions(ranks), WriteOptions(ranks, allow_loss=True)
        raises(CheckpointError, numbers, lambda a=(origin, target, to, plain): convert(*a))
        notes = convert(origin, target, to, lossy)
        assert any(numbers in note for note in notes), notes
    dist.barrier()


def missing_bases():
    engine = kinds.make_engine("lora", 3, {})
    checkpoint = open_checkpoint(OUT / "lora_3_excluded")
    raises(CheckpointError, "embed.weight, which is frozen here", lambda: restore(engine, checkpoint))


def untold_buffers():
    """torch.save of a model and its optimizer: float buffers look like frozen parameters."""
    folder = OUT / "lora_3"
    plain = OUT / "plain.pt"
    if RANK == 0:
        convert(folder, OUT / "plain_with_names.pt", "consolidated", WriteOptions())
        saved = torch.load(OUT / "plain_with_names.pt", weights_only=False)
        torch.save({k: saved[k] for k in ("model", "optimizer")}, plain)
        convert(plain, OUT / "plain_2", "zero2")
        for origin in (plain, OUT / "plain_2"):  # which does not make it surer
            refused = (origin, OUT / "plain_3", "zero3")
            raises(CheckpointError, "which stage 3 lays in different ways", lambda a=refused: convert(*a))
    dist.barrier()
    for stage, buffers in ((3, ["inv_freq", "bias"]), (2, None)):
        folder = converted("lora_3", f"untold_{stage}", f"zero{stage}", plain, buffers=buffers)
        engine = fresh_engine("lora_3", stage, {})
        engine.load_checkpoint(str(folder))
        check(engine, "lora_3", False)


def universal_of_lora():
    folder = converted("lora_3_bf16", "universal_lora", "universal")
    engine = fresh_engine("lora_3_bf16", 3, kinds.BF16)
    restore(engine, open_checkpoint(folder))
    check(engine, "lora_3_bf16", False)


def universal_of_muon():
    if RANK == 0:
        target = OUT / "universal_muon"
        raises(CheckpointError, "momentum in parts", lambda: convert(OUT / "muon_3_of_2", target, "universal"))
    folder = converted("muon_1_bf16_optimizer", "universal_muon", "universal")
    config = {**kinds.BF16_OPTIMIZER, "checkpoint": {"load_universal": True}}
    engine = fresh_engine("muon_1_bf16_optimizer", 1, config)
    engine.load_checkpoint(str(folder))
    for name, buffer in engine.module.named_buffers():
        buffer.copy_(told("muon_1_bf16_optimizer")["buffers"][name])
    check(engine, "muon_1_bf16_optimizer", False)


def muon_under_init():
    """A model made under zero.Init hides the sizes that Muon sorts its matrices by."""
    if RANK == 0:
        refused = (OUT / "muon_3_of_2", OUT / "under_init", "zero3", WriteOptions(world_size=2))
        raises(CheckpointError, "--muon-order", lambda: convert(*refused))
    folder = converted("muon_3_of_2", "under_init", "zero3", muon_order="model")
    engine = fresh_engine("muon_3_of_2", 3, {}, init=True)
    engine.load_checkpoint(str(folder))
    check(engine, "muon_3_of_2", False)


def cases(world, first):
    """Name → function, for this number of ranks: those that make sources, or those that take them."""
    return {name: case for name, case in every(world, first).items() if name in WANTED}


def every(world, first):
    """All of them."""
    if first:
        return {f"make_{n}": lambda n=n: make(n) for n, s in SOURCES.items() if s[1] == world}
    table = {f"load_{n}": lambda n=n: load(n) for n, c in LOADS.items() if c[1] == world}
    table |= {f"restore_{n}": lambda n=n: restored(n) for n, c in LOADS.items() if c[1] == world}
    for source, formats in THROUGH.items():
        if SOURCES[source][1] == world:
            table |= {f"through_{to}_{source}": lambda s=source, t=to: through(s, t) for to in formats}
    if world == 2:
        table["restore_refuses_other_parts"] = other_parts
        table["restore_refuses_missing_bases"] = missing_bases
        table["buffers_of_a_file_that_does_not_tell"] = untold_buffers
        table["universal_of_lora"] = universal_of_lora
        table["universal_of_muon"] = universal_of_muon
        table["muon_under_init"] = muon_under_init
    return table


def regroup(store, phase, world):
    """A process group of the first ranks, and a DeepSpeed that knows of no other."""
    os.environ["WORLD_SIZE"] = os.environ["LOCAL_WORLD_SIZE"] = str(world)
    prefixed = dist.PrefixStore(f"phase-{phase}", store)
    dist.init_process_group("gloo", store=prefixed, rank=RANK, world_size=world, timeout=timedelta(seconds=60))
    reload(deepspeed.utils.groups)
    deepspeed.comm.comm.cdb = None
    deepspeed.zero.Init.param_id = 0  # stage 3 counts parameters and modules, and compares the counts across ranks
    DeepSpeedZeRoOffload._register_deepspeed_module.__defaults__[0][0] = 0


def main():
    store = dist.TCPStore("localhost", int(os.environ["MASTER_PORT"]), RANKS, False, timedelta(seconds=400), False)
    results = {}
    for phase, (world, first) in enumerate(((3, True), (2, True), (1, True), (1, False), (2, False), (3, False))):
        table = cases(world, first)
        if world > RANK:
            regroup(store, phase, world)
        for name, case in table.items():
            of_processor = time.process_time()
            try:
                if world > RANK:
                    case()
                results[f"case_{name}"] = "passed"
            except Exception:
                results[f"case_{name}"] = traceback.format_exc()
            used = f"{time.process_time() - of_processor:.2f} s of a processor"
            print(f"rank {RANK}, {name}: {used}", flush=True)
            (OUT / f"results-{RANK}.json").write_text(json.dumps(results))
            if world > RANK:
                dist.barrier()
        if world > RANK:
            dist.destroy_process_group()
        store.set(f"done-{phase}-{RANK}", "1")
        store.wait([f"done-{phase}-{rank}" for rank in range(RANKS)])


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    main()
