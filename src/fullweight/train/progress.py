"""What a person watching sees: a live bar on a terminal, plain lines otherwise, nothing on other ranks."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

_PLAIN_SECONDS = 5.0


class Reporter:
    """Prints messages and step lines of rank 0. `console` None is silent."""

    def __init__(self, console: Console | None) -> None:
        self.console = console
        self._bar: Progress | None = None
        self._task: Any = None
        self._printed = self._first_time = 0.0
        self._first_step = 0

    def say(self, *renderables: Any) -> None:
        """Print above the bar."""
        if self.console is not None:
            # markup off: a folder's name or an answer with brackets is text, not style
            self.console.print(*renderables, markup=False)

    @contextmanager
    def steps(self, first: int, total: int) -> Iterator[None]:
        """Show progress from `first` steps done to `total`."""
        self._first_step, self._first_time = first, time.perf_counter()
        if self.console is None or not self.console.is_terminal:
            yield
            return
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=self.console) as bar:
            self._bar, self._task = bar, bar.add_task("training", total=total, completed=first)
            yield
        self._bar = None

    def step(self, step: int, total: int, record: dict[str, Any]) -> None:
        """Show one finished step."""
        if self.console is None:
            return
        text = summary_line(record)
        if self._bar is not None:
            self._bar.update(self._task, completed=step, description=text)
            return
        now = time.perf_counter()
        if now - self._printed < _PLAIN_SECONDS and step not in (1, total):
            return
        self._printed = now
        left = (now - self._first_time) / max(step - self._first_step, 1) * (total - step)
        self.console.print(f"step {step}/{total}  {text}  {_clock(left)} left", highlight=False, soft_wrap=True)


def summary_line(record: dict[str, Any]) -> str:
    """The few numbers worth watching."""
    losses = "  ".join(f"{name} {value:.4f}" for name, value in record["loss"].items() if name != "balance")
    line = (
        f"{losses}  grad {record['grad_norm']:.2f}  {record['tokens_per_second']:,.0f} tok/s"
        f"  MFU {record['mfu']:.1%}"
    )
    return line + (f"  SKIPPED: {record['skipped']}" if record["skipped"] else "")


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
