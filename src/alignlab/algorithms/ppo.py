"""PPO for language models (arXiv:1707.06347, details arXiv:2403.17031): rollouts -> token rewards -> GAE -> steps.

1. score the completions: normalise, scale, take off what a missing stop token costs, clip, as far as asked for
2. token rewards: the score on the last action (sparse) or spread over the actions (dense), minus
   kl_coef KL(pi_old || reference) of each where the KL is in the reward
3. advantages and returns by GAE (arXiv:1506.02438), V_T = 0 at a stop; then whiten the advantages
4. epochs x minibatches of: max(-A rho, -A clip(rho)) + value_coef 1/2 max((V - R)^2, (clip(V) - R)^2) - entropy_coef H,
   plus kl_coef KL(pi || reference) where the KL is in the loss
The sign makes actions with positive advantage likelier. The critic reads the state before each action.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn import functional as F

from alignlab.algorithms import Models, beyond_rounding, completion_tokens, gap, masked_sum, numbers_dtype
from alignlab.algorithms._online import KLControl, ScoreShaping, swept, with_reference
from alignlab.errors import UserError
from alignlab.forward import final_values, prefix_rewards, rewards, score, score_and_values, values
from alignlab.functional.advantages import gae, potential_shaping
from alignlab.functional.masked import aggregate, masked_whiten
from alignlab.functional.surrogate import clipped, clipped_surrogate, clipped_value_loss
from alignlab.rollout import Source, rollout_metrics, stopped_tensor
from alignlab.timing import span
from alignlab.types import Batch, Directive, Group, LoopState, LossOutput, Phase, Role, Step


class PPO(ScoreShaping, KLControl):
    """Actor-critic policy gradient with a learned baseline and the KL to the reference in the reward."""

    metrics_file: ClassVar[str | None] = "ppo_metrics.jsonl"
    dropout: ClassVar[bool] = False
    data_kind: ClassVar[str] = "prompts"

    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper": {"learning_rate": 3e-6, "value_learning_rate": 3e-6, "kl_coef": 0.05, "value_coef": 0.1, "epochs": 4,
                  "temperature": 0.7},
        "trl": {"learning_rate": 3e-6, "value_learning_rate": 3e-6, "kl_coef": 0.05, "value_coef": 0.1, "epochs": 4,
                "temperature": 0.7},
        "verl": {"learning_rate": 1e-6, "value_learning_rate": 1e-5, "value_clip": 0.5, "value_coef": 1.0,
                 "gae_lambda": 1.0, "epochs": 1, "minibatches": 4, "kl_coef": 0.001, "kl_placement": "none",
                 "dual_clip": 3.0},
        "openrlhf": {"learning_rate": 1e-6, "value_learning_rate": 9e-6, "value_clip": 0.5, "value_coef": 1.0,
                     "gae_lambda": 1.0, "epochs": 1, "minibatches": 8, "kl_coef": 0.01, "score_clip": 10.0},
    }  # fmt: skip
    """PPO for language models in arXiv:2403.17031 (1707.06347 has simulated robots); trl's experimental PPOTrainer, in
    1.10, gone in 1.16, by the same author; verl's ppo_trainer.yaml; OpenRLHF's train_ppo_ray."""
    DEPARTURES: ClassVar[tuple[str, ...]] = (
        "The score stands on the last action, the stop token, as in OpenRLHF; trl puts it one token later where there "
        "is room, on padding.",
        "Old logprobs are those recorded while sampling, by the same code; peers compute them anew with the trainer.",
        "Advantages are whitened over the whole phase, before it is split into minibatches; the variance has n - 1, as "
        "in trl and verl, not n, as in OpenRLHF.",
        "The critic's head starts at 0 and its trunk is the policy's or the reward model's; arXiv:2403.17031 and "
        "OpenRLHF start it from the whole reward model, head included.",
        "A missing stop token costs missing_stop_penalty, as in trl; arXiv:2403.17031 sets such a score to -1.",
        "verl switches its KL off unless told otherwise, and so does the preset; kl_placement reward brings it back.",
    )

    name: Literal["ppo"] = "ppo"
    learning_rate: float = Field(3e-6, gt=0)
    """Peak learning rate of the policy (trl: 3e-6)."""
    value_learning_rate: float = Field(1e-5, gt=0)
    """Peak learning rate of the critic (OpenRLHF: 9e-6)."""
    max_grad_norm: float = Field(1.0, gt=0)
    """Gradient norm above which a role's gradients are scaled down."""
    critic: Literal["own", "shared", "reward_model"] = "own"
    """The critic's trunk: a copy of the starting policy's; the policy's own, which value gradients then reach; or a
    LoRA adapter on the reward model's."""
    value_warmup_steps: int = Field(0, ge=0)
    """Optimiser steps at the start in which only the critic learns."""
    prompts_per_phase: int = Field(64, ge=1)
    """Prompts sampled a phase."""
    group_size: int = Field(1, ge=1)
    """Completions a prompt."""
    temperature: float = Field(1.0, gt=0)
    """Sampling temperature; every logprob of the method is at this temperature."""
    epochs: int = Field(4, ge=1)
    """Passes over a phase's rollouts (trl: 4)."""
    minibatches: int = Field(1, ge=1)
    """Optimiser steps a pass. One epoch of one minibatch is REINFORCE with a critic: its ratio is 1 everywhere, and
    nothing is ever clipped."""
    clip_low: float = Field(0.2, gt=0, lt=1)
    clip_high: float = Field(0.2, gt=0)
    """Ratio range 1 - clip_low .. 1 + clip_high (epsilon)."""
    dual_clip: float | None = Field(None, gt=1)
    """Ratio above which an action with negative advantage is held too (c of arXiv:1912.09729; verl: 3); null = not."""
    value_clip: float | None = Field(0.2, gt=0)
    """How far a value may move from the one at sampling before its gradient stops; null = anywhere."""
    value_coef: float = Field(0.1, ge=0)
    """Weight of the value loss (trl .1; the documents .5). With an own trunk it only scales the critic's gradient."""
    entropy_coef: float = Field(0.0, ge=0)
    """Weight of the true entropy bonus (the documents: .01)."""
    gamma: float = Field(1.0, gt=0, le=1)
    """Discount a token."""
    gae_lambda: float = Field(0.95, ge=0, le=1)
    """GAE's trade of bias against variance (lambda)."""
    reward_placement: Literal["sparse", "dense"] = "sparse"
    """The score on the last action, the stop token, or spread over the actions."""
    dense_reward: Literal["share", "potential", "given"] = "share"
    """How `dense` spreads it. `share`: score / tokens on each. Shares sum to the score, so at gamma 1 the optimum
    stays, but return-to-go under-weights late tokens (a biased gradient). `potential`: the score on the last action
    plus gamma Phi(next state) - Phi(state), Phi the reward model's score of the prefix, which keeps the optimum (Ng et
    al. 1999). `given`: the token scores of reward functions that give some, the rest of the score on the last action;
    what is optimal is what these scores sum to."""
    shaping_coef: float = Field(1.0, gt=0)
    """Weight of the potential."""
    at_cutoff: Literal["zero", "bootstrap"] = "zero"
    """What follows a cut-off completion: nothing (all peers), or the critic's value of where it was cut."""
    whiten_rewards: bool = False
    """Divide token rewards by their standard deviation over the phase; their mean stays."""
    whiten_advantages: bool = True
    """Advantages to mean 0 and standard deviation 1 over the phase."""
    stop_epochs_above_kl: float | None = Field(None, gt=0)
    """Mean approximate KL to the sampling policy (nats a token) at which the phase ends early; null = never."""

    @model_validator(mode="after")
    def _consistent(self) -> PPO:
        if self.dual_clip is not None and self.dual_clip <= 1 + self.clip_high:
            raise ValueError(f"dual_clip must be above 1 + clip_high = {1 + self.clip_high:g}")
        if (self.reward_placement, self.dense_reward, self.score_normaliser) == ("dense", "given", "ema"):
            raise ValueError("score_normaliser ema moves scores away from what their tokens sum to; leave it out")
        if self.reward_placement == "sparse" and self.dense_reward != "share":
            raise ValueError(f"dense_reward {self.dense_reward} does nothing while reward_placement is sparse")
        return self

    @property
    def uses_potential(self) -> bool:
        return self.reward_placement == "dense" and self.dense_reward == "potential"

    def models(self) -> Mapping[str, Role]:
        roles = {
            "policy": Role(
                learning_rate=self.learning_rate, max_grad_norm=self.max_grad_norm, start_step=self.value_warmup_steps
            ),
            "value_model": Role(
                learning_rate=self.value_learning_rate, max_grad_norm=self.max_grad_norm, backbone=self.critic
            ),
        }
        if self.measures_kl:
            roles["reference"] = Role()
        if self.uses_potential or self.critic == "reward_model":
            roles["reward_model"] = Role()
        return roles

    def collect(self, models: Models, source: Source, state: LoopState) -> tuple[Phase, LoopState]:
        state = self.controlled(state)
        groups = source.rollouts(models["policy"], self.prompts_per_phase, self.group_size, state)
        metrics, drawn = rollout_metrics(groups, source.rewards), groups
        groups = judged(groups)
        batch = source.batch(groups, numbers_dtype(models["policy"]))
        assert batch.old_logprobs is not None
        like, mask = batch.old_logprobs, batch.completion_mask
        if self.measures_kl:
            batch = with_reference(models, source, batch, self.temperature)
            found, state = self.measured(batch, state)
            metrics |= found
        fresh = self._first_values(models, source, batch)
        old_values = (
            swept(source, batch, like, lambda b: values(models["value_model"], b)) if fresh is None else fresh.detach()
        )
        at_cutoff = self._at_cutoff(source, batch, groups, lambda b: final_values(models["value_model"], b))
        scores, state = self.scores(groups, like, state, source.sampling.max_completion_tokens)
        token_rewards, penalty = self._placed(scores, groups, mask, state), torch.zeros_like(like)
        if self.uses_potential:
            potentials = swept(source, batch, like, lambda b: prefix_rewards(models["reward_model"], b))
            final = self._at_cutoff(source, batch, groups, lambda b: rewards(models["reward_model"], b))
            token_rewards = token_rewards + self.shaping_coef * potential_shaping(potentials, mask, self.gamma, final)
        if self.penalises and self.kl_placement == "reward":
            assert batch.reference_logprobs is not None
            penalty = state.algorithm["kl_coef"] * self.token_kl(like, batch.reference_logprobs, mask)
        token_rewards = token_rewards - penalty
        advantages, returns = gae(
            masked_whiten(token_rewards, mask, shift_mean=False) if self.whiten_rewards else token_rewards,
            old_values, mask, gamma=self.gamma, gae_lambda=self.gae_lambda, bootstrap_values=at_cutoff,
        )  # fmt: skip
        metrics |= {
            "reward/minus_kl": (scores - penalty.sum(-1)).mean().item(),
            "value/explained_variance": explained_variance(old_values, returns, mask),
        }
        if self.whiten_advantages:
            advantages = masked_whiten(advantages, mask)
        batch = replace(batch, advantages=advantages, returns=returns, old_values=old_values, values=fresh)
        return Phase(self._steps(source, batch, state), metrics, drawn), state

    def _first_values(self, models: Models, source: Source, batch: Batch) -> Tensor | None:
        """(B, T) values with their graph, where the first optimiser step takes all rows in one microbatch and so would
        compute the very same ones; else None."""
        pieces = list(source.numbered_microbatches(batch))
        critic = models["value_model"]
        if self.minibatches > 1 or len(pieces) != 1 or critic.backbone is models["policy"]:
            return None
        assert batch.old_logprobs is not None
        ((rows, piece),) = pieces
        with span("scoring"), torch.enable_grad():
            found = values(critic, piece).to(batch.old_logprobs.dtype)
            filled = F.pad(found, (0, batch.old_logprobs.shape[1] - found.shape[1]))
            return torch.zeros_like(filled).index_copy(0, rows, filled)

    def _at_cutoff(
        self, source: Source, batch: Batch, groups: Sequence[Group], function: Callable[[Batch], Tensor]
    ) -> Tensor | None:
        """(B,) a function of the state in which a completion was cut off, 0 where it stopped; None for 0 everywhere."""
        if self.at_cutoff == "zero":
            return None
        assert batch.old_logprobs is not None
        found = swept(source, batch, batch.old_logprobs[:, 0], function)
        return torch.where(stopped_tensor(groups, found), 0.0, found)

    def _placed(self, scores: Tensor, groups: Sequence[Group], mask: Tensor, state: LoopState) -> Tensor:
        """(B,) scores -> (B, T): on the last action, in equal shares, or as token scores with the rest on the last.

        Raises:
            UserError: token scores are asked for, and in the first phase no reward function gives any.
        """
        if self.reward_placement == "dense" and self.dense_reward == "share":
            return torch.where(mask, (scores / mask.sum(-1))[:, None], 0.0)
        given = torch.zeros(mask.shape, dtype=scores.dtype, device=scores.device)
        if self.reward_placement == "dense" and self.dense_reward == "given":
            rollouts = [r for g in groups for r in g.rollouts]
            if state.phase == 0 and all(r.token_scores is None for r in rollouts):
                raise UserError(
                    "algorithm.dense_reward given: no reward function gives one score a token; name one that does "
                    "under reward, or choose share or potential"
                )
            flat = [x for r in rollouts for x in r.token_scores or (0.0,) * len(r.completion.token_ids)]
            given = given.masked_scatter(mask, self.reward_scale * given.new_tensor(flat))
        columns = torch.arange(mask.shape[1], device=mask.device)
        last_action = (mask * columns).argmax(-1)
        return given.scatter_add(1, last_action[:, None], (scores - given.sum(-1))[:, None])

    def _steps(self, source: Source, batch: Batch, state: LoopState) -> tuple[Step, ...]:
        """Every epoch splits the rows anew, into minibatches whose sizes differ by one row at most."""
        steps = []
        for epoch in range(self.epochs):
            batch = batch if epoch == 0 else replace(batch, values=None)
            order = torch.tensor(shuffled(len(batch), f"ppo/{state.seed}/{state.phase}/{epoch}"))
            for rows in order.to(batch.input_ids.device).tensor_split(min(self.minibatches, len(batch))):
                pieces = source.microbatches(batch.select(rows))
                steps.append(Step(pieces, completion_tokens(pieces)))
        return tuple(steps)

    def loss(self, models: Models, batch: Batch, state: LoopState) -> LossOutput:
        assert batch.old_logprobs is not None and batch.advantages is not None
        assert batch.old_values is not None and batch.returns is not None
        mask, clips = batch.completion_mask, (self.clip_low, self.clip_high, self.dual_clip)
        if batch.values is None:
            scores, value = score_and_values(
                models["policy"], models["value_model"], batch, temperature=self.temperature, entropy=True
            )
        else:
            scores, value = score(models["policy"], batch, temperature=self.temperature, entropy=True), batch.values
        assert scores.entropy is not None
        log_ratio = torch.where(mask, scores.logprobs - batch.old_logprobs, 0.0)
        policy_terms = clipped_surrogate(log_ratio, batch.advantages, *clips)
        value_terms = clipped_value_loss(value, batch.old_values, batch.returns, self.value_clip)
        terms = policy_terms + self.value_coef * value_terms
        if self.entropy_coef:  # an entropy that is differentiated costs a second pass over the vocabulary
            terms = terms - self.entropy_coef * scores.entropy
        is_clipped = clipped(log_ratio, batch.advantages, *clips)
        beyond = clipped(beyond_rounding(log_ratio, models["policy"]), batch.advantages, *clips)
        sums = {
            "loss/policy": masked_sum(policy_terms, batch),
            "loss/value": masked_sum(value_terms, batch),
            "policy/entropy": masked_sum(scores.entropy, batch),
            "policy/approx_kl": masked_sum(0.5 * log_ratio**2, batch),
            "policy/clip_fraction": masked_sum(is_clipped.float(), batch),
            "policy/ratio": masked_sum(log_ratio.exp(), batch),
            "value/mean": masked_sum(value, batch),
        }
        if self.value_clip is not None:
            moved = (value - batch.old_values).abs() > self.value_clip
            sums["value/clip_fraction"] = masked_sum(moved.float(), batch)
        identities = {
            "the log ratio of policy to sampling policy": gap(scores.logprobs, batch.old_logprobs, batch),
            "the clip fraction": gap(beyond.float(), torch.zeros_like(log_ratio), batch),
            "the relative change of the values": gap(value, batch.old_values, batch)
            / (1 + gap(batch.old_values, torch.zeros_like(value), batch)),
        }
        if batch.reference_logprobs is not None:
            if self.penalises and self.kl_placement == "loss":
                kl = self.token_kl(scores.logprobs, batch.reference_logprobs, mask)
                sums["loss/kl"] = masked_sum(kl, batch)
                terms = terms + state.algorithm["kl_coef"] * kl
            if state.step == 0:
                identities["KL to the reference"] = gap(scores.logprobs, batch.reference_logprobs, batch)
        return LossOutput(aggregate(terms, mask), sums, identities)

    def observe(self, state: LoopState, metrics: Mapping[str, float]) -> tuple[LoopState, Directive]:
        state, directive = self.guarded(state, metrics)
        limit = self.stop_epochs_above_kl
        if directive.action == "continue" and limit is not None and metrics["policy/approx_kl"] > limit:
            reason = f"the approximate KL is over {limit} nats a token"
            return state, replace(directive, action="end_phase", reason=reason)
        return state, directive

    def formula(self) -> tuple[str, ...]:
        plain = "ratio" if self.dual_clip is None else f"minimum(ratio, {self.dual_clip!r})"
        lines: tuple[str, ...] = (
            "ratio = exp(clip(logprobs - old_logprobs, -20, 20))",
            f"policy = maximum(-advantages * {plain}, "
            f"-advantages * clip(ratio, {1 - self.clip_low!r}, {1 + self.clip_high!r}))",
        )
        if self.value_clip is None:
            lines += ("value = 0.5 * (values - returns)**2",)
        else:
            lines += (
                f"held = clip(values, old_values - {self.value_clip!r}, old_values + {self.value_clip!r})",
                "value = 0.5 * maximum((values - returns)**2, (held - returns)**2)",
            )
        lines += (f"term = policy + {self.value_coef!r} * value",)
        if self.entropy_coef:
            lines += (f"term = term - {self.entropy_coef!r} * entropy",)
        if kl := self.kl_formula():
            lines += (*kl, f"term = term + {self.kl_weight()} * kl")
        return *lines, "loss = sum(mask * term) / completion_tokens"


def judged(groups: Sequence[Group]) -> tuple[Group, ...]:
    """The groups without completions that no reward function judged, as there is nothing to learn from these."""
    kept = (tuple(r for r in group.rollouts if not math.isnan(r.reward)) for group in groups)
    return tuple(Group(rollouts=rollouts) for rollouts in kept if rollouts)


def shuffled(count: int, key: str) -> list[int]:
    """A permutation of 0 .. count - 1 that is a function of the key, the same on every machine."""
    return sorted(range(count), key=lambda i: hashlib.sha256(f"{key}/{i}".encode()).digest())


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> float:
    """1 - Var(returns - values) / Var(returns) over masked entries: 1 = perfect critic, 0 = no better than a constant.

    NaN where the returns do not vary.
    """
    value, target = values[mask], returns[mask]
    variance = target.var(unbiased=False)
    return float("nan") if variance <= 0 else (1 - (target - value).var(unbiased=False) / variance).item()


ALGORITHM = PPO
