"""The training loop, the same for every method: step, record, evaluate, save, until done or asked to stop.

`train` starts a run in a new folder and `resume` continues one from its newest checkpoint, exactly: recorded
steps after it are superseded in the ledger, and every later number is the one that an uninterrupted run would have
written. Under torchrun every rank runs this function; rank 0 alone prints and writes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from fullweight.checkpoint.generations import Choice, OnCorrupt, listed
from fullweight.core import phase
from fullweight.core.collector import older_objects_left_alone
from fullweight.core.crash import crash_point
from fullweight.core.errors import ConfigError
from fullweight.core.strict_json import parse_json
from fullweight.core.types import Batch
from fullweight.data.identify import Identifying
from fullweight.data.synth import check
from fullweight.data.tokenised import told_counts
from fullweight.devices import absent, find, of
from fullweight.doctor.environment import shared
from fullweight.evidence import manifest as manifests
from fullweight.evidence.ledger import FORMAT, Ledger
from fullweight.models.deepseek_v4.cache import generate
from fullweight.ops import implementations
from fullweight.optim.groups import set_learning_rate
from fullweight.optim.schedule import lr_factor
from fullweight.parallel.agreement import as_facts, flat
from fullweight.parallel.deterministic import deterministic
from fullweight.parallel.mesh import Ranks, joined
from fullweight.train.assemble import Run, assemble, check_disk
from fullweight.train.boundaries import Heard, chosen_pieces, watching, write
from fullweight.train.changing import changed, check_length
from fullweight.train.config import RunConfig
from fullweight.train.evaluate import Answer, Evaluation, answer_questions, asked, held_out_loss, score
from fullweight.train.export import kept_form
from fullweight.train.finish import finish, show_answers
from fullweight.train.guards import StopRequest
from fullweight.train.metrics import step_record
from fullweight.train.opening import changes_since, gathered, write_head
from fullweight.train.progress import Reporter
from fullweight.train.ready import prepare, require_ready
from fullweight.train.records import Records
from fullweight.train.restarting import Beginning, begin, restarted
from fullweight.train.resuming import choose, described, settle, told
from fullweight.train.run_folder import RunFolder, write_json
from fullweight.train.saving import Saving, owned
from fullweight.train.step import Phases, StepResult, training_step
from fullweight.train.trackers import Trackers
from fullweight.train.weights import readable


@dataclass(frozen=True)
class Outcome:
    """How a call of `train` or `resume` ended; an unfinished run can be resumed."""

    folder: RunFolder
    step: int
    finished: bool


@dataclass(frozen=True)
class Taken:
    """A step that was taken: numbers, the rows it was fed, learning rate, and this rank's seconds by phase."""

    result: StepResult
    batches: list[Batch]
    learning_rate: float
    seconds: dict[str, float]


def train(config: RunConfig, console: Console | None = None) -> Outcome:
    """Run a recipe from its first step. Raises FullweightError before any work on whatever is wrong.

    Started again by the launcher that began the run, it goes on with it (`restarting.py`).
    """
    with joined_for(config) as ranks:
        beginning: tuple[RunFolder, Beginning] | None = None
        with ranks.main_first_failure():
            if ranks.is_main:
                beginning = begin(config)
        folder, how = ranks.broadcast(beginning)
        if how is Beginning.resumed:  # nobody is there to be asked
            return _resume(config, folder, ranks, console, OnCorrupt.previous)
        with Identifying(config.data) if ranks.is_main else nullcontext() as identifying:
            run = assemble(config, folder, ranks)
            together = gathered(run)
            with ranks.main_first_failure():
                if identifying is not None:
                    check_disk(run)
                    write_head(run, identifying.result(), together, again=how is Beginning.again)
        with owned(folder, ranks):
            return _drive(run, console, _start)


def resume(
    root: Path,
    console: Console | None = None,
    on_corrupt: OnCorrupt = OnCorrupt.refuse,
    overrides: Sequence[str] = (),
) -> Outcome:
    """Continue the run in folder `root` from its newest checkpoint, on any number of ranks.

    Every byte of the checkpoint is verified before the model is touched. `on_corrupt` says whether a damaged one
    is refused (CheckpointError says what is wrong with it) or the newest good one before it is taken. `overrides`
    (`a.b=c`) change what may change (`changing.py`), from now on.
    """
    folder = RunFolder(root)
    config = changed(load_config(folder), overrides)
    with joined_for(config) as ranks:
        return _resume(config, folder, ranks, console, on_corrupt)


def load_config(folder: RunFolder) -> RunConfig:
    """The resolved configuration of a run folder; raises ConfigError when it is none."""
    folder.require()
    try:
        values = parse_json(folder.config.read_bytes())
    except ValueError as error:
        raise ConfigError(f"{folder.config} is damaged: {error}") from None
    if isinstance(values, dict) and "model_type" in values:
        raise ConfigError(f"{folder.root} is a checkpoint folder, not a run folder; give the folder of a run")
    return RunConfig.resolve(values, str(folder.config))


def evaluate(run: Run) -> Evaluation:
    """Held-out loss and scored answers of the model as it is; all ranks together."""
    settings, method = run.config.eval, run.config.method
    losses, total = held_out_loss(run.model, method, run.engine, run.held_out, run.config.train.loss, run.ranks)
    answers: list[Answer] = []
    if run.questions:
        replies = partial(generate, max_new_tokens=settings.max_new_tokens, stop_ids=(run.tokenizer.eos_id,))
        with readable(run.model, run.config, run.ranks) as model:
            answers = answer_questions(
                partial(replies, model) if model is not None else None,
                run.questions,
                run.tokenizer,
                batch_size=settings.batch_size,
                checker=check,
                ranks=run.ranks,
            )
    return Evaluation(losses, total, score(answers), answers)


def _resume(
    config: RunConfig, folder: RunFolder, ranks: Ranks, console: Console | None, on_corrupt: OnCorrupt
) -> Outcome:
    with owned(folder, ranks):
        choice = choose(config, folder, on_corrupt)
        check_length(config, choice.generation.step)
        with ranks.main_first_failure():
            if ranks.is_main:
                kept_form(config.export, folder, choice.generation.manifest.facts.source)
        run = assemble(config, folder, ranks, folder.tokenizer)
        run.state.restore(choice.generation)
        ranks.agree({"checkpoint": choice.generation.sha256, "position": json.dumps(run.state.position())})
        with ranks.main_first_failure():
            superseded = settle(folder, choice) if ranks.is_main else 0
            if ranks.is_main and config != load_config(folder):
                write_json(folder.config, config.model_dump(mode="json"))
        return _drive(run, console, partial(_continue, choice=choice, superseded=superseded))


@contextmanager
def joined_for(config: RunConfig) -> Iterator[Ranks]:
    """The ranks of the run, on its device and in its mode."""
    applied = prepare(config)
    device = find(config.train.device)
    facts = _facts(config) | as_facts(shared(os.environ, device.name))
    with (
        deterministic(config.parallel.deterministic, device),
        joined(config.train.device, config.launch, facts) as ranks,
    ):
        require_ready(config, applied, ranks)
        yield ranks


def _facts(config: RunConfig) -> dict[str, str]:
    """The configuration as the ranks compare it: key by key, but for the folder, which rank 0 chooses."""
    return flat(config.model_dump(mode="json", exclude={"output"}), "config.")


def _drive(run: Run, console: Console | None, opening: Callable[[Run, Records], None]) -> Outcome:
    main = run.ranks.is_main
    reporter = Reporter(console if main else None)
    values = run.config.model_dump(mode="json")
    trackers = Trackers(run.config.trackers, run.folder.root, values, reporter.say) if main else None
    records = Records(Ledger(run.folder.ledger) if main else None, trackers, reporter)
    saving = Saving(run, records)
    try:
        with StopRequest().listening() as stop, run.ranks.telling():
            if run.ranks.watch is not None:
                run.ranks.watch.of_run(run.folder.stalls, partial(_how_to_go_on, run.folder))
            opening(run, records)
            try:
                finished = _steps(run, records, saving, stop)
            except Exception:
                saving.settle()
                raise
        if finished:
            phase.enter("export")
            finish(run, records)
    finally:
        records.close()
        run.power.close()
        run.state.loader.close()
    return Outcome(run.folder, run.state.step, finished)


def _start(run: Run, records: Records) -> None:
    records.begin("start", 0, {"format": FORMAT, **_bound(run), **_described(run), **_launched(run)})
    records.reporter.say(
        f"{run.config.name}: {run.parameters}, {run.ranks.size} rank(s), "
        f"{run.config.train.precision}, into {run.folder.root}"
    )
    records.reporter.say(_device_told(run))
    for line in told_counts(run.state.loader.prepared.counts):
        records.reporter.say(line)
    _evaluate_and_record(run, records)


def _described(run: Run) -> dict[str, Any]:
    """What an event at a start or resume keeps: device, peak, parameters, and what became of each source."""
    counts, kind = [asdict(count) for count in run.state.loader.prepared.counts], of(run.ranks.device)
    device = {"name": kind.name, "chip": kind.chip(), "operations": run.model.ops.name}
    return {
        "device": device,
        "peak": asdict(run.peak),
        "parameters": asdict(run.parameters),
        "data": counts,
        "operations": implementations(run.model.ops),
    }


def _bound(run: Run) -> dict[str, Any]:
    """What ties a ledger to its manifest."""
    if not run.ranks.is_main:
        return {}
    manifest = manifests.read(run.folder.manifest)
    named = {"run": manifest.run, "manifest_sha256": manifests.sha256(run.folder.manifest)}
    return named | changes_since(manifest, run)  # of a start over


def _changed(run: Run) -> dict[str, Any]:
    """What a resume stands on that the manifest does not say."""
    return changes_since(manifests.read(run.folder.manifest), run) if run.ranks.is_main else {}


def _device_told(run: Run) -> str:
    """Which device and operations were taken and, when that was left to the system, why not another device."""
    kind = of(run.ranks.device)
    told = f"device: {kind.name} ({kind.chip()}), operations: {run.model.ops.name}"
    if run.config.train.device != "auto":
        return told
    return "; ".join([told, *(f"no {name}: {reason}" for name, reason in absent().items())])


def _continue(run: Run, records: Records, choice: Choice, superseded: int) -> None:
    step, say = run.state.step, records.reporter.say
    origin = described(run.config, choice, superseded)
    records.begin("resume", step, {**origin, **_changed(run), **_described(run), **_launched(run)})
    say(f"resumed {run.folder.root} after step {step} of {run.config.train.num_steps}, {run.parameters}")
    say(_device_told(run))
    for line in told(origin):
        say(line)


def _launched(run: Run) -> dict[str, Any]:
    """For the ledger: how long ranks wait for each other, and whether the launcher started them again."""
    launch = run.config.launch
    bounds = {**launch.model_dump(), "collective_timeout_seconds": launch.collective_timeout_seconds}
    return {"launch": bounds, **restarted()} if run.ranks.size > 1 else restarted()


def _how_to_go_on(folder: RunFolder) -> str:
    """What a person can do after the ranks ended."""
    saved = listed(folder.checkpoints)
    if not saved:
        return "there is no checkpoint yet; start again with `fullweight train` and a new --output"
    return f"last checkpoint: {saved[-1][1].name}; continue with\n  fullweight resume {folder.root}"


def _steps(run: Run, records: Records, saving: Saving, stop: StopRequest) -> bool:
    """Run to the last step (True) or until asked to stop (False); either way the state is saved.

    Raises TrainingError when it cannot be.
    """
    total, state = run.config.train.num_steps, run.state
    with records.reporter.steps(state.step, total), older_objects_left_alone():
        while state.step < total and not run.ranks.any(stop.requested or saving.gave_up):
            chosen = chosen_pieces(run)
            with nullcontext() if chosen is None else watching(run, chosen) as heard:
                record = one_step(run)
            records.write("step", state.step, record)
            if heard is not None:
                _keep_boundaries(run, records, heard)
            records.reporter.step(state.step, total, record)
            _warn_of_stragglers(run, records)
            if record["skipped"] is not None:
                run.guard.enforce(state.step, record["skipped"])
            if state.step == 1:
                _note_unreached(record, records.reporter)
            if state.step == total or _due(state.step, run.config.eval.every):
                _evaluate_and_record(run, records)
            saving.report()
            around = _due(state.step, run.config.boundaries.every) or heard is not None
            if around or _due(state.step, run.config.checkpoint.every):
                saving.save()
    saving.save()
    saving.finish()
    return state.step == total


def _keep_boundaries(run: Run, records: Records, heard: Heard) -> None:
    """Write what passed through the step that was taken, and bind it in the ledger once it is on the disk."""
    stored = write(heard, run, run.folder.boundaries / f"step-{run.state.step}")
    records.write("event", stored.step, stored.event())
    told = f"failed: {stored.failure}" if stored.failure is not None else f"{len(stored.files)} files"
    records.reporter.say(f"boundaries of step {stored.step}: {told} in {stored.seconds:.1f} s")


def _warn_of_stragglers(run: Run, records: Records) -> None:
    for straggler in run.ranks.watch.stragglers() if run.ranks.watch is not None else ():
        records.write("event", run.state.step, {"what": "straggler", **straggler.as_dict()})
        records.reporter.say(f"slow: {straggler}")


def _note_unreached(record: dict[str, Any], reporter: Reporter) -> None:
    """Say once which parameters a step of this recipe can leave out; every step records them."""
    names = record["without_gradient"]
    if names:
        reporter.say(
            f"note: step 1 gave {len(names)} parameter(s) no gradient: {', '.join(names[:4])}"
            f"{', ...' if len(names) > 4 else ''} (documents shorter than a compression window cannot reach it)"
        )


def one_step(run: Run) -> dict[str, Any]:
    """Take the next step; what the ledger keeps of it. Nothing is written, and no policy is enforced."""
    with of(run.ranks.device).range(f"step {run.state.step + 1}"):
        return recorded(run, take_step(run))


def take_step(run: Run) -> Taken:
    """Take the next step and record nothing of it."""
    config, state = run.config, run.state
    crash_point("train.step")
    phase.begin_step(state.step + 1)
    run.power.begin()
    phases = Phases(run.ranks.device)
    batches = [next(state.loader).to(run.ranks.device) for _ in range(run.rows_per_rank)]
    rate = config.optimizer.learning_rate * lr_factor(config.schedule, state.step, config.train.num_steps)
    set_learning_rate(state.optimizers, rate)
    result = training_step(
        state.model,
        config.method,
        state.optimizers,
        batches,
        engine=run.engine,
        losses=config.train.loss,
        clip_norm=config.optimizer.clip_norm,
        guard=run.guard,
        ranks=run.ranks,
        phases=phases,
    )
    state.step += 1
    state.tokens += result.num_tokens
    if result.refusal is None:
        state.count(result.expert_counts, result.token_counts)
    return Taken(result, batches, rate, phases.seconds)


def recorded(run: Run, taken: Taken) -> dict[str, Any]:
    """What the ledger keeps of a step; all ranks together."""
    record = step_record(
        taken.result,
        batches=taken.batches,
        position=run.state.loader.state_dict(),
        power=run.power,
        model=run.model,
        learning_rate=taken.learning_rate,
        seconds=taken.seconds,
        peak=run.peak,
        ranks=run.ranks,
    )
    record["tokens"]["so_far"] = run.state.tokens
    return record


def _evaluate_and_record(run: Run, records: Records) -> None:
    phase.enter("evaluation")
    evaluation = evaluate(run)
    step = run.state.step
    records.write("eval", step, {**evaluation.as_dict(), **asked(run.state.loader, run.questions)})
    records.keep(run.folder.samples / f"step-{step}.json", [a.as_dict() for a in evaluation.answers])
    if evaluation.losses:
        parts = [f"{name} {value:.4f}" for name, value in evaluation.losses.items()]
        if evaluation.score is not None:
            parts.append(f"exact answers {evaluation.score:.1%} of {len(evaluation.answers)}")
        records.reporter.say(f"step {step}: held-out {', '.join(parts)}")
    if step < run.config.train.num_steps:  # the last ones are shown beside the first at the end
        show_answers(run.config.eval.show, evaluation.answers, records.reporter)


def _due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0
