#!/usr/bin/env python
"""Anon beside AdamW, Muon and SOAP: the same small GPT-2, data, schedule and seeds, each optimizer at several learning rates.

    python tools/race.py run --corpus python=data/stdlib --corpus kernel-doc=data/kernel-doc --out runs/race
    python tools/race.py collect runs/race configs/study/race
    python tools/race.py table configs/study/race
    python tools/race.py plot configs/study/race configs/study/loss.png
    python tools/race.py train muon --config configs/study/base.yaml --optim.lr 8e-3 --run-dir runs/muon

`run` goes on where it was interrupted. A run of fewer steps has a schedule of its own length: if it ends below AdamW's last loss, the
optimizer needs at most that share of AdamW's tokens.

| optimizer | what steps |
|---|---|
| adamw | torch's AdamW, beta2 0.99 (0.95 is worse here, see configs/study/results) |
| nadamw | the same with Nesterov momentum: torch's NAdam, whose momentum schedule is over after 200 steps |
| nadamw3 | that with three times the learning rate for token embeddings |
| muon | torch's Muon for the hidden matrices, at a rate that gives them AdamW's root mean square (arXiv 2502.16982); nadamw for the rest |
| muon32 | the same with its iterations in float32, which is faster on CPUs without fast bfloat16 |
| soap | SOAP (arXiv 2409.11321) of `pip install pytorch_optimizer`, beta2 0.95: sides up to 512 are turned, bases renewed every 10 steps |
| element | Anon with Nesterov momentum, otherwise as in the presets |
| columns, both | the same with that basis, beta1 0.95 (with both 0.9 and beta3 0.97 of embeddings), and a refresh every 4 steps at least |
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import math
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import mean, mode, stdev
from typing import Any
from unittest import mock

import torch
from rich.box import MARKDOWN
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.optim import Optimizer, _muon

from anon_dist.optim import param_groups
from anon_dist.train.config.parsing import OptimConfig, parse_args
from anon_dist.train.loop import train
from anon_dist.train.optimizer.build import MakeOptimizer, build_optimizer
from anon_dist.train.reports.metrics import from_json, read_metrics

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / "configs" / "study" / "base.yaml"
STEPS, SEQUENCES = 2000, 8
COMMON = "--train.precision fp32 --eval.every 250 --log.every 25"
PRESET = "--optim.refresh-ratio 1.03 --optim.beta3 0.93 --optim.window 64 --optim.nesterov True"
OFTEN = "--optim.betas 0.95 0.95 --optim.max-interval 4"
BOTH = "--optim.basis both --optim.embedding-beta1 0.9 --optim.embedding-beta3 0.97"
BETAS = "--optim.betas 0.9 0.99"
OPTIONS = {
    "adamw": f"--optim.name adamw {BETAS}",
    "nadamw": BETAS,
    "nadamw3": f"{BETAS} --optim.lr-by-name *wte* 3",
    "muon": BETAS,
    "muon32": BETAS,
    "soap": "",
    "element": PRESET,
    "columns": f"{PRESET} {OFTEN} --optim.basis columns",
    "both": f"{PRESET} {OFTEN} {BOTH}",
    "both64": f"{PRESET} {OFTEN} {BOTH} --optim.basis-block 64",
    "both32": f"{PRESET} {OFTEN} {BOTH} --optim.basis-block 32",
}
LABELS = {
    "adamw": "AdamW",
    "nadamw": "AdamW, Nesterov",
    "nadamw3": "AdamW, Nesterov, embeddings × 3",
    "muon": "Muon",
    "muon32": "Muon, float32",
    "soap": "SOAP",
    "element": "Anon, by element",
    "columns": "Anon, columns",
    "both": "Anon, both sides",
    "both64": "Anon, both, blocks of 64",
    "both32": "Anon, both, blocks of 32",
    "both-93": "Anon, both sides, β3 0.93",
    "both-e": "Anon, both sides, earlier",
    "both64-e": "Anon, both, blocks of 64, earlier",
    "both32-e": "Anon, both, blocks of 32, earlier",
}
"""β3 0.93: of embeddings too. Earlier: with a basis of the embeddings' columns too, their β1 0.95, and a covariance that kept β3 of the old
one. They cannot be run any more; of columns nothing but the last was changed, which made no difference."""
FIELDS = ("corpus", "edition", "optimizer", "batch_tokens", "steps", "lr", "seed", "loss", "bits_per_byte")
KEY = FIELDS[:-2]
"""The edition of a corpus: bytes per token of its validation split. A system's documentation and library change with its updates, and
losses on two editions are not compared."""


@dataclass(frozen=True)
class Entry:
    """One run."""

    optimizer: str
    lr: float
    seed: int = 0
    steps: int = STEPS
    sequences: int = SEQUENCES
    """Of 128 tokens, a step."""

    @property
    def folder(self) -> str:
        """Its name below the corpus's folder."""
        batch = f"-b{self.sequences}" if self.sequences != SEQUENCES else ""
        return f"{self.optimizer}-{self.steps}{batch}-lr{self.lr:g}-s{self.seed}"

    def args(self, data: str, out: Path) -> list[str]:
        """Of `anon-dist train`: a warm-up of 15% of the steps, then a cosine to a tenth."""
        seeds = f"--train.seed {self.seed} --data.seed {self.seed} --data.path {data} --run-dir {out / self.folder}"
        length = f"--train.steps {self.steps} --schedule.warmup-steps {self.steps * 3 // 20}"
        length += f" --train.global-batch {self.sequences} --train.micro-batch {self.sequences}"
        return f"--config {CONFIG} {seeds} --optim.lr {self.lr:g} {length} {COMMON} {OPTIONS[self.optimizer]}".split()


RATES = {
    "adamw": (4e-3, 6e-3),
    "nadamw": (4e-3, 6e-3),
    "nadamw3": (4e-3,),
    "muon": (4e-3, 8e-3),
    "soap": (6e-3, 1.2e-2),
    "element": (6e-3,),
    "columns": (6e-3, 1.2e-2),
    "both": (4e-3, 8e-3),
}
ADAMWS = ("nadamw", "nadamw3")
"""With the better of them others are compared."""
ENTRIES = [Entry(o, lr, seed) for seed in (0, 1) for o, rates in RATES.items() for lr in rates]
ENTRIES += [Entry(o, 6e-3, 0, steps) for o in ("columns", "both") for steps in (STEPS // 2, STEPS * 3 // 4)]
ENTRIES += [Entry(o, 8e-3, 0, STEPS // 2) for o in ("muon", "both", "both64", "both32")]
ENTRIES += [Entry("nadamw", lr, 0, 750, 32) for lr in (4e-3, 6e-3, 8e-3)] + [Entry("columns", 6e-3, 0, 560, 32)]
ENTRIES += [Entry(o, 8e-3, 0, 560, 32) for o in ("muon", "both")]
ENTRIES += [Entry("columns", 6e-3, 1, STEPS * 3 // 4), Entry("both", 8e-3, 0, 1100)]
ENTRIES += [Entry("nadamw", 2.8e-3, 0, steps) for steps in (STEPS, STEPS * 4)]
ENTRIES += [Entry(o, 4e-3, 0, STEPS * 4) for o in ("nadamw", "muon", "both")] + [Entry("columns", 6e-3, 0, STEPS * 3)]


class Several(Optimizer):
    """Optimizers of disjoint parameters as one."""

    def __init__(self, *members: Optimizer) -> None:
        super().__init__(list(itertools.chain(*(m.param_groups for m in members))), {})
        self.members = members
        self._share()

    def _share(self) -> None:
        groups = iter(self.param_groups)
        for member in self.members:
            member.param_groups = [next(groups) for _ in member.param_groups]
            member.state = self.state

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """One step of each."""
        for member in self.members:
            member.step()

    def load_state_dict(self, state_dict: Any) -> None:
        """Into all of them."""
        super().load_state_dict(state_dict)
        self._share()


def _nadamw(config: OptimConfig, groups: list[dict[str, Any]]) -> Optimizer:
    # NAdam's factor of the momentum, 1 - 0.96^(step * momentum_decay) / 2, is 1 to float32's precision by step 400.
    return torch.optim.NAdam(
        groups, lr=config.lr, betas=config.betas, momentum_decay=1.0, decoupled_weight_decay=True, foreach=True
    )


def nadamw(config: OptimConfig, model: nn.Module) -> Optimizer:
    """AdamW with Nesterov momentum; `optim.lr_by_name` holds for it too."""
    rates = {pattern: config.lr * factor for pattern, factor in config.lr_by_name.items()}
    return _nadamw(config, param_groups(model, config.weight_decay, lr=rates))


def muon(config: OptimConfig, model: nn.Module, of: type[torch.optim.Muon] = torch.optim.Muon) -> Optimizer:
    """Muon for matrices that are neither embeddings nor the output's, nadamw for the rest."""
    tables = {m.weight for m in model.modules() if isinstance(m, nn.Embedding)} | {model.get_output_embeddings().weight}
    groups = param_groups(model, config.weight_decay)
    hidden = [p for g in groups for p in g["params"] if p.ndim == 2 and p not in tables]
    rest = [{**g, "params": left} for g in groups if (left := [p for p in g["params"] if p.ndim != 2 or p in tables])]
    return Several(of(hidden, config.lr, config.weight_decay, adjust_lr_fn="match_rms_adamw"), _nadamw(config, rest))


class Muon32(torch.optim.Muon):
    """Muon with its Newton-Schulz iterations in float32, which is faster on CPUs without fast bfloat16."""

    def step(self, closure: Any = None) -> Any:
        """As torch's."""
        with mock.patch.object(_muon, "_zeropower_via_newtonschulz", orthogonalised):
            return super().step(closure)


def orthogonalised(grad: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """What torch's function of that name gives, in float32."""
    a, b, c = coefficients
    x = grad.mT if grad.shape[0] > grad.shape[1] else grad
    x = x / x.norm().clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if grad.shape[0] > grad.shape[1] else x


def soap(config: OptimConfig, model: nn.Module) -> Optimizer:
    """SOAP for all parameters."""
    from pytorch_optimizer import SOAP

    groups = param_groups(model, config.weight_decay)
    return SOAP(groups, lr=config.lr, betas=config.betas, precondition_frequency=10, max_precondition_dim=512)


PEERS: dict[str, MakeOptimizer] = {
    "nadamw": nadamw,
    "nadamw3": nadamw,
    "muon": muon,
    "muon32": partial(muon, of=Muon32),
    "soap": soap,
}


def run(args: argparse.Namespace) -> None:
    """Every entry on every corpus, in order; what is finished says so and ends."""
    for entry in ENTRIES:
        if args.only and entry.optimizer not in args.only:
            continue
        for corpus in args.corpus:
            name, _, data = corpus.partition("=")
            command = [sys.executable, __file__, "train", entry.optimizer, *entry.args(data, Path(args.out) / name)]
            print(" ".join(command), flush=True)
            subprocess.run(command, check=True)


def collect(out: Path, results: Path) -> None:
    """The losses of the finished runs below OUT, and their validation losses along the way."""
    results.mkdir(parents=True, exist_ok=True)
    rows, curves = [], []
    for path in sorted(out.glob("*/*/result.json")):
        result = from_json(json.loads(path.read_text()))
        config, name = result["config"], path.parent.name.partition("-")[0]
        if result["step"] < config["train"]["steps"]:
            continue
        batch, steps = config["train"]["global_batch"] * config["data"]["seq_len"], config["train"]["steps"]
        edition = f"{result['final_loss'] / math.log(2) / result['final_bits_per_byte']:.3f}"
        key = (path.parts[-3], edition, name, batch, steps, config["optim"]["lr"], config["train"]["seed"])
        rows.append((*key, result["final_loss"], result["final_bits_per_byte"]))
        points = {r["step"]: r["val_loss"] for r in read_metrics(path.parent / "metrics.jsonl") if "val_loss" in r}
        curves += [(*key, step, loss) for step, loss in points.items()]
    for file, head, lines in (("runs", FIELDS, rows), ("curves", (*KEY, "step", "val_loss"), curves)):
        with (results / f"{file}.csv").open("w", newline="") as f:
            csv.writer(f).writerows([head, *lines])


def read(results: Path) -> Iterator[tuple[str, list[dict[str, str]]]]:
    """The collected runs of each corpus."""
    with (results / "runs.csv").open() as f:
        rows = sorted(csv.DictReader(f), key=lambda r: r["corpus"])
    for corpus, lines in itertools.groupby(rows, key=lambda r: r["corpus"]):
        yield corpus, list(lines)


Group = tuple[str, int, int]
"""Optimizer, tokens a step, steps."""
Losses = dict[float, dict[tuple[str, int], float]]
"""Learning rate → edition and seed → last loss."""


def grouped(rows: list[dict[str, str]]) -> dict[Group, Losses]:
    """The last losses of a corpus's runs."""
    found: dict[Group, Losses] = defaultdict(lambda: defaultdict(dict))
    for r in rows:
        group = r["optimizer"], int(r["batch_tokens"]), int(r["steps"])
        found[group][float(r["lr"])][r["edition"], int(r["seed"])] = float(r["loss"])
    return found


def best(losses: Losses) -> dict[tuple[str, int], float]:
    """Those of the learning rate with the lowest mean."""
    return min(losses.values(), key=lambda seeds: mean(seeds.values()))


def peer(found: dict[Group, Losses], group: Group) -> dict[tuple[str, int], float]:
    """The best of `ADAMWS` of that batch on each edition, by seed: of as many steps, or of the next more. None is its own."""
    name, batch, steps = group
    if name in ADAMWS:
        return {}
    lengths = sorted({s for o, b, s in found if o in ADAMWS and b == batch})
    longer = [s for s in lengths if s >= steps] or lengths[-1:]
    runs = [seeds for o in ADAMWS for length in longer[:1] for seeds in found.get((o, batch, length), {}).values()]
    shared = {}
    for edition in sorted({edition for seeds in runs for edition, _ in seeds}):
        here = [{key: x for key, x in seeds.items() if key[0] == edition} for seeds in runs]
        shared.update(min(filter(None, here), key=lambda seeds: mean(seeds.values())))
    return shared


def with_error(values: Sequence[float], sign: str = "") -> str:
    """Their mean, ± its standard error where there are several."""
    error = f" ± {stdev(values) / len(values) ** 0.5:.3f}" if len(values) > 1 else ""
    return f"{mean(values):{sign}.3f}{error}"


def difference(losses: dict[tuple[str, int], float], base: dict[tuple[str, int], float]) -> str:
    """Seed by seed, of the seeds that both have on one edition."""
    common = losses.keys() & base.keys()
    return with_error([losses[seed] - base[seed] for seed in common], "+") if common else ""


def _order(group: Group) -> tuple[int, bool, int, int]:
    name, batch, steps = group
    return batch, steps > STEPS, list(LABELS).index(name), -steps


def summary(results: Path) -> None:
    """What was run on every corpus: the loss of its best rate on each, [the seeds], and (how far that is from `peer`). Of earlier versions
    only what the present one was not run with."""
    corpora = {corpus: grouped(rows) for corpus, rows in read(results)}
    shown = Table("optimizer", "tokens", "steps", *corpora, box=MARKDOWN)
    on_all = set.intersection(*map(set, corpora.values()))
    older = {"": ("93", "e"), "93": ("e",), "e": ()}
    superseded = {
        (f"{name.partition('-')[0]}-{version}", *rest)
        for name, *rest in on_all
        for version in older[name.partition("-")[2]]
    }
    for group in sorted(on_all - superseded, key=_order):
        cells = []
        for found in corpora.values():
            losses = best(found[group])
            away = difference(losses, peer(found, group))
            cells.append(f"{with_error([*losses.values()])} [{len(losses)}]" + (f" ({away})" if away else ""))
        shown.add_row(LABELS[group[0]], f"{group[1]:,}", str(group[2]), *cells)
    Console(width=220).print(shown)


def table(results: Path) -> None:
    """Last losses on the whole validation split, nats per token: means over seeds ± standard error, and the difference from `peer`."""
    summary(results)
    for corpus, rows in read(results):
        found = grouped(rows)
        rates = sorted({rate for losses in found.values() for rate in losses})
        shown = Table(
            "optimizer", "tokens", "steps", *(f"lr {rate:g}" for rate in rates), "best − AdamW's", box=MARKDOWN
        )
        for group in sorted(found, key=_order):
            losses = found[group]
            cells = [
                with_error([*losses[r].values()]) + (f" ({len(losses[r])})" if len(losses[r]) > 1 else "")
                if r in losses
                else ""
                for r in rates
            ]
            name, batch, steps = group
            shown.add_row(LABELS[name], f"{batch:,}", str(steps), *cells, difference(best(losses), peer(found, group)))
        print(f"\n{corpus}\n")
        Console(width=220).print(shown)


def plot(results: Path, out: Path) -> None:
    """Validation loss against tokens, of each optimizer's best learning rate over the full length; seed 0."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    corpora = list(read(results))
    with (results / "curves.csv").open() as f:
        curves = list(csv.DictReader(f))
    figure, axes = pyplot.subplots(
        1, len(corpora), figsize=(5 * len(corpora), 3.6), squeeze=False, layout="constrained"
    )
    styles = {
        "nadamw": ("black", "--"),
        "muon": ("#d55e00", "-."),
        "columns": ("#56b4e9", "-"),
        "both": ("#0072b2", "-"),
    }
    for axis, (corpus, rows) in zip(axes[0], corpora, strict=True):
        full = [r for r in rows if int(r["steps"]) == STEPS]
        edition = mode(r["edition"] for r in [r for r in full if r["optimizer"] == "both"] or full)  # all lines of one
        found = grouped([r for r in rows if r["edition"] == edition])
        for name, (colour, dashes) in styles.items():
            if name == "muon" and (name, SEQUENCES * 128, STEPS) not in found:
                name = "muon32"
            if not (losses := found.get((name, SEQUENCES * 128, STEPS))):
                continue
            lr = next(rate for rate in losses if losses[rate] == best(losses))
            key = (corpus, edition, name, str(SEQUENCES * 128), str(STEPS), lr, "0")
            points = [c for c in curves if (*(c[f] for f in KEY[:5]), float(c["lr"]), c["seed"]) == key]
            x = [int(c["step"]) * SEQUENCES * 128 / 1e6 for c in points]
            axis.plot(x, [float(c["val_loss"]) for c in points], color=colour, ls=dashes, label=LABELS[name])
        axis.set(title=corpus, xlabel="tokens (millions)", ylabel="validation loss (nats per token)")
        axis.grid(alpha=0.3)
        axis.legend()
    figure.savefig(out, dpi=110)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = arguments.add_subparsers(dest="command", required=True)
    runs = commands.add_parser("run", help="train all of them")
    runs.add_argument("--corpus", action="append", required=True, metavar="NAME=FOLDER")
    runs.add_argument("--out", required=True)
    runs.add_argument("--only", action="append", choices=OPTIONS)
    for name, help in (("collect", "losses and curves of runs"), ("table", "in Markdown"), ("plot", "as a picture")):
        command = commands.add_parser(name, help=help)
        command.add_argument("source", type=Path)
        if name != "table":
            command.add_argument("out", type=Path)
    trains = commands.add_parser("train", help="one run")
    trains.add_argument("optimizer", choices=OPTIONS)
    trains.add_argument("options", nargs=argparse.REMAINDER, help="of anon-dist train")
    args = arguments.parse_args()
    if args.command == "train":
        config = parse_args(args.options, f"tools/race.py train {args.optimizer}")
        train(config, PEERS.get(args.optimizer, build_optimizer))
    elif args.command == "run":
        run(args)
    elif args.command == "table":
        table(args.source)
    else:
        {"collect": collect, "plot": plot}[args.command](args.source, args.out)


if __name__ == "__main__":
    main()
