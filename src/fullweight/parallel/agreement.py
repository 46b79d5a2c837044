"""Before the first step every rank proves that it runs the same thing: one digest each, details on a mismatch.

Facts are texts by name: digest of the package's files, versions, and what the caller adds, such as the
configuration key by key and the variables that the device's software reads. One all-gather of 32 bytes a rank
compares them; when digests differ, the facts themselves are gathered and the ranks that differ from most are named
with both values.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
from collections.abc import Mapping
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from fullweight.core.errors import TrainingError
from fullweight.devices import DEVICES
from fullweight.parallel.rendezvous import named

_OWN_VARIABLES = ("FULLWEIGHT_", "PYTHONHASHSEED")
_PACKAGES = (
    *("fullweight", "numpy", "tokenizers", "datasets", "pyarrow", "safetensors"),
    *(package for kind in DEVICES.values() for package in kind.packages),
)
_SOURCES = {".py", ".toml", ".json", ".cpp", ".h", ".html", ".txt"}
_SHOWN = 5
_ABSENT = "nothing"


def standing(size: int) -> dict[str, str]:
    """Facts about the process: code, versions, this package's own variables, number of ranks."""
    facts = {"code": code_digest(), "python": platform.python_version(), "torch": str(torch.__version__)}
    for name in _PACKAGES:
        try:
            facts[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            facts[name] = _ABSENT
    facts |= as_facts({n: v for n, v in os.environ.items() if n.startswith(_OWN_VARIABLES)})
    return facts | {"number of ranks": str(size), "threads of a rank": str(torch.get_num_threads())}


def as_facts(variables: Mapping[str, str]) -> dict[str, str]:
    """Environment variables as ranks compare them."""
    return {f"environment variable {name}": value for name, value in variables.items()}


def flat(values: Mapping[str, Any], prefix: str) -> dict[str, str]:
    """A nested configuration as facts, one for each key.

    >>> flat({"train": {"seed": 1, "device": "cpu"}}, "config.")
    {'config.train.seed': '1', 'config.train.device': '"cpu"'}
    """
    facts: dict[str, str] = {}
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            facts |= flat(value, f"{prefix}{name}.")
        else:
            facts[prefix + name] = json.dumps(value, default=str)
    return facts


@cache
def code_digest(folder: Path = Path(__file__).parents[1]) -> str:
    """SHA-256 over names and content of the package's own source files."""
    hasher = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.suffix in _SOURCES and p.is_file()):
        content = hashlib.sha256(path.read_bytes()).hexdigest()
        hasher.update(f"{path.relative_to(folder)} {content}\n".encode())
    return hasher.hexdigest()


def agree(facts: Mapping[str, str], rank: int, size: int) -> None:
    """Raise TrainingError, the same on every rank, unless all ranks hold the same facts; all ranks together."""
    if size == 1:
        return
    own = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).digest()
    digests = torch.empty(size * len(own), dtype=torch.uint8)
    dist.all_gather_single(digests, torch.frombuffer(bytearray(own), dtype=torch.uint8))
    if digests.numpy().tobytes() == own * size:
        return
    told = dict(facts)
    if "code" in told:
        told["code"] = f"{told['code'][:12]} ({_commit() or 'outside git'})"
    everyone: list[Any] = [None] * size
    dist.all_gather_object(everyone, told)
    raise TrainingError(disagreement(everyone))


def disagreement(facts: list[Mapping[str, str]]) -> str:
    """Who differs from most ranks, in what; `facts` by rank.

    >>> print(disagreement([{"seed": "1"}, {"seed": "1"}, {"seed": "2"}]))
    the ranks do not run the same thing. seed: rank 2 has 2, ranks 0-1 have 1. Start all ranks alike
    """
    differences = []
    for name in sorted({name for each in facts for name in each}):
        holders: dict[str, list[int]] = {}
        for rank, each in enumerate(facts):
            holders.setdefault(each.get(name, _ABSENT), []).append(rank)
        if len(holders) > 1:
            fewest_first = sorted(holders.items(), key=lambda item: (len(item[1]), -item[1][0]))
            said = [f"{named(ranks)} {'have' if len(ranks) > 1 else 'has'} {v}" for v, ranks in fewest_first]
            differences.append(f"{name}: {', '.join(said)}")
    more = f"; and {len(differences) - _SHOWN} more" if len(differences) > _SHOWN else ""
    return f"the ranks do not run the same thing. {'; '.join(differences[:_SHOWN])}{more}. Start all ranks alike"


def _commit() -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
    return f"commit {found}"
