"""Two evaluations side by side: paired differences by hand, and what pairing is worth."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest

from alignlab.evaluation.compare import compare, over_tasks
from alignlab.evaluation.measures import Found, Whole
from alignlab.evaluation.measures.distinct import distinct_whole
from alignlab.statistics import mean_interval, mean_of_bounds, paired_interval, paired_proportion


def found(values: Sequence[float | None], name: str = "a/score") -> Found:
    return Found(values={name: values})


def test_differences_are_of_the_same_prompt_and_sample() -> None:
    clusters = ["p", "p", "q", "q", "r", "r"]
    ours, theirs = [1.0, 0.0, 1.0, 1.0, None, 1.0], [0.0, 0.0, 1.0, 0.0, 1.0, 0.5]
    difference = compare(found(ours), found(theirs), clusters)["a/score"]
    expected = paired_interval([1.0, 0.0, 1.0, 1.0, 1.0], [0.0, 0.0, 1.0, 0.0, 0.5], ["p", "p", "q", "q", "r"])
    assert (difference.mean, difference.low, difference.high) == (expected.mean, expected.low, expected.high)
    assert (difference.completions, difference.prompts) == (5, 3)
    turned = compare(found(theirs), found(ours), clusters)["a/score"]
    assert turned.mean == -difference.mean and turned.low == pytest.approx(-difference.high)
    assert not difference.is_clear


def test_what_only_one_of_them_has_is_left_out() -> None:
    clusters = ["p", "q"]
    assert compare(found([1.0, 0.0]), found([1.0, 0.0], "b/score"), clusters) == {}
    assert compare(found([None, 0.0]), found([1.0, 0.0]), clusters) == {}  # one prompt is left


def test_pairing_sees_what_two_intervals_do_not() -> None:
    random = np.random.default_rng(0)
    base = random.normal(size=200)
    clusters = [f"p/{i}" for i in range(200)]
    difference = compare(found((base + 0.1 + 0.05 * random.normal(size=200)).tolist()), found(base.tolist()), clusters)[
        "a/score"
    ]
    assert difference.is_clear and difference.mean == pytest.approx(0.1, abs=0.02)
    assert difference.high - difference.low < 0.05 < 2 * 1.96 / math.sqrt(200)


def test_numbers_of_a_whole_set_leave_out_the_same_prompts_of_both() -> None:
    texts = ["a b", "c d", "e f", "g h"]
    same = Found(whole={"distinct/1": distinct_whole(texts, 1)})
    equal = compare(same, same, ["p", "q", "r", "s"])["distinct/1"]
    assert (equal.mean, equal.low, equal.high) == (0.0, 0.0, 0.0)
    fewer = Found(whole={"distinct/1": distinct_whole(["a a", "a a", "a a", "a b"], 1)})
    difference = compare(fewer, same, ["p", "q", "r", "s"])["distinct/1"]
    assert difference.mean == 2 / 8 - 1 and difference.low < difference.mean < difference.high
    only = Found(whole={"x": Whole(statistic=lambda i: 1.0, interval="none")})
    assert compare(only, only, ["p", "q"]) == {}


def test_the_mean_over_tasks_counts_every_task_the_same() -> None:
    clusters = ["a/1", "a/2", "a/3", "b/1", "b/2"]
    ours = Found(values={"a/score": [1.0, 1.0, 0.0, None, None], "b/score": [None, None, None, 0.0, 1.0]})
    theirs = Found(values={"a/score": [0.0, 1.0, 0.0, None, None], "b/score": [None, None, None, 1.0, 1.0]})
    difference = over_tasks(ours, theirs, clusters)
    parts = [
        paired_proportion([1.0, 1.0, 0.0], [0.0, 1.0, 0.0], list("pqr")),
        paired_proportion([0.0, 1.0], [1.0, 1.0], list("pq")),
    ]
    expected = mean_of_bounds(parts)
    assert difference is not None and difference.mean == pytest.approx((1 / 3 - 1 / 2) / 2)
    assert (difference.low, difference.high) == pytest.approx((expected.low, expected.high))
    assert difference.prompts == 5


def test_the_mean_over_tasks_of_other_scores_is_a_t_interval() -> None:
    clusters = ["a/1", "a/2", "a/3", "b/1", "b/2"]
    ours = Found(values={"a/score": [0.5, 1.0, 0.0, None, None], "b/score": [None, None, None, 0.5, 1.0]})
    theirs = Found(values={"a/score": [0.0, 1.0, 0.0, None, None], "b/score": [None, None, None, 1.0, 1.0]})
    difference = over_tasks(ours, theirs, clusters)
    parts = [
        paired_interval([0.5, 1.0, 0.0], [0.0, 1.0, 0.0], list("pqr")),
        paired_interval([0.5, 1.0], [1.0, 1.0], list("pq")),
    ]
    expected = mean_interval(parts)
    assert difference is not None
    assert (difference.low, difference.high) == pytest.approx((expected.low, expected.high))


def test_shares_of_few_prompts_are_neither_impossible_nor_certain() -> None:
    """Two of three better, and no difference at all; the overall score of one task is the task's."""
    clusters = ["p", "q", "r"]
    for ours, theirs in (([1.0, 1.0, 1.0], [0.0, 0.0, 1.0]), ([1.0, 0.0, 1.0], [1.0, 0.0, 1.0])):
        difference = compare(found(ours), found(theirs), clusters)["a/score"]
        assert -1 <= difference.low < 0 < difference.high <= 1 and difference.low < difference.mean < difference.high
        overall = over_tasks(found(ours), found(theirs), clusters)
        assert overall is not None
        assert (overall.low, overall.high) == pytest.approx((difference.low, difference.high))
    two = Found(values={"a/score": [1.0, 1.0, None, None], "b/score": [None, None, 0.0, 0.0]})
    same = over_tasks(two, two, ["p", "q", "r", "s"])
    assert same is not None and same.low < 0 == same.mean < same.high
    assert over_tasks(found([1.0], "a/score"), found([1.0], "a/score"), ["p"]) is None
    assert over_tasks(Found(), Found(), []) is None
