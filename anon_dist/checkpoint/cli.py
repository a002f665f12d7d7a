"""`anon-dist ckpt inspect | convert | verify`.

What does the work is imported once the options are known: it imports torch.
"""

from __future__ import annotations

import json
import re
import sys
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from anon_dist.arguments import parse
from anon_dist.checkpoint.errors import CheckpointError
from anon_dist.checkpoint.keeping.names import newest_of, run_problem
from anon_dist.checkpoint.options import AdamWOptions, AnonOptions, Layout, ReadOptions, WriteOptions
from anon_dist.exits import FAILED, may_pass
from anon_dist.named import need_checkpoint, need_file, need_no
from anon_dist.stores import is_address
from anon_dist.usage import UsageError, ending

_Source = Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="SRC")]
_Target = Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="DST")]
_First = Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="A")]
_Second = Annotated[tyro.conf.Positional[str | None], tyro.conf.arg(metavar="[B]")]
_Format = Literal["canonical", "consolidated", "dcp", "hf", "zero0", "zero1", "zero2", "zero3", "universal"]
_NAME = "a run, or a checkpoint's file or folder"
_CALLED = {
    **dict.fromkeys(("fsdp", "fsdp2", "hsdp", "torchtitan"), "dcp"),
    "fsdp1": "dcp, which FSDP2 reads (FSDP1's own is only read)",
    **dict.fromkeys(("ddp", "single", "torch", "pt"), "consolidated"),
    **dict.fromkeys(("accelerate", "trainer"), "dcp with --layout accelerate or trainer"),
    **dict.fromkeys(("deepspeed", "zero"), "zero2 or zero3"),
    **dict.fromkeys(("safetensors", "huggingface", "transformers", "model"), "hf"),
}
"""What the formats are called by the engines that read them."""
_SHOWN = 40


@dataclass
class Reading:
    """How a checkpoint is read."""

    names: Path | None = None
    """A file with one parameter name on each line, in the optimizer's order: for optimizers that number their parameters."""
    names_in_model_order: bool = False
    """Say that such an optimizer was made from model.parameters(), or that each of its groups has that order. It is not looked for
    in the files, where it does not show."""
    unsafe: bool = False
    """Build whatever classes its pickles ask for. This may run any code that the file's author wants."""

    def check(self) -> None:
        """Raises `UsageError`: options contradict each other, or a file is not there."""
        if self.names and self.names_in_model_order:
            raise UsageError("--names and --names-in-model-order both say what the parameters are called; give one")
        need_file(self.names, "a file of parameter names", "--names")

    def options(self) -> ReadOptions:
        """For the readers."""
        from anon_dist.checkpoint.names import read_names

        names = read_names(self.names) if self.names else None
        return ReadOptions(names, self.names_in_model_order, unsafe=self.unsafe)


@dataclass
class Inspect:
    """Show what a checkpoint is: format, optimizer, world size, step, param groups, states."""

    src: _Source
    """A run's folder (its newest complete checkpoint), a checkpoint's file or folder, or an address of either (s3://…, gs://…): the
    checkpoint is copied into a temporary folder, and checked."""
    json: bool = False
    """As JSON."""
    reading: tyro.conf.OmitArgPrefixes[Reading] = field(default_factory=Reading)

    def check(self) -> None:
        """Raises `UsageError`: what is named is not there."""
        self.src = _named(self.src)
        self.reading.check()


@dataclass
class Convert:
    """Write a checkpoint in another format, for another world size or optimizer. What SRC is, is detected."""

    src: _Source
    """As for inspect; only read."""
    dst: _Target
    """Complete or absent. If the command is killed, the same command goes on."""
    to: Annotated[_Format, tyro.conf.arg(metavar="FORMAT")]
    """dcp, of FSDP2; zero0, zero1, zero2, zero3, universal, of DeepSpeed; consolidated, one file; hf, the weights alone; canonical."""
    world_size: int = 1
    """Ranks to write for; DCP and universal checkpoints are read on any number."""
    layout: Layout = "anon_dist"
    """Whose code will load it; trainer is transformers'. Of a DCP folder, of the files beside DeepSpeed's, and of a consolidated
    checkpoint, which for accelerate and trainer is a folder, as they write for one process and DDP."""
    keyed: Literal["name", "index"] = "name"
    """How a consolidated optimizer calls its parameters."""
    workers: int = 2
    """Threads."""
    overwrite: bool = False
    """Replace DST if it exists, once the new one is complete."""
    allow_loss: bool = False
    """Leave out what the format cannot hold, instead of refusing."""
    precision: Literal["float32", "bfloat16", "float16"] | None = None
    """zero0 to zero3, universal: of the engine that will load. By default as the source's weights, or as it records."""
    sub_group_size: int | None = None
    """zero3: of the engine that will load. By default as the source records, else DeepSpeed's own, 1e9."""
    round_robin_gradients: bool | None = None
    """zero1, zero2: whether the engine that will load has it. By default as the source records, else not."""
    muon_momentum: Literal["whole", "parts"] | None = None
    """zero1, zero2 of DeepSpeed's Muon: parts if the engine that will load offloads the optimizer, or runs stage 1 in bf16 with gradients
    summed in float32; else whole. By default as the source records."""
    muon_order: Literal["size", "model"] | None = None
    """zero3 of DeepSpeed's Muon: model if the model of the engine that will load is made under zero.Init, which hides the sizes that Muon
    sorts its matrices by; else size. It need not be said where the two are the same."""
    buffers: tuple[str, ...] | None = None
    """zero3: patterns of the buffers among what is in no param group, if SRC does not tell them from frozen parameters."""
    optimizer: Literal["anon", "adamw"] | None = None
    """Make the state that of another optimizer: AdamW's (or the paper's port's) Anon's, or Anon's AdamW's."""
    groups: Annotated[str | None, tyro.conf.arg(metavar="decay|FILE")] = None
    """Put the parameters into other param groups. decay: those of anon_dist.optim.param_groups, matrices as they are and vectors without
    weight decay. Or a JSON file: [{"params": [NAME or PATTERN, ...], "weight_decay": 0.1, "basis": null}, ...]."""
    anon: AnonOptions = field(default_factory=AnonOptions)
    adamw: AdamWOptions = field(default_factory=AdamWOptions)
    reading: tyro.conf.OmitArgPrefixes[Reading] = field(default_factory=Reading)

    def check(self) -> None:
        """Raises `UsageError`: what is named is not there, or is there already; or an option is out of its range."""
        if self.world_size < 1:
            raise UsageError(f"--world-size {self.world_size} is no number of ranks")
        if is_address(self.dst):
            raise UsageError(f"{self.dst} is an address: convert into a folder here, and copy that there")
        if self.groups and self.to == "hf":
            raise UsageError("--groups has no effect with --to hf, which has the weights alone")
        if self.groups and self.groups != "decay" and not Path(self.groups).exists():
            raise UsageError(f"--groups {self.groups} is neither 'decay' nor a file")
        self.src = _named(self.src)
        need_no(Path(self.dst), self.overwrite)
        self.reading.check()


@dataclass
class Verify:
    """Compare two checkpoints of any formats, bit for bit, or one with its own checksums. Exit code 1, and a table, if they differ."""

    a: _First
    """As for inspect."""
    b: _Second = None
    """Another; without it, A is compared with its checksums: the training loop's checkpoints and canonical ones have some."""
    workers: int = 2
    """Threads."""
    reading: tyro.conf.OmitArgPrefixes[Reading] = field(default_factory=Reading)

    def check(self) -> None:
        """Raises `UsageError`: what is named is not there."""
        self.a, self.b = _named(self.a), self.b and _named(self.b)
        self.reading.check()


COMMANDS: dict[str, Any] = {"inspect": Inspect, "convert": Convert, "verify": Verify}
"""Each command's options."""


def run(command: str, args: list[str]) -> None:
    """Run `inspect`, `convert` or `verify`; one line and an exit code of `anon_dist.exits` if something is wrong."""
    actions: dict[str, Any] = {"inspect": _inspect, "convert": _convert, "verify": _verify}
    kind, action = COMMANDS[command], actions[command]
    parsed = parse(kind, args, f"anon-dist ckpt {command}", called={"--to": _CALLED})
    with ending(CheckpointError, OSError):
        _check_options(args)
        parsed.check()
        try:
            action(parsed)
        except (CheckpointError, OSError):
            named = [path for key in ("src", "a", "b") if (path := getattr(parsed, key, None)) and not is_address(path)]
            if gone := [path for path in named if not Path(path).exists()]:
                removed = "was there and is gone: a training removes its older checkpoints. Give the command again"
                raise may_pass(CheckpointError(f"{gone[0]} {removed}")) from None
            raise


def _named(source: str) -> str:
    """Where the checkpoint lies that a command line names: of a run's folder the newest complete one, which is said.

    Raises:
        UsageError: nothing is there, it cannot be a checkpoint, or it is a run without one.
    """
    need_checkpoint(source, _NAME)
    if is_address(source) or not Path(source).is_dir():
        return source
    if newest := newest_of(Path(source)):
        _say_taken(source, str(newest))
        return str(newest)
    if problem := run_problem(Path(source)):
        raise UsageError(problem)
    return source


def _say_taken(run: str, newest: str) -> None:
    print(f"note: of {run} the newest complete checkpoint is taken: {newest}", file=sys.stderr)


def _at_hand(source: str) -> AbstractContextManager[Path]:
    from anon_dist.checkpoint.keeping.at_hand import at_hand

    return at_hand(source, _say_taken)


def _check_options(args: list[str]) -> None:
    """Raises `UsageError` for an option that would have no effect."""
    words = [word.partition("=")[0].replace("_", "-") for word in args if word.startswith("--")]
    options = [re.sub(r"(--|\.)no-", r"\1", word) for word in words]
    chosen = re.search(r"--optimizer[= ](\w+)", " ".join(args))
    for option in options:
        wanted = option[2:].partition(".")[0]
        if "." in option and (chosen is None or chosen[1] != wanted):
            raise UsageError(f"{option} has no effect without --optimizer {wanted}")


def _inspect(args: Inspect) -> None:
    from rich.console import Console
    from rich.table import Table

    from anon_dist.checkpoint.convert import inspect

    with _at_hand(args.src) as source:
        found = inspect(source, args.reading.options())
    if args.json:
        print(json.dumps(found, indent=1, ensure_ascii=False))
        return
    console = Console()
    for key in ("format", "optimizer", "step", "world_size", "parameters", "buffers", "frozen"):
        console.print(f"{key.replace('_', ' '):>12}  {found[key]}", highlight=False, markup=False)
    console.print(f"{'extras':>12}  {', '.join(found['extras']) or 'none'}", highlight=False, markup=False)
    for alias, name in found["tied"].items():
        console.print(f"{'tied':>12}  {alias} = {name}", highlight=False, markup=False)
    table = Table("state", "tensors", "elements", "bytes")
    for name, total in found["states"].items():
        table.add_row(name, *(f"{total[k]:,}" for k in ("tensors", "elements", "bytes")))
    for name, count in found["scalars"].items():
        table.add_row(f"{name} (scalar)", f"{count:,}", "", "")
    console.print(table)
    for i, group in enumerate(found["groups"]):
        options = ", ".join(f"{k}={v}" for k, v in group.items() if k not in ("parameters", "elements"))
        console.print(
            f"group {i}: {group['parameters']} parameters, {group['elements']:,} elements; {options}", markup=False
        )
    for note in found["notes"]:
        console.print(f"note: {note}", markup=False)


def _convert(args: Convert) -> None:
    from anon_dist.checkpoint.convert import convert
    from anon_dist.checkpoint.regroup import read_groups

    groups = read_groups(args.groups) if args.groups else None
    options = WriteOptions(
        args.world_size,
        args.layout,
        args.keyed,
        args.allow_loss,
        args.precision,
        args.sub_group_size,
        args.round_robin_gradients,
        args.muon_momentum,
        args.muon_order,
        args.buffers,
    )
    with _at_hand(args.src) as source:
        notes = convert(
            source,
            Path(args.dst),
            args.to,
            options,
            args.reading.options(),
            args.workers,
            args.overwrite,
            quiet=False,
            optimizer={"anon": args.anon, "adamw": args.adamw, None: None}[args.optimizer],
            groups=groups,
        )
    for note in notes:
        print(f"note: {note}")
    print(f"{args.dst} is complete")


def _verify(args: Verify) -> None:
    from rich.console import Console
    from rich.table import Table

    from anon_dist.checkpoint.verify import foreign, verify

    with _at_hand(args.a) as first, _at_hand(args.b) if args.b else nullcontext() as second:
        found = verify(first, second, args.reading.options(), args.workers)
        if not found:
            print("the same" if args.b else "as written")
            for path in foreign(first, second):
                print(f"note: {path} is none of the checkpoint's files: it was added later")
            return
    table = Table("what differs", "how")
    copies = {
        str(path): source for path, source in ((first, args.a), (second, args.b)) if source and is_address(source)
    }
    for what, how in found[:_SHOWN]:
        for copy, address in copies.items():
            how = how.replace(copy, address)
        table.add_row(what, how)
    if len(found) > _SHOWN:
        table.add_row(f"and {len(found) - _SHOWN} more", "")
    Console().print(table)
    sys.exit(FAILED)
