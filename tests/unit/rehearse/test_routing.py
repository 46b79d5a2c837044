"""Rows that a rank's experts are taken to receive."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fullweight.core.errors import ConfigError
from fullweight.rehearse.routing import Routing


def test_uniform_and_worst() -> None:
    """4 ranks send 600 choices each, 6 a token: on average a rank gets 600, at worst every token of all four."""
    assert Routing.parse("uniform").received(600, 4, 6, 8) == 600
    assert Routing.parse("worst").received(600, 4, 6, 8) == 4 * 100 * 6
    # three local experts can be chosen three times by a token, not six
    assert Routing.parse("worst").received(600, 4, 6, 3) == 4 * 100 * 3


def test_measured_takes_the_largest_load_of_a_ledger(tmp_path: Path) -> None:
    lines = [{"kind": "event"}] + [{"kind": "step", "experts": {"max_over_mean": m}} for m in (1.5, 2.5, 2.0)]
    (tmp_path / "ledger.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    routing = Routing.parse(str(tmp_path))
    assert routing.received(600, 4, 6, 8) == 1500
    assert routing.received(600, 2, 6, 8) == 2 * 100 * 6, "no more than there are choices"
    assert str(routing) == "measured, 2.50 times the mean"


@pytest.mark.parametrize(("content", "said"), [("", "no step yet"), ("{", "line 1: not JSON")])
def test_a_ledger_without_loads_is_told(content: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "ledger.jsonl").write_text(content)
    with pytest.raises(ConfigError, match=said):
        Routing.parse(str(tmp_path))
    with pytest.raises(ConfigError, match="expected uniform, worst, or a run folder"):
        Routing.parse(str(tmp_path / "nowhere"))
