"""Anon in a loop of one's own under accelerate: one process, or FSDP2 on several.

    python accelerate_fsdp2.py FOLDER
    torchrun --nproc-per-node 2 accelerate_fsdp2.py FOLDER

Called again, it goes on from the last checkpoint.
"""

import os
import sys
from datetime import timedelta
from pathlib import Path

import torch
import toy
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, FullyShardedDataParallelPlugin
from torch.utils.data import DataLoader
from transformers import get_cosine_schedule_with_warmup

from anon_dist import Anon
from anon_dist.engines import cpu
from anon_dist.optim import param_groups

STEPS, SAVE_EVERY, GLOBAL_BATCH = 12, 5, 8


def train(folder, stop_at=STEPS):
    """Train to the end, or as if interrupted after step `stop_at`."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world > 1 and not torch.accelerator.is_available():
        cpu.bring_up_processes(timedelta(minutes=1))
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="TRANSFORMER_BASED_WRAP",
        state_dict_type="SHARDED_STATE_DICT",
        cpu_ram_efficient_loading=False,
    )
    accelerator = Accelerator(
        fsdp_plugin=plugin if world > 1 else None,
        step_scheduler_with_optimizer=False,  # else every step of the schedule is one for each process
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True),  # else a resumed run shuffles anew
    )
    model = toy.model()
    groups = param_groups(model, weight_decay=0.1, gamma={"*wte*": 0.5})
    optimizer = Anon(groups, lr=1e-2, eps=1e-8, refresh_ratio=1.1, beta3=0.8)
    schedule = get_cosine_schedule_with_warmup(optimizer, num_warmup_steps=3, num_training_steps=STEPS)
    data = DataLoader(toy.Tokens(), batch_size=GLOBAL_BATCH // world, shuffle=True)
    model, optimizer, data, schedule = accelerator.prepare(model, optimizer, data, schedule)

    done = 0
    if checkpoints := sorted(Path(folder).glob("step-*[0-9]")):
        accelerator.load_state(str(checkpoints[-1]))
        done = schedule.scheduler.last_epoch
    losses = []
    for batch in accelerator.skip_first_batches(data, done):
        if done == min(stop_at, STEPS):
            break
        loss = model(**batch).loss
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        done += 1
        losses.append(float(accelerator.reduce(loss.detach(), "mean")))
        if done % SAVE_EVERY == 0:
            accelerator.save_state(f"{folder}/step-{done:06}.part")
            accelerator.wait_for_everyone()
            if accelerator.is_main_process:  # complete or absent
                os.rename(f"{folder}/step-{done:06}.part", f"{folder}/step-{done:06}")
    return model, optimizer, schedule, losses


if __name__ == "__main__":
    print(train(sys.argv[1])[-1])
