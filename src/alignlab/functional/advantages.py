"""How much better than expected: rewards (and values) -> advantages over the group, the siblings or a critic."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from alignlab.functional.masked import keep


class _Groups(NamedTuple):
    """Rewards (P, G) of P prompts; a NaN is a completion without a reward and takes no part."""

    centred: Tensor  # (P, G) reward minus the group's mean; exactly 0 where all agree or there is no reward
    present: Tensor  # (P, 1) how many of the group have a reward


def _grouped(rewards: Tensor, group_size: int, caller: str) -> _Groups:
    if group_size < 2:
        raise ValueError(f"{caller}: group_size must be >= 2: one completion has no siblings; got {group_size}")
    if rewards.dim() != 1 or len(rewards) % group_size:
        raise ValueError(
            f"{caller}: rewards must be flat (N,), N a multiple of group_size {group_size}; got {tuple(rewards.shape)}"
        )
    groups = rewards.to(torch.promote_types(rewards.dtype, torch.float32)).view(-1, group_size)
    if groups.isinf().any():
        raise ValueError(f"{caller}: a reward is infinite and would make its whole group NaN; clip it, or give NaN")
    valid = ~groups.isnan()
    present = valid.sum(1, keepdim=True)
    centred = groups - keep(groups, valid).sum(1, keepdim=True) / present.clamp(min=1)
    highest = groups.masked_fill(~valid, -torch.inf).amax(1, keepdim=True)
    lowest = groups.masked_fill(~valid, torch.inf).amin(1, keepdim=True)
    # Told by comparison: rounding leaves six rewards of .3 a spread of 3e-8, which a division by it turns into 1.
    alike = highest <= lowest
    return _Groups(keep(centred, valid & ~alike), present)


def group_advantages(
    rewards: Tensor,
    group_size: int,
    scale: Literal["group", "batch", "none"] = "group",
    eps: float = 1e-4,
    baseline: Literal["group", "leave_one_out"] = "group",
) -> Tensor:
    """(reward - mean of its group) / (std + eps): GRPO's advantage, arXiv:2402.03300 eq. 4.

    Args:
        rewards: (N,) in group order, N = prompts * group_size. NaN stands for "no reward": it is left out of every
            mean and std, and its advantage is 0.
        group_size: completions of one prompt, >= 2.
        scale: what divides. `group`: the group's std; `batch`: the std of all rewards as they are, differences between
            prompts included (as TRL has it; arXiv:2508.08221 argues for it); `none`: nothing (Dr. GRPO,
            arXiv:2503.20783). A std is that of a sample (n - 1).
        eps: added to the std.
        baseline: what is subtracted: the mean of the whole group, or of a completion's siblings (`leave_one_out`,
            arXiv:2402.14740), which is G / (G - 1) times the same.

    Returns:
        (N,). A group of equal rewards gives exactly 0: it says nothing about which completion is better.

    Raises:
        ValueError: an unknown scale or baseline, a group_size that does not fit, an infinite reward.
    """
    groups = _grouped(rewards, group_size, "group_advantages")
    if baseline not in ("group", "leave_one_out"):
        raise ValueError(f"group_advantages: unknown baseline {baseline!r}; choose group or leave_one_out")
    others = (groups.present - 1).clamp(min=1)
    above = groups.centred * groups.present / others if baseline == "leave_one_out" else groups.centred
    match scale:
        case "group":
            variance = groups.centred.square().sum(1, keepdim=True) / others
            return (above / (variance.sqrt() + eps)).flatten()
        case "batch":
            return (above / (_spread(rewards.to(above.dtype)) + eps)).flatten()
        case "none":
            return above.flatten()
        case _:
            raise ValueError(f"group_advantages: unknown scale {scale!r}; choose group, batch or none")


def leave_one_out(rewards: Tensor, group_size: int) -> Tensor:
    """The reward minus the mean reward of its siblings: RLOO's advantage, arXiv:2402.14740.

    Args:
        rewards: (N,) in group order; NaN stands for "no reward", is nobody's sibling, and has advantage 0.
        group_size: completions of one prompt, >= 2.

    Returns:
        (N,), G / (G - 1) times the group-centred rewards; exactly 0 where all siblings agree or there are none.

    Raises:
        ValueError: a group_size that does not fit, an infinite reward.
    """
    return group_advantages(rewards, group_size, scale="none", baseline="leave_one_out")


def running_advantages(
    rewards: Tensor, running_mean: float, scale: Literal["batch", "none"] = "none", eps: float = 1e-4
) -> Tensor:
    """The reward minus a mean of earlier rewards: REINFORCE with a running baseline (Williams 1992).

    Args:
        rewards: (N,); NaN stands for "no reward" and has advantage 0.
        running_mean: of rewards before these, on which they must not depend, or the gradient is biased.
        scale: what divides: the std of these rewards (n - 1), or nothing. A group's std is not offered: it is 0 where
            siblings agree, while their distance from the baseline is not.

    Returns:
        (N,). Unlike with siblings as baseline, a group of equal rewards does count here.

    Raises:
        ValueError: an unknown scale, an infinite reward.
    """
    if rewards.isinf().any():
        raise ValueError("running_advantages: a reward is infinite; clip it, or give NaN")
    if scale not in ("batch", "none"):
        raise ValueError(f"running_advantages: unknown scale {scale!r}; choose batch or none")
    above = (rewards - running_mean).nan_to_num(nan=0.0)
    return above / (_spread(rewards) + eps) if scale == "batch" else above


def component_advantages(components: Tensor, weights: Tensor, group_size: int, eps: float = 1e-4) -> Tensor:
    """Each reward component normalised within its groups, then summed, then normalised over the batch: GDPO,
    arXiv:2601.05242.

    Summed first, components of unlike scales drown each other, and different mixtures of them become equal advantages.

    Args:
        components: (C, N), each row one component in group order; NaN where it does not apply.
        weights: (C,).
        group_size: completions of one prompt, >= 2.
        eps: added to every std.

    Returns:
        (N,), mean 0 and std 1 over the completions that any component judged; 0 for the others, and everywhere where
        all groups agree in all components.

    Raises:
        ValueError: shapes that do not fit, an infinite reward.
    """
    if components.dim() != 2 or weights.shape != components.shape[:1]:
        raise ValueError(
            f"component_advantages: components must be (C, N) and weights (C,); got {tuple(components.shape)} and "
            f"{tuple(weights.shape)}"
        )
    each = torch.stack([group_advantages(component, group_size, eps=eps) for component in components])
    total = (weights[:, None] * each).sum(0)
    judged = ~components.isnan().all(0)
    spread = _spread(total[judged])
    if not spread > 0:
        return torch.zeros_like(total)
    return keep((total - total[judged].mean()) / (spread + eps), judged)


def _spread(rewards: Tensor) -> Tensor:
    """The std (n - 1) of those that are not NaN; 0 for a single one."""
    given = rewards[~rewards.isnan()]
    return given.std() if len(given) > 1 else rewards.new_zeros(())


def gae(
    token_rewards: Tensor,
    values: Tensor,
    mask: Tensor,
    *,
    gamma: float,
    gae_lambda: float,
    bootstrap_values: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation over tokens, arXiv:1506.02438, backwards along each row:

        delta_t = reward_t + gamma * V_next - V_t;  A_t = delta_t + gamma * gae_lambda * A_next;  return_t = A_t + V_t

    where "next" is the next token under the mask: masks may start anywhere, and a hole is stepped over as if it were
    not there (no discount for it either).

    Args:
        token_rewards: (B, T).
        values: (B, T), V of the state in which token t was chosen.
        mask: (B, T), True on the tokens of the completion.
        gamma: discount of one token, in [0, 1].
        gae_lambda: 0 is the one-step error, 1 the whole return minus V.
        bootstrap_values: (B,), V of the state after the last token for rows that were cut off, 0 for rows that
            stopped; None for 0 everywhere.

    Returns:
        (advantages, returns), both (B, T) and 0 where the mask is False; not whitened.

    Raises:
        ValueError: shapes that differ.
    """
    if mask.dim() != 2 or not token_rewards.shape == values.shape == mask.shape:
        raise ValueError(
            f"gae: token_rewards, values and mask must share one shape (B, T); got {tuple(token_rewards.shape)}, "
            f"{tuple(values.shape)} and {tuple(mask.shape)}"
        )
    rewards, values, mask = keep(token_rewards, mask), keep(values, mask), mask.bool()
    zero = values.new_zeros(len(values))
    if bootstrap_values is not None and bootstrap_values.shape != zero.shape:
        raise ValueError(f"gae: bootstrap_values must be (B,) = ({len(values)},); got {tuple(bootstrap_values.shape)}")
    next_value = zero if bootstrap_values is None else bootstrap_values
    next_advantage = zero
    columns: list[Tensor] = []
    for reward, value, here in reversed(list(zip(rewards.unbind(1), values.unbind(1), mask.unbind(1), strict=True))):
        advantage = reward + gamma * next_value - value + gamma * gae_lambda * next_advantage
        columns.append(torch.where(here, advantage, 0))
        next_value = torch.where(here, value, next_value)
        next_advantage = torch.where(here, advantage, next_advantage)
    advantages = torch.stack(columns[::-1], 1) if columns else torch.zeros_like(values)
    return advantages, advantages + values


def potential_shaping(potentials: Tensor, mask: Tensor, gamma: float, final_potentials: Tensor | None = None) -> Tensor:
    """gamma * Phi(next state) - Phi(state) for each token: shaping that keeps the optimum (Ng et al. 1999).

    Args:
        potentials: (B, T), Phi of the state in which token t was chosen, e.g. a reward model's score of the prefix.
        mask: (B, T); "next" is the next token under it, as in `gae`.
        gamma: discount of one token; the same as in the returns, or the optimum moves.
        final_potentials: (B,), Phi of the state after the last token, which is 0 at a true end: other than 0 only where
            the return goes on with a value of that state. None for 0 everywhere.

    Returns:
        (B, T), 0 outside the mask. With gamma 1 a row sums to -Phi of its first state, whatever the tokens are.
    """
    nothing = torch.zeros_like(potentials)
    return gae(nothing, potentials, mask, gamma=gamma, gae_lambda=0.0, bootstrap_values=final_potentials)[0]
