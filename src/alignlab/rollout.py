"""Where a method's data comes from: data items and a policy -> prompts -> completions -> rewards -> groups -> Batch.

A `Source` answers an algorithm's questions for a `LoopState`. What it answers is a pure function of (seed, phase) and
the policy's weights; the loop pulls, and nothing is prefetched, so rollouts are always on the current policy.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from numbers import Real
from typing import NamedTuple, TypeVar, cast

import numpy as np
import torch
from torch import Tensor

from alignlab.conversation import Template
from alignlab.data import collate, fit, plan_microbatches, take
from alignlab.errors import UserError
from alignlab.generate import CACHE_MB, Sampling, SamplingKey, generate
from alignlab.models import Model
from alignlab.rewards import Detailed, RewardFunction
from alignlab.timing import OutOfTime, span, time_limit
from alignlab.types import Batch, Completion, Example, Group, Labelled, LoopState, Pair, Prompt, Rollout, Row

T = TypeVar("T")
SEED_STRIDE = 1_000_003
"""Between the seeds of two attempts of one phase."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reward:
    """One component of the reward: its function and its weight in the sum."""

    name: str
    function: RewardFunction
    weight: float
    tasks: tuple[str, ...] = ()
    """Only prompts of these tasks; empty = all."""
    needs: str = ""
    """What a prompt must have for it, in words; empty = nothing."""
    timeout: float | None = None
    """Seconds that one call of the function may take; None = any time."""


class Judged(NamedTuple):
    """What the rewards make of one completion."""

    reward: float
    """Weighted sum of the components that apply; NaN if none does."""
    breakdown: dict[str, float]
    """Component -> its unweighted value; of one that scores tokens, their sum. Its parts are `component/part`."""
    token_scores: tuple[float, ...] | None
    """Weighted sum, token by token, of the components that score tokens; None if none does."""


@span("rewards")
def combine(
    rewards: Sequence[Reward], prompts: Sequence[Prompt], completions: Sequence[Completion], *, any_judged: bool = True
) -> list[Judged]:
    """Every completion judged by the components that apply to it; `any_judged`: at least one has to be.

    Raises:
        UserError: a function raised, took too long, or gave the wrong number of values, or something that is neither a
            finite number (or one a token) nor None, or no function judged any completion; names the function and the
            sample. A broken grader must not look like a bad model.
    """
    totals = [0.0 for _ in prompts]
    breakdowns: list[dict[str, float]] = [{} for _ in prompts]
    by_token: list[np.ndarray | None] = [None for _ in prompts]
    for reward in rewards:
        here = [i for i, prompt in enumerate(prompts) if not reward.tasks or prompt.task in reward.tasks]
        values = _values(reward, [prompts[i] for i in here], [completions[i] for i in here])
        for i, value in zip(here, values, strict=True):
            if isinstance(value, np.ndarray):
                before = by_token[i]
                by_token[i] = reward.weight * value if before is None else before + reward.weight * value
                value = float(value.sum())
            if value is not None:
                totals[i] += reward.weight * value
                breakdowns[i][reward.name] = float(value)
                parts = value.parts if isinstance(value, Detailed) else {}
                breakdowns[i] |= {f"{reward.name}/{part}": float(x) for part, x in parts.items()}
    if any_judged and prompts and not any(breakdowns):
        names = ", ".join(repr(reward.name) for reward in rewards) or "none is named"
        raise UserError(
            f"reward: no function ({names}) judged any of {len(prompts)} completions, the first being "
            f"{_sample(prompts[0], completions[0])} of task {prompts[0].task!r}; {why_silent(rewards, prompts)}"
        )
    return [
        Judged(total if b else math.nan, b, None if tokens is None else tuple(tokens.tolist()))
        for total, b, tokens in zip(totals, breakdowns, by_token, strict=True)
    ]


def why_silent(rewards: Sequence[Reward], prompts: Sequence[Prompt]) -> str:
    """Why none of the rewards judges any of the prompts, as far as that can be told."""
    why = []
    for reward in rewards:
        if reward.tasks and not any(prompt.task in reward.tasks for prompt in prompts):
            why.append(f"{reward.name} is for {', '.join(reward.tasks)} only (`tasks`)")
        elif reward.needs:
            why.append(f"{reward.name} needs {reward.needs} (data.columns maps other names)")
        else:
            why.append(f"{reward.name} gave None for each")
    return "; ".join(why) or "name one under `reward`"


def _values(
    reward: Reward, prompts: Sequence[Prompt], completions: Sequence[Completion]
) -> list[float | np.ndarray | None]:
    """What one function says about the completions it is responsible for; an array where it scores tokens."""
    if not prompts:
        return []
    try:
        with time_limit(reward.timeout):
            values = reward.function(prompts, completions)
    except UserError as error:
        raise UserError(f"reward {reward.name!r}: {error}") from error
    except OutOfTime as error:
        where = _culprit(reward, prompts, completions)
        raise UserError(
            f"reward {reward.name!r} did not come back within {reward.timeout:g} s on {where}; mend it, or set "
            "`timeout` beside its weight"
        ) from error
    except Exception as error:
        what = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        where = _culprit(reward, prompts, completions)
        raise UserError(f"reward {reward.name!r} raised {what} on {where}") from error
    if not isinstance(values, Sequence) or isinstance(values, str) or len(values) != len(prompts):
        given = f"{len(values)} values" if isinstance(values, list | tuple) else f"a {type(values).__name__}"
        raise UserError(
            f"reward {reward.name!r} returned {given} for {len(prompts)} completions, the first being "
            f"{_sample(prompts[0], completions[0])}; a list with one float or None for each is needed"
        )
    return [_checked(reward, *one) for one in zip(values, prompts, completions, strict=True)]


def _checked(reward: Reward, value: object, prompt: Prompt, completion: Completion) -> float | np.ndarray | None:
    """A function's value as it is counted."""
    if value is None:
        return None
    if isinstance(value, list | tuple | np.ndarray):
        if len(value) != len(completion.token_ids):
            raise UserError(
                f"reward {reward.name!r} returned {len(value)} token scores for {_sample(prompt, completion)}, which "
                f"has {len(completion.token_ids)} tokens; one finite float for each is needed"
            )
        if all(_is_number(x) for x in value):
            return np.array([float(x) for x in value])
    elif isinstance(value, Detailed) and not all(map(_is_number, value.parts.values())):
        value = value.parts  # told below
    elif _is_number(value):
        return value if isinstance(value, Detailed) else float(cast(Real, value))
    raise UserError(
        f"reward {reward.name!r} returned {value!r} for {_sample(prompt, completion)}; a finite float or None is needed"
    )


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def _culprit(reward: Reward, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> str:
    """The first completion that the function raises on, or hangs at, by itself."""
    share = None if reward.timeout is None else min(reward.timeout, max(1.0, reward.timeout / len(prompts)))
    for prompt, completion in zip(prompts, completions, strict=True):
        try:
            with time_limit(share):
                reward.function([prompt], [completion])
        except (Exception, OutOfTime):
            return _sample(prompt, completion)
    return f"{len(prompts)} completions together, the first being {_sample(prompts[0], completions[0])}"


def _sample(prompt: Prompt, completion: Completion) -> str:
    return f"prompt {prompt.id!r}, completion {completion.text[:60]!r}"


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Lengths in tokens, and how many rows meet the model at once."""

    max_prompt_tokens: int = 512
    max_completion_tokens: int = 256
    microbatch_rows: int = 64
    microbatch_tokens: int | None = None
    """Padded; None = any number."""
    sampling_rows: int = 512
    sampling_cache_mb: int = CACHE_MB


@dataclass(frozen=True, slots=True, kw_only=True)
class PairRows:
    """A preference pair as token rows."""

    chosen: Row
    rejected: Row
    margin: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelledRow:
    """A completion as a token row, with its label: True = desirable."""

    row: Row
    label: bool


@dataclass(frozen=True, kw_only=True)
class Source:
    """Everything a method may ask for. Only what the method needs has to be present."""

    template: Template
    device: torch.device
    limits: Limits
    sampling: Sampling
    examples: Sequence[Row] = ()
    pairs: Sequence[PairRows] = ()
    labelled: Sequence[LabelledRow] = ()
    prompts: Sequence[Prompt] = ()
    rewards: Sequence[Reward] = ()
    reference: Mapping[Row, Tensor] = field(default_factory=dict)
    """Row -> the reference's logprobs of its completion, (N,): where they are known before training. A microbatch whose
    rows all stand here brings them along."""

    @property
    def num_items(self) -> int:
        """Training items of whichever kind there is: what an epoch passes over once."""
        return len(self.examples) + len(self.pairs) + len(self.labelled) + len(self.prompts)

    # ---- offline -----------------------------------------------------------------------------------------------------

    def example_batches(self, count: int, state: LoopState) -> tuple[Batch, ...]:
        """The phase's `count` demonstrations as right-padded microbatches."""
        return self.plan_rows([self.examples[i] for i in take(len(self.examples), count, state.seed, state.phase)])

    def plan_rows(self, rows: Sequence[Row]) -> tuple[Batch, ...]:
        """Rows -> right-padded microbatches of at most `microbatch_rows`, sorted by length."""
        plan = self._plan([len(row) for row in rows])
        return tuple(self._collate([rows[i] for i in index]) for index in plan)

    def _plan(
        self, lengths: Sequence[int], *, rows_each: int = 1, prompts: Sequence[int] | None = None
    ) -> list[list[int]]:
        """Items of `rows_each` rows (2: pairs) as microbatches within the limits."""
        rows, tokens = self.limits.microbatch_rows, self.limits.microbatch_tokens
        return plan_microbatches(
            lengths, max(1, rows // rows_each), None if tokens is None else tokens // rows_each, prompts
        )

    def phase_pairs(self, count: int, state: LoopState) -> list[PairRows]:
        """The phase's `count` pairs."""
        return [self.pairs[i] for i in take(len(self.pairs), count, state.seed, state.phase)]

    def pair_batches(self, count: int, state: LoopState) -> tuple[Batch, ...]:
        """The phase's pairs as microbatches; in each, all chosen rows come first, then all rejected rows."""
        return self.plan_pairs(self.phase_pairs(count, state))

    def plan_pairs(self, pairs: Sequence[PairRows]) -> tuple[Batch, ...]:
        """Pairs -> microbatches of at most `microbatch_rows` rows, both rows of a pair in the same one."""
        lengths = [max(len(pair.chosen), len(pair.rejected)) for pair in pairs]
        batches = []
        for index in self._plan(lengths, rows_each=2):
            here = [pairs[i] for i in index]
            batch = self._collate([pair.chosen for pair in here] + [pair.rejected for pair in here])
            margin = torch.tensor([pair.margin for pair in here] * 2, device=self.device)
            batches.append(replace(batch, margin=margin))
        return tuple(batches)

    def phase_labelled(self, count: int, state: LoopState) -> list[LabelledRow]:
        """The phase's `count` labelled completions."""
        return [self.labelled[i] for i in take(len(self.labelled), count, state.seed, state.phase)]

    def labelled_batches(self, count: int, state: LoopState) -> tuple[Batch, ...]:
        """The same as right-padded microbatches, sorted by length, with `labels`."""
        items = self.phase_labelled(count, state)
        batches = []
        for index in self._plan([len(item.row) for item in items]):
            batch = self._collate([items[i].row for i in index])
            batches.append(replace(batch, labels=torch.tensor([items[i].label for i in index], device=self.device)))
        return tuple(batches)

    def _collate(self, rows: Sequence[Row]) -> Batch:
        batch = collate(rows, pad_id=self.template.pad_id).to(self.device)
        if not self.reference or not all(row in self.reference for row in rows):
            return batch
        known = torch.cat([self.reference[row] for row in rows]).to(self.device)
        zeros = torch.zeros(batch.input_ids.shape, dtype=known.dtype, device=self.device)
        return replace(batch, reference_logprobs=zeros.masked_scatter(batch.completion_mask, known))

    # ---- online ------------------------------------------------------------------------------------------------------

    def rollouts(
        self,
        policy: Model,
        num_prompts: int,
        group_size: int,
        state: LoopState,
        *,
        attempt: int = 0,
        needs_reward: bool = True,
    ) -> tuple[Group, ...]:
        """Draws the phase's prompts, samples a group of completions for each, and scores them.

        Every `attempt` of a phase draws prompts in another order and other completions. A source without rewards is an
        error where one is needed; else every reward is NaN.

        Raises:
            UserError: sampling is not from the policy itself (top-k, top-p, ...), so no ratio would be right; or the
                rewards cannot be used.
        """
        if not self.sampling.on_policy:
            raise UserError(f"training samples from the policy itself: leave out greedy and filters ({self.sampling})")
        seed = state.seed + SEED_STRIDE * attempt
        prompts = [self.prompts[i] for i in take(len(self.prompts), num_prompts, seed, state.phase)]
        prompt_ids = [self.template.encode_prompt(prompt) for prompt in prompts]
        sampled = sample_prompts(
            policy, prompts, prompt_ids, self.template, self.sampling, num_samples=group_size,
            seed=seed, phase=state.phase, max_rows=self.limits.sampling_rows,
            cache_mb=self.limits.sampling_cache_mb,
        )  # fmt: skip
        flat = [(p, ids, c) for p, ids, siblings in zip(prompts, prompt_ids, sampled, strict=True) for c in siblings]
        if self.rewards or needs_reward:
            # A second attempt may be at a few prompts only, of a task that has no reward.
            scored = combine(self.rewards, [p for p, _, _ in flat], [c for _, _, c in flat], any_judged=not attempt)
        else:
            scored = [Judged(math.nan, {}, None) for _ in flat]
        rollouts = [
            Rollout(prompt=prompt, prompt_ids=ids, completion=completion, **judged._asdict())
            for (prompt, ids, completion), judged in zip(flat, scored, strict=True)
        ]
        return tuple(Group(rollouts=tuple(rollouts[i : i + group_size])) for i in range(0, len(rollouts), group_size))

    def batch(self, groups: Sequence[Group], dtype: torch.dtype = torch.float32) -> Batch:
        """All rollouts of the groups as one batch, in group order, with the logprobs recorded while sampling."""
        rollouts = [r for group in groups for r in group.rollouts]
        batch = self._collate([Row(prompt_ids=r.prompt_ids, completion_ids=r.completion.token_ids) for r in rollouts])
        recorded = torch.tensor([x for r in rollouts for x in r.completion.logprobs], dtype=dtype, device=self.device)
        zeros = torch.zeros(batch.input_ids.shape, dtype=dtype, device=self.device)
        return replace(batch, old_logprobs=zeros.masked_scatter(batch.completion_mask, recorded))

    def microbatches(self, batch: Batch) -> tuple[Batch, ...]:
        """The batch in pieces within the limits, sorted by length so that little is padding, siblings together."""
        return tuple(piece for _, piece in self.numbered_microbatches(batch))

    def numbered_microbatches(self, batch: Batch) -> list[tuple[Tensor, Batch]]:
        """The same, each with the row numbers (M,) it was made of."""
        shapes = batch.shapes
        lengths = batch.attention_mask.sum(-1).tolist() if shapes is None else shapes.lengths
        plan = self._plan(lengths, prompts=None if shapes is None else shapes.prompts)
        rows = [torch.tensor(index, device=batch.input_ids.device) for index in plan]
        return [(index, batch.select(index)) for index in rows]

    def pair_pieces(self, batch: Batch, chosen: Tensor, rejected: Tensor) -> tuple[Batch, ...]:
        """Rows ((P,) int64 each) of the batch as pair microbatches, both rows of a pair in the same one."""
        lengths = batch.attention_mask.sum(-1)
        longest = torch.maximum(lengths[chosen], lengths[rejected]).tolist()
        plan = self._plan(longest, rows_each=2)
        return tuple(batch.select(torch.cat([chosen[index], rejected[index]])) for index in plan)


@span("sampling")
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
    cache_mb: int = CACHE_MB,
) -> list[list[Completion]]:
    """Samples completions and decodes them; one list of `num_samples` a prompt.

    A prompt that comes more than once (fewer prompts than a phase asks for) gets other random numbers each time.
    """
    keys, seen = [], Counter[str]()
    for prompt in prompts:
        keys.append(SamplingKey(seed, phase, prompt.id, attempt=seen[prompt.id]))
        seen[prompt.id] += 1
    sampled = generate(
        policy,
        prompt_ids,
        keys,
        sampling,
        num_samples=num_samples,
        stop_ids=template.stop_ids,
        pad_id=template.pad_id,
        max_rows=max_rows,
        cache_mb=cache_mb,
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


def component_tensor(groups: Sequence[Group], rewards: Sequence[Reward], like: Tensor) -> tuple[Tensor, Tensor]:
    """(C, N) unweighted values of every component in group order, NaN where it did not apply; (C,) their weights.

    A name that stands twice, with other weights for other tasks, counts once, its values already weighted.
    """
    rollouts = [r for g in groups for r in g.rollouts]
    names = list(dict.fromkeys(reward.name for reward in rewards))
    weights: dict[str, float] = {}
    rows = []
    for name in names:
        given = [reward for reward in rewards if reward.name == name]
        same = len({reward.weight for reward in given}) == 1
        weights[name] = given[0].weight if same else 1.0
        by_task = {task: reward.weight for reward in given for task in reward.tasks}
        factor = [1.0 if same else by_task.get(r.prompt.task, 0.0) for r in rollouts]
        rows.append([f * r.breakdown.get(name, math.nan) for f, r in zip(factor, rollouts, strict=True)])
    return like.new_tensor(rows), like.new_tensor([weights[name] for name in names])


def is_constant(group: Group, *, by_component: bool = False) -> bool:
    """Whether all of a group that was judged earned the same, so that it does not say which completion is better;
    `by_component`: in every component of the reward, not only in their sum."""
    judged = [r for r in group.rollouts if not math.isnan(r.reward)]
    if by_component:
        values = ({k: v for k, v in r.breakdown.items() if "/" not in k} for r in judged)  # without their parts
        return len({tuple(sorted(components.items())) for components in values}) <= 1
    return len({r.reward for r in judged}) <= 1


def stopped_tensor(groups: Sequence[Group], like: Tensor) -> Tensor:
    """(N,) bool: the completion ended with a stop token rather than at the length limit."""
    flags = [r.completion.finish_reason == "stop" for g in groups for r in g.rollouts]
    return torch.tensor(flags, device=like.device)


def rollout_metrics(groups: Sequence[Group], rewards: Sequence[Reward] = ()) -> dict[str, float]:
    """What is worth knowing about a phase's rollouts: lengths, stop reasons, how siblings differ; where something was
    judged, rewards by component and constant groups, and with the reward functions how many completions each judged and
    what it adds to the variance."""
    rollouts = [r for g in groups for r in g.rollouts]
    scores = np.array([r.reward for r in rollouts])
    lengths = np.array([len(r.completion.token_ids) for r in rollouts])
    metrics = {
        "completion/length": float(lengths.mean()),
        "completion/stop_fraction": float(np.mean([r.completion.finish_reason == "stop" for r in rollouts])),
        "ledger/prompts": float(len(groups)),
        "ledger/completions": float(len(rollouts)),
        "ledger/generated_tokens": float(lengths.sum()),
    }
    several = any(len(g.rollouts) > 1 for g in groups)
    if several:
        different = [len({r.completion.token_ids for r in g.rollouts}) / len(g.rollouts) for g in groups]
        metrics["group/distinct_fraction"] = float(np.mean(different))
    if not np.isnan(scores).all():
        metrics |= {
            "reward/mean": float(np.nanmean(scores)),
            "reward/std": float(np.nanstd(scores)),
            "reward/unjudged_fraction": float(np.isnan(scores).mean()),
        }
        if several:
            metrics["group/constant_fraction"] = float(np.mean([is_constant(group) for group in groups]))
    for name in sorted({k for r in rollouts for k in r.breakdown}):
        metrics[f"reward/{name}"] = float(np.mean([r.breakdown[name] for r in rollouts if name in r.breakdown]))
    for name in dict.fromkeys(reward.name for reward in rewards):
        metrics[f"reward_judged/{name}"] = float(np.mean([name in r.breakdown for r in rollouts]))
    return metrics | _variance_shares(groups, rewards)


def _variance_shares(groups: Sequence[Group], rewards: Sequence[Reward]) -> dict[str, float]:
    """Cov(weighted component, reward) / Var(reward) of each component, over what was judged; they add up to 1.

    Nothing where there is one component, or where all earned the same.
    """
    if len({reward.name for reward in rewards}) < 2:
        return {}
    components, weights = component_tensor(groups, rewards, torch.zeros((), dtype=torch.float64))
    judged = ~components.isnan().all(0)
    parts = (weights[:, None] * components.nan_to_num(nan=0.0))[:, judged]
    total = parts.sum(0)
    spread = (total - total.mean()).square().sum().item() if len(total) else 0.0
    if not spread > 1e-12 * total.square().sum().item():
        return {}
    shares = ((parts - parts.mean(1, keepdim=True)) @ (total - total.mean()) / spread).tolist()
    names = dict.fromkeys(reward.name for reward in rewards)
    return {f"reward_share/{name}": share for name, share in zip(names, shares, strict=True)}


# ---- encoding --------------------------------------------------------------------------------------------------------


def encode_examples(examples: Sequence[Example], template: Template, limits: Limits) -> list[Row]:
    """Demonstrations -> rows that fit the limits; what cannot be made to fit is left out.

    Raises:
        UserError: nothing is left.
    """
    rows = [template.row(e.prompt, e.completion) for e in examples]
    kept = [row for row in (_fit(row, limits) for row in rows) if row is not None]
    return _some(kept, [_sizes(row) for row in rows], limits)


def encode_pairs(pairs: Sequence[Pair], template: Template, limits: Limits) -> list[PairRows]:
    """Pairs -> rows that fit; a pair whose two rows are the same after truncation teaches nothing and is left out.

    Raises:
        UserError: nothing is left.
    """
    kept, sizes = [], []
    for pair in pairs:
        whole = [template.row(pair.prompt, text) for text in (pair.chosen, pair.rejected)]
        chosen, rejected = (_fit(row, limits) for row in whole)
        sizes.append(max(map(_sizes, whole)))
        if chosen is not None and rejected is not None and chosen != rejected:
            kept.append(PairRows(chosen=chosen, rejected=rejected, margin=pair.margin or 0.0))
    return _some(kept, sizes, limits)


def encode_labelled(items: Sequence[Labelled], template: Template, limits: Limits) -> list[LabelledRow]:
    """Labelled completions -> rows that fit the limits; what cannot be made to fit is left out.

    Raises:
        UserError: nothing is left.
    """
    rows = [template.row(item.prompt, item.completion) for item in items]
    fitted = [(_fit(row, limits), item.label) for row, item in zip(rows, items, strict=True)]
    kept = [LabelledRow(row=row, label=label) for row, label in fitted if row is not None]
    return _some(kept, [_sizes(row) for row in rows], limits)


def fitting_prompts(prompts: Sequence[Prompt], template: Template, limits: Limits) -> list[Prompt]:
    """The prompts that are short enough to sample from.

    Raises:
        UserError: nothing is left.
    """
    lengths = [len(template.encode_prompt(prompt)) for prompt in prompts]
    kept = [p for p, length in zip(prompts, lengths, strict=True) if length <= limits.max_prompt_tokens]
    if kept:
        return kept
    references = [len(template.encode_completion(prompt.answer or "")) for prompt in prompts]
    return _some(kept, list(zip(lengths, references, strict=True)), limits)


def _fit(row: Row, limits: Limits) -> Row | None:
    return fit(row, limits.max_prompt_tokens, limits.max_completion_tokens)


def _sizes(row: Row) -> tuple[int, int]:
    return len(row.prompt_ids), len(row.completion_ids)


def _some(kept: list[T], sizes: Sequence[tuple[int, int]], limits: Limits) -> list[T]:
    """`kept`, which is something where there were rows; `sizes`: (prompt, longest completion) of each, in tokens."""
    if kept or not sizes:
        return kept
    prompt, completion = _enough_for_half(sizes)
    keys = {"data.max_prompt_tokens": (prompt, limits.max_prompt_tokens),
            "data.max_completion_tokens": (completion, limits.max_completion_tokens)}  # fmt: skip
    more = " and ".join(f"{key} to {needed}" for key, (needed, now) in keys.items() if needed > now)
    raise UserError(
        f"data: none of {len(sizes)} rows is left within {limits.max_prompt_tokens} prompt and "
        f"{limits.max_completion_tokens} completion tokens (a pair must also differ within them); "
        + (f"half of them fit whole if you raise {more}" if more else "most pairs are two equal answers")
    )


def _enough_for_half(sizes: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """Limits within which half of the rows are whole: the same quantile of prompts and of completions, the least."""
    prompts, completions = (sorted(lengths) for lengths in zip(*sizes, strict=True))
    ranks = sorted(max(bisect_left(prompts, prompt), bisect_left(completions, answer)) for prompt, answer in sizes)
    rank = ranks[(len(ranks) - 1) // 2]
    return prompts[rank], completions[rank]
