"""PPO: token rewards, GAE and controller on three tokens by hand; the loss from raw log-softmaxes and hidden states."""

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from alignlab.algorithms import ppo as module
from alignlab.generate import Sampling
from alignlab.train import RunError
from alignlab.types import Batch, Group
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
    raw_values,
    rollout,
    rows_of,
    slipping,
    start_run,
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
    settings = {"kl_coef": 0.5, "gamma": 1.0, "gae_lambda": 1.0, "whiten_advantages": False, "epochs": 1}
    run = start_run(algorithm(**settings | options))
    with torch.no_grad():
        run.models["value_model"].head.bias.fill_(value)
    made = rollout(run.models["policy"], "1+1", "ab" if stop else "abc", reward=reward, shift=shift, stop=stop)
    run.source = fixed([Group(rollouts=(made,))])
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


@pytest.mark.filterwarnings("ignore:Mean of empty slice", "ignore:Degrees of freedom")
def test_no_reward_counts_as_zero(ppo: Any) -> None:
    returns, _ = returns_and_advantages(ppo, reward=math.nan)
    assert_close(returns, np.array([-0.1, -0.05, -0.15]), **FLOAT64)


@pytest.mark.parametrize("kind, kl", [("k2", (0.005, 0.02, 0.045)), ("k3", [math.exp(-d) - 1 + d for d in KL])])
def test_other_estimators_in_the_reward(ppo: Any, kind: str, kl: Any) -> None:
    returns, _ = returns_and_advantages(ppo, kl_estimator=kind, reward=0.0)
    assert_close(returns, -0.5 * np.cumsum(np.array(kl)[::-1])[::-1], **FLOAT64)


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
    assert phase.metrics["policy/kl_coef"] == 0.5
    assert_close(run.state.algorithm["kl_coef"], expected, **FLOAT64)
    assert_close(collect(run)[0].microbatches[0].returns.flatten()[-1].item(), 2.0 - kl * expected, **FLOAT64)


def test_fixed_coefficient_stays(ppo: Any) -> None:
    assert three_tokens(ppo, shift=(4.0, 4.0, 4.0))[0].state.algorithm == {}


def test_adaptive_needs_a_start_above_zero(ppo: Any) -> None:
    with pytest.raises(ValueError, match="kl_coef must start above 0"):
        ppo(kl_controller="adaptive", kl_coef=0.0)


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


# ---- the loss --------------------------------------------------------------------------------------------------------


def moved(algorithm: Any, **options: Any) -> tuple[Run, Any]:
    """A run with a critic that says something, one phase collected, and weights that have moved since."""
    run = start_run(algorithm(**TEN, epochs=1, minibatches=2, **options))
    fill(run.models["value_model"].head, 78)
    step = collect(run)[0]
    nudge(run.models["policy"], 0.05)
    nudge(run.models["value_model"].head, 0.05)
    if run.algorithm.critic == "own":
        nudge(run.models["value_model"].backbone, 0.05, seed=6)
    return run, step


def total_by_hand(
    run: Run, step: Any, *, clip: tuple[float, float], value_clip: float | None, c_v: float, c_e: float
) -> Tensor:
    """Token mean of max(-A rho, -A clip(rho)) + c_v / 2 max((V - R)^2, (clip(V) - R)^2) - c_e H, in plain torch."""
    terms, held = [], []
    for batch in step.microbatches:
        rows = zip(
            raw_logprobs(run.models["policy"], batch),
            raw_values(run.models["value_model"], batch),
            raw_entropies(run.models["policy"], batch),
            *(rows_of(getattr(batch, n), batch) for n in ("old_logprobs", "advantages", "returns", "old_values")),
            strict=True,
        )
        for new, value, entropy, old, advantage, ret, old_value in rows:
            ratio, a, r, v = (
                (new - torch.tensor(old)).exp(),
                torch.tensor(advantage),
                torch.tensor(ret),
                torch.tensor(old_value),
            )
            surrogate = torch.maximum(-a * ratio, -a * ratio.clip(1 - clip[0], 1 + clip[1]))
            error = (value - r) ** 2
            if value_clip is not None:
                kept = torch.minimum(torch.maximum(value, v - value_clip), v + value_clip)
                held.append((kept != value).double())
                error = torch.maximum(error, (kept - r) ** 2)
            terms.append(surrogate + c_v * 0.5 * error - c_e * entropy)
            held.append((surrogate != -a * ratio).double())
    assert 0.05 < torch.cat(held).mean() < 0.95, "both branches are wanted"
    return torch.cat(terms).mean()


@pytest.mark.parametrize("critic", ["own", "shared"])
@pytest.mark.parametrize("value_clip", [0.03, None])
def test_loss_and_gradient(ppo: Any, critic: str, value_clip: float | None) -> None:
    run, step = moved(
        ppo, critic=critic, clip_low=0.1, clip_high=0.05, value_clip=value_clip, value_coef=0.3, entropy_coef=0.02
    )
    loss, gradient = loss_and_gradient(run, step)
    expected = total_by_hand(run, step, clip=(0.1, 0.05), value_clip=value_clip, c_v=0.3, c_e=0.02)
    assert_close(loss, expected.item(), **FLOAT64)
    expected.backward()
    by_hand = {
        f"{role}.{name}": torch.zeros_like(p) if p.grad is None else p.grad
        for role in run.optimizers
        for name, p in run.models[role].named_parameters()
        if f"{role}.{name}" in gradient
    }
    assert len(by_hand) == len(gradient)
    assert_close(flat(gradient), flat(by_hand), **FLOAT64)


def test_value_gradients_reach_a_shared_trunk_only(ppo: Any) -> None:
    """The policy's gradient depends on value_coef where the trunk is shared, and not where the critic has its own."""
    for critic, reaches in (("own", False), ("shared", True)):
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


@pytest.mark.parametrize(
    "text, replacement, test, arguments",
    [
        ("(-kl_penalty).scatter_add", "(kl_penalty).scatter_add", test_sparse_reward, ()),
        (
            "last_action = (mask * columns).argmax(-1)",
            "last_action = (mask * columns).argmax(-1) - 1",
            test_sparse_reward,
            (),
        ),
        (
            "kl_estimate(batch.old_logprobs, batch.reference_logprobs,",
            "kl_estimate(batch.reference_logprobs, batch.old_logprobs,",
            test_sparse_reward,
            (),
        ),
        ("(scores / mask.sum(-1))", "(scores / mask.shape[1])", test_dense_reward, ()),
        ("0.0) - kl_penalty", "0.0)", test_dense_reward, ()),
        ("gamma=self.gamma, gae_lambda=self.gae_lambda", "gamma=self.gae_lambda, gae_lambda=self.gamma", test_gae, ()),
        ("torch.where(stopped, 0.0, after_cutoff)", "after_cutoff", test_cut_off, ("bootstrap", 1.825)),
        (
            "torch.where(stopped, 0.0, after_cutoff)",
            "torch.where(stopped, after_cutoff, 0.0)",
            test_cut_off,
            ("bootstrap", 1.825),
        ),
        (
            "scores - self.missing_stop_penalty * (~",
            "scores - self.missing_stop_penalty * (",
            test_penalty_before_clip,
            (),
        ),
        ("nan=0.0", "nan=1.0", test_no_reward_counts_as_zero, ()),
        ("min(0.2, max(-0.2,", "min(1.0, max(-1.0,", test_adaptive_controller, (4.0, 0.501)),
        ("self.kl_target_per_sequence - 1", "self.kl_target_per_sequence", test_adaptive_controller, (2.0, 0.5)),
        ("drift.sum(-1).mean()", "drift.mean()", test_adaptive_controller, (2.0, 0.5)),
        ("shift_mean=False", "shift_mean=True", test_whitened_rewards_keep_their_mean, ()),
        (
            "advantages = masked_whiten(advantages, mask)",
            "advantages = returns = masked_whiten(advantages, mask)",
            test_whitening_spans_the_phase,
            (),
        ),
        (
            "policy_terms = clipped_surrogate(",
            "policy_terms = -clipped_surrogate(",
            test_loss_and_gradient,
            ("own", None),
        ),
        (
            "scores.logprobs - batch.old_logprobs, 0.0)",
            "batch.old_logprobs - scores.logprobs, 0.0)",
            test_loss_and_gradient,
            ("own", None),
        ),
        ("+ self.value_coef * value_terms", "- self.value_coef * value_terms", test_loss_and_gradient, ("own", None)),
        ("terms - self.entropy_coef", "terms + self.entropy_coef", test_loss_and_gradient, ("own", None)),
        ("if self.entropy_coef:", "if True:", test_an_entropy_that_is_not_trained_on_is_not_differentiated, ()),
        ("batch.returns, self.value_clip)", "batch.returns, None)", test_loss_and_gradient, ("shared", 0.03)),
        ("aggregate(terms, mask)", "aggregate(terms, mask, 'sequence')", test_loss_and_gradient, ("own", None)),
        ("completion_tokens(pieces)))", "len(pieces)))", test_loss_and_gradient, ("own", None)),
        (
            "start_step=self.value_warmup_steps",
            "start_step=0",
            test_value_warm_up_leaves_the_policy_alone,
            ("shared", False),
        ),
        (
            'metrics["policy/approx_kl"] > limit',
            'metrics["policy/approx_kl"] < limit',
            test_kl_early_stop_ends_the_phase,
            (),
        ),
        (
            "piece, temperature=self.temperature).logprobs",
            "piece, temperature=1.0).logprobs",
            test_every_phase_starts_at_ratio_one,
            ("own", 0.6, False),
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
    ],
)
def test_mutants_are_noticed(
    text: str, replacement: str, test: Any, arguments: tuple[Any, ...], monkeypatch: Any
) -> None:
    changed = mutant(module, text, replacement)
    if test is test_an_entropy_that_is_not_trained_on_is_not_differentiated:
        arguments = (monkeypatch,)
    with pytest.raises((AssertionError, RunError, pytest.fail.Exception)):
        test(changed, *arguments)
