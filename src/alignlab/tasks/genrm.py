"""Judging as text: a question and an answer -> `Score: 8.5/10.`, the rows of a generative reward model.

Made of UltraFeedback's scored answers, two rows a pair. It is a task of its own and never the start of RL: a policy
trained on it has learned to write scores, not answers, so `starts_rl` is False and such a start is refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace

from alignlab.data.files import Record
from alignlab.data.formats import Unusable
from alignlab.data.prepare import score_bin
from alignlab.data.prepared import Entry
from alignlab.data.sets import Hub, Source, asked
from alignlab.tasks import Grade, Task
from alignlab.tasks.ultrafeedback import COLUMNS, HUB, LICENCE, SIZES, read_scored
from alignlab.types import Completion, Prompt

PATTERN = re.compile(r"Score:\s*([0-9]+(?:\.[0-9]+)?)/10")
"""How a verdict is written; the first one in a text counts."""
SYSTEM = "You judge answers. Say how good an answer is as `Score: x/10.`, from 0 (useless) to 10 (could not be better)."
QUESTION = "Question:\n{question}\n\nAnswer:\n{answer}\n\nHow good is the answer?"


def parse_verdict(text: str) -> float | None:
    """The score that a text states, in [0, 10]; None where it states none or an impossible one."""
    match = PATTERN.search(text)
    if match is None or len(match[1]) > 8:
        return None
    score = float(match[1])
    return score if score <= 10.0 else None


def verdict(score: float) -> str:
    """A score as the completion to learn: 8.5 -> `Score: 8.5/10.`"""
    return f"Score: {score:.1f}/10."


def grade(prompt: Prompt, completion: Completion) -> Grade:
    """`score` = 1 - |stated - true| / 10, and 0 where no score can be read; `error` only where one can."""
    said, true = parse_verdict(completion.text), parse_verdict(prompt.answer or "")
    if true is None:
        raise ValueError(f"the answer {prompt.answer!r} is no verdict such as 'Score: 8.5/10.'")
    if said is None:
        return {"score": 0.0, "parsed": 0.0}
    return {"score": 1.0 - abs(said - true) / 10.0, "parsed": 1.0, "error": abs(said - true)}


def read(row: Record) -> Iterator[Entry]:
    """Both answers of a pair, each with its score; both stay on the side of their question."""
    question, chosen, rejected, better, worse = read_scored(row)
    if better is None or worse is None:
        raise Unusable("no scores")
    for answer, score in ((chosen, better), (rejected, worse)):
        if not 0 <= score <= 10:
            raise Unusable("a score beyond 0 to 10")
        text = verdict(score)
        prompt = asked(
            QUESTION.format(question=question, answer=answer), answer=text, category=score_bin(score), stated=score
        )
        yield Entry(prompt=prompt, completion=text, score_chosen=score, group=question, said=question)


TASK = Task(
    name="genrm",
    description="Write how good an answer is, as `Score: x/10.`; for a judge, never the start of RL.",
    grade=grade,
    default_reward={},
    metrics={
        "score": "1 minus a tenth of the distance between the stated and the true score; 0 where none can be read",
        "parsed": "1 if a score can be read",
        "error": "distance between the stated and the true score, in points of 10, where one can be read",
    },
    sources=(
        Source(
            name="UltraFeedback binarized, as verdicts",
            licence=LICENCE,
            columns=(COLUMNS,),
            read=read,
            hub={"train": Hub(HUB, None, "train_prefs"), "test": Hub(HUB, None, "test_prefs")},
        ),
    ),
    sizes=replace(SIZES, balanced=()),
    system_prompt=SYSTEM,
    measures=("exact_match", "perplexity"),
    starts_rl=False,
)
