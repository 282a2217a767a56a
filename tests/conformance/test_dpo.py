"""The preference family beside trl's DPOTrainer: same policy, same reference, same pairs, one optimiser step."""

import copy
import dataclasses
from typing import Any

import pytest
import torch

from alignlab.algorithms.dpo import DPO
from alignlab.forward import score
from alignlab.types import Step
from tests.algorithms.world import Run, collect, nudge, policy

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
from tests.conformance.record import Measured, check, gap, split

pytestmark = pytest.mark.slow

PEER = "DPOTrainer"
BETA = 0.3


def ours(start: Any, moved: float = 0.15, **options: Any) -> tuple[Run, Step]:
    """A step on pairs, with a policy that has moved away from its reference."""
    run = our_run(DPO(pairs_per_step=8, **{"beta": BETA} | options), start, microbatch_rows=4)
    (step,) = collect(run)
    nudge(run.models["policy"], moved)
    return run, step


def theirs(run: Run, start: Any, step: Step, accumulate: int = 2, **options: Any) -> Measured:
    trainer = offline_trainer(
        PEER,
        copy.deepcopy(run.models["policy"]),
        paired_texts(step),
        accumulate=accumulate,
        ref_model=copy.deepcopy(start),
        **{"beta": BETA} | options,
    )
    return their_step(trainer)


E = 0.1
LOSSES: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "sigmoid": ({}, {"loss_type": "sigmoid"}, ""),
    "hinge": ({"loss_kind": "hinge"}, {"loss_type": "hinge"}, ""),
    "ipo, average": ({"loss_kind": "ipo", "average_logprobs": True}, {"loss_type": "ipo"}, ""),
    "robust, 0.1": (
        {"loss_kind": "robust", "label_smoothing": E},
        {"loss_type": "robust", "label_smoothing": E},
        "",
    ),
    "length-normalised": (
        {"variant": "length_normalised", "beta": 2.0},
        {"loss_type": "sigmoid_norm", "beta": 2.0},
        "",
    ),
    # trl has no cDPO by name; it is this combination of two of its losses: -log sigmoid(-b h) cancels out of `robust`.
    "cDPO, 0.1": (
        {"label_smoothing": E},
        {"loss_type": ["sigmoid", "robust"], "loss_weights": [2 * (1 - E), 2 * E - 1], "label_smoothing": E},
        "trl: 2(1-e) sigmoid - (1-2e) robust",
    ),
}


@pytest.mark.parametrize("kind", LOSSES)
def test_losses(kind: str) -> None:
    start = STARTS["gemma3"]()
    options, peer_options, note = LOSSES[kind]
    run, step = ours(start, **options)
    check("dpo", kind, our_step(run, step), theirs(run, start, step, **peer_options), peer=PEER,
          where=split("gemma3", 2, 8), note=note)  # fmt: skip


@pytest.mark.parametrize("accumulate", [1, 8])
@pytest.mark.parametrize("model", STARTS)
def test_models_and_microbatches(model: str, accumulate: int) -> None:
    start = STARTS[model]()
    run, step = ours(start)
    found = theirs(run, start, step, accumulate)
    check("dpo", "sigmoid", our_step(run, step), found, peer=PEER, where=split(model, accumulate, 8))


def test_margins_are_spread() -> None:
    """The comparisons above meet pairs on both sides of the hinge's corner and of 0."""
    start = STARTS["gemma3"]()
    run, step = ours(start)
    drifts = [
        torch.where(b.completion_mask, score(run.models["policy"], b).logprobs - b.reference_logprobs, 0.0).sum(-1)
        for b in step.microbatches
    ]
    margins = torch.cat([BETA * (chosen - rejected) for chosen, rejected in (d.chunk(2) for d in drifts)])
    assert (margins > 1).sum() >= 1 and (margins < 0).sum() >= 2 and len(margins) == 8, margins


def test_adapter() -> None:
    """LoRA: our reference is the policy with its adapter off, theirs a frozen copy of the adapter as it was."""
    start = policy(dtype=torch.float32, lora=True)
    run, step = ours(start)
    trainer = offline_trainer(PEER, copy.deepcopy(start), paired_texts(step), accumulate=2, beta=BETA)
    nudge(trainer.model, 0.15)
    found = their_step(trainer)
    check("dpo", "sigmoid, LoRA", our_step(run, step), found, peer=PEER, where=split("gemma3", 2, 8))


def test_likelihood_term() -> None:
    """Departure: ours (RPO) is the mean over pairs of each chosen completion's mean; theirs the token mean of a
    microbatch. With one pair a microbatch they meet."""
    start = STARTS["gemma3"]()
    run, step = ours(start, rpo_alpha=0.5)
    peer = {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]}
    assert not gap(our_step(run, step), theirs(run, start, step, 1, **peer)).small
    found = theirs(run, start, step, 8, **peer)
    note = "one pair a microbatch: trl's `sft` is a token mean of the microbatch"
    check("dpo", "RPO, 0.5", our_step(run, step), found, peer=PEER, where=split("gemma3", 8, 8), note=note)


def test_mutants() -> None:
    """Turned pairs; no stop token; no reference; another beta; a sum for a mean; IPO on sums."""
    start = STARTS["gemma3"]()
    run, step = ours(start)
    right = theirs(run, start, step)
    assert gap(our_step(run, step), right).small
    turned = tuple(b.select(torch.arange(len(b)).roll(len(b) // 2)) for b in step.microbatches)
    stopless = tuple(without_last_token(b) for b in step.microbatches)
    free = tuple(
        dataclasses.replace(b, reference_logprobs=torch.zeros_like(b.reference_logprobs))  # type: ignore[arg-type]
        for b in step.microbatches
    )
    for microbatches in (turned, stopless, free):
        assert not gap(our_step(run, dataclasses.replace(step, microbatches=microbatches)), right).small
    assert not gap(our_step(*ours(start, beta=0.1)), right).small
    assert not gap(our_step(run, dataclasses.replace(step, normaliser=1.0)), right).small
    ipo = theirs(run, start, step, loss_type="ipo")
    assert gap(our_step(*ours(start, loss_kind="ipo", average_logprobs=True)), ipo).small
    assert not gap(our_step(*ours(start, loss_kind="ipo")), ipo).small
