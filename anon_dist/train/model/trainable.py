"""The model of a run, with what the configuration asks of it before an engine wraps it: precision, recomputation, compilation."""

from __future__ import annotations

import logging
import os

import torch
import transformers
from accelerate import Accelerator
from torch import nn
from transformers import PreTrainedModel

from anon_dist.agreement import is_first
from anon_dist.data import Index
from anon_dist.engines.comparison import check_alike
from anon_dist.engines.context import ContextParallel
from anon_dist.engines.precision import use_tf32
from anon_dist.train.config.alike import pretrained_settings
from anon_dist.train.config.parsing import Config, ConfigError, TrainConfig
from anon_dist.train.config.phases import phases_of
from anon_dist.train.loss.attach import attach, unbalanced
from anon_dist.train.loss.evaluate import mixes_documents, sees_what_comes
from anon_dist.train.model.build import Planned, blocks, plan_model
from anon_dist.train.model.pretrained import SavedWeights
from anon_dist.train.model.recompute import recompute, set_budget

log = logging.getLogger(__name__)
LARGE = 50_000_000
"""Parameters of a model that one means to train on a GPU."""


def set_modes(config: Config, accelerator: Accelerator) -> None:
    """Of the libraries in this process: what they print, and how they compute.

    Raises:
        ConfigError: this device cannot compute so.
    """
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if config.train.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    if uses_tf32(config, accelerator):
        use_tf32()
    if config.model.attention == "flex_attention" and accelerator.device.type == "cpu":
        raise ConfigError("model.attention = flex_attention has no backward pass on CPUs; set it to sdpa")


def trainable(config: Config, index: Index, share: float) -> Planned:
    """The model before it is wrapped, as its options ask. Every rank calls it.

    Args:
        share: of the model that this machine's ranks will hold together.

    Raises:
        ConfigError: see `plan_model`; or options do not go together with this model.
    """
    planned = plan_model(
        config.model, index.vocab_size, index.eod_id, config.data.seq_len, seed=config.train.seed, share=share
    )
    built = planned.model
    if config.train.precision == "bf16-true":
        built.to(torch.bfloat16)
    if config.model.from_pretrained is not None:
        check_alike(pretrained_settings(built.config), config.train.timeout_minutes * 60)
        _check_same_files(planned, config.train.timeout_minutes * 60)
    loss = attach(built, config.train.loss, config.train.z_loss, half=config.train.precision != "fp32")
    if loss.why_whole and is_first():
        log.warning("%s: its loss takes the whole logits", loss.why_whole)
    if (said := unbalanced(built, loss)) and is_first():
        log.warning("%s", said)
    recompute(blocks(built), config.train.activation_checkpointing)
    _compile(built, config.train)
    return planned


def _check_same_files(planned: Planned, seconds: float) -> None:
    """That all ranks read the same pretrained weights, of which each may keep another part."""
    if isinstance(planned.weights, SavedWeights) and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        digests = planned.weights.digests()
        check_alike({f"the pretrained model's weight {name}": crc for name, crc in digests.items()}, seconds)


def _compile(model: PreTrainedModel, train: TrainConfig) -> None:
    """Outside of what `recompute` has wrapped, which torch.compile then sees."""
    if train.compile != "none":  # also back to all, after another run in this process
        set_budget(train.activation_budget if train.activation_checkpointing == "budget" else 1.0)
    if train.compile == "blocks":
        for block in blocks(model):
            block.forward = torch.compile(block.forward)
    elif train.compile == "whole":
        model.forward = torch.compile(model.forward)


def shared_sequences(
    config: Config, accelerator: Accelerator, model: PreTrainedModel, ranks: int
) -> ContextParallel | None:
    """The ranks that share sequences, and the model told of them; None where each rank has its own. Every rank calls it.

    Raises:
        ConfigError, EngineError: the sequence does not divide, or the model or options do not allow it.
    """
    if ranks == 1:
        return None
    for length in (phase.data.seq_len for _, phase in phases_of(config)):
        if length % (2 * ranks):
            raise ConfigError(
                f"data.seq_len = {length} is not a multiple of 2 · train.context_parallel = 2 · {ranks}; change one of them"
            )
    if config.data.mask_documents or config.model.attention != "sdpa":
        raise ConfigError(
            "train.context_parallel has an attention of its own, without masks: set data.mask_documents to false, model.attention to sdpa"
        )
    if config.eval.tasks:
        raise ConfigError(
            "eval.tasks are not scored by ranks that share sequences (train.context_parallel); leave them out, and use anon-dist eval"
        )
    if config.data.packing != "concat":
        raise ConfigError(
            f"train.context_parallel cuts samples of one text without gaps: set data.packing to concat, not {config.data.packing}"
        )
    context = ContextParallel(ranks, accelerator.device)
    context.attach(model)
    return context


def uses_tf32(config: Config, accelerator: Accelerator) -> bool:
    """Whether products of float32 matrices are in TF32."""
    return config.train.precision == "fp32" and config.train.tf32 and accelerator.device.type == "cuda"


def cpu_remarks(config: Config, device: torch.device, parameters: int) -> list[str]:
    """A line where a run that means a GPU, by its precision or its size, is on the CPU."""
    precision = config.train.precision
    wishes = [f"train.precision is {precision}"] * (precision != "fp32")
    wishes += [f"{parameters / 1e6:,.1f}M parameters are slow here"] * (parameters > LARGE)
    if device.type != "cpu" or not wishes:
        return []
    if torch.cuda.is_available():
        why = "though a GPU is here (use_cpu or --cpu of the launcher?)"
    else:
        why = "as torch finds no GPU here (nvidia-smi, CUDA_VISIBLE_DEVICES and torch.version.cuda say more)"
    return [f"WARNING: this trains on the CPU, {why}, and {', and '.join(wishes)}"]


def check_causal(config: Config, model: nn.Module, device: torch.device) -> None:
    """Refuse a model, of those that are not among the tested families, that sees the tokens it is to predict, as an encoder does: it would
    learn to copy them; or one that sees other documents where they are to be kept apart. Every rank calls it, with the wrapped model.

    Raises:
        ConfigError: it is one.
    """
    source = config.model.config or config.model.from_pretrained
    exact = config.train.precision == "fp32"
    if source is not None and sees_what_comes(model, device, config.data.seq_len, 1e-5 if exact else 1e-4):
        raise ConfigError(
            f"model: {source} is of a model that sees the tokens it is to predict, and cannot be trained so"
        )
    apart = source is not None and config.data.mask_documents
    if apart and mixes_documents(model, device, config.data.seq_len, 1e-5 if exact else 1e-3):
        raise ConfigError(
            f"data.mask_documents is true, and {source} is of a model whose tokens see earlier documents all the same (its masks are made "
            "without positions, or it has a state that runs on); set it to false, or take another model"
        )
