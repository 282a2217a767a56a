"""Stages of a recipe: each a folder made once, known by a hash, and the start of the next; a kill loses nothing."""

from __future__ import annotations

import json
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from alignlab import starter
from alignlab.conversation import Template
from alignlab.data import collate
from alignlab.forward import rewards
from alignlab.generate import Sampling
from alignlab.models import (
    ModelChoice,
    frozen_policy,
    load_generation_config,
    load_reward_model,
    load_tokenizer,
)
from alignlab.pipeline import check_recipe, run_recipe
from alignlab.pipeline.identity import (
    StageResult,
    Teacher,
    code_fingerprint,
    data_fingerprint,
    model_fingerprint,
    stage_key,
)
from alignlab.pipeline.stage import NORMALISATION_PROMPTS, StageRun
from alignlab.recipe import Stage, load_recipe
from alignlab.rollout import sample_prompts
from alignlab.types import Pair, Row
from tests.runs import (
    RECIPES,
    alignlab,
    debug_cache,
    debug_run,
    files_of,
    rows,
    small_model,
    start_alignlab,
    strict_json,
    write_rows,
)

SUMS = [
    {
        "id": f"sum/{a}{b}",
        "task": "reasoning",
        "prompt": f"{a} + {b}",
        "answer": str(a + b),
        "completion": str(a + b),
        "chosen": str(a + b),
        "rejected": "many",
    }
    for a in range(5)
    for b in range(4)
]
PIPELINE = """
model: {model}
data: {{path: sums.jsonl, max_completion_tokens: 8}}
train: {{num_phases: 2, save_every: 1}}
evaluation: {{prompts_per_task: 2}}
stages:
- {{name: sft, algorithm: {{name: sft, examples_per_step: 4, learning_rate: 1e-2}}}}
- {{name: judge, algorithm: {{name: reward_model, pairs_per_step: 4}}}}
- {{name: dpo, algorithm: {{name: dpo, pairs_per_step: 4, learning_rate: 1e-3}}}}
- {{name: grpo, reward_model: judge, reward: {{learned: 1.0}}, algorithm: {{name: grpo, kl_coef: 0.1, prompts_per_phase: 2, group_size: 2}}}}
"""  # noqa: E501
STAGES = ("sft", "judge", "dpo", "grpo")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_model(tmp_path_factory.mktemp("models") / "small")


@pytest.fixture
def recipe(tmp_path: Path, model: Path) -> Path:
    write_rows(tmp_path / "sums.jsonl", SUMS)
    path = tmp_path / "pipeline.yaml"
    path.write_text(PIPELINE.format(model=model), "utf-8")
    return path


def record(folder: Path, name: str) -> Any:
    return strict_json((folder / f"{name}.json").read_text("utf-8"))


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


# ---- stages ----------------------------------------------------------------------------------------------------------


def test_each_stage_starts_from_the_policy_before_it(recipe: Path) -> None:
    """sft -> judge and dpo; dpo -> grpo (the judge between them is no policy), scored by the judge."""
    run = recipe.parent / "run"
    results = run_recipe(load_recipe(recipe), run, quiet=True)
    assert [r.folder for r in results] == [run / name for name in STAGES]
    assert [r.kind for r in results] == ["policy", "reward_model", "policy", "policy"]
    keys = {name: record(run / name, "stage")["key"] for name in STAGES}
    starts = {name: record(run / name, "provenance")["start"] for name in STAGES}
    assert starts["judge"] == starts["dpo"] == keys["sft"] and starts["grpo"] == keys["dpo"]
    assert starts["sft"] == model_fingerprint(load_recipe(recipe).stages[0].model)
    assert record(run / "grpo", "provenance")["reward_model"] == keys["judge"]
    assert len(set(keys.values())) == 4


def test_the_reference_of_a_stage_is_the_policy_it_starts_from(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit the SFT policy for dpo, and after dpo's updates still that; the dpo policy for grpo."""
    seen: list[tuple[str, dict[str, torch.Tensor]]] = []
    finish = StageRun._finish

    def look(self: StageRun, models: Any, *arguments: Any) -> Any:
        if "reference" in models:
            seen.append((self.stage.name, {k: v.clone() for k, v in models["reference"].state_dict().items()}))
        return finish(self, models, *arguments)

    monkeypatch.setattr(StageRun, "_finish", look)
    run_recipe(load_recipe(recipe), recipe.parent / "run", quiet=True)
    assert [name for name, _ in seen] == ["dpo", "grpo"]
    for (_, reference), start in zip(seen, ("sft", "dpo"), strict=True):
        saved = load_file(recipe.parent / "run" / start / "policy" / "model.safetensors")
        assert all(torch.equal(reference[name], tensor) for name, tensor in saved.items())
    assert weights(recipe.parent / "run/sft/policy") != weights(recipe.parent / "run/dpo/policy")


LABELLED = [
    {"prompt": f"{a} + {b}", "completion": str(a + b) if b % 2 else "many", "label": bool(b % 2), "answer": str(a + b)}
    for a in range(5)
    for b in range(4)
]


def test_kto_learns_from_verdicts_in_a_file(tmp_path: Path, model: Path) -> None:
    """The usual unpaired format; evaluation asks the same prompts; a label that is none is one line with its row."""
    path = tmp_path / "kto.yaml"
    path.write_text(
        f"model: {model}\n"
        "data: {path: verdicts.jsonl, task: reasoning, max_completion_tokens: 8}\n"
        "algorithm: {name: kto, examples_per_step: 8, learning_rate: 1e-3}\n"
        "train: {num_phases: 2}\nevaluation: {prompts_per_task: 2}\n",
        "utf-8",
    )
    write_rows(tmp_path / "verdicts.jsonl", LABELLED)
    result = alignlab("train", path, "--output", tmp_path / "run")
    assert result.code == 0, result.err
    first, second = [row for row in rows(tmp_path / "run" / "log_history.jsonl") if "phases_done" not in row]
    assert first["loss/total"] == pytest.approx(0.5, abs=1e-5) != second["loss/total"]
    assert 0 < first["kto/desirable_fraction"] < 1 and record(tmp_path / "run", "evaluation")["metrics"]
    write_rows(tmp_path / "verdicts.jsonl", [*LABELLED, {**LABELLED[0], "label": "maybe"}])
    refused = alignlab("train", path, "--output", tmp_path / "other")
    assert refused.code == 2 and len(refused.errors) == 1
    assert "verdicts.jsonl, row 21: column 'label' holds 'maybe'" in refused.errors[0]


def stamps(folder: Path) -> dict[str, int]:
    return {str(p): p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}


def test_a_killed_pipeline_goes_on_at_the_first_unfinished_stage(recipe: Path) -> None:
    """Stage 3 of 4 loses its end: made again from its checkpoint, stage 4 anew, stages 1 and 2 are not touched."""
    run = recipe.parent / "run"
    train = ("train", recipe, "--output", run)
    assert alignlab(*train).code == 0
    whole = files_of(run)
    shutil.rmtree(run / "grpo")
    shutil.rmtree(run / "dpo" / "policy")
    shutil.rmtree(run / "dpo" / "checkpoints" / "phase-000002")
    (run / "dpo" / "stage.json").unlink()
    before = stamps(run / "sft") | stamps(run / "judge")
    refused = alignlab(*train)
    assert refused.code == 2 and "add --resume" in refused.errors[0]
    result = alignlab(*train, "--resume")
    assert result.code == 0, result.err
    assert [line for line in result.err.splitlines() if "already complete" in line or "resumed" in line] == [
        f"sft: already complete in {run / 'sft'}",
        f"judge: already complete in {run / 'judge'}",
        "dpo: resumed after phase 1 of 2",
    ]
    assert stamps(run / "sft") | stamps(run / "judge") == before
    again = files_of(run)
    assert again.keys() == whole.keys()
    for name in whole:
        if name.endswith(".safetensors") or name.endswith(("state.json", "recipe.yaml", "completions.jsonl")):
            assert again[name] == whole[name], name
    for name in ("dpo", "grpo"):
        steps = [(row["phase"], row["step"]) for row in rows(run / name / "log_history.jsonl")]
        assert steps == [(0, 1), (1, 2), (2, 2)]


def test_a_changed_later_stage_keeps_the_earlier_ones(recipe: Path) -> None:
    """And the record says what the run was made with in the end."""
    run = recipe.parent / "run"
    assert alignlab("train", recipe, "--output", run).code == 0
    shutil.rmtree(run / "grpo")
    before = stamps(run / "sft") | stamps(run / "judge") | stamps(run / "dpo")
    change = "stages.grpo.algorithm.group_size=3"
    assert alignlab("train", recipe, change, "--resume", "--output", run).code == 0
    assert stamps(run / "sft") | stamps(run / "judge") | stamps(run / "dpo") == before
    assert load_recipe(run / "recipe.yaml") == load_recipe(recipe, [change])
    assert load_recipe(run / "grpo" / "recipe.yaml").stages[0].algorithm.group_size == 3  # type: ignore[attr-defined]
    other = alignlab("train", recipe, "stages.sft.algorithm.examples_per_step=5", "--resume", "--output", run)
    assert other.code == 2 and "another recipe, data or model" in other.errors[0]


def test_the_resolved_recipe_of_a_run_makes_the_run_again(recipe: Path, tmp_path: Path) -> None:
    run, again = tmp_path / "run", tmp_path / "again"
    assert alignlab("train", recipe, "--output", run).code == 0
    assert alignlab("train", run / "recipe.yaml", "--output", again).code == 0
    assert weights(run / "grpo" / "policy") == weights(again / "grpo" / "policy")
    alone = tmp_path / "alone"
    assert alignlab("train", run / "dpo" / "recipe.yaml", "--output", alone).code == 0
    assert weights(run / "dpo" / "policy") == weights(alone / "policy")


def test_a_run_folder_is_a_start_and_its_last_policy_is_taken(recipe: Path) -> None:
    run = recipe.parent / "run"
    assert alignlab("train", recipe, "--output", run).code == 0
    for start, expected in ((run, "grpo"), (run / "sft", "sft")):
        after = recipe.with_name("after.yaml")
        after.write_text(
            f"start: {start}\n"
            "data: {path: sums.jsonl, max_completion_tokens: 8}\n"
            "evaluation: {prompts_per_task: 2}\n"
            "algorithm: {name: dpo, pairs_per_step: 4}\n",
            "utf-8",
        )
        output = recipe.parent / f"after-{expected}"
        result = alignlab("train", after, "--debug", "--output", output)
        assert result.code == 0, result.err
        assert record(output, "provenance")["start"] == record(run / expected, "stage")["key"]


def test_weights_drawn_at_random_are_drawn_once(recipe: Path) -> None:
    """`weights: random` beside the stages means the first: later ones start from what training made of it."""
    run = recipe.parent / "run"
    result = alignlab("train", recipe, "model.weights=random", "--output", run)
    assert result.code == 0, result.err
    for name in ("dpo", "grpo"):
        assert abs(rows(run / name / "log_history.jsonl")[-1]["evaluation/policy/kl_per_token"]) < 0.5
    assert rows(run / "dpo" / "log_history.jsonl")[0]["loss/total"] == pytest.approx(np.log(2), abs=1e-5)
    evaluation = record(run / "dpo", "evaluation")["metrics"]
    assert evaluation["policy/kl_per_sequence"] != 0.0


# ---- identity --------------------------------------------------------------------------------------------------------


def key_of(path: Path, *overrides: str, start: StageResult | None = None, seed: int | None = None) -> str:
    recipe = load_recipe(path, overrides)
    return stage_key(recipe.stages[0], recipe.seed if seed is None else seed, start, None)[0]


def test_a_key_does_not_depend_on_where_things_lie(
    recipe: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = key_of(recipe)
    elsewhere = tmp_path / "else where"
    elsewhere.mkdir()
    shutil.copy(recipe, elsewhere / "other-name.yaml")
    shutil.copy(tmp_path / "sums.jsonl", elsewhere)
    shutil.copytree(model, elsewhere / "copied-model")
    assert key_of(elsewhere / "other-name.yaml", "name=renamed", "stages.sft.name=first") == key
    monkeypatch.chdir(elsewhere)
    assert key_of(Path("other-name.yaml"), "model.name=copied-model") == key
    monkeypatch.setenv("HOME", str(elsewhere))
    assert key_of(Path("other-name.yaml"), "model.name=~/copied-model", "data.path=~/sums.jsonl") == key


CHANGES: dict[str, str] = {
    "seed": "seed=7",
    "a hyperparameter": "stages.sft.algorithm.learning_rate=1e-3",
    "the number of phases": "train.num_phases=3",
    "the optimiser": "train.adamw.beta2=0.9",
    "the schedule": "train.schedule.shape=linear",
    "a length limit": "data.max_prompt_tokens=100",
    "the system prompt": "data.system_prompt=Be brief.",
    "an adapter": "model.adapter=lora",
    "the type": "model.dtype=float64",
    "random weights": "model.weights=random",
}


def test_a_key_changes_with_everything_that_decides_weights(recipe: Path, model: Path, tmp_path: Path) -> None:
    keys = {name: key_of(recipe, change) for name, change in CHANGES.items()}
    start = StageResult(folder=tmp_path, key="0" * 64, kind="policy", ledger={})
    keys["the start"] = key_of(recipe, start=start)
    keys["another start"] = key_of(recipe, start=replace(start, key="1" * 64))
    keys["nothing"] = key_of(recipe)
    other = tmp_path / "other-model"
    for file, change in (("model.safetensors", b"\0"), ("tokenizer.json", b"\n"), ("chat_template.jinja", b"\n")):
        shutil.copytree(model, other, dirs_exist_ok=True)
        (other / file).write_bytes((other / file).read_bytes() + change)
        keys[f"the model's {file}"] = key_of(recipe, f"model.name={other}")
    write_rows(tmp_path / "sums.jsonl", [*SUMS[:-1], {**SUMS[-1], "completion": "0"}])
    keys["one row of the data"] = key_of(recipe)
    assert len(set(keys.values())) == len(keys), keys


def test_a_key_changes_with_the_code_but_a_contract_does_not(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint goes on under a newer version; what is shared by hash is trained again."""
    stage = load_recipe(recipe).stages[0]
    key, contract = stage_key(stage, 42, None, None)
    monkeypatch.setattr("alignlab.pipeline.identity.code_fingerprint", lambda: "other")
    assert stage_key(stage, 42, None, None)[0] != key and stage_key(stage, 42, None, None)[1] == contract
    assert "code" not in contract and "data.path" not in contract and contract["algorithm.name"] == "sft"


def test_provenance_names_what_a_run_was_made_of() -> None:
    folder = debug_run("starter/sft.yaml")
    found, stage = record(folder, "provenance"), load_recipe(RECIPES / "starter" / "sft.yaml").stages[0]
    assert found["start"] == model_fingerprint(stage.model) and found["data"] == data_fingerprint(stage)
    assert found["code"] == code_fingerprint() and found["reward_model"] is None
    assert found["model"]["name"] == "starter" and found["model"]["parameters"] == found["model"]["trained"] > 10**6
    assert found["template"] == {"stop_ids": [1, 4], "bos_id": 2, "pad_id": 0}
    assert found["versions"]["torch"] == torch.__version__ and found["machine"]["device"] == "cpu"
    assert (starter.DATA / "reasoning" / "train.jsonl").is_file()


# ---- a kill that lands -----------------------------------------------------------------------------------------------

GRPO = """
model: {model}
data: {{path: sums.jsonl, task: reasoning, max_completion_tokens: 8}}
algorithm: {{name: grpo, learning_rate: 1e-3, kl_coef: 0.05, prompts_per_phase: 4, group_size: 4, epochs: 2}}
reward: {{exact: 1.0, length: {{weight: 1.0, limit: 2, buffer: 4}}}}
train: {{num_phases: {phases}, save_every: 7, keep_checkpoints: 99, schedule: {{shape: cosine, warmup: 0.2}}}}
evaluation: {{every: 10, prompts_per_task: 2}}
"""
PHASES = 63
SEEN = 17
"""The phase whose row in the log triggers the kill; enough are left that it lands before the end."""


def wait_for(ready: Callable[[], bool], process: Any) -> None:
    deadline = time.monotonic() + 240
    while not ready():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.002)


def logged(folder: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if not k.startswith("time/")} for row in rows(folder / "log_history.jsonl")]


def test_a_sigkilled_run_resumed_is_the_uninterrupted_run_bit_for_bit(tmp_path: Path, model: Path) -> None:
    """A real SIGKILL of a real process, some time after phase 17 of 63 and before the end."""
    write_rows(tmp_path / "sums.jsonl", SUMS)
    recipe = tmp_path / "grpo.yaml"
    recipe.write_text(GRPO.format(model=model, phases=PHASES), "utf-8")
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert alignlab("train", recipe, "--output", whole).code == 0
    log = killed / "log_history.jsonl"
    process = start_alignlab("train", recipe, "--output", killed, OMP_NUM_THREADS=str(torch.get_num_threads()))
    wait_for(lambda: log.is_file() and f'"phase": {SEEN},'.encode() in log.read_bytes(), process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    left = json.loads(log.read_bytes().split(b"\n")[-2])
    assert left["phase"] < PHASES - 1 and not (killed / "stage.json").exists() and (killed / ".lock").exists()
    newest = max(int(p.name.removeprefix("phase-")) for p in (killed / "checkpoints").glob("phase-*"))
    assert 0 < newest < PHASES

    result = alignlab("train", recipe, "--resume", "--output", killed)
    assert result.code == 0 and f"resumed after phase {newest} of {PHASES}" in result.err
    expected, found = files_of(whole / "checkpoints"), files_of(killed / "checkpoints")
    assert found.keys() == expected.keys() and len([n for n in found if n.endswith("state.json")]) == 9
    for name in expected:
        assert found[name] == expected[name], name
    assert files_of(killed / "policy") == files_of(whole / "policy")
    assert logged(killed) == logged(whole)
    assert (killed / "completions.jsonl").read_bytes() == (whole / "completions.jsonl").read_bytes()
    assert record(killed, "evaluation")["scores"] == record(whole, "evaluation")["scores"]

    first, second = (expected[f"phase-{n:06d}/policy/model.safetensors"] for n in (7, 14))
    assert first != second  # the comparison can fail


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ppo", "dpo", "kto", "reward_model", "sft"])
def test_starter_recipes_resume_bit_for_bit_after_a_sigkill(name: str, tmp_path: Path) -> None:
    few = ("algorithm.prompts_per_phase=8",) if name == "ppo" else ()
    small = (
        RECIPES / "starter" / f"{name}.yaml",
        "train.num_phases=12",
        "train.save_every=4",
        "evaluation.every=0",
        *few,
    )
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert alignlab("train", *small, "--output", whole).code == 0
    log = killed / "log_history.jsonl"
    process = start_alignlab("train", *small, "--output", killed, OMP_NUM_THREADS=str(torch.get_num_threads()))
    wait_for(lambda: log.is_file() and b'"phase": 5,' in log.read_bytes(), process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL and not (killed / "stage.json").exists()
    assert alignlab("train", *small, "--resume", "--output", killed).code == 0
    newest = "checkpoints/phase-000012"
    assert files_of(killed / newest) == files_of(whole / newest) and logged(killed) == logged(whole)


# ---- reward models ---------------------------------------------------------------------------------------------------


def test_a_reward_model_is_normalised_on_the_answers_of_its_start() -> None:
    """Scores of the start's own answers, of prompts of every task, have mean 0 and standard deviation 1."""
    folder = debug_run("starter/reward_model.yaml")
    stage = load_recipe(folder / "recipe.yaml", debug=True).stages[0]
    start = next(
        p.parent for p in debug_cache().glob("starter-sft-*/stage.json")
        if strict_json(p.read_text("utf-8"))["key"] == record(folder, "provenance")["start"]
    )  # fmt: skip
    prompts, scores = reference_scores(stage, folder / "reward_model", start / "policy")
    assert len(scores) >= NORMALISATION_PROMPTS and {p.task for p in prompts} == {
        "reasoning",
        "safety",
        "clinical",
        "code",
    }
    assert scores.mean() == pytest.approx(0.0, abs=1e-4) and scores.std(ddof=1) == pytest.approx(1.0, abs=1e-4)
    head = load_file(folder / "reward_model" / "scalar_head.safetensors")
    assert head["scale"].item() > 0 and head["shift"].item() != 0.0


def reference_scores(stage: Stage, reward_model: Path, policy: Path) -> tuple[list[Any], np.ndarray]:
    """What a reward model says about the policy's own answers to the prompts its normalisation is defined on."""
    from alignlab.pipeline.items import load_items

    template = Template.of(load_tokenizer(str(policy)), load_generation_config(str(policy)))
    pairs: list[Pair] = load_items(stage, "pairs", "train")
    prompts = [p.prompt for p in pairs[:: max(1, len(pairs) // NORMALISATION_PROMPTS)]]
    ids = [template.encode_prompt(p) for p in prompts]
    cpu = torch.device("cpu")
    sampling = Sampling(max_completion_tokens=stage.data.max_completion_tokens)
    start = frozen_policy(ModelChoice(name=str(policy)), cpu)
    sampled = sample_prompts(start, prompts, ids, template, sampling, num_samples=1, seed=42, phase=0)
    model = load_reward_model(reward_model, ModelChoice(), device=cpu)
    scores = []
    for prompt, (completion,) in zip(ids, sampled, strict=True):
        row = Row(prompt_ids=tuple(prompt), completion_ids=completion.token_ids)
        with torch.no_grad():
            scores.append(rewards(model, collate([row])).item())
    return prompts, np.array(scores)


def test_the_accuracy_of_a_reward_model_is_of_held_out_pairs() -> None:
    folder = debug_run("starter/reward_model.yaml")
    evaluation = record(folder, "evaluation")
    scores = evaluation["scores"]
    assert len(scores) == 8 and set(scores.values()) <= {0.0, 0.5, 1.0}  # two pairs of each of the four tasks
    assert evaluation["metrics"]["preference/accuracy"] == pytest.approx(np.mean(list(scores.values())))
    for task in ("reasoning", "safety", "clinical", "code"):
        here = [scores[i] for i, name in evaluation["tasks"].items() if name == task]
        assert len(here) == 2 and evaluation["metrics"][f"{task}/accuracy"] == pytest.approx(np.mean(here))
    low, high = evaluation["intervals"]["preference/accuracy"]
    assert 0 <= low <= evaluation["metrics"]["preference/accuracy"] <= high <= 1


# ---- preflight -------------------------------------------------------------------------------------------------------


def test_the_last_stage_is_checked_before_the_first_is_trained(recipe: Path) -> None:
    run = recipe.parent / "run"
    result = alignlab("train", recipe, "stages.grpo.reward={lerned: 1}", "--output", run)
    assert result.code == 2 and "did you mean 'learned'?" in result.errors[0] and not run.exists()


def test_a_shared_model_beside_stages_is_no_contradiction(recipe: Path, model: Path) -> None:
    check_recipe(load_recipe(recipe, [f"model={model}", "stages.dpo.start=sft"]))
    check_recipe(load_recipe(RECIPES / "starter" / "pipeline.yaml", ["model=google/gemma-3-270m-it"]))


# ---- teachers --------------------------------------------------------------------------------------------------------

COMMON = """
model: {model}
data: {{path: sums.jsonl, max_completion_tokens: 8}}
train: {{num_phases: 2, save_every: 1}}
evaluation: {{prompts_per_task: 2}}
"""
TEACHER = "algorithm: {name: sft, examples_per_step: 4, learning_rate: 1e-2}\n"
PUPIL = "teacher: sft.yaml\nalgorithm: {name: distill, prompts_per_phase: 4, learning_rate: 1e-3, objective: full}\n"


@pytest.fixture
def pupil(tmp_path: Path, model: Path) -> Path:
    """A recipe that distils what `sft.yaml` beside it makes."""
    write_rows(tmp_path / "sums.jsonl", SUMS)
    (tmp_path / "sft.yaml").write_text(COMMON.format(model=model) + TEACHER, "utf-8")
    path = tmp_path / "pupil.yaml"
    path.write_text(COMMON.format(model=model) + PUPIL, "utf-8")
    return path


def test_a_teacher_is_a_recipe_a_run_or_a_model(pupil: Path, model: Path) -> None:
    """The same teacher by each of its names: the same weights, bit for bit; a trained one is known by its key."""
    folder = pupil.parent
    assert alignlab("train", folder / "sft.yaml", "--output", folder / "sft").code == 0
    for name, teacher in (("recipe", "sft.yaml"), ("run", folder / "sft"), ("model", folder / "sft" / "policy")):
        result = alignlab("train", pupil, f"teacher={teacher}", "--output", folder / name)
        assert result.code == 0, result.err
    made = [weights(folder / name / "policy") for name in ("recipe", "run", "model")]
    assert made[0] == made[1] == made[2] not in (weights(folder / "sft" / "policy"), weights(model))
    keys = [record(folder / name, "provenance")["teacher"] for name in ("recipe", "run", "model")]
    assert keys[0] == keys[1] == record(folder / "sft", "stage")["key"] != keys[2] and len(keys[2]) == 64
    log = rows(folder / "run" / "log_history.jsonl")
    assert log[0]["distill/reverse_kl_per_token"] > 1e-4 and "reward/mean" not in log[0]  # no task, so no reward
    again = folder / "again"
    assert alignlab("train", folder / "recipe" / "recipe.yaml", "--output", again).code == 0
    assert weights(again / "policy") == made[0]


def test_an_earlier_stage_teaches_and_who_is_his_own_teacher_learns_nothing(recipe: Path) -> None:
    """The pupil starts from its teacher, sft: no divergence, no gradient, the same bits. From sft and taught by dpo, it
    does learn."""
    text = recipe.read_text("utf-8")
    head, stages = text.split("stages:\n")
    lines = stages.splitlines()
    pupil = (
        "- {{name: {0}, start: sft, teacher: {1}, algorithm: {{name: distill, prompts_per_phase: 4, objective: full}}}}"
    )
    recipe.write_text(
        "\n".join([head, "stages:", lines[0], lines[2], pupil.format("same", "sft"), pupil.format("other", "dpo")]),
        "utf-8",
    )
    run = recipe.parent / "run"
    result = alignlab("train", recipe, "stages.other.algorithm.learning_rate=1e-3", "--output", run)
    assert result.code == 0, result.err
    assert weights(run / "same" / "policy") == weights(run / "sft" / "policy") != weights(run / "other" / "policy")
    divergence = {n: [r.get("distill/reverse_kl_per_token") for r in rows(run / n / "log_history.jsonl")][:2]
                  for n in ("same", "other")}  # fmt: skip
    assert divergence["same"] == [0.0, 0.0] and min(divergence["other"]) > 0
    assert record(run / "other", "provenance")["teacher"] == record(run / "dpo", "stage")["key"]
    alone = recipe.parent / "alone"
    assert alignlab("train", run / "other" / "recipe.yaml", "--output", alone).code == 0
    assert weights(alone / "policy") == weights(run / "other" / "policy")


def test_a_key_changes_with_the_teacher(pupil: Path, tmp_path: Path) -> None:
    stage = load_recipe(pupil).stages[0]
    teachers = [None, *(Teacher(name=n, model=n, key=k) for n, k in (("a", "0"), ("b", "0"), ("a", "1")))]
    keys = [stage_key(stage, 42, None, None, teacher)[0] for teacher in teachers]
    assert keys[1] == keys[2] and len(set(keys)) == 3  # not by where it lies


def another_tokenizer(model: Path, folder: Path, change: str) -> Path:
    shutil.copytree(model, folder)
    if change == "template":
        (folder / "chat_template.jinja").write_text(
            (folder / "chat_template.jinja").read_text("utf-8").replace("<start_of_turn>", "<end_of_turn>"), "utf-8"
        )
    else:
        tokenizer = json.loads((folder / "tokenizer.json").read_text("utf-8"))
        words = tokenizer["model"]["vocab"]
        one, other = list(words)[-2:]
        words[one], words[other] = words[other], words[one]
        (folder / "tokenizer.json").write_text(json.dumps(tokenizer), "utf-8")
    return folder


@pytest.mark.parametrize(("change", "said"), [("template", "another chat template"), ("words", "another vocabulary")])
def test_a_teacher_with_another_tokenizer_is_refused(
    pupil: Path, model: Path, tmp_path: Path, change: str, said: str
) -> None:
    other = another_tokenizer(model, tmp_path / "other", change)
    result = alignlab("train", pupil, f"teacher={other}", "--output", tmp_path / "run")
    assert result.code == 2 and len(result.errors) == 1, result.err
    assert f"teacher '{other}' has {said} than the policy" in result.errors[0]


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (("teacher=null",), "distill needs `teacher: STAGE, RECIPE, RUN or MODEL`"),
        (("teacher=nowhere.yaml",), "'nowhere.yaml' is neither a stage of this recipe, nor a recipe file"),
        (("teacher=no such model",), "no such folder"),
        (("algorithm={name: sft}",), "sft has no use for a teacher; drop `teacher`"),
        (("algorithm={name: reward_model}", "teacher=null", "evaluation.best_of=2", "data.task=reasoning"),
         "evaluation.best_of samples a policy"),
        (("teacher=null", "algorithm={name: dpo}", "evaluation.best_of=2"), "no reward; name one under `reward`"),
        (("teacher=null", "algorithm={name: sft}", "evaluation.best_of=0"), "evaluation.best_of"),
        (("algorithm.gama=1",), "did you mean 'gamma'?"),
    ],
)  # fmt: skip
def test_what_cannot_be_taught_or_chosen_is_said_first(pupil: Path, overrides: tuple[str, ...], said: str) -> None:
    run = pupil.parent / "run"
    result = alignlab("train", pupil, *overrides, "--output", run)
    assert result.code == 2 and said in " ".join(result.errors), result.err
    assert not run.exists()


# ---- best of n -------------------------------------------------------------------------------------------------------


def test_evaluations_choose_with_the_rewards_of_the_stage(pupil: Path) -> None:
    """During and after training; also of a method that learns from no reward."""
    run = pupil.parent / "run"
    chosen = ("reward={repetition: 1.0}", "evaluation.best_of=3", "evaluation.every=1", "data.task=reasoning")
    result = alignlab("train", pupil.with_name("sft.yaml"), *chosen, "--output", run)
    assert result.code == 0, result.err
    metrics = record(run, "evaluation")["metrics"]
    assert metrics["inference/candidates"] == 3.0 and metrics["inference/reward_gain"] >= 0
    assert len(record(run, "evaluation_samples")) == len(record(run, "evaluation")["scores"]) > 0
    assert [r["evaluation/inference/candidates"] for r in rows(run / "log_history.jsonl") if "phases_done" in r] == [
        3.0, 3.0, 3.0,
    ]  # fmt: skip
