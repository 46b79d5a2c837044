"""The fitted coefficients as a file: `coefficients.toml`, written by `fullweight bench planner --write`."""

from __future__ import annotations

import tomllib
from dataclasses import asdict, dataclass
from functools import cache
from importlib import resources
from pathlib import Path

from fullweight.planner.cost import Coefficients


@dataclass(frozen=True)
class Calibration:
    """Coefficients, and how far measured runs lie from predictions that have not seen them.

    The spreads are (low, high) of measured over predicted time, for the middle 80 % of dense and of routed models.
    """

    coefficients: Coefficients
    dense_spread: tuple[float, float]
    moe_spread: tuple[float, float]
    num_runs: int

    def write(self, path: Path) -> None:
        lines = ["# Written by `fullweight bench planner --write`; what each means is in cost.py.", ""]
        lines += [f"num_runs = {self.num_runs}"]
        for name, (low, high) in (("dense_spread", self.dense_spread), ("moe_spread", self.moe_spread)):
            lines.append(f"{name} = [{low:.4g}, {high:.4g}]")
        lines += ["", "[coefficients]"]
        lines += [f"{name} = {value:.4g}" for name, value in asdict(self.coefficients).items()]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")


@cache
def calibration() -> Calibration:
    """The one that comes with the package."""
    text = resources.files("fullweight.planner").joinpath("coefficients.toml").read_text(encoding="utf-8")
    values = tomllib.loads(text)
    return Calibration(
        Coefficients(**{name: float(value) for name, value in values["coefficients"].items()}),
        (values["dense_spread"][0], values["dense_spread"][1]),
        (values["moe_spread"][0], values["moe_spread"][1]),
        values["num_runs"],
    )
