r"""Which number does a worked solution, in anybody's style, answer with?

"... <<9*2=18>>18 dollars.\n#### 18" | "So she makes \boxed{\$18}." | "The answer is 18 dollars." -> Fraction(18).

A *marked* answer stands in `<answer>` tags, after `####`, in `\boxed{}` or after "the answer is" / "Answer:"; they are
looked for in this order. Where a text goes on to a next question, only what stands before it counts. Every pattern has
bounded repetition or no overlap, so that hostile text takes time in proportion to its length.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise

LONGEST_NUMBER = 64
"""Characters; anything longer is no number (keeps hostile digit strings cheap)."""
LARGEST_EXPONENT = 30
LONGEST_MARK = 400
"""Characters after a mark within which its number is looked for."""
MOST_MARKS = 50
"""Boxes or phrases looked at, from the end."""
MOST_LINES = 200
"""Lines with digits looked at, from the end, where nothing is marked."""
LONGEST_LINE = 4000
"""Characters of such a line looked at, from its end."""
WINDOW = 8
"""Characters before a sign that say whether it is a minus."""

_END = re.compile(
    r"<\|im_end\|>|<\|endoftext\|>|<\|eot_id\|>|<end_of_turn>|</s>|<eos>|\n\s{0,8}(?:Human|User|Assistant)\s{0,2}:"
)
_NEXT_QUESTION = re.compile(r"\n[ \t]{0,8}[#*\[]{0,6}[ \t]?(?:Question|Q|Problem)[*\]]{0,4}[ \t]?[:.]")
_TAGS = re.compile(r"<answer>((?:(?!</?answer>).)*)</answer>", re.DOTALL | re.IGNORECASE)
_HASHES = re.compile(r"####(?!#)[ \t]*\n?([^\n]*)")
_BOXED = re.compile(r"\\f?boxed\s?\{?")
_PHRASE = re.compile(
    r"\banswers?\b(?:[^\n.:=0-9]{0,60}?\b(?:is|are|be|equals)\b|[\s*_]{0,4}(?:\([^()\n]{0,30}\))?[\s*_]{0,4}[:=])"
    r"(?!\s*\n?\s*(?:not|incorrect|wrong)\b)",
    re.IGNORECASE,
)
_STARTS_WITH_NUMBER = re.compile(r"[\s$€£*_`=~≈\\({+.-]{0,12}(?:boxed|[dt]?frac|text)?[\s{$\\.-]{0,6}[0-9½¼¾⅓⅔]")
_HEADING = re.compile(
    r"\W{0,20}(?:step|part|case|day|week|month|year|question|problem|solution|method|option|section)\b", re.IGNORECASE
)
_LABEL = re.compile(r"[ \t]*[0-9]{1,3}(?:[.)]\s+[A-Za-z*]|:)")
_SENTENCE_END = re.compile(r"[.!?](?=\s|$)\s*|\n+")
_BOLD = re.compile(r"\*\*([^*\n]{1,200})\*\*")
_LIST_LABEL = re.compile(r"(?m)^[ \t]*[0-9]{1,3}[.)](?=\s|$)")

_CALCULATOR = re.compile(r"<<[^<>\n]{0,200}?=\s*([^<>=\n]{0,64})>>(\s?[$€£]?-?\.?[0-9])?")
_REWRITES = tuple(
    (re.compile(pattern), to)
    for pattern, to in (
        (r"\\[dt]?frac\s?\{\s?(-?[0-9]{1,32})\s?\}\s?\{\s?([0-9]{1,32})\s?\}", r" \1/\2 "),
        (r"\\[dt]?frac\s?([0-9])\s?([0-9])", r" \1/\2 "),
        (r"\\(?:text|textbf|mathrm|mathbf|mbox|boxed|fbox)\s?\{([^{}]{0,200})\}", r" \1 "),
        (r"\{,\}", ","),
        (r"(?<=[0-9])(?:\\[,;!: ]|[\u2009\u202f\u00a0\u2008])(?=[0-9]{3}(?![0-9]))", ""),
        (r"\\(?:left|right|displaystyle|quad|qquad|,|;|!|:|\(|\)|\[|\]| )", " "),
        (r"\\([$%#&_])", r"\1"),
        (r"\\(?:times|cdot)(?![a-zA-Z])|[×·]", "*"),
        (r"\\approx(?![a-zA-Z])|[≈≃]", "="),
        (r"(?<=[A-Za-z])\^\{?-?[0-9]\}?", ""),
        (r"\^\s?\{\s?(-?[0-9]{1,4})\s?\}", r"^\1"),
        (r"[\u2212\uff0d\ufe63]", "-"),
        (r"[\u2013\u2014\u2012]", " – "),
        (r"[\u2009\u202f\u00a0\u2008\u200a]", " "),
        (r"(?<![0-9`*_\s])[`*_]+|[`*_]+(?![0-9`*_\s])", " "),
        (r"\*\*+|__+", " "),
    )
)
_VULGAR = {"½": "1/2", "¼": "1/4", "¾": "3/4", "⅓": "1/3", "⅔": "2/3", "⅕": "1/5", "⅛": "1/8"}
_ASIDE = re.compile(r"(?<=\S)\s{0,4}\([^()]{0,200}\)|\s(?:because|since|as)\s[^\n]{0,400}")
_SPACED = re.compile(r"[\s$€£]{0,9}([0-9]{1,3}(?: [0-9]{3}){1,6})(?![0-9.,/ ]{0,2}[0-9])")
_DIGITS = r"(?:[0-9][0-9,]*(?:\.[0-9]+)?|\.[0-9]+)"
_NUMBER = re.compile(
    rf"(?P<sign>[-+]?)\s?(?P<money>[$€£]?)\s?(?P<inner>-?)(?P<digits>{_DIGITS})"
    r"(?:[eE](?P<exponent>[-+]?[0-9]{1,4})(?![0-9A-Za-z])|\s?\*\s?10\^(?P<power>[-+]?[0-9]{1,4}))?"
    r"(?:\s?/\s?(?P<below>[0-9]{1,32})(?![0-9/]))?"
    r"(?:\s?(?P<scale>hundred|thousand|million|billion|trillion)\b)?"
)
_MIXED = re.compile(r"(?<![0-9.,/])([0-9]{1,20})(?:\s|\sand\s|-)([0-9]{1,9})\s?/\s?([0-9]{1,9})(?![0-9/])")
_COINS = re.compile(r"(?<![0-9.,])([0-9]{1,20}) dollars? and ([0-9]{1,2}) cents?\b")
_SCALES = {"hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_GROUPED = re.compile(r"[0-9]{1,3}(?:,[0-9]{2,3})*,[0-9]{3}|[0-9]+")
_ALTERNATIVE = re.compile(r"\b(?:or|to|and|versus|vs)\b|[–;,]|(?<!\w)-|-(?=\s?[$€£]?[0-9])", re.IGNORECASE)


@dataclass(frozen=True)
class Found:
    """A number in a text. Example: "$18.50 a day" -> Found(Fraction(37, 2), 0, 6)."""

    value: Fraction
    start: int
    end: int


def marked_number(text: str) -> Fraction | None:
    """The number of the text's marked answer; None without a mark, or where what is marked is not one number.

    The last well-formed `<answer>` block, else the first `####` that a number follows (a base model runs on to further
    problems after it; `#### Step 2` is a heading), else the last `\\boxed{}`, else the last "the answer is"/"Answer:".
    """
    return _marked(_own_part(text))[0]


def answered_number(text: str) -> Fraction | None:
    """The marked number or, without a readable mark, the one that the text ends on.

    That is: a bold number of the last line that has numbers, else what follows the last `=` of the last sentence that
    has numbers, else that sentence's last number. Labels of lists, times and dates are no numbers.
    """
    text = _own_part(text)
    marked, _ = _marked(text)
    return marked if marked is not None else _last(text)


def read(text: str) -> Fraction | None:
    """The one number that a short text states, in whatever dress; None if there is none or it is not one.

    "$1,000.", "18 dollars", "x = 18", "3 * 6 = 18", "1 1/2", "\\frac{3}{2}", "18%", "2 million" are numbers;
    "18 or 20", "18-20", "5:30", "1/0" and "12/05/2024" are not. A percent sign and a unit say nothing about the value.
    """
    text = _plain(text[:LONGEST_MARK])
    aside = _ASIDE.sub(" ", text)
    text = aside if _numbers(aside) else text
    spaced = _SPACED.match(text)
    if spaced:
        return Fraction(spaced[1].replace(" ", ""))
    head, equals, tail = text.rpartition("=")
    if equals and _numbers(tail, leading=True):
        text = tail
    elif equals:
        text = head
    found = _numbers(text, leading=True)
    if not found:
        return None
    values = {number.value for number in found}
    if len(values) == 1:
        return found[0].value
    for one, other in pairwise(found):
        between = text[one.end : other.start]
        if one.value != other.value and len(between) < 24 and _alternative(between):
            return None
    if not re.search(r"[A-Za-z]", text[: found[0].start]):
        return found[0].value
    return found[-1].value


def _alternative(between: str) -> bool:
    """Whether two numbers with this between them are a range, a choice or a list: "to", " or ", "-", " apples and "."""
    return not re.search(r"[A-Za-z]{3}", _ALTERNATIVE.sub(" ", between)) or bool(
        re.search(r"\b(?:or|to)\b|–", between, re.IGNORECASE)
    )


def _own_part(text: str) -> str:
    """The text up to where somebody else's turn begins or, if a number stands before one, a next question.

    A numbered question ("Question 2:") is a step of the solution, not a next problem.
    """
    end = next((m.start() for m in _END.finditer(text) if text[: m.start()].strip()), len(text))
    text = text[:end]
    asked = next((m.start() for m in _NEXT_QUESTION.finditer(text) if text[: m.start()].strip()), None)
    return text[:asked] if asked is not None and _last(text[:asked]) is not None else text


def _marked(text: str) -> tuple[Fraction | None, bool]:
    """`(number, whether there is a mark)`; the number is None where what is marked cannot be read."""
    tags = _TAGS.findall(text)
    if tags:
        return _inside(tags[-1]), True
    lines = [line for line in _HASHES.findall(text) if line.strip()]
    ends = text.rstrip()
    for line in lines:
        heading = _LABEL.match(line) and not ends.endswith(line.rstrip())
        if not heading and _STARTS_WITH_NUMBER.match(line):
            return read(line), True
    if (
        lines
        and not _HEADING.match(lines[-1])
        and not _LABEL.match(lines[-1])
        and len(_numbers(_plain(lines[-1]))) == 1
    ):
        return read(lines[-1]), True
    for start in _last_ends(_BOXED, text):
        content = _braced(text, start)
        if content.strip():
            return read(content), True
    for start in _last_ends(_PHRASE, text):
        phrase = _sentence(text[start : start + LONGEST_MARK])
        if _numbers(_plain(phrase)):
            return read(phrase), True
    return None, False


def _inside(content: str) -> Fraction | None:
    """The number of an answer block: stated alone, marked once more inside it, or the one it ends on."""
    content = content.strip()
    if len(content) <= LONGEST_MARK and "\n" not in content:
        inner, marked = _marked(content)
        return inner if marked else read(content)
    inner, marked = _marked(content)
    return inner if marked else _last(content)


def _last_ends(pattern: re.Pattern[str], text: str) -> list[int]:
    """Where the last matches end, the very last first."""
    return [match.end() for match in pattern.finditer(text)][: -MOST_MARKS - 1 : -1]


def _braced(text: str, start: int) -> str:
    """What stands from `start` to the brace that closes the one before it (at most LONGEST_MARK characters)."""
    depth = 1
    for i in range(start, min(len(text), start + LONGEST_MARK)):
        depth += (text[i] == "{") - (text[i] == "}")
        if depth == 0:
            return text[start:i]
    return text[start : start + LONGEST_MARK].partition("\n")[0]


def _sentence(text: str) -> str:
    """The first sentence that is not blank (emphasis and brackets alone are blank)."""
    for line in text.split("\n"):
        for piece in _SENTENCE_END.split(line):
            if re.search(r"[A-Za-z0-9½¼¾⅓⅔]", piece):
                return piece
    return ""


def _last(text: str) -> Fraction | None:
    lines = [line for line in text.split("\n") if any(c.isdigit() or c in _VULGAR for c in line)]
    for line in lines[: -MOST_LINES - 1 : -1]:
        bold = [number for number in map(read, _BOLD.findall(line[-LONGEST_LINE:])) if number is not None]
        if (
            bold
            and not line.strip().startswith(("**Step", "**step"))
            and not re.fullmatch(r"\s*(?:[-*]|[0-9]+[.)])?\s*\*\*[^*]*\*\*:?\s*\S.*", line)
        ):
            return bold[-1]
        plain = _LIST_LABEL.sub(" ", _plain(line[-LONGEST_LINE:]))
        for sentence in reversed(_SENTENCE_END.split(plain)):
            found = _numbers(sentence)
            after = [number for number in found if number.start >= sentence.rfind("=") >= 0]
            if found:
                return after[0].value if after else found[-1].value
    return None


def _plain(text: str) -> str:
    """The text without calculator marks, LaTeX, emphasis and typographic variants of signs and spaces."""
    text = _CALCULATOR.sub(lambda m: m[2] if m[2] else f" {m[1]} ", text)
    for sign, ratio in _VULGAR.items():
        if sign in text:
            text = text.replace(sign, f" {ratio} ")
    for pattern, to in _REWRITES:
        text = pattern.sub(to, text)
    text = _COINS.sub(lambda m: f" {m[1]}.{int(m[2]):02d} ", text)
    return re.sub(r"(?<=[$€£])\s?[$€£]|[\\{}]", "", text)


def _numbers(text: str, *, leading: bool = False) -> list[Found]:
    """All numbers of a plain text, in order; `leading` takes a spaced minus at its very beginning for a sign."""
    found: list[Found] = []
    mixed = {m.start(): m for m in _MIXED.finditer(text)}
    skip = 0
    for match in _NUMBER.finditer(text):
        start, end = match.start("digits"), match.end()
        if start < skip:
            continue
        if start in mixed:
            whole, above, below = (int(part) for part in mixed[start].groups())
            skip = mixed[start].end()
            if below:
                found.append(
                    Found(_signed(text, match, Fraction(whole) + Fraction(above, below), leading), start, skip)
                )
            continue
        value = None if _glued(text, match) else _value(match)
        if value is not None:
            found.append(Found(_signed(text, match, value, leading), start, end))
    return found


def _glued(text: str, match: re.Match[str]) -> bool:
    """Whether the digits are part of a name, a time, a date or a longer thing: `x2`, `5:30`, `12/05/2024`, `v1.2.3`."""
    start = match.start("digits")
    before, after = text[max(0, start - 2) : start], text[match.end() : match.end() + 2]
    return bool(re.search(r"[A-Za-z_][.]?$|[0-9][:/.]$", before) or re.match(r"[:/.][0-9]|[eE][-+0-9]", after))


def _signed(text: str, match: re.Match[str], value: Fraction, leading: bool) -> Fraction:
    sign = match["inner"] or match["sign"]
    if sign != "-":
        return value
    at = match.start("sign") if match["sign"] else match.start("inner")
    window = text[max(0, at - WINDOW) : at]
    before = window.rstrip()
    spaced = text[at + 1 : at + 2].isspace()
    if match["inner"]:
        return -value
    if not before:
        return -value if leading or not spaced else value
    return -value if not spaced and (before != window or before[-1] in "(=:$€£[*,") else value


def _value(match: re.Match[str]) -> Fraction | None:
    digits = match["digits"].rstrip(",")
    if len(match[0]) > LONGEST_NUMBER:
        return None
    whole, _, decimals = digits.partition(".")
    if whole and not _GROUPED.fullmatch(whole):
        return None
    value = Fraction(f"{whole.replace(',', '') or 0}.{decimals or 0}")
    exponent = int(match["exponent"] or match["power"] or 0)
    if abs(exponent) > LARGEST_EXPONENT:
        return None
    value *= Fraction(10) ** exponent
    if match["below"]:
        if int(match["below"]) == 0:
            return None
        value /= int(match["below"])
    return value * _SCALES.get(match["scale"] or "", 1)
