"""A penalty on toxic answers.

completion text -> a trained classifier -> probability of being toxic -> minus that, where it is above the threshold.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from alignlab.errors import UserError
from alignlab.models.store import read_json
from alignlab.rewards import _texts
from alignlab.types import Completion, Prompt

FILES = ("model",)
ONLY_HOW = ("device",)
LABELS = ("toxic", "toxicity")
"""What the label is called, in any case, where `label` does not say."""


def toxicity(
    prompts: Sequence[Prompt],
    completions: Sequence[Completion],
    *,
    model: str = "",
    label: str = "",
    threshold: float = 0.0,
    device: str = "auto",
) -> list[float | None]:
    """Minus the probability that the completion is toxic; 0 where that is not above `threshold`. Applies to all.

    Only what was said counts, not what was asked. A long text is read in windows, and the worst one counts.

    Args:
        model: a text classifier of `transformers`, as a folder or hub id; empty = the small one that alignlab brings.
        label: which of its labels; empty = the one called toxic or toxicity.

    Raises:
        UserError: the model or the label is not there.
        ValueError: unless 0 <= threshold < 1.
    """
    if not 0 <= threshold < 1:
        raise ValueError(f"rewards.toxicity: needs 0 <= threshold < 1, got {threshold}")
    found = toxic_probabilities([completion.text for completion in completions], model, label, device)
    return [-p if p > threshold else 0.0 for p in found]


def applies(prompt: Prompt, **_: object) -> bool:
    """Whether completions of this prompt are judged: all are."""
    return True


def toxic_probabilities(texts: Sequence[str], model: str = "", label: str = "", device: str = "auto") -> list[float]:
    """Probability of being toxic, of each text; 0 for one that says nothing. Without texts the names are checked."""
    if not model and label:
        raise UserError("toxicity: `label` is of a `model`; name one, or drop it")
    where = _texts.find(model) if model else ""
    if where and not texts:
        if Path(where).is_dir():
            label_number(where, label, read_json(Path(where) / "config.json").get("id2label") or {})
        return []
    saying = [i for i, text in enumerate(texts) if text.strip()]
    found = [0.0] * len(texts)
    if not where:
        from alignlab.classifiers import toxicity as shipped

        values: Sequence[float] = shipped([texts[i] for i in saying]) if saying else []
    else:
        reader = _texts.read(where, "classifier", device)
        values = _texts.probabilities(reader, [texts[i] for i in saying], _number(where, label, device))
    for i, value in zip(saying, values, strict=True):
        found[i] = float(value)
    return found


@lru_cache(maxsize=8)
def _number(where: str, label: str, device: str) -> int:
    return label_number(where, label, _texts.read(where, "classifier", device).model.config.id2label)


def label_number(model: str, label: str, names: dict[Any, str]) -> int:
    """The number of a label among those of a classifier.

    Raises:
        UserError: there is none of that name, with those there are.
    """
    wanted = (label.lower(),) if label else LABELS
    numbers = [int(number) for number, name in names.items() if name.lower() in wanted]
    if len(numbers) != 1:
        there = ", ".join(names.values()) or "none named in its config.json"
        asked = f"no label {label!r}" if label else "no label called toxic or toxicity"
        raise UserError(f"model {model!r}: {asked}; name one of its labels with `label`: {there}")
    return numbers[0]
