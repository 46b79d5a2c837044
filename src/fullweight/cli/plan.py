"""`fullweight plan`: which layouts fit a cluster, how long a step takes, what it costs, and why others fail."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fullweight.cli.files import require_folder, write_text, writing
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
    method: Annotated[str, typer.Option(help="sft or pretrain (continued), which cost the same")] = "sft",
    optimizer: Annotated[str, typer.Option(help="adamw or muon")] = "adamw",
    skew: Annotated[float, typer.Option(min=1.0, help="load of the fullest expert rank over the mean")] = 1.0,
    capacity_factor: Annotated[
        float | None, typer.Option(min=0.01, help="most that an expert takes of a row, in even shares")
    ] = None,
    document_lengths: Annotated[
        str | None, typer.Option(help="tokens of the documents that fill the rows, commas between; else one a row")
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="steps of the run, for its time and cost")] = None,
    price: Annotated[float | None, typer.Option(min=0, help="of a chip for an hour")] = None,
    price_kwh: Annotated[float | None, typer.Option("--price-kwh", min=0, help="of a kWh")] = None,
    failure_rate: Annotated[
        float | None, typer.Option(min=0, help="interruptions a device and hour; Llama-3 405B's if absent")
    ] = None,
    checkpoint_seconds: Annotated[float, typer.Option(min=0.1, help="that a checkpoint stops training")] = 60.0,
    restart_seconds: Annotated[float, typer.Option(min=0, help="from an interruption to the next step")] = 600.0,
    compare: Annotated[list[str] | None, typer.Option(help="another cluster, chip:chips; may be repeated")] = None,
    sweep: Annotated[
        list[str] | None, typer.Option(help="chips=..., sequence=... or model=..., commas between")
    ] = None,
    chip_file: Annotated[Path | None, typer.Option(help="chips and clusters of your own (TOML)")] = None,
    emit: Annotated[Path | None, typer.Option(help="write the first layout not tight as a new recipe")] = None,
    count: Annotated[int, typer.Option(min=1, max=50, help="layouts shown")] = 5,
    json_file: Annotated[Path | None, typer.Option("--json", help="write everything here")] = None,
    html_file: Annotated[Path | None, typer.Option("--html", help="write a page with pictures here")] = None,
) -> None:
    """The fastest layouts that fit, with memory, time, cost, reasons against their neighbours, and reliability.

    Exits with 2 when none fits, of any job. A projection: nothing runs.
    """
    from rich.console import Console

    from fullweight.core.config import nearest
    from fullweight.planner.answer import Answer, Money, describe
    from fullweight.planner.explain import FAILURES_PER_DEVICE_HOUR
    from fullweight.planner.recipe import SOURCES, recipe_text
    from fullweight.planner.report import print_comparison, print_plan
    from fullweight.planner.search import Planner

    if method not in SOURCES:
        raise ConfigError(f"--method {method!r} is not planned; {nearest(method, list(SOURCES))}")
    _check_outputs(emit, json_file, html_file)
    if sweep and (compare or emit):
        other = "--compare" if compare else "--emit"
        raise ConfigError(f"--sweep and {other} do not go together; leave one of them out")
    rate = FAILURES_PER_DEVICE_HOUR if failure_rate is None else failure_rate
    money = Money(steps, price, price_kwh, rate, checkpoint_seconds, restart_seconds)

    def asked(**changes: Any) -> Request:
        values: dict[str, Any] = {"model": model, "chip": chip, "chips": chips, "sequence": sequence} | changes
        request = _request(
            **values, global_batch=global_batch, optimizer=optimizer, skew=skew, chip_file=chip_file
        )
        lengths = _lengths(document_lengths, request.sequence) if document_lengths else ()
        return replace(request, capacity=capacity_factor, lengths=lengths)

    console = Console(width=max(Console().width, 120))
    requests = [asked(), *(asked(chip=name, chips=number) for name, number in map(_cluster, compare or ()))]
    if sweep:
        requests = [asked(**changes) for changes in _swept(sweep)]
    answers = []
    for request in requests:
        planner = Planner(request)
        answers.append(Answer(planner, planner.search(count), money))
    if len(answers) == 1:
        print_plan(console, answers[0])
    else:
        print_comparison(console, answers)
    record = [describe(answer) for answer in answers] if json_file or html_file else []
    if json_file is not None:
        write_text(json_file, json.dumps(record, indent=2) + "\n")
    if html_file is not None:
        from fullweight.planner.page import write_page

        with writing(html_file):
            write_page(record, html_file)
    first = answers[0].plan
    if emit is not None and first.best:
        write_text(emit, recipe_text(first.request, first.chosen, method))
        console.print(f"wrote {emit}: set its data.sources, then rehearse and train", highlight=False)
    if not any(answer.plan.best for answer in answers):
        raise typer.Exit(2)


def _check_outputs(emit: Path | None, *others: Path | None) -> None:
    """Before a search: each has a folder, and a recipe, which people edit, is never written over."""
    require_folder(emit, *others)
    if emit is not None and emit.exists():
        raise ConfigError(f"--emit {emit} is there already; remove it or choose another name")


_MOST_RANKS, _MOST_ROWS = 2**17, 2**18
"""Far above any cluster and batch that was told of; the search tries each divisor."""


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

    if not math.isfinite(skew):
        raise ConfigError(f"--skew {skew}: expected the load of the fullest expert rank over the mean, 1 or more")
    if global_batch > _MOST_ROWS:
        raise ConfigError(f"--global-batch {global_batch}: at most {_MOST_ROWS:,} rows a step are planned")
    if optimizer not in ("adamw", "muon"):
        raise ConfigError(f"--optimizer {optimizer!r}: expected adamw or muon")
    preset = model.removeprefix("deepseek-v4-")
    named = Path(model)
    if preset in PRESETS or not (named.exists() or len(named.parts) > 1 or named.suffix):
        config = DeepSeekV4Config.preset(preset)
    else:
        config = _config_of(Path(model))
    if sequence > config.max_position_embeddings:
        raise ConfigError(
            f"--sequence {sequence} exceeds the model's max_position_embeddings "
            f"({config.max_position_embeddings}); lower it"
        )
    device = find_chip(chip, chip_file)
    ranks = chips * device.dies_per_chip
    if ranks > _MOST_RANKS:
        most = _MOST_RANKS // device.dies_per_chip
        raise ConfigError(f"{chips} chips of {device.name}: at most {most:,} are planned; give fewer")
    return Request(model, config, device, ranks, sequence, global_batch, optimizer, skew)


def _lengths(text: str, sequence: int) -> tuple[int, ...]:
    values = [value for value in text.split(",") if value]
    if not values or not all(value.isdigit() and 0 < int(value) <= sequence for value in values):
        raise ConfigError(
            f"--document-lengths {text!r}: expected whole numbers from 1 to the row's {sequence} tokens, with "
            "commas between, such as 300,1500; each stands for as many documents as the others"
        )
    return tuple(int(value) for value in values)


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
    if not name or not number.isdecimal() or int(number) < 1:
        raise ConfigError(f"--compare {text!r}: expected a chip and a number of chips, such as h100:1024")
    return name, int(number)


def _swept(sweeps: list[str]) -> list[dict[str, Any]]:
    """The changes of each job: the values of one sweep, in the order given."""
    if len(sweeps) > 1:
        raise ConfigError(f"{len(sweeps)} sweeps; one goes through values of one thing: leave the others out")
    text = sweeps[0]
    key, _, values = text.partition("=")
    chosen = [value for value in map(str.strip, values.split(",")) if value]
    if key not in ("chips", "sequence", "model") or not chosen:
        raise ConfigError(f"--sweep {text!r}: expected chips=..., sequence=... or model=..., with commas between")
    if key != "model" and not all(value.isdecimal() and int(value) > 0 for value in chosen):
        raise ConfigError(f"--sweep {text!r}: {key} takes whole numbers above 0")
    found: list[dict[str, Any]] = [{key: value if key == "model" else int(value)} for value in chosen]
    if len(found) == 1:
        raise ConfigError(f"--sweep {text!r} has one value; give more, or plan it without --sweep")
    if any(one in found[:place] for place, one in enumerate(found)):
        raise ConfigError(f"--sweep {text!r} names a value twice; name each once")
    return found
