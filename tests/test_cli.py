"""The command line: what is wrong gets one line a problem and exit code 2, and the README tells the truth."""

from __future__ import annotations

import inspect
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import alignlab as package
from alignlab import pipeline, registry
from alignlab.cli import common
from alignlab.data.files import SUFFIXES
from alignlab.data.formats import FIELDS
from alignlab.pipeline.stage import Lock
from alignlab.recipe import DataSection
from alignlab.tasks import get_task
from alignlab.train import RunError
from tests.runs import (
    ROOT,
    SCRIPT,
    Finished,
    alignlab,
    debug_run,
    files_of,
    run_alignlab,
    small_model,
    start_alignlab,
    write_rows,
)

README = (ROOT / "README.md").read_text("utf-8")
ADDITIONS = [
    {"prompt": f"{a} + {b}", "completion": str(a + b), "answer": str(a + b)} for a in range(5) for b in range(4)
]
PAIRS = [{"prompt": row["prompt"], "chosen": row["answer"], "rejected": "no"} for row in ADDITIONS]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_model(tmp_path_factory.mktemp("models") / "small")


@pytest.fixture
def recipe(tmp_path: Path, model: Path) -> Path:
    """A recipe of a run of a second: supervised fine-tuning of a tiny model on twenty sums."""
    write_rows(tmp_path / "sums.jsonl", ADDITIONS)
    path = tmp_path / "sums.yaml"
    path.write_text(
        f"model: {model}\n"
        "data: {path: sums.jsonl, max_completion_tokens: 8}\n"
        "algorithm: {name: sft, examples_per_step: 4}\n"
        "train: {num_phases: 4, save_every: 1}\n"
        "evaluation: {prompts_per_task: 2}\n",
        "utf-8",
    )
    return path


def refused(result: Finished, *said: str, lines: int = 1) -> None:
    """Exit code 2, and on stderr `lines` lines that say all of this, nothing of Python's, and at most a data report."""
    assert result.code == 2, result
    told = [line for line in result.err.splitlines() if not re.fullmatch(r"(?!error)\w+: .* \d+ of \d+ rows.*", line)]
    assert len(told) == len(result.errors) == lines, result.err
    for part in said:
        assert part in result.err, result.err
    assert not re.search(r"Traceback|pydantic|site-packages|\.py\b", result.err), result.err


def test_a_run_without_a_step_says_so(recipe: Path) -> None:
    """A threshold that nothing reaches: the diagnosis names it and the best score, and the result what it is."""
    method = "algorithm={name: rejection, min_reward: 99, drop_constant: false, prompts_per_phase: 4, group_size: 2}"
    reward = "reward={length: {weight: 1, limit: 0, buffer: 1}}"
    off = "evaluation.prompts_per_task=0"
    result = alignlab("train", recipe, method, reward, off, "--output", recipe.parent / "run")
    assert result.code == 0, result
    assert "note: no optimiser step was taken: this is what it started from" in result.out
    assert "no_step: no optimiser step for 3 phases: nothing was kept (best score seen -1)" in result.err
    steps = alignlab("train", recipe, "--output", recipe.parent / "other", "-q")
    assert steps.code == 0 and "note" not in steps.out


# ---- bad input -------------------------------------------------------------------------------------------------------


def no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def only_pickles(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def cut_off(folder: Path) -> None:
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])


def no_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


BAD_OVERRIDES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "misspelt key": (("algorithm.learning_rte=1e-4",), ("algorithm.learning_rte", "did you mean 'learning_rate'?")),
    "wrong section": (("train.learning_rate=1e-4",), ("train.learning_rate", "it belongs into algorithm")),
    "wrong type": (("train.num_phases=many",), ("train.num_phases", "'many'")),
    "out of range": (("algorithm.learning_rate=-1",), ("algorithm.learning_rate", "greater than 0", "-1")),
    "not finite": (("algorithm.learning_rate=.inf",), ("algorithm.learning_rate", "finite")),
    "no override": (("algorithm",), ("'algorithm'", "key=value")),
    "unknown algorithm": (("algorithm={name: stf}",), ("'stf'", "did you mean 'sft'?", "there are: distill")),
    "unknown task": (("data.task=resoning",), ("'resoning'", "did you mean 'reasoning'?")),
    "unknown reward": (
        ("algorithm={name: grpo}", "reward={exat: 1}"),
        ("'exat'", "did you mean 'exact'?", "package.module:attribute"),
    ),
    "unknown option of a reward": (
        ("algorithm={name: grpo}", "reward={length: {limt: 9}}"),
        ("reward.length.limt: unknown option; did you mean 'limit'?",),
    ),
    "option of a reward that does not exist": (
        ("algorithm={name: grpo}", "reward={exact: {weight: 1, colour: red}}"),
        ("reward.exact.colour: unknown option; it takes mode",),
    ),
    "options of a reward in a mapping of their own": (
        ("algorithm={name: grpo}", "reward={length: {weight: 1, options: {limit: 3}}}"),
        ("reward.length.options: unknown option; options stand beside weight: {weight: 1, limit: 3}",),
    ),
    "wrong type of a reward's option": (
        ("algorithm={name: grpo}", "reward={length: {limit: many}}"),
        ("reward.length.limit: a whole number is needed, not 'many'",),
    ),
    "wrong choice of a reward's option": (
        ("algorithm={name: grpo}", "reward={exact: {mode: loose}}"),
        ("reward.exact.mode: strict or flexible or marked is needed, not 'loose'",),
    ),
    "misspelt task of a reward": (
        ("algorithm={name: grpo}", "data={task: [reasoning, code]}", "reward={exact: {tasks: reasonning}}"),
        ("reward.exact.tasks: no task 'reasonning' in data.task (reasoning, code); did you mean 'reasoning'?",),
    ),
    "reward without what it reads": (
        ("algorithm={name: grpo, prompts_per_phase: 2}", "reward={format: 1}", "evaluation.prompts_per_task=0"),
        (
            "no function ('format') judges any of 19 prompts",
            "format needs a column `format` that is reasoning_answer (data.columns",
        ),
    ),
    "reward for another task than the rows'": (
        ("algorithm={name: grpo}", "reward={length: {tasks: code}, exact: {tasks: reasoning}}"),
        ("no function ('length', 'exact') judges any of 19 prompts; length is for code only", "for reasoning only"),
    ),
    "reward that is a name": (("algorithm={name: grpo}", "reward=length"), ("reward: ", "reward={length: 1}")),
    "reward whose entry is a name": (
        ("algorithm={name: grpo}", "reward={length: high}"),
        ("reward: length: a weight is needed", "not 'high'"),
    ),
    "reward without a space": (
        ("algorithm={name: grpo}", "reward={length:0.5}"),
        ("a space is missing after the colon of 'length:0.5': write {length: 0.5}",),
    ),
    "reward of which nothing is left": (
        ("algorithm={name: grpo}", "reward={length: null}"),
        ("reward: every component is null", "default rewards"),
    ),
    "reward that is no function": (
        ("algorithm={name: grpo}", "reward={'math:pi': 1}"),
        ("reward 'math:pi' is 3.14159", "not a function of (prompts, completions)"),
    ),
    "reward that is a module": (
        ("algorithm={name: grpo}", "reward={os.path: 1}"),
        ("reward 'os.path' is a module, not a function",),
    ),
    "bad option of a reward": (
        ("algorithm={name: grpo}", "reward={length: {limit: -1, buffer: 4}}"),
        ("reward.length: needs limit >= 0",),
    ),
    "reward that cannot be imported": (
        ("algorithm={name: grpo}", "reward={my_package.my_reward: 1}"),
        ("my_package.my_reward", "cannot import"),
    ),
    "no reward at all": (("algorithm={name: grpo}",), ("no reward", "name one under `reward`")),
    "learned without a reward model": (
        ("algorithm={name: grpo}", "reward={learned: 1}"),
        ("`learned` needs `reward_model: RECIPE or RUN`",),
    ),
    "unknown start": (("start=nowhere.yaml",), ("'nowhere.yaml'", "neither a stage")),
    "unknown device": (("device=tpu9",), ("device 'tpu9'", "try auto or cpu")),
    "unknown mirror": (("tracking=mlflow",), ("'mlflow'", "tensorboard, wandb")),
    "name that is a path": (("name=../../elsewhere",), ("'../../elsewhere'", "cannot be a folder name")),
    "no such model": (("model.name=no/such-model-anywhere",), ("no/such-model-anywhere",)),
    "no such model folder": (("model.name=./no-such-folder",), ("no such folder", "starter")),
    "missing data file": (("data.path=smus.jsonl",), ("smus.jsonl", "no such file")),
    "missing validation file": (("data.validation_path=none.jsonl",), ("none.jsonl", "no such file")),
    "folder as data": (("data.path=.",), ("is a folder",)),
    "bad column": (("data.columns={prompt: qestion}",), ("no column 'qestion'", "found: prompt, completion, answer")),
    "two tasks of one file": (("data.task=[reasoning, code]",), ("is one task, not reasoning, code", "data.task=[]")),
    "no data": (("data.path=null",), ("names neither a task",)),
    "everything too long": (("data.max_prompt_tokens=1",), ("none of", "raise data.max_prompt_tokens")),
    "validation that cannot be graded": (
        ("data.task=safety",),
        ("evaluation: task 'safety' cannot grade prompt", "harmful", "evaluation.prompts_per_task=0"),
    ),
    "adapter on nothing": (
        ("model.adapter={target_modules: query}",),
        ("query match nothing", "q_proj"),
    ),
    "adapter by a paper's name": (
        ("model.adapter=qlora",),
        ("for QLoRA take model.adapter=lora model.quantization=4bit",),
    ),
    "unknown adapter": (("model.adapter=ia3",), ("'ia3' is no adapter; there is lora",)),
    "half precision": (("model.dtype=float16",), ("Gemma overflows in float16",)),
}


BEYOND_EXPLAIN = {"unknown device", "no such model", "everything too long"}
"""What depends on this machine, the hub or a tokenizer, so that `explain` does not know it."""


@pytest.mark.parametrize("case", BAD_OVERRIDES)
def test_bad_input_is_one_line_and_blocks_nothing(recipe: Path, case: str) -> None:
    overrides, said = BAD_OVERRIDES[case]
    output = recipe.parent / "run"
    result = alignlab("train", recipe, *overrides, "--output", output, cwd=recipe.parent)
    refused(result, *said)
    explained = alignlab("explain", recipe, *overrides, cwd=recipe.parent)
    assert (explained.errors, explained.code) == (([], 0) if case in BEYOND_EXPLAIN else (result.errors, 2))
    assert not list(output.rglob("*.safetensors")) and not list(output.rglob(".lock"))
    again = alignlab("train", recipe, "--debug", "--output", output, cwd=recipe.parent)
    assert again.code == 0, again.err


def test_a_hub_that_cannot_be_reached_is_one_line_at_once(recipe: Path) -> None:
    """In a real process, as the libraries read the environment when they are imported; nothing listens at that port."""
    away = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9"}
    result = run_alignlab("train", recipe, "model=google/gemma-9-none", "--output", recipe.parent / "run", **away)
    refused(result, "'google/gemma-9-none' is not here and the model hub cannot be reached; check the spelling")


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (no_config, ("has no config.json",)),
        (no_weights, ("no model.safetensors in it", "download")),
        (only_pickles, ("only pickle", "convert", "safetensors")),
        (cut_off, ("damaged", "download it again")),
        (no_tokenizer, ("has no tokenizer.json",)),
    ],
)
def test_an_incomplete_model_folder_is_named(
    recipe: Path, model: Path, damage: Callable[[Path], None], said: tuple[str, ...]
) -> None:
    broken = recipe.parent / "broken"
    shutil.copytree(model, broken)
    damage(broken)
    result = alignlab("train", recipe, f"model.name={broken}", "--output", recipe.parent / "run")
    refused(result, str(broken), *said)
    if damage is not cut_off:
        assert alignlab("explain", recipe, f"model.name={broken}").errors == result.errors


def test_every_problem_of_a_recipe_has_its_line(recipe: Path) -> None:
    bad = ("algorithm.learning_rte=1", "train.num_phases=0", "seed=-1", "evluation.every=3")
    result = alignlab("train", recipe, *bad, "--output", recipe.parent / "run")
    refused(result, "learning_rte", "train.num_phases", "seed", "evluation", lines=4)
    assert not (recipe.parent / "run").exists()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", ("is empty",)),
        (b'{"prompt": "1 + 1", "completion": "2"}\n{"prompt": \n', ("line 2", "invalid JSON")),
        (b'["prompt", "completion"]\n', ("line 1", "expected an object")),
        (b'{"question": "1 + 1", "reply": "2"}\n', ("completion", "found: question, reply")),
        (b'{"prompt": "caf\xe9", "completion": "2"}\n', ("line 1", "0xe9", "UTF-8")),
        (b'{"prompt": "1 + 1", "completion": "2"}\n', ("no row is left for validation", "prompts_per_task=0")),
        (b'{"prompt": "1 + 1", "completion": ["2", "3"]}\n' * 3, ("row 1",)),
        (b'{"prompt": "", "completion": "2"}\n' * 3, ("3 of 3 rows are unusable", "empty prompt")),
    ],
)
def test_unusable_data_names_file_and_line(recipe: Path, content: bytes, said: tuple[str, ...]) -> None:
    (recipe.parent / "sums.jsonl").write_bytes(content)
    result = alignlab("train", recipe, "--output", recipe.parent / "run")
    refused(result, "sums.jsonl", *said)
    assert alignlab("explain", recipe).errors == result.errors and not (recipe.parent / "run").exists()


def test_rows_of_an_unknown_task_are_said_before_training(recipe: Path) -> None:
    write_rows(recipe.parent / "sums.jsonl", [{**row, "task": "arithmetic"} for row in ADDITIONS])
    result = alignlab("train", recipe, "--output", recipe.parent / "run")
    refused(result, "task 'arithmetic'", "there are: clinical", "evaluation.prompts_per_task=0")
    result = alignlab("train", recipe, "evaluation.prompts_per_task=0", "--output", recipe.parent / "run")
    assert result.code == 0, result.err


def test_a_missing_recipe_and_a_folder_are_no_recipes(tmp_path: Path) -> None:
    refused(alignlab("train", "nowhere.yaml", cwd=tmp_path), "nowhere.yaml", "no such recipe file")
    refused(alignlab("train", tmp_path), "a folder, not a recipe file")
    refused(alignlab("study", "nowhere.yaml", cwd=tmp_path), "nowhere.yaml", "no such recipe file")


def test_a_wrong_command_line_shows_how_it_is_right() -> None:
    assert alignlab("trian").code == 2 and alignlab("train").code == 2
    assert alignlab("train", "recipes/starter/sft.yaml", "--outptu", "x").code == 2
    assert alignlab("version").out.strip() == package.__version__


def test_a_model_beside_a_start_is_said_before_anything_is_trained(recipe: Path, model: Path, cache: Path) -> None:
    staged = recipe.with_name("staged.yaml")
    staged.write_text("extends: sums.yaml\nstart: sums.yaml\nalgorithm: {name: sft, examples_per_step: 4}\n", "utf-8")
    before = set(cache.iterdir())
    result = alignlab("train", staged, "model.name=some/other", "--output", recipe.parent / "run")
    refused(result, "model.name has no effect", "start:")
    assert set(cache.iterdir()) == before


def test_a_file_in_the_place_of_the_run_folder(recipe: Path) -> None:
    refused(alignlab("train", recipe, "--output", recipe), "cannot be a run folder", "another --output")
    assert recipe.is_file()


# ---- a folder and its run --------------------------------------------------------------------------------------------


def test_a_folder_belongs_to_one_run(recipe: Path) -> None:
    output = recipe.parent / "run"
    train = ("train", recipe, "--output", output)
    assert alignlab(*train).code == 0
    for overrides in ((), ("--resume",)):
        done = alignlab(*train, *overrides)
        assert done.code == 0 and "already complete" in done.err
    refused(alignlab(*train, "seed=7"), "already holds a run", "--resume", "--output")
    refused(alignlab(*train, "seed=7", "--resume"), "another recipe, data or model", "another --output")
    write_rows(recipe.parent / "sums.jsonl", ADDITIONS[1:])
    refused(alignlab(*train, "--resume"), "another recipe, data or model")


def break_off(recipe: Path, output: Path, *overrides: str) -> None:
    """The run as a kill after phase 2 of 4 leaves it."""
    assert alignlab("train", recipe, "train.keep_checkpoints=9", *overrides, "--output", output).code == 0
    for made_later in ("checkpoints/phase-000003", "checkpoints/phase-000004", "policy"):
        shutil.rmtree(output / made_later)
    (output / "stage.json").unlink()


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ("seed=7", "seed: 42 -> 7"),
        ("algorithm.learning_rate=3e-4", "algorithm.learning_rate: 5e-05 -> 0.0003"),
        ("train.num_phases=9", "train.num_phases: 4 -> 9"),
        ("algorithm.examples_per_step=5", "algorithm.examples_per_step: 4 -> 5"),
        ("train.schedule.shape=linear", "train.schedule.shape: 'constant' -> 'linear'"),
    ],
)
def test_resuming_with_a_changed_recipe_names_the_key(recipe: Path, change: str, key: str) -> None:
    output, kept = recipe.parent / "run", "train.keep_checkpoints=9"
    break_off(recipe, output)
    before = {p: p.read_bytes() for p in output.rglob("*") if p.is_file()}
    result = alignlab("train", recipe, kept, change, "--resume", "--output", output)
    refused(result, "cannot resume", key, "--output")
    assert {p: p.read_bytes() for p in output.rglob("*") if p.is_file()} == before
    good = alignlab("train", recipe, kept, "--resume", "--output", output)
    assert good.code == 0 and "resumed after phase 2 of 4" in good.err


def test_resuming_with_changed_data_or_model_names_them(recipe: Path, model: Path) -> None:
    output, kept = recipe.parent / "run", "train.keep_checkpoints=9"
    break_off(recipe, output)
    write_rows(recipe.parent / "sums.jsonl", ADDITIONS[1:])
    refused(alignlab("train", recipe, kept, "--resume", "--output", output), "cannot resume", "(data: ")
    write_rows(recipe.parent / "sums.jsonl", ADDITIONS)
    other = recipe.parent / "other"
    shutil.copytree(model, other)
    config = json.loads((other / "config.json").read_text("utf-8"))
    (other / "config.json").write_text(json.dumps({**config, "sliding_window": 32}), "utf-8")
    result = alignlab("train", recipe, kept, f"model.name={other}", "--resume", "--output", output)
    refused(result, "cannot resume", "(start: ")


def test_a_run_that_has_begun_is_not_overwritten(recipe: Path) -> None:
    output = recipe.parent / "run"
    break_off(recipe, output)
    log = (output / "log_history.jsonl").read_bytes()
    refused(alignlab("train", recipe, "train.keep_checkpoints=9", "--output", output), "already holds a run")
    assert (output / "log_history.jsonl").read_bytes() == log


def test_resume_without_a_checkpoint_starts_from_the_beginning(recipe: Path) -> None:
    output = recipe.parent / "run"
    first = alignlab("train", recipe, "--resume", "--output", output)
    assert first.code == 0 and "resumed" not in first.err
    shutil.rmtree(output / "checkpoints")
    shutil.rmtree(output / "policy")
    (output / "stage.json").unlink()
    again = alignlab("train", recipe, "--resume", "seed=7", "--output", output)
    assert again.code == 0 and "resumed" not in again.err
    assert [json.loads(line)["step"] for line in (output / "log_history.jsonl").read_text("utf-8").splitlines()] == [
        1, 2, 3, 4, 4,
    ]  # fmt: skip
    assert "seed: 7" in (output / "recipe.yaml").read_text("utf-8")


def test_damaged_checkpoints_are_skipped_and_if_all_are_nothing_is_deleted(recipe: Path) -> None:
    output, train = recipe.parent / "run", ("train", recipe, "train.keep_checkpoints=9", "--resume")
    break_off(recipe, output)
    newest, oldest = (output / "checkpoints" / f"phase-00000{n}" / "policy" / "model.safetensors" for n in (2, 1))
    newest.write_bytes(newest.read_bytes()[:-1])
    result = alignlab(*train, "--output", output)
    assert result.code == 0 and "resumed after phase 1 of 4" in result.err
    assert "skipped checkpoint phase-000002" in result.err
    shutil.rmtree(output)
    break_off(recipe, output)
    for path in (newest, oldest):
        path.write_bytes(b"")
    result = alignlab(*train, "--output", output)
    assert result.code == 2 and "no usable checkpoint is left" in result.errors[0]
    assert newest.is_file() and oldest.is_file()


def test_a_damaged_result_is_noticed(recipe: Path) -> None:
    output = recipe.parent / "run"
    assert alignlab("train", recipe, "--output", output).code == 0
    weights = output / "policy" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    refused(alignlab("train", recipe, "--resume", "--output", output), "is damaged", "train it again")
    start = ("train", recipe, "model=starter", f"start={output}", "--output", recipe.parent / "next")
    refused(alignlab(*start), "is damaged")


def test_a_locked_folder_is_refused_and_a_dead_owner_is_not_waited_for(recipe: Path) -> None:
    output = recipe.parent / "run"
    output.mkdir()
    alive = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    (output / ".lock").write_text(str(alive.pid), "utf-8")
    refused(alignlab("train", recipe, "--output", output), f"process {alive.pid} is running this")
    assert (output / ".lock").read_text("utf-8") == str(alive.pid)
    alive.communicate(b"\n")
    assert alignlab("train", recipe, "--output", output).code == 0
    assert not (output / ".lock").exists()


@pytest.mark.parametrize("left", ["", "not a number"])
def test_a_lock_without_an_owner_is_taken(tmp_path: Path, left: str) -> None:
    (tmp_path / ".lock").write_text(left, "utf-8")
    with Lock(tmp_path):
        assert (tmp_path / ".lock").read_text("utf-8") == str(os.getpid())
    assert not (tmp_path / ".lock").exists()


def test_debug_leaves_a_run_of_that_name_alone(recipe: Path) -> None:
    assert alignlab("train", recipe, cwd=recipe.parent).code == 0
    before = (recipe.parent / "runs" / "sums" / "log_history.jsonl").read_bytes()
    for arguments in ((), (), ("--resume",)):  # each without --resume anew, with it as it stands
        debug = alignlab("train", recipe, "--debug", *arguments, cwd=recipe.parent)
        assert debug.code == 0 and ("already complete" in debug.err) == bool(arguments)
    assert (recipe.parent / "runs" / "sums" / "log_history.jsonl").read_bytes() == before
    assert (recipe.parent / "runs" / "debug" / "sums" / "policy").is_dir()


def test_a_debug_run_is_replaced_only_by_one_that_begins(
    recipe: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    debug = recipe.parent / "runs" / "debug" / "sums"
    assert alignlab("train", recipe, "--debug", cwd=recipe.parent).code == 0
    before = files_of(debug)
    broken = recipe.parent / "broken"
    shutil.copytree(model, broken)
    cut_off(broken)
    for wrong in ("algorithm.learning_rte=1", "data.path=none.jsonl", "model.name=no/such", f"model.name={broken}"):
        assert alignlab("train", recipe, wrong, "--debug", cwd=recipe.parent).code == 2
        assert files_of(debug) == before and [p.name for p in debug.parent.iterdir()] == ["sums"]
    monkeypatch.setattr(pipeline, "run_recipe", raising(KeyboardInterrupt()))
    assert alignlab("train", recipe, "--debug", cwd=recipe.parent).code == 130
    assert files_of(debug) == before
    monkeypatch.undo()
    assert alignlab("train", recipe, "seed=7", "--debug", cwd=recipe.parent).code == 0
    assert files_of(debug)["recipe.yaml"] != before["recipe.yaml"] and len(list(debug.parent.iterdir())) == 1


def test_the_way_out_that_an_error_names_works_in_debug_too(recipe: Path) -> None:
    debug = ("train", recipe, "data.task=safety", "--debug", "--output", recipe.parent / "run")
    refused(alignlab(*debug), "evaluation.prompts_per_task=0 switches evaluation off")
    assert alignlab(*debug, "evaluation.prompts_per_task=0").code == 0


@pytest.mark.parametrize("name", ["with space", "ünïcode", "brackets [red] [_x]"])
def test_odd_folder_names_work(recipe: Path, name: str) -> None:
    folder = recipe.parent / name
    folder.mkdir()
    odd = shutil.copy(recipe, folder / f"{name}.yaml")
    shutil.copy(recipe.parent / "sums.jsonl", folder)
    result = alignlab("train", odd, "--debug", cwd=folder)
    assert result.code == 0, result.err
    assert f"run folder: runs/debug/{name}" in result.out and (folder / "runs" / "debug" / name / "policy").is_dir()


# ---- how it ends -----------------------------------------------------------------------------------------------------


def raising(error: BaseException) -> Callable[..., Any]:
    def run(*_: Any, **__: Any) -> Any:
        raise error

    return run


def test_what_is_unexpected_is_one_line_and_exit_code_1(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "run_recipe", raising(KeyError("a bug\nwith a second line")))
    result = alignlab("train", recipe)
    assert result.code == 1 and len(result.errors) == 1 and "KeyError" in result.errors[0]
    assert "ALIGNLAB_TRACEBACK=1" in result.err and "Traceback" not in result.err
    monkeypatch.setenv("ALIGNLAB_TRACEBACK", "1")
    with pytest.raises(KeyError):
        alignlab("train", recipe)


def test_a_run_that_breaks_off_is_exit_code_1(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "run_recipe", raising(RunError("phase 3: the loss is nan")))
    result = alignlab("train", recipe)
    assert result.code == 1 and result.err == "error: phase 3: the loss is nan\n"


@pytest.mark.parametrize("command", ["train", "study"])
def test_ctrl_c_is_130_and_says_how_to_go_on(recipe: Path, monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    from alignlab import recipe as recipes
    from alignlab.study import plan

    monkeypatch.setattr(recipes, "load_recipe", raising(KeyboardInterrupt()))
    monkeypatch.setattr(plan, "load_study", raising(KeyboardInterrupt()))
    result = alignlab(command, recipe)
    assert result.code == 130 and len(result.err.splitlines()) == 1 and result.err.startswith("stopped; ")
    assert ("--resume" in result.err) == (command == "train")  # a study has no such option


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_real_signal_ends_a_real_run_which_then_goes_on(recipe: Path, number: signal.Signals, code: int) -> None:
    output, log = recipe.parent / "run", recipe.parent / "run" / "log_history.jsonl"
    long = ("train", recipe, "train.num_phases=2000", "train.keep_checkpoints=1", "--output", output)
    process = start_alignlab(*long)
    deadline = time.monotonic() + 120
    while not (log.is_file() and log.read_bytes().count(b"\n") >= 3):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == code and "Traceback" not in err and not (output / "stage.json").exists()
    assert not (output / ".lock").exists()
    again = alignlab(
        *long[:2], "train.num_phases=2000", "train.keep_checkpoints=1", "--resume", "seed=7", "--output", output
    )
    refused_at = re.search(r"phase-(\d+)", again.err)
    assert again.code == 2 and refused_at and int(refused_at[1]) >= 2  # there is a checkpoint to go on from


# ---- names of one's own ----------------------------------------------------------------------------------------------

OWN_REWARD = """
def short(prompts, completions, *, most=4):
    return [float(max(len(c.token_ids) for c in completions) - len(c.token_ids)) / most for c in completions]
"""


def test_a_reward_of_ones_own_is_named_by_its_import_path(recipe: Path) -> None:
    """In a real process, as it is imported from the folder the command is given in. It may need completions to run."""
    (recipe.parent / "own_rewards.py").write_text(OWN_REWARD, "utf-8")
    (recipe.parent / "random.py").write_text("raise RuntimeError('a file of the user is not the library')", "utf-8")
    grpo = ("algorithm={name: grpo, prompts_per_phase: 2, group_size: 2}", "reward={'own_rewards:short': {most: 2}}")
    result = run_alignlab("train", recipe, *grpo, "--debug", "--output", "run", cwd=recipe.parent)
    assert result.code == 0, result.err
    row = json.loads((recipe.parent / "run" / "log_history.jsonl").read_text("utf-8").splitlines()[0])
    assert row["reward/own_rewards:short"] == row["reward/mean"]


def test_a_reward_that_fails_is_named_with_its_sample(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = type(sys)("broken_rewards")
    module.fails = lambda prompts, completions: [1.0 / 0 for _ in completions]  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "broken_rewards", module)
    grpo = ("algorithm={name: grpo, prompts_per_phase: 2, group_size: 2}", "reward={'broken_rewards:fails': 1}")
    result = alignlab("train", recipe, *grpo, "--debug", "--output", recipe.parent / "run")
    assert result.code == 2 and len(result.errors) == 1
    for part in ("broken_rewards:fails", "ZeroDivisionError", "prompt 'sums/"):
        assert part in result.errors[0]


# ---- the README ------------------------------------------------------------------------------------------------------


def test_the_tree_of_the_readme_is_the_tree() -> None:
    (tree,) = re.findall(r"```\nsrc/alignlab/\n(.*?)```", README, re.DOTALL)
    listed = re.findall(r"── (\S+)", tree)
    sources = ROOT / "src" / "alignlab"
    there = {f"{p.name}/" if p.is_dir() else p.name for p in sources.iterdir()}
    assert sorted(listed) == sorted(there - {"__init__.py", "__pycache__/", "py.typed"})
    assert all(re.search(r"\S+ {2,}\S", line) for line in tree.splitlines()), "every entry says what it is"


def test_imports_of_the_readme_tree_point_one_way() -> None:
    """Read from the top, nothing refers to what has not been seen; import-linter checks the same by its own list."""
    listed = [name.rstrip("/").removesuffix(".py") for name in re.findall(r"── (\S+)", README)]
    for i, name in enumerate(listed):
        path = ROOT / "src" / "alignlab" / name
        files = path.rglob("*.py") if path.is_dir() else [path.with_suffix(".py")]
        imported = {
            found
            for file in files
            for found in re.findall(r"^\s*from alignlab\.(\w+)", file.read_text("utf-8"), re.MULTILINE)
        }
        assert imported <= {*listed[: i + 1], "__init__"}, name


def test_the_commands_of_the_readme_run(tmp_path: Path) -> None:
    """Every line of the blocks marked `<!-- run -->`, by the shell, from a folder that holds the recipes."""
    blocks = re.findall(r"<!-- run -->\n```bash\n(.*?)```", README, re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines() if line.strip()]
    assert lines and all(line.startswith("alignlab ") for line in lines)
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    path = f"{SCRIPT.parent}{os.pathsep}{os.environ['PATH']}"
    for line in lines:
        ran = subprocess.run(
            line, shell=True, cwd=tmp_path, env={**os.environ, "PATH": path}, capture_output=True, text=True
        )
        assert ran.returncode == 0, f"{line}\n{ran.stderr}"


@pytest.mark.slow
@pytest.mark.parametrize("page", ["data", "rewards", "judge", "human", "evaluation"])
def test_the_examples_of_a_page_run(page: str, tmp_path: Path) -> None:
    """Every block marked `<!-- run -->`, by the shell, one after the other in one folder."""
    text = (ROOT / "docs" / f"{page}.md").read_text("utf-8")
    blocks = re.findall(r"<!-- run -->\n```bash\n(.*?)```", text, re.DOTALL)
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    path = f"{SCRIPT.parent}{os.pathsep}{os.environ['PATH']}"
    errors = ""
    for block in blocks:
        ran = subprocess.run(
            ["bash", "-e", "-c", block], cwd=tmp_path, env={**os.environ, "PATH": path}, capture_output=True, text=True
        )
        assert ran.returncode == 0, f"{block}\n{ran.stderr}"
        errors += ran.stderr
    for said in re.findall(r"^It says `([^`]+)`", text, re.MULTILINE):
        assert page != "data" or said in errors
    assert blocks


def test_links_between_pages_lead_somewhere() -> None:
    for page in (ROOT / "README.md", *(ROOT / "docs").rglob("*.md")):
        for target in re.findall(r"\]\((?!https?:)([^)#]*)(?:#[^)]*)?\)", page.read_text("utf-8")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_what_the_pages_say_of_data_and_rewards_is_so() -> None:
    """Every key of the data section, every field of a row, every reward with its options, every task's default."""
    data, rewards = ((ROOT / "docs" / f"{name}.md").read_text("utf-8") for name in ("data", "rewards"))
    own = re.compile("|".join(rf"`(?:data\.)?{key}\b" for key in DataSection.model_fields))
    named = {match.strip("`").removeprefix("data.") for match in own.findall(data)}
    assert named == set(DataSection.model_fields), set(DataSection.model_fields) - named
    assert all(f"`{field}`" in data for field in FIELDS) and all(suffix in data for suffix in SUFFIXES)
    for name in registry.names("rewards"):
        function = getattr(registry.resolve("rewards", name), name)
        options = [p for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY]
        row = next(line for line in rewards.splitlines() if line.startswith(f"| `{name}` |"))
        for option in options:
            if option.name not in ("reward_model", "template", "same_ids", "weight"):  # not a recipe's to give
                told = re.findall(rf"`{option.name}` `?([\w.]+)", row)
                assert str(option.default) in told or (option.default == "" and f"`{option.name}`" in row), (
                    name,
                    option,
                )
    for name in registry.names("tasks"):
        assert f"`{name}`" in data and f"`{name}`" in rewards
        for reward, weight in get_task(name).default_reward.items():
            (row,) = [
                r for r in rewards.split("| task | default |")[1].split("\n\n")[0].splitlines() if f"`{name}`" in r
            ]
            assert f"`{reward}` {weight:g}" in row


def test_what_the_readme_says_a_run_leaves_is_there() -> None:
    (section,) = re.findall(r"## What a run leaves behind\n(.*?)\n## ", README, re.DOTALL)
    named = [name for name in re.findall(r"`([^`]+)`", section) if "/" in name or re.search(r"\.\w+$", name)]
    assert {"recipe.yaml", "provenance.json", "log_history.jsonl", "checkpoints/"} <= set(named)
    ppo, reward_model = debug_run("starter/ppo.yaml"), debug_run("starter/reward_model.yaml")
    for name in named:
        assert (ppo / name).exists() or (reward_model / name).exists(), name
    left = {p.name + ("/" if p.is_dir() else "") for p in [*ppo.iterdir(), *reward_model.iterdir()]}
    assert left - set(named) <= {"stage.json", "evaluation_samples.json"}


def test_the_recipes_and_files_of_the_readme_are_there() -> None:
    for name in re.findall(r"`(recipes/[^`]+)`", README):
        folder, _, rest = name.partition("{")
        names = (
            [folder + part + rest.partition("}")[2] for part in rest.partition("}")[0].split(",")] if rest else [name]
        )
        for path in names:
            assert (ROOT / path).is_dir() if path.endswith("/") else (ROOT / path).is_file(), path
    targets = re.findall(r"`make ([\w-]+)", README) + re.findall(r"^make ([\w-]+)", README, re.MULTILINE)
    makefile = (ROOT / "Makefile").read_text("utf-8")
    for target in {word for line in targets for word in line.split()}:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    for image in re.findall(r"!\[[^]]*\]\(([^)]+)\)", README):
        assert (ROOT / image).is_file(), image


def test_shipped_recipes_are_found_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert common.find_recipe(Path("recipes/starter/sft.yaml")).is_file()
    (tmp_path / "recipes" / "starter").mkdir(parents=True)
    own = tmp_path / "recipes" / "starter" / "sft.yaml"
    own.write_text("algorithm: sft\n", "utf-8")
    assert common.find_recipe(Path("recipes/starter/sft.yaml")) == Path(
        "recipes/starter/sft.yaml"
    )  # one's own goes first
