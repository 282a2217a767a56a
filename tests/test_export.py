"""A run with an adapter becomes a plain model: the same one, checked, complete; and what is refused leaves nothing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from alignlab import export
from alignlab.checkpoint import verify
from alignlab.errors import UserError
from alignlab.export import merge_run
from alignlab.forward import rewards
from alignlab.models import (
    ADAPTER_FILE,
    HEAD_FILE,
    LoraChoice,
    ModelChoice,
    fixed_logits,
    load_policy,
    load_reward_model,
    load_stored,
    load_tokenizer,
    make_reward_model,
    save_model,
)
from tests.runs import RECIPES, alignlab, files_of, small_model, strict_json
from tests.stand_ins import batch_of, nudge
from tests.tolerances import FLOAT32, Tolerance

CPU = torch.device("cpu")
LORA = LoraChoice(rank=4, alpha=8.0)
MERGED32 = Tolerance(rtol=2e-5, atol=2e-5)
"""W + BA multiplied once against W and BA multiplied apart, in single precision through a tiny trunk."""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_model(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def run(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run that trained an adapter for two phases; leave it as it is."""
    folder = tmp_path_factory.mktemp("runs") / "lora"
    return train(folder, base)


def train(folder: Path, base: Path, *more: str) -> Path:
    overrides = (f"model.name={base}", "model.adapter=lora", "algorithm.learning_rate=0.05", *more)
    result = alignlab("train", RECIPES / "starter/sft.yaml", *overrides, "--debug", "--output", folder)
    assert result.code == 0, result.err
    return folder


def adapter_folder(base: Path, folder: Path, *, dtype: str = "float32", scale: float = 0.1, **choice: Any) -> Path:
    """A folder with an adapter as a run leaves it, tokenizer beside it."""
    chosen = {"name": str(base), "dtype": dtype, "adapter": LORA, **choice}
    model = load_policy(ModelChoice(**chosen), device=CPU)
    nudge(model, scale=scale)
    save_model(model, folder)
    load_tokenizer(str(base)).save_pretrained(str(folder))
    return folder


def refusal(*parts: str, run: Path, output: Path, **options: Any) -> None:
    before = files_of(output.parent)
    with pytest.raises(UserError) as caught:
        merge_run(run, output, device=CPU, **options)
    line = str(caught.value)
    assert "\n" not in line and all(part in line for part in parts), line
    assert files_of(output.parent) == before and not list(output.parent.glob(".partial*"))


def test_the_command_writes_a_model_that_any_program_loads(run: Path, tmp_path: Path) -> None:
    """Weights, tokenizer with its template, stop tokens, and a manifest whose sums and differences are right."""
    output = tmp_path / "merged"
    result = alignlab("merge", run, "--output", output)
    assert result.code == 0 and f"merged model: {output} (float32)" in result.out, result.err
    assert sorted(p.name for p in output.iterdir()) == [
        "chat_template.jinja", "config.json", "generation_config.json", "manifest.json", "model.safetensors",
        "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip
    assert verify(output) == "" and not (output / ADAPTER_FILE).exists()

    adapter = load_stored(ModelChoice(name=str(run / "policy")), device=CPU)
    plain = AutoModelForCausalLM.from_pretrained(output)
    found = strict_json((output / "manifest.json").read_text())["merge"]
    difference = (fixed_logits(adapter) - fixed_logits(plain)).abs().max().item()
    assert found["largest_logit_difference"] == pytest.approx(difference, abs=1e-6)
    assert found["largest_logit_difference"] < 1e-4 * found["largest_logit"] < 1e-2 * found["adapter_effect"]
    assert found["dtype"] == "float32" and found["trained_on"] == "unquantised weights"
    assert f"{found['largest_logit_difference']:.2g}" in result.out

    tokenizer, own = AutoTokenizer.from_pretrained(output), load_tokenizer(str(run / "policy"))
    assert tokenizer.get_vocab() == own.get_vocab() and tokenizer.chat_template == own.chat_template
    assert plain.generation_config.eos_token_id == [1, 4]
    assert plain.lm_head.weight is plain.model.embed_tokens.weight
    assert "lm_head.weight" not in load_file(output / "model.safetensors")


def test_a_stage_starts_from_a_merged_model(run: Path, base: Path, tmp_path: Path) -> None:
    merge_run(run, tmp_path / "merged", device=CPU)
    merged = load_policy(ModelChoice(name=str(tmp_path / "merged")), device=CPU)
    direct = load_policy(ModelChoice(name=str(run / "policy")), device=CPU)
    assert all(torch.equal(a, b) for a, b in zip(merged.parameters(), direct.parameters(), strict=True))


def test_from_a_stage_a_run_of_stages_or_the_adapter_itself(run: Path, tmp_path: Path) -> None:
    """The last finished stage counts; all ways lead to the same bytes."""
    staged = tmp_path / "staged"
    for name in ("first", "second"):
        shutil.copytree(run, staged / name)
    (staged / "recipe.yaml").write_text("stages: [{name: first}, {name: second}, {name: third}]\n")
    written = []
    for number, source in enumerate((run, staged, staged / "first", run / "policy")):
        merge_run(source, tmp_path / str(number), device=CPU)
        written.append((tmp_path / str(number) / "model.safetensors").read_bytes())
    assert len(set(written)) == 1


def test_the_type_is_the_base_model_s_or_the_one_asked_for(base: Path, tmp_path: Path) -> None:
    """Not that in which the adapter happened to be trained; each weight is rounded once, from the sum in float32."""
    folder = adapter_folder(base, tmp_path / "adapter", dtype="bfloat16")
    exact = merge_run(folder, tmp_path / "exact", device=CPU)
    rounded = merge_run(folder, tmp_path / "rounded", dtype="bfloat16", device=CPU)
    assert (exact["dtype"], rounded["dtype"]) == ("float32", "bfloat16")
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("rounded", "exact"))
    assert all(torch.equal(ours[name], theirs[name].to(torch.bfloat16)) for name in theirs)
    assert exact["largest_logit_difference"] < 1e-4 < rounded["largest_logit_difference"]
    assert rounded["merging"] < 1e-4
    halved = tmp_path / "halved"
    shutil.copytree(base, halved)
    AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).save_pretrained(halved)
    folder = adapter_folder(halved, tmp_path / "on-half")
    assert merge_run(folder, tmp_path / "half", device=CPU)["dtype"] == "bfloat16"


@pytest.mark.parametrize("kind", ["4bit", "8bit"])
def test_an_adapter_trained_on_quantised_weights(kind: str, base: Path, tmp_path: Path) -> None:
    """It is merged into the weights before quantisation, and it is said how far that is from what was trained."""
    pytest.importorskip("bitsandbytes")
    folder = adapter_folder(base, tmp_path / "adapter", quantization=kind)
    found = merge_run(folder, tmp_path / "merged", device=CPU)
    trained = load_stored(ModelChoice(name=str(folder), quantization=kind), device=CPU)  # type: ignore[arg-type]
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    difference = (fixed_logits(trained) - fixed_logits(plain)).abs().max().item()
    assert found["trained_on"] == kind and found["difference_to_trained"] == pytest.approx(difference, rel=1e-3)
    assert found["largest_logit_difference"] < 1e-4 < found["difference_to_trained"]
    result = alignlab("merge", folder, "--output", tmp_path / "again")
    assert f"it was trained on {kind} weights" in result.out and result.code == 0


def test_a_reward_model_keeps_its_head(base: Path, tmp_path: Path) -> None:
    policy = load_policy(ModelChoice(name=str(base), adapter=LORA), device=CPU)
    nudge(policy)
    model = make_reward_model(policy, seed=3)
    model.set_normalisation(0.3, 1.7)
    save_model(model, tmp_path / "adapter")
    load_tokenizer(str(base)).save_pretrained(str(tmp_path / "adapter"))
    merge_run(tmp_path / "adapter", tmp_path / "merged", device=CPU)
    assert (tmp_path / "merged" / HEAD_FILE).read_bytes() == (tmp_path / "adapter" / HEAD_FILE).read_bytes()
    merged = load_reward_model(tmp_path / "merged", ModelChoice(), device=CPU)
    batch = batch_of([(2, 9, 33), (2, 5)], [(7, 8, 9), (30,)])
    torch.testing.assert_close(rewards(merged, batch), rewards(model, batch), **MERGED32)


def test_what_is_in_the_way_stays(run: Path, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for name in ("full", "file"):
        refusal(f"{tmp_path / name} is in the way", "choose another --output", run=run, output=tmp_path / name)
    (tmp_path / "empty").mkdir()
    merge_run(run, tmp_path / "empty", device=CPU)
    assert verify(tmp_path / "empty") == ""
    result = alignlab("merge", run, "--output", tmp_path / "full")
    assert result.code == 2 and len(result.errors) == 1


def test_what_cannot_be_merged(run: Path, base: Path, tmp_path: Path) -> None:
    output = tmp_path / "merged"
    (tmp_path / "empty").mkdir()
    refusal("neither a finished run", run=tmp_path / "empty", output=output)
    refusal("neither a finished run", run=tmp_path / "nowhere", output=output)
    refusal("neither a finished run", run=base, output=output)
    refusal("dtype 'int8'", "auto, float32", run=run, output=output, dtype="int8")
    refusal("Gemma overflows in float16", run=run, output=output, dtype="float16")
    weak = adapter_folder(base, tmp_path / "weak", scale=1e-4)
    refusal("bfloat16 would lose the adapter", "float32", run=weak, output=output, dtype="bfloat16")
    plain = tmp_path / "plain"
    shutil.copytree(run, plain)
    shutil.rmtree(plain / "policy")
    load = load_policy(ModelChoice(name=str(base)), device=CPU)
    save_model(load, plain / "policy")
    export.seal(plain / "policy")
    refusal("nothing to merge", "a plain model already", run=plain, output=output)


def test_a_base_that_is_another_now(base: Path, tmp_path: Path) -> None:
    own = Path(shutil.copytree(base, tmp_path / "own"))
    folder = adapter_folder(own, tmp_path / "adapter")
    tensors = load_file(own / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"] *= 1.01
    save_file(tensors, own / "model.safetensors", metadata={"format": "pt"})
    refusal("trained on other base weights", run=folder, output=tmp_path / "merged")


def test_a_disk_that_lies_is_noticed(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was written is read back and compared, to the bit, before it gets its name."""
    written = export._write

    def damaged(model: Any, adapter: Path, folder: Path) -> None:
        written(model, adapter, folder)
        tensors = load_file(folder / "model.safetensors")
        tensors["model.norm.weight"][3] += 1e-6
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    monkeypatch.setattr(export, "_write", damaged)
    refusal("reads back differently (model.norm.weight)", run=run, output=tmp_path / "merged")


def test_a_disk_that_is_full(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export, "_write", full)
    refusal("cannot be written", "No space left", run=run, output=tmp_path / "merged")


# The commands, for every way of holding weights -----------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["4bit", "8bit"])
def test_quantised_stages_from_start_to_merged_model(kind: str, base: Path, tmp_path: Path) -> None:
    """SFT, reward model, then PPO with a critic on the reward model's trunk, all on one quantised base."""
    pytest.importorskip("bitsandbytes")
    recipe = {
        "name": "quantised",
        "extends": str(RECIPES / "starter/base.yaml"),
        "model": {"name": str(base), "adapter": {"rank": 4, "alpha": 8}, "quantization": kind},
        "train": {"gradient_checkpointing": True},
        "data": {"task": ["reasoning"]},
        "stages": [
            {"name": "sft", "algorithm": {"name": "sft", "learning_rate": 0.02}},
            {"name": "judge", "algorithm": {"name": "reward_model", "learning_rate": 0.01}},
            {
                "name": "ppo",
                "algorithm": {"name": "ppo", "critic": "reward_model", "value_learning_rate": 0.01},
                "reward_model": "judge",
                "reward": {"learned": 1.0},
            },
        ],
    }
    (tmp_path / "recipe.json").write_text(json.dumps(recipe))
    folder = tmp_path / "run"
    result = alignlab("train", tmp_path / "recipe.json", "--debug", "--output", folder)
    assert result.code == 0, result.err
    provenance = [strict_json((folder / name / "provenance.json").read_text()) for name in ("sft", "judge", "ppo")]
    assert len({p["model"]["parameters"] for p in provenance}) == 2  # the reward model has its head besides
    merged = alignlab("merge", folder, "--output", tmp_path / "merged")
    assert merged.code == 0 and f"trained on {kind} weights" in merged.out, merged.err
    assert alignlab("merge", folder / "judge", "--output", tmp_path / "judge").code == 0
    torch.testing.assert_close(
        fixed_logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")),
        fixed_logits(load_policy(ModelChoice(name=str(folder / "ppo" / "policy")), device=CPU)),
        **FLOAT32,
    )
