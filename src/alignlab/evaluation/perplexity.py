"""How surprised a policy is by demonstrations: rows -> exp(mean negative log-likelihood of their completion tokens).

The mean runs over all tokens of all rows (every token counts the same, the stop token too), not over rows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from alignlab.data import collate, plan_microbatches
from alignlab.forward import score
from alignlab.models import Model, unwrap
from alignlab.types import Row


@torch.no_grad()
def perplexity(policy: Model, rows: Sequence[Row], *, pad_id: int, max_rows: int = 64) -> float:
    """exp(sum of -log pi(token) / number of tokens) over the rows' completions, at temperature 1; >= 1.

    1 is certainty, the size of the vocabulary a uniform guess. Dropout is off meanwhile. Sums are exact, so neither the
    order of the rows nor `max_rows` matters beyond the rounding of the forward pass.

    Raises:
        ValueError: the rows have no completion token.
    """
    module = unwrap(policy)
    training = [part for part in module.modules() if part.training]
    module.eval()  # type: ignore[no-untyped-call]
    try:
        terms: list[float] = []
        for index in plan_microbatches([len(row) for row in rows], max_rows):
            batch = collate([rows[i] for i in index], pad_id=pad_id).to(next(module.parameters()).device)
            terms += score(policy, batch).logprobs[batch.completion_mask].double().tolist()
    finally:
        for part in training:
            part.training = True
    if not terms:
        raise ValueError("perplexity: the rows have no completion token")
    try:
        return math.exp(-math.fsum(terms) / len(terms))
    except OverflowError:
        return math.inf
