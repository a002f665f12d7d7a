"""What `anon-dist bench` found of optimizer steps."""

from __future__ import annotations

from dataclasses import dataclass, field

from anon_dist.bench.machine import Machine

MEAN_STEPS = (10_000, 100_000)
"""Lengths of the runs that means are taken over."""


@dataclass
class Row:
    """One kind of step."""

    optimizer: str
    step: str
    ratio: list[float]
    """Its time over that of AdamW, fused: lower quartile, median, upper quartile."""
    milliseconds: list[float]
    """The same three of the time itself."""
    moved_bytes: float
    """For each element, what the step must read and write."""
    gb_per_s: float
    """Of these, by the median."""
    stream_share: float | None
    """Its bytes per second over the stream's, both by way of the AdamW steps beside them."""


@dataclass
class Mean:
    """Over a run's first steps, weighed by the schedule."""

    optimizer: str
    schedule: str
    steps: int
    ratio: list[float]


@dataclass
class Measured:
    """One list of tensors."""

    name: str
    tensors: int
    elements: int
    rows: list[Row] = field(default_factory=list)
    means: list[Mean] = field(default_factory=list)
    state_bytes: dict[str, float] = field(default_factory=dict)
    """Of an optimizer, for each element."""
    peak_bytes: dict[str, float | None] = field(default_factory=dict)
    """State and temporaries of its most demanding step, for each element; None where it could not be measured."""
    unavailable: dict[str, str] = field(default_factory=dict)
    """Those that could not run, and why."""


@dataclass
class Result:
    """All that was measured."""

    machine: Machine
    pairs: int
    repeats: int
    lists: list[Measured]
