"""Supervised fine-tuning beside trl's SFTTrainer: same weights, same demonstrations, one optimiser step."""

import copy
import dataclasses
from typing import Any

import pytest
import torch

from alignlab.algorithms.sft import SFT
from alignlab.types import Step
from tests.algorithms.world import Run, collect, nudge, policy

pytest.importorskip("trl", reason="the extra `conformance` is not installed")

from tests.conformance.peer import STARTS, offline_trainer, our_run, our_step, texts, their_step, without_last_token
from tests.conformance.record import Measured, added, check, gap, scaled, split

pytestmark = pytest.mark.slow

PEER = "SFTTrainer"


def ours(start: Any, **options: Any) -> tuple[Run, Step]:
    run = our_run(SFT(examples_per_step=8, **options), start, microbatch_rows=4)
    (step,) = collect(run)
    return run, step


def theirs(start: Any, step: Step, accumulate: int = 1, **options: Any) -> Measured:
    rows = [{"prompt": prompt, "completion": completion} for prompt, completion in texts(step)]
    given = {"completion_only_loss": True} | options
    return their_step(offline_trainer(PEER, copy.deepcopy(start), rows, accumulate=accumulate, **given))


@pytest.mark.parametrize("accumulate", [1, 2, 4, 8])
@pytest.mark.parametrize("model", STARTS)
def test_completion_only(model: str, accumulate: int) -> None:
    """Rows of 15 to 30 tokens in 8 x 1 to 1 x 8: their mean over the whole accumulated batch is ours."""
    start = STARTS[model]()
    run, step = ours(start)
    found = theirs(start, step, accumulate)
    check("sft", "completions only", our_step(run, step), found, peer=PEER, where=split(model, accumulate, 8))


def test_prompt_tokens_too() -> None:
    """Weight 1 for prompt tokens is trl's loss over the whole row; BOS has no predecessor in either."""
    start = STARTS["gemma3"]()
    run, step = ours(start, prompt_weight=1.0)
    whole_rows = theirs(start, step, 2, completion_only_loss=False)
    note = "trl: completion_only_loss=False"
    where = split("gemma3", 2, 8)
    check("sft", "`prompt_weight: 1`", our_step(run, step), whole_rows, peer=PEER, where=where, note=note)


def test_adapter() -> None:
    """The gradient of a LoRA adapter that is no longer fresh."""
    start = policy(dtype=torch.float32, lora=True)
    nudge(start, 0.05)
    run, step = ours(start)
    check("sft", "LoRA", our_step(run, step), theirs(start, step, 2), peer=PEER, where=split("gemma3", 2, 8))


def test_mutants() -> None:
    """No stop token; the prompt trained too; each microbatch with a mean of its own; one token more in the mean."""
    start = STARTS["gemma3"]()
    run, step = ours(start)
    right = theirs(start, step, 2)
    assert gap(our_step(run, step), right).small
    stopless = Step(tuple(without_last_token(b) for b in step.microbatches), step.normaliser - 8)
    whole = Step(
        tuple(b.as_text() for b in step.microbatches),
        float(sum(int(b.attention_mask[:, 1:].sum()) for b in step.microbatches)),
    )
    means = [Step((b,), float(b.completion_mask.sum())) for b in step.microbatches]
    assert not gap(our_step(run, stopless), right).small
    assert not gap(our_step(run, whole), right).small
    assert not gap(scaled(added([our_step(run, part) for part in means]), 1 / len(means)), right).small
    assert not gap(our_step(run, dataclasses.replace(step, normaliser=step.normaliser + 1)), right).small
