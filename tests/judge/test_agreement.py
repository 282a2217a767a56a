"""A judge beside people: MT-bench's votes give the published numbers; majority, ties and files by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from alignlab.errors import UserError
from alignlab.judge.agreement import Vote, agreement, between, by_item, majority, read_votes, vote
from alignlab.statistics import cohens_kappa, kappa_interval
from tests.runs import alignlab, strict_json, write_rows

PUBLISHED = 0.0005
"""Published with three decimals."""


@pytest.fixture(scope="module")
def mt_bench(shared_data: Path) -> dict[str, Any]:
    folder = shared_data / "mt_bench"
    return agreement(read_votes(folder / "human.jsonl"), read_votes(folder / "gpt4_pair.jsonl"))


def test_mt_bench_gives_the_published_agreement(mt_bench: dict[str, Any]) -> None:
    ties, decisive = mt_bench["with_ties"], mt_bench["without_ties"]
    assert (ties["n"], decisive["n"]) == (1814, 1078)
    assert ties["agreement"] == pytest.approx(0.672, abs=PUBLISHED)
    assert decisive["agreement"] == pytest.approx(0.884, abs=PUBLISHED)
    assert ties["kappa"] == pytest.approx(0.505, abs=PUBLISHED)
    assert decisive["kappa"] == pytest.approx(0.767, abs=PUBLISHED)


def test_mt_bench_gives_the_published_parts(mt_bench: dict[str, Any]) -> None:
    for turn, n, agreed, kappa in (("1", 910, 0.678, 0.516), ("2", 904, 0.666, 0.492)):
        part = mt_bench["turns"][turn]
        assert part["n"] == n
        assert (part["agreement"], part["kappa"]) == pytest.approx((agreed, kappa), abs=PUBLISHED)
    assert mt_bench["judge_inconsistent_share"] == pytest.approx(0.160, abs=PUBLISHED)
    assert mt_bench["people"]["comparisons"] == 961
    assert mt_bench["people"]["alpha"] == pytest.approx(0.485, abs=PUBLISHED)
    votes, decisive = mt_bench["votes_with_ties"], mt_bench["votes_without_ties"]
    assert (votes["n"], decisive["n"]) == (3355, 2129)
    assert (votes["agreement"], decisive["agreement"]) == pytest.approx((0.6617, 0.8563), abs=0.00005)


def test_mt_bench_intervals(mt_bench: dict[str, Any], shared_data: Path) -> None:
    """Published intervals of κ take comparisons as independent; those over questions are wider."""
    folder = shared_data / "mt_bench"
    people = by_item(read_votes(folder / "human.jsonl"))
    judge = by_item(read_votes(folder / "gpt4_pair.jsonl"))
    words = [(majority(people[i]), majority(judge[i])) for i in people if i in judge]
    decisive = [pair for pair in words if "tie" not in pair]
    for pairs, published in ((words, (0.472, 0.538)), (decisive, (0.726, 0.804))):
        low, high = kappa_interval(*zip(*pairs, strict=True))
        assert (low, high) == pytest.approx(published, abs=0.004)  # of 2,000 resamples each, others
    low, high = mt_bench["with_ties"]["kappa_interval"]
    assert high - low > 1.2 * (0.538 - 0.472)


def test_mt_bench_on_the_command_line(shared_data: Path, tmp_path: Path) -> None:
    folder = shared_data / "mt_bench"
    done = alignlab(
        "judge", "agreement", "--human", folder / "human.jsonl", "--judge", folder / "gpt4_pair.jsonl",
        "--output", tmp_path / "agreement.json",
    )  # fmt: skip
    assert done.code == 0, done.err
    assert "67.2 %" in done.out and "88.4 %" in done.out and "0.505" in done.out and "0.485" in done.out
    assert "586 comparisons were judged but not voted on" in done.err
    assert strict_json((tmp_path / "agreement.json").read_text("utf-8"))["with_ties"]["n"] == 1814


# ---- by hand ---------------------------------------------------------------------------------------------------------


def votes(*rows: tuple[str, str, str, str], rater: str = "r") -> list[Vote]:
    """(prompt, a, b, winner)."""
    return [vote({"prompt": p, "a": a, "b": b, "winner": w, "rater": rater}, "row") for p, a, b, w in rows]


def test_the_order_of_the_systems_does_not_matter() -> None:
    one, other = votes(("p", "x", "y", "a"), ("p", "y", "x", "b"))
    assert one == other
    assert one.item == ("p", "", "x", "y") and one.side == "first"
    (named,) = votes(("p", "x", "y", "y"))
    assert named.side == "second"
    tie = vote({"prompt": "p", "a": "x", "b": "y", "winner": "tie (inconsistent)"}, "row")
    assert tie.side == "tie" and tie.inconsistent


def test_a_tied_majority_is_a_tie() -> None:
    assert majority(votes(("p", "x", "y", "a"), ("p", "x", "y", "a"), ("p", "x", "y", "b"))) == "first"
    assert majority(votes(("p", "x", "y", "a"), ("p", "x", "y", "b"))) == "tie"
    assert majority(votes(("p", "x", "y", "a"), ("p", "x", "y", "b"), ("p", "x", "y", "tie"))) == "tie"
    assert majority(votes(("p", "x", "y", "b"))) == "second"


def test_agreement_by_hand() -> None:
    """Prompts 1 to 5; people say x x y tie x, the judge x y y x x: 3 of 5 agree; without ties 3 of 4.

    With ties: people x 3, y 1, tie 1; judge x 3, y 2: p_e = (9 + 2)/25, κ = (15 - 11)/(25 - 11) = 2/7.
    """
    people = votes(*((str(i), "x", "y", w) for i, w in enumerate(["a", "a", "b", "tie", "a"])))
    judge = votes(*((str(i), "y", "x", w) for i, w in enumerate(["b", "a", "a", "b", "b", "a"])))
    found = agreement(people, judge)
    assert (found["with_ties"]["n"], found["without_ties"]["n"]) == (5, 4)
    assert found["with_ties"]["agreement"] == pytest.approx(3 / 5)
    assert found["without_ties"]["agreement"] == pytest.approx(3 / 4)
    assert found["with_ties"]["kappa"] == pytest.approx(2 / 7)
    assert found["judge_only"] == 1 and found["people_only"] == 0
    assert found["people_tie_share"] == pytest.approx(1 / 5) and found["judge_tie_share"] == 0
    assert found["people"] == {"comparisons": 0, "raters": 1, "alpha": None, "alpha_interval": None}
    json.dumps(found, allow_nan=False)


def test_people_between_themselves_by_hand() -> None:
    """Units xx, xy, yy and a lone x: pairs agree 4 of 6; α = 1 - (2/6)/(18/30) = 4/9."""
    rows = [("1", "a"), ("1", "a"), ("2", "a"), ("2", "b"), ("3", "b"), ("3", "b"), ("4", "a")]
    found = between(votes(*((p, "x", "y", w) for p, w in rows)))
    assert found["comparisons"] == 3
    assert found["agreement"] == pytest.approx(4 / 6)
    assert found["alpha"] == pytest.approx(4 / 9)


def test_verdicts_of_a_comparison_are_votes(tmp_path: Path) -> None:
    about = {"system_a": "two", "system_b": "one", "judge": "gpt", "category": "math"}
    rows = [
        {**about, "prompt_id": "1", "winner": "a", "verdicts": ["a", "a"], "consistent": True},
        {**about, "prompt_id": "2", "winner": "tie", "verdicts": ["a", "b"], "consistent": False},
        {**about, "prompt_id": "3", "winner": None, "verdicts": ["a", None], "consistent": False},
    ]
    found = read_votes(write_rows(tmp_path / "verdicts.jsonl", rows))
    assert [(v.side, v.inconsistent, v.category, v.rater) for v in found] == [
        ("second", False, "math", "gpt"),
        ("tie", True, "math", "gpt"),
    ]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"prompt_id": "1", "a": "x", "b": "y", "winner": "z"}, "row 1: the winner is 'z', which is neither 'x'"),
        ({"prompt_id": "1", "a": "x", "b": "y", "winner": None}, "the winner is 'None'"),
        ({"prompt_id": "1", "a": "x", "b": "x", "winner": "a"}, "compares 'x' with itself"),
        ({"prompt_id": "1", "a": "x", "winner": "a"}, "no column system_b"),
        ({"a": "x", "b": "y", "winner": "a"}, "no column prompt_id"),
        ({"prompt_id": "1", "a": "x", "b": "y", "winner": None, "verdicts": []}, "no verdict that could be read"),
    ],
)
def test_wrong_votes_are_named(row: dict[str, Any], said: str, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "votes.jsonl", [row])
    with pytest.raises(UserError, match=said) as caught:
        read_votes(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_nothing_in_common_is_said() -> None:
    with pytest.raises(UserError, match="0 comparisons in common"):
        agreement(votes(("1", "x", "y", "a")), votes(("2", "x", "y", "a")))


def test_kappa_does_not_depend_on_what_systems_are_called_first() -> None:
    rows = [(str(i), w) for i, w in enumerate("aabbatbab".replace("t", "t"))]
    words = {"a": "a", "b": "b", "t": "tie"}
    people = votes(*((p, "x", "y", words[w]) for p, w in rows))
    judge = votes(*((p, "x", "y", words[w]) for p, w in zip(map(str, range(9)), "abbbatbaa", strict=True)))
    found = agreement(people, judge)
    assert found["with_ties"]["kappa"] == pytest.approx(cohens_kappa("aabbatbab", "abbbatbaa"))
