"""Two systems on the same prompts: answers -> a verdict in each order -> games -> win rates and how far to trust them.

A game is one prompt. A judge that reads sees both orders, and where its two verdicts differ the game is a tie. A scorer
(a reward model, a rule) gives each answer a number and has no order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from alignlab.errors import UserError
from alignlab.judge.client import Client
from alignlab.judge.families import family
from alignlab.judge.parsing import Verdict, parse_verdict
from alignlab.judge.prompts import pairwise, shortened
from alignlab.statistics.agreement import mcnemar_exact
from alignlab.statistics.wins import WinRate, length_controlled, trinomial_interval, win_rate
from alignlab.types import Prompt

Winner = Literal["a", "b", "tie"]
Score = Callable[[Sequence[Prompt], Sequence[str]], Sequence[float]]
"""Prompts and one completion of each -> their scores, higher = better."""

MANY_TIES = 0.30
"""Share of ties above which a win rate says little: the judge cannot tell the systems apart, or itself contradicts."""
MANY_UNREAD = 0.05
"""Share of games without a verdict above which what is left may be another sample."""
FEW_DECISIVE = 10
"""Games that were no ties below which only the exact test is to be trusted."""
FIRST_IS_BETTER: Mapping[Verdict, float] = {"first": 1.0, "tie": 0.5, "second": 0.0}


@dataclass(frozen=True, kw_only=True)
class Game:
    """One prompt answered by both systems, and what the judge said."""

    prompt_id: str
    category: str
    winner: Winner | None
    """None where a verdict could not be read."""
    verdicts: tuple[Winner | None, ...]
    """With a's answer shown first, then with b's; one verdict of a judge that sees no order; none where both answers
    are the same text, which is a tie that nobody is asked about."""
    replies: tuple[str, ...]
    """What the judge wrote, in the same order; the two scores of a scorer."""
    lengths: tuple[int, int]
    """Characters of a's and b's answer."""

    @property
    def consistent(self) -> bool:
        """Whether every order led to the same verdict."""
        return None not in self.verdicts and len(set(self.verdicts)) <= 1

    def to_json(self) -> dict[str, Any]:
        """A row of verdicts.jsonl."""
        return asdict(self) | {"consistent": self.consistent}


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """All games of two systems before one judge."""

    a: str
    b: str
    judge: str
    kind: Literal["judge", "reward model", "oracle", "people"]
    games: tuple[Game, ...]
    warnings: tuple[str, ...] = ()
    """What a reader must know besides the numbers."""

    def to_json(self) -> dict[str, Any]:
        """The content of judge.json; docs/judge.md describes it."""
        by_category = {
            category: numbers([game for game in self.games if game.category == category])
            for category in sorted({game.category for game in self.games} - {""})
        }
        found = {"schema": 1, "a": self.a, "b": self.b, "judge": self.judge, "kind": self.kind}
        overall = numbers(self.games)
        return (
            found | overall | {"categories": by_category, "warnings": [*self.warnings, *_warnings(overall, self.kind)]}
        )


def compare(
    client: Client,
    prompts: Sequence[Prompt],
    a: Sequence[str],
    b: Sequence[str],
    *,
    names: tuple[str, str] = ("a", "b"),
    judge: str | None = None,
    references: Sequence[str | None] | None = None,
    models: Sequence[str] = (),
    made_from: Sequence[str] = (),
) -> Comparison:
    """Asks a judge about every prompt in both orders.

    Args:
        a: the completions of the first system, one for each prompt; `b` those of the second.
        judge: its name; None = what the client calls itself.
        references: good answers that the judge is shown, where there are any.
        models: models that the systems were made from, to warn where the judge is of their family.
        made_from: models that the judge was made from, where it is one of ours.

    Raises:
        UserError: the client cannot go on (see `ChatClient.complete`).
        ValueError: prompts, completions and references are not of one length.
    """
    name = judge or str(getattr(client, "name", type(client).__name__))
    known = [None] * len(prompts) if references is None else list(references)
    conversations, judged = [], []
    for prompt, one, other, reference in zip(prompts, a, b, known, strict=True):
        for first, second in ((one, other), (other, one)) if one != other else ():
            conversations.append(pairwise(prompt, first, second, reference=reference))
            judged.append("\n".join([*(m.content for m in prompt.messages), shortened(first), shortened(second)]))
    replies = client.complete(conversations)
    said = iter([(reply, parse_verdict(reply, judged=text)) for reply, text in zip(replies, judged, strict=True)])
    games = []
    for prompt, one, other in zip(prompts, a, b, strict=True):
        if one == other:
            games.append(_game(prompt, (), (), one, other))
            continue
        (reply, forward), (swapped_reply, swapped) = next(said), next(said)
        verdicts = (_of_order(forward, "a", "b"), _of_order(swapped, "b", "a"))
        games.append(_game(prompt, verdicts, (reply, swapped_reply), one, other))
    return Comparison(
        a=names[0],
        b=names[1],
        judge=name,
        kind="judge",
        games=tuple(games),
        warnings=same_family(name, models, made_from),
    )


def compare_scores(
    score: Score,
    prompts: Sequence[Prompt],
    a: Sequence[str],
    b: Sequence[str],
    *,
    judge: str,
    kind: Literal["reward model", "oracle"],
    names: tuple[str, str] = ("a", "b"),
    tie_within: float = 0.0,
    warnings: Sequence[str] = (),
) -> Comparison:
    """The same before something that gives each answer a number; the higher one wins, and a difference of at most
    `tie_within` is a tie.

    Args:
        kind: a rule that knows the answer is an oracle, never a judge.

    Raises:
        UserError: a score is missing or not finite.
    """
    scores = [*score(prompts, a), *score(prompts, b)]
    if len(scores) != 2 * len(prompts) or not all(math.isfinite(value) for value in scores):
        raise UserError(
            f"{judge}: gave {len(scores)} scores for {2 * len(prompts)} answers, or some that are no numbers"
        )
    games = []
    for prompt, one, other, left, right in zip(prompts, a, b, scores, scores[len(prompts) :], strict=False):
        winner: Winner = "tie" if abs(left - right) <= tie_within else "a" if left > right else "b"
        verdicts: tuple[Winner, ...] = () if one == other else (winner,)
        games.append(_game(prompt, verdicts, (f"{left:.6g}", f"{right:.6g}"), one, other))
    return Comparison(a=names[0], b=names[1], judge=judge, kind=kind, games=tuple(games), warnings=tuple(warnings))


def numbers(games: Sequence[Game]) -> dict[str, Any]:
    """All that is said of some games; what cannot be computed from them is None."""
    judged = [game for game in games if game.winner is not None]
    found: dict[str, Any] = {"games": len(games), "unread": len(games) - len(judged)}
    found["identical"] = sum(not game.verdicts for game in games)
    if not judged:
        return found | {"wins": 0, "ties": 0, "losses": 0, "win_rate": None}
    outcomes, prompts = (
        [{"a": 1.0, "tie": 0.5, "b": 0.0}[g.winner or "tie"] for g in judged],
        [g.prompt_id for g in judged],
    )
    rate = win_rate(outcomes, prompts)
    equal = length_controlled(outcomes, [float(g.lengths[0] - g.lengths[1]) for g in judged], prompts)
    return found | _rates(rate) | {"length_controlled": asdict(equal), "lengths": _lengths(judged)} | position(judged)


def position(games: Sequence[Game]) -> dict[str, Any]:
    """How much of the verdicts is the order of the answers; nothing for a judge that sees no order.

    `flip_rate` is the share of games whose two verdicts differ, `reversal_rate` of those where the judge chose the same
    place twice. `first_position_rate` is the mean over games of 1 where the verdicts lean to whatever was shown first,
    0 where to the second, 1/2 where the order made no difference; without ties it is the share of all verdicts for the
    first place.
    """
    both = [game for game in games if len(game.verdicts) == 2 and None not in game.verdicts]
    if not both:
        return {"flip_rate": None, "first_position_rate": None}
    lean = [_lean(game) for game in both]
    first, second = lean.count(1), lean.count(-1)
    flips = sum(not game.consistent for game in both)
    reversals = sum(set(game.verdicts) == {"a", "b"} for game in both)
    flipped = win_rate([float(not game.consistent) for game in both], [game.prompt_id for game in both])
    low, high = trinomial_interval(first, len(both) - first - second, second)
    return {
        "flip_rate": flips / len(both),
        "flip_rate_interval": [flipped.low, flipped.high],
        "reversal_rate": reversals / len(both),
        "first_position_rate": (first + (len(both) - first - second) / 2) / len(both),
        "first_position_rate_interval": [low, high],
        "first_position_p": mcnemar_exact(first, second),
    }


def same_family(judge: str, models: Sequence[str], made_from: Sequence[str] = ()) -> tuple[str, ...]:
    """A warning where the judge is of the same family as a model that it judges.

    Args:
        made_from: models that the judge was made from.
    """
    names = {judge, *made_from}
    own = {family(name) for name in names} - {""}
    related = sorted({model for model in models if family(model) in own or model in names})
    if not related:
        return ()
    return (
        f"the judge {judge} is of one family with {', '.join(related)}: judges prefer what is written like their own; "
        "have another judge look at a part of it",
    )


def _game(prompt: Prompt, verdicts: tuple[Winner | None, ...], replies: tuple[str, ...], one: str, other: str) -> Game:
    winner: Winner | None = None
    if None not in verdicts:
        winner = verdicts[0] if len(set(verdicts)) == 1 else "tie"  # also where nobody was asked
    category = str(prompt.meta.get("category") or prompt.task)
    return Game(
        prompt_id=prompt.id, category=category, winner=winner, verdicts=verdicts, replies=replies,
        lengths=(len(one), len(other)),
    )  # fmt: skip


def _of_order(said: Verdict | None, first: Winner, second: Winner) -> Winner | None:
    """Which system a verdict names, given who was shown first."""
    return {"first": first, "second": second, "tie": "tie", None: None}[said]


def _lean(game: Game) -> int:
    """1 where the two verdicts lean to the first place, -1 to the second, 0 to neither."""
    value: dict[Winner | None, int] = {"a": 1, "tie": 0, "b": -1}
    for_a_first, for_b_first = (value[verdict] for verdict in game.verdicts)
    tilt = for_a_first - for_b_first
    return (tilt > 0) - (tilt < 0)


def _rates(rate: WinRate) -> dict[str, Any]:
    return {
        "wins": rate.wins,
        "ties": rate.ties,
        "losses": rate.losses,
        "tie_share": rate.ties / rate.games,
        "win_rate": rate.rate,
        "win_rate_interval": [rate.low, rate.high],
        "decisive_win_rate": rate.decisive_rate,
        "decisive_win_rate_interval": None if rate.decisive_low is None else [rate.decisive_low, rate.decisive_high],
        "p": rate.p,
        "prompts": rate.prompts,
        "design_effect": rate.design_effect,
    }


def _lengths(games: Sequence[Game]) -> dict[str, float | None]:
    longer = [game for game in games if game.lengths[0] != game.lengths[1] and game.winner != "tie"]
    won = sum((game.lengths[0] > game.lengths[1]) == (game.winner == "a") for game in longer)
    return {
        "a": sum(game.lengths[0] for game in games) / len(games),
        "b": sum(game.lengths[1] for game in games) / len(games),
        "longer_wins": won / len(longer) if longer else None,
    }


def _warnings(found: Mapping[str, Any], kind: str) -> list[str]:
    """What the numbers themselves warn of."""
    said = []
    if found["win_rate"] is None:
        return ["no verdict could be read: see the replies in verdicts.jsonl"]
    if found["tie_share"] > MANY_TIES:
        more = f"; {found['identical']} of them because both answers are the same" if found["identical"] else ""
        more += f"; in {found['flip_rate']:.0%} the verdict changed with the order" if found["flip_rate"] else ""
        ties = f"{found['tie_share']:.0%} of the games are ties"
        said.append(f"{ties}: the {kind} can hardly tell these systems apart{more}")
    decisive = found["wins"] + found["losses"]
    if 0 < decisive < FEW_DECISIVE:
        exact = "" if found["p"] is None else f"; go by the exact sign test (p {found['p']:.3g})"
        said.append(
            f"only {decisive} of {found['games']} games were decided: intervals are approximations, too narrow for so "
            f"few{exact}"
        )
    if found["unread"] > MANY_UNREAD * found["games"]:
        said.append(
            f"{found['unread']} of {found['games']} games have no verdict that could be read; they are left out"
        )
    if found["first_position_rate"] is not None and found["first_position_p"] < 0.05:
        place = "first" if found["first_position_rate"] > 0.5 else "second"
        said.append(
            f"the judge prefers what it is shown {place} (p {found['first_position_p']:.2g}); both orders even it out"
        )
    return said
