"""Direct preference optimisation (arXiv:2305.18290): pairs -> policy and reference logprobs -> logistic loss.

L = mean over pairs of -log sigmoid(beta h), h = [log pi(y_w) - log ref(y_w)] - [log pi(y_l) - log ref(y_l)], with
log pi(y) the sum over the completion's tokens, the stop token included. The sign makes the chosen completion likelier
than the rejected one, relative to the reference.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from alignlab.algorithms import Hyperparameters, Models, completion_rows, gap
from alignlab.forward import score
from alignlab.functional.preference import preference_loss
from alignlab.rollout import Source
from alignlab.types import Batch, Directive, LoopState, LossOutput, Phase, Role, Step


class DPO(Hyperparameters):
    """Preference optimisation without a reward model or sampling."""

    metrics_file: ClassVar[str | None] = None
    dropout: ClassVar[bool] = False
    data_kind: ClassVar[str] = "pairs"

    name: Literal["dpo"] = "dpo"
    learning_rate: float = Field(1e-6, gt=0)
    """Peak learning rate of AdamW (trl: 1e-6 for full fine-tuning; about ten times that for LoRA)."""
    max_grad_norm: float = Field(1.0, gt=0)
    """Gradient norm above which gradients are scaled down."""
    pairs_per_step: int = Field(32, ge=1)
    """Pairs an optimiser step."""
    beta: float = Field(0.1, gt=0)
    """Strength of the pull towards the reference (beta): the larger, the closer the policy stays."""
    loss_kind: Literal["sigmoid", "hinge", "ipo"] = "sigmoid"
    """sigmoid (the paper), hinge (arXiv:2305.10425), or ipo (arXiv:2310.12036)."""
    label_smoothing: float = Field(0.0, ge=0, lt=0.5)
    """Share of pairs assumed to be labelled the wrong way round (cDPO); only with `sigmoid`."""
    average_logprobs: bool = False
    """Mean instead of sum over a completion's tokens; ipo's authors average."""

    @model_validator(mode="after")
    def _smoothing_needs_sigmoid(self) -> DPO:
        if self.label_smoothing and self.loss_kind != "sigmoid":
            raise ValueError(f"label_smoothing works with loss_kind sigmoid only, not {self.loss_kind}")
        return self

    def models(self) -> Mapping[str, Role]:
        policy = Role(learning_rate=self.learning_rate, max_grad_norm=self.max_grad_norm)
        return {"policy": policy, "reference": Role()}

    def collect(self, models: Models, source: Source, state: LoopState) -> tuple[Phase, LoopState]:
        with torch.no_grad():
            batches = tuple(
                replace(batch, reference_logprobs=score(models["reference"], batch).logprobs)
                for batch in source.pair_batches(self.pairs_per_step, state)
            )
        return Phase((Step(batches, completion_rows(batches) / 2),)), state

    def loss(self, models: Models, batch: Batch, state: LoopState) -> LossOutput:
        assert batch.reference_logprobs is not None
        logprobs = score(models["policy"], batch).logprobs
        chosen, rejected = self._completions(logprobs, batch)
        reference_chosen, reference_rejected = self._completions(batch.reference_logprobs, batch)
        terms = preference_loss(
            chosen, rejected, reference_chosen, reference_rejected,
            beta=self.beta, kind=self.loss_kind, label_smoothing=self.label_smoothing,
        )  # fmt: skip
        with torch.no_grad():
            reward_chosen = self.beta * (chosen - reference_chosen)
            reward_rejected = self.beta * (rejected - reference_rejected)
            right = (reward_chosen > reward_rejected).float() + 0.5 * (reward_chosen == reward_rejected).float()
        pairs = float(len(chosen))
        sums = {
            "preference/accuracy": (right.sum().item(), pairs),
            "preference/margin": ((reward_chosen - reward_rejected).sum().item(), pairs),
            "preference/reward_chosen": (reward_chosen.sum().item(), pairs),
            "preference/reward_rejected": (reward_rejected.sum().item(), pairs),
            "policy/logprobs_chosen": (chosen.sum().item(), pairs),
            "policy/logprobs_rejected": (rejected.sum().item(), pairs),
        }
        if state.step > 0:
            return LossOutput(terms.sum(), sums)
        # Before the first update policy and reference are the same model: no KL, and every pair costs the same.
        at_start = {"sigmoid": math.log(2), "hinge": 1.0, "ipo": 1 / (2 * self.beta) ** 2}[self.loss_kind]
        identities = {
            "the loss over its value at policy = reference, minus 1": terms.mean().item() / at_start - 1,
            "KL to the reference": gap(logprobs, batch.reference_logprobs, batch),
        }
        return LossOutput(terms.sum(), sums, identities)

    def _completions(self, logprobs: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """(B, T) logprobs -> one number a completion, chosen and rejected."""
        totals = torch.where(batch.completion_mask, logprobs, 0).sum(-1)
        if self.average_logprobs:
            totals = totals / batch.completion_mask.sum(-1)
        chosen, rejected = totals.chunk(2)
        return chosen, rejected

    def observe(self, state: LoopState, metrics: Mapping[str, float]) -> tuple[LoopState, Directive]:
        return state, Directive()


ALGORITHM = DPO
