"""Rejection-sampling fine-tuning, or expert iteration: prompts -> groups of samples -> the best of each -> SFT steps.

Each phase samples from the current policy, keeps what earned most, and minimises

    L = -1/N sum_t log pi(y_t | x, y_<t)    over the N tokens of all kept completions, stop tokens included

RAFT (arXiv:2304.06767) keeps the best of each group; ReST (arXiv:2308.08998) and STaR (arXiv:2203.14465) keep what is
good enough. What is rejected teaches nothing, and how much better the best was does not matter: only the order of the
rewards counts. The sign makes kept completions likelier.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor

from alignlab.algorithms import Models, completion_tokens, masked_sum, numbers_dtype
from alignlab.algorithms._online import ScoreShaping
from alignlab.forward import score
from alignlab.functional.masked import aggregate
from alignlab.rollout import Source, rollout_metrics
from alignlab.types import Batch, Directive, Group, LoopState, LossOutput, Phase, Role, Step


class Rejection(ScoreShaping):
    """Supervised fine-tuning on the policy's own best samples, drawn anew each phase."""

    metrics_file: ClassVar[str | None] = None
    dropout: ClassVar[bool] = True
    data_kind: ClassVar[str] = "prompts"
    DEPARTURES: ClassVar[tuple[str, ...]] = (
        "Every phase samples from the current policy (RAFT); STaR starts from the base model each round, ReST filters "
        "one set of samples several times.",
        "A phase is one round of prompts and full-batch steps; RAFT fine-tunes on a round of 2,048 prompts in "
        "minibatches, further off policy by its end.",
        "Groups that agree are dropped; RAFT keeps their first.",
        "A mean over the tokens that are kept, however few: AdamW takes a step of full length for one completion, too.",
        "trl, verl and OpenRLHF have no trainer for it, so there are no presets.",
    )

    name: Literal["rejection"] = "rejection"
    learning_rate: float = Field(2e-5, gt=0)
    """Peak learning rate of AdamW, as in supervised fine-tuning (RAFT's LLaMA-7B: 2e-5)."""
    max_grad_norm: float = Field(1.0, gt=0)
    """Gradient norm above which gradients are scaled down."""
    prompts_per_phase: int = Field(16, ge=1)
    """Prompts sampled a phase (b; RAFT: 2048)."""
    group_size: int = Field(8, ge=1)
    """Completions a prompt to choose from (K; RAFT: 8 to 32)."""
    temperature: float = Field(1.0, gt=0)
    """Sampling temperature (RAFT's lambda). The loss is that of the policy at temperature 1, as in the papers, so lower
    values sharpen it by themselves."""
    keep: int | None = Field(1, ge=1)
    """The most that is kept of a group, best first, siblings of equal score in sampling order (RAFT: 1); null = all
    that reach min_reward."""
    min_reward: float | None = None
    """The least score of what is kept (ReST's threshold tau; STaR: the reward of a right answer); null = none."""
    drop_constant: bool = True
    """Drop groups that all scored the same: they do not say which completion is better. Under min_reward alone they may
    still be worth imitating; then false."""
    epochs: int = Field(1, ge=1)
    """Optimiser steps on the kept completions of a phase, each over all of them."""

    @model_validator(mode="after")
    def _rejects(self) -> Rejection:
        if self.min_reward is None and (self.keep is None or self.keep >= self.group_size):
            raise ValueError(
                f"nothing would be rejected: keep ({self.keep}) must be below group_size ({self.group_size}), or "
                "min_reward be given"
            )
        if self.drop_constant and self.group_size == 1:
            raise ValueError("group_size 1: a group of one is constant; set drop_constant: false")
        return self

    def models(self) -> Mapping[str, Role]:
        return {"policy": Role(learning_rate=self.learning_rate, max_grad_norm=self.max_grad_norm)}

    def collect(self, models: Models, source: Source, state: LoopState) -> tuple[Phase, LoopState]:
        groups = source.rollouts(models["policy"], self.prompts_per_phase, self.group_size, state)
        like = torch.zeros((), dtype=numbers_dtype(models["policy"]), device=source.device)
        scores, state = self.scores(groups, like, state, source.sampling.max_completion_tokens)
        kept = self.kept(groups, scores)
        metrics = rollout_metrics(groups, source.rewards) | kept_metrics(groups, kept, scores)
        if not kept:  # every group agreed, or nothing was good enough
            return Phase((), metrics, groups), state
        pieces = source.microbatches(source.batch(kept, like.dtype))
        return Phase((Step(pieces, completion_tokens(pieces)),) * self.epochs, metrics, groups), state

    def kept(self, groups: Sequence[Group], scores: Tensor) -> tuple[Group, ...]:
        """What of each group is trained on, best first; groups of which nothing is left do not appear.

        Args:
            scores: (N,) in group order; NaN, for what no reward judged, is never kept.
        """
        chosen, of_all = [], scores.tolist()
        for group in groups:
            size = len(group.rollouts)
            own, of_all = of_all[:size], of_all[size:]
            judged = [i for i in range(size) if not math.isnan(own[i])]
            if self.drop_constant and len({own[i] for i in judged}) <= 1:
                continue
            good = [i for i in judged if self.min_reward is None or own[i] >= self.min_reward]
            best = sorted(good, key=lambda i: -own[i])[: self.keep]  # stable: equal scores stay in sampling order
            if best:
                chosen.append(Group(rollouts=tuple(group.rollouts[i] for i in best)))
        return tuple(chosen)

    def loss(self, models: Models, batch: Batch, state: LoopState) -> LossOutput:
        scores = score(models["policy"], batch, entropy=True)
        assert scores.entropy is not None
        sums = {"policy/nll": masked_sum(-scores.logprobs, batch), "policy/entropy": masked_sum(scores.entropy, batch)}
        return LossOutput(aggregate(-scores.logprobs, batch.completion_mask), sums)

    def observe(self, state: LoopState, metrics: Mapping[str, float]) -> tuple[LoopState, Directive]:
        return state, Directive()

    def formula(self) -> tuple[str, ...]:
        return ("loss = sum(mask * -logprobs) / completion_tokens",)


def kept_metrics(groups: Sequence[Group], kept: Sequence[Group], scores: Tensor) -> dict[str, float]:
    """How much of a phase's samples is trained on, what it earned, and the best score (N,) of all, kept or not."""
    rewards = [r.reward for group in kept for r in group.rollouts]
    total = sum(len(group.rollouts) for group in groups)
    return {
        "rejection/kept_fraction": len(rewards) / total,
        "rejection/kept_reward": float(np.mean(rewards)) if rewards else math.nan,
        "rejection/best_score": max((s for s in scores.tolist() if not math.isnan(s)), default=math.nan),
    }


ALGORITHM = Rejection
