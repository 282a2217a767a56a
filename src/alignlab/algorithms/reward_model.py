"""Bradley-Terry reward model (arXiv:2203.02155): pairs -> two scalar scores -> logistic loss of their difference.

L = mean over pairs of -log sigmoid(r_chosen - r_rejected - margin) + c (r_chosen + r_rejected)^2, the score read at the
last token by the attention mask. The sign pushes the chosen score above the rejected one. With label smoothing e the
first term is (1 - e) of that and e of the same with the pair turned round.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

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

    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "trl": {"learning_rate": 1e-4, "pairs_per_step": 8, "use_margin": True, "centering_coef": 0.0},
        "openrlhf": {"learning_rate": 9e-6, "pairs_per_step": 128, "use_margin": False, "centering_coef": 0.0},
        "paper": {"learning_rate": 9e-6, "pairs_per_step": 64, "use_margin": False, "centering_coef": 0.0},
    }
    """trl's RewardConfig (which takes margins wherever the data has them), OpenRLHF's train_rm, arXiv:2203.02155 app. C
    (its 64 are prompts, each with all pairs of 4 to 9 answers)."""
    DEPARTURES: ClassVar[tuple[str, ...]] = (
        "The score is read at the last attended token; trl (through transformers) reads it at the last that is not the "
        "pad token, one early where the stop token is also the pad token.",
        "The mean over pairs is the optimiser step's; trl averages the means of microbatches.",
        "After training the start policy's own samples set the zero and the unit; arXiv:2203.02155 sets the zero by "
        "demonstrations, and no unit.",
        "Label smoothing turns the whole pair round, its margin too; trl and OpenRLHF have none for reward models.",
    )

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
    """Weight of (r_chosen + r_rejected)^2, which keeps scores around zero (c, arXiv:2312.09244)."""
    label_smoothing: float = Field(0.0, ge=0, lt=0.5)
    """Share of pairs assumed to be labelled the wrong way round (e; arXiv:2401.06080 uses it for reward models)."""

    def models(self) -> Mapping[str, Role]:
        return {"reward_model": Role(learning_rate=self.learning_rate, max_grad_norm=self.max_grad_norm)}

    def collect(self, models: Models, source: Source, state: LoopState) -> tuple[Phase, LoopState]:
        batches = source.pair_batches(self.pairs_per_step, state)
        return Phase((Step(batches, completion_rows(batches) / 2),)), state

    def loss(self, models: Models, batch: Batch, state: LoopState) -> LossOutput:
        chosen, rejected = rewards(models["reward_model"], batch).chunk(2)
        margin = batch.margin.chunk(2)[0] if self.use_margin and batch.margin is not None else None
        terms = bradley_terry_loss(
            chosen, rejected,
            margin=margin, centering_coef=self.centering_coef, label_smoothing=self.label_smoothing,
        )  # fmt: skip
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

    def formula(self) -> tuple[str, ...]:
        """The loss over `chosen` and `rejected`, here the (B,) raw scores of a pair's two completions."""
        margin = " - margin" if self.use_margin else ""
        term = f"term = -log_sigmoid(chosen - rejected{margin})"
        if smoothing := self.label_smoothing:
            reverse = f"log_sigmoid(rejected - chosen{margin})"
            term = f"term = -{1 - smoothing!r} * log_sigmoid(chosen - rejected{margin}) - {smoothing!r} * {reverse}"
        centering = (f"term = term + {self.centering_coef!r} * (chosen + rejected)**2",) if self.centering_coef else ()
        return term, *centering, "loss = sum(term) / pairs"


ALGORITHM = RewardModel
