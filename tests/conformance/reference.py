"""PPO as the papers have it, in NumPy and nothing else: one completion at a time, in loops, without a mask.

Written from arXiv:1506.02438 (GAE), arXiv:1707.06347 (PPO), arXiv:1912.09729 (dual clip), arXiv:1909.08593 (KL in the
reward, its controller), Ng et al. 1999 (shaping) and joschu.net/blog/kl-approx (estimators), without a look at `src`.
Arrays are (T,) for the T actions of one completion; a batch is a list of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np

Rows = Sequence[np.ndarray]


def advantage_over_k_steps(
    rewards: np.ndarray, values: np.ndarray, t: int, k: int, gamma: float, value_after: float
) -> float:
    """1506.02438 eq. 11-14: r_t + gamma r_{t+1} + ... + gamma^k V(s_{t+k}) - V(s_t); `value_after` is V(s_T)."""
    end = min(t + k, len(rewards))
    total = sum(gamma ** (i - t) * rewards[i] for i in range(t, end))
    return float(total + gamma ** (end - t) * (values[end] if end < len(values) else value_after) - values[t])


def gae(
    rewards: np.ndarray, values: np.ndarray, gamma: float, lam: float, value_after: float = 0.0
) -> tuple[np.ndarray, np.ndarray]:
    """1506.02438 eq. 16 in its first form: the (1 - lambda) lambda^(k-1) weighted mean of the k-step advantages.

    After the last action nothing is left to learn of, so that all k beyond it are the k that reaches it, with the
    weight that remains, lambda^(T-t-1). Advantages and returns = advantages + values.
    """
    advantages = []
    for t in range(len(rewards)):
        steps = len(rewards) - t
        weights = [(1 - lam) * lam ** (k - 1) for k in range(1, steps)] + [lam ** (steps - 1)]
        assert abs(sum(weights) - 1) < 1e-12
        over_k = [advantage_over_k_steps(rewards, values, t, k, gamma, value_after) for k in range(1, steps + 1)]
        advantages.append(sum(w * a for w, a in zip(weights, over_k, strict=True)))
    found = np.array(advantages)
    return found, found + values


def whitened(rows: Rows, *, keep_mean: bool) -> list[np.ndarray]:
    """All actions of the batch together: minus their mean, over their sample standard deviation; the mean back on."""
    every = np.concatenate(rows)
    mean = every.sum() / len(every)
    variance = ((every - mean) ** 2).sum() / (len(every) - 1)
    return [(row - mean) / np.sqrt(variance + 1e-8) + (mean if keep_mean else 0.0) for row in rows]


def kl(log_policy: np.ndarray, log_reference: np.ndarray, kind: Literal["k1", "k2", "k3"]) -> np.ndarray:
    """joschu.net/blog/kl-approx with r = reference / policy: -log r, (log r)^2 / 2, r - 1 - log r."""
    log_r = log_reference - log_policy
    return {"k1": -log_r, "k2": log_r**2 / 2, "k3": np.exp(log_r) - 1 - log_r}[kind]


def score_on_last_action(score: float, actions: int) -> np.ndarray:
    """1909.08593: the reward is for the whole text, so it comes with its last token."""
    return np.array([0.0] * (actions - 1) + [score])


def score_in_shares(score: float, actions: int) -> np.ndarray:
    return np.array([score / actions] * actions)


def shaping(potentials: np.ndarray, gamma: float) -> np.ndarray:
    """Ng et al. 1999: F(s, s') = gamma Phi(s') - Phi(s), and Phi = 0 where the episode has ended."""
    after = [*potentials[1:], 0.0]
    return np.array([gamma * b - a for a, b in zip(potentials, after, strict=True)])


def adapted(coefficient: float, kl_measured: float, target: float, completions: int, horizon: float) -> float:
    """1909.08593 section 2.2: e = clip((KL - target) / target, -.2, .2), beta <- beta (1 + K e), K = n / horizon."""
    error = (kl_measured - target) / target
    error = -0.2 if error < -0.2 else 0.2 if error > 0.2 else error
    return coefficient * (1 + completions / horizon * error)


def policy_objective(ratio: float, advantage: float, low: float, high: float, dual_clip: float | None) -> float:
    """1707.06347 eq. 7 for one action, and 1912.09729 eq. 5 where c is given: for A < 0 not below c A. To maximise."""
    inside = 1 - low if ratio < 1 - low else 1 + high if ratio > 1 + high else ratio
    objective = min(ratio * advantage, inside * advantage)
    return max(objective, dual_clip * advantage) if dual_clip is not None and advantage < 0 else objective


def value_loss(value: float, old_value: float, target: float, clip: float | None) -> float:
    """Half the squared error; with a clip the worse of it and that of the value held within `clip` of the old one."""
    error = (value - target) ** 2
    if clip is not None:
        held = old_value + min(max(value - old_value, -clip), clip)
        error = max(error, (held - target) ** 2)
    return 0.5 * error


def entropy(logits: np.ndarray) -> float:
    """-sum p log p of one distribution, (V,) logits."""
    p = np.exp(logits - logits.max())
    p /= p.sum()
    return float(-sum(x * np.log(x) for x in p if x > 0))


def mean_over_actions(term: Callable[..., float], *rows: Rows) -> float:
    """The mean of a term over all actions of all completions."""
    terms = [term(*at_t) for columns in zip(*rows, strict=True) for at_t in zip(*columns, strict=True)]
    return float(np.mean(terms))
