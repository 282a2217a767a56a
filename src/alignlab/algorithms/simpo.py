"""Simple preference optimisation (arXiv:2405.14734): pairs -> mean logprobs of the policy alone -> logistic loss.

L = mean over pairs of -log sigmoid(beta (m_w - m_l) - gamma), with m the mean of log pi over a completion's tokens, the
stop token included. The sign makes the chosen completion likelier per token, by gamma / beta at least. Without a
reference nothing but a small learning rate holds the policy near where it began.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field

from alignlab.algorithms import Hyperparameters, Models, completion_rows
from alignlab.algorithms._preference import halves, pair_metrics, row_sums, row_tokens
from alignlab.forward import score
from alignlab.functional.preference import simpo_loss
from alignlab.rollout import Source
from alignlab.types import Batch, Directive, LoopState, LossOutput, Phase, Role, Step


class SimPO(Hyperparameters):
    """Preference optimisation without a reference, by length-normalised likelihood and a margin."""

    metrics_file: ClassVar[str | None] = None
    dropout: ClassVar[bool] = False
    data_kind: ClassVar[str] = "pairs"
    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "trl": {"learning_rate": 1e-6, "pairs_per_step": 8, "beta": 0.1, "gamma": 0.5},
        "paper": {"learning_rate": 6e-7, "pairs_per_step": 128, "beta": 2.0, "gamma": 1.0},
    }
    """trl's CPOConfig with loss_type simpo (whose cpo_alpha has to be set to 0), the paper's Llama-3-Base setting."""
    DEPARTURES: ClassVar[tuple[str, ...]] = (
        "There is no likelihood term; trl's CPOConfig has one of weight cpo_alpha = 1 unless it is set to 0.",
    )

    name: Literal["simpo"] = "simpo"
    learning_rate: float = Field(1e-6, gt=0)
    """Peak learning rate of AdamW (trl: 1e-6; the authors search 3e-7 to 1e-6 and call it what matters most)."""
    max_grad_norm: float = Field(1.0, gt=0)
    """Gradient norm above which gradients are scaled down."""
    pairs_per_step: int = Field(32, ge=1)
    """Pairs an optimiser step."""
    beta: float = Field(2.0, gt=0)
    """Scale of the reward beta * mean logprob (the authors: 2 to 2.5, up to 10; far above DPO's)."""
    gamma: float = Field(1.0, ge=0)
    """Target margin, in reward units (the authors: gamma / beta from 0 to 1, .5 to begin with)."""

    def models(self) -> Mapping[str, Role]:
        return {"policy": Role(learning_rate=self.learning_rate, max_grad_norm=self.max_grad_norm)}

    def collect(self, models: Models, source: Source, state: LoopState) -> tuple[Phase, LoopState]:
        batches = source.pair_batches(self.pairs_per_step, state)
        return Phase((Step(batches, completion_rows(batches) / 2),)), state

    def loss(self, models: Models, batch: Batch, state: LoopState) -> LossOutput:
        totals = row_sums(score(models["policy"], batch).logprobs, batch)
        chosen, rejected = halves(totals / row_tokens(batch))
        terms = simpo_loss(chosen, rejected, beta=self.beta, gamma=self.gamma)
        return LossOutput(terms.sum(), pair_metrics(*halves(totals), self.beta * chosen, self.beta * rejected))

    def observe(self, state: LoopState, metrics: Mapping[str, float]) -> tuple[LoopState, Directive]:
        return state, Directive()

    def formula(self) -> tuple[str, ...]:
        return (
            "h = chosen / chosen_tokens - rejected / rejected_tokens",
            f"term = -log_sigmoid({self.beta!r} * h - {self.gamma!r})",
            "loss = sum(term) / pairs",
        )


ALGORITHM = SimPO
