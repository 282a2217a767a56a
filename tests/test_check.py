"""What can be known to be wrong is said by `train` and `explain` in the same words, before anything is trained."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from alignlab import starter
from alignlab.errors import UserError
from alignlab.pipeline import check_recipe, items
from alignlab.recipe import load_recipe
from tests.runs import RECIPES, alignlab, debug_run, small_model, write_rows

SUMS = [{"prompt": f"{a} + {b}", "completion": str(a + b), "answer": str(a + b)} for a in range(5) for b in range(4)]
STAGED = """
model: {model}
data: {{path: sums.jsonl, task: reasoning, max_completion_tokens: 8}}
train: {{num_phases: 2, save_every: 1}}
evaluation: {{prompts_per_task: 2}}
reward: {{exact: 1}}
stages:
- {{name: sft, algorithm: {{name: sft, examples_per_step: 4}}}}
- {{name: judge, algorithm: {{name: reward_model, pairs_per_step: 4}}, data: {{path: pairs.jsonl, task: reasoning}}}}
- {{name: grpo, start: sft, algorithm: {{name: grpo, prompts_per_phase: 2, group_size: 2}}}}
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_model(tmp_path_factory.mktemp("models") / "small")


@pytest.fixture
def recipe(tmp_path: Path, model: Path) -> Path:
    """Three stages whose last one comes to be wrong."""
    write_rows(tmp_path / "sums.jsonl", SUMS)
    pairs = [{"prompt": r["prompt"], "chosen": r["answer"], "rejected": "many"} for r in SUMS]
    write_rows(tmp_path / "pairs.jsonl", pairs)
    path = tmp_path / "staged.yaml"
    path.write_text(STAGED.format(model=model), "utf-8")
    return path


def both_say(recipe: Path, *overrides: str) -> str:
    """The one line of `train` and of `explain`; nothing has been trained."""
    output = recipe.parent / "run"
    trained = alignlab("train", recipe, *overrides, "--output", output, cwd=recipe.parent)
    explained = alignlab("explain", recipe, *overrides, cwd=recipe.parent)
    assert trained.code == explained.code == 2, (trained, explained)
    assert trained.errors == explained.errors and len(trained.errors) == 1, (trained.err, explained.err)
    assert trained.err.startswith("error: ") and not output.exists()
    return trained.errors[0]


def test_the_recipe_itself_is_good(recipe: Path) -> None:
    assert alignlab("explain", recipe).code == 0
    result = alignlab("train", recipe, "--debug", "--output", recipe.parent / "run")
    assert result.code == 0, result.err


LAST: dict[str, tuple[tuple[str, ...], str]] = {
    "a policy as reward model": (("stages.grpo.reward_model=sft",), "sft: gives a policy, but a reward_model is"),
    "a reward model as start": (("stages.grpo.start=judge",), "judge: gives a reward_model, but a policy is needed"),
    "a later stage as start": (("stages.sft.start=grpo",), "stage sft: start: grpo is not trained before it"),
    "itself as reward model": (("stages.grpo.reward_model=grpo",), "reward_model: grpo is not trained before it"),
    "an unknown mirror": (("tracking=[tensorbord]",), "did you mean 'tensorboard'?; choose from tensorboard, wandb"),
    "an overlong buffer": (("stages.grpo.algorithm.overlong_buffer=8",), "before the limit of 8 tokens a completion"),
    "a critic on nothing": (
        ("stages.grpo.algorithm={name: ppo, critic: reward_model}",),
        "stage grpo: with these settings of its algorithm a reward model is part of training; add reward_model",
    ),
    "a potential of nothing": (
        ("stages.grpo.algorithm={name: ppo, reward_placement: dense, dense_reward: potential}",),
        "a reward model is part of training",
    ),
    "a reward": (("stages.grpo.reward={exat: 1}",), "did you mean 'exact'?"),
    "a missing file": (("stages.grpo.data.path=smus.jsonl",), "smus.jsonl: no such file; did you mean 'sums.jsonl'?"),
    "several tasks to a file": (
        ("stages.grpo.data.task=[reasoning, code]",),
        "stage grpo: one file or hub set is one task, not reasoning, code",
    ),
    "columns": (("stages.grpo.data.columns={prompt: qestion}",), "no column 'qestion' for prompt"),
    "pairs of sums": (("stages.judge.data.path=sums.jsonl",), "no column for chosen"),
    "a task that cannot grade": (("stages.grpo.data.task=safety",), "evaluation: task 'safety' cannot grade prompt"),
    "no demonstrations": (
        ("data.task=[]", "stages.grpo.data={path: sums.jsonl, validation_path: prompts.jsonl}",
         "stages.grpo.evaluation.perplexity=true"),
        "evaluation: perplexity needs held-out demonstrations",
    ),
    "a type that Gemma overflows in": (("stages.grpo.model.dtype=float16",), "Gemma overflows in float16"),
    "eager attention in float64": (
        ("stages.grpo.model={dtype: float64, attention: eager}",),
        "eager attention gives NaN in float64",
    ),
    "layers that there are not": (
        ("stages.grpo.model.adapter={target_modules: foo}",),
        "adapter.target_modules: foo match nothing; this model has down_proj, gate_proj, k_proj, o_proj, q_proj,",
    ),
    "an adapter on the head": (("stages.grpo.model.adapter={target_modules: lm_head}",), "lm_head is tied"),
    "another adapter than that of the start": (
        ("stages.sft.model.adapter={rank: 4}", "stages.grpo.model.adapter={rank: 8}"),
        "stage grpo goes on with an adapter of rank 4, alpha 16.0: set adapter.rank and adapter.alpha to these",
    ),
    "quantised float64": (
        ("stages.grpo.model={dtype: float64, quantization: 4bit, adapter: lora}",),
        "4bit weights stand for float32 at best",
    ),
    "a context that is too small": (("stages.grpo.data.max_prompt_tokens=9000",), "tokens; lower one of them"),
    "a model beside a start": (("stages.grpo.model.name=some/other",), "stage grpo: model.name has no effect"),
    "a teacher without pupil": (("stages.grpo.teacher=sft",), "grpo has no use for a teacher"),
    "a reward model as teacher": (
        ("stages.grpo.algorithm=distill", "stages.grpo.teacher=judge"),
        "judge: gives a reward_model, but a policy is needed here",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", LAST)
def test_what_is_wrong_with_the_last_stage_is_said_before_the_first_is_trained(recipe: Path, case: str) -> None:
    overrides, said = LAST[case]
    write_rows(recipe.parent / "prompts.jsonl", [{"prompt": "7 + 7"}])
    assert said in both_say(recipe, *overrides)


FILES: dict[str, tuple[tuple[str, ...], str]] = {
    "reward_model": (("reward_model=sft.yaml",), "sft.yaml: gives a policy, but a reward_model is needed here"),
    "start": (("start=reward_model.yaml",), "reward_model.yaml: gives a reward_model, but a policy is needed here"),
    "data": (("data.path=nope.jsonl",), "one file or hub set is one task, not reasoning, safety, clinical, code"),
    "template": (('data.prompt_template="{prompt}"',), "data.prompt_template is for data of path or hub"),
    "half precision": (("model.dtype=float16",), "model 'starter': Gemma overflows in float16"),
    "targets": (("model.adapter={target_modules: foo}",), "foo match nothing"),
    "quantization": (("model={dtype: float64, adapter: lora, quantization: 8bit}",), "stand for float32 at best"),
}


@pytest.mark.parametrize("case", FILES)
def test_a_recipe_that_starts_from_others(tmp_path: Path, cache: Path, case: str) -> None:
    """Neither it nor what it starts from is trained, not even in part."""
    overrides, said = FILES[case]
    before = set(cache.iterdir())
    own = tmp_path / "grpo.yaml"
    own.write_text(f"extends: {RECIPES}/starter/grpo.yaml\n", "utf-8")
    for name in ("sft", "reward_model"):
        (tmp_path / f"{name}.yaml").write_text(f"extends: {RECIPES}/starter/{name}.yaml\n", "utf-8")
    assert said in both_say(own, *overrides)
    assert set(cache.iterdir()) == before


def test_a_mistake_in_a_recipe_that_is_started_from_is_found_there(recipe: Path) -> None:
    wrong = recipe.with_name("wrong.yaml")
    wrong.write_text(
        "extends: staged.yaml\ntracking: []\nstages: [{algorithm: sft, data: {path: no.jsonl}}]\n", "utf-8"
    )
    assert "no.jsonl: no such file" in both_say(recipe, "stages.grpo.start=wrong.yaml")
    wrong.write_text("start: wrong.yaml\nalgorithm: sft\ndata: {path: sums.jsonl}\n", "utf-8")
    assert "wrong.yaml: cannot be trained, as it needs itself" in both_say(recipe, "stages.grpo.start=wrong.yaml")


def test_runs_as_start_and_reward_model(recipe: Path) -> None:
    sft, judge = debug_run("starter/sft.yaml"), debug_run("starter/reward_model.yaml")
    (recipe.parent / "empty").mkdir()
    assert "empty: not a finished run with a policy" in both_say(recipe, "stages.sft.start=empty", "model=starter")
    said = both_say(recipe, "stages.grpo.start=null", "model=starter", f"stages.sft.start={judge}")
    assert said == f"{judge}: not a finished run with a policy; train it first (a model folder is named in model)"
    assert "not a finished run with a reward_model" in both_say(recipe, f"stages.grpo.reward_model={sft}")
    started = ("model=starter", f"stages.sft.start={sft}", "stages.grpo.start=null")
    assert "foo match nothing" in both_say(recipe, *started, "stages.grpo.model.adapter={target_modules: foo}")
    assert "float16" in both_say(recipe, *started, "stages.grpo.model.dtype=float16")
    assert alignlab("explain", recipe, *started).code == 0


def test_a_reward_model_that_the_doctor_found_unfit(recipe: Path, tmp_path: Path) -> None:
    judge = tmp_path / "judge"
    shutil.copytree(debug_run("starter/reward_model.yaml"), judge)
    key = json.loads((judge / "stage.json").read_text("utf-8"))["key"]
    said = {"key": key, "verdict": "not fit for RL", "reasons": ["it is a coin"]}
    (judge / "doctor.json").write_text(json.dumps(said), "utf-8")
    uses = (f"stages.grpo.reward_model={judge}", "stages.grpo.reward={learned: 1}")
    assert "is not fit for RL (it is a coin;" in both_say(recipe, *uses)
    assert alignlab("explain", recipe, *uses[:1], "stages.grpo.reward={learned: {force: true}}").code == 0


def test_a_shape_that_training_fills_with_weights(recipe: Path) -> None:
    """A folder with a configuration alone is enough for random weights, and for what starts from them."""
    shape = recipe.parent / "shape"
    shape.mkdir()
    for file in starter.ASSETS.iterdir():
        if file.suffix in (".json", ".jinja"):
            shutil.copy(file, shape)
    random = ("model={name: shape, weights: random, overrides: {max_position_embeddings: 4096}}",)
    longer = ("stages.grpo.data.max_prompt_tokens=4000",)
    for overrides in (random, (*random, *longer)):
        assert alignlab("explain", recipe, *overrides, cwd=recipe.parent).errors == []
    drawn = ("model={name: shape, weights: random}",)
    assert "context of 'shape' is 2048" in both_say(recipe, *drawn, *longer)
    assert "no model.safetensors in it" in both_say(recipe, "model={name: shape}")


def test_large_files_and_what_lies_elsewhere_are_not_read(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (recipe.parent / "sums.jsonl").write_text("no JSON\n", "utf-8")
    assert "invalid JSON" in both_say(recipe)
    for elsewhere in ("{hub: somebody/data}", "{path: 'https://nowhere.example/data.jsonl'}"):
        away = (f"stages.{stage}.data={elsewhere}" for stage in ("sft", "grpo"))
        check_recipe(load_recipe(recipe, [*away, "data.path=null", "evaluation.prompts_per_task=0"]))
    monkeypatch.setattr(items, "READABLE", 3)
    check_recipe(load_recipe(recipe))
    with pytest.raises(UserError, match=r"evaluation: none\.jsonl: no such file"):
        check_recipe(load_recipe(recipe, ["data.validation_path=none.jsonl"]))


def test_the_starters_data_are_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(items, "load_examples", lambda *_: pytest.fail("read"))
    check_recipe(load_recipe(RECIPES / "starter" / "pipeline.yaml"))


def test_passes_over_data_of_a_method_that_does_not_say_what_it_uses(recipe: Path) -> None:
    own = "stages.grpo.algorithm={name: 'tests.test_explain:Own'}"
    assert "set num_phases" in both_say(recipe, own, "stages.grpo.train={epochs: 2, num_phases: null}")
