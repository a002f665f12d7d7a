"""Anon in transformers' Trainer: one process, DDP, or FSDP2.

    python trainer.py FOLDER
    torchrun --nproc-per-node 2 trainer.py FOLDER [--fsdp]

Called again, it goes on from the last checkpoint.
"""

import os
import sys
from datetime import timedelta

import torch
import toy
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from anon_dist import Anon
from anon_dist.engines import cpu
from anon_dist.optim import param_groups

STEPS, GLOBAL_BATCH = 12, 8


class StopAt(TrainerCallback):
    """Stands for whatever ends a run early."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop |= state.global_step >= self.step


def train(folder, stop_at=STEPS, fsdp=False):
    """Train to the end, or as if interrupted after step `stop_at`."""
    on_cpu = not torch.accelerator.is_available()
    if fsdp and on_cpu:
        cpu.bring_up_processes(timedelta(minutes=1))
    args = TrainingArguments(
        output_dir=folder,
        max_steps=STEPS,
        per_device_train_batch_size=GLOBAL_BATCH // int(os.environ.get("WORLD_SIZE", "1")),
        lr_scheduler_type="cosine",
        warmup_steps=3,
        max_grad_norm=1.0,
        save_steps=5,
        logging_steps=1,
        report_to="none",
        disable_tqdm=True,
        fsdp=fsdp,
        fsdp_config={"transformer_layer_cls_to_wrap": "GPT2Block", "state_dict_type": "SHARDED_STATE_DICT"},
        use_cpu=on_cpu and not fsdp,
        accelerator_config={"use_configured_state": fsdp and on_cpu},
    )
    model = toy.model()
    # The groups go in as `params`: the Trainer's own rule gives every group `args.weight_decay`, whatever `weight_decay` says here, and
    # it does not pass `args.learning_rate` on.
    groups = param_groups(model, weight_decay=0.1, gamma={"*wte*": 0.5})
    hyper = {"params": groups, "lr": 1e-2, "eps": 1e-8, "refresh_ratio": 1.1, "beta3": 0.8}
    trainer = Trainer(
        model, args, train_dataset=toy.Tokens(), optimizer_cls_and_kwargs=(Anon, hyper), callbacks=[StopAt(stop_at)]
    )
    trainer.train(resume_from_checkpoint=get_last_checkpoint(folder) if os.path.isdir(folder) else None)
    losses = [record["loss"] for record in trainer.state.log_history if "loss" in record]
    return trainer.model, trainer.optimizer, trainer.lr_scheduler, losses


if __name__ == "__main__":
    print(train(sys.argv[1], fsdp="--fsdp" in sys.argv)[-1])
