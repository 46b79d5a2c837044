"""Names of rules are for others to build on: each is documented, and claims stand on rules that there are."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from tests.processes import ROOT

from fullweight.audit import verify
from fullweight.audit.boundaries import Failure
from fullweight.audit.claims import CLAIMS
from fullweight.audit.rule import RULES
from fullweight.evidence.bundle import REFUSALS


def test_every_rule_is_documented_with_what_it_proves() -> None:
    """The table of docs/evidence.md has a row for each, in the words of the program."""
    text = (ROOT / "docs" / "evidence.md").read_text(encoding="utf-8")
    assert verify.COMPLETENESS
    for rule in RULES:
        assert f"| `{rule.name}` | {rule.proves} | {rule.cannot} |" in text
    for name, meaning in REFUSALS.items():
        assert f"| `{name}` | {meaning} |" in text
    for name in ("bundle.signature", "bundles.seeds"):
        assert f"`{name}`" in text


def test_claims_stand_on_rules_that_are_there() -> None:
    names = {rule.name for rule in RULES}
    for kind in CLAIMS:
        assert set(kind.basis) <= names, kind.name
        assert len(set(kind.basis)) == len(kind.basis), kind.name


def test_every_forgery_of_the_table_has_its_rule_and_a_test_that_runs() -> None:
    """Rules and tests that a row names are there, and none of the tests is kept for the slow ones."""
    text = (ROOT / "docs" / "evidence.md").read_text(encoding="utf-8")
    _, _, table = text.partition("| forgery | covered up | caught by | test |\n|---|---|---|---|\n")
    rows = [row.strip("| ").split(" | ") for row in table.partition("\n\n")[0].splitlines()]
    assert len(rows) > 20
    tests = _tests()
    failures = {str(failure) for failure in Failure}
    named = {rule.name for rule in RULES} | set(REFUSALS) | failures | {"bundle.signature", "bundles.seeds"}
    for forgery, _, caught, by in rows:
        rules = re.findall(r"`([\w-]+\.[\w-]+)`", caught)
        assert rules or "`replay`" in caught or "`fullweight replay`" in caught, forgery
        assert set(rules) <= named, forgery
        assert by, forgery
        for name in re.findall(r"`(\w+)`", by):
            assert tests.get(name) is False, f"{forgery}: {name} is not there, or is slow"


def _tests() -> dict[str, bool]:
    """Whether a test of this folder is slow, by its name."""
    found = {}
    for path in Path(__file__).parent.glob("test_*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                marks = {ast.unparse(mark) for mark in node.decorator_list}
                found[node.name] = bool(marks & {"pytest.mark.slow", "pytest.mark.crash"})
    return found
