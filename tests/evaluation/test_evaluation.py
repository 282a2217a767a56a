"""Held-out evaluation against numbers worked out by hand: scores, task means, lengths, KL, the same dice for all."""

from __future__ import annotations

import inspect
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from alignlab import evaluation, rollout
from alignlab.conversation import Template
from alignlab.data import collate
from alignlab.errors import UserError
from alignlab.evaluation import (
    check_gradable,
    completion_metrics,
    evaluate_policy,
    evaluate_reward_model,
    kl_metrics,
    task_mean,
)
from alignlab.evaluation.schema import check_record
from alignlab.forward import rewards
from alignlab.generate import Sampling
from alignlab.models import ModelChoice, frozen_policy, load_tokenizer, make_reward_model
from alignlab.rollout import Limits, Reward, Source, encode_pairs, sample_prompts
from alignlab.statistics import clustered_interval, clustered_proportion, mean_interval, wilson_interval
from alignlab.types import Completion, Message, Pair, Prompt, Row
from tests.runs import small_model
from tests.statistics.mutants import mutated
from tests.tolerances import FLOAT32, FLOAT64

SAMPLING = Sampling(max_completion_tokens=12)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_model(tmp_path_factory.mktemp("models") / "small")


@pytest.fixture(scope="module")
def template(folder: Path) -> Template:
    return Template.of(load_tokenizer(str(folder)), None)


def load(folder: Path, dtype: str = "float64", shift: float = 0.0) -> PreTrainedModel:
    """The small model; with a shift, another one: its last norm scales the logits up."""
    model = frozen_policy(ModelChoice(name=str(folder), dtype=dtype), CPU)  # type: ignore[arg-type]
    assert isinstance(model, PreTrainedModel)
    with torch.no_grad():
        model.model.norm.weight.add_(shift)
    return model


def prompt(number: int, task: str = "reasoning", answer: str = "7") -> Prompt:
    message = Message("user", f"How many are {number} and {7 - number}?")
    return Prompt(messages=(message,), id=f"{task}/{number}", task=task, answer=answer, meta={"grading": "number"})


PROMPTS = [prompt(n) for n in range(3)] + [prompt(n, "code", "max(xs)") for n in range(2)]


def completion(text: str, tokens: int = 3, stop: bool = True) -> Completion:
    reason = "stop" if stop else "length"
    return Completion(token_ids=(5,) * tokens, logprobs=(-0.5,) * tokens, finish_reason=reason, text=text)  # type: ignore[arg-type]


# ---- scores ----------------------------------------------------------------------------------------------------------


def answers(monkeypatch: pytest.MonkeyPatch, texts: dict[str, Sequence[str]]) -> None:
    """Makes the model say these texts, by prompt id."""

    def say(
        policy: object, prompts: Sequence[Prompt], *_: object, num_samples: int, **__: object
    ) -> list[list[Completion]]:
        assert all(len(texts[p.id]) == num_samples for p in prompts)
        return [[completion(text) for text in texts[p.id]] for p in prompts]

    monkeypatch.setattr(evaluation, "sample_prompts", say)


RIGHT, WRONG = "<reasoning>a</reasoning><answer>7</answer>", "<reasoning>a</reasoning><answer>8</answer>"


def test_scores_are_means_over_samples_and_the_score_is_the_mean_over_tasks(
    folder: Path, template: Template, monkeypatch: pytest.MonkeyPatch
) -> None:
    """reasoning: (2/4, 4/4, 1/4) -> 7/12; code: (1/4, 0) -> 1/8; their mean 17/48, not the prompt mean (2.0 / 5)."""
    answers(
        monkeypatch,
        {
            "reasoning/0": [RIGHT, WRONG, RIGHT, WRONG],
            "reasoning/1": [RIGHT] * 4,
            "reasoning/2": [WRONG, WRONG, WRONG, RIGHT],
            "code/0": ["max(xs)", "min(xs)", "nothing at all", "max(ys)"],
            "code/1": ["max(", "", "x", "7"],
        },
    )
    found = evaluate_policy(load(folder), PROMPTS, template, SAMPLING, samples=4)
    assert found.scores == {"reasoning/0": 0.5, "reasoning/1": 1.0, "reasoning/2": 0.25, "code/0": 0.25, "code/1": 0.0}
    assert found.metrics["reasoning/score"] == pytest.approx(7 / 12, **approx())
    assert found.metrics["code/score"] == pytest.approx(1 / 8, **approx())
    assert found.metrics["score"] == pytest.approx(17 / 48, **approx())
    assert found.metrics["reasoning/format"] == 1.0
    assert len(found.samples) == 20 and found.tasks == {p.id: p.task for p in PROMPTS}
    again = {i: [s["score"] for s in found.samples if s["prompt_id"] == i] for i in found.scores}
    assert {i: sum(values) / 4 for i, values in again.items()} == found.scores
    right = {"reasoning": [1, 0, 1, 0, 1, 1, 1, 1, 0, 0, 0, 1], "code": [1, 0, 0, 0, 0, 0, 0, 0]}
    asked = {task: [i // 4 for i in range(len(values))] for task, values in right.items()}
    share = clustered_proportion(right["reasoning"], asked["reasoning"])
    assert found.intervals["reasoning/score"] == (share.low, share.high)
    overall = mean_interval([clustered_interval(right[task], asked[task]) for task in right])
    assert found.intervals["score"] == pytest.approx((overall.low, overall.high))
    content = found.to_json()
    assert content["scores"] == found.scores and check_record(content).metrics == found.metrics


def approx() -> dict[str, float]:
    return {"rel": FLOAT64["rtol"], "abs": FLOAT64["atol"]}


def test_prompts_without_a_task_are_measured_and_not_graded(
    folder: Path, template: Template, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = Prompt(messages=(Message("user", "Hello"),), id="free/0")
    answers(monkeypatch, {"free/0": ["Hi there"], "reasoning/0": [RIGHT]})
    found = evaluate_policy(load(folder), [free, PROMPTS[0]], template, SAMPLING)
    assert found.scores == {"reasoning/0": 1.0} and found.metrics["score"] == 1.0
    assert found.metrics["completion/length"] == 3.0 and found.samples[0]["score"] is None
    answers(monkeypatch, {"free/0": ["Hi there"]})
    found = evaluate_policy(load(folder), [free], template, SAMPLING)
    assert found.scores == {} and "score" not in found.metrics and "completion/length" in found.metrics


def test_the_task_mean_counts_every_task_the_same() -> None:
    tasks = {"a": "x", "b": "x", "c": "x", "d": "y"}
    assert task_mean({"a": 0.0, "b": 0.0, "c": 0.3, "d": 1.0}, tasks) == pytest.approx(0.55, **approx())


def test_what_cannot_be_graded_names_prompt_and_reason() -> None:
    check_gradable(PROMPTS)
    bad = Prompt(messages=(Message("user", "x"),), id="mine/3", task="safety")
    with pytest.raises(UserError, match=r"task 'safety' cannot grade prompt 'mine/3' .*harmful"):
        check_gradable([*PROMPTS, bad])
    unknown = Prompt(messages=(Message("user", "x"),), id="mine/4", task="vibes")
    with pytest.raises(UserError, match=r"'vibes'.*there are: clinical"):
        check_gradable([unknown])


# ---- completions -----------------------------------------------------------------------------------------------------


def test_lengths_stops_and_variety_of_hand_made_completions() -> None:
    """Lengths 1, 2, 6: mean 3, median 2, sd sqrt((4 + 1 + 9) / 3). Pairs: ab bc, ab, (one word: none) -> 2 of 3."""
    made = [completion("a b c", 1), completion("a b", 2, stop=False), completion("a", 6)]
    found = completion_metrics(made)
    assert found == pytest.approx(
        {
            "completion/length": 3.0,
            "completion/length_median": 2.0,
            "completion/length_sd": math.sqrt(14 / 3),
            "completion/stop_fraction": 2 / 3,
            "completion/distinct_2": 2 / 3,
        },
        **approx(),
    )
    assert completion_metrics([completion("x y x y x y")])["completion/distinct_2"] == pytest.approx(2 / 5)
    assert math.isnan(completion_metrics([completion("one")])["completion/distinct_2"])


# ---- KL --------------------------------------------------------------------------------------------------------------


def test_the_kl_to_itself_is_zero(folder: Path, template: Template) -> None:
    policy = load(folder)
    found = evaluate_policy(policy, PROMPTS, template, SAMPLING, samples=2, reference=load(folder))
    assert abs(found.metrics["policy/kl_per_sequence"]) < 1e-10 and abs(found.metrics["policy/kl_per_token"]) < 1e-10
    assert "policy/kl_per_sequence" not in evaluate_policy(policy, PROMPTS[:1], template, SAMPLING).metrics


def test_the_kl_is_the_sum_of_log_ratios_on_the_policys_own_samples(folder: Path, template: Template) -> None:
    """Against a plain forward of each row by itself: mean over completions of sum_t log pi - log ref; over tokens."""
    policy, reference = load(folder), load(folder, shift=0.5)
    sampling = Sampling(max_completion_tokens=12, temperature=0.7)
    ids = [template.encode_prompt(p) for p in PROMPTS]
    sampled = sample_prompts(policy, PROMPTS, ids, template, sampling, num_samples=2, seed=3, phase=0)
    total, tokens, count = 0.0, 0, 0
    for prefix, siblings in zip(ids, sampled, strict=True):
        for c in siblings:
            row = torch.tensor([[*prefix, *c.token_ids]])
            both = [torch.log_softmax(m(input_ids=row).logits[0, :-1] / 0.7, -1) for m in (policy, reference)]
            for t, token in enumerate(c.token_ids, start=len(prefix)):
                total += (both[0][t - 1, token] - both[1][t - 1, token]).item()
            tokens, count = tokens + len(c.token_ids), count + 1
    assert abs(total) > 1e-3 and count == 10
    found = kl_metrics(reference, PROMPTS, ids, sampled, template, sampling, max_rows=3)
    assert found["policy/kl_per_sequence"] == pytest.approx(total / count, rel=1e-8)
    assert found["policy/kl_per_token"] == pytest.approx(total / tokens, rel=1e-8)
    wrong_temperature = kl_metrics(reference, PROMPTS, ids, sampled, template, Sampling(max_completion_tokens=12))
    assert abs(wrong_temperature["policy/kl_per_sequence"] - total / count) > 1e-3


# ---- dice ------------------------------------------------------------------------------------------------------------


def test_equal_models_answer_equally_whatever_else_is_asked(folder: Path, template: Template) -> None:
    """The dice belong to the prompt: not to the model object, the other prompts, their order, or the batch."""
    first = evaluate_policy(load(folder), PROMPTS, template, SAMPLING, samples=3)
    second = evaluate_policy(load(folder), PROMPTS[::-1], template, SAMPLING, samples=3, max_rows=2)
    alone = evaluate_policy(load(folder), PROMPTS[1:2], template, SAMPLING, samples=3)

    def texts(found: evaluation.Evaluation) -> dict[str, list[str]]:
        return {p.id: [s["text"] for s in found.samples if s["prompt_id"] == p.id] for p in PROMPTS}

    assert texts(first) == texts(second)
    assert texts(alone)["reasoning/1"] == texts(first)["reasoning/1"]
    assert len({text for told in texts(first).values() for text in told}) > 10


def test_two_models_throw_the_same_dice(folder: Path, template: Template, monkeypatch: pytest.MonkeyPatch) -> None:
    thrown: list[list[object]] = []
    real = rollout.generate

    def watched(model: object, ids: object, keys: list[object], *args: object, **options: object) -> object:
        thrown.append(keys)
        return real(model, ids, keys, *args, **options)

    monkeypatch.setattr(rollout, "generate", watched)
    for model in (load(folder), load(folder, shift=0.5)):
        evaluate_policy(model, PROMPTS, template, SAMPLING)
    assert thrown[0] == thrown[1] and len(set(thrown[0])) == len(PROMPTS)


def test_evaluation_leaves_the_policy_and_the_generators_as_they_were(folder: Path, template: Template) -> None:
    policy = load(folder).train()
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    evaluate_policy(policy, PROMPTS[:2], template, SAMPLING, reference=load(folder))
    assert torch.equal(torch.rand(1), expected) and policy.training


# ---- reward models ---------------------------------------------------------------------------------------------------


def test_reward_model_accuracy_is_the_share_of_pairs_in_the_right_order(folder: Path, template: Template) -> None:
    model = make_reward_model(load(folder), seed=1)
    limits = Limits(max_prompt_tokens=64, max_completion_tokens=16)
    texts = ["one", "two words", "three words here", "7", "max(xs)", "no"]
    pairs = [
        Pair(prompt=prompt(n, "reasoning" if n < 3 else "code"), chosen=texts[n], rejected=texts[(n + 1) % 6])
        for n in range(6)
    ]
    encoded = encode_pairs(pairs, template, limits)
    source = Source(template=template, device=CPU, limits=limits, sampling=SAMPLING, pairs=encoded)
    found = evaluate_reward_model(model, source, [p.prompt.task for p in pairs])

    def scored(text: str, number: int) -> float:
        row = template.row(pairs[number].prompt, text)
        return rewards(model, collate([Row(prompt_ids=row.prompt_ids, completion_ids=row.completion_ids)])).item()

    won = [float(scored(p.chosen, n) > scored(p.rejected, n)) for n, p in enumerate(pairs)]
    assert list(found.scores.values()) == won and 0 < sum(won) < 6
    assert found.metrics["preference/accuracy"] == pytest.approx(sum(won) / 6)
    assert found.metrics["reasoning/accuracy"] == pytest.approx(sum(won[:3]) / 3)
    assert found.metrics["code/accuracy"] == pytest.approx(sum(won[3:]) / 3)
    assert found.intervals["preference/accuracy"] == wilson_interval(int(sum(won)), 6)


def test_ties_count_one_half_in_the_accuracy_and_its_interval(folder: Path, template: Template) -> None:
    model = make_reward_model(load(folder), seed=1)
    torch.nn.init.zeros_(model.head.weight)
    limits = Limits(max_prompt_tokens=64, max_completion_tokens=16)
    pairs = encode_pairs([Pair(prompt=PROMPTS[0], chosen="a", rejected="b")], template, limits)
    source = Source(template=template, device=CPU, limits=limits, sampling=SAMPLING, pairs=pairs)
    found = evaluate_reward_model(model, source, ["reasoning"])
    assert found.metrics["preference/accuracy"] == 0.5
    low, high = found.intervals["preference/accuracy"]
    assert low < 0.5 < high
    torch.testing.assert_close(torch.tensor(0.5), torch.tensor(found.scores["pair/0"]), **FLOAT32)


# ---- best of n -------------------------------------------------------------------------------------------------------


def by_length(prompts: Sequence[Prompt], completions: Sequence[Completion]) -> list[float | None]:
    """The longer the better; what says nothing is not judged."""
    return [float(len(c.text)) if c.text else None for c in completions]


LENGTH = Reward(name="length", function=by_length, weight=1.0)


def test_the_best_candidate_of_each_sample_is_graded(
    folder: Path, template: Template, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two samples of three candidates: sample 0 has completions 0, 2, 4, sample 1 has 1, 3, 5. The longest wins, the
    first of equals, and what is not judged loses. Not by the grader: the right answer of sample 1 is short."""
    longer = f"{WRONG} "
    answers(monkeypatch, {"reasoning/0": [WRONG, RIGHT, RIGHT + "  ", longer, "", ""]})
    found = evaluate_policy(load(folder), PROMPTS[:1], template, SAMPLING, samples=2, best_of=3, rewards=[LENGTH])
    assert [s["text"] for s in found.samples] == [RIGHT + "  ", longer]
    assert found.scores == {"reasoning/0": 0.5}
    answers(monkeypatch, {"reasoning/0": ["", "", WRONG, "a", RIGHT, "b"]})
    found = evaluate_policy(load(folder), PROMPTS[:1], template, SAMPLING, samples=2, best_of=3, rewards=[LENGTH])
    assert [s["text"] for s in found.samples] == [WRONG, "a"]


def test_what_the_choice_costs_and_gains(folder: Path, template: Template, monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts of 1, 2, 3, 4 letters for one sample of four: chosen 4, mean 2.5. Four completions of three tokens an
    answer. KL of best of 4 to one sample: at most log 4 - 3/4."""
    answers(monkeypatch, {"code/0": ["a", "ab", "abc", "abcd"]})
    found = evaluate_policy(load(folder), PROMPTS[3:4], template, SAMPLING, best_of=4, rewards=[LENGTH])
    assert {k: v for k, v in found.metrics.items() if k.startswith("inference/")} == pytest.approx(
        {
            "inference/tokens_per_answer": 12.0,
            "inference/candidates": 4.0,
            "inference/reward": 4.0,
            "inference/reward_gain": 1.5,
            "inference/kl_bound": math.log(4) - 0.75,
        },
        **approx(),
    )
    assert found.metrics["completion/length"] == 3.0 and len(found.samples) == 1
    answers(monkeypatch, {"code/0": ["a"]})
    plain = evaluate_policy(load(folder), PROMPTS[3:4], template, SAMPLING)
    assert plain.metrics["inference/tokens_per_answer"] == 3.0 and "inference/candidates" not in plain.metrics


def test_an_indifferent_reward_changes_nothing_but_the_cost(folder: Path, template: Template) -> None:
    """The first candidate of each sample is the completion that would be graded without a choice."""
    same = Reward(name="same", function=lambda prompts, completions: [0.5] * len(prompts), weight=1.0)
    policy, reference = load(folder), load(folder, shift=0.5)
    plain = evaluate_policy(policy, PROMPTS, template, SAMPLING, samples=3, reference=reference)
    chosen = evaluate_policy(
        policy, PROMPTS, template, SAMPLING, samples=3, reference=reference, best_of=4, rewards=[same]
    )
    assert chosen.samples == plain.samples and chosen.scores == plain.scores
    paid = chosen.metrics["inference/tokens_per_answer"]
    assert paid > 3 * plain.metrics["inference/tokens_per_answer"]
    for name, value in plain.metrics.items():
        assert name == "inference/tokens_per_answer" or chosen.metrics[name] == value, name


def test_the_kl_is_of_the_policy_and_not_of_the_choice(folder: Path, template: Template) -> None:
    """Chosen completions are no samples of the policy: their log ratios would not average to its divergence."""
    policy, reference = load(folder), load(folder, shift=0.5)
    plain, chosen = (
        evaluate_policy(policy, PROMPTS, template, SAMPLING, samples=2, reference=reference, **options)  # type: ignore[arg-type]
        for options in ({}, {"best_of": 3, "rewards": [LENGTH]})
    )
    assert [s["text"] for s in plain.samples] != [s["text"] for s in chosen.samples]
    for name in ("policy/kl_per_sequence", "policy/kl_per_token"):
        assert chosen.metrics[name] == plain.metrics[name]


def test_more_candidates_earn_more(folder: Path, template: Template) -> None:
    earned = [
        evaluate_policy(load(folder), PROMPTS, template, SAMPLING, samples=2, best_of=n, rewards=[LENGTH]).metrics[
            "inference/reward"
        ]
        for n in (2, 4, 8)
    ]
    assert earned[0] <= earned[1] <= earned[2] and earned[0] < earned[2]


def test_candidates_that_nothing_judges_are_an_error(folder: Path, template: Template) -> None:
    with pytest.raises(UserError, match="none is named"):
        evaluate_policy(load(folder), PROMPTS[:1], template, SAMPLING, best_of=2)


@pytest.mark.parametrize(
    ("text", "replacement", "test"),
    [
        ("(best[p, s]) * samples + s]", "(best[p, s]) + s * best_of]",
         test_the_best_candidate_of_each_sample_is_graded),
        ("-np.inf, by_sample).argmax(1)", "np.inf, by_sample).argmax(1)",
         test_the_best_candidate_of_each_sample_is_graded),
        ("-np.inf, by_sample).argmax(1)", "-np.inf, -by_sample).argmax(1)",
         test_the_best_candidate_of_each_sample_is_graded),
        ("siblings])) * best_of", "siblings]))", test_what_the_choice_costs_and_gains),
        ("- (best_of - 1) / best_of", "", test_what_the_choice_costs_and_gains),
        ("np.nanmean(picked) - np.nanmean(by_sample)", "np.nanmean(picked)", test_what_the_choice_costs_and_gains),
        ("siblings[:samples] for siblings in candidates", "siblings for siblings in chosen",
         test_the_kl_is_of_the_policy_and_not_of_the_choice),
    ],
)  # fmt: skip
def test_mutants_of_the_choice_are_noticed(
    text: str, replacement: str, test: Any, folder: Path, template: Template, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed = mutated(evaluation, text, replacement)
    monkeypatch.setattr(evaluation, "choose", changed.choose)
    monkeypatch.setitem(test.__globals__, "evaluate_policy", changed.evaluate_policy)
    monkeypatch.setattr(sys.modules[__name__], "evaluation", changed)
    names = inspect.signature(test).parameters
    given = {"folder": folder, "template": template, "monkeypatch": monkeypatch}
    with pytest.raises((AssertionError, IndexError)):
        test(**{name: given[name] for name in names})
