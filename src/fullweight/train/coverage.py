"""Coverage of a run folder: `evidence/coverage.py` told what the run's recipe trains and how it exports.

What is read of the configuration is read from the generation, so that a run is measured where its recipe's files
are not. A finished run of at most AT_END_PARAMETERS measures itself, on rank 0 while the others wait; a larger one
is left to `fullweight coverage RUN`, on any machine that sees the folder.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fullweight.checkpoint import generations
from fullweight.checkpoint.imported import open_form
from fullweight.checkpoint.manifest import Facts, Generation, verify
from fullweight.checkpoint.selection import ALL, select
from fullweight.evidence.coverage import Coverage, Progress, measure
from fullweight.evidence.coverage_report import report
from fullweight.evidence.first_weights import first_weights
from fullweight.evidence.manifest import read
from fullweight.models.deepseek_v4.config import DeepSeekV4Config
from fullweight.train.run_folder import RunFolder, write_json

AT_END_PARAMETERS = 100_000_000
"""Some seconds on two CPU cores: 7.3 million parameters take about one (`fullweight coverage RUN` tells)."""


def measure_run(
    folder: RunFolder,
    *,
    generation: Generation | None = None,
    initial: Path | None = None,
    progress: Progress | None = None,
) -> Coverage:
    """Measure a run's newest checkpoint, or a verified `generation` of it that may lie elsewhere.

    `initial` is where model.checkpoint lies here, if not where the run had it. The exported weights are compared
    where the run folder has them and they are of that step. `evidence.coverage_report.report` makes the content of
    coverage.json of it, `differences` compares two. Raises CheckpointError when the checkpoint is missing, damaged
    or not of its config's model.
    """
    generation = verify(generations.newest(folder.checkpoints)) if generation is None else generation
    facts = generation.manifest.facts
    form = None
    if folder.source.is_dir() and facts.source is not None:
        form = open_form(folder.source, facts.source)
    try:
        with first_weights(facts, folder.imported, initial) as first:
            return measure(
                generation,
                first,
                trained=trained_names(facts),
                form=facts.config["export"]["format"],
                source=form,
                exported=folder.export if _is_of(folder, facts) else None,
                weights_root=_recorded_root(folder),
                progress=progress,
            )
    finally:
        if form is not None:
            form.close()


def write_coverage(folder: RunFolder, coverage: Coverage) -> dict[str, Any]:
    """Write coverage.json; returns its content."""
    content = report(coverage)
    write_json(folder.coverage, content)
    return content


def trained_names(facts: Facts) -> frozenset[str] | None:
    """Our names of what the recipe trains; None for everything."""
    settings = facts.config["train"]
    trainable, frozen = tuple(settings["trainable"]), tuple(settings["frozen"])
    if trainable == ALL and not frozen:
        return None
    return select(DeepSeekV4Config.from_published(facts.model), trainable, frozen)


def _recorded_root(folder: RunFolder) -> str | None:
    """The root of the first weights in the run's manifest; None without one."""
    if not folder.manifest.is_file():
        return None
    root = read(folder.manifest).initial.get("weights_root")
    return None if root is None else str(root)


def _is_of(folder: RunFolder, facts: Facts) -> bool:
    """Whether the run's export is to be compared: there, and of the run's last step, which this one is."""
    return folder.export.is_dir() and facts.step == int(facts.config["train"]["num_steps"])
