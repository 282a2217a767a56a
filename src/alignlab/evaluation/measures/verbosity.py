"""How long answers are: completions -> words, and the share within a limit of words.

Words are what white space separates. The limit is in words and not in tokens, as that is what a person can ask for and
what compares between tokenizers; mean, median and deviation in tokens are `completion/length` of every evaluation.
"""

from __future__ import annotations

from alignlab.errors import UserError
from alignlab.evaluation.measures import Answers, Found, Measure, Settings


def num_words(text: str) -> int:
    return len(text.split())


def _find(answers: Answers, settings: Settings) -> Found:
    words = [num_words(text) for text in answers.texts]
    return Found(
        values={
            "verbosity/words": [float(n) for n in words],
            "verbosity/within_limit": [float(n <= settings.word_limit) for n in words],
        }
    )


def _check(settings: Settings) -> None:
    if settings.word_limit < 1:
        raise UserError(f"measure verbosity: a limit of {settings.word_limit} words allows no answer; give 1 or more")


MEASURE = Measure(says="length in words, and the share of answers within the word limit", find=_find, check=_check)
