"""Rejection sampling: which completions are kept, by hand; then the plain negative log-likelihood of these alone."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch.testing import assert_close

from alignlab.algorithms import rejection as module
from alignlab.algorithms.sft import SFT
from alignlab.generate import Sampling
from alignlab.rollout import Reward
from alignlab.types import Completion, Group, LoopState, Prompt, Rollout, Row
from tests.algorithms.world import (
    MAX_TOKENS,
    Run,
    collect,
    fixed,
    flat,
    loss_and_gradient,
    mutant,
    nudge,
    numbers,
    policy,
    raw_entropies,
    raw_logprobs,
    rollout,
    source,
    start_run,
)
from tests.tolerances import EXACT, FLOAT64

FOUR_BY_THREE = {"prompts_per_phase": 4, "group_size": 3}
NAN = math.nan


@pytest.fixture
def rejection() -> Any:
    return module.ALGORITHM


def group(*rewards: float, stop: Sequence[bool] | None = None) -> Group:
    """Siblings with these rewards, named a, b, c, ... in sampling order."""
    stops = stop or [True] * len(rewards)
    prompt = Prompt(messages=(), id="p")
    return Group(
        rollouts=tuple(
            Rollout(
                prompt=prompt,
                prompt_ids=(2,),
                completion=Completion(
                    token_ids=(i + 5, 4), logprobs=(0.0, 0.0), finish_reason="stop" if s else "length", text="abcdef"[i]
                ),
                reward=reward,
                breakdown={},
            )
            for i, (reward, s) in enumerate(zip(rewards, stops, strict=True))
        )
    )


def names(algorithm: Any, *groups: Group) -> list[str]:
    """What is kept of each group, as text; scores as the method shapes them."""
    scores, _ = algorithm.scores(groups, torch.zeros((), dtype=torch.float64), LoopState(seed=0), 8)
    return ["".join(r.completion.text for r in kept.rollouts) for kept in algorithm.kept(groups, scores)]


# ---- what is kept ----------------------------------------------------------------------------------------------------


def test_the_best_of_each_group(rejection: Any) -> None:
    assert names(rejection(), group(1, 3, 2), group(0.5, 0.1, 0.2)) == ["b", "a"]
    assert names(rejection(keep=2), group(1, 3, 2), group(0.5, 0.1, 0.2)) == ["bc", "ac"]


def test_equal_rewards_are_taken_in_sampling_order(rejection: Any) -> None:
    assert names(rejection(), group(1, 3, 3), group(0, 0, 1)) == ["b", "c"]
    assert names(rejection(keep=2), group(2, 1, 2, 2), group(1, 1, 1, 2)) == ["ac", "da"]


def test_what_is_good_enough(rejection: Any) -> None:
    """STaR and ReST: all at or above the threshold; with `keep`, the best of these."""
    groups = group(1, 0, 1), group(0, 0.5, 0.2), group(0, 0.9, 1.5)
    assert names(rejection(keep=None, min_reward=1.0), *groups) == ["ac", "c"]
    assert names(rejection(keep=None, min_reward=0.5), *groups) == ["ac", "b", "cb"]
    assert names(rejection(keep=1, min_reward=0.5), *groups) == ["a", "b", "c"]
    assert names(rejection(keep=1, min_reward=2.0), *groups) == []


def test_groups_that_agree_are_dropped_unless_wanted(rejection: Any) -> None:
    """All right and all wrong alike; with the option off, the first of them, or all that are good enough."""
    groups = group(1, 1, 1), group(0, 0, 0), group(0, 1, 0)
    assert names(rejection(), *groups) == ["b"]
    assert names(rejection(drop_constant=False), *groups) == ["a", "a", "b"]
    assert names(rejection(drop_constant=False, keep=None, min_reward=1.0), *groups) == ["abc", "b"]


def test_what_no_reward_judged_is_never_kept(rejection: Any) -> None:
    """Nor does it make a group differ: one judged completion agrees with itself."""
    assert names(rejection(keep=2), group(NAN, 1, 2), group(NAN, 1, NAN), group(NAN, NAN, NAN)) == ["cb"]
    assert names(rejection(keep=2, drop_constant=False), group(NAN, 1, NAN), group(NAN, NAN, NAN)) == ["b"]


def test_penalties_decide_where_rewards_do_not(rejection: Any) -> None:
    """A cut-off sibling of the same reward: with a penalty the group no longer agrees."""
    cut = group(1, 1, 1, stop=[False, True, True]), group(3, 2, 1, stop=[False, True, True])
    assert names(rejection(), *cut) == ["a"]
    assert names(rejection(missing_stop_penalty=1.5), *cut) == ["b", "b"]
    assert names(rejection(missing_stop_penalty=1.5, keep=None, min_reward=1.2), *cut) == ["ba"]
    assert names(rejection(missing_stop_penalty=1.5, score_clip=1.0), *cut) == ["b"]  # (1.5, 2, 1) become (1, 1, 1)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"keep": None}, "nothing would be rejected"),
        ({"keep": 8, "group_size": 8}, r"keep \(8\) must be below group_size \(8\), or min_reward"),
        ({"group_size": 1, "keep": None, "min_reward": 1.0}, "a group of one is constant"),
    ],
)
def test_settings_that_cannot_work_are_refused(rejection: Any, options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        rejection(**options)
    assert rejection(group_size=1, keep=None, min_reward=1.0, drop_constant=False)


# ---- the loss --------------------------------------------------------------------------------------------------------


def by_hand(run: Run, keep: int = 1) -> tuple[list[Rollout], list[Rollout]]:
    """(kept, all) rollouts of the next phase: sorted by NumPy, groups that agree left out."""
    phase, _ = run.algorithm.collect(run.models, run.source, run.state)
    kept = []
    for g in phase.groups:
        rewards = np.array([r.reward for r in g.rollouts])
        if rewards.min() < rewards.max():
            kept += [g.rollouts[i] for i in np.argsort(-rewards, kind="stable")[:keep]]
    return kept, [r for g in phase.groups for r in g.rollouts]


@pytest.mark.parametrize("keep", [1, 2])
def test_loss_is_the_mean_nll_of_the_tokens_that_were_kept(rejection: Any, keep: int) -> None:
    run = start_run(rejection(**FOUR_BY_THREE, keep=keep))
    kept, everything = by_hand(run, keep)
    assert 2 * keep <= len(kept) < len(everything)
    step = collect(run)[0]
    nudge(run.models["policy"], 0.05)
    rows = [Row(prompt_ids=r.prompt_ids, completion_ids=r.completion.token_ids) for r in kept]
    (whole,) = source(microbatch_rows=64).plan_rows(rows)
    logprobs = np.concatenate(numbers(raw_logprobs(run.models["policy"], whole)))
    assert keep == 1 or len({len(r.completion.token_ids) for r in kept}) > 1
    loss, gradient = loss_and_gradient(run, step)
    assert_close(loss, float(-logprobs.mean()), **FLOAT64)
    (-torch.cat(raw_logprobs(run.models["policy"], whole)).mean()).backward()
    expected = {name: p.grad for name, p in run.models["policy"].named_parameters()}
    assert flat(gradient).norm() > 0.1
    assert_close(flat(gradient), flat(expected), **FLOAT64)


def test_it_is_sft_on_what_was_kept(rejection: Any) -> None:
    """The step of SFT, which knows no reward, on the same rows: the same loss and gradient, digit for digit."""
    run = start_run(rejection(**FOUR_BY_THREE), microbatch_rows=64)
    kept, _ = by_hand(run)
    rows = [Row(prompt_ids=r.prompt_ids, completion_ids=r.completion.token_ids) for r in kept]
    other = start_run(SFT(examples_per_step=len(rows)), microbatch_rows=64, examples=rows)
    for ours, theirs in zip(loss_and_gradient(run, collect(run)[0]), loss_and_gradient(other, collect(other)[0]),
                            strict=True):  # fmt: skip
        if isinstance(ours, float):
            assert_close(ours, theirs, **FLOAT64)
        else:
            assert_close(flat(ours), flat(theirs), **FLOAT64)


def test_only_the_order_of_rewards_counts(rejection: Any) -> None:
    """A monotone transformation of the reward trains the same step; its opposite does not."""

    def reward(change: Any) -> list[Reward]:
        def judge(prompts: Sequence[Prompt], completions: Sequence[Completion]) -> list[float | None]:
            return [change(len(c.token_ids) + c.token_ids[0] / 100) for c in completions]

        return [Reward(name="mine", function=judge, weight=1.0)]

    def step(change: Any) -> torch.Tensor:
        run = start_run(rejection(**FOUR_BY_THREE), rewards=reward(change))
        return flat(loss_and_gradient(run, collect(run)[0])[1])

    assert_close(step(lambda x: x), step(lambda x: math.exp(x) - 40), **EXACT)
    assert (step(lambda x: x) - step(lambda x: -x)).norm() > 0.1


def test_epochs_are_steps_on_the_same_rows(rejection: Any) -> None:
    run = start_run(rejection(**FOUR_BY_THREE, epochs=3, learning_rate=0.01))
    steps = collect(start_run(rejection(**FOUR_BY_THREE, epochs=3)))
    assert len(steps) == 3 and steps[0] is steps[1] is steps[2]
    run.go(1)
    nll = run.column("policy/nll")
    assert len(nll) == 3 and nll[0] > nll[1] > nll[2]


def test_the_temperature_is_of_the_samples_and_not_of_the_loss(rejection: Any) -> None:
    run = start_run(rejection(**FOUR_BY_THREE, temperature=0.5), sampling=Sampling(temperature=0.5,
                    max_completion_tokens=MAX_TOKENS))  # fmt: skip
    kept, _ = by_hand(run)
    (whole,) = source(microbatch_rows=64).plan_rows(
        [Row(prompt_ids=r.prompt_ids, completion_ids=r.completion.token_ids) for r in kept]
    )
    loss = loss_and_gradient(run, collect(run)[0])[0]
    assert_close(loss, float(-np.concatenate(numbers(raw_logprobs(run.models["policy"], whole))).mean()), **FLOAT64)


# ---- phases ----------------------------------------------------------------------------------------------------------


def test_metrics_by_hand(rejection: Any) -> None:
    run = start_run(rejection(prompts_per_phase=8, group_size=3, keep=2))
    kept, everything = by_hand(run, keep=2)
    before = policy()
    metrics = run.go(1)[0].metrics
    rewards = [r.reward for r in kept]
    assert_close(metrics["rejection/kept_fraction"], len(kept) / 24, **FLOAT64)
    assert_close(metrics["rejection/kept_reward"], float(np.mean(rewards)), **FLOAT64)
    assert_close(metrics["reward/mean"], float(np.mean([r.reward for r in everything])), **FLOAT64)
    assert metrics["rejection/kept_reward"] > metrics["reward/mean"]
    assert metrics["rejection/best_score"] == max(r.reward for r in everything)
    (whole,) = source(microbatch_rows=64).plan_rows(
        [Row(prompt_ids=r.prompt_ids, completion_ids=r.completion.token_ids) for r in kept]
    )
    assert_close(metrics["policy/nll"], -np.concatenate(numbers(raw_logprobs(before, whole))).mean(), **FLOAT64)
    entropies = np.concatenate(numbers(raw_entropies(before, whole)))
    assert_close(metrics["policy/entropy"], entropies.mean(), **FLOAT64)
    assert metrics["ledger/completions"] == 24.0 and run.state.counters["trained_rows"] == len(kept)


def test_a_phase_in_which_nothing_is_kept_trains_nothing_and_is_logged(rejection: Any) -> None:
    same = Reward(name="same", function=lambda prompts, completions: [0.3] * len(prompts), weight=1.0)
    run = start_run(rejection(**FOUR_BY_THREE), rewards=[same])
    before = [p.clone() for p in run.models["policy"].parameters()]
    run.go(2)
    assert all(torch.equal(a, b) for a, b in zip(before, run.models["policy"].parameters(), strict=True))
    assert run.state.phase == 2 and run.state.step == 0 and run.state.counters["completions"] == 24
    assert [row["rejection/kept_fraction"] for row in run.recorder.rows] == [0.0, 0.0]
    assert all(math.isnan(row["rejection/kept_reward"]) for row in run.recorder.rows)
    assert run.column("rejection/best_score") == [pytest.approx(0.3)] * 2


def test_samples_come_from_the_policy_of_the_phase(rejection: Any) -> None:
    """The recorded logprobs of the second phase are those of the policy after the first."""
    run = start_run(rejection(**FOUR_BY_THREE, learning_rate=0.01))
    run.go(1)
    (batch, *_) = collect(run)[0].microbatches
    recorded = [x[m].numpy() for x, m in zip(batch.old_logprobs, batch.completion_mask, strict=True)]
    for ours, theirs in zip(recorded, numbers(raw_logprobs(run.models["policy"], batch)), strict=True):
        assert_close(ours, theirs, **FLOAT64)


def test_dropout_is_on_in_the_steps_and_off_in_sampling(rejection: Any) -> None:
    """As in supervised fine-tuning; the samples are those of the policy without it."""
    run, plain = (start_run(rejection(**FOUR_BY_THREE), dropout=d) for d in (0.5, 0.0))
    assert run.models["policy"].training
    with_dropout, without = (collect(r)[0].microbatches[0] for r in (run, plain))
    assert torch.equal(with_dropout.input_ids, without.input_ids)
    (first, _), (second, _) = (loss_and_gradient(run, collect(run)[0]) for _ in range(2))
    assert first != second


def test_fixed_groups_reach_the_step_in_any_order(rejection: Any) -> None:
    """Two prompts by hand; the second group agrees. Kept: the higher of the first, whose own tokens are averaged."""
    model = policy()
    first, second = (
        rollout(model, "1+1", text, reward=r, shift=(0.0,) * (len(text) + 1)) for text, r in (("two", 0.2), ("2", 0.9))
    )
    dull = rollout(model, "3", "x", reward=0.5, shift=(0.0, 0.0))
    groups = (Group(rollouts=(first, second)), Group(rollouts=(dull, replace(dull))))
    run = start_run(rejection(prompts_per_phase=2, group_size=2))
    run.source = fixed(groups)
    (step,) = collect(run)
    assert step.normaliser == 2.0 and sum(len(b) for b in step.microbatches) == 1
    expected = -(torch.cat(raw_logprobs(model, step.microbatches[0])).sum() / 2).item()
    assert_close(loss_and_gradient(run, step)[0], expected, **FLOAT64)


def test_learns(rejection: Any) -> None:
    run = start_run(rejection(prompts_per_phase=4, group_size=8, learning_rate=1e-2), microbatch_rows=32)
    run.go(12)
    rewards = run.column("reward/mean")
    assert np.mean(rewards[-3:]) > np.mean(rewards[:3]) + 0.1


def test_formula_is_the_executed_loss(rejection: Any) -> None:
    run = start_run(rejection(**FOUR_BY_THREE), microbatch_rows=64)
    (step,) = collect(run)
    (batch,) = step.microbatches
    rows = numbers(raw_logprobs(run.models["policy"], batch))
    names = {"sum": np.sum, "mask": 1.0, "logprobs": np.concatenate(rows), "completion_tokens": step.normaliser}
    for line in run.algorithm.formula():
        exec(line, names)
    assert_close(loss_and_gradient(run, step)[0], float(names["loss"]), **FLOAT64)


@pytest.mark.parametrize(
    "text, replacement, test, arguments",
    [
        ("key=lambda i: -own[i]", "key=lambda i: own[i]", test_the_best_of_each_group, ()),
        ("key=lambda i: -own[i]", "key=lambda i: (-own[i], -i)", test_equal_rewards_are_taken_in_sampling_order, ()),
        ("[: self.keep]", "[:1]", test_the_best_of_each_group, ()),
        ("own[i] >= self.min_reward", "own[i] > self.min_reward", test_what_is_good_enough, ()),
        ("<= 1:", "<= 0:", test_groups_that_agree_are_dropped_unless_wanted, ()),
        ("if self.drop_constant and len({", "if len({", test_groups_that_agree_are_dropped_unless_wanted, ()),
        ("if not math.isnan(own[i])", "", test_what_no_reward_judged_is_never_kept, ()),
        ("own, of_all = of_all[:size], of_all[size:]", "own = of_all[:size]", test_the_best_of_each_group, ()),
        ("aggregate(-scores.logprobs", "aggregate(scores.logprobs",
         test_loss_is_the_mean_nll_of_the_tokens_that_were_kept, (1,)),
        (
            "aggregate(-scores.logprobs, batch.completion_mask)",
            "aggregate(-scores.logprobs, batch.completion_mask, 'sequence')",
            test_loss_is_the_mean_nll_of_the_tokens_that_were_kept,
            (2,),
        ),
        ("source.batch(kept, like.dtype)", "source.batch(groups, like.dtype)", test_it_is_sft_on_what_was_kept, ()),
        ("batch, entropy=True)", "batch, entropy=True, temperature=self.temperature)",
         test_the_temperature_is_of_the_samples_and_not_of_the_loss, ()),
        ("if not kept:", "if False:", test_a_phase_in_which_nothing_is_kept_trains_nothing_and_is_logged, ()),
        ("len(rewards) / total", "len(kept) / total", test_metrics_by_hand, ()),
        ("dropout: ClassVar[bool] = True", "dropout: ClassVar[bool] = False",
         test_dropout_is_on_in_the_steps_and_off_in_sampling, ()),
    ],
)  # fmt: skip
def test_mutants_are_noticed(text: str, replacement: str, test: Any, arguments: tuple[Any, ...]) -> None:
    changed = mutant(module, text, replacement)
    with pytest.raises((AssertionError, ValueError)):
        test(changed, *arguments)
