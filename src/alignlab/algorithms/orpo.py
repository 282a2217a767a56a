"""Odds ratio preference optimisation (arXiv:2403.07691): pairs -> mean logprobs -> likelihood plus an odds ratio.

L = mean over pairs of -m_w - lambda log sigmoid(log odds_w - log odds_l), with m the mean of log pi over a completion's
tokens, the stop token included, and odds = e^m / (1 - e^m). The first term is supervised fine-tuning on the chosen
completions, the second makes them likelier than the rejected ones; so it needs neither a reference nor an SFT stage.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field

from alignlab.algorithms import Hyperparameters, Models, completion_rows
from alignlab.algorithms._preference import halves, pair_metrics, row_sums, row_tokens
from alignlab.forward import score
from alignlab.functional.preference import log_odds, odds_ratio_loss
from alignlab.rollout import Source
from alignlab.types import Batch, Directive, LoopState, LossOutput, Phase, Role, Step


class ORPO(Hyperparameters):
    """Fine-tuning and preference optimisation in one, without a reference."""

    metrics_file: ClassVar[str | None] = None
    dropout: ClassVar[bool] = False
    data_kind: ClassVar[str] = "pairs"
    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "trl": {"learning_rate": 1e-6, "pairs_per_step": 8, "odds_ratio_coef": 0.1},
        "paper": {"learning_rate": 5e-6, "pairs_per_step": 32, "odds_ratio_coef": 0.1},
    }
    """trl's ORPOConfig (its beta is lambda), and the authors' script for Mistral-ORPO-beta (4 devices of 8 pairs)."""
    DEPARTURES: ClassVar[tuple[str, ...]] = (
        "The likelihood term is the paper's expectation over pairs: the token mean of each chosen completion, averaged "
        "over pairs; trl and the authors' code take one mean over all tokens of a microbatch, the prompt's included "
        "(the authors' has a switch for that).",
    )

    name: Literal["orpo"] = "orpo"
    learning_rate: float = Field(5e-6, gt=0)
    """Peak learning rate of AdamW (the authors: 5e-6; larger than DPO's, as it also has to fine-tune)."""
    max_grad_norm: float = Field(1.0, gt=0)
    """Gradient norm above which gradients are scaled down."""
    pairs_per_step: int = Field(32, ge=1)
    """Pairs an optimiser step."""
    odds_ratio_coef: float = Field(0.1, ge=0)
    """Weight of the odds ratio (lambda; the authors and trl: .1); 0 is supervised fine-tuning on the chosen ones."""

    def models(self) -> Mapping[str, Role]:
        return {"policy": Role(learning_rate=self.learning_rate, max_grad_norm=self.max_grad_norm)}

    def collect(self, models: Models, source: Source, state: LoopState) -> tuple[Phase, LoopState]:
        batches = source.pair_batches(self.pairs_per_step, state)
        return Phase((Step(batches, completion_rows(batches) / 2),)), state

    def loss(self, models: Models, batch: Batch, state: LoopState) -> LossOutput:
        totals = row_sums(score(models["policy"], batch).logprobs, batch)
        chosen, rejected = halves(totals / row_tokens(batch))
        terms = -chosen + self.odds_ratio_coef * odds_ratio_loss(chosen, rejected)
        sums = pair_metrics(*halves(totals), log_odds(chosen), log_odds(rejected))
        return LossOutput(terms.sum(), {**sums, "policy/nll_chosen": (-chosen.sum().item(), float(len(chosen)))})

    def observe(self, state: LoopState, metrics: Mapping[str, float]) -> tuple[LoopState, Directive]:
        return state, Directive()

    def formula(self) -> tuple[str, ...]:
        return (
            "mean_chosen = chosen / chosen_tokens",
            "mean_rejected = rejected / rejected_tokens",
            "log_odds_ratio = (mean_chosen - log1mexp(mean_chosen)) - (mean_rejected - log1mexp(mean_rejected))",
            f"term = -mean_chosen - {self.odds_ratio_coef!r} * log_sigmoid(log_odds_ratio)",
            "loss = sum(term) / pairs",
        )


ALGORITHM = ORPO
