"""What evaluation.json is: one form for whoever writes it (stages, `alignlab evaluate`) -> checked, or an error.

docs/evaluation.md says what the keys mean.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Number = float | None
"""A value that cannot be computed is null."""


class Closed(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=False)


class CategoryNumber(Closed):
    """One metric of one category of prompts."""

    value: Number
    low: Number
    high: Number
    prompts: int = Field(ge=1)


class Decoding(Closed):
    """How completions were sampled."""

    name: str
    """`greedy`, or `sampled`."""
    temperature: float = Field(gt=0)
    top_k: int = Field(ge=0)
    greedy: bool
    samples: int = Field(ge=1)
    max_completion_tokens: int = Field(ge=1)
    best_of: int = Field(1, ge=1)
    seed: int
    phase: int


class Overlap(Closed):
    """How much of what is evaluated on was trained on."""

    known: bool
    """Whether the run's training data could be read."""
    exact: int = Field(ge=0)
    """Evaluated prompts that are also training prompts."""
    shown: list[str] = []
    """Ids of the first of them."""
    note: str = ""


class Data(Closed):
    """What was evaluated on."""

    source: str
    split: str
    prompts: int = Field(ge=0)
    left_out: int = Field(0, ge=0)
    """Prompts longer than the model's or the run's limit."""
    fingerprint: str
    """sha256 of the prompts in their order."""
    overlap: Overlap | None = None


class Record(Closed):
    """One evaluation of one model under one decoding."""

    schema_: Literal[2] = Field(alias="schema")
    metrics: dict[str, Number] = {}
    intervals: dict[str, tuple[Number, Number]] = {}
    counts: dict[str, int] = {}
    categories: dict[str, dict[str, CategoryNumber]] = {}
    scores: dict[str, float] = {}
    tasks: dict[str, str] = {}
    kind: Literal["policy", "reward_model"] | None = None
    """What was evaluated; missing where there was no evaluation (`prompts_per_task: 0`)."""
    run: str | None = None
    """The run folder or model that `alignlab evaluate` was given."""
    model: str | None = None
    """Where its weights are."""
    decoding: Decoding | None = None
    measures: list[str] = []
    data: Data | None = None
    others: list[Record] = []
    """The same model and prompts under further decodings."""
    suites: dict[str, Any] = {}
    ledger: dict[str, Number] = {}
    """What training cost; of a stage's own evaluation."""
    diagnosis: dict[str, Any] | list[Any] | None = None
    best_phase: int | None = None


def check_record(content: Mapping[str, Any]) -> Record:
    """The content of an evaluation.json, if it is one.

    Raises:
        ValueError: keys or types that it does not have.
    """
    return Record.model_validate(content)
