"""Questions under a system message, with a better and a worse answer (Intel/orca_dpo_pairs).

{system, question, chosen, rejected} -> conversation, preferred answer, other answer.
"""

from __future__ import annotations

from collections.abc import Iterator

from alignlab.data.files import Record
from alignlab.data.formats import Unusable
from alignlab.data.prepared import Entry
from alignlab.data.sets import Hub, Source, asked, text_of
from alignlab.tasks import Task
from alignlab.tasks._text import OVERLAP, category_of, grade_by_overlap


def read(row: Record) -> Iterator[Entry]:
    question, chosen, rejected = text_of(row, "question"), text_of(row, "chosen"), text_of(row, "rejected")
    if chosen.strip() == rejected.strip():
        raise Unusable("chosen equals rejected")
    prompt = asked(question, system=str(row["system"] or ""), answer=chosen, category=category_of(question))
    yield Entry(prompt=prompt, completion=chosen, rejected=rejected)


TASK = Task(
    name="orca",
    description="Answer a question as its system message asks.",
    grade=grade_by_overlap,
    default_reward={"learned": 1.0},
    metrics={"score": OVERLAP},
    sources=(
        Source(
            name="orca_dpo_pairs",
            licence="Apache-2.0 (Intel/orca_dpo_pairs), from OpenOrca, MIT; answers by GPT-4, ChatGPT and Llama 2",
            columns=(("system", "question", "chosen", "rejected"),),
            read=read,
            hub={"train": Hub("Intel/orca_dpo_pairs", None, "train")},
        ),
    ),
    measures=("rouge", "preference", "verbosity", "distinct", "perplexity"),
)
