"""On-policy distillation: prompts -> the student's own samples -> reverse KL to a frozen teacher, token by token.

The policy is the student; the teacher has its tokenizer and judges every token that the student says. Two objectives:

    sampled: max(-rho A, -clip(rho, 1 - clip_low, 1 + clip_high) A), rho = pi / pi_old, and with the discount gamma
             A_t = -sum_{s >= t} gamma^(s - t) (log pi_old(y_s) - log teacher(y_s))
    full:    sum_v pi(v) (log pi(v) - log teacher(v)) at every token, over the whole vocabulary, differentiated

(Thinking Machines, "On-Policy Distillation", 2025; GKD, arXiv:2306.13649, with lambda = 1 and reverse KL.) With gamma 0
and on policy the first has the gradient of the second in expectation, without its matrix product over the teacher's
vocabulary. Where the student stands is taken as given: neither differentiates through the sampling of earlier tokens.
The sign makes tokens likelier that the teacher finds likelier than the student does. No reward is needed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from alignlab.algorithms import (
    Hyperparameters,
    Models,
    beyond_rounding,
    completion_rows,
    completion_tokens,
    gap,
    masked_sum,
    numbers_dtype,
)
from alignlab.algorithms._online import swept
from alignlab.errors import UserError
from alignlab.forward import score, score_and_divergence
from alignlab.functional.advantages import gae
from alignlab.functional.masked import aggregate, keep
from alignlab.functional.surrogate import clipped, clipped_surrogate
from alignlab.models import head
from alignlab.rollout import Source, rollout_metrics
from alignlab.types import Batch, Directive, LoopState, LossOutput, Phase, Role, Step


class Distill(Hyperparameters):
    """The student learns from the teacher's judgement of what the student says; no critic, no reward."""

    metrics_file: ClassVar[str | None] = None
    dropout: ClassVar[bool] = False
    data_kind: ClassVar[str] = "prompts"
    needs_reward: ClassVar[bool] = False
    DEPARTURES: ClassVar[tuple[str, ...]] = (
        "`sampled` has PPO's clip; Thinking Machines' loss is the bare importance ratio. In a phase's first step both "
        "are the same.",
        "A token mean over the step; theirs is a sum over tokens, so their learning rate goes with their batch.",
        "`full` is GKD's lambda = 1 and reverse KL only: no mixture with demonstrations, no Jensen-Shannon.",
        "trl's GKD trainer normalises over each microbatch's tokens, and has one temperature to sample and one for the "
        "loss.",
    )

    name: Literal["distill"] = "distill"
    learning_rate: float = Field(5e-5, gt=0)
    """Peak learning rate of AdamW (Thinking Machines' recipes: 5e-5 for all weights, 1e-4 for LoRA)."""
    max_grad_norm: float = Field(1.0, gt=0)
    """Gradient norm above which gradients are scaled down."""
    prompts_per_phase: int = Field(64, ge=1)
    """Prompts sampled a phase (theirs: 64 to 512); each optimiser step of the phase uses all of them."""
    group_size: int = Field(1, ge=1)
    """Completions a prompt (theirs: 4). Every token has its own signal, so other prompts serve better than siblings."""
    temperature: float = Field(1.0, gt=0)
    """Sampling temperature; every distribution of the method, the teacher's too, is at this temperature."""
    objective: Literal["sampled", "full"] = "sampled"
    """Policy gradient on the sampled token's log ratio, or the exact divergence over the vocabulary (GKD)."""
    gamma: float = Field(0.0, ge=0, le=1)
    """Discount of later tokens' log ratios in `sampled`: 0 credits each token with its own term (as published by
    Thinking Machines), 1 with all that follow, which is the gradient of the divergence of whole completions."""
    clip_low: float = Field(0.2, gt=0, lt=1)
    clip_high: float = Field(0.2, gt=0)
    """Ratio range 1 - clip_low .. 1 + clip_high of `sampled` (epsilon); without effect in a phase's first step."""
    epochs: int = Field(1, ge=1)
    """Optimiser steps on the same samples."""
    aggregation: Literal["token", "sequence", "constant"] = "token"
    """Mean over all tokens of the step, over rows of token means, or the sum over rows times the completion limit."""

    def models(self) -> Mapping[str, Role]:
        return {
            "policy": Role(learning_rate=self.learning_rate, max_grad_norm=self.max_grad_norm),
            "teacher": Role(),
        }

    def collect(self, models: Models, source: Source, state: LoopState) -> tuple[Phase, LoopState]:
        self._require_one_vocabulary(models)
        groups = source.rollouts(
            models["policy"], self.prompts_per_phase, self.group_size, state, needs_reward=self.needs_reward
        )
        batch = source.batch(groups, numbers_dtype(models["policy"]))
        if self.objective == "sampled":
            batch = self._credited(models, source, batch)
        pieces = source.microbatches(batch)
        normaliser = {
            "token": completion_tokens(pieces),
            "sequence": completion_rows(pieces),
            "constant": completion_rows(pieces) * source.sampling.max_completion_tokens,
        }[self.aggregation]
        return Phase((Step(pieces, normaliser),) * self.epochs, rollout_metrics(groups, source.rewards), groups), state

    def _require_one_vocabulary(self, models: Models) -> None:
        student, teacher = (len(head(models[role]).weight) for role in ("policy", "teacher"))
        if self.objective == "full" and student != teacher:
            raise UserError(
                f"distill: the policy's head has {student} entries and the teacher's {teacher}, so there is no "
                "divergence over one vocabulary; choose objective: sampled"
            )

    def _credited(self, models: Models, source: Source, batch: Batch) -> Batch:
        """With the teacher's logprobs, as the reference of the KL, and the advantages."""
        assert batch.old_logprobs is not None
        teacher = swept(
            source,
            batch,
            batch.old_logprobs,
            lambda b: score(models["teacher"], b, temperature=self.temperature).logprobs,
        )
        log_ratio = teacher - batch.old_logprobs  # 0 outside the completion, as both are
        nothing = torch.zeros_like(log_ratio)
        advantages, _ = gae(log_ratio, nothing, batch.completion_mask, gamma=self.gamma, gae_lambda=1.0)
        return replace(batch, reference_logprobs=teacher, advantages=advantages)

    def loss(self, models: Models, batch: Batch, state: LoopState) -> LossOutput:
        return self._full_loss(models, batch) if self.objective == "full" else self._sampled_loss(models, batch)

    def _sampled_loss(self, models: Models, batch: Batch) -> LossOutput:
        assert batch.old_logprobs is not None and batch.advantages is not None and batch.reference_logprobs is not None
        mask, clips = batch.completion_mask, (self.clip_low, self.clip_high)
        scores = score(models["policy"], batch, temperature=self.temperature, entropy=True)
        assert scores.entropy is not None
        log_ratio = keep(scores.logprobs - batch.old_logprobs, mask)
        terms = clipped_surrogate(log_ratio, batch.advantages, *clips)
        is_clipped = clipped(log_ratio, batch.advantages, *clips).to(log_ratio.dtype)
        beyond = clipped(beyond_rounding(log_ratio, models["policy"]), batch.advantages, *clips)
        sums = {
            **divergence_sums(keep(scores.logprobs - batch.reference_logprobs, mask), batch),
            "policy/entropy": masked_sum(scores.entropy, batch),
            "policy/approx_kl": masked_sum(0.5 * log_ratio**2, batch),
            "policy/clip_fraction": masked_sum(is_clipped, batch),
            "policy/ratio": masked_sum(log_ratio.exp(), batch),
        }
        identities = {
            "the log ratio of policy to sampling policy": gap(scores.logprobs, batch.old_logprobs, batch),
            "the clip fraction": gap(beyond.float(), torch.zeros_like(log_ratio), batch),
        }
        return LossOutput(aggregate(terms, mask, self.aggregation), sums, identities)

    def _full_loss(self, models: Models, batch: Batch) -> LossOutput:
        assert batch.old_logprobs is not None
        mask = batch.completion_mask
        scores, divergence = score_and_divergence(
            models["policy"], models["teacher"], batch, temperature=self.temperature, entropy=True
        )
        assert scores.entropy is not None
        log_ratio = keep(scores.logprobs - batch.old_logprobs, mask).detach()
        sums = {
            **divergence_sums(divergence, batch),
            "policy/entropy": masked_sum(scores.entropy, batch),
            "policy/approx_kl": masked_sum(0.5 * log_ratio**2, batch),
            "policy/ratio": masked_sum(log_ratio.exp(), batch),
        }
        identities = {"the log ratio of policy to sampling policy": gap(scores.logprobs, batch.old_logprobs, batch)}
        return LossOutput(aggregate(divergence, mask, self.aggregation), sums, identities)

    def observe(self, state: LoopState, metrics: Mapping[str, float]) -> tuple[LoopState, Directive]:
        return state, Directive()

    def formula(self) -> tuple[str, ...]:
        lines: tuple[str, ...] = ("term = reverse_kl",)
        if self.objective == "sampled":
            low, high = 1 - self.clip_low, 1 + self.clip_high
            own = ("advantages = reference_logprobs - old_logprobs",) if self.gamma == 0 else ()
            lines = (
                *own,
                "ratio = exp(clip(logprobs - old_logprobs, -20, 20))",
                f"term = maximum(-advantages * ratio, -advantages * clip(ratio, {low!r}, {high!r}))",
            )
        return *lines, {
            "token": "loss = sum(mask * term) / completion_tokens",
            "sequence": "loss = sum(row_mean(term)) / rows",
            "constant": "loss = sum(mask * term) / (rows * max_completion_tokens)",
        }[self.aggregation]


def divergence_sums(divergence: Tensor, batch: Batch) -> dict[str, tuple[float, float]]:
    """Reverse KL to the teacher in nats a token and a completion, of (B, T) terms that are 0 outside the mask."""
    total, tokens = masked_sum(divergence, batch)
    return {
        "distill/reverse_kl_per_token": (total, tokens),
        "distill/reverse_kl_per_sequence": (total, float(len(batch))),
    }


ALGORITHM = Distill
