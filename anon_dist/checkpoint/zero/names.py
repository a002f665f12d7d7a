"""Names for parameters that a checkpoint knows by their place in the optimizer alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from anon_dist.checkpoint.errors import CheckpointError

LOOKS, FOUND = 100_000, 100
"""Places and assignments looked at before giving up."""


def name_members(
    groups: Sequence[int],
    shapes: Mapping[str, tuple[int, ...]],
    fits: Callable[[int, int, str], bool],
    where: str,
) -> tuple[list[list[str]], bool]:
    """The assignment of names to the places of the param groups that the evidence allows, and whether it is the only one.

    Groups are taken to keep the model's order within themselves, as a filter over `named_parameters()` does; parameters in no group are
    frozen. Of several assignments that differ in what is frozen, one is taken if it alone splits the fewest modules.

    Args:
        groups: members of each.
        shapes: name → shape, in the model's order.
        fits: whether the parameter at (group, place) can have this name.
        where: for the message.

    Raises:
        CheckpointError: none fits, or several do equally well.
    """
    names, frozen = list(shapes), len(shapes) - sum(groups)
    found: list[list[list[str]]] = []
    dead: set[tuple[int, ...]] = set()
    looks = 0

    def search(at: int, taken: list[list[str]], skipped: int) -> bool:
        """Whether some assignment was found from here."""
        nonlocal looks
        looks += 1
        state = (at, skipped, *(len(t) for t in taken))
        if state in dead or looks > LOOKS or len(found) > FOUND:
            return False
        if at == len(names):
            found.append([list(t) for t in taken])
            return True
        any_found = False
        for g, members in enumerate(taken):
            if len(members) < groups[g] and fits(g, len(members), names[at]):
                members.append(names[at])
                any_found |= search(at + 1, taken, skipped)
                members.pop()
        if skipped < frozen:
            any_found |= search(at + 1, taken, skipped + 1)
        if not any_found:
            dead.add(state)
        return any_found

    if frozen >= 0:
        search(0, [[] for _ in groups], 0)
    exhausted = looks <= LOOKS and len(found) <= FOUND
    if found and exhausted:
        splits = [_split_modules(names, assignment) for assignment in found]
        best = [a for a, n in zip(found, splits, strict=True) if n == min(splits)]
        if len(best) == 1:
            return best[0], len(found) == 1
    problem = "does not tell which parameter is which" if found else "does not fit the model's parameters"
    raise CheckpointError(
        f"{where}: knows parameters by their index, which {problem} ({sum(groups)} in the optimizer's {len(groups)} "
        f"groups, {len(names)} in the model); give the names of the optimizer's parameters, in its order"
    )


def _split_modules(names: Sequence[str], assignment: list[list[str]]) -> int:
    """Modules of which some parameters are frozen and others not."""
    trained = {name for group in assignment for name in group}
    kinds: dict[str, set[bool]] = {}
    for name in names:
        kinds.setdefault(name.rpartition(".")[0], set()).add(name in trained)
    return sum(len(kind) == 2 for kind in kinds.values())
