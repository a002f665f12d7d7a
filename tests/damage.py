"""Checkpoints damaged, and filled with code, as tests on one rank and on several want it."""

import contextlib
import io
import json
import pickle
import re
import zipfile
from pathlib import Path

import torch
import torch.distributed as dist


def first() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0


def together() -> None:
    if dist.is_initialized():
        dist.barrier()


@contextlib.contextmanager
def altered(path: Path, how, *args):
    """A file to which `how(path, *args)` has been done, by the first rank; as it was afterwards."""
    together()
    before = path.read_bytes() if first() else b""
    if first():
        how(path, *args)
    together()
    try:
        yield
    finally:
        together()
        if first():
            path.write_bytes(before)
        together()


def flip(path: Path, at: float = 0.6) -> None:
    """One bit of the byte at a share of the length."""
    data = bytearray(path.read_bytes())
    data[int(at * len(data))] ^= 4
    path.write_bytes(data)


@contextlib.contextmanager
def unsealed(checkpoint: Path):
    """A checkpoint as it would be without checksums, which whoever writes a file to run code would see to."""

    def strip(path):
        content = json.loads(path.read_text())
        del content["xxh3"]
        path.write_text(json.dumps(content))

    with altered(checkpoint / "trainer.json", strip), altered(checkpoint / "checksums.json", Path.unlink):
        yield


def refused(error: type[Exception], pattern: str, action, *args) -> None:
    """`action(*args)` raises this error, in one line that matches."""
    try:
        action(*args)
    except error as caught:
        if not re.search(pattern, str(caught)) or "\n" in str(caught):
            raise AssertionError(f"{pattern!r} is not how it was refused: {caught}") from caught
    else:
        raise AssertionError(f"no {error.__name__}: {pattern}")


# -- code -------------------------------------------------------------------------------------------------------------


def _text(value: str) -> bytes:
    data = value.encode()
    return b"X" + len(data).to_bytes(4, "little") + data


def _stack_global(module: str, name: str) -> bytes:
    return _text(module) + _text(name) + b"\x93"


def _global(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def _nested(mark: Path) -> bytes:
    inner = io.BytesIO()
    torch.save(1, inner)
    evil = b"\x80\x02" + _global("os", "mkdir") + _text(str(mark)) + b"\x85R."
    data = _replaced(inner.getvalue(), evil)
    return (
        b"\x80\x03"
        + _global("torch.storage", "_load_from_bytes")
        + b"B"
        + len(data).to_bytes(4, "little")
        + data
        + b"\x85R."
    )


PAYLOADS = {
    "reduce": lambda m: b"\x80\x02" + _global("os", "mkdir") + _text(str(m)) + b"\x85R.",
    "inst": lambda m: b"(" + _text(str(m)) + b"ilogging\nFileHandler\n.",
    "obj": lambda m: b"(" + _global("logging", "FileHandler") + _text(str(m)) + b"o.",
    "newobj_ex": lambda m: b"\x80\x04" + _global("tempfile", "TemporaryDirectory") + b")}\x92" + b"0"
    + _global("os", "mkdir") + _text(str(m)) + b"\x85R.",
    "setstate": lambda m: b"\x80\x02" + _global("collections", "OrderedDict") + b")R}" + _text("__setstate__")
    + _global("os", "mkdir") + b"sb" + _text(str(m)) + b"b.",
    "dotted": lambda m: b"\x80\x04" + _stack_global("torch", "serialization.os.mkdir") + _text(str(m)) + b"\x85R.",
    "import_name": lambda m: b"\x80\x04" + _stack_global("torch._utils", "_import_dotted_name") + _text("os.mkdir") + b"\x85R"
    + _text(str(m)) + b"\x85R.",
    "getattr": lambda m: b"\x80\x04" + _stack_global("builtins", "getattr") + _stack_global("builtins", "__import__")
    + _text("os") + b"\x85R" + _text("mkdir") + b"\x86R" + _text(str(m)) + b"\x85R.",
    "eval": lambda m: b"\x80\x02" + _global("builtins", "eval") + _text(f"__import__('os').mkdir({str(m)!r})") + b"\x85R.",
    "nested": _nested,
    "run_command": lambda m: b"\x80\x02" + _global("accelerate.test_utils.testing", "run_command") + b"]"
    + b"(" + _text("mkdir") + _text(str(m)) + b"e\x85R.",
    "memo": lambda m: b"\x80\x02" + _global("os", "mkdir") + b"q\x00" + b"0" + b"h\x00" + _text(str(m)) + b"\x85R.",
    "numpy": lambda m: b"\x80\x02" + _global("numpy.testing._private.utils", "runstring")
    + _text(f"__import__('os').mkdir({str(m)!r})") + b"}\x86R.",
}  # fmt: skip
"""Name → a function that gives a pickle, which makes the file or folder `mark` when pickle reads it."""


def _replaced(archive: bytes, pickled: bytes) -> bytes:
    """A file of torch.save with another pickle in it."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(archive)) as old, zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as new:
        for info in old.infolist():
            new.writestr(info.filename, pickled if info.filename.endswith("/data.pkl") else old.read(info))
    return out.getvalue()


def poison(path: Path, pickled: bytes) -> None:
    """Put a pickle into a file of torch.save, or make it the file."""
    data = path.read_bytes()
    path.write_bytes(_replaced(data, pickled) if data.startswith(b"PK") else pickled)


EVIL = "__9_0.distcp"


def poison_entry(metadata: Path, pickled: bytes) -> None:
    """Have a value that is no tensor, in a folder of DCP, be the pickle, in a file of its own, which stays."""
    folder = metadata.parent
    meta = pickle.loads((folder / ".metadata").read_bytes())
    index = next(
        i for i in meta.storage_data if type(meta.state_dict_metadata[i.fqn]).__name__ == "BytesStorageMetadata"
    )
    info = meta.storage_data[index]
    data = (folder / info.relative_path).read_bytes()
    evil = _replaced(data[info.offset : info.offset + info.length], pickled)
    (folder / EVIL).write_bytes(evil)
    info.relative_path, info.offset, info.length = EVIL, 0, len(evil)
    (folder / ".metadata").write_bytes(pickle.dumps(meta))
