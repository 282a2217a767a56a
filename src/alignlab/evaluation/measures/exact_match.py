"""Is the completion the reference, letter by letter? completion, reference -> 1.0 or 0.0.

Both are normalised the same way: Unicode NFKC, lower case (`casefold`), runs of white space as one space, none at the
ends, and one closing full stop taken off. Nothing else: punctuation inside and articles count.
"""

from __future__ import annotations

import unicodedata

from alignlab.evaluation.measures import Answers, Found, Measure, Settings
from alignlab.evaluation.measures._references import on_references


def normalised(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split()).removesuffix(".").rstrip()


def exact_match(text: str, reference: str) -> bool:
    return normalised(text) == normalised(reference)


def _find(answers: Answers, settings: Settings) -> Found:
    return Found(
        values=on_references(
            answers,
            lambda ts, rs: {"exact_match/rate": [float(exact_match(t, r)) for t, r in zip(ts, rs, strict=True)]},
        )
    )


MEASURE = Measure(
    says="share of completions that are the reference, after normalisation",
    find=_find,
    applies=lambda prompt, reference: bool(reference),
    needs="a reference text (column `answer`, or the demonstration's `completion`)",
)
