"""One contender of `anon-dist bench --train`, in a process of its own: it takes steps when it is told to, and says how long they took."""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch
from torch import Tensor

from anon_dist.data import Index, SampleOrder, TokenShards
from anon_dist.engines.start import start
from anon_dist.train import loop
from anon_dist.train.config.parsing import Config, accumulation, load_config
from anon_dist.train.model.build import build_model
from anon_dist.train.reports.metrics import Stopwatch
from anon_dist.train.run import set_up, wanted_engine


class Turns:
    """The other end of the parent's pipes: a number of steps comes in, seconds go out; the peak memory when there are no more."""

    def __init__(self) -> None:
        self._answers: TextIO = os.fdopen(os.dup(1), "w", buffering=1)
        os.dup2(2, 1)  # what libraries print is no answer
        self._left = 0
        self._begun = 0.0

    def begin(self) -> bool:
        """Wait for a turn; False if there is none any more."""
        line = sys.stdin.readline().strip()
        if not line or line == "end":
            self._answers.write(json.dumps({"peak_bytes": peak_bytes()}) + "\n")
            return False
        self._left, self._begun = int(line), time.perf_counter()
        return True

    def step(self) -> bool:
        """Count a step that has been taken; False if there is no other to take."""
        self._left -= 1
        if self._left:
            return True
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self._answers.write(json.dumps({"seconds": time.perf_counter() - self._begun}) + "\n")
        return self.begin()


def peak_bytes() -> int:
    """Of this process: allocated on the GPU, or resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def run_loop(config: Config, turns: Turns) -> None:
    """This package's loop, records of metrics among it."""
    accelerator, name = start(wanted_engine(config))
    run = set_up(config, accelerator, name, Path(config.run_dir))
    watch = Stopwatch(accelerator.device)
    with run.loader:
        more = turns.begin()
        while more:
            done = loop.take_step(run, run.loader, watch)
            if run.step % config.log.every == 0:
                loop.record_of(run, done, config.log.every, watch.read())
            more = turns.step()


def run_trainer(config: Config, turns: Turns) -> None:
    """transformers' Trainer with its fused AdamW, on the same samples in the same order."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    index, train = Index.load(config.data.path), config.train
    torch.manual_seed(train.seed)
    model = build_model(config.model, index.vocab_size, index.eod_id, config.data.seq_len)

    class Paced(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop = not turns.begin()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop = not turns.step()

    class InOrder(Trainer):
        def _get_train_sampler(self, *args: Any, **kwargs: Any) -> torch.utils.data.SequentialSampler:
            return torch.utils.data.SequentialSampler(self.train_dataset)

    arguments = TrainingArguments(
        output_dir=config.run_dir,
        max_steps=train.steps,
        per_device_train_batch_size=train.micro_batch,
        gradient_accumulation_steps=accumulation(config, 1),
        optim="adamw_torch_fused",
        learning_rate=config.optim.lr,
        adam_beta1=config.optim.betas[0],
        adam_beta2=config.optim.betas[1],
        weight_decay=config.optim.weight_decay,
        max_grad_norm=train.grad_clip or 0.0,
        warmup_steps=config.schedule.warmup_steps,
        bf16=train.precision == "bf16",
        gradient_checkpointing=train.activation_checkpointing != "none",
        torch_compile=train.compile != "none",
        logging_steps=config.log.every,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    InOrder(model=model, args=arguments, train_dataset=Samples(config), callbacks=[Paced()]).train()


class Samples(torch.utils.data.Dataset[dict[str, Tensor]]):
    """The samples that the loop reads, in its order; the labels are shifted already, so that all of a sample's tokens count."""

    def __init__(self, config: Config) -> None:
        self._shards, self._seq_len = TokenShards(config.data.path, "train"), config.data.seq_len
        self._order = SampleOrder(self._shards.num_samples(self._seq_len), config.data.seed)

    def __len__(self) -> int:
        return self._shards.num_samples(self._seq_len)

    def __getitem__(self, position: int) -> dict[str, Tensor]:
        tokens = torch.from_numpy(self._shards.samples(self._order(np.array([position])), self._seq_len)[0]).long()
        return {"input_ids": tokens[:-1], "labels": tokens[:-1], "shift_labels": tokens[1:]}


def main() -> None:
    """Arguments: which contender, the configuration file."""
    kind, config = sys.argv[1], load_config(Path(sys.argv[2]))
    runs: dict[str, Callable[[Config, Turns], None]] = {"anon": run_loop, "adamw": run_loop, "trainer": run_trainer}
    if kind != "trainer":
        config.optim = replace(config.optim, name="anon" if kind == "anon" else "adamw", eps=None)
    config.run_dir = f"{config.run_dir}/{kind}"
    runs[kind](config, Turns())


if __name__ == "__main__":
    main()
