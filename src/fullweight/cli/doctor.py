"""`fullweight doctor`: whether this machine, or under torchrun every machine of the job, is ready to train."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fullweight.cli.files import require_folder, write_text
from fullweight.core.errors import ConfigError

if TYPE_CHECKING:
    from fullweight.doctor.examine import Wish


def doctor_command(
    *,
    recipe: Annotated[Path | None, typer.Option(help="a TOML recipe: its device, environment and needs")] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="change a setting; may be repeated")
    ] = None,
    device: Annotated[str | None, typer.Option(help="this one in place of the recipe's, or of auto")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="no self-tests of operations and collectives")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="write facts and findings here")] = None,
    fix: Annotated[bool, typer.Option("--fix", help="print the shell lines that mend what variables can")] = False,
    facts_file: Annotated[
        Path | None, typer.Option("--facts", help="check facts that --json wrote, instead of this machine")
    ] = None,
) -> None:
    """Check versions, devices, environment, limits, operations and collectives; changes nothing.

    Exit status: 0 a run would start; 1 errors; 3 only warnings, which stop a run until its recipe accepts them.
    With --fix the lines are all that goes to standard output: eval "$(fullweight doctor --fix)".
    """
    from rich.console import Console

    from fullweight.doctor.compare import check_job
    from fullweight.doctor.examine import Examined, examine, status_of
    from fullweight.doctor.facts import Job
    from fullweight.doctor.findings import exports
    from fullweight.doctor.report import show

    require_folder(json_file)
    if facts_file is not None:
        if recipe is not None or device is not None:
            raise ConfigError("--facts checks what was recorded; leave out --recipe and --device")
        job = Job.read(facts_file)
        findings = check_job(job)
        examined = Examined(status_of(job, findings), job, tuple(findings))
    else:
        examined = examine(_wish(recipe, overrides or [], device), self_tests=not quick)
    if examined.job is not None:
        job = examined.job
        show(job, examined.findings, Console(stderr=fix))
        if fix:
            applied = [f'export {name}="{value}"' for name, value in job.machines[0].applied.items()]
            print("\n".join([*applied, *exports(examined.findings)]))
        if json_file is not None:
            told = {**job.as_dict(), "findings": [f.as_dict() for f in examined.findings]}
            write_text(json_file, json.dumps(told, indent=2) + "\n")
    raise typer.Exit(examined.status)


def _wish(recipe: Path | None, overrides: list[str], device: str | None) -> Wish:
    """What the recipe wants, with its environment set as a run would set it."""
    from fullweight.doctor.applied import apply_environment, likely_device
    from fullweight.doctor.config import DeviceConfig
    from fullweight.doctor.examine import Wish

    if recipe is None:
        if overrides:
            raise ConfigError("--set changes a recipe; name one with --recipe")
        applied = apply_environment(DeviceConfig(), likely_device(device or "auto"))
        return Wish(device=device or "auto", applied=applied.values)
    from fullweight.train.config import RunConfig
    from fullweight.train.ready import wish_of

    config = RunConfig.from_toml(recipe, overrides)
    if device is not None:
        config = config.model_copy(update={"train": config.train.model_copy(update={"device": device})})
    return wish_of(config)
