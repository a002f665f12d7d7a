"""DeepSpeed's checkpoints: stages 0 to 3 and universal, read and written without DeepSpeed."""

from anon_dist.checkpoint.zero.formats import FORMATS, ZeroFormat

__all__ = ["FORMATS", "ZeroFormat"]
