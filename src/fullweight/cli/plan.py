"""`fullweight plan`: which layouts fit a cluster, how long a step takes, what it costs, and why others fail."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fullweight.core.errors import ConfigError

if TYPE_CHECKING:
    from fullweight.models.deepseek_v4.config import DeepSeekV4Config
    from fullweight.planner.search import Request


def plan_command(
    model: Annotated[str, typer.Argument(help="deepseek-v4-pro, deepseek-v4-flash, a preset, or a config.json")],
    *,
    chip: Annotated[str, typer.Option(help="device, by its name in the table")],
    chips: Annotated[int, typer.Option(min=1, help="chips; a 910C chip is two dies, and each die a rank")],
    sequence: Annotated[int, typer.Option(min=1, help="tokens of a packed row")] = 4096,
    global_batch: Annotated[int, typer.Option(min=1, help="rows of a step, all ranks together")] = 1024,
    method: Annotated[str, typer.Option(help="sft: the only one that is planned")] = "sft",
    optimizer: Annotated[str, typer.Option(help="adamw or muon")] = "adamw",
    skew: Annotated[float, typer.Option(min=1.0, help="load of the fullest expert rank over the mean")] = 1.0,
    steps: Annotated[int | None, typer.Option(min=1, help="steps of the run, for its time and cost")] = None,
    price: Annotated[float | None, typer.Option(min=0, help="of a chip for an hour")] = None,
    price_kwh: Annotated[float | None, typer.Option("--price-kwh", min=0, help="of a kWh")] = None,
    failure_rate: Annotated[
        float | None, typer.Option(min=0, help="interruptions a device and hour; Llama-3 405B's if absent")
    ] = None,
    checkpoint_seconds: Annotated[float, typer.Option(min=0.1, help="that a checkpoint stops training")] = 60.0,
    restart_seconds: Annotated[float, typer.Option(min=0, help="from an interruption to the next step")] = 600.0,
    compare: Annotated[list[str] | None, typer.Option(help="another cluster, chip:chips; may be repeated")] = None,
    sweep: Annotated[str | None, typer.Option(help="chips=..., sequence=... or model=..., commas between")] = None,
    chip_file: Annotated[Path | None, typer.Option(help="chips and clusters of your own (TOML)")] = None,
    emit: Annotated[Path | None, typer.Option(help="write the first layout that is not tight as a recipe")] = None,
    count: Annotated[int, typer.Option(min=1, max=50, help="layouts shown")] = 5,
    json_file: Annotated[Path | None, typer.Option("--json", help="write everything here")] = None,
    html_file: Annotated[Path | None, typer.Option("--html", help="write a page with pictures here")] = None,
) -> None:
    """The fastest layouts that fit, with memory, time, cost, reasons against their neighbours, and reliability.

    Exits with 2 when none fits. A projection: nothing runs.
    """
    from rich.console import Console

    from fullweight.planner.explain import FAILURES_PER_DEVICE_HOUR
    from fullweight.planner.recipe import recipe_text
    from fullweight.planner.report import Money, describe, print_comparison, print_plan
    from fullweight.planner.search import Planner

    if method != "sft":
        raise ConfigError(
            f"--method {method!r} is not planned yet; use sft (continued pre-training costs the same)"
        )
    for file in (emit, json_file, html_file):
        if file is not None and not file.absolute().parent.is_dir():
            raise ConfigError(f"no folder {file.absolute().parent} to write {file.name} in; create it")
    rate = FAILURES_PER_DEVICE_HOUR if failure_rate is None else failure_rate
    money = Money(steps, price, price_kwh, rate, checkpoint_seconds, restart_seconds)

    def asked(**changes: Any) -> Request:
        values: dict[str, Any] = {"model": model, "chip": chip, "chips": chips, "sequence": sequence} | changes
        return _request(**values, global_batch=global_batch, optimizer=optimizer, skew=skew, chip_file=chip_file)

    console = Console(width=max(Console().width, 120))
    requests = [asked(), *(asked(chip=name, chips=number) for name, number in map(_cluster, compare or ()))]
    if sweep is not None:
        requests = [asked(**changes) for changes in _swept(sweep)]
    answers = []
    for request in requests:
        planner = Planner(request)
        plan = planner.search(count)
        answers.append((planner, plan))
    if len(answers) == 1:
        print_plan(console, *answers[0], money)
    else:
        print_comparison(console, answers, money)
    record = [describe(planner, plan, money) for planner, plan in answers]
    if json_file is not None:
        json_file.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    if html_file is not None:
        from fullweight.planner.page import write_page

        write_page(record, html_file)
    first = answers[0][1]
    if emit is not None and first.best:
        emit.write_text(recipe_text(first.request, first.chosen), encoding="utf-8")
        console.print(f"wrote {emit}: set its data.sources, then rehearse and train", highlight=False)
    if not first.best:
        raise typer.Exit(2)


def _request(
    *,
    model: str,
    chip: str,
    chips: int,
    sequence: int,
    global_batch: int,
    optimizer: str,
    skew: float,
    chip_file: Path | None,
) -> Request:
    from fullweight.models.deepseek_v4.config import PRESETS, DeepSeekV4Config
    from fullweight.planner.chips import chip as find_chip
    from fullweight.planner.search import Request

    if optimizer not in ("adamw", "muon"):
        raise ConfigError(f"--optimizer {optimizer!r}: expected adamw or muon")
    preset = model.removeprefix("deepseek-v4-")
    if preset in PRESETS or not Path(model).exists():
        config = DeepSeekV4Config.preset(preset)
    else:
        config = _config_of(Path(model))
    if sequence > config.max_position_embeddings:
        raise ConfigError(
            f"--sequence {sequence} exceeds the model's max_position_embeddings "
            f"({config.max_position_embeddings}); lower it"
        )
    device = find_chip(chip, chip_file)
    return Request(model, config, device, chips * device.dies_per_chip, sequence, global_batch, optimizer, skew)


def _config_of(file: Path) -> DeepSeekV4Config:
    """The file's model; of another family whose step times can be predicted, where."""
    from fullweight.models.deepseek_v4.config import DeepSeekV4Config
    from fullweight.planner.families import shape_of_file

    try:
        return DeepSeekV4Config.from_file(file)
    except ConfigError as error:
        try:
            shape_of_file(file)
        except ConfigError:
            raise error from None
        raise ConfigError(
            f"{error}: layouts and memory are planned for DeepSeek-V4 alone. What a layout of another family "
            "takes a step is predicted from a table of runs: fullweight bench planner --unseen FOLDER "
            "(docs/plan.md)"
        ) from None


def _cluster(text: str) -> tuple[str, int]:
    name, _, number = text.rpartition(":")
    if not name or not number.isdigit() or int(number) < 1:
        raise ConfigError(f"--compare {text!r}: expected a chip and a number of chips, such as h100:1024")
    return name, int(number)


def _swept(text: str) -> list[dict[str, Any]]:
    key, _, values = text.partition("=")
    chosen = [value for value in values.split(",") if value]
    if key not in ("chips", "sequence", "model") or not chosen:
        raise ConfigError(f"--sweep {text!r}: expected chips=..., sequence=... or model=..., with commas between")
    if key == "model":
        return [{key: value} for value in chosen]
    if not all(value.isdigit() and int(value) > 0 for value in chosen):
        raise ConfigError(f"--sweep {text!r}: {key} takes whole numbers above 0")
    return [{key: int(value)} for value in chosen]
