"""torch's loading of distributed checkpoints, with what it reads files by replaced: checked, and without running code.

torch's own reader unpickles `.metadata` and every value that is no tensor.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from torch.distributed._shard._utils import narrow_tensor_by_index
from torch.distributed.checkpoint._traverse import set_element
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem
from torch.futures import Future

from anon_dist.checkpoint.dcp.read import DcpFiles
from anon_dist.checkpoint.errors import DamagedCheckpoint
from anon_dist.checkpoint.torchfiles.mapped import copy_verified


class Reader(FileSystemReader):
    """Reads a folder as `FileSystemReader` does, by mapped files.

    Raises:
        DamagedCheckpoint: `.metadata` cannot be read.
        CheckpointError: it asks for more than its own classes, or for files elsewhere.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._files = DcpFiles(folder)

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """See torch's."""
        meta: Metadata = self._files.meta
        return meta

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """See torch's. What a rank asks for of a tensor is checked as it is copied, a value that is no tensor before it is read."""
        for item in plan.items:
            index = item.storage_index
            info = self._files.place(index.fqn, tuple(index.offset or ()))
            if item.type == LoadItemType.BYTE_IO:
                planner.load_bytes(item, self._files.value(info))
                continue
            source = self._files.tensor(index.fqn, info)
            source = narrow_tensor_by_index(source, item.storage_offsets, item.lengths)
            target = planner.resolve_tensor(item).detach()
            if target.size() != source.size():
                raise DamagedCheckpoint(
                    f"{self.path}: {index.fqn} has shape {tuple(source.shape)}, wanted {tuple(target.shape)}"
                )
            copy_verified(target, source)
            planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done


class Planner(DefaultLoadPlanner):
    """torch's, which takes values that have been read."""

    def load_bytes(self, read_item: ReadItem, value: Any) -> None:
        """See torch's."""
        set_element(self.original_state_dict, self.mappings[read_item.dest_index.fqn], copy.deepcopy(value))
