"""Rows as a model reads them: item -> tokens, each trained or masked, the stop token too."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rich.text import Text

from alignlab.conversation import Template
from alignlab.data.batches import fit
from alignlab.data.parts import Item
from alignlab.types import Labelled, Pair, Prompt, Row

TRAINED, MASKED, STOP = ("black on green", "black on bright_green"), ("dim", "none"), "white on red"
"""Styles; neighbouring tokens take turns, so that each is seen."""
OPEN, CLOSE, END = "‹", "›", "■"
"""What stands around trained tokens, and for the stop token, where there are no colours."""
LEGEND = f"trained tokens stand between {OPEN} and {CLOSE}, {END} is the stop token; all others are masked"
NEWLINE = "↵"


@dataclass(frozen=True, kw_only=True)
class Shown:
    """One row: `title`, its tokens as pieces of text, and how many of them come first and are masked."""

    title: str
    pieces: tuple[str, ...]
    num_masked: int
    stops: bool
    """Whether the last token is a stop token."""

    @property
    def num_trained(self) -> int:
        return len(self.pieces) - self.num_masked


def shown(item: Item, template: Template, max_prompt_tokens: int, max_completion_tokens: int) -> list[Shown]:
    """The rows of an item within the limits: two of a pair, one of anything else."""
    prompt = item if isinstance(item, Prompt) else item.prompt
    if isinstance(item, Prompt):
        ids = template.encode_prompt(prompt)
        return [Shown(title=f"{prompt.id} (prompt)", pieces=pieces(ids, template), num_masked=len(ids), stops=False)]
    texts = {"chosen": item.chosen, "rejected": item.rejected} if isinstance(item, Pair) else {"": item.completion}
    if isinstance(item, Labelled):
        texts = {"desirable" if item.label else "undesirable": item.completion}
    return [
        _row(f"{prompt.id} ({name})" if name else prompt.id, template.row(prompt, text), template,
             max_prompt_tokens, max_completion_tokens)
        for name, text in texts.items()
    ]  # fmt: skip


def _row(title: str, row: Row, template: Template, max_prompt_tokens: int, max_completion_tokens: int) -> Shown:
    fitting = fit(row, max_prompt_tokens, max_completion_tokens)
    if fitting is None:
        title += f": left out, its prompt has {len(row.prompt_ids)} tokens, the limit is {max_prompt_tokens}"
    elif fitting != row:
        title += f": cut from {len(row.completion_ids)} to {max_completion_tokens} completion tokens"
    kept = fitting or row
    return Shown(
        title=title,
        pieces=pieces(kept.prompt_ids, template) + pieces(kept.completion_ids, template),
        num_masked=len(kept.prompt_ids) if fitting is not None else len(kept),
        stops=fitting is not None and kept.completion_ids[-1:] != () and kept.completion_ids[-1] in template.stop_ids,
    )


def pieces(ids: Sequence[int], template: Template) -> tuple[str, ...]:
    """Each token's own text; a character of several tokens is shown with its last one."""
    decode = template.tokenizer.decode
    before = list(ids[:1])  # a leading space is lost at the beginning of a text, so no token is decoded there
    empty = _decoded(decode, before)
    found: list[str] = []
    waiting: list[int] = []
    for i in ids:
        waiting.append(i)
        text = _decoded(decode, [*before, *waiting]).removeprefix(empty)
        if text.endswith("\N{REPLACEMENT CHARACTER}") and len(waiting) < 4:
            found.append("")
            continue
        found.append(text)
        waiting = []
    return tuple(found)


def _decoded(decode: object, ids: Sequence[int]) -> str:
    assert callable(decode)
    return str(decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))


def coloured(row: Shown) -> Text:
    """The row for a terminal."""
    text = Text()
    for i, piece in enumerate(row.pieces):
        trained = i >= row.num_masked
        style = STOP if row.stops and i == len(row.pieces) - 1 else (TRAINED if trained else MASKED)[i % 2]
        text.append(_visible(piece, trained), style=style)
    return text


def plain(row: Shown) -> str:
    """The row without colours."""
    masked, trained = row.pieces[: row.num_masked], row.pieces[row.num_masked :]
    end = ""
    if row.stops:
        trained, end = trained[:-1], f"{row.pieces[-1]}{END}"
    said = "".join(masked)
    return said + (f"{OPEN}{_escaped(trained)}{end}{CLOSE}" if row.num_trained else "")


def _escaped(trained: Iterable[str]) -> str:
    """Marks in what people wrote are doubled, so that none is taken for one of ours."""
    said = "".join(trained)
    for mark in (OPEN, CLOSE, END):
        said = said.replace(mark, mark * 2)
    return said


def _visible(piece: str, trained: bool) -> str:
    return piece.replace("\n", f"{NEWLINE}\n") if trained else piece
