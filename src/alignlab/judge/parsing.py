"""What a judge's reply says, and nothing that it only quotes; text -> score or verdict, None where it says none.

Replies come from models, and may repeat whatever a judged text asked them to say. So a statement counts only outside
quotation marks and code, one that begins a line counts more than one within it, the last counts, and of several that
differ one that also stands in the judged text does not. What is ambiguous is None: a score is never guessed.
"""

from __future__ import annotations

import json
import math
import re
import unicodedata
from collections.abc import Iterator, Sequence
from typing import Any, Literal

Verdict = Literal["first", "second", "tie"]

MOST_CHARACTERS = 100_000
"""Only this much of the end of a reply is read."""

# Every repetition is bounded: a hostile reply must not make a search quadratic.
_NUMBER = r"(?<![\w.,+/-])(?P<number>[+-]?(?:\d{1,3}(?:,\d{3}){1,4}|\d{1,12})(?:\.\d{1,12}|,\d{1,2}(?!\d))?)"
_AFTER = r"(?![\w%])(?!\.\d)(?! ?[-–] ?\d)"  # not `8th`, `80%`, `1.2.3`, `7-8`
_SCALE = r"(?:\s?(?:/|out of|of)\s?(?P<scale>\d{1,6}(?:\.\d{1,6})?))?"
_MARKS = r"[\s*_`#\[({<:=|–—\-]{0,12}"
_EDGE = r"(?P<edge>^[\s*_`#>\-]{0,8})?"
_SAID = re.compile(
    rf"{_EDGE}\b(?P<whole>(?:final|overall|total) )?(?:score|rating|grade|mark|points?)\b"
    rf"(?:[ (]{{1,2}}out of \d{{1,4}}\)?)?[\s*_`]{{0,8}}(?:is|of|was)?{_MARKS}{_NUMBER}{_SCALE}{_AFTER}",
    re.IGNORECASE | re.MULTILINE,
)
_NO_NUMBER = re.compile(
    r"\b(?:score|rating|grade)[\s*_`]{0,8}(?::|=|is)[\s*_`]{0,8}[+-]?(?:nan|inf(?:inity)?|∞)(?!\w)", re.IGNORECASE
)
_BOXED = re.compile(rf"\[\[ ?{_NUMBER}{_SCALE} ?\]\]")
_OF = re.compile(rf"{_NUMBER}\s?(?:/|out of)\s?(?P<scale>\d{{1,6}}(?:\.\d{{1,6}})?){_AFTER}", re.IGNORECASE)
_BARE = re.compile(rf"{_NUMBER}{_AFTER}")
_WRITTEN = re.compile(rf" ?{_NUMBER} ?{_SCALE} ?")
_BULLET = re.compile(r"^ ?\d{1,2}[.)] (?=\S)", re.MULTILINE)

_LETTERS = {"a": "first", "1": "first", "first": "first", "b": "second", "2": "second", "second": "second"}
_CHOICE = r"(?P<choice>a|b|c|1|2|first|second|tied?|draw|equal|both|neither|same)(?![\w'])"
_NOUN = r"(?:answer|response|assistant|option)"
_BOXED_CHOICE = re.compile(rf"\[\[ ?{_CHOICE} ?\]\]", re.IGNORECASE)
_SAID_CHOICE = re.compile(
    rf"{_EDGE}\b(?P<whole>(?:final|overall) )?(?:verdict|winner|choice|decision|preference|better(?: {_NOUN})?|"
    rf"preferred(?: {_NOUN})?)\b[\s*_`]{{0,8}}(?:is|:|=){_MARKS}(?:is )?(?:an? (?=tie|draw))?(?:the )?(?:{_NOUN} )?"
    rf"{_MARKS}{_CHOICE}",
    re.IGNORECASE | re.MULTILINE,
)
_NAMED_CHOICE = re.compile(
    rf"\b{_NOUN} {_MARKS}(?P<choice>a|b|1|2)[*_`\])]{{0,8}} (?:is|was) (?:(?!not |hardly |never )\w{{1,20}} )?"
    rf"(?:better|best|stronger|superior|preferable|preferred)\b"
    rf"|\bI (?:would )?prefer (?:{_NOUN} )?{_MARKS}(?P<preferred>a|b|1|2)(?![\w'])"
    rf"|\b(?:it is|it's) a (?P<tied>tie|draw)\b",
    re.IGNORECASE,
)
_ALONE = re.compile(rf"[\s*_`#>\[({{\"']{{0,8}}(?:{_NOUN} )?{_CHOICE}[\s*_`.!\])}}\"']{{0,8}}", re.IGNORECASE)

_THOUGHT = re.compile(r"\A.*</think(?:ing)?>|<think(?:ing)?>.*\Z", re.IGNORECASE | re.DOTALL)
_QUOTED = re.compile(
    r"```.*?```|`[^`\n]*`|\"[^\"\n]*\"|“[^“”]*”|«[^«»]*»|(?<!\w)'[^'\n]*'(?!\w)|^>[^\n]*$", re.M | re.S
)
_WRAPPED = re.compile(r"\A(?:```\w{0,12}\n?(?P<fence>.*?)```|(?P<mark>[\"'`])(?P<quote>[^\"'`]*)(?P=mark))\Z", re.S)
_SCORE_KEYS = ("score", "overall_score", "final_score", "overall", "rating", "grade")
_VERDICT_KEYS = ("verdict", "winner", "choice", "preferred", "better")


def parse_score(text: str, low: float, high: float, *, judged: str = "") -> float | None:
    """The score that a reply states on the scale from `low` to `high`, or None.

    Understood are JSON with a `score`, `[[8]]`, `Score: 8`, `Score: 8/10`, `3 out of 5`, and a reply with one number
    only. None where nothing is said, several numbers could be meant, the number lies off the scale or is none (NaN), or
    it names another scale (`80/100` where `high` is 10).

    Args:
        judged: the text that was judged; what stands in it is suspected of being an echo.
    """
    text, judged = _readable(text), _readable(judged)
    for value in _objects(text, whole=True):
        return _on_scale(value, low, high)
    plain = _unquoted(text)
    if _NO_NUMBER.search(plain):
        return None
    for patterns in ((_BOXED, _SAID), (_OF,)):
        if any(pattern.search(plain) for pattern in patterns):
            said = _statement(patterns, plain, judged)
            return None if said is None else _on_scale(said["number"], low, high, said["scale"])
    for value in _objects(text, judged=judged):
        return _on_scale(value, low, high)
    alone = _BARE.fullmatch(_last_line(plain).strip(" *_`.[](){}"))
    if alone:
        return _on_scale(alone["number"], low, high)
    numbers = {m["number"] for m in _BARE.finditer(_BULLET.sub(" ", plain))}
    return _on_scale(numbers.pop(), low, high) if len(numbers) == 1 else None


def parse_verdict(text: str, *, judged: str = "") -> Verdict | None:
    """Which of two answers a reply prefers, as they were shown, or None where it does not say.

    Understood are `[[A]]`, JSON with a `winner` or `verdict`, `Verdict: B`, a last line that is nothing but the
    verdict, and `Answer A is better`; C, tie, draw, equal, both and neither are ties.
    """
    text, judged = _readable(text), _readable(judged)
    for value in _objects(text, _VERDICT_KEYS, whole=True):
        return _choice_of(value)
    plain = _unquoted(text)
    patterns = _BOXED_CHOICE, _SAID_CHOICE
    if any(pattern.search(plain) for pattern in patterns):
        said = _statement(patterns, plain, judged)
        return None if said is None else _choice(said["choice"])
    for value in _objects(text, _VERDICT_KEYS, judged=judged):
        return _choice_of(value)
    alone = _ALONE.fullmatch(_last_line(plain))
    if alone:
        return _choice(alone["choice"])
    named = {_choice(m["choice"] or m["preferred"] or m["tied"]) for m in _NAMED_CHOICE.finditer(plain)}
    return named.pop() if len(named) == 1 else None


# ---- statements ------------------------------------------------------------------------------------------------------


def _statement(patterns: Sequence[re.Pattern[str]], plain: str, judged: str) -> re.Match[str] | None:
    """The statement that counts; None where several differ and nothing sets one apart.

    Of those that stand out most the last one counts, as judges are told to end with their verdict.
    """
    found = [m for pattern in patterns for m in pattern.finditer(plain)]
    if judged and len({_value(m) for m in found}) > 1:
        echoes = {_value(m) for pattern in patterns for m in pattern.finditer(judged)}
        found = [m for m in found if _value(m) not in echoes] or found
    top = max(map(_weight, found))
    found = [m for m in found if _weight(m) == top]
    certain = top > 0 or len({_value(m) for m in found}) == 1
    return max(found, key=lambda m: m.end()) if certain else None


def _weight(said: re.Match[str]) -> int:
    """An overall score counts more than those of its parts, and what stands out more than what is within a sentence."""
    parts = said.groupdict()
    return 2 * bool(parts.get("whole")) + (parts.get("edge") is not None or said[0].startswith("[["))


def _value(said: re.Match[str]) -> str:
    parts = said.groupdict()
    return str(parts.get("number") or parts.get("choice")).lower()


def _on_scale(number: Any, low: float, high: float, scale: str | None = None) -> float | None:
    """A stated number, if it is one on the scale: of JSON, or as it was written."""
    if isinstance(number, str):
        written = _WRITTEN.fullmatch(number)
        if written is None:
            return None
        scale = scale or written["scale"]
        number = float(re.sub(r",(?=\d{3}(?:\D|\Z))", "", written["number"]).replace(",", "."))
    if isinstance(number, bool) or not isinstance(number, int | float) or not -1e9 < number < 1e9:
        return None
    if scale is not None and float(scale) != high:
        return None
    return float(number) if math.isfinite(number) and low <= number <= high else None


def _choice_of(value: Any) -> Verdict | None:
    alone = _ALONE.fullmatch(value) if isinstance(value, str) else None
    return _choice(alone["choice"]) if alone else None


def _choice(word: str) -> Verdict:
    found = _LETTERS.get(word.lower(), "tie")
    return "first" if found == "first" else "second" if found == "second" else "tie"


# ---- reading ---------------------------------------------------------------------------------------------------------


def _readable(text: str) -> str:
    """Full-width and other digits and signs as ASCII, single blanks, and nothing of what a model thought aloud."""
    text = unicodedata.normalize("NFKC", text[-MOST_CHARACTERS:])[-MOST_CHARACTERS:].replace("−", "-")
    text = "".join(str(unicodedata.digit(c)) if not c.isascii() and c.isdigit() else c for c in text)
    text = _THOUGHT.sub(" ", _single_blanks(text)).strip()
    wrapped = _WRAPPED.match(text)
    return (wrapped["fence"] or wrapped["quote"] or "").strip() if wrapped else text


def _unquoted(text: str) -> str:
    return _single_blanks(_QUOTED.sub(" ", text))


def _single_blanks(text: str) -> str:
    return re.sub(r" ?\n\s*", "\n", re.sub(r"[^\S\n]+", " ", text))


def _last_line(text: str) -> str:
    return text.strip().rpartition("\n")[2]


def _objects(text: str, keys: tuple[str, ...] = _SCORE_KEYS, *, whole: bool = False, judged: str = "") -> Iterator[Any]:
    """What JSON objects say under one of the keys: the reply as a whole, or objects in it, the last one first.

    Args:
        judged: objects that stand in this are no statements of the judge.
    """
    for candidate in [text] if whole else _braced(text):
        if judged and candidate in judged:
            continue
        try:
            value = json.loads(candidate)
        except (ValueError, RecursionError):
            continue
        if isinstance(value, dict):
            lowered = {str(key).lower(): said for key, said in value.items()}
            yield from (lowered[key] for key in keys if key in lowered)


def _braced(text: str, most: int = 20) -> Iterator[str]:
    """Stretches from a brace to the next that closes, the last first; few, as each costs a reading."""
    end = text.rfind("}")
    while end >= 0 and most > 0:
        start = text.rfind("{", 0, end)
        if start < 0:
            return
        yield text[start : end + 1]
        end, most = text.rfind("}", 0, start), most - 1
