"""The carriers that flow down alignlab: Prompt -> Completion -> Rollout -> Group -> Batch -> Step -> LossOutput.

All are frozen; each stage returns a new one and nobody writes into somebody else's. Dimensions: `B` rows, `T` tokens,
`G` siblings in a group. Every per-token tensor is (B, T) and index t belongs to token t of `input_ids`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

import torch
from torch import Tensor

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation, e.g. `Message("user", "What is 2 + 3?")`."""

    role: Literal["system", "user", "assistant"]
    content: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """What the model is asked, and what grading the answer needs.

    Example: `Prompt(messages=(Message("user", "Mia has 7 coins and finds 5. How many now?"),), id="reasoning/test/12",
    task="reasoning", answer="12")`. Without messages it is plain text: the completion follows the BOS token alone.
    """

    messages: tuple[Message, ...]
    id: str
    """Unique within its data; sampling keys and per-prompt statistics are built on it."""
    task: str = ""
    """Name of the task that grades it; empty for ungraded data."""
    answer: str | None = None
    """The reference answer; None where there is none."""
    meta: Mapping[str, Any] = field(default_factory=dict)
    """Whatever else the task's grading needs (JSON values)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """A demonstration: the completion is what supervised fine-tuning trains on, its stop token included."""

    prompt: Prompt
    completion: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """Two completions of one prompt, the first preferred. `margin` (score units, >= 0) is None where unknown."""

    prompt: Prompt
    chosen: str
    rejected: str
    margin: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Labelled:
    """One completion of a prompt and a verdict on it by itself: label True = desirable, False = undesirable."""

    prompt: Prompt
    completion: str
    label: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """Token ids of one model input. `completion_ids` ends with the stop token unless the completion was cut off.

    Example: prompt `<bos>..user..model\\n` = `prompt_ids`; `12<end_of_turn>` = `completion_ids`; they are concatenated
    as ids, never re-tokenised.
    """

    prompt_ids: tuple[int, ...]
    completion_ids: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.completion_ids)


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """What was sampled: N token ids (stop token included), their logprobs under the sampling policy, and the text.

    Example: `Completion(token_ids=(51, 52, 4), logprobs=(-0.1, -0.3, -0.01), finish_reason="stop", text="12")`.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    """At the sampling temperature, in nats; one a token."""
    finish_reason: FinishReason
    text: str
    """Without the stop token."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    """A prompt, one completion of it, and what the completion earned."""

    prompt: Prompt
    prompt_ids: tuple[int, ...]
    completion: Completion
    reward: float
    """Weighted sum of `breakdown`; NaN where every reward function declined to judge."""
    breakdown: Mapping[str, float]
    """Reward name -> its unweighted value, for those that gave one."""
    token_scores: tuple[float, ...] | None = None
    """What each token of the completion earned, where a reward says so; `reward` is their sum and what else applies."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """The G sibling rollouts of one prompt, in sampling order."""

    rollouts: tuple[Rollout, ...]


@dataclass(frozen=True, slots=True)
class RowShapes:
    """What is known of a batch's rows without looking into its tensors; one entry a row."""

    lengths: tuple[int, ...]
    """Tokens."""
    prompt_lengths: tuple[int, ...]
    prompts: tuple[int, ...]
    """Which prompt; the same number is the same prompt."""

    def select(self, rows: Sequence[int]) -> RowShapes:
        columns = (self.lengths, self.prompt_lengths, self.prompts)
        return RowShapes(*(tuple(column[row] for row in rows) for column in columns))


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Rows of tokens, right-padded.

    Example (prompt `P0 P1`, completion `A0 A1 <end_of_turn>`, one pad): `input_ids = [P0, P1, A0, A1, E, 0]`,
    `attention_mask = [1, 1, 1, 1, 1, 0]`, `completion_mask = [0, 0, 1, 1, 1, 0]`, `old_logprobs[2]` is log pi(A0 | P0
    P1). A preference batch holds all chosen rows first, then all rejected rows in the same order.
    """

    input_ids: Tensor  # (B, T) int64
    attention_mask: Tensor  # (B, T) bool, True = attended
    completion_mask: Tensor  # (B, T) bool, True = trained and scored
    old_logprobs: Tensor | None = None  # (B, T) under the policy that sampled
    reference_logprobs: Tensor | None = None  # (B, T)
    advantages: Tensor | None = None  # (B, T)
    returns: Tensor | None = None  # (B, T)
    old_values: Tensor | None = None  # (B, T)
    values: Tensor | None = None  # (B, T) of the critic as it is in this step, with the graph that they came with
    margin: Tensor | None = None  # (B,) preference margin of the row's pair
    labels: Tensor | None = None  # (B,) bool, True = a desirable completion (unpaired feedback)
    reference_point: Tensor | None = None  # (B,) what an unpaired completion's log ratio is compared with (KTO's z0)
    shapes: RowShapes | None = None  # lets siblings share their prompt's forward pass, and rows go without padding

    def __len__(self) -> int:
        return self.input_ids.shape[0]

    def tensors(self) -> dict[str, Tensor]:
        """The fields that are present, by name."""
        return {f.name: value for f in fields(self) if isinstance(value := getattr(self, f.name), Tensor)}

    def select(self, rows: Tensor) -> Batch:
        """The given rows ((M,) int64), with trailing columns that are padding in all of them cut off."""
        if self.shapes is None:
            shapes, width = None, max(1, int(self.attention_mask[rows].any(0).nonzero().max().item()) + 1)
        else:
            shapes = self.shapes.select(rows.tolist())
            width = max(shapes.lengths, default=1)
        kept: dict[str, Any] = {k: v[rows][:, :width] if v.dim() > 1 else v[rows] for k, v in self.tensors().items()}
        return replace(self, **kept, shapes=shapes)

    def as_text(self) -> Batch:
        """The same rows, prompts scored like completions."""
        shapes = None if self.shapes is None else replace(self.shapes, prompt_lengths=(0,) * len(self))
        return replace(self, completion_mask=self.attention_mask, shapes=shapes)

    def to(self, device: torch.device | str) -> Batch:
        moved: dict[str, Any] = {k: v.to(device) for k, v in self.tensors().items()}
        return replace(self, **moved)


@dataclass(frozen=True, slots=True)
class Step:
    """One optimiser step: its microbatches, and what the sum of all their terms is divided by.

    The normaliser belongs to the step, so any split into microbatches gives the same gradient.
    """

    microbatches: tuple[Batch, ...]
    normaliser: float


@dataclass(frozen=True, slots=True)
class Phase:
    """What one `collect` brings: the optimiser steps to take, and what is worth logging about how they came to be."""

    steps: tuple[Step, ...]
    metrics: Mapping[str, float] = field(default_factory=dict)
    """Logged with the first step of the phase: rewards, lengths, stop reasons, ..."""
    groups: tuple[Group, ...] = ()
    """The rollouts of an online method; written to completions.jsonl."""


@dataclass(frozen=True, slots=True)
class LossOutput:
    """What an algorithm says about one microbatch."""

    total: Tensor
    """Scalar: this microbatch's summed terms, not yet divided by the step's normaliser."""
    sums: Mapping[str, tuple[float, float]]
    """Metric name -> (sum, count) over this microbatch; logged as total sum / total count of the step."""
    identities: Mapping[str, float] = field(default_factory=dict)
    """Statement -> how far it is from true; asserted by the loop where the algorithm declares it must hold."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Role:
    """One model of a run and how it is trained. A role that has not started is not stepped at all."""

    learning_rate: float = 0.0
    """Peak learning rate of AdamW; 0 = frozen."""
    max_grad_norm: float = 1.0
    """Gradient norm above which the role's gradient is scaled down."""
    start_step: int = 0
    """First optimiser step (of the whole run) that updates it: critic warm-up = the policy's start step."""
    backbone: Literal["own", "shared", "reward_model"] = "own"
    """Of a scalar role: its own copy of the starting policy's trunk, the policy's trunk itself, or an adapter on the
    reward model's trunk."""

    @property
    def trained(self) -> bool:
        return self.learning_rate > 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Directive:
    """What `observe` asks of the loop after an optimiser step."""

    action: Literal["continue", "end_phase", "stop"] = "continue"
    reason: str = ""
    learning_rate_factor: Mapping[str, float] = field(default_factory=dict)
    """Role -> factor on its learning rate from now on (multiplied into what it already is)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoopState:
    """Everything that changes besides weights and optimisers; JSON; checkpointed whole.

    All randomness (data order, sampling, minibatch split, dropout) is a pure function of (seed, phase).
    """

    seed: int
    phase: int = 0
    """Finished phases (one `collect` and its steps)."""
    step: int = 0
    """Finished optimiser steps."""
    algorithm: Mapping[str, float] = field(default_factory=dict)
    """State of the method: adaptive KL coefficient, running reward moments, ..."""
    learning_rate_factor: Mapping[str, float] = field(default_factory=dict)
    """Role -> product of the factors asked for so far."""
    counters: Mapping[str, float] = field(default_factory=dict)
    """The ledger: prompts, completions, generated tokens, trained tokens, seconds so far."""
    stop_reason: str = ""
    """Set once when a method stopped the run early."""
    scaler: Mapping[str, float] = field(default_factory=dict)
    """The loss scale of float16 training and how long it has held; empty in every other type."""
    diagnosis: Mapping[str, float] = field(default_factory=dict)
    """What the diagnosis remembers of earlier phases: the entropy and length at the start, ..."""
    best: Mapping[str, float] = field(default_factory=dict)
    """Phase and figures of the best checkpoint so far, where the run keeps one."""
