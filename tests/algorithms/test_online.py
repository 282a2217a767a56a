"""What the methods that sample share: scores from rewards, and the controllers of the KL, by hand over phases."""

import json
import math
from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from alignlab.algorithms import _online as module
from alignlab.algorithms import grpo, ppo
from alignlab.errors import UserError
from alignlab.types import Batch, Completion, Group, LoopState, Rollout
from tests.algorithms.world import nudge, numbers, prompt, raw_logprobs, rows_of, start_run
from tests.statistics.mutants import mutated
from tests.tolerances import EXACT, FLOAT64

LIKE = torch.zeros(1, dtype=torch.float64)
METHODS = {"ppo": ppo.ALGORITHM, "grpo": grpo.ALGORITHM}


@pytest.fixture
def online() -> Any:
    return module


def doubles(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def group(rewards: Sequence[float], lengths: Sequence[int] | None = None, stops: str = "") -> Group:
    """Completions of these rewards and lengths; `stops` has an x for each that was cut off."""
    made = []
    for i, reward in enumerate(rewards):
        length = lengths[i] if lengths else 3
        completion = Completion(
            token_ids=(9,) * length,
            logprobs=(0.0,) * length,
            finish_reason="length" if stops[i : i + 1] == "x" else "stop",
            text="",
        )
        breakdown = {} if math.isnan(reward) else {"digits": reward}
        made.append(
            Rollout(prompt=prompt("1+1"), prompt_ids=(2,), completion=completion, reward=reward, breakdown=breakdown)
        )
    return Group(rollouts=tuple(made))


def stored(state: LoopState) -> LoopState:
    """The state as a checkpoint brings it back."""
    return LoopState(**json.loads(json.dumps({f.name: getattr(state, f.name) for f in fields(state)})))


# ---- scores ----------------------------------------------------------------------------------------------------------


def test_a_reward_is_its_score_unless_something_is_asked_for(online: Any) -> None:
    shaping = online.ScoreShaping()
    scores, state = shaping.scores([group([1.5, math.nan], stops=" x")], LIKE, LoopState(seed=0), 8)
    assert_close(scores, doubles(1.5, math.nan), equal_nan=True, **EXACT)
    assert state == LoopState(seed=0)


def test_running_moments_over_three_phases(online: Any) -> None:
    """Decay .9. Rewards (1, 3), then (5), then (NaN, 2, 4); the weighted sums and what divides them:

    phase 0: first .1 * 2, second .1 * 5, weight .1: mean 2, mean square 5, variance 1: scores -+1
    phase 1: .18 + .5 = .68, .45 + 2.5 = 2.95, weight .19
    phase 2: .612 + .3 = .912, 2.655 + 1 = 3.655, weight .271: the NaN is in none of them
    """
    shaping, state = online.ScoreShaping(score_normaliser="ema", ema_decay=0.9), LoopState(seed=0)
    expected = {0: (0.2, 0.5, 0.1), 1: (0.68, 2.95, 0.19), 2: (0.912, 3.655, 0.271)}
    for phase, rewards in enumerate([[1.0, 3.0], [5.0], [math.nan, 2.0, 4.0]]):
        scores, state = shaping.scores([group(rewards)], LIKE, stored(state), 8)
        first, second, weight = expected[phase]
        found = [state.algorithm[f"reward_{k}"] for k in ("mean", "square", "weight")]
        assert_close(found, [first, second, weight], **FLOAT64)
        mean, sd = first / weight, math.sqrt(second / weight - (first / weight) ** 2)
        assert_close(scores, (doubles(*rewards) - mean) / (sd + 1e-4), equal_nan=True, **FLOAT64)
    assert_close(doubles(*online.running_moments(state)), doubles(mean, sd), **FLOAT64)


def test_moments_without_anything_to_remember(online: Any) -> None:
    shaping, state = online.ScoreShaping(score_normaliser="ema"), LoopState(seed=0)
    scores, after = shaping.scores([group([math.nan, math.nan])], LIKE, state, 8)
    assert after == state and online.running_moments(state) == (0.0, 0.0)
    assert scores.isnan().all()
    scores, _ = shaping.scores([group([2.0, 2.0])], LIKE, state, 8)
    assert_close(scores, doubles(0.0, 0.0), **FLOAT64)  # no spread yet


def test_order_of_shaping(online: Any) -> None:
    """Normalise, scale, take penalties off, clip. (1, 3, -) normalised is -+1 / 1.0001 =: -+n; times 2; the first and
    the third were cut off and pay 3; held to +-4: -2n - 3 -> -4, 2n, and 0 - 3 for the one nobody judged."""
    shaping = online.ScoreShaping(
        score_normaliser="ema", reward_scale=2.0, missing_stop_penalty=3.0, score_clip=4.0, ema_decay=0.5
    )
    scores, _ = shaping.scores([group([1.0, 3.0, math.nan], stops="x x")], LIKE, LoopState(seed=0), 8)
    assert_close(scores, doubles(-4.0, 2 / 1.0001, math.nan), equal_nan=True, **FLOAT64)
    plain = shaping.model_copy(update={"score_clip": None})
    scores, _ = plain.scores([group([1.0, 3.0, math.nan], stops="x x")], LIKE, LoopState(seed=0), 8)
    assert_close(scores, doubles(-2 / 1.0001 - 3, 2 / 1.0001, math.nan), equal_nan=True, **FLOAT64)


def test_scale_is_of_the_reward_alone(online: Any) -> None:
    """.1 * 2 - 1, as the penalty is in units of the score."""
    shaping = online.ScoreShaping(reward_scale=0.1, missing_stop_penalty=1.0)
    scores, _ = shaping.scores([group([2.0, 1.0], stops="x ")], LIKE, LoopState(seed=0), 8)
    assert_close(scores, doubles(-0.8, 0.1), **FLOAT64)


def test_overlong_penalty(online: Any) -> None:
    """arXiv:2503.14476 eq. 13 with a limit of 10 and a buffer of 4: nothing up to 6 tokens, then a quarter a token, 1
    at the limit; a missing stop token costs on top."""
    shaping = online.ScoreShaping(overlong_buffer=4, missing_stop_penalty=2.0)
    lengths = [1, 5, 6, 7, 8, 9, 10, 10]
    cost = shaping.penalties([group([0.0] * 8, lengths, stops="       x")], LIKE, 10)
    assert_close(cost, doubles(0, 0, 0, 0.25, 0.5, 0.75, 1, 3), **FLOAT64)
    assert not online.ScoreShaping().penalties([group([0.0] * 8, lengths, stops="       x")], LIKE, 10).any()


def test_an_overlong_penalty_that_begins_at_the_first_token(online: Any) -> None:
    for buffer in (10, 11):
        with pytest.raises(UserError, match=rf"algorithm\.overlong_buffer: .* {buffer} tokens before the limit of 10"):
            online.ScoreShaping(overlong_buffer=buffer).check_buffer(10)
    online.ScoreShaping(overlong_buffer=9).check_buffer(10)


@pytest.mark.parametrize("name", METHODS)
def test_shaping_reaches_the_method(name: str) -> None:
    """The scores a method learns from are those of `ScoreShaping`: the overlong penalty moves PPO's returns and
    GRPO's advantages by what it says."""
    options = {"prompts_per_phase": 4, "group_size": 2, "epochs": 1}
    options |= {"kl_coef": 0.0, "gae_lambda": 1.0} if name == "ppo" else {"scale": "none"}
    found = []
    for shaping in ({}, {"overlong_buffer": 2, "reward_scale": 3.0}):
        run = start_run(METHODS[name](**options, **shaping), microbatch_rows=8)
        phase, _ = run.algorithm.collect(run.models, run.source, run.state)
        (batch,) = phase.steps[0].microbatches
        tensor, lengths = batch.returns if name == "ppo" else batch.advantages, batch.completion_mask.sum(-1)
        assert tensor is not None
        found.append((phase, tensor.gather(1, batch.completion_mask.int().argmax(-1)[:, None])[:, 0], batch, lengths))
    (phase, plain, batch, lengths), (_, shaped, other, _) = found
    assert torch.equal(batch.input_ids, other.input_ids) and len(set(lengths.tolist())) > 1
    penalty = ((lengths - 6) / 2).clamp(0, 1).double()
    if name == "grpo":
        order = {(*r.prompt_ids, *r.completion.token_ids): i for i, g in enumerate(phase.groups) for r in g.rollouts}
        groups = [order[tuple(ids[m].tolist())] for ids, m in zip(batch.input_ids, batch.attention_mask, strict=True)]
        penalty = penalty - torch.stack([penalty[[g == h for g in groups]].mean() for h in groups])
    assert_close(shaped, 3 * plain - penalty, **FLOAT64)


# ---- the KL ----------------------------------------------------------------------------------------------------------


def measured_state(**known: float) -> LoopState:
    return LoopState(seed=0, phase=4, algorithm=known)


@pytest.mark.parametrize(
    "kl, factor",
    [(12.0, 1 + 0.2 * 50 / 1000), (6.6, 1 + 0.1 * 50 / 1000), (6.0, 1.0), (5.7, 1 - 0.05 * 50 / 1000),
     (0.0, 1 - 0.2 * 50 / 1000), (-3.0, 1 - 0.2 * 50 / 1000)],
)  # fmt: skip
def test_adaptive(online: Any, kl: float, factor: float) -> None:
    """Target 6 nats a completion, horizon 1,000, 50 completions: 1 + clip(KL / 6 - 1, +-.2) 50 / 1000."""
    control = online.KLControl(kl_coef=0.5, kl_controller="adaptive", kl_horizon=1000)
    known = {"kl_coef": 0.3, "kl_per_sequence": kl, "kl_per_token": 99.0, "kl_completions": 50.0}
    after = control.controlled(measured_state(**known))
    assert_close(after.algorithm["kl_coef"], 0.3 * factor, **FLOAT64)
    assert control.controlled(LoopState(seed=0)).algorithm == {"kl_coef": 0.5}


def test_adaptive_over_three_phases(online: Any) -> None:
    """What one phase measures moves the next: 2 completions, KL (12, 12) nats, then (6.6, 6.6), then 0; horizon 10."""
    control, state = online.KLControl(kl_coef=0.5, kl_controller="adaptive", kl_horizon=10.0), LoopState(seed=0)
    factors = []
    for kl in (12.0, 6.6, 0.0):
        state = control.controlled(stored(state))
        factors.append(state.algorithm["kl_coef"])
        metrics, state = control.measured(drifted([[kl], [kl]]), state)
        assert metrics["policy/kl_coef"] == factors[-1]
    assert_close(factors, [0.5, 0.5 * 1.04, 0.5 * 1.04 * 1.02], **FLOAT64)


def test_phased(online: Any) -> None:
    """Targets .05, .02, .01 nats a token from phases 0, 3 and 5 on; at .021 the last phase was under the first by more
    than a fifth, over the second by a twentieth, over the third by more than a fifth. 10 completions, horizon 100."""
    control = online.KLControl(kl_controller="phased", kl_boundaries=(3, 5), kl_horizon=100.0)
    known = {"kl_coef": 0.3, "kl_per_sequence": 99.0, "kl_per_token": 0.021, "kl_completions": 10.0}
    expected = {1: -0.2, 2: -0.2, 3: 0.05, 4: 0.05, 5: 0.2, 9: 0.2}
    for phase, error in expected.items():
        after = control.controlled(replace(measured_state(**known), phase=phase))
        assert_close(after.algorithm["kl_coef"], 0.3 * (1 + error * 0.1), **FLOAT64)
    assert [control.target_per_token(p) for p in (0, 2, 3, 4, 5, 800)] == [0.05, 0.05, 0.02, 0.02, 0.01, 0.01]


@pytest.mark.parametrize("kind", ["fixed", "lr_guard"])
def test_a_coefficient_that_stays(online: Any, kind: str) -> None:
    control = online.KLControl(kl_coef=0.5, kl_controller=kind, kl_boundaries=(1, 2))
    known = {"kl_coef": 0.5, "kl_per_sequence": 99.0, "kl_per_token": 9.0, "kl_completions": 10.0}
    assert control.controlled(measured_state(**known)).algorithm["kl_coef"] == 0.5


def test_without_a_reference_nothing_is_remembered(online: Any) -> None:
    for options in ({"kl_coef": 0.0}, {"kl_placement": "none"}):
        assert online.KLControl(**options).controlled(LoopState(seed=0)) == LoopState(seed=0)


def drifted(rows: list[list[float]]) -> Batch:
    """A batch whose old logprobs are these above the reference's; NaN where a row has no such token."""
    width = max(len(row) for row in rows)
    drift = doubles(*(x for row in rows for x in [*row, *[math.nan] * (width - len(row))])).view(len(rows), width)
    mask = ~drift.isnan()
    reference = torch.full_like(drift, -1.0)
    return Batch(
        input_ids=torch.ones_like(mask, dtype=torch.int64),
        attention_mask=mask,
        completion_mask=mask,
        old_logprobs=reference + drift,
        reference_logprobs=reference,
    )


def test_what_is_measured(online: Any) -> None:
    """Sums .3, .6, 0 over 2, 1 and 3 tokens: .3 a completion, .15 a token; their standard deviation is sqrt((0 + .09 +
    .09) / 2) = .3, over sqrt 3."""
    control = online.KLControl(kl_coef=0.5)
    batch = drifted([[0.1, 0.2], [0.6], [0.3, -0.3, 0.0]])
    metrics, state = control.measured(batch, LoopState(seed=0, algorithm={"kl_coef": 0.7}))
    assert_close(metrics["policy/kl_per_sequence"], 0.3, **FLOAT64)
    assert_close(metrics["policy/kl_per_token"], 0.15, **FLOAT64)
    assert_close(metrics["policy/kl_standard_error"], 0.3 / math.sqrt(3), **FLOAT64)
    assert metrics["policy/kl_coef"] == 0.7 and len(metrics) == 4
    remembered = {"kl_coef": 0.7, "kl_per_sequence": 0.3, "kl_per_token": 0.15, "kl_completions": 3.0}
    assert state.algorithm == pytest.approx(remembered)
    single, _ = control.measured(drifted([[0.1, 0.2]]), LoopState(seed=0, algorithm={"kl_coef": 0.7}))
    assert math.isnan(single["policy/kl_standard_error"])
    none = online.KLControl(kl_placement="none", kl_controller="lr_guard", kl_boundaries=(1, 2))
    assert none.measured(batch, LoopState(seed=0, algorithm={"kl_coef": 0.7}))[0]["policy/kl_coef"] == 0.0


@pytest.mark.parametrize("name", METHODS)
def test_measured_of_the_sampling_policy(name: str) -> None:
    """k1 of the completions that were sampled, from the recorded logprobs and the reference's own."""
    run = start_run(METHODS[name](prompts_per_phase=4, group_size=3, kl_coef=0.1))
    nudge(run.models["policy"], 0.05)
    phase, _ = run.algorithm.collect(run.models, run.source, run.state)
    whole = run.source.batch(phase.groups, torch.float64)
    reference = numbers(raw_logprobs(run.models["reference"], whole))
    sums = np.array([(old - ref).sum() for old, ref in zip(rows_of(whole.old_logprobs, whole), reference, strict=True)])
    tokens = int(whole.completion_mask.sum())
    metrics = phase.metrics
    assert_close(metrics["policy/kl_per_sequence"], float(sums.mean()), **FLOAT64)
    assert_close(metrics["policy/kl_per_token"], float(sums.sum()) / tokens, **FLOAT64)
    assert_close(metrics["policy/kl_standard_error"], float(sums.std(ddof=1) / np.sqrt(12)), **FLOAT64)
    assert metrics["policy/kl_per_sequence"] > 0.1


# ---- lr_guard --------------------------------------------------------------------------------------------------------


def test_guard_by_itself(online: Any) -> None:
    """Over the phase's target: halved, twice, then stopped; on target or without the phase's KL: nothing happens. While
    it falls after a lowering it is left alone; on target, and with a new target, the count begins anew."""
    control = online.KLControl(
        kl_controller="lr_guard", kl_targets_per_token=(0.05, 0.02), kl_boundaries=(3,), lr_guard_patience=2
    )
    state = LoopState(seed=0)
    for metrics in (
        {},
        {"policy/kl_per_token": 0.05},
        {"policy/kl_per_token": -0.1},
        {"policy/kl_per_token": math.nan},
    ):
        after, directive = control.guarded(state, metrics)
        assert after.algorithm.get("lr_lowered", 0.0) == 0
        assert (directive.action, directive.learning_rate_factor) == ("continue", {})
    over = {"policy/kl_per_token": 0.0501}
    for lowered in (1, 2):
        state, directive = control.guarded(stored(state), over)
        assert state.algorithm["lr_lowered"] == lowered
        assert (directive.action, directive.learning_rate_factor) == ("continue", {"policy": 0.5})
    stopped, directive = control.guarded(stored(state), over)
    assert stopped == state and directive.action == "stop" and directive.learning_rate_factor == {}
    assert directive.reason == (
        "KL 0.0501 over 0.05 nats a token, and the learning rate was lowered 2 times without help"
    )
    assert control.guarded(state, {"policy/kl_per_token": 0.05005}) == (state, module.Directive())  # falling
    eased, _ = control.guarded(state, {"policy/kl_per_token": 0.04})
    lowered_again, directive = control.guarded(eased, over)
    assert lowered_again.algorithm["lr_lowered"] == 1 and directive.learning_rate_factor == {"policy": 0.5}
    later = replace(state, phase=3)
    state, directive = control.guarded(later, {"policy/kl_per_token": 0.03})
    assert state.algorithm["lr_lowered"] == 1 and directive.learning_rate_factor == {"policy": 0.5}
    fixed = online.KLControl()
    assert fixed.guarded(state, over) == (state, module.Directive())


@pytest.mark.parametrize("name", METHODS)
def test_guard_in_the_loop(name: str) -> None:
    """Through the real loop: phase 0 is on the reference, later ones are over the target. Each lowers the rate of what
    follows, the policy's alone, unless it fell since the last time; the third is one too many and ends the run."""
    options = {"prompts_per_phase": 4, "group_size": 4, "learning_rate": 0.01, "epochs": 2}
    guard = {"kl_controller": "lr_guard", "kl_targets_per_token": (1e-4,), "lr_guard_factor": 0.25}
    placement = {"kl_placement": "none"} if name == "ppo" else {}
    run = start_run(METHODS[name](**options, **guard, **placement, lr_guard_patience=2), microbatch_rows=16)
    run.go(10)
    kl = run.column("policy/kl_per_token")
    assert abs(kl[0]) < 1e-12 and all(x > 1e-4 for x in kl[1:])
    rates = run.column("policy/learning_rate")
    expected, rate, highest = [0.01, 0.01], 0.01, 0.0
    for value in kl[1:]:
        expected.append(rate)
        if value >= highest:
            rate, highest = 0.25 * rate, value
        expected.append(rate)
    assert_close(rates, expected[:-1], **FLOAT64)
    assert (
        run.state.phase == len(kl) < 10
        and len(set(rates)) == 3
        and "the learning rate was lowered 2 times without help" in run.state.stop_reason
    )
    assert run.column("ended") == [run.state.stop_reason]
    assert run.state.learning_rate_factor == {"policy": 0.0625}
    if name == "ppo":
        assert set(run.column("value_model/learning_rate")) == {1e-5}
    assert set(run.column("policy/kl_coef")) == {0.0}


def test_guard_and_early_stop_both_act() -> None:
    """PPO may lower the rate and end the phase at once."""
    algorithm = ppo.ALGORITHM(
        kl_controller="lr_guard", kl_targets_per_token=(0.01,), kl_placement="none", stop_epochs_above_kl=0.1
    )
    metrics = {"policy/kl_per_token": 0.02, "policy/approx_kl": 0.2}
    state, directive = algorithm.observe(LoopState(seed=0), metrics)
    assert directive.action == "end_phase" and directive.learning_rate_factor == {"policy": 0.5}
    assert state.algorithm == {"lr_lowered": 1.0, "lr_guard_target": 0.01, "lr_guard_kl": 0.02}


# ---- a run that is resumed -------------------------------------------------------------------------------------------

MEMORY: dict[str, Any] = {
    "ppo": ppo.ALGORITHM(
        prompts_per_phase=4, group_size=2, learning_rate=0.01, score_normaliser="ema", ema_decay=0.8, kl_coef=0.2,
        kl_controller="adaptive", kl_horizon=20, epochs=2,
    ),
    "grpo": grpo.ALGORITHM(
        prompts_per_phase=4, group_size=2, learning_rate=0.01, score_normaliser="ema", ema_decay=0.8, baseline="ema",
        scale="none", kl_coef=0.2, kl_controller="phased", kl_boundaries=(1, 2), kl_horizon=20,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MEMORY)
def test_what_is_remembered_survives_a_checkpoint(name: str) -> None:
    """Three phases in one go, or with the state stored as JSON in between: the same bits in weights and log."""
    whole, resumed = (start_run(MEMORY[name]) for _ in range(2))
    whole.go(3)
    for phase in (1, 2, 3):
        resumed.go(phase)
        resumed.state = stored(resumed.state)
    assert resumed.state.algorithm == whole.state.algorithm and "reward_weight" in whole.state.algorithm
    assert len(set(whole.column("policy/kl_coef"))) == 3
    for key, value in whole.models["policy"].state_dict().items():
        assert torch.equal(value, resumed.models["policy"].state_dict()[key])
    for name_ in ("loss/total", "policy/kl_coef", "reward/mean"):
        assert whole.column(name_) == resumed.column(name_)


@pytest.mark.parametrize("name", MEMORY)
def test_a_run_that_forgets_is_noticed(name: str) -> None:
    """That is, the memory matters in the test above."""
    whole, forgetful = (start_run(MEMORY[name]) for _ in range(2))
    whole.go(3)
    for phase in (1, 2, 3):
        forgetful.go(phase)
        forgetful.state = replace(forgetful.state, algorithm={})
    assert whole.column("policy/kl_coef") != forgetful.column("policy/kl_coef")
    assert whole.column("loss/total")[-1] != forgetful.column("loss/total")[-1]


# ---- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize(
    "options, message",
    [
        ({"kl_controller": "adaptive", "kl_coef": 0.0}, "kl_controller adaptive multiplies kl_coef, so it must start"),
        (
            {"kl_controller": "phased", "kl_coef": 0.0},
            "kl_controller phased multiplies kl_coef, so it must start above",
        ),
        ({"kl_controller": "adaptive", "kl_coef": 0.1, "kl_placement": "none"}, "kl_placement none ignores"),
        ({"kl_controller": "phased", "kl_coef": 0.1, "kl_placement": "none"}, "kl_controller phased moves kl_coef"),
        ({"kl_controller": "phased", "kl_coef": 0.1}, "kl_boundaries: 3 targets need 2 phases .* not 0"),
        ({"kl_controller": "lr_guard"}, "kl_boundaries: 3 targets need 2 phases at which the next begins, not 0"),
        ({"kl_controller": "lr_guard", "kl_targets_per_token": (0.1,), "kl_boundaries": (3,)}, "1 targets need 0"),
        ({"kl_controller": "lr_guard", "kl_boundaries": (5, 5)}, "kl_boundaries above 0 and rising"),
        ({"kl_controller": "lr_guard", "kl_boundaries": (5, 3)}, "kl_boundaries above 0 and rising"),
        ({"kl_controller": "lr_guard", "kl_boundaries": (0, 3)}, "kl_boundaries above 0 and rising"),
        ({"kl_controller": "lr_guard", "kl_targets_per_token": (0.1, 0.0), "kl_boundaries": (3,)}, "above 0"),
        ({"kl_targets_per_token": ()}, "kl_targets_per_token"),
        ({"kl_controller": "none"}, "kl_controller"),
        ({"kl_coef": -0.1}, "kl_coef"),
        ({"kl_threshold": -0.1}, "kl_threshold"),
        ({"kl_target_per_sequence": 0.0}, "kl_target_per_sequence"),
        ({"kl_horizon": 0.0}, "kl_horizon"),
        ({"lr_guard_factor": 1.0}, "lr_guard_factor"),
        ({"lr_guard_patience": -1}, "lr_guard_patience"),
        ({"ema_decay": 1.0}, "ema_decay"),
        ({"reward_scale": 0.0}, "reward_scale"),
        ({"missing_stop_penalty": -1.0}, "missing_stop_penalty"),
        ({"overlong_buffer": 0}, "overlong_buffer"),
        ({"score_clip": 0.0}, "score_clip"),
        ({"score_normaliser": "batch"}, "score_normaliser"),
    ],
    ids=str,
)
def test_refusals(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        METHODS[name](**options)


def test_boundaries_matter_only_to_those_who_read_them(online: Any) -> None:
    assert online.KLControl(kl_controller="adaptive").kl_boundaries == ()
    assert online.KLControl(kl_controller="phased", kl_targets_per_token=(0.1,)).target_per_token(9) == 0.1


@pytest.mark.parametrize(
    "text, replacement, test, arguments",
    [
        ("/ (sd + NORMALISER_EPS)", "/ sd", test_moments_without_anything_to_remember, ()),
        ("(rewards - mean) /", "rewards /", test_running_moments_over_three_phases, ()),
        ("given.square().mean()", "given.mean().square()", test_running_moments_over_three_phases, ()),
        ("rewards[~rewards.isnan()]", "rewards.nan_to_num(0)", test_running_moments_over_three_phases, ()),
        (
            "decay * before.get(k, 0.0) + (1 - decay)",
            "decay * before.get(k, 0.0) + 1",
            test_running_moments_over_three_phases,
            (),
        ),
        (
            'state.algorithm["reward_mean"] / weight',
            'state.algorithm["reward_mean"]',
            test_running_moments_over_three_phases,
            (),
        ),
        ("square - mean * mean", "square", test_running_moments_over_three_phases, ()),
        ("self.reward_scale * rewards - self", "self.reward_scale * rewards + self", test_order_of_shaping, ()),
        (
            "self.reward_scale * rewards - self.penalties(groups, like, limit)",
            "self.reward_scale * (rewards - self.penalties(groups, like, limit))",
            test_scale_is_of_the_reward_alone,
            (),
        ),
        ("clamp(-self.score_clip, self.score_clip)", "clamp(max=self.score_clip)", test_order_of_shaping, ()),
        (".clamp(0, 1)", ".clamp(max=1)", test_overlong_penalty, ()),
        ("(limit - self.overlong_buffer)", "limit", test_overlong_penalty, ()),
        ("beyond / self.overlong_buffer", "beyond / limit", test_overlong_penalty, ()),
        ("return cost + (beyond", "return (beyond", test_overlong_penalty, ()),
        (
            "self.overlong_buffer >= limit",
            "self.overlong_buffer > limit",
            test_an_overlong_penalty_that_begins_at_the_first_token,
            (),
        ),
        ("min(0.2, max(-0.2, error))", "error", test_adaptive, (12.0, 1.01)),
        ("/ self.kl_horizon", "/ 10_000", test_adaptive, (12.0, 1.01)),
        ('known["kl_completions"] /', "1 /", test_adaptive, (12.0, 1.01)),
        ('known["kl_per_sequence"] / self', 'known["kl_per_token"] / self', test_adaptive, (6.0, 1.0)),
        ("bisect_right(self.kl_boundaries, phase)", "bisect_right(self.kl_boundaries, phase - 1)", test_phased, ()),
        ('known["kl_per_token"] / self', 'known["kl_per_sequence"] / self', test_phased, ()),
        ("of_rows.std() / len(batch) ** 0.5", "of_rows.std()", test_what_is_measured, ()),
        (
            "drift.sum() / batch.completion_mask.sum()",
            "drift.mean() + 0 * batch.completion_mask.sum()",
            test_what_is_measured,
            (),
        ),
        (
            "keep(batch.old_logprobs - batch.reference_logprobs, batch.completion_mask)",
            "(batch.old_logprobs - batch.reference_logprobs)",
            test_what_is_measured,
            (),
        ),
        ("lowered >= self.lr_guard_patience", "lowered > self.lr_guard_patience", test_guard_by_itself, ()),
        ("not kl > target", "not kl >= target", test_guard_by_itself, ()),
        ('if lowered and kl < known["lr_guard_kl"]', "if False", test_guard_by_itself, ()),
        ('if known.get("lr_guard_target") == target else 0.0', "", test_guard_by_itself, ()),
        ('"lr_lowered": 0.0, "lr', '"lr_lowered": lowered, "lr', test_guard_by_itself, ()),
        ('{"policy": self.lr_guard_factor}', '{"policy": 1 / self.lr_guard_factor}', test_guard_by_itself, ()),
    ],
)
def test_mutants_are_noticed(text: str, replacement: str, test: Any, arguments: tuple[Any, ...]) -> None:
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        test(mutated(module, text, replacement), *arguments)
