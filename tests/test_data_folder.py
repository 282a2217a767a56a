"""Prepared folders in recipes: their splits, their hash, what is refused; every recipe on public data, end to end."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from alignlab import registry
from alignlab.errors import UserError
from alignlab.pipeline.identity import data_fingerprint
from alignlab.pipeline.items import load_items
from alignlab.recipe import Stage, load_recipe
from alignlab.study.plan import load_study
from alignlab.tasks import get_task
from alignlab.types import Completion, Example
from tests.runs import RECIPES, alignlab, rows, small_model, write_rows

REAL = RECIPES / "real"
PREPARED = sorted(p.relative_to(REAL).as_posix() for p in REAL.glob("*/*.yaml"))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_model(tmp_path_factory.mktemp("model"))


def prepare(task: str, where: Path, folder: Path, *more: str) -> Path:
    result = alignlab("data", "prepare", task, "--from", where, "--output", folder, *more)
    assert result.code == 0, result.err
    return folder


@pytest.fixture(scope="module")
def ultra(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Scored pairs of made-up questions."""
    path = tmp_path_factory.mktemp("ultra") / "train.jsonl"
    return write_rows(path, [
        {"prompt": f"What is {i} and {i + 1}?", "chosen": f"It is {2 * i + 1}.", "rejected": "No idea at all.",
         "score_chosen": 8, "score_rejected": i % 8} for i in range(60)
    ])  # fmt: skip


@pytest.fixture(scope="module")
def folder(ultra: Path) -> Path:
    return prepare("ultrafeedback", ultra, ultra.parent / "prepared")


def stage(tmp_path: Path, model: Path, data: str, algorithm: str = "sft", **more: str) -> Stage:
    return load_recipe(recipe(tmp_path, model, data, algorithm, **more)).stages[-1]


def recipe(tmp_path: Path, model: Path, data: str, algorithm: str = "sft", name: str = "r", **more: str) -> Path:
    path = tmp_path / f"{name}.yaml"
    lines = [f"model: {model}", f"data: {{{data}, max_completion_tokens: 8}}", f"algorithm: {{name: {algorithm}}}",
             "evaluation: {prompts_per_task: 2}", *(f"{key}: {value}" for key, value in more.items())]  # fmt: skip
    path.write_text("\n".join(lines) + "\n", "utf-8")
    return path


# ---- what a stage reads ----------------------------------------------------------------------------------------------


def test_every_kind_and_split_comes_from_its_own_file(folder: Path, model: Path, tmp_path: Path) -> None:
    made = stage(tmp_path, model, f"task: ultrafeedback, path: {folder}")
    for split in ("train", "validation", "test"):
        expected = rows(folder / f"{split}.jsonl")
        prompts, examples = load_items(made, "prompts", split), load_items(made, "examples", split)  # type: ignore[arg-type]
        assert [p.id for p in prompts] == [row["id"] for row in expected] == [e.prompt.id for e in examples]
        pairs = load_items(made, "pairs", split)  # type: ignore[arg-type]
        assert [p.margin for p in pairs] == [
            r["score_chosen"] - r["score_rejected"] for r in rows(folder / f"pairs.{split}.jsonl")
        ]
        assert len(load_items(made, "labelled", split)) == 2 * len(pairs)  # type: ignore[arg-type]
    ids = [{p.messages for p in load_items(made, "prompts", split)} for split in ("train", "validation", "test")]  # type: ignore[arg-type]
    assert not ids[0] & ids[1] and not ids[0] & ids[2] and not ids[1] & ids[2]


def test_rows_may_name_their_task_and_limits_hold(folder: Path, model: Path, tmp_path: Path) -> None:
    made = stage(tmp_path, model, f"path: {folder}, limit: 3, system_prompt: Be brief.")
    prompts = load_items(made, "prompts", "train")
    assert len(prompts) == 3 and {p.task for p in prompts} == {"ultrafeedback"}
    assert all(p.messages[0].content == "Be brief." for p in prompts)


def test_a_folder_that_is_only_for_testing_can_be_tested_on(model: Path, tmp_path: Path) -> None:
    row = {"task_id": "a", "prompt": "def f():\n", "entry_point": "f", "canonical_solution": "    pass\n", "test": "x"}
    path = write_rows(tmp_path / "he.jsonl", [{**row, "prompt": f"def f{i}():\n"} for i in range(4)])
    made = stage(tmp_path, model, f"path: {prepare('code', path, tmp_path / 'out')}")
    assert len(load_items(made, "prompts", "test")) == 4
    with pytest.raises(UserError, match=r"has no train\.jsonl; .*test\.jsonl"):
        load_items(made, "prompts", "train")


def test_prompts_without_a_demonstration_lie_beside_those_with_one(model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "mixed"
    folder.mkdir()
    talk = {"task": "", "messages": [{"role": "user", "content": "a"}]}
    for split in ("train", "validation"):
        content = [{**talk, "id": f"{split}/{i}", "completion": "b" if i == 0 else None, "meta": {}} for i in range(5)]
        write_rows(folder / f"{split}.jsonl", [{**r, "messages": [{"role": "user", "content": f"{split} {i}"}]}
                                               for i, r in enumerate(content)])  # fmt: skip
    made = stage(tmp_path, model, f"path: {folder}")
    assert len(load_items(made, "examples", "validation")) == 1 and len(load_items(made, "prompts", "validation")) == 5


def test_a_path_is_looked_for_beside_the_recipe_first(folder: Path, model: Path, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "mine").symlink_to(folder)
    made = stage(tmp_path, model, "path: data/mine")
    assert Path(str(made.data.path)) == folder.resolve()


def test_the_hash_of_a_folder_is_that_of_its_rows_wherever_it_lies(
    folder: Path, ultra: Path, model: Path, tmp_path: Path
) -> None:
    again = prepare("ultrafeedback", ultra, tmp_path / "again")
    other = prepare("ultrafeedback", ultra, tmp_path / "other", "--seed", "1")
    one, same, different = (
        data_fingerprint(stage(tmp_path, model, f"path: {path}")) for path in (folder, again, other)
    )
    assert one == same != different
    (again / "card.json").write_text("{}", "utf-8")
    assert data_fingerprint(stage(tmp_path, model, f"path: {again}")) == one
    with (again / "pairs.train.jsonl").open("a", encoding="utf-8") as file:
        file.write("\n")
    assert data_fingerprint(stage(tmp_path, model, f"path: {again}")) != one


BAD = {
    "raw folder": ("path: {raw}", "sft", ("nobody prepared", "alignlab data prepare TASK --from")),
    "no pairs": ("path: {alone}", "dpo", ("has no pairs.train.jsonl", "it has test.jsonl, train.jsonl")),
    "split of a folder": ("path: {folder}, split: 'train[:5]'", "sft", ("data.split is for files", "drop it")),
    "columns of a folder": ("path: {folder}, columns: {{prompt: x}}", "sft", ("data.columns is for files",)),
    "two tasks of a folder": ("path: {folder}, task: [orca, hh]", "sft", ("is one task, not orca, hh",)),
    "task without starter data": ("task: gsm8k", "sft", ("alignlab data prepare gsm8k", "data.path=data/gsm8k")),
    "no such folder": ("path: data/nowhere", "sft", ("nowhere", "no such file")),
    "task that was not prepared": (
        "task: gsm8k, path: data/g",
        "sft",
        ("alignlab data prepare gsm8k --output data/g",),
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_wrong_with_a_folder_is_one_line(case: str, folder: Path, model: Path, tmp_path: Path) -> None:
    data, algorithm, said = BAD[case]
    raw, alone = tmp_path / "raw", tmp_path / "alone"
    raw.mkdir()
    write_rows(raw / "train_10.jsonl", [{"prompt": "a", "completion": "b"}])
    own = write_rows(tmp_path / "x.jsonl", [{"prompt": f"a{i}", "completion": "b"} for i in range(9)])
    prepare("jsonl", own, alone)
    path = recipe(tmp_path, model, data.format(raw=raw, folder=folder, alone=alone), algorithm)
    result = alignlab("train", path, "--output", tmp_path / "run")
    assert result.code == 2 and len(result.errors) == 1, result.err
    assert all(word in result.errors[0] for word in said), result.errors
    assert not (tmp_path / "run").exists()


def test_an_explanation_counts_a_folders_rows(folder: Path, model: Path, tmp_path: Path) -> None:
    result = alignlab("explain", recipe(tmp_path, model, f"path: {folder}, validation_fraction: 0.3"))
    assert "data.validation_fraction" in result.out and "validation has rows of its own" in result.out
    assert result.code == 0 and f"{len(rows(folder / 'train.jsonl'))} demonstrations" in result.out, (
        result.err + result.out
    )


# ---- a judge is no start for RL --------------------------------------------------------------------------------------


def test_rl_does_not_start_from_a_policy_that_learned_to_judge(ultra: Path, model: Path, tmp_path: Path) -> None:
    verdicts = prepare("genrm", ultra, tmp_path / "genrm")
    answers = prepare("ultrafeedback", ultra, tmp_path / "answers")
    recipe(tmp_path, model, f"task: genrm, path: {verdicts}", name="judge")
    short = {"reward": "{length: {weight: 1, limit: 5}}"}
    refused = recipe(tmp_path, model, f"task: ultrafeedback, path: {answers}", "grpo", start="judge.yaml", **short)
    result = alignlab("train", refused, "--debug", "--output", tmp_path / "run")
    assert result.code == 2 and len(result.errors) == 1
    assert "was trained on genrm" in result.errors[0] and "RL starts from" in result.errors[0]

    unnamed = recipe(tmp_path, model, f"path: {verdicts}", name="unnamed")  # the rows, and the card, say the task
    again = recipe(tmp_path, model, f"path: {answers}", name="again", start="judge.yaml")  # trained on answers since
    for start in (unnamed, again):
        result = alignlab("train", refused, "--debug", f"start={start}", "--output", tmp_path / "run")
        assert result.code == 2 and "was trained on genrm" in result.errors[0], result.err
    assert alignlab("explain", recipe(tmp_path, model, f"path: {answers}", "dpo", start="judge.yaml")).code == 0


@pytest.mark.slow
def test_rl_does_not_start_from_the_run_of_a_judge(ultra: Path, model: Path, tmp_path: Path) -> None:
    verdicts = prepare("genrm", ultra, tmp_path / "genrm")
    answers = prepare("ultrafeedback", ultra, tmp_path / "answers")
    judge = recipe(tmp_path, model, f"task: genrm, path: {verdicts}, max_prompt_tokens: 400", name="judge")
    assert alignlab("train", judge, "--debug", "--output", tmp_path / "first").code == 0
    since = (f"start={tmp_path / 'first'}", "model=starter")
    more = recipe(tmp_path, model, f"path: {answers}", name="more")
    assert alignlab("train", more, *since, "--debug", "--output", tmp_path / "second").code == 0
    refused = recipe(tmp_path, model, f"task: ultrafeedback, path: {answers}", "grpo",
                     reward="{length: {weight: 1, limit: 5}}")  # fmt: skip
    for run_folder in (tmp_path / "first", tmp_path / "second"):
        start = (f"start={run_folder}", "model=starter")
        result = alignlab("train", refused, *start, "--debug", "--output", tmp_path / "run")
        assert result.code == 2 and "was trained on genrm" in result.errors[0], result.err


def test_rl_on_judging_itself_and_preferences_may_start_there(ultra: Path, model: Path, tmp_path: Path) -> None:
    verdicts = prepare("genrm", ultra, tmp_path / "genrm")
    recipe(tmp_path, model, f"task: genrm, path: {verdicts}", name="judge")
    path = recipe(tmp_path, model, f"task: genrm, path: {verdicts}", "grpo", start="judge.yaml",
                  reward="{length: {weight: 1, limit: 5}}")  # fmt: skip
    assert load_recipe(path).stages and alignlab("explain", path).code == 0


# ---- every recipe ----------------------------------------------------------------------------------------------------


def test_every_task_has_recipes_on_real_data() -> None:
    tasks = {name.split("/")[0] for name in PREPARED}
    assert tasks == set(registry.names("tasks")) - {"reasoning"}
    assert all(f"{task}/sft.yaml" in PREPARED for task in tasks)
    assert all(any(f"{task}/{m}.yaml" in PREPARED for m in ("dpo", "grpo")) for task in tasks - {"genrm"})


@pytest.mark.parametrize("name", PREPARED)
def test_a_recipe_reads_its_tasks_folder(name: str) -> None:
    (made,) = load_recipe(REAL / name).stages
    assert made.data.task == (name.split("/")[0],) and str(made.data.path).startswith("data/")


def test_recipes_run_on_small_files_of_the_sets_formats(tmp_path: Path, ultra: Path) -> None:
    conala = write_rows(
        tmp_path / "c.jsonl",
        [{"intent": f"sum x{i}", "snippet": f"y = sum(x{i})", "question_id": i} for i in range(40)],
    )
    prepare("ultrafeedback", ultra, tmp_path / "data" / "ultrafeedback")
    prepare("code", conala, tmp_path / "data" / "code")
    prepare("code", conala, tmp_path / "data" / "conala", "--set", "conala")
    for name in ("ultrafeedback/dpo", "code/grpo"):
        result = run(name, tmp_path)
        assert result.code == 0, result.err
        assert rows(tmp_path / "out" / name / "log_history.jsonl")[-1]["phases_done"] == 2


def run(name: str, where: Path) -> Any:
    arguments = (REAL / f"{name}.yaml", "--debug", "--output", where / "out" / name)
    return alignlab("train", *arguments, cwd=where)


def test_the_study_on_prepared_data_parses(tmp_path: Path, ultra: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    study = RECIPES / "studies" / "ultrafeedback.yaml"
    with pytest.raises(UserError, match="alignlab data prepare ultrafeedback"):
        load_study(study)
    prepare("ultrafeedback", ultra, tmp_path / "data" / "ultrafeedback")
    assert list(load_study(study).arms) == ["ppo", "grpo", "dpo"]


SLICES: dict[str, tuple[str, Sequence[str]]] = {
    "safety": ("safety", ("hh_rlhf", "simple_safety_tests", "advbench", "hhh_alignment")),
    "clinical": ("clinical", ("mts_dialog",)),
    "code": ("code", ("conala", "mbpp", "humaneval")),
    "conala": ("code", ("conala",)),
    "gsm8k": ("gsm8k", ("gsm8k",)),
    "rubric": ("rubric", ("biggen_bench",)),
    "ultrafeedback": ("ultrafeedback", ("ultrafeedback",)),
    "genrm": ("genrm", ("ultrafeedback",)),
    "orca": ("orca", ("orca_dpo_pairs",)),
    "hh": ("hh", ("hh_rlhf",)),
    "jsonl": ("jsonl", ("llamafactory_demos/dpo_en_demo.jsonl",)),
}


@pytest.fixture(scope="module")
def slices(tmp_path_factory: pytest.TempPathFactory, shared_data: Path) -> Path:
    """A place with data/TASK for every task, from the real slices."""
    where = tmp_path_factory.mktemp("slices")
    for name, (task, sources) in SLICES.items():
        named = [word for source in sources for word in ("--from", str(shared_data / source))]
        result = alignlab("data", "prepare", task, *named, "--output", where / "data" / name)
        assert result.code == 0, result.err
    return where


@pytest.mark.slow
@pytest.mark.parametrize("name", PREPARED)
def test_every_recipe_runs_on_its_real_slice(name: str, slices: Path) -> None:
    method = name.removesuffix(".yaml")
    assert alignlab("explain", REAL / name, cwd=slices).code == 0
    result = run(method, slices)
    assert result.code == 0, result.err
    evaluation = json.loads((slices / "out" / method / "evaluation.json").read_text("utf-8"))
    if "reward_model" in method:
        assert 0 <= evaluation["metrics"]["preference/accuracy"] <= 1
    else:
        assert evaluation["scores"] and all(0 <= score <= 1 for score in evaluation["scores"].values())


@pytest.mark.slow
def test_the_study_runs_on_its_real_slice(slices: Path) -> None:
    result = alignlab("study", RECIPES / "studies" / "ultrafeedback.yaml", "--debug", "--output", "out/s", cwd=slices)
    assert result.code == 0, result.err
    assert (slices / "out" / "s" / "report.html").is_file()


# ---- references ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", ["clinical", "conala", "gsm8k", "genrm", "orca", "rubric", "hh"])
def test_every_reference_of_a_real_test_set_is_graded_as_right(name: str, slices: Path) -> None:
    """Read back through the stage's own reading: what is asked for must not be called wrong."""
    task, _ = SLICES[name]
    made = load_recipe(REAL / task / "sft.yaml", [f"data.path={slices / 'data' / name}"]).stages[0]
    examples = load_items(made, "examples", "test")
    wrong = [example.prompt.id for example in examples if graded(task, example) != 1.0]
    assert len(examples) >= 20 and not wrong


@pytest.mark.slow
def test_every_reference_program_passes_its_tests(slices: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """MBPP and HumanEval by their own solutions, run apart; and HumanEval by the continuation alone."""
    monkeypatch.setenv("ALIGNLAB_RUN_CODE", "1")
    made = load_recipe(REAL / "code" / "sft.yaml", [f"data.path={slices / 'data' / 'code'}"]).stages[0]
    programs = [e for e in load_items(made, "examples", "test") if e.prompt.meta["grading"] == "tests"][:80]
    assert {e.prompt.meta["category"] for e in programs} == {"programs", "functions"}
    assert not [example.prompt.id for example in programs if graded("code", example) != 1.0]
    heads = [e for e in programs if e.prompt.meta["category"] == "functions"]
    rest = [replace(e, completion=e.completion.removeprefix(e.prompt.meta["test_setup"])) for e in heads]
    assert not [example.prompt.id for example in rest if graded("code", example) != 1.0]


def graded(task: str, example: Example) -> float:
    said = Completion(token_ids=(), logprobs=(), finish_reason="stop", text=example.completion)
    return get_task(task).grade(example.prompt, said)["score"]
