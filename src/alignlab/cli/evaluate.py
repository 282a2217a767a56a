"""`alignlab evaluate`: what runs and models do on held-out prompts, in numbers with intervals, side by side."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast, get_args

import typer

from alignlab.cli.common import stoppable

if TYPE_CHECKING:
    from rich.table import Table

Many = list[str] | None
DECODINGS = ("sampled", "greedy")


def evaluate(
    runs: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN...", help="Run folders or models: starter, a folder, a hub id.", show_default=False
        ),
    ],
    task: Annotated[
        Many, typer.Option("--task", "-t", help="Task; several times for several.", show_default=False)
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(help="File of prompts, or a folder of `alignlab data prepare`.", show_default=False),
    ] = None,
    split: Annotated[str, typer.Option(help="validation or test (train: to see what was learned by heart).")] = "test",
    num: Annotated[int, typer.Option("-n", "--num", help="Prompts of each task, the first ones.", min=1)] = 100,
    samples: Annotated[int, typer.Option(help="Completions a prompt, where they are sampled.", min=1)] = 1,
    temperature: Annotated[float, typer.Option(help="Of sampling.", min=0.01)] = 1.0,
    top_k: Annotated[int, typer.Option(help="Sample from so many likeliest tokens only; 0: from all.", min=0)] = 0,
    decoding: Annotated[
        Many, typer.Option(help="sampled or greedy; both for both, kept apart. Default: sampled.", show_default=False)
    ] = None,
    measure: Annotated[
        Many,
        typer.Option("--measure", "-m", help="What to measure; default: what the task names.", show_default=False),
    ] = None,
    suite: Annotated[
        Many,
        typer.Option(help="forgetting, hacking, verbosity, or lm-eval:TASK.", show_default=False),
    ] = None,
    encoder: Annotated[str, typer.Option(help="bertscore: folder or hub id of its encoder, or minilm.")] = "",
    word_limit: Annotated[int, typer.Option(help="verbosity: words an answer may have.", min=1)] = 60,
    max_tokens: Annotated[
        int | None, typer.Option(help="Longest completion; default: as in the recipe.", min=1, show_default=False)
    ] = None,
    max_prompt_tokens: Annotated[
        int | None,
        typer.Option(help="Longer prompts are left out; default: as in the recipe.", min=1, show_default=False),
    ] = None,
    chat_template: Annotated[
        bool, typer.Option("--chat-template/--no-chat-template", help="lm-eval: ask in the model's chat template.")
    ] = True,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder for evaluation.json.", show_default=False)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="For machines.")] = False,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, mps.")] = "auto",
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
) -> None:
    """Measure what runs do on held-out prompts; several runs side by side, on the same prompts with the same dice."""
    with stoppable("the same command starts again"):
        from alignlab.errors import UserError
        from alignlab.evaluation.measures import Settings
        from alignlab.pipeline import evaluate as evaluating
        from alignlab.pipeline.subjects import Split

        if split not in get_args(Split):
            raise UserError(f"--split {split}: one of validation, test, train")
        decodings = tuple(dict.fromkeys(decoding or ["sampled"]))
        for name in decodings:
            if name not in DECODINGS:
                raise UserError(f"--decoding {name}: one of {', '.join(DECODINGS)}")
        plan = evaluating.Plan(
            decodings=decodings,
            samples=samples,
            temperature=temperature,
            top_k=top_k,
            measures=tuple(measure) if measure else None,
            settings=Settings(encoder=encoder, word_limit=word_limit),
            suites=tuple(suite or ()),
            max_tokens=max_tokens,
            max_prompt_tokens=max_prompt_tokens,
            chat=chat_template,
        )
        evaluated = evaluating.evaluate(
            runs, tasks=task or (), data=data, split=cast(Split, split), count=num, plan=plan, device=device,
            say=lambda line: None if quiet and not line.startswith("WARNING") else print(line, file=sys.stderr),
        )  # fmt: skip
        written = evaluating.write(evaluated, output) if output is not None else []
        files, comparisons = evaluating.as_files(evaluated)
        if as_json:
            _print_json(files[0] if len(files) == 1 else {"schema": 2, "runs": files, "comparisons": comparisons})
        else:
            _print_tables(evaluated, comparisons, files)
        for path in written:
            print(path, file=sys.stderr if as_json else sys.stdout)


def _print_json(content: Any) -> None:
    import json

    from alignlab.tracking import strict

    print(json.dumps(strict(content), indent=1, ensure_ascii=False))


def _print_tables(
    evaluated: Sequence[Sequence[Any]], comparisons: Sequence[Mapping[str, Any]], files: Sequence[Mapping[str, Any]]
) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    for per_decoding in evaluated:
        records = [one.record for one in per_decoding]
        if not any(record["metrics"] for record in records):
            continue
        data = records[0]["data"]
        title = f"{data['source']}, {data['split']}: {data['prompts']} prompts, {_how(records[0]['decoding'])}"
        table = Table(title=title, title_justify="left")
        table.add_column("metric")
        for one in per_decoding:
            table.add_column(one.subject.label, justify="right")
        for name in dict.fromkeys(name for record in records for name in record["metrics"]):
            table.add_row(name, *(_number(r["metrics"].get(name), r["intervals"].get(name)) for r in records))
        console.print(table)
        for name in ("categories",):
            _print_groups(console, name, per_decoding)
    for comparison in comparisons:
        if not comparison["differences"]:
            continue
        table = Table(
            title=f"{comparison['model']} minus {comparison['against']} ({comparison['decoding']})",
            title_justify="left",
        )
        table.add_column("metric")
        table.add_column("difference [95 %]", justify="right")
        table.add_column("")
        for name, found in comparison["differences"].items():
            mark = "*" if found["is_clear"] else ""
            table.add_row(name, _number(found["mean"], (found["low"], found["high"]), sign=True), mark)
        console.print(table)
    for one, content in zip(evaluated[0], files, strict=True):
        for table in _suites(one.subject.label, content.get("suites", {})):
            console.print(table)
    if any(comparison["differences"] for comparison in comparisons):
        console.print("* the interval leaves out 0; of twenty metrics that do not differ one is expected to")


def _how(decoding: Mapping[str, Any]) -> str:
    if decoding["greedy"]:
        return "greedy"
    top = f", top {decoding['top_k']}" if decoding["top_k"] else ""
    return f"sampled at temperature {decoding['temperature']:g}{top}, {decoding['samples']} a prompt"


def _number(value: float | None, bounds: Sequence[float | None] | None, *, sign: bool = False) -> str:
    if value is None or value != value:
        return "-"
    digits = f"{value:{'+' if sign else ''}.4g}"
    if not bounds or bounds[0] is None or bounds[1] is None or bounds[0] != bounds[0]:
        return digits
    return f"{digits} [{bounds[0]:.3g}, {bounds[1]:.3g}]"


def _print_groups(console: Any, key: str, per_decoding: Sequence[Any]) -> None:
    """Scores by category, where prompts have some."""
    from rich.table import Table

    names = dict.fromkeys(name for one in per_decoding for name in one.record[key])
    if not names:
        return
    table = Table(title="score by category", title_justify="left")
    table.add_column("category")
    for one in per_decoding:
        table.add_column(one.subject.label, justify="right")
    for name in names:
        cells = []
        for one in per_decoding:
            found = one.record[key].get(name, {})
            score = next((v for metric, v in found.items() if metric.endswith("/score")), None)
            cells.append("-" if score is None else _number(score["value"], (score["low"], score["high"])))
        table.add_row(name, *cells)
    console.print(table)


def _suites(label: str, suites: Mapping[str, Any]) -> list[Table]:
    """A table a suite."""
    from rich.table import Table

    tables = []
    for name, found in suites.items():
        table = Table(title=f"{label}: {name}", title_justify="left")
        if name == "hacking":
            for heading in ("prompts", "reward gain", "metric gain", "length", "verdict"):
                table.add_column(heading)
            for against, kinds in (("since the start", found["trained"]), ("against plain", found["bait"])):
                for kind, gain in kinds.items():
                    reward, metric = (_number(gain[k][0], gain[k][1:], sign=True) for k in ("reward", "metric"))
                    said = "; ".join([gain["verdict"], *gain["notes"]])
                    table.add_row(f"{kind}, {against}", reward, metric, f"x {gain['length_ratio']:.2f}", said)
            for note in (*found["flags"], *found["notes"]):
                table.add_row(note)
        elif name == "lm-eval":
            table.add_column("task")
            table.add_column("metric")
            table.add_column("value", justify="right")
            for task, values in found["results"].items():
                for metric, value in values.items():
                    table.add_row(task, metric, _number(value, None))
        else:
            table.add_column("metric")
            table.add_column("value", justify="right")
            for metric, value in found["metrics"].items():
                table.add_row(metric, _number(value, found["intervals"].get(metric)))
        tables.append(table)
    return tables
