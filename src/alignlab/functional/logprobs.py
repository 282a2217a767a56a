"""Log-probabilities of given tokens without the logits: hidden states, head, token ids -> logprobs (and entropies).

With Gemma's 262,144 entries the logits of one thousand tokens take a gigabyte, and their gradient another. Here the
vocabulary streams past a block of rows in tiles, as keys stream past queries in flash attention (arXiv:2205.14135):
each row keeps its running maximum and what is summed below it, so a tile is used once and forgotten.

The gradient of a logprob by its hidden state is `W[taken] - sum_v p_v W[v]`, so with a frozen head (LoRA) it is
summed in the same tiles as the value, and the backward pass never sees the vocabulary. A trained head, and the gradient
of the entropy, recompute the tiles in the backward pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

TILE_BYTES = 32_000_000
"""No tile of logits is larger than this, on any device."""
CPU_TILE_BYTES = 2 * 2**20
"""On a CPU a tile that stays in the cache is faster; the tile is the smaller of the two."""
TILE_ROWS = 256
"""Rows that share a pass over the vocabulary: enough to make the matrix products efficient."""

_VANISHED = -1000.0  # exp of this is 0 in float32 and in float64, yet 0 times it is 0 and not NaN


def token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    token_ids: Tensor,
    *,
    temperature: float = 1.0,
    logit_softcap: float | None = None,
) -> Tensor:
    """log softmax(logits)[token_ids] with logits = softcap(hidden @ weight.T) / temperature, in float32, in nats.

    `hidden[b, t]` is the state that predicts `token_ids[b, t]`: the caller has shifted. Differentiable, once, by
    `hidden` and `weight`; memory beyond that of the results is a few tiles of at most 32 MB.

    Args:
        hidden: (B, T, H), or any leading shape; the product with `weight` is taken in this dtype.
        weight: (V, H), the output head, of the same dtype as `hidden`.
        token_ids: (B, T) integers in [0, V).
        temperature: divides the logits, as it did when the tokens were sampled; > 0.
        logit_softcap: c of c * tanh(logit / c), applied before the temperature (Gemma 2: 30); None for no cap.

    Returns:
        (B, T), float32 (float64 where `hidden` is).

    Raises:
        ValueError: shapes or dtypes that do not fit, a token id outside the vocabulary, a temperature or cap <= 0.
    """
    return _scored(hidden, weight, token_ids, temperature, logit_softcap, with_entropy=False)[0]


def token_logprobs_and_entropy(
    hidden: Tensor,
    weight: Tensor,
    token_ids: Tensor,
    *,
    temperature: float = 1.0,
    logit_softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """`token_logprobs` and, from the same tiles, the entropy of each distribution: -sum_v p_v log p_v, in nats.

    Arguments and errors are those of `token_logprobs`. Both results are (B, T) and differentiable. An entropy that is
    only logged, or weighed by 0, costs no matrix product; one that is trained on costs a second pass over the
    vocabulary in the backward pass.
    """
    return _scored(hidden, weight, token_ids, temperature, logit_softcap, with_entropy=True)


def _scored(
    hidden: Tensor, weight: Tensor, token_ids: Tensor, temperature: float, softcap: float | None, *, with_entropy: bool
) -> tuple[Tensor, Tensor]:
    _check(hidden, weight, token_ids, temperature, softcap)
    with torch.autocast(hidden.device.type, enabled=False):  # the backward pass runs outside it, and has to agree
        logprobs, entropy = _TokenLogprobs.apply(  # type: ignore[no-untyped-call]
            hidden.reshape(-1, hidden.shape[-1]),
            weight,
            token_ids.reshape(-1, 1).long(),
            _Scaling(temperature, softcap),
            with_entropy,
            torch.is_grad_enabled() and hidden.requires_grad and not weight.requires_grad,
        )
    return logprobs.view(token_ids.shape), entropy.view(token_ids.shape) if with_entropy else entropy


def _check(hidden: Tensor, weight: Tensor, token_ids: Tensor, temperature: float, softcap: float | None) -> None:
    where = "token_logprobs:"
    if weight.dim() != 2 or hidden.dim() < 1 or hidden.shape[-1] != weight.shape[-1]:
        raise ValueError(
            f"{where} hidden must be (..., H) and weight (V, H); got {tuple(hidden.shape)} and {tuple(weight.shape)}"
        )
    if hidden.shape[:-1] != token_ids.shape:
        raise ValueError(
            f"{where} token_ids must have hidden's leading shape {tuple(hidden.shape[:-1])}, one token for each state; "
            f"got {tuple(token_ids.shape)}"
        )
    if not hidden.is_floating_point() or hidden.dtype != weight.dtype:
        raise ValueError(
            f"{where} hidden and weight must have one floating dtype; got {hidden.dtype} and {weight.dtype}: cast one"
        )
    if token_ids.is_floating_point():
        raise ValueError(f"{where} token_ids must be integers; got {token_ids.dtype}")
    if not temperature > 0:
        raise ValueError(f"{where} temperature must be > 0; got {temperature}")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"{where} logit_softcap must be > 0, or None for no cap; got {softcap}")
    if token_ids.numel() and not (token_ids.min() >= 0 and token_ids.max() < len(weight)):
        raise ValueError(
            f"{where} token_ids must lie in [0, {len(weight)}); got {int(token_ids.min())} to {int(token_ids.max())} "
            "(give positions without a token any valid id, and mask the result)"
        )


class _Scaling(NamedTuple):
    """From a raw logit z to what the softmax sees: c * tanh(z / c) / temperature."""

    temperature: float
    softcap: float | None

    def logits(self, hidden: Tensor, weight: Tensor, *, with_slope: bool) -> tuple[Tensor, Tensor | None]:
        """A tile of scaled logits (R, C), and the slope of the cap in each (None: 1 everywhere, or not asked for)."""
        raw = (hidden @ weight.T).to(_compute_dtype(hidden))
        if self.softcap is None:
            return raw if self.temperature == 1 else raw.div_(self.temperature), None
        tanh = raw.div_(self.softcap).tanh_()
        slope = tanh.square().neg_().add_(1.0) if with_slope else None
        return tanh.mul_(self.softcap / self.temperature), slope


class _Scored(NamedTuple):
    """What one pass over the vocabulary knows about a block of rows."""

    logprobs: Tensor  # (R, 1)
    logsumexp: Tensor  # (R, 1)
    entropy: Tensor | None  # (R, 1)
    gradient: Tensor | None  # (R, H), d logprob / d hidden


def _compute_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _tiles(hidden: Tensor, weight: Tensor) -> tuple[list[slice], list[slice]]:
    """Cuts rows and vocabulary so that no block of logits exceeds the tile, in the dtype they are computed in."""
    tile_bytes = min(TILE_BYTES, CPU_TILE_BYTES) if hidden.device.type == "cpu" else TILE_BYTES
    tile = max(1, tile_bytes // _compute_dtype(hidden).itemsize)
    rows = max(1, min(TILE_ROWS, len(hidden), tile))
    return list(_slices(len(hidden), rows)), list(_slices(len(weight), max(1, tile // rows)))


def _slices(length: int, step: int) -> Iterator[slice]:
    return (slice(start, min(start + step, length)) for start in range(0, length, step))


def _located(token_ids: Tensor, columns: slice) -> tuple[Tensor, Tensor]:
    """Where the taken tokens (R, 1) lie in a tile: a column that exists in any case, and whether it is theirs."""
    inside = (token_ids >= columns.start) & (token_ids < columns.stop)
    return (token_ids - columns.start).clamp(0, columns.stop - columns.start - 1), inside


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right, the product taken in right's dtype and the sum kept in total's."""
    left = left.to(right.dtype)
    if total.dtype == right.dtype:
        total.addmm_(left, right)
    else:
        total.add_(left @ right)


def _score_rows(
    hidden: Tensor,
    weight: Tensor,
    token_ids: Tensor,
    scaling: _Scaling,
    columns_of_tiles: list[slice],
    *,
    with_entropy: bool,
    with_gradient: bool,
) -> _Scored:
    """Streams the vocabulary past hidden (R, H).

    Sums are of e^(logit - top), with top the maximum so far, and leave out the taken token: it enters at the end, where
    1 - p is the others' share, exactly. Beside a p near 1 the rest would drown.
    """
    dtype = _compute_dtype(hidden)
    column = hidden.new_zeros((len(hidden), 1), dtype=dtype)
    top = torch.full_like(column, torch.finfo(dtype).min)
    taken, taken_slope = torch.zeros_like(column), torch.ones_like(column)  # its logit, and the slope of its cap
    rest = torch.zeros_like(column)  # sum of e^(logit - top)
    moment = torch.zeros_like(column)  # sum of e^(logit - top) * (logit - top)
    pull = hidden.new_zeros(hidden.shape if with_gradient else (0,), dtype=dtype)  # sum of e^(logit - top) * slope * W

    for columns in columns_of_tiles:
        tile = weight[columns]
        logits, slope = scaling.logits(hidden, tile, with_slope=with_gradient)
        local, inside = _located(token_ids, columns)
        taken = torch.where(inside, logits.gather(1, local), taken)
        if slope is not None:
            taken_slope = torch.where(inside, slope.gather(1, local), taken_slope)

        previous, top = top, torch.maximum(top, logits.amax(1, keepdim=True))
        drop = (previous - top).clamp_(min=_VANISHED)
        decay = drop.exp()
        shifted = logits.sub_(top)
        weights = shifted.clamp_(min=_VANISHED).exp() if with_entropy else shifted.exp_()
        weights.scatter_(1, local, weights.gather(1, local).masked_fill_(inside, 0.0))
        if with_entropy:
            moment = decay * (moment + drop * rest) + shifted.mul_(weights).sum(1, keepdim=True)
        rest = decay * rest + weights.sum(1, keepdim=True)
        if with_gradient:
            _add_product(pull.mul_(decay), weights if slope is None else weights.mul_(slope), tile)

    distance = taken - top
    own = distance.exp()
    mass = rest + own
    # log(mass), to full precision where the taken token is the top
    log_mass = torch.log1p(rest + torch.expm1(distance))
    logprobs = distance - log_mass
    entropy, gradient = None, None
    if with_entropy:
        entropy = log_mass - (moment + own * distance.clamp(min=_VANISHED)) / mass
    if with_gradient:
        gradient = weight[token_ids.squeeze(1)] * (rest / mass * taken_slope)
        gradient = gradient.sub_(pull.div_(mass)).div_(scaling.temperature)
    return _Scored(logprobs, top + log_mass, entropy, gradient)


def _recomputed_gradients(
    hidden: Tensor,
    weight: Tensor,
    token_ids: Tensor,
    logsumexp: Tensor,
    entropy: Tensor,
    from_logprobs: Tensor,
    from_entropy: Tensor | None,
    scaling: _Scaling,
    *,
    wants_weight: bool,
) -> tuple[Tensor, Tensor | None]:
    """The gradients by hidden and weight from a second pass over the tiles; all that is known of a row is (N, 1).

    By the scaled logit of v:  d logprob = [v is taken] - p_v  and  d entropy = -p_v (log p_v + entropy).
    """
    # Rows whose result nobody used (padding, clipped tokens) cost nothing and cannot spread their NaN.
    used = ((from_logprobs != 0) if from_entropy is None else (from_logprobs != 0) | (from_entropy != 0)).squeeze(1)
    states, token_ids, logsumexp = hidden[used], token_ids[used], logsumexp[used]
    down_logprobs = from_logprobs[used] / -scaling.temperature
    if from_entropy is not None:
        entropy, down_entropy = entropy[used], from_entropy[used] / -scaling.temperature

    dtype = _compute_dtype(hidden)
    grad_states = torch.zeros_like(states, dtype=dtype)
    grad_weight = torch.empty_like(weight) if wants_weight else None
    rows_of_tiles, columns_of_tiles = _tiles(states, weight)
    for columns in columns_of_tiles:  # outermost, so that each tile of the weight's gradient is summed in one place
        tile = weight[columns]
        grad_tile = torch.zeros_like(tile, dtype=dtype) if wants_weight else None
        for rows in rows_of_tiles:
            logits, slope = scaling.logits(states[rows], tile, with_slope=True)
            logs = logits.sub_(logsumexp[rows])
            grad_logits = logs.exp()
            pull = down_logprobs[rows]
            if from_entropy is not None:
                pull = logs.clamp_(min=_VANISHED).add_(entropy[rows]).mul_(down_entropy[rows]).add_(pull)
            grad_logits.mul_(pull)
            local, inside = _located(token_ids[rows], columns)
            grad_logits.scatter_add_(1, local, -down_logprobs[rows].masked_fill(~inside, 0.0))
            if slope is not None:
                grad_logits.mul_(slope)
            _add_product(grad_states[rows], grad_logits, tile)
            if grad_tile is not None:
                _add_product(grad_tile, grad_logits.T, states[rows])
        if grad_weight is not None and grad_tile is not None:
            grad_weight[columns] = grad_tile
    return torch.zeros_like(hidden, dtype=dtype).masked_scatter_(used.unsqueeze(1), grad_states), grad_weight


class _TokenLogprobs(torch.autograd.Function):
    """hidden (N, H), weight (V, H), token_ids (N, 1) -> logprobs (N,) and entropy (N,), empty when not asked for."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        token_ids: Tensor,
        scaling: _Scaling,
        with_entropy: bool,
        with_gradient: bool,
    ) -> tuple[Tensor, Tensor]:
        logprobs, logsumexp, entropy = (
            hidden.new_empty((len(hidden) if wanted else 0, 1), dtype=_compute_dtype(hidden))
            for wanted in (True, True, with_entropy)
        )
        gradient = torch.empty_like(hidden) if with_gradient else None
        rows_of_tiles, columns_of_tiles = _tiles(hidden, weight)
        for rows in rows_of_tiles:
            scored = _score_rows(
                hidden[rows],
                weight,
                token_ids[rows],
                scaling,
                columns_of_tiles,
                with_entropy=with_entropy,
                with_gradient=with_gradient,
            )
            logprobs[rows], logsumexp[rows] = scored.logprobs, scored.logsumexp
            if scored.entropy is not None:
                entropy[rows] = scored.entropy
            if gradient is not None and scored.gradient is not None:
                gradient[rows] = scored.gradient
        ctx.save_for_backward(hidden, weight, token_ids, logsumexp, entropy, gradient)
        ctx.scaling = scaling
        ctx.set_materialize_grads(False)
        return logprobs.view(-1), entropy.view(-1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logprobs: Tensor | None, grad_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, token_ids, logsumexp, entropy, gradient = ctx.saved_tensors
        from_logprobs = torch.zeros_like(logsumexp) if grad_logprobs is None else grad_logprobs.unsqueeze(1)
        from_entropy = None if grad_entropy is None else grad_entropy.unsqueeze(1)
        kept, grad_weight = None, None
        if gradient is not None:  # the head is frozen; `where`, since 0 times the NaN of an unused row is NaN
            kept = torch.where(from_logprobs == 0, 0, gradient * from_logprobs)
            from_logprobs = torch.zeros_like(from_logprobs)
        if kept is not None and from_entropy is None:
            grad_hidden = kept
        else:
            grad_hidden, grad_weight = _recomputed_gradients(
                hidden,
                weight,
                token_ids,
                logsumexp,
                entropy,
                from_logprobs,
                from_entropy,
                ctx.scaling,
                wants_weight=ctx.needs_input_grad[1],
            )
            if kept is not None:
                grad_hidden.add_(kept)
        return grad_hidden.to(hidden.dtype), grad_weight, None, None, None, None
