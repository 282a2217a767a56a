"""The loop with an algorithm made for it: one normaliser, who is stepped when, what ends a phase, what is logged."""

import math
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from alignlab.algorithms.distill import Distill
from alignlab.algorithms.grpo import GRPO
from alignlab.algorithms.ppo import PPO
from alignlab.algorithms.sft import SFT
from alignlab.optim import FIRST_SCALER, AdamWChoice, Schedule, build_optimizers
from alignlab.train import IDENTITY_TOLERANCE, RunError, phase_seed, train, trained_modules
from alignlab.types import Batch, Directive, LoopState, LossOutput, Phase, Role, Step
from tests.algorithms.world import Recorder, loss_and_gradient, start_run
from tests.tolerances import EXACT, FLOAT64


def batch(*lengths: int) -> Batch:
    """Rows whose completions have the given lengths, after a prompt of one token."""
    mask = torch.tensor([[0] + [1] * n + [0] * (max(lengths) - n) for n in lengths], dtype=torch.bool)
    attended = mask.clone()
    attended[:, 0] = True
    return Batch(input_ids=torch.zeros(mask.shape, dtype=torch.long), attention_mask=attended, completion_mask=mask)


@dataclass
class Toy:
    """Minimises `slope * w` per row of a single weight, two roles, with everything open to tests."""

    steps: tuple[Step, ...] = (Step((batch(2, 3), batch(1)), 2.0),)
    roles: Mapping[str, Role] = field(default_factory=lambda: {"policy": Role(learning_rate=0.1)})
    phase_metrics: Mapping[str, float] = field(default_factory=dict)
    identities: Callable[[LoopState], Mapping[str, float]] = lambda state: {}
    react: Callable[[LoopState, Mapping[str, float]], Directive] = lambda state, metrics: Directive()
    slope: float = 3.0
    dropout = False
    metrics_file = None
    data_kind = "examples"
    drawn: list[Any] = field(default_factory=list)
    seen: list[Any] = field(default_factory=list)

    def models(self) -> Mapping[str, Role]:
        return self.roles

    def collect(self, models: Any, source: Any, state: LoopState) -> tuple[Phase, LoopState]:
        self.drawn.append((torch.rand(1).item(), float(np.random.rand()), random.random()))
        return Phase(self.steps, self.phase_metrics), state

    def loss(self, models: Any, batch: Batch, state: LoopState) -> LossOutput:
        total = sum((self.slope * len(batch) * m.weight.sum() for m in models.values()), torch.zeros(()))
        rows = float(len(batch))
        return LossOutput(total, {"some/rows": (rows, 1.0), "some/mean": (10 * rows, rows)}, self.identities(state))

    def observe(self, state: LoopState, metrics: Mapping[str, float]) -> tuple[LoopState, Directive]:
        self.seen.append((state, dict(metrics)))
        return state, self.react(state, metrics)


def weight(value: float = 1.0) -> nn.Linear:
    layer = nn.Linear(1, 1, bias=False)
    nn.init.constant_(layer.weight, value)
    return layer


@dataclass
class Loop:
    algorithm: Toy
    models: dict[str, nn.Linear]
    optimizers: dict[str, torch.optim.SGD]
    recorder: Recorder
    state: LoopState

    def value(self, name: str = "policy") -> Tensor:
        return self.models[name].weight.detach().flatten()[0]


def loop(
    toy: Toy,
    num_phases: int,
    *,
    schedule: Schedule | None = None,
    state: LoopState | None = None,
    momentum: float = 0.0,
) -> Loop:
    """Runs a toy with plain gradient descent, so that weights move by rate * gradient."""
    models = {name: weight() for name in toy.roles}
    optimizers = {
        name: torch.optim.SGD(models[name].parameters(), lr=99.0, momentum=momentum)
        for name, r in toy.roles.items()
        if r.trained
    }
    made = Loop(toy, models, optimizers, Recorder(), state or LoopState(seed=7))
    for finished in train(toy, models, optimizers, None, made.state, num_phases=num_phases,  # type: ignore[arg-type]
                          schedule=schedule or Schedule(), tracker=made.recorder):  # type: ignore[arg-type]  # fmt: skip
        made.state = finished.state
    return made


FREE = Role(learning_rate=0.1, max_grad_norm=1e9)


# ---- one step --------------------------------------------------------------------------------------------------------


def test_one_normaliser_for_all_microbatches() -> None:
    """(2 rows + 1 row) * 3 / 2 = 4.5: loss 4.5, gradient 4.5, weight 1 - .1 * 4.5."""
    run = loop(Toy(roles={"policy": FREE}), 1)
    assert_close(run.value(), torch.tensor(0.55))
    (row,) = run.recorder.rows
    assert row["loss/total"] == 4.5 and row["policy/grad_norm"] == 4.5 and row["policy/learning_rate"] == 0.1


def test_metrics_are_sums_over_counts_of_the_step() -> None:
    """Sums 2 + 1 over counts 1 + 1, and 20 + 10 over 2 + 1."""
    (row,) = loop(Toy(), 1).recorder.rows
    assert row["some/rows"] == 1.5 and row["some/mean"] == 10.0


def test_the_gradient_is_clipped_for_each_role() -> None:
    """4.5 is scaled down to 1 for the policy, and left alone for the critic."""
    run = loop(Toy(roles={"policy": Role(learning_rate=0.1), "value_model": FREE}), 1)
    assert_close(run.value("policy"), torch.tensor(0.9))
    assert_close(run.value("value_model"), torch.tensor(0.55))


def test_frozen_roles_are_left_alone() -> None:
    run = loop(Toy(roles={"policy": FREE, "reference": Role()}), 3)
    assert run.value("reference") == 1.0 and run.value("policy") != 1.0
    assert list(trained_modules(run.models, run.algorithm.roles)) == ["policy"]


def test_matches_the_helper_that_other_tests_use() -> None:
    """The loop's gradient is that of `loss_and_gradient`: its norm is logged before clipping."""
    run, twin = start_run(SFT(examples_per_step=6, max_grad_norm=1e9)), start_run(SFT(examples_per_step=6))
    phase, _ = twin.algorithm.collect(twin.models, twin.source, twin.state)
    loss, gradient = loss_and_gradient(twin, phase.steps[0])
    metrics = run.go(1)[0].metrics
    assert_close(metrics["loss/total"], loss, **FLOAT64)
    assert_close(
        metrics["policy/grad_norm"], torch.cat([g.flatten() for g in gradient.values()]).norm().item(), **FLOAT64
    )


# ---- who is stepped, and how far -------------------------------------------------------------------------------------


def test_a_role_waits_for_its_start_step() -> None:
    """Two steps a phase: the policy starts with step 3 of 4. Its momentum holds no trace of the gradients before."""
    late = Role(learning_rate=0.1, max_grad_norm=1e9, start_step=3)
    step = Step((batch(2, 3), batch(1)), 2.0)
    run = loop(Toy(steps=(step, step), roles={"policy": late, "value_model": FREE}), 2, momentum=0.5)
    assert_close(run.value("policy"), torch.tensor(0.55))
    assert [("policy/grad_norm" in r, "value_model/grad_norm" in r) for r in run.recorder.rows] == [
        (False, True)
    ] * 3 + [(True, True)]
    assert all(p.grad is None for m in run.models.values() for p in m.parameters())


def test_the_schedule_moves_with_phases() -> None:
    """Factors 1 and 1/2, two steps a phase: 1 - 4.5 * .1 * (1 + 1 + .5 + .5)."""
    step = Step((batch(2, 3), batch(1)), 2.0)
    run = loop(Toy(steps=(step, step), roles={"policy": FREE}), 2, schedule=Schedule(shape="linear"))
    assert [r["policy/learning_rate"] for r in run.recorder.rows] == [0.1, 0.1, 0.05, 0.05]
    assert_close(run.value(), torch.tensor(1 - 4.5 * 0.3))


def test_learning_rate_factors_multiply_and_last() -> None:
    """Halved after the first and second step, for the policy only; kept in the state, so that a resume knows them."""
    half = Directive(learning_rate_factor={"policy": 0.5})
    toy = Toy(
        roles={"policy": FREE, "value_model": FREE}, react=lambda state, _: half if state.step <= 2 else Directive()
    )
    run = loop(toy, 4)
    assert [r["policy/learning_rate"] for r in run.recorder.rows] == [0.1, 0.05, 0.025, 0.025]
    assert [r["value_model/learning_rate"] for r in run.recorder.rows] == [0.1] * 4
    assert run.state.learning_rate_factor == {"policy": 0.25}


# ---- directives ------------------------------------------------------------------------------------------------------


def test_end_phase_skips_the_rest_of_it() -> None:
    step = Step((batch(1),), 1.0)
    end = Directive(action="end_phase", reason="enough")
    run = loop(Toy(steps=(step,) * 3, react=lambda state, _: end if state.step == 2 else Directive()), 2)
    assert [(r["phase"], r["step"]) for r in run.recorder.rows] == [(0, 1), (0, 2), (1, 3), (1, 4), (1, 5)]
    assert [r.get("ended") for r in run.recorder.rows] == [None, "enough", None, None, None]
    assert run.state.phase == 2 and run.state.stop_reason == ""


def test_stop_ends_the_run_for_good() -> None:
    step = Step((batch(1),), 1.0)
    stop = Directive(action="stop", reason="KL over its limit")
    toy = Toy(steps=(step,) * 3, react=lambda state, _: stop if state.step == 2 else Directive())
    run = loop(toy, 5)
    assert run.state.phase == 1 and run.state.step == 2 and run.state.stop_reason == "KL over its limit"
    assert loop(Toy(), 5, state=run.state).recorder.rows == []
    nameless = loop(Toy(react=lambda *_: Directive(action="stop")), 5)
    assert nameless.state.stop_reason == "the method stopped the run"


def test_observe_sees_the_state_after_the_step_and_the_metrics_of_the_phase() -> None:
    step = Step((batch(1),), 1.0)
    toy = Toy(steps=(step, step), phase_metrics={"reward/mean": 0.5})
    loop(toy, 1)
    (first, metrics), (second, later) = toy.seen
    assert (first.step, second.step, first.phase) == (1, 2, 0)
    assert metrics["reward/mean"] == 0.5 and "reward/mean" not in later and metrics["loss/total"] == 3.0


# ---- what must not happen --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [0.02, -0.02, math.nan])
def test_a_violated_identity_stops_the_run(value: float) -> None:
    with pytest.raises(
        RunError, match=r"phase 0: the ratio is .* before any update .tolerance 1e-04.: sampling and scoring"
    ) as caught:
        loop(Toy(identities=lambda state: {"fine": 0.0, "the ratio": value}), 1)
    assert "\n" not in str(caught.value)


def test_identities_count_at_the_first_step_of_every_phase_only() -> None:
    """They are off by 1 at steps 2 and 4, and at step 5, the first of the third phase."""
    step = Step((batch(1),), 1.0)
    wrong_at = {1, 3, 4}
    toy = Toy(steps=(step, step), identities=lambda state: {"the ratio": 1.0 if state.step in wrong_at else 0.0})
    assert loop(toy, 2).state.phase == 2
    with pytest.raises(RunError, match="phase 2"):
        loop(toy, 3)


def test_identities_are_held_to_the_type() -> None:
    assert IDENTITY_TOLERANCE[torch.float64] < IDENTITY_TOLERANCE[torch.float32] < IDENTITY_TOLERANCE[torch.bfloat16]
    assert loop(Toy(identities=lambda state: {"rounding": 5e-6}), 1).state.phase == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_real_rounding_is_within_tolerance(dtype: torch.dtype) -> None:
    """Sampling through a cache and scoring whole rows differ by rounding, in every type."""
    run = start_run(
        GRPO(prompts_per_phase=8, group_size=4, kl_coef=0.01, learning_rate=1e-3), dtype=dtype, microbatch_rows=8
    )
    run.go(3)
    assert run.state.phase == 3


NARROW = {"clip_low": 1e-5, "clip_high": 1e-5, "learning_rate": 1e-3, "group_size": 4}


@pytest.mark.parametrize("method", [PPO, Distill, GRPO])
def test_rounding_beyond_a_narrow_clip_is_within_tolerance(method: Any) -> None:
    run = start_run(method(prompts_per_phase=8, **NARROW), dtype=torch.bfloat16, microbatch_rows=8)
    assert run.go(1)[0].metrics["policy/clip_fraction"] > 0


@pytest.mark.parametrize("slope", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_not_stepped(slope: float) -> None:
    toy, models = Toy(slope=slope), {"policy": weight()}
    optimizer = torch.optim.SGD(models["policy"].parameters(), lr=0.1)
    arguments = (toy, models, {"policy": optimizer}, None, LoopState(seed=1))
    with pytest.raises(RunError, match=r"phase 0, step 0: the loss is (nan|inf); the last checkpoint is intact"):
        next(train(*arguments, num_phases=1, schedule=Schedule(), tracker=Recorder()))  # type: ignore[arg-type]
    assert models["policy"].weight.item() == 1.0


def test_a_gradient_that_is_not_finite_is_not_stepped() -> None:
    """A finite loss with an infinite slope: sqrt at 0."""

    class Root(Toy):
        def loss(self, models: Any, batch: Batch, state: LoopState) -> LossOutput:
            return LossOutput(models["policy"].weight.sub(1).abs().sqrt().sum(), {})

    with pytest.raises(RunError, match=r"the gradient of the policy is (nan|inf)"):
        loop(Root(), 1)


def test_a_step_with_nothing_to_train_on() -> None:
    with pytest.raises(RunError, match=r"phase 0, step 0: nothing to train on in this step \(normaliser 0\)"):
        loop(Toy(steps=(Step((batch(1),), 0.0),)), 1)


# ---- float16 ---------------------------------------------------------------------------------------------------------


@dataclass
class HalfToy(Toy):
    """The toy in float16; at the planted steps its gradient is infinite, as if it had overflowed."""

    slope: float = 0.5  # times the first loss scale it fits float16, whose largest number is 65504
    planted: tuple[int, ...] = ()
    largest: float = math.inf
    """Loss scale from which on the gradient overflows."""
    scales: list[float] = field(default_factory=list)

    def loss(self, models: Any, batch: Batch, state: LoopState) -> LossOutput:
        self.scales.append(state.scaler["scale"])
        total = self.slope * sum((m.weight.float().sum() for m in models.values()), torch.zeros(()))
        if state.step in self.planted or state.scaler["scale"] > self.largest:
            total.register_hook(lambda gradient: gradient * math.inf)
        return LossOutput(total, {})


def half_loop(toy: Toy, num_phases: int, state: LoopState | None = None, policy: float = 1.0) -> Loop:
    """Runs a toy whose policy is in float16 (and whose critic is not), with the real optimisers."""
    models = {name: weight(policy).half() if name == "policy" else weight() for name in toy.roles}
    optimizers = build_optimizers(toy.roles, models, AdamWChoice())
    made = Loop(toy, models, optimizers, Recorder(), state or LoopState(seed=7))  # type: ignore[arg-type]
    for finished in train(toy, models, optimizers, None, made.state, num_phases=num_phases,  # type: ignore[arg-type]
                          schedule=Schedule(), tracker=made.recorder):  # type: ignore[arg-type]  # fmt: skip
        made.state = finished.state
    return made


ONE = (Step((batch(1),), 1.0),)


def test_the_loss_scale_is_taken_out_again() -> None:
    """Slope .5: the gradient is .5 whatever the scale, and clipping and logging see that one."""
    run = half_loop(HalfToy(steps=ONE, roles={"policy": FREE}), 2)
    assert [r["policy/grad_norm"] for r in run.recorder.rows] == [0.5, 0.5]
    assert [r["loss/total"] for r in run.recorder.rows] == [0.5, pytest.approx(0.45, abs=1e-3)]
    assert [(r["loss/scale"], r["loss/skipped_steps"]) for r in run.recorder.rows] == [(65536.0, 0.0)] * 2
    assert run.state.scaler == {"scale": 65536.0, "good_steps": 2.0, "skipped_steps": 0.0}
    assert_close(run.value(), torch.tensor(0.8, dtype=torch.float16))


def test_tiny_gradients_survive() -> None:
    """A slope of 1e-8 is 0 in float16, the smallest of whose numbers is 6e-8; at 65536 times that it is not."""
    run = half_loop(HalfToy(steps=ONE, roles={"policy": FREE}, slope=1e-8), 1)
    assert run.recorder.rows[0]["policy/grad_norm"] == pytest.approx(1e-8, rel=1e-3)


def test_an_overflowed_step_is_skipped_for_every_role() -> None:
    """Nothing of it arrives: neither in the policy, nor in the critic beside it, nor in any momentum."""
    roles = {"policy": FREE, "value_model": FREE}
    run = half_loop(HalfToy(steps=ONE * 3, roles=roles, planted=(1,)), 1)
    assert ["policy/grad_norm" in r for r in run.recorder.rows] == [True, False, True]
    assert [r["loss/scale"] for r in run.recorder.rows] == [65536.0, 65536.0, 32768.0]
    assert [r["loss/skipped_steps"] for r in run.recorder.rows] == [0.0, 1.0, 1.0]
    assert run.state.step == 3 and run.state.scaler == {"scale": 32768.0, "good_steps": 1.0, "skipped_steps": 1.0}
    without = half_loop(HalfToy(steps=ONE * 2, roles=roles), 1)
    for name in roles:
        assert_close(run.value(name), without.value(name), **EXACT)
        (ours, theirs) = (next(iter(r.optimizers[name].state.values())) for r in (run, without))
        assert ours.keys() == theirs.keys() == {"step", "exp_avg", "exp_avg_sq"}
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_the_scale_finds_its_place_and_goes_on_from_a_state() -> None:
    toy = HalfToy(steps=ONE * 6, roles={"policy": FREE}, largest=5000.0)
    run = half_loop(toy, 1)
    assert toy.scales == [65536.0, 32768.0, 16384.0, 8192.0, 4096.0, 4096.0]
    again = HalfToy(steps=ONE, roles={"policy": FREE})
    half_loop(again, 2, state=run.state)
    assert again.scales == [4096.0]


def test_an_overflow_that_no_scale_cures_ends_the_run() -> None:
    toy = HalfToy(steps=ONE * 40, roles={"policy": FREE}, largest=0.0)
    with pytest.raises(RunError, match=r"phase 0, step 29: gradients overflow in float16 .*bfloat16 or float32"):
        half_loop(toy, 1)


def test_a_role_that_has_not_started_does_not_hold_up_the_others() -> None:
    """Its gradient, infinite or not, is thrown away."""

    class Bad(HalfToy):
        def loss(self, models: Any, batch: Batch, state: LoopState) -> LossOutput:
            own, other = (models[name].weight.float().sum() for name in ("policy", "value_model"))
            own.register_hook(lambda gradient: gradient * math.inf)
            return LossOutput(own + other, {})

    late = Role(learning_rate=0.1, max_grad_norm=1e9, start_step=1)
    run = half_loop(Bad(steps=ONE, roles={"policy": late, "value_model": FREE}), 1)
    assert run.state.scaler["skipped_steps"] == 0.0 and "value_model/grad_norm" in run.recorder.rows[0]


def test_other_types_have_no_scale() -> None:
    assert loop(Toy(), 1).state.scaler == {}
    assert FIRST_SCALER["scale"] == 65536.0


def test_bfloat16_learns_as_float32_does() -> None:
    """At a rate below the rounding of its weights; stepped in bfloat16 themselves they would not learn at all."""

    def fall(dtype: torch.dtype, masters: bool = True) -> float:
        run = start_run(SFT(examples_per_step=8, learning_rate=1e-4), dtype=dtype, start=3)
        if not masters:
            parameters = list(run.models["policy"].parameters())
            run.optimizers = {"policy": torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.0)}  # type: ignore[dict-item]
        run.go(20)
        losses = run.column("loss/total")
        return float(losses[0] - losses[-1])

    expected = fall(torch.float32)
    assert expected > 0.1
    assert fall(torch.bfloat16) == pytest.approx(expected, rel=0.1)
    assert abs(fall(torch.bfloat16, masters=False)) < 0.1 * expected


# ---- state and log ---------------------------------------------------------------------------------------------------


def test_the_ledger_counts_what_was_consumed() -> None:
    """Rows 2 + 1 and completion tokens 2 + 3 + 1 a step, two steps a phase; sampled tokens once a phase."""
    step = Step((batch(2, 3), batch(1)), 2.0)
    run = loop(Toy(steps=(step, step), phase_metrics={"ledger/generated_tokens": 50.0, "reward/mean": 1.0}), 2)
    assert run.state.counters == {"generated_tokens": 100.0, "trained_rows": 12.0, "trained_tokens": 24.0}


def test_every_step_is_logged_once_and_every_phase_announced() -> None:
    step = Step((batch(1),), 1.0)
    run = loop(Toy(steps=(step, step), phase_metrics={"reward/mean": 0.5}), 2)
    assert [(r["phase"], r["step"], "reward/mean" in r, "time/collect" in r) for r in run.recorder.rows] == [
        (0, 1, True, True), (0, 2, False, False), (1, 3, True, True), (1, 4, False, False)]  # fmt: skip
    assert all(r["time/step"] >= 0 for r in run.recorder.rows)
    assert run.recorder.phases == [1, 2]


def test_randomness_of_a_phase_is_a_function_of_seed_and_phase() -> None:
    """torch, numpy and Python, whatever happened before: phase 1 of a resumed loop draws what phase 1 draws."""
    whole, resumed, other = Toy(), Toy(), Toy()
    state = loop(whole, 3).state
    torch.rand(5)
    loop(resumed, 3, state=LoopState(seed=7, phase=1, step=1))
    loop(other, 1, state=LoopState(seed=8))
    assert whole.drawn[1:] == resumed.drawn
    assert whole.drawn[0] != other.drawn[0] and len(set(whole.drawn)) == 3
    assert state.phase == 3
    seeds = {phase_seed(LoopState(seed=s, phase=p)) for s in (0, 1, 42, 123, 777) for p in range(200)}
    assert len(seeds) == 1000


def test_completions_are_shown(tmp_path: Any) -> None:
    run = start_run(GRPO(prompts_per_phase=3, group_size=2))
    run.go(2, log_completions=4)
    assert [r["phase"] for r in run.recorder.samples] == [0] * 4 + [1] * 4
    row = run.recorder.samples[0]
    assert (
        row["prompt"][0]["role"] == "user" and row["task"] == "sums" and row["breakdown"] == {"digits": row["reward"]}
    )
    assert row["finish_reason"] in ("stop", "length") and row["logprob"] < 0 and row["token_ids"]


def test_finished_runs_do_nothing() -> None:
    done = loop(Toy(), 2)
    again = loop(Toy(), 2, state=done.state)
    assert again.recorder.rows == [] and again.value() == 1.0
    assert_close(again.value(), torch.tensor(1.0), **EXACT)
