"""What the methods that sample have in common: a phase's rewards -> scores, and how the KL to the reference is held.

Two sets of hyperparameters, each with the few functions that give them meaning. What they remember between phases (the
KL coefficient, running moments) is in `LoopState.algorithm`, so it is checkpointed with everything else.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from alignlab.algorithms import Hyperparameters, Models
from alignlab.errors import UserError
from alignlab.forward import score
from alignlab.functional.kl import above_threshold, kl_estimate
from alignlab.functional.masked import keep
from alignlab.rollout import Source, reward_tensor, stopped_tensor
from alignlab.timing import span
from alignlab.types import Batch, Directive, Group, LoopState

NORMALISER_EPS = 1e-4
"""Added to a running standard deviation, which is 0 while all rewards are equal."""


class ScoreShaping(Hyperparameters):
    """From what reward functions say to the score that a method learns from: normalise, scale, penalise, clip."""

    score_normaliser: Literal["none", "ema"] = "none"
    """`ema`: (reward - running mean) / running standard deviation, over this and all earlier phases (document 001).
    Under a group baseline the mean cancels, and the scale cancels under `scale: group`."""
    ema_decay: float = Field(0.99, gt=0, lt=1)
    """How much of the running moments a phase keeps (alpha); they are corrected for their start."""
    reward_scale: float = Field(1.0, gt=0)
    """Factor on the reward (document 004: .1), after the normaliser."""
    missing_stop_penalty: float = Field(0.0, ge=0)
    """Taken off the score of a completion that was cut off (trl's missing_eos_penalty)."""
    overlong_buffer: int | None = Field(None, ge=1)
    """Tokens before the completion limit over which a penalty grows from 0 to 1 (DAPO's soft overlong punishment);
    null = none."""
    score_clip: float | None = Field(None, gt=0)
    """Scores are clipped to +- this, after everything else; null = not at all."""

    def scores(self, groups: Sequence[Group], like: Tensor, state: LoopState, limit: int) -> tuple[Tensor, LoopState]:
        """(N,) scores in group order, and the state with the running moments of this phase in it.

        Args:
            like: gives type and device.
            limit: the completion limit in tokens.

        Returns:
            The score of a completion that no reward function judged is NaN.
        """
        rewards = reward_tensor(groups, like)
        if self.score_normaliser == "ema":
            state = self._remembered(rewards, state)
            mean, sd = running_moments(state)
            rewards = (rewards - mean) / (sd + NORMALISER_EPS)
        rewards = self.reward_scale * rewards - self.penalties(groups, like, limit)
        return rewards if self.score_clip is None else rewards.clamp(-self.score_clip, self.score_clip), state

    def check_buffer(self, limit: int) -> None:
        """Refuses an overlong penalty that would begin before the first token."""
        if self.overlong_buffer is not None and self.overlong_buffer >= limit:
            raise UserError(
                f"algorithm.overlong_buffer: the penalty would begin {self.overlong_buffer} tokens before the limit of "
                f"{limit} tokens a completion, so every completion would pay; give it fewer tokens than the limit"
            )

    def penalties(self, groups: Sequence[Group], like: Tensor, limit: int) -> Tensor:
        """(N,) what a missing stop token and overlength cost, >= 0."""
        cost = self.missing_stop_penalty * (~stopped_tensor(groups, like)).to(like.dtype)
        if self.overlong_buffer is None:
            return cost
        lengths = [len(r.completion.token_ids) for g in groups for r in g.rollouts]
        beyond = torch.tensor(lengths, dtype=like.dtype, device=like.device) - (limit - self.overlong_buffer)
        return cost + (beyond / self.overlong_buffer).clamp(0, 1)

    def _remembered(self, rewards: Tensor, state: LoopState) -> LoopState:
        """First and second moment, each decay * old + (1 - decay) * the phase's mean, and their weight so far."""
        given = rewards[~rewards.isnan()].double()  # the variance is a small difference of large squares
        if not len(given):
            return state
        news = {"reward_mean": given.mean(), "reward_square": given.square().mean(), "reward_weight": torch.ones(())}
        before, decay = state.algorithm, self.ema_decay
        moments = {k: decay * before.get(k, 0.0) + (1 - decay) * v.item() for k, v in news.items()}
        return replace(state, algorithm={**before, **moments})


def running_moments(state: LoopState) -> tuple[float, float]:
    """Mean and standard deviation of the rewards so far, exponentially weighted, corrected for starting at 0.

    The standard deviation comes from the second moment, so that it also sees the mean move.
    """
    weight = state.algorithm.get("reward_weight", 0.0)
    if not weight:
        return 0.0, 0.0
    mean, square = state.algorithm["reward_mean"] / weight, state.algorithm["reward_square"] / weight
    return mean, math.sqrt(max(0.0, square - mean * mean))


class KLControl(Hyperparameters):
    """Where the KL to the reference acts, how it is estimated, and what happens when it is not as wanted."""

    kl_coef: float = Field(0.05, ge=0)
    """Weight of the KL (beta); the start value where a controller moves it."""
    kl_placement: Literal["reward", "loss", "none"] = "reward"
    """In the reward, detached, as PPO-RLHF has it; in the loss, differentiated, as GRPO has it; or nowhere."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k1"
    """Per-token estimator. In the reward k1 gives the exact reverse KL in expectation. In the loss k2 has the gradient
    of the true KL on policy, k3 (the GRPO paper's) nearly so, and k1 has none on average (arXiv:2510.01555)."""
    kl_threshold: float | None = Field(None, ge=0)
    """Nats a token that are free: only a completion whose mean KL is above it pays, for what is above (document 004:
    .05); null = every nat counts."""
    kl_controller: Literal["fixed", "adaptive", "phased", "lr_guard"] = "fixed"
    """`adaptive` moves kl_coef once a phase towards kl_target_per_sequence (arXiv:1909.08593); `phased` does so towards
    targets per token that change at kl_boundaries; `lr_guard` leaves the loss alone, lowers the policy's learning rate
    when the KL is over its target, and stops when that has not helped."""
    kl_target_per_sequence: float = Field(6.0, gt=0)
    """Nats a completion that `adaptive` aims at (arXiv:1909.08593: 6)."""
    kl_horizon: float = Field(10_000.0, gt=0)
    """Completions over which a controller corrects an error (arXiv:1909.08593: 10,000)."""
    kl_targets_per_token: tuple[float, ...] = Field((0.05, 0.02, 0.01), min_length=1)
    """Nats a token that `phased` aims at and `lr_guard` watches, one after the other (document 001)."""
    kl_boundaries: tuple[int, ...] = ()
    """Phases at which the next target begins; equal thirds of 800 phases are [267, 533]."""
    lr_guard_factor: float = Field(0.5, gt=0, lt=1)
    """What `lr_guard` multiplies the learning rate by."""
    lr_guard_patience: int = Field(3, ge=0)
    """How often in a row `lr_guard` lowers the learning rate without help before it stops the run."""

    @model_validator(mode="after")
    def _controllable(self) -> KLControl:
        if self.kl_controller in ("adaptive", "phased"):
            if not self.kl_coef:
                raise ValueError(f"kl_controller {self.kl_controller} multiplies kl_coef, so it must start above 0")
            if self.kl_placement == "none":
                raise ValueError(f"kl_controller {self.kl_controller} moves kl_coef, which kl_placement none ignores")
        if self.kl_controller in ("phased", "lr_guard"):
            targets, boundaries = self.kl_targets_per_token, self.kl_boundaries
            if len(boundaries) != len(targets) - 1:
                raise ValueError(
                    f"kl_boundaries: {len(targets)} targets need {len(targets) - 1} phases at which the next begins, "
                    f"not {len(boundaries)}"
                )
            if min(targets) <= 0 or any(a >= b for a, b in pairwise((0, *boundaries))):
                raise ValueError("kl_targets_per_token must be above 0, and kl_boundaries above 0 and rising")
        return self

    @property
    def penalises(self) -> bool:
        return self.kl_placement != "none" and self.kl_coef > 0

    @property
    def measures_kl(self) -> bool:
        """Whether the method needs a reference at all."""
        return self.penalises or self.kl_controller == "lr_guard"

    def target_per_token(self, phase: int) -> float:
        return self.kl_targets_per_token[bisect_right(self.kl_boundaries, phase)]

    def controlled(self, state: LoopState) -> LoopState:
        """The state with the coefficient of the phase that begins, moved by the KL that the last phase measured:
        kl_coef (1 + clip(KL / target - 1, +-.2) min(1, n / horizon)), n completions."""
        if not self.measures_kl:
            return state
        known = state.algorithm
        coefficient = known.get("kl_coef", self.kl_coef)
        if self.kl_controller in ("adaptive", "phased") and "kl_completions" in known:
            error = (
                known["kl_per_sequence"] / self.kl_target_per_sequence
                if self.kl_controller == "adaptive"
                else known["kl_per_token"] / self.target_per_token(state.phase)
            ) - 1
            coefficient *= 1 + min(0.2, max(-0.2, error)) * min(1.0, known["kl_completions"] / self.kl_horizon)
        return replace(state, algorithm={**known, "kl_coef": coefficient})

    def measured(self, batch: Batch, state: LoopState) -> tuple[dict[str, float], LoopState]:
        """KL of the sampling policy from the reference on its own samples (k1, nats), as metrics and remembered."""
        assert batch.old_logprobs is not None and batch.reference_logprobs is not None
        drift = keep(batch.old_logprobs - batch.reference_logprobs, batch.completion_mask)
        of_rows = drift.sum(-1)
        per_sequence = of_rows.mean().item()
        per_token = (drift.sum() / batch.completion_mask.sum().clamp(min=1)).item()
        found = {"kl_per_sequence": per_sequence, "kl_per_token": per_token, "kl_completions": float(len(batch))}
        metrics = {
            "policy/kl_per_sequence": per_sequence,
            "policy/kl_per_token": per_token,
            "policy/kl_standard_error": (of_rows.std() / len(batch) ** 0.5).item() if len(batch) > 1 else math.nan,
            "policy/kl_coef": state.algorithm["kl_coef"] if self.kl_placement != "none" else 0.0,
        }
        return metrics, replace(state, algorithm={**state.algorithm, **found})

    def token_kl(self, logprobs: Tensor, reference_logprobs: Tensor, mask: Tensor) -> Tensor:
        """(B, T) per-token KL as it is penalised, without the coefficient; 0 outside the mask."""
        kl = kl_estimate(keep(logprobs, mask), keep(reference_logprobs, mask), self.kl_estimator)
        return keep(kl, mask) if self.kl_threshold is None else above_threshold(kl, mask, self.kl_threshold)

    def guarded(self, state: LoopState, metrics: Mapping[str, float]) -> tuple[LoopState, Directive]:
        """`lr_guard` after the first step of a phase, the only one that brings the phase's KL with it.

        Over the target it lowers the learning rate, again only if the KL has not fallen since, and stops where this did
        not help `lr_guard_patience` times. A phase on target, or a new target, begins the count anew.
        """
        kl = metrics.get("policy/kl_per_token")
        if self.kl_controller != "lr_guard" or kl is None:
            return state, Directive()
        target, known = self.target_per_token(state.phase), state.algorithm
        lowered = known.get("lr_lowered", 0.0) if known.get("lr_guard_target") == target else 0.0
        if not kl > target:
            return replace(state, algorithm={**known, "lr_lowered": 0.0, "lr_guard_target": target}), Directive()
        if lowered and kl < known["lr_guard_kl"]:
            return state, Directive()
        what = f"KL {kl:.3g} over {target:g} nats a token"
        if lowered >= self.lr_guard_patience:
            return state, Directive(
                action="stop", reason=f"{what}, and the learning rate was lowered {lowered:g} times without help"
            )
        news = {"lr_lowered": lowered + 1, "lr_guard_target": target, "lr_guard_kl": kl}
        state = replace(state, algorithm={**known, **news})
        return state, Directive(learning_rate_factor={"policy": self.lr_guard_factor})

    def kl_formula(self) -> tuple[str, ...]:
        """`kl`, as assignments over logprobs and reference_logprobs; nothing where the loss has no KL."""
        if self.kl_placement != "loss" or not self.kl_coef:
            return ()
        kind = {"k1": "d", "k2": "0.5 * d**2", "k3": "exp(-maximum(d, -20)) - 1 + maximum(d, -20)"}[self.kl_estimator]
        lines: tuple[str, ...] = ("d = logprobs - reference_logprobs", f"kl = {kind}")
        if self.kl_threshold is not None:
            lines += (f"kl = where(row_mean(kl) > {self.kl_threshold}, kl - {self.kl_threshold}, 0)",)
        return lines

    def kl_weight(self) -> str:
        """The coefficient as the formula shows it: a number, or its name where a controller moves it."""
        return "kl_coef" if self.kl_controller in ("adaptive", "phased") else repr(self.kl_coef)


@span("scoring")
@torch.no_grad()
def swept(source: Source, batch: Batch, like: Tensor, function: Callable[[Batch], Tensor]) -> Tensor:
    """Applies a function of a microbatch to the whole batch without gradient; (M, t) or (M,) -> (B, T) or (B,).

    Args:
        like: (B, T), or (B,): gives shape, type and device of the result.
    """
    result = torch.zeros_like(like)
    for rows, piece in source.numbered_microbatches(batch):
        found = function(piece).to(result.dtype)
        if found.dim() == 1:
            result[rows] = found
        else:
            result[rows, : found.shape[1]] = found
    return result


@span("reference")
def with_reference(models: Models, source: Source, batch: Batch, temperature: float) -> Batch:
    """The batch with the reference's logprobs at the temperature the completions were sampled at."""
    assert batch.old_logprobs is not None
    reference = swept(
        source, batch, batch.old_logprobs, lambda b: score(models["reference"], b, temperature=temperature).logprobs
    )
    return replace(batch, reference_logprobs=reference)
