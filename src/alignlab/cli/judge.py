"""`alignlab judge` and `alignlab human`: who of two systems answers better, before a model and before people."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from alignlab.cli.common import stoppable

if TYPE_CHECKING:
    from alignlab.judge import Comparison
    from alignlab.judge.answers import Answers
    from alignlab.types import Prompt

app = typer.Typer(help="Have a model judge which of two systems answers better.", no_args_is_help=True)
human = typer.Typer(help="Have people judge: a blinded sheet to fill in, and what it says.", no_args_is_help=True)

System = Annotated[
    Path, typer.Argument(help="Run folder, folder with evaluation samples, or file of completions.", show_default=False)
]
OutputFolder = Annotated[
    Path | None, typer.Option("--output", "-o", help="Folder for the findings.", show_default=False)
]


@app.command()
def compare(
    a: System,
    b: System,
    judge: Annotated[str, typer.Option(help="Model at the endpoint.")] = "gpt-4o-mini",
    reward_model: Annotated[
        Path | None, typer.Option(help="Judge by the reward model of this run instead.", show_default=False)
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="Judge by a language model on this machine: folder, run or name.", show_default=False),
    ] = None,
    oracle: Annotated[
        bool, typer.Option("--oracle", help="Ask the tasks' graders, which know the answers: no judge, an oracle.")
    ] = False,
    base_url: Annotated[
        str | None, typer.Option(help="Any OpenAI-compatible endpoint; default: OpenAI's.", show_default=False)
    ] = None,
    api_key_env: Annotated[str, typer.Option(help="Environment variable with the key.")] = "OPENAI_API_KEY",
    limit: Annotated[
        int | None, typer.Option("-n", "--limit", help="The most prompts.", min=1, show_default=False)
    ] = None,
    references: Annotated[
        bool, typer.Option("--references", help="Show the judge the prompts' reference answers.")
    ] = False,
    max_calls: Annotated[
        int | None,
        typer.Option(help="Calls to make at most; 0 = only what the cache holds.", min=0, show_default=False),
    ] = None,
    max_cost: Annotated[
        float | None, typer.Option(help="US dollars to spend at most.", min=0, show_default=False)
    ] = None,
    input_price: Annotated[
        float | None, typer.Option(help="US dollars a million tokens sent.", min=0, show_default=False)
    ] = None,
    output_price: Annotated[
        float | None, typer.Option(help="US dollars a million tokens received.", min=0, show_default=False)
    ] = None,
    max_tokens: Annotated[int, typer.Option(help="Tokens of a reply.", min=1)] = 512,
    concurrency: Annotated[int, typer.Option(help="Calls at a time.", min=1)] = 8,
    timeout: Annotated[float, typer.Option(help="Seconds a call may take.", min=0.1)] = 60.0,
    cache: Annotated[
        Path | None, typer.Option(help="Folder of replies; default $ALIGNLAB_CACHE/judge.", show_default=False)
    ] = None,
    output: OutputFolder = None,
) -> None:
    """Compare the answers of A and B on the same prompts, in both orders. Writes judge.json and verdicts.jsonl."""
    from alignlab.errors import UserError

    chosen = [
        name for name, given in (("--reward-model", reward_model), ("--model", model), ("--oracle", oracle)) if given
    ]
    if len(chosen) > 1 or (chosen and base_url):
        raise UserError(
            f"judge: {', '.join(chosen + ['--base-url'] * bool(base_url))} name different judges; choose one"
        )
    with stoppable("the same command goes on: every reply so far is in the cache"):
        from alignlab.judge.client import ChatClient, Endpoint
        from alignlab.judge.local import LocalClient
        from alignlab.judge.pairwise import compare as by_verdicts
        from alignlab.pipeline.answers import origins

        systems, prompts = _systems([a, b], limit)
        texts = [[system.completions[prompt.id] for prompt in prompts] for system in systems]
        names = (systems[0].name, systems[1].name)
        cache = cache or _default_cache()
        if reward_model is not None:
            compared = _by_reward_model(reward_model, systems, prompts, texts, names)
        elif oracle:
            compared = _by_oracle(prompts, texts, names)
        else:
            client: ChatClient | LocalClient
            if model is not None:
                client = LocalClient(_policy(model), max_tokens=max_tokens, cache=cache)
            else:
                endpoint = Endpoint(
                    base_url=base_url, model=judge, api_key_env=api_key_env, max_tokens=max_tokens, timeout=timeout,
                    concurrency=concurrency, max_calls=max_calls, max_cost=max_cost, input_price=input_price,
                    output_price=output_price, cache=cache,
                )  # fmt: skip
                client = ChatClient(endpoint, progress=_progress)
            compared = by_verdicts(
                client, prompts, *texts, names=names, judge=model or judge,
                references=[prompt.answer for prompt in prompts] if references else None,
                models=[name for system in systems for name in system.models],
                made_from=origins(Path(_policy(model)).parent) if model is not None else (),
            )  # fmt: skip
            asked = sum(len(game.verdicts) for game in compared.games)
            spent = f"; called: {client.spent()}" if isinstance(client, ChatClient) else ""
            print(f"{client.replayed} of {asked} replies were in the cache{spent}", file=sys.stderr)
        folder = output or Path("runs") / "judge" / _file_name(f"{names[0]}-{names[1]}")
        _write_comparison(compared, folder)
        _show(compared.to_json())
        print(f"{folder / 'judge.json'}\n{folder / 'verdicts.jsonl'}")


@app.command()
def agreement(
    human: Annotated[Path, typer.Option(help="File of people's votes.", show_default=False)],
    judge: Annotated[
        Path, typer.Option(help="File of a judge's verdicts on the same comparisons.", show_default=False)
    ],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="JSON file for the numbers.", show_default=False)
    ] = None,
) -> None:
    """Say how far a judge agrees with people, beyond chance, and people with each other."""
    from alignlab.judge.agreement import agreement as compute
    from alignlab.judge.agreement import read_votes
    from alignlab.tracking import write_json

    found = compute(read_votes(human), read_votes(judge))
    _show_agreement(found)
    if output is not None:
        write_json(output, found)
        print(output)


@human.command()
def make(
    systems: Annotated[
        list[Path], typer.Argument(help="Two or more run folders, or files of completions.", show_default=False)
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="New folder for the sheet.", show_default=False)],
    num_prompts: Annotated[int, typer.Option("-n", "--prompts", help="Prompts on the sheet.", min=1)] = 200,
    seed: Annotated[int, typer.Option(help="Of the draw and the slots.", min=0)] = 42,
    duplicates: Annotated[
        float, typer.Option(help="Share of prompts that come twice, for self-consistency.", min=0, max=1)
    ] = 0.1,
) -> None:
    """Write a blinded sheet for people to fill in, its manifest, and its key."""
    from alignlab.evaluation.human import KEY, LONGEST_CELL, SHEET, make_sheet

    found, _ = _systems(systems, None)
    manifest = make_sheet(found, output, num_prompts=num_prompts, seed=seed, duplicates=duplicates)
    if (drawn := manifest["prompts"] + manifest["identical"]) < num_prompts:
        print(f"note: the systems share {drawn} prompts, so there are not {num_prompts}", file=sys.stderr)
    if manifest["longest_cell"] > LONGEST_CELL:
        print(
            f"note: a text has {manifest['longest_cell']} characters, and spreadsheets keep {LONGEST_CELL}; hand out "
            "sheet.jsonl",
            file=sys.stderr,
        )
    print(f"{manifest['rows']} rows, {manifest['duplicates']} of them for the second time")
    if manifest["identical"]:
        print(
            f"{manifest['identical']} of the {manifest['prompts'] + manifest['identical']} prompts drawn have the same "
            "answer from all systems: ties known in advance, not on the sheet, counted by `human read`"
        )
    print(f"hand out: {output / SHEET} (or sheet.jsonl), one copy a person, and nothing else of that folder")
    print(f"keep back: {output / KEY}")


@human.command()
def read(
    files: Annotated[list[Path], typer.Argument(help="Filled sheets, named after their people.", show_default=False)],
    folder: Annotated[
        Path | None,
        typer.Option("--manifest", help="Folder of the sheet; default: that of the first file.", show_default=False),
    ] = None,
    key: Annotated[
        Path | None, typer.Option(help="The key; default: key.json beside the manifest.", show_default=False)
    ] = None,
    judge: Annotated[
        Path | None, typer.Option(help="A judge's verdicts.jsonl to set beside the people.", show_default=False)
    ] = None,
    partial: Annotated[bool, typer.Option("--partial", help="Leave out rows without an answer.")] = False,
) -> None:
    """Say what filled sheets say: agreement, self-consistency, position bias, wins. Writes human.json, votes.jsonl."""
    from alignlab.evaluation.human import read_filled, results, vote_rows
    from alignlab.judge.agreement import read_votes
    from alignlab.tracking import append_jsonl, write_json

    where = folder or files[0].parent
    choices, known = read_filled(files, where, key, partial=partial)
    found = results(choices, known, read_votes(judge) if judge else None)
    _show_people(found)
    write_json(where / "human.json", found)
    votes = where / "votes.jsonl"
    votes.unlink(missing_ok=True)
    append_jsonl(votes, vote_rows(choices, known))
    print(f"{where / 'human.json'}\n{votes}")


# ---- judges ----------------------------------------------------------------------------------------------------------


def _systems(paths: Sequence[Path], limit: int | None) -> tuple[list[Answers], list[Prompt]]:
    """The systems' answers, and the prompts that all of them answered."""
    from alignlab.judge.answers import common_prompts, distinct_names
    from alignlab.pipeline.answers import read_system

    systems = distinct_names([read_system(path) for path in paths], paths)
    prompts = common_prompts(systems)
    for system in systems:
        if left := len(system.prompts) - len(prompts):
            print(f"note: {left} prompts of {system.name} were not answered by all, and are left out", file=sys.stderr)
    return systems, prompts[:limit]


def _progress(answered: int, asked: int) -> None:
    """A line for every tenth of many replies."""
    if asked >= 50 and answered * 10 // asked > (answered - 1) * 10 // asked:
        print(f"{answered} of {asked} replies", file=sys.stderr)


def _default_cache() -> Path:
    from alignlab.pipeline import default_cache

    return default_cache() / "judge"


def _policy(name: str) -> str:
    """A run's policy, or the model of that name."""
    from alignlab.pipeline.identity import finished_folder

    path = Path(name).expanduser()
    return str(finished_folder(path, "policy") / "policy") if (path / "recipe.yaml").is_file() else name


def _by_reward_model(
    run: Path,
    systems: Sequence[Answers],
    prompts: Sequence[Prompt],
    texts: Sequence[Sequence[str]],
    names: tuple[str, str],
) -> Comparison:
    from alignlab.doctor.runs import finished_reward_model
    from alignlab.judge.local import RewardModelScorer
    from alignlab.judge.pairwise import compare_scores

    stage = finished_reward_model(run)
    trained = [system.name for system in systems if system.reward_model == stage.key]
    warnings = [
        f"{' and '.join(trained)} was trained against this very reward model: it judges its own pupil, not quality"
    ] * bool(trained)
    return compare_scores(
        RewardModelScorer(stage.model),
        prompts,
        *texts,
        judge=run.resolve().name,
        kind="reward model",
        names=names,
        warnings=warnings,
    )


def _by_oracle(prompts: Sequence[Prompt], texts: Sequence[Sequence[str]], names: tuple[str, str]) -> Comparison:
    from alignlab.errors import UserError
    from alignlab.judge.pairwise import compare_scores
    from alignlab.tasks import get_task
    from alignlab.types import Completion

    def score(prompts: Sequence[Prompt], completions: Sequence[str]) -> list[float]:
        found = []
        for prompt, text in zip(prompts, completions, strict=True):
            if not prompt.task:
                raise UserError(f"prompt {prompt.id!r} has no task whose grader could be the oracle; take a judge")
            whole = Completion(token_ids=(), logprobs=(), finish_reason="stop", text=text)
            grade = get_task(prompt.task).grade(prompt, whole)
            if "score" not in grade:
                raise UserError(f"task {prompt.task!r} gives no score to prompt {prompt.id!r}; take a judge")
            found.append(float(grade["score"]))
        return found

    return compare_scores(score, prompts, *texts, judge="the tasks' graders", kind="oracle", names=names)


# ---- showing ---------------------------------------------------------------------------------------------------------


def _write_comparison(compared: Comparison, folder: Path) -> None:
    from alignlab.tracking import append_jsonl, write_json

    write_json(folder / "judge.json", compared.to_json())
    partial = folder / ".verdicts.jsonl"
    partial.unlink(missing_ok=True)
    about = {"system_a": compared.a, "system_b": compared.b, "judge": compared.judge}
    append_jsonl(partial, ({**about, **game.to_json()} for game in compared.games))
    partial.replace(folder / "verdicts.jsonl")


def _show(found: Mapping[str, Any]) -> None:
    a, b = found["a"], found["b"]
    table = Table(title=f"{a} against {b}, before the {found['kind']} {found['judge']}", title_justify="left")
    for column in (
        "",
        "games",
        f"{a} wins",
        "ties",
        f"{b} wins",
        "win rate (95 %)",
        "without ties",
        "equal length",
        "p",
    ):
        table.add_column(column, justify="left" if not column else "right")
    parts = [("all", found), *found["categories"].items()] if len(found["categories"]) > 1 else [("all", found)]
    for name, part in parts:
        table.add_row(*_row(name, part))
    console = Console(highlight=False)
    console.print(table)
    print("p: exact sign test of wins against losses; ties do not count")
    if found.get("flip_rate") is not None:
        low, high = found["flip_rate_interval"]
        print(
            f"verdict changed with the order: {found['flip_rate']:.1%} [{low:.1%}, {high:.1%}]; first place preferred: "
            f"{found['first_position_rate']:.1%} (50 % = no preference)"
        )
    _warn(found["warnings"])


def _row(name: str, part: Mapping[str, Any]) -> list[str]:
    if part["win_rate"] is None:
        return [name, str(part["games"]), "", "", "", "", "", "", ""]
    equal = part["length_controlled"]
    return [
        name,
        str(part["games"]),
        str(part["wins"]),
        str(part["ties"]),
        str(part["losses"]),
        _interval(part["win_rate"], part["win_rate_interval"]),
        _interval(part["decisive_win_rate"], part["decisive_win_rate_interval"]),
        _interval(equal["rate"], [equal["low"], equal["high"]]),
        _p(part["p"]),
    ]


def _show_agreement(found: Mapping[str, Any]) -> None:
    table = Table(title="Judge against people", title_justify="left")
    for column in ("", "n", "agreement (95 %)", "κ (95 %)"):
        table.add_column(column, justify="left" if not column else "right")
    named = [("majority, with ties", found["with_ties"]), ("majority, without ties", found["without_ties"])]
    named += [("every vote, with ties", found["votes_with_ties"]), ("every vote, without", found["votes_without_ties"])]
    named += [(f"turn {turn}", part) for turn, part in found["turns"].items()]
    named += [(category, part) for category, part in found["categories"].items()]
    for name, part in named:
        kappa = _plain(part.get("kappa"), part.get("kappa_interval"))
        table.add_row(name, str(part["n"]), _interval(part["agreement"], part["agreement_interval"]), kappa)
    Console(highlight=False).print(table)
    people = found["people"]
    if people["alpha"] is not None:
        print(
            f"people with each other: Krippendorff's α {_plain(people['alpha'], people['alpha_interval'])}"
            f" over {people['comparisons']} comparisons"
        )
    print(f"verdicts that changed with the order: {found['judge_inconsistent_share']:.1%}")
    for side, what in (("people_only", "voted on but not judged"), ("judge_only", "judged but not voted on")):
        if found[side]:
            print(f"note: {found[side]} comparisons were {what}", file=sys.stderr)


def _show_people(found: Mapping[str, Any]) -> None:
    for name, part in found["wins"].items():
        known = f" ({part['identical']} of them the same text)" if part["identical"] else ""
        print(f"{name}: {part['wins']} won, {part['ties']} tied{known}, {part['losses']} lost; win rate "
              f"{_interval(part['win_rate'], part['win_rate_interval'])}, exact p {_p(part['p'])}")  # fmt: skip
    between, own, place = found["between"], found["self_consistency"], found["position"]
    for pair in between["pairs"]:
        agreed = _interval(pair["agreement"], pair["agreement_interval"])
        print(
            f"{' and '.join(pair['annotators'])}: agree on {agreed} of "
            f"{pair['n']}, κ {_plain(pair['kappa'], pair['kappa_interval'])}"
        )
    if between["alpha"] is not None:
        print(f"all: Krippendorff's α {_plain(between['alpha'], between['alpha_interval'])}")
    if own["n"]:
        print(f"the same again on duplicates: {_interval(own['rate'], own['interval'])} of {own['n']}")
    if place["first_rate"] is not None:
        print(f"slot A was best in {_interval(place['first_rate'], place['first_rate_interval'])} "
              f"({place['expected']:.0%} without bias, p {place['p']:.2g})")  # fmt: skip
    if "judge" in found:
        _show_agreement(found["judge"])


def _interval(value: float | None, limits: Sequence[float | None] | None, percent: bool = True) -> str:
    """`61.2 % [55.0, 67.1]`, `.51 [.47, .54]`, or a dash where there is no number."""
    if value is None or value != value:
        return "-"
    scale, digits, unit = (100.0, 1, " %") if percent else (1.0, 3, "")
    low, high = limits if limits is not None else (None, None)
    if low is None or high is None or low != low or high != high:
        return f"{scale * value:.{digits}f}{unit}"
    return f"{scale * value:.{digits}f}{unit} [{scale * low:.{digits}f}, {scale * high:.{digits}f}]"


def _p(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def _plain(value: float | None, limits: Sequence[float | None] | None) -> str:
    return _interval(value, limits, percent=False)


def _warn(warnings: Sequence[str]) -> None:
    for warning in warnings:
        print(f"warning: {warning}")


def _file_name(text: str) -> str:
    return "".join(c if c.isalnum() or c in "-_." else "-" for c in text)[:120]
