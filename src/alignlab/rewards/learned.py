"""Learned reward: prompt + completion -> the normalised score of a trained reward model.

The reward model reads with its own tokenizer and template: the text of a completion is written anew as its own answer.
Only where both tokenizers are the same are the sampled ids taken as they are.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import torch

from alignlab.conversation import Template
from alignlab.data import collate, plan_microbatches
from alignlab.errors import UserError
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
    same_ids: bool = False,
    max_rows: int = 64,
) -> list[float | None]:
    """Scores in units of the reference policy's standard deviation, 0 = its mean. Applies to every completion.

    A completion that stopped is scored at its stop token. One that was cut off is scored as it stands, at its last
    token and without a stop token, whether by its own ids or by its text. No reward model saw such an end in training,
    so its score says little: let a penalty deal with cut-offs.

    Args:
        template: the reward model's.
        same_ids: both models have the same tokenizer (see `same_tokenizer`), so the sampled ids are scored as they are.
            Otherwise the text is: control tokens that the policy wrote within it are then plain text.

    Raises:
        UserError: a prompt and completion are longer than the reward model's context, or cannot be encoded for it.
    """
    config = unwrap(reward_model).config.get_text_config()
    context = getattr(config, "max_position_embeddings", None)
    rows = []
    for prompt, completion in zip(prompts, completions, strict=True):
        row = scored_row(prompt, completion, template, same_ids=same_ids)
        if context is not None and len(row) > context:
            raise UserError(
                f"prompt {prompt.id!r} and its completion are {len(row)} tokens to the reward model, whose context is "
                f"{context}; lower data.max_prompt_tokens or data.max_completion_tokens"
            )
        rows.append(row)
    device = next(unwrap(reward_model).parameters()).device
    scores: list[float | None] = [None] * len(rows)
    for index in plan_microbatches([len(row) for row in rows], max_rows):
        batch = collate([rows[i] for i in index], pad_id=template.pad_id).to(device)
        for i, value in zip(index, rewards(reward_model, batch).tolist(), strict=True):
            scores[i] = value
    return scores


def applies(prompt: Prompt, **_: object) -> bool:
    """Whether completions of this prompt are judged: all are."""
    return True


def scored_row(prompt: Prompt, completion: Completion, template: Template, *, same_ids: bool) -> Row:
    """The row that a reward model with this template reads."""
    if same_ids:
        return Row(prompt_ids=template.encode_prompt(prompt), completion_ids=completion.token_ids)
    ids = template.encode_completion(
        completion.text, stop=completion.finish_reason == "stop", chat=bool(prompt.messages)
    )
    return Row(prompt_ids=template.encode_prompt(prompt), completion_ids=ids)


def same_tokenizer(one: Template, other: Template) -> bool:
    """Whether any text, conversation and end of a turn has the same ids under both: proven, not guessed from names.

    Compared are the vocabulary with everything that splits, merges and normalises text, the chat template, and the
    control tokens. Padding and truncation are left out, as they change no id of a row.
    """
    return _rules(one) == _rules(other)


def _rules(template: Template) -> tuple[Any, ...]:
    tokenizer: Any = template.tokenizer
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    backend.update(padding=None, truncation=None)
    ends = (template.bos_id, template.eos_id, template.turn_end_id, template.adds_bos, dict(template.control))
    return backend, tokenizer.chat_template, ends
