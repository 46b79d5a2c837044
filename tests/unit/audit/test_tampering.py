"""What a forger can do to a bundle, and the rule by whose name each is caught.

Every forgery but the first few is covered as well as the program's own code can cover it: chain, list of files,
figures and claims are made anew. A test asks for the one rule that is meant, not merely for any refusal.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.unit.audit.conftest import Honest
from tests.unit.audit.forging import Entry, Forgery, refuted, retime, steps

from fullweight.audit.rule import Status
from fullweight.audit.signing import Trust
from fullweight.audit.verify import verify


def test_an_honest_run_holds(honest: Honest) -> None:
    """Every rule is looked at, signature, checkpoints, export and data too, and none is refuted or passed over."""
    report = verify(honest.bundle, run=honest.run, trust=Trust(public_key=honest.public_key), with_data=True)
    assert [f for f in report.findings if f.status is not Status.holds] == []
    open_claims = {v.claim for v in report.verdicts if v.status is not Status.holds}
    assert open_claims <= {"complete", "energy-per-token", "full-parameter"}


def test_a_bundle_alone_says_what_was_not_looked_at(honest: Honest) -> None:
    """Without key, run and data nothing is refuted, and what needs them is called not checkable."""
    report = verify(honest.bundle)
    assert not report.refuted
    passed_over = {f.rule for f in report.findings if f.status is Status.not_checkable}
    assert {"bundle.signature", "checkpoint.bytes", "checkpoint.roots", "export.bytes"} <= passed_over
    assert {"export.complete", "data.files", "data.samples", "data.held-out", "data.batches"} <= passed_over


def _edit_loss(lines: list[Entry]) -> None:
    steps(lines)[-1]["loss"]["lm"] -= 0.5


def _edit_loss_everywhere(lines: list[Entry]) -> None:
    step = steps(lines)[-1]
    step["loss"]["lm"] -= 0.5
    step["total_loss"] -= 0.5
    for name, value in (("lm", step["loss"]["lm"]), ("total", step["total_loss"])):
        step["loss_hex"][name] = struct.pack(">f", value).hex()


def _edit_early_loss_everywhere(lines: list[Entry]) -> None:
    _edit_loss_everywhere([next(line for line in lines if line["kind"] == "step")])


def _remove_step(lines: list[Entry]) -> None:
    lines.remove(steps(lines)[2])


def _reorder(lines: list[Entry]) -> None:
    a, b = (lines.index(step) for step in steps(lines)[:2])
    lines[a], lines[b] = lines[b], lines[a]


def _swap_times(lines: list[Entry]) -> None:
    """The slowest step's time for the fastest's, by a factor that no clock explains."""
    ordered = sorted(steps(lines), key=lambda step: float(step["seconds"]["total"]))
    fast, slow = ordered[0], ordered[-1]
    mine, other = fast["seconds"], {name: value * 3 + 1 for name, value in slow["seconds"].items()}
    other["total"] = sum(value for name, value in other.items() if name != "total")
    retime(fast, other)
    retime(slow, mine)


def _shorten_times(lines: list[Entry]) -> None:
    for step in steps(lines):
        retime(step, {name: value / 10 for name, value in step["seconds"].items()})


def _shorten_total(lines: list[Entry]) -> None:
    for step in steps(lines):
        retime(step, {**step["seconds"], "total": step["seconds"]["total"] / 2})


def _clock_back(lines: list[Entry]) -> None:
    lines[-1]["time"] = lines[0]["time"] - 60


def _cut_end(lines: list[Entry]) -> None:
    del lines[lines.index(steps(lines)[-1]) :]


def _declare_natural(lines: list[Entry]) -> None:
    for step in steps(lines):
        step["experts"].update(max_over_mean=1.0, dead=0)


def _forced(lines: list[Entry]) -> None:
    steps(lines)[1]["routing"] = "forced"


def _another_peak(lines: list[Entry]) -> None:
    for step in steps(lines):
        step["peak"]["flops_per_second"] /= 2
        step["mfu"] *= 2


def _count_padding(lines: list[Entry]) -> None:
    so_far = 0
    for step in steps(lines):
        tokens = step["tokens"]
        tokens["real"], tokens["padding"] = tokens["real"] + tokens["padding"], 0
        so_far += tokens["real"]
        tokens["so_far"] = so_far
        step["tokens_per_second"] = tokens["real"] / step["seconds"]["total"]


def _more_tokens(lines: list[Entry]) -> None:
    steps(lines)[3]["tokens"]["so_far"] += 100


def _faster(lines: list[Entry]) -> None:
    for step in steps(lines):
        step["tokens_per_second"] *= 1.1


def _more_flops(lines: list[Entry]) -> None:
    for step in steps(lines):
        step["model_flops_per_second"] *= 2
        step["mfu"] *= 2


def _more_mfu(lines: list[Entry]) -> None:
    for step in steps(lines):
        step["mfu"] = 0.5


def _another_rate(lines: list[Entry]) -> None:
    for step in steps(lines):
        step["learning_rate"] *= 2


def _hide_skip(lines: list[Entry]) -> None:
    steps(lines)[2]["grad_norm"] = "inf"


def _fewer_trained(lines: list[Entry]) -> None:
    for step in steps(lines):
        step["parameters"]["trained"] //= 2


def _better_score(lines: list[Entry]) -> None:
    [line for line in lines if line["kind"] == "eval"][-1]["score"] = 0.99


def _other_samples(lines: list[Entry]) -> None:
    [line for line in lines if line["kind"] == "eval"][-1]["samples"] = "0" * 64


def _hide_segment(lines: list[Entry]) -> None:
    lines[0]["segment"] = 1


def _another_run(lines: list[Entry]) -> None:
    lines[0]["run"] = "another"


COVERED: list[tuple[str, Callable[[list[Entry]], None], str]] = [
    ("a loss beside its bits", _edit_loss, "ledger.losses"),
    ("a loss, bits and total, before a checkpoint", _edit_early_loss_everywhere, "checkpoint.ledger"),
    ("a removed line", _remove_step, "ledger.steps"),
    ("two lines that changed places", _reorder, "ledger.times"),
    ("step times that changed places", _swap_times, "ledger.step-times"),
    ("shortened step times", _shorten_times, "ledger.idle"),
    ("a shorter total", _shorten_total, "ledger.phases"),
    ("a clock that goes back", _clock_back, "ledger.times"),
    ("a ledger cut short", _cut_end, "ledger.finish"),
    ("forced routing called natural", _declare_natural, "ledger.routing"),
    ("forced routing", _forced, "ledger.routing"),
    ("MFU over another peak", _another_peak, "ledger.peak"),
    ("padded tokens that count", _count_padding, "ledger.documents"),
    ("a running sum that is none", _more_tokens, "ledger.tokens"),
    ("more tokens a second", _faster, "ledger.throughput"),
    ("more FLOPs than the documents have", _more_flops, "ledger.flops"),
    ("MFU by itself", _more_mfu, "ledger.mfu"),
    ("a learning rate that is not as declared", _another_rate, "ledger.learning-rate"),
    ("a skipped step that is hidden", _hide_skip, "ledger.skips"),
    ("frozen parameters", _fewer_trained, "ledger.parameters"),
    ("a better score than the answers", _better_score, "evaluation.answers"),
    ("one evaluation on other samples", _other_samples, "evaluation.samples"),
    ("an interruption that is hidden", _hide_segment, "ledger.segments"),
    ("the ledger of another run", _another_run, "ledger.run"),
]


@pytest.mark.parametrize(("change", "rule"), [pytest.param(c, r, id=name) for name, c, r in COVERED])
def test_a_covered_change_of_the_ledger_is_caught(
    change: Callable[[list[Entry]], None], rule: str, honest: Honest, tmp_path: Path
) -> None:
    """The chain is whole and every figure fits; the changed number contradicts something all the same."""
    forgery = Forgery(honest.bundle, tmp_path)
    forgery.edit_lines(change)
    found = refuted(verify(forgery.root))
    assert rule in found
    assert "ledger.chain" not in found
    assert "bundle.hashes" not in found
    assert "performance.recomputed" not in found


@pytest.mark.parametrize("change", [_edit_loss_everywhere, _remove_step, _reorder])
def test_a_change_of_the_ledger_breaks_the_chain(
    change: Callable[[list[Entry]], None], honest: Honest, tmp_path: Path
) -> None:
    forgery = Forgery(honest.bundle, tmp_path)
    forgery.edit_lines(change, chained=False)
    assert "ledger.chain" in refuted(verify(forgery.root))


def test_a_file_that_was_changed_is_named(honest: Honest, tmp_path: Path) -> None:
    """Also when it is as long as before, and the signature no longer fits either."""
    forgery = Forgery(honest.bundle, tmp_path)
    text = (forgery.root / "evaluation.json").read_text()
    (forgery.root / "evaluation.json").write_text(text.replace("1", "2", 1))
    found = refuted(verify(forgery.root, trust=Trust(public_key=honest.public_key)))
    assert "evaluation.json" in found["bundle.hashes"]
    assert "evaluation.json" in found["bundle.signature"]


def test_a_loss_that_fits_in_all_else_is_not_signed_by_the_owner(honest: Honest, tmp_path: Path) -> None:
    """Were no checkpoint written after it, the key would be left, which a forger has not."""
    forgery = Forgery(honest.bundle, tmp_path)
    forgery.edit_lines(_edit_loss_everywhere)
    assert refuted(verify(forgery.root)).keys() == {"checkpoint.ledger"}
    assert "bundle.signature" in refuted(verify(forgery.root, trust=Trust(public_key=honest.public_key)))


def test_a_changed_manifest_is_not_the_one_that_was_bound(honest: Honest, tmp_path: Path) -> None:
    forgery = Forgery(honest.bundle, tmp_path)
    forgery.edit("manifest.json", lambda m: m["seeds"].update(train=7))
    forgery.relist()
    assert "manifest.bound" in refuted(verify(forgery.root))


def test_another_learning_rate_in_the_configuration(honest: Honest, tmp_path: Path) -> None:
    forgery = Forgery(honest.bundle, tmp_path)
    forgery.edit("config.json", lambda c: c["optimizer"].update(learning_rate=1e-3))
    forgery.relist()
    assert "manifest.config" in refuted(verify(forgery.root))


def test_another_peak_everywhere(honest: Honest, tmp_path: Path) -> None:
    """Manifest, events and steps agree; the checkpoints were written under other lines."""
    forgery = Forgery(honest.bundle, tmp_path)

    def change(lines: list[Entry]) -> None:
        _another_peak(lines)
        lines[0]["peak"]["flops_per_second"] /= 2

    forgery.edit_lines(change)
    forgery.edit_manifest(lambda m: m["peak"].update(flops_per_second=m["peak"]["flops_per_second"] / 2))
    found = refuted(verify(forgery.root))
    assert "ledger.peak" not in found
    assert "checkpoint.ledger" in found


def test_a_peak_that_the_chip_cannot_have(honest: Honest, tmp_path: Path) -> None:
    """An H100 with a tenth of its peak would make ten times the MFU."""
    forgery = Forgery(honest.bundle, tmp_path)
    forgery.edit_lines(lambda lines: lines[0]["device"].update(name="cuda", chip="NVIDIA H100 80GB HBM3"))
    assert "data sheet" in refuted(verify(forgery.root))["ledger.peak"]


def test_a_cut_ledger_that_calls_itself_unfinished(honest: Honest, tmp_path: Path) -> None:
    forgery = Forgery(honest.bundle, tmp_path)
    forgery.edit("bundle.json", lambda b: b.update(finished=False))
    forgery.edit_lines(_cut_end)
    assert "ledger.covers-files" in refuted(verify(forgery.root))


def test_a_cut_ledger_without_a_new_list(honest: Honest, tmp_path: Path) -> None:
    forgery = Forgery(honest.bundle, tmp_path)
    forgery.write_lines(forgery.lines()[:-1])
    assert "ledger.end" in refuted(verify(forgery.root))
