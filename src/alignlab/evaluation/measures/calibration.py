"""Does the model know when it is right? Several samples a prompt -> agreement as confidence -> calibration error.

A language model states no probability of being right. What stands in for one here is agreement: the share of a prompt's
samples that give its most frequent answer (self-consistency, arXiv 2203.11171), whose answer is then right or wrong.
The likelihood of the text is not used, as one answer can be written in many ways that share it out between them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable

import numpy as np

from alignlab.evaluation.measures import Answers, Found, Measure, Settings, Values, Whole
from alignlab.evaluation.measures.exact_match import normalised
from alignlab.rewards.exact import final_number
from alignlab.statistics.calibration import calibration_error, chance_error, reliability
from alignlab.statistics.clustered import IntArray

FEWEST_SAMPLES = 4
"""With fewer, agreement has next to no levels."""


def answer_of(text: str, is_number: bool) -> Hashable:
    """What counts as the same answer: the same final number, or the same normalised text."""
    number = final_number(text, "flexible") if is_number else None
    return normalised(text) if number is None else number


def agreement(answers: Answers) -> dict[str, tuple[float, float]]:
    """Prompt id -> (share of its samples that agree with the most frequent answer, whether that is right).

    Of answers that are equally frequent the first given counts. Prompts with fewer than four samples, or whose task
    gives grades between 0 and 1, are left out.
    """
    by_prompt: dict[str, list[int]] = {}
    for i, prompt in enumerate(answers.prompts):
        by_prompt.setdefault(prompt.id, []).append(i)
    found = {}
    for prompt_id, index in by_prompt.items():
        scores = [answers.grades[i].get("score") for i in index]
        if len(index) < FEWEST_SAMPLES or any(score not in (0.0, 1.0) for score in scores):
            continue
        is_number = answers.prompts[index[0]].meta.get("grading") == "number"
        said = [answer_of(answers.completions[i].text, is_number) for i in index]
        most, times = Counter(said).most_common(1)[0]
        right = [score for answer, score in zip(said, scores, strict=True) if answer == most and score is not None]
        found[prompt_id] = times / len(index), float(np.mean(right) >= 0.5)
    return found


def _find(answers: Answers, settings: Settings) -> Found:
    known = agreement(answers)
    if not known:
        return Found()
    pairs = [known.get(prompt.id) for prompt in answers.prompts]
    confidence: Values = [None if pair is None else pair[0] for pair in pairs]
    applies = [pair is not None for pair in pairs]
    accuracy: Values = [None if pair is None else pair[1] for pair in pairs]

    def error(index: IntArray) -> float:
        here = _of_prompts(answers, known, index)
        return calibration_error(reliability([stated for stated, _ in here], [right for _, right in here]))

    def chance(index: IntArray) -> float:
        return chance_error([stated for stated, _ in _of_prompts(answers, known, index)], draws=50)

    return Found(
        values={"calibration/agreement": confidence, "calibration/majority_accuracy": accuracy},
        whole={
            "calibration/error": Whole(statistic=error, applies=applies, interval="bootstrap"),
            "calibration/chance_error": Whole(statistic=chance, applies=applies, interval="none"),
        },
    )


def _of_prompts(answers: Answers, known: dict[str, tuple[float, float]], index: IntArray) -> list[tuple[float, float]]:
    """(agreement, right) once for as often as a prompt's samples all stand in `index`."""
    times = Counter(answers.prompts[i].id for i in index)
    samples = Counter(prompt.id for prompt in answers.prompts)
    return [known[p] for p, count in times.items() if p in known for _ in range(count // samples[p])]


MEASURE = Measure(
    says="agreement of a prompt's samples against how often the most frequent answer is right (4 samples or more)",
    find=_find,
    applies=lambda prompt, reference: bool(prompt.task),
    needs="a task that grades it right or wrong",
)
