"""`anon-dist init`: a configuration for a model, its data and a machine, by what the plan predicts."""

from __future__ import annotations

import dataclasses
import json
import math
import shlex
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from anon_dist.bench.asked import Asked
from anon_dist.bench.memory import MAX_INTERVAL, Job
from anon_dist.bench.options import EngineName, Hardware, InitOptions, OptimizerName
from anon_dist.bench.plan import Row, predict
from anon_dist.bench.shapes import Shape, shape_of
from anon_dist.files import write_text
from anon_dist.machine import free_memory
from anon_dist.train.config.parsing import ConfigError, ModelConfig, check, load_config

TOKENS_PER_PARAMETER, EPOCHS = 20, 4
"""Repeating data up to four times costs little (Muennighoff et al., arXiv 2305.16264)."""
LARGE = 80.0
"""GB of an A100 or H100."""
MFU = 0.4
STATES = "exp_avg_sq=bfloat16, precond=bfloat16"
"""As in the presets: 8 bytes a parameter."""
PLANNED: OptimizerName = "anon-columns"


def init(options: InitOptions, asked: Asked) -> str:
    """Write the configuration.

    Returns:
        For what machine it is, and how to start it.

    Raises:
        ConfigError: nothing fits into memory.
    """
    model, train, machine = asked.model, asked.train, machine_of(options)
    chosen = choose(options, machine, shape_of(model, asked.vocab), asked.seq_len, train)
    text = render(options, machine, model, chosen, train)
    _check_text(text)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    write_text(options.out, text)
    planned = f"for {options.ranks} x {machine.memory:g} GB{machine.said}"
    if options.model.endswith((".yaml", ".yml")):
        planned += f", with the model of {options.model} and none of its other settings"
    return f"{planned}; start it with\n\n  {_command(options, machine, chosen)}"


def _check_text(text: str) -> None:
    """That `anon-dist train --config` takes it."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.yaml"
        path.write_text(text, encoding="utf-8")
        try:
            check(load_config(path))
        except ConfigError as error:
            raise ConfigError(f"nothing is written, as {str(error).replace(f'{path}: ', '')}") from None


# -- the machine ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Machine:
    """What is planned for."""

    memory: float
    """GB of an accelerator, or for a process."""
    precision: Literal["bf16", "fp32"]
    said: str
    """Where that comes from, in words; "" if it was given."""


def machine_of(options: InitOptions) -> Machine:
    """What the options say; else what is here. Several ranks without a GPU here are those of another machine."""
    if options.memory is not None:
        return Machine(options.memory, options.precision or "bf16", "")
    if torch.cuda.is_available():
        memory = round(torch.cuda.get_device_properties(0).total_memory / 1e9, 1)
        return Machine(memory, options.precision or "bf16", f" ({torch.cuda.get_device_name(0)}, which is here)")
    if options.ranks > 1 or options.precision == "bf16":
        said = " (assumed, as no GPU is here; --memory says otherwise)"
        return Machine(LARGE, options.precision or "bf16", said)
    memory = round(free_memory() / 1e9, 1)
    return Machine(memory, "fp32", " (what is free here, where no GPU is; for a GPU elsewhere give its --memory)")


@dataclass(frozen=True)
class Chosen:
    """What fits, and is predicted to be the fastest that does."""

    engine: str
    """For train.engine."""
    checkpointing: str
    micro_batch: int
    global_batch: int
    steps: int
    seq_len: int
    parameters: int
    row: Row
    """What is predicted."""


def choose(options: InitOptions, machine: Machine, shape: Shape, seq_len: int, train: int) -> Chosen:
    """Batch, engine, micro-batch and activation checkpointing.

    Raises:
        ConfigError: nothing fits into memory, saying by how much the least does not.
    """
    parameters = sum(p.numel for p in shape.parameters())
    tokens = options.tokens or min(TOKENS_PER_PARAMETER * parameters, EPOCHS * train)
    share = max(1, round((options.batch_tokens or _batch_tokens(tokens)) / seq_len / options.ranks))  # a rank's
    share = 1 << max(0, round(math.log2(share)))
    hardware = Hardware(memory=1e9 * machine.memory, reserve=min(5e9, 1e8 * machine.memory), per_node=options.per_node)
    engines: tuple[EngineName, ...] = ("ddp", "fsdp2") if options.ranks > 1 else ("ddp",)
    least: Row | None = None
    for checkpointing in ("none", "selective", "full"):
        fitting = []
        for engine in engines:
            for micro in (1 << i for i in range(share.bit_length())):
                job = Job(
                    shape,
                    options.ranks,
                    micro_batch=micro,
                    accumulation=share // micro,
                    seq_len=seq_len,
                    bf16=machine.precision == "bf16",
                    checkpointing=checkpointing,
                )
                row = predict(engine, PLANNED, job, hardware, MFU, 10_000)
                if row.trouble is None:
                    fitting.append((row.tokens_per_s, micro, engine, row))
                elif least is None or row.memory.device < least.memory.device:
                    least = row
        if fitting:
            _, micro, engine, row = max(fitting, key=lambda f: (round(f[0], 3), f[1], f[2] == "ddp"))
            name = "single" if options.ranks == 1 else engine
            bound = options.tokens is None and tokens == EPOCHS * train  # "at most": not rounded up
            steps = max(2, (math.floor if bound else round)(tokens / (share * options.ranks * seq_len)))
            return Chosen(name, checkpointing, micro, share * options.ranks, steps, seq_len, parameters, row)
    assert least is not None
    raise ConfigError(
        f"{parameters / 1e9:.3g}B parameters do not fit on {options.ranks} x {machine.memory:g} GB{machine.said}: with one sequence at a "
        f"time, sharded and recomputed, a rank needs {least.memory.device / 1e9:,.1f} GB, and {hardware.reserve / 1e9:.2g} stay in "
        "reserve; take more ranks, shorter samples (--seq-len), or a smaller model"
    )


def _batch_tokens(tokens: int) -> int:
    """Of a step, growing with the length of the training as in nanochat's log of 2026-02-05: half a million at 10B tokens."""
    return int(2**19 * (tokens / 1e10) ** 0.383)


# -- the file ---------------------------------------------------------------------------------------------------------


def learning_rate(parameters: int) -> float:
    """Through those of the presets: 3e-3 at 1.35M parameters, 6e-4 at 124M, 3e-4 at 1B."""
    return float(f"{3e-3 * (parameters / 1.35e6) ** -0.356:.1e}")


def often(steps: int) -> int:
    """After how many steps to validate and save: a round number near a twentieth of them, and no fewer than 10."""
    unit = int(10 ** max(1, math.floor(math.log10(max(1, steps / 20)))))
    return min(steps, max(unit, round(steps / 20 / unit) * unit))


def duration(seconds: float) -> str:
    """In the unit that suits it."""
    units = ((86400, "days"), (3600, "hours"), (60, "minutes"), (1, "seconds"))
    unit, name = next((u for u in units if seconds >= 2 * u[0]), units[-1])
    return f"{seconds / unit:,.0f} {name}" if seconds >= 10 * unit else f"{seconds / unit:,.1f} {name}"


def _command(options: InitOptions, machine: Machine, chosen: Chosen) -> str:
    train = f"launch/pretrain.py --config {shlex.quote(str(options.out))}"
    if chosen.engine == "single":
        return f"anon-dist train --config {shlex.quote(str(options.out))}"
    if options.ranks > options.per_node:
        return f"bash launch/multinode/torchrun.sh --config {shlex.quote(str(options.out))}  # on each node: launch/multinode/README.md"
    cpu = "-cpu" if machine.precision == "fp32" else ""
    return f"accelerate launch --config_file configs/accelerate/{chosen.engine}{cpu}.yaml --num_processes {options.ranks} {train}"


_ALWAYS = ("family", "layers", "width", "heads", "context")


def render(options: InitOptions, machine: Machine, model: ModelConfig, chosen: Chosen, train: int) -> str:
    """The file, with what was predicted."""
    memory, row, per_step = chosen.row.memory, chosen.row, chosen.global_batch * chosen.seq_len
    tokens = chosen.steps * per_step
    every = often(chosen.steps)
    speed = row.tokens_per_s * options.ranks
    rounds = chosen.global_batch // options.ranks // chosen.micro_batch
    usual = dataclasses.asdict(ModelConfig())
    shown = {k: v for k, v in dataclasses.asdict(model).items() if k in _ALWAYS or v != usual[k]}
    sizes = "\n".join(f"  {k}: {_yaml(v)}" for k, v in shown.items())
    why = "fits without" if chosen.checkpointing == "none" else "what would not fit otherwise"
    timing = (
        f"{speed:,.0f} tokens/s on all ranks, {duration(tokens / speed)}, on H100s at {MFU:.0%} of their peak"
        if machine.precision == "bf16"
        else "the plan does not know this processor's speed"
    )
    return f"""\
# {chosen.parameters / 1e6:,.1f}M parameters on {tokens:,} tokens, {tokens / train:.2f} epochs of {options.data}.
# Written by anon-dist init for {options.ranks} x {machine.memory:g} GB{machine.said}; start it with
#
#   {_command(options, machine, chosen)}
#
# Predicted, not measured (anon-dist bench plan): a rank needs {memory.device / 1e9:.2f} GB, of which weights {memory.parameters / 1e9:.2f},
# gradients {memory.gradients / 1e9:.2f}, optimizer {memory.state / 1e9:.2f}, activations {memory.activations / 1e9:.2f};
# {timing}.
# anon-dist train --help says what each field means, and all that are not here.
model:
{sizes}
data:
  path: {_yaml(str(options.data))}
  seq_len: {chosen.seq_len}
optim:
  lr: {learning_rate(chosen.parameters):.1e}  # usual at this size; try half and twice as much in a short run (anon-dist sweep)
  state_dtype: {STATES}  # 8 bytes a parameter, as AdamW
  basis: columns  # with the next three: lower losses (configs/study); under FSDP1 and DeepSpeed's ZeRO 1 and 2 write null
  nesterov: true
  betas: [0.95, 0.95]
  max_interval: {MAX_INTERVAL}
schedule:
  warmup_steps: {max(1, min(2000, chosen.steps // 25))}
  decay: cosine
train:
  steps: {chosen.steps}
  global_batch: {chosen.global_batch}  # {per_step:,} tokens a step
  micro_batch: {chosen.micro_batch}  # of those that fit the fastest; on each rank {rounds} make a step
  engine: {chosen.engine}
  precision: {machine.precision}
  activation_checkpointing: {_yaml(chosen.checkpointing)}  # {why}
  compile: {"blocks" if machine.precision == "bf16" else "none"}
eval:
  every: {every}
  sequences: 256
checkpoint:
  every: {every}
run_dir: {_yaml(f"runs/{options.out.stem}")}
"""


def _yaml(value: object) -> str:
    """A scalar, as JSON has it, which is YAML."""
    return json.dumps(value, ensure_ascii=False)
