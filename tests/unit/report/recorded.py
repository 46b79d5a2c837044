"""What a ledger holds, by hand."""

from __future__ import annotations

from typing import Any


def step_line(step: int, loss: float | str | None = None) -> dict[str, Any]:
    """What a ledger holds of a step."""
    return {
        "loss": {"lm": 3.0 - step / 10 if loss is None else loss},
        "loss_hex": {},
        "total_loss": 3.0,
        "grad_norm": 1.0,
        "learning_rate": 1e-3,
        "tokens": {"real": 100, "padding": 0, "trained": 50, "so_far": 100 * step},
        "tokens_per_second": 100.0,
        "model_flops_per_second": 1e9,
        "mfu": 0.1,
        "mfu_convention": "none of ours",
        "peak": {"flops_per_second": 1e10, "source": "stated"},
        "experts": {"max_over_mean": 1.5, "dropped": 0},
        "parameters": {"total": 1, "trained": 1},
        "routing": "natural",
        "operations": "cpu",
        "seconds": {"forward": 1.0, "total": 1.0},
        "skipped": "lm loss nan" if isinstance(loss, str) else None,
        "power": {"watts": None, "source": None},
        "batch": {
            "digest": "00",
            "samples": 1,
            "pairs": {"window": 1, "csa_selected": 0, "csa_visible": 0, "hca": 0},
        },
    }


def evaluation(loss: float | str, score: float | None) -> dict[str, Any]:
    """What a ledger holds of an evaluation."""
    return {"loss": {"lm": loss}, "total_loss": loss, "score": score, "num_scored": 4}
