"""The examination of a reward model: judge and held-out pairs -> measures -> a verdict with its reasons.

Three things decide whether it is fit for RL: accuracy, calibration (document 001 of the project: at least .70 and below
.1) and that a score does not depend on the batch it is computed in. Everything else is said as a warning.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from alignlab.conversation import Template
from alignlab.data import collate, fit, order, plan_microbatches
from alignlab.doctor.measures import (
    Accuracy,
    Calibration,
    Invariance,
    LengthBias,
    Margins,
    Normalisation,
    Robustness,
    accuracies,
    calibration,
    length_bias,
    margin_histogram,
    normalisation,
    robustness,
)
from alignlab.doctor.perturbations import PERTURBATIONS, perturb
from alignlab.errors import UserError
from alignlab.pipeline.rewards import FIT, UNFIT
from alignlab.rollout import Limits
from alignlab.statistics.aggregates import FloatArray
from alignlab.types import Batch, Pair, Row

LEAST_ACCURACY = 0.70
"""Below this a reward model is not fit for RL (document 001)."""
MOST_ERROR = 0.10
"""An expected calibration error of this much, that no temperature brings below it, is not fit for RL (document 001)."""
LENGTH_LIMIT = 0.30
"""Correlations with length beyond this are flagged."""
STABILITY_LIMIT = 0.80
"""Perturbations that keep the meaning and leave a stability below this are flagged."""
MEAN_LIMIT, SD_LIMITS = 0.35, (0.7, 1.4)
"""Normalised scores of fresh reference outputs: about four standard errors of 128 of them against 128 others."""
KEEP_MEANING = ("synonyms", "sentence_order", "whitespace")
MOST_PERTURBED = 200
"""Pairs that are perturbed; all pairs are scored."""
INVARIANCE_ROWS = 32
"""Rows, of all lengths, that are scored in several kinds of batch."""


@dataclass(frozen=True, kw_only=True)
class Judge:
    """A reward model as the doctor sees it."""

    score: Callable[[Batch], Tensor]
    """A batch -> (B,) normalised scores."""
    template: Template
    limits: Limits
    scale: float = 1.0
    """Raw score units in one normalised unit."""
    tolerance: float = 1e-4
    """How far a score may move with its batch, in normalised units: 1e-4 in float32."""
    device: str = "cpu"


@dataclass(frozen=True, kw_only=True)
class ScoredPair:
    """One pair as it was scored."""

    prompt_id: str
    task: str
    chosen: float
    rejected: float
    chosen_tokens: int
    """Of the completion, stop token included."""
    rejected_tokens: int


@dataclass(frozen=True, kw_only=True)
class Examination:
    """What was found; the content of doctor.json but for where it was found."""

    verdict: str
    reasons: tuple[str, ...]
    """Why it is not fit for RL; empty where it is."""
    warnings: tuple[str, ...]
    """What does not decide, but should be known."""
    seed: int
    prompts: int
    """Different prompts among the pairs."""
    left_out: int
    """Pairs that do not fit the run's limits, or are the same within them."""
    accuracy: tuple[Accuracy, ...]
    """Of all pairs first, then by task and by the category that the data name."""
    calibration: Calibration
    margins: Margins
    length: LengthBias
    invariance: Invariance
    normalisation: Normalisation | None
    perturbations: dict[str, Robustness]
    pairs: tuple[ScoredPair, ...]

    @property
    def fit(self) -> bool:
        return self.verdict == FIT


def examine(
    judge: Judge,
    pairs: Sequence[Pair],
    *,
    reference: Sequence[Row] = (),
    seed: int = 0,
    say: Callable[[str], None] = lambda line: None,
) -> Examination:
    """Examines a judge on held-out pairs.

    Args:
        reference: fresh completions by the policy that the reward model was normalised on; none: not checked.
        seed: of the orientation of pairs, the halves, and the perturbations.
        say: is told what is being done, as it may take a while.

    Raises:
        UserError: fewer than two pairs fit, or they have a single prompt, or a score is not a finite number.
    """
    rows, kept = _fitting(pairs, judge)
    prompts = _prompt_numbers(kept)
    num_prompts = len(np.unique(prompts))
    if num_prompts < 2:
        raise UserError(
            f"{len(kept)} of {len(pairs)} pairs fit the run's limits, with {num_prompts} different prompts; at least "
            "2 are needed, and some hundred to say anything"
        )
    say(f"scoring {2 * len(kept)} completions")
    scores = _score(judge, [row for pair in rows for row in pair]).reshape(-1, 2)
    lengths = np.array([[len(row.completion_ids) for row in pair] for pair in rows], dtype=np.float64)
    margins = scores[:, 0] - scores[:, 1]
    say("scoring them in other batches")
    invariance = _invariance(judge, [row for pair in rows for row in pair])
    say("scoring them with small changes")
    few = sorted(order(len(kept), seed, 0)[:MOST_PERTURBED])
    perturbed = {name: _robustness(judge, [kept[i] for i in few], scores[few], name, seed) for name in PERTURBATIONS}
    found_accuracy = accuracies(margins, _groups(kept))
    found_calibration = calibration(margins * judge.scale, prompts, seed)
    bias = length_bias(scores, lengths, prompts)
    found_normalisation = normalisation(_score(judge, reference)) if len(reference) > 1 else None
    reasons = _reasons(found_accuracy[0], found_calibration, invariance)
    return Examination(
        verdict=UNFIT if reasons else FIT,
        reasons=reasons,
        warnings=_warnings(
            found_accuracy[0], found_calibration, bias, found_normalisation, perturbed, scores, num_prompts
        ),
        seed=seed,
        prompts=num_prompts,
        left_out=len(pairs) - len(kept),
        accuracy=found_accuracy,
        calibration=found_calibration,
        margins=margin_histogram(margins),
        length=bias,
        invariance=invariance,
        normalisation=found_normalisation,
        perturbations=perturbed,
        pairs=tuple(
            ScoredPair(
                prompt_id=pair.prompt.id, task=pair.prompt.task, chosen=float(score[0]), rejected=float(score[1]),
                chosen_tokens=int(length[0]), rejected_tokens=int(length[1]),
            )
            for pair, score, length in zip(kept, scores, lengths, strict=True)
        ),
    )  # fmt: skip


# ---- what decides ----------------------------------------------------------------------------------------------------


def _reasons(accuracy: Accuracy, calibration: Calibration, invariance: Invariance) -> tuple[str, ...]:
    """Why the judge is not fit for RL, in words.

    A calibration error counts after the fitted temperature where that helps: a temperature only stretches margins, as
    normalising the scores for RL does anyway, so what it repairs does no harm there.
    """
    reasons = []
    if accuracy.value < LEAST_ACCURACY:
        reasons.append(f"accuracy {accuracy.value:.3f} is below {LEAST_ACCURACY:.2f}")
    if min(calibration.error, calibration.error_at_temperature) >= MOST_ERROR:
        reasons.append(
            f"calibration error {calibration.error:.3f}, and {calibration.error_at_temperature:.3f} at the fitted "
            f"temperature, are not below {MOST_ERROR:.2f}"
        )
    if not invariance.holds:
        worst = max(invariance.differences, key=invariance.differences.__getitem__)
        reasons.append(
            f"scores depend on the batch: {worst} moves one by {invariance.largest:.2g}, and {invariance.tolerance:g} "
            "is allowed"
        )
    return tuple(reasons)


def _warnings(
    accuracy: Accuracy,
    calibration: Calibration,
    bias: LengthBias,
    normalisation: Normalisation | None,
    perturbed: dict[str, Robustness],
    scores: FloatArray,
    num_prompts: int,
) -> tuple[str, ...]:
    found = []
    if np.ptp(scores) == 0:
        found.append("every completion gets the same score")
    if accuracy.low < LEAST_ACCURACY <= accuracy.high:
        found.append(
            f"{accuracy.pairs} pairs cannot tell whether accuracy is above {LEAST_ACCURACY:.2f}: the 95 % interval is "
            f"{accuracy.low:.3f} to {accuracy.high:.3f}"
        )
    if num_prompts < accuracy.pairs:
        found.append(f"{accuracy.pairs} pairs share {num_prompts} prompts, so the intervals of accuracy are too narrow")
    if calibration.error >= MOST_ERROR > calibration.error_at_temperature:
        found.append(
            f"margins are no log-odds: divide raw ones by {calibration.temperature:.2f} to read them as such "
            f"(calibration error {calibration.error:.3f}, then {calibration.error_at_temperature:.3f})"
        )
    if calibration.error_by_chance >= MOST_ERROR / 2:
        found.append(
            f"{calibration.held_out_pairs} held-out pairs are few: chance alone gives a calibration error of "
            f"{calibration.error_by_chance:.3f}"
        )
    for where, correlation in (("over all completions", bias.overall), ("within prompts", bias.within_prompt)):
        if abs(correlation.largest) > LENGTH_LIMIT:
            asked = f"; of the labels it is {bias.labels_within_prompt.largest:+.2f} within prompts"
            found.append(f"scores go with length: correlation {correlation.largest:+.2f} {where}{asked}")
    if normalisation is not None and not (
        abs(normalisation.mean) <= MEAN_LIMIT and SD_LIMITS[0] <= normalisation.sd <= SD_LIMITS[1]
    ):
        found.append(
            f"reference outputs score {normalisation.mean:+.2f} on average with sd {normalisation.sd:.2f}; "
            "they should have 0 and 1"
        )
    for name in KEEP_MEANING:
        stability = perturbed[name].stability
        if stability is not None and stability < STABILITY_LIMIT:
            found.append(f"{name.replace('_', ' ')} alone leaves a stability of only {stability:.2f}")
    return tuple(found)


# ---- scoring ---------------------------------------------------------------------------------------------------------


def _row(pair: Pair, text: str, judge: Judge) -> Row | None:
    row = judge.template.row(pair.prompt, text)
    return fit(row, judge.limits.max_prompt_tokens, judge.limits.max_completion_tokens)


def _fitting(pairs: Sequence[Pair], judge: Judge) -> tuple[list[tuple[Row, Row]], list[Pair]]:
    """The pairs whose two rows fit the limits and differ, as training takes them."""
    rows, kept = [], []
    for pair in pairs:
        chosen, rejected = _row(pair, pair.chosen, judge), _row(pair, pair.rejected, judge)
        if chosen is not None and rejected is not None and chosen != rejected:
            rows.append((chosen, rejected))
            kept.append(pair)
    return rows, kept


def _score(judge: Judge, rows: Sequence[Row]) -> FloatArray:
    """(N,) scores, in microbatches of similar length."""
    scores = np.full(len(rows), math.nan)
    for index in plan_microbatches([len(row) for row in rows], judge.limits.microbatch_rows):
        scores[index] = _scored(judge, collate([rows[i] for i in index], pad_id=judge.template.pad_id))
    if not np.isfinite(scores).all():
        bad = int((~np.isfinite(scores)).sum())
        raise UserError(f"the reward model gives {bad} of {len(rows)} completions no finite score; train it again")
    return scores


@torch.no_grad()
def _scored(judge: Judge, batch: Batch) -> FloatArray:
    return judge.score(batch.to(judge.device)).double().cpu().numpy()


def _invariance(judge: Judge, rows: Sequence[Row]) -> Invariance:
    """Rows of all lengths by themselves against the same rows in ragged batches, padded right, left and otherwise."""
    by_length = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    places = np.linspace(0, len(rows) - 1, min(INVARIANCE_ROWS, len(rows))).round().astype(int)
    some = [rows[by_length[i]] for i in dict.fromkeys(places.tolist())]
    mixed = [some[i] for i in order(len(some), 0, 0)]
    pad, other = judge.template.pad_id, judge.template.turn_end_id
    alone = np.concatenate([_scored(judge, collate([row], pad_id=pad)) for row in mixed])
    kinds: dict[str, Callable[[Sequence[Row]], Batch]] = {
        "a ragged batch": lambda rows: collate(rows, pad_id=pad),
        "padding with another id": lambda rows: _padded(rows, other, left=0, right=5),
        "longer padding": lambda rows: _padded(rows, pad, left=0, right=11),
        "padding on the left": lambda rows: _padded(rows, pad, left=3, right=0),
    }
    size = judge.limits.microbatch_rows
    chunks = [mixed[i : i + size] for i in range(0, len(mixed), size)]
    differences = {
        name: float(np.abs(np.concatenate([_scored(judge, make(chunk)) for chunk in chunks]) - alone).max())
        for name, make in kinds.items()
    }
    return Invariance(rows=len(mixed), tolerance=judge.tolerance, differences=differences)


def _padded(rows: Sequence[Row], pad_id: int, *, left: int, right: int) -> Batch:
    """Rows padded to the longest of them and some more; on the left where `left` is not 0."""
    width = max(len(row) for row in rows) + left + right
    ids = torch.full((len(rows), width), pad_id, dtype=torch.int64)
    attended, completed = torch.zeros_like(ids, dtype=torch.bool), torch.zeros_like(ids, dtype=torch.bool)
    for i, row in enumerate(rows):
        start = width - len(row) if left else 0
        middle, end = start + len(row.prompt_ids), start + len(row)
        ids[i, start:end] = torch.tensor(row.prompt_ids + row.completion_ids)
        attended[i, start:end] = True
        completed[i, middle:end] = True
    return Batch(input_ids=ids, attention_mask=attended, completion_mask=completed)


def _robustness(judge: Judge, pairs: Sequence[Pair], before: FloatArray, name: str, seed: int) -> Robustness:
    after, changed = before.copy(), np.zeros(before.shape, dtype=np.bool_)
    rows, places = [], []
    for i, pair in enumerate(pairs):
        for j, text in enumerate((pair.chosen, pair.rejected)):
            new = perturb(name, text, seed)
            row = _row(pair, new, judge) if new != text else None
            if row is not None:
                rows.append(row)
                places.append((i, j))
    for place, score in zip(places, _score(judge, rows), strict=True):
        after[place], changed[place] = score, True
    return robustness(before, after, changed)


# ---- groups ----------------------------------------------------------------------------------------------------------


def _prompt_numbers(pairs: Sequence[Pair]) -> npt.NDArray[np.int64]:
    """(P,): pairs with the same messages have the same number."""
    numbers: dict[Any, int] = {}
    return np.array([numbers.setdefault(pair.prompt.messages, len(numbers)) for pair in pairs], dtype=np.int64)


def _groups(pairs: Sequence[Pair]) -> dict[str, list[int]]:
    """`all`, then each task and each `task/category`, where the data name any; a single task is `all`."""
    tasks: dict[str, list[int]] = {}
    categories: dict[str, list[int]] = {}
    for i, pair in enumerate(pairs):
        task, category = pair.prompt.task, pair.prompt.meta.get("category")
        if task:
            tasks.setdefault(task, []).append(i)
        if isinstance(category, str) and category:
            categories.setdefault(f"{task}/{category}" if task else category, []).append(i)
    named = tasks | categories if len(tasks) > 1 or categories else {}
    return {"all": list(range(len(pairs))), **dict(sorted(named.items()))}
