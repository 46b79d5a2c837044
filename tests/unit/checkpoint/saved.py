"""A small state and its facts, for tests of checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fullweight.checkpoint import store
from fullweight.checkpoint.manifest import Facts, Generation, verify


def state(value: float = 1.0, rows: int = 4) -> dict[str, Tensor]:
    """A parameter, a moment and a counter."""
    generator = torch.Generator().manual_seed(int(value * 1000))
    return {
        "model.w": torch.full((rows, 3), value),
        "model.noise": torch.randn(64, 5, generator=generator),
        "optimizer.adamw.w.step": torch.tensor(value),
    }


def facts(step: int = 1, **changed: Any) -> Facts:
    values = {
        "step": step,
        "model": {"dim": 3},
        "config": {"name": "test"},
        "world": {"ranks": 1, "axes": {}},
        "position": {"step": step},
        "versions": {"torch": torch.__version__},
    }
    return Facts.resolve({**values, **changed})


def save(folder: Path, step: int, value: float | None = None, keep: int | None = None) -> Path:
    return store.save(folder, state(float(step) if value is None else value), facts(step), keep=keep).path


def loaded(generation: Generation | Path, rows: int = 4) -> dict[str, Tensor]:
    """What a generation holds, verified first."""
    target = {name: torch.zeros_like(t) for name, t in state(rows=rows).items()}
    store.load(verify(generation) if isinstance(generation, Path) else generation, target)
    return target
