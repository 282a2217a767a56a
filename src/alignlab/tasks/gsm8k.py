"""Grade-school word problems (GSM8K, arXiv 2110.14168), whose reference answers end in `#### N`.

completion -> the number it answers with -> right, wrong, or near.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from decimal import Decimal
from fractions import Fraction
from numbers import Real
from typing import get_args

from alignlab.data.files import Record
from alignlab.data.formats import Unusable
from alignlab.data.prepared import Entry
from alignlab.data.sets import Hub, Source, asked, text_of
from alignlab.rewards._answers import answered_number, marked_number, read
from alignlab.rewards.exact import Mode, gold_number
from alignlab.rewards.format import well_formed
from alignlab.tasks import Grade, Task
from alignlab.types import Completion, Prompt

SYSTEM = "Think between <reasoning> and </reasoning>, then give the number between <answer> and </answer>."
_CALCULATOR = re.compile(r"<<[^<>]*>>")
"""Marks of the annotators' calculator, as in `48/2 = <<48/2=24>>24`."""


def grade(completion: str, answer: str | float, mode: Mode = "strict") -> bool:
    """Whether the completion's number equals the reference answer (a number, or the worked text with `#### N`).

    strict: a marked answer counts: the last `<answer>` block, else the first `####` that a number follows, else the
    last `\\boxed{}`, else the last "the answer is N" or "Answer: N". flexible: without a readable mark, the number that
    the text ends on. Numbers are compared exactly, as fractions; units, currency and percent signs say nothing. What
    follows a next "Question:" or the end of the turn is not read. False where `answer` holds no number.

    Raises:
        TypeError: the completion is no text, or the answer neither a text nor a number.
        ValueError: another mode.
    """
    gold, number = _gold(answer), _number(completion, mode)
    return gold is not None and number == gold


def within(completion: str, answer: str | float, tolerance: float = 0.1, mode: Mode = "flexible") -> bool:
    """Whether the completion's number is at most `tolerance` x |reference| from the reference; 0 has to be met."""
    gold, number = _gold(answer), _number(completion, mode)
    return gold is not None and number is not None and abs(number - gold) <= abs(gold) * Fraction(str(tolerance))


def formatted(completion: str) -> bool:
    """Whether it is one `<reasoning>` block, then one `<answer>` block, neither blank, with nothing around them."""
    return well_formed(completion)


def _gold(answer: str | float) -> Fraction | None:
    if isinstance(answer, bool) or not isinstance(answer, str | Real | Decimal):
        raise TypeError(f"gsm8k: answer is {type(answer).__name__}, needed is a text or a number")
    if not isinstance(answer, str):
        return Fraction(str(answer)) if math.isfinite(answer) else None
    number = gold_number(answer)
    return number if number is not None else marked_number(answer) or read(answer)


def _number(completion: str, mode: Mode) -> Fraction | None:
    if not isinstance(completion, str):
        raise TypeError(f"gsm8k: completion is {type(completion).__name__}, needed is a text")
    if mode not in get_args(Mode):
        raise ValueError(f"gsm8k: no mode {mode!r}; there are: {', '.join(get_args(Mode))}")
    return marked_number(completion) if mode == "strict" else answered_number(completion)


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
        "score": "1 if the marked number is right: in answer tags, after ####, in a box or after 'the answer is'",
        "flexible": "1 if the marked number is right or, without one, the number that the text ends on",
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
