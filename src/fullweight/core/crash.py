"""Dying on request at a named point, so that tests can kill a process exactly where it hurts.

`FULLWEIGHT_CRASH_AT="save.manifest"` makes rank 0 send itself SIGKILL the first time it comes to that point;
`FULLWEIGHT_CRASH_AT="save.shard rank=1 save=2 nth=100 delay=0.5"` does so on rank 1, in the second save of the
process, at the hundredth write, half a second after it got there. Points lie around writing and reading of
checkpoints, and between training steps. A process that torchrun started again meets none. Without the variable a
point costs one look-up in the environment.
"""

from __future__ import annotations

import os
import signal
import time
from collections import Counter

from fullweight.core.launcher import restart_count

VARIABLE = "FULLWEIGHT_CRASH_AT"

POINTS = (
    "begin.source",  # the form of the run's source is kept, its folder has not its name yet
    "save.begin",  # before anything is written
    "save.shard",  # a part of a shard is written
    "save.manifest",  # shards are on disk, the manifest is not
    "save.rename",  # the manifest is on disk, the folder has not its name yet
    "save.pointer",  # the folder has its name, `latest` is about to be replaced
    "save.retention",  # `latest` has moved, an older generation is being removed
    "save.flush",  # the snapshot is taken, its writing in the background begins
    "load.verify",  # files are about to be hashed
    "load.read",  # tensors are about to be read into the model
    "train.step",  # a step is about to begin
    "export",  # exported weights are written, their folder has not its name yet
)

_met: Counter[str] = Counter()


def crash_point(name: str) -> None:
    """Die here if the environment says so."""
    assert name in POINTS, name
    if wanted := os.environ.get(VARIABLE):
        _meet(name, wanted)


def _meet(name: str, wanted: str) -> None:
    point, *settings = wanted.split()
    options = dict(setting.split("=") for setting in settings)
    assert point in POINTS, f"{VARIABLE}={wanted!r}; points: {', '.join(POINTS)}"
    if name == "save.begin":
        _met["save"] += 1
    if (
        point != name
        or options.get("rank", "0") != os.environ.get("RANK", "0")
        or int(options.get("save", _met["save"])) != _met["save"]
        or restart_count()
    ):
        return
    _met[name] += 1
    if _met[name] == int(options.get("nth", "1")):
        time.sleep(float(options.get("delay", "0")))
        os.kill(os.getpid(), signal.SIGKILL)
