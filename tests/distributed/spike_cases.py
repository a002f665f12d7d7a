"""Spikes that one rank has, met by all; for the cases of several engines."""

import json
import math
import re
import time
from pathlib import Path

import torch
import torch.distributed as dist
from launch_cases import Patch, step_back

from anon_dist.checkpoint.verify import verify
from anon_dist.data import BatchLoader
from anon_dist.train import loop
from anon_dist.train import records as train_records
from anon_dist.train.health import spikes, stragglers


def records(folder):
    """Those of steps; and those of going back."""
    found = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return {r["step"]: r for r in found if "loss" in r}, [r for r in found if "rewound_from" in r]


def spiked(run, config, action, at=9, jump=None, nan=None):
    """A run of 12 steps, with a spike on rank 1 in the step that reads these samples, by `loop.Batch.losses`; its folder.

    `nan`: another step, in which the loss, and so the gradients, of rank 1 are NaN.
    `jump`: there is none, and after this many steps the samples of one step are passed over by hand.
    """
    config.train.on_spike, config.train.spike_sigma, config.eval.every = action, 40.0, 0
    patch, seen = Patch(), []
    losses, take_step, advance = loop.Batch.losses, loop.take_step, BatchLoader.advance

    def greater(batch, model, *args, **options):
        found = losses(batch, model, *args, **options)
        if jump is not None or dist.get_rank() != 1 or not model.training:
            return found
        return found * {at: 200.0, nan: math.nan}.get(seen[-1].loader.cursor // 8 + 1, 1.0)

    def told(run, *rest):
        seen.append(run)
        return take_step(run, *rest)

    def jumps(loader):
        if advance(loader) == 8 * (jump or -1):
            loader.pass_over(loader.cursor + 8)
        return loader.cursor

    for target, name, value in ((spikes, "WARM", 4), (loop, "take_step", told), (BatchLoader, "advance", jumps)):
        patch.setattr(target, name, value)
    patch.setattr(loop.Batch, "losses", greater)
    try:
        folder = run(config)
    finally:
        patch.close()
    spikes_known = (jump is None) * (1 + (nan is not None))
    assert seen[-1].spikes.found == spikes_known  # on every rank
    assert seen[-1].rewinds == (jump is None) * (action == "rewind")
    return folder


def check_spikes(run, config_of, other=None):
    """Skipped by all, to the bit; gone back from, after which the steps are those of a run that passed over the samples by hand.

    `other`: of another engine, which goes back alike.
    """
    alike = spiked(run, other, "rewind") if other is not None else None
    config = config_of()
    config.checkpoint.keep_steps = (8, 9, 10, 11)
    skipped = spiked(run, config, "skip", nan=11)
    back = spiked(run, config := config_of(), "rewind")
    goes_on_after_going_back(run, config)
    by_hand = spiked(run, config_of(), "record", jump=8)
    if dist.get_rank() == 0:
        (steps, _), (again, (told,)), (wanted, _) = records(skipped), records(back), records(by_hand)
        assert [t for t, r in steps.items() if r.get("skipped")] == [9, 11]
        for before, after in ((8, 9), (10, 11)):  # what skipped steps leave: weights and state, bit for bit
            at = [Path(skipped) / "checkpoints" / f"step-{step:08d}" for step in (before, after)]
            counted = ("extra global_samples", "extra skipped_steps")  # DeepSpeed's
            found = [d for d in verify(*at) if not d.what.endswith("lr") and d.what not in counted]
            assert found == [], found
        assert verify(at[0], Path(skipped) / "checkpoints" / "step-00000009") != []
        assert steps[9]["loss"] > 20 * steps[8]["loss"]
        assert steps[9]["update_rms"] == steps[8]["update_rms"]
        assert steps[10]["loss"] < 2 * steps[8]["loss"]
        assert (told["step"], told["rewound_from"], told["samples_passed_over"]) == (8, 9, 8)
        assert [r["samples"] for r in again.values()] == [8 * t + 8 * (t > 8) for t in range(1, 13)]
        for key in ("loss", "grad_norm", "update_rms", "lr"):
            ours, theirs = ([r[key] for r in found.values()] for found in (again, wanted))
            assert ours == theirs, (key, ours, theirs)
            if alike is not None:
                others = [r[key] for r in records(alike)[0].values()]
                assert all(abs(a - b) <= 1e-4 * abs(b) for a, b in zip(others, theirs, strict=True)), (
                    key,
                    others,
                    theirs,
                )


def goes_on_after_going_back(run, config):
    """A `spiked` run that went back, resumed from the checkpoint to which it did, as after a kill: it passes over the same samples, and has
    the records and weights that it had."""

    def history():
        told = ("step", "samples", "loss", "grad_norm", "update_rms", "lr", "spikes", "rewinds", "rewound_from")
        found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        kept = [[r.get(key) for key in told] for r in found if "lr" in r or "rewound_from" in r]
        return kept, (folder / "rewinds.json").read_text(), (folder / "model" / "model.safetensors").read_bytes()

    folder = Path(config.run_dir)
    before = history()
    assert step_back(folder).name == "step-00000008"
    spiked(run, config, "rewind")
    assert history() == before


def with_nan(run, config, at, action=None, jump=None):
    """A run of 8 steps, in one of which the loss of rank 1 is finite, and its gradient NaN; its folder.

    `action`: None: there is none, the optimizer is not called in that step; or with `jump` so many samples are passed over by hand after
    the step before the first of them.
    """
    config.train.on_spike, config.train.steps, config.eval.every = action or "record", 8, 0
    patch, seen = Patch(), []
    losses, take_step, advance = loop.Batch.losses, loop.take_step, BatchLoader.advance

    def poisoned(batch, model, *args, **options):
        found = losses(batch, model, *args, **options)
        if action and dist.get_rank() == 1 and model.training and seen[-1].loader.cursor == 8 * (at - 1):
            found.register_hook(lambda gradient: gradient * math.nan)
        return found

    def told(run, *rest):
        seen.append(run)
        if action or jump or run.step + 1 != at:
            return take_step(run, *rest)
        stepped, run.engine.step = run.engine.step, lambda lr, clip, veto: left_out(run, veto)
        try:
            return take_step(run, *rest)
        finally:
            run.engine.step = stepped

    def left_out(run, veto):
        for p in run.engine.model.parameters():
            p.grad = None
        veto(torch.tensor(1.0))
        return torch.tensor(1.0)

    def jumps(loader):
        if advance(loader) == 8 * 4 and jump:
            loader.pass_over(loader.cursor + jump)
        return loader.cursor

    for target, name, value in (
        (loop, "take_step", told),
        (BatchLoader, "advance", jumps),
        (loop.Batch, "losses", poisoned),
    ):
        patch.setattr(target, name, value)
    try:
        folder = run(config)
    finally:
        patch.close()
    last = seen[-1]
    found = torch.tensor([last.spikes.found, last.rewinds, last.skipped, last.step, last.loader.cursor])
    everywhere = [torch.zeros_like(found) for _ in range(dist.get_world_size())]
    dist.all_gather(everywhere, found)
    assert all(found.equal(other) for other in everywhere), everywhere
    assert found[:2].tolist() == [int(action is not None), int(action == "rewind")], found
    return folder


def check_nan(run, config_of, actions=("record", "skip", "rewind"), at=6):
    """A gradient of one rank is NaN: the step is none on every rank, whatever is done about spikes, and is counted once; the weights are
    those of a run that did not take it, or that passed over the samples by hand."""

    def weights(folder):
        return (Path(folder) / "model" / "model.safetensors").read_bytes()

    folders = {action: with_nan(run, config_of(), at, action) for action in actions}
    jumps = {8 * (at - 4) if action == "rewind" else None for action in actions}
    by_hand = {jump: with_nan(run, config_of(), at, jump=jump) for jump in sorted(jumps, key=str)}
    if dist.get_rank() == 0:
        for action, folder in folders.items():
            other = by_hand[8 * (at - 4) if action == "rewind" else None]
            (steps, back), (wanted, _) = records(folder), records(other)
            none = [t for t, r in steps.items() if r.get("skipped")]
            assert none == ([] if action == "rewind" else [at]), (action, none)
            assert [(r["step"], r["rewound_from"]) for r in back] == [(4, at)] * (action == "rewind")
            assert steps[8]["spikes"] == 1
            assert weights(folder) == weights(other), action
            for key in ("loss", "update_rms", "refreshes", "lr"):
                ours, theirs = ([r[key] for r in found.values()] for found in (steps, wanted))
                assert ours == theirs, (action, key, ours, theirs)
            assert steps[8]["samples"] == 8 * 8 + 8 * (at - 4) * (action == "rewind")


def check_straggler(run, config):
    """A rank that sleeps is the slowest in the records, though every rank takes the same time for a step; the others wait as long. When it
    has been for long, a line of the log says so."""
    config.eval.every, config.log.every = 0, 3
    patch, original, asleep = Patch(), loop.Batch.losses, 0.3
    slept: list[int] = []

    def slow(batch, model, *args, **options):
        if model.training:
            slept.append(1)
            # Rank 0 in the steps 1 to 6, so that rank 1 is not the slowest there by chance; then rank 1.
            of_rank = int(len(slept) > 6 * rounds)
            if dist.get_rank() == of_rank and len(slept) % rounds == 0:  # once in a step
                time.sleep(asleep)
        return original(batch, model, *args, **options)

    rounds = 8 // (2 * config.train.micro_batch)
    said: list[str] = []
    patch.setattr(loop.Batch, "losses", slow)
    patch.setattr(stragglers, "LONG", 6)
    patch.setattr(train_records.log, "warning", lambda text, *values: said.append(text % values))
    try:
        folder = run(config)
    finally:
        patch.close()
    if dist.get_rank() == 0:
        seconds = r"\d\.\d+(e-\d+)? s"
        words = rf"step 12: rank 1 on \S+ was the slowest over the last 6 steps: {seconds} of work a step, the others {seconds}"
        assert re.fullmatch(words, said[-1]), said
        r = records(folder)[0][12]
        assert r["slowest_rank"] == 1
        assert r["slowest_host"]
        assert r["work_s_min"] < r["work_s_median"] < r["work_s_max"]
        assert r["work_s_max"] > asleep
        assert r["work_s_max"] - r["work_s_min"] > asleep / 3
        assert r["peers_wait_s"] > asleep / 6  # the median of two: half of what the other waits
