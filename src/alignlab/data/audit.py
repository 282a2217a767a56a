"""Data looked over before anything is trained on them: parts -> lengths, duplicates, ties, overlaps.

Lengths are counted in tokens of a model's tokenizer, against the limits that a recipe would set.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from alignlab.conversation import Template
from alignlab.data.batches import fit
from alignlab.data.overlap import NGRAMS, near_duplicates, normalise, shared_ngrams, words
from alignlab.data.parts import Part, completions_of, prompt_of
from alignlab.types import Pair, Prompt

QUANTILES = {"min": 0.0, "median": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}


@dataclass(frozen=True, kw_only=True)
class Audit:
    """What was found; every count is of rows."""

    parts: tuple[Mapping[str, Any], ...]
    overlaps: tuple[Mapping[str, Any], ...]
    limits: Mapping[str, int]

    def to_json(self) -> dict[str, Any]:
        return {"schema": 1, "limits": dict(self.limits), "parts": [*self.parts], "overlaps": [*self.overlaps]}


def audit(
    parts: Sequence[Part],
    template: Template,
    max_prompt_tokens: int,
    max_completion_tokens: int,
    *,
    card: Mapping[str, Any] | None = None,
) -> Audit:
    """Looks over every part, and over each split against train.

    `card`: the overlaps that `prepare` counted in these very rows. Their n-grams are of what the authors wrote alone,
    which the rows no longer tell from the words that the task put around it; so they stand where they are given.
    """
    limits = {"max_prompt_tokens": max_prompt_tokens, "max_completion_tokens": max_completion_tokens}
    return Audit(
        parts=tuple(audit_part(part, template, max_prompt_tokens, max_completion_tokens) for part in parts),
        overlaps=tuple(_overlaps(parts, card or {})),
        limits=limits,
    )


def audit_part(part: Part, template: Template, max_prompt_tokens: int, max_completion_tokens: int) -> dict[str, Any]:
    """Counts of one part.

    `identical_after_truncation`: pairs whose rows are the same ids within the limits, so that they teach nothing.
    `ties`: pairs of equal scores. `chosen_longer`: share of pairs whose chosen answer has more tokens; far from one
    half, length alone tells the two apart.
    """
    prompts = [template.encode_prompt(prompt_of(item)) for item in part.items]
    answers = [
        [template.encode_completion(text, chat=bool(prompt_of(item).messages)) for text in completions_of(item)]
        for item in part.items
    ]
    flat = [ids for texts in answers for ids in texts]
    too_long = [len(ids) > max_prompt_tokens for ids in prompts]
    keys = [_key(prompt_of(item), item) for item in part.items]
    whole = Counter((key, completions_of(item), getattr(item, "label", None)) for key, item in zip(keys, part.items,
                                                                                              strict=True))  # fmt: skip
    found: dict[str, Any] = {
        "file": part.name,
        "split": part.split,
        "kind": part.kind,
        "rows": part.rows,
        "usable": len(part.items),
        "dropped": dict(part.dropped),
        "prompt_tokens": quantiles([len(ids) for ids in prompts]),
        "completion_tokens": quantiles([len(ids) for ids in flat]),
        "prompts_too_long": sum(too_long),
        "completions_cut": sum(len(ids) > max_completion_tokens for ids in flat),
        "without_completion": sum(isinstance(item, Prompt) for item in part.items),
        "duplicate_rows": len(part.items) - len(whole),
        "repeated_prompts": len(keys) - len(set(keys)),
        "near_duplicate_prompts": len(near_duplicates(list(dict.fromkeys(keys)))),
    }
    if part.kind == "pairs":
        found |= _of_pairs(part, template, max_prompt_tokens, max_completion_tokens, answers)
    return found


def _of_pairs(
    part: Part, template: Template, max_prompt: int, max_completion: int, answers: Sequence[Sequence[tuple[int, ...]]]
) -> dict[str, Any]:
    same = 0
    for item in part.items:
        assert isinstance(item, Pair)
        chosen, rejected = (
            fit(template.row(item.prompt, text), max_prompt, max_completion) for text in completions_of(item)
        )
        same += chosen is not None and chosen == rejected
    scored = [scores for scores in part.scores if scores is not None]
    longer = [len(chosen) > len(rejected) for chosen, rejected in answers if len(chosen) != len(rejected)]
    return {
        "identical_after_truncation": same,
        "scored": len(scored),
        "ties": sum(chosen == rejected for chosen, rejected in scored),
        "chosen_longer": float(np.mean(longer)) if longer else None,
        "equal_length": len(answers) - len(longer),
    }


def quantiles(lengths: Sequence[int]) -> dict[str, float]:
    """Lower quantiles: each is a length that occurs. Empty where there are no lengths."""
    if not lengths:
        return {}
    return {name: int(np.quantile(lengths, q, method="lower")) for name, q in QUANTILES.items()}


def _key(prompt: Prompt, item: object) -> str:
    """What a row asks, normalised and without a system message; of plain text all of it."""
    said = [normalise(message.content) for message in prompt.messages if message.role != "system"]
    return "\n".join(said) if prompt.messages else normalise(getattr(item, "completion", ""))


def _overlaps(parts: Sequence[Part], card: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Train against validation and test, over all kinds of rows at once, and validation against test.

    `exact` and `near` are of distinct prompts, those that are equal not counted as near too.
    """
    keys: dict[str, list[str]] = {}
    for part in parts:
        keys.setdefault(part.split, []).extend(_key(prompt_of(item), item) for item in part.items)
    found = []
    for one, other in (("train", "validation"), ("train", "test"), ("validation", "test")):
        if one not in keys or other not in keys:
            continue
        before, after = list(dict.fromkeys(keys[one])), list(dict.fromkeys(keys[other]))
        split = {name: [words(key) for key in some] for name, some in ((one, before), (other, after))}
        told: dict[str, Any] = {"of": other, "in": one, "prompts": len(after)}
        told["exact"] = len(set(before) & set(after))
        known = set(before)
        near = near_duplicates([*before, *(key for key in after if key not in known)])
        told["near"] = len({j for i, j in near if i < len(before) <= j})
        counted = card.get(other, {})
        counted = counted if one == "train" else counted.get(f"with_{one}", {})
        for n in NGRAMS:
            known_rows = counted.get(f"{n}-gram", {}).get("rows")
            told[f"{n}-gram"] = shared_ngrams(split[one], split[other], n).rows if known_rows is None else known_rows
        found.append(told)
    return found
