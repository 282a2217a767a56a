"""`alignlab doctor`: examine what was trained, before something is trained on it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from alignlab.cli.common import stoppable

app = typer.Typer(help="Examine what was trained, before something is trained on it.", no_args_is_help=True)


@app.command()
def reward(
    run: Annotated[Path, typer.Argument(help="Finished run that trained a reward model.", show_default=False)],
    pairs: Annotated[
        Path | None, typer.Option(help="File of other pairs; default: the run's validation pairs.", show_default=False)
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Folder for the findings; default: the run's.", show_default=False),
    ] = None,
    limit: Annotated[int, typer.Option(help="The most pairs to score.", min=2)] = 1000,
    seed: Annotated[int, typer.Option(help="Of everything drawn at random.", min=0)] = 0,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
) -> None:
    """Say whether a reward model is fit for RL, and why. Exit code 0 if it is, 1 if not.

    Findings in the run's own folder are heeded: the reward `learned` refuses a model that is not fit.
    """
    with stoppable("the same command starts again"):
        from alignlab.doctor import examine_run, terminal_tables, write

        def say(line: str) -> None:
            if not quiet:
                print(line, file=sys.stderr)

        examined = examine_run(run, pairs=pairs, limit=limit, seed=seed, say=say)
        console, examination = Console(highlight=False), examined.examination
        for table in terminal_tables(examined):
            console.print(table)
            console.print()
        for warning in examination.warnings:
            print(f"note: {warning}")
        numbers, page = write(examined, output or examined.stage.folder)
        print(f"{numbers}\n{page}")
        print(": ".join([examination.verdict, *(["; ".join(examination.reasons)] if examination.reasons else [])]))
    if not examination.fit:
        raise typer.Exit(1)


@app.callback()
def examine() -> None:
    """One command a thing to examine."""
