"""A param group's local tensors, gathered into buckets: what a backend takes in one call.

From one step to the next usually nothing changes but the gradients' tensors, which of them are there, and the step counts. Then the buckets
are made again by passes over whole lists: Python's work on each of a hundred tensors takes a GPU's host longer than their update takes the
GPU.
"""

from __future__ import annotations

import weakref
from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import compress
from operator import attrgetter, is_, itemgetter
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from anon_dist.optim import flat
from anon_dist.optim.backends.layout import ADDRESSES, Addresses, Lists, addresses_of, chosen, table
from anon_dist.optim.state import EXPONENTS, LAST_STEP, STATE_KEYS, local

Group = Mapping[str, Any]
States = Mapping[Tensor, dict[str, Any]]

_Pick = Callable[[list[Any]], list[Any]]
_dtype, _layout = attrgetter("dtype"), attrgetter("layout")
_values = itemgetter(*STATE_KEYS)


@dataclass
class Bucket:
    """Local tensors of one param group and one device, whose dtypes agree role by role, and which are of one `flat.kind`. All lists have a
    member for each parameter."""

    params: list[Tensor]
    lists: Lists
    """θ, g, m, s and v, by role (`plan.ROLES`)."""
    exponents: list[Tensor] | None
    """Of m's blocks, where m is in 8 bits."""
    steps: list[int]
    """The step that each parameter takes."""
    counters: list[Tensor]
    """Step counts, which go up when the step has been taken; none where someone else counts."""
    counts: list[Any] = field(default_factory=list)
    """The counters' memory (memoryview), if it is known: torch's operations on 0-dimensional tensors take a microsecond each."""
    addresses: Addresses | None = None
    """Of the lists' tensors, where they are known (see `layout.Addresses`)."""
    choices: dict[Any, Any] | None = None
    """What was chosen by the tensors' kinds, which are those of the steps before; None where they may be others."""

    def count(self, by: float = 1.0) -> None:
        """Raise the step counts."""
        if self.counts and not torch.compiler.is_compiling():
            for count in self.counts:
                count[()] += by
        elif self.counters:
            torch._foreach_add_(self.counters, by)

    def of(self, indices: Sequence[int]) -> Bucket:
        """A bucket of some of the parameters."""

        def pick(members: list[Any]) -> list[Any]:
            return [members[i] for i in indices]

        return Bucket(
            pick(self.params),
            tuple(map(pick, self.lists)),
            None if self.exponents is None else pick(self.exponents),
            pick(self.steps),
            pick(self.counters),
            pick(self.counts) if self.counts else [],
            None if self.addresses is None else chosen(self.addresses, indices),
            self.choices,
        )


class Gathered:
    """What a group's tensors were when they were last gathered one by one.

    It keeps the parameters alive, and no other tensor: torch's `swap_tensors` (`model.to` of DTensors) refuses those that are weakly
    referred to.
    """

    def __init__(self, group: Group, kinds: Iterable[_Kind]) -> None:
        self._params = list(group["params"])
        self._kinds = list(kinds)
        known = {position for kind in self._kinds for position in kind.positions}
        self._without_state = [i for i in range(len(self._params)) if i not in known]

    def is_of(self, group: Group) -> bool:
        """Whether the group has these very parameters."""
        params = group["params"]
        return len(params) == len(self._params) and all(map(is_, params, self._params))

    def buckets(self, group: Group, state: States) -> list[Bucket] | None:
        """The buckets of the next step; None if they must be gathered anew.

        That is where parameters, states, dtypes, devices or shapes have changed, or a parameter has its first gradient.
        """
        params = group["params"]
        if not self.is_of(group):
            return None
        grads = [p.grad for p in params]
        if any(grads[i] is not None for i in self._without_state):
            return None
        found = [kind.bucket(params, grads, state) for kind in self._kinds]
        renewed = [bucket for bucket in found if bucket is not None]
        return [bucket for bucket in renewed if bucket.params] if len(renewed) == len(found) else None


class _Kind:
    """Parameters of a group that come into one bucket, as they were at their last gathering."""

    def __init__(self, positions: list[int], params: list[Tensor], lists: Lists, state: States) -> None:
        states = [state[p] for p in params]
        self.positions = positions
        self._references = [_references(members) for members in zip(*map(_values, states), strict=True)]
        self._exponents = _references(s[EXPONENTS] for s in states if EXPONENTS in s)
        theta, grad, *kept = lists  # kept: m, s and v
        counters = [s["step"] for s in states]
        # An object that is the same, at the same address, has the dtype, device, size and strides that it had; but for a parameter, whose
        # tensor may have been swapped twice (`model.to`).
        self._theta_dtypes = set(map(_dtype, theta))
        self._addresses = [list(map(Tensor.data_ptr, members)) for members in (theta, *kept, counters)]
        self._grad_kind = _kind(grad[:1])
        self._numels = list(map(Tensor.numel, theta))
        countable = all(type(c) is Tensor and c.device.type == "cpu" for c in counters)
        self._counts = [c.numpy().data for c in counters] if countable else []
        self._is_plain = {type(t) for p, s in zip(params, states, strict=True) for t in (p, *s.values())} <= {
            nn.Parameter,
            Tensor,
        }
        found = (addresses_of(members) for members in (theta, *kept)) if self._is_plain else ()
        known = [addresses for addresses in found if addresses is not None]
        self._table = table([known[0], *known], theta) if len(known) == 4 else None
        """Addresses, with a place for the gradients', which are others at each step."""
        self._choices: dict[Any, Any] = {}

    def bucket(self, params: list[Tensor], grads: list[Tensor | None], state: States) -> Bucket | None:
        """The bucket of the parameters that have a gradient now; None if something else has changed."""
        if not self._counts:
            return None
        own, found = [params[i] for i in self.positions], [grads[i] for i in self.positions]
        there = [g is not None for g in found]
        if not all(there):
            there = [has or is_empty_shard(p) for has, p in zip(there, own, strict=True)]
        if not any(there):
            return Bucket([], ([], [], [], [], []), None, [], [])
        pick = _all if all(there) else partial(_some, there)
        owners, grad = pick(own), pick(found)
        try:
            states = [state[p] for p in owners]
            counters, *kept = map(list, zip(*map(_values, states), strict=True))
            exponents = [s[EXPONENTS] for s in states] if self._exponents else None
        except KeyError:
            return None
        if not all(map(_are, (counters, *kept), map(pick, self._references))):
            return None
        if exponents is not None and not _are(exponents, pick(self._exponents)):
            return None
        plain = self._is_plain and set(map(type, grad)) == {Tensor}
        theta = owners
        if not plain:
            theta, grad = list(map(local, owners)), list(map(local_gradient, owners))
            kept = [list(map(local, members)) for members in kept]
        lists = cast(Lists, (theta, grad, *kept))
        if not self._is_as_it_was(lists, counters, pick):
            return None
        counts = pick(self._counts)
        steps = [int(count[()]) + 1 for count in counts]
        if max(steps) >= LAST_STEP:
            return None
        addresses = self._known_addresses(theta, grad, there) if plain else None
        return Bucket(owners, lists, exponents, steps, counters, counts, addresses, self._choices if plain else None)

    def _is_as_it_was(self, lists: Lists, counters: list[Tensor], pick: _Pick) -> bool:
        theta, grad, *kept = lists
        for members, addresses in zip((theta, *kept, counters), map(pick, self._addresses), strict=True):
            if list(map(Tensor.data_ptr, members)) != addresses:
                return False
        if set(map(_dtype, theta)) != self._theta_dtypes:
            return False
        return list(map(Tensor.numel, grad)) == pick(self._numels) and _kind(grad) == self._grad_kind

    def _known_addresses(self, theta: list[Tensor], grad: list[Tensor], there: list[bool]) -> Addresses | None:
        """What `_is_as_it_was` has compared, and the gradients'; None where a tensor has gaps or another order."""
        found = addresses_of(grad)
        if self._table is None or found is None or not all(map(Tensor.is_contiguous, theta)):
            return None
        known = self._table[:] if all(there) else chosen(self._table, compress(range(len(there)), there))
        known[1::ADDRESSES] = array("q", found)
        return known


def gather(index: int, group: Group, state: States) -> tuple[list[Bucket], Gathered]:
    """The group's local tensors, of all parameters that have a gradient; and what is to be remembered of it.

    Raises:
        RuntimeError: a gradient is sparse, or laid out otherwise than its parameter; a parameter has been resized; or a step count has come
            to its end.
    """
    kinds: dict[tuple[Any, ...], tuple[list[int], list[Tensor], Lists]] = {}
    for position, p in enumerate(group["params"]):
        if not state.get(p):
            continue
        tensors = _tensors(p, state[p])
        if p.grad is not None or is_empty_shard(p):
            _check(index, position, p, state[p], tensors)
        elif tensors[0].numel() != tensors[2].numel():
            continue
        key = (tensors[0].device, *(t.dtype for t in tensors), flat.kind(p, group))
        positions, params, lists = kinds.setdefault(key, ([], [], tuple([] for _ in tensors)))
        positions.append(position)
        params.append(p)
        for members, tensor in zip(lists, tensors, strict=True):
            members.append(tensor)
    known = [_Kind(positions, params, lists, state) for positions, params, lists in kinds.values()]
    buckets = []
    for _, params, lists in kinds.values():
        indices = [i for i, p in enumerate(params) if p.grad is not None or is_empty_shard(p)]
        if indices:
            buckets.append(_bucket(params, lists, state).of(indices))
    return buckets, Gathered(group, known)


def _bucket(params: list[Tensor], lists: Lists, state: States) -> Bucket:
    states = [state[p] for p in params]
    exponents = [s[EXPONENTS] for s in states] if EXPONENTS in states[0] else None
    counters = [s["step"] for s in states]
    return Bucket(params, lists, exponents, [int(c) + 1 for c in counters], counters)


def _tensors(p: Tensor, own: dict[str, Any]) -> list[Tensor]:
    """θ, g, m, s, v of a parameter; in place of a gradient that it has not, itself."""
    return [local(p), local_gradient(p), *(local(own[key]) for key in STATE_KEYS[1:])]


def _check(index: int, position: int, p: Tensor, own: dict[str, Any], tensors: list[Tensor]) -> None:
    """Refuse a parameter that cannot be updated; see `gather`."""
    where = f"parameter {position} of param group {index}"
    if p.grad is not None and p.grad.is_sparse:
        raise RuntimeError(
            f"Anon: {where} has a sparse gradient, which is not supported; make it dense (nn.Embedding(sparse=False))"
        )
    if int(own["step"]) + 1 >= LAST_STEP:
        raise RuntimeError(f"Anon: the step counter, a float32 as in torch, cannot count past {LAST_STEP}")
    if any(t.numel() != tensors[0].numel() for t in tensors):  # a kernel would write past the end
        raise RuntimeError(
            f"Anon: {where} has {tensors[0].numel()} elements, its gradient {tensors[1].numel()} and its exp_avg {tensors[2].numel()}: it "
            "was resized after its state was made. del optimizer.state[p] starts it afresh"
        )


def local_gradient(p: Tensor) -> Tensor:
    """This rank's part of p's gradient; p's own numbers where it has none.

    Raises:
        RuntimeError: the gradient is laid out otherwise than the parameter (a pending sum over ranks, say).
    """
    grad = p.detach() if p.grad is None else p.grad
    if isinstance(p, DTensor) != isinstance(grad, DTensor):
        raise RuntimeError(
            f"Anon: the parameter is a {type(p).__name__} and its gradient a {type(grad).__name__}; they must be sharded alike"
        )
    if (
        isinstance(p, DTensor)
        and isinstance(grad, DTensor)
        and (grad.placements, grad.device_mesh) != (p.placements, p.device_mesh)
    ):
        raise RuntimeError(
            f"Anon: gradient placements {grad.placements} differ from the parameter's {p.placements}; redistribute it before step()"
        )
    return local(grad)


def is_empty_shard(p: Tensor) -> bool:
    """Whether p is what FSDP1 leaves of a parameter on a rank that holds none of its elements. It never has a gradient there; its step
    counts all the same, since FSDP1 saves one count for all ranks."""
    return p.numel() == 0 and p.requires_grad and not isinstance(p, DTensor)


def _all(members: list[Any]) -> list[Any]:
    return members


def _some(there: list[bool], members: list[Any]) -> list[Any]:
    return list(compress(members, there))


def _kind(tensors: list[Tensor]) -> tuple[set[Any], ...]:
    """What a backend needs to be alike in a list."""
    return set(map(_dtype, tensors)), set(map(Tensor.get_device, tensors)), set(map(_layout, tensors))


def _references(tensors: Iterable[Tensor]) -> list[weakref.ref[Tensor]]:
    return [weakref.ref(t) for t in tensors]


def _are(tensors: list[Any], references: Iterable[weakref.ref[Tensor]]) -> bool:
    """Whether the tensors are the ones that are referred to."""
    return all(map(is_, tensors, [r() for r in references]))
