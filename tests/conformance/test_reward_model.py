"""The reward model beside trl's RewardTrainer: same trunk, same scalar head, same pairs, one optimiser step."""

import copy
import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Gemma3TextForSequenceClassification, LlamaForSequenceClassification

from alignlab.algorithms.reward_model import RewardModel
from alignlab.types import Batch, Step
from tests.algorithms.world import Run, collect, fill

pytest.importorskip("trl", reason="the extra `conformance` is not installed")

from tests.conformance.peer import STARTS, offline_trainer, our_run, our_step, paired_texts, peer_tokenizer, their_step
from tests.conformance.record import Measured, check, gap, split

pytestmark = pytest.mark.slow

PEER = "RewardTrainer"
CLASSES = {"gemma3": Gemma3TextForSequenceClassification, "llama": LlamaForSequenceClassification}


def ours(model: str, **options: Any) -> tuple[Run, Step]:
    run = our_run(RewardModel(pairs_per_step=8, **options), STARTS[model](), microbatch_rows=8)
    fill(run.models["reward_model"].head, 77)
    with torch.no_grad():
        run.models["reward_model"].head.bias.zero_()  # theirs has none
    (step,) = collect(run)
    return run, step


def named_as_theirs(measured: Measured) -> Measured:
    """Our names -> theirs; the bias of the head, which only we have, is left out."""
    names: dict[str, Tensor] = {}
    for name, gradient in measured.gradient.items():
        if name == "head.weight":
            names["score.weight"] = gradient
        elif name.startswith("backbone.model."):
            names[name.removeprefix("backbone.")] = gradient
        else:
            assert name in ("head.bias", "backbone.lm_head.weight")  # untied: a scalar model does not reach it
    return Measured(measured.loss, names)


def theirs(run: Run, step: Step, model: str, accumulate: int = 2, margin: bool = False, **options: Any) -> Measured:
    trained = run.models["reward_model"]
    config = copy.deepcopy(trained.backbone.config)
    config.num_labels = 1
    peer = CLASSES[model](config).float()
    peer.model.load_state_dict(trained.backbone.model.state_dict())
    peer.score.load_state_dict({"weight": trained.head.weight})
    rows: list[dict[str, Any]] = [dict(pair) for pair in paired_texts(step)]
    margins = [float(m) for b in step.microbatches for m in b.margin.chunk(2)[0]]  # type: ignore[union-attr]
    assert max(margins) > 1
    if margin:
        rows = [row | {"margin": m} for row, m in zip(rows, margins, strict=True)]
    return their_step(offline_trainer(PEER, peer, rows, accumulate=accumulate, **options))


@pytest.mark.parametrize("model", STARTS)
@pytest.mark.parametrize("centering", [0.0, 0.01, 0.3])
@pytest.mark.parametrize("margin", [False, True])
def test_losses(model: str, centering: float, margin: bool) -> None:
    run, step = ours(model, centering_coef=centering, use_margin=margin)
    found = theirs(run, step, model, margin=margin, center_rewards_coefficient=centering or None)
    setting = f"{'margin of the pair' if margin else 'no margin'}, centering {centering:g}"
    mine = named_as_theirs(our_step(run, step, "reward_model"))
    check("reward_model", setting, mine, found, peer=PEER, where=split(model, 2, 8))


def test_padding_is_told_by_the_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    """Departure: where the stop token is also the pad token, theirs reads the score before it, ours on it."""
    run, step = ours("gemma3", centering_coef=0.0)
    tokenizer = copy.deepcopy(peer_tokenizer())
    tokenizer.pad_token = "<end_of_turn>"
    monkeypatch.setattr("tests.conformance.peer.peer_tokenizer", lambda: tokenizer)
    found = theirs(run, step, "gemma3")
    at_the_stop = named_as_theirs(our_step(run, step, "reward_model"))
    cut = Step(tuple(before_the_stop(b) for b in step.microbatches), step.normaliser)
    before_it = named_as_theirs(our_step(run, cut, "reward_model"))
    assert not gap(at_the_stop, found).small
    note = "pad = stop: trl reads the score one token early; agrees when ours drops the stop token too"
    check("reward_model", "pad token = stop token", before_it, found, peer=PEER, where=split("gemma3", 2, 8), note=note)


def before_the_stop(batch: Batch) -> Batch:
    """The batch as if no row had its last token."""
    mask = batch.attention_mask
    shorter = mask & torch.cat([mask[:, 1:], torch.zeros_like(mask[:, :1])], 1)
    return dataclasses.replace(batch, attention_mask=shorter, shapes=None)


def test_mutants() -> None:
    """The pairs turned round; a sum instead of a mean; the margin or the centering forgotten."""
    run, step = ours("gemma3", centering_coef=0.1, use_margin=True)
    right = theirs(run, step, "gemma3", margin=True, center_rewards_coefficient=0.1)

    def distance(run: Run, step: Step) -> bool:
        return gap(named_as_theirs(our_step(run, step, "reward_model")), right).small

    assert distance(run, step)
    turned = tuple(b.select(torch.arange(len(b)).roll(len(b) // 2)) for b in step.microbatches)
    assert not distance(run, dataclasses.replace(step, microbatches=turned))
    assert not distance(run, dataclasses.replace(step, normaliser=1.0))
    assert not distance(*ours("gemma3", centering_coef=0.1))
    assert not distance(*ours("gemma3", use_margin=True, centering_coef=0.0))
