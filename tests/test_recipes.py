"""Every shipped recipe runs: through the real command line, on the starter, leaving the whole run folder."""

from __future__ import annotations

import csv
import hashlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from alignlab import starter
from alignlab.checkpoint import verify
from alignlab.models import AdapterOff
from alignlab.pipeline import stage as stages
from alignlab.recipe import load_recipe, read_mapping
from alignlab.study.plan import load_study
from tests.runs import RECIPES, alignlab, debug_cache, debug_run, rows, run_alignlab, strict_json, write_rows
from tests.tolerances import FLOAT32

SINGLE = ("sft", "reward_model", "dpo", "simpo", "orpo", "kto", "online_dpo", "ppo", "grpo", "rejection", "distill")
ONLINE = ("online_dpo", "ppo", "grpo", "rejection", "distill")
REAL = ("grpo_gsm8k", "reward_model_hh", "dpo_hh", "sft_mts")
PIPELINE = {"sft": "policy", "reward_model": "reward_model", "grpo": "policy"}
FRAGMENTS = {f"{p.parent.name}/{p.name}" for p in RECIPES.rglob("*.yaml") if p.name in ("base.yaml", "online.yaml")}
"""What several recipes extend; no recipes by themselves."""
FILES = {
    "recipe.yaml",
    "provenance.json",
    "log_history.jsonl",
    "completions.jsonl",
    "evaluation.json",
    "stage.json",
    "checkpoints",
}
LN2 = math.log(2)
ON_PREPARED_DATA = ("studies/ultrafeedback.yaml",)
"""Studies whose data have to be prepared first: tests/test_data_folder.py has them."""


def all_files() -> list[str]:
    return sorted(
        p.relative_to(RECIPES).as_posix() for p in RECIPES.rglob("*") if p.suffix in (".yaml", ".yml", ".json")
    )


# ---- reading ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [n for n in all_files() if not n.startswith("studies/") and n not in FRAGMENTS])
def test_every_recipe_parses_and_reads_back_to_itself(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(RECIPES / name)
    resolved = tmp_path / "recipe.yaml"
    resolved.write_text(recipe.to_yaml(), "utf-8")
    assert load_recipe(resolved) == recipe
    assert all(stage.train.num_phases == 2 for stage in load_recipe(RECIPES / name, debug=True).stages)


@pytest.mark.parametrize("name", [n for n in all_files() if n.startswith("studies/") and n not in ON_PREPARED_DATA])
def test_every_study_parses(name: str) -> None:
    assert load_study(RECIPES / name).arms


def test_a_fragment_is_extended_by_a_recipe() -> None:
    extended = {read_own(RECIPES / name).get("extends") for name in all_files()}
    for name in FRAGMENTS:
        assert "algorithm" not in read_mapping(RECIPES / name) and Path(name).name in extended


def read_own(path: Path) -> dict[str, Any]:
    from ruamel.yaml import YAML

    return dict(YAML(typ="safe", pure=True).load(path.read_text("utf-8")))


# ---- running ---------------------------------------------------------------------------------------------------------


def generates(folder: Path) -> None:
    """Plain transformers loads model and tokenizer from the folder, and the model's own stop ids are all of ours."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Python: the largest of marks"}], add_generation_prompt=True, return_tensors="pt",
        return_dict=True,
    )  # fmt: skip
    made = model.generate(**ids, max_new_tokens=5, do_sample=False)
    width = ids["input_ids"].shape[1]
    assert made.shape[0] == 1 and width < made.shape[1] <= width + 5 and bool(torch.isfinite(model(**ids).logits).all())
    stop_ids = {tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<end_of_turn>")}
    assert set(model.generation_config.eos_token_id) == stop_ids
    assert not list(folder.rglob("*.bin")) and not list(folder.rglob("*.pt"))


def check_folder(folder: Path, kind: str, *, online: bool, ppo: bool = False, start: bool = True) -> None:
    """Every file that a run leaves, and what is in it."""
    left = {p.name for p in folder.iterdir()}
    expected = FILES | {kind} | ({"ppo_metrics.jsonl"} if ppo else set())
    assert left == expected | ({"evaluation_samples.json"} if kind == "policy" else set())
    contents = {p: strict_json(p.read_text("utf-8")) for p in folder.glob("*.json")}
    assert contents

    log = rows(folder / "log_history.jsonl")
    steps = [row for row in log if "phases_done" not in row]
    assert [row["step"] for row in steps] == list(range(1, len(steps) + 1)) and {r["phase"] for r in steps} == {0, 1}
    assert all(isinstance(row["loss/total"], float) and row["time/step"] > 0 for row in steps)
    assert log[-1]["phases_done"] == 2 and any(key.startswith("evaluation/") for key in log[-1])
    if ppo:
        assert (folder / "ppo_metrics.jsonl").read_bytes() == (folder / "log_history.jsonl").read_bytes()
        assert {"value/explained_variance", "policy/kl_per_sequence", "policy/clip_fraction"} <= steps[0].keys()
    completions = rows(folder / "completions.jsonl") if online else []
    assert {row["phase"] for row in completions} == ({0, 1} if online else set())
    for row in completions:
        assert row["prompt"] and row["task"] and len(row["token_ids"]) >= 1 and row["logprob"] <= 0
        assert row["finish_reason"] in ("stop", "length") and row["breakdown"] and math.isfinite(row["reward"])

    evaluation = contents[folder / "evaluation.json"]
    assert evaluation["metrics"] and evaluation["scores"] and evaluation["ledger"]["phases"] == 2
    assert evaluation["ledger"]["optimizer_steps"] == len(steps) and evaluation["ledger"]["seconds"] > 0
    assert {f"evaluation/{k}": v for k, v in evaluation["metrics"].items()}.items() <= log[-1].items()

    provenance = contents[folder / "provenance.json"]
    assert {"torch", "transformers", "python"} <= provenance["versions"].keys()
    assert (
        provenance["seed"] == 42 and len(provenance["key"]) == len(provenance["code"]) == len(provenance["data"]) == 64
    )
    assert provenance["start"] and provenance["model"]["parameters"] >= provenance["model"]["trained"] > 0
    assert provenance["key"] == contents[folder / "stage.json"]["key"]

    checkpoints = sorted((folder / "checkpoints").iterdir())
    assert [p.name for p in checkpoints] == ["phase-000001", "phase-000002"]
    assert all(verify(p) == "" for p in checkpoints) and verify(folder / kind) == ""
    allowed = {".json", ".safetensors", ".jinja"}
    assert {p.suffix for p in folder.rglob("*") if p.is_file() and p.parent != folder} <= allowed
    generates(folder / kind)
    assert start == (contents[folder / "stage.json"]["kind"] == "reward_model" or evaluation_has_kl(evaluation))


def evaluation_has_kl(evaluation: dict[str, Any]) -> bool:
    return "policy/kl_per_sequence" in evaluation["metrics"]


@pytest.mark.parametrize("name", SINGLE)
def test_a_starter_recipe_leaves_the_whole_run_folder(name: str) -> None:
    folder = debug_run(f"starter/{name}.yaml")
    kind = "reward_model" if name == "reward_model" else "policy"
    check_folder(folder, kind, online=name in ONLINE, ppo=name == "ppo", start=name != "sft")
    again = load_recipe(folder / "recipe.yaml")
    assert again.name == f"starter-{name.replace('_', '-')}" and again.stages[0].train.num_phases == 2


def test_a_pipeline_leaves_a_folder_for_every_stage() -> None:
    folder = debug_run("starter/pipeline.yaml")
    assert {p.name for p in folder.iterdir()} == {"recipe.yaml", *PIPELINE}
    for stage, kind in PIPELINE.items():
        check_folder(folder / stage, kind, online=stage == "grpo", start=stage != "sft")
        read = load_recipe(folder / stage / "recipe.yaml")  # each can be run again by itself
        assert read.stages[0].algorithm.name == stage  # type: ignore[attr-defined]


def test_the_start_of_several_recipes_is_trained_once() -> None:
    """All but sft.yaml itself start from it: their provenance names one hash, and one folder has it."""
    starts = {
        json.loads((debug_run(f"starter/{n}.yaml") / "provenance.json").read_text("utf-8"))["start"] for n in SINGLE[1:]
    }
    (start,) = starts
    (folder,) = [p for p in debug_cache().glob("starter-sft-*") if p.is_dir()]
    assert start.startswith(folder.name.removeprefix("starter-sft-"))
    assert json.loads((folder / "stage.json").read_text("utf-8"))["key"] == start


def test_methods_see_the_numbers_that_must_hold_before_the_first_update() -> None:
    dpo, grpo, ppo = (rows(debug_run(f"starter/{n}.yaml") / "log_history.jsonl") for n in ("dpo", "grpo", "ppo"))
    first = {name: next(r for r in log if r["step"] == 1) for name, log in (("dpo", dpo), ("grpo", grpo), ("ppo", ppo))}
    assert first["dpo"]["loss/total"] == pytest.approx(LN2, abs=1e-5) and abs(first["dpo"]["preference/margin"]) < 1e-4
    for name in ("ppo", "grpo"):
        assert (
            first[name]["policy/ratio"] == pytest.approx(1.0, abs=1e-5) and first[name]["policy/clip_fraction"] == 0.0
        )
    assert abs(first["ppo"]["policy/kl_per_sequence"]) < 1e-3


def test_a_recipe_runs_as_its_users_run_it(tmp_path: Path) -> None:
    """The installed script in a process of its own, from another folder, with an override."""
    result = run_alignlab("train", "recipes/starter/sft.yaml", "--debug", "algorithm.learning_rate=1e-4", cwd=tmp_path)
    assert result.code == 0, result.err
    assert "policy: runs/debug/starter-sft/policy" in result.out and "Traceback" not in result.err
    assert not [line for line in result.err.splitlines() if "arning" in line], result.err
    (row, *_) = rows(tmp_path / "runs" / "debug" / "starter-sft" / "log_history.jsonl")
    assert row["policy/learning_rate"] == pytest.approx(1e-4) and {p.name for p in tmp_path.iterdir()} == {"runs"}


def test_the_same_command_gives_the_same_bytes(tmp_path: Path) -> None:
    first = debug_run("starter/dpo.yaml")
    assert alignlab("train", RECIPES / "starter/dpo.yaml", "--debug", "--output", tmp_path / "again").code == 0
    for name in ("policy/model.safetensors", "checkpoints/phase-000002/optimizer.policy.safetensors", "recipe.yaml"):
        assert (first / name).read_bytes() == (tmp_path / "again" / name).read_bytes(), name
    assert (
        alignlab("train", RECIPES / "starter/dpo.yaml", "--debug", "seed=7", "--output", tmp_path / "other").code == 0
    )
    weights = "policy/model.safetensors"
    assert (first / weights).read_bytes() != (tmp_path / "other" / weights).read_bytes()


def test_pretraining_runs_on_a_corpus_of_its_form(tmp_path: Path) -> None:
    corpus = []
    for task in ("reasoning", "code"):
        for line in (starter.DATA / task / "train.jsonl").read_text("utf-8").splitlines()[:20]:
            row = json.loads(line)
            corpus.append({"id": row["id"], "messages": row["messages"], "completion": row["completion"]})
    path = write_rows(tmp_path / "corpus.jsonl", corpus)
    result = alignlab(
        "train", RECIPES / "starter/pretrain.yaml", f"data.path={path}", "--debug", "--output", tmp_path / "run"
    )
    assert result.code == 0, result.err
    assert "policy/nll" in rows(tmp_path / "run" / "log_history.jsonl")[0]
    generates(tmp_path / "run" / "policy")


# ---- real data -------------------------------------------------------------------------------------------------------

HH = "\n\nHuman: what is {a} plus {b}?\n\nAssistant: Which kind?\n\nHuman: just plus\n\nAssistant: {answer}"


def gsm8k_file(folder: Path) -> Path:
    def row(a: int, b: int) -> dict[str, str]:
        answer = f"He has <<{a}+{b}={a + b}>>{a + b}.\n#### {a + b}"
        return {"question": f"Tom has {a} cats and gets {b}. How many?", "answer": answer}

    return write_rows(folder / "gsm8k.jsonl", [row(a, b) for a in range(5) for b in range(4)])


def hh_file(folder: Path) -> Path:
    def row(a: int, b: int) -> dict[str, str]:
        good, bad = (HH.format(a=a, b=b, answer=answer) for answer in (f"It is {a + b}.", "Go away."))
        return {"chosen": good, "rejected": bad}

    return write_rows(folder / "hh.jsonl", [row(a, b) for a in range(5) for b in range(4)])


def mts_file(folder: Path) -> Path:
    path = folder / "mts.csv"
    with path.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["ID", "section_header", "section_text", "dialogue"])
        for i in range(20):
            writer.writerow([i, "GENHX", f"Pain for {i} days.", f'Doctor: How long?\nPatient: {i} days, "about".\n'])
    return path


OWN: dict[str, Callable[[Path], Path]] = {
    "grpo_gsm8k": gsm8k_file, "reward_model_hh": hh_file, "dpo_hh": hh_file, "sft_mts": mts_file,
}  # fmt: skip
SHARED = {
    "grpo_gsm8k": "gsm8k/train_2000.jsonl",
    "reward_model_hh": "hh_rlhf/harmless-base_test_1000.jsonl",
    "dpo_hh": "hh_rlhf/harmless-base_test_1000.jsonl",
    "sft_mts": "mts_dialog/train.csv",
}


def run_real(name: str, path: Path, folder: Path, *overrides: str) -> str:
    arguments = (RECIPES / f"real/{name}.yaml", f"data.path={path}", "train.microbatch_rows=4", *overrides)
    result = alignlab("train", *arguments, "--debug", "--output", folder)
    assert result.code == 0, result.err
    kind = "reward_model" if name == "reward_model_hh" else "policy"
    assert rows(folder / "log_history.jsonl")[-1]["phases_done"] == 2 and verify(folder / kind) == ""
    provenance = strict_json((folder / "provenance.json").read_text("utf-8"))
    content = f"{path.name} {hashlib.sha256(path.read_bytes()).hexdigest()}"
    assert provenance["data"] == hashlib.sha256(content.encode()).hexdigest()
    return result.err


@pytest.mark.parametrize("name", REAL)
def test_a_real_recipe_runs_on_a_file_of_the_format(name: str, tmp_path: Path) -> None:
    said = run_real(name, OWN[name](tmp_path), tmp_path / "run")
    assert "of 20 rows" in said and "held back" in said
    if name == "grpo_gsm8k":
        row = rows(tmp_path / "run" / "log_history.jsonl")[0]
        assert {"reward/exact", "reward/length"} <= row.keys()
        sampled = rows(tmp_path / "run" / "completions.jsonl")[0]
        assert sampled["answer"].isdigit() and sampled["prompt"][0]["role"] in ("system", "user")
        assert "reasoning" in json.dumps(sampled["prompt"])


@pytest.mark.parametrize("name", REAL)
def test_a_real_recipe_runs_on_real_data_and_goes_on(name: str, tmp_path: Path, shared_data: Path) -> None:
    """And its folder can be resumed: what is taken away of the end is made again, the same."""
    path = shared_data / SHARED[name]
    run_real(name, path, tmp_path / "run", "data.limit=60")
    kind = "reward_model" if name == "reward_model_hh" else "policy"
    weights = (tmp_path / "run" / kind / "model.safetensors").read_bytes()
    (tmp_path / "run" / "stage.json").unlink()
    for file in sorted((tmp_path / "run" / "checkpoints" / "phase-000002").rglob("*"), reverse=True):
        file.unlink() if file.is_file() else file.rmdir()
    (tmp_path / "run" / "checkpoints" / "phase-000002").rmdir()
    overrides = (f"data.path={path}", "train.microbatch_rows=4", "data.limit=60")
    arguments = (
        "train",
        RECIPES / f"real/{name}.yaml",
        *overrides,
        "--debug",
        "--resume",
        "--output",
        tmp_path / "run",
    )
    result = alignlab(*arguments)
    assert result.code == 0 and "resumed after phase 1 of 2" in result.err
    assert (tmp_path / "run" / kind / "model.safetensors").read_bytes() == weights


# ---- adapters --------------------------------------------------------------------------------------------------------

STAGED = f"""
extends: {RECIPES / "starter" / "base.yaml"}
model: {{name: starter, adapter: {{rank: 4, dropout: 0.1}}}}
data: {{task: [code], max_completion_tokens: 24}}
evaluation: {{prompts_per_task: 2}}
stages:
- {{name: sft, algorithm: {{name: sft, learning_rate: 3e-2, examples_per_step: 4}}}}
- {{name: dpo, algorithm: {{name: dpo, learning_rate: 1e-3, pairs_per_step: 4}}}}
"""


def test_staged_lora_keeps_the_sft_adapter_in_the_reference(tmp_path: Path) -> None:
    recipe = tmp_path / "staged.yaml"
    recipe.write_text(STAGED, "utf-8")
    result = alignlab("train", recipe, "--debug", "--output", tmp_path / "run")
    assert result.code == 0, result.err
    for stage in ("sft", "dpo"):
        left = {p.name for p in (tmp_path / "run" / stage / "policy").iterdir()}
        assert {"adapter_config.json", "adapter_model.safetensors"} <= left and "model.safetensors" not in left
        provenance = strict_json((tmp_path / "run" / stage / "provenance.json").read_text("utf-8"))
        assert 0 < provenance["model"]["trained"] < 0.2 * provenance["model"]["parameters"]
    first, second, last = rows(tmp_path / "run" / "dpo" / "log_history.jsonl")
    torch.testing.assert_close(first["loss/total"], LN2, **FLOAT32)
    assert abs(second["loss/total"] - LN2) > 1e-4  # it learns: the identity is of the first step only
    evaluation = strict_json((tmp_path / "run" / "sft" / "evaluation.json").read_text("utf-8"))
    assert "policy/kl_per_sequence" not in evaluation["metrics"] and "evaluation/policy/kl_per_sequence" in last


def test_a_reference_without_the_sft_adapter_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The classic mistake: taking the policy with its adapter switched off where the adapter is not fresh."""
    recipe = tmp_path / "staged.yaml"
    recipe.write_text(STAGED, "utf-8")
    monkeypatch.setattr(stages, "make_reference", lambda policy, fresh_adapter: AdapterOff(policy))
    result = alignlab("train", recipe, "--debug", "--output", tmp_path / "run")
    assert result.code == 1 and len(result.errors) == 1
    assert "before any update" in result.errors[0] and "a wrong adapter state" in result.errors[0]


@pytest.mark.parametrize("start", ["starter/sft.yaml", ""], ids=["from a full policy", "from the model"])
def test_grpo_trains_an_adapter(start: str, tmp_path: Path) -> None:
    recipe = tmp_path / "grpo.yaml"
    recipe.write_text(
        f"extends: {RECIPES / 'starter' / 'base.yaml'}\n"
        + (f"start: {RECIPES / start}\n" if start else "")
        + "model: {name: starter, adapter: lora}\n"
        "data: {task: [code, reasoning], max_completion_tokens: 24}\n"
        "algorithm: {name: grpo, learning_rate: 1e-3, kl_coef: 0.05, prompts_per_phase: 2, group_size: 4}\n"
        "evaluation: {prompts_per_task: 2}\n",
        "utf-8",
    )
    result = alignlab("train", recipe, "--debug", "--output", tmp_path / "run")
    assert result.code == 0, result.err
    row = rows(tmp_path / "run" / "log_history.jsonl")[0]
    assert abs(row["policy/kl_per_token"]) < 1e-4 and row["policy/ratio"] == pytest.approx(1.0, abs=1e-5)
    assert (tmp_path / "run" / "policy" / "adapter_model.safetensors").is_file()
    assert not (tmp_path / "run" / "policy" / "model.safetensors").exists()


def test_any_recipe_takes_an_adapter_or_another_model_as_an_override(tmp_path: Path) -> None:
    """`model: starter` in the recipe, `model.adapter=lora` on the command line, as the README says."""
    path = mts_file(tmp_path)
    run_real("sft_mts", path, tmp_path / "run", "model.adapter=lora")
    assert (tmp_path / "run" / "policy" / "adapter_model.safetensors").is_file()
