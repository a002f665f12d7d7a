"""What all parts share: their rows, and the configuration of a training."""

from __future__ import annotations

import json
import math
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from anon_dist.train.config.parsing import Config

ROOT = Path(__file__).parents[2]


@dataclass
class Found:
    """What a part has found so far."""

    out: Path
    work: Path
    on_gpu: bool
    ends: float = math.inf
    """When the part is killed, by `time.monotonic`."""
    longest: float = 0.0
    """Seconds of the longest of the part's runs so far."""
    rows: list[dict[str, str]] = field(default_factory=list)
    numbers: dict[str, Any] = field(default_factory=dict)

    def row(self, what: str, ours: str, beside: str = "", remark: str = "", numbers: Any = None) -> None:
        """Another row, on the disk at once; with the `numbers` that it is made of."""
        self.rows.append({"what": what, "ours": ours, "beside": beside, "remark": remark})
        if numbers is not None:
            self.numbers[what] = numbers
        text = json.dumps({"rows": self.rows, "numbers": self.numbers})
        self.out.with_suffix(".new").write_text(text)
        self.out.with_suffix(".new").replace(self.out)

    def has_time(self, what: str, wanted: float) -> bool:
        """Whether what may take so many seconds is begun; a row says so if it is not."""
        left = self.ends - time.monotonic()
        if left < wanted:
            self.row(what, "–", "", f"not run: of {wanted:.0f} s that it may take {max(0.0, left):.0f} were left")
        return left >= wanted

    @property
    def data(self) -> Path:
        """What the part machine has prepared."""
        return self.work / "data"

    @property
    def device(self) -> torch.device:
        import torch

        return torch.device("cuda" if self.on_gpu else "cpu")


def configuration(found: Found, preset: str, **changes: Any) -> Config:
    """A shipped training configuration for one process, with the vocabulary it is meant for; toy-sized on a CPU.

    `changes`: section_field = value.
    """
    from anon_dist.train.config.parsing import find_config, load_config

    config = load_config(find_config(preset))
    config.data.path, config.run_dir, config.resume = str(found.data), str(found.work / f"run-{os.getpid()}"), "never"
    config.train.engine, config.log.trackers, config.train.compile = "single", (), "none"
    config.train.activation_checkpointing = "none"
    config.model.pad_vocab_to = {"gpt2": 50304}.get(config.model.family, 32000)  # more than the corpus has
    gpu_gb = memory_gb() if found.on_gpu else 0
    config.train.micro_batch = 16 if config.model.family == "gpt2" else 2 if gpu_gb > 100 else 1
    if not found.on_gpu:
        config.model.layers, config.model.width, config.model.heads, config.model.pad_vocab_to = 2, 64, 2, 512
        config.model.hidden = 4 * config.model.width
        config.data.seq_len = config.model.context = 64
        config.train.micro_batch = 2
        if config.model.family != "gpt2":
            config.model.kv_heads, config.model.head_dim = 1, 32
    config.train.global_batch = config.train.micro_batch
    for key, value in changes.items():
        section, _, name = key.partition("_")
        setattr(getattr(config, section), name, value)
    return config


def memory_gb() -> float:
    """Of the GPU."""
    import torch

    return torch.cuda.get_device_properties(0).total_memory / 1e9


def forget_accelerate() -> None:
    """What a run leaves behind in the process, so that one of another precision can follow."""
    from accelerate.state import AcceleratorState, GradientState, PartialState

    for state in (AcceleratorState, GradientState, PartialState):
        state._shared_state.clear()
