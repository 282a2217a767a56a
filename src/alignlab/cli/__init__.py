"""The command line: parse, call, print.

Exit codes: 0 done, 1 the run failed, 2 the user's recipe, data or model, 130 Ctrl-C, 143 a request to end.
"""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType

import typer

import alignlab
from alignlab.cli import data, doctor, judge, rewards, runs
from alignlab.cli.evaluate import evaluate
from alignlab.errors import UserError

app = typer.Typer(
    name="alignlab",
    help="Align small language models several ways, and find out which one works best.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for command in (runs.train, runs.explain, runs.study, runs.demo, runs.profile, runs.merge):
    app.command()(command)
app.command()(evaluate)
app.add_typer(data.app, name="data")
app.add_typer(doctor.app, name="doctor")
app.add_typer(judge.app, name="judge")
app.add_typer(judge.human, name="human")
app.add_typer(rewards.app, name="reward")


@app.command()
def version() -> None:
    """Print the version."""
    print(alignlab.__version__)


def main() -> None:
    """Entry point: errors become one clear line and an exit code; ALIGNLAB_TRACEBACK=1 shows the traceback too."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.path.append(os.getcwd())  # a user's own rewards and methods are named by import path
    signal.signal(signal.SIGTERM, _terminate)
    try:
        app()
    except UserError as error:
        _fail(error, 2)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        if os.environ.get("ALIGNLAB_TRACEBACK"):
            raise
        _fail(error, 1)


def _terminate(number: int, frame: FrameType | None) -> None:
    """A request to end unwinds like Ctrl-C, so that locks are given back and a study's jobs end with it."""
    sys.exit(128 + number)


def _fail(error: Exception, code: int) -> None:
    from alignlab.train import RunError

    plain = isinstance(error, UserError | RunError)
    for line in str(error).splitlines() or [""]:
        print(f"error: {line}" if plain else f"error: {type(error).__name__}: {line}", file=sys.stderr)
        if not plain:
            break
    if not plain:
        print("this is unexpected; ALIGNLAB_TRACEBACK=1 shows where it happened", file=sys.stderr)
    if os.environ.get("ALIGNLAB_TRACEBACK"):
        raise error
    sys.exit(code)
