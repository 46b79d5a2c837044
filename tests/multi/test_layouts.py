"""Ten steps under every layout of ranks are the ten steps of one rank.

The reference is one rank without any sharding on the same rows (`layouts.py` says what rows). Everything is fp64,
Newton-Schulz included: what is left of a difference is then a mistake, not the order of a sum, and no choice of
experts or entries lies so near a tie that rounding decides it.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch
from tests.multi.layouts import (
    CASES,
    INEXACT,
    SAME_BITS,
    STEPS,
    TIGHT,
    Case,
    Found,
    awkward_rows,
    found,
    run_cases,
)
from tests.processes import fullweight

from fullweight.models.deepseek_v4.config import DeepSeekV4Config
from fullweight.models.deepseek_v4.init import initialise
from fullweight.models.deepseek_v4.model import DeepSeekV4
from fullweight.models.deepseek_v4.moe import Gate

# The same fp64 numbers added in another order differ by about 1e-16 of a sum; 5e-16 is found after ten steps.
LOSS = 1e-12
# Of the way that a tensor went in ten steps. Hyper-connections read streams that start as copies of each other, so
# some directions of their gradients are rounding noise, which Muon makes larger by up to 1e5 at every step. A lost
# micro-batch, a gradient of half the ranks or a wrong expert would be some tenths.
WEIGHTS = 1e-5
# fp32 sums differ by about 6e-8, at every step anew, and the updates that follow divide by a gradient's own size:
# about 1e-6 in a loss is found after ten steps. A gradient's norm adds up such differences over all weights.
FP32_LOSS = 1e-5
FP32_NORM = 1e-4

pytestmark = pytest.mark.timeout(3600)  # the first case of so many ranks runs them all, within a limit of its own


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("layouts")


@cache
def launch(folder: Path, ranks: int, slow: bool, fp32: bool) -> None:
    """All cases of so many ranks in one start; each leaves a file."""
    chosen = [name for name, case in CASES.items() if (case.ranks, case.slow) == (ranks, slow)]
    names = [name for name in chosen if name.endswith("-fp32") == fp32]
    call = f"{run_cases.__module__}:{run_cases.__name__}"
    ended = fullweight(folder, *names, ranks=ranks, call=call, limit_seconds=60.0 * len(names) + 60)
    assert ended.ok, ended.output


def result(folder: Path, name: str) -> Found:
    launch(folder, CASES[name].ranks, CASES[name].slow, name.endswith("-fp32"))
    return found(folder, name)


def reference(name: str) -> str:
    """The case of one rank with the same rows and model."""

    def alike(case: Case) -> tuple[int, tuple[str, ...]]:
        return case.tokens, tuple(s for s in case.settings if s in TIGHT or not s.startswith("parallel."))

    return next(n for n, case in CASES.items() if case.ranks == 1 and alike(case) == alike(CASES[name]))


MANY = [name for name, case in CASES.items() if case.ranks > 1]


@pytest.mark.parametrize("name", [n for n in MANY if n.endswith("-fp32")])
@pytest.mark.slow
def test_a_layout_follows_one_rank_in_fp32(name: str, folder: Path) -> None:
    """Losses and norms step by step, as fp32 can tell them; the weights are compared in fp64 below."""
    one, many = result(folder, reference(name)), result(folder, name)
    for number, (a, b) in enumerate(zip(one.steps, many.steps, strict=True)):
        for exact in ("tokens", "without_gradient", "unseen"):
            assert b[exact] == a[exact], (number, exact)
        assert b["losses"] == pytest.approx(a["losses"], rel=FP32_LOSS, abs=1e-9), number
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=FP32_NORM), number


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow] if CASES[name].slow else [])
        for name in MANY
        if not name.endswith("-fp32") and name not in INEXACT
    ],
)
def test_a_layout_follows_one_rank(name: str, folder: Path) -> None:
    """Losses, norms, counts of tokens and experts step by step, and the weights in the end."""
    one, many = result(folder, reference(name)), result(folder, name)
    assert len(one.steps) == len(many.steps) == STEPS
    for number, (a, b) in enumerate(zip(one.steps, many.steps, strict=True)):
        for exact in ("tokens", "without_gradient", "unseen"):
            assert b[exact] == a[exact], (number, exact)
        assert torch.equal(b["expert_counts"], a["expert_counts"]), f"step {number} chose other experts"
        assert b["dropped"] == a["dropped"]
        assert (a["dropped"] > 0) == name.startswith("capacity")
        assert b["losses"] == pytest.approx(a["losses"], rel=LOSS, abs=1e-15), number
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=LOSS), number
    assert many.first.keys() == many.last.keys() == one.first.keys()
    for key, start in one.first.items():
        assert torch.equal(many.first[key], start), f"{key} starts elsewhere"
        if not start.is_floating_point() or key.endswith("gate.bias"):
            assert torch.equal(many.last[key], one.last[key]), key
            continue
        way = (one.last[key] - start).norm()
        apart = (many.last[key] - one.last[key]).norm()
        assert way > 0, f"{key} did not train"
        assert apart <= way * WEIGHTS, (key, (apart / way).item())


@pytest.mark.slow
@pytest.mark.parametrize(("name", "other"), SAME_BITS.items())
def test_the_same_layout_gives_the_same_bits(name: str, other: str, folder: Path) -> None:
    """Two starts, one of them deterministic and with activations made again."""
    one, two = result(folder, other), result(folder, name)
    for a, b in zip(one.steps, two.steps, strict=True):
        assert (a["losses"], a["grad_norm"]) == (b["losses"], b["grad_norm"])
    for key, weight in one.last.items():
        assert torch.equal(two.last[key], weight), key


@pytest.mark.slow
def test_gradients_travel_as_bf16(folder: Path) -> None:
    """The first step's losses are untouched, its gradients rounded to 2^-9 on the way, and training goes on."""
    exact, rounded = result(folder, "fsdp2"), result(folder, "fsdp2-bf16-wire")
    assert rounded.steps[0]["losses"] == exact.steps[0]["losses"]
    assert rounded.steps[0]["grad_norm"] != exact.steps[0]["grad_norm"]
    for a, b in zip(exact.steps, rounded.steps, strict=True):
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=2**-8)
        assert b["losses"]["lm"] == pytest.approx(a["losses"]["lm"], rel=1e-3)


def test_the_rows_are_awkward() -> None:
    """One document crosses every boundary, one row is nearly all padding, and there some experts get nothing."""
    config = DeepSeekV4Config.preset("tiny")
    model, chosen = initialise(DeepSeekV4(config)), []
    for module in model.modules():
        if isinstance(module, Gate):
            module.register_forward_hook(lambda _module, _inputs, found: chosen.append(found[1]))
    for step in range(STEPS):
        rows = awkward_rows(step, 256, config.vocab_size, config.ratios)
        assert rows[0].layout.document_lengths == (256,)
        assert min(rows[2].layout.document_lengths) == 1
        assert rows[3].layout.num_padding == 254
        chosen.clear()
        with torch.no_grad():
            model(rows[3])
        assert all(len(experts.unique()) < config.n_routed_experts for experts in chosen)
