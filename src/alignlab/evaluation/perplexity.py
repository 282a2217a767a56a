"""How surprised a policy is by given texts: rows -> nats of each token -> perplexity, bits a byte, preferred answers.

Means run over all tokens of all rows (every token counts the same, the stop token too), not over rows. Perplexities of
different tokenizers do not compare; bits per byte of text do.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch

from alignlab.data import collate, plan_microbatches
from alignlab.evaluation.measures import Estimate
from alignlab.forward import score
from alignlab.models import Model, unwrap
from alignlab.statistics.clustered import ratio_interval
from alignlab.types import Row


@torch.no_grad()
def token_nats(policy: Model, rows: Sequence[Row], *, pad_id: int, max_rows: int = 64) -> list[list[float]]:
    """-log pi of every completion token of every row, at temperature 1. Dropout is off meanwhile."""
    module = unwrap(policy)
    training = [part for part in module.modules() if part.training]
    module.eval()  # type: ignore[no-untyped-call]
    found: list[list[float]] = [[] for _ in rows]
    try:
        for index in plan_microbatches([len(row) for row in rows], max_rows):
            batch = collate([rows[i] for i in index], pad_id=pad_id).to(next(module.parameters()).device)
            logprobs = score(policy, batch).logprobs.double()
            for i, row, mask in zip(index, logprobs, batch.completion_mask, strict=True):
                found[i] = (-row[mask]).tolist()
    finally:
        for part in training:
            part.training = True
    return found


def perplexity(policy: Model, rows: Sequence[Row], *, pad_id: int, max_rows: int = 64) -> float:
    """exp(sum of -log pi(token) / number of tokens) over the rows' completions, at temperature 1; >= 1.

    1 is certainty, the size of the vocabulary a uniform guess. Sums are exact, so neither the order of the rows nor
    `max_rows` matters beyond the rounding of the forward pass.

    Raises:
        ValueError: the rows have no completion token.
    """
    terms = [nats for row in token_nats(policy, rows, pad_id=pad_id, max_rows=max_rows) for nats in row]
    if not terms:
        raise ValueError("perplexity: the rows have no completion token")
    return _exp(math.fsum(terms) / len(terms))


def surprise(nats: Sequence[Sequence[float]], texts: Sequence[str], clusters: Sequence[str]) -> dict[str, Estimate]:
    """`policy/perplexity` and `policy/bits_per_byte` of texts whose `token_nats` are given, clustered by prompt.

    bits per byte = sum of nats / (ln 2 * bytes of the texts in UTF-8). The stop token's nats are in it, as every
    tokenizer has one; it adds no byte.
    """
    bits = [len(text.encode()) * math.log(2) for text in texts]
    return {**perplexity_estimate(nats, clusters), "policy/bits_per_byte": _ratio(nats, bits, clusters)}


def perplexity_estimate(nats: Sequence[Sequence[float]], clusters: Sequence[str]) -> dict[str, Estimate]:
    """`policy/perplexity` from `token_nats`: the exponential of the mean and of its interval's ends."""
    mean = _ratio(nats, [float(len(row)) for row in nats], clusters)
    return {"policy/perplexity": replace(mean, value=_exp(mean.value), low=_exp(mean.low), high=_exp(mean.high))}


def _ratio(nats: Sequence[Sequence[float]], units: Sequence[float], clusters: Sequence[str]) -> Estimate:
    """All nats over all units, exactly, with its interval."""
    value = math.fsum(term for row in nats for term in row) / math.fsum(units)
    counted = {"completions": len(units), "prompts": len(set(clusters))}
    if counted["prompts"] < 2 or not math.isfinite(value):
        return Estimate(value=value, low=math.nan, high=math.nan, **counted)
    interval = ratio_interval([math.fsum(row) for row in nats], units, clusters)
    return Estimate(value=value, low=interval.low, high=interval.high, **counted)


def preferred(chosen: Sequence[Sequence[float]], rejected: Sequence[Sequence[float]]) -> dict[str, list[float]]:
    """Of each pair, whether its chosen answer is the likelier one (a tie is one half), from the `token_nats` of both.

    `preference/likelier_text` compares the logprobs of whole texts, which favours short ones;
    `preference/likelier_token` those of the mean token, which does not.
    """
    pairs = list(zip(chosen, rejected, strict=True))
    return {
        "preference/likelier_text": [_beats(math.fsum(c), math.fsum(r)) for c, r in pairs],
        "preference/likelier_token": [_beats(math.fsum(c) / len(c), math.fsum(r) / len(r)) for c, r in pairs],
    }


def _beats(nats: float, others: float) -> float:
    return 1.0 if nats < others else 0.5 if nats == others else 0.0


def _exp(mean: float) -> float:
    try:
        return math.exp(mean)
    except OverflowError:
        return math.inf
