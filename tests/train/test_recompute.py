"""Recomputation of activations: the same bits, less memory, and as much more work as it says."""

import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from anon_dist.train.config.parsing import ModelConfig
from anon_dist.train.model.build import blocks, build_model
from anon_dist.train.model.recompute import recompute

TOKENS = torch.arange(256).view(2, 128) % 100


class Live(TorchDispatchMode):
    """Bytes of storages that operations have made and that still live."""

    def __init__(self):
        super().__init__()
        self.made = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor):
                storage = x.untyped_storage()
                self.made[storage._cdata] = (weakref.ref(storage), storage.nbytes())
        return out

    def bytes(self):
        return sum(size for ref, size in self.made.values() if ref() is not None)


def step(family, how, **changes):
    model = build_model(
        ModelConfig(family=family, layers=3, width=64, heads=4, context=128, **changes), 100, 0, 128, seed=3
    )
    recompute(blocks(model), how)
    with FlopCounterMode(display=False) as flops:
        with Live() as live:
            loss = model(input_ids=TOKENS).logits.float().logsumexp(-1).mean()
            kept = live.bytes()
        loss.backward()
    return loss.detach(), [p.grad for p in model.parameters()], kept, flops.get_total_flops()


@pytest.mark.parametrize(
    ("family", "changes"), [("gpt2", {"dropout": 0.1}), ("qwen3", {"kv_heads": 2}), ("mixtral", {"experts": 4})]
)
def test_recomputed_activations_change_nothing_but_memory_and_work(family, changes):
    runs = {}
    for how in ("none", "full", "selective"):
        torch.manual_seed(1)  # dropout's
        runs[how] = step(family, how, **changes)
    for loss, gradients, *_ in runs.values():
        assert torch.equal(loss, runs["none"][0])
        for ours, theirs in zip(gradients, runs["none"][1], strict=True):
            assert torch.equal(ours, theirs)
    kept, work = ([run[i] for run in runs.values()] for i in (2, 3))
    assert kept[1] < 0.9 * kept[2] < 0.5 * kept[0]
    assert work[0] < work[2] < work[1]
