"""The training loss, taken inside the model's own forward, where sharding engines have its weights at hand.

`attach` gives the forward of a transformers causal LM an argument `targets`, with which it returns losses in place of logits; its output
layer takes the hidden states, and makes losses of them without whole logits (`cross_entropy`). Modules, names and hooks stay as they are.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import MethodType, SimpleNamespace
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.nn import functional as F

from anon_dist.data.samples.packing import IGNORED
from anon_dist.train.config.families import expert_share
from anon_dist.train.config.parsing import ConfigError
from anon_dist.train.loss.cross_entropy import Head, Split, summed_loss, token_losses
from anon_dist.train.loss.documents import ATTRIBUTE, Documents, know_documents

Kind = Literal["auto", "chunked", "torch", "liger", "whole"]
SUMS = ("objective", "cross_entropy", "z", "balance")
"""What a forward pass with targets returns, as sums over tokens."""


@dataclass
class Loss:
    """How a model's losses are computed."""

    kind: Kind
    """Not "auto"."""
    head: Head
    balance: float = 0.0
    """Weight of a mixture of experts' load-balancing loss (transformers' router_aux_loss_coef)."""
    balancing: Callable[..., Any] | None = None
    """transformers' function of that loss. Kept here, since FSDP2 gives the model a class of its own."""
    why_whole: str | None = None
    """Why "auto" came to whole logits."""


class NotUnderstoodError(Exception):
    """What a model does between its output layer and its logits is no scale and no soft cap."""


def attach(model: Any, kind: Kind = "auto", z_loss: float = 0.0, half: bool = False) -> Loss:
    """Have a causal LM's forward take `targets`, in place; before it is wrapped.

    With `targets`, (B, L) int64, of which `packing.IGNORED` count for nothing, it returns float32 (4,): `SUMS`; of these only the
    first has a gradient, and is what to minimise. With `per_token=True` besides, it returns each token's cross-entropy, (B, L) float32,
    without gradient. Without `targets` it returns what it always has. `documents`: those that attention keeps apart (see there).

    Args:
        kind: "chunked": pieces of the logits, by this package; "torch": by torch.nn.functional.linear_cross_entropy; "liger": by Liger's
            kernels; "whole": logits as a whole, as transformers makes them; "auto": chunked, and whole for a model that does more to its
            logits than to scale and to cap them.
        z_loss: weight of logsumexp(logits)².
        half: whether it will be computed in half precision.

    Raises:
        ConfigError: this kind cannot compute this model's loss, or not here; or the model's tokens are not called input_ids.
    """
    if model.main_input_name != "input_ids":
        raise ConfigError(
            f"model: {type(model).__name__} takes its tokens as {model.main_input_name}, not as input_ids, and cannot be trained here; "
            "take another model"
        )
    loss = Loss(kind, Head(z_loss=z_loss), *_balance(model))
    try:
        scale, cap = logits_of(model)
        loss.head = Head(scale, cap, z_loss)
        loss.kind = "chunked" if kind == "auto" else kind
    except NotUnderstoodError as error:
        if kind not in ("auto", "whole"):
            raise ConfigError(f"train.loss is {kind}, and {type(model).__name__} {error}; set it to auto") from None
        loss.kind, loss.why_whole = "whole", f"{type(model).__name__} {error}" if kind == "auto" else None
    _check(loss, half)
    head = model.get_output_embeddings()
    model.anon_dist_loss, head.anon_dist_loss = loss, loss
    model.logits_forward, head.logits_forward = model.forward, head.forward
    know_documents(model)
    model.forward = MethodType(_model_forward, model)
    head.forward = MethodType(_head_forward, head)
    return loss


def _check(loss: Loss, half: bool) -> None:
    if loss.kind == "torch":
        if not hasattr(F, "linear_cross_entropy"):
            raise ConfigError(
                f"train.loss is torch, which needs torch 2.13; this is {torch.__version__}: set it to auto"
            )
        if half:
            raise ConfigError(
                "train.loss is torch, whose loss comes back in half precision from numbers in half precision; set it to auto, or "
                "train.precision to fp32"
            )
        if loss.head.cap is not None or loss.head.z_loss:
            raise ConfigError("train.loss is torch, which has no z-loss and caps no logits; set it to auto")
    if loss.kind == "liger":
        if not torch.cuda.is_available():
            raise ConfigError("train.loss is liger, whose kernels run on GPUs, and there is none here; set it to auto")
        try:
            import liger_kernel.transformers  # noqa: F401
        except ImportError as error:
            raise ConfigError(
                f"train.loss is liger: {error}; pip install 'anon-dist[liger]', or set it to auto"
            ) from None


def _balance(model: Any) -> tuple[float, Callable[..., Any] | None]:
    """Weight of the load-balancing loss, 0 where the model has none, and its function."""
    function = getattr(sys.modules[type(model).__module__], "load_balancing_loss_func", None)
    if getattr(model.config, "output_router_logits", False) and function is None:
        raise ConfigError(
            f"model: output_router_logits asks for a balancing loss, which the code of {type(model).__name__} "
            "has not where it is looked for; remove the key"
        )
    weight = getattr(model, "router_aux_loss_coef", None) or getattr(model.config, "aux_loss_coef", None)
    return (float(weight or 0.0), function) if function is not None else (0.0, None)


def unbalanced(model: Any, loss: Loss) -> str | None:
    """What to say of a mixture of experts whose load nothing balances as it trains; None: something does, or it is none."""
    experts, _ = expert_share(model.config)
    if experts < 2 or loss.balance > 0.0 or not any(".experts." in name for name, _ in model.named_parameters()):
        return None
    if loss.balancing is not None:
        why = "the weight of its load-balancing loss (router_aux_loss_coef) is 0"
        remedy = "set that in its config.json"
    else:
        why = "its code in transformers has no load-balancing loss"
        tensors = (*model.named_buffers(), *model.named_parameters())
        if bias := next((name for name, _ in tensors if name.endswith("e_score_correction_bias")), None):
            why += f", and the bias of its routers ({bias}) is moved by a rule that only its authors' own training has"
        remedy = "take one whose code has the loss (mixtral, qwen3_moe)"
    return (
        f"{model.config.model_type}: nothing balances its {experts} experts: {why}. A few of them may come to get most tokens, and the "
        f"others learn nothing; to train from scratch, {remedy}"
    )


# -- what a model does to its logits ----------------------------------------------------------------------------------


class _Stand:
    """A stand-in for a model, of which some attributes are not its own."""

    def __init__(self, original: Any, changed: dict[str, Any]) -> None:
        self.__dict__.update(changed, original=original)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.original, name)


class _Output(SimpleNamespace):
    """What the model below the output layer returns: hidden states, and None for all else."""

    def __getattr__(self, name: str) -> None:
        return None

    def __getitem__(self, index: int) -> Any:
        return self.last_hidden_state if index == 0 else None


def logits_of(model: Any) -> tuple[float, float | None]:
    """What a causal LM's forward does to the numbers a that its output layer returns: (scale, cap), as of `cross_entropy.Head`.

    Found by running its forward's own code around a stand-in for all that lies below; no weights are used, so it may be on "meta".

    Raises:
        NotUnderstoodError: neither; the message goes on after the model's name.
    """
    head, base = model.get_output_embeddings(), model.base_model
    names = {name: child for name, child in model.named_children() if child is head or child is base}
    if type(head) is not nn.Linear or base is model or len(names) != 2:
        raise NotUnderstoodError("has no plain output layer over its hidden states")
    hidden, given = torch.zeros(1, 1, head.in_features, dtype=torch.float64), list[Any]()
    sample = torch.linspace(-60.0, 60.0, head.out_features, dtype=torch.float64)

    def respond(values: Tensor) -> Tensor:
        """The logits that the model's forward makes of what its output layer returns, both (V,)."""

        def answer(states: Tensor) -> Tensor:
            given.append(states)
            return values.expand(1, 1, -1).clone()

        stubs = {n: answer if child is head else _below for n, child in names.items()}

        with torch.no_grad():
            output = type(model).forward(_Stand(model, stubs), input_ids=torch.zeros(1, 1, dtype=torch.int64))
        return cast(Tensor, output.logits.double().flatten())

    def _below(*args: Any, **kwargs: Any) -> _Output:
        return _Output(last_hidden_state=hidden)

    try:
        small, large = (respond(torch.full_like(sample, x))[0].item() for x in (1e-6, 1e9))
        found = respond(sample)
    except Exception as error:  # whatever its forward finds missing in the stand-ins
        raise NotUnderstoodError(
            f"is built otherwise than the models this was made for ({type(error).__name__})"
        ) from error
    scale = float(f"{small / 1e-6:.9g}")
    cap = None if abs(large - scale * 1e9) <= 1e-5 * abs(large) else large
    if cap is None:
        scale = large / 1e9
    expected = scale * sample if cap is None else cap * torch.tanh(scale * sample / cap)
    passed = all(states.shape == hidden.shape and bool((states == hidden).all()) for states in given)
    if not passed or scale == 0.0 or (found - expected).abs().max() > 1e-5 * expected.abs().max():
        raise NotUnderstoodError("changes its logits by more than a scale and a soft cap")
    return scale, cap


# -- forward passes ---------------------------------------------------------------------------------------------------


def _model_forward(
    model: Any,
    *args: Any,
    targets: Tensor | None = None,
    per_token: bool = False,
    documents: Documents | None = None,
    **inputs: Any,
) -> Any:
    """Of the model; see `attach`."""
    getattr(model, ATTRIBUTE).spans = None if documents is None else documents.spans
    if targets is None:
        return model.logits_forward(*args, **inputs)
    loss: Loss = model.anon_dist_loss
    balanced = loss.balance > 0.0 and not per_token
    if balanced:
        inputs["output_router_logits"] = True
    if loss.kind == "whole":
        output = model.logits_forward(*args, **inputs)
        result = _of_logits(output.logits, targets, loss.head.z_loss, per_token)
    else:
        output = model.base_model(*args, **inputs)
        result = model.get_output_embeddings()(output[0], targets=targets, per_token=per_token)
    return result if per_token else _with_balance(model, result, output, targets, balanced)


def _with_balance(model: Any, sums: Tensor, output: Any, targets: Tensor, balanced: bool) -> Tensor:
    """`SUMS`, of the first three and the load-balancing loss times the number of tokens."""
    if not balanced or not output.router_logits:  # none: no layer of this shape has experts
        return torch.cat([sums, sums.new_zeros(1)])
    function = model.anon_dist_loss.balancing
    balance = function(output.router_logits, model.num_experts, model.num_experts_per_tok, None)
    balance = balance.to(sums) * (targets != IGNORED).sum()
    objective = sums[0] + model.anon_dist_loss.balance * balance
    return torch.stack([objective, sums[1], sums[2], balance.detach()])


def _of_logits(logits: Tensor, targets: Tensor, z_loss: float, per_token: bool) -> Tensor:
    """As `attach` says, from whole logits."""
    logits = logits.flatten(0, 1).float()
    losses = F.cross_entropy(logits, targets.flatten(), reduction="none", ignore_index=IGNORED)
    if per_token:
        return losses.detach().view_as(targets)
    lse = logits.logsumexp(1) if z_loss else logits.detach().logsumexp(1)
    z = torch.where(targets.flatten() != IGNORED, lse.square(), 0.0).sum()
    total = losses.sum()
    return torch.stack([total + z_loss * z, total.detach(), z.detach()])


def _head_forward(head: Any, hidden: Tensor, targets: Tensor | None = None, per_token: bool = False) -> Tensor:
    """Of the output layer: losses, if it is given targets. Under tensor parallelism its inputs and weights are DTensors."""
    if targets is None:
        return cast(Tensor, head.logits_forward(hidden))
    loss: Loss = head.anon_dist_loss
    weight, bias, mesh, split = head.weight, head.bias, None, None
    if isinstance(weight, DTensor):
        hidden, weight, bias, mesh, split = _local(cast(DTensor, hidden), weight, bias)
    flat, wanted = hidden.flatten(0, -2), targets.flatten()
    if per_token:
        result = token_losses(flat, weight, bias, wanted, loss.head, split).view_as(targets)
    elif loss.kind == "chunked":
        result = summed_loss(flat, weight, bias, wanted, loss.head, split)
    elif split is not None:
        raise ConfigError(f"train.loss is {loss.kind}, which tensor parallelism does not split; set it to auto")
    else:
        result = (_by_torch if loss.kind == "torch" else _by_liger)(flat, weight, bias, wanted, loss.head)
    return result if mesh is None else DTensor.from_local(result, mesh, [Replicate()], run_check=False)


def _local(hidden: DTensor, weight: DTensor, bias: DTensor | None) -> tuple[Tensor, Tensor, Tensor | None, Any, Split]:
    """This rank's rows, and where they lie."""
    mesh = weight.device_mesh
    if mesh.ndim != 1 or weight.placements != (Shard(0),):
        raise ConfigError(f"train.loss: an output matrix that is split as {weight.placements} is not supported")
    rows = -(-weight.shape[0] // mesh.size())
    split = Split(mesh.get_group(), mesh.get_local_rank() * rows)
    here = hidden.redistribute(placements=[Replicate()]).to_local(grad_placements=[Partial()])
    return here, weight.to_local(), None if bias is None else bias.to_local(), mesh, split


def _by_torch(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, head: Head) -> Tensor:
    options = nn.LinearCrossEntropyOptions()
    if head.scale != 1.0:
        hidden, bias = hidden * head.scale, None if bias is None else bias * head.scale
    total = F.linear_cross_entropy(
        hidden, weight, targets, linear_bias=bias, reduction="sum", ignore_index=IGNORED, options=options
    )
    return torch.stack([total, total.detach(), total.detach().new_zeros(())])


def _by_liger(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, head: Head) -> Tensor:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    if head.scale != 1.0:
        hidden, bias = hidden * head.scale, None if bias is None else bias * head.scale
    fused = LigerFusedLinearCrossEntropyLoss(
        ignore_index=IGNORED,
        lse_square_scale=head.z_loss,
        reduction="sum",
        softcap=head.cap,
        return_z_loss=True,
        accum_dtype=torch.float32,
    )
    output = fused(weight, hidden, targets, bias)
    weighed = output.z_loss.detach().float()
    z = weighed / head.z_loss if head.z_loss else torch.zeros_like(weighed)
    return torch.stack([output.loss.float(), output.loss.detach().float() - weighed, z])
