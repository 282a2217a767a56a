"""Direct preference optimisation (arXiv:2305.18290): pairs -> policy and reference logprobs -> logistic loss.

L = mean over pairs of -log sigmoid(beta h), h = [log pi(y_w) - log ref(y_w)] - [log pi(y_l) - log ref(y_l)], with
log pi(y) the sum over the completion's tokens, the stop token included. The sign makes the chosen completion likelier
than the rejected one, relative to the reference. Its relatives are other functions of h.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator
from torch import Tensor

from alignlab.algorithms import Hyperparameters, Models, completion_rows, gap
from alignlab.algorithms._preference import LOSS_AT_START, halves, pair_metrics, referenced, row_sums, row_tokens
from alignlab.forward import score
from alignlab.functional.preference import preference_loss
from alignlab.rollout import Source
from alignlab.types import Batch, Directive, LoopState, LossOutput, Phase, Role, Row, Step

SMOOTHED = ("sigmoid", "robust")
"""Losses that know of wrong labels."""


class PreferenceLoss(Hyperparameters):
    """The loss of a pair as a function of h, for pairs from a file (`DPO`) or sampled ones (`online_dpo`)."""

    VARIANTS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "cdpo": {"loss_kind": "sigmoid", "label_smoothing": 0.1},
        "robust": {"loss_kind": "robust", "label_smoothing": 0.1},
        "hinge": {"loss_kind": "hinge"},
        "ipo": {"loss_kind": "ipo", "average_logprobs": False},
        "ipo_average": {"loss_kind": "ipo", "average_logprobs": True},
        "length_normalised": {"loss_kind": "sigmoid", "average_logprobs": True, "beta": 5.0},
        "rpo": {"loss_kind": "sigmoid", "rpo_alpha": 1.0},
    }

    beta: float = Field(0.1, gt=0)
    """Strength of the pull towards the reference (beta; tau in the IPO paper): the larger, the closer the policy stays.
    .1 is the paper's and trl's; per token (`average_logprobs`) open-instruct uses 5 with `sigmoid`."""
    loss_kind: Literal["sigmoid", "robust", "hinge", "ipo"] = "sigmoid"
    """sigmoid (the paper), robust (arXiv:2403.00409), hinge (arXiv:2305.10425), or ipo (arXiv:2310.12036)."""
    label_smoothing: float = Field(0.0, ge=0, lt=0.5)
    """Share of pairs assumed to be labelled the wrong way round (epsilon): cDPO with `sigmoid`, or `robust`."""
    average_logprobs: bool = False
    """Mean instead of sum over a completion's tokens, in h; ipo's authors average (and trl), others sum."""
    rpo_alpha: float = Field(0.0, ge=0)
    """Weight of the negative log-likelihood of the chosen completion, the mean over its tokens (alpha of
    arXiv:2404.19733, 1 there): what keeps it from falling. 0 = without."""

    @model_validator(mode="after")
    def _smoothing_needs_a_kind(self) -> PreferenceLoss:
        if self.label_smoothing and self.loss_kind not in SMOOTHED:
            raise ValueError(f"label_smoothing works with loss_kind sigmoid and robust only, not {self.loss_kind}")
        return self

    def pair_loss(self, logprobs: Tensor, batch: Batch, state: LoopState) -> LossOutput:
        """The summed terms of a pair batch with reference logprobs; (B, T) logprobs of the policy, differentiable."""
        assert batch.reference_logprobs is not None
        totals, references = row_sums(logprobs, batch), row_sums(batch.reference_logprobs, batch)
        divisor = row_tokens(batch) if self.average_logprobs else totals.new_ones(len(batch))
        chosen, rejected = halves(totals / divisor)
        reference_chosen, reference_rejected = halves(references / divisor)
        preferences = preference_loss(
            chosen, rejected, reference_chosen, reference_rejected,
            beta=self.beta, kind=self.loss_kind, label_smoothing=self.label_smoothing,
        )  # fmt: skip
        rewards = self.beta * (chosen - reference_chosen), self.beta * (rejected - reference_rejected)
        sums, pairs, total = pair_metrics(*halves(totals), *rewards), float(len(chosen)), preferences.sum()
        if self.rpo_alpha:
            nll = halves(-totals / row_tokens(batch))[0].sum()
            total, sums["policy/nll_chosen"] = total + self.rpo_alpha * nll, (nll.item(), pairs)
        if state.step > 0:
            return LossOutput(total, sums)
        # Before the first update policy and reference are the same model: no KL, and every pair costs the same.
        # Rounding adds up over a completion's tokens, so what is asked of its sum is asked per token.
        at_start = {"hinge": 1.0, "ipo": 1 / (2 * self.beta) ** 2}.get(self.loss_kind, math.log(2))
        tokens = row_tokens(batch).double().mean().item()
        identities = {
            LOSS_AT_START: (preferences.mean().item() / at_start - 1) / tokens,
            "KL to the reference": gap(logprobs, batch.reference_logprobs, batch),
        }
        return LossOutput(total, sums, identities)

    def formula(self) -> tuple[str, ...]:
        drift_chosen, drift_rejected = "chosen - reference_chosen", "rejected - reference_rejected"
        h = f"({drift_chosen}) - ({drift_rejected})"
        if self.average_logprobs:
            h = f"({drift_chosen}) / chosen_tokens - ({drift_rejected}) / rejected_tokens"
        beta, flipped, right = self.beta, self.label_smoothing, 1 - self.label_smoothing
        smoothed = f"{right!r} * log_sigmoid({beta!r} * h)", f"{flipped!r} * log_sigmoid(-{beta!r} * h)"
        term = {
            "sigmoid": f"-{smoothed[0]} - {smoothed[1]}" if flipped else f"-log_sigmoid({beta!r} * h)",
            "robust": f"({smoothed[1]} - {smoothed[0]}) / {1 - 2 * flipped!r}",
            "hinge": f"maximum(0, 1 - {beta!r} * h)",
            "ipo": f"(h - {1 / (2 * beta)!r})**2",
        }[self.loss_kind]
        rpo = (f"term = term - {self.rpo_alpha!r} * chosen / chosen_tokens",) if self.rpo_alpha else ()
        return f"h = {h}", f"term = {term}", *rpo, "loss = sum(term) / pairs"


class DPO(PreferenceLoss):
    """Preference optimisation without a reward model or sampling."""

    metrics_file: ClassVar[str | None] = None
    dropout: ClassVar[bool] = False
    data_kind: ClassVar[str] = "pairs"
    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "trl": {"learning_rate": 1e-6, "pairs_per_step": 8, "beta": 0.1, "max_grad_norm": 1.0},
        "openrlhf": {"learning_rate": 1e-5, "pairs_per_step": 128, "beta": 0.1, "max_grad_norm": 1.0},
        "paper": {"learning_rate": 1e-6, "pairs_per_step": 64, "beta": 0.1},
    }
    """trl's DPOConfig on one device, OpenRLHF's train_dpo, arXiv:2305.18290 app. B (with RMSprop there)."""
    DEPARTURES: ClassVar[tuple[str, ...]] = (
        "The optimiser is AdamW, not the paper's RMSprop.",
        "loss_kind ipo sums logprobs over tokens, as IPO's formula reads; trl averages them, which is ipo_average.",
        "rpo_alpha weighs the token mean of each chosen completion, averaged over pairs; trl's sft term is one mean "
        "over all chosen tokens of a microbatch, and arXiv:2404.19733 divides by prompt and completion tokens.",
        "A completion that is too long is cut and keeps its stop token, and a prompt is never cut; trl cuts the end "
        "off prompt and completion together.",
    )

    name: Literal["dpo"] = "dpo"
    variant: Literal["cdpo", "robust", "hinge", "ipo", "ipo_average", "length_normalised", "rpo"] | None = None
    """A relative of DPO by its name: what loss_kind, label_smoothing, average_logprobs, beta and rpo_alpha are."""
    learning_rate: float = Field(1e-6, gt=0)
    """Peak learning rate of AdamW (trl: 1e-6 for full fine-tuning; about ten times that for LoRA)."""
    max_grad_norm: float = Field(1.0, gt=0)
    """Gradient norm above which gradients are scaled down."""
    pairs_per_step: int = Field(32, ge=1)
    """Pairs an optimiser step."""

    def models(self) -> Mapping[str, Role]:
        policy = Role(learning_rate=self.learning_rate, max_grad_norm=self.max_grad_norm)
        return {"policy": policy, "reference": Role()}

    def reference_rows(self, source: Source, state: LoopState) -> list[Row]:
        """What the phase needs the reference's logprobs of; they can be computed before training."""
        return [row for pair in source.phase_pairs(self.pairs_per_step, state) for row in (pair.chosen, pair.rejected)]

    def collect(self, models: Models, source: Source, state: LoopState) -> tuple[Phase, LoopState]:
        batches = referenced(models, source.pair_batches(self.pairs_per_step, state))
        return Phase((Step(batches, completion_rows(batches) / 2),)), state

    def loss(self, models: Models, batch: Batch, state: LoopState) -> LossOutput:
        return self.pair_loss(score(models["policy"], batch).logprobs, batch, state)

    def observe(self, state: LoopState, metrics: Mapping[str, float]) -> tuple[LoopState, Directive]:
        return state, Directive()


ALGORITHM = DPO
