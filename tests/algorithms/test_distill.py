"""On-policy distillation against raw log-softmaxes of student and teacher: credit, loss, gradient, identities."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from alignlab.algorithms import distill as module
from alignlab.errors import UserError
from alignlab.generate import Sampling
from alignlab.models import unwrap
from alignlab.train import RunError
from alignlab.types import Batch, Completion, Group, Rollout, Step
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
    prompt,
    raw_entropies,
    raw_logprobs,
    rows_of,
    slipping,
    start_run,
    template,
)
from tests.tolerances import EXACT, FLOAT64

TWELVE = {"prompts_per_phase": 4, "group_size": 3}
OBJECTIVES = ("sampled", "full")


@pytest.fixture
def distill() -> Any:
    return module.ALGORITHM


def at_temperature(value: float) -> Sampling:
    return Sampling(temperature=value, max_completion_tokens=MAX_TOKENS)


def credit(batch: Batch, run: Run, gamma: float, temperature: float = 1.0) -> list[np.ndarray]:
    """A_t = sum_{s >= t} gamma^(s - t) (log teacher - log pi_old), a row at a time, summed as it is written."""
    rows = []
    teacher = numbers(raw_logprobs(run.models["teacher"], batch, temperature))
    for old, said in zip(rows_of(batch.old_logprobs, batch), teacher, strict=True):
        gains = said - old
        rows.append(
            np.array([sum(gamma ** (s - t) * gains[s] for s in range(t, len(gains))) for t in range(len(gains))])
        )
    return rows


def raw_divergences(run: Run, batch: Batch, temperature: float = 1.0) -> list[Tensor]:
    """sum_v p log(p / q) before each completion token, (N_i,) a row, from whole log-softmaxes; differentiable."""
    rows = []
    for ids, attended, completion in zip(batch.input_ids, batch.attention_mask, batch.completion_mask, strict=True):
        tokens, first = ids[attended][None], int(completion.int().argmax())
        p, q = (
            (unwrap(run.models[role])(input_ids=tokens).logits[0] / temperature).log_softmax(-1)
            for role in ("policy", "teacher")
        )
        rows.append((p.exp() * (p - q)).sum(-1)[first - 1 : tokens.shape[1] - 1])
    return rows


def aggregated(rows: list[np.ndarray], aggregation: str) -> float:
    return float(
        {
            "token": np.concatenate(rows).mean(),
            "sequence": np.mean([row.mean() for row in rows]),
            "constant": np.concatenate(rows).sum() / (len(rows) * MAX_TOKENS),
        }[aggregation]
    )


# ---- sampled ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0])
def test_each_token_is_credited_with_the_teachers_log_ratio_from_there_on(distill: Any, gamma: float) -> None:
    run = start_run(distill(**TWELVE, gamma=gamma))
    (step,) = collect(run)
    credits = []
    for batch in step.microbatches:
        expected = credit(batch, run, gamma)
        for ours, theirs in zip(rows_of(batch.advantages, batch), expected, strict=True):
            assert_close(ours, theirs, **FLOAT64)
        credits += expected
        assert not batch.advantages[~batch.completion_mask].any()
    values = np.concatenate(credits)
    assert len({len(c) for c in credits}) > 2 and (values > 0.1).any() and (values < -0.1).any()


@pytest.mark.parametrize("aggregation", ["token", "sequence", "constant"])
@pytest.mark.parametrize("gamma", [0.0, 0.9])
def test_sampled_loss(distill: Any, aggregation: str, gamma: float) -> None:
    """After an update, so that ratios are not 1 and some are clipped at .9 and 1.05."""
    run = start_run(distill(**TWELVE, gamma=gamma, aggregation=aggregation, clip_low=0.1, clip_high=0.05))
    (step,) = collect(run)
    nudge(run.models["policy"], 0.05)
    rows, held, total = [], 0, 0
    for batch in step.microbatches:
        policy_rows = numbers(raw_logprobs(run.models["policy"], batch))
        for new, old, a in zip(policy_rows, rows_of(batch.old_logprobs, batch), credit(batch, run, gamma), strict=True):
            ratio = np.exp(new - old)
            terms = -np.minimum(ratio * a, np.clip(ratio, 0.9, 1.05) * a)
            held, total = held + int((terms != -ratio * a).sum()), total + len(terms)
            rows.append(terms)
    assert 0.1 < held / total < 0.9
    assert_close(loss_and_gradient(run, step)[0], aggregated(rows, aggregation), **FLOAT64)


def test_gradient_at_ratio_one_is_reinforce(distill: Any) -> None:
    """Of -mean over tokens of A log pi, on the policy that sampled."""
    run = start_run(distill(**TWELVE))
    (step,) = collect(run)
    _, gradient = loss_and_gradient(run, step)
    for batch in step.microbatches:
        for a, logprobs in zip(credit(batch, run, 0.0), raw_logprobs(run.models["policy"], batch), strict=True):
            (-(torch.from_numpy(a) * logprobs).sum() / step.normaliser).backward()
    expected = {name: p.grad for name, p in run.models["policy"].named_parameters()}
    assert flat(gradient).norm() > 0.1
    assert_close(flat(gradient), flat(expected), **FLOAT64)


# ---- full ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("aggregation", ["token", "sequence", "constant"])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_full_loss_and_gradient(distill: Any, aggregation: str, temperature: float) -> None:
    options = {**TWELVE, "objective": "full", "aggregation": aggregation, "temperature": temperature}
    run = start_run(distill(**options), sampling=at_temperature(temperature))
    (step,) = collect(run)
    nudge(run.models["policy"], 0.05)
    loss, gradient = loss_and_gradient(run, step)
    rows = [row for batch in step.microbatches for row in raw_divergences(run, batch, temperature)]
    assert len({len(row) for row in rows}) > 2
    assert_close(loss, aggregated(numbers(rows), aggregation), **FLOAT64)
    tokens = sum(len(row) for row in rows)
    weight = {"token": lambda row: 1 / tokens, "sequence": lambda row: 1 / (12 * len(row)),
              "constant": lambda row: 1 / (12 * MAX_TOKENS)}[aggregation]  # fmt: skip
    total = torch.stack([row.sum() * weight(row) for row in rows]).sum()
    total.backward()
    expected = {name: p.grad for name, p in run.models["policy"].named_parameters()}
    assert flat(gradient).norm() > 0.1
    assert_close(flat(gradient), flat(expected), **FLOAT64)


def every_word(model: Any) -> tuple[Group, ...]:
    """One prompt answered by each of the vocabulary's words, cut off after it, with the model's own logprobs."""
    asked = prompt("1+1")
    ids = template().encode_prompt(asked)
    with torch.no_grad():
        logs = model(input_ids=torch.tensor([ids])).logits[0, -1].log_softmax(-1)
    made = [Completion(token_ids=(v,), logprobs=(x,), finish_reason="length", text="") for v, x in
            enumerate(logs.tolist())]  # fmt: skip
    return (
        Group(
            rollouts=tuple(Rollout(prompt=asked, prompt_ids=ids, completion=c, reward=0.0, breakdown={}) for c in made)
        ),
    )


def test_the_sampled_gradient_is_the_full_one_in_expectation(distill: Any) -> None:
    """sum_v pi(v) (the gradient of a completion `v`) = the gradient of the divergence in that place."""
    groups = every_word(policy())
    run = start_run(distill(), microbatch_rows=64)
    run.source = fixed(groups, microbatch_rows=64)
    (batch,) = collect(run)[0].microbatches
    assert_close(batch.old_logprobs[batch.completion_mask].exp().sum().item(), 1.0, **FLOAT64)
    weighted = replace(batch, advantages=batch.advantages * batch.old_logprobs.exp())
    _, expected_gradient = loss_and_gradient(run, Step((weighted,), 1.0))
    run.algorithm = distill(objective="full")
    divergence, gradient = loss_and_gradient(run, Step((batch.select(torch.tensor([0])),), 1.0))
    assert flat(gradient).norm() > 0.1
    assert_close(flat(expected_gradient), flat(gradient), **FLOAT64)
    assert_close(-weighted.advantages.sum().item(), divergence, **FLOAT64)


# ---- identities ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_teacher_that_is_the_student_teaches_nothing(distill: Any, objective: str) -> None:
    """No advantage and no divergence; full: exactly, sampled: to the rounding between sampler and scorer."""
    run = start_run(distill(**TWELVE, objective=objective, gamma=1.0))
    run.models["teacher"] = policy().requires_grad_(False)
    (step,) = collect(run)
    loss, gradient = loss_and_gradient(run, step)
    zero = EXACT if objective == "full" else FLOAT64
    assert_close(loss, 0.0, **zero)
    assert_close(flat(gradient), torch.zeros_like(flat(gradient)), **zero)
    if objective == "sampled":
        assert all(b.advantages.abs().max() < 1e-12 for b in step.microbatches)
    metrics = run.go(1)[0].metrics
    assert abs(metrics["distill/reverse_kl_per_token"]) < 1e-12


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("temperature, lora", [(1.0, False), (0.6, True)])
def test_every_phase_starts_at_ratio_one(distill: Any, objective: str, temperature: float, lora: bool) -> None:
    """With dropout in the configuration, over phases that really learn, full and LoRA."""
    algorithm = distill(**TWELVE, objective=objective, temperature=temperature, learning_rate=0.01)
    run = start_run(algorithm, dropout=0.5, lora=lora, sampling=at_temperature(temperature))
    run.go(3)
    assert_close(run.column("policy/ratio"), [1.0] * 3, **FLOAT64)
    assert run.column("policy/clip_fraction") == ([0.0] * 3 if objective == "sampled" else [])


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_weights_that_changed_after_sampling_are_found(distill: Any, objective: str) -> None:
    run = start_run(distill(**TWELVE, objective=objective))
    run.source = slipping(run.source)
    with pytest.raises(RunError, match=r"phase 0: the log ratio .* weights that changed"):
        run.go(1)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_teacher_stays_as_it_is(distill: Any, objective: str) -> None:
    run = start_run(distill(**TWELVE, objective=objective, learning_rate=0.01))
    before = [p.clone() for p in run.models["teacher"].parameters()]
    run.go(2)
    assert list(run.optimizers) == ["policy"] and not run.models["teacher"].training
    for now, then in zip(run.models["teacher"].parameters(), before, strict=True):
        assert torch.equal(now, then) and now.grad is None


# ---- what it needs ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_no_reward_is_needed_and_one_is_only_logged(distill: Any, objective: str) -> None:
    with_reward, without = (
        start_run(distill(**TWELVE, objective=objective, learning_rate=0.01), **changes)
        for changes in ({}, {"rewards": ()})
    )
    for run in (with_reward, without):
        run.go(2)
    assert torch.equal(
        *(torch.cat([p.flatten() for p in r.models["policy"].parameters()]) for r in (with_reward, without))
    )
    assert "reward/digits" in with_reward.recorder.rows[0]
    assert not any(name.startswith(("reward", "group/constant")) for name in without.recorder.rows[0])


def test_a_teacher_with_another_vocabulary_can_only_be_sampled(distill: Any) -> None:
    run = start_run(distill(**TWELVE, objective="full"))
    run.models["teacher"].resize_token_embeddings(64, mean_resizing=False)
    with pytest.raises(UserError, match=r"head has 46 entries and the teacher's 64.*objective: sampled"):
        run.go(1)
    run.algorithm = distill(**TWELVE)
    run.go(1)


# ---- metrics and learning --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_metrics(distill: Any, objective: str) -> None:
    """Of the second step on the same samples, when the policy has moved by one step away from them."""
    settings = {**TWELVE, "objective": objective, "learning_rate": 0.02, "clip_low": 0.05, "clip_high": 0.05}
    once, twice = start_run(distill(**settings)), start_run(distill(**settings, epochs=2))
    (step, _) = collect(twice)
    once.go(1)
    metrics = twice.go(1)[0].metrics
    new, old, teacher, divergences, entropies, lengths = [], [], [], [], [], []
    for b in step.microbatches:
        new += numbers(raw_logprobs(once.models["policy"], b))
        old += rows_of(b.old_logprobs, b)
        teacher += numbers(raw_logprobs(once.models["teacher"], b))
        divergences += numbers(raw_divergences(once, b))
        entropies += numbers(raw_entropies(once.models["policy"], b))
        lengths += b.completion_mask.sum(-1).tolist()
    now, before, said = (np.concatenate(x) for x in (new, old, teacher))
    ratio, advantage = np.exp(now - before), said - before
    held = ((ratio > 1.05) & (advantage > 0)) | ((ratio < 0.95) & (advantage < 0))
    gaps = now - said if objective == "sampled" else np.concatenate(divergences)
    assert 0 < held.mean() < 1 and sum(lengths) == len(now)
    assert_close(metrics["distill/reverse_kl_per_token"], gaps.mean(), **FLOAT64)
    assert_close(metrics["distill/reverse_kl_per_sequence"], gaps.sum() / 12, **FLOAT64)
    assert_close(metrics["policy/entropy"], np.concatenate(entropies).mean(), **FLOAT64)
    assert_close(metrics["policy/ratio"], ratio.mean(), **FLOAT64)
    assert_close(metrics["policy/approx_kl"], (np.log(ratio) ** 2 / 2).mean(), **FLOAT64)
    if objective == "sampled":
        assert_close(metrics["policy/clip_fraction"], held.mean(), **FLOAT64)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_learns(distill: Any, objective: str) -> None:
    """The divergence falls; exact, it falls by more than half."""
    run = start_run(distill(prompts_per_phase=8, group_size=4, objective=objective, learning_rate=5e-3),
                    microbatch_rows=32)  # fmt: skip
    run.go(15)
    divergence = run.column("distill/reverse_kl_per_token")
    assert np.mean(divergence[-3:]) < (0.5 if objective == "full" else 0.75) * np.mean(divergence[:3])


@pytest.mark.parametrize("options", [{}, {"gamma": 0.5, "clip_high": 0.03}, {"objective": "full"}], ids=str)
@pytest.mark.parametrize("aggregation", ["token", "sequence", "constant"])
def test_formula_is_the_executed_loss(distill: Any, options: dict[str, Any], aggregation: str) -> None:
    run = start_run(distill(**TWELVE, **options, aggregation=aggregation), microbatch_rows=12)
    (step,) = collect(run)
    nudge(run.models["policy"], 0.05)
    (b,) = step.microbatches
    divergences = torch.zeros_like(b.old_logprobs).masked_scatter(b.completion_mask, torch.cat(raw_divergences(run, b)))
    logprobs = torch.zeros_like(b.old_logprobs).masked_scatter(
        b.completion_mask, torch.cat(raw_logprobs(run.models["policy"], b)).detach()
    )
    mask = b.completion_mask.numpy()
    names: dict[str, Any] = {
        "mask": mask, "logprobs": logprobs.numpy(), "old_logprobs": b.old_logprobs.numpy(),
        "reverse_kl": divergences.detach().numpy(), "rows": 12, "completion_tokens": mask.sum(),
        "max_completion_tokens": MAX_TOKENS, "exp": np.exp, "clip": np.clip, "maximum": np.maximum, "sum": np.sum,
        "row_mean": lambda x: (x * mask).sum(-1, keepdims=True) / mask.sum(-1, keepdims=True),
    }  # fmt: skip
    if "objective" not in options:
        names |= {"reference_logprobs": b.reference_logprobs.numpy(), "advantages": b.advantages.numpy()}
    for line in run.algorithm.formula():
        exec(line, names)
    assert_close(loss_and_gradient(run, step)[0], float(names["loss"]), **FLOAT64)


@pytest.mark.parametrize(
    "text, replacement, test, arguments",
    [
        ("log_ratio = teacher - batch", "log_ratio = batch.old_logprobs - teacher + 0 * batch",
         test_gradient_at_ratio_one_is_reinforce, ()),
        ("gamma=self.gamma", "gamma=1.0",
         test_each_token_is_credited_with_the_teachers_log_ratio_from_there_on, (0.0,)),
        ("gae_lambda=1.0", "gae_lambda=0.0",
         test_each_token_is_credited_with_the_teachers_log_ratio_from_there_on, (0.5,)),
        ("models[\"teacher\"], b, temperature=self.temperature", "models[\"policy\"], b, temperature=self.temperature",
         test_each_token_is_credited_with_the_teachers_log_ratio_from_there_on, (0.0,)),
        ("terms = clipped_surrogate(", "terms = -clipped_surrogate(", test_sampled_loss, ("token", 0.0)),
        ("clips = batch.completion_mask, (self.clip_low, self.clip_high)",
         "clips = batch.completion_mask, (self.clip_high, self.clip_low)", test_sampled_loss, ("token", 0.0)),
        ("aggregate(terms, mask, self.aggregation)", "aggregate(terms, mask)", test_sampled_loss, ("sequence", 0.0)),
        ("aggregate(divergence, mask, self.aggregation)", "aggregate(-divergence, mask, self.aggregation)",
         test_full_loss_and_gradient, ("token", 1.0)),
        ("aggregate(divergence, mask, self.aggregation)", "aggregate(divergence, mask)",
         test_full_loss_and_gradient, ("sequence", 1.0)),
        ("models[\"teacher\"], batch, temperature=self.temperature, entropy=True",
         "models[\"teacher\"], batch, entropy=True", test_full_loss_and_gradient, ("token", 0.6)),
        ("models[\"policy\"], models[\"teacher\"], batch", "models[\"teacher\"], models[\"policy\"], batch",
         test_full_loss_and_gradient, ("token", 1.0)),
        ("* source.sampling.max_completion_tokens", "", test_full_loss_and_gradient, ("constant", 1.0)),
        ("(total, float(len(batch)))", "(total, tokens)", test_metrics, ("full",)),
        ("scores.logprobs - batch.reference_logprobs, mask", "batch.old_logprobs - batch.reference_logprobs, mask",
         test_metrics, ("sampled",)),
        ("needs_reward=self.needs_reward", "needs_reward=True", test_no_reward_is_needed_and_one_is_only_logged,
         ("full",)),
        ("dropout: ClassVar[bool] = False", "dropout: ClassVar[bool] = True", test_every_phase_starts_at_ratio_one,
         ("full", 1.0, False)),
        ("if self.objective == \"full\" and student != teacher", "if False",
         test_a_teacher_with_another_vocabulary_can_only_be_sampled, ()),
    ],
)  # fmt: skip
def test_mutants_are_noticed(text: str, replacement: str, test: Any, arguments: tuple[Any, ...]) -> None:
    changed = mutant(module, text, replacement)
    with pytest.raises((AssertionError, RunError, RuntimeError, UserError, ValueError)):
        test(changed, *arguments)


def test_all_rows_of_a_phase_are_finite() -> None:
    run = start_run(module.ALGORITHM(**TWELVE))
    run.go(1)
    assert all(math.isfinite(v) for v in run.recorder.rows[0].values() if isinstance(v, float))
