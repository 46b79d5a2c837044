"""The released tokenizer and trained ones: ids, round trips, files that transformers loads."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fullweight.core.errors import ConfigError, DataError
from fullweight.data.encoding import load_encoding
from fullweight.data.tokenizer import Tokenizer, load_tokenizer, train_tokenizer

TEXTS = [f"What is {a} + {b}? The answer is {a + b}.\n" for a in range(30) for b in range(30)]
HOSTILE = [
    "",
    " ",
    "\x00\x01\x7f",
    "naïve Ünïcode — “quotes” 你好，世界 こんにちは 👩‍👩‍👧‍👦 \u202e",
    "tabs\tand\r\nlines\n\n\n   end   ",
    "\U0010ffff\ufffe\ufeff",
    "e\u0301 vs é",
    "1234567890 ٣٤ Ⅻ ½ 3.14e-10",
]


@pytest.fixture(scope="module")
def released() -> Tokenizer:
    return load_tokenizer("deepseek-v4")


@pytest.fixture(scope="module")
def trained() -> Tokenizer:
    return train_tokenizer(TEXTS, 400)


def test_released_ids(released: Tokenizer) -> None:
    """Vocabulary and special ids are those published for the model."""
    assert (released.vocab_size, released.bos_id, released.eos_id, released.pad_id) == (129280, 0, 1, 2)
    assert released.encode("<｜User｜>Hi<｜Assistant｜></think>")[:1] == [128803]
    assert released.decode([128803, 1, 128822]) == "<｜User｜><｜end▁of▁sentence｜></think>"
    assert released.decode([128803, 1, 128822], skip_special=True) == "<｜User｜></think>"


def test_released_tokenizer_loads_without_transformers() -> None:
    """Reading the package's files must not import it: that takes seconds and a dependency we do not have."""
    code = (
        "import sys; from fullweight.data.tokenizer import load_tokenizer; load_tokenizer('deepseek-v4');"
        "sys.exit('transformers' in sys.modules or 'torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_saved_released_tokenizer_is_the_published_file(released: Tokenizer, tmp_path: Path) -> None:
    """Saving keeps the release's bytes (published SHA-256) and loads again."""
    released.save(tmp_path / "new" / "folder")
    data = (tmp_path / "new" / "folder" / "tokenizer.json").read_bytes()
    assert hashlib.sha256(data).hexdigest() == "8f9f37ca37fdc4f5fd36d5cf4d3b0e8392edb4e894fd10cc0d70b4957c8633cf"
    again = load_tokenizer(tmp_path / "new" / "folder")
    assert again.encode(TEXTS[7]) == released.encode(TEXTS[7])


def test_trained_layout(trained: Tokenizer) -> None:
    """Control tokens come first in the encoding's order; the size is what was asked for, at most."""
    control = load_encoding("deepseek-v4").control_tokens
    assert [trained.token_id(token) for token in control] == list(range(len(control)))
    assert (trained.bos_id, trained.eos_id, trained.pad_id) == (0, 1, 2)
    assert len(control) + 256 < trained.vocab_size <= 400
    text = "".join(control)
    assert trained.encode(text) == list(range(len(control)))
    assert trained.decode(range(len(control)), skip_special=True) == "".join(control[3:])


def test_trained_digits_are_single_tokens(trained: Tokenizer) -> None:
    """Every digit is its own token wherever it stands, so a number's tokens are its decimal digits."""
    digits = {trained.encode(str(d))[0] for d in range(10)}
    assert len(digits) == 10
    for text in ("12", " 345", "a678b", "9,012.5", "x=-31\n", "٣٤"):
        ids = trained.encode_plain([text])[0]
        assert [trained.decode([i]) for i in ids if i in digits] == [c for c in text if c in "0123456789"]


def test_training_is_deterministic() -> None:
    """The same texts give the same file, so a run's tokenizer can be rebuilt."""
    assert train_tokenizer(TEXTS, 350)._texts == train_tokenizer(iter(TEXTS), 350)._texts


@pytest.mark.parametrize("text", HOSTILE)
def test_round_trip_of_hostile_text(text: str, trained: Tokenizer, released: Tokenizer) -> None:
    """Byte-level vocabularies lose nothing, never seen or not."""
    for tokenizer in (trained, released):
        assert tokenizer.decode(tokenizer.encode(text)) == text
        assert tokenizer.decode(tokenizer.encode_plain([text])[0]) == text


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet=st.characters(), max_size=40))
def test_any_python_string_encodes(text: str) -> None:
    """No string fails; one that is Unicode text comes back, lone surrogates come back as U+FFFD."""
    tokenizer = _SMALL
    expected = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    assert tokenizer.decode(tokenizer.encode_plain([text, "x"])[0]) == expected


_SMALL = train_tokenizer(TEXTS[:50], 300)


def test_lone_surrogates_become_the_replacement_character(trained: Tokenizer, released: Tokenizer) -> None:
    """JSON can carry half a character; training must not stop for it."""
    broken = json.loads('"a\\ud83d b"')
    for tokenizer in (trained, released):
        assert tokenizer.decode(tokenizer.encode(broken)) == "a\ufffd b"
    assert train_tokenizer([broken] * 9, 300).encode("a\ufffd b") == train_tokenizer(
        ["a\ufffd b"] * 9, 300
    ).encode("a\ufffd b")


@pytest.mark.parametrize("kind", ["trained", "released"])
def test_transformers_loads_the_saved_files(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """AutoTokenizer gives the same ids, the same special ids and the same text back."""
    from transformers import AutoTokenizer

    tokenizer: Tokenizer = request.getfixturevalue(kind)
    tokenizer.save(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    for text in [*HOSTILE, *TEXTS[:20], "<｜User｜>a<｜Assistant｜><think>b</think>c<｜end▁of▁sentence｜>"]:
        ids = tokenizer.encode(text)
        assert theirs(text, add_special_tokens=False)["input_ids"] == ids
        assert theirs.decode(ids) == text
    assert (theirs.bos_token_id, theirs.eos_token_id) == (0, 1)


def test_plain_encoding_spells_control_tokens_out(trained: Tokenizer, released: Tokenizer) -> None:
    """The plain reading of a control token is its characters."""
    for tokenizer in (trained, released):
        token = "<｜User｜>"
        assert tokenizer.encode(token) == [tokenizer.token_id(token)]
        ids = tokenizer.encode_plain([token])[0]
        assert tokenizer.token_id(token) not in ids
        assert tokenizer.decode(ids) == token


def test_load_by_folder_or_file(trained: Tokenizer, tmp_path: Path) -> None:
    """A model folder and the path of its tokenizer.json mean the same."""
    trained.save(tmp_path)
    for spec in (tmp_path, str(tmp_path), tmp_path / "tokenizer.json"):
        assert load_tokenizer(spec).encode("12 apples") == trained.encode("12 apples")


def test_errors_say_what_to_do(trained: Tokenizer, tmp_path: Path) -> None:
    """Absent, malformed and foreign files; a vocabulary too small; a token of another encoding."""
    with pytest.raises(ConfigError, match=r"no .*tokenizer\.json and no .*; give 'deepseek-v4' or a folder"):
        load_tokenizer(tmp_path / "nowhere")
    trained.save(tmp_path)
    with pytest.raises(DataError, match="has no token '<other>'"):
        trained.token_id("<other>")
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": "<s>"}')
    with pytest.raises(ConfigError, match="bos_token is '<s>', which tokenizer"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ConfigError, match="malformed tokenizer"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="tokenizer"):
        load_tokenizer(tmp_path)
    with pytest.raises(ConfigError, match="vocab_size must be at least 272"):
        train_tokenizer(TEXTS, 271)
