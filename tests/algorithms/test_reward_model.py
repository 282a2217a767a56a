"""The reward model's loss against -log sigmoid(r_w - r_l - margin) + c (r_w + r_l)^2, from raw last hidden states."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from alignlab.algorithms import reward_model as module
from alignlab.types import Batch
from tests.algorithms.world import PAIRS, collect, flat, loss_and_gradient, mutant, raw_states, start_run
from tests.tolerances import EXACT, FLOAT64

EIGHT = {"pairs_per_step": 8, "use_margin": True, "centering_coef": 0.01}
NAMES = {"sum": np.sum, "log_sigmoid": lambda x: -np.log1p(np.exp(-x))}
"""What a printed formula may call here, in NumPy."""


@pytest.fixture
def reward_model() -> Any:
    return module.ALGORITHM


def raw_scores(model: Any, batch: Batch) -> Tensor:
    """The head at each row's last token, (B,), every row by itself and without padding."""
    last = torch.stack([states[-1] for states in raw_states(model, batch)])
    return last @ model.head.weight[0] + model.head.bias[0]


def test_loss(reward_model: Any) -> None:
    """Eight pairs of margins 0, .25, .. 1.75 (each in its place after sorting by length), microbatches of two pairs."""
    run = start_run(reward_model(**EIGHT))
    (step,) = collect(run)
    terms, margins = [], []
    for batch in step.microbatches:
        scores, margin = raw_scores(run.models["reward_model"], batch).detach().numpy(), batch.margin[:2].numpy()
        for chosen, rejected, m in zip(scores[:2], scores[2:], margin, strict=True):
            terms.append(np.log1p(np.exp(-(chosen - rejected - m))) + 0.01 * (chosen + rejected) ** 2)
            margins.append(float(m))
    assert len(step.microbatches) == 4 and sorted(margins) == [p.margin for p in PAIRS]
    assert_close(loss_and_gradient(run, step)[0], float(np.mean(terms)), **FLOAT64)


def test_gradient(reward_model: Any) -> None:
    """Of one pair: d -log sigmoid(x) = -(1 - sigmoid(x)) dx, and d c s^2 = 2 c s ds."""
    run = start_run(reward_model(**EIGHT | {"pairs_per_step": 1}))
    (step,) = collect(run)
    (batch,) = step.microbatches
    _, gradient = loss_and_gradient(run, step)
    chosen, rejected = raw_scores(run.models["reward_model"], batch)
    x = (chosen - rejected - batch.margin[0]).detach()
    slope = -1 / (1 + x.exp())
    (slope * (chosen - rejected) + 0.02 * (chosen + rejected).detach() * (chosen + rejected)).backward()
    by_hand = {
        n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in run.models["reward_model"].named_parameters()
    }
    assert_close(flat(gradient), flat(by_hand), **FLOAT64)


def test_margins_are_left_out_unless_asked_for(reward_model: Any) -> None:
    run = start_run(reward_model(**EIGHT | {"use_margin": False, "centering_coef": 0.0}))
    (step,) = collect(run)
    scores = [raw_scores(run.models["reward_model"], b).detach().numpy() for b in step.microbatches]
    terms = [np.log1p(np.exp(s[2:] - s[:2])) for s in scores]
    assert_close(loss_and_gradient(run, step)[0], float(np.mean(terms)), **FLOAT64)


def scored_pairs(run: Any, step: Any) -> dict[str, np.ndarray]:
    """Raw scores and margins of all pairs of a step, in one order."""
    columns: dict[str, list[np.ndarray]] = {"chosen": [], "rejected": [], "margin": []}
    for batch in step.microbatches:
        scores, half = raw_scores(run.models["reward_model"], batch).detach().numpy(), len(batch) // 2
        columns["chosen"].append(scores[:half])
        columns["rejected"].append(scores[half:])
        columns["margin"].append(batch.margin[:half].numpy())
    return {name: np.concatenate(parts) for name, parts in columns.items()}


def test_label_smoothing(reward_model: Any) -> None:
    """A fifth of the labels wrong: .8 of the pair's loss and .2 of that of the pair turned round, margin and all."""
    run = start_run(reward_model(**EIGHT | {"label_smoothing": 0.2}))
    (step,) = collect(run)
    r = scored_pairs(run, step)
    right = np.log1p(np.exp(-(r["chosen"] - r["rejected"] - r["margin"])))
    wrong = np.log1p(np.exp(-(r["rejected"] - r["chosen"] - r["margin"])))
    by_hand = 0.8 * right + 0.2 * wrong + 0.01 * (r["chosen"] + r["rejected"]) ** 2
    assert_close(loss_and_gradient(run, step)[0], float(by_hand.mean()), **FLOAT64)


FORMULAS = {
    "plain": {"use_margin": False, "centering_coef": 0.0},
    "margin": {"use_margin": True, "centering_coef": 0.0},
    "centering": {"use_margin": False, "centering_coef": 0.3},
    "smoothing": {"use_margin": False, "centering_coef": 0.0, "label_smoothing": 0.1},
    "all": {"use_margin": True, "centering_coef": 0.02, "label_smoothing": 0.3},
}


@pytest.mark.parametrize("case", FORMULAS)
def test_the_printed_formula_is_the_executed_loss(reward_model: Any, case: str) -> None:
    run = start_run(reward_model(pairs_per_step=8, **FORMULAS[case]))
    (step,) = collect(run)
    values: dict[str, Any] = {**NAMES, **scored_pairs(run, step), "pairs": step.normaliser}
    for line in run.algorithm.formula():
        exec(line, {"__builtins__": {}}, values)
    assert_close(loss_and_gradient(run, step)[0], float(values["loss"]), **FLOAT64)


def test_presets_are_what_their_libraries_do() -> None:
    """Read from their sources and the paper's appendix; what the recipe says goes over them."""
    make = module.RewardModel
    assert make().preset is None and make().centering_coef == 0.01
    trl, openrlhf, paper = (make(preset=name) for name in ("trl", "openrlhf", "paper"))
    assert (trl.learning_rate, trl.pairs_per_step, trl.use_margin, trl.centering_coef) == (1e-4, 8, True, 0)
    assert (openrlhf.learning_rate, openrlhf.pairs_per_step, openrlhf.centering_coef) == (9e-6, 128, 0)
    assert (paper.learning_rate, paper.pairs_per_step, paper.use_margin) == (9e-6, 64, False)
    assert make(preset="trl", centering_coef=0.01).centering_coef == 0.01


def test_padding_and_its_ids_mean_nothing(reward_model: Any) -> None:
    """Scores are read at the last attended token: longer padding, with any id, changes neither loss nor gradient."""
    run = start_run(reward_model(**EIGHT), microbatch_rows=16)
    (step,) = collect(run)
    (batch,) = step.microbatches
    for pad_id in (0, 1, 4, 20):  # the pad, both stop tokens, a letter
        filled = torch.where(batch.attention_mask, batch.input_ids, pad_id)
        wider = {
            "input_ids": torch.nn.functional.pad(filled, (0, 3), value=pad_id),
            "attention_mask": torch.nn.functional.pad(batch.attention_mask, (0, 3)),
            "completion_mask": torch.nn.functional.pad(batch.completion_mask, (0, 3)),
        }
        padded = replace(step, microbatches=(replace(batch, **wider),))
        for found, expected in zip(loss_and_gradient(run, padded), loss_and_gradient(run, step), strict=True):
            assert_close(found, expected, **FLOAT64)


def test_metrics(reward_model: Any) -> None:
    """Accuracy counts a tie one half: a head of zeros cannot tell any pair apart, loses ln 2 a pair, and scores 0."""
    run = start_run(reward_model(**EIGHT | {"use_margin": False}))
    with torch.no_grad():
        run.models["reward_model"].head.weight.zero_()
        run.models["reward_model"].head.bias.zero_()
    metrics = run.go(1)[0].metrics
    assert_close(metrics["preference/accuracy"], 0.5, **EXACT)
    assert_close(metrics["loss/total"], float(np.log(2)), **FLOAT64)
    assert_close(metrics["reward_model/mean_score"], 0.0, **EXACT)


def test_learns_to_tell_pairs_apart(reward_model: Any) -> None:
    run = start_run(reward_model(**EIGHT | {"use_margin": False}, learning_rate=1e-2))
    run.go(30)
    assert run.column("preference/accuracy")[-1] == 1.0
    assert run.column("preference/margin")[-1] > 1.0 > run.column("preference/margin")[0]
    assert abs(run.column("reward_model/mean_score")[-1]) < 0.5


@pytest.mark.parametrize(
    "text, replacement, test",
    [
        ("chosen, rejected = rewards", "rejected, chosen = rewards", test_loss),
        ("margin=margin,", "margin=-margin,", test_loss),
        ("margin=margin,", "", test_loss),
        (".chunk(2)[0] if", ".flip(0).chunk(2)[0] if", test_loss),
        ("terms.sum()", "-terms.sum()", test_gradient),
        ("terms.sum()", "terms.mean()", test_loss),
        ("centering_coef=self.centering_coef", "centering_coef=0.0", test_gradient),
        ("/ 2)", "/ 1)", test_loss),
        ("if self.use_margin and", "if", test_margins_are_left_out_unless_asked_for),
        ("0.5 * (chosen == rejected)", "0.0 * (chosen == rejected)", test_metrics),
        ("label_smoothing=self.label_smoothing", "label_smoothing=0.0", test_label_smoothing),
        (", label_smoothing=self.label_smoothing", "", test_label_smoothing),
    ],
)
def test_mutants_are_noticed(text: str, replacement: str, test: Any) -> None:
    changed = mutant(module, text, replacement)
    with pytest.raises(AssertionError):
        test(changed)
