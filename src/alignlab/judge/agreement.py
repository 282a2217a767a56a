"""Does a judge judge as people do? Votes of people, verdicts of a judge -> agreement, κ, α, with and without ties.

A vote is one rater's winner on one comparison (prompt, turn, two systems). People's votes on a comparison are one by
majority, where a tied majority is a tie; a judge's verdict that changed with the order is a tie as well.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from alignlab.data.files import read_file
from alignlab.errors import UserError
from alignlab.statistics.agreement import alpha_interval, cohens_kappa, kappa_interval, krippendorff_alpha
from alignlab.statistics.wins import win_rate

Side = Literal["first", "second", "tie"]
Item = tuple[str, str, str, str]
"""Prompt, turn, and the two systems in the order of their names."""

COLUMNS: Mapping[str, tuple[str, ...]] = {
    "prompt": ("prompt_id", "question_id", "id"),
    "a": ("system_a", "model_a", "a"),
    "b": ("system_b", "model_b", "b"),
    "winner": ("winner", "verdict"),
}
"""What each column may be called."""
OPTIONAL: Mapping[str, tuple[str, ...]] = {
    "turn": ("turn",),
    "rater": ("annotator", "rater", "judge"),
    "category": ("category",),
}
FEWEST = 2
"""Comparisons below which there is nothing to say."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Vote:
    """One rater's word on one comparison."""

    item: Item
    rater: str
    side: Side
    """`first` is the system whose name comes first."""
    inconsistent: bool = False
    """The verdict changed with the order of the answers, which makes it a tie."""
    category: str = ""


def read_votes(path: Path) -> list[Vote]:
    """The votes of a file (JSONL, JSON, CSV): columns prompt_id, system_a, system_b, winner, and perhaps turn,
    annotator and category; verdicts.jsonl of `alignlab judge compare` and the MT-bench files are such files.

    `winner` is a, b, the column's or the system's name, or a tie; verdicts that could not be read (null) are left out.

    Raises:
        UserError: a column is missing, or a winner is none of the two; with the row.
    """
    votes = []
    for number, row in enumerate(read_file(path), 1):
        found = {name: _column(row, names, name, f"{path}, row {number}") for name, names in COLUMNS.items()}
        if found["winner"] is None and "verdicts" in row:
            continue
        extra = {name: next((row[n] for n in names if row.get(n) is not None), "") for name, names in OPTIONAL.items()}
        votes.append(vote(found | extra, f"{path}, row {number}", inconsistent=row.get("consistent") is False))
    if not votes:
        raise UserError(f"{path}: holds no verdict that could be read")
    return votes


def vote(found: Mapping[str, Any], where: str, *, inconsistent: bool = False) -> Vote:
    """A vote from the values of its columns.

    Raises:
        UserError: the winner is none of the two systems and no tie, or the systems are one.
    """
    a, b, said = str(found["a"]), str(found["b"]), str(found["winner"]).strip()
    if a == b:
        raise UserError(f"{where}: compares {a!r} with itself")
    words = {"a": a, "model_a": a, "system_a": a, a.lower(): a, "b": b, "model_b": b, "system_b": b, b.lower(): b}
    tie = said.lower().startswith(("tie", "draw", "equal"))
    winner = None if tie else words.get(said.lower())
    if not tie and winner is None:
        raise UserError(f"{where}: the winner is {said!r}, which is neither {a!r} (a), {b!r} (b) nor tie")
    first, second = sorted((a, b))
    return Vote(
        item=(str(found["prompt"]), str(found.get("turn", "")), first, second),
        rater=str(found.get("rater", "")),
        side="tie" if tie else "first" if winner == first else "second",
        inconsistent=inconsistent or "inconsistent" in said.lower(),
        category=str(found.get("category", "")),
    )


def agreement(people: Sequence[Vote], judge: Sequence[Vote]) -> dict[str, Any]:
    """All that is to be said about a judge's verdicts beside people's votes on the same comparisons.

    Raises:
        UserError: they have no comparisons in common.
    """
    voted, judged = by_item(people), by_item(judge)
    common = [item for item in voted if item in judged]
    if len(common) < FEWEST:
        raise UserError(
            f"the votes and the judge's verdicts have {len(common)} comparisons in common: prompt, turn and systems "
            f"must have the same names; votes have {next(iter(voted))}, verdicts {next(iter(judged))}"
        )
    words = [(item, majority(voted[item]), majority(judged[item])) for item in common]
    decisive = [row for row in words if "tie" not in row[1:]]
    single = [(item, vote.side, majority(judged[item])) for item in common for vote in voted[item]]
    decisive_votes = [row for row in single if "tie" not in row[1:]]
    categories = {item: next((v.category for v in [*voted[item], *judged[item]] if v.category), "") for item in common}
    flips = [vote.inconsistent for item in common for vote in judged[item]]
    return {
        "schema": 1,
        "comparisons": len(common),
        "prompts": len({item[0] for item in common}),
        "people_only": len(voted) - len(common),
        "judge_only": len(judged) - len(common),
        "with_ties": _agreement(words),
        "without_ties": _agreement(decisive),
        "votes_with_ties": _rate(single),
        "votes_without_ties": _rate(decisive_votes),
        "people": between(people),
        "judge_tie_share": sum(judge_said == "tie" for _, _, judge_said in words) / len(words),
        "people_tie_share": sum(said == "tie" for _, said, _ in words) / len(words),
        "judge_inconsistent_share": sum(flips) / len(flips),
        "turns": _parts(words, lambda item: item[1]),
        "categories": _parts(words, lambda item: categories[item]),
    }


def between(votes: Sequence[Vote]) -> dict[str, Any]:
    """How far raters agree with each other: Krippendorff's α over the comparisons with several votes."""
    several = [[vote.side for vote in found] for found in by_item(votes).values() if len(found) > 1]
    if not several:
        return {"comparisons": 0, "raters": len({vote.rater for vote in votes}), "alpha": None, "alpha_interval": None}
    most = max(map(len, several))
    ratings = [[unit[i] if i < len(unit) else None for unit in several] for i in range(most)]
    return {
        "comparisons": len(several),
        "raters": len({vote.rater for vote in votes}),
        "alpha": krippendorff_alpha(ratings),
        "alpha_interval": list(alpha_interval(ratings)),
        "agreement": _pairwise_agreement(several),
    }


def by_item(votes: Sequence[Vote]) -> dict[Item, list[Vote]]:
    found: dict[Item, list[Vote]] = {}
    for one in votes:
        found.setdefault(one.item, []).append(one)
    return found


def majority(votes: Sequence[Vote]) -> Side:
    """What most of the votes on one comparison say; a tie where none is said most often."""
    first, *others = Counter(vote.side for vote in votes).most_common()
    return "tie" if others and others[0][1] == first[1] else first[0]


def _agreement(words: Sequence[tuple[Item, Side, Side]]) -> dict[str, Any]:
    if len(words) < FEWEST:
        return {"n": len(words), "agreement": None, "agreement_interval": None, "kappa": None, "kappa_interval": None}
    people, judge = [said for _, said, _ in words], [said for _, _, said in words]
    prompts = [item[0] for item, _, _ in words]
    return _rate(words) | {
        "kappa": cohens_kappa(people, judge),
        "kappa_interval": list(kappa_interval(people, judge, clusters=prompts)),
    }


def _rate(words: Sequence[tuple[Item, Side, Side]]) -> dict[str, Any]:
    if not words:
        return {"n": 0, "agreement": None, "agreement_interval": None}
    rate = win_rate([float(one == other) for _, one, other in words], [item[0] for item, _, _ in words])
    return {"n": len(words), "agreement": rate.rate, "agreement_interval": [rate.low, rate.high]}


def _parts(words: Sequence[tuple[Item, Side, Side]], part: Callable[[Item], str]) -> dict[str, Any]:
    names = sorted({part(item) for item, _, _ in words} - {""})
    return {name: _agreement([row for row in words if part(row[0]) == name]) for name in names}


def _pairwise_agreement(several: Sequence[Sequence[Side]]) -> float:
    """Share of pairs of votes on one comparison that say the same."""
    same = sum(sum(n * (n - 1) for n in Counter(unit).values()) for unit in several)
    return same / sum(len(unit) * (len(unit) - 1) for unit in several)


def _column(row: Mapping[str, Any], names: Sequence[str], wanted: str, where: str) -> Any:
    for name in names:
        if name in row:
            return row[name]
    raise UserError(f"{where}: no column {names[0]} ({wanted}); there are: {', '.join(map(str, row))}")
