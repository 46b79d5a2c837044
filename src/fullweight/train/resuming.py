"""Which checkpoint a run continues from, and what has to be put in order before it does.

A generation must be intact, of this model, and written under this run's ledger. Choosing reads only; `settle` then
removes what an interrupted save left, sets refused generations aside and cuts off the half line that a kill left
in the ledger. Lines of later steps stay; the event `resume`, written next, says that they are superseded.
"""

from __future__ import annotations

from typing import Any

from fullweight.checkpoint import generations
from fullweight.checkpoint.compare import changes
from fullweight.checkpoint.generations import Choice, OnCorrupt
from fullweight.checkpoint.manifest import Manifest
from fullweight.evidence import ledger, manifest
from fullweight.train.config import RunConfig
from fullweight.train.run_folder import RunFolder

_SHOWN = 3


def choose(config: RunConfig, folder: RunFolder, on_corrupt: OnCorrupt) -> Choice:
    """The verified generation to continue from; all ranks together. Raises CheckpointError."""
    model = config.model.architecture().to_published()

    def misfit(manifest: Manifest) -> str | None:
        path = folder.checkpoints / manifest.generation
        if different := changes(manifest.facts.model, model):
            told = [f"{name} is {a}, this run's is {b}" for name, (a, b) in list(different.items())[:_SHOWN]]
            return f"{path} is a checkpoint of another model: {'; '.join(told)}"
        head = manifest.facts.ledger
        reason = None if head is None else ledger.not_under(folder.ledger, head)
        return reason and f"{path} is not a checkpoint of this run's ledger: {reason}"

    return generations.choose(folder.checkpoints, on_corrupt, misfit)


def settle(folder: RunFolder, choice: Choice) -> int:
    """Put the run folder in order for going on from the choice; rank 0 alone.

    Returns the number of recorded steps that are superseded. Raises CheckpointError, before anything is changed,
    when the ledger is damaged or the run's manifest is not the one it began with.
    """
    ledger.mend(folder.ledger)
    manifest.require_bound(folder.manifest, folder.ledger)
    generations.remove_unfinished(folder.checkpoints)
    generations.set_aside(folder.checkpoints, choice)
    return ledger.superseded_steps(folder.ledger, choice.generation.step)


def described(config: RunConfig, choice: Choice, superseded: int) -> dict[str, Any]:
    """What the ledger keeps of a resume."""
    facts = choice.generation.manifest.facts
    now = config.model_dump(mode="json", exclude={"output"})
    return {
        "generation": choice.generation.path.name,
        "manifest_sha256": choice.generation.sha256,
        "written_by_ranks": facts.world["ranks"],
        "superseded_steps": superseded,
        "refused": [{"generation": r.name, "reason": r.reason} for r in choice.refused],
        "config_changes": {name: list(pair) for name, pair in changes(facts.config, now).items()},
    }


def told(values: dict[str, Any]) -> list[str]:
    """The same for a person; usually nothing."""
    lines = [f"passed over: {r['reason']}" for r in values["refused"]]
    if changed := values["config_changes"]:
        shown = [f"{name} {a} -> {b}" for name, (a, b) in list(changed.items())[:_SHOWN]]
        more = f" and {len(changed) - _SHOWN} more" if len(changed) > _SHOWN else ""
        lines.append(f"note: the configuration changed since this checkpoint: {', '.join(shown)}{more}")
    return lines
