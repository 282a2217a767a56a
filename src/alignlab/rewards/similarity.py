"""Does the answer say what the reference says?

completion text, reference -> ROUGE-L F1 of their words, or cosine of their vectors -> a number up to 1.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from typing import Literal

from alignlab.errors import UserError
from alignlab.rewards import _texts
from alignlab.types import Completion, Prompt

Measure = Literal["rouge_l", "cosine", "mean"]

NEEDS = "a column `answer`, the reference"
FILES = ("model",)
ONLY_HOW = ("device",)
MOST_WORDS = 20_000
"""Of a text; what is beyond is not compared."""
_WORD = re.compile(r"[^\W_]+")


def similarity(
    prompts: Sequence[Prompt],
    completions: Sequence[Completion],
    *,
    measure: Measure = "rouge_l",
    model: str = "",
    device: str = "auto",
) -> list[float | None]:
    """How similar each completion is to `prompt.answer`; None where there is none.

    rouge_l: F1 of the longest common subsequence of words, in [0, 1] (Lin 2004; words are runs of letters and digits,
    lower-case, without stemming). cosine: of the mean token vectors of an encoder, in [-1, 1]. mean: of both.
    It rewards copying the reference, whatever the prompt asks.

    Args:
        model: the encoder of cosine and mean, as a folder or hub id, or `minilm`; it reads the beginning of a text, up
            to its window.

    Raises:
        UserError: the model is missing, or named where none is used.
    """
    if (measure == "rouge_l") != (not model):
        raise UserError(
            f"similarity: measure {measure} needs `model`, an encoder (such as {_texts.MINILM})"
            if not model
            else "similarity: measure rouge_l uses no `model`; drop it, or set measure to cosine or mean"
        )
    where = _texts.find(model) if model else ""
    here = [i for i, prompt in enumerate(prompts) if applies(prompt)]
    texts, references = [completions[i].text for i in here], [str(prompts[i].answer) for i in here]
    values: list[float | None] = [None] * len(prompts)
    found = [[rouge_l(t, r) for t, r in zip(texts, references, strict=True)]] if measure != "cosine" else []
    if where and here:
        vectors = _texts.embed(_texts.read(where, "encoder", device), [*texts, *references])
        cosines = (vectors[: len(here)] * vectors[len(here) :]).sum(-1).clamp(-1, 1)
        found.append([c if t.strip() else 0.0 for c, t in zip(cosines.tolist(), texts, strict=True)])
    for i, *each in zip(here, *found, strict=True):
        values[i] = sum(each) / len(each)
    return values


def applies(prompt: Prompt, **_: object) -> bool:
    """Whether completions of this prompt are judged: it has a reference."""
    return bool((prompt.answer or "").strip())


def rouge_l(text: str, reference: str) -> float:
    """F1 = 2 LCS / (words of the text + words of the reference); of a reference without words, in characters."""
    one, other = words(text), words(reference)
    if not other:  # signs alone: equal answers are not 0 by accident
        one, other = (list("".join(t.split())[:MOST_WORDS]) for t in (text, reference))
    return 2 * longest_common(one, other) / (len(one) + len(other)) if one and other else 0.0


def words(text: str) -> list[str]:
    """Runs of letters and digits, lower-case; at most `MOST_WORDS`."""
    return [match[0] for match, _ in zip(_WORD.finditer(text.lower()), range(MOST_WORDS), strict=False)]


def longest_common(one: Sequence[str], other: Sequence[str]) -> int:
    """Length of the longest common subsequence, a row of the table at a time as bits of one integer (Hyyro 2004)."""
    places: defaultdict[str, int] = defaultdict(int)
    for i, word in enumerate(one):
        places[word] |= 1 << i
    full = (1 << len(one)) - 1
    row = full
    for word in other:
        matches = row & places.get(word, 0)
        row = ((row + matches) | (row - matches)) & full
    return len(one) - row.bit_count()
