"""One optimiser step is one number and one gradient, however its rows are split, whatever stands outside the masks."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from alignlab.algorithms import dpo, grpo, ppo, reward_model, sft
from alignlab.types import Batch, Step
from tests.algorithms.world import Run, collect, fill, flat, loss_and_gradient, mutant, nudge, start_run
from tests.tolerances import FLOAT64

SFT, RM, DPO, PPO, GRPO = (m.ALGORITHM for m in (sft, reward_model, dpo, ppo, grpo))
EIGHT = {"prompts_per_phase": 4, "group_size": 2}
MOVED = {"clip_low": 0.1, "clip_high": 0.05}
KINDS = ("token", "sequence", "constant")
CASES = {
    "sft": SFT(examples_per_step=8),
    "sft/prompt_weight": SFT(examples_per_step=8, prompt_weight=0.3),
    "reward_model": RM(pairs_per_step=8, use_margin=True, centering_coef=0.1),
    "dpo/sigmoid": DPO(pairs_per_step=8),
    "dpo/smoothed": DPO(pairs_per_step=8, label_smoothing=0.1),
    "dpo/hinge": DPO(pairs_per_step=8, loss_kind="hinge"),
    "dpo/ipo": DPO(pairs_per_step=8, loss_kind="ipo", average_logprobs=True),
    "ppo/own": PPO(**EIGHT, **MOVED, entropy_coef=0.01, value_clip=0.03),
    "ppo/shared": PPO(**EIGHT, **MOVED, critic="shared", reward_placement="dense", at_cutoff="bootstrap"),
    **{f"grpo/{kind}": GRPO(**EIGHT, **MOVED, aggregation=kind) for kind in KINDS},
    **{f"grpo/{kind}/kl": GRPO(**EIGHT, **MOVED, aggregation=kind, kl_coef=0.2) for kind in KINDS},
}  # fmt: skip


def first_step(algorithm: Any, rows: int) -> tuple[Run, Step]:
    """The first step of a phase in microbatches of `rows` rows (or pairs), on weights that have moved since."""
    run = start_run(algorithm, microbatch_rows=2 * rows if algorithm.data_kind == "pairs" else rows)
    if "value_model" in run.models:
        fill(run.models["value_model"].head, 78)
    step = collect(run)[0]
    nudge(next(iter(run.models.values())), 0.05)
    return run, step


def check_splits(algorithm: Any) -> None:
    """8 x 1 = 4 x 2 = 1 x 8, rows of unequal lengths."""
    whole = None
    for rows in (8, 2, 1):
        run, step = first_step(algorithm, rows)
        assert [len(b) for b in step.microbatches] == [rows * (2 if algorithm.data_kind == "pairs" else 1)] * (
            8 // rows
        )
        loss, gradient = loss_and_gradient(run, step)
        lengths = {int(n) for b in step.microbatches for n in b.attention_mask.sum(-1)}
        assert len(lengths) > 3 and flat(gradient).norm() > 1e-3
        if whole is None:
            whole = loss, gradient
        assert_close(loss, whole[0], **FLOAT64)
        assert_close(flat(gradient), flat(whole[1]), **FLOAT64)


@pytest.mark.parametrize("algorithm", CASES.values(), ids=CASES.keys())
def test_splits(algorithm: Any) -> None:
    check_splits(algorithm)


@pytest.mark.parametrize(
    "module, text, replacement, options",
    [
        (
            sft,
            "aggregate(nll, batch.completion_mask)",
            "len(batch) * aggregate(nll, batch.completion_mask, normaliser=float(batch.completion_mask.sum()))",
            {"examples_per_step": 8},
        ),
        (reward_model, "terms.sum()", "terms.mean()", {"pairs_per_step": 8}),
        (
            dpo,
            "return LossOutput(terms.sum(), sums, identities)",
            "return LossOutput(terms.mean(), sums, identities)",
            {"pairs_per_step": 8},
        ),
        (ppo, "aggregate(terms, mask)", "aggregate(terms, mask, normaliser=float(mask.sum()))", EIGHT),
        (
            ppo,
            "advantages = masked_whiten(advantages, mask)",
            "advantages = masked_whiten(advantages, mask) * len(source.microbatches(batch))",
            EIGHT,
        ),
        (
            grpo,
            "aggregate(terms, mask, self.aggregation)",
            "aggregate(terms, mask, self.aggregation, normaliser=float(mask.sum()))",
            EIGHT,
        ),
        (grpo, '"sequence": completion_rows(pieces)', '"sequence": float(len(pieces))', EIGHT),
    ],
)
def test_split_mutants_are_noticed(module: Any, text: str, replacement: str, options: dict[str, Any]) -> None:
    """A mean over the microbatch instead of the step is the classic."""
    changed = mutant(module, text, replacement)(**options)
    with pytest.raises(AssertionError):
        check_splits(changed)


def poisoned(batch: Batch) -> Batch:
    """NaN in every per-token tensor, wherever nothing is trained."""
    outside = ~batch.completion_mask
    names = [n for n, v in batch.tensors().items() if v.is_floating_point() and v.dim() == 2]
    return replace(batch, **{n: getattr(batch, n).masked_fill(outside, math.nan) for n in names})


def check_poison(algorithm: Any) -> None:
    run, step = first_step(algorithm, 4)
    loss, gradient = loss_and_gradient(run, step)
    bad = Step(tuple(poisoned(b) for b in step.microbatches), step.normaliser)
    bad_loss, bad_gradient = loss_and_gradient(run, bad)
    assert bad_loss == loss
    assert torch.equal(flat(bad_gradient), flat(gradient))
    output = run.algorithm.loss(run.models, bad.microbatches[0], run.state)
    assert all(math.isfinite(v) for v in output.identities.values())
    assert all(math.isfinite(total) for total, _ in output.sums.values())


@pytest.mark.parametrize("name", [name for name in CASES if name.split("/")[0] in ("dpo", "ppo", "grpo")])
def test_nothing_outside_the_completion_reaches_loss_or_gradient(name: str) -> None:
    check_poison(CASES[name])


@pytest.mark.parametrize(
    "module, text, replacement, options",
    [
        (dpo, "torch.where(batch.completion_mask, logprobs, 0).sum(-1)", "logprobs.sum(-1)", {"pairs_per_step": 8}),
        (ppo, "aggregate(terms, mask)", "terms.sum()", EIGHT),
        (grpo, "aggregate(terms, mask, self.aggregation)", "(terms.sum(-1) / mask.sum(-1)).sum()", EIGHT),
        (
            grpo,
            "drift = torch.where(mask, scores.logprobs - batch.reference_logprobs, 0.0)",
            "drift = scores.logprobs - batch.reference_logprobs",
            {**EIGHT, "kl_coef": 0.2},
        ),
    ],
)
def test_dropped_masks_are_noticed(module: Any, text: str, replacement: str, options: dict[str, Any]) -> None:
    changed = mutant(module, text, replacement)(**options)
    with pytest.raises(AssertionError):
        check_poison(changed)
