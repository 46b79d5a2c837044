"""The `fullweight` command: the table of commands, and how a mistake is told.

A user's mistake, a full disk or an interruption ends in one message on standard error and a non-zero status,
never a traceback. Anything else is a bug of ours and keeps its traceback. Commands import what they need when
they run, so that `--help` is quick.
"""

from __future__ import annotations

import sys

import typer

from fullweight.cli.bench import bench_app
from fullweight.cli.bench_checkpoint import bench_checkpoint_command
from fullweight.cli.bench_convert import bench_convert_command
from fullweight.cli.bench_evidence import bench_evidence_command
from fullweight.cli.bench_planner import bench_planner_command
from fullweight.cli.boundaries import boundaries_command
from fullweight.cli.chat import chat_command
from fullweight.cli.checkpoint import checkpoint_app
from fullweight.cli.compare import compare_command
from fullweight.cli.convert import convert_app
from fullweight.cli.coverage import coverage_command
from fullweight.cli.data import data_app
from fullweight.cli.doctor import doctor_command
from fullweight.cli.generate import generate_command
from fullweight.cli.init import init_command
from fullweight.cli.parity import parity_command
from fullweight.cli.plan import plan_command
from fullweight.cli.rehearse import rehearse_command
from fullweight.cli.replay import replay_command
from fullweight.cli.report import report_command
from fullweight.cli.resume import resume_command
from fullweight.cli.seal import seal_command
from fullweight.cli.train import INTERRUPTED, train_command
from fullweight.cli.verify import verify_command
from fullweight.cli.watch import watch_command
from fullweight.core.errors import FullweightError, ToldError
from fullweight.core.launcher import failure_text, outside, tell_launcher

app = typer.Typer(
    help="Full-parameter post-training of DeepSeek-V4-class models.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.command("train")(train_command)
app.command("resume")(resume_command)
app.command("replay")(replay_command)
app.command("boundaries")(boundaries_command)
app.command("generate")(generate_command)
app.command("chat")(chat_command)
app.command("coverage")(coverage_command)
app.command("init")(init_command)
app.command("compare")(compare_command)
app.command("parity")(parity_command)
app.command("report")(report_command)
app.command("watch")(watch_command)
app.command("plan")(plan_command)
app.command("rehearse")(rehearse_command)
app.command("doctor")(doctor_command)
app.command("seal")(seal_command)
app.command("verify")(verify_command)
app.add_typer(data_app, name="data")
app.add_typer(checkpoint_app, name="checkpoint")
app.add_typer(convert_app, name="convert")
bench_app.command("convert")(bench_convert_command)
bench_app.command("checkpoint")(bench_checkpoint_command)
bench_app.command("planner")(bench_planner_command)
bench_app.command("evidence")(bench_evidence_command)
app.add_typer(bench_app, name="bench")


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status (0 done, 1 a mistake, 2 wrong usage, 130 interrupted)."""
    try:
        app(arguments, prog_name="fullweight")
    except SystemExit as end:
        if end.__context__ is not None and isinstance(end.__context__.__cause__, KeyboardInterrupt):
            return _fail("interrupted", INTERRUPTED)
        return end.code if isinstance(end.code, int) else 0
    except ToldError as error:
        tell_launcher(str(error))
        return 1
    except (FullweightError, OSError, RuntimeError, MemoryError) as error:
        message = outside(error)
        if message is None:
            raise
        return _fail(message)
    return 0


def _fail(message: str, status: int = 1) -> int:
    message = message.encode("utf-8", "backslashreplace").decode("utf-8")  # half a surrogate pair is no text
    typer.secho(failure_text(message), fg="red", err=True)
    tell_launcher(message)
    return status


if __name__ == "__main__":
    sys.exit(main())
