"""The formula that a method prints is the loss that it computes: evaluated over arrays from elsewhere, the same number
and the same gradient, for every field that changes it."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from alignlab import registry
from alignlab.recipe import algorithm_class
from alignlab.rollout import Reward
from alignlab.types import Step
from tests.algorithms.formula import (
    arrays,
    evaluate,
    inputs_read,
    mutants,
    numpy_functions,
    step_inputs,
    torch_functions,
)
from tests.algorithms.test_microbatches import digit_scores
from tests.algorithms.world import Run, collect, fill, flat, loss_and_gradient, nudge, start_run
from tests.tolerances import EXACT, FLOAT64

WITHOUT_FORMULA: tuple[str, ...] = ()
"""Methods whose loss cannot be printed yet."""

FOUR_BY_TWO = {"prompts_per_phase": 4, "group_size": 2}
TIGHT = {"clip_low": 0.1, "clip_high": 0.05}
AGGREGATIONS = ("token", "sequence", "constant")
KL: list[dict[str, Any]] = [
    {"kl_coef": 0.3, "kl_estimator": "k1"},
    {"kl_coef": 0.3, "kl_estimator": "k2"},
    {"kl_coef": 0.3, "kl_estimator": "k3"},
    {"kl_coef": 0.3, "kl_estimator": "k1", "kl_threshold": 0.06},
    {"kl_coef": 0.3, "kl_estimator": "k3", "kl_threshold": 0.06},
    {"kl_coef": 0.3, "kl_controller": "adaptive", "kl_estimator": "k2"},
    {"kl_coef": 0.3, "kl_controller": "phased", "kl_boundaries": (1, 2), "kl_estimator": "k2"},
    {"kl_coef": 0.3, "kl_controller": "lr_guard", "kl_boundaries": (1, 2), "kl_estimator": "k2"},
]
CASES: dict[str, list[dict[str, Any]]] = {
    "sft": [{"examples_per_step": 6}, {"examples_per_step": 6, "prompt_weight": 0.3}],
    "reward_model": [
        {"pairs_per_step": 6, "centering_coef": 0.0},
        {"pairs_per_step": 6, "centering_coef": 0.2, "use_margin": True},
        {"pairs_per_step": 6, "label_smoothing": 0.2, "use_margin": True},
    ],
    "dpo": [
        {"pairs_per_step": 6, "beta": 0.5},
        *({"pairs_per_step": 6, "variant": v} for v in algorithm_class("dpo").VARIANTS),
    ],
    "simpo": [{"pairs_per_step": 6}],
    "orpo": [{"pairs_per_step": 6}],
    "kto": [{"examples_per_step": 6, "beta": 0.5, "desirable_weight": 1.3, "undesirable_weight": 0.7}],
    "online_dpo": [{"prompts_per_phase": 6, "group_size": 3, "beta": 0.5}],
    "rejection": [{"prompts_per_phase": 6, "group_size": 3, "drop_constant": False}],
    "distill": [
        *({**FOUR_BY_TWO, **TIGHT, "aggregation": a} for a in AGGREGATIONS),
        {**FOUR_BY_TWO, **TIGHT, "gamma": 0.5},
        *({**FOUR_BY_TWO, "objective": "full", "aggregation": a} for a in AGGREGATIONS),
    ],
    "grpo": [
        {**FOUR_BY_TWO, **options, "aggregation": aggregation}
        for aggregation in AGGREGATIONS
        for options in (
            TIGHT,
            {"surrogate": "sequence", "clip_low": 0.02, "clip_high": 0.01},
            {"surrogate": "cispo", "clip_high": 0.05},
            TIGHT | {"dual_clip": 1.1},
            {"surrogate": "sequence", "clip_low": 0.02, "clip_high": 0.01, "dual_clip": 1.05},
            TIGHT | {"entropy_coef": 0.3},
            {"surrogate": "cispo", "clip_high": 0.05, "entropy_coef": 0.3, **KL[1]},
            TIGHT | {"kl_coef": 0.3, "kl_placement": "reward"},
            TIGHT | {"kl_coef": 0.3, "kl_placement": "none"},
            TIGHT | {"baseline": "leave_one_out"},
            *(TIGHT | kl for kl in (KL if aggregation == "sequence" else KL[4:6])),
        )
    ]
    + [{**FOUR_BY_TWO, "variant": v} for v in ("dr_grpo", "gspo", "rloo")]
    + [{**FOUR_BY_TWO, "variant": "cispo", "clip_high": 0.05}]
    + [{"prompts_per_phase": 8, "group_size": 8, "variant": "dapo", **TIGHT}],
    "ppo": [
        {**FOUR_BY_TWO, **TIGHT, "value_clip": 0.03, "value_coef": 0.3, **options}
        for options in (
            {},
            {"value_clip": None},
            {"value_coef": 0.7},
            {"entropy_coef": 0.3},
            {"dual_clip": 1.06},
            {"critic": "shared"},
            {"critic": "reward_model"},
            {"kl_placement": "none"},
            {"reward_placement": "dense"},
            {"reward_placement": "dense", "dense_reward": "potential"},
            {"reward_placement": "dense", "dense_reward": "given"},
            {"whiten_rewards": True, "whiten_advantages": False},
            {"at_cutoff": "bootstrap", "gamma": 0.9},
            *({"kl_placement": "loss", **kl} for kl in KL),
        )
    ],
}
"""Of each method, settings that change its formula, or must not."""
FLAT_CASES = [(method, options) for method, settings in CASES.items() for options in settings]


def moved(method: str, options: dict[str, Any]) -> tuple[Run, Any]:
    """A run, the first step of its first phase, and weights that have moved since."""
    rewards = [Reward(name="digits", function=digit_scores, weight=1.0)]
    scored = {"rewards": rewards} if options.get("dense_reward") == "given" else {}
    run = start_run(algorithm_class(method)(**options), **scored)
    if "value_model" in run.models:
        fill(run.models["value_model"].head, 78)
    trained = run.models["reward_model" if method == "reward_model" else "policy"]
    nudge(trained, 0.03, seed=9)  # not the reference any more
    step = collect(run)[0]
    if "kl_controller" in options:  # as after some phases
        run.state.algorithm["kl_coef"] = 0.45 if options["kl_controller"] in ("adaptive", "phased") else 0.3  # type: ignore[index]
    nudge(trained, 0.05, seed=14)  # ratios of tokens and rows on both sides of the clips, for either sign of advantage
    if method == "kto":  # as with a policy that has drifted
        pieces = (replace(b, reference_point=torch.full_like(b.reference_point, 0.3)) for b in step.microbatches)
        step = Step(tuple(pieces), step.normaliser)
    if "value_model" in run.models:
        nudge(run.models["value_model"].head, 0.05)
        if run.algorithm.critic != "shared":
            nudge(run.models["value_model"].backbone, 0.05, seed=6)
    return run, step


def test_every_method_is_here() -> None:
    assert not WITHOUT_FORMULA, "print their losses"
    assert sorted([*CASES, *WITHOUT_FORMULA]) == registry.names("algorithms")


@pytest.mark.parametrize("method, options", FLAT_CASES, ids=lambda x: str(x))
def test_the_formula_is_the_loss(method: str, options: dict[str, Any]) -> None:
    """With NumPy the same value; with tensors the same gradient of every trained weight. No name goes unread that the
    formula assigns, and every number but 0 and the bounds of +-20 matters."""
    run, step = moved(method, options)
    lines, inputs = run.algorithm.formula(), step_inputs(run, step)
    loss, gradient = loss_and_gradient(run, step)
    known = arrays(inputs)
    value = evaluate(lines, known, numpy_functions(known["mask"]))
    assert_close(loss, float(value), **FLOAT64)
    same = evaluate(lines, inputs, torch_functions(inputs["mask"]))
    assert_close(loss, same.item(), **FLOAT64)
    parameters = {
        f"{role}.{name}": p
        for role in run.optimizers
        for name, p in run.models[role].named_parameters()
        if f"{role}.{name}" in gradient
    }
    found = torch.autograd.grad(same, list(parameters.values()), allow_unused=True, retain_graph=True)
    by_formula = [torch.zeros_like(p) if g is None else g for g, p in zip(found, parameters.values(), strict=True)]
    assert_close(flat(dict(enumerate(by_formula))), flat(gradient), **FLOAT64)  # type: ignore[arg-type]


def outcome(lines: Any, inputs: dict[str, Any]) -> Tensor:
    """The loss and its gradient by every input that has one, in a row."""
    leaves = {
        k: v.detach().clone().requires_grad_()
        for k, v in inputs.items()
        if isinstance(v, Tensor) and v.requires_grad and v.is_floating_point()
    }
    given = {**inputs, **leaves}
    loss = evaluate(lines, given, torch_functions(inputs["mask"]))
    found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    parts = [torch.zeros_like(v) if g is None else g for g, v in zip(found, leaves.values(), strict=True)]
    return torch.cat([loss.reshape(1), *(p.flatten() for p in parts)]).detach()


@pytest.mark.parametrize("method", CASES)
def test_every_part_of_a_formula_counts(method: str) -> None:
    """Another number, sign, operator or function anywhere in any of its formulas gives another loss or gradient, in at
    least one of the settings that print it."""
    survivors: dict[str, bool] = {}
    for options in CASES[method]:
        run, step = moved(method, options)
        lines, inputs = run.algorithm.formula(), step_inputs(run, step)
        original = outcome(lines, inputs)
        assert original[0] != 0 and (original[1:] != 0).any()
        for which, changed in mutants(lines):
            try:
                other = outcome(changed, inputs)
                noticed = not torch.allclose(original, other, **FLOAT64, equal_nan=True)
            except (ValueError, RuntimeError, ZeroDivisionError):
                noticed = True
            survivors[which] = survivors.get(which, True) and not noticed
    assert not [which for which, survived in survivors.items() if survived]


def test_fields_that_change_the_loss_change_the_formula() -> None:
    """And those that act on advantages, returns or scores alone do not."""
    for method, inside, outside in (
        (
            "grpo",
            [{"surrogate": "sequence"}, {"surrogate": "cispo"}, {"clip_low": 0.1}, {"clip_high": 0.3},
             {"dual_clip": 3.0}, {"kl_coef": 0.1}, {"entropy_coef": 0.1}, {"aggregation": "token"},
             {"aggregation": "constant"}],
            [{"baseline": "leave_one_out"}, {"scale": "none"}, {"normalise_components": True}, {"epochs": 2},
             {"kl_coef": 0.1, "kl_placement": "reward"}, {"kl_coef": 0.1, "kl_placement": "none"}, {"max_redraws": 2},
             {"mask_truncated": True}, {"score_clip": 1.0}, {"kl_threshold": 0.1}, {"group_size": 4}],
        ),
        (
            "ppo",
            [{"clip_low": 0.1}, {"clip_high": 0.3}, {"dual_clip": 3.0}, {"value_clip": 0.1}, {"value_clip": None},
             {"value_coef": 0.5}, {"entropy_coef": 0.1}, {"kl_placement": "loss"}],
            [{"kl_placement": "none"}, {"kl_coef": 0.1}, {"kl_threshold": 0.1}, {"kl_controller": "adaptive"},
             {"critic": "shared"}, {"reward_placement": "dense"}, {"gamma": 0.9}, {"gae_lambda": 0.5}, {"epochs": 2},
             {"whiten_rewards": True}, {"at_cutoff": "bootstrap"}, {"score_clip": 1.0}],
        ),
    ):  # fmt: skip
        algorithm = algorithm_class(method)
        usual = algorithm().formula()
        printed = [algorithm(**options).formula() for options in inside]
        assert len({usual, *printed}) == len(inside) + 1
        assert {algorithm(**options).formula() for options in outside} == {usual}
        for kl in KL:
            lines = algorithm(**({"kl_placement": "loss"} | kl)).formula()
            moves = kl.get("kl_controller") in ("adaptive", "phased")
            assert ("kl_coef" in inputs_read(lines)) == moves and any("0.3" in line for line in lines) != moves


# ---- the evaluator itself --------------------------------------------------------------------------------------------


def test_by_hand() -> None:
    """x = (1, -2; 3, 9), the 9 outside the mask: row means -.5 and 3, sum 2.5; clipped to +-2 and squared: 1 + 4 + 4;
    2 * 9 / 4 - 2.5 = 2."""
    mask = np.array([[1.0, 1.0], [1.0, 0.0]])
    lines = (
        "y = clip(x, -2, 2)**2",
        "z = where(mask > 0, y, 0)",
        "loss = 2 * sum(z) / rows - sum(row_mean(x))",
    )
    x = np.array([[1.0, -2.0], [3.0, 9.0]])
    assert evaluate(lines, {"x": x, "mask": mask, "rows": 4}, numpy_functions(mask)) == 2.0
    assert inputs_read(lines) == {"x", "mask", "rows"}
    tensors = {"x": torch.tensor(x), "mask": torch.tensor(mask), "rows": 4}
    assert evaluate(lines, tensors, torch_functions(tensors["mask"])).item() == 2.0


def test_functions_agree() -> None:
    """NumPy's and torch's, over one row each; log1mexp is log(1 - e^x)."""
    x, mask = np.array([[-0.3, -1.5]]), np.ones((1, 2))
    tensor = torch.tensor(x)
    numpy_, torch_ = numpy_functions(mask), torch_functions(torch.tensor(mask))
    assert numpy_.keys() == torch_.keys()
    arguments: dict[str, Any] = {"clip": (-1, 1), "maximum": (-1,), "minimum": (-1,)}
    for name in numpy_.keys() - {"where"}:
        sign = -1 if name in ("log", "sqrt") else 1
        rest = arguments.get(name, ())
        assert_close(torch_[name](sign * tensor, *rest).numpy(), np.asarray(numpy_[name](sign * x, *rest)), **FLOAT64)
    assert_close(numpy_["where"](x < -1, x, 0), torch_["where"](tensor < -1, tensor, 0).numpy(), **EXACT)
    assert_close(float(numpy_["log1mexp"](-0.3)), math.log(1 - math.exp(-0.3)), **FLOAT64)
    assert_close(float(numpy_["log_sigmoid"](-0.3)), math.log(1 / (1 + math.exp(0.3))), **FLOAT64)


@pytest.mark.parametrize(
    "line, message",
    [
        ("loss = x.sum()", "not in the language"),
        ("loss = __import__('os')", "not in the language"),
        ("loss = sum(x, axis=0)", "not in the language"),
        ("loss = [x]", "not in the language"),
        ("loss = x if x else y", "not in the language"),
        ("loss = True", "not in the language"),
        ("loss = y", "reads 'y', which it has not been given; there are: .*'x'"),
        ("x", "not an assignment"),
        ("a.b = x", "not an assignment to a name"),
        ("a = x; b = x", "not an assignment"),
    ],
)
def test_anything_else_is_an_error(line: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate((line,), {"x": np.ones(2)}, numpy_functions())
