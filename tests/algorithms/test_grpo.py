"""GRPO against eq. 3 and 4 of arXiv:2402.03300, from rewards, recorded logprobs and raw log-softmaxes."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from alignlab.algorithms import grpo as module
from alignlab.generate import Sampling
from alignlab.rollout import Reward
from alignlab.train import RunError
from alignlab.types import Batch, Completion, Prompt, Step
from tests.algorithms.world import (
    MAX_TOKENS,
    Run,
    collect,
    digit_share,
    flat,
    loss_and_gradient,
    mutant,
    nudge,
    numbers,
    raw_entropies,
    raw_logprobs,
    rows_of,
    slipping,
    start_run,
)
from tests.tolerances import EXACT, FLOAT64

FOUR_BY_THREE = {"prompts_per_phase": 4, "group_size": 3}


@pytest.fixture
def grpo() -> Any:
    return module.ALGORITHM


def key(batch: Batch, row: int) -> tuple[int, ...]:
    return tuple(batch.input_ids[row][batch.attention_mask[row]].tolist())


def rewards_by_row(run: Run) -> tuple[Step, dict[tuple[int, ...], float]]:
    """The next step, and for each row of tokens its advantage by hand: (r - mean) / (sd + 1e-4) in groups of three."""
    phase, run.state = run.algorithm.collect(run.models, run.source, run.state)
    advantages = {}
    for group in phase.groups:
        rewards = np.array([r.reward for r in group.rollouts])
        for r, a in zip(group.rollouts, (rewards - rewards.mean()) / (rewards.std(ddof=1) + 1e-4), strict=True):
            advantages[(*r.prompt_ids, *r.completion.token_ids)] = float(a)
    assert len(advantages) == 12
    return phase.steps[0], advantages


@pytest.mark.parametrize("aggregation", ["token", "sequence", "constant"])
@pytest.mark.parametrize("kl", [{}, {"kl_coef": 0.3}, {"kl_coef": 0.3, "kl_estimator": "k2"}], ids=str)
def test_loss(grpo: Any, aggregation: str, kl: dict[str, Any]) -> None:
    """After an update, so that ratios are not 1 and some are clipped at .9 and 1.05."""
    run = start_run(grpo(**FOUR_BY_THREE, **kl, aggregation=aggregation, clip_low=0.1, clip_high=0.05))
    step, advantages = rewards_by_row(run)
    nudge(run.models["policy"], 0.05)
    rows, clipped_tokens, total_tokens = [], 0, 0
    for batch in step.microbatches:
        policy = numbers(raw_logprobs(run.models["policy"], batch))
        reference = numbers(raw_logprobs(run.models["reference"], batch)) if kl else policy
        for i, (new, old, ref) in enumerate(zip(policy, rows_of(batch.old_logprobs, batch), reference, strict=True)):
            ratio, advantage = np.exp(new - old), advantages[key(batch, i)]
            terms = -np.minimum(ratio * advantage, np.clip(ratio, 0.9, 1.05) * advantage)
            clipped_tokens += int((terms != -ratio * advantage).sum())
            total_tokens += len(terms)
            d = new - ref
            terms += kl.get("kl_coef", 0.0) * (d**2 / 2 if kl.get("kl_estimator") == "k2" else np.exp(-d) - 1 + d)
            rows.append(terms)
    expected = {
        "token": np.concatenate(rows).mean(),
        "sequence": np.mean([row.mean() for row in rows]),
        "constant": np.concatenate(rows).sum() / (12 * MAX_TOKENS),
    }[aggregation]
    assert len({len(row) for row in rows}) > 2 and 0.1 < clipped_tokens / total_tokens < 0.9
    assert_close(loss_and_gradient(run, step)[0], float(expected), **FLOAT64)


def test_gradient_at_ratio_one_is_reinforce(grpo: Any) -> None:
    """On the policy that sampled: the gradient of -mean over rows of mean over tokens of A log pi."""
    run = start_run(grpo(**FOUR_BY_THREE))
    step, advantages = rewards_by_row(run)
    loss, gradient = loss_and_gradient(run, step)
    for batch in step.microbatches:
        for i, logprobs in enumerate(raw_logprobs(run.models["policy"], batch)):
            (-advantages[key(batch, i)] * logprobs.mean() / 12).backward()
    by_hand = {name: p.grad for name, p in run.models["policy"].named_parameters()}
    assert flat(gradient).norm() > 0.1
    assert_close(flat(gradient), flat(by_hand), **FLOAT64)
    assert abs(loss) < 1e-12  # a group's advantages cancel; their gradients do not


@pytest.mark.parametrize("scale", ["batch", "none"])
def test_scale(grpo: Any, scale: str) -> None:
    """The advantage itself: divided by the sd of all twelve rewards, or by nothing."""
    run = start_run(grpo(**FOUR_BY_THREE, scale=scale), microbatch_rows=12)
    phase, _ = run.algorithm.collect(run.models, run.source, run.state)
    (batch,) = phase.steps[0].microbatches
    rewards = np.array([[r.reward for r in group.rollouts] for group in phase.groups])
    by_hand = (rewards - rewards.mean(1, keepdims=True)) / (rewards.std(ddof=1) + 1e-4 if scale == "batch" else 1.0)
    order = [(*r.prompt_ids, *r.completion.token_ids) for group in phase.groups for r in group.rollouts]
    for i, row in enumerate(rows_of(batch.advantages, batch)):
        assert_close(row, np.full(len(row), by_hand.flatten()[order.index(key(batch, i))]), **FLOAT64)
    assert not batch.advantages[~batch.completion_mask].any()


def test_completions_without_a_reward_have_no_advantage(grpo: Any) -> None:
    """NaN is nobody's sibling: its own advantage is 0, and the others are centred without it."""

    def first_sum_only(prompts: Sequence[Prompt], completions: Sequence[Completion]) -> list[float | None]:
        return [
            None if p.id == "sums/2+23" else float(len(c.token_ids)) for p, c in zip(prompts, completions, strict=True)
        ]

    run = start_run(grpo(prompts_per_phase=8, group_size=3, scale="none"), microbatch_rows=24,
                    rewards=[Reward(name="length", function=first_sum_only, weight=1.0)])  # fmt: skip
    phase, _ = run.algorithm.collect(run.models, run.source, run.state)
    (batch,) = phase.steps[0].microbatches
    silent = [
        (*r.prompt_ids, *r.completion.token_ids) for g in phase.groups for r in g.rollouts if math.isnan(r.reward)
    ]
    assert len(silent) == 3 and phase.metrics["reward/unjudged_fraction"] == 1 / 8
    assert phase.metrics["group/constant_fraction"] >= 1 / 8
    for i in range(24):
        if key(batch, i) in silent:
            assert not batch.advantages[i].any()
    assert batch.advantages.isfinite().all()
    assert math.isfinite(run.go(1)[0].metrics["loss/total"])


def test_groups_of_equal_rewards_give_no_gradient(grpo: Any) -> None:
    constant = Reward(name="same", function=lambda prompts, completions: [0.3] * len(prompts), weight=1.0)
    run = start_run(grpo(**FOUR_BY_THREE), rewards=[constant])
    (step,) = collect(run)
    assert_close(flat(loss_and_gradient(run, step)[1]).abs().max(), torch.tensor(0.0, dtype=torch.float64), **EXACT)
    assert run.go(1)[0].metrics["group/constant_fraction"] == 1.0


def test_metrics(grpo: Any) -> None:
    """Of the second step on the same rollouts, when the policy has moved by one step away from them."""
    settings = FOUR_BY_THREE | {"kl_coef": 0.1, "learning_rate": 0.02, "clip_low": 0.05, "clip_high": 0.05}
    once, twice = start_run(grpo(**settings)), start_run(grpo(**settings, epochs=2))
    step, advantages = rewards_by_row(twice)
    once.go(1)
    metrics = twice.go(1)[0].metrics
    new, old, ref, entropies, a = [], [], [], [], []
    for b in step.microbatches:
        new += numbers(raw_logprobs(once.models["policy"], b))
        old += rows_of(b.old_logprobs, b)
        ref += numbers(raw_logprobs(once.models["reference"], b))
        entropies += numbers(raw_entropies(once.models["policy"], b))
        a += [np.full(int(n), advantages[key(b, i)]) for i, n in enumerate(b.completion_mask.sum(-1))]
    now, before, start, advantage = (np.concatenate(x) for x in (new, old, ref, a))
    ratio, drift = np.exp(now - before), now - start
    held = ((ratio > 1.05) & (advantage > 0)) | ((ratio < 0.95) & (advantage < 0))
    assert 0 < held.mean() < 1
    assert_close(metrics["policy/entropy"], np.concatenate(entropies).mean(), **FLOAT64)
    assert_close(metrics["policy/ratio"], ratio.mean(), **FLOAT64)
    assert_close(metrics["policy/approx_kl"], (np.log(ratio) ** 2 / 2).mean(), **FLOAT64)
    assert_close(metrics["policy/clip_fraction"], held.mean(), **FLOAT64)
    assert_close(metrics["policy/kl_per_token"], drift.mean(), **FLOAT64)
    assert_close(metrics["policy/kl_per_sequence"], drift.sum() / 12, **FLOAT64)


# ---- identities ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_every_phase_starts_at_ratio_one(grpo: Any, temperature: float, lora: bool) -> None:
    """With dropout in the configuration, at both temperatures, full and LoRA, over phases that really learn."""
    run = start_run(grpo(**FOUR_BY_THREE, temperature=temperature, kl_coef=0.01, learning_rate=0.01), dropout=0.5,
                    lora=lora, sampling=Sampling(temperature=temperature, max_completion_tokens=6))  # fmt: skip
    run.go(3)
    assert_close(run.column("policy/ratio"), [1.0] * 3, **FLOAT64)
    assert_close(run.column("policy/clip_fraction"), [0.0] * 3, **EXACT)
    assert_close(run.column("policy/kl_per_token")[0], 0.0, **FLOAT64)
    assert abs(run.column("policy/kl_per_token")[2]) > 1e-4


def test_dropout_that_is_on_is_found(grpo: Any) -> None:
    run = start_run(grpo(**FOUR_BY_THREE))
    run.models["policy"].train()
    for layer in run.models["policy"].model.layers:
        layer.self_attn.attention_dropout = 0.5
    with pytest.raises(RunError, match=r"phase 0: the log ratio of policy to sampling policy is .* Look for dropout"):
        run.go(1)


def test_a_temperature_on_one_side_only_is_found(grpo: Any) -> None:
    with pytest.raises(RunError, match=r"log ratio .* a temperature on one side only"):
        start_run(grpo(**FOUR_BY_THREE, temperature=0.7)).go(1)


def test_weights_that_changed_after_sampling_are_found(grpo: Any) -> None:
    run = start_run(grpo(**FOUR_BY_THREE))
    run.go(1)
    run.source = slipping(run.source)
    with pytest.raises(RunError, match=r"phase 1: the log ratio .* weights that changed"):
        run.go(2)


def test_a_reference_that_is_another_model_is_found(grpo: Any) -> None:
    run = start_run(grpo(**FOUR_BY_THREE, kl_coef=0.1))
    nudge(run.models["reference"].requires_grad_(True), 0.01)
    with pytest.raises(RunError, match="phase 0: KL to the reference is"):
        run.go(1)


def test_learns(grpo: Any) -> None:
    run = start_run(grpo(prompts_per_phase=4, group_size=8, learning_rate=1e-2), microbatch_rows=32)
    run.go(12)
    rewards = run.column("reward/mean")
    assert np.mean(rewards[-3:]) > np.mean(rewards[:3]) + 0.1


def test_reward_function_of_this_world() -> None:
    """2 digits of 4 characters, 5 tokens: 2 / 5 + .05."""
    made = Completion(token_ids=(1,) * 5, logprobs=(0.0,) * 5, finish_reason="stop", text="a12b")
    assert_close(digit_share([], [made])[0], 0.45, **FLOAT64)


@pytest.mark.parametrize(
    "text, replacement, test, arguments",
    [
        ("terms = clipped_surrogate(", "terms = -clipped_surrogate(", test_gradient_at_ratio_one_is_reinforce, ()),
        (
            "scores.logprobs - batch.old_logprobs, 0.0)",
            "batch.old_logprobs - scores.logprobs, 0.0)",
            test_loss,
            ("token", {}),
        ),
        (
            "self.clip_low, self.clip_high)\n        is_clipped",
            "self.clip_high, self.clip_low)\n        is_clipped",
            test_loss,
            ("token", {}),
        ),
        ("+ self.kl_coef * kl", "- self.kl_coef * kl", test_loss, ("token", {"kl_coef": 0.3})),
        (
            "+ self.kl_coef * kl_estimate(scores.logprobs, batch.reference_logprobs,",
            "+ self.kl_coef * kl_estimate(batch.reference_logprobs, scores.logprobs,",
            test_loss,
            ("token", {"kl_coef": 0.3}),
        ),
        ("self.aggregation), sums", "'token'), sums", test_loss, ("sequence", {})),
        ("* source.sampling.max_completion_tokens", "", test_loss, ("constant", {})),
        ("aggregate(terms, mask,", "aggregate(terms, batch.attention_mask,", test_loss, ("sequence", {})),
        ("scale=self.scale", "scale='group'", test_scale, ("none",)),
        (
            "batch.completion_mask, advantages[:, None], 0.0",
            "batch.attention_mask, advantages[:, None], 0.0",
            test_scale,
            ("none",),
        ),
        ("advantages[:, None]", "advantages.flip(0)[:, None]", test_loss, ("token", {})),
        ("p, temperature=self.temperature)", "p, temperature=1.0)", test_every_phase_starts_at_ratio_one, (0.6, False)),
        (
            "dropout: ClassVar[bool] = False",
            "dropout: ClassVar[bool] = True",
            test_every_phase_starts_at_ratio_one,
            (1.0, False),
        ),
        ("gap(scores.logprobs, batch.old_logprobs, batch)", "0.0", test_a_temperature_on_one_side_only_is_found, ()),
        ("if state.step == 0:", "if False:", test_a_reference_that_is_another_model_is_found, ()),
        ("0.5 * log_ratio**2", "log_ratio**2", test_metrics, ()),
        ("(drift.sum().item(), float(len(batch)))", "masked_sum(drift, batch)", test_metrics, ()),
    ],
)
def test_mutants_are_noticed(text: str, replacement: str, test: Any, arguments: tuple[Any, ...]) -> None:
    changed = mutant(module, text, replacement)
    with pytest.raises((AssertionError, RunError, pytest.fail.Exception)):
        test(changed, *arguments)
