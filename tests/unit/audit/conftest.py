"""One honest run of seconds, and its bundle."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
from tests.processes import ROOT, fullweight

from fullweight.audit.seal import seal
from fullweight.audit.signing import Signer, new_key

SHORT = {"train.num_steps": 6, "eval.num_samples": 4, "eval.every": 3, "checkpoint.every": 3}
SHORT |= {"eval.max_new_tokens": 4, "checkpoint.keep": 2, "train.peak_flops_per_second": 1e11}


@dataclass(frozen=True)
class Honest:
    """A finished run, its signed bundle and the public key."""

    run: Path
    bundle: Path
    public_key: Path


COMMAND = "fullweight.cli.main:main"


def train(run: Path, ranks: int = 1, call: str = COMMAND, **settings: object) -> Path:
    """A run of the smallest recipe into a folder; `call` is another program than the honest one."""
    values = {**SHORT, **{name.replace("__", "."): value for name, value in settings.items()}}
    chosen = [part for name, value in values.items() for part in ("--set", f"{name}={value}")]
    ended = fullweight(
        "train", ROOT / "recipes" / "tiny_smoke.toml", *chosen, "--output", run, ranks=ranks, call=call
    )
    assert ended.ok, ended.output
    return run


@pytest.fixture(scope="session")
def again(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same recipe and seeds in a run of its own."""
    return train(tmp_path_factory.mktemp("again") / "run")


@pytest.fixture(scope="session")
def honest(tmp_path_factory: pytest.TempPathFactory) -> Honest:
    folder = tmp_path_factory.mktemp("honest")
    key = folder / "key.pem"
    public = new_key(key)
    run = train(folder / "run")
    seal(run, folder / "bundle", signer=Signer(key=key), ro_crate=True)
    return Honest(run, folder / "bundle", public)
