"""Online DPO (arXiv:2402.04792): prompts -> groups of samples -> the best and the worst of each -> DPO's loss.

Each phase samples a group of completions a prompt from the policy; the one with the highest score and the one with the
lowest become a pair, and the pairs are DPO's (`dpo`), against the starting policy as reference. A group that all scored
the same says nothing and is left out; a phase of such groups only has no steps.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from alignlab.algorithms import Models, gap, numbers_dtype
from alignlab.algorithms._online import ScoreShaping, with_reference
from alignlab.algorithms._preference import row_sums
from alignlab.algorithms.dpo import PreferenceLoss
from alignlab.forward import score
from alignlab.rollout import Source, rollout_metrics
from alignlab.types import Batch, Directive, LoopState, LossOutput, Phase, Role, Step


class OnlineDPO(ScoreShaping, PreferenceLoss):
    """DPO on pairs of the policy's own completions, ranked by the reward."""

    metrics_file: ClassVar[str | None] = None
    dropout: ClassVar[bool] = False
    data_kind: ClassVar[str] = "prompts"
    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "trl": {"learning_rate": 5e-7, "prompts_per_phase": 8, "group_size": 2, "temperature": 0.9, "beta": 0.1},
    }
    """trl's OnlineDPOConfig on one device."""
    DEPARTURES: ClassVar[tuple[str, ...]] = (
        "The reward ranks the completions, where the paper asks a language model which of two it prefers.",
        "Of more than two completions the best and the worst make the pair.",
        "A group whose completions all score the same is left out; trl then calls the first one chosen.",
    )

    name: Literal["online_dpo"] = "online_dpo"
    variant: Literal["cdpo", "robust", "hinge", "ipo", "ipo_average", "length_normalised", "rpo"] | None = None
    """A relative of DPO by its name: what loss_kind, label_smoothing, average_logprobs, beta and rpo_alpha are."""
    learning_rate: float = Field(5e-7, gt=0)
    """Peak learning rate of AdamW (trl: 5e-7)."""
    max_grad_norm: float = Field(1.0, gt=0)
    """Gradient norm above which gradients are scaled down."""
    prompts_per_phase: int = Field(32, ge=1)
    """Prompts sampled a phase; each gives one pair at most."""
    group_size: int = Field(2, ge=2)
    """Completions a prompt, of which the best and the worst make the pair (the paper and trl: 2)."""
    temperature: float = Field(1.0, gt=0)
    """Sampling temperature; every logprob of the method is at this temperature (trl: .9)."""
    epochs: int = Field(1, ge=1)
    """Optimiser steps on the same pairs; each uses all of them."""

    def models(self) -> Mapping[str, Role]:
        policy = Role(learning_rate=self.learning_rate, max_grad_norm=self.max_grad_norm)
        return {"policy": policy, "reference": Role()}

    def collect(self, models: Models, source: Source, state: LoopState) -> tuple[Phase, LoopState]:
        groups = source.rollouts(models["policy"], self.prompts_per_phase, self.group_size, state)
        batch = source.batch(groups, numbers_dtype(models["policy"]))
        batch = with_reference(models, source, batch, self.temperature)
        assert batch.old_logprobs is not None and batch.reference_logprobs is not None
        scores, state = self.scores(groups, batch.old_logprobs, state, source.sampling.max_completion_tokens)
        chosen, rejected = best_and_worst(scores, self.group_size)
        drifts = row_sums(batch.old_logprobs - batch.reference_logprobs, batch)  # of all completions, not of the pairs
        metrics = {
            **rollout_metrics(groups, source.rewards),
            "policy/kl_per_sequence": drifts.mean().item(),
            "policy/kl_per_token": (drifts.sum() / batch.completion_mask.sum()).item(),
            "policy/kl_standard_error": (drifts.std() / len(batch) ** 0.5).item(),
            "preference/pairs": float(len(chosen)),
        }
        if len(chosen):
            metrics["preference/score_gap"] = (scores[chosen] - scores[rejected]).mean().item()
        pieces = source.pair_pieces(batch, chosen, rejected)
        steps = (Step(pieces, float(len(chosen))),) * self.epochs if len(chosen) else ()
        return Phase(steps, metrics, groups), state

    def loss(self, models: Models, batch: Batch, state: LoopState) -> LossOutput:
        assert batch.old_logprobs is not None
        logprobs = score(models["policy"], batch, temperature=self.temperature).logprobs
        output = self.pair_loss(logprobs, batch, state)
        on_policy = {"the log ratio of policy to sampling policy": gap(logprobs, batch.old_logprobs, batch)}
        return LossOutput(output.total, output.sums, {**output.identities, **on_policy})

    def observe(self, state: LoopState, metrics: Mapping[str, float]) -> tuple[LoopState, Directive]:
        return state, Directive()


def best_and_worst(scores: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """(N,) scores in group order, NaN where nobody judged -> rows of the best and of the worst, (P,) each.

    Of equals the first sampled counts. A group without two different scores is left out.
    """
    of_groups = scores.view(-1, group_size)
    best = of_groups.nan_to_num(nan=-torch.inf).argmax(-1)
    worst = of_groups.nan_to_num(nan=torch.inf).argmin(-1)
    first = torch.arange(len(of_groups), device=scores.device) * group_size
    chosen, rejected = first + best, first + worst
    differ = scores[chosen] > scores[rejected]  # never where all are NaN
    return chosen[differ], rejected[differ]


ALGORITHM = OnlineDPO
