"""Before anything is built: the environment of the recipe, and whether the machines are ready.

The variables are set on every rank before ranks meet; then rank 0 looks at the facts of all. Errors, and warnings
that the recipe does not accept by name (`device.accept`), end the start with one message that says what to do.
`fullweight doctor` looks at more, with self-tests.
"""

from __future__ import annotations

from pathlib import Path

from fullweight.core.errors import ConfigError
from fullweight.devices import of
from fullweight.doctor.applied import Applied, apply_environment, likely_device
from fullweight.doctor.compare import check_job
from fullweight.doctor.examine import Wish, glance, job_of
from fullweight.doctor.facts import Facts
from fullweight.doctor.findings import blocking, refusal
from fullweight.parallel.mesh import Ranks
from fullweight.train.config import RunConfig


def prepare(config: RunConfig) -> Applied:
    """Set the recipe's environment on this rank. Raises ConfigError when it comes too late."""
    device = likely_device(config.train.device)
    return apply_environment(config.device, device, deterministic=config.parallel.deterministic)


def require_ready(config: RunConfig, applied: Applied, ranks: Ranks) -> None:
    """Raise ConfigError, all ranks together, on what would corrupt or hang, or is unwise and not accepted."""
    wish = wish_of(config, applied, with_disk=False)  # the run's own count of bytes follows
    texts = ranks.gather(glance(wish, of(ranks.device)).model_dump_json())
    with ranks.main_first_failure():
        if ranks.is_main:
            job = job_of(wish, [Facts.model_validate_json(text) for text in texts])
            if found := blocking(check_job(job), job.accept):
                raise ConfigError(refusal(found))


def wish_of(config: RunConfig, applied: Applied | None = None, *, with_disk: bool = True) -> Wish:
    """What a recipe wants of a machine; sets its environment when that has not been done."""
    if applied is None:
        applied = prepare(config)
    return Wish(
        device=config.train.device,
        operations=config.ops.default,
        chosen=config.ops.chosen,
        run_folder=config.output or Path("runs") / config.name,
        launch=config.launch,
        deterministic=config.parallel.deterministic,
        accept=config.device.accept,
        needed_disk_bytes=_disk_bytes(config) if with_disk else None,
        applied=applied.values,
    )


def _disk_bytes(config: RunConfig) -> int:
    """The least that checkpoints and a bf16 export take: fp32 weights, two fp32 moments of what trains."""
    architecture = config.model.architecture()
    total = architecture.num_parameters(mtp=True)
    moments = 2 if config.train.trained_names(architecture) is None and config.optimizer.name == "adamw" else 0
    return total * ((1 + moments) * 4 * (config.checkpoint.keep + 1) + 2 * config.export.enabled)
