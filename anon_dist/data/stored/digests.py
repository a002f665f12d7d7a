"""Checksums of files, and of tokenizers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import xxhash

READ_BLOCK = 1 << 24


def file_checksum(
    path: Path, seen: Callable[[memoryview], object] = lambda data: None, start: int = 0, size: int | None = None
) -> xxhash.xxh3_64:
    """The hash of a file, or of `size` bytes of it from `start` on, which may go on being updated. `seen` is given each piece that is
    read."""
    digest = xxhash.xxh3_64()
    left = path.stat().st_size - start if size is None else size
    with path.open("rb") as file:
        file.seek(start)
        while block := file.read(min(READ_BLOCK, left)):
            digest.update(block)
            seen(memoryview(block))
            left -= len(block)
    return digest


def tokenizer_hash(folder: Path) -> str:
    """Hash of what determines a tokenizer's ids. The other files may differ in ways that mean nothing, such as where they came from."""
    serialized = folder / "tokenizer.json"
    files = [serialized] if serialized.exists() else sorted(p for p in folder.iterdir() if p.is_file())
    digest = xxhash.xxh3_128()
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()
