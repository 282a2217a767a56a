"""Drawing a token: logprobs by hand, filters by their definition, and an inverse CDF that misses nothing."""

import math
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare
from torch import Tensor
from torch.testing import assert_close

from alignlab.generate import Sampling
from alignlab.generate import draw as module
from tests.statistics.mutants import mutated
from tests.tolerances import FLOAT64

LN2, LN3 = math.log(2), math.log(3)
ALMOST_ONE = math.nextafter(1.0, 0.0)
LEAST_P = 0.001
"""Smallest p-value that frequencies drawn with a fixed seed may have."""


@pytest.fixture
def draw() -> ModuleType:
    return module


def doubles(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def tokens_at(draw: ModuleType, numbers: list[float], sampling: Sampling, softcap: float | None = None) -> Any:
    """Tokens and logprobs for words with logits (ln 2, ln 3, 0), one row a uniform number."""
    states = doubles([[LN2, LN3]]).repeat(len(numbers), 1)
    head = doubles([[1, 0], [0, 1], [0, 0]])
    tokens, logprobs = draw.draw_tokens(states, head, doubles(numbers), sampling, softcap)
    return tokens.tolist(), logprobs


# Numbers --------------------------------------------------------------------------------------------------------------


def test_tokens_and_logprobs(draw: ModuleType) -> None:
    """Probabilities (2, 3, 1) / 6: the cumulative ones are 1/3, 5/6 and 1, and u belongs to the first above it."""
    tokens, logprobs = tokens_at(draw, [0, 0.333, 0.334, 0.833, 0.834, ALMOST_ONE], Sampling())
    assert tokens == [0, 0, 1, 1, 2, 2]
    assert_close(logprobs, doubles([2 / 6, 2 / 6, 3 / 6, 3 / 6, 1 / 6, 1 / 6]).log(), **FLOAT64)


def test_temperature(draw: ModuleType) -> None:
    """At 1/2 the odds are squared: (4, 9, 1) / 14, cumulative .2857, .9286, 1."""
    tokens, logprobs = tokens_at(draw, [0.28, 0.29, 0.92, 0.93], Sampling(temperature=0.5))
    assert tokens == [0, 1, 1, 2]
    assert_close(logprobs, doubles([4 / 14, 9 / 14, 9 / 14, 1 / 14]).log(), **FLOAT64)


def test_softcap_comes_before_temperature(draw: ModuleType) -> None:
    """tanh(ln x) = (x^2 - 1) / (x^2 + 1): capped at 1 the logits are (.6, .8, 0), at temperature 1/2 (1.2, 1.6, 0)."""
    _, logprobs = tokens_at(draw, [0.0, 0.5, ALMOST_ONE], Sampling(temperature=0.5), softcap=1.0)
    expected = doubles([1.2, 1.6, 0.0]) - math.log(math.exp(1.2) + math.exp(1.6) + 1)
    assert_close(logprobs, expected, **FLOAT64)


def test_greedy(draw: ModuleType) -> None:
    """The likeliest token whatever u is, with its logprob in the distribution; of equals the first."""
    tokens, logprobs = tokens_at(draw, [0, 0.5, ALMOST_ONE], Sampling(greedy=True))
    assert tokens == [1, 1, 1]
    assert_close(logprobs, doubles([3 / 6] * 3).log(), **FLOAT64)
    equal = draw.draw_tokens(doubles([[0.0]]), doubles([[1], [2], [3]]), doubles([0.9]), Sampling(greedy=True), None)
    assert equal[0].tolist() == [0]


def test_a_filter_changes_what_is_drawn_and_not_its_logprob(draw: ModuleType) -> None:
    """Top-2 of (2, 3, 1) / 6 leaves (2, 3) / 5 to draw from; the logprobs stay those of the whole distribution."""
    tokens, logprobs = tokens_at(draw, [0.39, 0.41, ALMOST_ONE], Sampling(top_k=2))
    assert tokens == [0, 1, 1]
    assert_close(logprobs, doubles([2 / 6, 3 / 6, 3 / 6]).log(), **FLOAT64)


def test_half_precision_states_give_single_precision_logprobs() -> None:
    tokens, logprobs = module.draw_tokens(
        torch.ones(2, 4, dtype=torch.bfloat16),
        torch.eye(4, dtype=torch.bfloat16),
        doubles([0.1, 0.9]),
        Sampling(),
        None,
    )
    assert logprobs.dtype == torch.float32 and tokens.tolist() == [0, 3]
    assert_close(logprobs, torch.tensor([1 / 4, 1 / 4]).log())


# Filters --------------------------------------------------------------------------------------------------------------


def kept(draw: ModuleType, weights: list[float], **choice: Any) -> list[int]:
    """Indices of what a filter keeps of one row."""
    row = draw.filtered(doubles([weights]), Sampling(**choice))[0]
    assert_close(row[row > 0], doubles(weights)[row > 0], **FLOAT64)
    return row.nonzero()[:, 0].tolist()  # type: ignore[no-any-return]


def test_filters_by_hand(draw: ModuleType) -> None:
    weights = [0.1, 0.4, 0.05, 0.3, 0.15]
    assert kept(draw, weights) == [0, 1, 2, 3, 4]
    assert kept(draw, weights, top_k=1) == [1]
    assert kept(draw, weights, top_k=3) == [1, 3, 4]
    assert kept(draw, weights, top_k=99) == [0, 1, 2, 3, 4]
    assert kept(draw, [0.3, 0.3, 0.3, 0.1], top_k=2) == [0, 1, 2]  # equals stay together
    assert kept(draw, weights, top_p=0.39) == [1]  # .4 reaches it
    assert kept(draw, weights, top_p=0.41) == [1, 3]
    assert kept(draw, weights, top_p=0.71) == [1, 3, 4]
    assert kept(draw, weights, top_p=0.96) == [0, 1, 2, 3, 4]
    assert kept(draw, weights, top_p=1e-9) == [1]
    assert kept(draw, weights, min_p=0.3) == [1, 3, 4]  # at least .12
    assert kept(draw, weights, min_p=1.0) == [1]
    assert kept(draw, weights, top_k=2, top_p=0.58) == [1, 3]  # of (.4, .3) / .7, .571 is not enough
    assert kept(draw, weights, top_k=2, top_p=0.57) == [1]
    assert kept(draw, [5 * w for w in weights], top_p=0.71) == [1, 3, 4]  # weights need not sum to 1


def by_definition(weights: np.ndarray, top_k: int, top_p: float, min_p: float) -> list[int]:
    """Token by token, the likeliest first, as the fields of Sampling describe it."""
    order = sorted(range(len(weights)), key=lambda i: -weights[i])
    if top_k:
        order = [i for i in order if weights[i] >= weights[order[min(top_k, len(order)) - 1]]]
    if top_p < 1:
        total, mass, few = math.fsum(weights[order]), 0.0, []
        for i in order:
            if mass >= top_p * total:
                break
            few.append(i)
            mass += weights[i]
        order = few
    return sorted(i for i in order if weights[i] >= min_p * weights.max())


@settings(deadline=None, max_examples=60)
@given(
    st.integers(0, 2**31),
    st.sampled_from([0, 1, 3, 17, 400]),
    st.sampled_from([1.0, 0.95, 0.5, 0.05]),
    st.sampled_from([0.0, 0.02, 0.3]),
)
def test_filters_by_definition(seed: int, top_k: int, top_p: float, min_p: float) -> None:
    weights = np.random.default_rng(seed).gamma(0.3, size=300) + 1e-6
    weights /= weights.max()
    sampling = Sampling(top_k=top_k, top_p=top_p, min_p=min_p)
    rows = module.filtered(torch.from_numpy(np.stack([weights, weights[::-1].copy()])), sampling)
    expected = by_definition(weights, top_k, top_p, min_p)
    assert rows[0].nonzero()[:, 0].tolist() == expected
    assert rows[1].nonzero()[:, 0].tolist() == sorted(299 - i for i in expected)


def test_out_of_range() -> None:
    for wrong in ({"temperature": 0.0}, {"temperature": math.nan}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.1},
                  {"min_p": -0.1}, {"max_completion_tokens": 0}):  # fmt: skip
        with pytest.raises(ValueError, match=f"^Sampling: out of range: {next(iter(wrong))}="):
            Sampling(**wrong)  # type: ignore[arg-type]


def test_on_policy() -> None:
    """Whatever the temperature; not with a filter, and not greedily."""
    assert Sampling().on_policy and Sampling(temperature=0.7).on_policy
    for other in ({"greedy": True}, {"top_k": 5}, {"top_p": 0.9}, {"min_p": 0.1}):
        assert not Sampling(**other).on_policy  # type: ignore[arg-type]


# The inverse CDF ------------------------------------------------------------------------------------------------------


def one_by_one(weights: np.ndarray, u: float) -> int:
    """The first index whose running sum exceeds u times the total."""
    sums = np.cumsum(weights.astype(np.float64))
    return int(np.searchsorted(sums, u * sums[-1], side="right"))


def test_inverse_cdf_across_blocks(draw: ModuleType) -> None:
    """Whole numbers as weights, so that sums are exact; sizes below, at, above and far from a multiple of the block."""
    rng = np.random.default_rng(0)
    for size in (1, 2, module.BLOCK - 1, module.BLOCK, module.BLOCK + 1, 1280, 1999):
        weights = rng.integers(0, 5, (200, size))
        weights[:, rng.integers(size)] += 1
        uniforms = np.concatenate([rng.random(197), [0.0, 0.5, ALMOST_ONE]])
        expected = [one_by_one(row, u) for row, u in zip(weights, uniforms, strict=True)]
        own = draw.inverse_cdf(torch.from_numpy(weights).float(), torch.from_numpy(uniforms))
        assert own.tolist() == expected, size


def test_an_edge_belongs_to_the_next_token(draw: ModuleType) -> None:
    """1024 equal weights: u = k / 1024 is exact, and the sum must exceed it, so it draws token k."""
    edges = torch.arange(1024, dtype=torch.float64) / 1024
    assert draw.inverse_cdf(torch.ones(1024, 1024), edges).tolist() == list(range(1024))


def test_a_very_large_vocabulary(draw: ModuleType) -> None:
    weights = np.random.default_rng(1).integers(0, 3, (4, 300_001))
    uniforms = np.array([0.0, 0.123456789, 0.987654321, ALMOST_ONE])
    expected = [one_by_one(row, u) for row, u in zip(weights, uniforms, strict=True)]
    assert draw.inverse_cdf(torch.from_numpy(weights).float(), torch.from_numpy(uniforms)).tolist() == expected


def test_frequencies_are_the_probabilities() -> None:
    """Pearson's chi-square over 1300 tokens, not a multiple of the block, at about 30 draws a token."""
    rng = np.random.default_rng(7)
    weights = rng.gamma(2.0, size=1300) + 0.2
    draws, at_once = 40_000, 2_000
    counts = np.zeros(1300)
    for _ in range(draws // at_once):
        rows = torch.from_numpy(weights).float().expand(at_once, -1)
        counts += np.bincount(module.inverse_cdf(rows, torch.from_numpy(rng.random(at_once))), minlength=1300)
    expected = weights / weights.sum() * draws
    assert chisquare(counts, expected).pvalue > LEAST_P
    assert chisquare(counts, np.roll(expected, 1)).pvalue < LEAST_P


@settings(deadline=None, max_examples=100)
@given(st.integers(0, 2**31), st.sampled_from([5, 256, 700]), st.sampled_from([torch.float32, torch.float64]))
def test_weight_zero_is_never_drawn(seed: int, size: int, dtype: torch.dtype) -> None:
    """Sparse weights over many magnitudes, numbers at and around every edge of the cumulative sum."""
    rng = np.random.default_rng(seed)
    weights = np.where(rng.random(size) < 0.1, 10.0 ** rng.uniform(-30, 0, size), 0.0)
    weights[rng.integers(size)] = 1.0
    row = torch.from_numpy(weights).to(dtype)
    edges = np.cumsum(row.double().numpy()) / row.double().sum().item()
    near = np.concatenate([edges, np.nextafter(edges, 0), np.nextafter(edges, 2), rng.random(20), [0.0, ALMOST_ONE]])
    uniforms = torch.from_numpy(np.clip(near, 0.0, ALMOST_ONE))
    drawn = module.inverse_cdf(row.expand(len(uniforms), -1), uniforms)
    assert (row[drawn] > 0).all()


def test_the_ends(draw: ModuleType) -> None:
    """u = 0 takes the first positive weight, u just below 1 the last one, whatever rounding does to the sums."""
    for size in (3, 600, 5000):
        for first, last in ((0, size - 1), (size // 3, size // 2), (size - 1, size - 1)):
            weights = torch.zeros(2, size)
            weights[:, first : last + 1] = 0.1  # not a binary fraction: sums by block and in turn differ
            ends = draw.inverse_cdf(weights, doubles([0.0, ALMOST_ONE]))
            assert ends.tolist() == [first, last]


def test_without_double_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on Apple's MPS: numbers that single precision rounds to 1 still draw a token of positive weight."""
    assert module.exact(SimpleNamespace(device=torch.device("mps"))) == torch.float32  # type: ignore[arg-type]
    assert module.exact(torch.zeros(1)) == torch.float64
    monkeypatch.setattr(module, "exact", lambda like: torch.float32)
    weights = torch.zeros(3, 700)
    weights[:, 100:300] = 0.1
    drawn = module.inverse_cdf(weights, torch.tensor([0.0, 0.5, 1.0]))
    assert drawn[0] == 100 and drawn[2] == 299 and abs(int(drawn[1]) - 200) <= 1
    top = module.filtered(torch.tensor([[0.1, 0.4, 0.05, 0.3, 0.15]]), Sampling(top_p=0.6))
    assert top[0].nonzero()[:, 0].tolist() == [1, 3]


# Mutants --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, replacement, test",
    [
        ("logits.div_(sampling.temperature)", "logits.mul_(sampling.temperature)", test_temperature),
        ("div_(softcap).tanh_()", "div_(softcap * sampling.temperature).tanh_()",
         test_softcap_comes_before_temperature),
        (" - weights.sum(-1).log()", "", test_tokens_and_logprobs),
        ("gather(-1, token[:, None])", "gather(-1, token[:, None] * 0)", test_tokens_and_logprobs),
        ("if sampling.greedy", "if not sampling.greedy", test_greedy),
        ("filtered(weights, sampling), uniforms", "weights, uniforms",
         test_a_filter_changes_what_is_drawn_and_not_its_logprob),
        ("weights < last", "weights <= last", test_filters_by_hand),
        ("before >= sampling.top_p", "reached >= sampling.top_p", test_filters_by_hand),
        (" * reached[:, -1:]", "", test_filters_by_hand),
        ("weights < sampling.min_p *", "weights < sampling.min_p +", test_filters_by_hand),
        ("target[:, None], right=True", "target[:, None], right=False", test_an_edge_belongs_to_the_next_token),
        ("rest[:, None], right=True", "rest[:, None], right=False", test_an_edge_belongs_to_the_next_token),
        ("_below(target - start,", "_below(target,", test_inverse_cdf_across_blocks),
        ("torch.minimum(x, torch.nextafter(end, torch.zeros_like(end)))", "x * 1.0000001", test_the_ends),
    ],
)  # fmt: skip
def test_mutants_are_noticed(text: str, replacement: str, test: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, f"{module.__name__}_mutant", module)  # where dataclasses look names up
    with pytest.raises(AssertionError):
        test(mutated(module, text, replacement))
