"""Is the final number right? completion, answer -> right (strict, flexible), within 10 %, written as asked for."""

from __future__ import annotations

from alignlab.evaluation.measures import Answers, Found, Measure, Settings
from alignlab.rewards.exact import gold_number
from alignlab.tasks.gsm8k import formatted, grade, within
from alignlab.types import Prompt


def _applies(prompt: Prompt, reference: str | None) -> bool:
    return prompt.answer is not None and gold_number(prompt.answer) is not None


def _find(answers: Answers, settings: Settings) -> Found:
    said = [
        (completion.text, prompt.answer if _applies(prompt, None) else None)
        for prompt, completion in zip(answers.prompts, answers.completions, strict=True)
    ]
    return Found(
        values={
            "gsm8k/strict": [None if gold is None else float(grade(text, gold)) for text, gold in said],
            "gsm8k/flexible": [None if gold is None else float(grade(text, gold, "flexible")) for text, gold in said],
            "gsm8k/within_10_percent": [None if gold is None else float(within(text, gold)) for text, gold in said],
            "gsm8k/format": [None if gold is None else float(formatted(text)) for text, gold in said],
        }
    )


MEASURE = Measure(
    says="accuracy of the final number: strict, flexible, within 10 %, and whether it stands where asked for",
    find=_find,
    applies=_applies,
    needs="an `answer` that is a number",
)
