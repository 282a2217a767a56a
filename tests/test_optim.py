"""AdamW for each role, the schedule's factors, and clipped steps, by hand."""

import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from alignlab.optim import (
    FIRST_SCALER,
    GOOD_STEPS,
    AdamWChoice,
    MasterAdamW,
    Schedule,
    build_optimizers,
    clipped_step,
    next_scaler,
    parameters_of,
    unscale,
)
from alignlab.types import Role
from tests.tolerances import EXACT, FLOAT32, FLOAT64


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


# Half precision -------------------------------------------------------------------------------------------------------


def half(value: float, dtype: torch.dtype, **options: Any) -> tuple[nn.Parameter, MasterAdamW]:
    parameter = nn.Parameter(torch.full((2, 2), value, dtype=dtype))
    return parameter, MasterAdamW([{"params": [parameter]}], lr=1.0, eps=0.0, weight_decay=0.0, **options)


def backward(parameter: nn.Parameter, slope: float) -> None:
    (parameter * slope).sum().backward()  # type: ignore[no-untyped-call]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_updates_below_the_rounding_add_up(dtype: torch.dtype) -> None:
    """AdamW moves a weight of 1 by its rate, here 1e-4, against the slope; next below 1 are 1 - 2^-8 in bfloat16 and
    1 - 2^-11 in float16. Without a master not one of 100 such steps would arrive; with it their sum, .01, does."""
    parameter, optimizer = half(1.0, dtype)
    pure = nn.Parameter(torch.ones(2, 2, dtype=dtype))
    without = torch.optim.AdamW([pure], lr=1.0, eps=0.0, weight_decay=0.0)
    for _ in range(100):
        for p, o in ((parameter, optimizer), (pure, without)):
            backward(p, 0.5)
            clipped_step(o, 1e9, 1e-4)
            o.zero_grad(set_to_none=True)
    assert_close(parameter.detach(), torch.full((2, 2), 0.99, dtype=dtype), **EXACT)
    assert_close(parameters_of(optimizer)[0].detach(), torch.full((2, 2), 0.99), **FLOAT32)
    assert pure.detach().eq(1).all()


def test_gradients_add_up_in_single_precision() -> None:
    """256 + 1 + 1 + 1 + 1 is 256 in bfloat16, one addition at a time, and 260 in float32."""
    parameter, optimizer = half(0.0, torch.bfloat16)
    plain = nn.Parameter(torch.zeros(2, 2, dtype=torch.bfloat16))
    for slope in (256.0, 1.0, 1.0, 1.0, 1.0):
        backward(parameter, slope)
        backward(plain, slope)
    (master,) = parameters_of(optimizer)
    assert parameter.grad is None and master.grad is not None and plain.grad is not None
    assert master.grad.dtype == torch.float32 and master.grad.eq(260).all()
    assert plain.grad.eq(256).all()
    optimizer.zero_grad(set_to_none=True)
    assert master.grad is None


def test_only_half_precision_has_masters() -> None:
    model = nn.Sequential(nn.Linear(2, 2, dtype=torch.bfloat16), nn.Linear(2, 1))
    model[0].bias.requires_grad_(False)
    (optimizer,) = build_optimizers({"policy": Role(learning_rate=1e-3)}, {"policy": model}, AdamWChoice()).values()
    assert [id(p) for _, p in optimizer.masters] == [id(model[0].weight)]
    assert {p.dtype for p in parameters_of(optimizer)} == {torch.float32}
    held = {id(p) for p in model.parameters()}
    assert sum(id(p) in held for p in parameters_of(optimizer)) == 2


@pytest.mark.parametrize("bad, finite", [(0.0, True), (math.inf, False), (-math.inf, False), (math.nan, False)])
def test_unscaling(bad: float, finite: bool) -> None:
    """Exact, as scales are powers of 2."""
    parameter, optimizer = half(1.0, torch.float16)
    backward(parameter, 3.0 * 2**12)
    (master,) = parameters_of(optimizer)
    assert master.grad is not None
    master.grad[1, 1] += bad
    assert unscale([optimizer], 2.0**12) == finite
    assert_close(master.grad[0, 0].item(), 3.0, **EXACT)
    assert unscale([], 2.0)


def test_the_loss_scale() -> None:
    """Halved by an overflow, which starts the count anew; doubled after 2000 steps without."""
    scaler = next_scaler(FIRST_SCALER, True)
    assert scaler == {"scale": 65536.0, "good_steps": 1.0, "skipped_steps": 0.0}
    scaler = next_scaler(scaler, False)
    assert scaler == {"scale": 32768.0, "good_steps": 0.0, "skipped_steps": 1.0}
    for _ in range(GOOD_STEPS - 1):
        scaler = next_scaler(scaler, True)
    assert scaler == {"scale": 32768.0, "good_steps": 1999.0, "skipped_steps": 1.0}
    assert next_scaler(scaler, True) == {"scale": 65536.0, "good_steps": 0.0, "skipped_steps": 1.0}
