"""Judges without a network: a causal language model as a chat client, and a reward model as a scorer.

conversations -> replies of a model on this machine; prompts and completions -> scores of a trained reward model.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from alignlab.conversation import Template
from alignlab.data import collate, plan_microbatches
from alignlab.errors import UserError
from alignlab.forward import rewards
from alignlab.generate import Sampling, SamplingKey, generate
from alignlab.judge.cache import Cache, Reply, question_key
from alignlab.models import (
    ModelChoice,
    ScalarModel,
    frozen_policy,
    load_generation_config,
    load_reward_model,
    load_tokenizer,
    location,
    pick_device,
    unwrap,
)
from alignlab.types import Message, Prompt


class LocalClient:
    """A causal language model that answers conversations greedily; its replies are cached like an endpoint's."""

    def __init__(
        self,
        model: str | Path,
        *,
        max_tokens: int = 256,
        device: str = "auto",
        cache: Path | None = None,
        max_rows: int = 8,
    ) -> None:
        """Loads the model: a folder, or a name of the hub.

        Args:
            max_tokens: of a reply.

        Raises:
            UserError: the model cannot be found or used.
        """
        self.name, self.max_tokens, self.max_rows = str(model), max_tokens, max_rows
        choice = ModelChoice(name=str(model))
        self.device = pick_device(device)
        self.template = Template.of(load_tokenizer(choice.name), load_generation_config(choice.name))
        self.model = frozen_policy(choice, self.device)
        self.cache, self.identity, self.replayed = Cache(cache), _identity(choice.name), 0

    def complete(self, conversations: Sequence[Sequence[Message]]) -> list[str]:
        """The reply to each conversation, in order.

        Raises:
            UserError: a conversation and its reply are longer than the model's context.
        """
        questions = [self._question(conversation) for conversation in conversations]
        replies = [self.cache.find(question) for question in questions]
        missing = [i for i, reply in enumerate(replies) if reply is None]
        self.replayed += len(questions) - len(missing)
        for start in range(0, len(missing), self.max_rows):  # kept as they come, so that a kill loses few
            few = missing[start : start + self.max_rows]
            for i, reply in zip(few, self._answer([conversations[i] for i in few]), strict=True):
                replies[i] = self.cache.keep(questions[i], reply)
        return [reply.text for reply in replies if reply is not None]

    def _question(self, conversation: Sequence[Message]) -> dict[str, Any]:
        return {
            "local": self.identity,
            "messages": [{"role": m.role, "content": m.content} for m in conversation],
            "max_tokens": self.max_tokens,
        }

    def _answer(self, conversations: Sequence[Sequence[Message]]) -> list[Reply]:
        context = getattr(unwrap(self.model).config.get_text_config(), "max_position_embeddings", None)
        prompts = [Prompt(messages=tuple(conversation), id="judge") for conversation in conversations]
        ids = [self.template.encode_prompt(prompt) for prompt in prompts]
        longest = max(map(len, ids)) + self.max_tokens
        if context is not None and longest > context:
            raise UserError(
                f"judge {self.name}: a question and its reply take up to {longest} tokens, but the model's context is "
                f"{context}; take a model with a longer one, or judge shorter answers"
            )
        keys = [SamplingKey(0, 0, question_key(self._question(c))) for c in conversations]
        sampling = Sampling(greedy=True, max_completion_tokens=self.max_tokens)
        sampled = generate(
            self.model, ids, keys, sampling, num_samples=1, stop_ids=self.template.stop_ids,
            pad_id=self.template.pad_id, max_rows=self.max_rows,
        )  # fmt: skip
        return [
            Reply(
                text=self.template.decode(one.token_ids),
                finish_reason=one.finish_reason,
                usage={"input": len(prompt), "output": len(one.token_ids)},
                model=self.name,
            )
            for prompt, (one,) in zip(ids, sampled, strict=True)
        ]


def _identity(name: str) -> str:
    """What tells a model from all others in the cache: a hash of its files, or its name on the hub."""
    folder = Path(location(name))
    if not folder.is_dir():
        return name
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.iterdir() if p.suffix in (".json", ".safetensors", ".jinja")):
        digest.update(path.name.encode())
        with path.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


class RewardModelScorer:
    """A trained reward model as it stands in its folder; higher = better, in its own normalised units."""

    def __init__(self, folder: Path, *, device: str = "auto", max_rows: int = 32) -> None:
        """Raises:
        UserError: the folder holds no trained reward model.
        """
        self.name, self.max_rows, self.device = str(folder), max_rows, pick_device(device)
        self.template = Template.of(load_tokenizer(str(folder)), load_generation_config(str(folder)))
        self.model: ScalarModel = load_reward_model(folder, ModelChoice(name=str(folder)), device=self.device)

    @torch.no_grad()
    def __call__(self, prompts: Sequence[Prompt], completions: Sequence[str]) -> list[float]:
        """The score of each completion, read as an answer that ended by itself.

        Raises:
            UserError: a prompt and its completion are longer than the model's context.
        """
        context = getattr(unwrap(self.model).config.get_text_config(), "max_position_embeddings", None)
        rows = [self.template.row(prompt, text) for prompt, text in zip(prompts, completions, strict=True)]
        for prompt, row in zip(prompts, rows, strict=True):
            if context is not None and len(row) > context:
                raise UserError(
                    f"prompt {prompt.id!r} and its completion are {len(row)} tokens to the reward model {self.name}, "
                    f"whose context is {context}; leave such prompts out"
                )
        scores = [0.0] * len(rows)
        for index in plan_microbatches([len(row) for row in rows], self.max_rows):
            batch = collate([rows[i] for i in index], pad_id=self.template.pad_id).to(self.device)
            for i, value in zip(index, rewards(self.model, batch).tolist(), strict=True):
                scores[i] = value
        return scores
