"""What a step's numbers mean: throughput, model FLOPs utilisation, expert load, memory.

MFU here is exact sparse model FLOPs (`models/deepseek_v4/flops.py`: forward and backward, no recompute, no
padding) over wall time times peak, where wall time is the whole step, data included, and the peak is that of
all ranks together: given in the recipe, or measured at the start of the run on every rank at once (`peak.py`).
The record carries the convention and the peak, because a bare percentage means nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import psutil
import torch
from torch import Tensor

from fullweight.core.types import Batch
from fullweight.devices import of, separate
from fullweight.devices.power import PowerMeter
from fullweight.evidence.performance import CONVENTION, FROZEN_CONVENTION
from fullweight.models.deepseek_v4.flops import Pairs, choice_flops, training_flops
from fullweight.models.deepseek_v4.model import DeepSeekV4, parameters_of
from fullweight.parallel.mesh import Ranks
from fullweight.train import fed
from fullweight.train.peak import matmul_rates
from fullweight.train.step import StepResult
from fullweight.train.trainable import ParameterCount

_PAIRS = ("window", "csa_selected", "csa_visible", "hca")


@dataclass(frozen=True)
class Peak:
    """FLOP/s that 100 % MFU stands for: all ranks together, and where the figure comes from."""

    flops_per_second: float
    source: str


@dataclass(frozen=True)
class ExpertLoad:
    """How evenly the real tokens of a step fell on the experts, over all MoE layers."""

    max_over_mean: float  # worst layer; 1 is perfect balance
    dead: int  # experts that no token reached, summed over layers
    num_experts: int  # summed over layers


def measure_peak(ranks: Ranks, shapes: tuple[tuple[int, int, int], ...] | None = None) -> Peak:
    """The machine's bf16 matmul rate (`peak.matmul_rates`), all ranks at once and added up."""
    ranks.barrier()
    best = max(matmul_rates(ranks.device, shapes), key=lambda rate: rate.flops_per_second)
    total = float(ranks.reduce(torch.tensor(best.flops_per_second, dtype=torch.float64)).item())
    source = f"measured: best median of bf16 x @ W.T over shapes, here {best.name}; {ranks.size} rank(s) at once"
    return Peak(total, source)


def expert_load(expert_counts: Tensor) -> ExpertLoad:
    """Load over `expert_counts` [layers, experts]."""
    counts = expert_counts.double()
    mean = counts.mean(dim=1).clamp_min(1e-9)
    worst = (counts.max(dim=1).values / mean).max().item() if counts.numel() else 0.0
    return ExpertLoad(worst, int((expert_counts == 0).sum()), expert_counts.numel())


def model_flops(model: DeepSeekV4, document_lengths: Sequence[int]) -> int:
    """FLOPs of one step over the documents, as `convention` says."""
    if not document_lengths:
        return 0
    trains = {name: facts.trains for name, facts in parameters_of(model).items()}
    indexer = any(trains[name] for name in trains if ".indexer." in name)
    parts = training_flops(
        model.config,
        document_lengths,
        mtp=len(model.mtp) > 0,
        indexer_loss=model.indexer_loss if indexer else "none",
        dense_csa=model.dense_csa,
    )
    return parts.total if all(trains.values()) else parts.partly_frozen


def convention(parameters: ParameterCount) -> str:
    """What the FLOPs of `model_flops` count."""
    return CONVENTION if parameters.all_trained else FROZEN_CONVENTION


def memory(device: torch.device) -> dict[str, int]:
    """Bytes in use by this process and, on an accelerator, the peak allocated there."""
    used = {"resident_bytes": psutil.Process().memory_info().rss}
    if separate(device):
        used["device_peak_bytes"] = of(device).memory().peak
    return used


def hexed(losses: dict[str, float], total: float) -> dict[str, str]:
    """Each loss component and the total as fp32, big-endian in hex: what decimal digits may hide.

    >>> hexed({"lm": 3.1415927}, 1.0)
    {'lm': '40490fdb', 'total': '3f800000'}
    """
    with np.errstate(over="ignore"):  # of a diverged run: infinite in fp32
        return {name: np.array(v, ">f4").tobytes().hex() for name, v in {**losses, "total": total}.items()}


def _pairs(model: DeepSeekV4, document_lengths: Sequence[int]) -> Tensor:
    """What FLOPs depend on beside tokens, so that anybody can count them again from the ledger."""
    found = Pairs.of(model.config, document_lengths)
    return torch.tensor([float(getattr(found, name)) for name in _PAIRS], dtype=torch.float64)


def _power(meter: PowerMeter) -> Tensor:
    """[watts, whether they are unknown], so that ranks add up."""
    watts = meter.watts()
    return torch.tensor([0.0, 1.0] if watts is None else [watts, 0.0], dtype=torch.float64)


def step_record(
    result: StepResult,
    *,
    batches: Sequence[Batch],
    position: dict[str, Any],
    power: PowerMeter,
    model: DeepSeekV4,
    learning_rate: float,
    seconds: dict[str, float],
    peak: Peak,
    ranks: Ranks,
) -> dict[str, Any]:
    """The ledger's values for one step; all ranks call it together.

    `batches` are this rank's rows and `position` is the loader's after them; `model` says what the FLOPs are,
    `seconds` is this rank's time by phase, whose sum is the step's wall time (rank 0's stands for all: ranks wait
    for each other every step).
    """
    wall = sum(seconds.values())
    parameters = ParameterCount.of(model)
    own = model_flops(model, result.document_lengths) if ranks.counts_row else 0
    own_flops = torch.tensor([float(own)], dtype=torch.float64)
    pairs = _pairs(model, result.document_lengths) * float(ranks.counts_row)
    added = ranks.reduce(torch.cat((own_flops, _power(power), pairs, fed.shares(batches, ranks))))
    flops, watts, unknown = added[:3].tolist()
    # forward alone where parameters are frozen, as in `model_flops`
    flops -= result.num_dropped * choice_flops(model.config) * (3 if parameters.all_trained else 1)
    rate = flops / wall
    return {
        "loss": result.losses,
        "total_loss": result.total_loss,
        "loss_hex": hexed(result.losses, result.total_loss),
        "batch": {
            **asdict(fed.combined(added[3 + len(_PAIRS) :])),
            "epoch": position["epoch"],
            "row": position["row"],
            "pairs": dict(zip(_PAIRS, map(int, added[3 : 3 + len(_PAIRS)].tolist()), strict=True)),
        },
        "grad_norm": result.grad_norm,
        "learning_rate": learning_rate,
        "tokens": {"real": result.num_tokens, "padding": result.num_padding, "trained": result.num_trained},
        "tokens_per_second": result.num_tokens / wall,
        "model_flops_per_second": rate,
        "mfu": rate / peak.flops_per_second,
        "mfu_convention": convention(parameters),
        "peak": asdict(peak),
        "experts": {**asdict(expert_load(result.expert_counts)), "dropped": result.num_dropped},
        "parameters": asdict(parameters),
        "routing": "natural",
        "operations": model.ops.name,
        "without_gradient": list(result.without_gradient),
        "unseen_embeddings": result.num_unseen_embeddings,
        "memory": memory(ranks.device),
        "power": {"watts": None, "source": "unknown"} if unknown else {"watts": watts, "source": power.source},
        "seconds": {**seconds, "total": wall},
        "skipped": result.refusal,
    }
