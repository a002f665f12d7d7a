"""A small training with DeepSpeed as its users write one: ZeRO-3, AdamW, a checkpoint at the end.

torchrun --nproc-per-node 2 deepspeed_adamw.py FOLDER
"""

import os
import sys

import deepspeed
import torch
import torch.distributed as dist
from transformers import GPT2Config, GPT2LMHeadModel

hyper = {"lr": 1e-3, "betas": (0.9, 0.95), "torch_adam": True}
config = {
    "train_batch_size": 8,
    "gradient_clipping": 1.0,
    "zero_optimization": {"stage": 3},
    "optimizer": {"type": "AdamW", "params": hyper},
}


def main(folder):
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=64, n_head=2, n_positions=64, vocab_size=512))
    engine, *_ = deepspeed.initialize(model=model, config=config, model_parameters=model.parameters())
    for _ in range(10):
        tokens = torch.randint(0, 512, (8 // dist.get_world_size(), 64), device=engine.device)
        loss = engine(input_ids=tokens, labels=tokens).loss
        engine.backward(loss)
        engine.step()
    engine.save_checkpoint(folder)
    if dist.get_rank() == 0:
        print(f"loss {loss.item():.3f}, {type(engine.optimizer.optimizer).__name__}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
    os._exit(0)  # where gloo, seldom, aborts a process that has done its work
