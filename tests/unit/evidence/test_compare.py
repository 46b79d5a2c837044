"""Comparing runs: what is told of curves whose difference is known, and of logs that other frameworks write."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fullweight.cli.main import main
from fullweight.core.errors import DataError
from fullweight.evidence.compare import Side, Verdict, compare, interval, relative
from fullweight.evidence.curves import HELD_OUT, LOSS, WALL, read_curve
from fullweight.evidence.ledger import Ledger

Write = Callable[..., Path]


@pytest.fixture
def run(tmp_path: Path) -> Write:
    """Write a run folder whose step n has the n-th of the given losses."""

    def write(name: str, losses: Sequence[float], *, seconds: float = 2.0, watts: float | None = None) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        lines = Ledger(folder / "ledger.jsonl")
        lines.append("event", 0, {"what": "start"})
        for step, loss in enumerate(losses, 1):
            values: dict[str, Any] = {
                "loss": {"lm": loss, "mtp": 2 * loss},
                "total_loss": 1.6 * loss,
                "grad_norm": 1.0,
                "learning_rate": 1e-3,
                "mfu": 0.25,
                "tokens": {"real": 100, "padding": 4, "trained": 50},
                "tokens_per_second": 100 / seconds,
                "seconds": {"forward": seconds, "total": seconds},
                "power": {"watts": watts, "source": "meter"},
            }
            lines.append("step", step, values)
        lines.append("eval", len(losses), {"loss": {"lm": losses[-1]}, "score": None})
        lines.close()
        return folder

    return write


def _sides(*groups: Sequence[Path]) -> list[Side]:
    return [Side(group[0].name, tuple(map(read_curve, group))) for group in groups]


def test_equal_runs_are_identical(run: Write) -> None:
    found = compare(_sides([run("a", [3.0, 2.0])], [run("b", [3.0, 2.0])])).pairs[0]
    assert found.verdict is Verdict.identical
    assert all(d.first_unequal is None and d.largest == 0 for d in found.differences)
    assert found.differences[0].num_steps == 2


def test_the_last_bit_is_a_difference_and_still_equivalent(run: Write) -> None:
    almost = [3.0, 2.0, math.nextafter(1.5, 2.0)]
    found = compare(_sides([run("a", [3.0, 2.0, 1.5])], [run("b", almost)])).pairs[0]
    assert found.verdict is Verdict.equivalent
    assert found.differences[0].first_unequal == 3
    assert found.differences[0].first_beyond is None


def test_the_first_step_beyond_the_tolerance_is_named(run: Write) -> None:
    a, b = [4.0, 3.0, 2.0, 2.0, 2.0], [4.0, 3.01, 2.0, 2.1, 2.0]
    found = compare(_sides([run("a", a)], [run("b", b)])).pairs[0]
    assert found.verdict is Verdict.different
    loss = found.differences[0]
    assert (loss.first_unequal, loss.first_beyond, loss.largest_at) == (2, 4, 4)
    assert loss.largest == pytest.approx(0.05)
    assert loss.mean == pytest.approx((0.01 / 3 + 0.05) / 5)
    assert "differs at step 4: lm" in found.told


def test_a_running_mean_takes_out_noise_that_averages_out(run: Write) -> None:
    noisy = [2.0 * (1 + (-1) ** step * 0.03) for step in range(40)]
    sides = _sides([run("a", [2.0] * 40)], [run("b", noisy)])
    assert compare(sides).pairs[0].verdict is Verdict.different
    smooth = compare(sides, window=8, tolerance=0.035).pairs[0]
    assert smooth.verdict is Verdict.equivalent
    assert smooth.differences[0].largest_at == 1  # where the mean is of one value


def test_numbers_that_are_not_finite(run: Write) -> None:
    a = np.array([1.0, math.nan, math.inf, 0.0, 0.0, 2.0])
    b = np.array([1.0, math.nan, math.inf, 0.0, 1.0, math.nan])
    assert relative(a, b).tolist() == [0.0, 0.0, 0.0, 0.0, math.inf, math.inf]
    found = compare(_sides([run("a", [1.0, 2.0])], [run("b", [1.0, math.nan])])).pairs[0]
    assert found.verdict is Verdict.different
    assert found.differences[0].first_beyond == 2


def test_only_common_steps_are_compared(run: Write, tmp_path: Path) -> None:
    (tmp_path / "other.csv").write_text("step,loss\n2,2.0\n3,1.0\n9,0.5\n")
    found = compare(_sides([run("a", [3.0, 2.0, 1.0])], [tmp_path / "other.csv"])).pairs[0]
    assert found.verdict is Verdict.identical
    assert found.differences[0].num_steps == 2
    (tmp_path / "late.csv").write_text("step,loss\n7,2.0\n")
    with pytest.raises(DataError, match="no step in common"):
        compare(_sides([tmp_path / "other.csv"], [tmp_path / "late.csv"]))


def test_the_interval_over_seeds_is_students_of_the_logarithms() -> None:
    found = interval([1.0, math.e, math.e**2])
    half = 4.302652729911275 / math.sqrt(3)  # t of 97.5 % and 2 degrees of freedom, from a table; deviation 1
    assert (found.mean, found.num_runs) == (pytest.approx(math.e), 3)
    assert found.low == pytest.approx(math.exp(1 - half))
    assert found.high == pytest.approx(math.exp(1 + half))
    one = interval([5.0])
    assert (one.mean, one.low, one.high) == (5.0, None, None)
    assert interval([0.0, 7.0]).low is None, "the target was there at once in a run, which has no logarithm"


@pytest.mark.parametrize("values", [[3.0, 9.0], [100.0, 101.0, 250.0], [0.2, 0.2, 0.2], [1e-9, 1.0, 1e9, 4.0]])
def test_the_interval_of_a_positive_number_is_scipys_and_positive(values: list[float]) -> None:
    """Student's t of the numbers themselves would reach below zero for the first, the second and the last."""
    from scipy import stats

    found, logs = interval(values), np.log(values)
    assert found.mean == pytest.approx(stats.gmean(values))
    if np.ptp(logs) == 0:
        assert found.low == found.mean == found.high
        return
    low, high = np.exp(stats.ttest_1samp(logs, 0.0).confidence_interval(0.95))
    assert found.low is not None
    assert found.high is not None
    assert (found.low, found.high) == (pytest.approx(low), pytest.approx(high))
    assert 0 < found.low < found.mean < found.high


@pytest.mark.parametrize(
    ("others", "verdict"),
    [
        ([2.0, 2.001, 1.999], Verdict.equivalent),
        ([2.5, 2.51, 2.49], Verdict.different),
        ([2.0, 2.3, 1.7], Verdict.undecided),
    ],
)
def test_seeds_decide_by_the_end_of_training(run: Write, others: list[float], verdict: Verdict) -> None:
    ends = [2.0, 2.002, 1.998]
    sides = [[run(f"{side}{n}", [4.0 - n, end]) for n, end in enumerate(group)] for side, group in
             (("a", ends), ("b", others))]  # fmt: skip
    found = compare(_sides(*sides)).pairs[0]
    assert found.verdict is verdict
    assert found.end is not None
    # Welch's interval written out: the means' standard error and the degrees of freedom of Welch and Satterthwaite
    va, vb = np.var(ends, ddof=1) / 3, np.var(others, ddof=1) / 3
    from scipy.stats import t

    half = t.ppf(0.975, (va + vb) ** 2 / (va**2 / 2 + vb**2 / 2)) * math.sqrt(va + vb)
    middle = (np.mean(others) - np.mean(ends)) / np.mean(ends)
    assert found.end.relative == pytest.approx(middle)
    assert found.end.low == pytest.approx(middle - half / np.mean(ends))
    assert found.end.high == pytest.approx(middle + half / np.mean(ends))


def test_costs_and_the_time_to_a_loss(run: Write) -> None:
    fast, slow = run("fast", [4.0, 3.0, 2.0, 1.0], seconds=1.0, watts=100.0), run("slow", [4.0, 3.0, 3.0, 1.0])
    found = compare(_sides([fast], [slow]), target=2.5)
    costs = found.costs["fast"]
    assert costs.tokens_per_second is not None
    assert costs.tokens_per_second.mean == 100.0
    assert costs.joules_per_token is not None
    assert costs.joules_per_token.mean == pytest.approx(1.0)
    assert found.target_metric == HELD_OUT
    assert found.costs["slow"].joules_per_token is None  # no meter, no figure
    assert compare(_sides([fast], [slow]), target=0.1).costs["fast"].seconds_to_target is None


def test_time_to_target_of_training_losses(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("iteration,lm loss,elapsed_seconds\n1,3,10\n2,2,20\n3,1,30\n")
    (tmp_path / "b.csv").write_text("iteration,lm loss,elapsed_seconds\n1,3,5\n2,2.5,10\n3,1.5,15\n")
    found = compare(_sides([tmp_path / "a.csv"], [tmp_path / "b.csv"]))
    assert (found.target, found.target_metric) == (1.5, LOSS)
    told = {name: (c.seconds_to_target, c.steps_to_target) for name, c in found.costs.items()}
    assert told["a.csv"][0] is not None
    assert (told["a.csv"][0].mean, told["b.csv"][0].mean) == (30.0, 15.0)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "header",
    [
        "step,loss",
        "global_step,train/loss",
        "Iteration,LM Loss",
        "train/global_step,train_loss",
        "iter,reduced_train_loss",
    ],
)
def test_usual_names_of_columns(tmp_path: Path, header: str) -> None:
    path = tmp_path / "log.csv"
    path.write_text(f"{header},run name\n1,2.5,first\n2,,first\n1,2.25,again\n")
    loss = read_curve(path).series[LOSS]
    assert (loss.steps.tolist(), loss.values.tolist()) == ([1], [2.25])  # the last of a step; empty cells left out


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("step,loss\n1,high\n", "log.csv:2: loss is 'high', expected a number"),
        ("step,loss\n1.5,2\n", "log.csv:2: step is '1.5', expected a whole number"),
        ("step,loss\n1,2,3\n", "more cells than the header"),
        ("time,loss\n1,2\n", "no column of steps"),
        ("step,perplexity\n1,2\n", "--column lm=NAME"),
        ("", "no column of steps"),
    ],
)
def test_bad_tables(tmp_path: Path, text: str, told: str) -> None:
    (tmp_path / "log.csv").write_text(text)
    with pytest.raises(DataError) as refused:
        read_curve(tmp_path / "log.csv")
    assert told in str(refused.value)


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_bytes(b"step,loss\n1,\xff\xfe\n")
    with pytest.raises(DataError, match="UTF-8"):
        read_curve(tmp_path / "log.csv")


def test_columns_of_other_names_are_named_by_the_user(tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_text("step,nll,aux\n1,2.0,0.5\n")
    curve = read_curve(tmp_path / "log.csv", {"lm": "nll", "balance": "aux"})
    assert curve.series["balance"].values.tolist() == [0.5]
    with pytest.raises(DataError, match="no column for --column lm=entropy; it has nll, aux"):
        read_curve(tmp_path / "log.csv", {"lm": "entropy"})


def test_tensorboard_folders(tmp_path: Path, run: Write) -> None:
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(tmp_path / "tb"))
    for step, loss in enumerate([3.0, 2.0, 1.5], 1):
        writer.add_scalar("train/loss", loss, step, walltime=1000.0 + 7 * step)
    writer.close()
    curve = read_curve(tmp_path / "tb")
    assert curve.series[LOSS].values.tolist() == [3.0, 2.0, 1.5]
    assert curve.series[WALL].values.tolist() == [0.0, 7.0, 14.0]
    assert compare(_sides([run("a", [3.0, 2.0, 1.5])], [tmp_path / "tb"])).pairs[0].verdict is Verdict.identical


def test_what_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nothing at"):
        read_curve(tmp_path / "absent")
    with pytest.raises(DataError, match="is no run"):
        read_curve(tmp_path)


def test_the_command_tells_writes_and_exits(
    run: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b, c = run("a", [3.0, 2.0]), run("b", [3.0, 2.0]), run("c", [3.0, math.nan])
    assert main(["compare", str(a), str(b)]) == 0
    assert "identical: lm, mtp equal bit for bit on 2 common steps" in capsys.readouterr().out
    page, data = tmp_path / "page.html", tmp_path / "data.json"
    assert main(["compare", str(a), str(c), "--html", str(page), "--json", str(data)]) == 1
    assert "differs at step 2" in capsys.readouterr().out
    found = json.loads(data.read_text())
    assert found["pairs"][0]["loss"]["b"] == [3.0, "nan"]
    assert found["pairs"][0]["verdict"] == "different"
    text = page.read_text()
    assert "differs at step 2" in text
    assert "plotly" in text
    assert "https://cdn" not in text.split("<body>")[0]
    assert main(["compare", f"{a},{b}", str(c)]) == 1  # one side alone has seeds: by steps, on the mean


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["{a}"], "takes two runs or more"),
        (["{a}", "{a}"], "given twice"),
        (["{a}", "{b}", "--column", "lm"], "ours=theirs"),
        (["{a}", "{b}", "--json", "{a}/none/x.json"], "no folder"),
        (["{a}", "{b}/absent"], "nothing at"),
    ],
)
def test_mistakes(run: Write, capsys: pytest.CaptureFixture[str], arguments: list[str], told: str) -> None:
    a, b = run("a", [3.0]), run("b", [3.0])
    assert main(["compare", *(text.format(a=a, b=b) for text in arguments)]) == 1
    assert told in capsys.readouterr().err
