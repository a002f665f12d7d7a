"""What a user may ask of reading, writing, and of the optimizer that is to be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Layout = Literal["anon_dist", "accelerate", "torchtitan", "trainer"]
"""Whose code will load it; `trainer` is transformers'."""
Basis = Literal["columns", "rows", "both"]
"""Sides of a matrix that Anon turns into a basis of their own."""


@dataclass(frozen=True)
class ReadOptions:
    """How a source is opened."""

    names: Sequence[str] | None = None
    """Of the parameters in the optimizer's order, for optimizers that number them."""
    names_in_model_order: bool = False
    """That such an optimizer was made from `model.parameters()`, or that each of its groups is a filter over them."""
    order: Sequence[str] | None = None
    """The same, as a run knows it of the checkpoints that it wrote itself; used where neither `names` nor the file says."""
    nameless: bool = False
    """Call parameters by their numbers where they cannot be named: enough for a look at them, or for the weights alone."""
    unsafe: bool = False
    """Build whatever classes its pickles ask for, which may run any code."""


@dataclass(frozen=True)
class WriteOptions:
    """How a target is laid out."""

    world_size: int = 1
    """Ranks whose files are written; the format may have one file anyway."""
    layout: Layout = "anon_dist"
    """Of a DCP folder and of what lies beside DeepSpeed's; a consolidated checkpoint is a file, and for accelerate and trainer a folder."""
    keyed: Literal["name", "index"] = "name"
    """How a consolidated optimizer state dictionary calls its parameters."""
    allow_loss: bool = False
    """Leave out what the format cannot hold, instead of refusing."""
    precision: Literal["float32", "bfloat16", "float16"] | None = None
    """Of the weights in DeepSpeed's formats: of the engine that will load, which goes by file names with it. None: as the source's."""
    sub_group_size: int | None = None
    """Of the engine that will load zero3: DeepSpeed loads sub-groups one by one. None: as the source records, else its default, 1e9."""
    round_robin_gradients: bool | None = None
    """Whether the engine that will load zero1 or zero2 has it: parameters lie in another order. None: as the source records, else not."""
    muon_momentum: Literal["whole", "parts"] | None = None
    """How the engine that will load zero1 or zero2 keeps the momentum of DeepSpeed's Muon: in parts if it offloads the optimizer or is
    BF16_Optimizer, else in whole matrices. None: as what the source records makes it."""
    muon_order: Literal["size", "model"] | None = None
    """How the engine that will load zero3 lays the matrices of DeepSpeed's Muon: by size, or, its model made under `zero.Init`, as the
    model has them. None: refused where the two differ."""
    buffers: Sequence[str] | None = None
    """zero3: patterns (`*.inv_freq`) of the buffers among what is in no param group, where the source does not tell buffers from
    frozen parameters. None: not known, and refused where there are such."""


@dataclass(frozen=True)
class AnonOptions:
    """Anon's hyperparameters that AdamW has no values for; the defaults are those of the language-model presets."""

    gamma: float = 1.0
    """Adaptivity γ."""
    eps: float | None = None
    """ε; None: the square of AdamW's, which stands outside the square root."""
    refresh_ratio: float = 1.03
    """ρ: the preconditioner is refreshed at steps 1, …, a, ⌈ρ a⌉, …"""
    beta3: float = 0.93
    """Weight of the old preconditioner at a refresh."""
    update_clip: float | None = 1.0
    """Largest magnitude of an element of v · m̂, meant for γ = 1: converted with the learning rate."""
    window: int | Literal["auto"] | None = 64
    """Steps before a refresh in which the second moment is accumulated. auto: so many that what is left out weighs at most
    2^-24. None: all of them."""
    hold_silent: bool = False
    """Elements without gradient since the last refresh keep their preconditioner."""
    max_interval: int | None = None
    """Most steps from one refresh to the next. None: no bound."""
    basis: Basis | None = None
    """Sides of matrices that are turned into a basis of their own."""
    basis_block: int = 128
    """Largest block of a basis."""
    nesterov: bool = False
    """Whether a step looks ahead by its gradient."""
    cautious_decay: bool = False
    """Whether weights decay only where the update makes them smaller too."""
    drop_basis: bool = False
    """Of Anon's own checkpoint with a basis: turn its states back, for engines that cannot have one (DeepSpeed's ZeRO 1 and 2, FSDP1)."""
    keep_lr: bool = False
    """Whether learning rate, clip and decay stay as they are also where γ ≠ 1, whatever their unit."""
    decoupled: bool = False
    """For the paper's port and torchao's optimizers, whose checkpoints do not say how they decay weights: that the port was built with
    weight_decouple=True, or torchao's is an AdamW."""


@dataclass(frozen=True)
class AdamWOptions:
    """Hyperparameters of the AdamW to be."""

    eps: float = 1e-8
    """ε, outside the square root."""
    keep_lr: bool = False
    """Whether the learning rate stays as it is also where γ ≠ 1."""
