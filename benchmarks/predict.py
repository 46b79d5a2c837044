"""Freeze what the planner predicts for the shipped recipes, so that a first real run can judge it.

`python benchmarks/predict.py` writes `benchmarks/predictions/DATE.json`, or `DATE-2.json` and so on: for every
recipe of a large model the step time with its interval, MFU and memory by pipeline rank, beside the coefficients,
the commit, and a SHA-256 over all of it. A file that is there is never written again: a better model has its own.
"""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fullweight.planner.answer import CONVENTION, interval
from fullweight.planner.chips import chip
from fullweight.planner.coefficients import calibration
from fullweight.planner.search import Planner, Request, mfu
from fullweight.train.config import RunConfig

_ROOT = Path(__file__).parents[1]
_NAME = re.compile(r"_(910c|h100|h200)_(\d+)$")


def predict(recipe: Path) -> dict[str, Any] | None:
    """What is expected of a recipe whose name ends in chip and ranks; None for others."""
    found = _NAME.search(recipe.stem)
    if found is None:
        return None
    device = chip({"910c": "ascend-910c"}.get(found[1], found[1]))
    config = RunConfig.from_toml(recipe, [])
    request = Request(
        str(config.model.preset),
        config.model.architecture(),
        device,
        int(found[2]),
        config.data.row_tokens,
        config.train.rows_per_step,
        config.optimizer.name,
    )
    candidate = Planner(request).evaluated(config.parallel)
    return {
        "recipe": f"recipes/{recipe.name}",
        "recipe_sha256": hashlib.sha256(recipe.read_bytes()).hexdigest(),
        "chip": device.name,
        "ranks": request.ranks,
        "seconds": round(candidate.seconds, 3),
        "interval_seconds": [round(x, 2) for x in interval(candidate)],
        "mfu": round(mfu(request, candidate.seconds), 4),
        "seconds_by_part": {name: round(x, 4) for name, x in asdict(candidate.time).items()},
        "peak_gib_by_rank": [round(stage.peak / 2**30, 2) for stage in candidate.memory],
        "limit_gib": round(candidate.usable / 2**30, 2),
    }


def _git(*arguments: str) -> str:
    return subprocess.run(
        ("git", *arguments), cwd=_ROOT, check=True, capture_output=True, text=True
    ).stdout.strip()


def main() -> int:
    """Write the next file of today; returns the exit status."""
    if changed := _git("status", "--porcelain", "src", "recipes"):
        print(f"commit these first, so that the prediction has a commit:\n{changed}")
        return 1
    today = datetime.now(UTC).date().isoformat()
    folder, number = _ROOT / "benchmarks" / "predictions", 1
    while (target := folder / (f"{today}.json" if number == 1 else f"{today}-{number}.json")).exists():
        number += 1
    recipes = sorted((_ROOT / "recipes").glob("v4_*.toml"))
    body = {
        "date": today,
        "commit": _git("rev-parse", "HEAD"),
        "convention": CONVENTION,
        "interval": "80 % of published routed runs that the model had not seen, wider where a part has no basis",
        "coefficients": asdict(calibration().coefficients),
        "predictions": [found for recipe in recipes if (found := predict(recipe)) is not None],
    }
    digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    target.write_text(json.dumps(body | {"sha256": digest}, indent=1) + "\n", encoding="utf-8")
    print(f"{target}: {digest}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
