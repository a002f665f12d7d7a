"""`anon-dist data prepare | index | merge | inspect | verify`.

What does the work is imported once the options are known.
"""

from __future__ import annotations

from typing import Any

from anon_dist.arguments import parse
from anon_dist.data.config import IndexConfig, InspectConfig, MergeConfig, PrepareConfig, VerifyConfig
from anon_dist.data.errors import DataError
from anon_dist.named import need_bare, need_data, need_room
from anon_dist.usage import ending

COMMANDS: dict[str, Any] = {
    "prepare": PrepareConfig,
    "index": IndexConfig,
    "merge": MergeConfig,
    "inspect": InspectConfig,
    "verify": VerifyConfig,
}
"""Each command's options."""
_BARE = {"inspect": "--folder", "index": "--source"}
"""Of those that take a name without an option, the option that one may guess."""


def run(command: str, args: list[str]) -> None:
    """Run one of `COMMANDS`; one line and an exit code of `anon_dist.exits` if something is wrong."""
    actions: dict[str, Any] = {
        "prepare": _prepare,
        "index": _index,
        "merge": _merge,
        "inspect": _inspect,
        "verify": _verify,
    }
    name = f"anon-dist data {command}"
    with ending(DataError, OSError):
        if command in _BARE:
            need_bare(args, _BARE[command], name)
        config = parse(COMMANDS[command], args, name)
        actions[command](config)


def _prepare(config: PrepareConfig) -> None:
    need_room(config.out, "--out")
    from anon_dist.data.preparation.prepare import prepare

    prepare(config)


def _index(config: IndexConfig) -> None:
    need_room(config.out.parent, "--out")
    from anon_dist.data.preparation.indexing import index_tokens

    index_tokens(config)


def _merge(config: MergeConfig) -> None:
    need_room(config.out, "--out")
    from anon_dist.data.preparation.merge import merge

    workers = max(1, config.workers)
    merge(config.parts, config.out, check=config.verify, ignore_times=config.ignore_times, workers=workers)


def _inspect(config: InspectConfig) -> None:
    config.check()
    from anon_dist.data.inspection import inspect

    inspect(config)


def _verify(config: VerifyConfig) -> None:
    need_data(config.folder)
    from anon_dist.data.verify import verify

    verify(config.folder, max(1, config.workers))
