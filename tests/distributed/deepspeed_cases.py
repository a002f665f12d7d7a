"""DeepSpeed's stages with Anon, on two ranks; `test_deepspeed.py` launches them all at once.

The oracle of whole runs is a run of one process without DeepSpeed, whose metrics the launcher leaves in argv[3].
"""

import json
import math
import os
import resource
import runpy
import shutil
import signal
import sys
import tempfile
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[1]))
import deepspeed
import snippets
from accelerate import Accelerator, PartialState
from accelerate.utils import DeepSpeedPlugin, DummyOptim
from damage import PAYLOADS, altered, flip, poison, refused, unsealed
from helpers import (
    assert_exported_as_by_the_run,
    assert_scored_as_by_one_process,
    at_step,
    forget_accelerate,
    metrics,
    write_tasks,
)
from launch_cases import Patch, raises, run, run_cases, shared_folder, step_back
from spike_cases import check_nan, check_spikes, goes_on_after_going_back, spiked
from torch import nn

from anon_dist import Anon
from anon_dist.checkpoint import CheckpointError, Checkpoints, DamagedCheckpoint
from anon_dist.checkpoint.formats import open_checkpoint
from anon_dist.engines import cpu, zero_restore
from anon_dist.engines.errors import EngineError
from anon_dist.engines.replicas import ReplicasDifferError, check_replicas
from anon_dist.engines.start import start
from anon_dist.engines.zero import NOWHERE
from anon_dist.optim import STATE_KEYS
from anon_dist.optim.backends import cpu as on_cpu
from anon_dist.optim.backends import foreach
from anon_dist.optim.frame import BASIS_KEYS
from anon_dist.train import loop
from anon_dist.train.config.parsing import Config, load_config
from anon_dist.train.run import set_up, wanted_engine

OUT, DATA, REFERENCE = sys.argv[1:4]
CONFIGS = Path(__file__).parents[2] / "configs" / "deepspeed"
PARAMS = {"lr": 3e-3, "betas": [0.9, 0.95], "gamma": 0.5, "refresh_ratio": 1.1, "beta3": 0.8, "eps": 1e-8}


class Net(nn.Module):
    """Odd sizes, a tied pair, a frozen layer, and a bias of one element."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.frozen, self.head = nn.Linear(63, 63), nn.Linear(63, 7), nn.Linear(7, 7), nn.Linear(7, 1)
        self.a2 = nn.Linear(63, 63, bias=False)
        self.a2.weight = self.a.weight
        self.frozen.requires_grad_(False)

    def forward(self, x):
        return self.head(torch.tanh(self.frozen(torch.tanh(self.b(self.a2(torch.tanh(self.a(x))))))))


def make():
    torch.manual_seed(0)
    return Net()


def groups(model):
    """Two param groups with their own γ and decay."""
    trained = [p for p in model.parameters() if p.requires_grad]
    matrices, vectors = [p for p in trained if p.dim() > 1], [p for p in trained if p.dim() == 1]
    return [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "gamma": 0.0, "weight_decay": 0.0}]


def batch(t, rank=None):
    rows = torch.randn(4 * dist.get_world_size(), 63, generator=torch.Generator().manual_seed(t))
    return rows if rank is None else rows[4 * rank : 4 * rank + 4]


def reference(steps, dtype=torch.float32):
    model = make()
    optimizer = Anon(groups(model), **PARAMS)
    for t in range(steps):
        model(batch(t)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def user_training(config, client, steps=12):
    """A user's own loop. `client`: the optimizer is built by the user, not by the configuration."""
    model = make()
    config = {"train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 2, "gradient_clipping": 0.0, **config}
    if client:
        engine, *_ = deepspeed.initialize(model=model, config=config, optimizer=Anon(groups(model), **PARAMS))
    else:
        config["optimizer"] = {"type": "Anon", "params": PARAMS}
        engine, *_ = deepspeed.initialize(model=model, config=config, model_parameters=groups(model))
    half = config.get("bf16", {}).get("enabled")
    for t in range(steps):
        for rows in batch(t, dist.get_rank()).split(2):
            engine.backward(engine(rows.bfloat16() if half else rows).float().square().mean())
            engine.step()
    return engine


def weights(engine):
    from deepspeed.utils import safe_get_full_fp32_param

    found = {}
    for name, p in engine.module.named_parameters():
        if p.requires_grad:
            value = safe_get_full_fp32_param(p)
            found[name] = (p.detach() if value is None else value).float().view(getattr(p, "ds_shape", p.shape)).clone()
    return found


def check_user_training(stage, client, bf16=False, **zero):
    config = {"zero_optimization": {"stage": stage, **zero}, "bf16": {"enabled": bf16}}
    engine = user_training(config, client)
    optimizer = engine.basic_optimizer
    assert isinstance(optimizer, Anon)
    assert [(g["gamma"], g["weight_decay"]) for g in optimizer.param_groups] == [(0.5, 0.1), (0.0, 0.0)]
    assert {int(s["step"]) for s in optimizer.state.values()} == {12}
    assert all(set(s) == set(STATE_KEYS) and s["exp_avg"].dtype == torch.float32 for s in optimizer.state.values())
    expected = dict(reference(12)[0].named_parameters())
    # float32: another order of summation, over 12 steps. bf16: gradients with 8 bits.
    tolerance = 2e-2 if bf16 else 1e-5
    for name, value in weights(engine).items():
        torch.testing.assert_close(
            value, expected[name].detach(), rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )
    if stage:
        local = sum(s[k].numel() for s in optimizer.state.values() for k in STATE_KEYS[1:])
        whole = 3 * sum(p.numel() for g in groups(make()) for p in g["params"])
        padding = 3 * 4 * len(optimizer.state)  # to a multiple of the ranks, per flat partition
        assert whole / dist.get_world_size() <= local <= whole / dist.get_world_size() * 1.02 + padding, (local, whole)


def case_user_stage0_json():
    check_user_training(0, client=False)


def case_user_stage0_bf16_client():
    """DeepSpeed makes this state by a step on zero gradients, unless spared."""
    check_user_training(0, client=True, bf16=True)


def case_user_stage1_client():
    check_user_training(1, client=True)


def case_user_stage2_json():
    check_user_training(2, client=False)


def case_user_stage2_offload_client():
    check_user_training(2, client=True, offload_optimizer={"device": "cpu"})


def case_user_stage2_bf16_json():
    check_user_training(2, client=False, bf16=True)


def case_user_stage3_json():
    """Several sub-groups per param group: DeepSpeed steps them one by one."""
    check_user_training(3, client=False, sub_group_size=1000)


def case_user_stage3_offload_client():
    check_user_training(3, client=True, sub_group_size=1000, offload_optimizer={"device": "cpu"})


def case_snippets_of_the_pages():
    """The pages' blocks for DeepSpeed, as they stand."""
    anon = snippets.run("settings")["anon"]
    for name, gamma in (("deepspeed", 1.0), ("deepspeed, gamma", 0.5)):
        config = {"train_micro_batch_size_per_gpu": 2, "zero_optimization": {"stage": 2}}
        engine = snippets.run(name, model=make(), config=config, anon=anon)["engine"]
        engine.backward(engine(batch(0, dist.get_rank())[:2]).square().mean())
        engine.step()
        assert isinstance(engine.basic_optimizer, Anon)
        assert {int(s["step"]) for s in engine.basic_optimizer.state.values()} == {1}
        (group,) = engine.basic_optimizer.param_groups
        assert (group["lr"], tuple(group["betas"]), group["gamma"]) == (1e-3, (0.9, 0.95), gamma)
        assert group["window"] == (64 if gamma == 1.0 else None)


def case_the_scripts_of_the_first_minutes():
    for name in ("adamw", "anon"):
        script = runpy.run_path(str(CONFIGS.parents[1] / "tools" / "first_minutes" / f"deepspeed_{name}.py"))
        folder = Path(shared_folder(OUT))
        script["main"](str(folder))
        assert len(list(folder.glob("global_step10/*optim_states.pt"))) == dist.get_world_size()


def check_kernel(stage):
    """All of this rank's masters go through the C kernel, and through nothing else."""
    patch, stepped, kernel = Patch(), [], on_cpu.run
    patch.setattr(on_cpu, "run", lambda lists, *rest: (stepped.extend(lists[0]), kernel(lists, *rest)))
    patch.setattr(foreach, "run", lambda *_: 1 / 0)
    config = {"zero_optimization": {"stage": stage, "offload_optimizer": {"device": "cpu"}}}
    engine = user_training(config, client=True, steps=2)
    patch.close()
    masters = [p for p in engine.basic_optimizer.state if p.numel()]
    assert len(stepped) == 2 * len(masters)
    assert {p.data_ptr() for p in stepped} == {p.data_ptr() for p in masters}


def case_the_kernel_steps_offloaded_shards():
    for stage in (1, 2, 3):
        check_kernel(stage)


def case_partial_offload_is_refused():
    config = {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu", "ratio": 0.5}}}
    try:
        user_training(config, client=True, steps=1)
    except EngineError as error:
        if "ratio is 0.5" not in str(error):
            raise
    else:
        raise AssertionError("DeepSpeed would step half of the parameters with AdamW")


def case_adams_in_place_of_the_optimizer_are_refused():
    """SuperOffload and ZenFlow, by name, however Anon comes in, and in this package's own trainings whatever the optimizer."""
    cpu_offload = {"device": "cpu"}
    zenflow = {"topk_ratio": 0.1, "select_strategy": "step", "select_interval": 2, "update_interval": 2}
    for zero, words in (
        (
            {"stage": 3, "offload_optimizer": {**cpu_offload, "super_offload": True}},
            "DeepSpeed's SuperOffload steps an",
        ),
        ({"stage": 2, "offload_optimizer": cpu_offload, "zenflow": zenflow}, "DeepSpeed's ZenFlow steps an Adam"),
        ({"stage": 3, "offload_optimizer": cpu_offload, "zenflow": zenflow}, "DeepSpeed's ZenFlow steps an Adam"),
    ):
        config = {"zero_optimization": zero}
        for client in (True, False):
            raises(EngineError, words, lambda c=config, client=client: user_training(c, client=client, steps=1))
        path = Path(shared_folder(OUT)) / "zero.json"
        if dist.get_rank() == 0:
            path.write_text(json.dumps(config))
        dist.barrier()
        for name in ("anon", "adamw"):
            ours = run_config("zero2", shared_folder(OUT))
            ours.train.deepspeed_config, ours.optim.name = str(path), name
            raises(EngineError, words, lambda ours=ours: run(ours))


def case_a_basis_is_refused_where_matrices_are_cut():
    """However Anon comes in; stage 0 leaves matrices as they are, and trains as one process. Stage 3: see `zero_basis_cases.py`."""
    PARAMS["basis"] = "columns"
    try:
        for stage, words in (
            (1, "basis is 'columns' in param group 0, and DeepSpeed's stage 1 cuts matrices into flat parts"),
            (2, "basis is 'columns' in param group 0, and DeepSpeed's stage 2 cuts matrices into flat parts"),
            (3, "the 63 rows of a.weight and 2 more do not divide among 2 ranks"),
        ):
            config = {"zero_optimization": {"stage": stage}}
            for client in (True, False):
                raises(EngineError, words, lambda c=config, client=client: user_training(c, client, steps=1))
        engine, (expected, _) = user_training({"zero_optimization": {"stage": 0}}, client=True), reference(12)
        for name, p in expected.named_parameters():
            if p.requires_grad:
                torch.testing.assert_close(weights(engine)[name], p.detach(), rtol=1e-4, atol=1e-4)
    finally:
        del PARAMS["basis"]
    config = with_a_basis("zero2")
    raises(EngineError, "DeepSpeed's stage 2 cuts matrices into flat parts", lambda: run(config))
    stop(torch_alone(config, "ddp"))
    config.optim.basis = None
    raises(
        CheckpointError,
        "which DeepSpeed's stage 2 cannot hold: `anon-dist ckpt convert SRC",
        lambda: run(configured(config, "zero2")),
    )


def with_a_basis(name):
    config = run_config(name, shared_folder(OUT))
    config.optim.basis, config.optim.basis_block, config.optim.refresh_ratio = "columns", 24, 1.3
    return config


def torch_alone(config, engine):
    """The same without DeepSpeed."""
    config.train.engine, config.train.deepspeed_config = engine, None
    return config


def stop(config):
    """Run until step 6, or 7."""
    patch = Patch()
    at_step(patch, 6, lambda: os.kill(os.getpid(), signal.SIGTERM))
    run(config)
    patch.close()


def losses(folder):
    return [r["loss"] for r in metrics(Path(folder)) if "loss" in r]


def case_runs_with_a_basis_in_stage_3():
    """As under DDP. Stopped and resumed to the bit; begun under FSDP2, ended there, and without the basis too."""
    expected = losses(run(torch_alone(with_a_basis("zero3"), "ddp")))
    config = with_a_basis("zero3")
    stop(config)
    goes_on_to_the_bit(config, run(config))
    other = with_a_basis("zero3")
    stop(torch_alone(other, "fsdp2"))
    found = [losses(config.run_dir), losses(run(configured(other, "zero3")))]
    step_back(Path(other.run_dir))
    found.append(losses(run(torch_alone(other, "fsdp2"))))
    if dist.get_rank() == 0:
        assert len(expected) == 12
        assert all(abs(x / y - 1) <= 1e-4 for own in found for x, y in zip(own, expected, strict=True)), (
            found,
            expected,
        )
    step_back(Path(config.run_dir))
    config.optim.basis = None
    run(config)
    left = open_checkpoint(Checkpoints(Path(config.run_dir) / "checkpoints", 1).complete()[-1] / "deepspeed")
    assert not {key.state for key in left.tensors} & set(BASIS_KEYS)


def case_bases_in_stage_3_are_compared():
    """Those of columns, which all ranks have alike."""
    config = with_a_basis("zero3")
    config.train.steps, config.resume = 4, "never"
    engine = resumed(config).engine
    check_replicas(engine.copies(), torch.device("cpu"))
    next(s for s in engine.optimizer.state.values() if "basis_columns" in s)["basis_columns"][3] = 1.0 + dist.get_rank()
    words = "differs between rank 0 and rank 1"
    raises(ReplicasDifferError, words, lambda: check_replicas(engine.copies(), torch.device("cpu")))


def accelerated(config, optimizer_of):
    forget_accelerate()
    cpu.bring_up_processes(timedelta(minutes=1))
    plugin = DeepSpeedPlugin(hf_ds_config={"train_micro_batch_size_per_gpu": 2, "gradient_clipping": 0.0, **config})
    accelerator = Accelerator(deepspeed_plugin=plugin)
    model = make()
    engine, _ = accelerator.prepare(model, optimizer_of(model))
    for t in range(3):
        accelerator.backward(engine(batch(t, dist.get_rank())[:2]).square().mean())
    return engine.basic_optimizer


def case_accelerate_does_not_replace_it_under_offload():
    config = {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}
    optimizer = accelerated(config, lambda model: Anon(groups(model), **PARAMS))
    assert type(optimizer) is Anon
    assert {int(s["step"]) for s in optimizer.state.values()} == {3}


def case_accelerate_fills_in_auto_values():
    params = {**PARAMS, "lr": "auto", "weight_decay": "auto"}
    config = {"zero_optimization": {"stage": 1}, "optimizer": {"type": "Anon", "params": params}}
    optimizer = accelerated(config, lambda model: DummyOptim(model.parameters(), lr=0.01, weight_decay=0.2))
    assert type(optimizer) is Anon
    group = optimizer.param_groups[0]
    assert (group["lr"], group["weight_decay"], group["gamma"]) == (0.01, 0.2, 0.5)


# -- the training loop ------------------------------------------------------------------------------------------------


def run_config(name, folder) -> Config:
    config = load_config(Path(REFERENCE) / "config.yaml")
    config.run_dir, config.train.engine, config.train.micro_batch = folder, "deepspeed", 2
    config.train.deepspeed_config = str(CONFIGS / f"{name}.json")
    return config


def check_run(name, precision="fp32"):
    """A run stopped half-way and resumed gives the losses of one process."""
    config = run_config(name, shared_folder(OUT))
    config.train.precision = precision
    patch = Patch()
    at_step(patch, 6, lambda: os.kill(os.getpid(), signal.SIGTERM) if dist.get_rank() == 1 else None)
    folder = run(config)
    patch.close()
    assert max(r["step"] for r in metrics(folder)) in (6, 7)
    run(config)
    if dist.get_rank() == 0:
        tolerance = 1e-2 if precision == "bf16" else 1e-4
        for key in ("loss", "val_loss", "final_loss", "grad_norm", "update_rms", "refreshes", "samples"):
            ours, theirs = ([r[key] for r in metrics(f) if key in r] for f in (folder, Path(REFERENCE)))
            assert len(ours) == len(theirs), key
            assert all(abs(a - b) <= tolerance * abs(b) for a, b in zip(ours, theirs, strict=True)), (key, ours, theirs)
    goes_on_to_the_bit(config, folder)


def goes_on_to_the_bit(config, folder):
    """A run that has ended, resumed from the checkpoint before its last, has the metrics it had."""
    before = metrics(folder)
    step_back(folder)
    run(config)
    assert before == metrics(folder)


def case_a_copy_is_written_as_deepspeed_writes():
    """The same files, and all that is in them, to the bit; though weights and states have changed before it is written. To capture takes no
    room on any disk: a rank's own folder for temporary files may be full, or gone."""
    for name in ("zero0", "zero2", "zero3"):
        config = run_config(name, shared_folder(OUT))
        config.train.steps, config.resume = 4, "never"
        engine = resumed(config).engine
        folder = Path(shared_folder(OUT))
        tempfile.tempdir = str(folder / "none")
        for _ in range(2):  # the buffers of the first copy are used again
            write = engine.capture(copied=True)
        tempfile.tempdir = None
        assert not Path(NOWHERE).exists()
        engine._engine.save_checkpoint(str(folder / "own"), tag="deepspeed", save_latest=False)
        with torch.no_grad(), engine.whole_optimizer() as optimizer:
            for p in [p for group in optimizer.param_groups for p in group["params"]]:
                p.add_(1.0)
                optimizer.state[p]["precond"].add_(1.0)
        for part in ("ours", "after"):
            (folder / part).mkdir(exist_ok=True)
            dist.barrier()
            (write if part == "ours" else engine.capture(copied=False))(folder / part)
        dist.barrier()
        own = {p.relative_to(folder / "own"): p for p in (folder / "own").rglob("*") if p.is_file()}
        ours = {p.relative_to(folder / "ours"): p for p in (folder / "ours").rglob("*") if p.is_file()}
        assert set(own) == set(ours), (set(own), set(ours))
        for path in own:
            if path.suffix == ".py":
                assert own[path].read_bytes() == ours[path].read_bytes()
                continue
            a, b, c = (torch.load(folder / d / path, weights_only=False) for d in ("own", "ours", "after"))
            sizes = [files[path].stat().st_size for files in (own, ours)]
            assert abs(sizes[0] - sizes[1]) < 0.02 * sizes[0], (path, sizes)  # storages are named by where they lay
            plain(a, b)
            if "optim" in path.name:
                try:
                    plain(a, c)
                except AssertionError:
                    continue
                raise AssertionError("nothing had changed")


def plain(a, b):
    """Assert that two loaded files hold the same."""
    assert type(a) is type(b), (type(a), type(b))
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert list(a) == list(b)
        for key in a:
            plain(a[key], b[key])
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            plain(x, y)
    elif hasattr(a, "__dict__") and not isinstance(a, type):
        plain(vars(a), vars(b))
    else:
        assert a == b


def case_damage_and_code_are_noticed_by_every_rank():
    """One bit of a file that one rank reads, a missing file, a pickle that would run code; then the run goes on."""
    for name, model in (
        ("zero2", "mp_rank_00_model_states.pt"),
        ("zero3", "zero_pp_rank_0_mp_rank_00_model_states.pt"),
    ):
        config = run_config(name, shared_folder(OUT))
        before = metrics(folder := run(config))
        checkpoint = step_back(folder)
        optimizer = f"deepspeed/{next((checkpoint / 'deepspeed').glob('*zero_pp_rank_1_*optim_states.pt')).name}"
        engine = resumed(config).engine
        for file in (optimizer, f"deepspeed/{model}"):
            for how in (flip, Path.unlink):
                with altered(checkpoint / file, how):
                    refused(DamagedCheckpoint, f"step-00000008/{file} is (damaged|missing)", engine.load, checkpoint)
        for kind in ("run_command", "nested"):  # the first is of a package that DeepSpeed's files have classes of
            mark, make = folder / f"ran-{kind}", PAYLOADS[kind]
            with unsealed(checkpoint), altered(checkpoint / optimizer, poison, make(mark)):
                refused(CheckpointError, "could run code", engine.load, checkpoint)
            assert not mark.exists(), kind
        with unsealed(checkpoint):
            engine.load(checkpoint)  # as older versions wrote them
        run(config)
        assert before == metrics(folder), name


def resumed(config):
    """A run as it is once its checkpoint is loaded, in this process."""
    forget_accelerate()
    accelerator, name = start(wanted_engine(config))
    return set_up(config, accelerator, name, Path(config.run_dir))


def case_the_loss_scale_comes_back():
    """fp16's, in the object that each wrapper keeps it in; DeepSpeed refuses fp16 on a CPU."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaleConfig, LossScaler

    saved = {"cur_scale": 512.0, "cur_iter": 77, "last_overflow_iter": 70, "scale_factor": 2.0, "scale_window": 100}
    dynamic = DynamicLossScaler(2.0**16, 1000, 1.0, 1, False, dtype=torch.float16)
    config = LossScaleConfig(torch.float16, True, 1.0, None)
    engine = SimpleNamespace(lr_scheduler=None, train_batch_size=lambda: 8)
    for name, scaler, mark in (
        ("loss_scaler", dynamic, "dynamic"),
        ("loss_scale_config", config, "dynamic_loss_scale"),
    ):
        manifest = SimpleNamespace(step=80, extras={"loss_scaler": {mark: True, **saved}, "skipped_steps": 3})
        zero_restore._load_counters(engine, SimpleNamespace(**{name: scaler}), SimpleNamespace(manifest=manifest))
        assert {k: getattr(scaler, k) for k in saved} == saved, name
        assert (engine.global_steps, engine.skipped_steps, engine.global_samples) == (80, 3, 640)
        static = LossScaler(1.0)
        zero_restore._load_counters(engine, SimpleNamespace(loss_scaler=static), SimpleNamespace(manifest=manifest))
        assert static.cur_scale == 1.0  # bf16's


def case_run_zero0():
    check_run("zero0")


def case_run_zero1():
    check_run("zero1")


def case_run_zero1_bf16_optimizer():
    check_run("zero1-bf16-optimizer", "bf16")


def case_run_zero2():
    check_run("zero2")


def case_run_zero2_offload():
    check_run("zero2-offload")


def case_run_zero3():
    check_run("zero3")


def case_runs_whose_shares_are_padded_go_on_to_the_bit():
    """No number of elements divides by the ranks: what is restored of the padding keeps the metrics finite at the next refresh."""
    for name in ("zero2", "zero3"):
        config = run_config(name, shared_folder(OUT))
        config.model.width, config.model.heads = 33, 3
        folder = run(config)
        goes_on_to_the_bit(config, folder)
        assert all(math.isfinite(r["update_rms"]) for r in metrics(folder) if "update_rms" in r)


def case_run_zero3_offload():
    check_run("zero3-offload")


def case_run_zero3_offload_params():
    check_run("zero3-offload-params")


def case_runs_are_scored_by_all_ranks_and_exported():
    folder = Path(shared_folder(OUT)) / "tasks"
    if dist.get_rank() == 0:
        write_tasks(folder)
    dist.barrier()
    for name, precision in (("zero2", "fp32"), ("zero3", "fp32"), ("zero3-offload-params", "fp32"), ("zero1", "bf16")):
        config = run_config(name, shared_folder(OUT))
        config.train.steps, config.schedule.warmup_steps, config.train.precision = 2, 1, precision
        config.eval.tasks, config.eval.tasks_path = ("local_mc", "local_text"), str(folder)
        done = run(config)
        if dist.get_rank() == 0:
            assert_exported_as_by_the_run(done, done / "exported")
            if precision == "fp32":
                assert_scored_as_by_one_process(done, folder)


def case_runs_with_a_gamma_schedule():
    """Begun under ZeRO 3, which steps a group in parts, and ended under ZeRO 2: as a run of FSDP2 that was not interrupted."""
    folders = []
    for names in (("fsdp2",), ("zero3", "zero2")):
        config = run_config("zero2", shared_folder(OUT))
        config.optim.gamma_schedule, config.optim.gamma_by_name = {0: 0.4, 20: 1.4}, {"*wte*": 0.5}
        config.optim.match = str(Path(REFERENCE) / "checkpoints" / "step-00000012")
        folders.append(Path(config.run_dir))
        for name in names:
            patch = Patch()
            if name != names[-1]:
                at_step(patch, 6, lambda: os.kill(os.getpid(), signal.SIGTERM))
            run(configured(config, name))
            patch.close()
    if dist.get_rank() == 0:
        theirs, ours = (map(json.loads, (f / "metrics.jsonl").read_text().splitlines()) for f in folders)
        theirs, ours = ([r for r in found if set(r) & {"loss", "val_loss"}] for found in (theirs, ours))
        assert len(ours) == len(theirs)
        for a, b in zip(ours, theirs, strict=True):
            for key in ("loss", "val_loss", "gamma/0", "gamma/1", "lr_factor/0", "lr_factor/1", "update_rms"):
                assert (key in a) == (key in b)
                assert key not in a or abs(a[key] - b[key]) <= 1e-3 * abs(b[key]), (key, a, b)


def configured(config, name):
    """The run, under an engine of torch or a DeepSpeed configuration."""
    deepspeed_file = CONFIGS / f"{name}.json"
    config.train.engine = "deepspeed" if deepspeed_file.exists() else name
    config.train.deepspeed_config = str(deepspeed_file) if deepspeed_file.exists() else None
    return config


def case_stages_and_engines_resume_each_other():
    """Runs of which every two steps are taken under another one, which together make a ring, have the losses of one process."""
    for ring in (
        ("zero2", "fsdp2", "zero3", "zero0", "zero1"),
        ("zero1", "zero3-offload", "zero2-offload", "ddp", "zero2"),
    ):
        config = run_config("zero2", shared_folder(OUT))
        for i, name in enumerate(ring[:-1], 1):
            run_until(configured(config, name), 2 * i)
        folder = run(configured(config, ring[-1]))
        if dist.get_rank() == 0:
            for key in ("loss", "val_loss", "final_loss", "grad_norm", "update_rms", "refreshes", "samples"):
                ours, theirs = ([r[key] for r in metrics(f) if key in r] for f in (folder, Path(REFERENCE)))
                assert len(ours) == len(theirs), (ring, key)
                where = (ring, key, ours, theirs)
                assert all(abs(a - b) <= 1e-4 * abs(b) for a, b in zip(ours, theirs, strict=True)), where


def run_until(config, step):
    """A run that is stopped after a step."""
    patch = Patch()
    at_step(patch, step - 1, lambda: os.kill(os.getpid(), signal.SIGTERM))  # the ranks agree one step later
    try:
        folder = run(config)
    finally:
        patch.close()
    assert max(r["step"] for r in metrics(folder)) == step


def case_torch_engines_take_deepspeeds_checkpoints():
    """zero1, fsdp1 and hsdp from stage 3, and another optimizer in Anon's place is refused, by DeepSpeed too."""
    made = run_config("zero3", shared_folder(OUT))
    run_until(made, 7)
    made.optim.name = "adamw"
    raises(CheckpointError, "the state of Anon, not of AdamW", lambda: run(made))
    for name in ("zero1", "fsdp1", "hsdp"):
        config = run_config("zero3", str(Path(shared_folder(OUT)) / "run"))
        if dist.get_rank() == 0:
            shutil.copytree(made.run_dir, config.run_dir)
        dist.barrier()
        config.train.engine, config.train.deepspeed_config, config.optim.name = name, None, "adamw"
        raises(CheckpointError, "the state of Anon, not of AdamW", lambda config=config: run(config))
        config.optim.name = "anon"
        folder = run(config)
        if dist.get_rank() == 0:
            ours, theirs = (
                [r["final_loss"] for r in metrics(f) if "final_loss" in r] for f in (folder, Path(REFERENCE))
            )
            assert abs(ours[0] / theirs[0] - 1) < 1e-4, (name, ours, theirs)


def case_adamw_goes_on_too():
    """The baseline has no state before its first step."""
    config = run_config("zero2", shared_folder(OUT))
    config.optim.name = "adamw"
    whole = run(config)
    config = run_config("zero2", shared_folder(OUT))
    config.optim.name = "adamw"
    patch = Patch()
    at_step(patch, 6, lambda: os.kill(os.getpid(), signal.SIGTERM))
    run(config)
    patch.close()
    folder = run(configured(config, "fsdp2"))
    if dist.get_rank() == 0:
        ours, theirs = ([r["loss"] for r in metrics(f) if "loss" in r] for f in (folder, whole))
        assert all(abs(a / b - 1) < 1e-4 for a, b in zip(ours, theirs, strict=True)), (ours, theirs)


def case_a_full_disk_ends_all_ranks_in_a_line():
    """DeepSpeed has barriers in its save, at which rank 0 waits for the one that has no room."""
    config = run_config("zero2", shared_folder(OUT))
    patch, (soft, hard) = Patch(), resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill():
        if dist.get_rank() == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
            os.kill(os.getpid(), signal.SIGTERM)

    at_step(patch, 6, fill)
    try:
        raises(CheckpointError, " could not be written: rank 1: ", lambda: run(config))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        patch.close()
    names = [p.name for p in (Path(config.run_dir) / "checkpoints").iterdir()]
    assert names in ([], ["step-00000004"]), names
    dist.barrier()
    assert max(r["step"] for r in metrics(run(config))) == config.train.steps


def case_spikes_are_met_by_all_ranks():
    check_spikes(run, lambda: run_config("zero2", shared_folder(OUT)), run_config("zero3", shared_folder(OUT)))
    stage1 = run_config("zero1", shared_folder(OUT))
    spiked(run, stage1, "rewind")
    goes_on_after_going_back(run, stage1)


def case_leave_runs_for_one_process():
    """Not a check of its own: `test_another_world_size` goes on from here."""
    for name in ("zero1", "zero2", "zero3"):
        patch = Patch()
        at_step(patch, 6, lambda: os.kill(os.getpid(), signal.SIGTERM))
        run(run_config(name, str(Path(OUT) / f"two-ranks-{name}")))
        patch.close()
    if dist.get_rank() == 0:
        shutil.copytree(Path(OUT) / "two-ranks-zero3", Path(OUT) / "two-ranks-zero3-copy")


def case_replicas_that_drift_apart_are_noticed():
    """Weights up to stage 2, and in stage 0 masters and states; before the next checkpoint (step 4) is written."""

    def weight(engine):
        next(iter(engine.model.module.parameters())).data.view(-1)[3] = float("nan")

    def state(engine):
        next(iter(engine.optimizer.state.values()))["exp_avg_sq"][-1] += 1e-3

    apart = "differs between rank 0 and rank 1"
    for name, precision, change, words in (
        ("zero0", "fp32", state, f"by step 4: exp_avg_sq of transformer.wte.weight {apart}"),
        ("zero0", "bf16", state, f"by step 4: exp_avg_sq of the float32 master of parameter 0 {apart}"),
        ("zero1", "bf16", weight, f"by step 4: transformer.wte.weight {apart}"),
        ("zero2", "fp32", weight, f"by step 4: transformer.wte.weight {apart}"),
    ):
        patch, original, config = Patch(), loop.take_step, run_config(name, shared_folder(OUT))
        config.train.precision = precision

        def take_step(run, *rest, original=original, change=change):
            done = original(run, *rest)
            if run.step == 4 and dist.get_rank() == 1:
                change(run.engine)
            return done

        patch.setattr(loop, "take_step", take_step)
        raises(EngineError, words, lambda config=config: run(config))
        patch.close()
        dist.barrier()
        assert not list(Path(config.run_dir).glob("checkpoints/*"))


def case_steps_with_nan_are_skipped():
    """On every rank, though only rank 1 sees the NaN; the step count stays."""
    original = loop.Batch.losses
    check_nan(run, lambda: run_config("zero1", shared_folder(OUT)), ("rewind",))
    for name in ("zero0", "zero1", "zero2", "zero3"):
        config = run_config(name, shared_folder(OUT))
        config.eval.every = 0
        calls = []

        def poisoned(batch, model, *args, calls=calls, **options):
            calls.append(1)
            loss = original(batch, model, *args, **options)
            return loss * float("nan") if model.training and dist.get_rank() == 1 and len(calls) in (5, 6) else loss

        patch = Patch()
        patch.setattr(loop.Batch, "losses", poisoned)
        folder = run(config)
        patch.close()
        if dist.get_rank() == 0:
            records = {r["step"]: r for r in metrics(folder) if "loss" in r}
            assert [t for t, r in records.items() if r.get("skipped")] == [3], name
            assert records[12]["refreshes"] == 11, (name, records[12])  # of 11 steps taken: a_k = 1 … 11


if __name__ == "__main__":
    PartialState._shared_state.clear()
    run_cases(globals())
