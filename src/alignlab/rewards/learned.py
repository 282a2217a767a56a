"""Learned reward: prompt + completion -> the normalised score of a trained reward model."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from alignlab.conversation import Template
from alignlab.data import collate, plan_microbatches
from alignlab.forward import rewards
from alignlab.models import ScalarModel, unwrap
from alignlab.types import Completion, Prompt, Row


@torch.no_grad()
def learned(
    prompts: Sequence[Prompt],
    completions: Sequence[Completion],
    *,
    reward_model: ScalarModel,
    template: Template,
    max_rows: int = 64,
) -> list[float | None]:
    """Scores in units of the reference policy's standard deviation, 0 = its mean. Applies to every completion.

    A completion that was cut off is scored as it stands, without a stop token.
    """
    rows = [
        Row(prompt_ids=template.encode_prompt(prompt), completion_ids=completion.token_ids)
        for prompt, completion in zip(prompts, completions, strict=True)
    ]
    device = next(unwrap(reward_model).parameters()).device
    scores: list[float | None] = [None] * len(rows)
    for index in plan_microbatches([len(row) for row in rows], max_rows):
        batch = collate([rows[i] for i in index], pad_id=template.pad_id).to(device)
        for i, value in zip(index, rewards(reward_model, batch).tolist(), strict=True):
            scores[i] = value
    return scores
