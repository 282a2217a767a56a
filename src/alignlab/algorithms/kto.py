"""Kahneman-Tversky optimisation (arXiv:2402.01306): single labelled completions -> log ratios -> a bounded loss.

L = mean over completions of w_D (1 - sigmoid(beta (r - z0))) where desirable and w_U (1 - sigmoid(beta (z0 - r))) where
not, with r = log pi(y) - log ref(y) summed over the completion's tokens. z0 = max(0, mean of r over completions that
were put behind another prompt of the step) estimates the KL to the reference and gets no gradient: a gain only counts
where it is more than the policy's drift. The sign makes desirable completions likelier than that, undesirable less.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from alignlab.algorithms import Hyperparameters, Models, completion_rows, gap
from alignlab.algorithms._preference import LOSS_AT_START, TIE, referenced, row_sums, row_tokens
from alignlab.forward import score
from alignlab.functional.preference import kto_loss
from alignlab.rollout import Source
from alignlab.timing import span
from alignlab.types import Batch, Directive, LoopState, LossOutput, Phase, Role, Row, Step


class KTO(Hyperparameters):
    """Preference optimisation from verdicts on single completions: no pairs, any ratio of good to bad."""

    metrics_file: ClassVar[str | None] = None
    dropout: ClassVar[bool] = False
    data_kind: ClassVar[str] = "labelled"
    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "trl": {"learning_rate": 1e-6, "examples_per_step": 8, "beta": 0.1},
        "openrlhf": {"learning_rate": 1e-5, "examples_per_step": 128, "beta": 0.01},
        "paper": {"learning_rate": 5e-6, "examples_per_step": 32, "beta": 0.1},
    }
    """trl's KTOConfig on one device, OpenRLHF's train_kto, and the authors' code (HALOs)."""
    DEPARTURES: ClassVar[tuple[str, ...]] = (
        "The reference point is estimated once over all rows of the step; trl and the authors take each microbatch's.",
        "A completion is put behind the prompt of the next row that has another prompt; trl takes the next row even "
        "where its prompt is the same.",
    )

    name: Literal["kto"] = "kto"
    learning_rate: float = Field(1e-6, gt=0)
    """Peak learning rate of AdamW (trl: 1e-6; the authors: 5e-6, larger than DPO's as the loss is bounded)."""
    max_grad_norm: float = Field(1.0, gt=0)
    """Gradient norm above which gradients are scaled down."""
    examples_per_step: int = Field(64, ge=2)
    """Labelled completions an optimiser step; of one alone there is no mismatched one."""
    beta: float = Field(0.1, gt=0)
    """How soon a gain over the reference point counts as certain (beta): the larger, the closer the policy stays."""
    desirable_weight: float = Field(1.0, gt=0)
    """w_D (lambda_D). The authors want w_D n_D / (w_U n_U) within 1 and 4/3, n counting the labels in the data."""
    undesirable_weight: float = Field(1.0, gt=0)
    """w_U (lambda_U)."""

    def models(self) -> Mapping[str, Role]:
        policy = Role(learning_rate=self.learning_rate, max_grad_norm=self.max_grad_norm)
        return {"policy": policy, "reference": Role()}

    def reference_rows(self, source: Source, state: LoopState) -> list[Row]:
        """What the phase needs the reference's logprobs of; they can be computed before training."""
        rows = self._rows(source, state)
        return rows + mismatched(rows)

    def collect(self, models: Models, source: Source, state: LoopState) -> tuple[Phase, LoopState]:
        batches = referenced(models, source.labelled_batches(self.examples_per_step, state))
        others = referenced(models, source.plan_rows(mismatched(self._rows(source, state))))
        with span("scoring"), torch.no_grad():
            drifts = [log_ratios(score(models["policy"], batch).logprobs, batch) for batch in others]
        reference_point = torch.cat(drifts).mean().clamp(min=0)
        batches = tuple(replace(b, reference_point=reference_point.expand(len(b))) for b in batches)
        return Phase((Step(batches, completion_rows(batches)),)), state

    def _rows(self, source: Source, state: LoopState) -> list[Row]:
        return [item.row for item in source.phase_labelled(self.examples_per_step, state)]

    def loss(self, models: Models, batch: Batch, state: LoopState) -> LossOutput:
        assert batch.labels is not None and batch.reference_point is not None
        assert batch.reference_logprobs is not None
        logprobs, good = score(models["policy"], batch).logprobs, batch.labels
        log_ratio = log_ratios(logprobs, batch)
        terms = kto_loss(
            log_ratio, good, batch.reference_point,
            beta=self.beta, desirable_weight=self.desirable_weight, undesirable_weight=self.undesirable_weight,
        )  # fmt: skip
        with torch.no_grad():
            rewards, totals = self.beta * log_ratio, row_sums(logprobs, batch)
            gain = torch.where(good, 1, -1) * (rewards - self.beta * batch.reference_point)
            right = (gain > TIE).double() + 0.5 * (gain.abs() <= TIE).double()
        of_all = torch.ones_like(good)
        found = {
            "kto/accuracy": (right, of_all),
            "kto/reference_point": (batch.reference_point, of_all),
            "kto/desirable_fraction": (good.double(), of_all),
            "kto/reward_desirable": (rewards, good),
            "kto/reward_undesirable": (rewards, ~good),
            "policy/logprobs_desirable": (totals, good),
            "policy/logprobs_undesirable": (totals, ~good),
        }
        sums = {name: (value[which].sum().item(), float(which.sum())) for name, (value, which) in found.items()}
        if state.step > 0:
            return LossOutput(terms.sum(), sums)
        # Before the first update policy and reference are the same model: no KL, and half of every weight is lost.
        num_good, tokens = good.sum().item(), row_tokens(batch).double().mean().item()
        at_start = (self.desirable_weight * num_good + self.undesirable_weight * (len(batch) - num_good)) / 2
        identities = {
            LOSS_AT_START: (terms.sum().item() / at_start - 1) / tokens,
            "KL to the reference": gap(logprobs, batch.reference_logprobs, batch),
            "the reference point, per token": batch.reference_point.mean().item() / tokens,
        }
        return LossOutput(terms.sum(), sums, identities)

    def observe(self, state: LoopState, metrics: Mapping[str, float]) -> tuple[LoopState, Directive]:
        return state, Directive()

    def formula(self) -> tuple[str, ...]:
        return (
            f"gain = {self.beta!r} * ((completion - reference_completion) - reference_point)",
            f"term = where(labels, {self.desirable_weight!r} * sigmoid(-gain), "
            f"{self.undesirable_weight!r} * sigmoid(gain))",
            "loss = sum(term) / rows",
        )


def mismatched(rows: Sequence[Row]) -> list[Row]:
    """Each completion behind the prompt of the next row that has another prompt, the last row's next being the first.

    A completion behind a prompt it was not made for is a sample whose log ratio says how far the policy has drifted in
    general. A step of one prompt only has no other prompt: its completions stay where they are.
    """
    made = []
    for i, row in enumerate(rows):
        others = (rows[(i + k) % len(rows)].prompt_ids for k in range(1, len(rows)))
        prompt_ids = next((ids for ids in others if ids != row.prompt_ids), row.prompt_ids)
        made.append(Row(prompt_ids=prompt_ids, completion_ids=row.completion_ids))
    return made


def log_ratios(logprobs: Tensor, batch: Batch) -> Tensor:
    """(B,) log pi - log reference of whole completions."""
    assert batch.reference_logprobs is not None
    return row_sums(logprobs - batch.reference_logprobs, batch)


ALGORITHM = KTO
