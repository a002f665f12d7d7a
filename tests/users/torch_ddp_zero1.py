"""Anon with torch alone: DDP, with the optimizer's state spread over the ranks by `ZeroRedundancyOptimizer` (ZeRO stage 1).

    torchrun --nproc-per-node 2 torch_ddp_zero1.py FOLDER

Called again, on as many processes as one likes, it goes on from the last checkpoint.
"""

import os
import sys
from itertools import islice

import torch
import torch.distributed as dist
import toy
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler
from transformers import get_cosine_schedule_with_warmup

from anon_dist import Anon
from anon_dist.optim import param_groups

STEPS, SAVE_EVERY, GLOBAL_BATCH = 12, 5, 8


def train(folder, stop_at=STEPS):
    """Train to the end, or as if interrupted after step `stop_at`."""
    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    if device.type != "cpu":
        torch.accelerator.set_device_index(int(os.environ["LOCAL_RANK"]))
    model = DistributedDataParallel(toy.model().to(device))
    groups = param_groups(model, weight_decay=0.1, gamma={"*wte*": 0.5})
    optimizer = ZeroRedundancyOptimizer(groups, optimizer_class=Anon, lr=1e-2, eps=1e-8, refresh_ratio=1.1, beta3=0.8)
    schedule = get_cosine_schedule_with_warmup(optimizer, num_warmup_steps=3, num_training_steps=STEPS)

    path = os.path.join(folder, "checkpoint.pt")
    if os.path.exists(path):
        saved = torch.load(path, map_location="cpu", weights_only=True)
        model.module.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        optimizer.state.clear()  # torch's wrapper would keep, beside its part of the state, what that was loaded from
        schedule.load_state_dict(saved["schedule"])
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
            optimizer.consolidate_state_dict()  # on every rank; then rank 0 has all of the state
            if dist.get_rank() == 0:
                os.makedirs(folder, exist_ok=True)
                state = {"model": model.module, "optimizer": optimizer, "schedule": schedule}
                torch.save({name: part.state_dict() for name, part in state.items()}, f"{path}.part")
                os.replace(f"{path}.part", path)
    return model, optimizer, schedule, losses


if __name__ == "__main__":
    dist.init_process_group()
    print(train(sys.argv[1])[-1])
    dist.destroy_process_group()
