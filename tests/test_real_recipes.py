"""The recipes for real models: each is complete, and runs two phases on a model of that model's true width.

Two layers of true width, vocabulary and control tokens stand for the weights that need a licence, and small files in
the hub's own columns for the data.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from alignlab.conversation import Template
from alignlab.models import load_generation_config, load_tokenizer
from alignlab.pipeline import run_recipe
from alignlab.recipe import dump_yaml, load_recipe, read_mapping
from alignlab.tracking import HISTORY, read_jsonl
from tests.runs import RECIPES, write_rows
from tests.test_recipes import gsm8k_file, hh_file, mts_file
from tests.true_models import CONFIGS, STOPS, family, make_true_model

METHODS = ("sft", "reward_model", "dpo", "ppo_sparse", "ppo_dense", "grpo", "staged")
MORE = {"gemma3-270m": ("sft_clinical", "sft_code")}
CASES = [(model, method) for model in CONFIGS for method in (*METHODS, *MORE.get(model, ()))]


def test_every_model_has_every_method() -> None:
    for model in CONFIGS:
        found = {path.stem for path in (RECIPES / model).glob("*.yaml")} - {"base", "online"}
        assert found == {*METHODS, *MORE.get(model, ())}


@pytest.mark.parametrize("model, method", CASES)
def test_the_recipe_parses_for_the_real_model(model: str, method: str) -> None:
    recipe = load_recipe(RECIPES / model / f"{method}.yaml")
    names = {stage.model.name for stage in recipe.stages}
    assert len(names) == 1 and family(model).removesuffix("b").rstrip("12") in names.pop().lower().replace("-", "")
    assert all(stage.data.hub or stage.data.path for stage in recipe.stages)
    assert all(stage.model.adapter for stage in recipe.stages)


# ---- true width ------------------------------------------------------------------------------------------------------


def ultrafeedback_file(folder: Path) -> Path:
    """As HuggingFaceH4/ultrafeedback_binarized has it: whole conversations of messages beside the prompt."""

    def row(i: int) -> dict[str, Any]:
        asked = f"Name {i} fruits."

        def talk(answer: str) -> list[dict[str, str]]:
            return [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]

        chosen, rejected = talk(f"Here are {i}: plum, fig."), talk("No.")
        scores = {"score_chosen": 8.0, "score_rejected": 3.0}
        return {
            "prompt": asked,
            "prompt_id": str(i),
            "chosen": chosen,
            "rejected": rejected,
            "messages": chosen,
            **scores,
        }

    return write_rows(folder / "ultrafeedback.jsonl", [row(i) for i in range(20)])


def orca_file(folder: Path) -> Path:
    rows = [
        {"system": "You are an AI assistant." if i % 2 else "", "question": f"Is {i} even?",
         "chosen": f"{i} is {'odd' if i % 2 else 'even'}.", "rejected": "Maybe."} for i in range(20)
    ]  # fmt: skip
    return write_rows(folder / "orca.jsonl", rows)


def conala_file(folder: Path) -> Path:
    rows = [
        {"intent": f"sum {i}", "rewritten_intent": f"sum the list `x{i}`", "snippet": f"sum(x{i})", "question_id": i}
        for i in range(20)
    ]
    return write_rows(folder / "conala.jsonl", rows)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("files")
    hh = hh_file(folder)
    return {
        "Anthropic/hh-rlhf": hh, "Anthropic/hh-rlhf/harmless-base": hh, "Anthropic/hh-rlhf/helpful-base": hh,
        "HuggingFaceH4/ultrafeedback_binarized": ultrafeedback_file(folder), "Intel/orca_dpo_pairs": orca_file(folder),
        "openai/gsm8k": gsm8k_file(folder), "neulab/conala": conala_file(folder), "MTS": mts_file(folder),
    }  # fmt: skip


@pytest.fixture(scope="module")
def true_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Made when first asked for, and gone with the module: some are gigabytes."""
    return {"": tmp_path_factory.mktemp("true-models")}


def local(section: Mapping[str, Any], model: Path, files: Mapping[str, Path]) -> dict[str, Any]:
    """A recipe's mapping with the model, the data and the lengths replaced; everything else as it is."""
    made: dict[str, Any] = {}
    for key, value in section.items():
        if key == "model":
            made[key] = {**value, "name": str(model)}
        elif key == "data":
            made[key] = local_data(dict(value), files)
        elif key == "stages":
            made[key] = [local(stage, model, files) for stage in value]
        else:
            made[key] = value
    return made


def local_data(data: dict[str, Any], files: Mapping[str, Path]) -> dict[str, Any]:
    if data.get("hub"):
        data |= {
            "path": str(files[data["hub"]]),
            "hub": None,
            "hub_config": None,
            "split": None,
            "validation_split": None,
        }
    elif data.get("path"):
        data |= {"path": str(files["MTS"]), "validation_path": None}
    limits = {"max_prompt_tokens": 300, "max_completion_tokens": 12}
    return data | {key: most for key, most in limits.items() if key in data}


def local_copy(model: str, folder: Path, weights: Path, files: Mapping[str, Path]) -> Path:
    """The model's recipes as files of their own, for weights and data that are here."""
    folder.mkdir(exist_ok=True)
    for path in (RECIPES / model).glob("*.yaml"):
        content = read_mapping(path)  # with what it extends, so that each stands alone
        if path.stem != "sft":  # a CPU makes 4-bit weights whole again in every product; once is enough to see it work
            content.get("model", {}).pop("quantization", None)
        (folder / path.name).write_text(dump_yaml(local(content, weights, files)), "utf-8")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("model", CONFIGS)
def test_true_size(
    model: str, true_folders: dict[str, Path], files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All recipes of one model, one after the other, so that they share the stages they start from."""
    pytest.importorskip("bitsandbytes", reason="the 4-bit recipes need the extra quant")
    monkeypatch.setenv("ALIGNLAB_CACHE", str(tmp_path / "cache"))
    weights = make_true_model(model, true_folders[""] / model)
    template = Template.of(load_tokenizer(str(weights)), load_generation_config(str(weights)))
    assert template.stop_ids == STOPS[family(model)]
    recipes = local_copy(model, tmp_path / "recipes", weights, files)
    for method in (*METHODS, *MORE.get(model, ())):
        recipe = load_recipe(recipes / f"{method}.yaml", ["train.microbatch_rows=4"], debug=True)
        results = run_recipe(recipe, tmp_path / method, debug=True, quiet=True)
        for result in results:
            steps = [row for row in read_jsonl(result.folder / HISTORY) if "loss/total" in row]
            assert {row["phase"] for row in steps} == {0, 1}, method
            assert all(torch.tensor(row["loss/total"]).isfinite() for row in steps)
            made = json.loads((result.folder / "provenance.json").read_text("utf-8"))["model"]
            assert 0 < made["trained"] < made["parameters"] / 10, "only adapter and head are trained"
