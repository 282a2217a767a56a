"""Losses on preference pairs: logprobs or rewards of chosen and rejected -> a loss for each pair."""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor


def preference_loss(
    chosen: Tensor,
    rejected: Tensor,
    reference_chosen: Tensor,
    reference_rejected: Tensor,
    *,
    beta: float,
    kind: Literal["sigmoid", "hinge", "ipo"] = "sigmoid",
    label_smoothing: float = 0.0,
) -> Tensor:
    """Direct preference optimisation and its relatives, to be minimised: widen the margin h over the reference's.

    With h = (chosen - reference_chosen) - (rejected - reference_rejected):

        sigmoid   -(1 - e) log sigmoid(beta h) - e log sigmoid(-beta h)    DPO, arXiv:2305.18290 eq. 7; e > 0: cDPO
        hinge     max(0, 1 - beta h)                                       SLiC with a reference, arXiv:2305.10425
        ipo       (h - 1 / (2 beta))^2                                     IPO, arXiv:2310.12036

    Args:
        chosen, rejected: (B,) logprobs of whole completions under the policy, summed over their tokens; IPO's authors
            average them instead.
        reference_chosen, reference_rejected: (B,) the same under the reference.
        beta: how strongly a margin counts, > 0; the larger, the closer the policy stays to the reference.
        kind: which loss.
        label_smoothing: e, the share of pairs thought to be labelled the wrong way round, in [0, .5); only `sigmoid`.

    Returns:
        (B,); with policy = reference ln 2, 1 and 1 / (2 beta)^2.

    Raises:
        ValueError: an unknown kind, a beta or label_smoothing out of range, shapes that differ.
    """
    if not beta > 0:
        raise ValueError(f"preference_loss: beta must be > 0; got {beta}")
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"preference_loss: label_smoothing must lie in [0, 0.5); got {label_smoothing}")
    if label_smoothing and kind != "sigmoid":
        raise ValueError(f"preference_loss: label_smoothing is defined for kind sigmoid only; got kind {kind!r}")
    _check_same_shape("preference_loss", chosen, rejected, reference_chosen, reference_rejected)
    margin = (chosen - reference_chosen) - (rejected - reference_rejected)
    match kind:
        case "sigmoid":
            loss = -(1 - label_smoothing) * F.logsigmoid(beta * margin)
            return loss - label_smoothing * F.logsigmoid(-beta * margin) if label_smoothing else loss
        case "hinge":
            return (1 - beta * margin).relu()
        case "ipo":
            return (margin - 1 / (2 * beta)).square()
        case _:
            raise ValueError(f"preference_loss: unknown kind {kind!r}; choose sigmoid, hinge or ipo")


def bradley_terry_loss(
    chosen_reward: Tensor,
    rejected_reward: Tensor,
    *,
    margin: Tensor | float | None = None,
    centering_coef: float = 0.0,
    label_smoothing: float = 0.0,
) -> Tensor:
    """-log sigmoid(chosen - rejected - margin) + c * (chosen + rejected)^2, to be minimised: chosen should win.

    The model of pairwise choice behind reward models (arXiv:2203.02155 eq. 1), with the margin of arXiv:2307.09288 and
    the term of arXiv:2312.09244 that keeps rewards, of which only differences are observed, around 0.

    Args:
        chosen_reward, rejected_reward: (B,) scores.
        margin: by how much chosen should win, (B,) or one number; None for 0.
        centering_coef: c, >= 0; .01 is usual.
        label_smoothing: e, the share of pairs thought to be labelled the wrong way round, in [0, .5): the loss is then
            its expectation, 1 - e times that of the pair and e times that of the pair turned round.

    Returns:
        (B,).

    Raises:
        ValueError: a negative centering_coef, a label_smoothing out of range, shapes that differ.
    """
    if not centering_coef >= 0:
        raise ValueError(f"bradley_terry_loss: centering_coef must be >= 0; got {centering_coef}")
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"bradley_terry_loss: label_smoothing must lie in [0, 0.5); got {label_smoothing}")
    _check_same_shape("bradley_terry_loss", chosen_reward, rejected_reward)
    difference = chosen_reward - rejected_reward
    if isinstance(margin, Tensor):
        _check_same_shape("bradley_terry_loss", difference, margin)
    margin = 0.0 if margin is None else margin
    loss = -F.logsigmoid(difference - margin)
    if label_smoothing:
        loss = (1 - label_smoothing) * loss - label_smoothing * F.logsigmoid(-(difference + margin))
    return loss + centering_coef * (chosen_reward + rejected_reward).square()


def _check_same_shape(caller: str, *tensors: Tensor) -> None:
    """A (B, 1) beside a (B,) would broadcast to (B, B): every chosen against every rejected, without an error."""
    shapes = [tuple(x.shape) for x in tensors]
    if len(set(shapes)) > 1:
        raise ValueError(f"{caller}: all tensors must have one shape (B,); got {', '.join(map(str, shapes))}")
