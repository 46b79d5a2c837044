"""What software a published run used: facts of the run beside its layout, none of them fitted.

`runs/software.csv` has them by model, system and release, from the recipes of Megatron-Bridge (`source` says
which): how much of a step is captured instead of launched, how tokens reach their experts, whether that is hidden
behind other work, and the type of attention's products. The last line that suits a run counts; `*` stands for
models without a line of their own. Left out: what a recipe makes again (`mla_up_proj`, `moe_act`), a small part of
a block. Imports no torch.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Literal

_CAPTURES = {"none": 0, "parts": 1, "step": 2}


@dataclass(frozen=True)
class Software:
    """The fields of a job that its software decides."""

    graphed: int = 0
    dispatch: Literal["fused", "plain"] = "fused"
    hidden_exchange: bool = False
    narrow_attention: bool = False


def software(model: str, system: str, release: str) -> Software:
    """What a release of Megatron-Bridge used for that model on that system."""
    found = Software()
    for row in _lines():
        named = row["model"] == "*" or model.startswith(row["model"])
        if named and system in row["systems"].split() and _number(release) >= _number(row["since"]):
            dispatch: Literal["fused", "plain"] = "plain" if row["dispatch"] == "plain" else "fused"
            hidden, narrow = row["exchange"] == "hidden", row["attention"] == "fp8"
            found = Software(_CAPTURES[row["capture"]], dispatch, hidden, narrow)
    return found


@cache
def _lines() -> list[dict[str, str]]:
    text = resources.files("fullweight.planner").joinpath("runs/software.csv").read_text(encoding="utf-8")
    return list(csv.DictReader(text.splitlines()))


def _number(release: str) -> tuple[int, ...]:
    return tuple(int(part) for part in release.split("."))
