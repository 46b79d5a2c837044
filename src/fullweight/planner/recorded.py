"""A recorded rehearsal (`benchmarks/rehearsals.py`) as a question to the planner. Imports no torch."""

from __future__ import annotations

from typing import Any

from fullweight.models.deepseek_v4.config import DeepSeekV4Config
from fullweight.parallel.config import Layout, ParallelConfig
from fullweight.planner.memory import MemoryModel, Setting, StageMemory
from fullweight.planner.muon import Update


def planned(record: dict[str, Any]) -> list[StageMemory]:
    """What the planner says of each pipeline rank's memory."""
    model, parallel, layout = _question(record)
    setting = Setting(
        record["row_tokens"],
        record["micro_batches"],
        record["optimizer"],
        operations=record["operations"],
        capacity=parallel.expert_capacity_factor,
    )
    return list(model.of(parallel, layout, setting))


def planned_updates(record: dict[str, Any]) -> list[Update]:
    """What it says of each pipeline rank's step of Muon."""
    model, parallel, layout = _question(record)
    return model.updates(parallel, layout, record["row_tokens"])


def _question(record: dict[str, Any]) -> tuple[MemoryModel, ParallelConfig, Layout]:
    config = DeepSeekV4Config.preset(record["model"]["preset"], **record["model"]["changes"])
    parallel = ParallelConfig.model_validate(record["parallel"])
    layout = parallel.layout(record["ranks"], config, record["row_tokens"], record["rows_per_step"])
    return MemoryModel(config), parallel, layout
