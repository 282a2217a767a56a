"""`alignlab explain`: the printed formula is the executed loss, the printed arithmetic is what a run does, and neither
needs a model, a network or a file that is not here."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import transformers
from pydantic import ValidationError
from rich.console import Console
from torch.testing import assert_close

from alignlab import registry
from alignlab.algorithms import Hyperparameters
from alignlab.errors import UserError
from alignlab.explain import Explained, explain, explain_stage, render
from alignlab.explain.facts import facts_of
from alignlab.explain.loss import GLOSSARY, free_names
from alignlab.optim import Schedule
from alignlab.recipe import DataSection, ModelSection, Stage, TrainSection, algorithm_class, load_recipe, read_mapping
from alignlab.rollout import Reward
from alignlab.types import LoopState, Step
from tests.algorithms.formula import arrays, evaluate, numpy_functions, step_inputs
from tests.algorithms.test_microbatches import CASES, digit_scores, first_step
from tests.algorithms.world import MAX_TOKENS, Run, collect, loss_and_gradient, start_run
from tests.runs import RECIPES, ROOT, alignlab, debug_run, strict_json, write_rows
from tests.tolerances import FLOAT64

EXAMPLE = ROOT / "docs" / "methods" / "example.txt"
SHOWN = ("explain", "recipes/starter/grpo.yaml", "algorithm.kl_coef=0.04")
HEADING = "Loss of an optimiser step, minimised"
METHODS = registry.names("algorithms")


# ---- what is printed -------------------------------------------------------------------------------------------------


def stage_of(algorithm: Any, **changes: Any) -> Stage:
    """A stage whose data nobody has to read."""
    data = DataSection(hub="somebody/data", max_completion_tokens=MAX_TOKENS, task="reasoning")
    given = {"reward_model": "runs/rm", "teacher": "starter", "data": data, **changes}
    return Stage(name="stage", algorithm=algorithm, **given)


def printed(stage: Stage, width: int = 80) -> str:
    explained = Explained(name="x", seed=0, stages=(explain_stage(facts_of(stage, {}), {}),))
    console = Console(width=width, highlight=False, force_terminal=False)
    with console.capture() as capture:
        console.print(render(explained, width))
    return capture.get()


def printed_formula(text: str) -> tuple[str, ...]:
    """The assignments under the heading, continuation lines joined."""
    below = text.split(f"{HEADING}\n")[1].split("\n\n")[0].splitlines()
    found: list[str] = []
    for line in below:
        assert line.startswith("    ")
        if line.startswith(" " * 8):
            found[-1] += f" {line.strip()}"
        else:
            found.append(line.strip())
    return tuple(found)


# ---- the printed formula is the executed loss ------------------------------------------------------------------------


def evaluated(formula: tuple[str, ...], run: Run, step: Step) -> float:
    """The loss that the lines say, over arrays from raw forward passes."""
    inputs = arrays(step_inputs(run, step))
    return float(evaluate(formula, inputs, numpy_functions(inputs["mask"])))


def check_printed_formula(algorithm: Any, width: int = 60) -> None:
    run, step = first_step(algorithm, 4)
    executed, _ = loss_and_gradient(run, step)
    formula = printed_formula(printed(stage_of(algorithm), width))
    assert formula == algorithm.formula()
    assert_close(evaluated(formula, run, step), executed, **FLOAT64)


@pytest.mark.parametrize("algorithm", CASES.values(), ids=CASES.keys())
def test_the_printed_formula_is_the_executed_loss(algorithm: Any) -> None:
    check_printed_formula(algorithm)


def others(method: type[Hyperparameters], base: Any) -> Iterator[tuple[str, Any]]:
    """(field, the base with another value of it), for every value that the method accepts."""
    for name, field in method.model_fields.items():
        if name in ("name", "preset"):
            continue
        value = getattr(base, name)
        tried: list[Any] = []
        match value:
            case bool():
                tried = [not value]
            case int():
                tried = [value + 1, 2 * value]
            case float():
                tried = [1.5 * value, 0.5 * value, value + 0.25]
            case str():
                tried = [v for v in getattr(field.annotation, "__args__", ()) if v != value]
            case tuple():
                tried = [(*value, 7), tuple(reversed(value)), tuple(2 * v for v in value)]
            case None:
                kinds = str(field.annotation)
                tried = list(method.VARIANTS) if name == "variant" else [1.5, 0.01] if "float" in kinds else [3, 1]
        for other in tried:
            given = {k: v for k, v in base if k in base.model_fields_set and k != name}
            try:
                made = method(**{**given, name: other})
            except (ValidationError, TypeError):
                continue
            if getattr(made, name) != value:
                yield name, made


SMALL = {"prompts_per_phase": 4, "group_size": 2, "examples_per_step": 8, "pairs_per_step": 8}
RICH: dict[str, list[dict[str, Any]]] = {
    "ppo": [{"kl_placement": "loss", "entropy_coef": 0.1, "dual_clip": 3.0, "clip_low": 0.1, "clip_high": 0.05},
            {"kl_placement": "loss", "kl_controller": "adaptive", "kl_estimator": "k3", "kl_threshold": 0.001}],
    "grpo": [{"kl_coef": 0.2, "entropy_coef": 0.1, "dual_clip": 3.0, "clip_low": 0.1, "clip_high": 0.05},
             {"kl_coef": 0.2, "kl_estimator": "k2", "surrogate": "sequence", "clip_low": 0.01, "clip_high": 0.01},
             {"kl_coef": 0.2, "kl_threshold": 0.001, "surrogate": "cispo", "clip_high": 0.05}],
    "dpo": [{"loss_kind": "robust", "label_smoothing": 0.1, "rpo_alpha": 0.5}],
    "online_dpo": [{"loss_kind": "sigmoid", "label_smoothing": 0.1, "average_logprobs": True}],
    "reward_model": [{"use_margin": True, "label_smoothing": 0.1}],
    "rejection": [{"drop_constant": False}],
    "sft": [{"prompt_weight": 0.3}],
    "distill": [{"clip_low": 0.1, "clip_high": 0.05}, {"objective": "full"}],
}  # fmt: skip
"""Combinations in which the fields of the loss have an effect."""


def bases(name: str) -> list[Any]:
    method = algorithm_class(name)
    sizes = {k: v for k, v in SMALL.items() if k in method.model_fields}
    return [method(**sizes, **extra) for extra in RICH.get(name, [{}])]


IN_LOSS = (
    *("clip", "coef", "kl_", "beta", "gamma", "alpha", "smoothing", "weight", "loss_kind", "average", "aggregation"),
    *("surrogate", "margin", "objective", "variant"),
)
"""Parts of the names of fields that may stand in a loss; the others make its inputs, or its sizes."""


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_the_printed_formula_follows_every_field(name: str) -> None:
    for base in bases(name):
        for field, algorithm in others(type(base), base):
            in_loss = any(part in field for part in IN_LOSS) and not field.startswith("score_")
            if in_loss:
                check_printed_formula(algorithm)


@pytest.mark.parametrize(("text", "other"), [("-advantages * ratio", "advantages * ratio"), ("0.95", "0.96"),
                                             ("/ completion_tokens", "/ rows")])  # fmt: skip
def test_a_wrong_formula_is_noticed(text: str, other: str) -> None:
    algorithm = CASES["ppo/own"].model_copy(update={"clip_low": 0.05})
    run, step = first_step(algorithm, 4)
    formula = printed_formula(printed(stage_of(algorithm)))
    assert text in " ".join(formula)
    wrong = tuple(line.replace(text, other) for line in formula)
    executed = loss_and_gradient(run, step)[0]
    assert_close(evaluated(formula, run, step), executed, **FLOAT64)
    assert abs(evaluated(wrong, run, step) - executed) > 1e-6


@pytest.mark.parametrize("name", METHODS)
def test_every_input_of_every_formula_is_explained(name: str) -> None:
    for base in bases(name):
        for _, algorithm in ((None, base), *others(type(base), base)):
            assert not [n for n in free_names(algorithm.formula()) if n not in GLOSSARY]


EXPLAINED_UNDER: dict[str, list[dict[str, Any]]] = {
    "ppo": [{"kl_controller": "adaptive"}, {"kl_controller": "phased", "kl_boundaries": (3, 5)},
            {"kl_controller": "lr_guard", "kl_boundaries": (3, 5)}, {"score_normaliser": "ema"},
            {"reward_placement": "dense"}, {"reward_placement": "dense", "dense_reward": "potential"}],
    "grpo": [{"kl_coef": 0.1, "kl_controller": "adaptive"},
             {"kl_coef": 0.1, "kl_controller": "phased", "kl_boundaries": (3, 5)},
             {"kl_controller": "lr_guard", "kl_boundaries": (3, 5)},
             {"score_normaliser": "ema", "baseline": "ema", "scale": "none"}],
    "rejection": [{"score_normaliser": "ema"}, {"min_reward": 0.5}],
    "online_dpo": [{"score_normaliser": "ema"}],
}  # fmt: skip
"""More combinations, in which the fields that make the inputs have an effect."""


@pytest.mark.parametrize("name", METHODS)
def test_no_field_goes_unexplained(name: str) -> None:
    """Changing any field changes what is said, apart from the lists of changed fields and differences."""
    method = algorithm_class(name)
    more = [method(**extra) for extra in EXPLAINED_UNDER.get(name, [])]
    silent = {field for field in method.model_fields if field not in ("name", "preset", "variant")}
    for base in (*bases(name), *more):
        said = content(base)
        silent -= {field for field, algorithm in others(method, base) if content(algorithm) != said}
    assert not silent


def content(algorithm: Any) -> Any:
    stage = stage_of(algorithm, train=TrainSection(num_phases=9))
    explained = explain_stage(facts_of(stage, {}), {})
    return explained.formula, explained.sections, explained.numbers


# ---- the printed arithmetic is what a run does -----------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", CASES.values(), ids=CASES.keys())
def test_the_arithmetic_is_that_of_a_phase(algorithm: Any) -> None:
    """Steps, rows and microbatches as `collect` makes them, in microbatches of four rows."""
    scored = {"rewards": [Reward(name="digits", function=digit_scores, weight=1.0)]}
    run = start_run(
        algorithm, microbatch_rows=4, **(scored if getattr(algorithm, "dense_reward", "") == "given" else {})
    )
    steps = collect(run)
    stage = stage_of(algorithm, train=TrainSection(num_phases=3, microbatch_rows=4))
    found = explain_stage(facts_of(stage, {}), {}).numbers
    assert len(steps) == found["steps_per_phase"] and 3 * len(steps) == found["optimizer_steps"]
    rows, pieces = sum(len(b) for s in steps for b in s.microbatches), sum(len(s.microbatches) for s in steps)
    if found["may_be_less"]:
        assert 3 * rows <= found["trained_rows"] and 3 * pieces <= found["microbatches"]
    else:
        assert 3 * rows == found["trained_rows"] and 3 * pieces == found["microbatches"]
        assert sum(len(b) for b in steps[0].microbatches) == found["rows_per_step"]
        assert len(steps[0].microbatches) == found["microbatches_per_step"]


def numbers_of(text: str, folder: Path, *overrides: str) -> dict[str, Any]:
    path = folder / "recipe.yaml"
    path.write_text(text, "utf-8")
    return dict(explain(load_recipe(path, overrides)).stages[0].numbers)


def test_ppo_by_hand(tmp_path: Path) -> None:
    """15 prompts x 2 = 30 completions; 4 minibatches of 8, 8, 7, 7 rows in microbatches of 3: 3 each; 2 epochs."""
    found = numbers_of(
        "data: {task: [reasoning, code], max_completion_tokens: 10}\n"
        "algorithm: {name: ppo, prompts_per_phase: 15, group_size: 2, epochs: 2, minibatches: 4}\n"
        "train: {num_phases: 7, microbatch_rows: 3}\n",
        tmp_path,
    )
    expected = {
        "completions_per_phase": 30, "completions": 210, "prompts": 105, "generated_tokens_at_most": 2100,
        "steps_per_phase": 8, "optimizer_steps": 56, "rows_per_step": 8, "microbatches_per_step": 3,
        "microbatches": 7 * 2 * 4 * 3, "trained_rows": 7 * 2 * 30, "may_be_less": False, "items": 2400,
    }  # fmt: skip
    assert found.items() >= expected.items()
    assert found["passes_over_the_data"] == pytest.approx(105 / 2400)


def test_pairs_by_hand(tmp_path: Path) -> None:
    """10 pairs in microbatches of 7 rows, so of 3 pairs: 4 of them; 1,200 pairs are 120 phases a pass."""
    text = "data: {task: safety}\nalgorithm: {name: dpo, pairs_per_step: 10}\n"
    text += "train: {microbatch_rows: 7, num_phases: 30}\n"
    found = numbers_of(text, tmp_path)
    assert (found["microbatches_per_step"], found["rows_per_step"], found["completions"]) == (4, 20, 0)
    assert (found["optimizer_steps"], found["trained_rows"], found["passes_over_the_data"]) == (30, 600, 0.25)
    found = numbers_of(text, tmp_path, "train={epochs: 2}")
    assert (found["phases"], found["passes_over_the_data"]) == (240, 2.0)


def test_redraws_and_what_is_left_out_are_bounds(tmp_path: Path) -> None:
    text = "data: {task: safety, max_completion_tokens: 5}\nreward: {length: {limit: 3, buffer: 2}}\n"
    text += "algorithm: {name: grpo, prompts_per_phase: 3, group_size: 4, variant: dapo, max_redraws: 4}\n"
    text += "train: {num_phases: 2}\n"
    found = numbers_of(text, tmp_path)
    assert found["completions"] == 24 and found["completions_with_every_redraw"] == 24 * 5 and found["may_be_less"]
    assert found["generated_tokens_at_most"] == 24 * 5 * 5
    printed_text = " ".join(alignlab("explain", tmp_path / "recipe.yaml").out.split())
    assert "at most 12 rows" in printed_text and "+ at most 48 of prompts drawn again" in printed_text


DEBUG = ("sft", "reward_model", "dpo", "ppo", "grpo")


@pytest.mark.parametrize("name", DEBUG)
def test_the_arithmetic_is_that_of_a_debug_run(name: str) -> None:
    """What is said of `--debug` beforehand is what the ledger of such a run says afterwards."""
    ledger = json.loads((debug_run(f"starter/{name}.yaml") / "stage.json").read_text("utf-8"))["ledger"]
    result = alignlab("explain", RECIPES / "starter" / f"{name}.yaml", "--debug", "--json")
    found = strict_json(result.out)["stages"][0]["numbers"]
    for mine, of_ledger in {"phases": "phases", "optimizer_steps": "optimizer_steps", "completions": "completions",
                            "prompts": "prompts", "trained_rows": "trained_rows"}.items():  # fmt: skip
        assert found[mine] == ledger[of_ledger], mine
    assert ledger["generated_tokens"] <= found["generated_tokens_at_most"]


def test_learning_rates_and_late_roles(tmp_path: Path) -> None:
    """PPO's critic alone for 5 steps of 2 a phase; warm-up over 2.5 of 10 phases: 1/3, 2/3, 1."""
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "data: {task: reasoning}\n"
        "algorithm: {name: ppo, learning_rate: 3e-4, value_warmup_steps: 5, epochs: 2}\n"
        "train: {num_phases: 10, schedule: {shape: linear, warmup: 0.25, floor: 0.1}}\n",
        "utf-8",
    )
    batch = explain(load_recipe(path)).stages[0].sections["batch"]
    said = dict(batch.lines)
    last = Schedule(shape="linear", warmup=0.25, floor=0.1).factor(9, 10)
    assert f"peak 0.0003, first phase 0.0001, last {3e-4 * last:.3g}" in said["policy"]
    assert "optimiser step 5, in phase 2" in said["policy"] and "starts at" not in said["value model"]
    assert "first 3 of 10 phases" in said["schedule"]
    never = explain(load_recipe(path, ["algorithm.value_warmup_steps=20"])).stages[0].sections["batch"]
    assert any("policy never learns" in remark for remark in never.remarks)


# ---- honest remarks --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("algorithm", "section", "said"),
    [
        ({"name": "grpo", "kl_coef": 0.1, "kl_estimator": "k1"}, "kl", "gradient of mean zero"),
        ({"name": "grpo", "kl_coef": 0.1}, "kl", "only nearly"),
        ({"name": "grpo", "kl_coef": 0.1, "kl_estimator": "k2"}, "kl", "gradient of the true reverse KL"),
        ({"name": "grpo", "kl_coef": 0.1, "kl_placement": "reward", "kl_estimator": "k3"}, "kl", "only k1 gives"),
        ({"name": "grpo"}, "loss", "nothing is ever clipped"),
        ({"name": "ppo", "epochs": 1}, "loss", "nothing is ever clipped"),
        ({"name": "ppo", "reward_placement": "dense"}, "credit", "late tokens get too little credit"),
        ({"name": "ppo", "kl_controller": "adaptive"}, "kl", "The controller is slow here: at most 0.13 % a phase"),
        ({"name": "grpo", "score_normaliser": "ema"}, "reward", "the running normaliser cancels out"),
        ({"name": "grpo", "aggregation": "constant"}, "loss", "the learning rate depends on that limit"),
        ({"name": "grpo", "variant": "gspo"}, "loss", "A clip of 0.0003 is below rounding, about 0.005 nats a token"),
        ({"name": "ppo", "clip_low": 0.004}, "loss", "A clip of 0.004 is below rounding"),
    ],
)
def test_remarks(algorithm: dict[str, Any], section: str, said: str) -> None:
    stage = stage_of(algorithm, reward={"length": {"limit": 3, "buffer": 2}})
    found = explain_stage(facts_of(stage, {}), {}).sections[section]
    assert any(said in remark for remark in found.remarks), found.remarks


def test_a_component_whose_tasks_are_not_the_datas_is_remarked() -> None:
    for tasks, silent in (("code", True), ("reasoning", False), ((), False)):
        stage = stage_of({"name": "grpo"}, reward={"length": {"tasks": tasks}})
        remarks = explain_stage(facts_of(stage, {}), {}).sections["reward"].remarks
        assert any("length: none of the tasks is in data.task" in remark for remark in remarks) == silent


def test_the_controller_is_as_slow_as_it_is_said_to_be() -> None:
    """The most that a phase of 64 completions moves kl_coef by, whatever the KL: .2 x 64 / 10,000 = .128 %."""
    algorithm = algorithm_class("ppo")(kl_controller="adaptive", kl_coef=1.0)
    measured = {"kl_coef": 1.0, "kl_per_sequence": 1e9, "kl_completions": 64.0}
    moved = algorithm.controlled(LoopState(seed=0, phase=1, algorithm=measured)).algorithm["kl_coef"]  # type: ignore[attr-defined]
    found = explain_stage(facts_of(stage_of(algorithm, train=TrainSection(num_phases=3)), {}), {}).sections["kl"]
    assert f"at most {100 * (moved - 1):.2g} % a phase, a factor of {moved**2:.3g} over the run" in " ".join(
        found.remarks
    )


def test_remarks_are_made_only_where_they_hold() -> None:
    two_steps = explain_stage(facts_of(stage_of({"name": "grpo", "epochs": 2, "kl_coef": 0.0}), {}), {})
    assert not any("clipped" in remark for remark in two_steps.sections["loss"].remarks)
    assert "nowhere: kl_coef is 0" in dict(two_steps.sections["kl"].lines)["where"]
    exact = {"algorithm": {"name": "grpo", "variant": "gspo"}, "model": ModelSection(dtype="float32")}
    for stage in (stage_of(**exact), stage_of({"name": "grpo", "variant": "cispo", "clip_low": 1e-4})):
        loss = explain_stage(facts_of(stage, {}), {}).sections["loss"]
        assert not any("below rounding" in remark for remark in loss.remarks)


# ---- what does nothing -----------------------------------------------------------------------------------------------

IDLE: list[tuple[str, dict[str, Any], str, Any]] = [
    ("grpo", {}, "kl_estimator", "k2"),
    ("grpo", {}, "kl_placement", "reward"),
    ("grpo", {}, "kl_threshold", 0.1),
    ("grpo", {}, "clip_high", 0.01),
    ("grpo", {"epochs": 2, "variant": "cispo"}, "clip_low", 0.01),
    ("grpo", {"kl_coef": 0.1}, "kl_target_per_sequence", 3.0),
    ("grpo", {"kl_coef": 0.1}, "kl_horizon", 5.0),
    ("grpo", {"kl_coef": 0.1, "kl_controller": "adaptive"}, "kl_targets_per_token", (0.1,)),
    ("grpo", {"kl_coef": 0.1}, "kl_boundaries", (1,)),
    ("grpo", {}, "lr_guard_patience", 1),
    ("ppo", {}, "lr_guard_factor", 0.1),
    ("ppo", {"kl_placement": "none"}, "kl_coef", 0.3),
    ("ppo", {}, "shaping_coef", 3.0),
    ("ppo", {}, "ema_decay", 0.5),
    ("ppo", {"epochs": 1}, "value_clip", 0.001),
    ("ppo", {"epochs": 1}, "stop_epochs_above_kl", 1e-9),
    ("distill", {}, "clip_low", 0.01),
    ("distill", {"objective": "full"}, "gamma", 0.7),
    ("distill", {"objective": "full", "epochs": 2}, "clip_low", 0.01),
    ("rejection", {}, "reward_scale", 3.0),
    ("rejection", {}, "score_normaliser", "ema"),
    ("rejection", {"min_reward": 0.3, "keep": None}, "keep", 5),
    ("online_dpo", {}, "reward_scale", 3.0),
]
"""Method, settings, and a field that does nothing under them, with a value that is not the default."""
AT_WORK: list[tuple[str, dict[str, Any]]] = [
    ("grpo", {"kl_coef": 0.1, "kl_estimator": "k2", "kl_placement": "reward", "kl_threshold": 0.1}),
    ("grpo", {"epochs": 2, "clip_low": 0.1, "clip_high": 0.1, "dual_clip": 3.0}),
    ("grpo", {"baseline": "ema", "scale": "none", "ema_decay": 0.5}),
    ("ppo", {"kl_controller": "adaptive", "kl_target_per_sequence": 3.0, "kl_horizon": 5.0}),
    ("ppo", {"kl_controller": "lr_guard", "kl_targets_per_token": (0.1, 0.2), "kl_boundaries": (3,),
             "lr_guard_factor": 0.1, "lr_guard_patience": 1}),
    ("ppo", {"reward_placement": "dense", "dense_reward": "potential", "shaping_coef": 2.0}),
    ("ppo", {"stop_epochs_above_kl": 0.1, "value_clip": 0.5}),
    ("distill", {"gamma": 0.5, "epochs": 2, "clip_low": 0.1}),
    ("rejection", {"min_reward": 0.5, "reward_scale": 2.0, "score_normaliser": "ema", "ema_decay": 0.5}),
    ("rejection", {"missing_stop_penalty": 1.0, "reward_scale": 2.0, "keep": 2}),
]  # fmt: skip


def idle_keys(algorithm: Any) -> set[str]:
    """Of the method's own."""
    found = explain_stage(facts_of(stage_of(algorithm), {}), {}).idle
    return {key.removeprefix("algorithm.") for key in found if key.startswith("algorithm.")}


@pytest.mark.parametrize(("name", "settings", "field", "value"), IDLE)
def test_what_is_said_to_do_nothing_changes_no_weight(
    name: str, settings: dict[str, Any], field: str, value: Any
) -> None:
    method, small = algorithm_class(name), {"prompts_per_phase": 4, "group_size": 3, "learning_rate": 0.01}
    weights = []
    for more in ({}, {field: value}):
        algorithm = method(**{**small, **settings, **more})
        assert idle_keys(algorithm) == more.keys()
        run = start_run(algorithm)
        run.go(2)
        weights.append(torch.cat([p.detach().flatten() for p in run.models["policy"].parameters()]))
    assert torch.equal(*weights)


@pytest.mark.parametrize(("name", "settings"), AT_WORK)
def test_nothing_is_said_of_what_is_at_work(name: str, settings: dict[str, Any]) -> None:
    assert idle_keys(algorithm_class(name)(**settings)) == set()


@pytest.mark.parametrize("name", METHODS)
def test_what_a_table_brings_along_is_nobodys_mistake(name: str) -> None:
    method = algorithm_class(name)
    for table, rows in (("preset", method.PRESETS), ("variant", method.VARIANTS)):
        assert not any(idle_keys(method(**{table: row})) for row in rows)


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("data: {validation_fraction: 0.2}", "data.validation_fraction"),
        ("data: {hub: a/b, validation_split: test, validation_fraction: 0.2}", "data.validation_fraction"),
        ("data: {hub_config: main}", "data.hub_config"),
        ("data: {path: sums.jsonl, split: train}", "data.split"),
        ("data: {path: sums.jsonl, validation_split: test, validation_fraction: 0.2}", "data.validation_split"),
        (
            "data: {path: sums.jsonl, validation_split: 'train[4:]', validation_fraction: 0.2}",
            "data.validation_fraction",
        ),
        ("data: {path: sums.jsonl, split: 'train[:4]', validation_fraction: 0.2}", None),
        ("train: {schedule: {floor: 0.1}}", "train.schedule.floor"),
        ("evaluation: {greedy: true, samples: 4}", "evaluation.samples"),
        ("evaluation: {every: 4, prompts_per_task: 0}", "evaluation.every"),
        ("evaluation: {encoder: minilm, measures: rouge}", "evaluation.encoder"),
        ("evaluation: {word_limit: 5}", "evaluation.word_limit"),
        ("evaluation: {word_limit: 5, measures: verbosity}", None),
        ("reward: {exact: 1}", "reward"),
        ("algorithm: grpo\nreward: {exact: 1}\nreward_model: .", "reward_model"),
        ("algorithm: grpo\nreward: {learned: 1}\nreward_model: .\nevaluation: {samples: 4}", None),
        ("data: {hub: a/b, system_prompt: Be brief., hub_config: c, validation_fraction: 0.2}", None),
        ("train: {schedule: {floor: 0.1, shape: linear}}\nevaluation: {best_of: 2}\nreward: {exact: 1}", None),
    ],
)
def test_keys_of_other_sections_that_do_nothing(tmp_path: Path, text: str, key: str | None) -> None:
    path = tmp_path / "recipe.yaml"
    write_rows(tmp_path / "sums.jsonl", [{"prompt": f"{i} + 1", "completion": str(i + 1)} for i in range(9)])
    path.write_text(text if "algorithm" in text else f"{text}\nalgorithm: sft", "utf-8")
    stage = load_recipe(path, ["data.task=reasoning"]).stages[0]
    assert set(explain_stage(facts_of(stage, {}), {}).idle) == ({key} if key else set())


def test_a_key_that_does_nothing_is_a_remark() -> None:
    shown = " ".join(printed(stage_of({"name": "distill", "objective": "full", "gamma": 0.5})).split())
    assert "! algorithm.gamma does nothing here: objective full differentiates" in shown


# ---- presets ---------------------------------------------------------------------------------------------------------

PPO = "data: {task: reasoning}\nalgorithm: {name: ppo, epochs: 2}\n"


def loaded(folder: Path, text: str, *overrides: str) -> Any:
    path = folder / "recipe.yaml"
    path.write_text(text, "utf-8")
    return load_recipe(path, overrides)


@pytest.mark.parametrize(
    ("text", "overrides", "preset"),
    [
        (f"preset: trl\n{PPO}", (), "trl"),
        (PPO, ("preset=trl",), "trl"),
        (f"preset: verl\n{PPO}", ("algorithm.preset=trl",), "trl"),
        (f"preset: trl\n{PPO}", ("algorithm.preset=null",), None),
        (f"preset: null\n{PPO}", (), None),
        ("preset: trl\ndata: {task: reasoning}\nstages: [{algorithm: {name: ppo, epochs: 2}}]\n", (), "trl"),
        (
            "preset: verl\ndata: {task: reasoning}\nstages: [{preset: trl, algorithm: {name: ppo, epochs: 2}}]\n",
            (),
            "trl",
        ),
    ],
)
def test_preset_beside_the_algorithm(tmp_path: Path, text: str, overrides: tuple[str, ...], preset: str | None) -> None:
    """It is the algorithm's, which has the last word; what the recipe says goes over it."""
    recipe = loaded(tmp_path, text, *overrides)
    algorithm = recipe.stages[0].algorithm
    wanted = {**type(algorithm).PRESETS.get(preset, {}), "epochs": 2}
    assert algorithm.preset == preset and wanted.items() <= algorithm.model_dump().items()
    again = tmp_path / "again.yaml"
    again.write_text(recipe.to_yaml(), "utf-8")
    assert load_recipe(again) == recipe


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (f"preset: tlr\n{PPO}", ("algorithm: no preset 'tlr'", "did you mean 'trl'?", "there are: paper, trl, verl")),
        (f"preset: [trl]\n{PPO}", ("no preset ['trl']",)),
        (f"prest: trl\n{PPO}", ("prest: unknown key; did you mean 'preset'?",)),
        (f"train: {{preset: trl}}\n{PPO}", ("train.preset", "it belongs into algorithm")),
        (
            "preset: paper\ndata: {task: code}\nalgorithm: sft\n",
            ("no preset 'paper'", "there are: trl, verl, openrlhf"),
        ),
    ],
)
def test_a_preset_that_does_not_exist(tmp_path: Path, text: str, said: tuple[str, ...]) -> None:
    with pytest.raises(UserError) as error:
        loaded(tmp_path, text)
    assert len(str(error.value).splitlines()) == 1
    assert all(part in str(error.value) for part in said), error.value


def test_preset_variant_and_what_the_recipe_changes_are_shown(tmp_path: Path) -> None:
    text = "preset: trl\ndata: {task: reasoning}\n"
    text += "algorithm: {name: grpo, variant: dr_grpo, group_size: 8, clip_low: 0.3}\n"
    stage = explain(loaded(tmp_path, text)).stages[0]
    assert (stage.preset, stage.variant, dict(stage.changed)) == ("trl", "dr_grpo", {"clip_low": ("0.3", "0.2")})
    shown = " ".join(alignlab("explain", tmp_path / "recipe.yaml").out.split())
    assert "preset trl, variant dr_grpo" in shown and "clip_low 0.3 (not 0.2)" in shown


@pytest.mark.parametrize("name", METHODS)
def test_presets_hold_what_a_recipe_could_say_and_make_the_table(name: str) -> None:
    method = algorithm_class(name)
    for table in ("PRESETS", "VARIANTS"):
        for row, given in getattr(method, table).items():
            made = method(**{table.lower()[:-1]: row})
            assert all(getattr(made, k) == v for k, v in given.items()), (table, row)
    table = explain_stage(facts_of(stage_of(method()), {}), {}).differences
    assert table.columns == ("here", *[p for p in ("paper", "trl", "verl", "openrlhf") if p in method.PRESETS])
    assert table.departures == method.DEPARTURES
    for preset, column in zip(table.columns[1:], range(1, 9), strict=False):
        told = {field for field, cells in table.rows.items() if not cells[column].startswith("(")}
        assert told == set(method.PRESETS[preset]) & table.rows.keys()
    for preset in method.PRESETS:  # taken as it is, the recipe differs from it in nothing
        table = explain_stage(facts_of(stage_of(method(preset=preset)), {}), {}).differences
        column = table.columns.index(preset)
        assert all(cells[0] == cells[column].strip("()") for cells in table.rows.values())


# ---- every recipe, without a model or a network ----------------------------------------------------------------------


def whole_recipes() -> list[str]:
    """All that can be explained: what `make starter` trains on is made on its way, and may not be here; what prepared
    data need is explained where they are (test_data_folder)."""
    found = sorted(p.relative_to(RECIPES).as_posix() for p in RECIPES.rglob("*.yaml"))
    return [
        n
        for n in found
        if not n.startswith(("studies/", "starter/pretrain"))
        and not (n.startswith("real/") and n.count("/") > 1)
        and read_mapping(RECIPES / n).keys() & {"algorithm", "stages"}
    ]


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever loads a model or a tokenizer, or asks the network, fails."""

    def refuse(*arguments: object, **options: object) -> None:
        raise AssertionError("explain must neither load nor download anything")

    for kind in ("AutoModelForCausalLM", "AutoConfig", "AutoTokenizer", "GenerationConfig", "PreTrainedModel",
                 "PreTrainedTokenizerFast"):  # fmt: skip
        monkeypatch.setattr(getattr(transformers, kind), "from_pretrained", refuse)
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_config", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(torch.nn.Module, "__init__", refuse)


@pytest.mark.parametrize("name", whole_recipes())
def test_every_recipe_is_explained(name: str, alone: None) -> None:
    result = alignlab("explain", RECIPES / name)
    assert result.code == 0 and not result.err, result.err
    assert "\x1b" not in result.out and max(map(len, result.out.splitlines())) <= 80
    recipe = load_recipe(RECIPES / name)
    assert result.out.count(HEADING) == len(recipe.stages) and result.out.count("\nBatch\n") == len(recipe.stages)
    assert str(ROOT) not in result.out


def test_what_explains_imports_no_library_that_only_models_need() -> None:
    code = (
        "import sys; from pathlib import Path; from alignlab.explain import explain;"
        "from alignlab.recipe import load_recipe; explain(load_recipe(Path(sys.argv[1])));"
        "print(*{'peft', 'bitsandbytes', 'transformers.modeling_utils', 'datasets', 'accelerate'} & sys.modules.keys())"
    )
    recipe = RECIPES / "starter" / "ppo.yaml"
    ran = subprocess.run([sys.executable, "-c", code, recipe], capture_output=True, text=True, check=True)
    assert not ran.stdout.strip(), ran.stdout


def test_a_gated_model_is_no_hindrance(alone: None) -> None:
    result = alignlab("explain", RECIPES / "starter/grpo.yaml", "start=null", "model=google/gemma-3-4b-it")
    assert result.code == 0 and "starts as google/gemma-3-4b-it" in result.out


@pytest.mark.parametrize("width", [40, 60, 100, 200])
def test_lines_keep_within_the_width(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    for name in ("grpo", "ppo", "dpo"):
        result = alignlab("explain", RECIPES / "starter" / f"{name}.yaml", "algorithm.learning_rate=0.000123456789")
        lines = result.out.splitlines()
        assert max(map(len, lines)) <= width and not [line for line in lines if line != line.rstrip()]


def test_json_has_everything_and_nothing_that_is_not_json() -> None:
    result = alignlab("explain", RECIPES / "starter/pipeline.yaml", "--json")
    found = strict_json(result.out)
    assert [stage["name"] for stage in found["stages"]] == ["sft", "reward_model", "grpo"]
    grpo = found["stages"][2]
    assert tuple(grpo["formula"]) == load_recipe(RECIPES / "starter/pipeline.yaml").stages[2].method.formula()
    assert grpo["inputs"].keys() == {"logprobs", "old_logprobs", "advantages", "rows"}
    assert grpo["sections"].keys() == {"loss", "models", "reward", "credit", "kl", "masks", "batch"}
    assert grpo["numbers"]["completions"] == 15 * 16 * 8 and grpo["changed"] == {"learning_rate": ["0.0004", "1e-06"]}
    assert "the result of stage sft" in grpo["sections"]["models"]["lines"]["policy"]


# ---- what cannot be explained ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (("algorithm.learning_rte=1",), "did you mean 'learning_rate'"),
        (("reward={exat: 1}",), "did you mean 'exact'"),
        (("data.task=resoning",), "did you mean 'reasoning'"),
        (("model.name=./no-such-folder", "start=null"), "no such folder"),
        (("start=nowhere.yaml",), "neither a stage"),
        (("reward_model=null",), "`learned` needs `reward_model: RECIPE or RUN`"),
        (("data={task: []}",), "names neither a task"),
    ],
)
def test_a_broken_recipe_is_one_line_and_code_2(overrides: tuple[str, ...], said: str) -> None:
    """The same as `train` says."""
    result = alignlab("explain", RECIPES / "starter/grpo.yaml", *overrides)
    assert result.code == 2 and len(result.errors) == 1 and said in result.errors[0], result.err
    assert not result.out


def test_no_such_recipe() -> None:
    result = alignlab("explain", "nowhere.yaml")
    assert result.code == 2 and result.errors == ["nowhere.yaml: no such recipe file"]


def test_data_that_lie_elsewhere_leave_totals_open(tmp_path: Path) -> None:
    for where in ("path: 'https://example.org/none.jsonl'", "hub: somebody/data"):
        found = numbers_of(f"data: {{{where}}}\nalgorithm: sft\ntrain: {{epochs: 3}}\n", tmp_path)
        assert found["items"] is None and found["phases"] is None and found["optimizer_steps"] is None
    write_rows(tmp_path / "some.jsonl", [{"prompt": str(i), "completion": "x"} for i in range(40)])
    found = numbers_of("data: {path: some.jsonl}\nalgorithm: sft\ntrain: {epochs: 3}\n", tmp_path)
    assert found["phases"] == -(-3 * found["items"] // 32) and 30 <= found["items"] <= 40


class Own(Hyperparameters):
    """A method of somebody's own. It says nothing about itself."""

    metrics_file: ClassVar[str | None] = None
    dropout: ClassVar[bool] = False
    data_kind: ClassVar[str] = "examples"
    name: str = "own"
    lines: tuple[str, ...] = ()

    def models(self) -> dict[str, Any]:
        return {}


class Talking(Own):
    def formula(self) -> tuple[str, ...]:
        return self.lines


def test_a_method_of_ones_own() -> None:
    silent = explain_stage(facts_of(stage_of(Own()), {}), {})
    assert silent.formula == () and "no formula()" in dict(silent.sections["loss"].lines)["formula"]
    assert dict(silent.sections["batch"].lines)["a phase"].startswith("the method alone knows")
    talking = explain_stage(facts_of(stage_of(Talking(lines=("loss = sum(mine) / rows",))), {}), {})
    assert talking.inputs["mine"] == ("?", "an input of this method's own")
    for bad in ("loss =", "print(1)", "loss = 1; x = 2"):
        with pytest.raises(UserError, match="formula"):
            explain_stage(facts_of(stage_of(Talking(lines=(bad,))), {}), {})


# ---- the example -----------------------------------------------------------------------------------------------------


def test_the_example_is_fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """Anew: COLUMNS=100 alignlab explain recipes/starter/grpo.yaml algorithm.kl_coef=0.04 > docs/methods/example.txt"""
    monkeypatch.setenv("COLUMNS", "100")
    assert alignlab(*SHOWN, cwd=ROOT).out == EXAMPLE.read_text("utf-8")
