"""Planted judges with one known fault each (or none) get the verdict and the numbers that the fault deserves."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, cast

import numpy as np
import pytest
import torch
from scipy import special

from alignlab import forward
from alignlab.conversation import Template
from alignlab.doctor import Examination, Judge, examine
from alignlab.doctor import examination as module
from alignlab.errors import UserError
from alignlab.models import ScalarModel, load_generation_config, load_policy, load_tokenizer, make_reward_model
from alignlab.models.load import ModelChoice
from alignlab.rollout import Limits
from alignlab.statistics.inference import wilson_interval
from alignlab.types import Batch, Message, Pair, Prompt, Row
from tests.statistics.mutants import mutated

LIMITS = Limits(max_prompt_tokens=64, max_completion_tokens=64, microbatch_rows=16)
ROUNDING = 1e-6
"""Scores are float64 sums of a few numbers, or of a hash."""


@pytest.fixture(scope="module")
def template() -> Template:
    return Template.of(load_tokenizer("starter"), load_generation_config("starter"))


def judge(template: Template, says: Callable[[str], float], **options: Any) -> Judge:
    """A judge that reads the completion's text."""

    def score(batch: Batch) -> torch.Tensor:
        texts = [
            template.decode(ids[mask].tolist())
            for ids, mask in zip(batch.input_ids, batch.completion_mask, strict=True)
        ]
        return torch.tensor([says(text) for text in texts], dtype=torch.float64)

    return Judge(score=score, template=template, limits=LIMITS, **options)


def noise(text: str, name: str = "") -> float:
    """A standard normal number that is a function of the text."""
    digest = hashlib.sha256(f"{name}/{text}".encode()).digest()
    return float(special.ndtri((int.from_bytes(digest[:6], "big") + 0.5) / 2**48))


def prompt(i: int, task: str = "", **meta: Any) -> Prompt:
    return Prompt(messages=(Message("user", f"Question {i}?"),), id=f"p/{i}", task=task, meta=meta)


def chosen_pairs(utility: Callable[[str], float], texts: Sequence[tuple[str, str]], seed: int = 0) -> list[Pair]:
    """Pairs whose label is drawn as Bradley and Terry say: the first wins with sigmoid(u - v)."""
    random = np.random.default_rng(seed)
    pairs = []
    for i, (a, b) in enumerate(texts):
        first = random.random() < special.expit(utility(a) - utility(b))
        pairs.append(Pair(prompt=prompt(i), chosen=a if first else b, rejected=b if first else a))
    return pairs


def drawn_pairs(utility: Callable[[str], float], count: int = 800) -> list[Pair]:
    return chosen_pairs(
        utility, [(f"We say {i}. It is so. I think.", f"No, {i + count}. Now I say. Yes.") for i in range(count)]
    )


# ---- the scorers -----------------------------------------------------------------------------------------------------


def test_a_perfect_judge(template: Template) -> None:
    pairs = [Pair(prompt=prompt(i), chosen=f"good {i}", rejected=f"bad {i}") for i in range(100)]
    found = examine(judge(template, lambda text: 4.0 if "good" in text else 0.0), pairs)
    assert found.fit and found.reasons == ()
    (everything,) = found.accuracy
    assert (everything.value, everything.ties) == (1.0, 0)
    assert (everything.low, everything.high) == wilson_interval(100, 100)
    assert found.calibration.error == pytest.approx(1 - special.expit(4), abs=ROUNDING)
    assert found.calibration.temperature == 0.01  # nothing contradicts it, so the margins could be larger still
    assert found.margins.mean == 4.0 and found.margins.sd == 0.0
    assert found.invariance.largest == 0.0


def test_a_random_judge(template: Template) -> None:
    pairs = [Pair(prompt=prompt(i), chosen=f"good {i}", rejected=f"bad {i}") for i in range(400)]
    found = examine(judge(template, noise), pairs)
    assert not found.fit and "accuracy" in found.reasons[0]
    assert found.accuracy[0].low < 0.5 < found.accuracy[0].high
    # Every changed text is a new draw: half of the preferences turn round, and the ranking is unrelated.
    changed = found.perturbations["whitespace"]
    assert changed.completions == 400
    assert changed.flip_rate == pytest.approx(0.5, abs=0.12)
    assert changed.kendall_tau == pytest.approx(0.0, abs=0.12)
    assert changed.stability is not None and changed.stability < 0.1
    assert changed.variation == pytest.approx(math.sqrt(2), rel=0.15)


def test_a_judge_of_length(template: Template) -> None:
    """Labels are coins, scores are lengths: every correlation is 1, and the labels have none."""
    texts = [("word " * (1 + i % 7), "word " * (1 + (3 * i + 1) % 11)) for i in range(300)]
    pairs = chosen_pairs(lambda text: 0.0, [pair for pair in texts if pair[0] != pair[1]])
    found = examine(judge(template, lambda text: 0.1 * len(text.split())), pairs)
    assert found.length.overall.pearson == pytest.approx(1.0, abs=0.005)  # words are nearly tokens
    assert found.length.within_prompt.spearman == pytest.approx(1.0, abs=0.005)
    assert abs(cast(float, found.length.labels_within_prompt.pearson)) < 0.2
    flagged = [warning for warning in found.warnings if "scores go with length: correlation +1.00" in warning]
    assert len(flagged) == 2 and "over all completions" in flagged[0] and "within prompts" in flagged[1]
    # -.1 a word: a truncated text of one sentence loses a tenth of its words, and at least one.
    assert found.perturbations["truncation"].mean_change == pytest.approx(-0.1, abs=ROUNDING)


@pytest.mark.parametrize("planted", [1.0, 3.0])
def test_a_judge_that_is_too_sure(template: Template, planted: float) -> None:
    """Labels follow sigmoid(u - v), scores are planted * u: that is the temperature, which repairs the calibration."""
    found = examine(judge(template, lambda text: planted * 2 * noise(text)), drawn_pairs(lambda text: 2 * noise(text)))
    assert found.accuracy[0].value > 0.7
    assert found.calibration.temperature == pytest.approx(planted, rel=0.25)
    assert found.calibration.error_at_temperature < 0.06
    assert found.fit
    told = [warning for warning in found.warnings if "log-odds" in warning]
    if planted == 1.0:
        assert found.calibration.error < 0.06 and not told
    else:
        assert found.calibration.error > 0.1 and len(told) == 1
        assert found.calibration.nll > found.calibration.nll_at_temperature


def test_calibration_reads_raw_scores_not_normalised_ones(template: Template) -> None:
    """The loss was about raw scores: what normalisation makes of them changes neither temperature nor error."""
    pairs = drawn_pairs(lambda text: 2 * noise(text), 200)
    raw = examine(judge(template, lambda text: 2 * noise(text)), pairs)
    normalised = examine(judge(template, lambda text: (2 * noise(text) - 7) / 5, scale=5.0), pairs)
    assert normalised.calibration.temperature == pytest.approx(raw.calibration.temperature, rel=ROUNDING)
    assert normalised.calibration.error == pytest.approx(raw.calibration.error, abs=ROUNDING)
    assert normalised.margins.mean == pytest.approx(raw.margins.mean / 5, abs=ROUNDING)


def test_a_judge_that_no_temperature_repairs(template: Template) -> None:
    """Sure where it is wrong and unsure where it is right: 75 % at p = .5, 72 % at p = .99."""

    def score(text: str) -> float:
        i = int(text.split()[1])
        wrong = (i // 2) % 4 == 0
        return (-1 if wrong else 1) * (5.0 if i % 2 else 0.01) if text.startswith("good") else 0.0

    pairs = [Pair(prompt=prompt(i), chosen=f"good {i}", rejected=f"bad {i}") for i in range(400)]
    found = examine(judge(template, score), pairs)
    assert found.accuracy[0].value == 0.75
    assert not found.fit and len(found.reasons) == 1 and "calibration error" in found.reasons[0]


def test_a_judge_that_sees_no_difference(template: Template) -> None:
    pairs = [Pair(prompt=prompt(i), chosen=f"good {i}. Now.", rejected=f"bad {i}. Now.") for i in range(20)]
    found = examine(judge(template, lambda text: 1.5), pairs)
    assert not found.fit and found.accuracy[0].ties == 20 and found.accuracy[0].value == 0.5
    assert "every completion gets the same score" in found.warnings
    assert found.calibration.temperature == 1.0
    assert found.length.overall.pearson is None
    assert found.perturbations["truncation"].stability is None and found.perturbations["truncation"].flip_rate == 0.0


def test_a_judge_that_reads_padding(template: Template) -> None:
    pairs = [Pair(prompt=prompt(i), chosen="good " * (1 + i % 5), rejected="bad " * (1 + i % 3)) for i in range(40)]
    honest = judge(template, lambda text: 4.0 if "good" in text else 0.0)

    def width(batch: Batch) -> torch.Tensor:
        return honest.score(batch) + 0.001 * batch.input_ids.shape[1]

    found = examine(replace(honest, score=width), pairs)
    assert not found.fit and "scores depend on the batch" in found.reasons[0]
    assert found.invariance.largest == pytest.approx(0.001 * 19, abs=0.006)  # 11 columns more than the longest row
    assert examine(honest, pairs).fit


@pytest.fixture(scope="module")
def reward_model() -> ScalarModel:
    """A random head on the starter's trunk."""
    return make_reward_model(load_policy(ModelChoice(), device=torch.device("cpu")), seed=0).eval()


LENGTHS = [Pair(prompt=prompt(i), chosen="Yes. " * (1 + i % 7), rejected="No! ok " + "x" * i) for i in range(12)]


def test_a_real_reward_model_does_not_depend_on_its_batch(reward_model: ScalarModel, template: Template) -> None:
    score = partial(forward.rewards, reward_model)
    found = examine(Judge(score=score, template=template, limits=LIMITS), LENGTHS).invariance
    assert found.holds and 0 < found.largest < 1e-5 and found.rows == 24


@pytest.mark.parametrize(
    ("wrong", "kind"),
    [
        ("last column", "a ragged batch"),
        ("last id that is no pad", "padding with another id"),
        ("number of attended tokens", "padding on the left"),
    ],
)
def test_readers_of_the_wrong_place_are_found(
    reward_model: ScalarModel, template: Template, wrong: str, kind: str
) -> None:
    """The three usual ways to read a score at the wrong token."""

    def score(batch: Batch) -> torch.Tensor:
        columns = torch.arange(batch.input_ids.shape[1])
        last = {
            "last column": torch.full((len(batch),), len(columns) - 1),
            "last id that is no pad": ((batch.input_ids != template.pad_id) * columns).argmax(-1),
            "number of attended tokens": batch.attention_mask.sum(-1) - 1,
        }[wrong]
        states = forward.padded_states(reward_model, batch)
        return cast(torch.Tensor, reward_model(states[torch.arange(len(batch)), last]))

    found = examine(Judge(score=score, template=template, limits=LIMITS), LENGTHS)
    assert not found.fit and any("scores depend on the batch" in reason for reason in found.reasons)
    assert found.invariance.differences[kind] > 0.01


# ---- robustness ------------------------------------------------------------------------------------------------------


def test_a_judge_of_words_alone_is_not_moved_by_their_places(template: Template) -> None:
    pairs = drawn_pairs(noise, 120)
    found = examine(judge(template, lambda text: noise(" ".join(sorted(text.split())))), pairs).perturbations
    for name in ("whitespace", "sentence_order"):
        measured = found[name]
        assert measured.completions > 0 and (measured.flip_rate, measured.max_change) == (0.0, 0.0), name
        assert measured.stability == pytest.approx(1.0, abs=ROUNDING)
    assert cast(float, found["truncation"].stability) < 0.2


def test_one_word_that_counts_is_found(template: Template) -> None:
    """`help` is worth 2 and its synonyms nothing: all chosen texts fall by 2, below the rejected ones at 1."""
    pairs = [Pair(prompt=prompt(i), chosen=f"I help with {i}", rejected=f"it is with {i}") for i in range(30)]
    found = examine(
        judge(template, lambda text: 2.0 if "help" in text.split() else 1.0 if "it" in text.split() else 0.0), pairs
    )
    synonyms = found.perturbations["synonyms"]
    assert (synonyms.completions, synonyms.pairs) == (30, 30)
    assert (synonyms.mean_change, synonyms.sd_change, synonyms.flip_rate) == (-2.0, 0.0, 1.0)
    assert synonyms.kendall_tau is None  # all changed texts are equally good, before and after


def test_what_cannot_be_changed_is_not_counted(template: Template) -> None:
    pairs = [Pair(prompt=prompt(i), chosen=f"{i} + 1", rejected=f"{i} + 2") for i in range(6)]
    found = examine(judge(template, noise), pairs)
    assert all(measured.completions == 0 for measured in found.perturbations.values())


def test_fragile_judges_are_told(template: Template) -> None:
    found = examine(judge(template, noise), drawn_pairs(noise, 100))
    told = [warning for warning in found.warnings if "stability of only" in warning]
    assert [warning.split(" alone")[0] for warning in told] == ["synonyms", "sentence order", "whitespace"]


# ---- what else is said -----------------------------------------------------------------------------------------------


def rows(template: Template, texts: Sequence[str]) -> list[Row]:
    return [template.row(prompt(i), text) for i, text in enumerate(texts)]


@pytest.mark.parametrize(("shift", "factor", "told"), [(0.0, 1.0, False), (1.0, 1.0, True), (0.0, 2.0, True)])
def test_reference_outputs_have_mean_0_and_sd_1(template: Template, shift: float, factor: float, told: bool) -> None:
    pairs = drawn_pairs(noise, 20)
    says = judge(template, lambda text: shift + factor * noise(text))
    found = examine(says, pairs, reference=rows(template, [f"answer {i}" for i in range(128)]))
    assert found.normalisation is not None and found.normalisation.completions == 128
    assert found.normalisation.mean == pytest.approx(shift, abs=0.25 * factor)
    assert any("reference outputs" in warning for warning in found.warnings) == told
    assert examine(says, pairs).normalisation is None


def test_groups_are_tasks_and_categories(template: Template) -> None:
    pairs = [
        Pair(prompt=prompt(i, "code" if i < 4 else "safety", **({"category": "theft"} if i >= 6 else {})),
             chosen=f"good {i}", rejected=f"bad {i}")
        for i in range(8)
    ]  # fmt: skip
    found = examine(
        judge(template, lambda text: float(text.startswith("good")) * (1 if int(text[-1]) > 1 else -1)), pairs
    )
    assert [(group.name, group.pairs, group.value) for group in found.accuracy] == [
        ("all", 8, 0.75),
        ("code", 4, 0.5),
        ("safety", 4, 1.0),
        ("safety/theft", 2, 1.0),
    ]


def test_few_pairs_and_shared_prompts_are_told(template: Template) -> None:
    pairs = [Pair(prompt=prompt(i // 2), chosen=f"good {i}", rejected=f"bad {i}") for i in range(20)]
    found = examine(judge(template, lambda text: 1.0 if text.startswith("good") and text[-1] != "7" else 0.5), pairs)
    assert any("20 pairs share 10 prompts" in warning for warning in found.warnings)
    assert any("held-out pairs are few" in warning for warning in found.warnings)
    half = [
        replace(pair, chosen=pair.rejected, rejected=pair.chosen) if i % 3 == 0 else pair
        for i, pair in enumerate(pairs)
    ]
    unsure = examine(judge(template, lambda text: float(text.startswith("good"))), half)
    assert any("cannot tell whether accuracy is above 0.70" in warning for warning in unsure.warnings)


def test_pairs_that_do_not_fit_are_left_out(template: Template) -> None:
    pairs = drawn_pairs(noise, 10)
    same = Pair(prompt=prompt(90), chosen="a", rejected="a")
    long = Pair(prompt=Prompt(messages=(Message("user", "so " * 200),), id="long"), chosen="a", rejected="b")
    found = examine(judge(template, noise), [*pairs, same, long])
    assert found.left_out == 2 and len(found.pairs) == found.accuracy[0].pairs == 10
    with pytest.raises(UserError, match="1 of 2 pairs fit the run's limits, with 1 different prompts"):
        examine(judge(template, noise), [pairs[0], long])


def test_a_score_that_is_no_number(template: Template) -> None:
    with pytest.raises(UserError, match="gives 1 of 20 completions no finite score"):
        examine(judge(template, lambda text: math.nan if " 3." in text else 1.0), drawn_pairs(noise, 10))


def test_the_same_seed_finds_the_same(template: Template) -> None:
    pairs = drawn_pairs(noise, 60)
    assert examine(judge(template, noise), pairs, seed=3) == examine(judge(template, noise), pairs, seed=3)
    assert examine(judge(template, noise), pairs, seed=4) != examine(judge(template, noise), pairs, seed=3)


# ---- mutants ---------------------------------------------------------------------------------------------------------


def verdict(module: Any, template: Template) -> None:
    """The gate by hand: 70 of 100 right is enough, 69 is not; an error of .0999 is, one of .1 is not."""

    def found(right: int) -> Examination:
        pairs = [Pair(prompt=prompt(i), chosen=f"good {i}", rejected=f"bad {i}") for i in range(100)]
        says = judge(template, lambda text: (1.0 if int(text.split()[1]) < right else -1.0) * text.startswith("good"))
        return cast(Examination, module.examine(says, pairs))

    assert not any("accuracy" in reason for reason in found(70).reasons)
    assert any("accuracy" in reason for reason in found(69).reasons)


def test_the_gate(template: Template) -> None:
    verdict(module, template)


@pytest.mark.parametrize(
    ("text", "replacement"),
    [
        ("accuracy.value < LEAST_ACCURACY:", "accuracy.value <= LEAST_ACCURACY:"),
        ("LEAST_ACCURACY = 0.70", "LEAST_ACCURACY = 0.68"),
    ],
)
def test_mutants_of_the_gate_are_caught(template: Template, text: str, replacement: str) -> None:
    with pytest.raises(AssertionError):
        verdict(mutated(module, text, replacement), template)


def check_repairable(module: Any, template: Template) -> None:
    """An error that the temperature repairs is no reason; what it cannot repair is."""
    pairs = drawn_pairs(lambda text: 2 * noise(text), 400)
    found = module.examine(judge(template, lambda text: 6 * noise(text)), pairs)
    assert found.calibration.error >= 0.1 > found.calibration.error_at_temperature
    assert found.verdict == "fit for RL", found.reasons


def test_a_repairable_error_is_no_reason(template: Template) -> None:
    check_repairable(module, template)


@pytest.mark.parametrize(
    ("text", "replacement"),
    [
        ("if min(calibration.error, calibration", "if max(calibration.error, calibration"),
        ("calibration(margins * judge.scale,", "calibration(margins * judge.scale / 1000,"),
    ],
)
def test_mutants_of_the_calibration_gate_are_caught(template: Template, text: str, replacement: str) -> None:
    with pytest.raises(AssertionError):
        check_repairable(mutated(module, text, replacement), template)
