"""PPO beside an independent NumPy reference, function by function and then a whole phase; trl 1.16 has no PPO trainer.

The phase: sampled completions and their recorded logprobs -> token rewards, GAE, whitening -> the loss of a minibatch
after both models have moved, and its gradient by finite differences of the reference's loss. All in float64.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from alignlab.algorithms.ppo import PPO
from alignlab.functional.advantages import gae, potential_shaping
from alignlab.functional.kl import kl_estimate
from alignlab.functional.masked import masked_whiten
from alignlab.functional.surrogate import clipped_surrogate, clipped_value_loss
from alignlab.generate import Sampling
from alignlab.models import make_reward_model
from alignlab.optim import AdamWChoice, build_optimizers
from alignlab.rollout import Reward
from alignlab.types import Completion, LoopState, Phase, Prompt, Rollout, Step
from tests.algorithms.world import (
    Run,
    build_models,
    digit_share,
    fill,
    flat,
    loss_and_gradient,
    numbers,
    policy,
    raw_entropies,
    raw_logprobs,
    raw_values,
    source,
)
from tests.conformance import reference as paper
from tests.conformance.record import Measured, check, gap
from tests.tolerances import FLOAT64

pytestmark = pytest.mark.slow

PEER = "NumPy reference"
RNG = np.random.default_rng(7)
LENGTHS = (5, 1, 9, 3, 7)
LIMIT = 14


# ---- function by function --------------------------------------------------------------------------------------------


def rows() -> list[np.ndarray]:
    return [RNG.normal(size=n) for n in LENGTHS]


def padded(given: Sequence[np.ndarray], first: int = 2) -> tuple[Tensor, Tensor]:
    """(T,) rows -> (B, T) with prompts of unequal length before them, NaN outside; and the mask."""
    width = first + len(given) + max(map(len, given)) + 1
    x, mask = torch.full((len(given), width), torch.nan, dtype=torch.float64), torch.zeros(len(given), width).bool()
    for i, row in enumerate(given):
        here = slice(first + i, first + i + len(row))
        x[i, here], mask[i, here] = torch.from_numpy(row), True
    return x, mask


def same(found: Tensor, mask: Tensor, expected: Sequence[np.ndarray]) -> None:
    for row, m, e in zip(found, mask, expected, strict=True):
        np.testing.assert_allclose(row[m].numpy(), e, **FLOAT64)


@pytest.mark.parametrize("gamma, lam", [(1.0, 0.95), (0.99, 0.95), (0.9, 0.0), (0.9, 1.0), (1.0, 1.0)])
@pytest.mark.parametrize("bootstrap", [False, True])
def test_gae(gamma: float, lam: float, bootstrap: bool) -> None:
    rewards, values = rows(), rows()
    after = RNG.normal(size=len(LENGTHS)) if bootstrap else np.zeros(len(LENGTHS))
    (r, mask), (v, _) = padded(rewards), padded(values)
    advantages, returns = gae(r, v, mask, gamma=gamma, gae_lambda=lam, bootstrap_values=torch.from_numpy(after))
    expected = [paper.gae(*row, gamma, lam, float(a)) for *row, a in zip(rewards, values, after, strict=True)]
    same(advantages, mask, [a for a, _ in expected])
    same(returns, mask, [r for _, r in expected])
    if lam not in (0.0, 1.0):  # the reference in its second form: the discounted sum of one-step errors
        for (advantage, _), r_, v_, a_ in zip(expected, rewards, values, after, strict=True):
            errors = r_ + gamma * np.append(v_[1:], a_) - v_
            weights = (gamma * lam) ** np.arange(len(r_))
            np.testing.assert_allclose(
                advantage, [weights[: len(r_) - t] @ errors[t:] for t in range(len(r_))], **FLOAT64
            )


@pytest.mark.parametrize("keep_mean", [False, True])
def test_whitening(keep_mean: bool) -> None:
    given = [3 + 2 * row for row in rows()]
    x, mask = padded(given)
    same(masked_whiten(x, mask, shift_mean=not keep_mean), mask, paper.whitened(given, keep_mean=keep_mean))


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_kl(kind: Any) -> None:
    ours, reference = rows(), rows()
    (a, mask), (b, _) = padded(ours), padded(reference)
    same(kl_estimate(a, b, kind), mask, [paper.kl(*row, kind) for row in zip(ours, reference, strict=True)])


@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_shaping(gamma: float) -> None:
    potentials = rows()
    phi, mask = padded(potentials)
    same(potential_shaping(phi, mask, gamma), mask, [paper.shaping(row, gamma) for row in potentials])


@pytest.mark.parametrize("dual_clip", [None, 1.5])
def test_policy_loss(dual_clip: float | None) -> None:
    """Ratios of .2 to 5 with either sign of the advantage: every branch of min and max."""
    log_ratio, advantages = rows(), rows()
    (x, mask), (a, _) = padded(log_ratio), padded(advantages)
    expected = [
        np.array([-paper.policy_objective(np.exp(x), y, 0.2, 0.3, dual_clip) for x, y in zip(*row, strict=True)])
        for row in zip(log_ratio, advantages, strict=True)
    ]
    same(clipped_surrogate(x, a, 0.2, 0.3, dual_clip), mask, expected)


@pytest.mark.parametrize("clip", [None, 0.2])
def test_value_loss(clip: float | None) -> None:
    values, returns = rows(), rows()
    old = [v + 0.3 * RNG.normal(size=len(v)) for v in values]
    (v, mask), (o, _), (r, _) = padded(values), padded(old), padded(returns)
    expected = [
        np.array([paper.value_loss(*at_t, clip) for at_t in zip(*row, strict=True)])
        for row in zip(values, old, returns, strict=True)
    ]
    same(clipped_value_loss(v, o, r, clip), mask, expected)


@pytest.mark.parametrize("measured, grows", [(9.0, True), (6.5, True), (6.0, None), (5.5, False), (-1.0, False)])
def test_adaptive_controller(measured: float, grows: bool | None) -> None:
    """The coefficient of the next phase; twice over the target counts no more than 1.2 times."""
    algorithm = PPO(kl_controller="adaptive", kl_coef=0.2, kl_target_per_sequence=6.0, kl_horizon=1000.0)
    state = LoopState(seed=0, algorithm={"kl_coef": 0.2, "kl_per_sequence": measured, "kl_completions": 64.0})
    expected = paper.adapted(0.2, measured, 6.0, 64, 1000.0)
    assert algorithm.controlled(state).algorithm["kl_coef"] == pytest.approx(expected, rel=1e-12)
    assert (expected > 0.2) == (grows is True) and (expected < 0.2) == (grows is False)


# ---- a whole phase ---------------------------------------------------------------------------------------------------


def per_token(prompts: Sequence[Prompt], completions: Sequence[Completion]) -> list[list[float]]:
    """Token scores: .1 for a digit's place, unequal along the completion."""
    return [[0.1 * (i % 3) + 0.05 * (t % 2) for i, t in enumerate(x.token_ids)] for x in completions]


def started(algorithm: PPO, rewards: Sequence[Reward]) -> Run:
    """A run in float64 whose policy has left its reference and whose critic has an opinion."""
    torch.manual_seed(0)
    without_reward_model = algorithm.model_copy(update={"dense_reward": "share"})
    models = build_models(without_reward_model, policy())
    shake(models["policy"], 0.03, seed=21)
    fill(models["value_model"].head, 78)
    if algorithm.uses_potential:
        models["reward_model"] = make_reward_model(policy(3), seed=0)
        fill(models["reward_model"].head, 79)
        models["reward_model"].set_normalisation(0.2, 1.7)
    optimizers = build_optimizers(without_reward_model.models(), models, AdamWChoice())
    sampling = Sampling(max_completion_tokens=LIMIT)
    data = source(microbatch_rows=3, rewards=list(rewards), sampling=sampling)
    return Run(algorithm, models, optimizers, data, LoopState(seed=42))


def shake(model: torch.nn.Module, size: float, seed: int) -> None:
    with torch.no_grad():
        generator = torch.Generator().manual_seed(seed)
        for parameter in model.parameters():
            parameter += size * (2 * torch.rand(parameter.shape, generator=generator, dtype=torch.float64) - 1)


class Expected:
    """The reference's view of a phase: by row of tokens, what the method should have made of it."""

    algorithm: PPO

    def __init__(self, run: Run, phase: Phase) -> None:
        self.algorithm = a = run.algorithm
        rollouts: list[Rollout] = [r for g in phase.groups for r in g.rollouts]
        batch = run.source.batch(phase.groups, torch.float64)
        with torch.no_grad():
            values = numbers(raw_values(run.models["value_model"], batch))
            reference = numbers(raw_logprobs(run.models["reference"], batch))
            after = [float(x) for x in self._after(run, batch)]
            potentials = (
                [(x - 0.2) / 1.7 for x in numbers(raw_values(run.models["reward_model"], batch))]
                if a.uses_potential
                else None
            )
        rewards = []
        for i, r in enumerate(rollouts):
            n, score, stopped = len(values[i]), a.reward_scale * r.reward, r.completion.finish_reason == "stop"
            score -= 0.0 if stopped else a.missing_stop_penalty
            score = score if a.score_clip is None else max(-a.score_clip, min(a.score_clip, score))
            if a.reward_placement == "sparse" or a.dense_reward == "potential":
                row = paper.score_on_last_action(score, n)
            elif a.dense_reward == "share":
                row = paper.score_in_shares(score, n)
            else:
                given = a.reward_scale * np.array(r.token_scores)
                row = given + paper.score_on_last_action(score - given.sum(), n)
            if potentials is not None:
                row = row + a.shaping_coef * paper.shaping(potentials[i], a.gamma)
            if a.kl_placement == "reward":
                row = row - a.kl_coef * paper.kl(np.array(r.completion.logprobs), reference[i], a.kl_estimator)
            rewards.append(row)
        if a.whiten_rewards:
            rewards = paper.whitened(rewards, keep_mean=True)
        stopped_rows = [r.completion.finish_reason == "stop" for r in rollouts]
        left = [0.0 if stopped or a.at_cutoff == "zero" else v for stopped, v in zip(stopped_rows, after, strict=True)]
        made = [paper.gae(r, v, a.gamma, a.gae_lambda, last) for r, v, last in zip(rewards, values, left, strict=True)]
        advantages = [x for x, _ in made]
        if a.whiten_advantages:
            advantages = paper.whitened(advantages, keep_mean=False)
        self.rows = {
            (*r.prompt_ids, *r.completion.token_ids): {
                "advantages": advantages[i],
                "returns": made[i][1],
                "old_values": values[i],
                "old_logprobs": np.array(r.completion.logprobs),
                "reference_logprobs": reference[i],
            }
            for i, r in enumerate(rollouts)
        }
        assert {True, False} == set(stopped_rows), "some completions stop and some are cut off"

    @staticmethod
    def _after(run: Run, batch: Any) -> list[Tensor]:
        """V of the state after the last token: the values of rows that are taken to go on for one token more."""
        longer = replace(batch, completion_mask=batch.attention_mask)
        model = run.models["value_model"]
        hidden = [
            model.backbone.get_decoder()(input_ids=ids[m][None]).last_hidden_state[0, -1]
            for ids, m in zip(longer.input_ids, longer.attention_mask, strict=True)
        ]
        return [h @ model.head.weight[0] + model.head.bias[0] for h in hidden]

    def of(self, batch: Any, name: str) -> list[np.ndarray]:
        """The named quantity of the rows of one of our batches."""
        return [
            self.rows[tuple(ids[m].tolist())][name]
            for ids, m in zip(batch.input_ids, batch.attention_mask, strict=True)
        ]

    def loss(self, run: Run, step: Step) -> float:
        """The reference's loss of one optimiser step with the models as they are now."""
        a = self.algorithm
        found: dict[str, list[np.ndarray]] = {k: [] for k in ("ratio", "A", "V", "V_old", "R", "H", "KL")}
        with torch.no_grad():
            for batch in step.microbatches:
                new = numbers(raw_logprobs(run.models["policy"], batch))
                old = self.of(batch, "old_logprobs")
                found["ratio"] += [np.exp(x - y) for x, y in zip(new, old, strict=True)]
                found["A"] += self.of(batch, "advantages")
                found["V"] += numbers(raw_values(run.models["value_model"], batch))
                found["V_old"] += self.of(batch, "old_values")
                found["R"] += self.of(batch, "returns")
                found["H"] += numbers(raw_entropies(run.models["policy"], batch))
                found["KL"] += [
                    paper.kl(x, y, a.kl_estimator)
                    for x, y in zip(new, self.of(batch, "reference_logprobs"), strict=True)
                ]

        def term(ratio: float, A: float, V: float, V_old: float, R: float, H: float, KL: float) -> float:
            policy_loss = -paper.policy_objective(ratio, A, a.clip_low, a.clip_high, a.dual_clip)
            total = policy_loss + a.value_coef * paper.value_loss(V, V_old, R, a.value_clip) - a.entropy_coef * H
            return total + (a.kl_coef * KL if a.kl_placement == "loss" else 0.0)

        return paper.mean_over_actions(term, *found.values())


DIGITS = (Reward(name="digits", function=digit_share, weight=1.0),)
TOKENS = (*DIGITS, Reward(name="places", function=per_token, weight=0.5))
CASES: dict[str, dict[str, Any]] = {
    "defaults": {},
    "score shared over the tokens": {"reward_placement": "dense"},
    "potential shaping": {"reward_placement": "dense", "dense_reward": "potential", "shaping_coef": 0.4, "gamma": 0.95},
    "given token scores": {"reward_placement": "dense", "dense_reward": "given"},
    "whitened rewards": {"whiten_rewards": True},
    "advantages as they are": {"whiten_advantages": False, "gamma": 0.9, "gae_lambda": 0.8},
    "bootstrap at the cut-off": {"at_cutoff": "bootstrap", "gamma": 0.97},
    "penalty, scale and clip of the score": {"missing_stop_penalty": 0.5, "reward_scale": 2.0, "score_clip": 0.6},
    "dual clip": {"dual_clip": 1.1},
    "no value clip": {"value_clip": None},
    "entropy bonus": {"entropy_coef": 0.05},
    "KL in the loss, k3": {"kl_placement": "loss", "kl_estimator": "k3"},
    "KL in the loss, k2": {"kl_placement": "loss", "kl_estimator": "k2"},
    "KL in the reward, k3": {"kl_estimator": "k3"},
}
SMALL = {
    "prompts_per_phase": 5,
    "group_size": 2,
    "epochs": 2,
    "minibatches": 2,
    "clip_low": 0.06,
    "clip_high": 0.04,
    "value_clip": 0.02,
    "value_coef": 0.5,
    "kl_coef": 0.3,
}


def at_work(**options: Any) -> tuple[Run, Phase, Expected]:
    """A collected phase, and both models having moved since."""
    run = started(PPO(**SMALL | options), TOKENS if options.get("dense_reward") == "given" else DIGITS)
    phase, run.state = run.algorithm.collect(run.models, run.source, run.state)
    expected = Expected(run, phase)
    shake(run.models["policy"], 0.03, seed=22)
    shake(run.models["value_model"], 0.01, seed=23)
    return run, phase, expected


def slope(run: Run, step: Step, expected: Expected, seed: int) -> tuple[float, float]:
    """Along one random direction of all weights: <our gradient, direction>, and the reference's finite difference."""
    _, gradient = loss_and_gradient(run, step)
    parameters = {
        f"{role}.{name}": p for role in ("policy", "value_model") for name, p in run.models[role].named_parameters()
    }
    generator = torch.Generator().manual_seed(seed)
    direction = {
        k: torch.randn(g.shape, generator=generator, dtype=g.dtype) + g / flat(gradient).norm()
        for k, g in gradient.items()
    }
    start = {k: parameters[k].detach().clone() for k in direction}

    def moved(by: float) -> float:
        with torch.no_grad():
            for k, v in direction.items():
                parameters[k].copy_(start[k] + by * v)
        return expected.loss(run, step)

    h = 1e-6
    difference = (moved(h) - moved(-h)) / (2 * h)
    moved(0.0)
    return float(sum((gradient[k] * direction[k]).sum() for k in direction)), difference


@pytest.mark.parametrize("case", CASES)
def test_phase(case: str) -> None:
    """Advantages and returns of every row, and loss and slope of all four steps of two epochs."""
    run, phase, expected = at_work(**CASES[case])
    assert len(phase.steps) == 4
    ours, theirs = [], []
    for number, step in enumerate(phase.steps):
        for batch in step.microbatches:
            for name in ("advantages", "returns", "old_values"):
                for x, m, e in zip(getattr(batch, name), batch.completion_mask, expected.of(batch, name), strict=True):
                    np.testing.assert_allclose(x[m].numpy(), e, rtol=1e-8, atol=1e-10)
        mine, by_difference = slope(run, step, expected, seed=number)
        loss = loss_and_gradient(run, step)[0]
        ours.append(Measured(loss, {"slope": torch.tensor([mine], dtype=torch.float64)}))
        theirs.append(Measured(expected.loss(run, step), {"slope": torch.tensor([by_difference], dtype=torch.float64)}))
        assert abs(by_difference) > 1e-3
    for a, b in zip(ours, theirs, strict=True):
        assert gap(a, b).small
    worst = max(range(4), key=lambda i: gap(ours[i], theirs[i]).gradient)
    check("ppo", case, ours[worst], theirs[worst], peer=PEER, where="gemma3, float64, 4 steps",
          note="gradient: the slope along a random direction")  # fmt: skip


def test_every_branch_is_met() -> None:
    """Both ends of the ratio's clip, the second bound and the value's clip hold some action back, and not all."""
    run, phase, expected = at_work(dual_clip=1.1)
    a = run.algorithm
    seen = {"low": 0, "high": 0, "above": 0, "held value": 0, "all": 0}
    for batch in phase.steps[0].microbatches:
        new = numbers(raw_logprobs(run.models["policy"], batch))
        values = numbers(raw_values(run.models["value_model"], batch))
        for x, y, adv, v, o in zip(new, expected.of(batch, "old_logprobs"), expected.of(batch, "advantages"), values,
                                   expected.of(batch, "old_values"), strict=True):  # fmt: skip
            ratio = np.exp(x - y)
            seen["low"] += int(((ratio < 1 - a.clip_low) & (adv < 0)).sum())
            seen["high"] += int(((ratio > 1 + a.clip_high) & (adv > 0)).sum())
            seen["above"] += int(((ratio > 1.1) & (adv < 0)).sum())
            seen["held value"] += int((abs(v - o) > a.value_clip).sum())
            seen["all"] += len(x)
    assert all(0 < seen[k] < seen["all"] for k in ("low", "high", "above", "held value")), seen


MUTANTS: dict[str, Callable[[Run, Step], Step]] = {
    "one token more in the mean": lambda run, step: replace(step, normaliser=step.normaliser + 1),
    "returns are advantages": lambda run, step: with_field(step, returns=lambda b: b.advantages),
    "old values are the returns": lambda run, step: with_field(step, old_values=lambda b: b.returns),
    "the sampling policy is the reference": lambda run, step: with_field(
        step, old_logprobs=lambda b: b.reference_logprobs
    ),
    "advantages one token late": lambda run, step: with_field(step, advantages=lambda b: b.advantages.roll(1, -1)),
}


def with_field(step: Step, **fields: Callable[[Any], Any]) -> Step:
    return replace(
        step,
        microbatches=tuple(replace(b, **{k: f(b) for k, f in fields.items()}) for b in step.microbatches),
    )


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_of_the_step(name: str) -> None:
    run, phase, expected = at_work()
    right = expected.loss(run, phase.steps[0])
    assert abs(loss_and_gradient(run, phase.steps[0])[0] - right) < 1e-9
    assert abs(loss_and_gradient(run, MUTANTS[name](run, phase.steps[0]))[0] - right) > 1e-5


@pytest.mark.parametrize(
    "wrong",
    [{"clip_low": 0.2}, {"value_coef": 1.0}, {"value_clip": None}, {"entropy_coef": 0.01}, {"gae_lambda": 0.9},
     {"gamma": 0.99}, {"kl_coef": 0.31}, {"kl_estimator": "k3"}, {"whiten_rewards": True},
     {"reward_placement": "dense"}, {"at_cutoff": "bootstrap"}],
    ids=str,
)  # fmt: skip
def test_mutants_of_the_method(wrong: dict[str, Any]) -> None:
    """One number off, and the reference notices."""
    run, phase, expected = at_work()
    run.algorithm = PPO(**SMALL | wrong)
    run.state = copy.copy(LoopState(seed=42))
    sampled, _ = collected_again(run, phase)
    assert abs(loss_and_gradient(run, sampled)[0] - expected.loss(run, phase.steps[0])) > 1e-5


def collected_again(run: Run, phase: Phase) -> tuple[Step, Run]:
    """The first step that the run's method makes of the phase's rollouts, its models being those of `at_work`."""
    moved = {name: copy.deepcopy(model.state_dict()) for name, model in run.models.items() if name != "reference"}
    fresh = started(run.algorithm, DIGITS)
    again, run.state = run.algorithm.collect(fresh.models, fresh.source, run.state)
    assert [r.completion.token_ids for g in again.groups for r in g.rollouts] == [
        r.completion.token_ids for g in phase.groups for r in g.rollouts
    ]
    for name, weights in moved.items():
        run.models[name].load_state_dict(weights)
    return again.steps[0], run
