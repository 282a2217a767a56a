"""Commands about recipes: train, explain, study, demo, profile, merge."""

from __future__ import annotations

import shutil
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from alignlab.cli.common import Debug, Output, Overrides, RecipePath, find_recipe, recipes_folder, replaced, stoppable


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
    with stoppable("the same command with --resume goes on from the newest checkpoint"):
        from alignlab.pipeline import run_recipe
        from alignlab.recipe import load_recipe

        loaded = load_recipe(find_recipe(recipe), overrides or [], debug=debug)
        anew = debug and output is None and not resume
        output = output or Path("runs") / ("debug" if debug else "") / loaded.name
        started = time.monotonic()
        with replaced(output) if anew else nullcontext():
            results = run_recipe(loaded, output, resume=resume, debug=debug, quiet=quiet)
        for result in results:
            print(f"{result.kind.replace('_', ' ')}: {result.model}")
            if not result.ledger["optimizer_steps"]:
                print(
                    f"note: no optimiser step was taken: this is what it started from; see {result.folder}/stage.json"
                )
        print(f"run folder: {output}  ({time.monotonic() - started:.0f} s)")


def explain(
    recipe: RecipePath,
    overrides: Overrides = None,
    debug: Debug = False,
    as_json: Annotated[bool, typer.Option("--json", help="For machines.")] = False,
) -> None:
    """Say what a recipe does, in numbers: its loss, KL, masks, batches, and how it differs. Loads no model."""
    from alignlab import explain as explaining
    from alignlab.recipe import load_recipe

    explained = explaining.explain(load_recipe(find_recipe(recipe), overrides or [], debug=debug), debug=debug)
    if as_json:
        print(explaining.as_json(explained))
    else:
        console = Console(highlight=False)
        console.print(explaining.render(explained, console.width))


def study(
    recipe: RecipePath,
    overrides: Overrides = None,
    output: Output = None,
    debug: Debug = False,
) -> None:
    """Compare several methods over several seeds and write report.html; a restart goes on where it stopped."""
    with stoppable("the same command goes on with what is not finished"):
        from alignlab.study.plan import load_study
        from alignlab.study.run import run_study

        loaded = load_study(find_recipe(recipe), tuple(overrides or ()), debug=debug)
        folder = output or Path("runs") / ("debug" if debug else "") / loaded.name
        if debug and output is None:
            shutil.rmtree(folder, ignore_errors=True)
        failed = run_study(loaded, folder, Console())
    if failed:
        raise typer.Exit(1)


def demo(
    output: Output = None,
    debug: Debug = False,
) -> None:
    """SFT, DPO, PPO and GRPO on the embedded starter model, three seeds each, and the report."""
    study(recipes_folder() / "studies" / "starter.yaml", None, output, debug)


def merge(
    run: Annotated[Path, typer.Argument(help="Finished run, or a folder with an adapter.", show_default=False)],
    output: Annotated[Path, typer.Option("--output", "-o", help="New folder for the model.", show_default=False)],
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16; auto: as the base model's.")] = "auto",
) -> None:
    """Merge a run's adapter into its base model, check that it is the same model, and write it as a plain folder."""
    from alignlab.export import merge_run

    found = merge_run(run, output, dtype=dtype)
    print(f"merged model: {output} ({found['dtype']})")
    print(
        f"largest logit difference to the adapter: {found['largest_logit_difference']:.2g} (the adapter changes logits "
        f"by up to {found['adapter_effect']:.3g})"
    )
    if "difference_to_trained" in found:
        print(
            f"it was trained on {found['trained_on']} weights: logits differ from that by up to "
            f"{found['difference_to_trained']:.3g}; evaluate the merged model before you rely on it"
        )


def profile(
    recipe: RecipePath,
    overrides: Overrides = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Folder; default runs/profile/NAME.", show_default=False),
    ] = None,
    stage: Annotated[
        str | None, typer.Option(help="Which stage of the recipe; default: the last.", show_default=False)
    ] = None,
    phases: Annotated[int, typer.Option(help="Phases to measure, after one that warms up.", min=1)] = 3,
    try_changes: Annotated[
        bool, typer.Option("--try/--no-try", help="Run a phase again with the most promising changes.")
    ] = True,
    debug: Debug = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
) -> None:
    """Say where a run's time and memory go, and which settings are most worth changing. Trains nothing for good."""
    with stoppable("the same command starts again"):
        from alignlab import profile as profiling

        def say(line: str) -> None:
            if not quiet:
                print(line, file=sys.stderr)

        profiled, folder = profiling.profile(
            find_recipe(recipe), overrides or [], output, stage=stage, phases=phases, try_changes=try_changes,
            debug=debug, say=say,
        )  # fmt: skip
        console = Console(highlight=False)
        for shown in profiling.tables(profiled):
            console.print(shown)
            console.print()
        numbers, page = profiling.write(profiled, folder)
        print(f"{numbers}\n{page}")
