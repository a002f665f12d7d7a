"""Names of parameters: without what wrappers add, and for optimizers that only count them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from anon_dist.checkpoint.errors import CheckpointError

_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
_BUFFERS = ("running_mean", "running_var", "num_batches_tracked", "position_ids", "inv_freq", "masked_bias")
Shape = tuple[int, ...]


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
    if twice := sorted({n for n in names if names.count(n) > 1}):
        raise CheckpointError(f"--names {path} has {twice[0]} twice")
    return names


def assign(
    groups: Sequence[Sequence[int]],
    shapes: Mapping[int, Shape | None],
    model: Mapping[str, Shape],
    where: str,
    ordered: bool = True,
) -> dict[int, str]:
    """Names for an optimizer that numbers its parameters: those of the model beside it, in the model's order within each group.

    Args:
        groups: the numbers in each group.
        shapes: of the parameters, by number, where a state of the parameter's shape tells.
        model: the model's parameters in its order.
        ordered: whether that order is known; safetensors files sort by name.

    Raises:
        CheckpointError: no assignment fits the shapes, or several do.
    """
    if not ordered and len(set(model.values())) < len(model):
        solutions: list[dict[int, str]] = [{}, {}]
    else:
        solutions = _solutions([list(g) for g in groups], shapes, list(model.items()))
    if len(solutions) == 1:
        return solutions[0]
    count = sum(map(len, groups))
    problem = (
        f"fits the {len(model)} parameters of the model beside it in more than one way"
        if solutions
        else f"has states of {count} parameters that do not fit the {len(model)} of the model beside it"
        if model
        else f"numbers its {count} parameters, and no model is beside it"
    )
    raise CheckpointError(
        f"{where}: the optimizer {problem}. Give --names FILE, one parameter name on each line in the optimizer's order: "
        "of its first group, then of the second, … In the script that made it: names = {p: n for n, p in model.named_parameters()}; "
        'print(*(names[p] for g in optimizer.param_groups for p in g["params"]), sep="\\n")'
    )


def _solutions(
    groups: list[list[int]], shapes: Mapping[int, Shape | None], model: list[tuple[str, Shape]]
) -> list[dict[int, str]]:
    """Up to two assignments that keep the model's order within each group; parameters may be left over (frozen ones)."""
    spare = len(model) - sum(map(len, groups))
    if spare < 0:
        return []
    # Ways through the model, parameter by parameter: how many of each group are taken → up to two assignments so far.
    ways: dict[tuple[int, ...], list[dict[int, str]]] = {(0,) * len(groups): [{}]}
    for position, (name, shape) in enumerate(model):
        following: dict[tuple[int, ...], list[dict[int, str]]] = {}
        for taken, so_far in ways.items():
            if position - sum(taken) < spare:
                following.setdefault(taken, []).extend(so_far)
            for g, members in enumerate(groups):
                if taken[g] < len(members) and shapes.get(members[taken[g]]) in (None, shape):
                    further = (*taken[:g], taken[g] + 1, *taken[g + 1 :])
                    following.setdefault(further, []).extend({**s, members[taken[g]]: name} for s in so_far)
        ways = {taken: found[:2] for taken, found in following.items()}
        if len(ways) > 4096:
            return [{}, {}]  # too many to tell apart
    return ways.get(tuple(map(len, groups)), [])
