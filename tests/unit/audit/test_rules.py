"""Names of rules are for others to build on: each is documented, and claims stand on rules that there are."""

from __future__ import annotations

from tests.processes import ROOT

from fullweight.audit import verify
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
