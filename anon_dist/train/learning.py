"""What the host learns of a step when the device is past it: whether it was taken, whether it was a spike, and what then."""

from __future__ import annotations

import logging
import math
import time

from anon_dist.train.config.errors import DIVERGED, SkippedError
from anon_dist.train.reports.metrics import Record
from anon_dist.train.rewind import rewind
from anon_dist.train.running import Run

log = logging.getLogger(__name__)


def learn(run: Run) -> None:
    """Know whether the last step was taken; a step whose gradient was not finite is none, nor is a spike, unless it is only recorded. Waits
    for the device, if that is not past it.

    Every rank has the same norm and loss, so a step is skipped on all ranks or none, and the optimizer's step count stays.

    Raises:
        SkippedError: too many steps in a row were none.
    """
    if run.norm is None:
        return
    begun = time.perf_counter()
    norm, run.norm = run.norm.value(), None
    found, action = run.spikes.read(), run.config.train.on_spike
    run.waited += time.perf_counter() - begun
    spike = found is not None and found.spike
    none = not math.isfinite(norm) or (spike and action != "record")
    run.skipped = run.skipped + 1 if none else 0
    run.skip_is_news |= none or spike
    if (none or spike) and run.accelerator.is_main_process:
        why = found if spike else f"the gradient norm is {norm}"
        log.warning("step %d %s: %s", run.step, "skipped" if none else "is a spike, and was taken", why)
    if run.spikes.pending is None and run.skipped > run.config.train.max_skipped:
        why = DIVERGED if not math.isfinite(norm) else f"steps in a row were spikes (the last: {found})"
        raise SkippedError(
            f"{run.skipped} {why}; the last checkpoint is {run.checkpoints.last()}. Lower optim.lr, "
            "lengthen the warm-up, or set optim.update_clip and train.grad_clip"
        )


def back(run: Run) -> Record | None:
    """Go back, if a spike that the host knows of asks for it; what to record then."""
    spike, run.spikes.pending = run.spikes.pending, None
    if spike is None:
        return None
    with run.pulse.phase("going back", run.step, long=True):
        return rewind(run, spike)
