"""torch's distributed checkpoints (DCP): written and read by the ranks of a run, and as files, without any."""
