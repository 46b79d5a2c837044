"""The words that optimisation problems share: sums, plans, lists and the closing instruction."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

from fullweight.data.synth.answers import format_number
from fullweight.data.synth.problem import Problem
from fullweight.data.synth.solver import Optimum

_CLOSING = " Finish with a line 'Answer: ' and the number."


def optimum_problem(question: str, steps: str, optimum: Optimum) -> Problem:
    """The problem, with the form of the answer asked for."""
    return Problem(question + _CLOSING, steps, format_number(optimum.value))


def expression(weights: Sequence[int], names: Sequence[str]) -> str:
    """'3 a + 2 b', zero terms left out."""
    return " + ".join(f"{w} {n}" for w, n in zip(weights, names, strict=True) if w)


def value_sum(weights: Sequence[int], plan: Sequence[Fraction], value: Fraction) -> str:
    """'3 x 4 + 2 x 1.5 = 15', zero terms left out."""
    terms = [f"{w} x {format_number(x)}" for w, x in zip(weights, plan, strict=True) if w and x]
    return f"{' + '.join(terms)} = {format_number(value)}"


def plan_text(names: Sequence[str], plan: Sequence[Fraction]) -> str:
    """'a = 4, b = 1.5', zeros kept."""
    return ", ".join(f"{name} = {format_number(x)}" for name, x in zip(names, plan, strict=True))


def sentence(text: str) -> str:
    """The text with its first letter a capital."""
    return text[:1].upper() + text[1:]


def listing(parts: Sequence[str]) -> str:
    """'a, b and c'."""
    return f"{', '.join(parts[:-1])} and {parts[-1]}"
