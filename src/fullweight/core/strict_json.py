"""JSON that somebody else wrote: whatever is wrong with it is a ValueError with a short reason.

`json.loads` has three more ways to fail than its documentation suggests: nesting beyond the interpreter's stack,
integers of thousands of digits, and bytes that are not UTF-8. Imports no torch.
"""

from __future__ import annotations

import json
import math
from typing import Any

_MOST_DIGITS = 40


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text; raises ValueError saying what is wrong and where."""
    try:
        return json.loads(text.decode("utf-8") if isinstance(text, bytes) else text)
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 (byte {error.start}); save the file as UTF-8") from None
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if error.lineno > 1 else ""
        raise ValueError(f"not JSON: {error.msg} at {line}column {error.colno}") from None
    except RecursionError:
        raise ValueError("JSON nested too deeply") from None
    except ValueError:  # what is left is int(), which refuses more than 4300 digits
        raise ValueError("not JSON that can be read: a number has too many digits") from None


def parse_strict(text: str | bytes, max_depth: int = 64) -> Any:
    """As `parse_json`, and nothing that two readers could take for different things.

    Refused with ValueError as well: a key given twice, NaN and infinities (which JSON has not), a number that is
    none once it is read (1e999), and nesting beyond `max_depth`.
    """
    try:
        decoded = text.decode("utf-8") if isinstance(text, bytes) else text
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 (byte {error.start})") from None
    try:
        value = json.loads(
            decoded, object_pairs_hook=_once, parse_constant=_no_constant, parse_float=_finite, parse_int=_integer
        )
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} at line {error.lineno}, column {error.colno}") from None
    except RecursionError:
        raise ValueError("JSON nested too deeply") from None
    _require_shallow(value, max_depth)
    return value


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(k for k in keys if keys.count(k) > 1)[:60]!r} is given twice")
    return found


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number of JSON")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {text[:20]} is beyond what a reader can hold")
    return value


def _integer(text: str) -> int:
    if len(text) > _MOST_DIGITS:
        raise ValueError(f"a number has {len(text)} digits")
    return int(text)


def _require_shallow(value: Any, max_depth: int) -> None:
    level = [value]
    for _ in range(max_depth):
        level = [
            child
            for one in level
            if isinstance(one, dict | list)
            for child in (one.values() if isinstance(one, dict) else one)
            if isinstance(child, dict | list)
        ]
        if not level:
            return
    raise ValueError(f"JSON nested beyond {max_depth} levels")
