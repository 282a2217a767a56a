"""How far one model's next-token distribution is from another's, exactly: two hidden states, two heads -> KL in nats.

Nothing is sampled: the sum runs over the whole vocabulary, which streams past a block of rows in tiles for both models
at once, as in `logprobs`; no tensor is larger than a tile.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from alignlab.functional.logprobs import _add_product, _compute_dtype, _Scaling, _tiles


def reverse_kl(
    hidden: Tensor,
    weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    *,
    temperature: float = 1.0,
    logit_softcap: float | None = None,
    teacher_logit_softcap: float | None = None,
) -> Tensor:
    """KL(student || teacher) = sum_v p_v (log p_v - log q_v) of each pair of states, in float32, in nats.

    With p = softmax(softcap(hidden @ weight.T) / temperature) and q likewise of the teacher: GKD's reverse KL
    (arXiv:2306.13649). Reverse, because the average is over what the student does; a token that the teacher would
    say and the student never says costs little. Never negative, and exactly 0 for equal states and heads.

    Differentiable, once, by `hidden` and `weight`; the teacher gets no gradient. By the student's logit of v, after cap
    and temperature: p_v (log p_v - log q_v - KL). The backward pass makes the tiles again.

    Args:
        hidden: (B, T, H), or any leading shape; each product is taken in the dtype of its own model.
        weight: (V, H), the student's output head, of the same dtype as `hidden`.
        teacher_hidden: (B, T, H'), the teacher's states in the same positions.
        teacher_weight: (V, H'), of the same dtype as `teacher_hidden`.
        temperature: divides the logits of both; > 0.
        logit_softcap, teacher_logit_softcap: c of c * tanh(logit / c), before the temperature; None for no cap.

    Returns:
        (B, T), float32 (float64 where `hidden` is).

    Raises:
        ValueError: shapes or dtypes that do not fit, heads of two vocabularies, a temperature or cap <= 0.
    """
    _check(hidden, weight, teacher_hidden, teacher_weight, temperature, (logit_softcap, teacher_logit_softcap))
    with torch.autocast(hidden.device.type, enabled=False):  # the backward pass runs outside it, and has to agree
        flat: Tensor = _ReverseKL.apply(  # type: ignore[no-untyped-call]
            hidden.reshape(-1, hidden.shape[-1]),
            weight,
            teacher_hidden.reshape(-1, teacher_hidden.shape[-1]).detach(),
            teacher_weight.detach(),
            _Scaling(temperature, logit_softcap),
            _Scaling(temperature, teacher_logit_softcap),
        )
    return flat.view(hidden.shape[:-1])


def _check(
    hidden: Tensor,
    weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    temperature: float,
    softcaps: tuple[float | None, ...],
) -> None:
    where = "reverse_kl:"
    for whose, states, head in (("", hidden, weight), ("teacher_", teacher_hidden, teacher_weight)):
        if head.dim() != 2 or states.dim() < 1 or states.shape[-1] != head.shape[-1]:
            raise ValueError(
                f"{where} {whose}hidden must be (..., H) and {whose}weight (V, H); got {tuple(states.shape)} and "
                f"{tuple(head.shape)}"
            )
        if not states.is_floating_point() or states.dtype != head.dtype:
            raise ValueError(
                f"{where} {whose}hidden and {whose}weight must have one floating dtype; got {states.dtype} and "
                f"{head.dtype}: cast one"
            )
    if hidden.shape[:-1] != teacher_hidden.shape[:-1]:
        raise ValueError(
            f"{where} both models' states must stand in the same positions; got {tuple(hidden.shape[:-1])} and "
            f"{tuple(teacher_hidden.shape[:-1])}"
        )
    if len(weight) != len(teacher_weight):
        raise ValueError(
            f"{where} the heads have {len(weight)} and {len(teacher_weight)} entries; a sum over the vocabulary needs "
            "one vocabulary"
        )
    if not temperature > 0:
        raise ValueError(f"{where} temperature must be > 0; got {temperature}")
    if any(cap is not None and not cap > 0 for cap in softcaps):
        raise ValueError(f"{where} a logit_softcap must be > 0, or None for no cap; got {softcaps}")


class _ReverseKL(torch.autograd.Function):
    """hidden (N, H), weight (V, H), teacher's (N, H') and (V, H') -> KL (N,)."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        teacher_hidden: Tensor,
        teacher_weight: Tensor,
        scaling: _Scaling,
        teacher_scaling: _Scaling,
    ) -> Tensor:
        dtype = _compute_dtype(hidden)
        # All that is known of a row afterwards: the KL, the student's logsumexp, and how far it is above the teacher's.
        kl, logsumexp, offset = (hidden.new_empty((len(hidden), 1), dtype=dtype) for _ in range(3))
        rows_of_tiles, columns_of_tiles = _tiles(hidden, weight)
        for rows in rows_of_tiles:
            column = hidden.new_zeros((len(hidden[rows]), 1), dtype=dtype)
            top, teacher_top = (torch.full_like(column, torch.finfo(dtype).min) for _ in range(2))
            mass, teacher_mass = column, column  # sums of e^(logit - top), with top the maximum so far
            excess = column  # sum of e^(logit - top) * (logit - teacher's logit)
            for columns in columns_of_tiles:
                logits, _ = scaling.logits(hidden[rows], weight[columns], with_slope=False)
                others, _ = teacher_scaling.logits(teacher_hidden[rows], teacher_weight[columns], with_slope=False)
                others = others.to(dtype)
                previous, top = top, torch.maximum(top, logits.amax(1, keepdim=True))
                decay = (previous - top).exp()
                weights = (logits - top).exp_()
                mass = decay * mass + weights.sum(1, keepdim=True)
                excess = decay * excess + weights.mul_(logits.sub_(others)).sum(1, keepdim=True)
                previous, teacher_top = teacher_top, torch.maximum(teacher_top, others.amax(1, keepdim=True))
                teacher_mass = (previous - teacher_top).exp() * teacher_mass + others.sub_(teacher_top).exp_().sum(
                    1, keepdim=True
                )
            logsumexp[rows] = top + mass.log()
            offset[rows] = logsumexp[rows] - (teacher_top + teacher_mass.log())
            kl[rows] = (excess / mass - offset[rows]).clamp(min=0)  # rounding alone takes it below
        ctx.save_for_backward(hidden, weight, teacher_hidden, teacher_weight, kl, logsumexp, offset)
        ctx.scalings = scaling, teacher_scaling
        return kl.view(-1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, teacher_hidden, teacher_weight, kl, logsumexp, offset = ctx.saved_tensors
        scaling, teacher_scaling = ctx.scalings
        dtype, wants_weight = kl.dtype, ctx.needs_input_grad[1]
        # Rows whose result nobody used (padding) cost nothing and cannot spread their NaN.
        used = upstream != 0
        states, teacher_states, kl, logsumexp, offset = (
            x[used] for x in (hidden, teacher_hidden, kl, logsumexp, offset)
        )
        down = upstream[used].unsqueeze(1) / scaling.temperature
        grad_states = torch.zeros_like(states, dtype=dtype)
        grad_weight = torch.empty_like(weight) if wants_weight else None
        rows_of_tiles, columns_of_tiles = _tiles(states, weight)
        for columns in columns_of_tiles:  # outermost, so that each tile of the weight's gradient is summed in one place
            tile = weight[columns]
            grad_tile = torch.zeros_like(tile, dtype=dtype) if wants_weight else None
            for rows in rows_of_tiles:
                logits, slope = scaling.logits(states[rows], tile, with_slope=True)
                others, _ = teacher_scaling.logits(teacher_states[rows], teacher_weight[columns], with_slope=False)
                grad_logits = (logits - logsumexp[rows]).exp_()
                log_ratio = logits.sub_(others.to(dtype)).sub_(offset[rows])
                grad_logits.mul_(log_ratio.sub_(kl[rows])).mul_(down[rows])
                if slope is not None:
                    grad_logits.mul_(slope)
                _add_product(grad_states[rows], grad_logits, tile)
                if grad_tile is not None:
                    _add_product(grad_tile, grad_logits.T, states[rows])
            if grad_weight is not None and grad_tile is not None:
                grad_weight[columns] = grad_tile
        grad_hidden = torch.zeros_like(hidden, dtype=dtype).masked_scatter_(used.unsqueeze(1), grad_states)
        return grad_hidden.to(hidden.dtype), grad_weight, None, None, None, None
