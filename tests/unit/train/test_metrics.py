"""What the ledger's figures mean."""

import hashlib
import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch

from fullweight.bench.measure import measure_matmul
from fullweight.checkpoint.selection import select
from fullweight.core.types import Batch, PackedLayout
from fullweight.data.loader import batch_digest
from fullweight.devices.power import EnergyCounters
from fullweight.models.deepseek_v4.config import DeepSeekV4Config
from fullweight.models.deepseek_v4.flops import forward_flops, training_flops
from fullweight.models.deepseek_v4.model import DeepSeekV4
from fullweight.parallel.mesh import Ranks
from fullweight.train import peak as train_peak
from fullweight.train.metrics import Peak, expert_load, measure_peak, model_flops, step_record
from fullweight.train.step import StepResult
from fullweight.train.trainable import freeze

ALONE = Ranks(0, 1, torch.device("cpu"))


def test_expert_load_is_of_the_worst_layer() -> None:
    """Layer 0 is even; in layer 1 one of four experts takes half of 8 tokens (2x the mean), one takes none."""
    load = expert_load(torch.tensor([[2, 2, 2, 2], [4, 3, 1, 0]]))
    assert load.max_over_mean == pytest.approx(2.0)
    assert (load.dead, load.num_experts) == (1, 8)


def test_mfu_is_model_flops_over_wall_time_and_peak() -> None:
    """Padding is in neither tokens/s nor FLOPs, nor are dropped choices, and all phases are in the time."""
    config = DeepSeekV4Config.preset("tiny")
    lengths = (100, 57)
    result = StepResult(
        losses={"lm": 2.0},
        total_loss=2.0,
        counts={"lm": 50.0},
        grad_norm=1.0,
        num_tokens=157,
        num_padding=99,
        num_trained=50.0,
        document_lengths=lengths,
        expert_counts=torch.ones(5, 8, dtype=torch.int64),
        num_dropped=5,
        token_counts=torch.tensor([0, 5, 0, 2, 0, 150]),
        without_gradient=(),
        refusal=None,
    )
    joules, clock = iter([1.0, 70.0, 50.0]), iter([0.0, 1.0, 3.0])
    seconds = {"data": 0.5, "forward": 0.5, "backward": 0.75, "optimizer": 0.25}
    row = Batch(torch.arange(4), torch.ones(4), PackedLayout.build([2, 2], (), 4), ("a", "b"))
    power = EnergyCounters(lambda: {"0": (next(joules), 100.0)}, lambda: next(clock))
    power.begin()
    record = step_record(
        result,
        batches=[replace(row, digest=batch_digest(row))] * 2,
        position={"epoch": 1, "row": 6},
        power=power,
        model=DeepSeekV4(config),
        learning_rate=1e-3,
        seconds=seconds,
        peak=Peak(1e9, "given"),
        ranks=ALONE,
    )
    dropped = 5 * 3 * 2 * (3 * config.hidden_size * config.moe_intermediate_size)
    flops = training_flops(config, lengths, mtp=True).total - dropped
    assert record["experts"]["dropped"] == 5
    assert record["tokens_per_second"] == pytest.approx(157 / 2)
    assert record["mfu"] == pytest.approx(flops / 2 / 1e9)
    assert record["seconds"]["total"] == pytest.approx(2.0)
    total = config.num_parameters(mtp=True)
    assert record["parameters"] == {"total": total, "trained": total}
    assert record["routing"] == "natural"
    assert record["operations"] in ("cpu", "reference")
    assert record["peak"] == {"flops_per_second": 1e9, "source": "given"}
    assert "no padding" in record["mfu_convention"]
    assert record["power"] == {"watts": 40.0, "source": power.source}, "the counter began anew at 100 J"
    content = np.arange(4, dtype="<i8").tobytes() + np.ones(4, dtype="<f4").tobytes() + b"[2,2]"
    both = hashlib.sha256(content).digest() * 2
    expected = {"digest": hashlib.sha256(both).hexdigest(), "rows": 2, "samples": 4, "epoch": 1, "row": 6}
    met = [(t, config.sliding_window, config.index_topk) for length in lengths for t in range(1, length + 1)]
    pairs = {
        "window": sum(min(t, window) for t, window, _ in met),
        "csa_selected": sum(min(t // 4, k) for t, _, k in met),
        "csa_visible": sum(t // 4 for t, _, _ in met),
        "hca": sum(t // 128 for t, _, _ in met),
    }
    assert record["batch"] == {**expected, "pairs": pairs}
    assert record["loss_hex"] == {"lm": "40000000", "total": "40000000"}


def test_frozen_parameters_have_no_backward_flops() -> None:
    """Warm-up: a dense forward, and the indexer's own backward (two products a projection, three a score).

    Any other freezing counts forward only, so that the MFU is never more than what was done.
    """
    config, lengths = DeepSeekV4Config.preset("tiny"), (100, 57)
    model = DeepSeekV4(config, indexer_loss="visible")
    model.dense_csa = True
    freeze(model, select(config, ["*.indexer.*"], []))
    sparse = forward_flops(config, lengths)
    expected = forward_flops(config, lengths, dense_csa=True).total
    expected += 2 * sparse.indexer_projections + 3 * sparse.indexer_scores
    assert model_flops(model, lengths) == expected
    model = DeepSeekV4(config)
    freeze(model, select(config, ["layers.0.*"], []))
    assert model_flops(model, lengths) == sparse.total
    assert model_flops(model, ()) == 0


def test_the_measured_peak_says_how_it_was_measured() -> None:
    """A peak without its method is no denominator."""
    peak = measure_peak(ALONE, shapes=((128, 64, 32),))
    assert peak.flops_per_second > 1e6
    assert "bf16 x @ W.T" in peak.source
    assert "128 x 64 x 32" in peak.source


def test_runs_and_the_benchmark_measure_one_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock says 0.5 s a product: both report 2 x rows x in x out / 0.5 of the same, faster shape."""
    ticks = itertools.count(step=0.5)
    monkeypatch.setattr(train_peak.time, "perf_counter", lambda: next(ticks))
    monkeypatch.setattr(train_peak, "CPU_SHAPES", ((64, 32, 16), (8, 8, 8)))
    assert measure_peak(ALONE).flops_per_second == 2 * 64 * 32 * 16 / 0.5
    assert measure_matmul().flops_per_second == {
        "64 x 32 x 16": 2 * 64 * 32 * 16 / 0.5,
        "8 x 8 x 8": 2 * 512 / 0.5,
    }
    assert next(ticks) == 0.5 * 2 * 24 + 2 * 0.5, (
        "2 x (2 + 4 products of 2 seconds in all) x 2 shapes, 2 for waiting"
    )
