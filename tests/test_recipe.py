"""Reading recipes: what is good resolves and round-trips, what is bad gets one clear line that names key and remedy."""

from __future__ import annotations

from pathlib import Path

import pytest

from alignlab.algorithms.grpo import GRPO
from alignlab.errors import UserError
from alignlab.recipe import apply_overrides, load_recipe, merge

GOOD = "algorithm: {name: grpo, learning_rate: 1e-5}\ndata: {task: reasoning}\n"


def write(folder: Path, text: str, name: str = "recipe.yaml") -> Path:
    path = folder / name
    path.write_text(text, "utf-8")
    return path


def error_of(folder: Path, text: str, *overrides: str) -> str:
    with pytest.raises(UserError) as found:
        load_recipe(write(folder, text), list(overrides))
    return str(found.value)


def test_a_single_stage_gets_the_defaults_of_its_method_and_the_file_name(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, GOOD))
    (stage,) = recipe.stages
    assert recipe.name == "recipe" and recipe.seed == 42 and stage.name == "grpo"
    assert isinstance(stage.algorithm, GRPO)
    assert stage.algorithm.learning_rate == 1e-5 and stage.algorithm.group_size == 8
    assert stage.data.task == ("reasoning",)


def test_the_resolved_recipe_reads_back_to_itself(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, GOOD))
    again = load_recipe(write(tmp_path, recipe.to_yaml(), "again.yaml"))
    assert again == recipe


def test_yaml_1_2_numbers(tmp_path: Path) -> None:
    """In YAML 1.1 `1e-5` is a string and `no` is False; here they are what they look like."""
    recipe = load_recipe(write(tmp_path, "name: 'no'\n" + GOOD))
    assert recipe.name == "no" and recipe.stages[0].algorithm.learning_rate == 1e-5  # type: ignore[attr-defined]


def test_extends_merges_deeply_and_another_method_replaces_the_algorithm(tmp_path: Path) -> None:
    write(tmp_path, GOOD + "train: {num_phases: 7, microbatch_rows: 16}\n", "base.yaml")
    recipe = load_recipe(write(tmp_path, "extends: base.yaml\ntrain: {num_phases: 9}\n"))
    assert recipe.stages[0].train.num_phases == 9 and recipe.stages[0].train.microbatch_rows == 16
    assert merge({"algorithm": {"name": "grpo", "group_size": 4}}, {"algorithm": {"name": "dpo"}}) == {
        "algorithm": {"name": "dpo"}
    }


def test_overrides_reach_single_stages_named_stages_and_the_model_by_name(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, GOOD), ["algorithm.group_size=4", "seed=7", "model=google/gemma-3-270m-it"])
    assert recipe.seed == 7 and recipe.stages[0].algorithm.group_size == 4  # type: ignore[attr-defined]
    assert recipe.stages[0].model.name == "google/gemma-3-270m-it"
    several = "data: {task: reasoning}\nstages:\n- {name: a, algorithm: sft}\n- {name: b, algorithm: {name: grpo}}\n"
    both = ["stages.b.algorithm.group_size=2", "stages.a.algorithm.learning_rate=1e-3"]
    recipe = load_recipe(write(tmp_path, several), both)
    assert recipe.stages[1].algorithm.group_size == 2  # type: ignore[attr-defined]
    assert recipe.stages[0].algorithm.learning_rate == 1e-3  # type: ignore[attr-defined]
    kept = apply_overrides({"model": {"name": "starter", "adapter": "lora"}}, ["model=other"])
    assert kept == {"model": {"name": "other", "adapter": "lora"}}


def test_pipeline_stages_inherit_what_stands_beside_them(tmp_path: Path) -> None:
    text = "data: {task: safety}\ntrain: {num_phases: 3}\n"
    text += "stages:\n- {algorithm: sft}\n- {algorithm: dpo, train: {num_phases: 4}}\n"
    recipe = load_recipe(write(tmp_path, text))
    assert [s.name for s in recipe.stages] == ["sft", "dpo"]
    assert [s.train.num_phases for s in recipe.stages] == [3, 4]
    assert all(s.data.task == ("safety",) for s in recipe.stages)


def test_a_null_takes_an_inherited_component_out(tmp_path: Path) -> None:
    write(tmp_path, "algorithm: grpo\nreward: {exact: 1, learned: 0.5, length: {weight: 2, limit: 3}}\n", "base.yaml")
    path = write(tmp_path, "extends: base.yaml\nreward: {learned: null}\n")
    assert list(load_recipe(path).stages[0].reward) == ["exact", "length"]
    assert list(load_recipe(path, ["reward.exact=null"]).stages[0].reward) == ["length"]
    assert load_recipe(path, ["reward=null"]).stages[0].reward == {}


def test_debug_is_two_phases_of_every_stage(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, GOOD + "train: {num_phases: 500}\n"), debug=True)
    assert recipe.stages[0].train.num_phases == 2


def test_debug_leaves_alone_what_is_smaller_still(tmp_path: Path) -> None:
    """So the way out that an error names, `evaluation.prompts_per_task=0`, is one in `--debug` too."""
    path = write(tmp_path, GOOD + "train: {num_phases: 500, epochs: null}\n")
    small = ["evaluation.prompts_per_task=0", "train.num_phases=1", "data.limit=7", "algorithm.group_size=3"]
    stage = load_recipe(path, small, debug=True).stages[0]
    assert (stage.evaluation.prompts_per_task, stage.train.num_phases, stage.data.limit) == (0, 1, 7)
    assert stage.algorithm.group_size == 3  # type: ignore[attr-defined]
    large = ["evaluation={prompts_per_task: 90, samples: 4, every: 5}", "train={epochs: 3, num_phases: null}"]
    stage = load_recipe(path, large, debug=True).stages[0]
    assert (stage.evaluation.prompts_per_task, stage.evaluation.samples, stage.evaluation.every) == (2, 1, 0)
    assert (stage.train.num_phases, stage.train.epochs) == (2, None)
    for wrong in ("train.num_phases=many", "train.num_phases=0", "train=5", "evaluation.samples=-1"):
        with pytest.raises(UserError, match=wrong.partition("=")[0]):
            load_recipe(path, [wrong], debug=True)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("data.prompt_template=Q: {question", "'Q: {question' is not a prompt template"),
        ("data.prompt_template=Q {}", "'Q {}' is not a prompt template"),
        ("data.prompt_template=solve this", "'solve this' does not name a {column}"),
        ("data.prompt_template=Q: {question}", """put it in quotes, on the command line in two kinds of them: '"""
         """data.prompt_template="..."'"""),
        ("data.system_prompt=Note: be kind", "data.system_prompt: needs text, but YAML reads a mapping here"),
        ("data.system_prompt=[kind]", "data.system_prompt: needs text, but YAML reads a list here"),
    ],
)  # fmt: skip
def test_texts_that_are_none(tmp_path: Path, override: str, said: str) -> None:
    message = error_of(tmp_path, GOOD, override)
    assert said in message and len(message.splitlines()) == 1


def test_the_advice_about_quotes_works(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, GOOD), ['data.prompt_template="Q: {question}"'])
    assert recipe.stages[0].data.prompt_template == "Q: {question}"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("algorithm: {name: grpo, learning_rte: 1e-5}\n", ("algorithm.learning_rte", "did you mean 'learning_rate'")),
        ("algorithm: {name: gpro}\n", ("gpro", "did you mean 'grpo'")),
        ("algorithm: {name: grpo}\ntrian: {}\n", ("trian", "did you mean 'train'")),
        ("algorithm: {name: grpo}\ntrain: {group_size: 4}\n", ("train.group_size", "algorithm")),
        ("algorithm: {name: grpo, learning_rate: fast}\n", ("algorithm.learning_rate", "number", "fast")),
        ("algorithm: {name: grpo, learning_rate: -1}\n", ("algorithm.learning_rate", "greater than 0")),
        ("algorithm: {name: grpo, learning_rate: .inf}\n", ("algorithm.learning_rate", "finite")),
        ("algorithm: {name: grpo, learning_rate: .nan}\n", ("algorithm.learning_rate", "finite")),
        ("algorithm: {name: grpo, group_size: 1}\n", ("algorithm.group_size", "2")),
        ("algorithm: {name: dpo, beta: 0}\n", ("algorithm.beta", "greater than 0")),
        ("algorithm: {name: dpo, loss_kind: ipo, label_smoothing: 0.1}\n", ("label_smoothing", "sigmoid")),
        ("train: {num_phases: 0}\nalgorithm: sft\n", ("train.num_phases", "1")),
        ("model: {name: starter}\n", ("algorithm", "missing")),
        ("algorithm: {learning_rate: 1}\n", ("algorithm", "name")),
        ("algorithm: sft\nstart: nowhere.yaml\n", ("nowhere.yaml", "neither a stage")),
        ("", ("empty",)),
        ("- a\n- b\n", ("list", "mapping")),
        ("algorithm: sft\nalgorithm: dpo\n", ("line 2", "algorithm")),
        ("algorithm: {name: sft\n", ("not valid YAML",)),
        ("algorithm: !!python/object:os.system x\n", ("not valid YAML",)),
        ("stages: [{algorithm: sft}, {algorithm: sft}]\n", ("sft", "two stages")),
        ("name: a\nalgorithm: sft\nstages: []\n", ("stages",)),
        ("start: sft.yaml\narms: {a: a.yaml}\nseeds: [1]\n", ("this is a study", "alignlab study")),
    ],
)
def test_bad_recipes_say_what_where_and_what_to_do(tmp_path: Path, text: str, said: tuple[str, ...]) -> None:
    message = error_of(tmp_path, text)
    for part in said:
        assert part in message, message
    assert "Traceback" not in message and "pydantic" not in message


def test_all_problems_are_listed_at_once_one_line_each(tmp_path: Path) -> None:
    message = error_of(tmp_path, "algorithm: {name: dpo, beta: -1, betta: 2}\ntrain: {num_phases: 0}\nseed: -1\n")
    assert len(message.splitlines()) == 4
    for part in ("algorithm.beta", "algorithm.betta", "train.num_phases", "seed"):
        assert part in message


def test_numeric_strings_are_accepted(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, "algorithm: {name: sft, learning_rate: '1e-4'}\n"))
    assert recipe.stages[0].algorithm.learning_rate == 1e-4  # type: ignore[attr-defined]


@pytest.mark.parametrize("override", ["nonsense", "=3", "algorithm.name.x=1", "stages.zzz.seed=1"])
def test_bad_overrides(tmp_path: Path, override: str) -> None:
    text = "stages: [{algorithm: sft}]\n" if override.startswith("stages") else GOOD
    assert override.split("=")[0].split(".")[-1] in error_of(tmp_path, text, override)


def test_extending_itself_is_an_error(tmp_path: Path) -> None:
    assert "extends itself" in error_of(tmp_path, "extends: recipe.yaml\n")


def test_a_huge_file_and_bad_bytes_are_refused(tmp_path: Path) -> None:
    assert "at most" in error_of(tmp_path, "# " + "x" * 1_100_000)
    path = tmp_path / "latin.yaml"
    path.write_bytes(b"name: caf\xe9\n")
    with pytest.raises(UserError, match="UTF-8"):
        load_recipe(path)


def test_an_anchor_bomb_does_not_explode(tmp_path: Path) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12)]
    assert "unfolds to more than" in error_of(tmp_path, "\n".join(lines) + "\n" + GOOD)


def test_a_teacher_is_looked_for_beside_the_recipe_or_is_a_models_name(tmp_path: Path) -> None:
    """A file or folder beside the recipe, a stage, a hub id, or the starter, whatever lies beside the recipe."""
    for name in ("grpo.yaml", "starter/config.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()

    def teacher(value: str) -> str | None:
        return load_recipe(write(tmp_path, f"algorithm: distill\nteacher: {value}\n")).stages[0].teacher

    assert teacher("grpo.yaml") == str(tmp_path / "grpo.yaml")
    assert teacher("starter") == "starter" and teacher("google/gemma-3-1b-it") == "google/gemma-3-1b-it"
    with pytest.raises(UserError, match=r"'dpo\.yaml' is neither a stage of this recipe, nor a recipe file"):
        teacher("dpo.yaml")
    staged = "stages:\n- {name: grpo.yaml, algorithm: grpo}\n- {name: d, algorithm: distill, teacher: grpo.yaml}\n"
    assert load_recipe(write(tmp_path, staged)).stages[1].teacher == "grpo.yaml"


def test_debug_keeps_a_selection_possible(tmp_path: Path) -> None:
    """Of groups made smaller, fewer are kept: keeping all of them would be no selection."""
    path = write(tmp_path, "algorithm: {name: rejection, group_size: 16, keep: 8}\n")
    algorithm = load_recipe(path, debug=True).stages[0].algorithm
    assert (algorithm.group_size, algorithm.keep) == (4, 1)  # type: ignore[attr-defined]
    threshold = "algorithm: {name: rejection, keep: null, min_reward: 1.0}\n"
    assert load_recipe(write(tmp_path, threshold), debug=True).stages[0].algorithm.keep is None  # type: ignore[attr-defined]
