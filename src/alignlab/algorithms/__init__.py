"""The methods, one short file each: a frozen, typed object whose fields are its hyperparameters and the recipe's keys.

An algorithm says which models it needs, how a phase's data comes to be, what one microbatch costs, and how it reacts to
what happened. It never touches an optimiser, a log or a file; the loop in `train.py` does, and knows no method's name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Protocol

import torch
from pydantic import BaseModel, ConfigDict, model_validator
from torch import Tensor
from torch.nn.functional import softshrink

from alignlab.functional.masked import aggregate, masked_mean
from alignlab.models import Model, unwrap
from alignlab.registry import did_you_mean
from alignlab.rollout import Source
from alignlab.types import Batch, Directive, LoopState, LossOutput, Phase, Role

IDENTITY_TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-4, torch.bfloat16: 0.05, torch.float16: 0.02}
"""How far an identity may be off, by the policy's type: ten times the rounding of a trunk pass (a mean over a
microbatch's tokens; nats for log ratios and KL, relative for values)."""

Models = Mapping[str, Any]
"""Role -> its model: `policy`, `reference`, `reward_model`, `value_model`, `teacher`."""


class Hyperparameters(BaseModel):
    """Closed and frozen: an unknown key is an error, and nothing changes a method's numbers after it was read.

    `variant` and `preset` are rows of tables beside the method: what a key is where the recipe does not say it. A
    variant goes over a preset, and what the recipe says goes over both.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)

    VARIANTS: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    """Named combinations of the method's choices, by the name their paper gave them."""
    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    """The defaults of other libraries (`trl`, `verl`, `openrlhf`) and of the paper."""
    DEPARTURES: ClassVar[tuple[str, ...]] = ()
    """Where the method is not its paper's, or another library's, in a way that no field says; a sentence each."""
    needs_reward: ClassVar[bool] = True
    """Of a method that samples: whether it learns from a reward; else `reward` is only logged, where it is given."""

    variant: str | None = None
    """A named combination of the choices below."""
    preset: str | None = None
    """Whose defaults hold for what the recipe does not say: trl, verl, openrlhf, paper; null = those given here."""

    @model_validator(mode="before")
    @classmethod
    def _from_tables(cls, given: Any) -> Any:
        if not isinstance(given, Mapping):
            return given
        below: dict[str, Any] = {}
        for key, table in (("preset", cls.PRESETS), ("variant", cls.VARIANTS)):
            name = given.get(key)
            if name is None:
                continue
            if not isinstance(name, str) or name not in table:
                known = f"there are: {', '.join(table)}" if table else "this method has none"
                raise ValueError("; ".join(filter(None, (f"no {key} {name!r}", did_you_mean(str(name), table), known))))
            below |= table[name]
        return {**below, **given}


class Algorithm(Protocol):
    """How a method gets its data, what it minimises, and how it reacts."""

    metrics_file: ClassVar[str | None]
    """A second log the method's metrics also go to, by a name its users look for."""
    dropout: ClassVar[bool]
    """Whether dropout stays on in training; never where logprobs are compared with each other."""
    data_kind: ClassVar[str]
    """What it learns from: `examples`, `pairs`, `labelled` or `prompts`."""

    def models(self) -> Mapping[str, Role]:
        """The roles it needs, each trained or frozen."""
        ...

    def collect(self, models: Models, source: Source, state: LoopState) -> tuple[Phase, LoopState]:
        """The optimiser steps of one phase; whatever spans a whole step without gradient is computed here."""
        ...

    def loss(self, models: Models, batch: Batch, state: LoopState) -> LossOutput:
        """The summed terms of one microbatch; the loop divides by the step's normaliser."""
        ...

    def observe(self, state: LoopState, metrics: Mapping[str, float]) -> tuple[LoopState, Directive]:
        """Pure reaction to an optimiser step: go on, end the phase, stop, or change a learning rate."""
        ...

    def formula(self) -> tuple[str, ...]:
        """The loss as assignments over named inputs, every number filled in; the last one is `loss = ...`.

        Python's syntax, evaluated by the tests with NumPy and compared with the executed loss. Per-token inputs are
        (B, T): `logprobs`, `old_logprobs`, `reference_logprobs`, `reverse_kl`, `entropy`, `advantages`, `values`,
        `old_values`, `returns`, `mask` and `prompt_mask` (0 or 1; the prompt's without the first token, which nothing
        predicts); per row (B,): `tokens` (of the row), `margin`, `labels`, `reference_point`; of the whole step:
        `rows`, `pairs`, `completion_tokens`, `prompt_tokens`, `max_completion_tokens`, and `kl_coef` where a controller
        moves it. Pairs come as `chosen`, `rejected`, `reference_chosen`, `reference_rejected` (B,), each summed over
        its tokens, and `chosen_tokens`, `rejected_tokens`; single completions as `completion` and
        `reference_completion` (B,), summed likewise. Functions: abs, exp, log, log1mexp, clip, maximum, minimum,
        where, sum, row_mean (over a row's completion tokens, (B, 1)), sigmoid, log_sigmoid, sqrt, stop_gradient.
        """
        ...


def masked_sum(values: Tensor, batch: Batch) -> tuple[float, float]:
    """(sum over completion tokens, number of completion tokens), as a metric's contribution."""
    return aggregate(values.detach(), batch.completion_mask).item(), float(batch.completion_mask.sum().item())


def gap(actual: Tensor, expected: Tensor, batch: Batch) -> float:
    """Mean |actual - expected| over completion tokens: how far from true an identity of two (B, T) tensors is.

    A mean, because the largest of many rounding errors grows with their number.
    """
    return masked_mean((actual - expected).detach().abs(), batch.completion_mask).item()


def beyond_rounding(log_ratio: Tensor, model: Model) -> Tensor:
    """Log ratios drawn towards 0 by what rounding may make of 0: what a clip still holds back has really moved."""
    return softshrink(log_ratio.detach(), IDENTITY_TOLERANCE[next(unwrap(model).parameters()).dtype])


def completion_tokens(batches: Sequence[Batch]) -> float:
    """Completion tokens of all microbatches of a step: the normaliser of a token mean."""
    return float(sum(int(b.completion_mask.sum()) for b in batches))


def completion_rows(batches: Sequence[Batch]) -> float:
    """Rows of all microbatches of a step."""
    return float(sum(len(b) for b in batches))


def numbers_dtype(model: Model) -> torch.dtype:
    """The type in which logprobs, values and rewards of a model are kept: float32, float64 for a float64 model."""
    return torch.promote_types(next(unwrap(model).parameters()).dtype, torch.float32)


__all__ = [
    "IDENTITY_TOLERANCE",
    "Algorithm",
    "Hyperparameters",
    "Models",
    "beyond_rounding",
    "completion_rows",
    "completion_tokens",
    "gap",
    "masked_sum",
    "numbers_dtype",
]
