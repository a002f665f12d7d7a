"""The step in the background under FSDP2's CPU offload, on two ranks; `test_overlap.py` launches all cases at once.

The oracle is the plain `optimizer.step()` of the same loop. Each part of the background step is made slow, so that a reader who does
not wait reads old values.
"""

import copy
import logging
import sys
import threading
import time
from pathlib import Path

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, init_device_mesh
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.optimizer import register_optimizer_step_post_hook

sys.path.insert(0, str(Path(__file__).parents[1]))
from helpers import metrics
from launch_cases import Patch, raises, run, run_cases, shared_folder

from anon_dist import Anon
from anon_dist.engines.errors import EngineError
from anon_dist.engines.overlap import OverlappedStep
from anon_dist.optim import STATE_KEYS, param_groups
from anon_dist.optim.backends import cpu
from anon_dist.train.config import parsing as c

STEPS, WIDTH = 10, 5


class Net(nn.Module):
    """Blocks that are called in another order than they are made; `spare` only when asked for."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(WIDTH, 3)
        self.spare = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x, spare=False):
        for block in self.blocks:
            x = x + torch.tanh(block(x))
        return self.head(x + self.spare(x) if spare else x)


def make():
    """The sharded model, its optimizer, and the order of the parts of a step after a first forward."""
    torch.manual_seed(0)
    model = Net()
    mesh, policy = init_device_mesh("cpu", (2,)), CPUOffloadPolicy(pin_memory=False)
    for module in (*model.blocks, model.spare):
        fully_shard(module, mesh=mesh, offload_policy=policy)
    fully_shard(model, mesh=mesh, offload_policy=policy)
    optimizer = Anon(param_groups(model, 0.1), lr=0.05, betas=(0.9, 0.95), refresh_ratio=1.1, gamma=0.7)
    return model, optimizer


def before_each_part(optimizer, action):
    """Have `action(i)` called in the thread before the i-th part of each step."""
    original = optimizer.split_step

    def both(i, update):
        action(i)
        update()

    def split_step(parts):
        return [lambda i=i, u=update: both(i, u) for i, update in enumerate(original(parts))]

    optimizer.split_step = split_step


def local(tensor):
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def everything(model, optimizer):
    """All bits of the model and of the optimizer, as checkpoint libraries ask for them, on this rank."""
    weights, state = get_state_dict(model, optimizer)
    return copy.deepcopy(
        [*map(local, weights.values()), *(local(s[k]) for s in state["state"].values() for k in STATE_KEYS)]
    )


def rows(t):
    return torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(t + 1000 * torch.distributed.get_rank()))


def train(overlap, *, set_to_none=True, by_model=False, accumulation=1, early="", spare=lambda t: t % 3 == 0):
    """What was seen on the way: losses, validation losses, state dicts, and everything in the end."""
    model, optimizer = make()
    stepper = OverlappedStep(model, optimizer) if overlap else optimizer
    if overlap:
        before_each_part(optimizer, lambda i: time.sleep(0.003))
    if early == "prefetched":
        model.blocks[0].set_modules_to_forward_prefetch([model.blocks[2]])
    schedule = LambdaLR(optimizer, lambda t: 1.0 / (1 + t))
    seen = []
    for t in range(STEPS):
        if early == "unsharded":
            model.blocks[2].unshard()
        for i in range(accumulation):
            model.set_requires_gradient_sync(i + 1 == accumulation)
            loss = model(rows(t * accumulation + i), spare(t)).square().mean()
            loss.backward()
            seen.append(loss.detach())
        stepper.step()
        schedule.step()
        (model if by_model else optimizer).zero_grad(set_to_none=set_to_none)
        if t % 4 == 1:
            model.eval()
            with torch.no_grad():
                seen.append(model(rows(-t)))
            model.train()
        if t % 4 == 2:
            seen += everything(model, optimizer)
        if t % 4 == 3:
            seen += copy.deepcopy([local(p) for p in model.blocks[1].state_dict().values()])
        if t == 4:
            optimizer.rebase(gamma=0.5)
    return seen + everything(model, optimizer)


def assert_same(overlapped, plain):
    assert len(overlapped) == len(plain)
    for i, (a, b) in enumerate(zip(overlapped, plain, strict=True)):
        assert torch.equal(a, b), i


def check_bits(**how):
    assert_same(train(True, **how), train(False, **how))


def case_same_bits():
    check_bits()


def case_same_bits_with_gradients_set_to_zero():
    """Then a parameter that gets none is stepped all the same, and zeros must not reach the step before."""
    check_bits(set_to_none=False)
    check_bits(set_to_none=False, by_model=True)


def case_same_bits_with_accumulation():
    check_bits(accumulation=3)


def case_same_bits_where_modules_are_gathered_before_their_forward():
    check_bits(early="prefetched")
    check_bits(early="unsharded")


def case_same_bits_with_a_module_that_is_never_called():
    check_bits(spare=lambda t: False)


def case_a_forward_starts_before_the_last_parameter_is_updated():
    """Block 2's update cannot begin before block 0's forward has. All of block 0 is updated by then, and of block 2 before its own."""
    model, optimizer = make()
    background, events, gate, last = OverlappedStep(model, optimizer), [], threading.Event(), threading.Event()
    parts = ["outside", "root", "block 0", "block 1", "block 2", "spare", "rest"]
    model(rows(0)).sum().backward()

    def gated(i):
        if parts[i] == "block 2":
            assert gate.wait(20)
        if parts[i] == "spare":
            assert last.wait(20)
            time.sleep(0.1)
        events.append(f"update of {parts[i]}")

    def started(i):
        def hook(*_):
            events.append(f"forward of block {i}")
            gate.set()

        return hook

    before_each_part(optimizer, gated)
    for i, block in enumerate(model.blocks):
        block.register_forward_pre_hook(started(i))
    background.step()
    model.head.register_forward_hook(lambda *_: last.set())
    model(rows(1))
    assert "update of rest" in events  # the forward has waited for `spare` too, which it did not call
    order = [e for e in events if e.endswith(("0", "2"))]
    expected = ["update of block 0", "forward of block 0", "update of block 2", "forward of block 2"]
    assert order == expected, events


def case_the_gradients_may_go_while_the_step_runs():
    """`zero_grad()` does not wait: here the update cannot begin before it has returned."""
    model, optimizer = make()
    background, gate = OverlappedStep(model, optimizer), threading.Event()
    model(rows(0)).sum().backward()
    before_each_part(optimizer, lambda i: gate.wait(20) or sys.exit("zero_grad waited"))
    background.step()
    optimizer.zero_grad()
    assert all(p.grad is None for p in model.parameters())
    gate.set()
    background.wait()
    assert {int(optimizer.state[p]["step"]) for p in model.blocks.parameters()} == {1}


def case_a_failure_is_raised_by_all_that_waits():
    model, optimizer = make()
    background = OverlappedStep(model, optimizer)
    saved, fail = copy.deepcopy(optimizer.state_dict()), [True]
    model(rows(0)).sum().backward()

    def tear(i):
        if i == 1 and fail:
            raise MemoryError("no room for the step")

    logged = []
    handler = logging.Handler()
    handler.emit = logged.append
    logging.getLogger("anon_dist.engines.overlap").addHandler(handler)
    before_each_part(optimizer, tear)
    background.step()
    waits = {
        "forward": lambda: model(rows(1)),
        "wait": background.wait,
        "step": background.step,
        "plain step": optimizer.step,
        "state_dict": model.state_dict,
        "a block's state_dict": model.blocks[0].state_dict,
        "optimizer.state_dict": optimizer.state_dict,
        "zero_grad": lambda: optimizer.zero_grad(set_to_none=False),
        "model.zero_grad": lambda: model.zero_grad(False),
        "rebase": lambda: optimizer.rebase(gamma=0.1),
        "unshard": model.blocks[0].unshard,
    }
    for action in waits.values():
        raises(MemoryError, "no room", action)
    assert [record.exc_info[0] for record in logged] == [MemoryError]
    assert all(int(optimizer.state[p]["step"]) == 0 for p in model.parameters())  # nothing after it was updated
    fail.clear()
    optimizer.load_state_dict(saved)
    model(rows(1)).sum().backward()
    background.step()
    background.wait()
    assert int(optimizer.state[model.head.weight]["step"]) == 1


def case_what_a_step_refuses_is_refused_at_once():
    model, optimizer = make()
    background = OverlappedStep(model, optimizer)
    model(rows(0)).sum().backward()
    before = everything(model, optimizer)
    optimizer.param_groups[1]["lr"] = -1.0
    raises(ValueError, "lr", background.step)
    optimizer.param_groups[1]["lr"] = 0.1
    hook = optimizer.register_step_post_hook(lambda *_: None)
    raises(EngineError, "hooks", background.step)
    hook.remove()
    hook = register_optimizer_step_post_hook(lambda *_: None)
    raises(EngineError, "hooks", background.step)
    hook.remove()
    assert_same(everything(model, optimizer), before)
    raises(EngineError, "only an Anon", lambda: OverlappedStep(model, torch.optim.SGD(model.parameters())))
    raises(EngineError, "fully_shard", lambda: OverlappedStep(Net(), optimizer))
    other = Anon(make()[0].parameters())
    raises(EngineError, "the model has not", lambda: OverlappedStep(model, other))


def case_the_kernel_steps_the_shards():
    model, optimizer = make()
    background, patch = OverlappedStep(model, optimizer), Patch()
    model(rows(0), True).sum().backward()
    stepped = []
    kernel = cpu.run
    patch.setattr(cpu, "run", lambda lists, *rest: (stepped.extend(lists[0]), kernel(lists, *rest)))
    background.step()
    background.wait()
    patch.close()
    assert len(stepped) == len(list(model.parameters()))


def case_runs_of_the_training_loop():
    """On the device, on the host, and on the host in the background: the same losses and gradient norms."""
    folders, steps, patch = {}, [], Patch()
    original = OverlappedStep.step
    patch.setattr(OverlappedStep, "step", lambda self: (steps.append(1), original(self)))
    for offload in ("off", "serial", "overlap"):
        folders[offload] = shared_folder(OUT)
        config = c.Config(
            model=c.ModelConfig(layers=2, width=32, heads=2, context=32),
            data=c.DataConfig(path=DATA, seq_len=32),
            optim=c.OptimConfig(lr=3e-3),
            schedule=c.ScheduleConfig(warmup_steps=2),
            train=c.TrainConfig(steps=6, global_batch=8, micro_batch=2, engine="fsdp2", offload=offload),
            eval=c.EvalConfig(every=2, sequences=15, final_sequences=15),
            checkpoint=c.CheckpointConfig(every=3, keep=9),
            log=c.LogConfig(every=3, trackers=()),
            run_dir=folders[offload],
        )
        run(config)
        assert len(steps) == (6 if offload == "overlap" else 0)
    patch.close()
    expected = metrics(Path(folders["off"]))
    assert metrics(Path(folders["serial"])) == expected
    assert metrics(Path(folders["overlap"])) == expected
    config.train.engine, config.resume = "ddp", "never"
    raises(EngineError, "needs engine fsdp2 or hsdp", lambda: run(config))


if __name__ == "__main__":
    OUT, DATA = sys.argv[1:3]
    run_cases(globals())
