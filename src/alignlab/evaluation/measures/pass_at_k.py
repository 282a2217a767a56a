"""Would one of k attempts be right? n samples a prompt, c of them right -> pass@k (arXiv 2107.03374).

    pass@k = 1 - C(n - c, k) / C(n, k)

the unbiased estimate from n >= k samples. What is right: prompts graded by `tests` run the model's code, and only if
that is allowed; all others go by their task's score of 1 and run nothing (`expression` compares syntax trees).
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from alignlab.errors import UserError
from alignlab.evaluation.measures import Answers, Found, Measure, Settings, Values
from alignlab.types import Completion, Prompt

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


def _is_right(prompt: Prompt, completion: Completion, grade: Mapping[str, float], settings: Settings) -> bool:
    if prompt.meta.get("grading") == "tests":
        return _passes(prompt, completion, settings)
    return grade["score"] >= 1.0


def _passes(prompt: Prompt, completion: Completion, settings: Settings) -> bool:
    require_running(settings)
    from alignlab.rewards import code

    return bool(code.run_tests(prompt, completion))  # type: ignore[attr-defined]


def require_running(settings: Settings) -> None:
    """Code that a model wrote is run only where that was asked for.

    Raises:
        UserError: it was not.
    """
    if not settings.run_code:
        raise UserError(
            "measure pass_at_k: these prompts are graded by unit tests, which run code that the model wrote; allow it "
            "with --run-code (a child process with limits: less risk, no sandbox)"
        )


def _find(answers: Answers, settings: Settings) -> Found:
    right: dict[str, list[bool]] = {}
    applies = [_applies(p, None) and bool(g) for p, g in zip(answers.prompts, answers.grades, strict=True)]
    for prompt, completion, grade, here in zip(
        answers.prompts, answers.completions, answers.grades, applies, strict=True
    ):
        if here:
            right.setdefault(prompt.id, []).append(_is_right(prompt, completion, grade, settings))
    if not right:
        return Found()
    fewest = min(map(len, right.values()))
    reported = sorted({k for k in (*ATTEMPTS, fewest) if k <= fewest})
    values: dict[str, Values] = {}
    for k in reported:  # a prompt's estimate stands at each of its samples
        of_prompt = {prompt_id: pass_at_k(len(said), sum(said), k) for prompt_id, said in right.items()}
        values[f"pass/at_{k}"] = [
            of_prompt[p.id] if here else None for p, here in zip(answers.prompts, applies, strict=True)
        ]
    return Found(values=values)


def _applies(prompt: Prompt, reference: str | None) -> bool:
    return bool(prompt.task)


MEASURE = Measure(
    says="chance that at least one of k samples is right",
    find=_find,
    applies=_applies,
    needs="a task that grades it",
)
