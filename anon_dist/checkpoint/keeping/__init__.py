"""The checkpoints of a run: which are kept, copies in host memory, copies in other places."""
