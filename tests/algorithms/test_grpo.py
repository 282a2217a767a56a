"""GRPO against eq. 3 and 4 of arXiv:2402.03300, and its relatives against theirs, from rewards, recorded logprobs and
raw log-softmaxes."""

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from alignlab.algorithms import _online as online_module
from alignlab.algorithms import grpo as module
from alignlab.generate import Sampling
from alignlab.rollout import Reward
from alignlab.train import RunError
from alignlab.types import Batch, Completion, Group, LoopState, Prompt, Step
from tests.algorithms.world import (
    MAX_TOKENS,
    Run,
    collect,
    digit_share,
    fixed,
    flat,
    loss_and_gradient,
    mutant,
    nudge,
    numbers,
    raw_entropies,
    raw_logprobs,
    rollout,
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


def by_hand(run: Run, step: Step, advantages: dict[tuple[int, ...], float], **o: Any) -> Tensor:
    """The loss of a step from raw log-softmaxes, differentiable; `o` are the method's fields that change it."""
    low, high = 1 - o.get("clip_low", 0.2), 1 + o.get("clip_high", 0.2)
    estimate = {"k1": lambda d: d, "k2": lambda d: d**2 / 2, "k3": lambda d: (-d).exp() - 1 + d}
    rows, held = [], []
    for batch in step.microbatches:
        policy = raw_logprobs(run.models["policy"], batch)
        reference = numbers(raw_logprobs(run.models["reference"] if o.get("kl_coef") else run.models["policy"], batch))
        entropies = raw_entropies(run.models["policy"], batch)
        for i, (new, old, ref) in enumerate(zip(policy, rows_of(batch.old_logprobs, batch), reference, strict=True)):
            a, log_ratio = advantages[key(batch, i)], new - torch.tensor(old)
            if o.get("surrogate") == "sequence":
                log_ratio = log_ratio.mean().expand_as(log_ratio)
            ratio = log_ratio.exp()
            if o.get("surrogate") == "cispo":
                terms = -ratio.detach().clamp(max=high) * a * new
                held.append(ratio > high)
            else:
                bounded = ratio.clamp(max=o.get("dual_clip") or math.inf)
                terms = -torch.minimum(bounded * a, ratio.clamp(low, high) * a)
                held.append(terms != -ratio * a)
            if o.get("kl_coef"):
                kl = estimate[o.get("kl_estimator", "k3")](new - torch.tensor(ref))
                if o.get("kl_threshold") is not None:
                    kl = (kl - o["kl_threshold"]) * (kl.mean() > o["kl_threshold"])
                terms = terms + o["kl_coef"] * kl
            rows.append(terms - o.get("entropy_coef", 0.0) * entropies[i])
    assert len({len(row) for row in rows}) > 2 and 0.1 < torch.cat(held).double().mean() < 0.9
    return {
        "token": torch.cat(rows).mean(),
        "sequence": torch.stack([row.mean() for row in rows]).mean(),
        "constant": torch.cat(rows).sum() / (len(rows) * MAX_TOKENS),
    }[o.get("aggregation", "sequence")]


def moved(algorithm: Any, **options: Any) -> tuple[Run, Step, dict[tuple[int, ...], float]]:
    """A phase, its advantages by hand, and weights that have changed since: ratios on both sides of the clips."""
    run = start_run(algorithm(**FOUR_BY_THREE, **options))
    step, advantages = rewards_by_row(run)
    nudge(run.models["policy"], 0.05)
    return run, step, advantages


def gradient_of(run: Run, loss: Tensor) -> Tensor:
    """The gradient by the policy's parameters, which then have none."""
    loss.backward()
    parameters = list(run.models["policy"].parameters())
    found = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters])
    for parameter in parameters:
        parameter.grad = None
    return found


TIGHT = {"clip_low": 0.1, "clip_high": 0.05}
TIGHTER = {"clip_low": 0.02, "clip_high": 0.03}


@pytest.mark.parametrize("aggregation", ["token", "sequence", "constant"])
@pytest.mark.parametrize(
    "options",
    [
        TIGHT,
        TIGHTER | {"surrogate": "sequence"},
        {"surrogate": "cispo", "clip_high": 0.05},
        TIGHT | {"dual_clip": 1.1},
        TIGHTER | {"surrogate": "sequence", "dual_clip": 1.05},
        TIGHT | {"entropy_coef": 0.3},
        {"surrogate": "cispo", "clip_high": 0.05, "entropy_coef": 0.3, "kl_coef": 0.3},
        TIGHT | {"kl_coef": 0.3},
        TIGHT | {"kl_coef": 0.3, "kl_estimator": "k1"},
        TIGHT | {"kl_coef": 0.3, "kl_estimator": "k2"},
        TIGHT | {"kl_coef": 0.3, "kl_threshold": 0.06},
        TIGHT | {"kl_coef": 0.3, "kl_threshold": 0.01, "kl_estimator": "k1"},
    ],
    ids=str,
)
def test_loss(grpo: Any, aggregation: str, options: dict[str, Any]) -> None:
    """Value and gradient, for every field that changes the loss, in every aggregation."""
    run, step, advantages = moved(grpo, **options, aggregation=aggregation)
    loss, gradient = loss_and_gradient(run, step)
    expected = by_hand(run, step, advantages, **options, aggregation=aggregation)
    assert_close(loss, expected.item(), **FLOAT64)
    assert_close(flat(gradient), gradient_of(run, expected), **FLOAT64)


def test_rows_on_both_sides_of_the_threshold(grpo: Any) -> None:
    """What `test_loss` relies on, k3 at .06 and k1 at .01."""
    run, step, _ = moved(grpo, kl_coef=0.3)
    d = [
        new.detach() - ref.detach()
        for b in step.microbatches
        for new, ref in zip(*(raw_logprobs(run.models[n], b) for n in ("policy", "reference")), strict=True)
    ]
    for means, threshold in (([(torch.exp(-x) - 1 + x).mean() for x in d], 0.06), ([x.mean() for x in d], 0.01)):
        assert min(means) < threshold < max(means)


def test_gradient_of_gspo(grpo: Any) -> None:
    """arXiv:2507.18071 eq. 10: the mean over rows of -s_i A_i times the row's mean gradient of log pi, where s_i is the
    geometric mean of its ratios: every token weighs the same. Nothing from rows that s has taken over the clip."""
    run, step, advantages = moved(grpo, variant="gspo", clip_low=0.02, clip_high=0.03)
    weights, total = [], torch.zeros((), dtype=torch.float64)
    for batch in step.microbatches:
        logprobs = raw_logprobs(run.models["policy"], batch)
        for i, (new, old) in enumerate(zip(logprobs, rows_of(batch.old_logprobs, batch), strict=True)):
            s, a = float(np.exp((new.detach().numpy() - old).mean())), advantages[key(batch, i)]
            held = (a > 0 and s > 1.03) or (a < 0 and s < 0.98)
            weights.append(0.0 if held else s)
            total = total - weights[-1] * a * new.mean() / 12
    assert 0 < weights.count(0.0) < 12
    assert_close(flat(loss_and_gradient(run, step)[1]), gradient_of(run, total), **FLOAT64)


def test_gradient_of_cispo(grpo: Any) -> None:
    """arXiv:2506.13585 eq. 4: -min(ratio, c) A gradient of log pi of every token over the number of tokens: those over
    the bound count too, and a low ratio has no floor."""
    run, step, advantages = moved(grpo, variant="cispo", clip_high=0.05)
    total, count, over = torch.zeros((), dtype=torch.float64), 0, 0
    for batch in step.microbatches:
        logprobs = raw_logprobs(run.models["policy"], batch)
        for i, (new, old) in enumerate(zip(logprobs, rows_of(batch.old_logprobs, batch), strict=True)):
            ratio = np.exp(new.detach().numpy() - old)
            total = total - (torch.tensor(np.minimum(ratio, 1.05)) * advantages[key(batch, i)] * new).sum()
            count, over = count + len(ratio), over + int((ratio > 1.05).sum())
    assert 0 < over < count
    assert_close(flat(loss_and_gradient(run, step)[1]), gradient_of(run, total / count), **FLOAT64)


def test_gradient_of_rloo(grpo: Any) -> None:
    """arXiv:2402.14740 eq. 6: (1/N) sum_i (R_i - mean of its siblings' R) gradient of log pi(y_i), with the whole KL
    taken off the reward, R = r - beta (log pi_old(y) - log ref(y)); ours over the completion limit as well."""
    run = start_run(grpo(**FOUR_BY_THREE, variant="rloo", kl_coef=0.4))
    nudge(run.models["policy"], 0.05)  # not the reference any more
    phase, run.state = run.algorithm.collect(run.models, run.source, run.state)
    flat_rollouts = [r for g in phase.groups for r in g.rollouts]
    whole = run.source.batch(phase.groups, torch.float64)
    reference = numbers(raw_logprobs(run.models["reference"], whole))
    scores = np.array(
        [
            r.reward - 0.4 * (sum(r.completion.logprobs) - ref.sum())
            for r, ref in zip(flat_rollouts, reference, strict=True)
        ]
    ).reshape(4, 3)
    advantages = scores - (scores.sum(1, keepdims=True) - scores) / 2
    logprobs = raw_logprobs(run.models["policy"], whole)
    total = sum(-a * row.sum() for a, row in zip(advantages.flatten().tolist(), logprobs, strict=True)) / (
        12 * MAX_TOKENS
    )
    assert np.abs(scores - [[r.reward for r in g.rollouts] for g in phase.groups]).max() > 0.05
    assert_close(flat(loss_and_gradient(run, phase.steps[0])[1]), gradient_of(run, total), **FLOAT64)


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


def advantages_of(run: Run, phase: Any) -> np.ndarray:
    """(prompts, group size): what each completion's tokens were given; the same number on all of them."""
    found = {}
    for batch in phase.steps[0].microbatches:
        for i, row in enumerate(rows_of(batch.advantages, batch)):
            assert len(set(row)) == 1
            found[key(batch, i)] = row[0]
        assert not batch.advantages[~batch.completion_mask].any()
    return np.array([[found[(*r.prompt_ids, *r.completion.token_ids)] for r in g.rollouts] for g in phase.groups])


def collected(run: Run) -> tuple[Any, np.ndarray]:
    """A phase, and its rewards (prompts, group size)."""
    phase, run.state = run.algorithm.collect(run.models, run.source, run.state)
    return phase, np.array([[r.reward for r in group.rollouts] for group in phase.groups])


@pytest.mark.parametrize("scale", ["batch", "none"])
def test_scale(grpo: Any, scale: str) -> None:
    """The advantage itself: divided by the sd of all twelve rewards, or by nothing."""
    run = start_run(grpo(**FOUR_BY_THREE, scale=scale), microbatch_rows=12)
    phase, rewards = collected(run)
    expected = (rewards - rewards.mean(1, keepdims=True)) / (rewards.std(ddof=1) + 1e-4 if scale == "batch" else 1.0)
    assert_close(advantages_of(run, phase), expected, **FLOAT64)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_leave_one_out(grpo: Any, scale: str) -> None:
    """Minus the mean of the two siblings; the same spreads divide."""
    run = start_run(grpo(**FOUR_BY_THREE, baseline="leave_one_out", scale=scale))
    phase, rewards = collected(run)
    above = rewards - (rewards.sum(1, keepdims=True) - rewards) / 2
    spread = {"group": rewards.std(1, ddof=1, keepdims=True) + 1e-4, "batch": rewards.std(ddof=1) + 1e-4, "none": 1.0}
    assert_close(advantages_of(run, phase), above / spread[scale], **FLOAT64)


@pytest.mark.parametrize("scale", ["batch", "none"])
def test_running_mean_as_baseline(grpo: Any, scale: str) -> None:
    """Phase 0 has no earlier rewards and takes its own mean, m0; phase 1 takes m0; phase 2 the mean of both, weighted
    as decay .9 has it: (.9 * .1 m0 + .1 m1) / (.9 * .1 + .1) = (.9 m0 + m1) / 1.9."""
    run = start_run(grpo(**FOUR_BY_THREE, baseline="ema", scale=scale, ema_decay=0.9))
    means: list[float] = []
    for number in range(3):
        phase, rewards = collected(run)
        means.append(float(rewards.mean()))
        baseline = [means[0], means[0], (0.9 * means[0] + means[1]) / 1.9 if number == 2 else 0.0][number]
        spread = rewards.std(ddof=1) + 1e-4 if scale == "batch" else 1.0
        assert_close(advantages_of(run, phase), (rewards - baseline) / spread, **FLOAT64)
        run.state = LoopState(**json.loads(json.dumps(vars_of(replace(run.state, phase=number + 1)))))
    assert len(set(means)) == 3


def vars_of(state: LoopState) -> dict[str, Any]:
    return {name: getattr(state, name) for name in state.__dataclass_fields__}


def groups_by_hand(model: Any, rewards: Sequence[Sequence[float]], texts: Sequence[Sequence[str]]) -> list[Group]:
    """Groups of completions; a text that ends with ~ was cut off there."""
    return [
        Group(
            rollouts=tuple(
                rollout(
                    model, f"{i}+1", text.rstrip("~"), reward=reward, stop=not text.endswith("~"),
                    shift=[0.0] * (len(text.rstrip("~")) + (not text.endswith("~"))),
                )
                for reward, text in zip(row, row_of_texts, strict=True)
            )
        )
        for i, (row, row_of_texts) in enumerate(zip(rewards, texts, strict=True))
    ]  # fmt: skip


def with_components(group: Group, values: Sequence[dict[str, float]]) -> Group:
    made = [
        replace(r, breakdown=v, reward=sum(v.values()) if v else math.nan)
        for r, v in zip(group.rollouts, values, strict=True)
    ]
    return Group(rollouts=tuple(made))


def silent(prompts: Sequence[Prompt], completions: Sequence[Completion]) -> list[float | None]:
    raise AssertionError("the rollouts are made by hand")


@pytest.mark.parametrize("penalty", [0.0, 2.0])
def test_components_are_normalised_by_themselves(grpo: Any, penalty: float) -> None:
    """Two groups of two with components a (weight 2) and b (weight 3): a = (0, 1), (4, 4); b = (5, -), (1, 3), and of
    a third group nobody judged the first completion: a = (-, 7). Within a group of two, normalised is -+c with
    c = (d / 2) / (d / sqrt 2 + 1e-4), d the difference. What a missing stop costs, here the first completion of all, is
    centred in its group and keeps its size; where nobody judged, it says nothing."""
    run = start_run(grpo(prompts_per_phase=3, group_size=2, normalise_components=True, missing_stop_penalty=penalty))
    groups = groups_by_hand(run.models["policy"], [[0, 0]] * 3, [["ab~", "a"], ["abc", "b"], ["ab~", "c"]])
    values = [
        [{"a": 0.0, "b": 5.0}, {"a": 1.0}], [{"a": 4.0, "b": 1.0}, {"a": 4.0, "b": 3.0}], [{}, {"a": 7.0}],
    ]  # fmt: skip
    rewards = [Reward(name="a", function=silent, weight=2.0), Reward(name="b", function=silent, weight=3.0)]
    run.source = replace(
        fixed([with_components(g, v) for g, v in zip(groups, values, strict=True)]), rewards=tuple(rewards)
    )
    c = lambda d: (d / 2) / (d / math.sqrt(2) + 1e-4)  # noqa: E731
    total = np.array([-2 * c(1), 2 * c(1), -3 * c(2), 3 * c(2), math.nan, 0.0])
    judged = total[~np.isnan(total)]
    expected = np.nan_to_num((total - judged.mean()) / (judged.std(ddof=1) + 1e-4), nan=0.0)
    expected[:2] += [-penalty / 2, penalty / 2]
    phase, _ = collected(run)
    assert_close(advantages_of(run, phase).flatten(), expected, **FLOAT64)


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
@pytest.mark.parametrize("threshold", [None, 0.05])
def test_kl_in_the_reward(grpo: Any, kind: str, threshold: float | None) -> None:
    """Two siblings of KL (.1, -.2, .3) and (.6, .1): beta times the sum of the estimate comes off rewards 1 and 2."""
    run = start_run(
        grpo(prompts_per_phase=1, group_size=2, scale="none", kl_placement="reward", kl_coef=0.5, kl_estimator=kind,
             kl_threshold=threshold)
    )  # fmt: skip
    drifts = (np.array([0.1, -0.2, 0.3]), np.array([0.6, 0.1]))
    made = [
        rollout(run.models["policy"], "1+1", text, reward=r, shift=d.tolist())
        for text, r, d in zip(("ab", "a"), (1.0, 2.0), drifts, strict=True)
    ]
    run.source = fixed([Group(rollouts=tuple(made))])
    phase, _ = collected(run)
    kl = [{"k1": d, "k2": d**2 / 2, "k3": np.exp(-d) - 1 + d}[kind] for d in drifts]
    if threshold is not None:
        kl = [(k - threshold) * (k.mean() > threshold) for k in kl]
        assert kind != "k1" or all(k.any() for k in kl)
    scores = np.array([1.0, 2.0]) - 0.5 * np.array([k.sum() for k in kl])
    assert_close(advantages_of(run, phase)[0], scores - scores.mean(), **FLOAT64)
    assert "loss/kl" not in run.algorithm.loss(run.models, phase.steps[0].microbatches[0], run.state).sums
    assert_close(phase.metrics["policy/kl_per_sequence"], 0.45, **FLOAT64)
    assert_close(phase.metrics["policy/kl_per_token"], 0.9 / 5, **FLOAT64)


# ---- completions that were cut off, groups that say nothing ----------------------------------------------------------

CUT_TEXTS = [["ab~", "a"], ["abcd~", "bcd"]]


@pytest.mark.parametrize("aggregation, normaliser", [("token", 6.0), ("sequence", 2.0), ("constant", 2.0 * MAX_TOKENS)])
def test_mask_truncated(grpo: Any, aggregation: str, normaliser: float) -> None:
    """Of two groups, one completion each was cut off: `a` and `bcd` with their stop tokens are 2 + 4 tokens, 2 rows.
    Advantages still know the others: (0, 1) and (0, 3) centred give .5 and 1.5 to those that stopped."""
    run = start_run(grpo(prompts_per_phase=2, group_size=2, scale="none", mask_truncated=True, aggregation=aggregation))
    run.source = fixed(groups_by_hand(run.models["policy"], [[0, 1], [0, 3]], CUT_TEXTS))
    phase, _ = collected(run)
    (step,) = phase.steps
    assert step.normaliser == normaliser and phase.metrics["completion/masked_fraction"] == 0.5
    (batch,) = step.microbatches
    assert [len(row) for row in rows_of(batch.input_ids, batch)] == [4, 2]
    assert [set(row) for row in rows_of(batch.advantages, batch)] == [{1.5}, {0.5}]
    rows = [-a * row for a, row in zip((1.5, 0.5), raw_logprobs(run.models["policy"], batch), strict=True)]
    total = sum(row.mean() if aggregation == "sequence" else row.sum() for row in rows) / normaliser
    assert_close(flat(loss_and_gradient(run, step)[1]), gradient_of(run, total), **FLOAT64)


def test_completions_that_were_cut_off_count_unless_they_are_masked(grpo: Any) -> None:
    run = start_run(grpo(prompts_per_phase=2, group_size=2, aggregation="token"))
    run.source = fixed(groups_by_hand(run.models["policy"], [[0, 1], [0, 3]], CUT_TEXTS))
    phase, _ = collected(run)
    assert phase.steps[0].normaliser == 2 + 2 + 4 + 4 and "completion/masked_fraction" not in phase.metrics


def test_a_phase_in_which_all_was_cut_off(grpo: Any) -> None:
    """It has no steps, changes no weight, not even by decay, and is logged and counted."""
    run = start_run(grpo(prompts_per_phase=2, group_size=2, mask_truncated=True, learning_rate=0.1), weight_decay=0.5)
    texts, rewards = [["ab~", "a~"], ["abcd~", "bcd~"]], [[0, 1], [0, 3]]
    run.source = fixed(groups_by_hand(run.models["policy"], rewards, texts))
    before = {k: v.clone() for k, v in run.models["policy"].state_dict().items()}
    (finished,) = run.go(1)
    assert all(torch.equal(v, before[k]) for k, v in run.models["policy"].state_dict().items())
    assert not run.optimizers["policy"].state
    (row,) = run.recorder.rows
    assert row["completion/masked_fraction"] == finished.metrics["completion/masked_fraction"] == 1.0
    assert (row["phase"], row["step"], row["reward/mean"]) == (0, 0, 1.0) and "loss/total" not in row
    assert (run.state.phase, run.state.step) == (1, 0)
    assert run.state.counters == {"prompts": 2.0, "completions": 4.0, "generated_tokens": 10.0}
    run.source = fixed(groups_by_hand(run.models["policy"], rewards, CUT_TEXTS))
    run.go(2)
    assert run.column("step") == [0, 1] and run.optimizers["policy"].state


DULL = ("sums/1+1", "sums/2+23", "sums/5+5+5", "sums/9")


def half_dull(prompts: Sequence[Prompt], completions: Sequence[Completion]) -> list[float | None]:
    """Half of the prompts earn the same whatever is answered."""
    varied = digit_share(prompts, completions)
    return [0.3 if p.id in DULL else v for p, v in zip(prompts, varied, strict=True)]


def is_dull(group: Group) -> bool:
    return len({r.reward for r in group.rollouts}) == 1


@pytest.mark.parametrize("max_redraws", [1, 2, 10])
def test_dynamic_sampling(grpo: Any, max_redraws: int) -> None:
    """Round k draws as many groups as still say nothing, by attempt k; those that say something replace them in order.
    What is constant after the last round stays. The ledger and the rewards are of everything that was drawn."""
    rewards = [Reward(name="half", function=half_dull, weight=1.0)]
    run = start_run(grpo(prompts_per_phase=5, group_size=3, max_redraws=max_redraws), rewards=rewards)
    model, state = run.models["policy"], run.state
    drawn = list(run.source.rollouts(model, 5, 3, state))
    kept, dull, rounds = [g for g in drawn if not is_dull(g)], [g for g in drawn if is_dull(g)], 0
    assert len(dull) > 1
    while dull and rounds < max_redraws:
        rounds += 1
        fresh = run.source.rollouts(model, len(dull), 3, state, attempt=rounds)
        drawn += fresh
        kept += [g for g in fresh if not is_dull(g)]
        dull = dull[: 5 - len(kept)]
    phase, _ = collected(run)
    assert phase.groups == (*kept, *dull) and len(phase.groups) == 5
    assert bool(dull) == (max_redraws == 1)
    metrics, everything = phase.metrics, [r for g in drawn for r in g.rollouts]
    assert metrics["group/redraws"] == rounds and (max_redraws < 10 or rounds < 10)
    assert metrics["group/constant_fraction"] == len(dull) / 5
    assert_close(metrics["group/drawn_constant_fraction"], sum(map(is_dull, drawn)) / len(drawn), **FLOAT64)
    assert_close(metrics["reward/mean"], float(np.mean([r.reward for r in everything])), **FLOAT64)
    assert metrics["ledger/prompts"] == len(drawn) and metrics["ledger/completions"] == 3 * len(drawn)
    assert metrics["ledger/generated_tokens"] == sum(len(r.completion.token_ids) for r in everything)
    assert sum(len(b) for b in phase.steps[0].microbatches) == 15
    again = start_run(grpo(prompts_per_phase=5, group_size=3, max_redraws=max_redraws), rewards=rewards)
    assert collected(again)[0].groups == phase.groups


def test_redraws_that_nobody_can_judge(grpo: Any) -> None:
    """Prompts of a task without a reward may be all that a round draws: they say nothing, and the run goes on."""
    rewards = [Reward(name="digits", function=digit_share, weight=1.0, tasks=("sums",))]
    prompts = [replace(p, task="talk") if i > 1 else p for i, p in enumerate(start_run(grpo()).source.prompts)]
    run = start_run(grpo(prompts_per_phase=8, group_size=2, max_redraws=3), rewards=rewards, prompts=tuple(prompts))
    run.go(2)
    assert run.column("group/redraws") == [3.0, 3.0] and run.column("reward/unjudged_fraction")[0] > 0.5


def test_without_redraws_nothing_is_said_of_them(grpo: Any) -> None:
    metrics = collected(start_run(grpo(**FOUR_BY_THREE)))[0].metrics
    assert "group/redraws" not in metrics and "group/drawn_constant_fraction" not in metrics


# ---- variants and presets --------------------------------------------------------------------------------------------

PAPERS = {
    # arXiv:2503.20783: no std, sum over the completion limit, no KL (trl's paper index has beta 0 as well)
    "dr_grpo": {"scale": "none", "aggregation": "constant", "kl_coef": 0.0, "baseline": "group"},
    # arXiv:2503.14476, 3.1 to 3.4 and 4.1; 10 is max_num_gen_batches of its script in verl
    "dapo": {"clip_low": 0.2, "clip_high": 0.28, "aggregation": "token", "max_redraws": 10, "mask_truncated": True,
             "kl_coef": 0.0, "scale": "group"},
    # arXiv:2507.18071, eq. 5 and 5.1
    "gspo": {"surrogate": "sequence", "clip_low": 3e-4, "clip_high": 4e-4, "aggregation": "sequence", "scale": "group"},
    # arXiv:2506.13585 eq. 4 and 5, no KL; the bound of 5 is arXiv:2510.13786's (trl: epsilon_high 5.0)
    "cispo": {"surrogate": "cispo", "clip_high": 4.0, "aggregation": "token", "kl_coef": 0.0, "dual_clip": None},
    # arXiv:2402.14740; beta .05 is trl's, .03 the paper's on TL;DR
    "rloo": {"baseline": "leave_one_out", "scale": "none", "kl_placement": "reward", "kl_estimator": "k1",
             "kl_coef": 0.05, "aggregation": "constant"},
}  # fmt: skip


@pytest.mark.parametrize("variant", PAPERS)
def test_variants(grpo: Any, variant: str) -> None:
    """A variant is these values, under whatever preset; what the recipe says goes over it; what comes out reads as
    itself, and without the name it is the same method."""
    assert grpo.VARIANTS.keys() == PAPERS.keys()
    for preset in (None, *grpo.PRESETS):
        made = grpo(variant=variant, preset=preset)
        assert {k: getattr(made, k) for k in PAPERS[variant]} == PAPERS[variant]
        assert grpo(**made.model_dump()) == made == grpo(**json.loads(made.model_dump_json()))
    said = {"group_size": 5, "aggregation": "sequence", "clip_high": 0.7, "kl_coef": 0.2}
    made = grpo(variant=variant, preset="verl", dual_clip=None, **said)
    assert {k: getattr(made, k) for k in said} == said
    bare = grpo(**{k: v for k, v in made.model_dump().items() if k not in ("variant", "preset")})
    assert bare.model_copy(update={"variant": variant, "preset": "verl"}) == made


@pytest.mark.parametrize("preset", ["paper", "trl", "verl", "openrlhf"])
def test_presets(grpo: Any, preset: str) -> None:
    made = grpo(preset=preset, group_size=3)
    assert made.group_size == 3
    expected = {k: v for k, v in grpo.PRESETS[preset].items() if k != "group_size"}
    assert {k: getattr(made, k) for k in expected} == expected
    assert grpo(**made.model_dump()) == made


def test_refusals(grpo: Any) -> None:
    """What is the method's own; those of the KL and of the score are in test_online."""
    for options, message in (
        ({"baseline": "ema"}, "baseline ema goes with scale batch or none"),
        ({"normalise_components": True, "scale": "none"}, "normalise_components is a group mean and std"),
        ({"normalise_components": True, "baseline": "leave_one_out"}, "normalise_components is a group mean and std"),
        ({"normalise_components": True, "score_normaliser": "ema"}, "two ways to normalise"),
        ({"normalise_components": True, "score_clip": 1.0}, "leaves nothing to reward_scale and score_clip"),
        ({"normalise_components": True, "reward_scale": 0.1}, "leaves nothing to reward_scale and score_clip"),
        ({"dual_clip": 1.2}, r"dual_clip must be above 1 \+ clip_high = 1\.2"),
        ({"surrogate": "cispo", "dual_clip": 3.0}, "surrogate cispo bounds every ratio"),
        ({"variant": "dapo2"}, "no variant 'dapo2'; did you mean 'dapo'.*there are: dr_grpo, dapo, gspo, cispo, rloo"),
        ({"preset": "paper2"}, "no preset 'paper2'; did you mean 'paper'"),
        ({"group_size": 1}, "group_size"),
    ):
        with pytest.raises(ValueError, match=message):
            grpo(**options)


def test_roles(grpo: Any) -> None:
    for options, expected in (
        ({}, {"policy"}),
        ({"kl_coef": 0.1}, {"policy", "reference"}),
        ({"kl_coef": 0.1, "kl_placement": "reward"}, {"policy", "reference"}),
        ({"kl_coef": 0.1, "kl_placement": "none"}, {"policy"}),
        ({"kl_controller": "lr_guard", "kl_boundaries": (1, 2)}, {"policy", "reference"}),
        ({"variant": "rloo"}, {"policy", "reference"}),
        ({"variant": "dapo", "preset": "paper"}, {"policy"}),
    ):
        assert grpo(**options).models().keys() == expected, options


# ---- rewards ---------------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize(
    "options",
    [{}, {"surrogate": "sequence", "clip_low": 0.01, "clip_high": 0.01}, {"surrogate": "cispo"}, {"dual_clip": 1.06}],
    ids=str,
)
def test_metrics(grpo: Any, options: dict[str, Any]) -> None:
    """Of the second step on the same rollouts, when the policy has moved by one step away from them. `clip_fraction` is
    of what the surrogate bounds: token ratios, the ratio of the whole completion, or weights."""
    settings = FOUR_BY_THREE | {"kl_coef": 0.1, "learning_rate": 0.02, "clip_low": 0.05, "clip_high": 0.05} | options
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
    bounded, (low, high) = ratio, (0.95, 1.05)
    if options.get("surrogate") == "sequence":
        bounded, (low, high) = (
            np.concatenate([np.full(len(n), np.exp((n - o).mean())) for n, o in zip(new, old, strict=True)]),
            (0.99, 1.01),
        )
    held = ((bounded > high) & (advantage > 0)) | ((bounded < low) & (advantage < 0))
    if "dual_clip" in options:
        held |= (bounded > 1.06) & (advantage < 0)
    if options.get("surrogate") == "cispo":
        held = bounded > high
    assert 0 < held.mean() < 1
    assert_close(metrics["policy/entropy"], np.concatenate(entropies).mean(), **FLOAT64)
    assert_close(metrics["policy/ratio"], ratio.mean(), **FLOAT64)
    assert_close(metrics["policy/approx_kl"], (np.log(ratio) ** 2 / 2).mean(), **FLOAT64)
    assert_close(metrics["policy/clip_fraction"], held.mean(), **FLOAT64)
    assert_close(metrics["loss/kl"], (np.exp(-drift) - 1 + drift).mean(), **FLOAT64)


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


def test_rounding_is_no_clipping_and_another_temperature_is() -> None:
    """GSPO's ranges of 3e-4 and 4e-4 are below the rounding of bfloat16; what is beyond them by more still counts,
    even if nothing else compared the log ratios."""
    blind = mutant(module, "gap(scores.logprobs, batch.old_logprobs, batch)", "0.0")
    for temperature in (1.0, 0.5):
        for clips in ({"variant": "gspo"}, {"clip_low": 1e-3, "clip_high": 1e-3}):
            algorithm = blind(prompts_per_phase=8, group_size=4, **clips, temperature=temperature)
            run = start_run(algorithm, dtype=torch.bfloat16)  # which samples at 1
            if temperature == 1:
                run.go(2)
                continue
            with pytest.raises(RunError, match=r"phase 0: the clip fraction is .* before any update"):
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


# ---- mutants ---------------------------------------------------------------------------------------------------------

KL = TIGHT | {"kl_coef": 0.3}
GSPO = TIGHTER | {"surrogate": "sequence"}
CISPO = {"surrogate": "cispo", "clip_high": 0.05}
MUTANTS: list[tuple[str, str, Any, tuple[Any, ...]]] = [
    ("terms = clipped_surrogate(", "terms = -clipped_surrogate(", test_gradient_at_ratio_one_is_reinforce, ()),
    (
        "scores.logprobs - batch.old_logprobs, 0.0)",
        "batch.old_logprobs - scores.logprobs, 0.0)",
        test_loss,
        ("token", TIGHT),
    ),
    ("(self.clip_low, self.clip_high)", "(self.clip_high, self.clip_low)", test_loss, ("token", TIGHT)),
    ('terms + state.algorithm["kl_coef"] * kl', 'terms - state.algorithm["kl_coef"] * kl', test_loss, ("token", KL)),
    ('terms + state.algorithm["kl_coef"] * kl', "terms + kl", test_loss, ("token", KL)),
    ("terms - self.entropy_coef", "terms + self.entropy_coef", test_loss, ("token", TIGHT | {"entropy_coef": 0.3})),
    ("self.aggregation), sums", "'token'), sums", test_loss, ("sequence", TIGHT)),
    ("* source.sampling.max_completion_tokens", "", test_loss, ("constant", TIGHT)),
    ("aggregate(terms, mask,", "aggregate(terms, batch.attention_mask,", test_loss, ("sequence", TIGHT)),
    ('if self.surrogate == "sequence" else log_ratio', "if False else log_ratio", test_loss, ("token", GSPO)),
    (
        "clipped_surrogate(bounded, batch.advantages, *clips, self.dual_clip)",
        "clipped_surrogate(bounded, batch.advantages, *clips)",
        test_loss,
        ("token", TIGHT | {"dual_clip": 1.1}),
    ),
    (
        "clipped_importance(logprobs, log_ratio",
        "clipped_importance(logprobs, 0 * log_ratio",
        test_loss,
        ("token", CISPO),
    ),
    ("batch.advantages, 1 + self.clip_high)", "batch.advantages, 2 + self.clip_high)", test_gradient_of_cispo, ()),
    (
        "clipped(bounded, batch",
        "clipped(log_ratio, batch",
        test_metrics,
        ({"surrogate": "sequence", "clip_low": 0.01, "clip_high": 0.01},),
    ),
    (
        "clipped(log_ratio, advantages, self.clip_low, self.clip_high, self.dual_clip)",
        "clipped(log_ratio, advantages, self.clip_low, self.clip_high)",
        test_metrics,
        ({"dual_clip": 1.06},),
    ),
    ("scale=self.scale, baseline", "scale='group', baseline", test_scale, ("none",)),
    ("baseline=self.baseline", "baseline='group'", test_leave_one_out, ("none",)),
    (
        "torch.where(mask, advantages[:, None], 0.0)",
        "torch.where(batch.attention_mask, advantages[:, None], 0.0)",
        test_scale,
        ("none",),
    ),
    (
        "torch.where(mask, advantages[:, None], 0.0)",
        "torch.where(mask, advantages.flip(0)[:, None], 0.0)",
        test_loss,
        ("token", TIGHT),
    ),
    ("decay * mean + (1 - decay) * now", "decay * mean + now", test_running_mean_as_baseline, ("none",)),
    ("decay * weight + 1 - decay", "1.0", test_running_mean_as_baseline, ("none",)),
    ("mean / weight if known", "mean if known", test_running_mean_as_baseline, ("none",)),
    (
        "mean / weight if known else now",
        "news['baseline_mean'] / news['baseline_weight']",
        test_running_mean_as_baseline,
        ("none",),
    ),
    ("else now, scale=self.scale", "else now, scale='none'", test_running_mean_as_baseline, ("batch",)),
    ("gains - group_adv", "gains + group_adv", test_components_are_normalised_by_themselves, (2.0,)),
    (
        'costs, self.group_size, scale="none"',
        "costs, self.group_size",
        test_components_are_normalised_by_themselves,
        (2.0,),
    ),
    (
        "costs.masked_fill(components.isnan().all(0), torch.nan)",
        "costs",
        test_components_are_normalised_by_themselves,
        (2.0,),
    ),
    ("penalty + self.penalties(groups, like, limit)", "penalty", test_components_are_normalised_by_themselves, (2.0,)),
    ("scores - penalty", "scores + penalty", test_kl_in_the_reward, ("k1", None)),
    (
        'state.algorithm["kl_coef"] * kl.sum(-1)',
        'state.algorithm["kl_coef"] * kl.mean(-1)',
        test_kl_in_the_reward,
        ("k1", None),
    ),
    ('self.penalises and self.kl_placement == "loss"', "self.penalises", test_kl_in_the_reward, ("k1", None)),
    ("mask = mask & stopped_tensor(groups, mask)[:, None]", "mask = mask & mask", test_mask_truncated, ("token", 6.0)),
    (
        "stopped_tensor(groups, mask)[:, None]",
        "~stopped_tensor(groups, mask)[:, None]",
        test_mask_truncated,
        ("token", 6.0),
    ),
    ("batch.select(kept)", "batch", test_mask_truncated, ("sequence", 2.0)),
    ("if not len(kept):", "if False:", test_a_phase_in_which_all_was_cut_off, ()),
    ("attempt=redraws", "attempt=1", test_dynamic_sampling, (10,)),
    ("redraws < self.max_redraws", "redraws < 10", test_dynamic_sampling, (1,)),
    ("found = rollout_metrics(drawn,", "found = rollout_metrics((*kept, *dull),", test_dynamic_sampling, (2,)),
    ("dull = dull[: self.prompts_per_phase - len(kept)]", "dull = []", test_dynamic_sampling, (1,)),
    ("len(dull), self.group_size", "self.prompts_per_phase, self.group_size", test_dynamic_sampling, (1,)),
    ('{**found, **dropped, "group/constant_fraction": share}', "{**found, **dropped}", test_dynamic_sampling, (2,)),
    (
        "dropout: ClassVar[bool] = False",
        "dropout: ClassVar[bool] = True",
        test_every_phase_starts_at_ratio_one,
        (1.0, False),
    ),
    ("gap(scores.logprobs, batch.old_logprobs, batch)", "0.0", test_a_temperature_on_one_side_only_is_found, ()),
    ("if state.step == 0:", "if False:", test_a_reference_that_is_another_model_is_found, ()),
    ("0.5 * log_ratio**2", "log_ratio**2", test_metrics, ({},)),
    (
        '"policy/ratio": masked_sum(log_ratio.exp(), batch)',
        '"policy/ratio": masked_sum(bounded.exp(), batch)',
        test_metrics,
        ({"surrogate": "sequence", "clip_low": 0.01, "clip_high": 0.01},),
    ),
]
MUTANTS_BELOW: list[tuple[str, str, Any, tuple[Any, ...]]] = [
    (
        "kl_estimate(keep(logprobs, mask), keep(reference_logprobs, mask)",
        "kl_estimate(keep(reference_logprobs, mask), keep(logprobs, mask)",
        test_loss,
        ("token", KL),
    ),
    ("self.kl_estimator)", "'k3')", test_loss, ("token", KL | {"kl_estimator": "k2"})),
    (
        'score(models["reference"], b, temperature=temperature)',
        'score(models["reference"], b, temperature=1.0)',
        test_every_phase_starts_at_ratio_one,
        (0.6, False),
    ),
]
"""Of what it has in common with other methods."""


@pytest.mark.parametrize(
    "used, text, replacement, test, arguments",
    [*((None, *case) for case in MUTANTS), *((online_module, *case) for case in MUTANTS_BELOW)],
)
def test_mutants_are_noticed(used: Any, text: str, replacement: str, test: Any, arguments: tuple[Any, ...]) -> None:
    changed = mutant(module, text, replacement, used=used)
    with pytest.raises((AssertionError, RuntimeError, pytest.fail.Exception)):
        test(changed, *arguments)
