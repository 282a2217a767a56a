"""Group relative policy optimisation (arXiv:2402.03300): prompts -> groups of samples -> advantages -> clipped steps.

Per token: -min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A) + kl_coef KL(pi || reference), with rho = pi / pi_old
and A = (r - mean of the group) / scale. Terms meet one aggregation over the whole step. The sign makes completions that
beat their siblings likelier. A loss near 0 is normal: at ratio 1 the advantages of a group cancel, their gradients do
not.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import ClassVar, Literal

import torch
from pydantic import Field

from alignlab.algorithms import (
    Hyperparameters,
    Models,
    completion_rows,
    completion_tokens,
    gap,
    masked_sum,
    numbers_dtype,
)
from alignlab.forward import score
from alignlab.functional.advantages import group_advantages
from alignlab.functional.kl import kl_estimate
from alignlab.functional.masked import aggregate
from alignlab.functional.surrogate import clipped, clipped_surrogate
from alignlab.rollout import Source, reward_tensor, rollout_metrics
from alignlab.types import Batch, Directive, LoopState, LossOutput, Phase, Role, Step


class GRPO(Hyperparameters):
    """Policy gradient with the group as its own baseline; no critic."""

    metrics_file: ClassVar[str | None] = None
    dropout: ClassVar[bool] = False
    data_kind: ClassVar[str] = "prompts"

    name: Literal["grpo"] = "grpo"
    learning_rate: float = Field(1e-6, gt=0)
    """Peak learning rate of AdamW (trl and DeepSeekMath: 1e-6)."""
    max_grad_norm: float = Field(1.0, gt=0)
    """Gradient norm above which gradients are scaled down."""
    prompts_per_phase: int = Field(16, ge=1)
    """Prompts sampled a phase; each optimiser step of the phase uses all of them."""
    group_size: int = Field(8, ge=2)
    """Completions a prompt (G); a group of one has no advantage."""
    temperature: float = Field(1.0, gt=0)
    """Sampling temperature; every logprob of the method is at this temperature."""
    scale: Literal["group", "batch", "none"] = "group"
    """What divides centred rewards: the group's standard deviation (the paper), the batch's, or nothing (Dr. GRPO)."""
    clip_low: float = Field(0.2, gt=0, lt=1)
    clip_high: float = Field(0.2, gt=0)
    """Ratio range 1 - clip_low .. 1 + clip_high (epsilon); DAPO's clip-higher is 0.28."""
    epochs: int = Field(1, ge=1)
    """Optimiser steps on the same rollouts (mu)."""
    kl_coef: float = Field(0.0, ge=0)
    """Weight of the KL to the reference in the loss (beta in the paper, .04 there); 0 leaves reference and KL out."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    """Per-token estimator, differentiated; k3 is the paper's, k2 has the gradient of the true KL on policy."""
    aggregation: Literal["token", "sequence", "constant"] = "sequence"
    """Mean over rows of token means (the paper), over all tokens of the step (DAPO), or the sum over rows times the
    completion limit (Dr. GRPO)."""

    def models(self) -> Mapping[str, Role]:
        policy = Role(learning_rate=self.learning_rate, max_grad_norm=self.max_grad_norm)
        return {"policy": policy, "reference": Role()} if self.kl_coef else {"policy": policy}

    def collect(self, models: Models, source: Source, state: LoopState) -> tuple[Phase, LoopState]:
        groups = source.rollouts(models["policy"], self.prompts_per_phase, self.group_size, state)
        batch = source.batch(groups, numbers_dtype(models["policy"]))
        assert batch.old_logprobs is not None
        advantages = group_advantages(reward_tensor(groups, batch.old_logprobs), self.group_size, scale=self.scale)
        batch = replace(batch, advantages=torch.where(batch.completion_mask, advantages[:, None], 0.0))
        pieces = source.microbatches(batch)
        if self.kl_coef:
            with torch.no_grad():
                pieces = tuple(
                    replace(p, reference_logprobs=score(models["reference"], p, temperature=self.temperature).logprobs)
                    for p in pieces
                )
        normaliser = {
            "token": completion_tokens(pieces),
            "sequence": completion_rows(pieces),
            "constant": completion_rows(pieces) * source.sampling.max_completion_tokens,
        }[self.aggregation]
        return Phase((Step(pieces, normaliser),) * self.epochs, rollout_metrics(groups), groups), state

    def loss(self, models: Models, batch: Batch, state: LoopState) -> LossOutput:
        assert batch.old_logprobs is not None and batch.advantages is not None
        mask = batch.completion_mask
        scores = score(models["policy"], batch, temperature=self.temperature, entropy=True)
        assert scores.entropy is not None
        log_ratio = torch.where(mask, scores.logprobs - batch.old_logprobs, 0.0)
        terms = clipped_surrogate(log_ratio, batch.advantages, self.clip_low, self.clip_high)
        is_clipped = clipped(log_ratio, batch.advantages, self.clip_low, self.clip_high)
        sums = {
            "policy/entropy": masked_sum(scores.entropy, batch),
            "policy/approx_kl": masked_sum(0.5 * log_ratio**2, batch),
            "policy/clip_fraction": masked_sum(is_clipped.float(), batch),
            "policy/ratio": masked_sum(log_ratio.exp(), batch),
        }
        identities = {
            "the log ratio of policy to sampling policy": gap(scores.logprobs, batch.old_logprobs, batch),
            "the clip fraction": gap(is_clipped.float(), torch.zeros_like(log_ratio), batch),
        }
        if batch.reference_logprobs is not None:
            terms = terms + self.kl_coef * kl_estimate(scores.logprobs, batch.reference_logprobs, self.kl_estimator)
            drift = torch.where(mask, scores.logprobs - batch.reference_logprobs, 0.0)
            sums |= {
                "policy/kl_per_token": masked_sum(drift, batch),
                "policy/kl_per_sequence": (drift.sum().item(), float(len(batch))),
            }
            if state.step == 0:
                identities["KL to the reference"] = gap(scores.logprobs, batch.reference_logprobs, batch)
        return LossOutput(aggregate(terms, mask, self.aggregation), sums, identities)

    def observe(self, state: LoopState, metrics: Mapping[str, float]) -> tuple[LoopState, Directive]:
        return state, Directive()


ALGORITHM = GRPO
