"""The options of `anon-dist bench` and what it is asked about."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal, get_args

import tyro

from anon_dist.named import need_data, need_room
from anon_dist.usage import UsageError

EngineName = Literal[
    "ddp",
    "zero1",
    "fsdp1",
    "fsdp2",
    "hsdp",
    "fsdp2+tp",
    "zero0",
    "zero1-deepspeed",
    "zero2",
    "zero3",
    "zero2-offload",
    "zero3-offload",
    "zero3-offload-params",
]
"""zero1 is torch's ZeroRedundancyOptimizer; the last seven are DeepSpeed's, as configs/deepspeed has them."""
ENGINES: tuple[EngineName, ...] = get_args(EngineName)
OptimizerName = Literal["anon", "anon-bf16", "anon-bf16-m", "anon-8bit-m", "anon-columns", "anon-both", "adamw"]
OPTIMIZERS: tuple[OptimizerName, ...] = get_args(OptimizerName)


@dataclass(frozen=True)
class Hardware:
    """One rank's accelerator and its share of the node. The defaults are an H100 SXM's in a DGX H100."""

    memory: float = 80e9
    """Bytes of the accelerator."""
    reserve: float = 5e9
    """Of those, bytes for the context, the collectives' buffers and fragmentation: an estimate."""
    hbm: float = 3.35e12
    """Bytes per second of its memory."""
    flops: float = 989e12
    """Peak dense bfloat16 operations per second."""
    flops32: float = 67e12
    """Peak float32 operations per second, without TF32, in which matrices are turned into a basis."""
    per_node: int = 8
    """Ranks of a node."""
    nvlink: float = 450e9
    """Bytes per second that a rank sends within the node."""
    network: float = 50e9
    """Bytes per second that a rank sends to other nodes."""
    pcie: float = 64e9
    """Bytes per second between accelerator and host, each way."""
    host_memory: float = 250e9
    """Bytes of the host, a rank's share."""
    host: float = 76.8e9
    """Bytes per second of the host's memory, a rank's share."""


@dataclass
class StepOptions:
    """Measure time and memory of optimizer steps against torch's fused AdamW, which takes turns with each: medians and quartiles of ratios.

    Anon's steps are plain (between windows), accumulating (inside a window) and refreshing; the means over a run weigh them as its schedule
    does. GB/s are of the bytes that a step must move.
    """

    sizes: list[float] = field(default_factory=list)
    """Elements, in four tensors of whole blocks (60e6, say). Without this and --tensors: 1e6, 10e6 and 60e6, or what memory holds of
    them; on CUDA more."""
    tensors: list[str] = field(default_factory=list)
    """Models whose lists of parameters are stepped: names of shipped training configurations (gpt2-small: 148 tensors)."""
    only: list[str] = field(default_factory=list)
    """Patterns of names of the optimizers to measure ("anon*", "torchao *"); without it all."""
    pairs: int = 20
    """Steps of each, alternating, in a repeat."""
    repeats: int = 5
    """The quartiles are over these."""
    device: Literal["cpu", "cuda"] | None = None
    """None: CUDA if there is one."""
    memory: bool = True
    """Measure also the peak, on the last list; on the CPU in a process of its own."""
    json: Path | None = None
    """File to write all numbers to."""
    plot: Path | None = None
    """PNG file to draw the ratios to."""


@dataclass
class TrainOptions:
    """Measure tokens per second and peak memory of pretraining: this loop with Anon, with AdamW, and a Hugging Face Trainer, in turns."""

    data: Path
    """Folder made by `anon-dist data prepare`."""
    config: str = "quickstart"
    """Training configuration: a shipped one's name, or a YAML file."""
    turn: int = 5
    """Steps of a turn."""
    repeats: int = 7
    """Turns of each, after one to warm up."""
    micro_batch: int | None = None
    """Sequences at once. None: the configuration's."""
    global_batch: int | None = None
    """Sequences of a step. None: the configuration's."""
    minutes: float = 9.0
    """Longest that all may take."""
    json: Path | None = None
    """File to write the numbers to."""


@dataclass
class ScalingOptions:
    """Measure time, state and bytes sent of a step on several processes of this machine, Anon and AdamW taking turns."""

    model: str = "small"
    """7b, 70b, 405b, small; or a training configuration: a shipped one's name, or a YAML file."""
    vocab: int = 4096
    """Tokens, for a training configuration."""
    ranks: tuple[int, ...] = (1, 2, 4)
    """Numbers of processes."""
    engines: tuple[EngineName, ...] = ("ddp", "zero1", "fsdp2")
    """Engines."""
    steps: int = 10
    """Timed steps of each optimizer."""
    micro_batch: int = 2
    """Sequences that a rank takes at once."""
    accumulation: int = 1
    """Micro-batches of a step."""
    accumulate: Annotated[str, tyro.conf.arg(metavar="{sharded,whole}")] = "sharded"
    """FSDP: gradients are reduced after each micro-batch, or kept whole and reduced once a step (train.accumulate)."""
    seq_len: int = 64
    """Tokens of a sequence."""
    precision: Annotated[str, tyro.conf.arg(metavar="{bf16,fp32}")] = "fp32"
    """Of the computation."""
    checkpointing: Annotated[str, tyro.conf.arg(metavar="{none,full,selective}")] = "none"
    """What of a block's activations is computed again (train.activation_checkpointing)."""
    check: bool = False
    """Exit with code 1 if state bytes are not those predicted, or bytes sent differ by more than 3%."""
    minutes: float = 5.0
    """Longest that the processes of one number of ranks may take."""
    json: Path | None = None
    """File to write the numbers to."""


@dataclass
class PlanOptions:
    """Predict memory, traffic and time of a step, for each engine and optimizer. Nothing is run."""

    model: str = "7b"
    """7b, 70b, 405b, small; or a training configuration: a shipped one's name, or a YAML file."""
    vocab: int = 50304
    """Tokens, for a training configuration, which leaves them to the data."""
    ranks: int = 64
    """Accelerators."""
    micro_batch: int = 1
    """Sequences that a rank, or a tensor-parallel group, takes at once."""
    accumulation: int = 1
    """Micro-batches of a step."""
    accumulate: Annotated[str | None, tyro.conf.arg(metavar="{sharded,whole}")] = None
    """FSDP: gradients are reduced after each micro-batch, or kept whole and reduced once a step (train.accumulate). None: sharded, but
    whole for bf16-true."""
    loss: Annotated[str, tyro.conf.arg(metavar="{chunked,whole}")] = "chunked"
    """Logits of a piece of the tokens at a time, or of all at once (train.loss)."""
    seq_len: int | None = None
    """Tokens of a sequence. None: the model's context."""
    precision: Annotated[str, tyro.conf.arg(metavar="{bf16,bf16-true,fp32}")] = "bf16"
    """Of the computation; bf16-true: of parameters and gradients too (train.precision)."""
    checkpointing: Annotated[str, tyro.conf.arg(metavar="{none,full,selective}")] = "full"
    """What of a block's activations is computed again (train.activation_checkpointing)."""
    compile: Annotated[str, tyro.conf.arg(metavar="{none,blocks}")] = "blocks"
    """Whether blocks are compiled (train.compile), which saves less for the backward pass."""
    shard_ranks: int = 8
    """hsdp: ranks that share one copy."""
    tensor_parallel: int = 8
    """fsdp2+tp: ranks that split matrices."""
    context_parallel: int = 1
    """fsdp2 and hsdp: ranks that share each sequence (train.context_parallel)."""
    mfu: float = 0.4
    """Share of the peak that forward and backward passes reach where nothing is computed again."""
    steps: int = 100_000
    """Length of the run, on which the mean traffic of Anon's step depends (with the presets' schedule)."""
    basis_block: int = 128
    """Of anon-columns and anon-both (optim.basis_block)."""
    engines: tuple[EngineName, ...] = ENGINES
    """Which to show."""
    optimizers: tuple[OptimizerName, ...] = OPTIMIZERS
    """Which to show."""
    json: Path | None = None
    """File to write the numbers to."""
    hardware: Hardware = field(default_factory=Hardware)


@dataclass
class InitOptions:
    """Write a commented configuration for a model, its data and a machine. Nothing is run: micro-batch, sharding and activation
    checkpointing are the fastest that `anon-dist bench plan` has fit into memory.
    """

    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL")]
    """Number of parameters (124M, 1.3B), for a Llama shape; or a shipped configuration's name or file, or 7b, 70b, 405b."""
    data: str
    """Folder made by `anon-dist data prepare`, or its address."""
    out: Path
    """YAML file to write, for `anon-dist train --config OUT`."""
    ranks: int = 1
    """Accelerators, or processes."""
    per_node: int = 8
    """Of those, in one node."""
    memory: float | None = None
    """GB (1e9 bytes) of one. None: of this machine's GPU. Where there is none, what memory is free, for one process on the CPU; for several
    ranks, 80."""
    precision: Literal["bf16", "fp32"] | None = None
    """Of the computation. None: bf16; fp32 on a CPU."""
    seq_len: int | None = None
    """Tokens of a sample. None: the model's context."""
    context: int = 2048
    """Longest sequence, of a model that is given by its number of parameters."""
    tokens: int | None = None
    """To train on. None: 20 for each parameter (Hoffmann et al., arXiv 2203.15556), but at most four epochs of the data."""
    batch_tokens: int | None = None
    """Of a step. None: by the number of tokens to train on."""

    def check(self) -> None:
        """Raises `UsageError`: an option is out of its range, the data are not there, or the file is there already."""
        for name in ("ranks", "per_node", "context", "seq_len", "tokens", "batch_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"--{name.replace('_', '-')} must be at least 1, not {value}")
        if self.memory is not None and not 0.1 <= self.memory <= 1e5:
            raise UsageError(f"--memory is GB of one accelerator, from 0.1 to 100,000, not {self.memory:g}")
        if os.path.lexists(self.out):
            raise UsageError(f"--out {self.out} exists; name another file, or remove it")
        need_room(self.out.parent, "--out")
        need_data(self.data, "--data")
