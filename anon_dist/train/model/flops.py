"""Model FLOPs utilisation (MFU): what a token costs by count, and what a device could do at its best.

mfu = tokens per second · `flops_per_token` / (devices · `peak_flops`)
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel

from anon_dist.train.config.families import expert_share, window_of


def flops_per_token(model: PreTrainedModel, seq_len: int) -> float:
    """Floating-point operations that one token of a training step costs, forward and backward.

    6 for each parameter that multiplies (all but embedding look-ups; of experts those that a token passes), and 12 · heads · head size ·
    tokens attended to for each layer's attention, as in PaLM's appendix B (arXiv 2204.02311), where no causality is counted.
    """
    config: Any = model.config
    experts, share = expert_share(config)
    multiplied = 0.0
    for name, p in model.named_parameters():
        multiplied += p.numel() * (share if experts and p.dim() == 3 and ".experts." in name else 1.0)
    embedding = model.get_input_embeddings().weight
    output = model.get_output_embeddings()
    if output is None or output.weight is not embedding:
        multiplied -= embedding.numel()
    if getattr(config, "model_type", "") == "gpt2":
        multiplied -= config.n_positions * config.n_embd
    count = getattr(config, "num_attention_heads", None)
    if (
        not isinstance(count, int) or not count
    ):  # layers that differ, or none that attend: their products are not counted
        return 6.0 * multiplied
    heads = count * (getattr(config, "head_dim", None) or config.hidden_size // count)
    windows = (window_of(config, layer) for layer in range(config.num_hidden_layers))
    seen = sum(min(seq_len, window or seq_len) for window in windows)
    return float(6.0 * multiplied + 12.0 * heads * seen)


PEAK_BF16_FLOPS = {
    "GB300": 2.5e15,
    "GB200": 2.5e15,
    "B300": 2.25e15,
    "B200": 2.25e15,
    "GH200": 989e12,
    "H200 NVL": 835e12,
    "H200": 989e12,
    "H100 NVL": 835e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "A10G": 70e12,
    "RTX 5090": 209.5e12,
    "RTX 4090": 165.2e12,
    "V100": 125e12,
    "T4": 65e12,
    "MI325X": 1307.4e12,
    "MI300X": 1307.4e12,
}
"""By a part of the device's name, the first that is in it: multiplications and additions of matrices per second in bfloat16 (V100 and T4:
float16) without sparsity, summed in float32, from the vendors' data sheets, which mostly print twice as much, with sparsity."""


def peak_flops(device: torch.device) -> float | None:
    """The device's peak in bfloat16, whatever it computes in; None where the table does not have it."""
    return peak_of(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


def peak_of(name: str) -> float | None:
    """The same, by the name that torch gives a device."""
    return next((peak for key, peak in PEAK_BF16_FLOPS.items() if key in name), None)
