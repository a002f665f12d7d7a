"""Where a preparation may write: nowhere that it would read."""

from __future__ import annotations

from pathlib import Path

from anon_dist.data.errors import PreparationError
from anon_dist.data.preparation.sources import FileSource, HubSource, LimitedSource, SeveralSources, Source


def check_out(out: Path, source: Source) -> None:
    """Refuse a folder that holds texts of the source, that the source takes in, or that is a training's.

    Raises:
        PreparationError: naming another place.
    """
    here = out.resolve()
    if (out / "config.yaml").is_file() and ((out / "checkpoints").is_dir() or (out / "run.lock").exists()):
        raise PreparationError(f"--out {out} is the folder of a training. Name a folder of its own.")
    for each in _plain(source):
        if isinstance(each, FileSource) and isinstance(each.root, Path):  # and not at an address
            root = each.root.resolve()
            holds = here in {path.resolve().parent for path in each.files}
            if holds or (each.recursive and (here == root or root in here.parents)):
                _refuse(out, root, "holds texts of the source" if holds else "lies in the source's folder")
        elif isinstance(each, HubSource) and each.folder is not None:
            root = each.folder.resolve()
            if here == root or root in here.parents:
                _refuse(out, root, "lies in the source's folder")


def _refuse(out: Path, root: Path, why: str) -> None:
    beside = root.parent / f"{root.name}-prepared"
    raise PreparationError(
        f"--out {out} {why}: what is written there would be read as text. Name a folder of its own, such as {beside}."
    )


def _plain(source: Source) -> list[Source]:
    """Those that it is made of."""
    if isinstance(source, LimitedSource):
        return _plain(source.source)
    if isinstance(source, SeveralSources):
        return [each for one in source.sources for each in _plain(one)]
    return [source]
