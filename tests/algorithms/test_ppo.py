"""PPO: token rewards and GAE on three tokens by hand; the loss from raw log-softmaxes and hidden states."""

import itertools
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from alignlab.algorithms import _online as online_module
from alignlab.algorithms import ppo as module
from alignlab.errors import UserError
from alignlab.generate import Sampling
from alignlab.rollout import Reward
from alignlab.train import RunError
from alignlab.types import Batch, Completion, Group, Prompt
from tests.algorithms.world import (
    Run,
    collect,
    fill,
    fixed,
    flat,
    loss_and_gradient,
    mutant,
    nudge,
    numbers,
    raw_entropies,
    raw_logprobs,
    raw_states,
    raw_values,
    rollout,
    rows_of,
    slipping,
    start_run,
    template,
)
from tests.tolerances import EXACT, FLOAT64

TEN = {"prompts_per_phase": 5, "group_size": 2}
KL = (0.1, -0.2, 0.3)
"""log pi_old - log ref of the three tokens of the completions below."""


@pytest.fixture
def ppo() -> Any:
    return module.ALGORITHM


# ---- three tokens by hand --------------------------------------------------------------------------------------------


def three_tokens(algorithm: Any, value: float = 0.25, **options: Any) -> tuple[Run, Batch, Any]:
    """A phase with one completion `ab<end_of_turn>` (or `abc`, cut off) of score 2, KL (.1, -.2, .3) and V = .25."""
    shift, reward, stop = options.pop("shift", KL), options.pop("reward", 2.0), options.pop("stop", True)
    token_scores = options.pop("token_scores", None)
    settings = {"kl_coef": 0.5, "gamma": 1.0, "gae_lambda": 1.0, "whiten_advantages": False, "epochs": 1}
    run = start_run(algorithm(**settings | options))
    with torch.no_grad():
        run.models["value_model"].head.bias.fill_(value)
    made = rollout(run.models["policy"], "1+1", "ab" if stop else "abc", reward=reward, shift=shift, stop=stop)
    run.source = fixed([Group(rollouts=(replace(made, token_scores=token_scores),))])
    phase, run.state = run.algorithm.collect(run.models, run.source, run.state)
    (batch,) = phase.steps[0].microbatches
    assert int(batch.completion_mask.sum()) == 3
    return run, batch, phase


def returns_and_advantages(algorithm: Any, **options: Any) -> tuple[np.ndarray, np.ndarray]:
    _, batch, _ = three_tokens(algorithm, **options)
    return rows_of(batch.returns, batch)[0], rows_of(batch.advantages, batch)[0]


def test_sparse_reward(ppo: Any) -> None:
    """r = (-.05, .1, 2 - .15); gamma = lambda = 1: returns (1.9, 1.95, 1.85), advantages .25 less."""
    returns, advantages = returns_and_advantages(ppo)
    assert_close(returns, np.array([1.9, 1.95, 1.85]), **FLOAT64)
    assert_close(advantages, np.array([1.65, 1.7, 1.6]), **FLOAT64)


def test_dense_reward(ppo: Any) -> None:
    """r = 2/3 + (-.05, .1, -.15): returns (1.9, 1.28333, .516667). The shares add up to the score, the KL stays."""
    returns, _ = returns_and_advantages(ppo, reward_placement="dense")
    assert_close(returns, np.array([1.9, 4 / 3 - 0.05, 2 / 3 - 0.15]), **FLOAT64)


def test_gae(ppo: Any) -> None:
    """gamma .9, lambda .8, V = .25, V_T = 0:  A_2 = 1.85 - .25 = 1.6;  A_1 = .1 + .225 - .25 + .72 A_2 = 1.227;
    A_0 = -.05 + .225 - .25 + .72 A_1 = .80844;  returns A + .25."""
    returns, advantages = returns_and_advantages(ppo, gamma=0.9, gae_lambda=0.8)
    assert_close(advantages, np.array([0.80844, 1.227, 1.6]), **FLOAT64)
    assert_close(returns, np.array([1.05844, 1.477, 1.85]), **FLOAT64)


@pytest.mark.parametrize("at_cutoff, last", [("zero", 1.6), ("bootstrap", 1.6 + 0.9 * 0.25)])
def test_cut_off(ppo: Any, at_cutoff: str, last: float) -> None:
    """A completion cut off at its limit may go on with gamma V(after it) = .225; one that stopped never does."""
    options = {"gamma": 0.9, "gae_lambda": 0.8, "at_cutoff": at_cutoff}
    assert_close(returns_and_advantages(ppo, stop=False, **options)[1][2], last, **FLOAT64)
    assert_close(returns_and_advantages(ppo, stop=True, **options)[1][2], 1.6, **FLOAT64)


def test_penalty_before_clip(ppo: Any) -> None:
    """Cut off: 2 - 3 = -1, clipped to -.5, minus .5 * .3. The other way round it would be .5 - 3. Stopped: 2 -> .5."""
    options = {"missing_stop_penalty": 3.0, "score_clip": 0.5}
    assert_close(returns_and_advantages(ppo, stop=False, **options)[0][2], -0.65, **FLOAT64)
    assert_close(returns_and_advantages(ppo, stop=True, **options)[0][2], 0.35, **FLOAT64)


def test_what_nobody_judged_is_left_out(ppo: Any) -> None:
    """Of ten completions those without a digit get no reward: they are sampled and counted, and not trained on."""

    def digits(prompts: Sequence[Prompt], completions: Sequence[Completion]) -> list[float | None]:
        counts = [sum(c.isdigit() for c in completion.text) for completion in completions]
        return [float(n) if n else None for n in counts]

    run = start_run(ppo(**TEN, epochs=1), rewards=[Reward(name="digits", function=digits, weight=1.0)])
    phase, _ = run.algorithm.collect(run.models, run.source, run.state)
    drawn = [r for g in phase.groups for r in g.rollouts]
    judged = [r for r in drawn if not math.isnan(r.reward)]
    assert 0 < len(judged) < len(drawn) == 10
    pieces = [b for step in phase.steps for b in step.microbatches]
    trained = sorted(tuple(int(t) for t in row) for b in pieces for row in rows_of(b.input_ids, b))
    assert trained == sorted(r.completion.token_ids for r in judged)
    assert phase.metrics["reward/unjudged_fraction"] == pytest.approx(1 - len(judged) / 10)
    assert phase.metrics["ledger/completions"] == 10


@pytest.mark.parametrize("kind, kl", [("k2", (0.005, 0.02, 0.045)), ("k3", [math.exp(-d) - 1 + d for d in KL])])
def test_other_estimators_in_the_reward(ppo: Any, kind: str, kl: Any) -> None:
    returns, _ = returns_and_advantages(ppo, kl_estimator=kind, reward=0.0)
    assert_close(returns, -0.5 * np.cumsum(np.array(kl)[::-1])[::-1], **FLOAT64)


def test_a_threshold_in_the_reward(ppo: Any) -> None:
    """The mean KL .2 / 3 is above .05, so each token pays .5 (kl - .05): r = -.025, .125, 2 - .125; below .07, none."""
    returns, _ = returns_and_advantages(ppo, kl_threshold=0.05)
    assert_close(returns, np.array([2 - 0.025, 2.0, 1.875]), **FLOAT64)
    returns, _ = returns_and_advantages(ppo, kl_threshold=0.07)
    assert_close(returns, np.array([2.0, 2.0, 2.0]), **FLOAT64)


@pytest.mark.parametrize("placement", ["loss", "none"])
def test_a_kl_that_is_not_in_the_reward(ppo: Any, placement: str) -> None:
    """The score alone is the reward; in the loss the KL is still measured, and nowhere there is no reference at all."""
    run, batch, phase = three_tokens(ppo, kl_placement=placement)
    assert_close(rows_of(batch.returns, batch)[0], np.array([2.0, 2.0, 2.0]), **FLOAT64)
    assert phase.metrics["reward/minus_kl"] == 2.0
    assert ("reference" in run.models) == ("policy/kl_per_token" in phase.metrics) == (placement == "loss")


# ---- dense rewards by hand -------------------------------------------------------------------------------------------


def potentials(run: Run, batch: Batch) -> np.ndarray:
    """Normalised scores of the prompt, with a, with ab, and of all there is: the reward model's shift is .3, its scale
    .5 (see `frozen_reward_model`)."""
    model = run.models["reward_model"]
    (states,) = raw_states(model, batch)
    raw = states @ model.head.weight[0] + model.head.bias[0]
    return (numbers([raw])[0][-4:] - 0.3) / 0.5


def test_potential(ppo: Any) -> None:
    """Shaping telescopes: with lambda = 1 the return at t is gamma^(2 - t) 2 - coef Phi_t, KL left out."""
    options = {"reward_placement": "dense", "dense_reward": "potential", "kl_placement": "none"}
    run, batch, phase = three_tokens(ppo, **options, gamma=0.9, shaping_coef=0.25)
    phi = potentials(run, batch)
    assert len({round(x, 3) for x in phi}) == 4
    expected = 2 * 0.9 ** np.array([2, 1, 0]) - 0.25 * phi[:3]
    assert_close(rows_of(batch.returns, batch)[0], expected, **FLOAT64)
    assert phase.metrics["reward/minus_kl"] == 2.0  # what PPO maximises, which shaping does not change
    assert all(not p.requires_grad for p in run.models["reward_model"].parameters())


@pytest.mark.parametrize("at_cutoff", ["zero", "bootstrap"])
def test_potential_of_a_completion_that_was_cut_off(ppo: Any, at_cutoff: str) -> None:
    """At an end Phi is 0. Where the critic's .25 follows, the state goes on and Phi is its own:
    return at t = gamma^(3 - t) (.25 + coef Phi_3) + gamma^(2 - t) 2 - coef Phi_t."""
    options = {"reward_placement": "dense", "dense_reward": "potential", "kl_placement": "none"}
    run, batch, _ = three_tokens(ppo, **options, gamma=0.9, shaping_coef=0.25, stop=False, at_cutoff=at_cutoff)
    phi = potentials(run, batch)
    after = 0.25 + 0.25 * phi[3] if at_cutoff == "bootstrap" else 0.0
    expected = after * 0.9 ** np.array([3, 2, 1]) + 2 * 0.9 ** np.array([2, 1, 0]) - 0.25 * phi[:3]
    assert_close(rows_of(batch.returns, batch)[0], expected, **FLOAT64)


@pytest.mark.parametrize(
    "options, rewards",
    [
        ({}, (0.5, -1.0, 2.5)),  # what of the score 2 the tokens' .5 - 1 + .25 do not say stands on the last
        ({"reward_scale": 2.0}, (1.0, -2.0, 5.0)),
        ({"score_clip": 1.0}, (0.5, -1.0, 1.5)),
        ({"missing_stop_penalty": 3.0, "stop": False}, (0.5, -1.0, -0.5)),
        ({"token_scores": (0.0, 0.0, 0.0)}, (0.0, 0.0, 2.0)),
    ],
    ids=str,
)
def test_given_token_scores(ppo: Any, options: dict[str, Any], rewards: tuple[float, ...]) -> None:
    given = {"reward_placement": "dense", "dense_reward": "given", "token_scores": (0.5, -1.0, 0.25), "kl_coef": 0.0}
    returns, _ = returns_and_advantages(ppo, **(given | options))
    assert_close(returns, np.cumsum(np.array(rewards)[::-1])[::-1].copy(), **FLOAT64)


def test_token_scores_of_a_reward_function(ppo: Any) -> None:
    """From the function to the returns: each digit earns 2 * 1, each other token 2 * -.1, and .5 a completion more on
    its last token."""

    def by_token(prompts: Sequence[Prompt], completions: Sequence[Completion]) -> list[list[float]]:
        decode = template().decode
        return [[1.0 if decode([t]).isdigit() else -0.1 for t in c.token_ids] for c in completions]

    rewards = [
        Reward(name="digits", function=by_token, weight=2.0),
        Reward(name="there", function=lambda prompts, completions: [1.0] * len(prompts), weight=0.5),
    ]
    options = {"reward_placement": "dense", "dense_reward": "given", "kl_coef": 0.0, "gamma": 1.0, "gae_lambda": 1.0}
    run = start_run(ppo(**TEN, **options, epochs=1), rewards=rewards, microbatch_rows=16)
    (batch,) = collect(run)[0].microbatches
    tokens = rows_of(batch.input_ids, batch)
    assert len({len(row) for row in tokens}) > 1
    for ids, returns in zip(tokens, rows_of(batch.returns, batch), strict=True):
        earned = [2.0 if template().decode([int(t)]).isdigit() else -0.2 for t in ids]
        earned[-1] += 0.5
        assert_close(returns, np.cumsum(earned[::-1])[::-1].copy(), **FLOAT64)


def test_token_scores_that_nobody_gives(ppo: Any) -> None:
    with pytest.raises(UserError, match=r"algorithm\.dense_reward given: no reward function gives one score a token"):
        start_run(ppo(**TEN, reward_placement="dense", dense_reward="given")).go(1)


def test_metrics_of_the_phase(ppo: Any) -> None:
    """KL .2 a sequence, .2 / 3 a token; score minus .5 * .2; residuals of V = .25 vary as the returns do."""
    metrics = three_tokens(ppo)[2].metrics
    assert_close(metrics["policy/kl_per_sequence"], 0.2, **FLOAT64)
    assert_close(metrics["policy/kl_per_token"], 0.2 / 3, **FLOAT64)
    assert_close(metrics["reward/minus_kl"], 1.9, **FLOAT64)
    assert_close(metrics["policy/kl_coef"], 0.5, **EXACT)
    assert_close(metrics["value/explained_variance"], 0.0, **FLOAT64)


def test_explained_variance() -> None:
    """Returns 1, 2, 3 have variance 2/3; residuals 0, 0, 1 have 2/9: 1 - 1/3. A masked NaN counts for nothing."""
    values, returns = torch.tensor([1.0, 2.0, 2.0, math.nan]), torch.tensor([1.0, 2.0, 3.0, 9.0])
    mask = torch.tensor([True, True, True, False])
    assert module.explained_variance(values, returns, mask) == pytest.approx(2 / 3)
    assert math.isnan(module.explained_variance(values, torch.ones(4), mask))


# ---- the KL controller -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kl, expected",
    [
        (4.0, 0.5 * (1 + 0.2 / 100)),  # 12 nats of 6: error 1, held to .2
        (2.2, 0.5 * (1 + 0.1 / 100)),  # 6.6 nats of 6: error .1
        (2.0, 0.5),  # on target
        (-1.0, 0.5 * (1 - 0.2 / 100)),  # below, held to -.2
    ],
)
def test_adaptive_controller(ppo: Any, kl: float, expected: float) -> None:
    """arXiv:1909.08593, 2.2: beta (1 + clip(KL / target - 1, +-.2) n / horizon) with n = 1, horizon 100, next phase."""
    run, _, phase = three_tokens(ppo, kl_controller="adaptive", kl_horizon=100, shift=(kl, kl, kl))
    assert phase.metrics["policy/kl_coef"] == run.state.algorithm["kl_coef"] == 0.5
    second, run.state = run.algorithm.collect(run.models, run.source, run.state)
    (batch,) = second.steps[0].microbatches
    assert_close(second.metrics["policy/kl_coef"], expected, **FLOAT64)
    assert_close(run.state.algorithm["kl_coef"], expected, **FLOAT64)
    assert_close(batch.returns.flatten()[-1].item(), 2.0 - kl * expected, **FLOAT64)


def test_fixed_coefficient_stays(ppo: Any) -> None:
    run, _, phase = three_tokens(ppo, shift=(4.0, 4.0, 4.0))
    collect(run)
    assert run.state.algorithm["kl_coef"] == phase.metrics["policy/kl_coef"] == 0.5


def test_refusals(ppo: Any) -> None:
    """What is the method's own; those of the KL and of the score are in test_online."""
    for options, message in (
        ({"dual_clip": 1.2}, r"dual_clip must be above 1 \+ clip_high = 1\.2"),
        ({"dual_clip": 1.5, "clip_high": 0.6}, r"dual_clip must be above 1 \+ clip_high = 1\.6"),
        ({"reward_placement": "dense", "dense_reward": "given", "score_normaliser": "ema"}, "score_normaliser ema"),
        ({"dense_reward": "potential"}, "dense_reward potential does nothing while reward_placement is sparse"),
        ({"dense_reward": "given"}, "dense_reward given does nothing"),
        ({"variant": "dapo"}, "no variant 'dapo'; this method has none"),
        ({"preset": "tlr"}, "no preset 'tlr'; did you mean 'trl'"),
    ):
        with pytest.raises(ValueError, match=message):
            ppo(**options)


@pytest.mark.parametrize("preset", [None, "paper", "trl", "verl", "openrlhf"])
def test_presets(ppo: Any, preset: str | None) -> None:
    """A preset's values hold where the recipe says nothing, and what comes out reads as itself."""
    made = ppo(preset=preset, group_size=3, epochs=7)
    assert (made.group_size, made.epochs) == (3, 7)
    for key, value in ({} if preset is None else ppo.PRESETS[preset]).items():
        assert getattr(made, key) == (7 if key == "epochs" else value)
    assert ppo(**made.model_dump()) == made and ppo(**json.loads(made.model_dump_json())) == made
    assert ppo(preset=preset, dual_clip=None).dual_clip is None  # null is said, too


def test_roles(ppo: Any) -> None:
    """Who is needed, for every field that decides it."""
    usual = {"policy", "value_model", "reference"}
    for options, expected in (
        ({}, usual),
        ({"kl_placement": "loss"}, usual),
        ({"kl_placement": "none"}, usual - {"reference"}),
        ({"kl_coef": 0.0}, usual - {"reference"}),
        ({"kl_placement": "none", "kl_controller": "lr_guard", "kl_boundaries": (1, 2)}, usual),
        ({"critic": "reward_model"}, usual | {"reward_model"}),
        ({"reward_placement": "dense"}, usual),
        ({"reward_placement": "dense", "dense_reward": "potential"}, usual | {"reward_model"}),
    ):
        roles = ppo(**options).models()
        assert roles.keys() == expected, options
        assert {name for name, role in roles.items() if role.trained} == {"policy", "value_model"}
        assert roles["value_model"].backbone == options.get("critic", "own")


# ---- whitening and minibatches ---------------------------------------------------------------------------------------


def by_row(tensor: Tensor | None, batches: Any) -> dict[tuple[int, ...], np.ndarray]:
    found = {}
    for batch in batches:
        for ids, attended, row in zip(
            batch.input_ids, batch.attention_mask, rows_of(tensor_of(tensor, batch), batch), strict=True
        ):
            found[tuple(ids[attended].tolist())] = row
    return found


def tensor_of(name: Any, batch: Batch) -> Tensor:
    value = getattr(batch, name)
    assert isinstance(value, Tensor)
    return value


def test_whitening_spans_the_phase(ppo: Any) -> None:
    """Advantages: mean 0 and sd 1 (n - 1) over all tokens of the phase, whatever the minibatches; returns stay."""
    plain, white = (
        collect(start_run(ppo(**TEN, epochs=1, minibatches=3, whiten_advantages=w, gae_lambda=0.9)))
        for w in (False, True)
    )
    raw, whitened = (
        np.concatenate([r for s in steps for b in s.microbatches for r in rows_of(b.advantages, b)])
        for steps in (plain, white)
    )
    assert_close(whitened, (raw - raw.mean()) / np.sqrt(raw.var(ddof=1) + 1e-8), **FLOAT64)
    for a, b in zip(plain, white, strict=True):
        assert all(torch.equal(x.returns, y.returns) for x, y in zip(a.microbatches, b.microbatches, strict=True))


def test_whitened_rewards_keep_their_mean(ppo: Any) -> None:
    """lambda = gamma = 1, V = 0: returns are sums to come of (r - mean) / sd + mean."""
    options = {**TEN, "epochs": 1, "gae_lambda": 1.0}
    returns = [
        [r for b in collect(start_run(ppo(**options, whiten_rewards=w), microbatch_rows=16))[0].microbatches
         for r in rows_of(b.returns, b)] for w in (False, True)
    ]  # fmt: skip
    rewards = [np.append(row[:-1] - row[1:], row[-1]) for row in returns[0]]
    every = np.concatenate(rewards)
    for row, expected in zip(returns[1], rewards, strict=True):
        scaled = (expected - every.mean()) / np.sqrt(every.var(ddof=1) + 1e-8) + every.mean()
        assert_close(row, np.cumsum(scaled[::-1])[::-1].copy(), **FLOAT64)


def test_minibatches(ppo: Any) -> None:
    """Two epochs of three minibatches: each epoch has every row once, 4 + 3 + 3, split another way each time."""
    run = start_run(ppo(**TEN, epochs=2, minibatches=3))
    steps = collect(run)
    keys = [sorted(by_row("advantages", s.microbatches)) for s in steps]
    assert [len(k) for k in keys] == [4, 3, 3, 4, 3, 3]
    assert sorted(itertools.chain(*keys[:3])) == sorted(itertools.chain(*keys[3:]))
    assert keys[:3] != keys[3:]
    assert [s.normaliser for s in steps] == [sum(float(b.completion_mask.sum()) for b in s.microbatches) for s in steps]
    again = collect(start_run(ppo(**TEN, epochs=2, minibatches=3)))
    assert [sorted(by_row("advantages", s.microbatches)) for s in again] == keys


def test_split_is_the_same_on_every_machine() -> None:
    """`printf ppo/42/0/0/K | sha256sum` begins with bda8, f565, 60c2, 4285, cff2 for K = 0, 1, 2, 3, 4."""
    assert module.shuffled(5, "ppo/42/0/0") == [3, 2, 0, 4, 1]


def test_more_minibatches_than_rows(ppo: Any) -> None:
    run = start_run(ppo(prompts_per_phase=2, epochs=1, minibatches=5))
    assert len(collect(run)) == 2


@pytest.mark.parametrize("options, reused", [({}, 1), ({"minibatches": 2}, 0), ({"microbatch_rows": 4}, 0)])
def test_values_of_the_first_step_are_not_computed_twice(ppo: Any, options: dict[str, Any], reused: int) -> None:
    """Where it takes all rows in one microbatch; then its gradient is that of values computed anew."""
    rows = options.pop("microbatch_rows", 64)
    run = start_run(ppo(**TEN, epochs=2, **options), microbatch_rows=rows)
    steps = collect(run)
    assert [b.values is not None for step in steps for b in step.microbatches].count(True) == reused
    if reused:
        ((batch,), _) = (step.microbatches for step in steps)
        critic = [x for x in run.models["value_model"].parameters() if x.requires_grad]
        found = [
            torch.autograd.grad(
                run.algorithm.loss(run.models, b, run.state).total, critic, retain_graph=True, allow_unused=True
            )
            for b in (batch, replace(batch, values=None))
        ]
        assert any(g is not None and bool(g.any()) for g in found[0])
        for reused_gradient, gradient in zip(*found, strict=True):
            assert_close(reused_gradient, gradient, **FLOAT64)


# ---- the loss --------------------------------------------------------------------------------------------------------


def moved(algorithm: Any, **options: Any) -> tuple[Run, Any]:
    """A run with a critic that says something, one phase collected, and weights that have moved since."""
    run = start_run(algorithm(**TEN, epochs=1, minibatches=2, **options))
    fill(run.models["value_model"].head, 78)
    step = collect(run)[0]
    nudge(run.models["policy"], 0.05)
    nudge(run.models["value_model"].head, 0.05)
    if run.algorithm.critic != "shared":
        nudge(run.models["value_model"].backbone, 0.05, seed=6)
    return run, step


def total_by_hand(
    run: Run,
    step: Any,
    *,
    clip: tuple[float, float],
    value_clip: float | None,
    c_v: float,
    c_e: float,
    dual: float = math.inf,
    kl: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Token mean of max(-A rho, -A clip(rho)) + c_v / 2 max((V - R)^2, (clip(V) - R)^2) - c_e H, in plain torch;
    for A < 0 at most -dual A, plus `kl` of a row's log pi - log ref."""
    terms, held, dually_held = [], [], []
    for batch in step.microbatches:
        reference = run.models["policy"] if kl is None else run.models["reference"]
        rows = zip(
            raw_logprobs(run.models["policy"], batch),
            raw_values(run.models["value_model"], batch),
            raw_entropies(run.models["policy"], batch),
            numbers(raw_logprobs(reference, batch)),
            *(rows_of(getattr(batch, n), batch) for n in ("old_logprobs", "advantages", "returns", "old_values")),
            strict=True,
        )
        for new, value, entropy, ref, old, advantage, ret, old_value in rows:
            ratio, a, r, v = (
                (new - torch.tensor(old)).exp(),
                torch.tensor(advantage),
                torch.tensor(ret),
                torch.tensor(old_value),
            )
            surrogate = torch.maximum(-a * ratio, -a * ratio.clip(1 - clip[0], 1 + clip[1]))
            if dual < math.inf:
                surrogate = torch.where(a < 0, torch.minimum(surrogate, -dual * a), surrogate)
                dually_held.append((a < 0) & (ratio > dual))
            error = (value - r) ** 2
            if value_clip is not None:
                kept = torch.minimum(torch.maximum(value, v - value_clip), v + value_clip)
                held.append((kept != value).double())
                error = torch.maximum(error, (kept - r) ** 2)
            terms.append(surrogate + c_v * 0.5 * error - c_e * entropy)
            if kl is not None:
                terms[-1] = terms[-1] + kl(new - torch.tensor(ref))
            held.append((surrogate != -a * ratio).double())
    assert not dually_held or torch.cat(dually_held).any()
    assert 0.05 < torch.cat(held).mean() < 0.95, "both branches are wanted"
    return torch.cat(terms).mean()


K = {"k1": lambda d: d, "k2": lambda d: d**2 / 2, "k3": lambda d: (-d).exp() - 1 + d}


def hinge(kind: str, threshold: float, weight: float) -> Callable[[Tensor], Tensor]:
    """weight (k - threshold) at each token of a row whose mean k is above the threshold."""

    def pays(d: Tensor) -> Tensor:
        k = K[kind](d)
        return weight * (k - threshold) * (k.mean() > threshold)

    return pays


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_kl_in_the_loss(ppo: Any, kind: str) -> None:
    """beta k of each token, differentiated."""
    check_loss(ppo, {"kl": lambda d: 0.7 * K[kind](d)}, kl_placement="loss", kl_estimator=kind, kl_coef=0.7)


@pytest.mark.parametrize("kind, threshold", [("k1", 0.0), ("k2", 0.06), ("k3", 0.06)])
def test_a_threshold_in_the_loss(ppo: Any, kind: str, threshold: float) -> None:
    options = {"kl_placement": "loss", "kl_estimator": kind, "kl_coef": 0.7, "kl_threshold": threshold}
    run, step = check_loss(ppo, {"kl": hinge(kind, threshold, 0.7)}, **options)
    drifts = [
        K[kind](a - b).mean().item()
        for x in step.microbatches
        for a, b in zip(*(raw_logprobs(run.models[n], x) for n in ("policy", "reference")), strict=True)
    ]
    assert min(drifts) < threshold < max(drifts), "rows within the threshold and above it"


def test_dual_clip(ppo: Any) -> None:
    """c = 1.06, so that it binds: -c A at most where A < 0."""
    check_loss(ppo, {"dual": 1.06}, dual_clip=1.06)


@pytest.mark.parametrize("critic", ["own", "shared", "reward_model"])
@pytest.mark.parametrize("value_clip", [0.03, None])
def test_loss_and_gradient(ppo: Any, critic: str, value_clip: float | None) -> None:
    check_loss(ppo, {"value_clip": value_clip}, critic=critic, value_clip=value_clip)


def check_loss(algorithm: Any, by_hand: dict[str, Any], **options: Any) -> tuple[Run, Any]:
    """Loss and gradient of every trained parameter against `total_by_hand`; `by_hand` are its arguments."""
    settings = {"clip_low": 0.1, "clip_high": 0.05, "value_clip": None, "value_coef": 0.3, "entropy_coef": 0.02}
    run, step = moved(algorithm, **(settings | options))
    loss, gradient = loss_and_gradient(run, step)
    expected = total_by_hand(
        run, step, **({"clip": (0.1, 0.05), "value_clip": None, "c_v": 0.3, "c_e": 0.02} | by_hand)
    )
    assert_close(loss, expected.item(), **FLOAT64)
    expected.backward()
    plain = {
        f"{role}.{name}": torch.zeros_like(p) if p.grad is None else p.grad
        for role in run.optimizers
        for name, p in run.models[role].named_parameters()
        if f"{role}.{name}" in gradient
    }
    assert len(plain) == len(gradient)
    assert_close(flat(gradient), flat(plain), **FLOAT64)
    for parameter in (p for model in run.models.values() if isinstance(model, nn.Module) for p in model.parameters()):
        parameter.grad = None
    return run, step


def test_value_gradients_reach_a_shared_trunk_only(ppo: Any) -> None:
    """The policy's gradient depends on value_coef where the trunk is shared, and not where the critic has another."""
    for critic, reaches in (("own", False), ("shared", True), ("reward_model", False)):
        gradients = []
        for coefficient in (0.0, 0.5):
            run, step = moved(ppo, critic=critic, value_coef=coefficient)
            _, gradient = loss_and_gradient(run, step)
            gradients.append(torch.cat([g.flatten() for k, g in gradient.items() if k.startswith("policy.")]))
        assert (not torch.equal(*gradients)) == reaches


def test_metrics_of_a_step(ppo: Any) -> None:
    """Of the second epoch, after one step with every token once."""
    options = {
        **TEN,
        "learning_rate": 0.02,
        "value_learning_rate": 0.05,
        "clip_low": 0.05,
        "clip_high": 0.05,
        "value_clip": 0.05,
    }
    once, twice = start_run(ppo(**options, epochs=1)), start_run(ppo(**options, epochs=2))
    for run in (once, twice):
        fill(run.models["value_model"].head, 78)
    steps = collect(twice)
    once.go(1)
    metrics = twice.go(1)[0].metrics
    new, value, entropy, old, a, r, v = ([] for _ in range(7))  # type: ignore[var-annotated]
    for b in steps[1].microbatches:
        new += numbers(raw_logprobs(once.models["policy"], b))
        value += numbers(raw_values(once.models["value_model"], b))
        entropy += numbers(raw_entropies(once.models["policy"], b))
        for name, rows in (("old_logprobs", old), ("advantages", a), ("returns", r), ("old_values", v)):
            rows += rows_of(getattr(b, name), b)
    n, w, h, o, adv, ret, old_v = (np.concatenate(x) for x in (new, value, entropy, old, a, r, v))
    ratio, kept = np.exp(n - o), np.clip(w, old_v - 0.05, old_v + 0.05)
    surrogate = np.maximum(-adv * ratio, -adv * np.clip(ratio, 0.95, 1.05))
    errors = 0.5 * np.maximum((w - ret) ** 2, (kept - ret) ** 2)
    assert 0 < (kept != w).mean() < 1 and 0 < metrics["policy/clip_fraction"] < 1
    for name, expected in (
        ("loss/policy", surrogate), ("loss/value", errors), ("policy/entropy", h), ("policy/ratio", ratio),
        ("value/mean", w),
        ("policy/approx_kl", (n - o) ** 2 / 2), ("value/clip_fraction", kept != w),
        ("loss/total", surrogate + 0.1 * errors),
        ("policy/clip_fraction", ((ratio > 1.05) & (adv > 0)) | ((ratio < 0.95) & (adv < 0))),
    ):  # fmt: skip
        assert_close(metrics[name], expected.mean(), **FLOAT64, msg=name)


def test_an_entropy_that_is_not_trained_on_is_not_differentiated(ppo: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its gradient costs a second pass over the vocabulary."""
    run, step = moved(ppo)
    output = run.algorithm.loss(run.models, step.microbatches[0], run.state)
    seen: list[Any] = []
    for node, _ in walk(output.total.grad_fn):
        if "TokenLogprobs" in type(node).__name__:
            node.register_prehook(lambda grads: seen.append(grads[1]))
    output.total.backward()
    assert seen == [None]


def walk(node: Any) -> Any:
    """All nodes of an autograd graph."""
    stack, known = [(node, 0)], set()
    while stack:
        here, index = stack.pop()
        if here is None or here in known:
            continue
        known.add(here)
        yield here, index
        stack += here.next_functions


# ---- phases ----------------------------------------------------------------------------------------------------------


def test_kl_early_stop_ends_the_phase(ppo: Any) -> None:
    """With a large step the second epoch sees a KL over the limit: two of four steps are taken, then the next phase."""
    options = {**TEN, "learning_rate": 0.02, "epochs": 4}
    free, held = start_run(ppo(**options)), start_run(ppo(**options, stop_epochs_above_kl=1e-4))
    free.go(1)
    held.go(2)
    assert free.column("step") == [1, 2, 3, 4]
    assert held.column("phase") == [0, 0, 1, 1] and held.column("step") == [1, 2, 3, 4]
    assert free.column("policy/approx_kl")[:2] == held.column("policy/approx_kl")[:2]
    assert held.column("policy/approx_kl")[0] < 1e-20 and held.column("policy/approx_kl")[1] > 1e-4
    assert held.column("ended") == ["the approximate KL is over 0.0001 nats a token"] * 2
    assert held.state.stop_reason == ""


@pytest.mark.parametrize("critic", ["own", "shared"])
@pytest.mark.parametrize("lora", [False, True])
def test_value_warm_up_leaves_the_policy_alone(ppo: Any, critic: str, lora: bool) -> None:
    """Bit for bit, weight decay included, and without a trace in its optimiser, while the critic learns; then it moves.

    With a shared trunk this means that only the critic's head learns.
    """
    run = start_run(
        ppo(**TEN, critic=critic, epochs=2, value_warmup_steps=4, learning_rate=0.01, value_learning_rate=0.01),
        lora=lora, weight_decay=0.5,
    )  # fmt: skip
    before = {k: v.clone() for k, v in run.models["policy"].state_dict().items()}
    head = run.models["value_model"].head.weight.clone()
    run.go(2)
    assert run.state.step == 4
    assert all(torch.equal(v, before[k]) for k, v in run.models["policy"].state_dict().items())
    assert not run.optimizers["policy"].state and run.optimizers["value_model"].state
    assert not torch.equal(head, run.models["value_model"].head.weight)
    assert all(
        p.grad is None for model in run.models.values() if hasattr(model, "parameters") for p in model.parameters()
    )
    assert run.column("policy/grad_norm") == [] and len(run.column("value_model/grad_norm")) == 4
    run.go(3)
    assert run.optimizers["policy"].state
    assert any(not torch.equal(v, before[k]) for k, v in run.models["policy"].state_dict().items())


def test_critic_on_the_reward_model(ppo: Any) -> None:
    """It starts with the reward model's states and the value 0, learns by its adapter and head alone, and leaves the
    reward model bit for bit."""
    run = start_run(ppo(**TEN, critic="reward_model", epochs=2, learning_rate=0.01, value_learning_rate=0.01))
    critic, judge = run.models["value_model"], run.models["reward_model"]
    before = {k: v.clone() for k, v in judge.state_dict().items()}
    (batch, *_) = collect(run)[0].microbatches
    for own, its in zip(raw_states(critic, batch), raw_states(judge, batch), strict=True):
        assert_close(own, its, **FLOAT64)
    assert not batch.old_values.any()
    trained = {name for name, p in critic.named_parameters() if p.requires_grad}
    assert all(name.startswith("head.") or ".lora_" in name for name in trained) and len(trained) > 2
    start = {k: v.clone() for k, v in critic.named_parameters()}
    run.go(2)
    assert all(torch.equal(v, before[k]) for k, v in judge.state_dict().items())
    moved_ = {k for k, v in critic.named_parameters() if not torch.equal(v, start[k])}
    assert moved_ == trained
    assert not torch.equal(raw_states(critic, batch)[0], raw_states(judge, batch)[0])


def test_learns(ppo: Any) -> None:
    options = {"learning_rate": 5e-3, "value_learning_rate": 2e-2, "epochs": 2, "kl_coef": 0.0}
    run = start_run(ppo(prompts_per_phase=8, group_size=4, **options), microbatch_rows=32)
    run.go(10)
    rewards = run.column("reward/mean")
    assert np.mean(rewards[-3:]) > np.mean(rewards[:3]) + 0.1
    assert run.column("value/explained_variance")[-1] > run.column("value/explained_variance")[0]


# ---- identities ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("critic", ["own", "shared"])
@pytest.mark.parametrize("temperature, lora", [(1.0, False), (0.6, False), (1.0, True)])
def test_every_phase_starts_at_ratio_one(ppo: Any, critic: str, temperature: float, lora: bool) -> None:
    """With dropout in the configuration, over phases in which policy and critic really learn."""
    run = start_run(
        ppo(**TEN, critic=critic, temperature=temperature, learning_rate=0.01, value_learning_rate=0.01, epochs=2),
        dropout=0.5, lora=lora, sampling=Sampling(temperature=temperature, max_completion_tokens=6),
    )  # fmt: skip
    run.go(3)
    assert_close(run.column("policy/ratio")[::2], [1.0] * 3, **FLOAT64)
    assert_close(run.column("policy/clip_fraction")[::2], [0.0] * 3, **EXACT)
    assert_close(run.column("value/clip_fraction")[::2], [0.0] * 3, **EXACT)
    assert_close(run.column("policy/kl_per_sequence")[0], 0.0, **FLOAT64)
    assert run.column("policy/approx_kl")[1] > 1e-6 and abs(run.column("policy/kl_per_sequence")[2]) > 1e-4


def turn_dropout_on(model: Any) -> None:
    model.train()
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5


def test_dropout_that_is_on_is_found(ppo: Any) -> None:
    run = start_run(ppo(**TEN))
    turn_dropout_on(run.models["policy"])
    with pytest.raises(RunError, match=r"phase 0: the log ratio of policy to sampling policy is .* Look for dropout"):
        run.go(1)


def test_dropout_that_is_on_in_the_critic_is_found(ppo: Any) -> None:
    run = start_run(ppo(**TEN, value_learning_rate=0.05))
    run.go(1)
    turn_dropout_on(run.models["value_model"].backbone)
    with pytest.raises(RunError, match="phase 1: the relative change of the values is"):
        run.go(2)


def test_a_temperature_on_one_side_only_is_found(ppo: Any) -> None:
    with pytest.raises(RunError, match=r"log ratio .* a temperature on one side only"):
        start_run(ppo(**TEN, temperature=0.7)).go(1)


def test_weights_that_changed_after_sampling_are_found(ppo: Any) -> None:
    run = start_run(ppo(**TEN))
    run.go(1)
    run.source = slipping(run.source)
    with pytest.raises(RunError, match=r"phase 1: the log ratio .* weights that changed"):
        run.go(2)


def test_a_reference_that_is_another_model_is_found(ppo: Any) -> None:
    run = start_run(ppo(**TEN))
    nudge(run.models["reference"].requires_grad_(True), 0.01)
    with pytest.raises(RunError, match="phase 0: KL to the reference is"):
        run.go(1)


# ---- mutants ---------------------------------------------------------------------------------------------------------

MUTANTS: list[tuple[str, str, Any, tuple[Any, ...]]] = [
    ("token_rewards = token_rewards - penalty", "token_rewards = token_rewards + penalty", test_sparse_reward, ()),
    ("token_rewards = token_rewards - penalty", "token_rewards = token_rewards", test_dense_reward, ()),
    ("(mask * columns).argmax(-1)", "(mask * columns).argmax(-1) - 1", test_sparse_reward, ()),
    ("(scores / mask.sum(-1))", "(scores / mask.shape[1])", test_dense_reward, ()),
    ("gamma=self.gamma, gae_lambda=self.gae_lambda", "gamma=self.gae_lambda, gae_lambda=self.gamma", test_gae, ()),
    ("0.0, found)", "found, found)", test_cut_off, ("bootstrap", 1.825)),
    ("0.0, found)", "found, 0.0)", test_cut_off, ("bootstrap", 1.825)),
    ('self.at_cutoff == "zero"', 'self.at_cutoff == "bootstrap"', test_cut_off, ("zero", 1.6)),
    ("if not math.isnan(r.reward))", "if True)", test_what_nobody_judged_is_left_out, ()),
    ('self.kl_placement == "reward"', "True", test_a_kl_that_is_not_in_the_reward, ("loss",)),
    ("(scores - penalty.sum(-1)).mean()", "token_rewards.sum(-1).mean()", test_potential, ()),
    ("self.shaping_coef * potential_shaping", "potential_shaping", test_potential, ()),
    ("potential_shaping(potentials, mask, self.gamma", "potential_shaping(potentials, mask, 1.0", test_potential, ()),
    ("token_rewards + self.shaping_coef", "token_rewards - self.shaping_coef", test_potential, ()),
    ("self.gamma, final)", "self.gamma)", test_potential_of_a_completion_that_was_cut_off, ("bootstrap",)),
    ("prefix_rewards(models", "values(models", test_potential, ()),
    ("scores - given.sum(-1)", "scores", test_given_token_scores, ({}, (0.5, -1.0, 2.5))),
    ("self.reward_scale * given", "given", test_given_token_scores, ({"reward_scale": 2.0}, (1.0, -2.0, 5.0))),
    ("masked_scatter(mask, ", "masked_scatter(mask, -", test_token_scores_of_a_reward_function, ()),
    ("state.phase == 0 and all(", "False and all(", test_token_scores_that_nobody_gives, ()),
    ("shift_mean=False", "shift_mean=True", test_whitened_rewards_keep_their_mean, ()),
    (
        "advantages = masked_whiten(advantages, mask)",
        "advantages = returns = masked_whiten(advantages, mask)",
        test_whitening_spans_the_phase,
        (),
    ),
    ("policy_terms = clipped_surrogate(", "policy_terms = -clipped_surrogate(", test_loss_and_gradient, ("own", None)),
    (
        "scores.logprobs - batch.old_logprobs, 0.0)",
        "batch.old_logprobs - scores.logprobs, 0.0)",
        test_loss_and_gradient,
        ("own", None),
    ),
    (
        "(self.clip_low, self.clip_high, self.dual",
        "(self.clip_high, self.clip_low, self.dual",
        test_loss_and_gradient,
        ("own", None),
    ),
    ("self.clip_high, self.dual_clip)", "self.clip_high, None)", test_dual_clip, ()),
    ("+ self.value_coef * value_terms", "- self.value_coef * value_terms", test_loss_and_gradient, ("own", None)),
    ("terms - self.entropy_coef", "terms + self.entropy_coef", test_loss_and_gradient, ("own", None)),
    (
        "if self.entropy_coef:  # an entropy",
        "if True:  # an entropy",
        test_an_entropy_that_is_not_trained_on_is_not_differentiated,
        (),
    ),
    ("batch.returns, self.value_clip)", "batch.returns, None)", test_loss_and_gradient, ("shared", 0.03)),
    ("aggregate(terms, mask)", "aggregate(terms, mask, 'sequence')", test_loss_and_gradient, ("own", None)),
    ("completion_tokens(pieces)))", "len(pieces)))", test_loss_and_gradient, ("own", None)),
    (
        'terms + state.algorithm["kl_coef"] * kl',
        'terms - state.algorithm["kl_coef"] * kl',
        test_kl_in_the_loss,
        ("k2",),
    ),
    ('terms + state.algorithm["kl_coef"] * kl', "terms + kl", test_kl_in_the_loss, ("k3",)),
    ('terms + state.algorithm["kl_coef"] * kl', "terms", test_kl_in_the_loss, ("k1",)),
    ('self.kl_placement == "loss"', 'self.kl_placement == "reward"', test_kl_in_the_loss, ("k2",)),
    (
        "start_step=self.value_warmup_steps",
        "start_step=0",
        test_value_warm_up_leaves_the_policy_alone,
        ("shared", False),
    ),
    ("backbone=self.critic", 'backbone="own"', test_value_gradients_reach_a_shared_trunk_only, ()),
    (
        'metrics["policy/approx_kl"] > limit',
        'metrics["policy/approx_kl"] < limit',
        test_kl_early_stop_ends_the_phase,
        (),
    ),
    (
        "dropout: ClassVar[bool] = False",
        "dropout: ClassVar[bool] = True",
        test_every_phase_starts_at_ratio_one,
        ("own", 1.0, False),
    ),
    ("gap(value, batch.old_values, batch)", "0.0", test_dropout_that_is_on_in_the_critic_is_found, ()),
    ("if state.step == 0:", "if False:", test_a_reference_that_is_another_model_is_found, ()),
    ("{state.phase}/{epoch}", "{state.phase}", test_minibatches, ()),
    ("if self.measures_kl:\n            roles", "if True:\n            roles", test_roles, ()),
    ('or self.critic == "reward_model"', "", test_roles, ()),
]
MUTANTS_BELOW: list[tuple[str, str, Any, tuple[Any, ...]]] = [
    (
        "kl_estimate(keep(logprobs, mask), keep(reference_logprobs, mask)",
        "kl_estimate(keep(reference_logprobs, mask), keep(logprobs, mask)",
        test_sparse_reward,
        (),
    ),
    ("self.kl_estimator)", "'k2')", test_sparse_reward, ()),
    (
        "keep(kl, mask) if self.kl_threshold is None else above",
        "kl if True else above",
        test_a_threshold_in_the_reward,
        (),
    ),
    ("self.missing_stop_penalty * (~", "self.missing_stop_penalty * (", test_penalty_before_clip, ()),
    ("min(0.2, max(-0.2, error))", "min(1.0, max(-1.0, error))", test_adaptive_controller, (4.0, 0.501)),
    ("        ) - 1\n", "        )\n", test_adaptive_controller, (2.0, 0.5)),
    ("per_sequence = of_rows.mean()", "per_sequence = drift.mean()", test_adaptive_controller, (2.0, 0.5)),
    (
        'score(models["reference"], b, temperature=temperature)',
        'score(models["reference"], b, temperature=1.0)',
        test_every_phase_starts_at_ratio_one,
        ("own", 0.6, False),
    ),
]
"""Of what it has in common with other methods."""


@pytest.mark.parametrize(
    "used, text, replacement, test, arguments",
    [*((None, *case) for case in MUTANTS), *((online_module, *case) for case in MUTANTS_BELOW)],
)
@pytest.mark.filterwarnings("ignore:Mean of empty slice", "ignore:Degrees of freedom")
def test_mutants_are_noticed(
    used: Any, text: str, replacement: str, test: Any, arguments: tuple[Any, ...], monkeypatch: Any
) -> None:
    changed = mutant(module, text, replacement, used=used)
    if test is test_an_entropy_that_is_not_trained_on_is_not_differentiated:
        arguments = (monkeypatch,)
    with pytest.raises((AssertionError, RunError, pytest.fail.Exception)):
        test(changed, *arguments)
