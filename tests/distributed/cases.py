"""Cases that need several ranks; `test_distributed.py` launches them all at once.

Each `case_…` function runs on every rank, one after the other, in one process group over gloo.
"""

import dataclasses
import json
import os
import resource
import shutil
import signal
import sys
import time
import warnings
from datetime import timedelta
from functools import cache
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from accelerate import Accelerator, DistributedDataParallelKwargs
from torch import nn
from torch.distributed import PrefixStore
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor, init_device_mesh
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from anon_dist import Anon
from anon_dist.bench.traffic import Traffic
from anon_dist.checkpoint import CheckpointError, Checkpoints, DamagedCheckpoint
from anon_dist.checkpoint.dcp.linking import LinkingWriter
from anon_dist.checkpoint.verify import verify
from anon_dist.data import Index, PrepareConfig, prepare
from anon_dist.engines import comparison
from anon_dist.engines.check import check_optimizer, check_same_start, check_world, state_bytes
from anon_dist.engines.errors import EngineError
from anon_dist.engines.grads import global_norm, scale_gradients
from anon_dist.engines.replicas import Copy, ReplicasDifferError, check_replicas, copies_of, states_of
from anon_dist.engines.start import Wanted, start, wrap
from anon_dist.optim import STATE_KEYS, monitor, param_groups
from anon_dist.optim.backends import choice, cpu
from anon_dist.optim.backends.build import BuildError
from anon_dist.optim.state import decoded
from anon_dist.train import loop
from anon_dist.train.config import parsing as c
from anon_dist.train.health import signals
from anon_dist.train.inputs import randomness
from anon_dist.train.loss.attach import attach
from anon_dist.train.loss.batch import mean_loss
from anon_dist.train.model.build import build_model
from anon_dist.train.reports.metrics import read_metrics
from anon_dist.train.run import set_up, wanted_engine

sys.path.insert(0, str(Path(__file__).parents[1]))
from damage import PAYLOADS, altered, flip, poison, poison_entry, refused, unsealed
from family_cases import (  # noqa: F401 - run_cases finds them here
    case_an_export_takes_one_copy_of_the_weights,
    case_every_family_has_the_bits_and_gradients_of_plain_transformers,
    case_no_rank_ever_has_a_whole_model,
    case_what_sharing_sequences_cannot_do_is_refused,
)
from helpers import (
    assert_exported_as_by_the_run,
    assert_scored_as_by_one_process,
    at_step,
    forget_accelerate,
    metrics,
    write_tasks,
)
from launch_cases import Patch, raises, run, run_cases, shared_folder
from spike_cases import check_nan, check_spikes, check_straggler

LM = {"betas": (0.9, 0.95), "refresh_ratio": 1.1, "beta3": 0.8, "update_clip": 1.0, "weight_decay": 0.1}
# What an engine may meet: odd sizes, and on some rank an empty shard.
SHAPES = {"square": (63, 63), "one": (1,), "row": (1, 7), "vector": (128,), "cube": (3, 4, 5), "long": (1001,)}
EIGHT_BITS = "exp_avg=int8, exp_avg_sq=bfloat16, precond=bfloat16"


class Bag(nn.Module):
    """Parameters of these shapes, the same on every rank."""

    def __init__(self, shapes=None):
        super().__init__()
        for i, (name, shape) in enumerate((shapes or SHAPES).items()):
            setattr(self, name, nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(i))))


def gradient(name, shape, t):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(map(ord, name)) * 100 + t))


def full(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def step_with_gradients(model, optimizer, t):
    """The same gradients, however the parameters are laid out; none for `vector` on every third step."""
    for name, p in model.named_parameters():
        p.grad = None
        if name != "vector" or t % 3:
            grad = gradient(name, p.shape, t)
            p.grad = distribute_tensor(grad, p.device_mesh, p.placements) if isinstance(p, DTensor) else grad
    optimizer.step()


def assert_same_bits(model, optimizer, other, reference):
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(full(p), full(q)), name
        state, expected = decoded(optimizer.state[p]), decoded(reference.state[q])
        for key in STATE_KEYS:
            assert torch.equal(full(state[key]), full(expected[key])), (name, key)


def wanted(engine, precision="fp32"):
    return Wanted(engine, precision, timedelta(minutes=1), micro_batch=2, accumulation=lambda ranks: 2, clip=None)


def small_model(vocab=100, **changes):
    torch.manual_seed(0)
    return build_model(c.ModelConfig(**{"layers": 2, "width": 32, "heads": 2, "context": 32, **changes}), vocab, 0, 32)


# -- the optimizer under FSDP2 ----------------------------------------------------------------------------------------


def case_bits_do_not_depend_on_the_sharding():
    for hyper in (
        {},
        {"gamma": 0.5, "window": 3},
        {"gamma": -1.0, "hold_silent": True, "refresh_ratio": 2.0},
        {"foreach": True},
        {"fused": True},
        {"state_dtype": "bfloat16"},
    ):
        whole, model = Bag(), fully_shard(Bag())
        reference, optimizer = Anon(whole.parameters(), **{**LM, **hyper}), Anon(model.parameters(), **{**LM, **hyper})
        for t in range(40):
            step_with_gradients(whole, reference, t)
            step_with_gradients(model, optimizer, t)
        assert_same_bits(model, optimizer, whole, reference)


def case_one_rank_that_cannot_build_the_kernel_keeps_all_from_it():
    """Replicas stay the same bits: those of the foreach path where one rank has no compiler, the kernel's where all have one."""
    for rank_without in (1, None):
        patch = Patch()
        store = PrefixStore(f"without {rank_without}", choice._get_default_store())
        patch.setattr(
            choice, "_get_default_store", lambda store=store: store
        )  # as if this were the first step in these processes
        if dist.get_rank() == rank_without:
            patch.setattr(cpu, "library", lambda: (_ for _ in ()).throw(BuildError("no C compiler found")))
        model, other = Bag(), Bag()
        optimizer = Anon(model.parameters(), **LM)
        reference = Anon(other.parameters(), **LM, fused=rank_without is None)
        for t in range(12):
            step_with_gradients(model, optimizer, t)
            step_with_gradients(other, reference, t)
        patch.close()
        assert_same_bits(model, optimizer, other, reference)


def case_a_rank_left_without_parameters_takes_part():
    """The first step waits for every rank, so one that has nothing to step must answer too, and at once."""
    patch = Patch()
    store = PrefixStore("left without", choice._get_default_store())
    patch.setattr(choice, "_get_default_store", lambda: store)
    optimizer = Anon([{"params": [nn.Parameter(torch.ones(3))] if dist.get_rank() == 0 else []}], **LM)
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.ones(3)
    begun = time.monotonic()
    optimizer.step()
    patch.close()
    assert time.monotonic() - begun < choice.AGREEMENT_SECONDS / 2
    assert optimizer._stepper.kernel_agreed is True


def case_state_is_sharded_and_the_step_adds_no_communication():
    forget_accelerate()
    accelerator, name = start(wanted("fsdp2"))
    model = small_model(width=64)
    optimizer = Anon(
        param_groups(model, 0.1), **{**LM, "weight_decay": 0.1}
    )  # over the unsharded parameters, as people write it
    engine = wrap(name, accelerator, model, optimizer)
    model, size = engine.model, engine.state_bytes()
    assert size.whole == 12 * sum(p.numel() for p in model.parameters())
    assert abs(size.local * dist.get_world_size() / size.whole - 1) < 0.02, size
    assert len(optimizer.state) == len(list(model.parameters()))
    tokens = torch.randint(0, 100, (2, 32))
    model(input_ids=tokens).logits.sum().backward()
    with CommDebugMode() as communication:
        optimizer.step()
    assert communication.get_total_counts() == 0, communication.get_comm_counts()


def case_an_optimizer_made_before_fully_shard_is_noticed():
    """torch's own fully_shard replaces the parameters in the model and not in the optimizer, which then trains nothing."""
    model = nn.Linear(64, 64)
    optimizer = Anon(model.parameters(), **LM)
    fully_shard(model)
    model(torch.ones(1, 64)).sum().backward()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimizer.step()
    assert any("make it afterwards" in str(w.message) for w in caught)
    assert len(optimizer.state) == 0


def case_reading_the_state_first_takes_no_step():
    for read in (lambda m, o: o.state_dict(), get_optimizer_state_dict):
        model = fully_shard(Bag())
        optimizer = Anon(model.parameters(), **LM)
        states = read(model, optimizer)["state"]
        assert all(float(s["step"]) == 0 for s in states.values())
        assert len(states) == len(SHAPES)


def case_dcp_round_trip_into_a_fresh_optimizer():
    """As a user of torch alone would do it: the fresh optimizer has no state when its state dict is asked for."""
    for steps, state_dtype in (
        (3, None),
        (9, EIGHT_BITS),
        (31, None),
        (33, EIGHT_BITS),
    ):  # around refreshes and window edges
        hyper = {**LM, "refresh_ratio": 2.0, "window": 5, "state_dtype": state_dtype}
        model = fully_shard(Bag())
        optimizer = Anon(model.parameters(), **hyper)
        for t in range(steps):
            step_with_gradients(model, optimizer, t)
        folder = shared_folder(OUT)
        model_state, optimizer_state = get_state_dict(model, optimizer)
        dcp.save({"m": model_state, "o": optimizer_state}, checkpoint_id=folder)
        other = fully_shard(Bag())
        resumed = Anon(other.parameters(), lr=0.5, state_dtype=state_dtype)
        model_state, optimizer_state = get_state_dict(other, resumed)
        dcp.load({"m": model_state, "o": optimizer_state}, checkpoint_id=folder)
        set_state_dict(other, resumed, model_state_dict=model_state, optim_state_dict=optimizer_state)
        for t in range(steps, steps + 40):
            step_with_gradients(model, optimizer, t)
            step_with_gradients(other, resumed, t)
        assert_same_bits(model, optimizer, other, resumed)


# -- gradients --------------------------------------------------------------------------------------------------------


def case_global_norm_over_meshes():
    """Parameters sharded on one mesh, on another, replicated, and plain ones: the norm of all of them together."""
    world = dist.get_world_size()
    line, grid = init_device_mesh("cpu", (world,)), init_device_mesh("cpu", (world, 1), mesh_dim_names=("dp", "tp"))
    layouts = [
        (line, [Shard(0)]),
        (grid, [Shard(0), Shard(1)]),
        (grid, [Replicate(), Shard(1)]),
        (line, [Replicate()]),
        None,
    ]
    parameters, total = [], 0.0
    for i, layout in enumerate(layouts):
        value = torch.randn(7, 5, generator=torch.Generator().manual_seed(i))
        total += float(value.double().square().sum())
        p = nn.Parameter(distribute_tensor(value, *layout) if layout else value)
        p.grad = p.detach().clone()
        parameters.append(p)
    assert abs(global_norm(parameters) / total**0.5 - 1) < 1e-6
    scale_gradients(parameters, 0.5)
    assert abs(global_norm(parameters) / total**0.5 - 0.5) < 1e-6


def case_global_norm_of_fsdp2_over_tensor_parallelism():
    """FSDP2 shards what is column-parallel already with _StridedShard, which torch does not count as a Shard."""
    world = dist.get_world_size()
    for shape in ((1, world), (world, 1)):
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("dp", "tp"))
        torch.manual_seed(0)
        model, whole = (nn.Sequential(nn.Linear(8, 16, bias=False), nn.Linear(16, 8, bias=False)) for _ in range(2))
        whole.load_state_dict(model.state_dict())
        parallelize_module(model, mesh["tp"], {"0": ColwiseParallel(), "1": RowwiseParallel()})
        fully_shard(model, mesh=mesh["dp"])
        x = torch.randn(4, 8, generator=torch.Generator().manual_seed(1))
        for net in (model, whole):
            net(x).square().sum().backward()
        assert abs(global_norm(model.parameters()) / global_norm(whole.parameters()) - 1) < 1e-5, shape


# -- what must not go unnoticed ---------------------------------------------------------------------------------------


def case_ranks_that_train_alone_are_noticed():
    launched = os.environ["WORLD_SIZE"]
    os.environ["WORLD_SIZE"] = "3"
    try:
        raises(
            EngineError, f"started 3 processes, and this one sees {launched}", lambda: check_world(torch.device("cpu"))
        )
    finally:
        os.environ["WORLD_SIZE"] = launched


def case_ranks_that_start_differently_are_noticed():
    model = Bag()
    check_same_start(model, torch.device("cpu"))
    if dist.get_rank() == 1:
        model.one.data += 1e-7
    raises(EngineError, "different weights", lambda: check_same_start(model, torch.device("cpu")))


def case_a_replaced_optimizer_is_noticed():
    model = Bag()
    groups = [{"lr": 1e-3, "gamma": 0.5}]
    adam = torch.optim.AdamW(model.parameters())
    raises(EngineError, "replaced Anon by AdamW", lambda: check_optimizer(adam, model, Anon, groups))
    changed = Anon(model.parameters(), gamma=1.0)
    raises(EngineError, "gamma of param group 0 is 1.0", lambda: check_optimizer(changed, model, Anon, groups))
    partial = Anon([model.one], gamma=0.5)
    raises(EngineError, "left parameter square out", lambda: check_optimizer(partial, model, Anon, groups))
    half = Bag().to(torch.bfloat16)
    raises(
        EngineError, "torch.bfloat16", lambda: check_optimizer(Anon(half.parameters(), gamma=0.5), half, Anon, groups)
    )


def case_ranks_with_their_own_gammas_are_noticed():
    """Under zero1 a rank may keep only parameters that are behind, whose refreshes, and with them changes of γ, come later."""
    forget_accelerate()
    accelerator, name = start(wanted("zero1"))
    accelerator.ddp_handler = DistributedDataParallelKwargs(find_unused_parameters=True)

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.always, self.rarely = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4))

        def forward(self, t):
            return self.always.sum() + (self.rarely.sum() if t % 2 else 0.0)

    for rarely in (False, True):
        model = Two()
        engine = wrap(name, accelerator, model, Anon(model.parameters(), gamma=0.4, **LM))
        for t in range(12):
            with engine.whole_optimizer() as optimizer:
                optimizer.param_groups[0]["gamma"] = 0.4 + 0.05 * t
            engine.backward(engine.model(t if rarely else 1), last=True)
            engine.step(1e-3, None)
        if rarely:
            raises(EngineError, "at different steps", lambda engine=engine: engine.save(Path(shared_folder(OUT))))
        else:
            engine.save(Path(shared_folder(OUT)))


def case_contradicting_configurations_are_noticed():
    forget_accelerate()
    os.environ["ACCELERATE_USE_FSDP"], os.environ["FSDP_VERSION"] = "true", "2"
    os.environ["ACCELERATE_MIXED_PRECISION"] = "fp16"
    try:
        raises(EngineError, "mixed_precision: fp16", lambda: start(wanted("auto", "bf16")))
        raises(EngineError, "train.engine is ddp", lambda: start(wanted("ddp")))
    finally:
        for key in ("ACCELERATE_USE_FSDP", "FSDP_VERSION", "ACCELERATE_MIXED_PRECISION"):
            del os.environ[key]


def case_fp16_is_deepspeeds_and_needs_a_gpu():
    forget_accelerate()
    for engine in ("fsdp2", "deepspeed"):
        raises(EngineError, "fp16 needs engine deepspeed", lambda engine=engine: start(wanted(engine, "fp16")))


def case_plain_accelerate():
    """Accelerator.prepare as a user calls it: FSDP2's switch of parameters leaves no state of the old ones."""
    forget_accelerate()
    start(wanted("fsdp2"))
    accelerator = Accelerator()
    model = small_model()
    optimizer = Anon(model.parameters(), **LM)
    optimizer.init_state()  # too early: it must not stay
    model, prepared = accelerator.prepare(model, optimizer)
    for _ in range(2):
        accelerator.backward(model(input_ids=torch.randint(0, 100, (2, 32))).logits.sum())
        prepared.step()
        prepared.zero_grad()
    size = state_bytes(optimizer)
    assert set(optimizer.state) == set(model.parameters())
    assert abs(size.local * dist.get_world_size() / size.whole - 1) < 0.05, size
    assert monitor.read(monitor.measure(optimizer, torch.device("cpu")))[0].elements == size.local // 12


def rank_1(value, otherwise):
    return value if dist.get_rank() == 1 else otherwise


def case_ranks_that_were_started_otherwise_are_named():
    """One field at a time, before anything in which one would wait for the other; nothing is written."""
    folder = shared_folder(OUT)
    for name, value, words in (
        ("optim.lr", 1e-3, "optim.lr is 0.003 on rank 0 and 0.001 on rank 1"),
        ("optim.gamma", 0.5, "optim.gamma is 1.0 on rank 0 and 0.5 on rank 1"),
        ("optim.betas", (0.9, 0.99), "optim.betas is [0.9, 0.95] on rank 0 and [0.9, 0.99] on rank 1"),
        ("optim.gamma_by_name", {"*wte*": 0.5}, 'optim.gamma_by_name is {} on rank 0 and {"*wte*": 0.5} on rank 1'),
        ("optim.name", "adamw", 'optim.name is "anon" on rank 0 and "adamw" on rank 1'),
        ("data.seed", 1, "data.seed is 0 on rank 0 and 1 on rank 1"),
        ("train.seed", 1, "train.seed is 0 on rank 0 and 1 on rank 1"),
        ("train.steps", 13, "train.steps is 12 on rank 0 and 13 on rank 1"),
        ("train.grad_clip", None, "train.grad_clip is 1.0 on rank 0 and null on rank 1"),
        ("train.precision", "bf16", 'train.precision is "fp32" on rank 0 and "bf16" on rank 1'),
        ("train.engine", "hsdp", 'train.engine is "fsdp2" on rank 0 and "hsdp" on rank 1'),
        ("train.engine", "single", 'train.engine is "fsdp2" on rank 0 and "single" on rank 1'),
        ("train.engine", "deepspeed", 'train.engine is "fsdp2" on rank 0 and "deepspeed" on rank 1'),
        ("train.tensor_parallel", 2, "train.tensor_parallel is null on rank 0 and 2 on rank 1"),
        ("train.micro_batch", 4, "train.micro_batch is 2 on rank 0 and 4 on rank 1"),
        ("checkpoint.every", 3, "checkpoint.every is 4 on rank 0 and 3 on rank 1"),
        ("eval.every", 0, "eval.every is 5 on rank 0 and 0 on rank 1"),
        ("log.every", 3, "log.every is 1 on rank 0 and 3 on rank 1"),
        ("model.layers", 3, "model.layers is 2 on rank 0 and 3 on rank 1"),
        ("model.from_pretrained", "somewhere", 'model.from_pretrained is null on rank 0 and "a path" on rank 1'),
        ("resume", "never", 'resume is "auto" on rank 0 and "never" on rank 1'),
        ("run_dir", f"{folder}/other", f'run_dir is "{folder}/run" on rank 0 and "{folder}/other" on rank 1'),
    ):
        config = run_config(DATA, f"{folder}/run")
        *section, key = name.split(".")
        owner = getattr(config, section[0]) if section else config
        setattr(owner, key, rank_1(value, getattr(owner, key)))
        raises(EngineError, f"the ranks were not started alike: {words[:70]}", lambda config=config: run(config))
    assert not os.listdir(folder)


def case_ranks_with_other_surroundings_are_named():
    """Versions, sources, what accelerate was configured with, DeepSpeed's JSON by its content, the data by its fingerprint."""
    folder = shared_folder(OUT)
    other = Path(folder, f"node-{dist.get_rank()}")
    shutil.copytree(DATA, other / "data")
    (other / "zero.json").write_text(json.dumps({"zero_optimization": {"stage": rank_1(1, 2)}}))
    index = Index.load(other / "data")
    if dist.get_rank() == 1:
        changed = dataclasses.replace(index, tokenizer_hash="0" * 32, fingerprint="")
        (other / "data" / "index.json").write_text(json.dumps(changed.to_json()))
    for name, action, words in (
        ("version", None, 'the version of torch is "2.0"'),
        ("sources", None, "the hash of anon_dist's sources is "),
        ("accelerate", None, "accelerate's setting FSDP_SHARDING is not set on rank 0 and "),
        (
            "zero",
            lambda c: setattr(c.train, "deepspeed_config", f"{other}/zero.json"),
            "the DeepSpeed configuration's ",
        ),
        ("data", lambda c: setattr(c.data, "path", f"{other}/data"), "alike: the fingerprint of the data is "),
    ):
        patch, config = Patch(), run_config(DATA, f"{folder}/run")
        if name == "version":
            patch.setattr(comparison, "_version", lambda library: rank_1("1.0", "2.0"))
        if name == "sources":
            patch.setattr(comparison, "_source_hash", lambda: rank_1("1", "2"))
        if name == "accelerate" and dist.get_rank() == 1:
            os.environ["FSDP_SHARDING"] = "FULL"
        if action:
            action(config)
        raises(EngineError, words, lambda config=config: run(config))
        os.environ.pop("FSDP_SHARDING", None)
        patch.close()
    assert not Path(folder, "run").exists()


def case_paths_may_differ_where_their_contents_do_not():
    """Each node its own copy of the data and of a pretrained model; but another weight, or another configuration, is named."""
    parent = Path(shared_folder(OUT))
    nodes = [parent / f"node-{rank}" for rank in range(dist.get_world_size())]
    torch.manual_seed(0)
    model = build_model(c.ModelConfig(layers=2, width=32, heads=2, context=32), 257, 256, 32)

    def save(folders):  # transformers writes on the first rank only
        if dist.get_rank() == 0:
            for folder in folders:
                model.save_pretrained(folder / "model")
        dist.barrier()

    save(nodes)
    own = nodes[dist.get_rank()]
    shutil.copytree(DATA, own / "data")
    config = run_config(str(own / "data"), shared_folder(OUT))
    config.model.from_pretrained, config.train.steps = str(own / "model"), 4
    run(config)
    config.run_dir = shared_folder(OUT)
    with torch.no_grad():
        model.transformer.h[1].ln_2.weight[3] += 1e-6
    save(nodes[1:])
    words = "the pretrained model's weight transformer.h.1.ln_2.weight is"
    raises(EngineError, words, lambda: run(config))
    model.config.layer_norm_epsilon = 1e-6
    save(nodes[1:])
    words = "the pretrained model's layer_norm_epsilon is 1e-05 on rank 0 and 1e-06 on rank 1"
    raises(EngineError, words, lambda: run(config))


def drifting(config, step, change, words):
    """A run on whose rank 1 `change(engine)` is done after a step: it ends before it validates or saves what came of it."""
    patch, original = Patch(), loop.take_step

    def take_step(run, *rest):
        done = original(run, *rest)
        if run.step == step and dist.get_rank() == 1:
            with torch.no_grad():
                change(run.engine)
        return done

    patch.setattr(loop, "take_step", take_step)
    last = Path(config.run_dir, "checkpoints", "step-00000004")
    try:
        run(config)
    except EngineError as error:
        said = str(error)
    else:
        said = ""
    assert words in said
    assert step == 5 or f"Resume from {last} " in said, said
    patch.close()
    dist.barrier()
    assert [p.name for p in sorted(Path(config.run_dir, "checkpoints").iterdir())] == ["step-00000004"]


def local(tensor):
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def case_replicas_that_drift_apart_are_noticed():
    """At the next validation (step 5) or checkpoint (step 8), and named; the last good checkpoint too."""

    def weight(engine):
        part = "input_layernorm" if "+tp" in engine.name else "h.1.mlp"
        found = [p for name, p in engine.model.named_parameters() if part in name]
        local(found[0]).view(-1)[:1].view(torch.int32).bitwise_xor_(1)

    def nan(engine):
        local(next(iter(engine.model.parameters()))).view(-1)[-1] = float("nan")

    def state(engine):
        local(next(iter(engine.optimizer.state.values()))["precond"]).view(-1)[0] *= 1.5

    apart = "differs between rank 0 and rank 1"
    for engine, step, change, words in (
        ("ddp", 5, weight, f"drifted apart by step 5: transformer.h.1.mlp.c_fc.weight {apart}"),
        ("ddp", 8, nan, f"by step 8: transformer.wte.weight {apart}"),
        ("ddp", 6, state, f"by step 8: precond of transformer.wte.weight {apart}"),
        ("zero1", 8, weight, f"by step 8: transformer.h.1.mlp.c_fc.weight {apart}"),
        ("llama", 8, weight, f"by step 8: model.layers.0.input_layernorm.weight {apart}"),
    ):
        config = run_config(DATA, shared_folder(OUT), engine="fsdp2" if engine == "llama" else engine)
        if engine == "llama":
            config.model = c.ModelConfig("llama", 2, 32, 4, kv_heads=2, context=32)
            config.train.tensor_parallel = 2
        drifting(config, step, change, words)


def case_shards_are_compared_with_their_own_replicas_only():
    """HSDP's layout: rows are replicas, columns shards. Where each rank has a shard of its own, nothing is compared."""
    world = dist.get_world_size()
    values = torch.arange(64.0).view(8, 8)
    for shape, layout, compared in (
        ((world, 1), [Replicate(), Shard(0)], True),
        ((1, world), [Replicate(), Shard(0)], False),
    ):
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard"))
        model = nn.Module()
        model.weight = nn.Parameter(distribute_tensor(values, mesh, layout))
        optimizer = Anon(model.parameters(), state_dtype=EIGHT_BITS)
        optimizer.init_state()

        def check(model=model, optimizer=optimizer):
            check_replicas([*copies_of(model), *states_of(optimizer, {model.weight: "weight"})], torch.device("cpu"))

        check()
        state = optimizer.state[model.weight]
        for name, tensor in (("weight", model.weight.data), ("precond of weight", state["precond"])):
            before = tensor.to_local().clone()
            tensor.to_local()[-1, -1] = rank_1(float("nan"), 1.0)
            if compared:
                raises(ReplicasDifferError, f"{name} differs between rank 0 and rank 1", check)
            else:
                check()
            tensor.to_local().copy_(before)
    names = rank_1(["a", "b"], ["a"])
    words = "b (3,) torch.float32 is on rank 1 only, of 2"
    copies = [Copy(name, torch.ones(3), torch.ones(3)) for name in names]
    raises(ReplicasDifferError, words, lambda: check_replicas(copies, torch.device("cpu")))


# -- whole runs -------------------------------------------------------------------------------------------------------


def run_config(data, folder, **changes):
    config = c.Config(
        model=c.ModelConfig(layers=2, width=32, heads=2, context=32, dropout=changes.pop("dropout", 0.0)),
        data=c.DataConfig(path=data, seq_len=32),
        optim=c.OptimConfig(lr=3e-3),
        schedule=c.ScheduleConfig(warmup_steps=3),
        train=c.TrainConfig(steps=12, global_batch=8, micro_batch=2, engine=changes.pop("engine", "fsdp2")),
        eval=c.EvalConfig(every=5, sequences=7, final_sequences=9),
        checkpoint=c.CheckpointConfig(every=4, keep=9),
        log=c.LogConfig(every=1, trackers=()),
        run_dir=folder,
    )
    assert not changes
    return config


@cache
def whole_run(engine):
    """The folder of a run that nothing befell; it is only read."""
    return run(run_config(DATA, shared_folder(OUT), engine=engine))


def run_until(config, step):
    """A run that is stopped after a step."""
    patch = Patch()
    at_step(patch, step - 1, lambda: os.kill(os.getpid(), signal.SIGTERM))  # the ranks agree one step later
    try:
        folder = run(config)
    finally:
        patch.close()
    assert max(r["step"] for r in metrics(folder)) == step


class Killed:
    """A launcher that is no more."""

    gone, name, pid = True, "torchrun", 7


def case_a_signal_to_one_rank_stops_all():
    """Only rank 1 is told to stop, or loses its launcher; all stop after the same step, and go on bit for bit. With dropout and
    accumulation."""
    whole = run(run_config(DATA, shared_folder(OUT), dropout=0.1))
    for launcher in (False, True):
        config = run_config(DATA, shared_folder(OUT), dropout=0.1)
        patch = Patch()

        def stop(patch=patch, launcher=launcher):
            if dist.get_rank() == 1 and launcher:
                patch.setattr(signals, "LAUNCHER", Killed)
            elif dist.get_rank() == 1:
                os.kill(os.getpid(), signal.SIGTERM)

        at_step(patch, 6, stop)
        folder = run(config)
        patch.close()
        assert max(r["step"] for r in metrics(folder)) in (6, 7)
        run(config)
        if dist.get_rank() == 0:
            assert metrics(folder) == metrics(whole)


def case_a_full_disk_ends_all_ranks_in_a_line():
    """Rank 1 has no room for its part of the second checkpoint, or rank 0 for the metrics before it. The run goes on from the first."""
    whole = whole_run("fsdp2")
    for rank, words in (
        (1, "the checkpoint of step 8 could not be written (rank 1: "),
        (0, "metrics.jsonl could not be written: "),
    ):
        folder = Path(shared_folder(OUT))
        config = run_config(DATA, str(folder))
        patch, (soft, hard) = Patch(), resource.getrlimit(resource.RLIMIT_FSIZE)

        def fill(rank=rank, folder=folder, hard=hard):
            if dist.get_rank() == rank:
                size = (folder / "metrics.jsonl").stat().st_size + 50 if rank == 0 else 1000
                resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))

        at_step(patch, 7, fill)
        try:
            raises(RuntimeError, words, lambda config=config: run(config))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
            patch.close()
        found = [p.name for p in Checkpoints(folder / "checkpoints", 1).complete()]
        assert found == ["step-00000004"], found
        dist.barrier()
        run(config)
        if dist.get_rank() == 0:
            assert metrics(folder) == metrics(whole)


def case_saves_in_the_background_are_those_in_the_foreground():
    """Though steps are taken before a rank writes; and if a rank cannot write, the next step is saved in its place."""
    for engine, split in (("zero1", 1), ("fsdp1", 1), ("fsdp2", 2)):
        folders = []
        for background in (True, False):
            config = run_config(DATA, shared_folder(OUT), engine=engine, dropout=0.1)
            config.optim.window, config.optim.refresh_ratio, config.checkpoint.async_save = 2, 2.0, background
            config.train.steps, config.eval.every, config.checkpoint.every = 4, 0, 2
            if split > 1:
                config.model = c.ModelConfig("llama", 2, 32, 4, kv_heads=2, context=32)
                config.train.tensor_parallel = split
            patch, write = Patch(), LinkingWriter.write_data

            def late(writer, *args, background=background, write=write):
                time.sleep(0.3 * background * dist.get_rank())
                return write(writer, *args)

            patch.setattr(LinkingWriter, "write_data", late)
            folders.append(run(config))
            patch.close()
        for step in (2, 4) if dist.get_rank() == 0 else ():
            a, b = (folder / "checkpoints" / f"step-{step:08d}" for folder in folders)
            assert verify(a, b) == [], (engine, step)
            assert verify(a) == []
            for rank in range(dist.get_world_size()):
                name = f"random-{rank:05d}.pt"
                assert (a / name).read_bytes() == (b / name).read_bytes()
    config = run_config(DATA, shared_folder(OUT))
    patch, write, left = Patch(), LinkingWriter.write_data, [dist.get_rank() == 1]

    def fail(writer, *args):
        if left.pop() if left else False:
            raise OSError(28, "No space left on device")
        return write(writer, *args)

    patch.setattr(LinkingWriter, "write_data", fail)
    folder = run(config)
    patch.close()
    dist.barrier()
    found = sorted(p.name for p in (folder / "checkpoints").iterdir())
    assert found[0] in [f"step-{step:08d}" for step in (5, 6, 7, 8)], found
    assert found[-1] == "step-00000012"


def case_damage_and_code_are_noticed_by_every_rank():
    """Of FSDP2's and zero1's checkpoints: a bit anywhere, a missing file, a pickle that would run code; on the ranks that read it and
    on those that do not. Then the run goes on."""
    for engine, other in (("fsdp2", "ddp"), ("zero1", "fsdp2")):
        config = run_config(DATA, shared_folder(OUT), engine=engine, dropout=0.1)
        folder = run(config)
        before = metrics(folder)
        checkpoint = folder / "checkpoints" / "step-00000008"
        for run_engine in (engine, other):  # another engine: every rank reads parts of other ranks' files
            config.train.engine, config.resume = run_engine, "never"
            config.run_dir = shared_folder(OUT)
            forget_accelerate()
            accelerator, name = start(wanted_engine(config))
            loaded = set_up(config, accelerator, name, Path(config.run_dir)).engine
            for file in ("__0_0.distcp", "__1_0.distcp", ".metadata", "checksums.json", "trainer.json"):
                for how in (flip, Path.unlink):
                    if (file, how) == ("trainer.json", Path.unlink):
                        continue
                    with altered(checkpoint / file, how):
                        refused(
                            DamagedCheckpoint,
                            rf"step-00000008/{file} is (damaged|missing)",
                            loaded.load,
                            checkpoint,
                        )
            loaded.load(checkpoint)
        rank = dist.get_rank()
        for how in (flip, Path.unlink):
            with altered(checkpoint / "random-00001.pt", how):
                refused(
                    DamagedCheckpoint,
                    r"random-00001.pt (is damaged|does not exist)",
                    randomness.load,
                    checkpoint,
                    rank,
                )
        for kind in ("reduce", "setstate"):
            mark, make = folder / f"ran-{kind}", PAYLOADS[kind]
            with unsealed(checkpoint):
                with altered(checkpoint / ".metadata", poison, make(mark)):
                    refused(CheckpointError, "which no DCP metadata has|is damaged", loaded.load, checkpoint)
                with altered(checkpoint / "random-00001.pt", poison, make(mark)):
                    refused(CheckpointError, "could run code", randomness.load, checkpoint, rank)
                with altered(checkpoint / ".metadata", poison_entry, make(mark)):
                    refused(CheckpointError, "could run code", loaded.load, checkpoint)
            assert not mark.exists(), kind
        with unsealed(checkpoint):
            loaded.load(checkpoint)  # as older versions wrote them
        dist.barrier()
        if rank == 0:
            (folder / "result.json").unlink()
            shutil.rmtree(folder / "checkpoints" / "step-00000012")
        dist.barrier()
        config.train.engine, config.resume, config.run_dir = engine, "auto", str(folder)
        run(config)
        assert before == metrics(folder)


def whole_and_resumed(whole, interrupted):
    """Two runs of one configuration, the second ended at step 6 and resumed; their folders."""
    run(whole)
    run_until(interrupted, 7)
    run(interrupted)
    return Path(whole.run_dir), Path(interrupted.run_dir)


def case_runs_with_a_gamma_schedule_resume():
    """Interrupted between refreshes, and matched by another run's checkpoint: the records of a run that was not; γ is that of t = 11."""
    source = whole_run("ddp") / "checkpoints" / "step-00000012"
    for engine in ("fsdp2", "zero1"):
        configs = [run_config(DATA, shared_folder(OUT), engine=engine) for _ in range(2)]
        for config in configs:
            config.optim.gamma_schedule, config.optim.gamma_by_name = {0: 0.4, 20: 1.4}, {"*wte*": 0.5}
            config.optim.match, config.optim.refresh_ratio = str(source), 1.3
        whole, resumed = whole_and_resumed(*configs)
        if dist.get_rank() == 0:
            assert metrics(whole) == metrics(resumed)
            lines = [json.loads(line) for line in (resumed / "metrics.jsonl").read_text().splitlines()]
            last = [r for r in lines if "loss" in r][-1]
            assert [round(last[f"gamma/{i}"], 12) for i in range(3)] == [0.5, 0.95, 0.95], last


def with_a_basis(engine, folder=None, data=None):
    config = run_config(data or DATA, folder or shared_folder(OUT), engine=engine)
    config.optim.basis, config.optim.basis_block, config.optim.nesterov = "columns", 24, True
    config.optim.refresh_ratio, config.optim.lr_by_name = 1.3, {"*wte*": 2.0}
    return config


def case_runs_with_a_basis_resume():
    """To the bit."""
    for engine in ("fsdp2", "ddp", "zero1"):
        whole, resumed = whole_and_resumed(with_a_basis(engine), with_a_basis(engine))
        if dist.get_rank() == 0:
            assert metrics(whole) == metrics(resumed), engine


def case_a_basis_goes_from_engine_to_engine():
    """To the rounding of sums in another order; where matrices are cut flat not at all."""
    losses = {}
    for first, second in (("ddp", "ddp"), ("fsdp2", "zero1"), ("zero1", "fsdp2")):
        config = with_a_basis(first)
        patch = Patch()
        at_step(patch, 6, lambda: os.kill(os.getpid(), signal.SIGTERM))
        run(config)
        patch.close()
        config.train.engine = second
        run(config)
        losses[first, second] = [r["loss"] for r in metrics(Path(config.run_dir)) if "loss" in r]
    for key, found in losses.items():
        assert len(found) == 12
        assert all(abs(x / y - 1) <= 1e-4 for x, y in zip(found, losses["ddp", "ddp"], strict=True)), (key, losses)
    raises(EngineError, "engine fsdp1 cuts matrices into flat parts", lambda: run(with_a_basis("fsdp1")))
    config.train.engine, config.optim.basis, config.train.steps = "fsdp1", None, 14
    raises(CheckpointError, "matrices in bases of their own, which fsdp1 cannot hold", lambda: run(config))
    config = with_a_basis("fsdp2")
    config.optim.basis = "rows"
    raises(EngineError, "basis_block=16 would fit", lambda: run(config))
    config = with_a_basis("ddp")
    config.optim.basis, config.optim.embedding_beta1 = "both", 0.9
    run(config)
    config.optim.basis, config.train.steps, config.train.engine = "columns", 14, "fsdp2"
    raises(EngineError, "the checkpoint's basis (both) is loaded before it becomes another", lambda: run(config))
    for config.train.steps, config.train.engine in ((14, "ddp"), (16, "fsdp2")):  # as it says
        run(config)


def case_bases_on_ranks_are_compared():
    """Bases of columns are alike on all ranks that hold other rows, and counted once."""
    forget_accelerate()
    model = small_model()
    optimizer = Anon(param_groups(model, 0.1, basis="columns"), lr=1e-3, basis_block=8)
    engine = wrap(*reversed(start(wanted("fsdp2"))), model, optimizer)
    sizes = [(p.numel(), p[0].numel() if p.dim() > 1 else 0) for p in small_model().parameters()]
    assert engine.state_bytes().whole == sum(12 * numel + 2 * 4 * 8 * columns for numel, columns in sizes)
    check_replicas(engine.copies(), torch.device("cpu"))
    state = next(s for s in engine.optimizer.state.values() if "basis_columns" in s)
    state["basis_columns"].to_local()[3, 3] = 1.0 + dist.get_rank()
    words = "basis_columns of transformer.wte.weight differs between rank 0 and rank 1"
    raises(ReplicasDifferError, words, lambda: check_replicas(engine.copies(), torch.device("cpu")))


def case_compact_runs_resume():
    """bfloat16 parameters, 8-bit and bfloat16 states: interrupted and resumed, the losses of a run that was not."""
    for engine in ("ddp", "fsdp2"):
        configs = [run_config(DATA, shared_folder(OUT), engine=engine) for _ in range(2)]
        for config in configs:
            config.train.precision, config.optim.state_dtype = "bf16-true", EIGHT_BITS
        whole, resumed = whole_and_resumed(*configs)
        if dist.get_rank() == 0:
            assert metrics(whole) == metrics(resumed)
            assert metrics(whole)[-1]["final_loss"] < metrics(whole)[0]["loss"]


def case_gradients_are_exchanged_as_often_as_asked():
    """Once a step however many micro-batches it has, or under FSDP, so that no rank keeps whole gradients, with each."""
    norms = []
    for name, accumulate, reductions, scatters in (
        ("ddp", None, 1, 0),
        ("fsdp2", "whole", 0, 1),
        ("fsdp2", "sharded", 0, 3),
        ("fsdp1", "whole", 0, 1),
        ("fsdp1", None, 0, 3),
    ):
        counts = []
        for rounds in (1, 3):
            forget_accelerate()
            model = small_model()
            attach(model)
            groups = param_groups(model, 0.1)
            engine = wrap(*reversed(start(wanted(name))), model, Anon(groups, lr=1e-3), accumulate=accumulate)
            for _ in range(2):  # the first step sets up buckets
                torch.manual_seed(dist.get_rank())
                with Traffic() as traffic:
                    for i in range(rounds):
                        tokens, last = torch.randint(0, 100, (2, 33)), i + 1 == rounds
                        with engine.micro_batch(last):
                            engine.backward(mean_loss(engine.model, tokens), last)
            counts.append((traffic.sent["all-reduce"], traffic.sent["reduce-scatter"]))
        (reduced, scattered), more = counts
        assert more == (reductions * reduced, scatters * scattered), (name, accumulate, counts)
        assert reduced + scattered > 0
        norms.append(engine.step(1e-3, None))
    assert all(abs(norm / norms[0] - 1) < 1e-5 for norm in norms), norms


def case_how_gradients_are_summed_is_a_choice_under_fsdp_only():
    config = run_config(DATA, shared_folder(OUT), engine="ddp")
    config.train.accumulate = "whole"
    raises(EngineError, "train.accumulate is a choice under fsdp2, hsdp, fsdp1 only", lambda: run(config))


def case_8_bit_states_move_between_engines():
    """Through this package's own restore, which reads what each rank needs."""
    # Blocks and rounding differ with the cut; a state that was lost, or codes taken for numbers, would differ by far more.
    check_states_move(EIGHT_BITS, (("fsdp2", 4), ("zero1", 7), ("fsdp1", 10), ("ddp", None)), 2e-3)


def case_states_of_several_dtypes_move_between_engines():
    """The presets' states; FSDP1 itself gathers states of one dtype only. It goes on with its own checkpoint too."""
    states = "exp_avg_sq=bfloat16, precond=bfloat16"
    check_states_move(states, (("fsdp1", 4), ("fsdp1", 7), ("fsdp2", 10), ("fsdp1", None)), 1e-4)


def check_states_move(states, engines, close):
    configs = [run_config(DATA, shared_folder(OUT)) for _ in range(2)]
    for config in configs:
        config.optim.state_dtype = states
    whole, moved = configs
    run(whole)
    for engine, stop in engines:
        moved.train.engine = engine
        run_until(moved, stop) if stop else run(moved)
    if dist.get_rank() == 0:
        ours, theirs = ([r["loss"] for r in metrics(Path(c.run_dir)) if "loss" in r] for c in (moved, whole))
        assert len(ours) == len(theirs) == 12
        assert all(abs(x - y) <= close * abs(y) for x, y in zip(ours, theirs, strict=True)), (ours, theirs)


GROUPS = ("update_max", "precond_spread/0", "precond_spread/1", "precond_age/0", "clipped_share/1")


def case_engines_agree_and_resume_each_other():
    """A run that each engine takes over from the one before, in a ring, has the records of one that fsdp2 made alone."""
    whole = whole_run("fsdp2")
    config = run_config(DATA, shared_folder(OUT))
    config.checkpoint.every = 1
    checkpoints = Checkpoints(Path(config.run_dir) / "checkpoints", 9)
    for engine, stop in (("ddp", 3), ("zero1", 6), ("fsdp2", 7), ("fsdp1", 10), ("hsdp", 11), ("ddp", None)):
        config.train.engine = engine
        run_until(config, stop) if stop else run(config)
        torn = engine in ("zero1", "fsdp1")  # in a file that one rank reads: all take the checkpoint of the step before
        latest = checkpoints.latest()
        dist.barrier()
        if torn and dist.get_rank() == 1:
            (latest / "random-00001.pt").write_bytes(b"torn")
        dist.barrier()
    assert sorted(p.name for p in latest.parent.glob("*.damaged")) == ["step-00000006.damaged", "step-00000010.damaged"]
    if dist.get_rank() == 0:
        for key in (*("loss", "val_loss", "final_loss", "grad_norm", "update_rms"), *GROUPS):
            a, b = ([r[key] for r in metrics(Path(f)) if key in r] for f in (config.run_dir, whole))
            assert len(a) == len(b), key
            assert all(abs(x - y) <= 1e-4 * abs(y) for x, y in zip(a, b, strict=True)), (key, a, b)


def case_phases_of_mixtures_agree_and_resume():
    """A run that is stopped in the middle of a phase and goes on under another engine reads what one reads that was not stopped."""
    other = Path(shared_folder(OUT))
    if dist.get_rank() == 0:
        texts = [json.dumps({"text": f"{i} times {i} is {i * i}; " * 9}) for i in range(60)]
        (other / "a.jsonl").write_text("\n".join(texts))
        prepare(
            PrepareConfig(
                source=str(other / "a.jsonl"), tokenizer="bytes", out=other / "data", val_fraction=0.2, workers=1
            )
        )
    dist.barrier()
    text, sums = c.SourceConfig(DATA, 0.5), c.SourceConfig(str(other / "data"), 0.5)
    phases = (
        c.PhaseConfig(3, {"text": text}),
        c.PhaseConfig(9, {"text": text, "sums": sums}, seq_len=16),
        c.PhaseConfig(sources={"sums": sums}, global_batch=16),
    )
    configs = [run_config(DATA, shared_folder(OUT)) for _ in range(2)]
    for config in configs:
        config.data.phases = phases
    run(configs[0])
    run_until(configs[1], 6)
    configs[1].train.engine = "ddp"
    run(configs[1])
    if dist.get_rank() == 0:
        first, second = (read_metrics(Path(config.run_dir) / "metrics.jsonl") for config in configs)
        records = [r for r in first if "loss" in r]
        assert [r["samples"] for r in records] == [8, 16, 24, *range(40, 121, 16), 136, 152, 168]
        for key in (
            "loss",
            "samples",
            "epoch",
            "epoch/text",
            "val_loss",
            "val_loss/sums",
            "final_loss",
            "final_loss/text",
        ):
            a, b = ([r[key] for r in found if key in r] for found in (first, second))
            assert a, key
            assert len(a) == len(b), key
            assert all(abs(x - y) <= 1e-4 * abs(y) for x, y in zip(a, b, strict=True)), (key, a, b)


def tasks_folder():
    folder = Path(shared_folder(OUT)) / "tasks"
    if dist.get_rank() == 0:
        write_tasks(folder)
    dist.barrier()
    return folder


def case_runs_are_scored_by_all_ranks_and_exported():
    """11 questions of 3 choices and 5 texts, which ranks cannot share evenly; and the run stays what it is."""
    folder, whole = tasks_folder(), whole_run("fsdp2")
    for engine, split in (("fsdp2", 1), ("fsdp2", 2), ("ddp", 1), ("zero1", 1), ("fsdp1", 1), ("hsdp", 1)):
        config = run_config(DATA, shared_folder(OUT), engine=engine)
        config.eval.tasks, config.eval.tasks_path = ("local_mc", "local_text"), str(folder)
        if (engine, split) == ("fsdp2", 1):
            config.eval.tasks_every = 5
        else:
            config.train.steps, config.schedule.warmup_steps = 2, 1
        if split > 1:
            config.model = c.ModelConfig("llama", 2, 32, 4, kv_heads=2, context=32)
            config.train.tensor_parallel = split
        done = run(config)
        if dist.get_rank() == 0:
            assert_scored_as_by_one_process(done, folder)
            assert_exported_as_by_the_run(done, done / "exported")
            if config.eval.tasks_every:
                assert [r for r in metrics(done) if len(r) > 1] == metrics(whole)


def case_tensor_parallel_runs_agree_and_resume():
    """A run begun over tensor parallelism and ended without, and the other way round, with and without tied embeddings."""
    for tied in (True, False):
        folders = {}
        for splits in ((1,), (2, 1), (1, 2)):
            config = run_config(DATA, shared_folder(OUT), engine="fsdp2")
            family = "llama" if tied else "qwen3"
            config.model = c.ModelConfig(family, 2, 32, 4, kv_heads=2, context=32, tie_embeddings=tied)
            for i, config.train.tensor_parallel in enumerate(splits):
                run(config) if i + 1 == len(splits) else run_until(config, 7)
            folders[splits] = config.run_dir
        if dist.get_rank() == 0:
            for key in ("loss", "val_loss", "final_loss", "grad_norm", "update_rms", "samples"):
                whole, *others = ([r[key] for r in metrics(Path(f)) if key in r] for f in folders.values())
                for other in others:
                    assert len(whole) == len(other), (tied, key)
                    assert all(abs(x / y - 1) < 1e-5 for x, y in zip(other, whole, strict=True)), (tied, key)


def case_the_loss_is_split_with_the_output_matrix():
    """Over a vocabulary that does not divide: losses and gradients of plain code, and no rank has all logits."""
    sizes = {"family": "llama", "heads": 4, "tie_embeddings": False, "pad_vocab_to": 1}
    alone, model = small_model(101, **sizes), small_model(101, **sizes)
    attach(model, z_loss=0.01)
    forget_accelerate()
    options = dataclasses.replace(wanted("fsdp2"), tensor_parallel=2)
    engine = wrap(*reversed(start(options)), model, torch.optim.SGD(model.parameters(), lr=1.0), 2)
    assert model.lm_head.weight.to_local().shape[0] == (51, 50)[dist.get_rank()]
    tokens = torch.randint(0, 101, (2, 33), generator=torch.Generator().manual_seed(0))
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    logits = alone(input_ids=inputs).logits
    losses = nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    squares = logits.logsumexp(2).square().sum()
    ((losses.sum() + 0.01 * squares) / 64).backward()
    with CommDebugMode() as communication:
        sums = engine.model(input_ids=inputs, targets=targets)
        engine.backward(sums[0] / 64, last=True)
    assert torch.ops.c10d_functional.all_gather_into_tensor not in communication.get_comm_counts()
    torch.testing.assert_close(sums[1:3], torch.stack([losses.sum(), squares]).detach(), rtol=1e-6, atol=0)
    for (name, p), q in zip(engine.model.named_parameters(), alone.parameters(), strict=True):
        grad, atol = p.grad.full_tensor(), 1e-5 * float(q.grad.abs().max())
        torch.testing.assert_close(grad, q.grad, rtol=1e-4, atol=atol, msg=lambda m, n=name: f"{n}: {m}")
    each = engine.model(input_ids=inputs, targets=targets, per_token=True)
    torch.testing.assert_close(each.flatten(), losses.detach(), rtol=1e-6, atol=2e-6)


def case_runs_that_share_sequences_agree_and_resume():
    """Begun with ranks that share each sequence and ended without, and the other way round."""
    folders = {}
    for shared in ((1,), (2, 1), (1, 2)):
        config = run_config(DATA, shared_folder(OUT), engine="fsdp2")
        config.model = c.ModelConfig("qwen3", 2, 32, 4, kv_heads=2, context=32)
        config.train.activation_checkpointing = "selective"
        for i, config.train.context_parallel in enumerate(shared):
            run(config) if i + 1 == len(shared) else run_until(config, 7)
        folders[shared] = config.run_dir
    if dist.get_rank() == 0:
        for key in ("loss", "val_loss", "final_loss", "grad_norm", "update_rms", "samples"):
            whole, *others = ([r[key] for r in metrics(Path(f)) if key in r] for f in folders.values())
            for other in others:
                assert len(whole) == len(other), key
                assert all(abs(x / y - 1) < 1e-5 for x, y in zip(other, whole, strict=True)), key
    config.run_dir, config.data.mask_documents = shared_folder(OUT), True
    raises(c.ConfigError, "has an attention of its own, without masks", lambda: run(config))
    config.data.mask_documents, config.data.seq_len = False, 30
    raises(c.ConfigError, "data.seq_len = 30 is not a multiple of 2 · train.context_parallel", lambda: run(config))
    os.environ["PARALLELISM_CONFIG_SP_SIZE"] = "2"
    try:
        raises(EngineError, "DeepSpeed's sequence parallelism is not supported", lambda: start(wanted("fsdp2")))
    finally:
        del os.environ["PARALLELISM_CONFIG_SP_SIZE"]


def case_what_tensor_parallelism_cannot_split_is_refused():
    for model, words in (
        (c.ModelConfig("gpt2", 1, 32, 4, context=32), "set model.family to llama"),
        (
            c.ModelConfig("olmo2", 1, 32, 4, context=32),
            "splits llama, qwen3, gemma3_text, and this model is a Olmo2ForCausalLM",
        ),
        (c.ModelConfig("llama", 1, 32, 4, kv_heads=1, context=32), "does not divide the model's 1 key-value heads"),
    ):
        config = run_config(DATA, shared_folder(OUT), engine="fsdp2")
        config.model, config.train.tensor_parallel = model, 2
        raises(EngineError, words, lambda config=config: run(config))
    config.train.engine = "ddp"
    raises(EngineError, "it needs engine fsdp2, here ddp", lambda: run(config))


def case_spikes_are_met_by_all_ranks():
    check_spikes(run, lambda: run_config(DATA, shared_folder(OUT), engine="fsdp2"))


def case_a_nan_in_the_gradient_of_one_rank():
    for engine in ("ddp", "fsdp2", "zero1"):
        check_nan(run, lambda engine=engine: run_config(DATA, shared_folder(OUT), engine=engine))


def case_the_slow_rank_is_told():
    check_straggler(run, run_config(DATA, shared_folder(OUT), engine="ddp"))


def case_the_slow_rank_is_told_under_fsdp2():
    """A case of its own: what rank 0 alone asserts may only come last."""
    check_straggler(run, run_config(DATA, shared_folder(OUT), engine="fsdp2"))


def case_leave_a_run_for_one_process():
    """Not a check of its own: `test_another_world_size` goes on from here."""
    whole = whole_run("fsdp2")
    if dist.get_rank() == 0:
        shutil.copytree(whole, Path(OUT) / "two-ranks")
    run(with_a_basis("fsdp2", str(Path(OUT) / "two-ranks-basis")))


if __name__ == "__main__":
    OUT, DATA = sys.argv[1:3]
    run_cases(globals())
