"""One optimiser step is one number and one gradient, however its rows are split, whatever stands outside the masks."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from alignlab.algorithms import (
    distill,
    dpo,
    grpo,
    kto,
    online_dpo,
    orpo,
    ppo,
    rejection,
    reward_model,
    sft,
    simpo,
)
from alignlab.rollout import Reward
from alignlab.types import Batch, Completion, Prompt, Step
from tests.algorithms.world import Run, collect, fill, flat, loss_and_gradient, mutant, nudge, start_run, template
from tests.tolerances import FLOAT64

SFT, RM, DPO, PPO, GRPO = (m.ALGORITHM for m in (sft, reward_model, dpo, ppo, grpo))
REJECTION, DISTILL = (m.ALGORITHM for m in (rejection, distill))
SIMPO, ORPO, KTO, ONLINE_DPO = (m.ALGORITHM for m in (simpo, orpo, kto, online_dpo))
EIGHT_PAIRS = {"prompts_per_phase": 8, "group_size": 3}
EIGHT = {"prompts_per_phase": 4, "group_size": 2}
MANY = {"prompts_per_phase": 8, "group_size": 8}
"""So that enough completions stop by themselves."""
MOVED = {"clip_low": 0.1, "clip_high": 0.05}
KINDS = ("token", "sequence", "constant")
CASES = {
    "sft": SFT(examples_per_step=8),
    "sft/prompt_weight": SFT(examples_per_step=8, prompt_weight=0.3),
    "reward_model": RM(pairs_per_step=8, use_margin=True, centering_coef=0.1),
    "reward_model/smoothed": RM(pairs_per_step=8, use_margin=True, centering_coef=0.1, label_smoothing=0.2),
    "dpo/sigmoid": DPO(pairs_per_step=8),
    "dpo/smoothed": DPO(pairs_per_step=8, label_smoothing=0.1),
    "dpo/hinge": DPO(pairs_per_step=8, loss_kind="hinge"),
    **{f"dpo/{variant}": DPO(pairs_per_step=8, variant=variant) for variant in DPO.VARIANTS},
    "simpo": SIMPO(pairs_per_step=8),
    "orpo": ORPO(pairs_per_step=8),
    "kto": KTO(examples_per_step=8, beta=0.5, desirable_weight=1.3),
    "online_dpo": ONLINE_DPO(**EIGHT_PAIRS),
    "online_dpo/rpo": ONLINE_DPO(**EIGHT_PAIRS, variant="rpo"),
    "ppo/own": PPO(**EIGHT, **MOVED, entropy_coef=0.01, value_clip=0.03),
    "ppo/shared": PPO(**EIGHT, **MOVED, critic="shared", reward_placement="dense", at_cutoff="bootstrap"),
    "rejection": REJECTION(prompts_per_phase=8, group_size=3, drop_constant=False),
    **{f"distill/{kind}": DISTILL(**EIGHT, **MOVED, aggregation=kind, gamma=0.5) for kind in KINDS},
    **{f"distill/full/{kind}": DISTILL(**EIGHT, objective="full", aggregation=kind) for kind in KINDS},
    **{f"grpo/{kind}": GRPO(**EIGHT, **MOVED, aggregation=kind) for kind in KINDS},
    **{f"grpo/{kind}/kl": GRPO(**EIGHT, **MOVED, aggregation=kind, kl_coef=0.2) for kind in KINDS},
    **{f"grpo/{kind}/sequence": GRPO(**EIGHT, **MOVED, aggregation=kind, surrogate="sequence") for kind in KINDS},
    **{f"grpo/{kind}/cispo": GRPO(**EIGHT, **MOVED, aggregation=kind, surrogate="cispo") for kind in KINDS},
    **{f"grpo/{kind}/mask_truncated": GRPO(**MANY, **MOVED, aggregation=kind, mask_truncated=True) for kind in KINDS},
    **{f"grpo/{kind}/kl_threshold": GRPO(**EIGHT, **MOVED, aggregation=kind, kl_coef=0.2, kl_threshold=0.06)
       for kind in KINDS},
    "grpo/dual_clip": GRPO(**EIGHT, **MOVED, dual_clip=1.06),
    "grpo/leave_one_out": GRPO(**EIGHT, **MOVED, baseline="leave_one_out"),
    "grpo/ema": GRPO(**EIGHT, **MOVED, baseline="ema", scale="batch"),
    "grpo/normalise_components": GRPO(**EIGHT, **MOVED, normalise_components=True, missing_stop_penalty=0.5),
    "grpo/entropy": GRPO(**EIGHT, **MOVED, entropy_coef=0.1),
    "grpo/kl_in_reward": GRPO(**EIGHT, **MOVED, kl_placement="reward", kl_coef=0.2, kl_estimator="k1"),
    **{f"grpo/{variant}": GRPO(**(MANY if variant == "dapo" else EIGHT), variant=variant) for variant in GRPO.VARIANTS},
    **{f"ppo/{kind}": PPO(**EIGHT, **MOVED, kl_placement="loss", kl_coef=0.2, kl_estimator=kind)
       for kind in ("k1", "k2", "k3")},
    "ppo/kl_threshold": PPO(**EIGHT, **MOVED, kl_placement="loss", kl_coef=0.2, kl_estimator="k3", kl_threshold=0.06),
    "ppo/dual_clip": PPO(**EIGHT, **MOVED, dual_clip=1.06),
    **{f"ppo/{kind}": PPO(**EIGHT, **MOVED, reward_placement="dense", dense_reward=kind)
       for kind in ("share", "potential", "given")},
    "ppo/value_clip_none": PPO(**EIGHT, **MOVED, value_clip=None, entropy_coef=0.1),
    "ppo/reward_model": PPO(**EIGHT, **MOVED, critic="reward_model", whiten_rewards=True),
}  # fmt: skip


def digit_scores(prompts: Sequence[Prompt], completions: Sequence[Completion]) -> list[list[float]]:
    """Token by token: a digit earns 1, anything else nothing."""
    return [[float(template().decode([t]).isdigit()) for t in c.token_ids] for c in completions]


def of_pairs(algorithm: Any) -> bool:
    """Whether two rows of a microbatch make one term of the loss."""
    return algorithm.data_kind == "pairs" or algorithm.name == "online_dpo"


def first_step(algorithm: Any, rows: int) -> tuple[Run, Step]:
    """The first step of a phase in microbatches of `rows` rows (or pairs), on weights that have moved since."""
    rewards = {"rewards": [Reward(name="digits", function=digit_scores, weight=1.0)]}
    scored = rewards if getattr(algorithm, "dense_reward", "") == "given" else {}
    run = start_run(algorithm, microbatch_rows=2 * rows if of_pairs(algorithm) else rows, **scored)
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
        sizes = [len(b) // (2 if of_pairs(algorithm) else 1) for b in step.microbatches]
        count = sum(sizes)
        assert 4 < count < 64 if getattr(algorithm, "mask_truncated", False) else count == 8
        assert sizes == [min(rows, count - i) for i in range(0, count, rows)]
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
            "return LossOutput(total, sums, identities)",
            "return LossOutput(total / pairs, sums, identities)",
            {"pairs_per_step": 8},
        ),
        (simpo, "LossOutput(terms.sum()", "LossOutput(terms.mean()", {"pairs_per_step": 8}),
        (orpo, "LossOutput(terms.sum()", "LossOutput(terms.mean()", {"pairs_per_step": 8}),
        (
            orpo,
            "terms = -chosen +",
            "terms = -halves(totals)[0].sum() / halves(row_tokens(batch))[0].sum() +",
            {"pairs_per_step": 8},
        ),
        (kto, "LossOutput(terms.sum(), sums, id", "LossOutput(terms.mean(), sums, id", {"examples_per_step": 8}),
        (
            online_dpo,
            "Step(pieces, float(len(chosen)))",
            "Step(pieces, float(len(pieces[0])))",
            EIGHT_PAIRS,
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
        (
            rejection,
            "Step(pieces, completion_tokens(pieces))",
            "Step(pieces, completion_tokens(pieces[:1]))",
            {"prompts_per_phase": 8, "group_size": 3, "drop_constant": False},
        ),
        (distill, "aggregate(terms, mask, self.aggregation)", "aggregate(terms, mask) / len(batch)", EIGHT),
        (
            distill,
            "aggregate(divergence, mask, self.aggregation)",
            "aggregate(divergence, mask, normaliser=float(mask.sum()))",
            {**EIGHT, "objective": "full"},
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


MASKED = ("dpo", "kto", "online_dpo", "ppo", "grpo", "distill", "rejection")


@pytest.mark.parametrize("name", [name for name in CASES if name.split("/")[0] in MASKED])
def test_nothing_outside_the_completion_reaches_loss_or_gradient(name: str) -> None:
    check_poison(CASES[name])


@pytest.mark.parametrize(
    "module, text, replacement, options",
    [
        (
            dpo,
            "row_sums(batch.reference_logprobs, batch)",
            "batch.reference_logprobs.sum(-1)",
            {"pairs_per_step": 8},
        ),
        (
            kto,
            "row_sums(logprobs - batch.reference_logprobs, batch)",
            "(logprobs - batch.reference_logprobs).sum(-1)",
            {"examples_per_step": 8},
        ),
        (ppo, "aggregate(terms, mask)", "terms.sum()", EIGHT),
        (grpo, "aggregate(terms, mask, self.aggregation)", "(terms.sum(-1) / mask.sum(-1)).sum()", EIGHT),
        (distill, "aggregate(terms, mask, self.aggregation)", "terms.sum()", EIGHT),
        (
            grpo,
            "self.token_kl(scores.logprobs, batch.reference_logprobs, mask)",
            "self.token_kl(scores.logprobs, batch.reference_logprobs, mask | True)",
            {**EIGHT, "kl_coef": 0.2, "kl_threshold": 0.0},
        ),
        (
            ppo,
            "self.token_kl(scores.logprobs, batch.reference_logprobs, mask)",
            "self.token_kl(scores.logprobs, batch.reference_logprobs, mask | True)",
            {**EIGHT, "kl_coef": 0.2, "kl_placement": "loss", "kl_threshold": 0.0},
        ),
        (
            grpo,
            "sequence_log_ratio(log_ratio, mask)",
            "sequence_log_ratio(scores.logprobs - batch.old_logprobs, mask | True)",
            {**EIGHT, "surrogate": "sequence"},
        ),
    ],
)
def test_dropped_masks_are_noticed(module: Any, text: str, replacement: str, options: dict[str, Any]) -> None:
    changed = mutant(module, text, replacement)(**options)
    with pytest.raises(AssertionError):
        check_poison(changed)
