"""AdamW for each role, the schedule's factors, and clipped steps, by hand."""

import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from alignlab.optim import AdamWChoice, Schedule, build_optimizers, clipped_step, parameters_of
from alignlab.types import Role
from tests.tolerances import EXACT, FLOAT64


def factors(schedule: Schedule, num_phases: int) -> list[float]:
    return [schedule.factor(phase, num_phases) for phase in range(num_phases)]


@pytest.mark.parametrize(
    "schedule, expected",
    [
        (Schedule(), [1, 1, 1, 1]),
        (Schedule(shape="linear"), [1, 3 / 4, 2 / 4, 1 / 4]),
        (Schedule(shape="linear", floor=0.2), [1, 0.8, 0.6, 0.4]),
        (Schedule(shape="cosine"), [1, (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2]),
        (Schedule(shape="cosine", floor=0.5), [1, (3 + math.sqrt(0.5)) / 4, 0.75, (3 - math.sqrt(0.5)) / 4]),
        (Schedule(warmup=0.5), [1 / 3, 2 / 3, 1, 1]),  # two phases on the way up, none of them wasted on 0
        (Schedule(shape="linear", warmup=0.5), [1 / 3, 2 / 3, 1, 1 / 2]),
        (Schedule(warmup=1.0), [1 / 5, 2 / 5, 3 / 5, 4 / 5]),
        (Schedule(shape="linear", warmup=0.01), [1, 1 - 0.96 / 3.96, 1 - 1.96 / 3.96, 1 - 2.96 / 3.96]),
    ],
    ids=str,
)
def test_schedule(schedule: Schedule, expected: list[float]) -> None:
    assert_close(factors(schedule, 4), [float(x) for x in expected], **FLOAT64)


@pytest.mark.parametrize("shape", ["constant", "linear", "cosine"])
def test_no_phase_is_wasted_on_a_factor_of_zero(shape: Any) -> None:
    for warmup in (0.0, 0.05, 0.3):
        assert all(0 < f <= 1 for f in factors(Schedule(shape=shape, warmup=warmup), 40))


class Two(nn.Module):
    def __init__(self, trunk: nn.Linear | None = None) -> None:
        super().__init__()
        self.trunk = trunk or nn.Linear(2, 2, dtype=torch.float64)
        self.head = nn.Linear(2, 1, dtype=torch.float64)


def test_a_shared_trunk_belongs_to_the_first_role() -> None:
    policy = Two()
    critic = Two(policy.trunk)
    roles = {"policy": Role(learning_rate=1e-3), "reference": Role(), "value_model": Role(learning_rate=1e-2)}
    optimizers = build_optimizers(roles, {"policy": policy, "reference": Two(), "value_model": critic}, AdamWChoice())
    assert list(optimizers) == ["policy", "value_model"]
    assert {id(p) for p in parameters_of(optimizers["policy"])} == {id(p) for p in policy.parameters()}
    assert {id(p) for p in parameters_of(optimizers["value_model"])} == {id(p) for p in critic.head.parameters()}


def test_choices_arrive_and_decay_is_for_matrices() -> None:
    model = Two()
    model.trunk.weight.requires_grad_(False)
    choice = AdamWChoice(beta1=0.8, beta2=0.95, eps=1e-5, weight_decay=0.1)
    (optimizer,) = build_optimizers({"policy": Role(learning_rate=1e-3)}, {"policy": model}, choice).values()
    matrices, others = optimizer.param_groups
    assert [p.shape for p in matrices["params"]] == [(1, 2)] and matrices["weight_decay"] == 0.1
    assert [p.shape for p in others["params"]] == [(2,), (1,)] and others["weight_decay"] == 0.0
    assert {g["betas"] for g in optimizer.param_groups} == {(0.8, 0.95)} and {
        g["eps"] for g in optimizer.param_groups
    } == {1e-5}


def one_parameter(value: float, gradient: float, decay: float = 0.0) -> tuple[nn.Parameter, torch.optim.AdamW]:
    parameter = nn.Parameter(torch.full((1, 4), value, dtype=torch.float64))
    parameter.grad = torch.full_like(parameter, gradient)
    return parameter, torch.optim.AdamW([parameter], lr=123.0, weight_decay=decay, eps=0.0)


def test_a_step_at_the_given_rate() -> None:
    """AdamW's first step is rate * sign(g), after shrinking the weight by rate * decay: 1 - .1 * .5 - .1 = .85."""
    parameter, optimizer = one_parameter(1.0, 0.25, decay=0.5)
    norm = clipped_step(optimizer, 10.0, 0.1)
    assert_close(norm, 0.5, **EXACT)
    assert_close(parameter.detach(), torch.full((1, 4), 0.85, dtype=torch.float64), **FLOAT64)


def test_the_gradient_is_scaled_down_to_the_norm() -> None:
    """Norm sqrt(4 * .25) = 1 against .1; what Adam remembers is (1 - beta1) * .1 * g (torch adds 1e-6 to the norm)."""
    parameter, optimizer = one_parameter(1.0, 0.5)
    assert_close(clipped_step(optimizer, 0.1, 0.1), 1.0, **EXACT)
    remembered = optimizer.state[parameter]["exp_avg"]
    assert_close(remembered, torch.full((1, 4), 0.1 * 0.05, dtype=torch.float64), rtol=2e-6, atol=0.0)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_is_not_applied(bad: float) -> None:
    parameter, optimizer = one_parameter(1.0, 0.5)
    assert parameter.grad is not None
    parameter.grad[0, 2] = bad
    assert not math.isfinite(clipped_step(optimizer, 1.0, 0.1))
    assert_close(parameter.detach(), torch.ones((1, 4), dtype=torch.float64), **EXACT)
    assert not optimizer.state
