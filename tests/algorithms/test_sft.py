"""SFT's loss against -1/N sum log pi, added up from raw log-softmaxes row by row."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from alignlab.algorithms import sft as module
from tests.algorithms.world import (
    collect,
    flat,
    loss_and_gradient,
    mutant,
    numbers,
    raw_logprobs,
    raw_states,
    start_run,
    template,
)
from tests.tolerances import EXACT, FLOAT64

SIX = {"examples_per_step": 6}


@pytest.fixture
def sft() -> Any:
    return module.ALGORITHM


def test_loss(sft: Any) -> None:
    """Minus the mean over all completion tokens of the step, rows of 2 to 12 tokens, in microbatches of 4 and 2."""
    run = start_run(sft(**SIX))
    (step,) = collect(run)
    logprobs = np.concatenate([x for b in step.microbatches for x in numbers(raw_logprobs(run.models["policy"], b))])
    loss, _ = loss_and_gradient(run, step)
    assert len(step.microbatches) == 2 and step.normaliser == len(logprobs)
    assert_close(loss, -logprobs.mean(), **FLOAT64)


def test_gradient(sft: Any) -> None:
    run = start_run(sft(**SIX))
    (step,) = collect(run)
    _, gradient = loss_and_gradient(run, step)
    rows = [x for b in step.microbatches for x in raw_logprobs(run.models["policy"], b)]
    (-torch.cat(rows).mean()).backward()
    by_hand = {name: p.grad for name, p in run.models["policy"].named_parameters()}
    assert_close(flat(gradient), flat(by_hand), **FLOAT64)


def test_prompt_weight(sft: Any) -> None:
    """With weight w every prompt token but the first (nothing predicts it) counts w, in the sum and in N."""
    run = start_run(sft(**SIX, prompt_weight=0.25))
    (step,) = collect(run)
    total, count = 0.0, 0.0
    for batch in step.microbatches:
        weight = run.models["policy"].get_output_embeddings().weight
        for i, states in enumerate(raw_states(run.models["policy"], batch)):
            ids, trained = batch.input_ids[i], batch.completion_mask[i]
            logs = (states @ weight.T).log_softmax(-1)
            for t in range(1, len(states)):
                w = 1.0 if trained[t] else 0.25
                total, count = total - w * logs[t - 1, ids[t]].item(), count + w
    assert_close(loss_and_gradient(run, step)[0], total / count, **FLOAT64)


def test_the_stop_token_is_trained_and_the_prompt_is_not(sft: Any) -> None:
    (step,) = collect(start_run(sft(**SIX)))
    for batch in step.microbatches:
        for ids, attended, trained in zip(batch.input_ids, batch.attention_mask, batch.completion_mask, strict=True):
            last = int(attended.nonzero().max())
            assert trained[last] and int(ids[last]) == template().turn_end_id
            assert not trained[:2].any() and (trained <= attended).all()


def test_a_phase_is_one_step_of_the_next_examples(sft: Any) -> None:
    """Eight examples, six a phase: the second phase ends the first epoch and begins the next one."""
    run = start_run(sft(**SIX))
    seen = []
    for _ in range(4):
        (step,) = collect(run)
        seen += sorted(tuple(row.tolist()) for b in step.microbatches for row in b.input_ids)
        run.state = replace(run.state, phase=run.state.phase + 1)
    run.go(5)
    assert run.state.step == 1 and run.state.phase == 5
    assert len({tuple(i for i in row if i) for row in seen}) == 8


def test_learns(sft: Any) -> None:
    run = start_run(sft(**SIX, learning_rate=1e-2))
    run.go(30)
    losses = run.column("loss/total")
    assert losses[-1] < 0.6 * losses[0]
    assert_close(losses, run.column("policy/nll"), **FLOAT64)


def test_dropout_is_on_in_training_and_replays(sft: Any) -> None:
    """Dropout is part of SFT; it draws from (seed, phase), so two runs agree bit for bit and another seed does not."""
    losses = [start_run(sft(**SIX), dropout=p, seed=seed).go(1)[0].metrics["loss/total"]
              for p, seed in ((0.3, 42), (0.3, 42), (0.0, 42), (0.3, 43))]  # fmt: skip
    assert_close(losses[0], losses[1], **EXACT)
    assert losses[0] not in losses[2:]


@pytest.mark.parametrize(
    "text, replacement, test",
    [
        ("nll = -score", "nll = score", test_loss),
        ("nll = -score", "nll = score", test_gradient),
        ("if self.prompt_weight else batch", "if False else batch", test_prompt_weight),
        ("aggregate(nll, batch.completion_mask)", "aggregate(nll, batch.completion_mask, 'sequence')", test_loss),
        ("completion_tokens(batches) +", "len(batches) +", test_loss),
        ("+ self.prompt_weight * prompt_tokens", "", test_prompt_weight),
        ("total + self.prompt_weight *", "total +", test_prompt_weight),
        ("[:, 1:]", "", test_prompt_weight),
    ],
)
def test_mutants_are_noticed(text: str, replacement: str, test: Any) -> None:
    changed = mutant(module, text, replacement)
    with pytest.raises(AssertionError):
        test(changed)
