"""Text to training batches: tokenised once into shards, read in an order that one integer can resume.

`prepare` makes a folder; `TokenShards`, `SampleOrder` and `BatchLoader` read it. Importing this package imports neither torch nor numpy:
its modules are imported when something of theirs is asked for.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from anon_dist.data.config import PrepareConfig
    from anon_dist.data.errors import DataError, PreparationError, ShardError, SourceError, TokenizerError
    from anon_dist.data.preparation.prepare import prepare
    from anon_dist.data.preparation.tokenizer import Tokenizer
    from anon_dist.data.samples.loader import BatchLoader
    from anon_dist.data.samples.mixture import Mixture
    from anon_dist.data.samples.order import SampleOrder
    from anon_dist.data.samples.packing import Packing, is_packed, pack
    from anon_dist.data.samples.stream import Source, Stream, make_source
    from anon_dist.data.stored.index import Index, ShardInfo, SplitInfo, Statistics
    from anon_dist.data.stored.shards import TokenShards, verify_checksums

__all__ = [
    "BatchLoader",
    "DataError",
    "Index",
    "Mixture",
    "Packing",
    "PreparationError",
    "PrepareConfig",
    "SampleOrder",
    "ShardError",
    "ShardInfo",
    "Source",
    "SourceError",
    "SplitInfo",
    "Statistics",
    "Stream",
    "TokenShards",
    "Tokenizer",
    "TokenizerError",
    "is_packed",
    "make_source",
    "pack",
    "prepare",
    "verify_checksums",
]
_MODULES = {
    "config": ("PrepareConfig",),
    "errors": ("DataError", "PreparationError", "ShardError", "SourceError", "TokenizerError"),
    "stored.index": ("Index", "ShardInfo", "SplitInfo", "Statistics"),
    "samples.loader": ("BatchLoader",),
    "samples.mixture": ("Mixture",),
    "samples.order": ("SampleOrder",),
    "samples.packing": ("Packing", "is_packed", "pack"),
    "preparation.prepare": ("prepare",),
    "stored.shards": ("TokenShards", "verify_checksums"),
    "samples.stream": ("Source", "Stream", "make_source"),
    "preparation.tokenizer": ("Tokenizer",),
}
_HOMES = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
