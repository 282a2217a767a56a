"""Perplexity against numbers by hand: every token counts the same, the stop token too, whatever the batches."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from alignlab.conversation import Template
from alignlab.evaluation import perplexity as module
from alignlab.evaluation.perplexity import perplexity
from alignlab.models import ModelChoice, frozen_policy, load_tokenizer
from alignlab.types import Message, Prompt, Row
from tests.algorithms import world
from tests.runs import small_model
from tests.tolerances import FLOAT64

TEXTS = ("7", "a longer answer that has many more tokens than the others", "no", "max(xs)")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_model(tmp_path_factory.mktemp("models") / "small")


@pytest.fixture(scope="module")
def rows(folder: Path) -> list[Row]:
    template = Template.of(load_tokenizer(str(folder)), None)
    prompts = [Prompt(messages=(Message("user", f"How many are {n}?"),), id=str(n)) for n in range(len(TEXTS))]
    return [template.row(p, text) for p, text in zip(prompts, TEXTS, strict=True)]


def load(folder: Path) -> torch.nn.Module:
    model = frozen_policy(ModelChoice(name=str(folder), dtype="float64"), torch.device("cpu"))
    assert isinstance(model, torch.nn.Module)
    return model


def nll(model: torch.nn.Module, row: Row) -> np.ndarray:
    """-log softmax of a row's completion tokens, one plain forward pass of the row by itself."""
    ids = torch.tensor([[*row.prompt_ids, *row.completion_ids]])
    logits = model(input_ids=ids).logits[0].numpy()
    before = logits[len(row.prompt_ids) - 1 : -1]
    top = before.max(-1, keepdims=True)
    logs = before - top - np.log(np.exp(before - top).sum(-1, keepdims=True))
    return -logs[np.arange(len(row.completion_ids)), list(row.completion_ids)]


def test_it_is_the_exponential_of_the_mean_over_tokens(folder: Path, rows: list[Row]) -> None:
    """exp(sum over all tokens / number of tokens); the mean of the rows' means and their perplexities' are others."""
    model = load(folder)
    with torch.no_grad():
        each = [nll(model, row) for row in rows]
    expected = math.exp(sum(x.sum() for x in each) / sum(len(x) for x in each))
    found = perplexity(model, rows, pad_id=0)  # type: ignore[arg-type]
    assert found == pytest.approx(expected, rel=1e-10)
    of_rows = [x.mean() for x in each]
    wrong = (math.exp(np.mean(of_rows)), float(np.mean(np.exp(of_rows))), math.exp(sum(x[:-1].sum() for x in each) /
             sum(len(x) - 1 for x in each)))  # fmt: skip
    assert all(abs(found / other - 1) > 1e-6 for other in wrong)  # rows alike, or no stop token


def test_the_stop_token_counts(folder: Path, rows: list[Row]) -> None:
    model = load(folder)
    cut = [Row(prompt_ids=r.prompt_ids, completion_ids=r.completion_ids[:-1]) for r in rows]
    assert all(r.completion_ids[-1] in (1, 4) for r in rows)
    assert perplexity(model, rows, pad_id=0) != perplexity(model, cut, pad_id=0)  # type: ignore[arg-type]


def test_a_uniform_guess_has_the_size_of_the_vocabulary(folder: Path, rows: list[Row]) -> None:
    model = load(folder)
    torch.nn.init.zeros_(model.get_input_embeddings().weight)  # type: ignore[operator]
    assert perplexity(model, rows, pad_id=0) == pytest.approx(model.config.vocab_size, rel=1e-12)  # type: ignore[arg-type, union-attr]


@pytest.mark.parametrize("max_rows", [1, 2, 3, 64])
def test_neither_batches_nor_order_matter(folder: Path, rows: list[Row], max_rows: int) -> None:
    model = load(folder)
    expected = torch.tensor(perplexity(model, rows, pad_id=0))  # type: ignore[arg-type]
    for these in (rows, rows[::-1]):
        found = perplexity(model, these, pad_id=0, max_rows=max_rows)  # type: ignore[arg-type]
        torch.testing.assert_close(torch.tensor(found), expected, **FLOAT64)


def test_dropout_is_off_meanwhile_and_nothing_else_changes() -> None:
    policy = world.policy(dropout=0.5).train()
    frozen = next(m for m in policy.modules() if isinstance(m, torch.nn.Linear)).eval()
    rows = [Row(prompt_ids=(2, 8, 9), completion_ids=(10, 11, 12, 4)), Row(prompt_ids=(2, 8), completion_ids=(30, 4))]
    without = perplexity(world.policy().eval(), rows, pad_id=0)
    torch.manual_seed(5)
    drawn = torch.rand(1)
    torch.manual_seed(5)
    first, second = perplexity(policy, rows, pad_id=0), perplexity(policy, rows, pad_id=0)
    assert first == second == without
    assert torch.equal(torch.rand(1), drawn) and policy.training and not frozen.training
    assert all(p.grad is None for p in policy.parameters())


def test_nothing_to_measure_is_an_error() -> None:
    with pytest.raises(ValueError, match="no completion token"):
        perplexity(world.policy(), [], pad_id=0)


@pytest.mark.parametrize(("logprob", "expected"), [(0.0, 1.0), (-math.log(8), 8.0), (-1e6, math.inf)])
def test_from_certainty_to_what_is_beyond_numbers(
    folder: Path, rows: list[Row], monkeypatch: pytest.MonkeyPatch, logprob: float, expected: float
) -> None:
    def always(policy: object, batch: object) -> object:
        return type("Scores", (), {"logprobs": torch.full(batch.input_ids.shape, logprob, dtype=torch.float64)})  # type: ignore[attr-defined]

    monkeypatch.setattr(module, "score", always)
    assert perplexity(load(folder), rows, pad_id=0) == pytest.approx(expected, rel=1e-12)  # type: ignore[arg-type]
