"""A param group's local tensors, gathered into buckets.

From one step to the next usually nothing changes but the gradients' tensors and the step counts. Then the buckets are renewed by passes
over whole lists: Python's work on each of a hundred tensors takes a GPU's host longer than their update takes the GPU.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping
from operator import attrgetter, is_
from typing import Any, cast

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from anon_dist.optim.buckets import Bucket, local_gradient
from anon_dist.optim.state import EXPONENTS, STATE_KEYS, local

LAST_STEP = 1 << 24

States = Mapping[Tensor, dict[str, Any]]

Parts = Mapping[Tensor, int]
"""Parameter → the part of the step that it belongs to; those in none are in part -1."""

_kind = attrgetter("dtype", "device", "layout", "shape")


class Gathered:
    """What a group's buckets were made of in its last step. It keeps no tensor alive."""

    def __init__(self, group: Mapping[str, Any], parts: Parts, known: list[_Known]) -> None:
        self._params = _references(group["params"])
        self._has_gradient = [p.grad is not None for p in group["params"]]
        self._parts = {weakref.ref(p): part for p, part in parts.items()}
        self._known = known

    def renewed(self, group: Mapping[str, Any], state: States, parts: Parts) -> list[tuple[int, Bucket]] | None:
        """The buckets of the next step, each with its part.

        None if they must be gathered anew: parameters, states, dtypes, devices, shapes, parts or which gradients are there have changed, or
        the step counts of a bucket are not one any more.
        """
        params = group["params"]
        if not _are(params, self._params) or [p.grad is not None for p in params] != self._has_gradient:
            return None
        if parts != {p(): part for p, part in self._parts.items()}:
            return None
        found = [(known.part, known.renewed(state)) for known in self._known]
        buckets = [(part, bucket) for part, bucket in found if bucket is not None]
        return buckets if len(buckets) == len(found) else None


class _Known:
    """What one bucket was made of."""

    def __init__(self, part: int, bucket: Bucket, params: list[Tensor], state: States) -> None:
        self.part = part
        states = [state[p] for p in params]
        self._params = _references(params)
        self._states = [_references(s[key] for s in states) for key in STATE_KEYS]
        self._exponents = _references(bucket.exponents)
        self._kinds = [_kind(t) for members in bucket.lists for t in members]
        self._is_plain = {type(t) for p in params for t in (p, p.grad, *state[p].values())} <= {nn.Parameter, Tensor}
        self._places = list(map(Tensor.data_ptr, bucket.counters))
        countable = all(type(c) is Tensor and c.device.type == "cpu" for c in bucket.counters)
        self._counts = [c.numpy() for c in bucket.counters] if countable else []

    def renewed(self, state: States) -> Bucket | None:
        """The bucket of the next step; None if something that it was made of has changed."""
        params = [p for p in (r() for r in self._params) if p is not None and p in state]
        if len(params) != len(self._params) or not self._counts:
            return None
        states = [state[p] for p in params]
        kept = [[s.get(key) for s in states] for key in STATE_KEYS]
        exponents = [s[EXPONENTS] for s in states if EXPONENTS in s]
        if not all(map(_are, (*kept, exponents), (*self._states, self._exponents))):
            return None
        counters, *means = cast(list[list[Tensor]], kept)
        if list(map(Tensor.data_ptr, counters)) != self._places:
            return None
        steps = {float(count) for count in self._counts}
        step = int(steps.pop()) + 1
        if steps or step >= LAST_STEP:
            return None
        theta, grad = params, [p.grad for p in params]
        if not self._is_plain or set(map(type, grad)) != {Tensor}:
            theta, grad = list(map(local, params)), list(map(local_gradient, params))
            means = [list(map(local, members)) for members in means]
        m, s, v = means
        bucket = Bucket(step, (1.0, 1.0), counters, theta, cast(list[Tensor], grad), m, s, v, exponents, self._counts)
        return bucket if [_kind(t) for members in bucket.lists for t in members] == self._kinds else None


def gather(
    index: int, group: Mapping[str, Any], state: States, parts: Parts
) -> tuple[list[tuple[int, Bucket]], Gathered]:
    """The group's local tensors, those together that share part, step count, device and dtypes; each bucket with its part.

    Raises:
        RuntimeError: a gradient is sparse, or laid out otherwise than its parameter; a parameter has been resized; or a step count has come
            to its end.
    """
    buckets: dict[tuple[Any, ...], tuple[Bucket, list[Tensor]]] = {}
    for position, p in enumerate(group["params"]):
        if p.grad is None and not _is_empty_shard(p):
            continue
        if p.grad is not None and p.grad.is_sparse:
            raise RuntimeError(
                f"Anon: parameter {position} of param group {index} has a sparse gradient, which is not supported; make it dense "
                "(nn.Embedding(sparse=False))"
            )
        own = state[p]
        step = int(own["step"]) + 1
        if step >= LAST_STEP:
            raise RuntimeError(f"Anon: the step counter, a float32 as in torch, cannot count past {LAST_STEP}")
        tensors = [local(p), local_gradient(p), *(local(own[key]) for key in STATE_KEYS[1:])]
        if any(t.numel() != tensors[0].numel() for t in tensors):  # a kernel would write past the end
            raise RuntimeError(
                f"Anon: parameter {position} of param group {index} has {tensors[0].numel()} elements, its gradient {tensors[1].numel()} "
                f"and its exp_avg {tensors[2].numel()}: it was resized after its state was made. del optimizer.state[p] starts it afresh"
            )
        key = (parts.get(p, -1), step, tensors[0].device, *(t.dtype for t in tensors))
        bucket, params = buckets.setdefault(key, (Bucket(step), []))
        bucket.add(own["step"], tensors, own.get(EXPONENTS))
        params.append(p)
    known = [_Known(key[0], bucket, params, state) for key, (bucket, params) in buckets.items()]
    return [(key[0], bucket) for key, (bucket, _) in buckets.items()], Gathered(group, parts, known)


def _references(tensors: Iterable[Tensor]) -> list[weakref.ref[Tensor]]:
    return [weakref.ref(t) for t in tensors]


def _are(tensors: list[Any], references: list[weakref.ref[Tensor]]) -> bool:
    """Whether the tensors are the ones that are referred to."""
    return len(tensors) == len(references) and all(map(is_, tensors, [r() for r in references]))


def _is_empty_shard(p: Tensor) -> bool:
    """Whether p is what FSDP1 leaves of a parameter on a rank that holds none of its elements. It never has a gradient there; its step
    counts all the same, since FSDP1 saves one count for all ranks."""
    return p.numel() == 0 and p.requires_grad and not isinstance(p, DTensor)
