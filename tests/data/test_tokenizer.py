"""Every tokenizer keeps every text, and the saved folder gives the same ids through plain transformers."""

import io
import re

import numpy as np
import pytest
import sentencepiece
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, models, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Fast
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from anon_dist.data import Tokenizer, TokenizerError
from anon_dist.data.preparation.spm import EOD
from anon_dist.data.preparation.tokenizer import build_tokenizer

SPECS = ["bytes", "spm-bpe:600", "spm-unigram:600"]
TRICKY = [
    "",
    " ",
    "\n",
    "  leading, trailing \t\n\n\n",
    "\r\n\r\x0b\x0c\x85\u2028\xa0\u3000",
    f"text with {EOD} and <unk> <0x41> </s> in it",
    "a\0b\0",
    "def f(x):\n\tif x:\n            return 'ünï' # 漢字 😀👩‍👩‍👧 e\u0301\ufeff",
    "1234567890 3.14159",
    "x" * 5000 + " " * 777,
]


@pytest.fixture(scope="module")
def texts(corpus):
    return [path.read_text("utf-8") for path in sorted(corpus.iterdir())]


def build(spec, texts, folder):
    return build_tokenizer(spec, lambda: texts, folder, split_digits=True, say=lambda message: None)


@pytest.fixture(scope="module")
def built(texts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizers")
    return {spec: build(spec, texts, folder / spec.replace(":", "-")) for spec in SPECS}


@pytest.mark.parametrize("spec", SPECS)
def test_round_trip_and_equality(built, texts, spec, tmp_path):
    tokenizer = built[spec]
    tokenizer.save_pretrained(tmp_path / "saved")
    plain = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert plain.eos_token == plain.bos_token == plain.pad_token == EOD
    assert plain.eos_token_id == tokenizer.eod_id < tokenizer.vocab_size
    for text in [*TRICKY, *texts]:
        ids = tokenizer.encode(text)
        assert ids.dtype == np.uint32
        assert tokenizer.decode(ids) == text
        assert tokenizer.eod_id not in ids
        assert plain(text, add_special_tokens=False)["input_ids"] == ids.tolist()
        assert plain(text)["input_ids"] == ids.tolist()


@pytest.mark.parametrize("spec", SPECS)
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(st.one_of(st.characters(codec="utf-8", exclude_characters="▁"), st.sampled_from(" \n\t\r0aé<|>"))))
def test_round_trip_of_any_text(built, spec, text):
    tokenizer = built[spec]
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.hf(text, add_special_tokens=False)["input_ids"] == ids.tolist()


@pytest.mark.parametrize("spec", SPECS[1:])
def test_equals_sentencepiece(built, texts, spec):
    tokenizer = built[spec]
    original = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer.folder / "spm.model"))
    assert len(original) == tokenizer.vocab_size == 600
    different = [text for text in [*TRICKY, *texts] if tokenizer.encode(text).tolist() != original.encode(text)]
    if "bpe" in spec:
        assert not different
    for text in different:  # runs of spaces have segmentations of equal score
        a, b = (sum(map(original.get_score, ids)) for ids in (tokenizer.encode(text).tolist(), original.encode(text)))
        assert a == pytest.approx(b, rel=1e-6)


@pytest.mark.parametrize("spec", SPECS[1:])
def test_training_is_deterministic_and_hash_names_it(built, texts, spec, tmp_path):
    again = build(spec, texts, tmp_path / "again")
    assert (again.folder / "spm.model").read_bytes() == (built[spec].folder / "spm.model").read_bytes()
    assert again.hash == built[spec].hash
    assert len({t.hash for t in built.values()}) == len(SPECS)


def test_bytes_are_bytes(built):
    assert built["bytes"].encode("é\n").tolist() == [0xC3, 0xA9, 0x0A]
    assert (built["bytes"].eod_id, built["bytes"].vocab_size) == (256, 257)


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_model_file_with_the_trainers_defaults(texts, kind, tmp_path):
    """NFKC, a dummy prefix, extra spaces removed, no byte fallback: nothing like ours."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter("".join(texts).splitlines()),
        model_writer=model,
        model_type=kind,
        vocab_size=200,
        user_defined_symbols=["<sep>"],
        minloglevel=2,
    )
    path = tmp_path / "some.model"
    path.write_bytes(model.getvalue())
    tokenizer = build(str(path), texts, tmp_path / "out")
    original = sentencepiece.SentencePieceProcessor(model_file=str(path))
    assert tokenizer.eod_id == original.eos_id() == 2
    for text in ["the quick  brown", "fox<sep> pelka", "self.assertEqual(x, None)", "", "  ", "  quick\n\tﬁne  "]:
        assert tokenizer.encode(text).tolist() == original.encode(text)
    assert tokenizer.decode(tokenizer.encode("quick pelka")) == "quick pelka"


def test_model_file_without_an_end(texts, tmp_path):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_writer=model, model_type="bpe", vocab_size=200, eos_id=-1, minloglevel=2
    )
    (tmp_path / "some.model").write_bytes(model.getvalue())
    with pytest.raises(TokenizerError, match=r"some\.model: no end-of-sequence piece"):
        build(str(tmp_path / "some.model"), texts, tmp_path / "out")


def hf_folder(texts, folder, **options):
    """A byte-level BPE that adds tokens, truncates and pads unless it is kept from it."""
    fast = Fast(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=400, show_progress=False))
    fast.add_special_tokens([AddedToken("<s>"), AddedToken("</s>")])
    fast.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 400), ("</s>", 401)]
    )
    fast.enable_truncation(8)
    fast.enable_padding(length=8)
    PreTrainedTokenizerFast(tokenizer_object=fast, bos_token="<s>", **options).save_pretrained(folder)
    return f"hf:{folder}"


def test_hugging_face_adds_and_drops_nothing(texts, tmp_path):
    spec = hf_folder(texts, tmp_path / "theirs", eos_token="</s>")
    tokenizer = build(spec, texts, tmp_path / "out")
    plain = AutoTokenizer.from_pretrained(tmp_path / "out")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "theirs")
    assert tokenizer.eod_id == theirs.eos_token_id
    for text in texts:
        ids = tokenizer.encode(text).tolist()
        assert theirs.eos_token_id not in ids
        assert ids == plain(text, add_special_tokens=False)["input_ids"]
        assert ids == theirs(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.eod_id not in tokenizer.encode("a </s> b")
    assert tokenizer.encode("a </s> b").tolist() == plain("a </s> b", add_special_tokens=False)["input_ids"]


def test_hugging_face_without_an_end(texts, tmp_path):
    with pytest.raises(TokenizerError, match=r"no eos_token, .*save_pretrained"):
        build(hf_folder(texts, tmp_path / "theirs"), texts, tmp_path / "out")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("gpt2", "must be spm-bpe:SIZE"),
        ("spm-bpe", "SIZE must be a whole number"),
        ("spm-bpe:big", "SIZE must be a whole number"),
        ("hf:", "name a tokenizer"),
        ("nowhere/x.model", "No such file"),
        ("hf:nowhere/at/all", "transformers cannot load it"),
    ],
)
def test_bad_specifications(texts, spec, message, tmp_path):
    with pytest.raises(TokenizerError, match=message):
        build(spec, texts[:20], tmp_path / "out")


@pytest.mark.parametrize("kind", ["spm-bpe", "spm-unigram"])
@pytest.mark.parametrize("text", ["a", "".join(map(chr, range(0x4E00, 0x4F00))), "corpus"])
def test_a_size_that_cannot_be_made_is_answered_with_one_that_can(kind, text, texts, tmp_path):
    sample, made = texts[:20] if text == "corpus" else [text], []
    for size in (1, 259, 100_000):
        with pytest.raises(
            TokenizerError, match=rf"^--tokenizer {kind}:{size}: .* Take {kind}:\d+, or more"
        ) as refused:
            build(f"{kind}:{size}", sample, tmp_path / "out")
        made.append(int(re.search(r"Take \S+:(\d+),", str(refused.value))[1]))
    assert made[0] == made[1] <= made[2]
    for i, size in enumerate(made[1:]):
        tokenizer = build(f"{kind}:{size}", sample, tmp_path / str(i))
        assert tokenizer.vocab_size == size
        assert tokenizer.decode(tokenizer.encode(sample[0])) == sample[0]


def test_not_a_model(tmp_path, texts):
    (tmp_path / "x.model").write_bytes(b"\xff\xff")
    with pytest.raises(TokenizerError, match="not a SentencePiece model"):
        build(str(tmp_path / "x.model"), texts, tmp_path / "out")


def test_of_a_prepared_folder(prepared, tmp_path):
    assert Tokenizer.of(prepared).spec == "bytes"
