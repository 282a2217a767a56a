"""Group relative policy optimisation (arXiv:2402.03300): prompts -> groups of samples -> advantages -> clipped steps.

Four choices make a method: what is subtracted from a reward (baseline) and what divides it (scale) x how the ratio to
the sampling policy is bounded (surrogate, clips) x where the KL to the reference acts x how per-token terms meet
(aggregation). The paper's: group mean and standard deviation, token ratio, KL in the loss, mean of row means. The sign
makes completions that beat their baseline likelier. A loss near 0 is normal: at ratio 1 the advantages of a group
cancel, their gradients do not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from alignlab.algorithms import (
    Models,
    beyond_rounding,
    completion_rows,
    completion_tokens,
    gap,
    masked_sum,
    numbers_dtype,
)
from alignlab.algorithms._online import KLControl, ScoreShaping, with_reference
from alignlab.forward import score
from alignlab.functional.advantages import component_advantages, group_advantages, running_advantages
from alignlab.functional.masked import aggregate
from alignlab.functional.surrogate import clipped, clipped_importance, clipped_surrogate, sequence_log_ratio
from alignlab.rollout import Source, component_tensor, is_constant, rollout_metrics, stopped_tensor
from alignlab.types import Batch, Directive, Group, LoopState, LossOutput, Phase, Role, Step


class GRPO(ScoreShaping, KLControl):
    """Policy gradient with the group as its own baseline; no critic."""

    metrics_file: ClassVar[str | None] = None
    dropout: ClassVar[bool] = False
    data_kind: ClassVar[str] = "prompts"

    VARIANTS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "dr_grpo": {"scale": "none", "aggregation": "constant", "kl_coef": 0.0},
        "dapo": {"clip_low": 0.2, "clip_high": 0.28, "aggregation": "token", "max_redraws": 10, "mask_truncated": True,
                 "kl_coef": 0.0},
        "gspo": {"surrogate": "sequence", "clip_low": 3e-4, "clip_high": 4e-4, "aggregation": "sequence"},
        "cispo": {"surrogate": "cispo", "clip_high": 4.0, "dual_clip": None, "aggregation": "token", "kl_coef": 0.0},
        "rloo": {"baseline": "leave_one_out", "scale": "none", "kl_placement": "reward", "kl_estimator": "k1",
                 "kl_coef": 0.05, "aggregation": "constant"},
    }  # fmt: skip
    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper": {"learning_rate": 1e-6, "group_size": 64, "kl_coef": 0.04, "max_grad_norm": 1.0},
        "trl": {"learning_rate": 1e-6, "group_size": 8, "aggregation": "token"},
        "verl": {"learning_rate": 1e-6, "aggregation": "token", "kl_coef": 0.001, "dual_clip": 3.0},
        "openrlhf": {"learning_rate": 1e-6, "kl_coef": 0.01, "kl_estimator": "k3", "score_clip": 10.0,
                     "aggregation": "token"},
    }  # fmt: skip
    """arXiv:2402.03300, 4.2; trl's GRPOConfig; verl and OpenRLHF with their settings and the k3 in the loss that their
    pages ask for in GRPO (both sample one completion a prompt by default, which has no group)."""
    DEPARTURES: ClassVar[tuple[str, ...]] = (
        "Every aggregation is normalised over the whole optimiser step; trl's `bnpo` is by the microbatch.",
        "A completion that mask_truncated leaves out is in no denominator; in trl's sequence and constant "
        "aggregation it still counts as a row.",
        "A step uses all completions of its phase; peers split a phase into minibatches, which are off policy from the "
        "second on. Here only epochs > 1 is, and clips do nothing before.",
        "Groups of equal rewards are told by comparison and have advantage 0 exactly, whatever eps and rounding.",
        "eps is 1e-4, as in trl; 1e-6 in verl, 1e-9 in OpenRLHF.",
        "k3 in the loss is not multiplied by the ratio to the sampling policy, as in the paper; trl 1.16 does so "
        "(use_bias_correction_kl).",
        "RLOO clips token ratios, trl's the ratio of the whole completion; with one epoch neither ever clips.",
        "DAPO's soft overlong penalty depends on the limit, so overlong_buffer is not part of the variant.",
    )

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
    baseline: Literal["group", "leave_one_out", "ema"] = "group"
    """What is subtracted from a reward: its group's mean, its siblings' mean (RLOO, arXiv:2402.14740), or the running
    mean of earlier phases' scores."""
    scale: Literal["group", "batch", "none"] = "group"
    """What divides: the group's standard deviation (the paper), the batch's, or nothing (Dr. GRPO)."""
    normalise_components: bool = False
    """Normalise each reward component within its group, then sum, then normalise over the batch (GDPO,
    arXiv:2601.05242); needs baseline and scale `group`."""
    surrogate: Literal["token", "sequence", "cispo"] = "token"
    """Ratio of each token (the paper), of the whole completion (GSPO, arXiv:2507.18071), or as a bounded weight without
    gradient (CISPO, arXiv:2506.13585)."""
    clip_low: float = Field(0.2, gt=0, lt=1)
    clip_high: float = Field(0.2, gt=0)
    """Ratio range 1 - clip_low .. 1 + clip_high (epsilon); DAPO's clip-higher is .28. CISPO only has the upper end."""
    dual_clip: float | None = Field(None, gt=1)
    """Ratio above which a token with negative advantage is held too: the two-sided clip (delta of INTELLECT-2, c of
    dual-clip PPO); null = not held."""
    epochs: int = Field(1, ge=1)
    """Optimiser steps on the same rollouts (mu)."""
    kl_coef: float = Field(0.0, ge=0)
    """Weight of the KL to the reference (beta; .04 in the paper); 0 leaves reference and KL out."""
    kl_placement: Literal["reward", "loss", "none"] = "loss"
    """In the loss (the paper), or taken off the reward before advantages are formed."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    """Per-token estimator; k3 is the paper's, k2 has the gradient of the true KL on policy."""
    entropy_coef: float = Field(0.0, ge=0)
    """Weight of the true entropy bonus (document 004: .01)."""
    aggregation: Literal["token", "sequence", "constant"] = "sequence"
    """Mean over rows of token means (the paper), over all tokens of the step (DAPO), or the sum over rows times the
    completion limit (Dr. GRPO)."""
    max_redraws: int = Field(0, ge=0)
    """Rounds in which groups that all earned the same are replaced by groups drawn anew, from the prompts in another
    order (DAPO's dynamic sampling, 10 batches there); what is still constant then stays."""
    mask_truncated: bool = False
    """Leave completions that were cut off out of loss and denominator; they still count in their group's baseline."""

    @model_validator(mode="after")
    def _consistent(self) -> GRPO:
        if self.baseline == "ema" and self.scale == "group":
            raise ValueError("baseline ema goes with scale batch or none: where siblings agree, a group's std is 0")
        if self.normalise_components and (self.baseline, self.scale) != ("group", "group"):
            raise ValueError("normalise_components is a group mean and std for each component: drop baseline and scale")
        if self.normalise_components and self.score_normaliser != "none":
            raise ValueError("normalise_components and score_normaliser are two ways to normalise; choose one")
        if self.normalise_components and (self.reward_scale != 1 or self.score_clip is not None):
            raise ValueError("normalise_components leaves nothing to reward_scale and score_clip: drop them")
        if self.dual_clip is not None and self.surrogate == "cispo":
            raise ValueError("surrogate cispo bounds every ratio by 1 + clip_high already: drop dual_clip")
        if self.dual_clip is not None and self.dual_clip <= 1 + self.clip_high:
            raise ValueError(f"dual_clip must be above 1 + clip_high = {1 + self.clip_high:g}")
        return self

    def models(self) -> Mapping[str, Role]:
        policy = Role(learning_rate=self.learning_rate, max_grad_norm=self.max_grad_norm)
        return {"policy": policy, "reference": Role()} if self.measures_kl else {"policy": policy}

    def collect(self, models: Models, source: Source, state: LoopState) -> tuple[Phase, LoopState]:
        groups, metrics = self._rollouts(models, source, state)
        batch, state = source.batch(groups, numbers_dtype(models["policy"])), self.controlled(state)
        if self.measures_kl:
            batch = with_reference(models, source, batch, self.temperature)
            found, state = self.measured(batch, state)
            metrics |= found
        advantages, state = self._advantages(groups, source, batch, state)
        mask = batch.completion_mask
        if self.mask_truncated:
            mask = mask & stopped_tensor(groups, mask)[:, None]
            metrics["completion/masked_fraction"] = 1 - mask.any(-1).double().mean().item()
        batch = replace(batch, completion_mask=mask, advantages=torch.where(mask, advantages[:, None], 0.0))
        kept = mask.any(-1).nonzero()[:, 0]
        if not len(kept):  # every completion was cut off
            return Phase((), metrics, groups), state
        pieces = source.microbatches(batch.select(kept))
        normaliser = {
            "token": completion_tokens(pieces),
            "sequence": completion_rows(pieces),
            "constant": completion_rows(pieces) * source.sampling.max_completion_tokens,
        }[self.aggregation]
        return Phase((Step(pieces, normaliser),) * self.epochs, metrics, groups), state

    def _rollouts(self, models: Models, source: Source, state: LoopState) -> tuple[tuple[Group, ...], dict[str, float]]:
        """The phase's groups, those that say nothing replaced where asked for; metrics are of all that was drawn."""
        groups = source.rollouts(models["policy"], self.prompts_per_phase, self.group_size, state)
        if not self.max_redraws:
            return groups, rollout_metrics(groups, source.rewards)
        dull = [g for g in groups if is_constant(g, by_component=self.normalise_components)]
        kept = [g for g in groups if g not in dull]
        drawn, redraws = list(groups), 0
        while dull and redraws < self.max_redraws:
            redraws += 1
            fresh = source.rollouts(models["policy"], len(dull), self.group_size, state, attempt=redraws)
            drawn += fresh
            kept += [g for g in fresh if not is_constant(g, by_component=self.normalise_components)]
            dull = dull[: self.prompts_per_phase - len(kept)]
        found = rollout_metrics(drawn, source.rewards)
        share = rollout_metrics((*kept, *dull))["group/constant_fraction"]
        dropped = {"group/drawn_constant_fraction": found["group/constant_fraction"], "group/redraws": float(redraws)}
        return (*kept, *dull), {**found, **dropped, "group/constant_fraction": share}

    def _advantages(
        self, groups: Sequence[Group], source: Source, batch: Batch, state: LoopState
    ) -> tuple[Tensor, LoopState]:
        """(N,) in group order; a KL in the reward comes off each completion's score first."""
        assert batch.old_logprobs is not None
        like, limit = batch.old_logprobs, source.sampling.max_completion_tokens
        penalty = torch.zeros_like(like[:, 0])
        if self.penalises and self.kl_placement == "reward":
            assert batch.reference_logprobs is not None
            kl = self.token_kl(batch.old_logprobs, batch.reference_logprobs, batch.completion_mask)
            penalty = state.algorithm["kl_coef"] * kl.sum(-1)
        if self.normalise_components:
            components, weights = component_tensor(groups, source.rewards, like)
            gains = component_advantages(components, weights, self.group_size)
            costs = penalty + self.penalties(groups, like, limit)  # keep their size, beside advantages of sd 1
            costs = costs.masked_fill(components.isnan().all(0), torch.nan)  # what nobody judged stays at 0
            return gains - group_advantages(costs, self.group_size, scale="none"), state
        earlier = state
        scores, state = self.scores(groups, like, state, limit)
        scores = scores - penalty
        if self.baseline == "ema":
            return self._above_running_mean(scores, earlier, state)
        return group_advantages(scores, self.group_size, scale=self.scale, baseline=self.baseline), state

    def _above_running_mean(self, scores: Tensor, earlier: LoopState, state: LoopState) -> tuple[Tensor, LoopState]:
        """Against the mean of earlier phases; in the first phase, which has none, against its own."""
        known = "baseline_weight" in earlier.algorithm
        mean, weight = (earlier.algorithm[f"baseline_{k}"] if known else 0.0 for k in ("mean", "weight"))
        now = scores[~scores.isnan()].mean().item()
        decay = self.ema_decay
        news = {"baseline_mean": decay * mean + (1 - decay) * now, "baseline_weight": decay * weight + 1 - decay}
        state = replace(state, algorithm={**state.algorithm, **news})
        assert self.scale != "group"
        return running_advantages(scores, mean / weight if known else now, scale=self.scale), state

    def loss(self, models: Models, batch: Batch, state: LoopState) -> LossOutput:
        assert batch.old_logprobs is not None and batch.advantages is not None
        mask, clips = batch.completion_mask, (self.clip_low, self.clip_high)
        scores = score(models["policy"], batch, temperature=self.temperature, entropy=True)
        assert scores.entropy is not None
        log_ratio = torch.where(mask, scores.logprobs - batch.old_logprobs, 0.0)
        bounded = sequence_log_ratio(log_ratio, mask) if self.surrogate == "sequence" else log_ratio
        if self.surrogate == "cispo":
            logprobs = torch.where(mask, scores.logprobs, 0.0)
            terms = clipped_importance(logprobs, log_ratio, batch.advantages, 1 + self.clip_high)
        else:
            terms = clipped_surrogate(bounded, batch.advantages, *clips, self.dual_clip)
        beyond = beyond_rounding(bounded, models["policy"])
        sums = {
            "policy/entropy": masked_sum(scores.entropy, batch),
            "policy/approx_kl": masked_sum(0.5 * log_ratio**2, batch),
            "policy/clip_fraction": masked_sum(self._is_clipped(bounded, batch.advantages), batch),
            "policy/ratio": masked_sum(log_ratio.exp(), batch),
        }
        identities = {
            "the log ratio of policy to sampling policy": gap(scores.logprobs, batch.old_logprobs, batch),
            "the clip fraction": gap(self._is_clipped(beyond, batch.advantages), torch.zeros_like(beyond), batch),
        }
        if self.entropy_coef:
            terms = terms - self.entropy_coef * scores.entropy
        if batch.reference_logprobs is not None:
            if self.penalises and self.kl_placement == "loss":
                kl = self.token_kl(scores.logprobs, batch.reference_logprobs, mask)
                sums["loss/kl"] = masked_sum(kl, batch)
                terms = terms + state.algorithm["kl_coef"] * kl
            if state.step == 0:
                identities["KL to the reference"] = gap(scores.logprobs, batch.reference_logprobs, batch)
        return LossOutput(aggregate(terms, mask, self.aggregation), sums, identities)

    def _is_clipped(self, log_ratio: Tensor, advantages: Tensor) -> Tensor:
        """(B, T) 1.0 where a ratio is bounded, so that it has no gradient (CISPO: a smaller weight)."""
        if self.surrogate == "cispo":
            return (log_ratio.exp() > 1 + self.clip_high).float()
        return clipped(log_ratio, advantages, self.clip_low, self.clip_high, self.dual_clip).float()

    def observe(self, state: LoopState, metrics: Mapping[str, float]) -> tuple[LoopState, Directive]:
        return self.guarded(state, metrics)

    def formula(self) -> tuple[str, ...]:
        low, high = 1 - self.clip_low, 1 + self.clip_high
        lines: tuple[str, ...] = ("log_ratio = logprobs - old_logprobs",)
        if self.surrogate == "sequence":
            lines += ("log_ratio = row_mean(log_ratio)",)
        lines += ("ratio = exp(clip(log_ratio, -20, 20))",)
        if self.surrogate == "cispo":
            lines += (f"term = -stop_gradient(minimum(ratio, {high!r})) * advantages * logprobs",)
        else:
            plain = "ratio" if self.dual_clip is None else f"minimum(ratio, {self.dual_clip!r})"
            lines += (f"term = maximum(-advantages * {plain}, -advantages * clip(ratio, {low!r}, {high!r}))",)
        if self.entropy_coef:
            lines += (f"term = term - {self.entropy_coef!r} * entropy",)
        if kl := self.kl_formula():
            lines += (*kl, f"term = term + {self.kl_weight()} * kl")
        return *lines, {
            "token": "loss = sum(mask * term) / completion_tokens",
            "sequence": "loss = sum(row_mean(term)) / rows",
            "constant": "loss = sum(mask * term) / (rows * max_completion_tokens)",
        }[self.aggregation]


ALGORITHM = GRPO
