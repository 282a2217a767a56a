"""Would one of k attempts be right? n samples a prompt, c of them right -> pass@k (arXiv 2107.03374).

    pass@k = 1 - C(n - c, k) / C(n, k)

the unbiased estimate from n >= k samples. What is right is what the prompt's task gives the full score of 1. Nothing is
run here: a task that grades by unit tests runs them where that is allowed (ALIGNLAB_RUN_CODE=1); else it has no score.
"""

from __future__ import annotations

import math

from alignlab.evaluation.measures import Answers, Found, Measure, Settings, Values
from alignlab.rewards import code
from alignlab.types import Prompt

ATTEMPTS = (1, 5, 10, 100)
"""k that are reported, as far as there are so many samples; the number of samples itself too."""


def pass_at_k(samples: int, right: int, k: int) -> float:
    """1 - C(n - c, k) / C(n, k) as a product that neither overflows nor cancels.

    Raises:
        ValueError: not 1 <= k <= samples, or not 0 <= right <= samples.
    """
    if not (1 <= k <= samples and 0 <= right <= samples):
        raise ValueError(f"pass@{k} of {samples} samples with {right} right: needs 1 <= k <= samples, right <= samples")
    if samples - right < k:
        return 1.0
    return 1.0 - math.prod(1.0 - k / i for i in range(samples - right + 1, samples + 1))


def _find(answers: Answers, settings: Settings) -> Found:
    right: dict[str, list[bool]] = {}
    applies = ["score" in grade for grade in answers.grades]
    for prompt, grade in zip(answers.prompts, answers.grades, strict=True):
        if "score" in grade:
            right.setdefault(prompt.id, []).append(grade["score"] >= 1.0)
    if not right:
        return Found()
    fewest = min(map(len, right.values()))
    values: dict[str, Values] = {}
    for k in sorted({k for k in (*ATTEMPTS, fewest) if k <= fewest}):  # an estimate stands at each sample of its prompt
        of_prompt = {prompt_id: pass_at_k(len(said), sum(said), k) for prompt_id, said in right.items()}
        values[f"pass/at_{k}"] = [
            of_prompt[p.id] if here else None for p, here in zip(answers.prompts, applies, strict=True)
        ]
    return Found(values=values)


def _applies(prompt: Prompt, reference: str | None) -> bool:
    allowed = getattr(code, "running_allowed", lambda: False)
    return bool(prompt.task) and (prompt.meta.get("grading") != "tests" or bool(allowed()))


MEASURE = Measure(
    says="chance that at least one of k samples is right",
    find=_find,
    applies=_applies,
    needs="a task that grades it (by unit tests: with ALIGNLAB_RUN_CODE=1 in the environment)",
)
