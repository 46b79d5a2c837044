"""How a process that ends tells why: on standard error, and to the launcher that started it.

torchrun reads the reason of a rank's end from a file that it names in the environment, and shows it in its report.
"""

from __future__ import annotations

import errno
import json
import os
import time
from pathlib import Path

from fullweight.core.errors import FullweightError

_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO}
_PATH = {errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ELOOP}
_MEMORY = ("can't allocate memory", "not enough memory", "out of memory", "Cannot allocate memory")
_SMALLER = "use shorter rows (data.row_tokens), fewer new tokens, a smaller model or more ranks"


def outside(error: Exception) -> str | None:
    """What to say of an error that is a user's or the outside world's; None for a bug of ours."""
    if isinstance(error, FullweightError):
        return str(error)
    if isinstance(error, OSError) and error.errno in _DISK | _PATH:
        where = f" ({error.filename})" if error.filename else ""
        return f"{error.strerror}{where}; free space or choose another folder"
    scarce = isinstance(error, RuntimeError) and any(sign in str(error) for sign in _MEMORY)
    if isinstance(error, MemoryError) or scarce:
        return f"out of memory: {str(error).partition(chr(10))[0] or 'nothing is left'}; {_SMALLER}"
    return None


def tell_launcher(message: str) -> None:
    """Under torchrun, leave `message` where it looks for the reason why a rank ended, for its report."""
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        Path(path).write_text(json.dumps({"message": message, "timestamp": int(time.time())}), encoding="utf-8")


def failure_text(message: str) -> str:
    """An error as it is shown, with the rank if there are several."""
    rank = os.environ.get("RANK")
    return f"error{f' (rank {rank})' if rank else ''}: {message}"


def restart_count() -> int:
    """How often torchrun has started these ranks again; 0 the first time, or without it."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
