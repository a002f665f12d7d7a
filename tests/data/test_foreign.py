"""Token files of datatrove and Megatron-LM, written here byte by byte as their formats say, read where they lie."""

import random
import struct

import numpy as np
import pytest

from anon_dist.cli import main
from anon_dist.data import ShardError, Tokenizer, TokenShards
from anon_dist.data.config import IndexConfig
from anon_dist.data.preparation.indexing import index_tokens
from anon_dist.data.verify import verify

EOD = 256
TEXTS = ["def f(x):\n    return x\n" * 9, "naïve 漢字 " * 20, "short", "words and words " * 60]


def documents(count=200, eod=EOD):
    """Texts as bytes, each with the end token of `bytes`; None: without."""
    rng = random.Random(0)
    made = []
    for i in range(count):
        text = f"{i}: " + rng.choice(TEXTS) * rng.randint(1, 3)
        made.append(list(text.encode()) + ([] if eod is None else [eod]))
    return made


def write_datatrove(path, docs, width=2, metadata="gpt2|2"):
    with path.open("wb") as file, path.with_name(path.name + ".index").open("wb") as index:
        end = 0
        for doc in docs:
            file.write(struct.pack(f"<{len(doc)}{'H' if width == 2 else 'I'}", *doc))
            end += len(doc)
            index.write(struct.pack("<Q", end))
    if metadata:
        path.with_name(path.name + ".metadata").write_text(f"{metadata}\n{end}\n1 T")


def write_megatron(prefix, docs, code=8, per_document=1):
    """Each document in so many sequences."""
    letter, width = {8: ("H", 2), 4: ("i", 4), 5: ("q", 8)}[code]
    sequences = []
    for doc in docs:
        cut = -(-len(doc) // per_document)
        sequences += [doc[i * cut : (i + 1) * cut] for i in range(per_document)]
    places, at = [], 0
    with prefix.with_suffix(".bin").open("wb") as file:
        for s in sequences:
            file.write(struct.pack(f"<{len(s)}{letter}", *s))
            places.append(at)
            at += width * len(s)
    with prefix.with_suffix(".idx").open("wb") as index:
        index.write(b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, code, len(sequences), len(docs) + 1))
        index.write(struct.pack(f"<{len(sequences)}i", *map(len, sequences)))
        index.write(struct.pack(f"<{len(sequences)}q", *places))
        index.write(struct.pack(f"<{len(docs) + 1}q", *(i * per_document for i in range(len(docs) + 1))))


WRITERS = {
    "datatrove": lambda folder, name, docs: write_datatrove(folder / f"{name}.ds", docs),
    "datatrove, uint32": lambda folder, name, docs: write_datatrove(folder / f"{name}.ds", docs, 4, "gpt2|4"),
    "Megatron-LM": lambda folder, name, docs: write_megatron(folder / name, docs),
    "Megatron-LM, int32": lambda folder, name, docs: write_megatron(folder / name, docs, 4),
    "Megatron-LM, sentences": lambda folder, name, docs: write_megatron(folder / name, docs, 8, 3),
}


def index(source, out, tokenizer="bytes", val_fraction=0.1, **options):
    return index_tokens(
        IndexConfig(source=str(source), out=out, tokenizer=tokenizer, val_fraction=val_fraction, workers=2, **options)
    )


def split_documents(tokens):
    ends = np.flatnonzero(tokens == EOD) + 1
    assert ends[-1] == len(tokens)
    return [piece.tolist() for piece in np.split(tokens, ends[:-1])]


@pytest.mark.parametrize("kind", WRITERS)
def test_the_tokens_are_those_of_the_files(kind, tmp_path):
    docs = documents()
    (tmp_path / "corpus" / "sub").mkdir(parents=True)
    WRITERS[kind](tmp_path / "corpus", "a_00000", docs[:150])
    WRITERS[kind](tmp_path / "corpus" / "sub", "a_00001", docs[150:])
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "corpus").rglob("*")}
    found = index(tmp_path / "corpus", tmp_path / "out")
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "corpus").rglob("*")} == before
    read = {name: TokenShards(tmp_path / "out", name, "read") for name in ("train", "val")}
    parts = {name: split_documents(shards.tokens(0, len(shards))) for name, shards in read.items()}
    # Whole documents, each in one split, in their order; those for validation from all over the corpus.
    at = {tuple(doc): i for i, doc in enumerate(docs)}
    places = {name: [at[tuple(doc)] for doc in found] for name, found in parts.items()}
    assert sorted(places["train"] + places["val"]) == list(range(200))
    assert all(numbers == sorted(numbers) for numbers in places.values())
    assert {i // 50 for i in places["val"]} == {0, 1, 2, 3}
    assert found.splits["train"].documents == len(parts["train"])
    assert 0.05 < found.splits["val"].tokens / sum(map(len, docs)) < 0.15
    assert found.splits["train"].bytes_per_token == pytest.approx(
        1 - len(parts["train"]) / len(read["train"]), rel=0.01
    )
    assert Tokenizer.of(tmp_path / "out").eod_id == EOD
    assert found.dtype == ("uint32" if "32" in kind else "uint16")
    assert verify(tmp_path / "out") == found
    assert TokenShards(tmp_path / "out", "train", "checksum").index.fingerprint == found.fingerprint


def test_a_single_file_and_a_prefix_are_sources_too(tmp_path):
    docs = documents()
    write_datatrove(tmp_path / "a.ds", docs)
    write_megatron(tmp_path / "b", docs)
    found = [
        index(tmp_path / name, tmp_path / f"out-{i}")
        for i, name in enumerate(("a.ds", "a.ds.index", "b", "b.bin", "b.idx", "*.ds"))
    ]
    assert len({each.fingerprint for each in found}) == 1
    everything = index(tmp_path / "b", tmp_path / "all", val_fraction=0.0)
    assert list(everything.splits) == ["train"]
    assert everything.splits["train"].tokens == sum(map(len, docs))


def test_the_tokenizer_of_datatroves_metadata_is_taken(tmp_path):
    write_datatrove(tmp_path / "a.ds", documents(), metadata="nowhere/none|2")
    with pytest.raises(SystemExit, match="tokenizer nowhere/none: transformers cannot load it"):
        main(["data", "index", str(tmp_path / "a.ds"), "--out", str(tmp_path / "out")])
    assert not list(tmp_path.glob("out*"))
    index(tmp_path / "a.ds", tmp_path / "first")
    write_datatrove(tmp_path / "a.ds", documents(), metadata=f"{tmp_path}/first/tokenizer|2")
    main(["data", "index", str(tmp_path / "a.ds"), "--out", str(tmp_path / "out"), "--val-fraction", "0.1"])
    assert Tokenizer.of(tmp_path / "out").hash == Tokenizer.of(tmp_path / "first").hash


def test_documents_without_an_end_are_said_and_other_ends_refused(tmp_path, capsys):
    docs = documents(eod=None)
    write_datatrove(tmp_path / "a.ds", docs)
    found = index(tmp_path / "a.ds", tmp_path / "out")
    assert "WARNING: 200 of 200 documents do not end with the end-of-document token, 256" in capsys.readouterr().out
    assert not found.documents_end
    assert not TokenShards(tmp_path / "out").index.documents_end
    write_datatrove(tmp_path / "b.ds", documents(eod=0))
    with pytest.raises(
        ValueError, match=r"every document ends with token 0 \('Ā'\), and the eos_token of --tokenizer bytes is 256"
    ):
        index(tmp_path / "b.ds", tmp_path / "other")


def test_a_tokenizer_that_made_other_tokens_is_said(tmp_path, capsys):
    docs = [[(t * 7 + 3) % 256 for t in doc[:-1]] + [EOD] for doc in documents()]
    write_datatrove(tmp_path / "a.ds", docs)
    index(tmp_path / "a.ds", tmp_path / "out")
    assert "makes other tokens in" in capsys.readouterr().out
    write_datatrove(tmp_path / "b.ds", documents())
    index(tmp_path / "b.ds", tmp_path / "right")
    assert "WARNING" not in capsys.readouterr().out


def torn(path, by):
    path.write_bytes(path.read_bytes()[:-by])


def edit(path, at, data):
    content = bytearray(path.read_bytes())
    content[at : at + len(data)] = data
    path.write_bytes(content)


BROKEN = {
    "ds torn": ("ds", lambda f: torn(f / "a.ds", 2), r"a\.ds is torn, or is not of its index: [\d,]+ bytes"),
    "ds without index": ("ds", lambda f: (f / "a.ds.index").unlink(), r"a\.ds\.index is missing: it says where"),
    "ds index torn": ("ds", lambda f: torn(f / "a.ds.index", 3), r"a\.ds\.index is torn"),
    "ds ends": ("ds", lambda f: edit(f / "a.ds.index", 8, struct.pack("<Q", 1)), r"documents end before they begin"),
    "ds width": (
        "ds",
        lambda f: (f / "a.ds.metadata").write_text("x|4\n"),
        r"says 4 bytes a token, and the index of the file 2",
    ),
    "ds of uint32 cut to half": (
        "ds",
        lambda f: [
            write_datatrove(f / "a.ds", documents(), 4, None),
            torn(f / "a.ds", (f / "a.ds").stat().st_size // 2),
            (f / "a.ds.metadata").unlink(),
        ],
        r"a\.ds is torn: its tokens look like uint32",
    ),
    "a single document": (
        "bin",
        lambda f: [write_megatron(f / name, documents(1)) for name in "ab"],
        r"no file has more than one document.*do without it: --val-fraction 0",
    ),
    "bin torn": ("bin", lambda f: torn(f / "a.bin", 2), r"a\.bin is torn, or is not of its index"),
    "bin without idx": ("bin", lambda f: (f / "a.idx").unlink(), r"a\.idx is missing"),
    "idx torn": ("bin", lambda f: torn(f / "a.idx", 8), r"a\.idx: [\d,]+ bytes; it is torn"),
    "idx magic": ("bin", lambda f: edit(f / "a.idx", 0, b"TNTIDX"), r"is no index of Megatron-LM's indexed datasets"),
    "idx dtype": (
        "bin",
        lambda f: edit(f / "a.idx", 17, b"\x05"),
        r"token ids are int64; what is read is uint16 and int32",
    ),
    "idx places": ("bin", lambda f: edit(f / "a.idx", 34 + 4 * 200, b"\x01"), r"sequences do not follow each other"),
    "idx documents": (
        "bin",
        lambda f: edit(f / "a.idx", 34 + 12 * 200, b"\x01"),
        r"list of documents does not go over all",
    ),
    "idx border beyond": (
        "bin",
        lambda f: edit(f / "a.idx", 34 + 12 * 200 + 8 * 100, struct.pack("<q", 400)),
        r"a\.idx: document 100 ends before sequence 400, of 200; the file is damaged",
    ),
    "vocabulary": (
        "bin",
        lambda f: edit(f / "a.bin", 2000, b"\x2c\x01"),
        r"a\.bin: token 300, number 1,000, is not in the voc",
    ),
    "both kinds": (
        "ds",
        lambda f: write_megatron(f / "b", documents()),
        r"b\.bin is a file of Megatron-LM, and .* of datatrove",
    ),
    "nothing": ("ds", lambda f: [p.unlink() for p in f.iterdir()], r"no \.ds files of datatrove there, and no \.bin"),
}


@pytest.mark.parametrize("how", BROKEN)
def test_what_is_wrong_with_files_is_named(how, tmp_path):
    kind, damage, words = BROKEN[how]
    folder = tmp_path / "corpus"
    folder.mkdir()
    write = write_datatrove if kind == "ds" else write_megatron
    write(folder / ("a.ds" if kind == "ds" else "a"), documents())
    damage(folder)
    with pytest.raises(ValueError, match=words):
        index(folder, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def test_files_that_change_afterwards_are_refused(tmp_path):
    write_datatrove(tmp_path / "a.ds", documents())
    index(tmp_path / "a.ds", tmp_path / "out")
    shards = TokenShards(tmp_path / "out", "train", "read")
    edit(tmp_path / "a.ds", 100, b"\x07")
    with pytest.raises(ShardError, match=r"a\.ds is altered: bytes 0 to [\d,]+ have checksum \w+, train\.sums says"):
        shards.tokens(0, 100)
    torn(tmp_path / "a.ds", 2)
    with pytest.raises(ShardError, match=r"a\.ds has [\d,]+ bytes, and had [\d,]+ when it was indexed\. Put it back"):
        TokenShards(tmp_path / "out", "val")
    (tmp_path / "a.ds").unlink()
    with pytest.raises(ShardError, match=r"a\.ds is missing\. Put it back where it was, or index it again"):
        TokenShards(tmp_path / "out")


def test_options_that_are_wrong(tmp_path):
    write_megatron(tmp_path / "a", documents())
    (tmp_path / "there").mkdir()
    (tmp_path / "c.idx").touch()
    for options, words in (
        ({"out": tmp_path / "there"}, r"--out .*there is there already"),
        ({"tokenizer": None}, r"a\.bin does not say which tokenizer made it; name it with --tokenizer"),
        ({"tokenizer": "spm-bpe:400"}, r"would be trained; name the one that made the tokens"),
        ({"val_fraction": 1.5}, r"--val-fraction must be in \[0, 1\)"),
        ({"val_fraction": 1e-6}, r"no document is left for the split val; raise --val-fraction"),
        ({"source": str(tmp_path / "c.idx")}, r"c\.bin is missing: it holds the tokens"),
        ({"source": "s3://b/x/*.ds"}, r"is an address, .* \(`aws s3 sync s3://b/x DIR`\), and index the copy"),
        ({"source": "gs://b/x/"}, r"\(`gcloud storage rsync --recursive gs://b/x DIR`\)"),
        ({"source": "memory://b/x"}, r"copy them to a file system that all nodes see, and index the copy"),
    ):
        wanted = {"source": str(tmp_path / "a"), "out": tmp_path / "out", "tokenizer": "bytes", **options}
        with pytest.raises(ValueError, match=words):
            index_tokens(IndexConfig(**wanted))
