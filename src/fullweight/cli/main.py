"""The `fullweight` command: the table of commands, and how a mistake is told.

A user's mistake, a full disk or an interruption ends in one message on standard error and a non-zero status,
never a traceback. Anything else is a bug of ours and keeps its traceback. Commands import what they need when
they run, so that `--help` is quick.
"""

from __future__ import annotations

import errno
import os
import sys

import typer

from fullweight.cli.bench import bench_app
from fullweight.cli.bench_checkpoint import bench_checkpoint_command
from fullweight.cli.bench_convert import bench_convert_command
from fullweight.cli.chat import chat_command
from fullweight.cli.checkpoint import checkpoint_app
from fullweight.cli.convert import convert_app
from fullweight.cli.data import data_app
from fullweight.cli.generate import generate_command
from fullweight.cli.init import init_command
from fullweight.cli.rehearse import rehearse_command
from fullweight.cli.resume import resume_command
from fullweight.cli.train import INTERRUPTED, tell_launcher, train_command
from fullweight.core.errors import FullweightError

app = typer.Typer(
    help="Full-parameter post-training of DeepSeek-V4-class models.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.command("train")(train_command)
app.command("resume")(resume_command)
app.command("generate")(generate_command)
app.command("chat")(chat_command)
app.command("init")(init_command)
app.command("rehearse")(rehearse_command)
app.add_typer(data_app, name="data")
app.add_typer(checkpoint_app, name="checkpoint")
app.add_typer(convert_app, name="convert")
bench_app.command("convert")(bench_convert_command)
bench_app.command("checkpoint")(bench_checkpoint_command)
app.add_typer(bench_app, name="bench")

_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO}
_PATH = {errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ELOOP}
_MEMORY = ("can't allocate memory", "not enough memory", "out of memory", "Cannot allocate memory")
_SMALLER = "use shorter rows (data.row_tokens), fewer new tokens, a smaller model or more ranks"
_LOST_PEER = ("Connection closed by peer", "Connection reset by peer", "Socket unexpectedly closed")


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status (0 done, 1 a mistake, 2 wrong usage, 130 interrupted)."""
    try:
        app(arguments, prog_name="fullweight")
    except SystemExit as end:
        if end.__context__ is not None and isinstance(end.__context__.__cause__, KeyboardInterrupt):
            return _fail("interrupted", INTERRUPTED)
        return end.code if isinstance(end.code, int) else 0
    except (FullweightError, OSError, RuntimeError, MemoryError) as error:
        message = _told(error)
        if message is None:
            raise
        return _fail(message)
    return 0


def _told(error: Exception) -> str | None:
    """What to say of an error that is a user's or the outside world's; None for a bug of ours."""
    if isinstance(error, FullweightError):
        return str(error)
    if isinstance(error, OSError) and error.errno in _DISK | _PATH:
        where = f" ({error.filename})" if error.filename else ""
        return f"{error.strerror}{where}; free space or choose another folder"
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and _has(error, _MEMORY)):
        return f"out of memory: {str(error).partition(chr(10))[0] or 'nothing is left'}; {_SMALLER}"
    if isinstance(error, RuntimeError) and _has(error, _LOST_PEER):
        return "the connection to another rank was lost: it has ended, and its own message says why"
    return None


def _has(error: Exception, signs: tuple[str, ...]) -> bool:
    return any(sign in str(error) for sign in signs)


def _fail(message: str, status: int = 1) -> int:
    rank = os.environ.get("RANK")
    message = message.encode("utf-8", "backslashreplace").decode("utf-8")  # half a surrogate pair is no text
    typer.secho(f"error{f' (rank {rank})' if rank else ''}: {message}", fg="red", err=True)
    tell_launcher(message)
    return status


if __name__ == "__main__":
    sys.exit(main())
