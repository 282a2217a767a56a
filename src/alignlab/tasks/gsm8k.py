"""Grade-school word problems (GSM8K, arXiv 2110.14168), whose reference answers end in `#### N`.

completion -> final number -> right or wrong.
"""

from __future__ import annotations

from alignlab.rewards.exact import Mode, final_number, gold_number
from alignlab.tasks import Grade, Task
from alignlab.types import Completion, Prompt


def grade(completion: str, answer: str, mode: Mode = "strict") -> bool:
    """Whether the completion's final number equals the reference answer (a number, or the worked text with `#### N`).

    strict: the number stands in `<answer>` tags or after `####`. flexible: the last number of the text counts.
    """
    gold = gold_number(answer)
    return gold is not None and final_number(completion, mode) == gold


def _grade(prompt: Prompt, completion: Completion) -> Grade:
    answer = prompt.answer or ""
    return {
        "score": float(grade(completion.text, answer)),
        "flexible": float(grade(completion.text, answer, "flexible")),
    }


TASK = Task(
    name="gsm8k",
    description="Grade-school word problems with a number as the answer.",
    grade=_grade,
    default_reward={"exact": 1.0},
    metrics={
        "score": "1 if the number in the answer tags or after #### is right",
        "flexible": "1 if the last number anywhere is right",
    },
)
