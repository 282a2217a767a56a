"""Is the final number right?

completion text -> the number it ends on -> 1.0 if equal to the prompt's answer, else 0.0.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from fractions import Fraction
from typing import Literal

from alignlab.rewards._answers import LONGEST_NUMBER, marked_number
from alignlab.types import Completion, Prompt

Mode = Literal["strict", "flexible"]
RewardMode = Literal["strict", "flexible", "marked"]

NEEDS = "a column `answer` that is a number"

_NUMBER = r"(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+"
_WHOLE = re.compile(rf"([+-]?)\s*\$?\s*((?:{_NUMBER})(?:\s*/\s*[0-9]+)?)\s*%?\.?")
_ANYWHERE = re.compile(rf"(?<![\w.)])[+-]?\$?(?:{_NUMBER})(?:/[0-9]+)?|{_NUMBER}")
_ANSWER = re.compile(r"<answer>((?:(?!</?answer>).)*)</answer>", re.DOTALL)
_HASHES = re.compile(r"####[ \t]*([^\n]*)")


def exact(
    prompts: Sequence[Prompt], completions: Sequence[Completion], *, mode: RewardMode = "strict"
) -> list[float | None]:
    """1.0 where the completion's final number equals `prompt.answer`, 0.0 where it does not or is missing.

    strict and flexible read as `final_number`; marked reads as GSM8K's strict grading does (`tasks.gsm8k.grade`): tags,
    `####`, `\\boxed{}` or "the answer is", units allowed.

    None where the prompt has no numeric answer or `meta["grading"]` names another kind than "number".
    Numbers are compared exactly, as fractions: "1,000", "$1000.", "1000.0" and "2000/2" are equal.
    """
    return [_judge(prompt, completion, mode) for prompt, completion in zip(prompts, completions, strict=True)]


def _judge(prompt: Prompt, completion: Completion, mode: RewardMode) -> float | None:
    if prompt.answer is None or prompt.meta.get("grading", "number") != "number":
        return None
    gold = gold_number(prompt.answer)
    if gold is None:
        return None
    found = marked_number(completion.text) if mode == "marked" else final_number(completion.text, mode)
    return float(found == gold)


def final_number(text: str, mode: Mode = "strict") -> Fraction | None:
    """The number a text ends on; None if there is none.

    strict: all that the last well-formed `<answer>..</answer>` holds or, without one, what follows the last `####`.
    flexible: the last number anywhere.
    """
    if mode == "flexible":
        found = _ANYWHERE.findall(text)
        return parse_number(found[-1]) if found else None
    marked = _ANSWER.findall(text) or _HASHES.findall(text)
    return parse_number(marked[-1]) if marked else None


def gold_number(answer: str) -> Fraction | None:
    """The number of a reference answer: the answer itself, or what follows `####` in a worked one (GSM8K)."""
    marked = _HASHES.findall(answer)
    return parse_number(marked[-1] if marked else answer)


def parse_number(text: str) -> Fraction | None:
    """The exact value of a text that is a number and nothing else; None otherwise.

    Understands signs, thousands commas, a dollar or percent sign, decimals, fractions and a closing full stop; not
    exponents, whose value could fill the memory.
    """
    text = text.strip().replace("\N{MINUS SIGN}", "-")
    match = _WHOLE.fullmatch(text.replace("$-", "-$")) if len(text) <= LONGEST_NUMBER else None
    if match is None:
        return None
    numerator, _, denominator = match[2].replace(",", "").partition("/")
    below = Fraction(denominator.strip() or 1)
    return None if below == 0 else Fraction(match[1] + numerator.strip()) / below
