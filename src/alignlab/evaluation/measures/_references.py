"""Measures against references where there are some: answers -> values, None for completions without a reference."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from alignlab.evaluation.measures import Answers, Values


def on_references(
    answers: Answers, measure: Callable[[list[str], list[str]], Mapping[str, Sequence[float]]]
) -> dict[str, Values]:
    """Calls `measure(texts, references)` on the completions that have a reference."""
    pairs = zip(answers.texts, answers.references, strict=True)
    here = [(i, text, reference) for i, (text, reference) in enumerate(pairs) if reference]
    found = measure([text for _, text, _ in here], [reference for _, _, reference in here]) if here else {}
    result: dict[str, Values] = {}
    for name, values in found.items():
        by_place: list[float | None] = [None] * len(answers)
        for (i, _, _), value in zip(here, values, strict=True):
            by_place[i] = value
        result[name] = by_place
    return result
