"""Text made comparable: any text -> plain lower-case text -> sentences and words.

Only the beginning and the end of a long text are read, so that time does not grow with its length.
"""

from __future__ import annotations

import re

HEAD, TAIL = 6000, 1500
"""Characters read from the beginning and from the end."""

_QUOTES = str.maketrans({"’": "'", "‘": "'", "`": "'", "“": '"', "”": '"', "«": '"', "»": '"', "\u00a0": " "})
_SENTENCE = re.compile(r"(?<=[.!?:])[\"')*]*\s+|\n+")
_WORD = re.compile(r"[a-z0-9']+")
_CODE = re.compile(r"'''.*?(?:'''|\Z)", re.DOTALL)
_QUOTED = re.compile(r"\"[^\"\n]{6,400}\"")


def plain(text: str) -> str:
    """Lower case, straight quotes, code blocks as the word `codeblock`; head and tail only."""
    if len(text) > HEAD + TAIL:
        text = f"{text[:HEAD]}\n{text[-TAIL:]}"
    return _CODE.sub(" codeblock ", text.translate(_QUOTES).lower())


def require_text(where: str, **arguments: object) -> None:
    """Says which argument is no text.

    Raises:
        TypeError: one is none.
    """
    for name, value in arguments.items():
        if not isinstance(value, str):
            raise TypeError(f"{where}: {name} is {type(value).__name__}, needed is text")


def unquoted(text: str) -> str:
    """The plain text with what stands in quotation marks as the word `quotedtext`, unless all of it does."""
    stripped = _QUOTED.sub(" quotedtext ", text)
    return stripped if len(words(stripped)) > 4 else text


def sentences(text: str) -> list[str]:
    """Sentences and lines that have a word in them."""
    return [piece.strip() for piece in _SENTENCE.split(text) if piece and _WORD.search(piece)]


def words(text: str) -> list[str]:
    """Words of letters, digits and apostrophes."""
    return _WORD.findall(text)
