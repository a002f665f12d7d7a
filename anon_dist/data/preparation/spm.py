"""SentencePiece models: training, and the same model as a `tokenizers` tokenizer, checked against the original."""

from __future__ import annotations

import io
import re
import string
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

from anon_dist.data.errors import TokenizerError

EOD = "<|endofdoc|>"
SPACE = "▁"
MAX_SENTENCE_BYTES = 1 << 16
META_PIECES = 260
"""Of a model that is trained here: the bytes, the unknown token, the end of a document, newline and tab."""
TRAPS = ("<0x41>", "<unk>", "</s>", EOD, "a▁b", "   ", "\r\n \n\t\t", "\0", "𝖀\u0301")
# Values of the enumerations in sentencepiece_model.proto.
UNIGRAM, BPE = 1, 2
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6


def train(kind: Literal["bpe", "unigram"], vocab_size: int, texts: Iterable[str], *, split_digits: bool) -> bytes:
    """Train a model that keeps every byte of a text, but for U+2581, SentencePiece's sign for a space, which comes back as a space.

    The same texts give the same model on any number of cores.

    Characters that the vocabulary lacks are spelled in bytes, white space is kept as it is, and newlines and tabs are pieces of their own.

    Raises:
        TokenizerError: the trainer cannot make a vocabulary of that size from the texts; with the nearest one that it can make.
    """
    import sentencepiece

    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=(line for text in texts for line in _sentences(text)),
            model_writer=model,
            model_type=kind,
            vocab_size=max(vocab_size, META_PIECES),  # with fewer it cannot say how many are needed
            byte_fallback=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            split_digits=split_digits,
            user_defined_symbols=["\n", "\t"],
            # The rarest letters are left to byte fallback, but never a printable character of ASCII.
            character_coverage=0.9999,
            required_chars="".join(c for c in string.printable if c not in string.whitespace),
            max_sentence_length=MAX_SENTENCE_BYTES,
            unk_id=0,
            eos_id=1,
            eos_piece=EOD,
            bos_id=-1,
            pad_id=-1,
            # The unigram trainer adds up per thread, so the count is part of the result.
            num_threads=2,
            minloglevel=2,
        )
    except (RuntimeError, OSError) as error:
        raise TokenizerError(f"--tokenizer spm-{kind}:{vocab_size}: {_why_not(kind, str(error))}") from error
    if vocab_size < META_PIECES:
        raise TokenizerError(f"--tokenizer spm-{kind}:{vocab_size}: {_too_few(kind, META_PIECES)}")
    return model.getvalue()


def _why_not(kind: str, said: str) -> str:
    """What the trainer's error means, with a size that it can make."""
    if needed := re.search(r"smaller than required_chars\. \d+ vs (\d+)", said):
        return _too_few(kind, int(needed[1]))
    if most := re.search(r"set it to a value <= (\d+)", said):
        return (
            f"so many tokens are not to be had of these texts. Take spm-{kind}:{most[1]}, or more text (another --source; of a large one "
            "raise --tokenizer-sample-mb)."
        )
    return f"SentencePiece cannot train it ({said}). Take another size, or other texts."


def _too_few(kind: str, needed: int) -> str:
    return f"the texts' characters and the 256 bytes need {needed} tokens. Take spm-{kind}:{needed}, or more."


def _sentences(text: str) -> Iterable[str]:
    """Lines, cut where the trainer would drop them for their length."""
    step = MAX_SENTENCE_BYTES // 4  # a character has up to four bytes
    for line in text.splitlines(keepends=True):
        for start in range(0, len(line), step):
            # The trainer ends a sentence at NUL.
            yield line[start : start + step].replace("\0", "")


def convert(model: bytes, name: str) -> tuple[Any, str]:
    """The model as a `tokenizers.Tokenizer` with the same ids, and its end-of-document piece.

    Raises:
        TokenizerError: it is not a BPE or unigram model, has no end-of-sequence piece, or marks spaces as suffixes.
    """
    from sentencepiece import sentencepiece_model_pb2
    from tokenizers import AddedToken, Tokenizer, normalizers, pre_tokenizers

    proto = sentencepiece_model_pb2.ModelProto()
    try:
        proto.ParseFromString(model)
    except Exception as error:  # protobuf's DecodeError lives in a module whose place varies
        raise TokenizerError(f"{name}: not a SentencePiece model ({error}).") from error
    spec, pieces = proto.trainer_spec, proto.pieces
    if spec.treat_whitespace_as_suffix:
        raise TokenizerError(f"{name}: treat_whitespace_as_suffix is not supported. Train the model without it.")
    if not 0 <= spec.eos_id < len(pieces) or pieces[spec.eos_id].type != CONTROL:
        raise TokenizerError(
            f"{name}: no end-of-sequence piece to end documents with. Train the model with eos_id ≥ 0."
        )

    tokenizer = Tokenizer(_bpe(proto) if spec.model_type == BPE else _unigram(proto, name))
    rules = proto.normalizer_spec
    if steps := _normalizers(rules):
        tokenizer.normalizer = normalizers.Sequence(steps)
    # Where runs of spaces collapse, a leading space and the prefix become one; Metaspace adds it only if there is none.
    first = rules.add_dummy_prefix and rules.remove_extra_whitespaces
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(SPACE, "first" if first else "never", split=False)
    tokenizer.decoder = _decoder(strip_first=rules.add_dummy_prefix)
    added = [AddedToken(p.piece, normalized=False) for p in pieces if p.type == USER_DEFINED]
    special = [AddedToken(p.piece, normalized=False) for p in pieces if p.type in (UNKNOWN, CONTROL)]
    tokenizer.add_tokens(added)
    tokenizer.add_special_tokens(special)
    tokenizer.encode_special_tokens = True  # text that spells one is text
    return tokenizer, pieces[spec.eos_id].piece


def _bpe(proto: Any) -> Any:
    from tokenizers import models

    ids = {p.piece: i for i, p in enumerate(proto.pieces)}
    normal = {p.piece for p in proto.pieces if p.type == NORMAL}
    # SentencePiece merges by the score of what results; a merge list needs each way to get there. Where two ways compete for
    # overlapping pieces, SentencePiece takes the left one: that with the longer left part comes first.
    merges = [
        (-p.score, i, -cut, (p.piece[:cut], p.piece[cut:]))
        for i, p in enumerate(proto.pieces)
        if p.type == NORMAL
        for cut in range(1, len(p.piece))
        if p.piece[:cut] in normal and p.piece[cut:] in normal
    ]
    return models.BPE(
        ids,
        [pair for *_, pair in sorted(merges)],
        unk_token=proto.pieces[proto.trainer_spec.unk_id].piece,
        fuse_unk=True,
        byte_fallback=proto.trainer_spec.byte_fallback,
    )


def _unigram(proto: Any, name: str) -> Any:
    from tokenizers.models import Unigram

    if proto.trainer_spec.model_type != UNIGRAM:
        raise TokenizerError(f"{name}: neither a BPE nor a unigram model. Train one of these.")
    # `tokenizers` would find control and byte pieces in text that spells them. A score below that of any way to spell them in others
    # prevents it, and changes nothing else: it makes an unknown character dearer too, but no piece competes with that.
    lowest = min((p.score for p in proto.pieces if p.type == NORMAL), default=0.0)
    never = 2.0 * max(len(p.piece) for p in proto.pieces) * min(lowest, -1.0)
    scores = [(p.piece, never if p.type in (UNKNOWN, CONTROL, BYTE) else p.score) for p in proto.pieces]
    return Unigram(scores, unk_id=proto.trainer_spec.unk_id, byte_fallback=proto.trainer_spec.byte_fallback)


def _normalizers(rules: Any) -> list[Any]:
    from tokenizers import Regex, normalizers

    steps: list[Any] = []
    if rules.precompiled_charsmap:
        steps.append(normalizers.Precompiled(rules.precompiled_charsmap))
    if rules.remove_extra_whitespaces:
        steps.append(normalizers.Replace(Regex(" {2,}"), " "))
        steps.append(normalizers.Strip(left=not rules.add_dummy_prefix, right=True))
    elif rules.add_dummy_prefix:
        steps.append(normalizers.Prepend(SPACE))
    return steps


def _decoder(*, strip_first: bool) -> Any:
    from tokenizers import decoders

    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    return decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if strip_first else steps)


def check_conversion(tokenizer: Any, model: bytes, texts: Sequence[str], name: str) -> list[str]:
    """Compare the converted tokenizer with SentencePiece on texts of the corpus. Returns remarks on what is not quite the same.

    Two things may differ. Of segmentations with equal score, such as `▁▁ ▁` and `▁ ▁▁`, a unigram model may take either: the
    libraries round their sums differently. And inputs that a corpus hardly contains, such as text that spells a control piece, are
    beyond what some models of other makers can be converted for.

    Raises:
        TokenizerError: they differ in anything else.
    """
    import sentencepiece

    original = sentencepiece.SentencePieceProcessor(model_proto=model)

    def equal(text: str) -> bool:
        return bool(tokenizer.encode(text, add_special_tokens=False).ids == original.encode(text))

    ties = 0
    for text in texts:
        if not equal(text):
            _refuse_difference(tokenizer, original, text, name)
            ties += 1
    traps = (*TRAPS, *map(original.id_to_piece, range(min(len(original), 16))))
    remarks = [f"{ties} of {len(texts)} sample texts have another segmentation than SentencePiece's, of equal score"]
    remarks += [f"unlike SentencePiece, it gives {trap!r} another encoding" for trap in traps if not equal(trap)]
    return remarks[0 if ties else 1 :]


def _refuse_difference(tokenizer: Any, original: Any, text: str, name: str) -> None:
    ours, theirs = tokenizer.encode(text, add_special_tokens=False).ids, original.encode(text)
    if _tie(original, ours, theirs):
        return
    at = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs)))
    raise TokenizerError(
        f"{name}: its conversion to a transformers tokenizer encodes differently: token {at} of {text[:60]!r}… is "
        f"{ours[at : at + 1]}, SentencePiece says {theirs[at : at + 1]}. Use another model or vocabulary size."
    )


def _tie(original: Any, ours: list[int], theirs: list[int]) -> bool:
    """Whether both spell the same text with the same score. Only a unigram model's scores add up to mean anything."""
    from sentencepiece import sentencepiece_model_pb2

    spec = sentencepiece_model_pb2.ModelProto.FromString(original.serialized_model_proto()).trainer_spec
    if spec.model_type != UNIGRAM or original.decode(ours) != original.decode(theirs):
        return False
    a, b = (sum(map(original.get_score, ids)) for ids in (ours, theirs))
    # SentencePiece adds up in float32, over the whole text.
    return bool(abs(a - b) <= 1e-6 * max(1.0, abs(b)))


def read_model(path: Path) -> bytes:
    """The content of a `.model` file.

    Raises:
        TokenizerError: it cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise TokenizerError(
            f"--tokenizer {path}: {error.strerror}. Give the path of a SentencePiece .model file."
        ) from None
