"""The command line: parse, call, print.

Exit codes: 0 done, 1 the run failed, 2 the user's recipe, data or model, 130 Ctrl-C, 143 a request to end.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Annotated

import typer
from rich.console import Console

import alignlab
from alignlab.errors import UserError

app = typer.Typer(
    name="alignlab",
    help="Align small language models several ways, and find out which one works best.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
RecipePath = Annotated[Path, typer.Argument(help="Recipe file, YAML or JSON.", show_default=False)]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[key=value]...", help="Recipe keys to replace.", show_default=False)
]
Output = Annotated[
    Path | None, typer.Option("--output", "-o", help="Run folder; default runs/NAME.", show_default=False)
]
Debug = Annotated[bool, typer.Option("--debug", help="Two phases of every stage, in seconds.")]


def recipes_folder() -> Path:
    """The recipes shipped with alignlab: in a wheel inside the package, in a checkout beside the sources."""
    package = Path(alignlab.__file__).parent
    inside = package / "_recipes"
    return inside if inside.is_dir() else package.parents[1] / "recipes"


def _find(path: Path) -> Path:
    """The recipe as given, or the shipped one of that name (`recipes/starter/sft.yaml` works from anywhere)."""
    shipped = recipes_folder() / Path(*path.parts[1:]) if path.parts[:1] == ("recipes",) else path
    return shipped if not path.exists() and shipped.exists() else path


@contextmanager
def _stoppable(go_on: str) -> Iterator[None]:
    """Ctrl-C is no error: one line that says how to go on, and exit code 130."""
    try:
        yield
    except KeyboardInterrupt:
        print(f"stopped; {go_on}", file=sys.stderr)
        raise typer.Exit(130) from None


@app.command()
def train(
    recipe: RecipePath,
    overrides: Overrides = None,
    output: Output = None,
    debug: Debug = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the newest checkpoint, if there is one.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
) -> None:
    """Train the stages of a recipe, each into a run folder."""
    with _stoppable("the same command with --resume goes on from the newest checkpoint"):
        from alignlab.pipeline import run_recipe
        from alignlab.recipe import load_recipe

        loaded = load_recipe(_find(recipe), overrides or [], debug=debug)
        if debug and output is None:
            output = Path("runs") / "debug" / loaded.name
            if not resume:
                shutil.rmtree(output, ignore_errors=True)
        output = output or Path("runs") / loaded.name
        started = time.monotonic()
        results = run_recipe(loaded, output, resume=resume, debug=debug, quiet=quiet)
        for result in results:
            print(f"{result.kind.replace('_', ' ')}: {result.model}")
        print(f"run folder: {output}  ({time.monotonic() - started:.0f} s)")


@app.command()
def study(
    recipe: RecipePath,
    overrides: Overrides = None,
    output: Output = None,
    debug: Debug = False,
) -> None:
    """Compare several methods over several seeds and write report.html; a restart goes on where it stopped."""
    with _stoppable("the same command goes on with what is not finished"):
        from alignlab.study.plan import load_study
        from alignlab.study.run import run_study

        loaded = load_study(_find(recipe), tuple(overrides or ()), debug=debug)
        folder = output or Path("runs") / ("debug" if debug else "") / loaded.name
        if debug and output is None:
            shutil.rmtree(folder, ignore_errors=True)
        failed = run_study(loaded, folder, Console())
    if failed:
        raise typer.Exit(1)


@app.command()
def demo(
    output: Output = None,
    debug: Debug = False,
) -> None:
    """SFT, DPO, PPO and GRPO on the embedded starter model, three seeds each, and the report."""
    study(recipes_folder() / "studies" / "starter.yaml", None, output, debug)


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


if __name__ == "__main__":
    main()
