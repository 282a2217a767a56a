"""Grade-school word problems (GSM8K, arXiv 2110.14168), whose reference answers end in `#### N`.

completion -> final number -> right or wrong.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from alignlab.data.files import Record
from alignlab.data.formats import Unusable
from alignlab.data.prepared import Entry
from alignlab.data.sets import Hub, Source, asked, text_of
from alignlab.rewards.exact import Mode, final_number, gold_number
from alignlab.tasks import Grade, Task
from alignlab.types import Completion, Prompt

SYSTEM = "Think between <reasoning> and </reasoning>, then give the number between <answer> and </answer>."
_CALCULATOR = re.compile(r"<<[^<>]*>>")
"""Marks of the annotators' calculator, as in `48/2 = <<48/2=24>>24`."""


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


def read_row(row: Record) -> Iterator[Entry]:
    """A question, and its worked answer in the tags that the system message asks for."""
    worked, hashes, number = text_of(row, "answer").rpartition("####")
    if not hashes or gold_number(number) is None:
        raise Unusable("no number after ####")
    number = number.strip().replace(",", "")
    steps = _CALCULATOR.sub("", worked).strip()
    if not steps:
        raise Unusable("no working")
    prompt = asked(text_of(row, "question").strip(), answer=number, grading="number", format="reasoning_answer")
    yield Entry(prompt=prompt, completion=f"<reasoning>{steps}</reasoning><answer>{number}</answer>")


TASK = Task(
    name="gsm8k",
    description="Grade-school word problems with a number as the answer.",
    grade=_grade,
    default_reward={"exact": 1.0},
    metrics={
        "score": "1 if the number in the answer tags or after #### is right",
        "flexible": "1 if the last number anywhere is right",
    },
    sources=(
        Source(
            name="GSM8K",
            licence="MIT; Cobbe et al. 2021",
            columns=(("question", "answer"),),
            read=read_row,
            hub={"train": Hub("openai/gsm8k", "main", "train"), "test": Hub("openai/gsm8k", "main", "test")},
        ),
    ),
    system_prompt=SYSTEM,
    measures=("gsm8k", "verbosity", "perplexity"),
)
