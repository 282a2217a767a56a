"""The same recipe on a model of true width and vocabulary (two layers of Gemma 3 270M, weights drawn at random)."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from transformers import Gemma3TextConfig

from alignlab import starter
from alignlab.pipeline import run_recipe
from alignlab.recipe import load_recipe
from alignlab.tracking import HISTORY, read_jsonl

RECIPES = Path(__file__).parents[1] / "recipes"


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder with Gemma 3 270M's shape cut to two layers and the starter's tokenizer."""
    folder = tmp_path_factory.mktemp("gemma") / "gemma-3-270m"
    config = Gemma3TextConfig(
        vocab_size=262_144, hidden_size=640, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=1,
        head_dim=256, intermediate_size=2048, sliding_window=512, layer_types=["sliding_attention", "full_attention"],
        max_position_embeddings=32_768, query_pre_attn_scalar=256, pad_token_id=0, bos_token_id=2, eos_token_id=1,
        rope_parameters={
            "full_attention": {"rope_type": "default", "rope_theta": 1_000_000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
        },
    )  # fmt: skip
    config.architectures = ["Gemma3ForCausalLM"]
    config.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        shutil.copy(starter.ASSETS / name, folder / name)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("adapter", ["null", "lora"])
@pytest.mark.parametrize("method", ["sft", "dpo", "grpo", "ppo"])
def test_two_phases_of_every_method_at_true_width(gemma: Path, tmp_path: Path, method: str, adapter: str) -> None:
    overrides = [
        "start=null", f"model.name={gemma}", "model.weights=random", f"model.adapter={adapter}",
        "data.task=[reasoning]",
        "data.max_completion_tokens=8", "evaluation.every=0", "evaluation.prompts_per_task=1",
    ]  # fmt: skip
    if method in ("grpo", "ppo"):
        overrides += ["reward_model=null", "reward={repetition: 1.0, length: 1.0}"]
    recipe = load_recipe(RECIPES / "starter" / f"{method}.yaml", overrides, debug=True)
    run_recipe(recipe, tmp_path / "run", debug=True, quiet=True)
    log = read_jsonl(tmp_path / "run" / HISTORY)
    assert len({row["phase"] for row in log if "loss/total" in row}) == 2
    made = json.loads((tmp_path / "run" / "provenance.json").read_text("utf-8"))["model"]
    assert made["parameters"] > 170_000_000
    assert (made["trained"] < 1_000_000) == (adapter == "lora")
