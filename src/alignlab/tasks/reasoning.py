"""Word problems on two whole numbers, answered with a line of working and a number.

"Mia has 17 coins and loses 9. .." -> `<reasoning>17 - 9 = 10 - 2 = 8</reasoning><answer>8</answer>` -> right or wrong.

The working goes through tens and ones: a model of a million parameters learns each of its steps within minutes, where
it would need hours to learn two-digit sums in one go.
"""

from __future__ import annotations

from random import Random

from alignlab.rewards.exact import final_number, gold_number
from alignlab.rewards.format import well_formed
from alignlab.tasks import Generator, Grade, Task, split_of
from alignlab.types import Completion, Example, Message, Prompt

# fmt: off
NAMES = (
    "Mia", "Tom", "Ada", "Ben", "Eva", "Leo", "Ida", "Max", "Zoe", "Sam", "Lea", "Jon",
    "Amy", "Kai", "Nora", "Omar", "Rosa", "Finn", "Lucy", "Paul",
)
THINGS = (
    "coins", "apples", "books", "cards", "shells", "stamps", "eggs", "pens", "cakes",
    "toys", "balls", "plums", "rings", "cups", "seeds", "keys", "nuts", "hats",
)
# fmt: on
ADD = (
    "{a} has {x} {things} and finds {y} more. How many {things} does {a} have now?",
    "{a} has {x} {things}. {b} gives {a} {y} more. How many {things} does {a} have?",
    "There are {x} {things} in a box and {y} in a bag. How many {things} are there in all?",
    "{a} has {x} {things} and {b} has {y}. How many {things} do they have together?",
    "{a} buys {x} {things} on Monday and {y} on Friday. How many {things} is that?",
    "A shop has {x} {things} and gets {y} more. How many {things} does the shop have?",
    "{a} has {x} {things}. {b} has {y} more than {a}. How many {things} does {b} have?",
    "{b} took {y} {things} from {a}, who has {x} left. How many {things} did {a} have before?",
)
SUBTRACT = (
    "{a} has {x} {things} and loses {y}. How many {things} are left?",
    "{a} had {x} {things} and gave {y} to {b}. How many {things} does {a} have now?",
    "There were {x} {things} in a box. {a} took {y}. How many {things} are still in it?",
    "{a} has {x} {things}. {b} has {y} fewer. How many {things} does {b} have?",
    "{a} needs {x} {things} and has {y}. How many more {things} does {a} need?",
    "{a} has {y} {things} but wants {x}. How many {things} are missing?",
    "A shop has {x} {things} and sells {y}. How many {things} does the shop have?",
    "After {b} gave {a} {y} {things}, {a} has {x}. How many {things} did {a} have before?",
)
MULTIPLY = (
    "{a} has {y} boxes with {x} {things} each. How many {things} is that?",
    "{a} buys {x} {things} a day. How many {things} is that in {y} days?",
    "{y} friends have {x} {things} each. How many {things} do they have?",
)
TEMPLATES = {"+": ADD, "-": SUBTRACT, "*": MULTIPLY}
LARGEST = 99
"""No number in a problem or its answer is larger."""
DRILL = 4
"""Bare sums in one row of practice."""


def grade(prompt: Prompt, completion: Completion) -> Grade:
    """`score` 1.0 for the right number in the answer tags."""
    gold = gold_number(prompt.answer or "")
    return {
        "score": float(gold is not None and final_number(completion.text, "strict") == gold),
        "flexible": float(gold is not None and final_number(completion.text, "flexible") == gold),
        "format": float(completion.finish_reason == "stop" and well_formed(completion.text)),
    }


def ask(rng: Random) -> Prompt:
    """A word problem; the key is its sum, written so that 3 + 4 and 4 + 3 are one."""
    x, kind, y, result = _sum(rng)
    a, b = rng.choice(NAMES), rng.choice(NAMES)
    while a == b:
        b = rng.choice(NAMES)
    text = rng.choice(TEMPLATES[kind]).format(a=a, b=b, x=x, y=y, things=rng.choice(THINGS))
    return Prompt(
        messages=(Message("user", text),),
        id="",
        task="reasoning",
        answer=str(result),
        meta={
            "grading": "number",
            "format": "reasoning_answer",
            "key": _key(x, kind, y),
            "working": _working(x, kind, y),
        },
    )


def demonstrate(rng: Random, prompt: Prompt) -> str:
    return _tagged(prompt.meta["working"], prompt.answer or "")


def contrast(rng: Random, prompt: Prompt) -> tuple[str, str, str]:
    """Right against wrong (half of them), formatted against plain, concise against rambling."""
    working, answer = prompt.meta["working"], prompt.answer or ""
    chosen = _tagged(working, answer)
    draw = rng.random()
    if draw < 0.1:
        return "consistent", chosen, _tagged(working, answer, _slip(rng, answer))
    if draw < 0.55:
        return "correct", chosen, _tagged(working, _slip(rng, answer))
    if draw < 0.8:
        return "format", chosen, _plain(rng, working, answer)
    return "concise", chosen, _tagged(_chatter(rng) + working, answer)


def babble(rng: Random, prompt: Prompt) -> Example:
    """Bare sums to practise on, and word problems answered in every style, one in eight wrongly."""
    working, answer = prompt.meta["working"], prompt.answer or ""
    if rng.random() < 0.4:
        return _drill(rng, prompt.id)
    if rng.random() < 0.12:
        answer = _slip(rng, answer)
    draw = rng.random()
    if draw < 0.45:
        text = _tagged(working, answer)
    elif draw < 0.75:
        text = _plain(rng, working, answer)
    elif draw < 0.85:
        text = _tagged(_chatter(rng) + working, answer)
    else:
        text = _chatter(rng) + _plain(rng, working, answer)
    return Example(prompt=prompt, completion=text)


def _sum(rng: Random) -> tuple[int, str, int, int]:
    """`(x, sign, y, result)`, nothing above LARGEST and nothing below 1."""
    kind = rng.choices("+-*", (45, 45, 10))[0]
    if kind == "*":
        y = rng.choice((2, 2, 3, 4, 5))
        x = 2 + rng.randrange(LARGEST // y - 1)
        return x, kind, y, x * y
    total = 2 + rng.randrange(LARGEST - 1)
    y = 1 + rng.randrange(total - 1)
    return (total - y, kind, y, total) if kind == "+" else (total, kind, y, total - y)


def _working(x: int, kind: str, y: int) -> str:
    """The sum and its way through tens and ones, all but the result: `43 - 28 = 20 - 5`; `3 + 4` needs no way."""
    (tens, ones), (other_tens, other_ones) = divmod(x, 10), divmod(y, 10)
    if max(x, y) < 10:
        return f"{x} {kind} {y}"
    if kind == "*":
        parts = 10 * tens * y, ones * y
    elif kind == "+":
        parts = 10 * (tens + other_tens), ones + other_ones
    else:
        parts = 10 * (tens - other_tens), ones - other_ones
    return f"{x} {kind} {y} = {parts[0]} {'-' if parts[1] < 0 else '+'} {abs(parts[1])}"


def _key(x: int, kind: str, y: int) -> str:
    return f"{x} - {y}" if kind == "-" else f"{min(x, y)} {kind} {max(x, y)}"


def _drill(rng: Random, id: str) -> Example:
    """A few bare sums with their working; only sums of the train split."""
    sums: list[tuple[int, str, int, int]] = []
    while len(sums) < DRILL:
        x, kind, y, result = _sum(rng)
        if split_of(_key(x, kind, y)) == "train":
            sums.append((x, kind, y, result))
    asked = ", ".join(f"{x} {kind} {y}" for x, kind, y, _ in sums)
    results = ", ".join(f"{_working(x, kind, y)} = {result}" for x, kind, y, result in sums)
    return Example(
        prompt=Prompt(messages=(Message("user", asked),), id=id, task="reasoning", answer=results), completion=results
    )


def _tagged(working: str, result: str, answer: str | None = None) -> str:
    return f"<reasoning>{working} = {result}</reasoning><answer>{answer or result}</answer>"


def _plain(rng: Random, working: str, answer: str) -> str:
    styles = ("The answer is {a}.", "{w} = {a}", "{w} = {a}, so it is {a}.", "It is {a}.", "<answer>{w} = {a}")
    return rng.choice(styles).format(a=answer, w=working)


def _chatter(rng: Random) -> str:
    return rng.choice(("Let me think. ", "Well, let me see. ", "OK, I think this is it. ", "Good question. So, "))


def _slip(rng: Random, answer: str) -> str:
    """A wrong number that looks right: off by 1, 2 or 10, or one digit changed."""
    value = int(answer)
    digit, place = rng.randrange(10), rng.choice((1, 10))
    changed = value + (digit - value // place % 10) * place
    wrong = rng.choice((value - 1, value + 1, value - 2, value + 2, value - 10, value + 10, changed, changed))
    return str(wrong) if 0 <= wrong != value else str(value + 1)


TASK = Task(
    name="reasoning",
    description="Word problems on two whole numbers, answered with a line of working and a number.",
    grade=grade,
    default_reward={"exact": 1.0, "format": 0.2},
    metrics={
        "score": "1 if the number in the answer tags is right",
        "flexible": "1 if the last number anywhere is right",
        "format": "1 if it is one reasoning block, one answer block, and stopped by itself",
    },
    generate=Generator(ask=ask, demonstrate=demonstrate, contrast=contrast, babble=babble),
)
