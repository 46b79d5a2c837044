"""The recipe's `[device]` section: which environment a run gets, and which unwise findings it accepts.

Imports no torch: what a library reads when it is loaded must be set before.
"""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from fullweight.core.config import Config
from fullweight.doctor.environment import ANY, PREFIXES, misspelt, variables


class DeviceConfig(Config):
    """Variables for the accelerator's software; those of another device than the one in use are left alone."""

    environment: Literal["auto", "none", "ascend-910c"] = Field(
        "auto",
        description="vetted variables to set where the shell exports none; auto: the device's, if it has any",
    )
    env: dict[str, str] = Field(
        default_factory=dict, description="variables of your own, which replace vetted and exported ones"
    )
    accept: tuple[str, ...] = Field((), description="names of the doctor's warnings that do not stop the run")

    @model_validator(mode="after")
    def _real_variables(self) -> Self:
        for name, value in self.env.items():
            if problem := _problem(name, value):
                raise ValueError(f"env.{name}: {problem}")
        return self


def _problem(name: str, value: str) -> str | None:
    """What is wrong with a variable of a recipe; None when nothing is."""
    known = variables().get(name)
    if known is None:
        meant = next(filter(None, (misspelt(name, device) for device in PREFIXES)), None)
        if meant:
            return f"no such variable; did you mean {meant!r}?"
        if not name.startswith(tuple(p for group in PREFIXES.values() for p in group)):
            return "not a variable of an accelerator's software; export it in the shell that starts the run"
        return None
    if known.device == ANY and known.at_start and name.endswith("_THREADS"):
        return "read before a recipe is; export it in the shell that starts the run"
    return None if known.legal(value) or not known.checked else f"found {value!r}, expected {known.expected}"
