"""Dialogues of Human: and Assistant: turns, the last answer once better and once worse (HH-RLHF, arXiv 2204.05862).

transcript pairs -> conversation, preferred answer, other answer.
"""

from __future__ import annotations

from collections.abc import Iterator

from alignlab.conversation import turn_error
from alignlab.data.files import Record
from alignlab.data.formats import Unusable, transcript
from alignlab.data.prepared import Entry
from alignlab.data.sets import Hub, Source
from alignlab.tasks import Task
from alignlab.tasks._text import OVERLAP, grade_by_overlap
from alignlab.types import Message, Prompt

LICENCE = "MIT; Bai et al. 2022. Offensive text, collected to find it"


def split_transcript(text: str) -> tuple[tuple[Message, ...], str]:
    """The turns before the last answer, and that answer.

    Raises:
        Unusable: there is none, or turns do not alternate.
    """
    messages = transcript(text)
    if not messages or messages[-1].role != "assistant" or not messages[-1].content.strip():
        raise Unusable("the dialogue does not end with an answer")
    before = tuple(messages[:-1])
    if not before or not all(message.content.strip() for message in before):
        raise Unusable("empty turn")
    if turn_error(before):
        raise Unusable("turns do not alternate")
    return before, messages[-1].content


def read(row: Record) -> Iterator[Entry]:
    """A pair of transcripts that part at the last answer."""
    before, chosen = split_transcript(_text(row, "chosen"))
    other, rejected = split_transcript(_text(row, "rejected"))
    if before != other:
        raise Unusable("chosen and rejected have different prompts")
    if chosen.strip() == rejected.strip():
        raise Unusable("chosen equals rejected")
    meta = {"category": f"{len(before) // 2 + 1} turns" if len(before) > 1 else "1 turn"}
    yield Entry(prompt=Prompt(messages=before, id="", answer=chosen, meta=meta), completion=chosen, rejected=rejected)


def _text(row: Record, column: str) -> str:
    if not isinstance(row[column], str):
        raise ValueError(f"column {column!r} holds no text")
    return str(row[column])


def harmless(name: str = "hh-rlhf harmless-base") -> Source:
    """The half of it that red-teaming wrote; also what the task `safety` trains on."""
    hub = "Anthropic/hh-rlhf/harmless-base"
    return Source(
        name=name,
        licence=LICENCE,
        columns=(("chosen", "rejected"),),
        without=("prompt", "question", "messages", "conversations"),
        read=read,
        hub={"train": Hub(hub, None, "train"), "test": Hub(hub, None, "test")},
    )


TASK = Task(
    name="hh",
    description="Go on with a dialogue of Human: and Assistant: turns.",
    grade=grade_by_overlap,
    default_reward={"learned": 1.0},
    metrics={"score": OVERLAP},
    sources=(harmless(),),
    measures=("rouge", "preference", "verbosity", "distinct", "perplexity"),
)
