"""Text to training batches: tokenised once into memory-mapped shards, read in an order that one integer can resume.

`prepare` makes a folder; `TokenShards`, `SampleOrder` and `BatchLoader` read it.
"""

from anon_dist.data.errors import DataError, PreparationError, ShardError, SourceError, TokenizerError
from anon_dist.data.index import Index, ShardInfo, SplitInfo, Statistics
from anon_dist.data.loader import BatchLoader
from anon_dist.data.order import SampleOrder
from anon_dist.data.prepare import PrepareConfig, prepare
from anon_dist.data.shards import TokenShards, verify_checksums
from anon_dist.data.tokenizer import Tokenizer

__all__ = [
    "BatchLoader",
    "DataError",
    "Index",
    "PreparationError",
    "PrepareConfig",
    "SampleOrder",
    "ShardError",
    "ShardInfo",
    "SourceError",
    "SplitInfo",
    "Statistics",
    "TokenShards",
    "Tokenizer",
    "TokenizerError",
    "prepare",
    "verify_checksums",
]
