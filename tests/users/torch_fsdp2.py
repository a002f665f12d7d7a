"""Anon with torch alone: `fully_shard`, and sharded checkpoints through `torch.distributed.checkpoint`.

    torchrun --nproc-per-node 2 torch_fsdp2.py FOLDER

Called again, on as many processes as one likes, it goes on from the last checkpoint.
"""

import os
import sys
from itertools import islice
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import toy
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, DistributedSampler
from transformers import get_cosine_schedule_with_warmup

from anon_dist import Anon
from anon_dist.optim import param_groups

STEPS, SAVE_EVERY, GLOBAL_BATCH = 12, 5, 8


class Run:
    """What a checkpoint holds, as `torch.distributed.checkpoint` asks for it."""

    def __init__(self, model, optimizer, schedule):
        self.model, self.optimizer, self.schedule = model, optimizer, schedule

    def state_dict(self):
        model, optimizer = get_state_dict(self.model, self.optimizer)
        return {"model": model, "optimizer": optimizer, "schedule": self.schedule.state_dict()}

    def load_state_dict(self, state):
        set_state_dict(self.model, self.optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])


def train(folder, stop_at=STEPS):
    """Train to the end, or as if interrupted after step `stop_at`."""
    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    if device.type != "cpu":
        torch.accelerator.set_device_index(int(os.environ["LOCAL_RANK"]))
    model = toy.model().to(device)
    for block in model.transformer.h:
        fully_shard(block)
    fully_shard(model)
    # After fully_shard, which makes new parameters: an optimizer of the old ones would train nothing.
    groups = param_groups(model, weight_decay=0.1, gamma={"*wte*": 0.5})
    optimizer = Anon(groups, lr=1e-2, eps=1e-8, refresh_ratio=1.1, beta3=0.8)
    schedule = get_cosine_schedule_with_warmup(optimizer, num_warmup_steps=3, num_training_steps=STEPS)

    run = Run(model, optimizer, schedule)
    if complete := sorted(Path(folder).glob("*/.metadata")):  # written last
        dcp.load({"run": run}, checkpoint_id=complete[-1].parent)
    done = schedule.last_epoch
    data = toy.Tokens()
    loader = DataLoader(data, batch_size=GLOBAL_BATCH // dist.get_world_size(), sampler=DistributedSampler(data))
    losses = []
    for batch in islice(loader, done, min(stop_at, STEPS)):
        loss = model(**{key: value.to(device) for key, value in batch.items()}).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        done += 1
        mean = loss.detach() / dist.get_world_size()
        dist.all_reduce(mean)
        losses.append(float(mean))
        if done % SAVE_EVERY == 0:
            dcp.save({"run": run}, checkpoint_id=f"{folder}/step-{done:06}")
    return model, optimizer, schedule, losses


if __name__ == "__main__":
    dist.init_process_group()
    print(train(sys.argv[1])[-1])
    dist.destroy_process_group()
