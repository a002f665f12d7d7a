"""Context parallelism: neighbouring ranks share each sequence, a part each; attention gathers keys and values of all of it.

So that causal attention is as much work on every rank, a sequence of n ranks is cut into 2n pieces, and rank r has the pieces r and
2n − 1 − r. Keys and values are gathered whole, for one layer at a time (as for Llama 3, arXiv 2407.21783, section 3.3.2); their gradients
are summed back. torch's own context parallelism, which accelerate offers, does this inside of attention kernels of GPUs only.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as collectives
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.attention.bias import CausalBias, causal_lower_right
from torch.nn.functional import scaled_dot_product_attention

from anon_dist.engines.errors import EngineError

ATTENTION = "sdpa_of_ranks"
"""What transformers calls the attention of this module."""

KINDS = ("gpt2", "llama", "qwen3", "olmo2", "mixtral")
"""Model types that are tested with it: tokens meet in causal attention over everything before, and nowhere else."""


class ContextParallel:
    """This rank's place among the `ranks` that share its sequences. Every rank must make one.

    Args:
        ranks: that share a sequence; they are neighbours.
        device: whose process groups to use.
    """

    def __init__(self, ranks: int, device: torch.device) -> None:
        mesh = init_device_mesh(
            device.type, (dist.get_world_size() // ranks, ranks), mesh_dim_names=("data", "context")
        )
        self.ranks, self.rank, self._group = ranks, mesh.get_local_rank("context"), mesh.get_group("context")
        self._own = (self.rank, 2 * ranks - 1 - self.rank)
        self._biases: dict[int, CausalBias] = {}

    def pieces(self, tokens: Tensor) -> Tensor:
        """This rank's two pieces of each sequence, with the token after: (B, L + 1) → (2 B, L / 2n + 1), first pieces first."""
        size = (tokens.shape[1] - 1) // (2 * self.ranks)
        return torch.cat([tokens[:, piece * size : (piece + 1) * size + 1] for piece in self._own])

    def attach(self, model: nn.Module) -> None:
        """Have the model compute on pieces: positions are those in the sequence, and attention reaches over the ranks.

        Raises:
            EngineError: its tokens meet in other ways too, or its dropout would differ from one process's.
        """
        from transformers import AttentionInterface

        config: Any = model.config
        others = set(getattr(config, "layer_types", None) or ()) - {"full_attention"}
        if config.model_type not in KINDS or others or getattr(config, "sliding_window", None) is not None:
            raise EngineError(
                f"train.context_parallel splits sequences of {', '.join(KINDS)} whose layers attend to everything before, and this model "
                f"is a {type(model).__name__} ({config.model_type}); set it to 1"
            )
        if max(getattr(config, "attn_pdrop", 0.0), getattr(config, "attention_dropout", 0.0)):
            raise EngineError("train.context_parallel has no dropout of attention; set model.dropout to 0")
        AttentionInterface.register(ATTENTION, self._attention)
        config._attn_implementation = ATTENTION
        model.register_forward_pre_hook(self._positions, with_kwargs=True)

    def _positions(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        if kwargs.get("attention_mask") is not None or kwargs.get("position_ids") is not None:
            raise EngineError(
                "train.context_parallel has no masks and positions of documents; set data.mask_documents to false"
            )
        rows, size = kwargs["input_ids"].shape
        # Made here: torch makes no such bias inside of a block whose operations are looked at (selective recomputation).
        self._biases = {piece: causal_lower_right(size, (piece + 1) * size) for piece in self._own}
        first = torch.arange(size, device=kwargs["input_ids"].device)
        both = torch.stack([first + piece * size for piece in self._own])
        return args, {**kwargs, "position_ids": both.repeat_interleave(rows // 2, 0)}

    def _attention(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """transformers' attention of (2 B, heads, L / 2n, head size); the keys and values may have fewer heads."""
        query, key, value = _as_attention_takes_them(query, key, value)
        keys, values = self._whole(key), self._whole(value)
        size, grouped = query.shape[2], query.shape[1] != key.shape[1]
        found = []
        for rows, piece in zip(query.chunk(2), self._own, strict=True):
            seen = (piece + 1) * size
            found.append(
                scaled_dot_product_attention(
                    rows,
                    keys[:, :, :seen],
                    values[:, :, :seen],
                    attn_mask=self._biases[piece],
                    scale=scaling,
                    enable_gqa=grouped,
                )
            )
        return torch.cat(found).transpose(1, 2).contiguous(), None

    def _whole(self, own: Tensor) -> Tensor:
        """All pieces of the sequences, in their order: (2 B, heads, L / 2n, size) → (B, heads, L, size)."""
        gathered = _gather(own.contiguous(), self._group).unflatten(0, (self.ranks, 2, -1))
        pieces = [gathered[rank, 0] for rank in range(self.ranks)]
        pieces += [gathered[rank, 1] for rank in reversed(range(self.ranks))]
        return torch.cat(pieces, dim=2)


def _as_attention_takes_them(*tensors: Tensor) -> tuple[Tensor, ...]:
    """In the dtype of autocast, into which it casts what its own attention is given, and not what a bias stands beside."""
    device = tensors[0].device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else tensors[-1].dtype
    return tuple(t.to(dtype) for t in tensors)


def _gather(own: Tensor, group: Any) -> Tensor:
    """Of all ranks, along the first dimension; its gradient is summed back."""
    gather: Any = getattr(collectives, "all_gather_single_autograd", None)  # from torch 2.13 on
    if gather is None:
        gather = collectives.all_gather_tensor_autograd
    found: Tensor = gather(own, 0, group)
    return found
