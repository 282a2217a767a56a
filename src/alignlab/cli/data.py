"""`alignlab data`: prepare a task's data, show them as a model reads them, look them over."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from alignlab.cli.common import stoppable
from alignlab.errors import UserError

if TYPE_CHECKING:
    from alignlab.conversation import Template
    from alignlab.data.audit import Audit
    from alignlab.data.source import DataSource

app = typer.Typer(help="Prepare a task's data, show them as a model reads them, look them over.", no_args_is_help=True)

Where = Annotated[
    str, typer.Argument(metavar="TASK|FILE|FOLDER", help="What to look at; a URL of a file too.", show_default=False)
]
Tokenizer = Annotated[str, typer.Option(help="Model whose tokens are counted: starter, a folder, a hub id.")]
Columns = Annotated[
    list[str] | None,
    typer.Option("--column", metavar="OURS=THEIRS", help="A column under another name; may be repeated.",
                 show_default=False),
]  # fmt: skip
Format = Annotated[str, typer.Option("--format", help="chat, transcript or text; auto: what the columns say.")]
PromptTemplate = Annotated[
    str | None, typer.Option(help='The user\'s message made of columns: "Summarise: {dialogue}".', show_default=False)
]
PromptTokens = Annotated[int, typer.Option("--max-prompt-tokens", help="Longer prompts are left out.", min=1)]
CompletionTokens = Annotated[int, typer.Option("--max-completion-tokens", help="Longer answers are cut.", min=1)]


@app.command()
def prepare(
    task: Annotated[str, typer.Argument(help="Task; `jsonl` takes your own rows.", show_default=False)],
    where: Annotated[
        list[str] | None,
        typer.Option("--from", metavar="PATH|HUB", help="File, folder, URL or hub set; may be repeated. Default: the "
                     "task's sets on the hub.", show_default=False),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="New folder; default data/TASK.", show_default=False)
    ] = None,
    seed: Annotated[int, typer.Option(help="Of what is held back and sampled.")] = 42,
    train: Annotated[int | None, typer.Option(help="The most prompts to train on.", min=1, show_default=False)] = None,
    validation: Annotated[
        int | None, typer.Option(help="Prompts for validation.", min=1, show_default=False)
    ] = None,
    test: Annotated[int | None, typer.Option(help="Prompts to test on.", min=1, show_default=False)] = None,
    sets: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME", help="Only this one of the task's sets, `conala`; may be repeated.",
                     show_default=False),
    ] = None,
    split: Annotated[
        list[str] | None,
        typer.Option(help="Part of the rows to read, `train[:200]`; may be repeated.", show_default=False),
    ] = None,
    column: Columns = None,
    system_prompt: Annotated[
        str | None,
        typer.Option(help='System message of conversations without one; default the task\'s, "" for none.',
                     show_default=False),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a folder that was prepared before.")] = False,
) -> None:  # fmt: skip
    """Split a task's data into train, validation and test without a common prompt, and write them with a card."""
    with stoppable("the same command starts again"):
        from dataclasses import replace

        from alignlab import registry
        from alignlab.data.prepare import divide, make_card, with_system, write_folder
        from alignlab.data.prepared import SPLITS
        from alignlab.data.sets import choose, collect
        from alignlab.tasks import Task

        found_task = getattr(module := registry.resolve("tasks", task), "TASK", module)
        if not isinstance(found_task, Task):
            raise UserError(f"{task}: is no task, but a {type(found_task).__name__}; name one, or package.module:TASK")
        task = found_task.name
        if not found_task.sources and not where:
            how = "its rows are your own: name them with --from" if task == "jsonl" else "it has no public set"
            raise UserError(f"{task}: {how}; `alignlab data show {task}` shows the starter's rows, where it has any")
        folder = output or Path("data") / task
        if folder.exists() and not force and (folder.is_file() or any(folder.iterdir())):
            raise UserError(f"{folder}: exists; choose another --output, or --force replaces it")
        asked: dict[str, Any] = {
            name: n for name, n in zip(SPLITS, (train, validation, test), strict=True) if n is not None
        }
        sizes = replace(found_task.sizes, **asked, asked=tuple(s for s in SPLITS if s in asked))
        system = found_task.system_prompt if system_prompt is None else system_prompt
        sources = choose(task, found_task.sources, sets or ())
        with _own_words():
            found = collect(task, sources, where or (), columns=_mapping(column), splits=split or ())
        found = with_system(found, system)
        divided = divide(found, sources, sizes, seed, task)
        card, files = make_card(task, found, sources, divided, seed, system)
        write_folder(folder, card, files, force=force)
        for line in _summary(card):
            print(line)
        print(f"prepared: {folder}  (data.path={folder} in a recipe)")


@app.command()
def show(
    where: Where,
    tokenizer: Tokenizer = "starter",
    count: Annotated[int, typer.Option("-n", help="Rows of each file.", min=1)] = 3,
    split: Annotated[
        str | None, typer.Option(help="train, validation or test of a folder; [5:9] of a file.", show_default=False)
    ] = None,
    column: Columns = None,
    format: Format = "auto",
    prompt_template: PromptTemplate = None,
    max_prompt_tokens: PromptTokens = 512,
    max_completion_tokens: CompletionTokens = 128,
) -> None:
    """Show the first rows as a model reads them: which tokens are trained on, which are masked, and the stop token."""
    from alignlab.data.parts import open_parts
    from alignlab.data.show import LEGEND, coloured, plain, shown

    with _own_words():
        parts = open_parts(where, source=_source(column, format, prompt_template), split=split)
    template, console = _template(tokenizer), Console(highlight=False)
    colours = console.is_terminal and not console.no_color
    if not colours:
        print(LEGEND)
    for part in parts:
        for item in part.items[:count]:
            for row in shown(item, template, max_prompt_tokens, max_completion_tokens):
                title = f"{part.name}: {row.title}, {row.num_masked} masked + {row.num_trained} trained"
                if colours:
                    console.rule(f"[bold]{escape(title)}", align="left")
                    console.print(coloured(row), soft_wrap=True)
                else:
                    print(f"--- {title}\n{plain(row)}")


@app.command()
def audit(
    where: Where,
    tokenizer: Tokenizer = "starter",
    column: Columns = None,
    format: Format = "auto",
    prompt_template: PromptTemplate = None,
    max_prompt_tokens: PromptTokens = 512,
    max_completion_tokens: CompletionTokens = 128,
    as_json: Annotated[bool, typer.Option("--json", help="For machines.")] = False,
) -> None:
    """Look data over: lengths against the limits, duplicates, ties, rows that truncation makes equal, overlaps."""
    from alignlab.data.audit import audit as look_over
    from alignlab.data.parts import find, open_parts
    from alignlab.data.prepared import is_folder, overlap_of

    with _own_words():
        parts = open_parts(where, source=_source(column, format, prompt_template))
    as_prepared = is_folder(path := find(where)) and prompt_template is None and not column
    card = overlap_of(Path(path).expanduser()) if as_prepared else {}
    found = look_over(parts, _template(tokenizer), max_prompt_tokens, max_completion_tokens, card=card)
    if as_json:
        print(json.dumps(found.to_json(), indent=1, ensure_ascii=False))
        return
    console = Console(highlight=False)
    for table in _tables(found):
        console.print(table)


@app.callback()
def data() -> None:
    """Rows before they are trained on."""


def _template(name: str) -> Template:
    from alignlab.conversation import Template
    from alignlab.models import load_generation_config, load_tokenizer

    return Template.of(load_tokenizer(name), load_generation_config(name))


def _source(column: Sequence[str] | None, format: str, prompt_template: str | None) -> DataSource:
    from alignlab.data.source import DataSource

    return DataSource(columns=_mapping(column), format=format, prompt_template=prompt_template)  # type: ignore[arg-type]


@contextmanager
def _own_words() -> Iterator[None]:
    """Errors that name a recipe's keys name the options of these commands instead."""
    try:
        yield
    except UserError as error:
        raise UserError(re.sub(r"data\.columns\.(\w+=)", r"--column \1", str(error))) from error


def _mapping(columns: Sequence[str] | None) -> dict[str, str]:
    pairs = [text.partition("=") for text in columns or ()]
    for ours, _, theirs in pairs:
        if not ours or not theirs:
            raise UserError("--column: write OURS=THEIRS, such as --column prompt=question")
    return {ours: theirs for ours, _, theirs in pairs}


# ---- words -----------------------------------------------------------------------------------------------------------


def _summary(card: Mapping[str, Any]) -> Iterator[str]:
    for source in card["sources"]:
        left_out = "".join(f", {count} left out: {reason}" for reason, count in source["unusable"].items())
        yield f"{source['name']} ({source['where']}): {source['rows']} rows{left_out}; {source['licence']}"
    for split, counts in card["splits"].items():
        categories = [f"{count} {name}" for name, count in counts["categories"].items() if name]
        pairs = f", {counts['pairs']} pairs" if counts["pairs"] else ""
        verdicts = f", {counts['labelled']} labelled ({counts['desirable']} desirable)" if counts["labelled"] else ""
        shown = f" ({', '.join(categories)})" if 1 < len(categories) <= 8 else ""
        yield f"{split}: {counts['prompts']} prompts{pairs}{verdicts}{shown}"
    for reason, count in card["dropped"].items():
        yield f"dropped: {count} {reason}"
    for split, shared in card["overlap"].items():
        grams = ", ".join(
            f"{shared[name]['rows']} share {'an' if name.startswith('8') else 'a'} {name}"
            for name in shared
            if name.endswith("-gram")
        )
        yield f"overlap of {split} with train: {shared['exact']} of {shared['of']} prompts exactly, {grams} of words"
    for note in card["notes"]:
        yield f"note: {note}"


def _tables(found: Audit) -> Iterator[Table]:
    for part in found.parts:
        table = Table(title=escape(f"{part['file']} ({part['kind']})"), title_justify="left", show_header=False)
        for name, value in part.items():
            if name in ("file", "kind", "split") or value in ({}, None):
                continue
            table.add_row(name.replace("_", " "), escape(_said(name, value, part, found.limits)))
        yield table
    if found.overlaps:
        table = Table(title="the same prompts on two sides", title_justify="left")
        for column in found.overlaps[0]:
            table.add_column(column)
        for row in found.overlaps:
            table.add_row(*map(str, row.values()))
        yield table


def _said(name: str, value: Any, part: Mapping[str, Any], limits: Mapping[str, int]) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {count}" for key, count in value.items())
    if name == "chosen_longer":
        return f"{value:.0%} of pairs of unequal length"
    if name in ("prompts_too_long", "completions_cut"):
        limit = limits["max_prompt_tokens" if name == "prompts_too_long" else "max_completion_tokens"]
        return f"{value} over {limit} tokens"
    if name == "ties":
        return f"{value} of {part['scored']} scored pairs"
    return str(value)
