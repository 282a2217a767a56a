"""Advantages by hand: groups with round means, and three tokens of GAE."""

import math
from types import ModuleType
from typing import Any, Literal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from alignlab.functional import advantages as module
from tests.statistics.mutants import mutated
from tests.tolerances import EXACT, FLOAT32, FLOAT64

NAN = math.nan
REWARDS = (1.0, 2.0, 3.0, 10.0, 10.0, 16.0)  # two groups of three, with means 2 and 12


@pytest.fixture
def advantages() -> ModuleType:
    return module


def doubles(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_group_scale(advantages: ModuleType) -> None:
    """Centred (-1, 0, 1) with variance 2 / 2 = 1, and (-2, -2, 4) with variance 24 / 2 = 12; eps is .5 here."""
    root = math.sqrt(12) + 0.5
    expected = doubles([-1 / 1.5, 0, 1 / 1.5, -2 / root, -2 / root, 4 / root])
    assert_close(advantages.group_advantages(doubles(REWARDS), 3, eps=0.5), expected, **FLOAT64)
    assert_close(advantages.group_advantages(doubles(REWARDS), 3, "group", 0.5), expected, **FLOAT64)


def test_batch_scale(advantages: ModuleType) -> None:
    """All six as they are: mean 7, squares 36 + 25 + 16 + 9 + 9 + 81 = 176, variance 176 / 5."""
    root = math.sqrt(176 / 5) + 0.5
    expected = doubles([-1 / root, 0, 1 / root, -2 / root, -2 / root, 4 / root])
    assert_close(advantages.group_advantages(doubles(REWARDS), 3, "batch", eps=0.5), expected, **FLOAT64)


def test_no_scale(advantages: ModuleType) -> None:
    """The centred rewards, whatever eps."""
    expected = doubles([-1, 0, 1, -2, -2, 4])
    assert_close(advantages.group_advantages(doubles(REWARDS), 3, "none", eps=0.5), expected, **FLOAT64)


def test_the_usual_epsilon() -> None:
    """1 / (1 + 1e-4)."""
    assert_close(module.group_advantages(doubles([1, 2, 3]), 3)[2], doubles(1 / 1.0001), **FLOAT64)


def test_missing_rewards(advantages: ModuleType) -> None:
    """(1, -, 3): mean 2, variance 2 / 1, so -1 / (sqrt 2 + .5) and its opposite; (-, -, 5) and (-, -, -) say nothing.

    The batch's std is that of 1, 3, 5: mean 3, variance 8 / 2 = 4, so -1 / 2.5.
    """
    rewards = doubles([1, NAN, 3, NAN, NAN, 5, NAN, NAN, NAN])
    for scale, one in (("group", 1 / (math.sqrt(2) + 0.5)), ("batch", 1 / 2.5), ("none", 1.0)):
        expected = doubles([-one, 0, one, 0, 0, 0, 0, 0, 0])
        assert_close(advantages.group_advantages(rewards, 3, scale, eps=0.5), expected, **FLOAT64)
    assert_close(advantages.leave_one_out(rewards, 3), doubles([-2, 0, 2, 0, 0, 0, 0, 0, 0]), **FLOAT64)


def test_leave_one_out(advantages: ModuleType) -> None:
    """1 - (2 + 6) / 2 = -3;  2 - (1 + 6) / 2 = -1.5;  6 - (1 + 2) / 2 = 4.5."""
    assert_close(advantages.leave_one_out(doubles([1, 2, 6]), 3), doubles([-3, -1.5, 4.5]), **FLOAT64)


def test_leave_one_out_under_every_scale(advantages: ModuleType) -> None:
    """Three halves of the centred (-1, 0, 1, -2, -2, 4); the spreads are those of `test_group_scale` and
    `test_batch_scale`, for a baseline does not change how far rewards lie apart."""
    root, batch = math.sqrt(12) + 0.5, math.sqrt(176 / 5) + 0.5
    above = doubles([-1.5, 0, 1.5, -3, -3, 6])
    for scale, divisor in (
        ("none", doubles([1.0] * 6)),
        ("group", doubles([1.5] * 3 + [root] * 3)),
        ("batch", doubles([batch] * 6)),
    ):
        found = advantages.group_advantages(doubles(REWARDS), 3, scale, 0.5, "leave_one_out")
        assert_close(found, above / divisor, **FLOAT64)


def test_running_advantages(advantages: ModuleType) -> None:
    """(1, 2, 6) against 4: (-3, -2, 2); their mean is 3, squares 4 + 1 + 9 = 14, variance 7. NaN takes no part, and
    equal rewards do count: they are all 1.5 above 2.5."""
    rewards = doubles([1, NAN, 2, 6])
    assert_close(advantages.running_advantages(rewards, 4.0), doubles([-3, 0, -2, 2]), **FLOAT64)
    root = math.sqrt(7) + 0.5
    scaled = advantages.running_advantages(rewards, 4.0, "batch", eps=0.5)
    assert_close(scaled, doubles([-3 / root, 0, -2 / root, 2 / root]), **FLOAT64)
    assert_close(advantages.running_advantages(doubles([4, 4]), 2.5), doubles([1.5, 1.5]), **FLOAT64)
    assert_close(advantages.running_advantages(doubles([4]), 2.5, "batch", eps=0.5), doubles([3.0]), **FLOAT64)


COMPONENTS = [[1.0, 2.0, 3.0, 10.0, 10.0, 16.0], [0.0, 1.0, 0.0, 5.0, NAN, 7.0]]
"""The groups of `REWARDS`, and beside them (0, 1, 0) and (5, -, 7)."""


def test_component_advantages(advantages: ModuleType) -> None:
    """With eps .5, the first component is that of `test_group_scale`; the second has means 1/3 and 6, variances
    (1/9 + 4/9 + 1/9) / 2 = 1/3 and 2. Weighted by 2 and 3 and summed, then mean 0 and std 1 (+ .5) over all six."""
    first = np.array([-1 / 1.5, 0, 1 / 1.5, *(np.array([-2, -2, 4]) / (math.sqrt(12) + 0.5))])
    third, two = math.sqrt(1 / 3) + 0.5, math.sqrt(2) + 0.5
    second = np.array([-1 / 3 / third, 2 / 3 / third, -1 / 3 / third, -1 / two, 0, 1 / two])
    total = 2 * first + 3 * second
    expected = (total - total.mean()) / (total.std(ddof=1) + 0.5)
    found = advantages.component_advantages(doubles(COMPONENTS), doubles([2, 3]), 3, eps=0.5)
    assert_close(found, doubles(expected), **FLOAT64)


def test_components_of_unlike_scales_count_alike(advantages: ModuleType) -> None:
    """What GDPO is for: (0, 0, 1, 1) x 1000 beside (0, 1, 0, 1): summed first, the second is a thousandth of the first;
    normalised first, both have centred values -+.5 and std 1 / sqrt 3, so the sums are -1, 0, 0, 1 times sqrt(3) / (1 +
    eps sqrt 3), whose std is sqrt(2/3) of that: -sqrt(3/2), 0, 0, sqrt(3/2), but for eps."""
    found = advantages.component_advantages(doubles([[0, 0, 1000, 1000], [0, 1, 0, 1]]), doubles([1, 1]), 4, eps=1e-14)
    assert_close(found, doubles([-math.sqrt(1.5), 0, 0, math.sqrt(1.5)]), **FLOAT64)


def test_completions_that_no_component_judged(advantages: ModuleType) -> None:
    """They have advantage 0 and no part in the last normalisation: (0, 2) centred and scaled is (-1, 1) c, whose mean
    is 0 and whose std is c sqrt 2, so -+1 / sqrt 2 but for eps. A component that says nothing about a group adds 0."""
    components = doubles([[0, 2, NAN, NAN], [NAN, NAN, NAN, NAN]])
    found = advantages.component_advantages(components, doubles([1, 5]), 2, eps=1e-14)
    assert_close(found, doubles([-math.sqrt(0.5), math.sqrt(0.5), 0, 0]), **FLOAT64)


def test_components_that_agree_everywhere_say_nothing(advantages: ModuleType) -> None:
    """Six times .3 in float32 are not their own mean; a single completion with a reward has no siblings."""
    same = torch.tensor([[0.3] * 6, [0.7] * 6])
    assert_close(advantages.component_advantages(same, torch.ones(2), 6, eps=1e-9), torch.zeros(6), **EXACT)
    alone = doubles([[1, NAN, NAN, NAN]])
    assert_close(advantages.component_advantages(alone, doubles([1]), 2), doubles([0, 0, 0, 0]), **EXACT)


def test_one_component_that_judges_all_is_the_group_advantage_normalised() -> None:
    rewards = doubles(REWARDS)
    single = module.group_advantages(rewards, 3)
    expected = (single - single.mean()) / (single.std() + 1e-4)
    assert_close(module.component_advantages(rewards[None], doubles([1]), 3), expected, **FLOAT64)


def test_equal_rewards_give_exactly_nothing(advantages: ModuleType) -> None:
    """Six times .3 in float32 are not their own mean; at eps 1e-9 the rounding would become an advantage near 1."""
    rewards = torch.tensor([0.3] * 6 + [0.7] * 5 + [0.2])
    for scale in ("group", "batch", "none"):
        result = advantages.group_advantages(rewards, 6, scale, eps=1e-9)
        assert_close(result[:6], torch.zeros(6), **EXACT)
        assert (result[6:] != 0).all()
    assert_close(advantages.leave_one_out(rewards, 6)[:6], torch.zeros(6), **EXACT)
    everybody = advantages.group_advantages(rewards[:6], 6, "batch", eps=1e-9)
    assert_close(everybody, torch.zeros(6), **EXACT)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=6), st.integers(2, 5), st.randoms())
def test_leave_one_out_is_the_centred_reward_enlarged(some: list[float], group_size: int, random: Any) -> None:
    """r - (S - r) / (G - 1) = (G r - S) / (G - 1) = G / (G - 1) * (r - S / G), and siblings may trade places."""
    rewards = [random.choice(some) for _ in range(3 * group_size)]
    centred = module.group_advantages(doubles(rewards), group_size, "none")
    alone = module.leave_one_out(doubles(rewards), group_size)
    assert_close(alone, centred * group_size / (group_size - 1), **FLOAT64)
    by_loop = [
        r - (sum(rewards[i - i % group_size :][:group_size]) - r) / (group_size - 1) for i, r in enumerate(rewards)
    ]
    assert_close(alone, doubles(by_loop), **FLOAT64)
    order = torch.arange(len(rewards)).view(3, group_size).flip(0, 1).flatten()
    assert_close(module.leave_one_out(doubles(rewards)[order], group_size), alone[order], **FLOAT64)


def test_counts_and_half_precision_are_computed_in_float32() -> None:
    expected = torch.tensor([-0.5, 0.5])
    for rewards in (torch.tensor([0, 1]), torch.tensor([False, True]), torch.tensor([0, 1], dtype=torch.bfloat16)):
        assert_close(module.group_advantages(rewards, 2, "none"), expected, **EXACT)


def three_tokens() -> tuple[Tensor, Tensor, Tensor]:
    return doubles([[1, 2, 3]]), doubles([[0.5, 1, 1.5]]), torch.ones(1, 3, dtype=torch.bool)


def test_gae(advantages: ModuleType) -> None:
    """gamma = .5, lambda = .4, so advantages are carried at .2:

    delta_2 = 3 + 0 - 1.5 = 1.5      A_2 = 1.5
    delta_1 = 2 + .75 - 1 = 1.75     A_1 = 1.75 + .3 = 2.05
    delta_0 = 1 + .5 - .5 = 1        A_0 = 1 + .41 = 1.41        returns: plus .5, 1, 1.5
    """
    result, returns = advantages.gae(*three_tokens(), gamma=0.5, gae_lambda=0.4)
    assert_close(result, doubles([[1.41, 2.05, 1.5]]), **FLOAT64)
    assert_close(returns, doubles([[1.91, 3.05, 3.0]]), **FLOAT64)


def test_gae_of_a_row_that_was_cut_off(advantages: ModuleType) -> None:
    """V = 4 after the end: delta_2 = 3 + 2 - 1.5 = 3.5;  A_1 = 1.75 + .7 = 2.45;  A_0 = 1 + .49 = 1.49."""
    result, returns = advantages.gae(*three_tokens(), gamma=0.5, gae_lambda=0.4, bootstrap_values=doubles([4]))
    assert_close(result, doubles([[1.49, 2.45, 3.5]]), **FLOAT64)
    assert_close(returns, doubles([[1.99, 3.45, 5.0]]), **FLOAT64)


def test_gae_steps_over_whatever_is_masked(advantages: ModuleType) -> None:
    """The three tokens of `test_gae`, behind padding, with holes between them and NaN in every slot that is not theirs;
    a row without tokens beside them; the cut-off's value belongs to its own row."""
    places = [1, 3, 4]
    rewards, values = torch.full((3, 7), NAN, dtype=torch.float64), torch.full((3, 7), NAN, dtype=torch.float64)
    mask = torch.zeros(3, 7, dtype=torch.bool)
    for row in (0, 2):
        rewards[row, places], values[row, places] = three_tokens()[0], three_tokens()[1]
        mask[row, places] = True
    result, returns = advantages.gae(
        rewards, values, mask, gamma=0.5, gae_lambda=0.4, bootstrap_values=doubles([0, 9, 4])
    )
    expected, expected_returns = torch.zeros(3, 7, dtype=torch.float64), torch.zeros(3, 7, dtype=torch.float64)
    expected[0, places], expected_returns[0, places] = doubles([1.41, 2.05, 1.5]), doubles([1.91, 3.05, 3.0])
    expected[2, places], expected_returns[2, places] = doubles([1.49, 2.45, 3.5]), doubles([1.99, 3.45, 5.0])
    assert_close(result, expected, **FLOAT64)
    assert_close(returns, expected_returns, **FLOAT64)


def random_rows() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    rewards, values = torch.randn(2, 5, 9, generator=generator, dtype=torch.float64)
    mask = torch.rand(5, 9, generator=generator) < 0.6
    return rewards, values, mask, torch.randn(5, generator=generator, dtype=torch.float64)


def test_gae_with_lambda_one_is_return_minus_value(advantages: ModuleType) -> None:
    """The errors telescope: A_t + V_t = sum_k gamma^k r_{t+k} + gamma^n V_end, over the tokens under the mask."""
    rewards, values, mask, end = random_rows()
    result, returns = advantages.gae(rewards, values, mask, gamma=0.9, gae_lambda=1.0, bootstrap_values=end)
    for row in range(len(rewards)):
        places = mask[row].nonzero().flatten().tolist()
        for i, t in enumerate(places):
            later = sum(0.9**k * rewards[row, u] for k, u in enumerate(places[i:]))
            expected = later + 0.9 ** (len(places) - i) * end[row]
            assert_close(returns[row, t], expected, **FLOAT64)
            assert_close(result[row, t], expected - values[row, t], **FLOAT64)


def test_gae_with_lambda_zero_is_the_one_step_error(advantages: ModuleType) -> None:
    """A_t = r_t + gamma V_next - V_t."""
    rewards, values, mask, end = random_rows()
    result, _ = advantages.gae(rewards, values, mask, gamma=0.9, gae_lambda=0.0, bootstrap_values=end)
    for row in range(len(rewards)):
        places = mask[row].nonzero().flatten().tolist()
        following = [*values[row, places[1:]], end[row]]
        for t, next_value in zip(places, following, strict=True):
            assert_close(result[row, t], rewards[row, t] + 0.9 * next_value - values[row, t], **FLOAT64)


def test_gae_does_not_depend_on_padding_or_company() -> None:
    """Row by row, trimmed to its own tokens and padded anew, each row has the same bits."""
    rewards, values, mask, end = random_rows()
    together = module.gae(rewards, values, mask, gamma=0.9, gae_lambda=0.5, bootstrap_values=end)
    for row in range(len(rewards)):
        own = mask[row]
        trimmed = [torch.nn.functional.pad(x[row, own], (2, 3), value=NAN)[None] for x in (rewards, values)]
        where = torch.nn.functional.pad(own[own], (2, 3))[None]
        alone = module.gae(*trimmed, where, gamma=0.9, gae_lambda=0.5, bootstrap_values=end[row : row + 1])
        for one, all_rows in zip(alone, together, strict=True):
            assert_close(one[where], all_rows[row, own], **EXACT)


def test_gae_keeps_nan_out_of_the_gradient() -> None:
    values = torch.tensor([[NAN, 0.5, NAN, 1.0]], requires_grad=True)
    mask = torch.tensor([[False, True, False, True]])
    result, _ = module.gae(torch.zeros(1, 4), values, mask, gamma=1.0, gae_lambda=0.0)
    result[0, 1].backward()  # V_next - V_t
    assert values.grad is not None
    assert_close(values.grad, torch.tensor([[0.0, -1.0, 0.0, 1.0]]), **FLOAT32)


def test_potential_shaping(advantages: ModuleType) -> None:
    """Phi = (2, 3, 7), gamma = .5: .5 * 3 - 2 = -.5;  .5 * 7 - 3 = .5;  .5 * 0 - 7 = -7. Holes hold NaN; and cut off
    where Phi is 4, the last is .5 * 4 - 7 = -5."""
    phi = doubles([[NAN, 2, NAN, 3, 7, NAN]] * 2)
    mask = torch.tensor([[False, True, False, True, True, False]] * 2)
    expected = doubles([[0, -0.5, 0, 0.5, -7, 0]] * 2)
    assert_close(advantages.potential_shaping(phi, mask, 0.5), expected, **FLOAT64)
    expected[1, 4] = -5
    assert_close(advantages.potential_shaping(phi, mask, 0.5, doubles([0, 4])), expected, **FLOAT64)


@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_shaping_changes_every_return_by_what_no_action_can_change(advantages: ModuleType, gamma: float) -> None:
    """The discounted sum from t on telescopes to -Phi of the state at t, whatever is done there and later. So the
    advantage of lambda = 1 against V - Phi is what it was against V, and the optimum stays (Ng et al. 1999)."""
    rewards, values, mask, end = random_rows()
    phi = random_rows()[1].flip(0)
    final = 3 * end
    shaping = advantages.potential_shaping(phi, mask, gamma, final)
    for row in range(len(rewards)):
        places = mask[row].nonzero().flatten().tolist()
        for i, t in enumerate(places):
            later = sum(gamma**k * shaping[row, u] for k, u in enumerate(places[i:]))
            assert_close(later, gamma ** (len(places) - i) * final[row] - phi[row, t], **FLOAT64)
    settings_ = {"gamma": gamma, "gae_lambda": 1.0}
    plain, _ = module.gae(rewards, values, mask, bootstrap_values=end, **settings_)
    shaped, _ = module.gae(rewards + shaping, values - phi, mask, bootstrap_values=end - final, **settings_)
    assert_close(shaped, plain, **FLOAT64)


def test_an_empty_completion_axis() -> None:
    nothing = torch.zeros(2, 0)
    result, returns = module.gae(nothing, nothing, nothing.bool(), gamma=1.0, gae_lambda=1.0)
    assert result.shape == returns.shape == (2, 0)


@pytest.mark.parametrize("function", [module.group_advantages, module.leave_one_out])
@pytest.mark.parametrize(
    "rewards, group_size, message",
    [
        ([1, 2], 1, "group_size must be >= 2"),
        ([1, 2, 3], 2, "a multiple of group_size 2"),
        ([[1, 2], [3, 4]], 2, "must be flat"),
        ([1, math.inf], 2, "infinite"),
    ],
)
def test_group_errors(function: Any, rewards: Any, group_size: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        function(doubles(rewards), group_size)


def test_other_errors() -> None:
    scale: Literal["group"] = "std"  # type: ignore[assignment]
    with pytest.raises(ValueError, match="unknown scale 'std'; choose group, batch or none"):
        module.group_advantages(doubles(REWARDS), 3, scale)
    with pytest.raises(ValueError, match="unknown baseline 'mean'; choose group or leave_one_out"):
        module.group_advantages(doubles(REWARDS), 3, baseline="mean")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="unknown scale 'group'; choose batch or none"):
        module.running_advantages(doubles(REWARDS), 0.0, "group")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="running_advantages: a reward is infinite"):
        module.running_advantages(doubles([1, math.inf]), 0.0)
    for components, weights in ((REWARDS, [1]), ([REWARDS], [1, 2])):
        with pytest.raises(ValueError, match=r"components must be \(C, N\) and weights \(C,\)"):
            module.component_advantages(doubles(components), doubles(weights), 3)
    with pytest.raises(ValueError, match="infinite"):
        module.component_advantages(doubles([[1, math.inf]]), doubles([1]), 2)
    rewards, values, mask = three_tokens()
    with pytest.raises(ValueError, match=r"share one shape \(B, T\)"):
        module.gae(rewards, values[:, :2], mask, gamma=1.0, gae_lambda=1.0)
    with pytest.raises(ValueError, match="bootstrap_values must be"):
        module.gae(rewards, values, mask, gamma=1.0, gae_lambda=1.0, bootstrap_values=doubles([[4]]))


@pytest.mark.parametrize(
    "text, replacement, test",
    [
        ("centred = groups - keep", "centred = groups + keep", test_no_scale),
        (".view(-1, group_size)", ".view(group_size, -1).T", test_no_scale),
        (
            "keepdim=True) / others\n            return",
            "keepdim=True) / groups.present\n            return",
            test_group_scale,
        ),
        ("(variance.sqrt() + eps)", "variance.sqrt()", test_group_scale),
        ("(variance.sqrt() + eps)", "(variance + eps)", test_group_scale),
        ("_spread(rewards.to(above.dtype))", "above.std()", test_batch_scale),
        ("given.std()", "given.std(correction=0)", test_batch_scale),
        ("rewards[~rewards.isnan()]", "rewards.nan_to_num(0)", test_missing_rewards),
        ("valid & ~alike", "valid", test_equal_rewards_give_exactly_nothing),
        ("valid & ~alike", "valid | ~alike", test_missing_rewards),
        ("present = valid.sum(1, keepdim=True)", "present = valid.sum(1, keepdim=True) * 0 + 3", test_missing_rewards),
        ("groups.centred * groups.present / ", "groups.centred / ", test_leave_one_out),
        ("groups.centred.square().sum(1", "above.square().sum(1", test_leave_one_out_under_every_scale),
        ("rewards - running_mean", "rewards + running_mean", test_running_advantages),
        ("above / (_spread(rewards) + eps)", "above / (_spread(above) + eps)", test_running_advantages),
        ("(nan=0.0)", "(nan=1.0)", test_running_advantages),
        ("len(given) > 1", "True", test_running_advantages),
        ("weights[:, None] * each", "each", test_component_advantages),
        ("component, group_size, eps=eps", "component, group_size, scale='none'", test_component_advantages),
        ("spread = _spread(total[judged])", "spread = _spread(total)", test_completions_that_no_component_judged),
        ("components.isnan().all(0)", "components.isnan().any(0)", test_component_advantages),
        ("keep(centred, valid & ~alike)", "keep(centred, valid)", test_components_that_agree_everywhere_say_nothing),
        (
            "(weights[:, None] * each).sum(0)",
            "group_advantages((weights[:, None] * components.nan_to_num(0)).sum(0), group_size)",
            test_components_of_unlike_scales_count_alike,
        ),
        ("bootstrap_values=final_potentials", "bootstrap_values=None", test_potential_shaping),
        ("gamma=gamma, gae_lambda=0.0", "gamma=1.0, gae_lambda=0.0", test_potential_shaping),
        ("gamma=gamma, gae_lambda=0.0", "gamma=gamma, gae_lambda=1.0", test_potential_shaping),
        ("gae(nothing, potentials,", "gae(nothing, -potentials,", test_potential_shaping),
        ("+ gamma * next_value", "+ next_value", test_gae),
        ("next_value - value", "next_value + value", test_gae),
        ("gamma * gae_lambda * next_advantage", "gae_lambda * next_advantage", test_gae),
        ("return advantages, advantages + values", "return advantages, advantages", test_gae),
        ("columns[::-1]", "columns", test_gae),
        ("zero if bootstrap_values is None else bootstrap_values", "zero", test_gae_of_a_row_that_was_cut_off),
        (
            "next_value = torch.where(here, value, next_value)",
            "next_value = value",
            test_gae_steps_over_whatever_is_masked,
        ),
        ("torch.where(here, advantage, next_advantage)", "advantage", test_gae_steps_over_whatever_is_masked),
        ("keep(values, mask), mask", "values, mask", test_gae_steps_over_whatever_is_masked),
    ],
)
def test_mutants_are_noticed(text: str, replacement: str, test: Any) -> None:
    with pytest.raises(AssertionError):
        test(mutated(module, text, replacement))
