"""Checksums of files, and of tokenizers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import xxhash

READ_BLOCK = 1 << 24


def file_checksum(path: Path, seen: Callable[[memoryview], object] = lambda data: None) -> xxhash.xxh3_64:
    """The hash of a file, which may go on being updated. `seen` is given each piece that is read."""
    digest = xxhash.xxh3_64()
    with path.open("rb") as file:
        while block := file.read(READ_BLOCK):
            digest.update(block)
            seen(memoryview(block))
    return digest


def tokenizer_hash(folder: Path) -> str:
    """Hash of what determines a tokenizer's ids. The other files may differ in ways that mean nothing, such as where they came from."""
    serialized = folder / "tokenizer.json"
    files = [serialized] if serialized.exists() else sorted(p for p in folder.iterdir() if p.is_file())
    digest = xxhash.xxh3_128()
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()
