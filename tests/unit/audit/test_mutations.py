"""Whatever is done to a bundle, verification ends with a verdict or a refusal by name, and never with a yes."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from random import Random

from tests.unit.audit.conftest import Honest
from tests.unit.audit.forging import Forgery, named
from tests.unit.audit.mutating import damage, fresh, retype

from fullweight.audit.signing import Trust
from fullweight.audit.verify import verify
from fullweight.evidence.bundle import REFUSALS, RefusedError

ROUNDS = 100


def test_damage_to_a_signed_bundle_never_passes(honest: Honest, tmp_path: Path) -> None:
    """Bytes flipped, cut, put in or repeated; files exchanged, emptied, gone: seeded, so a failure repeats."""
    trust, random = Trust(public_key=honest.public_key), Random(20)
    passed = []
    for _ in range(ROUNDS):
        forgery = fresh(honest.bundle, tmp_path)
        done = damage(forgery.root, random)
        found = _ended(forgery.root, trust)
        # a signature can be written in other bytes, and then still is one over the same files
        if found == "holds" and done and not done.endswith("bundle.sig"):
            passed.append(done)
    assert passed == []


def test_values_of_another_kind_are_judged_or_refused(honest: Honest, tmp_path: Path) -> None:
    """With list and chain made to fit, so that the rules see them; signed by nobody, a verdict is all asked."""
    random, ends = Random(21), Counter[str]()
    for _ in range(ROUNDS):
        forgery = fresh(honest.bundle, tmp_path)
        retype(forgery, random)
        ends[_ended(forgery.root)] += 1
    assert min(ends["refused"], ends["refuted"]) > ROUNDS // 10, ends


def test_a_checkpoints_event_with_lists_for_names(honest: Honest, tmp_path: Path) -> None:
    """What no set can hold is judged like any other wrong name."""
    forgery = Forgery(honest.bundle, tmp_path)
    for key in ("generation", "manifest_sha256"):
        lines = forgery.lines()
        named(lines, "checkpoint")[0][key] = [{}]
        forgery.write_lines(lines)
        forgery.relist()
        assert _ended(forgery.root) == "refuted"


def _ended(root: Path, trust: Trust | None = None) -> str:
    """How a verification ended; any other error is the test's."""
    try:
        return "refuted" if verify(root, trust=trust).refuted else "holds"
    except RefusedError as error:
        return "refused" if error.rule in REFUSALS and len(str(error)) < 1000 else str(error)
