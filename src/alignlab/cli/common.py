"""What the commands share: kinds of arguments, shipped recipes, being stopped."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

import alignlab

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


def find_recipe(path: Path) -> Path:
    """The recipe as given, or the shipped one of that name (`recipes/starter/sft.yaml` works from anywhere)."""
    shipped = recipes_folder() / Path(*path.parts[1:]) if path.parts[:1] == ("recipes",) else path
    return shipped if not path.exists() and shipped.exists() else path


@contextmanager
def replaced(run: Path) -> Iterator[None]:
    """A run makes place for a new one, and comes back if that does not get as far as the first line of its log."""
    before = run.with_name(f".{run.name}.before")
    if run.is_dir():
        shutil.rmtree(before, ignore_errors=True)
        run.rename(before)
    try:
        yield
    finally:
        if before.is_dir() and not any(run.rglob("log_history.jsonl")):
            shutil.rmtree(run, ignore_errors=True)
            before.rename(run)
        shutil.rmtree(before, ignore_errors=True)


@contextmanager
def stoppable(go_on: str) -> Iterator[None]:
    """Ctrl-C is no error: one line that says how to go on, and exit code 130."""
    try:
        yield
    except KeyboardInterrupt:
        print(f"stopped; {go_on}", file=sys.stderr)
        raise typer.Exit(130) from None
