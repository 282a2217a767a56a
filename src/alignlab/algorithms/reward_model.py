"""Bradley-Terry reward model (arXiv:2203.02155): pairs -> two scalar scores -> logistic loss of their difference.

L = mean over pairs of -log sigmoid(r_chosen - r_rejected - margin) + c (r_chosen + r_rejected)^2, the score read at the
last token by the attention mask. The sign pushes the chosen score above the rejected one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

from pydantic import Field

from alignlab.algorithms import Hyperparameters, Models, completion_rows
from alignlab.forward import rewards
from alignlab.functional.preference import bradley_terry_loss
from alignlab.rollout import Source
from alignlab.types import Batch, Directive, LoopState, LossOutput, Phase, Role, Step


class RewardModel(Hyperparameters):
    """Scalar reward model on preference pairs, grown from the starting policy's trunk."""

    metrics_file: ClassVar[str | None] = None
    dropout: ClassVar[bool] = False
    data_kind: ClassVar[str] = "pairs"

    name: Literal["reward_model"] = "reward_model"
    learning_rate: float = Field(1e-4, gt=0)
    """Peak learning rate of AdamW (document 001 and trl: 1e-4)."""
    max_grad_norm: float = Field(1.0, gt=0)
    """Gradient norm above which gradients are scaled down."""
    pairs_per_step: int = Field(32, ge=1)
    """Pairs an optimiser step."""
    use_margin: bool = False
    """Subtract each pair's own margin (its score difference) where the data has one (arXiv:2307.09288)."""
    centering_coef: float = Field(0.01, ge=0)
    """Weight of (r_chosen + r_rejected)^2, which keeps scores around zero (arXiv:2312.09244)."""

    def models(self) -> Mapping[str, Role]:
        return {"reward_model": Role(learning_rate=self.learning_rate, max_grad_norm=self.max_grad_norm)}

    def collect(self, models: Models, source: Source, state: LoopState) -> tuple[Phase, LoopState]:
        batches = source.pair_batches(self.pairs_per_step, state)
        return Phase((Step(batches, completion_rows(batches) / 2),)), state

    def loss(self, models: Models, batch: Batch, state: LoopState) -> LossOutput:
        chosen, rejected = rewards(models["reward_model"], batch).chunk(2)
        margin = batch.margin.chunk(2)[0] if self.use_margin and batch.margin is not None else None
        terms = bradley_terry_loss(chosen, rejected, margin=margin, centering_coef=self.centering_coef)
        pairs = float(len(chosen))
        right = (chosen > rejected).float() + 0.5 * (chosen == rejected).float()
        return LossOutput(
            terms.sum(),
            {
                "preference/accuracy": (right.sum().item(), pairs),
                "preference/margin": ((chosen - rejected).sum().item(), pairs),
                "reward_model/mean_score": ((chosen + rejected).sum().item(), 2 * pairs),
            },
        )

    def observe(self, state: LoopState, metrics: Mapping[str, float]) -> tuple[LoopState, Directive]:
        return state, Directive()


ALGORITHM = RewardModel
