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
from contextlib import contextmanager, nullcontext
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
doctor = typer.Typer(help="Examine what was trained, before something is trained on it.", no_args_is_help=True)
app.add_typer(doctor, name="doctor")
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
def _replaced(run: Path) -> Iterator[None]:
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
        anew = debug and output is None and not resume
        output = output or Path("runs") / ("debug" if debug else "") / loaded.name
        started = time.monotonic()
        with _replaced(output) if anew else nullcontext():
            results = run_recipe(loaded, output, resume=resume, debug=debug, quiet=quiet)
        for result in results:
            print(f"{result.kind.replace('_', ' ')}: {result.model}")
            if not result.ledger["optimizer_steps"]:
                print(
                    f"note: no optimiser step was taken: this is what it started from; see {result.folder}/stage.json"
                )
        print(f"run folder: {output}  ({time.monotonic() - started:.0f} s)")


@app.command()
def explain(
    recipe: RecipePath,
    overrides: Overrides = None,
    debug: Debug = False,
    as_json: Annotated[bool, typer.Option("--json", help="For machines.")] = False,
) -> None:
    """Say what a recipe does, in numbers: its loss, KL, masks, batches, and how it differs. Loads no model."""
    from alignlab import explain as explaining
    from alignlab.recipe import load_recipe

    explained = explaining.explain(load_recipe(_find(recipe), overrides or [], debug=debug), debug=debug)
    if as_json:
        print(explaining.as_json(explained))
    else:
        console = Console(highlight=False)
        console.print(explaining.render(explained, console.width))


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


@doctor.command("reward")
def doctor_reward(
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
    with _stoppable("the same command starts again"):
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


@app.command()
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
    with _stoppable("the same command starts again"):
        from alignlab import profile as profiling

        def say(line: str) -> None:
            if not quiet:
                print(line, file=sys.stderr)

        profiled, folder = profiling.profile(
            _find(recipe), overrides or [], output, stage=stage, phases=phases, try_changes=try_changes, debug=debug,
            say=say,
        )  # fmt: skip
        console = Console(highlight=False)
        for shown in profiling.tables(profiled):
            console.print(shown)
            console.print()
        numbers, page = profiling.write(profiled, folder)
        print(f"{numbers}\n{page}")


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
