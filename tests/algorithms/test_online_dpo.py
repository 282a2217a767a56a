"""Online DPO: which completions make a pair, and that the pairs are DPO's, from raw log-softmaxes."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from alignlab.algorithms import online_dpo as module
from alignlab.generate import Sampling
from alignlab.rollout import Reward
from alignlab.train import RunError
from alignlab.types import Group, Step
from tests.algorithms.world import (
    Run,
    collect,
    fixed,
    formula_value,
    loss_and_gradient,
    mutant,
    nudge,
    numbers,
    pair_inputs,
    policy,
    raw_logprobs,
    rollout,
    rows_of,
    slipping,
    start_run,
    template,
)
from tests.tolerances import EXACT, FLOAT64

FOUR = {"prompts_per_phase": 4, "group_size": 3, "beta": 0.4}
NAN = math.nan


@pytest.fixture
def online_dpo() -> Any:
    return module.ALGORITHM


def groups_of(rewards: list[list[float]]) -> list[Group]:
    """Groups by hand: their completions are different words, their rewards as given."""
    words, texts = (
        iter(("2", "no", "it is 3", "x y", "9", "seven", "a", "b c", "12", "ok", "so", "1 2 3")),
        ("1+1", "3", "9"),
    )
    model, shift = policy(), [0.0] * 20
    groups = []
    for text, of_group in zip(texts, rewards, strict=False):
        made = []
        for reward in of_group:
            word = next(words)
            tokens = len(template().encode_completion(word))
            made.append(rollout(model, text, word, reward=reward, shift=shift[:tokens]))
        groups.append(Group(rollouts=tuple(made)))
    return groups


def run_on(algorithm: Any, rewards: list[list[float]], **changes: Any) -> Run:
    return replace_source(start_run(algorithm, **changes), groups_of(rewards))


def replace_source(run: Run, groups: list[Group]) -> Run:
    run.source = fixed(groups)
    return run


def texts(step: Step) -> list[tuple[str, str]]:
    """The pairs of a step as texts, in the order of its microbatches."""
    found = []
    for batch in step.microbatches:
        rows = [
            template().decode(ids[mask].tolist())
            for ids, mask in zip(batch.input_ids, batch.completion_mask, strict=True)
        ]
        found += list(zip(rows[: len(rows) // 2], rows[len(rows) // 2 :], strict=True))
    return found


# ---- pairs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "scores, expected",
    [
        ([[1, 3, 2], [5, 4, 6]], ([1, 5], [0, 4])),
        ([[1, 3, 3], [0, 0, 5]], ([1, 5], [0, 3])),
        ([[2, 2, 2], [1, 0, 1]], ([3], [4])),
        ([[NAN, 1, 2], [3, NAN, NAN]], ([2], [1])),
        ([[NAN, NAN, NAN], [7, 7, NAN]], ([], [])),
    ],
    ids=[
        "best and worst",
        "ties go to the first",
        "equal groups are left out",
        "unjudged ones do not count",
        "nothing",
    ],
)
def test_best_and_worst(scores: list[list[float]], expected: tuple[list[int], list[int]]) -> None:
    chosen, rejected = module.best_and_worst(torch.tensor(scores, dtype=torch.float64).flatten(), 3)
    assert (chosen.tolist(), rejected.tolist()) == expected


def test_the_pairs_of_a_phase(online_dpo: Any) -> None:
    run = run_on(online_dpo(**FOUR), [[0.1, 0.9, 0.5], [0.3, 0.3, 0.3], [0.2, NAN, 0.7]])
    phase, _ = run.algorithm.collect(run.models, run.source, run.state)
    (step,) = phase.steps
    assert sorted(texts(step)) == [("12", "a"), ("no", "2")]
    assert step.normaliser == 2.0 and phase.metrics["preference/pairs"] == 2.0
    assert_close(phase.metrics["preference/score_gap"], ((0.9 - 0.1) + (0.7 - 0.2)) / 2, **FLOAT64)
    assert_close(phase.metrics["group/constant_fraction"], 1 / 3, **FLOAT64)


def test_a_phase_of_ties_has_no_steps(online_dpo: Any) -> None:
    run = run_on(online_dpo(**FOUR), [[0.5, 0.5, 0.5], [0.1, 0.1, NAN]])
    before = [p.clone() for p in run.models["policy"].parameters()]
    phase, _ = run.algorithm.collect(run.models, run.source, run.state)
    assert phase.steps == () and phase.metrics["preference/pairs"] == 0.0
    assert phase.metrics["group/constant_fraction"] == 1.0 and "preference/score_gap" not in phase.metrics
    run.go(2)
    assert run.state.phase == 2 and run.state.step == 0 and run.column("group/constant_fraction") == [1.0, 1.0]
    assert all(torch.equal(a, b) for a, b in zip(before, run.models["policy"].parameters(), strict=True))


def test_a_missing_stop_token_can_decide(online_dpo: Any) -> None:
    """The better completion was cut off; at a penalty of .5 the other one wins, at none it does not."""
    model, found = policy(), []
    cut = rollout(model, "3", "345", reward=0.9, shift=[0.0] * 3, stop=False)
    whole = rollout(model, "3", "3", reward=0.6, shift=[0.0] * 2)
    for penalty in (0.0, 0.5):
        algorithm = online_dpo(prompts_per_phase=1, group_size=2, missing_stop_penalty=penalty)
        run = replace_source(start_run(algorithm), [Group(rollouts=(cut, whole))])
        found += texts(collect(run)[0])
    assert found == [("345", "3"), ("3", "345")]


# ---- the loss --------------------------------------------------------------------------------------------------------


def sampled_run(algorithm: Any, **changes: Any) -> tuple[Run, Step]:
    """A step of real samples, and a policy that has moved since."""
    run = start_run(algorithm, **changes)
    step = collect(run)[0]
    nudge(run.models["policy"], 0.1)
    run.state = replace(run.state, step=3)
    return run, step


def test_loss(online_dpo: Any) -> None:
    run, step = sampled_run(online_dpo(**FOUR))
    values = pair_inputs(run, step)
    h = (values["chosen"] - values["reference_chosen"]) - (values["rejected"] - values["reference_rejected"])
    assert len(h) == 4 and np.ptp(h) > 0.1
    assert_close(loss_and_gradient(run, step)[0], float(np.log1p(np.exp(-0.4 * h)).mean()), **FLOAT64)


@pytest.mark.parametrize("variant", [None, *module.ALGORITHM.VARIANTS])
def test_the_printed_formula_is_the_executed_loss(online_dpo: Any, variant: str | None) -> None:
    run, step = sampled_run(online_dpo(prompts_per_phase=4, group_size=3, variant=variant))
    expected = formula_value(run.algorithm.formula(), pair_inputs(run, step))
    assert_close(loss_and_gradient(run, step)[0], expected, **FLOAT64)


def test_every_logprob_is_at_the_sampling_temperature(online_dpo: Any) -> None:
    sampling = Sampling(temperature=0.7, max_completion_tokens=8)
    run, step = sampled_run(online_dpo(**FOUR, temperature=0.7), sampling=sampling)
    drifts = []
    for batch in step.microbatches:
        of_roles = [
            np.array([x.sum() for x in numbers(raw_logprobs(run.models[role], batch, temperature=0.7))])
            for role in ("policy", "reference")
        ]
        drift = of_roles[0] - of_roles[1]
        drifts += list(drift[: len(drift) // 2] - drift[len(drift) // 2 :])
    expected = np.log1p(np.exp(-0.4 * np.array(drifts))).mean()
    assert_close(loss_and_gradient(run, step)[0], float(expected), **FLOAT64)


@pytest.mark.parametrize("lora", [False, True])
def test_at_the_start_the_loss_is_ln_2(online_dpo: Any, lora: bool) -> None:
    run = start_run(online_dpo(**FOUR), dropout=0.5, lora=lora)
    metrics = run.go(1)[0].metrics
    assert_close(metrics["loss/total"], math.log(2), **FLOAT64)
    assert_close(metrics["preference/accuracy"], 0.5, **EXACT)
    assert_close(metrics["policy/kl_per_sequence"], 0.0, rtol=0.0, atol=1e-10)


def test_kl_is_over_all_completions(online_dpo: Any) -> None:
    """Not over the pairs alone, which are the best and the worst: their mean log ratio is no KL."""
    run = start_run(online_dpo(**FOUR))
    nudge(run.models["policy"], 0.1)
    run.state = replace(run.state, step=3)
    phase, _ = run.algorithm.collect(run.models, run.source, run.state)
    batch = run.source.batch(phase.groups, torch.float64)
    with torch.no_grad():
        ratios = [
            (a - b).numpy()
            for a, b in zip(*(raw_logprobs(run.models[r], batch) for r in ("policy", "reference")), strict=True)
        ]
    assert len(ratios) == 12
    assert_close(phase.metrics["policy/kl_per_sequence"], float(np.mean([r.sum() for r in ratios])), **FLOAT64)
    assert_close(phase.metrics["policy/kl_per_token"], float(np.concatenate(ratios).mean()), **FLOAT64)
    error = np.std([r.sum() for r in ratios], ddof=1) / 12**0.5
    assert_close(phase.metrics["policy/kl_standard_error"], float(error), **FLOAT64)


def test_sampling_from_another_model_is_found(online_dpo: Any) -> None:
    run = start_run(online_dpo(**FOUR))
    run.go(1)
    run.source = slipping(run.source)
    with pytest.raises(RunError, match="phase 1: the log ratio of policy to sampling policy"):
        run.go(2)


def test_epochs_are_steps_on_the_same_pairs(online_dpo: Any) -> None:
    run = start_run(online_dpo(**FOUR, epochs=3))
    steps = collect(run)
    assert len(steps) == 3 and steps[0] is steps[1] is steps[2]
    run = start_run(online_dpo(**FOUR, epochs=3, learning_rate=1e-3))
    run.go(1)
    losses = run.column("loss/total")
    assert run.state.step == 3 and losses[2] < losses[1] < losses[0]


def test_sampling_logprobs_travel_with_the_pairs(online_dpo: Any) -> None:
    run = start_run(online_dpo(**FOUR))
    for batch in collect(run)[0].microbatches:
        recorded = rows_of(batch.old_logprobs, batch)
        for a, b in zip(recorded, numbers(raw_logprobs(run.models["policy"], batch)), strict=True):
            assert_close(a, b, **FLOAT64)


def test_learns_what_is_rewarded(online_dpo: Any) -> None:
    """Short completions are; lengths fall."""

    def short(prompts: Any, completions: Any) -> list[float]:
        return [-float(len(c.token_ids)) for c in completions]

    rewards = [Reward(name="short", function=short, weight=1.0)]
    algorithm = online_dpo(prompts_per_phase=8, group_size=4, learning_rate=5e-3)
    run = start_run(algorithm, rewards=rewards, microbatch_rows=16)
    run.go(15)
    lengths = run.column("completion/length")
    assert np.mean(lengths[-3:]) < np.mean(lengths[:3]) - 1


@pytest.mark.parametrize(
    "text, replacement, test, arguments",
    [
        ("chosen, rejected = best_and_worst", "rejected, chosen = best_and_worst", test_the_pairs_of_a_phase, ()),
        ("temperature=self.temperature).logprobs", "temperature=1.0).logprobs",
         test_every_logprob_is_at_the_sampling_temperature, ()),
        ("source, batch, self.temperature)", "source, batch, 1.0)",
         test_every_logprob_is_at_the_sampling_temperature, ()),
        ("float(len(chosen))),) * self.epochs", "float(len(groups))),) * self.epochs", test_the_pairs_of_a_phase, ()),
        ("LossOutput(output.total,", "LossOutput(-output.total,", test_loss, ()),
        ("{**output.identities, **on_policy}", "output.identities", test_sampling_from_another_model_is_found, ()),
        (" if len(chosen) else ()", "", test_a_phase_of_ties_has_no_steps, ()),
        ("best_and_worst(scores,", "best_and_worst(torch.tensor([r.reward for g in groups for r in g.rollouts]),",
         test_a_missing_stop_token_can_decide, ()),
        ("drifts.mean().item()", "drifts[chosen].mean().item()", test_kl_is_over_all_completions, ()),
        ("drifts.sum() / batch", "drifts.mean() / batch", test_kl_is_over_all_completions, ()),
        ("dropout: ClassVar[bool] = False", "dropout: ClassVar[bool] = True", test_at_the_start_the_loss_is_ln_2,
         (False,)),
    ],
)  # fmt: skip
def test_mutants_are_noticed(text: str, replacement: str, test: Any, arguments: tuple[Any, ...]) -> None:
    changed = mutant(module, text, replacement)
    with pytest.raises((AssertionError, RunError, pytest.fail.Exception)):
        test(changed, *arguments)
