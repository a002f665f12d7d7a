"""A cell's folder, and what became of it."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from anon_dist.files import write_json
from anon_dist.sweep.early import Curve
from anon_dist.sweep.grid import Cell
from anon_dist.train.config.errors import DIVERGED
from anon_dist.train.config.parsing import Config, to_yaml
from anon_dist.train.reports.metrics import Record, from_json, read_metrics

State = Literal["missing", "unfinished", "finished", "stopped", "failed"]
LOG_TAIL = 20
"""Lines of a failed run's output that are kept in its outcome."""


@dataclass(frozen=True)
class Outcome:
    """How a cell ended."""

    state: Literal["finished", "stopped", "failed"]
    step: int
    reason: str = ""
    loss: float | None = None
    """finished: on the validation split, nats per token."""
    bits_per_byte: float | None = None
    log_tail: str = ""


@dataclass(frozen=True)
class CellFolder:
    """A cell, and where it lies."""

    cell: Cell
    path: Path

    @classmethod
    def of(cls, sweep: Path, cell: Cell) -> CellFolder:
        """The folder of a cell in a sweep."""
        return cls(cell, sweep / "cells" / cell.name)

    @classmethod
    def all(cls, sweep: Path) -> list[CellFolder]:
        """Every cell that was ever planned in this sweep."""
        found = []
        for file in sorted((sweep / "cells").glob("*/cell.json")):
            found.append(cls(Cell(**json.loads(file.read_text())), file.parent))
        return found

    def plan(self, base: Config) -> None:
        """Write down what is to be run here."""
        self.path.mkdir(parents=True, exist_ok=True)
        config = self.cell.config(base)
        config.run_dir = str(self.path)
        if config.checkpoint.remote is not None:  # each run has an address of its own
            config.checkpoint.remote = f"{config.checkpoint.remote.rstrip('/')}/{self.cell.name}"
        (self.path / "cell.yaml").write_text(to_yaml(config))
        write_json(self.path / "cell.json", asdict(self.cell))

    @property
    def log(self) -> Path:
        """What its runs printed."""
        return self.path / "log.txt"

    @property
    def outcome(self) -> Outcome | None:
        """None: it has not ended."""
        file = self.path / "outcome.json"
        return Outcome(**json.loads(file.read_text())) if file.exists() else None

    @property
    def state(self) -> State:
        """`unfinished` runs now, or was interrupted."""
        if outcome := self.outcome:
            return outcome.state
        return "unfinished" if self.metrics() else "missing"

    def end(self, outcome: Outcome) -> None:
        """Record how it ended."""
        write_json(self.path / "outcome.json", asdict(outcome))

    def reopen(self) -> None:
        """Have it run again, from its checkpoint if it has one."""
        (self.path / "outcome.json").unlink(missing_ok=True)

    def metrics(self) -> list[Record]:
        """The run's records so far."""
        return read_metrics(self.path / "metrics.jsonl")

    def curve(self) -> Curve:
        """Validation losses so far."""
        return {int(r["step"]): float(r["val_loss"]) for r in self.metrics() if "val_loss" in r}

    def by_set(self) -> dict[str, float]:
        """Last validation losses of each source or set by itself, if it was validated on several and has finished."""
        result = (self._result() or {}) if self.state == "finished" else {}
        return {key.partition("/")[2]: float(loss) for key, loss in result.items() if key.startswith("final_loss/")}

    def judge(self, exit_code: int) -> Outcome:
        """What a run that ended by itself came to."""
        records = self.metrics()
        step = int(records[-1]["step"]) if records else 0
        lines = self._log_lines()
        tail = "\n".join(lines[-LOG_TAIL:])
        if exit_code == 0 and (result := self._result()):
            loss = result.get("final_loss", math.nan)
            if math.isfinite(loss):
                return Outcome("finished", result["step"], loss=loss, bits_per_byte=result["final_bits_per_byte"])
            return Outcome("failed", step, f"diverged: the final loss is {loss}", log_tail=tail)
        last = self.last_line()
        if DIVERGED in last or (records and not math.isfinite(records[-1].get("loss", 0.0))):
            return Outcome("failed", step, f"diverged: {last}", log_tail=tail)
        how = f"killed by signal {-exit_code}" if exit_code < 0 else f"exit code {exit_code}"
        if exit_code == 0:
            how = "it ended without a result"
        return Outcome("failed", step, f"crashed ({how}): {last}", log_tail=tail)

    def last_line(self) -> str:
        """What its run printed last."""
        return next((line.strip() for line in reversed(self._log_lines()) if line.strip()), "it printed nothing")

    def _log_lines(self) -> list[str]:
        return self.log.read_text(errors="replace").splitlines() if self.log.exists() else []

    def drop_weights(self) -> None:
        """Remove a finished run's checkpoints and exported model."""
        for name in ("checkpoints", "model"):
            shutil.rmtree(self.path / name, ignore_errors=True)

    def _result(self) -> dict[str, Any] | None:
        try:
            result: dict[str, Any] = from_json(json.loads((self.path / "result.json").read_text()))
        except (OSError, ValueError):
            return None
        return result
