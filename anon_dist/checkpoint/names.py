"""Names of parameters: without what wrappers add, and for optimizers that only count them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import Any

from torch import Tensor

from anon_dist.checkpoint.boxes import Boxes
from anon_dist.checkpoint.errors import CheckpointError, NamesWanted

Shape = tuple[int, ...]
_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
_ELEMENTWISE = ("exp_avg", "momentum_buffer", "precond", "fixed_lr", "exp_avg_sq", "square_avg", "sum", "variance")
"""States that have the parameter's shape in the optimizers that have them, unless they project (GaLore), which has more to keep."""
_FACTORS = {"exp_avg_sq_row": ("exp_avg_sq_col", None), "row_var": ("col_var", -1)}
"""Adafactor's means over rows, transformers' and torch's, which keeps the dimension → those over columns."""
_BUFFERS = ("running_mean", "running_var", "num_batches_tracked", "position_ids", "inv_freq", "masked_bias")

NUMBERED = "the optimizer's parameters are called by their numbers here, #0, #1, …, and none of the model's is taken to be frozen: {}"
"""Note, with the reason, where names are not needed."""


def unwrapped(names: Sequence[str]) -> dict[str, str]:
    """Each name → the name in the unwrapped model. `module.` is only taken off where all names begin with it."""
    everywhere = bool(names) and all(n.startswith("module.") for n in names)
    found = {}
    for name in names:
        clean = ".".join(part for part in name.split(".") if part not in _WRAPPERS)
        found[name] = clean.removeprefix("module.") if everywhere else clean
    return found if len(set(found.values())) == len(found) else {n: n for n in names}


def is_buffer(name: str, floating: bool) -> bool:
    """Whether this entry of a model's state dict looks like a buffer."""
    return not floating or name.rpartition(".")[2] in _BUFFERS


def read_names(path: Path) -> list[str]:
    """The lines of a names file: parameter names in the optimizer's order, group after group.

    Raises:
        CheckpointError: it cannot be read, or a name is there twice.
    """
    try:
        names = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"--names {path} cannot be read: {error}") from None
    check_once(names, f"--names {path}")
    return names


def check_once(names: Iterable[str], said_by: str) -> None:
    """Raises `CheckpointError` if a name is there twice: the states of one parameter would take another's place."""
    if twice := sorted(name for name, count in Counter(names).items() if count > 1):
        raise CheckpointError(f"{said_by} has {twice[0]} twice")


def unnamed(number: Any) -> str:
    """What a parameter is called that is known by its number alone, where names do not matter."""
    return f"#{number}"


def fitting_names(state: Mapping[str, Any], shapes: Mapping[str, Shape]) -> set[str]:
    """The parameters whose shapes a parameter's states allow."""
    own = {k: tuple(v.shape) for k, v in state.items() if isinstance(v, Tensor | Boxes) and k != "step"}
    plain = all(k in own or v is None or isinstance(v, int | float | str | Tensor) for k, v in state.items())
    exact = next((own[k] for k in _ELEMENTWISE if k in own), None) if plain else None
    for rows, (columns, stop) in _FACTORS.items():
        if exact is None and rows in own and own.get(columns):
            exact = (*own[rows][:stop], own[columns][-1])
    if exact is not None:
        return {name for name, shape in shapes.items() if shape == exact}
    agreed = {s for s in own.values() if s} or set(own.values())
    if len(agreed) != 1:
        return set(shapes)  # nothing is known of such states
    only = agreed.pop()
    return {n for n, shape in shapes.items() if shape == only or (len(only) < len(shape) and {*only} <= {*shape})}


def assign(
    groups: Sequence[Sequence[Any]],
    fitting: Mapping[Any, AbstractSet[str]],
    model: Sequence[str],
    where: str,
    stateless: AbstractSet[Any] = frozenset(),
    ordered: bool = True,
    in_model_order: bool = False,
) -> dict[Any, str]:
    """Names for an optimizer that numbers its parameters: those of the model beside it, where only one assignment fits.

    Order is no evidence: an optimizer made from sorted names, whose blocks h.1, h.10, h.2 … are alike, fits the model's order too.

    Args:
        groups: the numbers in each group.
        fitting: number → names that its states allow.
        model: names of the model's entries that may be parameters, in its order.
        stateless: numbers without a state: within a group it makes no difference which is which.
        ordered: whether the model's order is known; safetensors files sort by name.
        in_model_order: the user says that each group has the model's order; parameters may be left over (frozen ones).

    Raises:
        NamesWanted: no assignment fits, or several do.
    """
    only = _only({number: fitting[number] for own in groups for number in own})
    if only is not None and (rest := [n for own in groups for n in own if n not in only]):
        left = [name for name in model if name not in set(only.values())]
        together = any(stateless >= set(rest) and set(rest) <= set(own) for own in groups)
        only = {**only, **dict(zip(rest, left, strict=True))} if together and len(left) == len(rest) else {}
    if only or not any(groups):
        return only or {}
    known = [name for name in model if not is_buffer(name, True)]
    by_order = _in_order([list(own) for own in groups], fitting, known) if ordered and only is not None else []
    if in_model_order and len(by_order) == 1:
        return by_order[0]
    problem = _problem(sum(map(len, groups)), len(known), only is not None)
    if in_model_order and only is not None:
        problem = _problem_of_order(problem, len(by_order), ordered)
    raise NamesWanted(f"{where}: the optimizer {problem}. {_remedy(by_order)}")


def _problem(count: int, tensors: int, fits: bool) -> str:
    """Args:
    tensors: of the model, that may be parameters: those of the optimizer, frozen ones, buffers, and other names of tied ones.
    """
    if not tensors:
        return f"numbers its {count} parameters, and no model is beside it"
    spare = tensors - count
    more = (
        f", of which {spare} {'is' if spare == 1 else 'are'} frozen, a buffer, or tied to another" if spare > 0 else ""
    )
    beside = f"the {tensors} tensors of the model beside it{more}"
    if not fits:
        return f"has states of {count} parameters that do not fit {beside}"
    return f"numbers its {count} parameters, and their states fit {beside}, in more than one way"


def _problem_of_order(problem: str, ways: int, ordered: bool) -> str:
    """The same where it was said that the groups have the model's order."""
    if not ordered:
        return f"{problem}; the model, in safetensors, has lost its order"
    if not ways:
        return f"{problem}, none of which has the model's order in each group"
    return f"{problem}, also if each group has the model's order"


def _remedy(by_order: Sequence[Any]) -> str:
    short = (
        " If each of its groups has the order of model.parameters(), --names-in-model-order says so and is enough"
        if len(by_order) == 1
        else ""
    )
    return (
        "Give --names FILE, one parameter name on each line in the optimizer's order: "
        "of its first group, then of the second, … In the script that made it: names = {p: n for n, p in model.named_parameters()}; "
        f'print(*(names[p] for g in optimizer.param_groups for p in g["params"]), sep="\\n").{short}'
    )


def _only(fitting: Mapping[Any, AbstractSet[str]]) -> dict[Any, str] | None:
    """The names that are certain, each number with its own; None: they cannot all have one.

    If there is only one assignment, all are: some number has a single name left then, and without the two the same holds of the rest (a
    bipartite graph with one perfect matching has leaves on both sides).
    """
    left = {number: set(names) for number, names in fitting.items()}
    wanted: dict[str, list[Any]] = {}
    for number, names in left.items():
        for name in names:
            wanted.setdefault(name, []).append(number)
    found: dict[Any, str] = {}
    ready = [number for number, names in left.items() if len(names) <= 1]
    while ready:
        number = ready.pop()
        if not left[number]:
            return None
        found[number] = name = left[number].pop()
        for other in wanted[name]:
            if other not in found:
                left[other].discard(name)
                if len(left[other]) <= 1 and other not in ready:
                    ready.append(other)
    alike = Counter(frozenset(names) for number, names in left.items() if number not in found)
    return None if any(count > len(names) for names, count in alike.items()) else found


def _in_order(
    groups: list[list[Any]], fitting: Mapping[Any, AbstractSet[str]], model: Sequence[str]
) -> list[dict[Any, str]]:
    """Up to two assignments that keep the model's order within each group; parameters may be left over (frozen ones)."""
    spare = len(model) - sum(map(len, groups))
    if spare < 0:
        return []
    # Ways through the model, parameter by parameter: how many of each group are taken → up to two assignments so far.
    ways: dict[tuple[int, ...], list[dict[Any, str]]] = {(0,) * len(groups): [{}]}
    for position, name in enumerate(model):
        following: dict[tuple[int, ...], list[dict[Any, str]]] = {}
        for taken, so_far in ways.items():
            if position - sum(taken) < spare:
                following.setdefault(taken, []).extend(so_far)
            for g, members in enumerate(groups):
                if taken[g] < len(members) and name in fitting[members[taken[g]]]:
                    further = (*taken[:g], taken[g] + 1, *taken[g + 1 :])
                    following.setdefault(further, []).extend({**s, members[taken[g]]: name} for s in so_far)
        ways = {taken: found[:2] for taken, found in following.items()}
        if len(ways) > 4096:
            return [{}, {}]  # too many to tell apart
    return ways.get(tuple(map(len, groups)), [])
