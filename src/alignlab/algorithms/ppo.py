"""PPO for language models (arXiv:1707.06347, details arXiv:2403.17031): rollouts -> token rewards -> GAE -> steps.

1. score the completions; a missing stop token costs `missing_stop_penalty`; clip the score if asked to
2. token reward r_t = -kl_coef (log pi_old - log ref), plus the score on the last action (sparse) or spread (dense)
3. advantages and returns by GAE (arXiv:1506.02438), V_T = 0 at a stop; then whiten the advantages
4. epochs x minibatches of: max(-A rho, -A clip(rho)) + value_coef 1/2 max((V - R)^2, (clip(V) - R)^2) - entropy_coef H
The sign makes actions with positive advantage likelier. The critic reads the state before each action.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from typing import ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from alignlab.algorithms import Hyperparameters, Models, completion_tokens, gap, masked_sum, numbers_dtype
from alignlab.forward import final_values, score, score_and_values, values
from alignlab.functional.advantages import gae
from alignlab.functional.kl import kl_estimate
from alignlab.functional.masked import aggregate, masked_whiten
from alignlab.functional.surrogate import clipped, clipped_surrogate, clipped_value_loss
from alignlab.rollout import Source, reward_tensor, rollout_metrics, stopped_tensor
from alignlab.types import Batch, Directive, Group, LoopState, LossOutput, Phase, Role, Step


class PPO(Hyperparameters):
    """Actor-critic policy gradient with a learned baseline and the KL to the reference in the reward."""

    metrics_file: ClassVar[str | None] = "ppo_metrics.jsonl"
    dropout: ClassVar[bool] = False
    data_kind: ClassVar[str] = "prompts"

    name: Literal["ppo"] = "ppo"
    learning_rate: float = Field(3e-6, gt=0)
    """Peak learning rate of the policy (trl: 3e-6)."""
    value_learning_rate: float = Field(1e-5, gt=0)
    """Peak learning rate of the critic (OpenRLHF: 9e-6)."""
    max_grad_norm: float = Field(1.0, gt=0)
    """Gradient norm above which a role's gradients are scaled down."""
    critic: Literal["own", "shared"] = "own"
    """The critic's trunk: a copy of the starting policy's, or the policy's own, which value gradients then reach."""
    value_warmup_steps: int = Field(0, ge=0)
    """Optimiser steps at the start in which only the critic learns."""
    prompts_per_phase: int = Field(64, ge=1)
    """Prompts sampled a phase."""
    group_size: int = Field(1, ge=1)
    """Completions a prompt."""
    temperature: float = Field(1.0, gt=0)
    """Sampling temperature; every logprob of the method is at this temperature."""
    epochs: int = Field(4, ge=1)
    """Passes over a phase's rollouts (trl: 4)."""
    minibatches: int = Field(1, ge=1)
    """Optimiser steps a pass."""
    clip_low: float = Field(0.2, gt=0, lt=1)
    clip_high: float = Field(0.2, gt=0)
    """Ratio range 1 - clip_low .. 1 + clip_high (epsilon)."""
    value_clip: float | None = Field(0.2, gt=0)
    """How far a value may move from the one at sampling before its gradient stops; null = anywhere."""
    value_coef: float = Field(0.1, ge=0)
    """Weight of the value loss (trl .1; the documents .5). With an own trunk it only scales the critic's gradient."""
    entropy_coef: float = Field(0.0, ge=0)
    """Weight of the true entropy bonus."""
    gamma: float = Field(1.0, gt=0, le=1)
    """Discount a token."""
    gae_lambda: float = Field(0.95, ge=0, le=1)
    """GAE's trade of bias against variance (lambda)."""
    reward_placement: Literal["sparse", "dense"] = "sparse"
    """The score on the last action, or an equal share of it on every action. Shares sum to the score, so at gamma 1 the
    optimum stays, but return-to-go under-weights late tokens (a biased gradient)."""
    missing_stop_penalty: float = Field(0.0, ge=0)
    """Taken off the score of a completion that was cut off (trl's missing_eos_penalty)."""
    score_clip: float | None = Field(None, gt=0)
    """Scores are clipped to +- this; null = not at all."""
    at_cutoff: Literal["zero", "bootstrap"] = "zero"
    """What follows a cut-off completion: nothing (all peers), or the critic's value of where it was cut."""
    whiten_rewards: bool = False
    """Divide token rewards by their standard deviation over the phase; their mean stays."""
    whiten_advantages: bool = True
    """Advantages to mean 0 and standard deviation 1 over the phase."""
    kl_coef: float = Field(0.05, ge=0)
    """Weight of the KL in the reward (trl: .05); the start value of an adaptive controller."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k1"
    """Per-token estimator, detached; k1 in the reward is the exact reverse KL in expectation."""
    kl_controller: Literal["fixed", "adaptive"] = "fixed"
    """Adaptive moves kl_coef once a phase towards the target (arXiv:1909.08593)."""
    kl_target_per_sequence: float = Field(6.0, gt=0)
    """Nats a completion the adaptive controller aims at."""
    kl_horizon: float = Field(10_000.0, gt=0)
    """Completions over which the adaptive controller corrects an error."""
    stop_epochs_above_kl: float | None = Field(None, gt=0)
    """Mean approximate KL to the sampling policy (nats a token) at which the phase ends early; null = never."""

    @model_validator(mode="after")
    def _adaptive_starts_above_zero(self) -> PPO:
        if self.kl_controller == "adaptive" and not self.kl_coef:
            raise ValueError("kl_controller adaptive multiplies kl_coef, so kl_coef must start above 0")
        return self

    def models(self) -> Mapping[str, Role]:
        return {
            "policy": Role(
                learning_rate=self.learning_rate, max_grad_norm=self.max_grad_norm, start_step=self.value_warmup_steps
            ),
            "reference": Role(),
            "value_model": Role(
                learning_rate=self.value_learning_rate, max_grad_norm=self.max_grad_norm, backbone=self.critic
            ),
        }

    def collect(self, models: Models, source: Source, state: LoopState) -> tuple[Phase, LoopState]:
        kl_coef = state.algorithm.get("kl_coef", self.kl_coef)
        groups = source.rollouts(models["policy"], self.prompts_per_phase, self.group_size, state)
        batch = source.batch(groups, numbers_dtype(models["policy"]))
        batch, after_cutoff = self._before_update(models, source, batch, stopped_tensor(groups, batch.input_ids))
        mask = batch.completion_mask
        assert batch.old_logprobs is not None and batch.reference_logprobs is not None and batch.old_values is not None
        kl = torch.where(mask, kl_estimate(batch.old_logprobs, batch.reference_logprobs, self.kl_estimator), 0.0)
        token_rewards = self._token_rewards(groups, mask, kl_coef * kl)
        advantages, returns = gae(
            masked_whiten(token_rewards, mask, shift_mean=False) if self.whiten_rewards else token_rewards,
            batch.old_values, mask, gamma=self.gamma, gae_lambda=self.gae_lambda, bootstrap_values=after_cutoff,
        )  # fmt: skip
        if self.whiten_advantages:
            advantages = masked_whiten(advantages, mask)
        drift = torch.where(mask, batch.old_logprobs - batch.reference_logprobs, 0.0)
        kl_per_sequence = drift.sum(-1).mean().item()
        metrics = rollout_metrics(groups) | {
            "policy/kl_coef": kl_coef,
            "policy/kl_per_sequence": kl_per_sequence,
            "policy/kl_per_token": (drift.sum() / mask.sum()).item(),
            "reward/minus_kl": token_rewards.sum(-1).mean().item(),
            "value/explained_variance": explained_variance(batch.old_values, returns, mask),
        }
        steps = self._steps(source, replace(batch, advantages=advantages, returns=returns), state)
        return Phase(steps, metrics, groups), self._controlled(state, kl_coef, kl_per_sequence, len(batch))

    def _before_update(
        self, models: Models, source: Source, batch: Batch, stopped: Tensor
    ) -> tuple[Batch, Tensor | None]:
        """The batch with reference logprobs and values, and what GAE starts from at each row's end (B,); no gradient.

        That is 0 where the completion stopped by itself, and the critic's value where it was cut off.
        """
        assert batch.old_logprobs is not None
        reference, old_values = torch.zeros_like(batch.old_logprobs), torch.zeros_like(batch.old_logprobs)
        after_cutoff = torch.zeros_like(reference[:, 0]) if self.at_cutoff == "bootstrap" else None
        with torch.no_grad():
            for rows, piece in source.numbered_microbatches(batch):
                width = piece.input_ids.shape[1]
                reference[rows, :width] = score(models["reference"], piece, temperature=self.temperature).logprobs
                old_values[rows, :width] = values(models["value_model"], piece)
                if after_cutoff is not None:
                    after_cutoff[rows] = final_values(models["value_model"], piece)
        if after_cutoff is not None:
            after_cutoff = torch.where(stopped, 0.0, after_cutoff)
        return replace(batch, reference_logprobs=reference, old_values=old_values), after_cutoff

    def _token_rewards(self, groups: tuple[Group, ...], mask: Tensor, kl_penalty: Tensor) -> Tensor:
        """(B, T): minus the KL penalty, plus the completion's score on its last action or in equal shares."""
        scores = torch.nan_to_num(reward_tensor(groups, kl_penalty), nan=0.0)  # no reward applies: nothing to gain
        scores = scores - self.missing_stop_penalty * (~stopped_tensor(groups, mask)).to(scores.dtype)
        if self.score_clip is not None:
            scores = scores.clamp(-self.score_clip, self.score_clip)
        if self.reward_placement == "dense":
            return torch.where(mask, (scores / mask.sum(-1))[:, None], 0.0) - kl_penalty
        columns = torch.arange(mask.shape[1], device=mask.device)
        last_action = (mask * columns).argmax(-1)
        return (-kl_penalty).scatter_add(1, last_action[:, None], scores[:, None])

    def _steps(self, source: Source, batch: Batch, state: LoopState) -> tuple[Step, ...]:
        """Every epoch splits the rows anew, into minibatches whose sizes differ by one row at most."""
        steps = []
        for epoch in range(self.epochs):
            order = torch.tensor(shuffled(len(batch), f"ppo/{state.seed}/{state.phase}/{epoch}"))
            for rows in order.to(batch.input_ids.device).tensor_split(min(self.minibatches, len(batch))):
                pieces = source.microbatches(batch.select(rows))
                steps.append(Step(pieces, completion_tokens(pieces)))
        return tuple(steps)

    def _controlled(self, state: LoopState, kl_coef: float, kl_per_sequence: float, completions: int) -> LoopState:
        """The coefficient of the next phase: beta (1 + clip(KL / target - 1, +-.2) n / horizon)."""
        if self.kl_controller == "fixed":
            return state
        error = min(0.2, max(-0.2, kl_per_sequence / self.kl_target_per_sequence - 1))
        kl_coef *= 1 + error * completions / self.kl_horizon
        return replace(state, algorithm={**state.algorithm, "kl_coef": kl_coef})

    def loss(self, models: Models, batch: Batch, state: LoopState) -> LossOutput:
        assert batch.old_logprobs is not None and batch.advantages is not None
        assert batch.old_values is not None and batch.returns is not None and batch.reference_logprobs is not None
        mask = batch.completion_mask
        scores, value = score_and_values(
            models["policy"], models["value_model"], batch, temperature=self.temperature, entropy=True
        )
        assert scores.entropy is not None
        log_ratio = torch.where(mask, scores.logprobs - batch.old_logprobs, 0.0)
        policy_terms = clipped_surrogate(log_ratio, batch.advantages, self.clip_low, self.clip_high)
        value_terms = clipped_value_loss(value, batch.old_values, batch.returns, self.value_clip)
        terms = policy_terms + self.value_coef * value_terms
        if self.entropy_coef:  # an entropy that is differentiated costs a second pass over the vocabulary
            terms = terms - self.entropy_coef * scores.entropy
        is_clipped = clipped(log_ratio, batch.advantages, self.clip_low, self.clip_high)
        sums = {
            "loss/policy": masked_sum(policy_terms, batch),
            "loss/value": masked_sum(value_terms, batch),
            "policy/entropy": masked_sum(scores.entropy, batch),
            "policy/approx_kl": masked_sum(0.5 * log_ratio**2, batch),
            "policy/clip_fraction": masked_sum(is_clipped.float(), batch),
            "policy/ratio": masked_sum(log_ratio.exp(), batch),
            "value/mean": masked_sum(value, batch),
        }
        if self.value_clip is not None:
            moved = (value - batch.old_values).abs() > self.value_clip
            sums["value/clip_fraction"] = masked_sum(moved.float(), batch)
        identities = {
            "the log ratio of policy to sampling policy": gap(scores.logprobs, batch.old_logprobs, batch),
            "the clip fraction": gap(is_clipped.float(), torch.zeros_like(log_ratio), batch),
            "the relative change of the values": gap(value, batch.old_values, batch)
            / (1 + gap(batch.old_values, torch.zeros_like(value), batch)),
        }
        if state.step == 0:
            identities["KL to the reference"] = gap(scores.logprobs, batch.reference_logprobs, batch)
        return LossOutput(aggregate(terms, mask), sums, identities)

    def observe(self, state: LoopState, metrics: Mapping[str, float]) -> tuple[LoopState, Directive]:
        limit = self.stop_epochs_above_kl
        if limit is not None and metrics["policy/approx_kl"] > limit:
            return state, Directive(action="end_phase", reason=f"the approximate KL is over {limit} nats a token")
        return state, Directive()


def shuffled(count: int, key: str) -> list[int]:
    """A permutation of 0 .. count - 1 that is a function of the key, the same on every machine."""
    return sorted(range(count), key=lambda i: hashlib.sha256(f"{key}/{i}".encode()).digest())


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> float:
    """1 - Var(returns - values) / Var(returns) over masked entries: 1 = perfect critic, 0 = no better than a constant.

    NaN where the returns do not vary.
    """
    value, target = values[mask], returns[mask]
    variance = target.var(unbiased=False)
    return float("nan") if variance <= 0 else (1 - (target - value).var(unbiased=False) / variance).item()


ALGORITHM = PPO
