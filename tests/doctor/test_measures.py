"""The doctor's numbers by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from alignlab.doctor import measures as module
from alignlab.doctor.measures import (
    accuracies,
    calibration,
    correlation,
    length_bias,
    margin_histogram,
    normalisation,
    robustness,
)
from tests.statistics.mutants import mutated

ROUNDING = 1e-12
NO_CHANGE = np.zeros((3, 2), dtype=bool)


def test_accuracy_counts_a_tie_one_half() -> None:
    """Three wins, one tie, one loss: 3.5 of 5, in the estimate and in Wilson's interval."""
    (found,) = accuracies(np.array([2.0, 1.0, 0.5, 0.0, -1.0]), {"all": range(5)})
    assert (found.name, found.pairs, found.ties, found.value) == ("all", 5, 1, 0.7)
    z = 1.959963984540054
    half = z * math.sqrt(0.7 * 0.3 / 5 + z**2 / 100)
    assert found.low == pytest.approx((0.7 + z**2 / 10 - half) / (1 + z**2 / 5), abs=ROUNDING)
    assert found.high == pytest.approx((0.7 + z**2 / 10 + half) / (1 + z**2 / 5), abs=ROUNDING)


def test_accuracy_of_groups() -> None:
    found = accuracies(np.array([1.0, -1.0, 1.0]), {"all": [0, 1, 2], "code": [1], "safety": [0, 2]})
    assert [(group.name, group.pairs, group.value) for group in found] == [
        ("all", 3, 2 / 3),
        ("code", 1, 0.0),
        ("safety", 2, 1.0),
    ]


def test_calibration_keeps_the_pairs_of_a_prompt_together() -> None:
    """Seven prompts of 1 to 7 pairs: three prompts are fitted, all their pairs, and the others' are held out."""
    prompts = np.repeat(np.arange(7), np.arange(1, 8))
    margins = np.where(np.arange(28) % 4 == 0, -2.0, 2.0)
    sizes = set()
    for seed in range(6):
        found = calibration(margins, prompts, seed)
        assert found.fitted_pairs + found.held_out_pairs == 28
        assert (
            sum(b.count for b in found.bins) == sum(b.count for b in found.bins_at_temperature) == found.held_out_pairs
        )
        assert found == calibration(margins, prompts, seed)
        sizes.add(found.fitted_pairs)
    assert len(sizes) > 1


def test_calibration_by_hand() -> None:
    """All margins 2 in size, three of four right in both halves: p = .881 and .119, three quarters come true.

    Error |.881 - .75| = .131; at T = 2 / ln 3 it is 0. Whichever way the pairs are turned, as the two bins mirror each
    other only on average, many pairs are needed.
    """
    margins = np.tile([2.0, 2.0, 2.0, -2.0], 4000)
    prompts = np.repeat(np.arange(4000), 4)
    found = calibration(margins, prompts, 0)
    assert found.temperature == pytest.approx(2 / math.log(3), rel=1e-6)
    assert found.error == pytest.approx(1 / (1 + math.exp(-2)) - 0.75, abs=0.01)
    assert found.error_at_temperature < 0.02
    by_hand = 0.75 * math.log1p(math.exp(-2)) + 0.25 * math.log1p(math.exp(2))
    assert found.nll == pytest.approx(by_hand, abs=ROUNDING)
    assert found.nll_at_temperature == pytest.approx(math.log(4) - 0.75 * math.log(3), rel=1e-6)
    stated = sorted({round(b.stated, 3) for b in found.bins if b.stated is not None})
    assert stated == [0.119, 0.881]


def test_calibration_needs_something_to_hold_out() -> None:
    with pytest.raises(ValueError, match="at least 2 prompts"):
        calibration(np.array([1.0, 2.0]), np.array([0, 0]), 0)


def test_margins_split_at_zero() -> None:
    found = margin_histogram(np.array([-1.0, -0.001, 0.0, 0.5, 3.0]))
    assert sum(found.counts) == 5 and len(found.edges) == len(found.counts) + 1
    zero = next(i for i, edge in enumerate(found.edges) if edge == 0.0)
    assert sum(found.counts[:zero]) == 2
    assert found.mean == pytest.approx(2.499 / 5, abs=ROUNDING)
    for same in (0.0, 2.0, -2.0):
        assert sum(margin_histogram(np.full(4, same)).counts) == 4


SCORES = np.array([[3.0, 1.0], [0.0, 4.0]])
LENGTHS = np.array([[10.0, 6.0], [2.0, 8.0]])


def test_length_bias_by_hand() -> None:
    """Scores less their mean (1, -1, -2, 2), lengths (3.5, -.5, -4.5, 1.5): 16 / sqrt(10 * 35).

    Within prompts (1, -1, -2, 2) and (2, -2, -3, 3): 16 / sqrt(10 * 26), in the same order. The labels (.5, -.5) and
    the same lengths: -1 / sqrt(26).
    """
    found = length_bias(SCORES, LENGTHS, np.array([0, 1]))
    assert found.overall.pearson == pytest.approx(16 / math.sqrt(350), abs=ROUNDING)
    assert found.within_prompt.pearson == pytest.approx(16 / math.sqrt(260), abs=ROUNDING)
    assert found.within_prompt.spearman == pytest.approx(1.0, abs=ROUNDING)
    assert found.labels_within_prompt.pearson == pytest.approx(-1 / math.sqrt(26), abs=ROUNDING)
    together = length_bias(SCORES, LENGTHS, np.array([0, 0]))  # one prompt: its mean is that of all
    assert together.within_prompt.pearson == pytest.approx(16 / math.sqrt(350), abs=ROUNDING)


def test_what_does_not_vary_has_no_correlation() -> None:
    assert correlation(np.ones(5), np.arange(5.0)).pearson is None
    assert correlation(np.arange(5.0), np.ones(5)).largest == 0.0
    same_within = length_bias(np.array([[1.0, 1.0], [2.0, 2.0]]), LENGTHS, np.array([0, 1]))
    assert same_within.within_prompt.spearman is None and same_within.overall.pearson is not None


def test_robustness_by_hand() -> None:
    """Changes 1, -1.5, -3: mean -7/6, sd sqrt(49/12); scores sd sqrt(41/30). Both changed pairs turn round, the ranking
    0 < 2 < 3 becomes 1 > .5 > 0."""
    before = np.array([[1.0, 0.0], [0.0, 2.0], [3.0, 1.0]])
    after = np.array([[1.0, 0.0], [1.0, 0.5], [0.0, 1.0]])
    found = robustness(before, after, np.array([[False, False], [True, True], [True, False]]))
    assert (found.completions, found.pairs, found.max_change) == (3, 2, 3.0)
    assert found.mean_change == pytest.approx(-7 / 6, abs=ROUNDING)
    assert found.sd_change == pytest.approx(math.sqrt(49 / 12), abs=ROUNDING)
    assert found.variation == pytest.approx(math.sqrt(49 / 12) / math.sqrt(41 / 30), abs=ROUNDING)
    assert (found.flip_rate, found.kendall_tau, found.stability) == (1.0, pytest.approx(-1.0, abs=ROUNDING), 0.0)


def check_stability(robustness: object) -> None:
    """One of four pairs turns round and one becomes a tie: flips 3/8."""
    before = np.array([[8.0, 1.0], [7.0, 2.0], [6.0, 3.0], [5.0, 4.0]])
    after = np.array([[8.0, 1.0], [7.0, 2.0], [4.0, 6.0], [5.0, 5.0]])
    found = robustness(before, after, np.ones((4, 2), dtype=bool))  # type: ignore[operator]
    # Against 8 7 6 5 4 3 2 1 stand 8 7 4 5 5 6 2 1: of 28 comparisons 5 are reversed, 1 is tied, so that
    # tau-b = (22 - 5) / sqrt(28 * 27).
    tau = 17 / math.sqrt(28 * 27)
    assert found.flip_rate == pytest.approx(0.375, abs=ROUNDING)
    assert found.kendall_tau == pytest.approx(tau, abs=ROUNDING)
    assert found.stability == pytest.approx(tau * 0.625, abs=ROUNDING)


def test_stability_by_hand() -> None:
    check_stability(robustness)


@pytest.mark.parametrize(
    ("text", "replacement"),
    [
        ("max(0.0, tau) * (1 - flip_rate)", "max(0.0, tau)"),
        ("old * new < 0, 1.0", "old * new < 0, 0.5"),
        ("(old == 0) != (new == 0), 0.5", "(old == 0) != (new == 0), 0.0"),
        ("after[pairs, 0] - after[pairs, 1]", "before[pairs, 0] - before[pairs, 1]"),
    ],
)
def test_mutants_are_caught(text: str, replacement: str) -> None:
    with pytest.raises(AssertionError):
        check_stability(mutated(module, text, replacement).robustness)


def test_nothing_changed_and_nothing_to_rank() -> None:
    nothing = robustness(np.eye(3, 2), np.eye(3, 2), NO_CHANGE)
    assert nothing.completions == nothing.pairs == 0
    assert nothing.flip_rate is nothing.stability is nothing.mean_change is nothing.max_change is None
    same = robustness(np.ones((3, 2)), np.ones((3, 2)), ~NO_CHANGE)
    assert (same.flip_rate, same.kendall_tau, same.stability, same.variation) == (0.0, None, None, None)
    steady = robustness(SCORES, SCORES, np.ones((2, 2), dtype=bool))
    assert (steady.flip_rate, steady.stability, steady.max_change) == (0.0, pytest.approx(1.0, abs=ROUNDING), 0.0)


def test_normalisation() -> None:
    found = normalisation(np.array([2.0, 4.0, 9.0]))
    assert (found.completions, found.mean) == (3, 5.0)
    assert found.sd == pytest.approx(math.sqrt(13), abs=ROUNDING)
