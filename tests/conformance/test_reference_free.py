"""SimPO and ORPO beside trl's CPOTrainer and ORPOTrainer (experimental there): same policy, same pairs, one step."""

import copy
import dataclasses
from typing import Any

import pytest
import torch

from alignlab.algorithms.orpo import ORPO
from alignlab.algorithms.sft import SFT
from alignlab.algorithms.simpo import SimPO
from alignlab.types import Step
from tests.algorithms.world import Run, collect

pytest.importorskip("trl", reason="the extra `conformance` is not installed")

from tests.conformance.peer import (
    STARTS,
    offline_trainer,
    our_run,
    our_step,
    paired_texts,
    their_step,
    without_last_token,
)
from tests.conformance.record import Measured, added, check, gap, scaled, split

pytestmark = pytest.mark.slow


def ours(algorithm: Any, start: Any) -> tuple[Run, Step]:
    run = our_run(algorithm, start, microbatch_rows=4)
    (step,) = collect(run)
    return run, step


def theirs(name: str, start: Any, step: Step, accumulate: int = 1, **options: Any) -> Measured:
    return their_step(offline_trainer(name, copy.deepcopy(start), paired_texts(step), accumulate=accumulate, **options))


@pytest.mark.parametrize("model, accumulate", [("gemma3", 1), ("gemma3", 4), ("llama", 2)])
def test_simpo(model: str, accumulate: int) -> None:
    start = STARTS[model]()
    run, step = ours(SimPO(pairs_per_step=8, beta=2.0, gamma=0.7), start)
    options = {"loss_type": "simpo", "cpo_alpha": 0.0, "beta": 2.0, "simpo_gamma": 0.7}
    found = theirs("CPOTrainer", start, step, accumulate, **options)
    note = "trl: loss_type simpo, cpo_alpha 0"
    where = split(model, accumulate, 8)
    check("simpo", "beta 2, gamma 0.7", our_step(run, step), found, peer="CPOTrainer", where=where, note=note)


def test_simpo_mutants() -> None:
    """Another margin; sums for means; no stop token."""
    start = STARTS["gemma3"]()
    run, step = ours(SimPO(pairs_per_step=8, beta=2.0, gamma=0.7), start)
    options = {"loss_type": "simpo", "cpo_alpha": 0.0, "beta": 2.0, "simpo_gamma": 0.7}
    right = theirs("CPOTrainer", start, step, **options)
    assert not gap(our_step(*ours(SimPO(pairs_per_step=8, beta=2.0, gamma=0.0), start)), right).small
    stopless = tuple(without_last_token(b) for b in step.microbatches)
    assert not gap(our_step(run, dataclasses.replace(step, microbatches=stopless)), right).small


def whole_chosen_rows(start: Any, step: Step) -> Measured:
    """Mean negative log-likelihood of all tokens, prompt and completion, of the chosen rows of the step."""
    run = our_run(SFT(prompt_weight=1.0), start)
    pieces = tuple(b.select(torch.arange(len(b) // 2)) for b in step.microbatches)
    return our_step(run, Step(pieces, float(sum(int(b.attention_mask[:, 1:].sum()) for b in pieces))))


@pytest.mark.parametrize("model", STARTS)
def test_orpo(model: str) -> None:
    """Departure: the likelihood term of ours is the mean over pairs of each chosen completion's mean; theirs is the
    token mean of a microbatch over prompt and completion. The odds ratio is the same."""
    start = STARTS[model]()
    run, step = ours(ORPO(pairs_per_step=8, odds_ratio_coef=0.3), start)
    found = theirs("ORPOTrainer", start, step, beta=0.3)
    assert not gap(our_step(run, step), found).small
    without = our_run(ORPO(pairs_per_step=8, odds_ratio_coef=0.0), start)
    odds_ratio = added([our_step(run, step), scaled(our_step(without, step), -1.0)])
    mine = added([odds_ratio, whole_chosen_rows(start, step)])
    note = "our odds ratio plus the likelihood as trl has it: token mean over prompt and completion"
    check("orpo", "lambda 0.3", mine, found, peer="ORPOTrainer", where=split(model, 1, 8), note=note)
    twice = added([odds_ratio, odds_ratio, whole_chosen_rows(start, step)])
    assert not gap(twice, found).small
