"""Small changes to an answer that should hardly change its score; (text, seed) -> text.

Four kinds: synonyms, sentence order, whitespace, truncation. Each is a pure function of text and seed, and each leaves
what carries the answer alone: tags, the content of <answer>, numbers, and code keep their wording and their order.
"""

from __future__ import annotations

import random
import re
from bisect import bisect_left
from collections.abc import Callable, Mapping
from dataclasses import dataclass

_PAIRS = """
    able/capable about/roughly additionally/furthermore afterwards/later aid/help allow/permit also/too
    although/though amount/quantity answer/reply anyway/regardless ask/request assist/help attempt/try big/large
    brief/short buy/purchase careful/cautious carefully/cautiously care/caution change/alter cheap/inexpensive
    choose/pick clear/plain clearly/plainly close/near comprehend/understand correct/right crime/offence
    difficult/hard discuss/talk doctor/physician easy/simple end/finish enough/sufficient error/mistake fast/quick
    finally/lastly first/firstly frequently/often gather/collect get/obtain give/provide glad/happy goal/aim
    good/fine great/excellent harm/hurt however/nevertheless huge/enormous idea/thought ill/sick illness/disease
    important/essential improve/better keep/retain kind/sort leave/depart maybe/perhaps medicine/medication
    method/way need/require nice/pleasant now/currently only/merely option/choice pain/ache people/persons
    person/individual place/spot problem/issue quickly/swiftly rarely/seldom really/truly reason/cause remain/stay
    reports/states result/outcome safe/secure say/state see/notice several/some show/display sometimes/occasionally
    soon/shortly sorry/regretful speak/talk start/begin stop/halt strange/odd sure/certain takes/uses tell/inform
    therefore/thus thing/item think/believe total/sum unable/incapable unfortunately/regrettably usually/normally
    very/highly whole/entire wrong/incorrect
"""
SYNONYMS: Mapping[str, str] = {
    word: other for pair in reversed(_PAIRS.split()) for word, other in (pair.split("/"), reversed(pair.split("/")))
}
"""Word -> another that says nearly the same in most places; of a word in several pairs the first counts."""

Perturbation = Callable[[str, random.Random], str]


@dataclass(frozen=True, slots=True)
class Piece:
    """A stretch of a text."""

    text: str
    protected: bool


# Repeats are bounded, so that no text takes long.
_NAME = r"\b\w[\w.]{0,60}"
_ROUND, _SQUARE, _CURLY = r"\((?:[^()\n]|\([^()\n]{0,60}\)){0,200}\)", r"\[[^\[\]\n]{0,200}\]", r"\{[^{}\n]{0,200}\}"
_OPERAND = rf"(?:(?:{_NAME})?(?:{_ROUND}|{_SQUARE}|{_CURLY})|\b\w(?:[\w.]{{0,60}}\w)?)"
_SIGN = r"(?:[=!<>]=|\*\*|//|[-+*/=<>^]|%(?= ?\d))"
_OPERATOR = rf"(?: {_SIGN} |{_SIGN})"
_PROTECTED = re.compile(
    r"(?s:```.*?(?:```|\Z)|<answer\b[^<>]*>.*?(?:</answer>|\Z))"  # whole, over several lines
    r"|<[^<>\s][^<>\n]*>|`[^`\n]+`"  # a tag, a word of code
    r"|^[ \t]*(?:(?:def|class|for|if|while|with|try|else)\b[^\n]*:|(?:return|import)\b[^\n]*|[^\n]*[{};])[ \t]*$"
    r"|\blambda\b[^\n]*"
    rf"|{_OPERAND}(?:{_OPERATOR}{_OPERAND})+"  # a formula: 17 - 9 = 8, sum(xs) / n
    rf"|{_NAME}{_ROUND}|(?:{_NAME})?{_SQUARE}|{_CURLY}"  # max(xs), xs[0], [1, 2], {1}
    r"|[-+$€£#]?\d+(?:[.,:/]\d+)*(?:\s?[%°])?",  # a number
    re.IGNORECASE | re.MULTILINE,
)
_END = re.compile(r"[.!?]+[\"')\]]*(?=\s|\Z)|\n")
_ABBREVIATION = re.compile(r"\b(?:e\.g|i\.e|etc|dr|mr|mrs|ms|prof|vs|approx|fig)\.\Z", re.IGNORECASE)
_GAPLESS = re.compile(r"\S+")
_WORD = re.compile(r"[^\W\d_]+(?:['’][^\W\d_]+)?")


def pieces(text: str) -> list[Piece]:
    """The text cut into protected and free stretches, in order; joined again they are the text."""
    cut, end = [], 0
    for found in _PROTECTED.finditer(text):
        if found.start() > end:
            cut.append(Piece(text[end : found.start()], False))
        if found[0]:
            cut.append(Piece(found[0], True))
        end = max(end, found.end())
    return [*cut, Piece(text[end:], False)] if end < len(text) else cut


def protected(text: str) -> list[str]:
    """What no perturbation changes, in order: tags, answers, code, numbers."""
    return [piece.text for piece in pieces(text) if piece.protected]


# ---- the perturbations -----------------------------------------------------------------------------------------------


def synonyms(text: str, dice: random.Random) -> str:
    """Half of the words that the table knows, and at least one of them, each by its synonym in the same case."""

    def known(piece: str) -> list[re.Match[str]]:
        return [found for found in _WORD.finditer(piece) if found[0].lower() in SYNONYMS]

    return _replaced(text, known, lambda found: _in_case_of(found[0], SYNONYMS[found[0].lower()]), 0.5, dice)


def whitespace(text: str, dice: random.Random) -> str:
    """A fifth of the gaps between words, and at least one, doubled."""

    def gaps(piece: str) -> list[re.Match[str]]:
        return list(re.finditer(r"(?<=\S)[ \t]+(?=\S)|(?<=\S)[ \t]+\Z|\A[ \t]+(?=\S)", piece))

    return _replaced(text, gaps, lambda found: found[0] * 2, 0.2, dice)


def sentence_order(text: str, dice: random.Random) -> str:
    """The sentences in another order; those with something protected in them stay where they are."""
    spans, free = _sentences(text)
    shuffled = list(free)
    dice.shuffle(shuffled)
    if len(free) > 1 and shuffled == free:
        shuffled = free[1:] + free[:1]
    taken = dict(zip(free, shuffled, strict=True))
    built, at = "", 0
    for i, (start, end) in enumerate(spans):
        built += text[at:start] + text[slice(*spans[taken.get(i, i)])]
        at = end
    return built + text[at:]


def truncation(text: str, dice: random.Random) -> str:
    """Without the last sentence that holds nothing protected; one sentence alone loses the last tenth of its words."""
    spans, free = _sentences(text)
    if not free:
        return text
    last, (start, end) = free[-1], spans[free[-1]]
    if len(spans) > 1:
        return text[: spans[last - 1][1]] + text[end:] if last else text[:start] + text[end:].lstrip()
    words = list(_GAPLESS.finditer(text, start, end))
    kept = len(words) - max(1, round(len(words) / 10))
    return text[: words[kept - 1].end()] + text[end:] if kept > 0 else text


PERTURBATIONS: Mapping[str, Perturbation] = {
    "synonyms": synonyms,
    "sentence_order": sentence_order,
    "whitespace": whitespace,
    "truncation": truncation,
}


def perturb(name: str, text: str, seed: int = 0) -> str:
    """The text under one of `PERTURBATIONS`, the same for the same text and seed.

    It is unchanged where there is nothing to change, or where the change would touch what is protected.

    Raises:
        KeyError: there is no such perturbation.
    """
    changed = PERTURBATIONS[name](text, random.Random(f"{seed}/{name}/{text}"))
    return changed if protected(changed) == protected(text) else text


# ---- parts -----------------------------------------------------------------------------------------------------------


def _replaced(
    text: str,
    candidates: Callable[[str], list[re.Match[str]]],
    replacement: Callable[[re.Match[str]], str],
    share: float,
    dice: random.Random,
) -> str:
    """Some of the candidates in the free pieces of a text replaced: each with that probability, and at least one."""
    cut = pieces(text)
    found = [(i, match) for i, piece in enumerate(cut) if not piece.protected for match in candidates(piece.text)]
    chosen = {place for place in range(len(found)) if dice.random() < share}
    if found and not chosen:
        chosen = {dice.randrange(len(found))}
    texts = [piece.text for piece in cut]
    for place in sorted(chosen, reverse=True):  # from the back, so that earlier positions stay right
        i, match = found[place]
        texts[i] = texts[i][: match.start()] + replacement(match) + texts[i][match.end() :]
    return "".join(texts)


def _in_case_of(model: str, word: str) -> str:
    if model.isupper() and len(model) > 1:
        return word.upper()
    return word.capitalize() if model[:1].isupper() else word


def _sentences(text: str) -> tuple[list[tuple[int, int]], list[int]]:
    """Where sentences (or lines) begin and end, whitespace lying between them; and which hold nothing protected."""
    blocks = [found.span() for found in _PROTECTED.finditer(text)]
    starts = [start for start, _ in blocks]

    def touches(start: int, end: int) -> bool:
        before = bisect_left(starts, end) - 1
        return before >= 0 and start < blocks[before][1]

    ends = [
        found.end()
        for found in _END.finditer(text)
        if not touches(found.start(), found.start() + 1)
        and not _ABBREVIATION.search(text, max(0, found.end() - 8), found.end())
    ]
    spans, at = [], 0
    for end in [*ends, len(text)]:
        sentence = text[at:end]
        if sentence.strip():
            spans.append((end - len(sentence.lstrip()), at + len(sentence.rstrip())))
        at = end
    return spans, [i for i, span in enumerate(spans) if not touches(*span)]
