"""Reading the final answer of a response, exactly.

A response ends with one line `Answer: VALUE`. A number may be written as an integer, a terminating decimal
or a fraction and is compared as a rational number; anything else is a name, compared without regard to case
and spacing. There is no tolerance and no search for a number somewhere in the text: a checker that is also
a reward must not be easier to please than to satisfy. Text up to `</think>` is reasoning and is not read.
"""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Any

from fullweight.core.errors import DataError

_LINE = re.compile(r"answer:[ \t]*(\S.*)", re.IGNORECASE)
_DECIMAL = re.compile(r"[+-]?[0-9]{1,30}(\.[0-9]{1,30})?", re.ASCII)
_FRACTION = re.compile(r"([+-]?[0-9]{1,30})/([0-9]{1,30})", re.ASCII)
_END_OF_THINKING = "</think>"
_END_OF_SENTENCE = "<｜end▁of▁sentence｜>"


def format_answer(answer: str) -> str:
    """The final line that `check` reads."""
    return f"Answer: {answer}"


def format_number(value: Fraction | int) -> str:
    """Canonical text of a rational: an integer, else a terminating decimal, else a reduced fraction.

    >>> format_number(Fraction(7, 2)), format_number(Fraction(6, 2)), format_number(Fraction(1, 3))
    ('3.5', '3', '1/3')
    """
    value = Fraction(value)
    for decimals in range(13):
        scaled = value * 10**decimals
        if scaled.denominator == 1:
            if decimals == 0:
                return str(scaled.numerator)
            digits = f"{abs(scaled.numerator):0{decimals + 1}d}"
            return f"{'-' if value < 0 else ''}{digits[:-decimals]}.{digits[-decimals:]}"
    return f"{value.numerator}/{value.denominator}"


def parse_value(text: str) -> Fraction | str | None:
    """The number or the name that `text` is, whole; None when it is neither (empty, NaN, infinity)."""
    text = text.strip()
    if _DECIMAL.fullmatch(text):
        return Fraction(text)
    fraction = _FRACTION.fullmatch(text)
    if fraction:
        numerator, denominator = int(fraction[1]), int(fraction[2])
        return Fraction(numerator, denominator) if denominator else None
    name = " ".join(text.split()).casefold()
    return None if name.lstrip("+-") in {"", "nan", "inf", "infinity"} else name


def parse_answer(response: str) -> Fraction | str | None:
    """The final answer of a response; None when it is missing, not last, or contradicted by another."""
    text = response.removesuffix(_END_OF_SENTENCE).rpartition(_END_OF_THINKING)[2]
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    matches = [_LINE.fullmatch(line) for line in lines]
    if not matches or matches[-1] is None:
        return None
    values = {parse_value(match[1]) for match in matches if match}
    return values.pop() if len(values) == 1 else None


def check(sample: dict[str, Any], response: str) -> bool:
    """Whether the response's final answer is exactly the sample's.

    Raises DataError when the sample has no answer to compare with.
    """
    answer = sample.get("answer")
    expected = parse_value(answer) if isinstance(answer, str) else None
    if expected is None:
        raise DataError(
            f"sample {sample.get('id', '(no id)')} cannot be checked: its answer is {answer!r}, expected "
            'text such as "42" or "Ann"'
        )
    return parse_answer(response) == expected
