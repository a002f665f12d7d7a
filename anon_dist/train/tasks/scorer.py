"""A model in training, as lm-eval's Hugging Face model: all ranks score together.

Imported where lm-eval is installed (see `harness`), and only there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from lm_eval.models.huggingface import HFLM
from torch import Tensor
from transformers import PretrainedConfig

from anon_dist.train.config.errors import HarnessError

Answer = tuple[float, bool]


class Engine:
    """What lm-eval's model asks of a transformers model: no module, whose `eval()` and `tie_weights()` it would call."""

    def __init__(self, logits: Callable[[Tensor], Tensor], config: PretrainedConfig, device: torch.device) -> None:
        self.logits, self.config, self.device = logits, config, device


class Scorer(HFLM):
    """Scores requests by `logits`, a share on each reader.

    lm-eval itself would give ranks documents of their own. Then the numbers of their forward passes differ (it groups requests that
    have their context in common), which sharded models, whose every forward is collective, do not survive; and a rank without a document
    fails. So here each rank has all requests, as if it were alone, and they are shared out below, in equal numbers: each rank takes part
    in every forward pass, and ends with all answers.

    Args:
        logits: (B, L) int64 token ids → (B, L, V), on `device`. Every rank calls it equally often.
        batch: sequences that a rank takes at once.
        reader: which of the `readers` shares of the requests this rank scores; several ranks may have the same.
    """

    def __init__(
        self,
        logits: Callable[[Tensor], Tensor],
        config: PretrainedConfig,
        device: torch.device,
        tokenizer: Any,
        batch: int,
        reader: int,
        readers: int,
    ) -> None:
        engine: Any = Engine(logits, config, device)
        # The cache of logits would make one request of several, on one rank more than on another.
        super().__init__(engine, backend="causal", tokenizer=tokenizer, batch_size=batch, logits_cache=False)
        self._logits, self._batch, self._reader, self._readers = logits, batch, reader, readers

    def _model_call(self, inps: Tensor, attn_mask: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
        with torch.no_grad():
            return self._logits(inps).float()

    def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> list[Answer]:
        answers: list[Answer] = super().loglikelihood(requests, disable_tqdm=True)
        return answers

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        self.batch_size_per_gpu = self._batch * self._readers  # as many windows at once as all readers take
        sums: list[float] = super().loglikelihood_rolling(requests, disable_tqdm=True)
        return sums

    def _loglikelihood_tokens(
        self, requests: Sequence[Any], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[Answer]:
        self.batch_size_per_gpu = self._batch
        by_length = sorted(range(len(requests)), key=lambda i: -len(requests[i][1]) - len(requests[i][2]))
        rounds = -(-len(requests) // self._readers)
        share = [min(i * self._readers + self._reader, len(requests) - 1) for i in range(rounds)]
        answers = super()._loglikelihood_tokens([requests[by_length[i]] for i in share], True, override_bs)
        found = dict(zip(share, answers, strict=True))
        if self._readers > 1:
            shares: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(shares, found)
            for other in shares:
                found |= other
        places = {request: place for place, request in enumerate(by_length)}
        return [found[places[i]] for i in range(len(requests))]

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        raise HarnessError(f"{requests[0].task_name} has the model write text, which is not done while it trains")
