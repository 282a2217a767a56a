"""Rewards combined under their contract, groups of rollouts, and rows within limits."""

import math
import re
import signal
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from alignlab import rollout as rollout_module
from alignlab.errors import UserError
from alignlab.generate import Sampling
from alignlab.rewards import Detailed
from alignlab.rollout import (
    Limits,
    Reward,
    _enough_for_half,
    combine,
    component_tensor,
    encode_examples,
    encode_labelled,
    encode_pairs,
    fitting_prompts,
    is_constant,
    reward_tensor,
    rollout_metrics,
    sample_prompts,
    stopped_tensor,
)
from alignlab.types import Completion, Example, Group, Labelled, LoopState, Pair, Prompt, Rollout
from tests.algorithms.world import LABELLED, PROMPTS, policy, prompt, raw_logprobs, rollout, rows_of, source, template
from tests.statistics.mutants import mutated
from tests.tolerances import EXACT, FLOAT64

STATE = LoopState(seed=42, phase=3)


def completion(text: str) -> Completion:
    return Completion(token_ids=(9, 1), logprobs=(-1.0, -2.0), finish_reason="stop", text=text)


def reward(values: Any, name: str = "mine", weight: float = 1.0, tasks: tuple[str, ...] = ()) -> Reward:
    """A reward that answers `values`, whatever it is asked."""

    def function(prompts: Sequence[Prompt], completions: Sequence[Completion]) -> Any:
        return values(prompts, completions) if callable(values) else values

    return Reward(name=name, function=function, weight=weight, tasks=tasks)


TWO_PROMPTS = (prompt("1+1", task="sums"), prompt("hello", task="talk"))
TWO = (completion("2"), completion("hi there"))


# ---- combine ---------------------------------------------------------------------------------------------------------


def test_weighted_sum_of_what_applies() -> None:
    """2 * .5 + 3 * -1 = -2 for the first; the second has no `b`: 2 * .25 = .5."""
    combined = combine([reward([0.5, 0.25], "a", 2.0), reward([-1, None], "b", 3.0)], TWO_PROMPTS, TWO)
    assert combined == [(-2.0, {"a": 0.5, "b": -1.0}, None), (0.5, {"a": 0.25}, None)]


def test_token_scores_add_up() -> None:
    """Completions of two tokens. a: 2 (.5, .25) = (1, .5); b: 3 (-1, 1) = (-3, 3) for the first, the number 2 for the
    second; c: the number 4 at weight .5. Totals: 1.5 + 0 + 2 = 3.5 and 2 (.1 + .2) + 3 * 2 + 2 = 8.6; what counts by
    token is a + b for the first, a alone for the second."""
    rewards = [
        reward([[0.5, 0.25], (0.1, 0.2)], "a", 2.0),
        reward([np.array([-1, 1]), 2], "b", 3.0),
        reward([4.0, 4.0], "c", 0.5),
    ]
    first, second = combine(rewards, TWO_PROMPTS, TWO)
    assert first.reward == pytest.approx(3.5) and second.reward == pytest.approx(8.6)
    assert first.breakdown == pytest.approx({"a": 0.75, "b": 0.0, "c": 4.0})
    assert second.breakdown == pytest.approx({"a": 0.3, "b": 2.0, "c": 4.0})
    assert first.token_scores == pytest.approx((-2.0, 3.5)) and second.token_scores == pytest.approx((0.2, 0.4))
    assert combine([reward([4.0, 4.0])], TWO_PROMPTS, TWO)[0].token_scores is None


def test_nobody_has_to_judge_a_second_attempt() -> None:
    """A redraw may be at one prompt, of a task that has no reward; a whole phase of those is a broken recipe."""
    silent = [reward([1.0], tasks=("elsewhere",))]
    (judged, _) = combine(silent, TWO_PROMPTS, TWO, any_judged=False)
    assert math.isnan(judged.reward) and judged.breakdown == {} and judged.token_scores is None
    run = source(rewards=silent)
    with pytest.raises(UserError, match="judged any of 2 completions"):
        run.rollouts(policy(), 1, 2, STATE)
    (group,) = run.rollouts(policy(), 1, 2, STATE, attempt=1)
    assert all(math.isnan(r.reward) for r in group.rollouts)


def test_a_completion_nobody_judges_is_nan() -> None:
    (first, _, _), (second, breakdown, _) = combine([reward([0.5, None])], TWO_PROMPTS, TWO)
    assert first == 0.5 and math.isnan(second) and breakdown == {}


def test_tasks_restrict_what_a_function_sees() -> None:
    seen: list[Any] = []

    def talk(prompts: Sequence[Prompt], completions: Sequence[Completion]) -> list[float]:
        seen.append(([p.task for p in prompts], [c.text for c in completions]))
        return [7.0] * len(prompts)

    combined = combine([reward(talk, tasks=("talk",)), reward(talk, "none", tasks=("elsewhere",))], TWO_PROMPTS, TWO)
    assert seen == [(["talk"], ["hi there"])]
    assert math.isnan(combined[0][0]) and combined[1] == (7.0, {"mine": 7.0}, None)


def test_one_name_with_two_weights() -> None:
    """The same function for two tasks, at weights 1 and 10."""
    rewards = [reward([2.0], "exact", 1.0, ("sums",)), reward([3.0], "exact", 10.0, ("talk",))]
    assert [r for r, _, _ in combine(rewards, TWO_PROMPTS, TWO)] == [2.0, 30.0]


def test_numpy_numbers_are_numbers() -> None:
    values = [np.float32(0.5), np.int64(2)]
    assert combine([reward(values)], TWO_PROMPTS, TWO) == [(0.5, {"mine": 0.5}, None), (2.0, {"mine": 2.0}, None)]


def test_nothing_to_judge() -> None:
    assert combine([reward([])], (), ()) == []


def raises(*_: Any) -> Any:
    raise KeyError("answer\nmissing")


def raises_on_the_second(prompts: Sequence[Prompt], completions: Sequence[Completion]) -> list[float]:
    if any(c.text == "hi there" for c in completions):
        raise ValueError("no number in it")
    return [1.0] * len(prompts)


def raises_on_more_than_one(prompts: Sequence[Prompt], completions: Sequence[Completion]) -> list[float]:
    if len(prompts) > 1:
        raise RuntimeError("too many")
    return [1.0]


FIRST = r"prompt 'sums/1\+1', completion '2'"
SECOND = "prompt 'talk/hello', completion 'hi there'"


@pytest.mark.parametrize(
    "values, message",
    [
        ([1.0], f"returned 1 values for 2 completions, the first being {FIRST}"),
        ([1.0, 2.0, 3.0], "returned 3 values for 2 completions"),
        (1.0, f"returned a float for 2 completions, the first being {FIRST}"),
        ("ab", "returned a str for 2 completions"),
        (None, "returned a NoneType for 2 completions"),
        ({"a": 1, "b": 2}, "returned a dict for 2 completions"),
        (torch.ones(2), "returned a Tensor for 2 completions"),
        ([1.0, math.nan], f"returned nan for {SECOND}; a finite float or None is needed"),
        ([math.inf, 1.0], f"returned inf for {FIRST}"),
        (["1.0", 1.0], f"returned '1.0' for {FIRST}"),
        ([1.0, True], f"returned True for {SECOND}"),
        ([[1.0], 1.0], rf"returned 1 token scores for {FIRST}, which has 2 tokens; one finite float for each"),
        ([1.0, [1.0, 2.0, 3.0]], f"returned 3 token scores for {SECOND}, which has 2 tokens"),
        ([[1.0, math.nan], 1.0], rf"returned \[1.0, nan\] for {FIRST}; a finite float or None is needed"),
        ([1.0, (True, 0.0)], rf"returned \(True, 0.0\) for {SECOND}"),
        ([["1", 0.0], 1.0], rf"returned \['1', 0.0\] for {FIRST}"),
        (raises, f"raised KeyError: 'answer.nmissing' on {FIRST}"),
        (raises_on_the_second, f"raised ValueError: no number in it on {SECOND}"),
        (raises_on_more_than_one, f"raised RuntimeError: too many on 2 completions together, the first being {FIRST}"),
        (
            [None, None],
            rf"reward: no function \('mine'\) judged any of 2 completions, the first being {FIRST} of task 'sums'",
        ),
    ],
)
def test_contract(values: Any, message: str) -> None:
    with pytest.raises(UserError, match="mine") as caught:
        combine([reward([0.0, 0.0], "other")] * (values != [None, None]) + [reward(values)], TWO_PROMPTS, TWO)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=message):
        combine([reward(values)], TWO_PROMPTS, TWO)


# ---- time, and parts -------------------------------------------------------------------------------------------------


def hangs_on_the_second(prompts: Sequence[Prompt], completions: Sequence[Completion]) -> list[float]:
    if any(c.text == "hi there" for c in completions):
        time.sleep(60)
    return [1.0] * len(prompts)


def loops_and_catches(prompts: Sequence[Prompt], completions: Sequence[Completion]) -> list[float]:
    while True:
        with suppress(Exception):
            math.sqrt(-1)


def hangs_on_more_than_one(prompts: Sequence[Prompt], completions: Sequence[Completion]) -> list[float]:
    threading.Event().wait(60 if len(prompts) > 1 else 0)
    return [1.0] * len(prompts)


@pytest.mark.parametrize(
    ("function", "where"),
    [
        (hangs_on_the_second, SECOND),
        (loops_and_catches, FIRST),
        (hangs_on_more_than_one, f"2 completions together, the first being {FIRST}"),
    ],
)
def test_a_function_that_hangs_is_named_with_its_sample(function: Any, where: str) -> None:
    late = Reward(name="mine", function=function, weight=1.0, timeout=0.2)
    before, started = signal.getsignal(signal.SIGALRM), time.perf_counter()
    with pytest.raises(UserError, match=rf"reward 'mine' did not come back within 0.2 s on {where}; .*`timeout`"):
        combine([late], TWO_PROMPTS, TWO)
    assert time.perf_counter() - started < 5
    assert signal.getsignal(signal.SIGALRM) is before and signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_a_limit_that_is_kept_changes_nothing() -> None:
    in_time = Reward(name="mine", function=lambda p, c: [0.5] * len(p), weight=2.0, timeout=30.0)
    assert [judged.reward for judged in combine([in_time], TWO_PROMPTS, TWO)] == [1.0, 1.0]
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_parts_are_logged_beside_their_value_and_count_for_nothing() -> None:
    values = [Detailed(0.5, {"facts": 1, "tone": 0.0}), Detailed(0.25, {"facts": 0.5})]
    found = combine([reward(values, weight=2.0)], TWO_PROMPTS, TWO)
    assert [judged.reward for judged in found] == [1.0, 0.5]
    assert found[0].breakdown == {"mine": 0.5, "mine/facts": 1.0, "mine/tone": 0.0}
    rollouts = [
        Rollout(prompt=p, prompt_ids=(1,), completion=c, **judged._asdict())
        for p, c, judged in zip(TWO_PROMPTS, TWO, found, strict=True)
    ]
    metrics = rollout_metrics([Group(rollouts=(r,)) for r in rollouts], [reward(values)])
    assert metrics["reward/mine/facts"] == 0.75 and metrics["reward/mine"] == 0.375
    assert "reward_judged/mine/facts" not in metrics
    same = [
        replace(r, reward=1.0, breakdown={"mine": 0.5, "mine/facts": x}) for r, x in zip(rollouts, (0, 1), strict=True)
    ]
    assert is_constant(Group(rollouts=tuple(same)), by_component=True)


def test_parts_are_finite_numbers() -> None:
    with pytest.raises(UserError, match=rf"returned {{'facts': nan}} for {FIRST}"):
        combine([reward([Detailed(0.5, {"facts": math.nan}), 1.0])], TWO_PROMPTS, TWO)


def test_what_a_reward_says_to_users_is_said_as_it_is() -> None:
    def refuses(prompts: Sequence[Prompt], completions: Sequence[Completion]) -> list[float]:
        calls.append(len(prompts))
        raise UserError("judge: no key; set one")

    calls: list[int] = []
    with pytest.raises(UserError, match=r"^reward 'mine': judge: no key; set one$"):
        combine([Reward(name="mine", function=refuses, weight=1.0)], TWO_PROMPTS, TWO)
    assert calls == [2]


def test_no_reward_for_any_task_here() -> None:
    with pytest.raises(UserError, match=r"reward: no function \('mine'\) judged any of 2 completions, .* task 'sums'"):
        combine([reward([1.0], tasks=("elsewhere",))], TWO_PROMPTS, TWO)
    with pytest.raises(UserError, match=r"none is named.*; name one under `reward`"):
        combine([], TWO_PROMPTS, TWO)


def test_why_nothing_was_judged() -> None:
    """By the tasks of a component, by what its prompts lack, or by its own silence."""
    silent = [reward([1.0], "a", tasks=("elsewhere",)), replace(reward([None, None], "b"), needs="an `answer`"),
              reward([None, None], "c")]  # fmt: skip
    said = r"; a is for elsewhere only \(`tasks`\); b needs an `answer` \(.*\); c gave None for each$"
    with pytest.raises(UserError, match=said):
        combine(silent, TWO_PROMPTS, TWO)


def test_interrupts_are_not_rewards() -> None:
    def stop(*_: Any) -> Any:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        combine([reward(stop)], TWO_PROMPTS, TWO)


# ---- rollouts --------------------------------------------------------------------------------------------------------


def ids(groups: Sequence[Group]) -> list[tuple[int, ...]]:
    return [r.completion.token_ids for g in groups for r in g.rollouts]


def test_groups_are_siblings_of_one_prompt_in_order() -> None:
    groups = source().rollouts(policy(), 5, 3, STATE)
    assert [len(g.rollouts) for g in groups] == [3] * 5
    assert all(len({r.prompt.id for r in g.rollouts}) == 1 for g in groups)
    assert len({g.rollouts[0].prompt.id for g in groups}) == 5
    for rollout_ in (r for g in groups for r in g.rollouts):
        text, tokens = rollout_.completion.text, rollout_.completion.token_ids
        assert rollout_.prompt_ids == template().encode_prompt(rollout_.prompt)
        assert_close(rollout_.reward, sum(c.isdigit() for c in text) / (1 + len(text)) + 0.01 * len(tokens), **FLOAT64)


def test_rollouts_are_a_function_of_seed_and_phase() -> None:
    same = [source().rollouts(policy(), 4, 2, STATE) for _ in range(2)]
    assert same[0] == same[1]
    for other in (replace(STATE, seed=43), replace(STATE, phase=4)):
        assert ids(source().rollouts(policy(), 4, 2, other)) != ids(same[0])


def test_rows_decoded_together_change_nothing() -> None:
    few = source(limits=Limits(max_prompt_tokens=32, max_completion_tokens=8, sampling_rows=2))
    assert ids(few.rollouts(policy(), 4, 2, STATE)) == ids(source().rollouts(policy(), 4, 2, STATE))


def test_a_prompt_that_comes_twice_is_sampled_anew() -> None:
    """Three prompts, six wanted: the second pass over the data must not repeat the first one's completions."""
    groups = source(prompts=PROMPTS[:3]).rollouts(policy(), 6, 4, STATE)
    names = [g.rollouts[0].prompt.id for g in groups]
    assert sorted(names[:3]) == sorted(names[3:])
    for name in set(names):
        first, second = (ids([g]) for g in groups if g.rollouts[0].prompt.id == name)
        assert first != second
    once = source(prompts=PROMPTS[:3]).rollouts(policy(), 3, 4, replace(STATE, phase=6))
    assert ids(once) == ids(source(prompts=PROMPTS[:3]).rollouts(policy(), 3, 4, replace(STATE, phase=6)))


def test_every_attempt_draws_other_prompts_and_other_completions() -> None:
    """And the same ones every time; attempt 0 is what a phase draws anyway."""
    first, second, third = (source().rollouts(policy(), 4, 2, STATE, attempt=k) for k in range(3))
    assert source().rollouts(policy(), 4, 2, STATE) == first
    assert source().rollouts(policy(), 4, 2, STATE, attempt=1) == second
    orders = [[g.rollouts[0].prompt.id for g in groups] for groups in (first, second, third)]
    assert orders[0] != orders[1] != orders[2] != orders[0]
    shared = set(orders[0]) & set(orders[1])
    assert shared, "prompts that both attempts have"
    for name in shared:
        one, other = (ids([g for g in groups if g.rollouts[0].prompt.id == name]) for groups in (first, second))
        assert one != other


def test_without_rewards_nothing_is_judged_where_none_is_needed() -> None:
    """The same completions; every reward NaN, and no metric that speaks of rewards. Where one is needed: an error."""
    plain = source(rewards=())
    groups = plain.rollouts(policy(), 4, 2, STATE, needs_reward=False)
    assert ids(groups) == ids(source().rollouts(policy(), 4, 2, STATE, needs_reward=False))
    assert all(math.isnan(r.reward) and not r.breakdown for g in groups for r in g.rollouts)
    assert all(not name.startswith(("reward", "group/constant")) for name in rollout_metrics(groups))
    assert source().rollouts(policy(), 4, 2, STATE, needs_reward=False) == source().rollouts(policy(), 4, 2, STATE)
    with pytest.raises(UserError, match="none is named"):
        plain.rollouts(policy(), 4, 2, STATE)


@pytest.mark.parametrize("filters", [{"top_p": 0.9}, {"top_k": 5}, {"min_p": 0.1}, {"greedy": True}])
def test_only_the_policy_itself_is_sampled_from(filters: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="samples from the policy itself"):
        source(sampling=Sampling(**filters)).rollouts(policy(), 1, 2, STATE)


def test_sample_prompts_decodes_without_the_stop_token() -> None:
    asked = [template().encode_prompt(p) for p in PROMPTS]
    sampled = sample_prompts(policy(), PROMPTS, asked, template(), source().sampling, num_samples=2, seed=1, phase=0)
    stopped = [c for siblings in sampled for c in siblings if c.finish_reason == "stop"]
    assert stopped and all(
        c.token_ids[-1] in template().stop_ids and not c.text.endswith(("<eos>", "<end_of_turn>")) for c in stopped
    )
    assert all(len(c.token_ids) == len(c.logprobs) for siblings in sampled for c in siblings)


def test_batch_holds_rows_in_group_order_with_the_sampled_logprobs() -> None:
    model = policy()
    groups = source().rollouts(model, 4, 2, STATE)
    batch = source().batch(groups, torch.float64)
    rollouts = [r for g in groups for r in g.rollouts]
    for i, r in enumerate(rollouts):
        row = batch.input_ids[i][batch.attention_mask[i]].tolist()
        assert row == [*r.prompt_ids, *r.completion.token_ids]
        assert_close(rows_of(batch.old_logprobs, batch)[i], np.array(r.completion.logprobs), **EXACT)
    assert batch.old_logprobs is not None and not batch.old_logprobs[~batch.completion_mask].any()
    for recorded, raw in zip(rows_of(batch.old_logprobs, batch), raw_logprobs(model, batch), strict=True):
        assert_close(recorded, raw.detach().numpy(), **FLOAT64)
    assert source().batch(groups).old_logprobs.dtype == torch.float32  # type: ignore[union-attr]


def test_microbatches_keep_siblings_together_the_longest_group_first() -> None:
    run = source(microbatch_rows=3)
    batch = run.batch(run.rollouts(policy(), 4, 2, STATE))
    pieces = run.numbered_microbatches(batch)
    lengths = batch.attention_mask.sum(-1)
    assert sorted(i for rows, _ in pieces for i in rows.tolist()) == list(range(8))
    assert [len(p) for _, p in pieces] == [3, 3, 2]
    order = [i for rows, _ in pieces for i in rows.tolist()]
    assert [i // 2 for i in order[::2]] == [i // 2 for i in order[1::2]]
    longest = [int(max(lengths[i], lengths[j])) for i, j in zip(order[::2], order[1::2], strict=True)]
    assert longest == sorted(longest, reverse=True)
    for rows, piece in pieces:
        assert piece.input_ids.shape[1] == int(lengths[rows].max())
        assert torch.equal(piece.input_ids, batch.input_ids[rows][:, : piece.input_ids.shape[1]])


def test_a_token_budget_holds_for_everything_that_is_trained_on() -> None:
    """Rows, labelled rows, pairs (both rows together) and samples, counted padded; nothing is lost."""
    plain = source(microbatch_rows=64)
    run = replace(plain, limits=replace(plain.limits, microbatch_tokens=90))
    batch = run.batch(run.rollouts(policy(), 4, 2, STATE))
    for pieces, rows in (
        (run.example_batches(6, STATE), 6),
        (run.labelled_batches(6, STATE), 6),
        (run.pair_batches(4, STATE), 8),
        (run.microbatches(batch), 8),
        (run.pair_pieces(batch, torch.arange(4), torch.arange(4, 8)), 8),
    ):
        assert len(pieces) > 1 and sum(map(len, pieces)) == rows
        assert all(piece.input_ids.numel() <= 90 for piece in pieces)


def test_pairs_stay_together() -> None:
    batches = source(microbatch_rows=6).pair_batches(8, STATE)
    assert [len(b) for b in batches] == [6, 6, 4]
    for batch in batches:
        half = len(batch) // 2
        prompts = [tuple(ids_[m & ~c].tolist()) for ids_, m, c in
                   zip(batch.input_ids, batch.attention_mask, batch.completion_mask, strict=True)]  # fmt: skip
        assert prompts[:half] == prompts[half:]
        assert batch.margin is not None and torch.equal(batch.margin[:half], batch.margin[half:])


# ---- metrics ---------------------------------------------------------------------------------------------------------


def test_metrics_and_tensors() -> None:
    """Two groups of two: rewards (1, 3) and (NaN, 2), of which the second leaves one value and so is constant."""
    model = policy()
    made = [
        rollout(model, "1+1", "ab", reward=1.0, shift=(0, 0, 0)),
        rollout(model, "1+1", "abcd", reward=3.0, shift=(0, 0, 0, 0), stop=False),
        rollout(model, "3", "a", reward=math.nan, shift=(0, 0)),
        rollout(model, "3", "1", reward=2.0, shift=(0, 0)),
    ]
    made[2] = replace(made[2], breakdown={})
    groups = [Group(rollouts=tuple(made[:2])), Group(rollouts=tuple(made[2:]))]
    metrics = rollout_metrics(groups)
    expected = {
        "reward/mean": 2.0, "reward/std": math.sqrt(2 / 3), "reward/unjudged_fraction": 0.25, "reward/digits": 2.0,
        "completion/length": 11 / 4, "completion/stop_fraction": 0.75, "group/constant_fraction": 0.5,
        "group/distinct_fraction": 1.0,
        "ledger/prompts": 2.0, "ledger/completions": 4.0, "ledger/generated_tokens": 11.0,
    }  # fmt: skip
    assert metrics.keys() == expected.keys()
    for name, value in expected.items():
        assert metrics[name] == pytest.approx(value), name
    like = torch.zeros(1, dtype=torch.float64)
    assert_close(
        reward_tensor(groups, like), torch.tensor([1, 3, math.nan, 2], dtype=torch.float64), equal_nan=True, **EXACT
    )
    assert stopped_tensor(groups, like).tolist() == [True, False, True, True]
    assert not any(name.startswith("group/") for name in rollout_metrics([Group(rollouts=(made[0],))]))
    assert rollout_metrics([Group(rollouts=(made[2], made[2]))])["group/distinct_fraction"] == 0.5


def test_shares_of_the_variance() -> None:
    """2 a + b with a = (0, 1, 0, 1), b = (0, 0, 4, 4): the sums 0, 2, 4, 6 have variance 5, of which b brings 4. What
    was not judged does not count, nor does a component that is the only one."""
    model = policy()
    values = [{"a": 0.0, "b": 0.0}, {"a": 1.0, "b": 0.0}, {"a": 0.0, "b": 4.0}, {"a": 1.0, "b": 4.0}, {}]
    made = [replace(rollout(model, "3", "a", reward=0.0, shift=(0, 0)), breakdown=v) for v in values]
    group = Group(rollouts=tuple(made))

    def shares(*names: str) -> dict[str, float]:
        rewards = [Reward(name=n, function=lambda p, c: [], weight={"a": 2.0, "b": 1.0}[n]) for n in names]
        found = rollout_metrics([group], rewards)
        return {k.removeprefix("reward_share/"): v for k, v in found.items() if k.startswith("reward_share/")}

    silent = [Reward(name=n, function=lambda p, c: [], weight=1.0) for n in ("a", "off")]
    found = rollout_metrics([group], silent)
    assert (found["reward_judged/a"], found["reward_judged/off"]) == (0.8, 0.0)
    assert shares("a", "b") == pytest.approx({"a": 0.2, "b": 0.8})
    assert shares("a") == shares() == {}
    assert rollout_metrics([Group(rollouts=(made[0], made[0]))], ()).keys().isdisjoint({"reward_share/a"})


def test_constant_by_component() -> None:
    """Sums that agree although their components do not: constant for the sum, not for each component by itself."""
    model = policy()
    made = [
        replace(rollout(model, "3", "a", reward=1.0, shift=(0, 0)), breakdown=b)
        for b in ({"a": 1.0, "b": 0.0}, {"b": 1.0, "a": 0.0})
    ]
    group = Group(rollouts=tuple(made))
    assert is_constant(group) and not is_constant(group, by_component=True)
    assert is_constant(Group(rollouts=(made[0], made[0])), by_component=True)


def judged(task: str, **values: float) -> Any:
    """A rollout that earned the given components; the number it totals does not matter here."""
    made = rollout(policy(), "1+1", "a", reward=sum(values.values()) if values else math.nan, shift=(0, 0))
    return replace(made, prompt=replace(made.prompt, task=task), breakdown=values)


def test_components() -> None:
    """a applies to all at weight 2; b, at 3 for sums and 5 for talk, comes weighted already: 3 * 1 = 3, 5 * 2 = 10."""
    rewards = [
        reward(None, "a", 2.0), reward(None, "b", 3.0, ("sums",)), reward(None, "b", 5.0, ("talk",)), reward(None, "c"),
    ]  # fmt: skip
    groups = [
        Group(rollouts=(judged("sums", a=0.5, b=1.0), judged("sums", a=0.25))),
        Group(rollouts=(judged("talk", b=2.0, c=7.0), judged("talk"))),
    ]
    like = torch.zeros(1, dtype=torch.float64)
    components, weights = component_tensor(groups, rewards, like)
    nan = math.nan
    expected = torch.tensor([[0.5, 0.25, nan, nan], [3, nan, 10, nan], [nan, nan, 7, nan]], dtype=torch.float64)
    assert_close(components, expected, equal_nan=True, **EXACT)
    assert_close(weights, torch.tensor([2, 1, 1], dtype=torch.float64), **EXACT)
    same = [reward(None, "b", 3.0, ("sums",)), reward(None, "b", 3.0, ("talk",))]
    components, weights = component_tensor(groups, same, like)
    assert_close(components, torch.tensor([[1, nan, 2, nan]], dtype=torch.float64), equal_nan=True, **EXACT)
    assert weights.tolist() == [3.0]


@pytest.mark.parametrize(
    "rewards, constant",
    [((1.0, 1.0), True), ((1.0, 2.0), False), ((1.0, math.nan), True), ((math.nan, math.nan), True),
     ((1.0, math.nan, 2.0), False)],
)  # fmt: skip
def test_constant_groups(rewards: tuple[float, ...], constant: bool) -> None:
    made = rollout(policy(), "1+1", "a", reward=0.0, shift=(0, 0))
    assert is_constant(Group(rollouts=tuple(replace(made, reward=r) for r in rewards))) == constant


@pytest.mark.parametrize(
    "text, replacement, test",
    [
        ("value = float(value.sum())", "value = float(value.mean())", test_token_scores_add_up),
        ("before is None else before + reward", "before is None else reward", test_token_scores_add_up),
        ("by_token[i] = reward.weight * value", "by_token[i] = value", test_token_scores_add_up),
        ("any_judged=not attempt", "any_judged=True", test_nobody_has_to_judge_a_second_attempt),
        ("SEED_STRIDE * attempt", "0 * attempt", test_every_attempt_draws_other_prompts_and_other_completions),
        ("math.nan) for f, r in", "0.0) for f, r in", test_components),
        ("1.0 if same else by_task", "1.0 if True else by_task", test_components),
        ("given[0].weight if same else 1.0", "given[0].weight", test_components),
    ],
)  # fmt: skip
def test_mutants_are_noticed(text: str, replacement: str, test: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    changed = mutated(rollout_module, text, replacement)
    here = sys.modules[__name__]
    for name in ("combine", "component_tensor", "is_constant"):
        monkeypatch.setattr(here, name, getattr(changed, name))
    usual = source
    monkeypatch.setattr(here, "source", lambda **changes: changed.Source(**vars(usual(**changes))))
    with pytest.raises((AssertionError, UserError, pytest.fail.Exception)):
        test()


# ---- rows within limits ----------------------------------------------------------------------------------------------

TIGHT = Limits(max_prompt_tokens=22, max_completion_tokens=4)


def test_a_completion_too_long_keeps_its_stop_token() -> None:
    asked = prompt("1+1")  # 19 tokens with the template
    (row,) = encode_examples([Example(prompt=asked, completion="abcdef")], template(), TIGHT)
    assert template().decode(row.completion_ids) == "abc" and row.completion_ids[-1] == template().turn_end_id
    assert len(row.completion_ids) == 4


def test_rows_that_do_not_fit_are_left_out() -> None:
    long = prompt("1+1+1+1+1")
    examples = [Example(prompt=long, completion="a"), Example(prompt=prompt("2"), completion="b")]
    assert len(encode_examples(examples, template(), TIGHT)) == 1
    assert [p.id for p in fitting_prompts([long, prompt("2")], template(), TIGHT)] == ["sums/2"]
    with pytest.raises(UserError, match=r"none of 1 rows is left within 22 prompt and 4 completion tokens"):
        encode_examples(examples[:1], template(), TIGHT)
    with pytest.raises(UserError, match=r"half of them fit whole if you raise data\.max_prompt_tokens to \d+$"):
        fitting_prompts([replace(long, answer="5")], template(), TIGHT)
    with pytest.raises(UserError, match=r"max_prompt_tokens to \d+ and data\.max_completion_tokens to 7$"):
        fitting_prompts([replace(long, answer="abcdef")], template(), TIGHT)
    assert encode_examples([], template(), TIGHT) == []


def test_an_error_says_the_limits_that_keep_half_of_the_rows() -> None:
    pairs = [Pair(prompt=prompt("1+" * (9 + i)), chosen="a" * (20 - i), rejected="a" * 7) for i in range(5)]
    with pytest.raises(UserError) as error:
        encode_pairs(pairs, template(), TIGHT)
    said = r"raise data\.max_prompt_tokens to (\d+) and data\.max_completion_tokens to (\d+)$"
    found = re.search(said, str(error.value))
    assert found is not None
    enough = Limits(max_prompt_tokens=int(found[1]), max_completion_tokens=int(found[2]))
    assert 3 <= len(encode_pairs(pairs, template(), enough)) < 5


@given(st.lists(st.tuples(st.integers(1, 50), st.integers(1, 50)), min_size=1, max_size=30))
def test_the_limits_for_half_keep_half(sizes: list[tuple[int, int]]) -> None:
    prompt, completion = _enough_for_half(sizes)
    assert 2 * sum(p <= prompt and c <= completion for p, c in sizes) >= len(sizes)
    assert prompt in [p for p, _ in sizes] and completion in [c for _, c in sizes]


def test_labelled_completions_fit_and_keep_their_label() -> None:
    asked, long = prompt("2"), prompt("a much longer question than fits")
    items = [
        Labelled(prompt=asked, completion="abcdefgh", label=False),
        Labelled(prompt=long, completion="a", label=True),
        Labelled(prompt=asked, completion="a", label=True),
    ]
    cut, kept = encode_labelled(items, template(), TIGHT)
    assert [cut.label, kept.label] == [False, True]
    assert len(cut.row.completion_ids) == TIGHT.max_completion_tokens
    assert cut.row.completion_ids[-1] == kept.row.completion_ids[-1] == template().encode_completion("a")[-1]
    with pytest.raises(UserError, match="none of 1 rows is left"):
        encode_labelled(items[1:2], template(), TIGHT)


def test_labels_follow_their_rows() -> None:
    """Microbatches are sorted by length; each row keeps its own label."""
    batches = source(microbatch_rows=3).labelled_batches(8, STATE)
    assert [len(b) for b in batches] == [3, 3, 2]
    found = []
    for batch in batches:
        assert batch.labels is not None and batch.labels.dtype == torch.bool
        for ids, mask, label in zip(batch.input_ids, batch.completion_mask, batch.labels.tolist(), strict=True):
            found.append((template().decode(ids[mask].tolist()), label))
    assert sorted(found) == sorted((item.completion, item.label) for item in LABELLED)


def test_known_reference_logprobs_come_along_in_their_places() -> None:
    """The numbers of each row stand at its completion tokens, in double precision; of a stranger's batch, none."""
    world = source(microbatch_rows=3)
    rows = [item.row for item in world.labelled]
    table = {row: torch.arange(len(row.completion_ids), dtype=torch.float64) - 10.0 * i for i, row in enumerate(rows)}
    for batch in replace(world, reference=table).labelled_batches(8, STATE):
        assert batch.reference_logprobs is not None and batch.reference_logprobs.dtype == torch.float64
        for ids, attended, mask, numbers in zip(
            batch.input_ids, batch.attention_mask, batch.completion_mask, batch.reference_logprobs, strict=True
        ):
            (row,) = [r for r in rows if r.prompt_ids + r.completion_ids == tuple(ids[attended].tolist())]
            assert torch.equal(numbers[mask], table[row]) and not numbers[~mask].any()
    del table[rows[0]]
    given = [b.reference_logprobs is None for b in replace(world, reference=table).labelled_batches(8, STATE)]
    assert sum(given) == 1


def test_pair_pieces_keep_pairs_together() -> None:
    """Rows picked from a batch as pairs, chosen ones first, in at most `microbatch_rows` rows."""
    world = source(microbatch_rows=4)
    batch = world.plan_rows([item.row for item in world.labelled][:4])[0]
    chosen, rejected = torch.tensor([0, 3, 2]), torch.tensor([1, 0, 1])
    pieces = world.pair_pieces(batch, chosen, rejected)
    assert sorted(len(p) for p in pieces) == [2, 4]

    def text(b: Any, i: int) -> str:
        return template().decode(b.input_ids[i][b.completion_mask[i]].tolist())

    found = {(text(p, i), text(p, i + len(p) // 2)) for p in pieces for i in range(len(p) // 2)}
    assert found == {(text(batch, int(a)), text(batch, int(b))) for a, b in zip(chosen, rejected, strict=True)}


def test_pairs_that_are_equal_after_truncation_are_left_out() -> None:
    asked = prompt("2")
    same, other = (
        Pair(prompt=asked, chosen="abcX", rejected="abcY"),
        Pair(prompt=asked, chosen="a", rejected="b", margin=0.5),
    )
    pairs = encode_pairs([same, other], template(), TIGHT)
    assert [p.margin for p in pairs] == [0.5]
    with pytest.raises(UserError, match="a pair must also differ within them"):
        encode_pairs([same], template(), TIGHT)
