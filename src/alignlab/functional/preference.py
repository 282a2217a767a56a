"""Losses on preferences: logprobs or rewards of chosen and rejected -> a loss for each pair; or for each completion."""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor


def preference_loss(
    chosen: Tensor,
    rejected: Tensor,
    reference_chosen: Tensor,
    reference_rejected: Tensor,
    *,
    beta: float,
    kind: Literal["sigmoid", "robust", "hinge", "ipo"] = "sigmoid",
    label_smoothing: float = 0.0,
) -> Tensor:
    """Direct preference optimisation and its relatives, to be minimised: widen the margin h over the reference's.

    With h = (chosen - reference_chosen) - (rejected - reference_rejected):

        sigmoid   -(1 - e) log sigmoid(beta h) - e log sigmoid(-beta h)    DPO, arXiv:2305.18290 eq. 7; e > 0: cDPO
        robust    [-(1 - e) log sigmoid(beta h) + e log sigmoid(-beta h)] / (1 - 2e)    rDPO, arXiv:2403.00409
        hinge     max(0, 1 - beta h)                                       SLiC with a reference, arXiv:2305.10425
        ipo       (h - 1 / (2 beta))^2                                     IPO, arXiv:2310.12036

    Both smoothed kinds suppose a share e of labels to be flipped: `sigmoid` bounds the margin that pays, `robust` is on
    average over the flips the loss of the true labels, and falls below 0.

    Args:
        chosen, rejected: (B,) logprobs of whole completions under the policy, summed over their tokens; IPO's authors
            average them instead.
        reference_chosen, reference_rejected: (B,) the same under the reference.
        beta: how strongly a margin counts, > 0; the larger, the closer the policy stays to the reference.
        kind: which loss.
        label_smoothing: e, the share of pairs thought to be labelled the wrong way round, in [0, .5); only
            `sigmoid` and `robust`.

    Returns:
        (B,); with policy = reference ln 2, ln 2, 1 and 1 / (2 beta)^2.

    Raises:
        ValueError: an unknown kind, a beta or label_smoothing out of range, shapes that differ.
    """
    if not beta > 0:
        raise ValueError(f"preference_loss: beta must be > 0; got {beta}")
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"preference_loss: label_smoothing must lie in [0, 0.5); got {label_smoothing}")
    if label_smoothing and kind not in ("sigmoid", "robust"):
        raise ValueError(f"preference_loss: label_smoothing is defined for sigmoid and robust; got kind {kind!r}")
    _check_same_shape("preference_loss", chosen, rejected, reference_chosen, reference_rejected)
    margin = (chosen - reference_chosen) - (rejected - reference_rejected)
    match kind:
        case "sigmoid":
            loss = -(1 - label_smoothing) * F.logsigmoid(beta * margin)
            return loss - label_smoothing * F.logsigmoid(-beta * margin) if label_smoothing else loss
        case "robust":
            right, flipped = F.logsigmoid(beta * margin), F.logsigmoid(-beta * margin)
            return (label_smoothing * flipped - (1 - label_smoothing) * right) / (1 - 2 * label_smoothing)
        case "hinge":
            return (1 - beta * margin).relu()
        case "ipo":
            return (margin - 1 / (2 * beta)).square()
        case _:
            raise ValueError(f"preference_loss: unknown kind {kind!r}; choose sigmoid, robust, hinge or ipo")


def simpo_loss(chosen: Tensor, rejected: Tensor, *, beta: float, gamma: float) -> Tensor:
    """-log sigmoid(beta (chosen - rejected) - gamma), to be minimised: chosen likelier than rejected, by a margin.

    SimPO, arXiv:2405.14734 eq. 6.

    Args:
        chosen, rejected: (B,) mean logprob of each completion's tokens.
        beta: scale of the reward beta * mean logprob, > 0.
        gamma: by how much chosen's reward should be the larger, >= 0.

    Returns:
        (B,).

    Raises:
        ValueError: a beta or gamma out of range, shapes that differ.
    """
    if not beta > 0 or not gamma >= 0:
        raise ValueError(f"simpo_loss: beta must be > 0 and gamma >= 0; got {beta} and {gamma}")
    _check_same_shape("simpo_loss", chosen, rejected)
    return -F.logsigmoid(beta * (chosen - rejected) - gamma)


def log_odds(logprobs: Tensor) -> Tensor:
    """log(p / (1 - p)) of p = e^logprobs, in full precision from p = 0 to p = 1.

    A p that rounds to 1, whose odds are infinite, counts as 1 - eps and gets no gradient.
    """
    return logprobs - log1mexp(logprobs.clamp(max=-torch.finfo(logprobs.dtype).eps))


def log1mexp(x: Tensor) -> Tensor:
    """log(1 - e^x) for x < 0: by expm1 where e^x is near 1, by log1p where it is near 0 (Maechler 2012)."""
    near_one = x > -math.log(2)
    # each form only sees inputs it is good for, as a NaN or infinite slope of the other would get through `where`
    return torch.where(
        near_one,
        torch.log(-torch.expm1(torch.where(near_one, x, -1.0))),
        torch.log1p(-torch.exp(torch.where(near_one, -1.0, x))),
    )


def odds_ratio_loss(chosen: Tensor, rejected: Tensor) -> Tensor:
    """-log sigmoid(log odds(chosen) - log odds(rejected)), to be minimised: chosen with the larger odds.

    The preference term of ORPO, arXiv:2403.07691 eq. 7, with odds p / (1 - p) of the geometric mean p of a completion's
    token probabilities.

    Args:
        chosen, rejected: (B,) mean logprob of each completion's tokens, so log p.

    Returns:
        (B,).

    Raises:
        ValueError: shapes that differ.
    """
    _check_same_shape("odds_ratio_loss", chosen, rejected)
    return -F.logsigmoid(log_odds(chosen) - log_odds(rejected))


def kto_loss(
    log_ratio: Tensor,
    labels: Tensor,
    reference_point: Tensor,
    *,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """Kahneman-Tversky optimisation of single completions, to be minimised (arXiv:2402.01306):

        desirable     w_D (1 - sigmoid(beta (log_ratio - z0)))    pushes the log ratio above the reference point
        undesirable   w_U (1 - sigmoid(beta (z0 - log_ratio)))    pushes it below

    Args:
        log_ratio: (B,) log pi - log reference of each completion, summed over its tokens.
        labels: (B,) bool, True = desirable.
        reference_point: (B,) z0, an estimate of the KL to the reference, >= 0; a constant: its gradient is not wanted.
        beta: how soon a gain counts as certain, > 0.
        desirable_weight, undesirable_weight: w_D and w_U, > 0.

    Returns:
        (B,), each within 0 and its weight; half its weight with policy = reference.

    Raises:
        ValueError: beta or a weight out of range, labels that are not bool, shapes that differ.
    """
    if not min(beta, desirable_weight, undesirable_weight) > 0:
        given = f"{beta}, {desirable_weight} and {undesirable_weight}"
        raise ValueError(f"kto_loss: beta and both weights must be > 0; got {given}")
    if labels.dtype != torch.bool:
        raise ValueError(f"kto_loss: labels must be bool, True = desirable; got {labels.dtype}")
    _check_same_shape("kto_loss", log_ratio, labels, reference_point)
    gain = beta * (log_ratio - reference_point)
    # 1 - sigmoid(x) = sigmoid(-x), which keeps its digits where sigmoid(x) is near 1
    return torch.where(labels, desirable_weight * torch.sigmoid(-gain), undesirable_weight * torch.sigmoid(gain))


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
