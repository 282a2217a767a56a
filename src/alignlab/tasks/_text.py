"""What graders and readers of several tasks share: overlap with a reference, kinds of questions."""

from __future__ import annotations

import re

from alignlab.rewards.similarity import rouge_l
from alignlab.tasks import Grade
from alignlab.types import Completion, Prompt

OVERLAP = "ROUGE-L F1 with the preferred answer: a weak stand-in for quality, see docs/tasks.md"
CATEGORIES = ("factual", "instruction", "creative")

_MADE = (
    r"(?:stor(?:y|ies)|poems?|haikus?|sonnets?|limericks?|ballads?|rhymes?|songs?|lyrics|raps?|jokes?|riddles?|"
    r"screenplays?|scenes?|monologues?|dialogues?|plays?|novels?|novellas?|fables?|fairy ?tales?|myths?|legends?|"
    r"fan ?fiction|fiction|plots?|characters?|slogans?|taglines?|puns?|parod(?:y|ies)|satires?|speech(?:es)?|essays?|"
    r"blog posts?|headlines?|names? for)"
)
_CREATIVE = re.compile(
    rf"\b(?:write|compose|create|craft|invent|imagine|tell|make(?: up)?|come up with|generate|draft|continue|pen)\b"
    rf"[^.?!\n]{{0,80}}?\b{_MADE}\b|\bpretend\b|\brole-?play|\bimagine (?:you|that|a)\b",
    re.IGNORECASE,
)
_QUESTION = re.compile(
    r"(?:who|whom|whose|what|when|where|which|why|how|is|are|was|were|do|does|did|can|could|has|have|had|will|would|"
    r"should|explain|define|describe|tell me about|what's|who's|where's|name)\b",
    re.IGNORECASE,
)
_LONGEST_QUESTION = 300
"""Characters; a longer prompt that begins like a question brings material to work on."""


def grade_by_overlap(prompt: Prompt, completion: Completion) -> Grade:
    """`score`: overlap with the reference answer; nothing where there is none."""
    return {} if prompt.answer is None else {"score": rouge_l(completion.text, prompt.answer)}


def category_of(text: str) -> str:
    """`creative`, `factual` or `instruction`: what a prompt asks for, by its words alone, the same for ever.

    creative: it asks to write, invent or tell a story, poem, song, speech, slogan and the like, or to play a role.
    factual: not creative, at most 300 characters, and it begins with a question word or a verb of a question (or
    explain, define, describe, name) or is one sentence that ends with a question mark. instruction: all the rest.
    """
    said = text.strip().lstrip("\"'[(*#-> ")
    if _CREATIVE.search(said[:_LONGEST_QUESTION]):
        return "creative"
    if len(said) <= _LONGEST_QUESTION and (_QUESTION.match(said) or ("\n" not in said and said.endswith("?"))):
        return "factual"
    return "instruction"
