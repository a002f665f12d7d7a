"""Runs the scripts of this folder, on every rank, and writes down what came of them; `test_users.py` launches it.

launched.py FOLDER first       each way whole, and once more, ended early
launched.py FOLDER again       those that were ended early go on, in new processes
launched.py FOLDER alone       one process: each way whole, ended early and resumed; and checkpoints of two ranks resumed
"""

import json
import os
import sys
import traceback
from datetime import timedelta
from pathlib import Path

import accelerate_fsdp2
import torch
import torch.distributed as dist
import torch_ddp_zero1
import torch_fsdp2
import toy
import trainer
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.data import DataLoader, Subset
from transformers import TrainingArguments

from anon_dist import Anon

sys.path.insert(0, str(Path(__file__).parents[1]))
import snippets
from helpers import forget_accelerate

WAYS = {
    "trainer": trainer.train,
    "trainer_fsdp2": lambda folder, stop_at=trainer.STEPS: trainer.train(folder, stop_at, fsdp=True),
    "accelerate_fsdp2": accelerate_fsdp2.train,
    "torch_fsdp2": torch_fsdp2.train,
    "torch_ddp_zero1": torch_ddp_zero1.train,
}
HYPER = ("lr", "gamma", "weight_decay", "eps", "refresh_ratio", "beta3", "history")

steps: list = []
"""The learning rates, by param group, of every step that any Anon took."""
samples: list = []
"""The indices of the samples in the order in which they were read."""


def observe():
    def before_step(optimizer, args, kwargs):
        if isinstance(optimizer, Anon):
            steps.append([float(g["lr"]) for g in optimizer.param_groups])

    register_optimizer_step_pre_hook(before_step)
    read = toy.Tokens.__getitem__

    def getitem(self, index):
        samples.append(index)
        return read(self, index)

    toy.Tokens.__getitem__ = getitem


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor):
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def findings(model, optimizer, losses):
    """What the test compares, as plain tensors and numbers."""
    anon = (
        optimizer.optim
        if isinstance(optimizer, ZeroRedundancyOptimizer)
        else getattr(optimizer, "optimizer", optimizer)
    )
    names = {p: name.removeprefix("module.") for name, p in model.named_parameters()}
    moments = [t for s in anon.state.values() for t in (s["exp_avg"], s["exp_avg_sq"], s["precond"])]
    return {
        "class": f"{type(anon).__module__}.{type(anon).__name__}",
        "losses": losses,
        "steps": list(steps),
        "samples": list(samples),
        "weights": {names[p]: whole(p.detach()) for p in names},
        "state": {names[p]: {k: whole(v) for k, v in s.items()} for p, s in anon.state.items()},
        "groups": [{k: g[k] for k in HYPER} for g in anon.param_groups],
        "parameters": [[names[p] for p in g["params"]] for g in anon.param_groups],
        "bytes": sum(local(t).numel() * t.element_size() for t in moments),
    }


def record(path, action):
    """What a run comes to, or how it failed, in a file of this rank's."""
    forget_accelerate()
    steps.clear()
    samples.clear()
    try:
        model, optimizer, _, losses = action()
        found = findings(model, optimizer, losses)
    except Exception:
        found = {"failed": traceback.format_exc()}
    torch.save(found, f"{path}-{RANK}.pt")
    if dist.is_initialized():
        dist.barrier()


# -- what a user may get wrong ----------------------------------------------------------------------------------------


def schedules():
    """The learning rate factors that accelerate's scheduler gives, by how it is set up."""
    found = {}
    for name, settings in {
        "default": {},
        "split_batches": {"dataloader_config": DataLoaderConfiguration(split_batches=True)},
        "unlinked": {"step_scheduler_with_optimizer": False},
        "unlinked, guarded": {"step_scheduler_with_optimizer": False},
        "not prepared": {},
    }.items():
        for accumulate in (1, 2):
            forget_accelerate()
            accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulate, **settings)
            model = torch.nn.Linear(2, 2)
            optimizer = Anon(model.parameters(), lr=1.0)
            schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
            model, optimizer = accelerator.prepare(model, optimizer)
            if name != "not prepared":
                schedule = accelerator.prepare(schedule)
            steps.clear()
            for _ in range(4 * accumulate):
                with accelerator.accumulate(model):
                    accelerator.backward(model(torch.ones(1, 2)).sum())
                    optimizer.step()
                    if "guarded" not in name or accelerator.sync_gradients:
                        schedule.step()
                    optimizer.zero_grad()
            found[f"{name}, {accumulate}"] = [lr for (lr,) in steps]
    return found


def optimizer_before_fully_shard():
    """Whether an optimizer that was made before torch's own `fully_shard` trains anything, and what it keeps."""
    model = toy.model()
    optimizer = Anon(model.parameters(), lr=1.0)
    fully_shard(model)
    before = [whole(p.detach()).clone() for p in model.parameters()]
    batch = toy.Tokens()[0]
    model(**{k: v[None] for k, v in batch.items()}).loss.backward()
    optimizer.step()
    return {
        "trained": any(not torch.equal(a, whole(b.detach())) for a, b in zip(before, model.parameters(), strict=True)),
        "same parameters": set(optimizer.param_groups[0]["params"]) == set(model.parameters()),
        "states": len(optimizer.state),
    }


def steps_of(optimizer):
    """The step counts that its parameters have arrived at."""
    wrapped = optimizer.optim if isinstance(optimizer, ZeroRedundancyOptimizer) else optimizer
    return sorted({float(s["step"]) for s in getattr(wrapped, "optimizer", wrapped).state.values()})


def resumed_snippets(out, names):
    """Blocks that train and save, each twice: 5 steps, and on to 8. The step counts that Anon arrives at."""
    found = {}
    for name in names:
        folder, path = str(out / f"snippet {name}"), str(out / "snippet.pt")
        for done, steps in ((0, 5), (5, 8)):
            forget_accelerate()
            data = toy.Tokens()
            loader = DataLoader(Subset(data, range(8 * steps)), batch_size=8)
            yours = {"model": toy.model(), "data": data, "loader": loader, "folder": folder, "path": path}
            after = snippets.run(name, **yours, done=done, steps=steps)
            optimizer = after["trainer"].optimizer if "trainer" in after else after["optimizer"]
            found.setdefault(name, []).append(steps_of(optimizer))
    return found


def one_line_snippets(out, names):
    """Blocks that make an optimizer and no more: the groups, and the step counts after a step."""
    anon, found = snippets.run("settings")["anon"], {}
    for name in names:
        forget_accelerate()
        folder = str(out / "snippet fsdp2, resumed")
        args = TrainingArguments(str(out / "line"), max_steps=1, use_cpu=True, report_to="none", disable_tqdm=True)
        yours = {"model": toy.model(), "data": toy.Tokens(), "args": args, "folder": folder, "anon": anon}
        after = snippets.run(name, **yours)
        if name == "trainer":
            after["trainer"].train()
            optimizer = after["trainer"].optimizer.optimizer
        else:
            optimizer = after["optimizer"]
            batch = toy.Tokens()[0]
            after["model"](**{k: v[None] for k, v in batch.items()}).loss.backward()
            optimizer.step()
        keys = ("lr", "betas", "gamma", "refresh_ratio", "beta3", "update_clip", "window", "weight_decay", "initial_lr")
        groups = [{k: g.get(k) for k in keys} for g in optimizer.param_groups]
        dtypes = {str(s[key].dtype) for s in optimizer.state.values() for key in ("exp_avg_sq", "precond")}
        found[name] = {"class": type(optimizer).__name__, "steps": steps_of(optimizer), "groups": groups}
        found[name]["dtypes"] = sorted(dtypes)
    return found


# -- what is launched -------------------------------------------------------------------------------------------------


def first(out):
    for way, train in WAYS.items():
        record(out / f"whole-{way}", lambda: train(str(out / f"{way}-whole")))  # noqa: B023 - called at once
        record(out / f"early-{way}", lambda: train(str(out / way), stop_at=7))  # noqa: B023
    found = {"schedules": schedules(), "before": optimizer_before_fully_shard()}
    (out / f"traps-{RANK}.json").write_text(json.dumps(found))


def again(out):
    for way, train in WAYS.items():
        record(out / f"resumed-{way}", lambda: train(str(out / way)))  # noqa: B023


def alone(out):
    found = resumed_snippets(out, ("trainer, resumed", "accelerate, resumed"))
    made = one_line_snippets(out, ("trainer", "arguments", "bases"))
    for way, train in WAYS.items():
        if way == "trainer_fsdp2":
            continue
        if way.startswith("torch") and not dist.is_initialized():  # from here on there is a process group, of one
            dist.init_process_group("gloo", init_method=f"file://{out}/peers", rank=0, world_size=1)
        record(out / f"alone-whole-{way}", lambda: train(str(out / f"{way}-alone-whole")))  # noqa: B023
        record(out / f"alone-early-{way}", lambda: train(str(out / f"{way}-alone"), stop_at=7))  # noqa: B023
        record(out / f"alone-resumed-{way}", lambda: train(str(out / f"{way}-alone")))  # noqa: B023
        if way != "accelerate_fsdp2":  # without FSDP, accelerate looks for another kind of checkpoint
            record(out / f"fewer-{way}", lambda: train(str(out / f"{way}-fewer")))  # noqa: B023
    found |= resumed_snippets(out, ("fsdp2, resumed", "zero1, resumed"))
    (out / "snippets.json").write_text(json.dumps(found))
    made |= one_line_snippets(out, ("fsdp2", "matched"))
    (out / "lines.json").write_text(json.dumps(made))


if __name__ == "__main__":
    RANK = int(os.environ.get("RANK", "0"))
    if "RANK" in os.environ:
        dist.init_process_group("gloo", timeout=timedelta(seconds=300))
    observe()
    globals()[sys.argv[2]](Path(sys.argv[1]))
    if dist.is_initialized():
        dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)  # see `anon_dist.cli.leave`
