"""Where a method's data comes from: data items and a policy -> prompts -> completions -> rewards -> groups -> Batch.

A `Source` answers an algorithm's questions for a `LoopState`. What it answers is a pure function of (seed, phase) and the
policy's weights; the loop pulls, and nothing is prefetched, so rollouts are always on the current policy.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from alignlab.conversation import Template
from alignlab.data import collate, fit, plan_microbatches, take
from alignlab.errors import UserError
from alignlab.generate import Sampling, SamplingKey, generate
from alignlab.models import Model
from alignlab.types import Batch, Completion, Example, Group, LoopState, Pair, Prompt, Rollout, Row

T = TypeVar("T")
RewardFunction = Callable[[Sequence[Prompt], Sequence[Completion]], Sequence[float | None]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Reward:
    """One component of the reward: its function and its weight in the sum."""

    name: str
    function: RewardFunction
    weight: float
    tasks: tuple[str, ...] = ()
    """Only prompts of these tasks; empty = all."""


def combine(
    rewards: Sequence[Reward], prompts: Sequence[Prompt], completions: Sequence[Completion]
) -> list[tuple[float, dict[str, float]]]:
    """(reward, breakdown) of every completion: the weighted sum of the components that apply, NaN if none does.

    Raises:
        UserError: a function raised, or gave the wrong number of values, or something that is neither a finite number nor
            None; names the function and the sample. A broken grader must not look like a bad model.
    """
    breakdowns: list[dict[str, float]] = [{} for _ in prompts]
    weights = {reward.name: reward.weight for reward in rewards}
    for reward in rewards:
        chosen = [i for i, prompt in enumerate(prompts) if not reward.tasks or prompt.task in reward.tasks]
        if not chosen:
            continue
        try:
            values = reward.function([prompts[i] for i in chosen], [completions[i] for i in chosen])
        except Exception as error:
            raise UserError(f"reward {reward.name!r} raised {type(error).__name__}: {error}") from error
        if not isinstance(values, Sequence) or isinstance(values, str) or len(values) != len(chosen):
            given = len(values) if isinstance(values, Sequence) else type(values).__name__
            raise UserError(f"reward {reward.name!r} returned {given} values for {len(chosen)} completions")
        for i, value in zip(chosen, values, strict=True):
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                where = f"prompt {prompts[i].id!r}, completion {completions[i].text[:60]!r}"
                raise UserError(f"reward {reward.name!r} returned {value!r} for {where}; a finite float or None is needed")
            breakdowns[i][reward.name] = float(value)
    return [(sum(weights[k] * v for k, v in b.items()) if b else math.nan, b) for b in breakdowns]


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Lengths in tokens, and how many rows meet the model at once."""

    max_prompt_tokens: int = 512
    max_completion_tokens: int = 256
    microbatch_rows: int = 64
    sampling_rows: int = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class PairRows:
    """A preference pair as token rows."""

    chosen: Row
    rejected: Row
    margin: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Source:
    """Everything a method may ask for. Only what the method needs has to be present."""

    template: Template
    device: torch.device
    limits: Limits
    sampling: Sampling
    examples: Sequence[Row] = ()
    pairs: Sequence[PairRows] = ()
    prompts: Sequence[Prompt] = ()
    rewards: Sequence[Reward] = ()

    # ---- offline -----------------------------------------------------------------------------------------------------

    def example_batches(self, count: int, state: LoopState) -> tuple[Batch, ...]:
        """The phase's `count` demonstrations as right-padded microbatches."""
        return self.plan_rows([self.examples[i] for i in take(len(self.examples), count, state.seed, state.phase)])

    def plan_rows(self, rows: Sequence[Row]) -> tuple[Batch, ...]:
        """Rows -> right-padded microbatches of at most `microbatch_rows`, sorted by length."""
        plan = plan_microbatches([len(row) for row in rows], self.limits.microbatch_rows)
        return tuple(self._collate([rows[i] for i in index]) for index in plan)

    def pair_batches(self, count: int, state: LoopState) -> tuple[Batch, ...]:
        """The phase's `count` pairs as microbatches; in each, all chosen rows come first, then all rejected rows."""
        return self.plan_pairs([self.pairs[i] for i in take(len(self.pairs), count, state.seed, state.phase)])

    def plan_pairs(self, pairs: Sequence[PairRows]) -> tuple[Batch, ...]:
        """Pairs -> microbatches of at most `microbatch_rows` rows, both rows of a pair in the same one."""
        lengths = [max(len(pair.chosen), len(pair.rejected)) for pair in pairs]
        batches = []
        for index in plan_microbatches(lengths, max(1, self.limits.microbatch_rows // 2)):
            here = [pairs[i] for i in index]
            batch = self._collate([pair.chosen for pair in here] + [pair.rejected for pair in here])
            margin = torch.tensor([pair.margin for pair in here] * 2, device=self.device)
            batches.append(replace(batch, margin=margin))
        return tuple(batches)

    def _collate(self, rows: Sequence[Row], **per_token: list[Sequence[float]]) -> Batch:
        return collate(rows, pad_id=self.template.pad_id, per_token=per_token).to(self.device)

    # ---- online ------------------------------------------------------------------------------------------------------

    def rollouts(self, policy: Model, num_prompts: int, group_size: int, state: LoopState) -> tuple[Group, ...]:
        """Draws the phase's prompts, samples a group of completions for each, and scores them."""
        prompts = [self.prompts[i] for i in take(len(self.prompts), num_prompts, state.seed, state.phase)]
        prompt_ids = [self.template.encode_prompt(prompt) for prompt in prompts]
        sampled = sample_prompts(
            policy, prompts, prompt_ids, self.template, self.sampling, num_samples=group_size,
            seed=state.seed, phase=state.phase, max_rows=self.limits.sampling_rows,
        )  # fmt: skip
        flat_prompts = [p for p in prompts for _ in range(group_size)]
        flat = [completion for siblings in sampled for completion in siblings]
        scored = combine(self.rewards, flat_prompts, flat)
        rollouts = [
            Rollout(prompt=p, prompt_ids=prompt_ids[i // group_size], completion=c, reward=reward, breakdown=breakdown)
            for i, (p, c, (reward, breakdown)) in enumerate(zip(flat_prompts, flat, scored, strict=True))
        ]
        if all(math.isnan(r.reward) for r in rollouts):
            raise UserError(f"no reward applies to any of the {len(prompts)} prompts of phase {state.phase}; see `reward`")
        return tuple(Group(rollouts=tuple(rollouts[i : i + group_size])) for i in range(0, len(rollouts), group_size))

    def batch(self, groups: Sequence[Group]) -> Batch:
        """All rollouts of the groups as one batch, in group order, with the logprobs recorded while sampling."""
        rollouts = [r for group in groups for r in group.rollouts]
        rows = [Row(prompt_ids=r.prompt_ids, completion_ids=r.completion.token_ids) for r in rollouts]
        return self._collate(rows, old_logprobs=[r.completion.logprobs for r in rollouts])

    def microbatches(self, batch: Batch) -> tuple[Batch, ...]:
        """The batch in pieces of at most `microbatch_rows` rows, sorted by length so that little is padding."""
        return tuple(piece for _, piece in self.numbered_microbatches(batch))

    def numbered_microbatches(self, batch: Batch) -> list[tuple[Tensor, Batch]]:
        """The same, each with the row numbers (M,) it was made of."""
        lengths = batch.attention_mask.sum(-1).tolist()
        plan = plan_microbatches(lengths, self.limits.microbatch_rows)
        rows = [torch.tensor(index, device=batch.input_ids.device) for index in plan]
        return [(index, batch.select(index)) for index in rows]


def sample_prompts(
    policy: Model,
    prompts: Sequence[Prompt],
    prompt_ids: Sequence[Sequence[int]],
    template: Template,
    sampling: Sampling,
    *,
    num_samples: int,
    seed: int,
    phase: int,
    max_rows: int = 512,
) -> list[list[Completion]]:
    """Samples completions and decodes them; one list of `num_samples` a prompt."""
    sampled = generate(
        policy,
        prompt_ids,
        [SamplingKey(seed, phase, prompt.id) for prompt in prompts],
        sampling,
        num_samples=num_samples,
        stop_ids=template.stop_ids,
        pad_id=template.pad_id,
        max_rows=max_rows,
    )
    return [
        [
            Completion(
                token_ids=s.token_ids,
                logprobs=s.logprobs,
                finish_reason=s.finish_reason,
                text=template.decode(s.token_ids),
            )
            for s in siblings
        ]
        for siblings in sampled
    ]


def reward_tensor(groups: Sequence[Group], like: Tensor) -> Tensor:
    """(N,) rewards in group order; NaN where no reward applied."""
    return torch.tensor([r.reward for g in groups for r in g.rollouts], dtype=like.dtype, device=like.device)


def stopped_tensor(groups: Sequence[Group], like: Tensor) -> Tensor:
    """(N,) bool: the completion ended with a stop token rather than at the length limit."""
    flags = [r.completion.finish_reason == "stop" for g in groups for r in g.rollouts]
    return torch.tensor(flags, device=like.device)


def rollout_metrics(groups: Sequence[Group]) -> dict[str, float]:
    """What is worth knowing about a phase's rollouts: rewards by component, lengths, stop reasons, constant groups."""
    rollouts = [r for g in groups for r in g.rollouts]
    rewards = np.array([r.reward for r in rollouts])
    lengths = np.array([len(r.completion.token_ids) for r in rollouts])
    metrics = {
        "reward/mean": float(np.nanmean(rewards)),
        "reward/std": float(np.nanstd(rewards)),
        "completion/length": float(lengths.mean()),
        "completion/stop_fraction": float(np.mean([r.completion.finish_reason == "stop" for r in rollouts])),
        "ledger/prompts": float(len(groups)),
        "ledger/completions": float(len(rollouts)),
        "ledger/generated_tokens": float(lengths.sum()),
    }
    if any(len(g.rollouts) > 1 for g in groups):
        constant = [len({r.reward for r in g.rollouts}) == 1 for g in groups]
        metrics["group/constant_fraction"] = float(np.mean(constant))
    for name in sorted({k for r in rollouts for k in r.breakdown}):
        metrics[f"reward/{name}"] = float(np.mean([r.breakdown[name] for r in rollouts if name in r.breakdown]))
    return metrics


# ---- encoding --------------------------------------------------------------------------------------------------------


def encode_examples(examples: Sequence[Example], template: Template, limits: Limits) -> list[Row]:
    """Demonstrations -> rows that fit the limits; what cannot be made to fit is left out.

    Raises:
        UserError: nothing is left.
    """
    rows = [_fit(template.row(e.prompt, e.completion), limits) for e in examples]
    return _some([row for row in rows if row is not None], len(examples), limits)


def encode_pairs(pairs: Sequence[Pair], template: Template, limits: Limits) -> list[PairRows]:
    """Pairs -> rows that fit; a pair whose two rows are the same after truncation teaches nothing and is left out.

    Raises:
        UserError: nothing is left.
    """
    kept = []
    for pair in pairs:
        chosen, rejected = (_fit(template.row(pair.prompt, text), limits) for text in (pair.chosen, pair.rejected))
        if chosen is not None and rejected is not None and chosen != rejected:
            kept.append(PairRows(chosen=chosen, rejected=rejected, margin=pair.margin or 0.0))
    return _some(kept, len(pairs), limits)


def fitting_prompts(prompts: Sequence[Prompt], template: Template, limits: Limits) -> list[Prompt]:
    """The prompts that are short enough to sample from.

    Raises:
        UserError: nothing is left.
    """
    kept = [p for p in prompts if len(template.encode_prompt(p)) <= limits.max_prompt_tokens]
    return _some(kept, len(prompts), limits)


def _fit(row: Row, limits: Limits) -> Row | None:
    return fit(row, limits.max_prompt_tokens, limits.max_completion_tokens)


def _some(kept: list[T], total: int, limits: Limits) -> list[T]:
    if kept or not total:
        return kept
    raise UserError(
        f"data: none of {total} rows fits {limits.max_prompt_tokens} prompt and {limits.max_completion_tokens} completion "
        "tokens; raise data.max_prompt_tokens or data.max_completion_tokens"
    )
