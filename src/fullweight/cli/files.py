"""Files that a user names for an answer: looked at before the work, and one message when they cannot be made."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fullweight.core.errors import ConfigError


def require_folder(*files: Path | None) -> None:
    """Raise ConfigError when there is no folder to write one of them in, or it is a folder. None is no file."""
    for file in files:
        if file is None:
            continue
        if not file.absolute().parent.is_dir():
            raise ConfigError(f"no folder {file.absolute().parent} to write {file.name} in; create it")
        if file.is_dir():
            raise ConfigError(f"{file} is a folder; name a file to write")
        if not os.access(file.absolute().parent, os.W_OK):
            raise ConfigError(
                f"{file.absolute().parent} cannot be written to; choose another folder for {file.name}"
            )


@contextmanager
def writing(file: Path) -> Iterator[None]:
    """Around what writes it: raises ConfigError for whatever the system says against that."""
    try:
        yield
    except OSError as error:
        raise ConfigError(f"cannot write {file}: {error.strerror}; name another file") from None


def write_text(file: Path, text: str) -> None:
    """The text in UTF-8. Raises ConfigError when that cannot be."""
    with writing(file):
        file.write_text(text, encoding="utf-8")
