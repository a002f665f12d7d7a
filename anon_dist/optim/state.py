"""The state of a parameter: made, checked when it is loaded, and the mapping that holds it.

| key | what it is | who writes it, after `initial_state` | dtype |
|---|---|---|---|
| `step` | t, steps taken; 0-dim, on the CPU | `gather.Bucket.count`, when a step has been taken | float32 |
| `exp_avg` | m, the mean of the gradient, still to be debiased | the backend, in each step | `state_dtype` |
| `exp_avg_sq` | s, the mean of the squared gradient since the last refresh | the backend: it adds g² in the accumulating steps, and sets \
0 in a refresh, when v has been made from it | `state_dtype` |
| `precond` | v = d^(−1/2), the preconditioner | the backend, in a refresh; and conversions of γ (see `regime`) | `state_dtype` |
| `basis_columns`, `basis_rows` | the basis that a side of a matrix is turned into, if it is: (length of the side, b) | `turned`, \
after a refresh | float32 |
| `covariance_columns`, `covariance_rows` | the covariance of the momentum in it, of the same shape | `turned`, after a refresh | float32 |
| `exp_avg_exponents` | beside an 8-bit exp_avg alone, and in no state dict | the backend, with exp_avg | uint8 |

The backends are `backends/foreach.py`, `anon.c` (by way of `cpu.py`) and `gpu_step.py` (by way of `gpu.py`). A turned matrix's exp_avg,
exp_avg_sq and precond are of the turned matrix, and a new basis turns exp_avg and precond too. Loading writes all of them.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from anon_dist.optim import flat, frame
from anon_dist.optim.rounding import decode_blocks, encode_blocks, exponents_for

STATE_KEYS = ("step", "exp_avg", "exp_avg_sq", "precond")
EXPONENTS = "exp_avg_exponents"
"""Beside an 8-bit exp_avg: the exponents of its blocks, uint8, of this rank's part. Not in state dicts, where exp_avg is bfloat16."""

NEUTRAL = {"precond": 1.0}
"""What a state is before the first step, if not 0; so also in the padding of an engine's flat parameters, where 0 would become NaN."""

LAST_STEP = 1 << 24
"""A step count, a float32 as in torch, cannot go past it."""

Dtypes = Mapping[str, torch.dtype]


class LazyState(defaultdict[Any, Any]):
    """`Optimizer.state`, which is true from the start.

    torch.distributed.checkpoint asks whether it is (`_init_optim_state`) and, told no, makes the state with a step on zero gradients. That
    step would be Anon's first refresh, and nothing about it tells every rank alike that it is not a real one. `Anon.state_dict` allocates
    what is missing.
    """

    def __init__(self, *args: Any) -> None:
        super().__init__(dict, *args)

    def __bool__(self) -> bool:
        return True

    def __reduce__(self) -> Any:  # copies and pickles are plain; Anon.__setstate__ makes them its own
        return defaultdict, (dict,), None, None, iter(self.items())


class AsIs:
    """A state value on its way through torch's `load_state_dict`, which would cast a tensor."""

    def __init__(self, value: Any) -> None:
        self.value = value


@contextmanager
def in_own_dtypes(optimizer: Optimizer) -> Iterator[None]:
    """While it lasts, `load_state_dict` casts no state to its parameter's dtype: each value passes behind `AsIs`, out of which
    `checked_state` takes it, before any post-hook runs. And groups keep their `state_dtype`, which says how much memory there is here."""
    dtypes = [{"state_dtype": group["state_dtype"]} for group in optimizer.param_groups]

    def protect(_: Optimizer, loaded: dict[str, Any]) -> dict[str, Any]:
        states = {p: {k: AsIs(v) for k, v in s.items()} for p, s in loaded["state"].items()}
        groups = loaded["param_groups"]
        if len(groups) == len(dtypes):  # else torch refuses
            groups = [{**group, **own} for group, own in zip(groups, dtypes, strict=True)]
        return {**loaded, "state": states, "param_groups": groups}

    handle = optimizer.register_load_state_dict_pre_hook(protect)  # the last one: the user's own see plain tensors
    try:
        yield
    finally:
        handle.remove()


def local(tensor: Tensor) -> Tensor:
    """This rank's part of it."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def initial_state(p: Tensor, dtypes: Dtypes, group: frame.Group) -> dict[str, Tensor]:
    """The state before the first step: sharded as the parameter is, and neutral (v = 1, nothing turned)."""
    p, bases = p.detach(), flat.initial(p, group, dtypes["precond"])
    layout = torch.contiguous_format if bases and p.dim() > 2 else torch.preserve_format  # to be seen as a matrix
    state = {
        "step": torch.zeros((), dtype=torch.float32, device="cpu"),
        "exp_avg": torch.zeros_like(p, dtype=dtypes["exp_avg"], memory_format=layout),
        "exp_avg_sq": torch.zeros_like(p, dtype=dtypes["exp_avg_sq"], memory_format=layout),
        "precond": torch.ones_like(p, dtype=dtypes["precond"], memory_format=layout),
    }
    state |= bases
    if dtypes["exp_avg"] == torch.int8:
        state[EXPONENTS] = exponents_for(local(p))
    return state


def decoded(state: dict[str, Any]) -> dict[str, Any]:
    """The state with an 8-bit exp_avg as bfloat16, which holds it exactly; otherwise the state itself."""
    if EXPONENTS not in state:
        return state
    codes = state["exp_avg"]
    exp_avg = torch.empty_like(codes, dtype=torch.bfloat16)
    local(exp_avg).copy_(decode_blocks(local(codes), state[EXPONENTS]))
    return {**{k: v for k, v in state.items() if k != EXPONENTS}, "exp_avg": exp_avg}


def encoded(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state with exp_avg in 8 bits, to the nearest; the same values as before if `decoded` gave them and the blocks lie alike."""
    codes = torch.empty_like(state["exp_avg"], dtype=torch.int8)
    values, exponents = encode_blocks(local(state["exp_avg"]).float())
    local(codes).copy_(values)
    return {**state, "exp_avg": codes, EXPONENTS: exponents}


@contextmanager
def decoded_states(optimizer: Optimizer) -> Iterator[None]:
    """8-bit states as numbers, to save or to fill in place, and then in 8 bits again."""
    in_blocks = [p for p, state in optimizer.state.items() if EXPONENTS in state]
    for p in in_blocks:
        optimizer.state[p] = decoded(optimizer.state[p])
    try:
        yield
    finally:
        for p in in_blocks:
            optimizer.state[p] = encoded(optimizer.state[p])


def named_parameters(groups: Iterable[dict[str, Any]]) -> Iterator[tuple[Tensor, str]]:
    """(parameter, a name for error messages)."""
    index = 0
    for group in groups:
        for name, p in zip(group.get("param_names") or [""] * len(group["params"]), group["params"], strict=True):
            yield p, f"parameter {index}" + (f" ({name})" if name else "")
            index += 1


def checked_state(
    name: str, p: Tensor, loaded: dict[str, Any], dtypes: Dtypes, group: frame.Group
) -> dict[str, Tensor]:
    """A loaded state in the dtypes asked for and on the parameter's device.

    Raises:
        ValueError: keys are missing or foreign, a shape or sharding is not the parameter's, or values are none of a state.
    """
    values = frame.with_present_keys({k: v.value if isinstance(v, AsIs) else v for k, v in loaded.items()})
    if getattr(values.get("exp_avg"), "dtype", None) != torch.int8 or not isinstance(values.get(EXPONENTS), Tensor):
        values.pop(EXPONENTS, None)  # torch's flattened state dicts give {} for what they lack
    values = decoded(values)
    bases = flat.initial(p, group, dtypes["precond"])
    _check_keys(name, values, {*STATE_KEYS, *bases}, group["basis"])
    state = {"step": _step_count(name, values["step"])}
    for key in (*STATE_KEYS[1:], *bases):
        like = bases.get(key, p)
        value = _checked(f"{key} of {name}", values[key], like, p, key in bases)
        if key in bases:
            state[key] = value.to(dtype=like.dtype, device=p.device)
            continue
        if value.dtype == torch.int8:
            raise ValueError(
                f"Anon: {key} of {name} is int8, and the exponents of its blocks ({EXPONENTS}) are missing"
            )
        wanted = dtypes[key]
        state[key] = value.to(dtype=torch.float32 if wanted == torch.int8 else wanted, device=p.device)
        if bases and p.dim() > 2:
            state[key] = state[key].contiguous()  # to be seen as a matrix
    return encoded(state) if dtypes["exp_avg"] == torch.int8 else state


def _check_keys(name: str, values: dict[str, Any], keys: set[str], basis: str | None) -> None:
    """Refuse a state of other keys than these.

    Raises:
        ValueError: it is empty, another optimizer's, or of another basis.
    """
    if not values:
        raise ValueError(
            f"Anon: the state of {name} is empty. torch fills a flattened state dict (flatten_optimizer_state_dict) by the state that the "
            "optimizer has: call optimizer.init_state() before"
        )
    if keys != set(values):
        theirs = (
            "another optimizer's"
            if not set(STATE_KEYS) <= set(values) <= {*keys, *frame.BASIS_KEYS}
            else "of another basis"
        )
        adams = {"exp_avg", "exp_avg_sq"} <= set(values) and "precond" not in values
        remedy = (
            "anon-dist ckpt convert SRC DST --to … --optimizer anon makes it Anon's"
            if adams
            else "Load the weights and start Anon's state afresh, or load the state into the optimizer that wrote it"
        )
        raise ValueError(
            f"Anon: the state of {name} has {sorted(map(str, values))} where Anon's, with basis={basis!r}, has {sorted(keys)}: it "
            f"is {theirs}. {remedy}"
        )


def _checked(what: str, value: Any, like: Tensor, p: Tensor, of_basis: bool) -> Tensor:
    """A loaded value of the parameter `p`, if it is in place of `like`.

    Raises:
        ValueError: it is none, or has another shape, sharding or kind.
    """
    if of_basis and value == {}:
        raise ValueError(
            f"Anon: the loaded state dict has no {what}, or has it under the name of an earlier version, which torch does not "
            "find in a flattened state dict: write the checkpoint anew with anon-dist ckpt convert SRC DST --to dcp"
        )
    if not isinstance(value, Tensor) or value.shape != like.shape or _layout(value) != _layout(like):
        should = f"the parameter is a {_describe(p)}" + (f" and it should be a {_describe(like)}" if of_basis else "")
        raise ValueError(
            f"Anon: {what} is a {_describe(value)}, but {should}: the checkpoint is of another model or basis_block, or "
            "sharded otherwise (load sharded ones with torch.distributed.checkpoint)"
        )
    if value.layout != torch.strided or not (value.is_floating_point() or value.dtype == torch.int8):
        kind = str(value.dtype if value.layout == torch.strided else value.layout).removeprefix("torch.")
        raise ValueError(f"Anon: {what} is {kind}, and should be dense and of floating point. {_AFRESH}")
    return value


_AFRESH = "Load another checkpoint; or load the weights alone and start Anon's state afresh"


def _step_count(name: str, value: Any) -> Tensor:
    """A loaded step count.

    Raises:
        ValueError: it is none.
    """
    try:
        count = float(value)
    except (TypeError, ValueError, RuntimeError):
        count = math.nan
    if not count.is_integer() or not 0 <= count < LAST_STEP:
        raise ValueError(
            f"Anon: step of {name} is {value}, and should be an integer from 0 to {LAST_STEP - 1}. {_AFRESH}"
        )
    return torch.tensor(count, dtype=torch.float32, device="cpu")


def _layout(value: Any) -> tuple[Any, ...]:
    """How a tensor is laid out over ranks; empty for one that is not."""
    return (value.device_mesh, value.placements) if isinstance(value, DTensor) else ()


def _describe(value: Any) -> str:
    layout = f" {value.placements}" if isinstance(value, DTensor) else ""
    return f"{type(value).__name__}{tuple(getattr(value, 'shape', ()))}{layout}"
