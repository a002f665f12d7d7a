"""From raw Common Crawl files to a prepared folder. datatrove's step needs its environment: DATATROVE_PYTHON, or this one."""

import gzip
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from anon_dist.cli import main
from anon_dist.data import Index, Tokenizer, TokenShards

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "tools" / "common_crawl.py"
PYTHON = os.environ.get("DATATROVE_PYTHON") or (sys.executable if importlib.util.find_spec("datatrove") else None)
PAGES = [f"Plain text {i} of a page. It says little, and stands for much." for i in range(6)]
SEA = (
    "This is paragraph {} of article {}, which is about the sea, and goes on for a while so that it is taken for text."
)
MENU = "Home | About us | Imprint"


def record(kind, number, body, content_type):
    """A member of a WARC file, in the format's own words."""
    head = [
        "WARC/1.0",
        f"WARC-Type: {kind}",
        f"WARC-Target-URI: http://example.org/{number}",
        "WARC-Date: 2024-02-21T00:00:00Z",
        f"WARC-Record-ID: <urn:uuid:00000000-0000-0000-0000-{number:012d}>",
        f"Content-Type: {content_type}",
        f"Content-Length: {len(body)}",
    ]
    return gzip.compress("\r\n".join(head).encode() + b"\r\n\r\n" + body + b"\r\n\r\n")


@pytest.fixture
def crawl(tmp_path):
    """A WARC file of six pages of HTML, and a WET file of six of text, one of them not UTF-8."""
    folder = tmp_path / "crawl"
    folder.mkdir()
    warc = [record("warcinfo", 0, b"software: none", "application/warc-fields")]
    for i in range(6):
        text = "".join(f"<p>{SEA.format(k, i)}</p>" for k in range(8))
        html = f"<html><body><nav>{MENU}</nav><article>{text}</article></body></html>".encode()
        http = b"HTTP/1.1 200 OK\r\nContent-Type: text/html; charset=utf-8\r\n\r\n" + html
        warc.append(record("response", i, http, "application/http; msgtype=response"))
    (folder / "CC-MAIN-0.warc.gz").write_bytes(b"".join(warc))
    wet = [record("conversion", 100 + i, page.encode(), "text/plain") for i, page in enumerate(PAGES)]
    (folder / "CC-MAIN-0.warc.wet.gz").write_bytes(b"".join(wet))
    return folder


def prepared(texts, out):
    main(["data", "prepare", "--source", str(texts), "--tokenizer", "bytes", "--val-fraction", "0", "--out", str(out)])
    shards, tokenizer = TokenShards(out), Tokenizer.of(out)
    return tokenizer.decode(shards.tokens(0, len(shards))).split(tokenizer.hf.eos_token)[:-1]


@pytest.mark.skipif(
    PYTHON is None, reason="datatrove is not installed: name the Python of its environment in DATATROVE_PYTHON"
)
def test_from_warc_and_wet_to_shards(crawl, tmp_path):
    command = [
        PYTHON,
        str(SCRIPT),
        "--crawl",
        str(crawl),
        "--out",
        str(tmp_path / "web"),
        "--tasks",
        "2",
        "--workers",
        "1",
    ]
    alone = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, env=alone, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    documents = prepared(tmp_path / "web" / "texts", tmp_path / "data")
    articles = ["\n".join(SEA.format(k, i) for k in range(8)) for i in range(6)]
    assert sorted(document.strip() for document in documents) == sorted([*articles, *PAGES])


def test_what_datatrove_writes_is_read(tmp_path):
    """Its JsonlWriter's rows, as version 0.10.1 writes them; also where datatrove is not installed."""
    (tmp_path / "texts").mkdir()
    rows = [
        {"text": page, "id": f"<urn:uuid:{i}>", "metadata": {"url": "http://x", "date": "2024"}}
        for i, page in enumerate(PAGES)
    ]
    for i in range(2):
        lines = "".join(json.dumps(row, separators=(",", ":")) + "\n" for row in rows[i::2])
        (tmp_path / "texts" / f"{i:05d}.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    assert prepared(tmp_path / "texts", tmp_path / "data") == PAGES[0::2] + PAGES[1::2]


def test_crawl_files_given_to_prepare_are_not_taken_for_text(crawl, tmp_path, capsys):
    (crawl / "a.txt").write_text("text")
    assert prepared(crawl, tmp_path / "data") == ["text"]
    assert Index.load(tmp_path / "data").source["skipped"] == {"no text format": 2}
    assert "CC-MAIN-0.warc.wet.gz): extract their text" in capsys.readouterr().out


@pytest.mark.skipif(importlib.util.find_spec("datatrove") is not None, reason="datatrove is installed")
def test_without_datatrove(tmp_path):
    command = [sys.executable, str(SCRIPT), "--crawl", str(tmp_path), "--out", str(tmp_path / "web")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1
    assert "pip install 'datatrove[io,processing]' lxml_html_clean" in done.stderr
