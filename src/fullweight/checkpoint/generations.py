"""The generations of one run: their names, the pointer `latest`, which one to resume from, which ones to remove.

    checkpoints/
      latest          name and manifest digest of the newest generation that was written to the end
      step-40/        a generation; the same step saved again becomes step-40-2
      .writing-step-60/   being written; whatever it holds, it is nothing yet
      refused-step-60/    failed verification and was passed over by `--on-corrupt previous`; kept to be looked at

A generation is written aside, synced and renamed; `latest` moves last. A name is never used twice, so no save
overwrites what an earlier one left. `latest` is how a generation that has vanished, or that was put there by
somebody else, is noticed; one newer than `latest` is whole (the process died between the two renames).
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from fullweight.checkpoint.manifest import NAME, CorruptError, Generation, Manifest, verify
from fullweight.checkpoint.peers import Peers
from fullweight.core.crash import crash_point
from fullweight.core.durable import rename, sync
from fullweight.core.errors import CheckpointError

POINTER = "latest"
REFUSED = "refused-"
WRITING = ".writing-"
REMOVING = ".removing-"
_LOCK = ".lock"
_POINTER_TEXT = re.compile(r"(step-\d+(?:-\d+)?) ([0-9a-f]{64})\n")


class OnCorrupt(StrEnum):
    """What to do with a generation that fails verification."""

    refuse = "refuse"
    previous = "previous"


@dataclass(frozen=True)
class Refusal:
    """A generation that cannot be used, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class Choice:
    """A verified generation, and the newer ones that were passed over."""

    generation: Generation
    refused: list[Refusal]


def listed(folder: Path) -> list[tuple[int, Path]]:
    """(step, path) of every generation under `folder`, oldest first; whether they are intact is not looked at."""
    if not folder.is_dir():
        return []
    found = [(m, p) for p in folder.iterdir() if (m := NAME.fullmatch(p.name)) and p.is_dir()]
    return [(int(m[1]), p) for m, p in sorted(found, key=lambda pair: (int(pair[0][1]), int(pair[0][2] or 1)))]


def newest(folder: Path) -> Path:
    """The newest generation, not verified; raises CheckpointError when there is none."""
    found = listed(folder)
    if not found:
        raise CheckpointError(f"no checkpoint in {folder}; start again with `fullweight train` and a new --output")
    return found[-1][1]


def new_name(folder: Path, step: int) -> str:
    """A name that no generation of this step has or had been refused under."""
    serial, name = 1, f"step-{step}"
    while (folder / name).exists() or (folder / f"{REFUSED}{name}").exists():
        serial += 1
        name = f"step-{step}-{serial}"
    return name


def read_pointer(folder: Path) -> tuple[str, str] | None:
    """(generation, manifest digest) that `latest` names, None without one; raises CorruptError."""
    try:
        text = (folder / POINTER).read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise CorruptError(f"{folder / POINTER} cannot be read: {error.strerror}") from None
    found = _POINTER_TEXT.fullmatch(text.decode("ascii", errors="replace"))
    if found is None:
        raise CorruptError(f"{folder / POINTER} is damaged: found {text[:40]!r}, expected a name and a digest")
    return found[1], found[2]


def write_pointer(folder: Path, name: str, sha256: str) -> Path:
    """Write a new `latest` beside the old one, on disk; `move_pointer` puts it in place, which needs no room."""
    temporary = folder / f".{POINTER}.tmp"
    with temporary.open("w", encoding="ascii") as stream:
        stream.write(f"{name} {sha256}\n")
        stream.flush()
        os.fsync(stream.fileno())
    return temporary


def move_pointer(folder: Path, temporary: Path) -> None:
    """Replace `latest` atomically."""
    crash_point("save.pointer")
    rename(temporary, folder / POINTER)


def choose(
    folder: Path,
    on_corrupt: OnCorrupt = OnCorrupt.refuse,
    fits: Callable[[Manifest], str | None] = lambda manifest: None,
    peers: Peers | None = None,
) -> Choice:
    """The generation to resume from, verified; all ranks of `peers` together.

    `fits` says why an intact generation is not this run's (another model), or None. Under `refuse` the newest
    one must be good: otherwise CorruptError says what is wrong and which earlier one could be taken. Under
    `previous` the newest good one is taken. Raises CheckpointError when there is none.
    """
    peers = peers or Peers()
    paths = peers.on_main(lambda: [path for _, path in reversed(listed(folder))])
    if not paths:
        newest(folder)  # says that there is none
    refused = peers.on_main(lambda: _pointer_refusal(folder))
    for path in paths:
        try:
            generation = verify(path, peers)
            reason = peers.on_main(lambda: _not_what_latest_names(folder, generation) or fits(generation.manifest))  # noqa: B023
        except CorruptError as error:
            reason = str(error)
        if reason is not None:
            refused.append(Refusal(path.name, reason))
        elif refused and on_corrupt is OnCorrupt.refuse:
            raise CorruptError(
                f"{refused[0].reason}. {path.name} is intact: resume with `--on-corrupt previous` to continue "
                "from there; no step after it is lost, they are run again"
            )
        else:
            return Choice(generation, refused)
    raise CorruptError(f"{refused[0].reason}; no other generation in {folder} is good: restore one from a copy")


def set_aside(folder: Path, choice: Choice) -> None:
    """After a fall back: refused generations get a name that no resume looks at, and `latest` is right again."""
    for refusal in choice.refused:
        if (folder / refusal.name).is_dir():
            (folder / refusal.name).rename(folder / f"{REFUSED}{refusal.name}")
    sync(folder)
    move_pointer(folder, write_pointer(folder, choice.generation.path.name, choice.generation.sha256))


def remove_unfinished(folder: Path) -> list[str]:
    """Remove what interrupted saves and removals left; returns the names. Only for the holder of the lock."""
    found = sorted([*folder.glob(f"{WRITING}*"), *folder.glob(f"{REMOVING}*")])
    for path in found:
        shutil.rmtree(path)
    return [path.name for path in found]


def removable(folder: Path, keep: int, good: Path) -> list[Path]:
    """Generations beyond the `keep` newest, oldest first; never `good`, the newest known to verify."""
    assert keep >= 1
    return [path for _, path in listed(folder)[:-keep] if path != good]


def remove(path: Path) -> None:
    """Remove a generation: its name first, so that nothing half removed is ever found under it."""
    nameless = path.with_name(f"{REMOVING}{path.name}")
    path.rename(nameless)
    crash_point("save.retention")
    shutil.rmtree(nameless)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the folder as its one writer; raises CheckpointError when another process does.

    The lock goes with the process, however it ends. Where the file system has no locks nothing is checked.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / _LOCK).open("a+", encoding="utf-8") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            stream.seek(0)
            raise CheckpointError(
                f"{folder} is being written by another process ({stream.read().strip() or 'unknown'}); "
                "wait for it or stop it"
            ) from None
        except OSError:
            pass
        stream.truncate(0)
        stream.write(f"process {os.getpid()} on {os.uname().nodename}\n")
        stream.flush()
        yield


def _pointer_refusal(folder: Path) -> list[Refusal]:
    """`latest` itself damaged, or naming what is not there."""
    try:
        pointer = read_pointer(folder)
    except CorruptError as error:
        return [Refusal(POINTER, str(error))]
    if pointer is not None and not (folder / pointer[0]).is_dir():
        return [Refusal(pointer[0], f"{folder / POINTER} names {pointer[0]}, which is not there")]
    return []


def _not_what_latest_names(folder: Path, generation: Generation) -> str | None:
    """Why an intact folder is not the generation that was written under its name."""
    try:
        pointer = read_pointer(folder)
    except CorruptError:
        return None
    if pointer is None or pointer[0] != generation.path.name or pointer[1] == generation.sha256:
        return None
    return (
        f"{generation.path}: its manifest has SHA-256 {generation.sha256[:12]}..., {POINTER} says "
        f"{pointer[1][:12]}...: another generation was put in its place"
    )
