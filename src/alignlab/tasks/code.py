"""A sentence, and the Python expression it describes.

"the first 3 items of names" -> `names[:3]` -> the same syntax tree or not. Nothing of that is ever run.

Prepared from public sets there are also statements (CoNaLa), compared likewise, and programs with unit tests (MBPP,
HumanEval), which are run only where ALIGNLAB_RUN_CODE=1 allows it; elsewhere they have no `score`.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from functools import cache
from random import Random

from alignlab.data.files import Record
from alignlab.data.formats import Unusable
from alignlab.data.prepared import Entry, Split
from alignlab.data.sets import Hub, Source, asked, text_of
from alignlab.rewards.code import parse_expression, parse_program, passes, program_of, running_allowed, same_expression
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
    """`score` 1.0 for the wanted expression or statements, compared as syntax trees, or where all unit tests pass.

    Unit tests need programs to be run; where that is off there is no `score`, and a line on stderr says so, once.
    """
    if prompt.meta.get("grading") == "tests":
        return _grade_program(prompt, completion)
    statements = prompt.meta.get("statements")
    parsed = (parse_program if statements else parse_expression)(completion.text)
    return {
        "score": float(same_expression(completion.text, prompt.answer or "")),
        "parses": float(parsed is not None),
    }


def _grade_program(prompt: Prompt, completion: Completion) -> Grade:
    parses = float(parse_program(program_of(completion.text)) is not None)
    if not running_allowed():
        _say_once("code: running programs is off, so unit tests give no score; ALIGNLAB_RUN_CODE=1 turns it on")
        return {"parses": parses}
    result = passes(prompt, completion.text)
    return {"score": float(result.passed), "parses": parses, "tests_passed": result.num_passed / result.num_tests}


@cache
def _say_once(line: str) -> None:
    print(f"note: {line}", file=sys.stderr)


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


# ---- public sets -----------------------------------------------------------------------------------------------------

ASK_PROGRAM = "{task}\nYour code should pass this test:\n{test}"
ASK_FUNCTION = "Complete this Python function and answer with all of it:\n{header}"


def read_conala(row: Record) -> Iterator[Entry]:
    """What is wanted in one line, and the line; all snippets of one Stack Overflow question stay on one side."""
    rewritten = row.get("rewritten_intent")
    intent = text_of(row, "rewritten_intent") if rewritten and str(rewritten).strip() else text_of(row, "intent")
    snippet = text_of(row, "snippet").strip()
    if parse_program(snippet) is None:
        raise Unusable("the snippet is no Python 3")
    prompt = asked(
        f"Python: {intent.strip()}",
        answer=snippet,
        grading="expression",
        statements=True,
        category="snippets",
        question_id=row.get("question_id"),
    )
    yield Entry(prompt=prompt, completion=snippet, group=f"stackoverflow {row['question_id']}", said=intent)


def read_mbpp(row: Record) -> Iterator[Entry]:
    """A task with tests, the first of which is shown, as the paper does; its split follows from its number."""
    number = int(row["task_id"])
    code = text_of(row, "code").replace("\r\n", "\n").replace("\t", "    ").rstrip()
    tests = [str(test) for test in row["test_list"]]
    if not tests:
        raise Unusable("no tests")
    named = re.findall(r"^def\s+(\w+)", code, re.MULTILINE)
    entry_point = next((name for name in named if name in tests[0]), None)
    prompt = asked(
        ASK_PROGRAM.format(task=text_of(row, "prompt", "text").strip(), test=tests[0]),
        answer=code,
        grading="tests",
        tests=tests,
        test_setup="\n".join(map(str, row.get("test_imports") or ())),
        **({"entry_point": entry_point} if entry_point else {}),
        category="programs",
    )
    yield Entry(prompt=prompt, completion=code, split=_split_of_mbpp(number), said=text_of(row, "prompt", "text"))


def _split_of_mbpp(number: int) -> Split:
    """The authors' (arXiv 2108.07732): 11-510 test, 511-600 validation, the others to train or to show."""
    return "test" if 11 <= number <= 510 else "validation" if 511 <= number <= 600 else "train"


def read_humaneval(row: Record) -> Iterator[Entry]:
    """A function's head and docstring; an answer may be the whole function or go on with it."""
    header, name = str(row["prompt"]), text_of(row, "entry_point")
    prompt = asked(
        ASK_FUNCTION.format(header=header.strip()),
        answer=header + str(row["canonical_solution"]),
        grading="tests",
        tests=[f"{row['test']}\ncheck({name})"],
        test_setup=header,
        entry_point=name,
        category="functions",
    )
    yield Entry(prompt=prompt, completion=prompt.answer, said=header)


_MBPP, _HUMANEVAL = "google-research-datasets/mbpp", "openai/openai_humaneval"

TASK = Task(
    name="code",
    description="Write the Python expression that a sentence describes.",
    grade=grade,
    default_reward={"code": 1.0},
    metrics={
        "score": "1 if it is the wanted expression or statement, compared as syntax trees; of programs: all tests pass",
        "parses": "1 if it is Python of the kind that is asked for",
        "tests_passed": "programs only, where they may be run: share of the unit tests that pass",
    },
    generate=Generator(ask=ask, demonstrate=demonstrate, contrast=contrast, babble=babble),
    sources=(
        Source(
            name="CoNaLa",
            licence="MIT; Yin et al. 2018, from Stack Overflow (question_id names the page)",
            columns=(("intent", "snippet", "question_id"),),
            read=read_conala,
            hub={"train": Hub("neulab/conala", None, "train"), "test": Hub("neulab/conala", None, "test")},
        ),
        Source(
            name="MBPP sanitized",
            licence="CC BY 4.0; Austin et al. 2021",
            columns=(("task_id", "prompt", "code", "test_list"),),
            read=read_mbpp,
            hub={
                "train": (Hub(_MBPP, "sanitized", "train"), Hub(_MBPP, "sanitized", "prompt")),
                "validation": Hub(_MBPP, "sanitized", "validation"),
                "test": Hub(_MBPP, "sanitized", "test"),
            },
        ),
        Source(
            name="HumanEval",
            licence="MIT; Chen et al. 2021",
            columns=(("task_id", "prompt", "entry_point", "canonical_solution", "test"),),
            read=read_humaneval,
            hub={"test": Hub(_HUMANEVAL, None, "test")},
            shares={"test": 1.0},
        ),
    ),
    measures=("exact_match", "bleu", "pass_at_k"),
)
