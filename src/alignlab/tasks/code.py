"""A sentence, and the Python expression it describes.

"the first 3 items of names" -> `names[:3]` -> the same syntax tree or not. Nothing is ever run.
"""

from __future__ import annotations

import re
from random import Random

from alignlab.rewards.code import parse_expression, same_expression
from alignlab.tasks import Generator, Grade, Task
from alignlab.types import Completion, Example, Message, Prompt

LISTS = ("names", "words", "items", "lines", "rows", "users")
NUMBERS = ("prices", "scores", "ages", "sizes", "marks", "totals")
SCALARS = ("x", "y", "a", "b", "width", "height", "price", "total")
TEXTS = ("text", "name", "title", "line", "word")

SENTENCES: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("{list}[:{n}]", ("the first {n} items of {list}", "{list} up to item {n}")),
    ("{list}[-{n}:]", ("the last {n} items of {list}", "the {n} items that end {list}")),
    ("{list}[{n}:]", ("{list} without the first {n} items", "all of {list} after the first {n}")),
    ("{list}[:-{n}]", ("{list} without the last {n} items", "all of {list} before the last {n}")),
    ("{list}[{n}]", ("item {n} of {list}", "the item of {list} at index {n}")),
    ("{list}[::{n}]", ("every {n}th item of {list}", "{list} in steps of {n}")),
    ("{list}[{n}:{m}]", ("{list} from index {n} up to {m}", "the items of {list} from {n} until {m}")),
    ("{list}[::-1]", ("{list} in reverse", "{list} backwards")),
    ("len({list})", ("how many {list} there are", "the number of {list}")),
    ("sorted({list})", ("{list} in order", "{list} sorted")),
    ("sorted({numbers}, reverse=True)", ("{numbers} from large to small", "{numbers} sorted downwards")),
    ("sum({numbers})", ("the sum of {numbers}", "all {numbers} added up")),
    ("max({numbers})", ("the largest of {numbers}", "the top of {numbers}")),
    ("min({numbers})", ("the smallest of {numbers}", "the lowest of {numbers}")),
    ("sum({numbers}) / len({numbers})", ("the mean of {numbers}", "the average of {numbers}")),
    ("[x for x in {numbers} if x > {n}]", ("the {numbers} over {n}", "the {numbers} greater than {n}")),
    ("[x for x in {numbers} if x < {n}]", ("the {numbers} under {n}", "the {numbers} less than {n}")),
    ("[x * {n} for x in {numbers}]", ("all {numbers} times {n}", "each of {numbers} multiplied by {n}")),
    ("[x + {n} for x in {numbers}]", ("all {numbers} plus {n}", "each of {numbers} increased by {n}")),
    ("{numbers}.count({n})", ("how often {n} is in {numbers}", "the count of {n} in {numbers}")),
    ("{n} in {numbers}", ("whether {n} is in {numbers}", "is {n} one of {numbers}")),
    ("{s} + {n} * {t}", ("{s} plus {n} times {t}", "{n} times {t} added to {s}")),
    ("({s} + {n}) * {t}", ("the sum of {s} and {n}, times {t}", "{t} times the sum of {s} and {n}")),
    ("{s} - {t}", ("{s} minus {t}", "{s} less {t}")),
    ("{s} % {n}", ("the remainder of {s} by {n}", "{s} modulo {n}")),
    ("{s} ** {n}", ("{s} to the power of {n}", "{s} raised to {n}")),
    ("{s} > {n}", ("whether {s} is over {n}", "is {s} greater than {n}")),
    ("{text}.upper()", ("{text} in capitals", "{text} in upper case")),
    ("{text}.lower()", ("{text} in small letters", "{text} in lower case")),
    ("{text}.strip()", ("{text} without outer spaces", "{text} stripped")),
    ("{text}.split()", ("the parts of {text}", "{text} split at spaces")),
    ("{text}[:{n}]", ("the first {n} letters of {text}", "{text} cut to {n} letters")),
    ("{text} * {n}", ("{text} repeated {n} times", "{n} copies of {text}")),
)
_SWAPS = (
    ("max(", "min("),
    (".upper", ".lower"),
    (".strip", ".split"),
    (" > ", " < "),
    (" + ", " - "),
    (" * ", " + "),
    (" % ", " / "),
    (" ** ", " * "),
    ("[:-", "[-"),
    ("[:", "[-"),
    ("[::", "["),
    ("sorted(", "reversed("),
    ("sum(", "len("),
    ("len(", "sum("),
    (" in ", " not in "),
    (".count(", ".index("),
)


def grade(prompt: Prompt, completion: Completion) -> Grade:
    """`score` 1.0 for the wanted expression, compared as syntax trees."""
    return {
        "score": float(same_expression(completion.text, prompt.answer or "")),
        "parses": float(parse_expression(completion.text) is not None),
    }


def ask(rng: Random) -> Prompt:
    """A sentence; the key is its expression, so all its wordings are in one split."""
    expression, wordings = rng.choice(SENTENCES)
    n = 2 + rng.randrange(18)
    s = rng.choice(SCALARS)
    slots = {
        "list": rng.choice(LISTS),
        "numbers": rng.choice(NUMBERS),
        "text": rng.choice(TEXTS),
        "s": s,
        "t": rng.choice(tuple(name for name in SCALARS if name != s)),
        "n": n,
        "m": n + 1 + rng.randrange(19),
    }
    answer = expression.format(**slots)
    return Prompt(
        messages=(Message("user", f"Python: {rng.choice(wordings).format(**slots)}"),),
        id="",
        task="code",
        answer=answer,
        meta={"grading": "expression", "key": answer},
    )


def demonstrate(rng: Random, prompt: Prompt) -> str:
    return prompt.answer or ""


def contrast(rng: Random, prompt: Prompt) -> tuple[str, str, str]:
    """The right expression against a wrong one, or bare against wrapped in chatter."""
    answer = prompt.answer or ""
    if rng.random() < 0.65:
        return "correct", answer, _slip(rng, answer)
    return "plain", answer, _wrap(rng, answer)


def babble(rng: Random, prompt: Prompt) -> Example:
    """Bare or wrapped in chatter, one in six wrong."""
    answer = prompt.answer or ""
    if rng.random() < 0.17:
        answer = _slip(rng, answer)
    return Example(prompt=prompt, completion=answer if rng.random() < 0.5 else _wrap(rng, answer))


def _wrap(rng: Random, expression: str) -> str:
    return rng.choice(("You can use {e}.", "Try {e}", "The code is {e}", "`{e}`", "print({e})")).format(e=expression)


def _slip(rng: Random, expression: str) -> str:
    """A likely mistake: another number, another variable, or another operation."""
    mistakes = [expression.replace(old, new, 1) for old, new in _SWAPS if old in expression]
    for number in re.findall(r"\d+", expression):
        mistakes += [expression.replace(number, str(int(number) + step), 1) for step in (1, -1)]
    for names in (LISTS, NUMBERS, SCALARS, TEXTS):
        for name in names:
            if re.search(rf"\b{name}\b", expression) and f"for {name} " not in expression:
                mistakes.append(
                    re.sub(rf"\b{name}\b", rng.choice([other for other in names if other != name]), expression)
                )
    return rng.choice([mistake for mistake in mistakes if not same_expression(mistake, expression)])


TASK = Task(
    name="code",
    description="Write the Python expression that a sentence describes.",
    grade=grade,
    default_reward={"code": 1.0},
    metrics={
        "score": "1 if it is the wanted expression, compared as syntax trees",
        "parses": "1 if it is a Python expression at all",
    },
    generate=Generator(ask=ask, demonstrate=demonstrate, contrast=contrast, babble=babble),
)
