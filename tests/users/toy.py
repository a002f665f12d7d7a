"""A model and data small enough for a test: what stands here for a user's own."""

import torch
from torch.utils.data import Dataset
from transformers import GPT2Config, GPT2LMHeadModel

VOCABULARY, LENGTH = 101, 16


def model() -> GPT2LMHeadModel:
    """A small GPT-2, the same on every rank."""
    torch.manual_seed(0)
    shape = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": LENGTH, "vocab_size": VOCABULARY}
    quiet = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "use_cache": False}
    return GPT2LMHeadModel(GPT2Config(**shape, **quiet, bos_token_id=0, eos_token_id=0)).train()


class Tokens(Dataset):
    """Sequences in which each token follows from the one before, mostly."""

    def __len__(self) -> int:
        return 128

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(index)
        noise = torch.randint(0, 3, (LENGTH,), generator=generator)
        start = torch.randint(0, VOCABULARY, (1,), generator=generator)
        tokens = (start + (5 + noise).cumsum(0)) % VOCABULARY
        labels = tokens.clone()
        labels[0] = -100  # it is never predicted, and the Trainer's average would count it
        return {"input_ids": tokens, "labels": labels}
