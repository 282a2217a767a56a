"""`alignlab reward`: train what a reward is made of."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from alignlab.cli.common import Overrides, RecipePath, find_recipe, stoppable

app = typer.Typer(help="Train what a reward is made of.", no_args_is_help=True)


@app.command()
def encoder(
    recipe: RecipePath,
    overrides: Overrides = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="New folder.", show_default=False)] = ...,  # type: ignore[assignment]
    model: Annotated[str, typer.Option(help="Text encoder to start from: folder, hub id, or minilm.")] = "minilm",
    epochs: Annotated[int, typer.Option(help="Passes over the pairs.", min=1)] = 2,
    learning_rate: Annotated[float, typer.Option(help="Peak; the head's is 20 times that.", min=0)] = 5e-5,
    window: Annotated[int, typer.Option(help="Tokens it reads at once.", min=16)] = 256,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
) -> None:
    """Train a small reward model, an encoder with a scalar head, on a recipe's pairs; the reward `hybrid` uses it."""
    with stoppable("the same command starts again"):
        from alignlab.models import hush_progress_bars
        from alignlab.pipeline.encoder import train_encoder_reward
        from alignlab.recipe import load_recipe

        def say(line: str) -> None:
            if not quiet:
                print(line, file=sys.stderr)

        hush_progress_bars()
        loaded = load_recipe(find_recipe(recipe), overrides or [])
        record = train_encoder_reward(
            loaded, output, model=model, epochs=epochs, learning_rate=learning_rate, window=window, say=say
        )
        print(f"held-out accuracy: {record['accuracy']:.3f} of {record['held_out']} pairs (guessing: 0.5)")
        print(f"encoder reward: {output}; use it as reward.hybrid={{weight: 1, model: {output}}}")


@app.callback()
def reward() -> None:
    """One command a thing to train."""
