"""Prompts of many kinds with two scored answers (UltraFeedback, arXiv 2310.01377, binarized).

{prompt, chosen, rejected, score_chosen, score_rejected} -> prompt, preferred answer, other answer, scores.
"""

from __future__ import annotations

from collections.abc import Iterator

from alignlab.data.files import Record
from alignlab.data.formats import Unusable
from alignlab.data.prepare import Sizes
from alignlab.data.prepared import Entry
from alignlab.data.sets import Hub, Source, asked, number_of, text_of
from alignlab.tasks import Task
from alignlab.tasks._text import CATEGORIES, OVERLAP, category_of, grade_by_overlap

LICENCE = "MIT; Cui et al. 2023. Prompts from several public sets, answers by many models, scores by GPT-4"
COLUMNS = ("prompt", "chosen", "rejected", "score_chosen", "score_rejected")
HUB = "HuggingFaceH4/ultrafeedback_binarized"
SIZES = Sizes(train=10_000, test=300, balanced=CATEGORIES)


def read_scored(row: Record) -> tuple[str, str, str, float | None, float | None]:
    """Prompt, chosen, rejected and their scores; of conversations the last message."""
    prompt, chosen, rejected = (text_of(row, column) for column in COLUMNS[:3])
    if chosen.strip() == rejected.strip():
        raise Unusable("chosen equals rejected")
    better, worse = number_of(row, "score_chosen"), number_of(row, "score_rejected")
    if better is not None and worse is not None and better < worse:
        raise Unusable("chosen is scored below rejected")
    return prompt, chosen, rejected, better, worse


def read(row: Record) -> Iterator[Entry]:
    question, chosen, rejected, better, worse = read_scored(row)
    prompt = asked(question, answer=chosen, category=category_of(question))
    yield Entry(prompt=prompt, completion=chosen, rejected=rejected, score_chosen=better, score_rejected=worse)


TASK = Task(
    name="ultrafeedback",
    description="Answer prompts of many kinds.",
    grade=grade_by_overlap,
    default_reward={"learned": 1.0},
    metrics={"score": OVERLAP},
    sources=(
        Source(
            name="UltraFeedback binarized",
            licence=LICENCE,
            columns=(COLUMNS,),
            read=read,
            hub={"train": Hub(HUB, None, "train_prefs"), "test": Hub(HUB, None, "test_prefs")},
        ),
    ),
    sizes=SIZES,
    measures=("rouge", "preference", "verbosity", "distinct", "perplexity"),
)
