"""A trained encoder's score and plain rules together.

completion -> rules: toxicity, length, repetition -> h <= 0; prompt, completion -> trained encoder -> m, normalised;
reward = clip(alpha h + beta m, -clip, clip).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from alignlab.errors import UserError
from alignlab.rewards import Detailed, _encoder
from alignlab.rewards._encoder import train_encoder
from alignlab.rewards.toxicity import toxic_probabilities
from alignlab.types import Completion, Prompt

FILES = ("model", "toxicity_model")
ONLY_HOW = ("device",)
__all__ = ["hybrid", "train_encoder"]


def hybrid(
    prompts: Sequence[Prompt],
    completions: Sequence[Completion],
    *,
    kind: Literal["hybrid", "heuristic", "trainable"] = "hybrid",
    model: str = "",
    alpha: float = 0.5,
    beta: float = 0.5,
    toxicity_model: str = "",
    toxicity_label: str = "",
    toxicity_threshold: float = 0.3,
    toxicity_weight: float = 0.5,
    shortest: int = 20,
    longest: int = 1000,
    length_penalty: float = 0.1,
    least_unique: float = 0.5,
    repetition_penalty: float = 0.1,
    clip: float = 10.0,
    device: str = "auto",
) -> list[float | None]:
    """alpha x heuristics + beta x model, within +-clip; `heuristic` and `trainable` are one of the two, unweighted.

    h = - toxicity_weight x p where p, the probability that the completion is toxic, is above its threshold;
        - length_penalty for fewer than `shortest` or more than `longest` characters;
        - repetition_penalty where fewer than `least_unique` of the words are distinct (case is ignored).
    m = score of the trained encoder, in standard deviations of the completions it was trained on, whose mean is 0.
    Both are fixed: normalising each phase's scores anew would take away the scale that the rules are on.

    Applies to every prompt. The parts are logged: `reward/hybrid/toxicity` and so on.

    Args:
        model: folder of an encoder trained by `alignlab reward encoder`; none other is used.
        toxicity_model: as `model` of the reward `toxicity`, and `toxicity_label` as its `label`.

    Raises:
        UserError: the model is missing, untrained, or named where none is used.
        ValueError: a number is out of range.
    """
    least = (toxicity_weight, length_penalty, repetition_penalty, shortest, longest - shortest, alpha, beta)
    if min(least) < 0 or not (0 <= toxicity_threshold < 1 and 0 <= least_unique <= 1 and clip > 0):
        raise ValueError(
            "rewards.hybrid: needs weights, penalties and shortest >= 0, longest >= shortest, toxicity_threshold and "
            "least_unique in [0, 1], clip > 0"
        )
    if (kind == "heuristic") != (not model):
        raise UserError(
            f"hybrid: kind {kind} needs `model`, the folder of a trained encoder (`alignlab reward encoder` trains one)"
            if not model
            else "hybrid: kind heuristic uses no `model`; drop one of the two"
        )
    texts = [completion.text for completion in completions]
    parts: list[dict[str, float]] = [{} for _ in texts]
    if kind != "trainable":
        toxic = toxic_probabilities(texts, toxicity_model, toxicity_label, device)
        for part, text, p in zip(parts, texts, toxic, strict=True):
            part["toxicity"] = -toxicity_weight * p if p > toxicity_threshold else 0.0
            part["length"] = 0.0 if shortest <= len(text) <= longest else -length_penalty
            part["repetition"] = -repetition_penalty if unique_fraction(text) < least_unique else 0.0
    totals = [sum(part.values()) for part in parts]
    if kind != "heuristic":
        _encoder.check(model)
        found = _encoder.scores(_encoder.load(model, device), prompts, texts) if texts else []
        for i, score in enumerate(found):
            parts[i]["model"] = score
            totals[i] = score if kind == "trainable" else alpha * totals[i] + beta * score
    return [Detailed(min(clip, max(-clip, total)), part) for total, part in zip(totals, parts, strict=True)]


def applies(prompt: Prompt, **_: object) -> bool:
    """Whether completions of this prompt are judged: all are."""
    return True


def unique_fraction(text: str) -> float:
    """Distinct / all words, in (0, 1]; 1 for no words."""
    words = text.lower().split()
    return len(set(words)) / len(words) if words else 1.0
