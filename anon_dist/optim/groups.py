"""Param groups by the usual rules: what is weight-decayed, which matrices are turned, and what parameters have of their own by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, Literal

from torch import Tensor, nn

Basis = Literal["columns", "rows", "both"]


def param_groups(
    model: nn.Module,
    weight_decay: float = 0.1,
    *,
    lr: Mapping[str, float] | None = None,
    decay: Mapping[str, float] | None = None,
    gamma: Mapping[str, float] | None = None,
    basis: Basis | None = None,
    embeddings: Mapping[str, Any] | None = None,
    overrides: Mapping[str, Mapping[str, Any]] | None = None,
    no_decay: Sequence[str] = (),
) -> list[dict[str, Any]]:
    """Param groups for `Anon` (or any torch optimizer): matrices and embeddings decayed, vectors (biases, norm weights) not.

    Frozen parameters are left out, tied ones appear once. Patterns are shell-style (`fnmatch`) and matched against the names of
    `model.named_parameters()`; of each argument the first one that matches a parameter counts.

        param_groups(model, 0.1, basis="both", embeddings={"betas": (0.9, 0.95)}, lr={"*wte*": 3e-3}, decay={"*wte*": 0.0})

    Args:
        weight_decay: λ of the parameters that are decayed.
        lr: pattern → learning rate of the parameters it matches; the others' is the optimizer's. A scheduler of torch keeps the ratio.
        decay: pattern → λ of the parameters it matches, matrices or not, in place of the rule.
        gamma: pattern → γ of the parameters it matches.
        basis: which sides of matrices are turned (see `Anon`). Rows that stand for tokens never are: those of embeddings and of output
            heads (see `token_matrices`), which have None under "both" and "rows", and "columns" under "columns". Stacks of matrices in
            one tensor, such as a layer's experts, have None. All that have None are in groups apart.
        embeddings: any hyperparameters of these embeddings and heads, in place of the others' and of `basis`.
        overrides: pattern → any hyperparameters of the parameters it matches, over all of the above.
        no_decay: patterns of further parameters that are not decayed.

    Returns:
        Groups in the order in which their first parameter appears in the model; none is empty. Which parameters are together depends on
        the decay rule, the patterns, whether rows are turned, and whether `embeddings` has any; not on the values, so that a
        checkpoint fits after a value has changed.

    Raises:
        ValueError: a pattern matches no trainable parameter, `embeddings` are given and the model has none, or `basis` is none of these.
        TypeError: `embeddings` is no mapping of hyperparameters.
    """
    if basis not in (None, "columns", "rows", "both"):
        raise ValueError(f"param_groups: basis must be None, 'columns', 'rows' or 'both', not {basis!r}")
    if embeddings is not None and (not isinstance(embeddings, Mapping) or "params" in embeddings):
        raise TypeError(
            f'param_groups: embeddings are hyperparameters, such as {{"betas": (0.9, 0.95)}}, not {embeddings!r}'
        )
    values: dict[str, Mapping[str, Any]] = {"lr": lr or {}, "weight_decay": decay or {}, "gamma": gamma or {}}
    by_pattern = {**values, "overrides": overrides or {}}
    patterns = {pattern for named in (*by_pattern.values(), no_decay) for pattern in named}
    unused, of_tokens = set(patterns), token_matrices(model) if basis in ("rows", "both") or embeddings else set()
    stacked = stacks(model) if basis is not None or embeddings else set()
    groups: dict[tuple[Any, ...], dict[str, Any]] = {}
    for name, p in [(name, p) for name, p in model.named_parameters() if p.requires_grad]:
        matches = {pattern for pattern in patterns if fnmatchcase(name, pattern)}
        unused.difference_update(matches)
        decayed = p.dim() >= 2 and not matches.intersection(no_decay)
        settings: dict[str, Any] = {"weight_decay": weight_decay if decayed else 0.0}
        own = {key: next((m for m in named if m in matches), "") for key, named in by_pattern.items()}
        if basis is not None:
            settings["basis"] = None if p in stacked or (p in of_tokens and basis != "columns") else basis
        settings |= embeddings or {} if p in of_tokens else {}
        settings |= {key: named[own[key]] for key, named in values.items() if own[key]}
        settings |= by_pattern["overrides"].get(own["overrides"], {})
        key = (decayed, p in of_tokens, p in stacked, *own.values())
        groups.setdefault(key, {"params": [], **settings})["params"].append(p)
    if unused:
        raise ValueError(_no_match(unused, model))
    if embeddings and not of_tokens:
        raise ValueError(
            f"param_groups: embeddings={embeddings!r}, and the model has no embeddings (nn.Embedding): leave them out, or "
            "give parameters hyperparameters by name (overrides)"
        )
    return list(groups.values())


def _no_match(patterns: set[str], model: nn.Module) -> str:
    names = ", ".join(name for name, _ in list(model.named_parameters())[:4])
    return f"param_groups: {sorted(patterns)} match no trainable parameter; the names are like {names}, …"


def stacks(model: nn.Module) -> set[Tensor]:
    """The parameters that are several matrices in one tensor of three dimensions; those of convolutions are one matrix."""
    convolutions = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
    others = (module for module in model.modules() if not isinstance(module, convolutions))
    return {p for module in others for p in module.parameters(recurse=False) if p.dim() == 3}


def token_matrices(model: nn.Module) -> set[Tensor]:
    """The parameters whose rows stand for tokens: embeddings, and output heads.

    A head is what the model's `get_output_embeddings` gives, which transformers' models have; of others a linear layer that is not inside
    of numbered blocks and whose weight has the shape of some embedding's; without any, one with as many outputs as the embedding of most
    rows has.
    """
    embeddings = [module for module in model.modules() if isinstance(module, nn.Embedding | nn.EmbeddingBag)]
    found, shapes = {module.weight for module in embeddings}, {module.weight.shape for module in embeddings}
    # Within DDP the model is its `module`; the groups must be those that it has alone.
    of_model = (getattr(m, "get_output_embeddings", None) for m in (model, getattr(model, "module", None)))
    if (get := next(filter(callable, of_model), None)) is not None:
        head = getattr(get(), "weight", None)
        return found if head is None else {*found, head}
    linear = [
        module.weight
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and not any(part.isdigit() for part in name.split(".")[:-1])
    ]
    heads = [w for w in linear if w.shape in shapes]
    return {*found, *(heads or [w for w in linear if shapes and w.shape[0] == max(shape[0] for shape in shapes)])}
