"""Tokenizers: each is made once into a folder that `transformers.AutoTokenizer` loads, and used from that folder ever after.

Documents are encoded as pure text, whatever they contain: text that spells a special token is split like any other, and nothing is added.
The one end-of-document token after each document is appended by whoever writes documents.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray

from anon_dist.data.errors import TokenizerError
from anon_dist.data.preparation import spm
from anon_dist.data.stored.digests import tokenizer_hash

Ids = NDArray[np.uint32]

SPM_FILE = "spm.model"
SPM_KINDS: dict[str, Literal["bpe", "unigram"]] = {"spm-bpe": "bpe", "spm-unigram": "unigram"}
BYTES = "bytes"
CHECK_TEXTS = 256
CHECK_CHARS = 1 << 20
CONFIG_FILE = "tokenizer_config.json"
PROBE = "The 1,234 naïve foxes\n\tdef jump(x):  # über—dog\n"
"""Two tokenizers of one vocabulary may still cut text differently."""
KINDS = "spm-bpe:SIZE, spm-unigram:SIZE, a SentencePiece .model file, hf:NAME_OR_FOLDER, or bytes"


class Tokenizer:
    """A tokenizer loaded from its folder.

    Args:
        folder: a folder made by `build_tokenizer` (or any that AutoTokenizer loads).
        spec: how it was asked for; `bytes` takes the short way of numpy.

    Raises:
        TokenizerError: the folder cannot be loaded, or the tokenizer has no end-of-sequence token.
    """

    def __init__(self, folder: str | Path, spec: str = "") -> None:
        self.folder, self.spec = Path(folder), spec
        self.hf = _load_hf(str(folder), local=True)
        self.eod_id = _eod_id(self.hf, str(folder))
        self.vocab_size = max(self.hf.get_vocab().values()) + 1
        self.hash = tokenizer_hash(self.folder)
        self._encode_all = _encoder(self.hf, spec)

    def encode(self, text: str) -> Ids:
        """The ids of one text, uint32, without special tokens."""
        return self.encode_all([text])[0]

    def encode_all(self, texts: Sequence[str]) -> list[Ids]:
        """The ids of each text, uint32, without special tokens."""
        return self._encode_all(texts)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of these ids, special tokens included."""
        text: str = self.hf.decode(list(map(int, ids)), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return text

    def behaviour(self) -> dict[str, Any]:
        """What the files beside `tokenizer.json` decide, as JSON: which tokens are special, and how plain AutoTokenizer encodes."""
        roles = {role: [text, self.hf.convert_tokens_to_ids(text)] for role, text in _special_tokens(self.hf).items()}
        return {"special_tokens": roles, "probe": self.hf(PROBE + self.hf.eos_token)["input_ids"]}

    def save_pretrained(self, folder: str | Path) -> None:
        """Copy the tokenizer into `folder`, so that `AutoTokenizer.from_pretrained(folder)` loads it and encodes the same."""
        shutil.copytree(self.folder, folder, dirs_exist_ok=True)

    def check(self, texts: Sequence[str]) -> None:
        """Compare with what plain `AutoTokenizer.from_pretrained(folder)(text)` gives.

        Raises:
            TokenizerError: it gives other ids for one of the texts.
        """
        for text, ids in zip(texts, self.encode_all(texts), strict=True):
            if self.hf(text, add_special_tokens=False, verbose=False)["input_ids"] != ids.tolist():
                raise TokenizerError(f"{self.spec}: as loaded by AutoTokenizer it encodes {text[:60]!r}… differently.")

    @classmethod
    def of(cls, directory: str | Path) -> Self:
        """The tokenizer of a prepared data folder.

        Raises:
            ShardError: it is not one, or unfinished.
            TokenizerError: its tokenizer is missing, or not the one that the data was made with.
        """
        from anon_dist.data.stored.index import TOKENIZER_FOLDER, Index
        from anon_dist.data.stored.remote import located

        index, folder = Index.load(directory), located(directory) / TOKENIZER_FOLDER
        remedy = "Copy it again from where the data came from, or prepare again."
        if not folder.is_dir():
            raise TokenizerError(f"{folder} is missing: the data's tokenizer. {remedy}")
        if tokenizer_hash(folder) != index.tokenizer_hash:
            raise TokenizerError(f"{folder} was changed after the data was prepared. {remedy}")
        if not (folder / CONFIG_FILE).is_file():
            raise TokenizerError(f"{folder / CONFIG_FILE} is missing: it says which tokens are special. {remedy}")
        tokenizer = cls(folder, index.tokenizer)
        if (tokenizer.eod_id, tokenizer.vocab_size) != (index.eod_id, index.vocab_size):
            raise TokenizerError(
                f"{folder}: end-of-document token {tokenizer.eod_id} of {tokenizer.vocab_size} tokens, and the data has {index.eod_id} of "
                f"{index.vocab_size}. {remedy}"
            )
        if changed := _changes(index.tokenizer_behaviour, tokenizer.behaviour()):
            raise TokenizerError(f"{folder} was changed after the data was prepared: {changed}. {remedy}")
        return tokenizer


def _changes(then: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """How a tokenizer's behaviour differs from what was recorded; "" where it does not, or nothing was."""
    before, after = then.get("special_tokens"), now["special_tokens"]
    if before is not None and before != after:
        name = next(n for n in {**before, **after} if before.get(n) != after.get(n))
        return f"{name} is {_shown(after.get(name))}, and was {_shown(before.get(name))}"
    if then.get("probe") not in (None, now["probe"]):
        return f"AutoTokenizer encodes {PROBE[:21]!r}… differently with its {CONFIG_FILE} of now (or this version of transformers)"
    return ""


def _shown(token: Sequence[Any] | None) -> str:
    return "not set" if token is None else f"{token[0]!r} ({token[1]})"


def _special_tokens(hf: Any) -> dict[str, str]:
    """Role, such as `eos_token`, → text."""
    return {role: str(token) for role, token in hf.special_tokens_map.items() if isinstance(token, str)}


def check_spec(spec: str) -> None:
    """Refuse a tokenizer specification that no tokenizer can come of, before any work is done.

    Raises:
        TokenizerError: naming what is allowed.
    """
    kind, colon, argument = spec.partition(":")
    if kind in SPM_KINDS:
        if not argument.isdecimal() or int(argument) < 1:
            raise TokenizerError(f"--tokenizer {spec}: SIZE must be a whole number, as in {kind}:4096.")
    elif kind == "hf" and colon:
        if not argument:
            raise TokenizerError(f"--tokenizer {spec}: name a tokenizer, as in hf:gpt2 or hf:path/to/folder.")
    elif spec.endswith(".model"):
        spm.read_model(Path(spec))
    elif spec != BYTES:
        raise TokenizerError(f"--tokenizer {spec}: must be {KINDS}.")


def build_tokenizer(
    spec: str, sample: Callable[[], Sequence[str]], folder: Path, *, split_digits: bool, say: Callable[[str], None]
) -> Tokenizer:
    """Make the tokenizer of that specification in `folder` (which must not exist), and check it on the sample.

    Args:
        spec: one of `spm-bpe:SIZE`, `spm-unigram:SIZE` (trained on the sample), a `.model` file, `hf:NAME_OR_FOLDER`, `bytes`.
        sample: gives texts of the corpus.
        folder: where its files go. A SentencePiece model is kept there too, as `spm.model`.
        split_digits: whether a trained tokenizer has no pieces of several digits.
        say: told what is worth telling the user.

    Raises:
        TokenizerError: it cannot be made, has no end-of-document token, or encodes differently after the conversion.
    """
    check_spec(spec)
    texts = sample()
    checked = _check_sample(texts)
    kind, _, argument = spec.partition(":")
    if kind == "hf":
        _save_hf(argument, folder)
    elif spec == BYTES:
        _wrap(_byte_level(), spm.EOD).save_pretrained(folder)
    elif kind in SPM_KINDS:
        say(f"training {spec} on {sum(map(len, texts)) / 1e6:.1f} M characters")
        model = spm.train(SPM_KINDS[kind], int(argument), texts, split_digits=split_digits)
        _save_spm(model, spec, checked, folder, say)
    else:
        _save_spm(spm.read_model(Path(spec)), spec, checked, folder, say)
    tokenizer = Tokenizer(folder, spec)
    tokenizer.check([*checked, spm.EOD, tokenizer.hf.eos_token])
    if tokenizer.eod_id in tokenizer.encode(tokenizer.hf.eos_token):
        say(f"{spec}: text that spells {tokenizer.hf.eos_token!r} will be read as the end of a document")
    return tokenizer


def is_trained(spec: str) -> bool:
    """Whether the tokenizer is trained on the corpus."""
    return spec.partition(":")[0] in SPM_KINDS


def _save_hf(name: str, folder: Path) -> None:
    hf = _load_hf(name, local=False)
    _eod_id(hf, name)
    hf.split_special_tokens = True
    hf.init_kwargs["split_special_tokens"] = True  # this is what is saved
    hf.save_pretrained(folder)


def _save_spm(model: bytes, spec: str, checked: Sequence[str], folder: Path, say: Callable[[str], None]) -> None:
    fast, eod = spm.convert(model, spec)
    for remark in spm.check_conversion(fast, model, checked, spec):
        say(f"{spec}: {remark}")
    _wrap(fast, eod).save_pretrained(folder)
    (folder / SPM_FILE).write_bytes(model)


def _check_sample(texts: Sequence[str]) -> list[str]:
    """Some of the texts, spread evenly and short enough to be quick."""
    spread = texts[:: max(1, len(texts) // CHECK_TEXTS)][:CHECK_TEXTS]
    return [text[: CHECK_CHARS // max(1, len(spread))] for text in spread]


def _load_hf(name: str, *, local: bool) -> Any:
    # Worker processes are the parallelism here; the library's own threads would fight them, and warn about forks.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name, local_files_only=local)
    except Exception as error:  # transformers raises OSError, ValueError, KeyError, and what its parsers raise
        raise TokenizerError(
            f"tokenizer {name}: transformers cannot load it ({type(error).__name__}: {' '.join(str(error).split())}). "
            "Check the name or folder, and the network for a name of the hub."
        ) from error


def _eod_id(hf: Any, name: str) -> int:
    if hf.eos_token_id is None:
        missing = (
            f" (there is no {CONFIG_FILE})" if Path(name).is_dir() and not (Path(name) / CONFIG_FILE).exists() else ""
        )
        raise TokenizerError(
            f"tokenizer {name}: no eos_token{missing}, so documents cannot be told apart. "
            "Set one (`tokenizer.eos_token = ...; tokenizer.save_pretrained(folder)`) and use hf:folder."
        )
    return int(hf.eos_token_id)


def _encoder(hf: Any, spec: str) -> Callable[[Sequence[str]], list[Ids]]:
    if spec == BYTES:
        return lambda texts: [np.frombuffer(text.encode(), np.uint8).astype(np.uint32) for text in texts]
    backend = getattr(hf, "backend_tokenizer", None)
    if backend is None:  # a tokenizer in pure Python
        return lambda texts: [np.array(hf.encode(t, add_special_tokens=False), np.uint32) for t in texts]
    # Past transformers' own call, which builds masks and offsets. It would set these on each call.
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True

    def encode(texts: Sequence[str]) -> list[Ids]:
        encodings = backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, np.uint32) for encoding in encodings]

    return encode


def _wrap(tokenizer: Any, eod: str) -> Any:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=eod,
        eos_token=eod,
        pad_token=eod,
        split_special_tokens=True,
        clean_up_tokenization_spaces=False,
    )


def _byte_level() -> Any:
    """A tokenizer whose ids are the values of the UTF-8 bytes, and 256 the end of a document."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    vocab = {character: byte for byte, character in bytes_to_unicode().items()}
    tokenizer = Tokenizer(models.BPE(vocab, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(spm.EOD, normalized=False)])
    return tokenizer
