"""What is printed is what was said: folders and answers are text, never style or terminal commands."""

from __future__ import annotations

import io

from rich.console import Console

from fullweight.train.evaluate import Answer
from fullweight.train.finish import show_answers
from fullweight.train.progress import Reporter


def test_brackets_and_control_characters_are_shown_not_obeyed() -> None:
    """A closing tag without its opening one, a style, a backslash before a bracket, and a terminal escape."""
    stream = io.StringIO()
    reporter = Reporter(Console(file=stream, width=200))
    reporter.say("into runs/[/x] [bold]")
    said = r"\[/b] [red]x \x1b".replace(r"\x1b", "\x1b[2J")
    show_answers(1, [Answer("a", "q [/q]", said, "e [/e]", False)], reporter)
    printed = stream.getvalue()
    for text in ("into runs/[/x] [bold]", "q [/q]", r"\[/b] [red]x �[2J", "e [/e]"):
        assert text in printed
    assert "\x1b" not in printed
