"""One answer at a time: prompts and completions -> scores in [0, 1], None where the judge's reply gives none."""

from __future__ import annotations

from collections.abc import Sequence

from alignlab.judge.client import Client
from alignlab.judge.parsing import parse_score
from alignlab.judge.prompts import HIGH, LOW, graded, shortened
from alignlab.types import Completion, Prompt


def grade(
    client: Client,
    prompts: Sequence[Prompt],
    completions: Sequence[Completion | str],
    *,
    rubric: str | Sequence[str | None] | None = None,
    reference: str | Sequence[str | None] | None = None,
) -> list[float | None]:
    """Asks a judge for a score of each completion.

    Args:
        rubric: what to grade by, in words: one criterion for all completions, or one for each; None = how well it
            serves the user.
        reference: a good answer to show the judge, for all or for each.

    Raises:
        UserError: the client cannot go on (see `ChatClient.complete`).
        ValueError: as many prompts, completions, rubrics and references as needed are not there.
    """
    texts = [completion if isinstance(completion, str) else completion.text for completion in completions]
    rubrics, references = _each(rubric, len(texts)), _each(reference, len(texts))
    rows = list(zip(prompts, texts, rubrics, references, strict=True))
    replies = client.complete([graded(p, text, rubric=r, reference=known) for p, text, r, known in rows])
    found = []
    for (prompt, text, _, _), reply in zip(rows, replies, strict=True):
        judged = "\n".join([*(message.content for message in prompt.messages), shortened(text)])
        score = parse_score(reply, LOW, HIGH, judged=judged)
        found.append(None if score is None else (score - LOW) / (HIGH - LOW))
    return found


def _each(value: str | Sequence[str | None] | None, count: int) -> list[str | None]:
    if value is None or isinstance(value, str):
        return [value] * count
    if len(value) != count:
        raise ValueError(f"{len(value)} rubrics or references for {count} completions: give one for all, or one each")
    return list(value)
