#!/usr/bin/env python
"""Text from Common Crawl's files, WARC or WET, as JSON Lines that `anon-dist data prepare` reads; with datatrove, which must be installed.

    python tools/common_crawl.py --crawl FOLDER --out FOLDER [--tasks 64] [--workers 8]

--crawl may be an address, such as s3://commoncrawl/crawl-data/CC-MAIN-2024-10/segments/1707947473347.0/wet/. The main text of HTML is taken
out by trafilatura; WET files have plain text already. Each task writes a file into OUT/texts; one that is finished is not done again when
the same command is given. datatrove's filters and deduplication go where the comment says.
"""

from __future__ import annotations

import argparse
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--crawl", required=True, help="folder or address of .warc.gz or .warc.wet.gz files")
    parser.add_argument("--out", type=Path, required=True, help="folder for texts/ and logs/")
    parser.add_argument("--tasks", type=int, default=8, help="shares of the files, each of which makes a file of texts")
    parser.add_argument("--workers", type=int, default=2, help="processes")
    args = parser.parse_args()
    try:
        import trafilatura  # noqa: F401  # where it is missing, datatrove would lose every document and go on
        from datatrove.executor import LocalPipelineExecutor
        from datatrove.pipeline.extractors import Trafilatura
        from datatrove.pipeline.readers import WarcReader
        from datatrove.pipeline.writers import JsonlWriter
    except ImportError as error:
        raise SystemExit(
            f"{error}\nInstall it, into an environment of its own: pip install 'datatrove[io,processing]' lxml_html_clean"
        ) from None

    class FromHtml(Trafilatura):
        """Of WARC files; the text of WET files is taken as it is."""

        def extract(self, text: str) -> str:
            begin = text[:4096].lower()
            return super().extract(text) if "<html" in begin or "<!doctype" in begin else text

    steps = [
        WarcReader(args.crawl, glob_pattern="*.gz"),
        FromHtml(timeout=10),
        # here, such as datatrove.pipeline.filters.GopherQualityFilter()
        JsonlWriter(str(args.out / "texts")),
    ]
    logs = str(args.out / "logs")
    LocalPipelineExecutor(steps, tasks=args.tasks, workers=args.workers, logging_dir=logs).run()


if __name__ == "__main__":
    main()
