"""JSON that two readers could take for different things is refused."""

from __future__ import annotations

import json

import pytest

from fullweight.core.strict_json import parse_strict


@pytest.mark.parametrize("text", ['{"a": [1, 2.5, null, true, "x"], "b": {"c": -1e-3}}', "[]", b"[1]", '"text"'])
def test_plain_json_is_what_json_says(text: str | bytes) -> None:
    assert parse_strict(text) == json.loads(text)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"a": 1, "b": 2, "a": 3}', "'a' is given twice"),
        ('{"a": NaN}', "NaN is no number"),
        ("[-Infinity]", "-Infinity is no number"),
        ("[1e999]", "beyond what a reader can hold"),
        (f"[{'9' * 100}]", "100 digits"),
        ("[" * 100 + "]" * 100, "beyond 64 levels"),
        ("[" * 100_000 + "]" * 100_000, "nested too deeply"),
        (b'"\xff"', r"not UTF-8 \(byte 1\)"),
        ('{"a": 1', "not JSON"),
        ("", "not JSON"),
    ],
)
def test_what_readers_could_differ_on_is_refused(text: str | bytes, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        parse_strict(text)
