"""The container of `torch.save`, laid out before its contents exist: a zip file of stored records, each aligned to 64 bytes."""

from __future__ import annotations

import struct
import zlib

_ALIGNMENT = 64
_LIMIT = 0xFFFFFFFF
_FLAGS, _VERSION = 0x0808, 0  # UTF-8 names, sizes in a descriptor after the data; as torch writes them


class StoredZip:
    """Records of known sizes, one after the other; byte for byte where torch's writer puts them.

    torch does not check a record's CRC. Records filled later get 0 for theirs.

    Attributes:
        literals: (offset, bytes) of all that is known: headers, literal records, directory.
        end: where the next record's header goes; after `close`, the size of the file.
    """

    def __init__(self, folder: str = "archive") -> None:
        self.literals: list[tuple[int, bytes]] = []
        self.end = 0
        self._folder = folder
        self._directory: list[bytes] = []

    def add(self, name: str, data: bytes) -> int:
        """A literal record; where its data begins."""
        start = self.reserve(name, len(data), zlib.crc32(data))
        if data:
            self.literals.append((start, data))
        return start

    def reserve(self, name: str, size: int, crc: int = 0) -> int:
        """A record of `size` bytes to be filled by others; where its data begins."""
        path, header = f"{self._folder}/{name}".encode(), self.end
        large, far = size >= _LIMIT, header >= _LIMIT
        wide = b""
        if large or far:
            fields = [size, size] * large + [header] * far
            wide = struct.pack(f"<HH{len(fields)}Q", 1, 8 * len(fields), *fields)
        begin = header + 30 + len(path) + len(wide) + 4
        padding = -begin % _ALIGNMENT
        extra = wide + struct.pack("<2sH", b"FB", padding) + b"Z" * padding
        local = struct.pack("<4s5H3I2H", b"PK\3\4", 0, _FLAGS, 0, 0, 0, 0, 0, 0, len(path), len(extra))
        self.literals.append((header, local + path + extra))
        start = begin + padding
        descriptor = b""
        if size:
            descriptor = struct.pack("<4sI2Q" if wide else "<4sI2I", b"PK\7\x08", crc, size, size)
            self.literals.append((start + size, descriptor))
        self.end = start + size + len(descriptor)
        self._directory.append(_entry(path, crc, size, header, wide))
        return start

    def close(self) -> None:
        """Add the directory; no more records."""
        directory, count = b"".join(self._directory), len(self._directory)
        at, length = self.end, len(directory)
        wide = struct.pack("<4sQ2H2I4Q", b"PK\6\6", 44, 0x031E, 45, 0, 0, count, count, length, at)
        locator = struct.pack("<4sIQI", b"PK\6\7", 0, at + length, 1)
        few = min(count, 0xFFFF)
        short = struct.pack(
            "<4s4H2IH", b"PK\5\6", 0, 0, few, few, min(length, _LIMIT), min(at, _LIMIT), 0
        )  # limits refer to the wide one
        tail = directory + wide + locator + short
        self.literals.append((at, tail))
        self.end = at + len(tail)


def _entry(path: bytes, crc: int, size: int, header: int, wide: bytes) -> bytes:
    """A record's line in the directory."""
    short, at = min(size, _LIMIT), min(header, _LIMIT)
    fields = (0, _VERSION, _FLAGS, 0, 0, 0, crc, short, short, len(path), len(wide), 0, 0, 0, 0, at)
    return struct.pack("<4s6H3I5H2I", b"PK\1\2", *fields) + path + wide
