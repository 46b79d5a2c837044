"""A run's folder before its first step: everything that says what the run began with.

The manifest gathers it and is never changed; `require_same_data` and `changes_since` compare what a later segment
of the run stands on with it.
"""

from __future__ import annotations

import hashlib
import json
import secrets
from collections import Counter
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

from fullweight.core.durable import sync, sync_tree
from fullweight.core.errors import DataError
from fullweight.data.identify import Identified
from fullweight.devices import of
from fullweight.evidence import manifest as manifests
from fullweight.evidence import merkle
from fullweight.evidence.manifest import Data, DataFile, RunManifest, Samples, Source
from fullweight.evidence.state_root import live_root
from fullweight.train import code
from fullweight.train.assemble import Run
from fullweight.train.metrics import convention
from fullweight.train.restarting import this_launch
from fullweight.train.run_folder import environment, write_json
from fullweight.train.weights import keep_origin

_DIGEST_BYTES = 16
_ROOTED_BYTES = 10**9
_OF_ONE_CALL = ("command", "commit", "uncommitted_changes")  # the code has its own entry


@dataclass(frozen=True)
class Together:
    """What of a manifest takes all ranks."""

    chips: list[str]  # of each rank
    weights_root: str | None  # of the first weights (`evidence/state_root.py`)


def gathered(run: Run) -> Together:
    """All ranks together. Models of more than 1 GB have no root: hashing them on rank 0 would hold up the run."""
    root = None
    if run.parameters.total * 4 <= _ROOTED_BYTES:
        weights = {name: value for name, value in run.state.tensors().items() if name.startswith("model.")}
        root = live_root(weights, run.state.position()).parts["model"]
    return Together(run.ranks.gather(of(run.ranks.device).chip()), root)


def write_head(run: Run, identified: Identified, together: Together, again: bool) -> None:
    """Make the folder of a run and write all that there is before its first step; rank 0 alone.

    With `again` the run was begun here before, and its manifest stays. Raises DataError when the data are others
    now.
    """
    run.folder.create(this_launch(), again)
    run.tokenizer.save(run.folder.tokenizer)
    keep_origin(run.imported, run.folder)
    write_json(run.folder.model, run.architecture.to_published())
    stood_on = environment(run.ranks.size, run.ranks.device)
    write_json(run.folder.environment, stood_on)
    manifest = manifest_of(run, identified, together, stood_on)
    if run.folder.manifest.is_file():
        require_same_data(manifests.read(run.folder.manifest), manifest.data)
    else:
        manifests.write(run.folder.manifest, manifest)
    sync_tree(run.folder.root)
    write_json(run.folder.config, run.config.model_dump(mode="json"))  # last: it makes this a run's folder
    sync(run.folder.root.absolute().parent)


def manifest_of(run: Run, identified: Identified, together: Together, stood_on: dict[str, Any]) -> RunManifest:
    """What the run begins with."""
    config = run.config.model_dump(mode="json", exclude={"output"})
    return RunManifest(
        run=secrets.token_hex(16),
        written_at=datetime.now(UTC).isoformat(timespec="seconds"),
        code={**code.identity(), "packages": stood_on["packages"]},
        config=config,
        config_sha256=manifests.config_sha256(config),
        model=run.architecture.to_published(),
        parameters=asdict(run.parameters),
        environment=stood_on,
        layout={"ranks": run.ranks.size, "axes": run.ranks.layout.axes(), "chips": dict(Counter(together.chips))},
        seeds={"train": run.config.train.seed, "data": run.config.data.seed},
        threads_per_rank=stood_on["threads_per_rank"],
        data=_data(run, identified),
        initial={**_initial(run), "weights_root": together.weights_root},
        peak=asdict(run.peak),
        flops_convention=convention(run.parameters),
        mlperf=_mlperf(run),
    )


def changes_since(manifest: RunManifest, run: Run) -> dict[str, Any]:
    """What a later segment has to add to the manifest: its code and its environment, where they are others."""
    stood_on = json.loads(json.dumps(environment(run.ranks.size, run.ranks.device)))  # as the manifest came back
    now = {**code.identity(), "packages": stood_on["packages"]}
    changes: dict[str, Any] = {} if now == manifest.code else {"code": now}
    if _lasting(stood_on) != _lasting(manifest.environment):
        changes["environment"] = stood_on
    return changes


def _lasting(stood_on: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in stood_on.items() if name not in _OF_ONE_CALL}


def require_same_data(before: RunManifest, now: Data) -> None:
    """Raise DataError unless a run that is begun again reads what it read before."""
    one, other = (data.model_copy(update={"sources": ()}) for data in (before.data, now))
    if one == other:  # a fingerprint of `datasets` changes with its cache; what was read from there does not
        return
    names = {f.name for f in set(before.data.files) ^ set(now.files)}
    told = ", ".join(sorted(names)[:3]) or "generated or fetched samples"
    raise DataError(
        f"the data are not those that this run began with ({told}); restore them, or begin another run with "
        "another --output"
    )


def _data(run: Run, identified: Identified) -> Data:
    loader = run.state.loader
    files = tuple(DataFile(name=f.name, size_bytes=f.size_bytes, sha256=f.sha256) for f in identified.files)
    return Data(
        files=files,
        merkle_root=manifests.files_root(files),
        sources=tuple(Source(name=name, identity=identity) for name, identity in identified.others),
        tokenizer_sha256=run.tokenizer.sha256,
        identity=loader.state_dict()["data"],
        train=_samples(loader.prepared.train_digests),
        held_out=_samples(loader.prepared.held_out_digests),
    )


def _samples(digests: bytes) -> Samples:
    leaves = (digests[i : i + _DIGEST_BYTES] for i in range(0, len(digests), _DIGEST_BYTES))
    return Samples(number=len(digests) // _DIGEST_BYTES, merkle_root=merkle.root(leaves))


def _initial(run: Run) -> dict[str, Any]:
    """Where the first weights come from. Fresh ones depend on seed, name and code alone."""
    if run.imported is not None:
        receipt = hashlib.sha256(run.folder.imported.read_bytes()).hexdigest()
        return {"kind": "checkpoint", "source": run.imported.origin, "import_sha256": receipt}
    model = run.config.model
    kind = "preset" if model.preset is not None else "config"
    return {"kind": kind, "source": str(getattr(model, kind)), "seed": run.config.train.seed}


def _mlperf(run: Run) -> dict[str, Any]:
    config, data = run.config, run.state.loader.prepared
    return {
        "seed": config.train.seed,
        "global_batch_size": config.train.rows_per_step,
        "gradient_accumulation_steps": run.rows_per_rank,
        "max_sequence_length": config.data.row_tokens,
        "train_samples": len(data.train.ids),
        "eval_samples": len(data.held_out.ids),
        "opt_name": config.optimizer.name,
        "opt_base_learning_rate": config.optimizer.learning_rate,
        "opt_weight_decay": config.optimizer.weight_decay,
        "opt_gradient_clip_norm": config.optimizer.clip_norm,
        "opt_learning_rate_warmup_steps": config.schedule.num_warmup_steps(config.train.num_steps),
        "opt_learning_rate_training_steps": config.train.num_steps,
    }
