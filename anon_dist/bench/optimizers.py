"""The optimizers that are compared, how each is made, and what its step is called and must move."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from anon_dist.bench.clock import Step
from anon_dist.bench.paper import PaperLoop
from anon_dist.optim import Anon
from anon_dist.optim.frame import BASIS_KEYS, sides_of
from anon_dist.optim.plan import Variant
from anon_dist.optim.regime import Regime
from anon_dist.train.config.parsing import OptimConfig, find_config, load_config

PRESET = "gpt2-small"
"""The shipped training configuration whose optimizer settings are taken."""
DECAY = 0.1
BASE = "torch AdamW fused"
STATES = {
    "float32": "float32",
    "precond bf16": {"precond": "bfloat16"},
    "precond, exp_avg_sq bf16": {"precond": "bfloat16", "exp_avg_sq": "bfloat16"},
    "all bf16": {"precond": "bfloat16", "exp_avg_sq": "bfloat16", "exp_avg": "bfloat16"},
    "bf16, exp_avg int8": {"precond": "bfloat16", "exp_avg_sq": "bfloat16", "exp_avg": "int8"},
}

Parameters = list[nn.Parameter]


class UnavailableError(Exception):
    """An optimizer cannot run here; the message says why."""


@dataclass(frozen=True)
class Contestant:
    """An optimizer."""

    name: str
    build: Callable[[Parameters], Optimizer]
    package: str = "torch"
    """What to install for it."""
    devices: tuple[str, ...] = ("cpu", "cuda")


def contestants() -> list[Contestant]:
    """All, those of this package first; `BASE`, with which they are compared, is the first of torch's."""
    return [
        *(Contestant(f"Anon {label}", partial(_anon, states)) for label, states in STATES.items()),
        *(Contestant(f"Anon {basis} turned", partial(_anon_in_a_basis, basis)) for basis in ("columns", "both")),
        Contestant(BASE, partial(torch.optim.AdamW, weight_decay=DECAY, fused=True)),
        Contestant("torch AdamW foreach", partial(torch.optim.AdamW, weight_decay=DECAY, foreach=True)),
        Contestant("DeepSpeedCPUAdam", _deepspeed_cpu, "deepspeed", ("cpu",)),
        Contestant("DeepSpeed FusedAdam", _deepspeed_cuda, "deepspeed", ("cuda",)),
        *(
            Contestant(f"torchao {name}", partial(_torchao, name), "torchao")
            for name in ("AdamW8bit", "AdamW4bit", "AdamWFp8")
        ),
        Contestant("bitsandbytes AdamW8bit", _bitsandbytes, "bitsandbytes"),
        Contestant("Anon, the paper's loop", partial(PaperLoop, betas=(0.9, 0.95), weight_decay=DECAY)),
    ]


def make(contestant: Contestant, tensors: Parameters) -> tuple[Optimizer, dict[str, Step]]:
    """The optimizer and its steps by what they do (one, called "step", unless they differ), each taken often enough: state is there, code
    compiled, graphs captured.

    Raises:
        UnavailableError: it is not installed, or cannot run on this device.
    """
    device = tensors[0].device.type
    if device not in contestant.devices:
        raise UnavailableError(f"runs on {' and '.join(contestant.devices)} only")
    try:
        optimizer = contestant.build(tensors)
        optimizer.step()
        steps = _steps(optimizer, sum(p.numel() for p in tensors))
        for step in [*steps.values()] * 2:
            step.prepare()
            step.run()
    except ImportError as error:
        missing = isinstance(error, ModuleNotFoundError) and str(error.name).split(".")[0] == contestant.package
        raise UnavailableError(
            f"not installed (pip install {contestant.package})" if missing else _line(error)
        ) from error
    except UnavailableError:
        raise
    except Exception as error:  # whatever a package does on a machine that it was not made for
        raise UnavailableError(_line(error)) from error
    return optimizer, steps


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]


# -- how each is made --------------------------------------------------------------------------------------------------


def preset_settings() -> OptimConfig:
    """Of the shipped training configuration; the mean of all steps has its `max_interval` in a row of its own."""
    return replace(load_config(find_config(PRESET)).optim, max_interval=None)


def anon_settings(config: OptimConfig) -> dict[str, Any]:
    """Anon's arguments."""
    names = ("betas", "weight_decay", "gamma", "refresh_ratio", "beta3", "update_clip", "window", "hold_silent")
    return {name: getattr(config, name) for name in (*names, "max_interval", "nesterov", "cautious_decay")}


def _anon(states: Any, tensors: Parameters) -> Optimizer:
    return Anon(tensors, **anon_settings(preset_settings()), state_dtype=states, fused=True)


def _anon_in_a_basis(basis: Literal["columns", "both"], tensors: Parameters) -> Optimizer:
    """With both sides the model's embeddings, which are the matrices with most rows to a column, have none (see `param_groups`)."""
    if all(p.dim() < 2 for p in tensors):
        raise UnavailableError("it turns matrices, and these are vectors: --tensors gpt2-small")
    turned, tokens = list[nn.Parameter](), list[nn.Parameter]()
    for p in tensors:
        (tokens if basis == "both" and "rows" not in sides_of(p.shape, {"basis": basis}) else turned).append(p)
    groups: list[dict[str, Any]] = [{"params": turned, "basis": basis}, {"params": tokens}]
    return Anon([g for g in groups if g["params"]], **anon_settings(preset_settings()), fused=True)


def _deepspeed_cpu(tensors: Parameters) -> Optimizer:
    from deepspeed.ops.adam import DeepSpeedCPUAdam
    from torch.utils.cpp_extension import _get_build_directory

    lock = Path(_get_build_directory("cpu_adam", verbose=False)) / "lock"
    if lock.exists():
        raise UnavailableError(f"it is being built, or was interrupted at it; if no process builds it, remove {lock}")
    made: Optimizer = DeepSpeedCPUAdam(tensors, weight_decay=DECAY, adamw_mode=True)
    return made


def _deepspeed_cuda(tensors: Parameters) -> Optimizer:
    from deepspeed.ops.adam import FusedAdam

    made: Optimizer = FusedAdam(tensors, weight_decay=DECAY, adam_w_mode=True)
    return made


def _torchao(name: str, tensors: Parameters) -> Optimizer:
    import torchao.optim

    made: Optimizer = getattr(torchao.optim, name)(tensors, weight_decay=DECAY)
    return made


def _bitsandbytes(tensors: Parameters) -> Optimizer:
    import bitsandbytes

    made: Optimizer = bitsandbytes.optim.AdamW8bit(tensors, weight_decay=DECAY)
    return made


# -- what a step is called, and must move ------------------------------------------------------------------------------


NAMES = {Variant.PLAIN: "plain", Variant.ACCUMULATE: "accumulating", Variant.REFRESH: "refreshing"}
"""Of what a step of Anon does."""


def _steps(optimizer: Optimizer, elements: int) -> dict[str, Step]:
    """Parameters and gradients are float32: 12 bytes, and the states that are read, twice if they are written too. What turning a matrix
    moves besides depends on its blocks, and is not counted."""
    size = {key: total / elements for key, total in state_bytes(optimizer).items() if key not in BASIS_KEYS}
    if isinstance(optimizer, PaperLoop):
        return {"step": Step(optimizer.step, 12 + 2 * (size["exp_avg"] + size["exp_avg_sq"]) + size["precond"])}
    if not isinstance(optimizer, Anon):
        return {"step": Step(optimizer.step, 12 + 2 * sum(size.values()))}
    s, v = size["exp_avg_sq"], size["precond"]
    plain = 12 + 2 * sum(size.values()) - 2 * s - v
    moved = {"plain": plain, "accumulating": plain + 2 * s, "refreshing": plain + 2 * s + v}
    regime, found = Regime(optimizer.param_groups[0]), dict[str, int]()
    for t in range(20_000, 30_000):  # late enough to be none of the first
        found.setdefault(NAMES[regime.plan(t).variant], t)
    run = partial(_step_and_renew, optimizer) if optimizer.param_groups[0]["basis"] else optimizer.step
    return {name: Step(run, moved[name], partial(_count_to, optimizer, found[name] - 1)) for name in moved}


def _step_and_renew(optimizer: Anon) -> None:
    """A step with what is left to be done after a refresh, which the next step would do."""
    optimizer.step()
    optimizer.settle()


def _count_to(optimizer: Anon, taken: int) -> None:
    """Have the next step be the one after `taken`."""
    for state in optimizer.state.values():
        state["step"].fill_(taken)


def state_bytes(optimizer: Optimizer) -> Counter[str]:
    """Of the state's tensors, by their key; without step counters. A tensor that several parameters share counts once."""
    total, seen = Counter[str](), set[int]()
    for state in optimizer.state.values():
        for key, value in state.items():
            for tensor in _plain_tensors(value) if key != "step" else ():
                if tensor.data_ptr() not in seen:
                    seen.add(tensor.data_ptr())
                    total[key] += tensor.numel() * tensor.element_size()
    return total


def _plain_tensors(value: Any) -> Iterator[Tensor]:
    """The tensors that a value is made of: torchao's states are subclasses that hold codes and scales."""
    if isinstance(value, Tensor) and hasattr(value, "__tensor_flatten__"):
        for name in value.__tensor_flatten__()[0]:
            yield from _plain_tensors(getattr(value, name))
    elif isinstance(value, Tensor):
        yield value


def weights(settings: dict[str, Any], steps: int) -> dict[str, float]:
    """How often steps 1 … `steps` take each variant, as a share of all."""
    regime = Regime(Anon([torch.zeros(1)], **settings).param_groups[0])
    counted = Counter(NAMES[regime.plan(t).variant] for t in range(1, steps + 1))
    return {name: count / steps for name, count in counted.items()}


def schedules() -> dict[str, dict[str, Any]]:
    """Settings of the means: the paper's refreshes with the preset's window, the preset's, and these as they are with its basis."""
    preset, as_shipped = preset_settings(), load_config(find_config(PRESET)).optim
    paper = replace(preset, refresh_ratio=2.0, beta3=0.5)
    rare, often = f"rho = {preset.refresh_ratio}", f"every {as_shipped.max_interval} steps at least"
    return {
        "rho = 2": anon_settings(paper),
        f"{rare}, {often}": anon_settings(as_shipped),
        rare: anon_settings(preset),
    }
