"""What tests of checkpoints share."""

import os
from pathlib import Path

import torch


def fill(path: Path, file, source) -> None:
    """Write a laid out file, tensors taken from a dictionary of `Key`."""
    with path.open("wb") as out:
        out.truncate(file.size)
        for offset, data in file.literals:
            os.pwrite(out.fileno(), data, offset)
        for region in file.regions:
            piece = source[region.part.key].flatten()[region.part.start : region.part.stop].to(region.dtype)
            os.pwrite(out.fileno(), piece.contiguous().view(torch.uint8).numpy().tobytes(), region.offset)
