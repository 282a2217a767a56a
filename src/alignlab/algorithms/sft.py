"""Supervised fine-tuning: demonstrations -> negative log-likelihood of their completions -> one step a phase.

L = -1/N sum_t log pi(y_t | x, y_<t) over the N completion tokens of the whole optimiser step, the stop token included;
prompt tokens are not trained (`prompt_weight`: or count for less, in the sum and in N). The sign makes likelier
demonstrations a lower loss.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field

from alignlab.algorithms import Hyperparameters, Models, completion_tokens, masked_sum
from alignlab.forward import score
from alignlab.functional.masked import aggregate
from alignlab.rollout import Source
from alignlab.types import Batch, Directive, LoopState, LossOutput, Phase, Role, Step


class SFT(Hyperparameters):
    """Supervised fine-tuning on demonstrations."""

    metrics_file: ClassVar[str | None] = None
    dropout: ClassVar[bool] = True
    data_kind: ClassVar[str] = "examples"

    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "trl": {"learning_rate": 2e-5, "examples_per_step": 8, "max_grad_norm": 1.0},
        "verl": {"learning_rate": 1e-5, "examples_per_step": 256, "max_grad_norm": 1.0},
        "openrlhf": {"learning_rate": 5e-6, "examples_per_step": 128, "max_grad_norm": 1.0},
    }
    """trl's SFTConfig on one device, verl's sft_trainer.yaml, OpenRLHF's train_sft. There is no one paper."""
    DEPARTURES: ClassVar[tuple[str, ...]] = (
        "One mean over all completion tokens of the optimiser step, as in trl. OpenRLHF and verl's fsdp_sft_trainer "
        "average the means of microbatches instead: the split decides how much a token counts.",
        "The prompt is masked whatever form the data have. trl masks it where rows have `prompt` and `completion` "
        "columns; of `messages` it trains every token unless assistant_only_loss is set.",
        "A completion over the limit is cut before its stop token, which stays and is trained, and a row with too long "
        "a prompt is left out. trl keeps the first max_length tokens, so that row never says stop.",
        "A completion ends with its stop token. What a chat template writes after it (Gemma: a newline) is not "
        "trained; in trl it is.",
    )

    name: Literal["sft"] = "sft"
    learning_rate: float = Field(5e-5, gt=0)
    """Peak learning rate of AdamW (document 000: 5e-5 for full fine-tuning; about ten times that for LoRA)."""
    max_grad_norm: float = Field(1.0, gt=0)
    """Gradient norm above which gradients are scaled down."""
    examples_per_step: int = Field(32, ge=1)
    """Demonstrations an optimiser step, whatever the microbatch."""
    prompt_weight: float = Field(0.0, ge=0, le=1)
    """Weight of a prompt token in the loss beside 1 for a completion token; 0 masks the prompt. For pretraining."""

    def models(self) -> Mapping[str, Role]:
        return {"policy": Role(learning_rate=self.learning_rate, max_grad_norm=self.max_grad_norm)}

    def collect(self, models: Models, source: Source, state: LoopState) -> tuple[Phase, LoopState]:
        batches = source.example_batches(self.examples_per_step, state)
        prompt_tokens = sum(int((b.attention_mask & ~b.completion_mask)[:, 1:].sum()) for b in batches)
        return Phase((Step(batches, completion_tokens(batches) + self.prompt_weight * prompt_tokens),)), state

    def loss(self, models: Models, batch: Batch, state: LoopState) -> LossOutput:
        scored = batch.as_text() if self.prompt_weight else batch
        nll = -score(models["policy"], scored).logprobs
        total = aggregate(nll, batch.completion_mask)
        if self.prompt_weight:
            total = total + self.prompt_weight * aggregate(nll, batch.attention_mask & ~batch.completion_mask)
        return LossOutput(total, {"policy/nll": masked_sum(nll, batch)})

    def observe(self, state: LoopState, metrics: Mapping[str, float]) -> tuple[LoopState, Directive]:
        return state, Directive()

    def formula(self) -> tuple[str, ...]:
        if not self.prompt_weight:
            return "term = -logprobs", "loss = sum(mask * term) / completion_tokens"
        weight = repr(self.prompt_weight)
        return (
            "term = -logprobs",
            f"total = sum(mask * term) + {weight} * sum(prompt_mask * term)",
            f"loss = total / (completion_tokens + {weight} * prompt_tokens)",
        )


ALGORITHM = SFT
