"""Loading, adapting, copying and storing models: what is the same bit for bit, what is shared, and what is refused."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from huggingface_hub import errors as hub
from peft import LoraConfig, LoraModel, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file
from torch import nn
from torch.testing import assert_close
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    GPT2Config,
    GraniteConfig,
    PhiConfig,
    PreTrainedModel,
    ViTConfig,
)

from alignlab import starter
from alignlab.errors import UserError
from alignlab.forward import padded_states, rewards, score
from alignlab.models import (
    ADAPTER_FILE,
    BASE_FILE,
    HEAD_FILE,
    AdapterOff,
    LoraChoice,
    Model,
    ModelChoice,
    ScalarModel,
    disable_dropout,
    fixed_logits,
    frozen_copy,
    frozen_policy,
    has_adapter,
    head,
    hidden_size,
    load,
    load_generation_config,
    load_policy,
    load_reward_model,
    load_stored,
    load_tokenizer,
    load_weights,
    location,
    make_reference,
    make_reward_model,
    make_value_model,
    merge_adapter,
    merge_checked,
    num_parameters,
    pick_device,
    quantization,
    save_model,
    stored_quantization,
    trainable_copy,
    trunk,
    unwrap,
)
from tests.stand_ins import PROMPTS, SHAPE, SLIDING, adapted, batch_of, nudge, random_ids, tiny
from tests.tolerances import EXACT, FLOAT32, Tolerance

CPU = torch.device("cpu")
LORA = LoraChoice(rank=4, alpha=8.0)
BATCH = batch_of(PROMPTS, random_ids(7, 2, 1))
MERGED32 = Tolerance(rtol=2e-5, atol=2e-5)
"""W + BA multiplied once against W and BA multiplied apart, in single precision through a tiny trunk."""


def folder_of(path: Path, architecture: str = "gemma3", **changes: Any) -> Path:
    """A model folder as transformers itself writes it."""
    tiny(architecture, **changes).save_pretrained(str(path))
    return path


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder_of(tmp_path_factory.mktemp("base"))


@pytest.fixture
def copied(base: Path, tmp_path: Path) -> Path:
    """The same folder, to be damaged."""
    return Path(shutil.copytree(base, tmp_path / "copied"))


def policy(path: Path | str, seed: int = 0, **choice: Any) -> PreTrainedModel | PeftModel:
    return load_policy(ModelChoice(name=str(path), **choice), seed=seed, device=CPU)


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


@torch.no_grad()
def logprobs(model: Model) -> torch.Tensor:
    return score(model, BATCH).logprobs


def refusal(call: Callable[[], object], *parts: str) -> str:
    """The one line that a user gets; it contains every part."""
    with pytest.raises(UserError) as caught:
        call()
    line = str(caught.value)
    assert "\n" not in line and len(line) < 400, line
    for part in parts:
        assert part in line, line
    return line


# Loading --------------------------------------------------------------------------------------------------------------


def test_a_folder_loads_as_transformers_loads_it(base: Path) -> None:
    loaded = policy(base)
    plain = AutoModelForCausalLM.from_pretrained(str(base))
    assert same(weights(loaded), weights(plain))
    assert all(p.requires_grad for p in loaded.parameters()) and not loaded.training
    assert loaded.dtype == torch.float32


@pytest.mark.parametrize("adapter", [None, LORA], ids=["random weights", "adapter"])
def test_what_is_drawn_comes_from_the_seed_alone(base: Path, adapter: LoraChoice | None) -> None:
    """Same seed, same bytes, whatever torch's generator holds, which stays as it is; another seed, other bytes."""
    choice: dict[str, Any] = {"adapter": adapter} if adapter else {"weights": "random"}
    torch.manual_seed(1)
    first = weights(policy(base, seed=5, **choice))
    state = torch.get_rng_state()
    torch.manual_seed(2)
    again, other = weights(policy(base, seed=5, **choice)), weights(policy(base, seed=6, **choice))
    assert same(first, again) and not same(first, other)
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), state)
    if adapter:  # the base is the same in both
        assert all(torch.equal(first[k], other[k]) for k in first if "lora_A" not in k)


def test_random_weights_take_only_the_shape(base: Path) -> None:
    drawn = policy(base, weights="random")
    assert {k: v.shape for k, v in weights(drawn).items()} == {k: v.shape for k, v in weights(policy(base)).items()}
    assert not same(weights(drawn), weights(policy(base))) and not drawn.training
    assert all(p.requires_grad for p in drawn.parameters())


def test_overrides_change_the_shape_of_random_weights(base: Path) -> None:
    """The pattern of layer types follows the number of layers, or is given."""
    longer = unwrap(policy(base, weights="random", overrides={"num_hidden_layers": 3, "vocab_size": 80})).config
    assert longer.layer_types == ["sliding_attention", "full_attention", "sliding_attention"]
    shorter = policy(base, weights="random", overrides={"num_hidden_layers": 1})
    assert unwrap(shorter).config.layer_types == ["sliding_attention"] and len(trunk(shorter).layers) == 1
    given = {"num_hidden_layers": 1, "layer_types": ["full_attention"]}
    assert unwrap(policy(base, weights="random", overrides=given)).config.layer_types == ["full_attention"]


def test_wrong_overrides(base: Path) -> None:
    with pytest.raises(UserError, match=r"Gemma3TextConfig has no num_layers; it has .*num_hidden_layers"):
        policy(base, weights="random", overrides={"num_layers": 2})
    refusal(lambda: policy(base, overrides={"num_hidden_layers": 1}), "model.overrides", "weights: random")
    refusal(lambda: policy(base, weights="random", overrides={"layer_types": ["full_attention"]}), "layer_types")


def test_the_text_part_of_an_image_model(tmp_path: Path) -> None:
    """A Gemma 3 of 4B and up holds a vision tower; its text model is what is trained and sampled."""
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
              "image_size": 28, "patch_size": 14}  # fmt: skip
    config = Gemma3Config(text_config={**SHAPE, **SLIDING}, vision_config=vision, mm_tokens_per_image=4)
    whole = Gemma3ForConditionalGeneration(config)
    whole.save_pretrained(str(tmp_path))
    loaded = policy(tmp_path)
    assert type(loaded).__name__ == "Gemma3ForCausalLM"
    assert same(weights(trunk(loaded)), weights(whole.model.language_model))
    with torch.no_grad():
        expected = whole(input_ids=BATCH.input_ids[1:2]).logits
        assert_close(loaded(input_ids=BATCH.input_ids[1:2]).logits, expected, **FLOAT32)


def test_dtypes_and_attention(base: Path, tmp_path: Path) -> None:
    assert policy(base, dtype="bfloat16").dtype == torch.bfloat16
    assert policy(base, dtype="float64").dtype == torch.float64
    assert policy(base).config._attn_implementation == "sdpa"
    gemma2 = folder_of(tmp_path / "gemma2", "gemma2")
    assert policy(gemma2).config._attn_implementation == "eager"
    refusal(lambda: policy(gemma2, attention="sdpa"), "could not be loaded: Gemma2ForCausalLM does not support")
    refusal(lambda: policy(gemma2, dtype="float64"), "float64", "set model.dtype to float32")
    for path in (base, gemma2):
        refusal(lambda path=path: policy(path, dtype="float16"), "Gemma overflows in float16", "bfloat16")
    assert policy(folder_of(tmp_path / "llama", "llama"), dtype="float16").dtype == torch.float16


def test_devices() -> None:
    assert pick_device("cpu") == CPU and pick_device().type in ("cpu", "cuda", "mps")
    refusal(lambda: pick_device("gpu"), "device 'gpu'", "try auto or cpu")
    if not torch.cuda.is_available():
        refusal(lambda: pick_device("cuda"), "device 'cuda'", "try auto or cpu")


def test_locations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert location("starter") == str(starter.ASSETS) and location(str(tmp_path)) == str(tmp_path)
    assert location("google/gemma-3-270m-it") == "google/gemma-3-270m-it" and location("gpt2") == "gpt2"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "starter").mkdir()
    assert location("starter") == str(starter.ASSETS)  # never a folder that happens to be called so
    (tmp_path / "file").write_text("")
    for name in (
        "",
        "./missing",
        "/missing",
        "~/missing-model",
        "a/b/c",
        "a\\b",
        "file",
        "../x",
        "owner/na me",
        "-x/y",
    ):
        refusal(lambda name=name: location(name), f"model {name!r}: no such folder")


def test_tokenizer_and_generation_config(base: Path, tmp_path: Path) -> None:
    assert load_tokenizer("starter").pad_token_id == 0
    generation = load_generation_config("starter")
    assert generation is not None and generation.eos_token_id == [1, 4]
    refusal(lambda: load_tokenizer(str(base)), "no tokenizer.json")
    (tmp_path / "config.json").write_text("{}")
    assert load_generation_config(str(tmp_path)) is None
    (tmp_path / "generation_config.json").write_text("{")
    refusal(lambda: load_generation_config(str(tmp_path)), "could not be loaded", "not a valid JSON")
    assert load_generation_config("nobody/nothing") is None


# What cannot be used --------------------------------------------------------------------------------------------------


def test_missing_files_are_named(base: Path, copied: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    refusal(lambda: policy(tmp_path / "empty"), "no config.json")
    weights_file = copied / "model.safetensors"
    whole = weights_file.read_bytes()
    weights_file.unlink()
    refusal(lambda: policy(copied), "no model.safetensors in it")
    (copied / "pytorch_model.bin").write_bytes(b"pickle")
    refusal(lambda: policy(copied), "only pickles (pytorch_model.bin)", "convert them to safetensors")
    (copied / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}})
    )
    (copied / "pytorch_model.bin").unlink()
    (copied / "model-00001-of-00002.safetensors").write_bytes(whole)
    refusal(lambda: policy(copied), "no model-00002-of-00002.safetensors in it")


def test_damaged_files_are_named(copied: Path) -> None:
    file = copied / "model.safetensors"
    for content in (b"", file.read_bytes()[:200], file.read_bytes()[:-5]):
        file.write_bytes(content)
        refusal(lambda: policy(copied), "damaged", "download it again")
        refusal(lambda: load_weights(tiny(), copied), "model.safetensors: damaged")
    (copied / "config.json").write_text("{")
    refusal(lambda: policy(copied), "could not be loaded", "not a valid JSON")


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(str(folder / "model.safetensors"))
    change(tensors)
    save_file(tensors, str(folder / "model.safetensors"), metadata={"format": "pt"})


NORM, UP = "model.layers.0.input_layernorm.weight", "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize(
    "change, parts",
    [
        (lambda t: t.pop(UP), [f"missing: {UP}"]),
        (lambda t: t.update(strange=torch.zeros(2)), ["unexpected: strange"]),
        (lambda t: t.update({NORM: torch.zeros(3)}), [f"of another shape: {NORM} (3,), not (32,)"]),
        (lambda t: (t.pop(UP), t.update(strange=torch.zeros(2))), [f"missing: {UP}", "unexpected: strange"]),
    ],
    ids=["missing", "unexpected", "shape", "both"],
)
def test_weights_that_do_not_fit_are_listed(copied: Path, change: Any, parts: list[str]) -> None:
    """By load_policy and by load_weights, which then has changed nothing."""
    rewrite(copied, change)
    refusal(lambda: policy(copied), "weights that do not fit this model", *parts)
    model = tiny(seed=9)
    before = weights(model)
    refusal(lambda: load_weights(model, copied), "weights that do not fit this model", *parts)
    assert same(weights(model), before)


def test_a_long_list_is_cut(tmp_path: Path) -> None:
    folder_of(tmp_path, num_hidden_layers=1, layer_types=["full_attention"])
    refusal(lambda: load_weights(tiny(), tmp_path), "missing: model.layers.1.input_layernorm.weight, ", "and 8 more")


def test_nan_weights_are_named(copied: Path) -> None:
    for value in (torch.nan, -torch.inf):
        rewrite(copied, lambda t, value=value: t[UP].view(-1)[5:6].fill_(value))
        refusal(lambda: policy(copied), "NaN or infinite weights", UP)


@pytest.mark.parametrize(
    "config, reason",
    [
        (GraniteConfig(**{**SHAPE, "pad_token_id": None}, logits_scaling=8.0), "GraniteForCausalLM scales its logits"),
        (PhiConfig(**{**SHAPE, "pad_token_id": None}), "the head of PhiForCausalLM is not a plain matrix"),
        (BertConfig(**SHAPE), "the head of BertLMHeadModel is not a plain matrix"),
        (ViTConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2), "is no causal language model"),
    ],
    ids=["scaled logits", "head with a bias", "encoder", "images"],
)  # fmt: skip
def test_architectures_that_would_give_wrong_numbers(config: Any, reason: str, tmp_path: Path) -> None:
    config.save_pretrained(str(tmp_path))
    refusal(lambda: policy(tmp_path, weights="random"), reason, "choose")


def test_layers_that_are_not_called_linear(tmp_path: Path) -> None:
    """GPT-2's are of a class of its own; they can be adapted too."""
    GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=2, n_positions=64).save_pretrained(str(tmp_path))
    assert num_parameters(policy(tmp_path, weights="random", adapter=LORA), trained_only=True) > 0
    choice = LoraChoice(target_modules=("c_attn",))
    adapter = policy(tmp_path, weights="random", adapter=choice)
    assert num_parameters(adapter, trained_only=True) == 8 * (32 + 96)


def test_code_of_a_model_folder_is_never_run(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither run nor asked about: nothing waits for an answer at the keyboard."""
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    evil = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model", "AutoTokenizer": ["evil.Tok", None]}
    (copied / "evil.py").write_text("raise SystemExit('ran')")
    (copied / "config.json").write_text(json.dumps({"model_type": "evil", "auto_map": evil}))
    refusal(lambda: policy(copied), "needs code from its own repository, which alignlab never runs")
    (copied / "config.json").write_text(json.dumps({"model_type": "unheard-of"}))
    refusal(lambda: policy(copied), "does not know", "check its config.json")
    (copied / "config.json").write_text("{}")
    refusal(lambda: policy(copied), "does not know", "check its config.json")


def gated(status: int) -> Exception:
    response = httpx.Response(status, request=httpx.Request("GET", "https://huggingface.co"))
    return hub.GatedRepoError("gated", response=response)


def not_found(kind: type[Exception]) -> Exception:
    return kind("404", response=httpx.Response(404, request=httpx.Request("GET", "https://x")))  # type: ignore[call-arg]


@pytest.mark.parametrize(
    "cause, advice",
    [
        (gated(401), "is gated: accept its licence at https://huggingface.co/owner/name, then log in with `hf auth"),
        (gated(403), "is gated and your account has no access yet"),
        (not_found(hub.RepositoryNotFoundError), "was not found: neither a folder nor a public model on the hub"),
        (not_found(hub.RevisionNotFoundError), "has no such revision"),
        (hub.LocalEntryNotFoundError("x"), "the model hub cannot be reached"),
        (hub.OfflineModeIsEnabled("x"), "the model hub cannot be reached"),
        (ConnectionError("x"), "the model hub cannot be reached"),
        (ImportError("This needs sentencepiece.\nInstall it."), "could not be loaded: This needs sentencepiece."),
        (KeyError(), "could not be loaded: KeyError"),
    ],
)  # fmt: skip
def test_what_the_hub_says(cause: Exception, advice: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As transformers raises it: an OSError of many lines from the hub's own error; numbers in names mean nothing."""

    def failing(*_: Any, **__: Any) -> None:
        if isinstance(cause, ImportError | KeyError):
            raise cause
        raise OSError("many\nlines about 401, 403 and 404") from cause

    monkeypatch.setattr(AutoConfig, "from_pretrained", failing)
    refusal(lambda: policy("owner/name"), "model 'owner/name' ", advice)


def test_an_unreachable_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """For real: the tests are offline."""
    refusal(lambda: policy("owner/name-401"), "the model hub cannot be reached")
    refusal(lambda: load_tokenizer("owner/name-401"), "the model hub cannot be reached")


@pytest.mark.parametrize(
    "said, advice",
    [
        (gated(401), "is gated: accept its licence"),
        (not_found(hub.RepositoryNotFoundError), "was not found: neither a folder nor a public model on the hub"),
        (not_found(hub.RevisionNotFoundError), "has no such revision"),
        (httpx.ConnectError("refused"), "the model hub cannot be reached"),
        (httpx.ReadTimeout("slow"), "the model hub cannot be reached"),
    ],
)
def test_the_hub_is_asked_once_before_a_tokenizer_is_loaded(
    said: Exception, advice: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loading would ask it again and again; what it may still get is left to it: a file from the cache, a busy hub."""
    asked: list[str] = []

    def answer(error: Exception | None) -> None:
        def respond(url: str) -> None:
            asked.append(url)
            if error is not None:
                raise error

        monkeypatch.setattr(load, "get_hf_file_metadata", respond)

    class Loading(Exception):
        pass

    def loading(*_: Any, **__: Any) -> None:
        raise Loading("it goes on")

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", loading)
    answer(said)
    refusal(lambda: load_tokenizer("owner/name", "main"), "model 'owner/name' ", advice)
    assert len(asked) == 1 and asked[0].endswith("/owner/name/resolve/main/config.json")
    for fine in (None, not_found(hub.HfHubHTTPError), not_found(hub.RemoteEntryNotFoundError)):
        answer(fine)
        refusal(lambda: load_tokenizer("owner/name"), "it goes on")
    answer(said)
    monkeypatch.setattr(load, "try_to_load_from_cache", lambda *_, **__: "config.json")
    refusal(lambda: load_tokenizer("owner/name"), "it goes on")


# Adapters -------------------------------------------------------------------------------------------------------------


def test_a_fresh_adapter(base: Path) -> None:
    """Changes nothing yet; trains A and B of every linear layer but the head, in evaluation mode."""
    loaded = policy(base, adapter=LORA)
    assert has_adapter(loaded) and not has_adapter(policy(base)) and not any(m.training for m in loaded.modules())
    assert_close(logprobs(loaded), logprobs(policy(base)), **EXACT)
    trained = {n for n, p in loaded.named_parameters() if p.requires_grad}
    assert all(".lora_" in n for n in trained) and len(trained) == 2 * 7 * 2 and "lm_head" not in str(trained)
    few = policy(base, adapter=LoraChoice(rank=4, target_modules=("self_attn.q_proj", "down_proj")))
    names = {n.split(".lora_")[0].rsplit("layers.", 1)[-1] for n, p in few.named_parameters() if p.requires_grad}
    assert names == {f"{i}.{layer}" for i in (0, 1) for layer in ("self_attn.q_proj", "mlp.down_proj")}
    assert num_parameters(few, trained_only=True) == 2 * 4 * ((32 + 32) + (48 + 32))


def test_adapters_are_single_precision_at_least(base: Path) -> None:
    """Steps of 1e-5 of a weight are lost in bfloat16's eight bits."""
    for dtype, expected in (("bfloat16", torch.float32), ("float32", torch.float32), ("float64", torch.float64)):
        loaded = policy(base, dtype=dtype, adapter=LORA)
        assert {p.dtype for p in loaded.parameters() if p.requires_grad} == {expected}
        assert logprobs(loaded).isfinite().all()


def test_targets_that_cannot_be_adapted(base: Path, tmp_path: Path) -> None:
    def adapt(path: Path, *targets: str) -> Callable[[], object]:
        return lambda: policy(path, adapter=LoraChoice(target_modules=targets))

    linear = "down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj"
    refusal(adapt(base, "q_proj", "c_attn", "w1"), "c_attn, w1 match nothing; this model has", linear)
    refusal(adapt(base, "proj"), "proj match nothing")  # part of a name is not a name
    refusal(adapt(base, "embed_tokens"), "embed_tokens match nothing")
    refusal(adapt(base, "lm_head"), "lm_head is tied to the embedding here; leave it out")
    refusal(adapt(folder_of(tmp_path, "llama"), "q_proj", "lm_head"), "lm_head stays frozen; leave it out")


def test_a_head_with_an_adapter_is_not_scored() -> None:
    """Its weight alone would be read, without the adapter."""
    model = tiny("llama")
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=["lm_head"], task_type="CAUSAL_LM"))
    with pytest.raises(TypeError, match="not a plain matrix"):
        head(wrapped)


def stored_adapter(base: Path, folder: Path, **choice: Any) -> PeftModel:
    """A folder with a trained adapter on `base`, and the policy it was stored from."""
    trained = policy(base, adapter=LORA, **choice)
    assert isinstance(trained, PeftModel)
    nudge(trained)
    save_model(trained, folder)
    return trained


def test_a_stored_adapter_goes_on(base: Path, tmp_path: Path) -> None:
    """Asked for with an adapter: the same one, bit for bit, and only it is trained, with the dropout asked for now."""
    trained = stored_adapter(base, tmp_path)
    loaded = policy(tmp_path, seed=99, adapter=LoraChoice(rank=4, alpha=8.0, dropout=0.25))
    assert isinstance(loaded, PeftModel) and same(weights(loaded), weights(trained))
    assert_close(logprobs(loaded), logprobs(trained), **EXACT)
    assert {n for n, p in loaded.named_parameters() if p.requires_grad} == {
        n for n, p in trained.named_parameters() if p.requires_grad
    }
    assert {m.p for m in loaded.modules() if isinstance(m, nn.Dropout)} == {0.25}
    assert not any(m.training for m in loaded.modules())
    named = policy(tmp_path, adapter=LoraChoice(rank=4, alpha=8.0, target_modules=(
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")))  # fmt: skip
    assert same(weights(named), weights(trained))


def test_a_stored_adapter_is_merged(base: Path, tmp_path: Path) -> None:
    """Asked for without an adapter: a plain model that computes the same, and all of it is trained."""
    trained = stored_adapter(base, tmp_path)
    merged = policy(tmp_path)
    assert not isinstance(merged, PeftModel) and not any("lora" in n for n, _ in merged.named_parameters())
    assert all(p.requires_grad for p in merged.parameters()) and not any(m.training for m in merged.modules())
    assert_close(logprobs(merged), logprobs(trained), **MERGED32)
    assert (logprobs(merged) - logprobs(policy(base))).abs().max() > 100 * MERGED32["atol"]
    save_model(merged, tmp_path / "merged")
    assert_close(logprobs(policy(tmp_path / "merged")), logprobs(merged), **EXACT)


def test_another_adapter_than_the_stored_one(base: Path, tmp_path: Path) -> None:
    """Its rank, scale and layers are what they are: a recipe that says otherwise is wrong."""
    stored_adapter(base, tmp_path)
    for other in (LoraChoice(rank=8, alpha=8.0), LoraChoice(rank=4, alpha=16.0)):
        refusal(lambda other=other: policy(tmp_path, adapter=other), "adapter of rank 4, alpha 8", "set adapter.rank")
    few = LoraChoice(rank=4, alpha=8.0, target_modules=("q_proj",))
    refusal(lambda: policy(tmp_path, adapter=few), "other layers than adapter.target_modules", "mlp.down_proj")
    refusal(lambda: policy(tmp_path, adapter=LORA, weights="random"), "is an adapter", "drop model.weights")


def test_the_base_of_an_adapter(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Known by name and fingerprint; a folder by its whole path, so it is found from anywhere."""
    monkeypatch.chdir(base.parent)
    save_model(policy(base.name, adapter=LORA), tmp_path / "relative")
    monkeypatch.chdir(tmp_path)
    config = json.loads((tmp_path / "relative" / ADAPTER_FILE).read_text())
    assert config["base_model_name_or_path"] == str(base.resolve())
    policy("relative", adapter=LORA)
    on_starter = load_policy(ModelChoice(weights="random", adapter=LORA), device=CPU)
    save_model(on_starter, tmp_path / "starter-adapter")
    config = json.loads((tmp_path / "starter-adapter" / ADAPTER_FILE).read_text())
    assert config["base_model_name_or_path"] == "starter"
    assert sorted(p.name for p in (tmp_path / "starter-adapter").iterdir()) == sorted(
        [ADAPTER_FILE, "adapter_model.safetensors", BASE_FILE]
    )
    assert load_tokenizer(str(tmp_path / "starter-adapter")).pad_token_id == 0  # the base's
    generation = load_generation_config(str(tmp_path / "starter-adapter"))
    assert generation is not None and generation.eos_token_id == [1, 4]


def test_an_adapter_on_other_base_weights(copied: Path, tmp_path: Path) -> None:
    """The base was trained again in place, or was drawn at random: the adapter means nothing on it."""
    folder = tmp_path / "adapter"
    stored_adapter(copied, folder)
    policy(copied, adapter=LORA, dtype="bfloat16")
    policy(folder, adapter=LORA, dtype="bfloat16")  # the same weights, rounded
    policy(folder, adapter=LORA, dtype="float64")
    rewrite(copied, lambda t: t[UP].mul_(1.1))
    refusal(lambda: policy(folder, adapter=LORA), "trained on other base weights than", str(copied))
    refusal(lambda: policy(folder), "trained on other base weights than")
    (folder / BASE_FILE).unlink()  # an adapter from elsewhere: nothing to compare with
    policy(folder)
    drawn = load_policy(ModelChoice(name=str(copied), weights="random", adapter=LORA), seed=1, device=CPU)
    save_model(drawn, tmp_path / "drawn")
    load_weights(load_policy(ModelChoice(name=str(copied), weights="random", adapter=LORA), seed=1), tmp_path / "drawn")
    refusal(lambda: policy(tmp_path / "drawn"), "trained on other base weights")


def test_adapters_that_are_damaged_or_no_plain_lora(base: Path, tmp_path: Path) -> None:
    stored_adapter(base, tmp_path)
    file, config = tmp_path / "adapter_model.safetensors", json.loads((tmp_path / ADAPTER_FILE).read_text())
    tensors = load_file(str(file))
    name = "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"
    for changed, part in (
        ({k: v for k, v in tensors.items() if k != name}, f"missing: {name}"),
        ({**tensors, "strange": torch.zeros(1)}, "unexpected: strange"),
        ({**tensors, name: torch.zeros(2, 2)}, f"of another shape: {name} (2, 2), not (4, 32)"),
    ):
        save_file(changed, str(file))
        refusal(lambda: policy(tmp_path), part)
        refusal(lambda: load_weights(policy(base, adapter=LORA), tmp_path), part)
    file.write_bytes(b"")
    refusal(lambda: policy(tmp_path), "adapter_model.safetensors: damaged")
    file.unlink()
    refusal(lambda: policy(tmp_path), "no adapter_model.safetensors in it")
    beyond = ({"modules_to_save": ["lm_head"]}, {"trainable_token_indices": [3]}, {"layer_replication": [[0, 2]]})
    for change in (*beyond, {"init_lora_weights": "pissa"}, {"peft_type": "IA3"}):
        (tmp_path / ADAPTER_FILE).write_text(json.dumps({**config, **change}))
        refusal(lambda: policy(tmp_path), "not plain LoRA; merge it")
    (tmp_path / ADAPTER_FILE).write_text(json.dumps({**config, "target_modules": ["embed_tokens"]}))
    refusal(lambda: policy(tmp_path), "its adapter is on model.embed_tokens; merge it")
    (tmp_path / ADAPTER_FILE).write_text(json.dumps({**config, "base_model_name_or_path": None}))
    refusal(lambda: policy(tmp_path), "names no base model")
    (tmp_path / ADAPTER_FILE).write_text(json.dumps({**config, "base_model_name_or_path": str(tmp_path / "gone")}))
    refusal(lambda: policy(tmp_path), "gone': no such folder")
    (tmp_path / ADAPTER_FILE).write_text("{")
    refusal(lambda: policy(tmp_path), "could not be loaded")


# References and copies ------------------------------------------------------------------------------------------------


def storages(model: nn.Module) -> dict[str, int]:
    return {name: p.data_ptr() for name, p in model.named_parameters()}


def test_copies_share_what_is_frozen() -> None:
    """Base weights under an adapter are shared, the adapter is copied; without an adapter everything is copied."""
    for original, expected in ((adapted(tiny()), "base"), (tiny(), "nothing")):
        for copier, trained in ((frozen_copy, False), (trainable_copy, True)):
            copy = copier(original)
            shared = {n for n in storages(original) if storages(copy)[n] == storages(original)[n]}
            base = {n for n, p in original.named_parameters() if not p.requires_grad}
            assert shared == (base if expected == "base" else set())
            assert any(p.requires_grad for p in copy.parameters()) == trained
            assert same(weights(copy), weights(original))
            before = weights(copy)
            nudge(original)
            assert same(weights(copy), before) and not same(weights(original), before)


def test_references(base: Path) -> None:
    """Adapter off where it is fresh; a staged run's reference is the starting policy including its adapter."""
    fresh = policy(base, adapter=LORA)
    reference = make_reference(fresh, fresh_adapter=True)
    assert isinstance(reference, AdapterOff) and unwrap(reference) is unwrap(fresh)
    staged = adapted(tiny())
    start = logprobs(staged)
    frozen = make_reference(staged, fresh_adapter=False)
    assert isinstance(frozen, PeftModel) and not frozen.training
    nudge(staged)
    assert_close(logprobs(frozen), start, **EXACT)
    assert (logprobs(staged) - start).abs().max() > 0.01
    assert (logprobs(AdapterOff(staged)) - start).abs().max() > 0.01  # what it must not be
    full = tiny()
    frozen = make_reference(full, fresh_adapter=False)
    nudge(full)
    assert_close(logprobs(frozen), logprobs(tiny()), **EXACT)


def test_frozen_policies_and_copies_have_no_dropout(base: Path, tmp_path: Path) -> None:
    """For good: not in training mode either, in adapters and in functional attention dropout too."""
    stored_adapter(base, tmp_path)
    dropping = LoraChoice(rank=4, alpha=8.0, dropout=0.5)
    frozen = frozen_policy(ModelChoice(name=str(tmp_path), adapter=dropping), CPU)
    assert not any(p.requires_grad for p in frozen.parameters())
    full = tiny(attention_dropout=0.5)
    with_dropout = policy(tmp_path, adapter=dropping)
    disabled = tiny(attention_dropout=0.5)
    disable_dropout(disabled)
    for model in (frozen, frozen_copy(full), frozen_copy(with_dropout), disabled):
        expected = logprobs(model.eval())  # type: ignore[no-untyped-call]
        model.train()
        assert_close(logprobs(model), expected, **EXACT)
    for model in (full, with_dropout):  # as a control, these do drop
        expected = logprobs(model.eval())  # type: ignore[no-untyped-call]
        model.train()
        assert (logprobs(model) - expected).abs().max() > 0.01


def test_frozen_policy_takes_the_seed(base: Path) -> None:
    choice = ModelChoice(name=str(base), weights="random")
    assert same(weights(frozen_policy(choice, CPU, seed=3)), weights(load_policy(choice, seed=3, device=CPU)))


def test_value_models() -> None:
    """On the policy's own trunk or on a copy of what is trained of it; worth 0 everywhere at first."""
    for original in (tiny(), adapted(tiny())):
        shared, own = make_value_model(original, "shared"), make_value_model(original, "own")
        assert shared.backbone is original and own.backbone is not original
        trained = {n for n, p in original.named_parameters() if p.requires_grad}
        assert {n for n, p in own.backbone.named_parameters() if p.requires_grad} == trained
        assert not any(storages(own.backbone)[n] == storages(original)[n] for n in trained)
        assert not shared.head.weight.any() and not own.head.bias.any()


def test_reward_heads_come_from_the_seed() -> None:
    """N(0, 1/(H+1)): for H = 4095 a standard deviation of 1/64, whatever torch's generator holds."""

    def drawn(seed: int) -> torch.Tensor:
        torch.manual_seed(seed + 17)
        return make_reward_model(tiny(), seed=seed).head.weight

    assert torch.equal(drawn(1), drawn(1)) and not torch.equal(drawn(1), drawn(2))
    model, state = tiny(), torch.get_rng_state()
    make_reward_model(model, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    wide = ScalarModel(tiny(), 4095, init_std=4096**-0.5)
    assert wide.head.weight.std().item() == pytest.approx(1 / 64, rel=0.05) and not wide.head.bias.any()


def test_normalisation() -> None:
    model = make_reward_model(tiny(), seed=0)
    raw = rewards(model, BATCH)
    model.set_normalisation(raw.mean().item(), raw.std().item())
    after = rewards(model, BATCH)
    assert_close(after.mean(), torch.tensor(0.0), **FLOAT32)
    assert_close(after.std(), torch.tensor(1.0), **FLOAT32)
    for scale in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="cannot normalise"):
            model.set_normalisation(0.0, scale)


def test_looking_into_models() -> None:
    """Whatever is around it, the causal LM inside is found."""
    plain, lora = tiny(), adapted(tiny())
    inner = lora.get_base_model()
    value, lora_value = make_value_model(plain, "shared"), make_value_model(lora, "shared")
    around: dict[Any, PreTrainedModel] = {
        plain: plain,
        value: plain,
        lora: inner,
        AdapterOff(lora): inner,
        lora_value: inner,
    }
    for model, expected in around.items():
        assert unwrap(model) is expected and hidden_size(model) == 32
        assert trunk(model) is expected.model
    with pytest.raises(TypeError, match="got Linear"):
        unwrap(nn.Linear(2, 2))
    assert num_parameters(plain) == sum(p.numel() for p in plain.parameters())
    assert num_parameters(AdapterOff(lora)) == num_parameters(lora)
    assert head(tiny("gemma2")).softcap == 3.0 and head(plain).softcap is None
    assert head(plain).weight is plain.model.embed_tokens.weight


# Storing --------------------------------------------------------------------------------------------------------------


def all_kinds() -> dict[str, Callable[[int], nn.Module]]:
    """Name -> a model with weights from a seed, each of the same structure whatever the seed."""

    def trained(seed: int, adapter: bool, architecture: str = "gemma3") -> Any:
        plain = tiny(architecture, seed=0 if adapter else seed)
        return adapted(plain, seed=seed) if adapter else plain

    def scalar(seed: int, adapter: bool) -> ScalarModel:
        model = make_reward_model(trained(seed, adapter), seed=seed)
        nn.init.constant_(model.head.bias, 0.1 * seed)
        model.set_normalisation(0.25 * seed, 1.0 + seed)
        return model

    return {
        "full": lambda seed: trained(seed, False),
        "untied": lambda seed: trained(seed, False, "llama"),
        "biases": lambda seed: trained(seed, False, "qwen2"),
        "lora": lambda seed: trained(seed, True),
        "scalar full": lambda seed: scalar(seed, False),
        "scalar lora": lambda seed: scalar(seed, True),
    }


@pytest.mark.parametrize("kind", all_kinds())
def test_stored_weights_come_back_bit_for_bit(kind: str, tmp_path: Path) -> None:
    """Everything, heads and normalisation too, over another model of the structure; in place, for optimisers' sake."""
    make = all_kinds()[kind]
    stored, other = make(1), make(2)
    save_model(stored, tmp_path)
    assert {p.suffix for p in tmp_path.iterdir()} <= {".safetensors", ".json"}
    before = storages(other)
    assert not same(weights(stored), weights(other))
    load_weights(other, tmp_path)
    assert same(weights(stored), weights(other)) and storages(other) == before
    if isinstance(stored, ScalarModel) and isinstance(other, ScalarModel):
        assert_close(rewards(other, BATCH), rewards(stored, BATCH), **EXACT)


def test_sharded_weights(tmp_path: Path) -> None:
    stored, other = tiny(seed=1), tiny(seed=2)
    stored.save_pretrained(str(tmp_path), max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    load_weights(other, tmp_path)
    assert same(weights(stored), weights(other)) and same(weights(policy(tmp_path)), weights(stored))
    next(tmp_path.glob("model-00002*")).unlink()
    refusal(lambda: load_weights(other, tmp_path), "no model-00002")


@pytest.mark.parametrize("kind", ["scalar full", "scalar lora"])
def test_a_stored_reward_model_scores_as_before(kind: str, base: Path, tmp_path: Path) -> None:
    """Bit for bit, frozen, without dropout; the adapter stays in place, whatever adapter the policy has."""
    lora = kind == "scalar lora"
    backbone: Any = policy(base, adapter=LoraChoice(rank=4, alpha=8.0, dropout=0.5)) if lora else policy(base)
    nudge(backbone)
    model = make_reward_model(backbone, seed=3)
    model.set_normalisation(0.3, 1.7)
    save_model(model, tmp_path)
    for adapter in (None, LoraChoice(rank=2)):
        loaded = load_reward_model(tmp_path, ModelChoice(weights="random", adapter=adapter), device=CPU)
        assert_close(rewards(loaded, BATCH), rewards(model, BATCH), **EXACT)
        assert not any(p.requires_grad for p in loaded.parameters())
        loaded.train()
        assert_close(rewards(loaded, BATCH), rewards(model, BATCH), **EXACT)


def test_a_scalar_model_without_its_head(base: Path, tmp_path: Path) -> None:
    """Refused: a random head would score, and look right. So is a head that lacks something or has more."""
    model = make_reward_model(tiny(), seed=0)
    refusal(lambda: load_reward_model(base, ModelChoice(), device=CPU), f"no {HEAD_FILE}", "train a reward model first")
    refusal(lambda: load_weights(model, base), f"no {HEAD_FILE}")
    save_model(model, tmp_path)
    whole = load_file(str(tmp_path / HEAD_FILE))
    for changed, part in (
        ({k: v for k, v in whole.items() if k != "scale"}, "missing: scale"),
        ({**whole, "extra": torch.zeros(1)}, "unexpected: extra"),
        ({**whole, "weight": torch.zeros(1, 31)}, "weight (1, 31), not (1, 32)"),
    ):
        save_file(changed, str(tmp_path / HEAD_FILE))
        refusal(lambda: load_weights(model, tmp_path), part)
        refusal(lambda: load_reward_model(tmp_path, ModelChoice(), device=CPU), part)
    (tmp_path / HEAD_FILE).write_bytes(b"x")
    refusal(lambda: load_weights(model, tmp_path), f"{HEAD_FILE}: damaged")


def test_a_reward_folder_is_a_policy_folder_too(tmp_path: Path) -> None:
    """Its trunk is stored as any model, so that it can be looked at with plain transformers."""
    model = make_reward_model(tiny(), seed=0)
    save_model(model, tmp_path)
    assert same(weights(policy(tmp_path)), weights(unwrap(model)))


# Quantised weights ----------------------------------------------------------------------------------------------------

KINDS = ("4bit", "8bit")


@pytest.fixture
def bitsandbytes() -> Any:
    return pytest.importorskip("bitsandbytes")


@pytest.mark.usefixtures("bitsandbytes")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("architecture", ["gemma3", "gemma2", "llama", "qwen2"])
def test_linear_layers_are_quantised_and_the_head_is_not(kind: str, architecture: str, tmp_path: Path) -> None:
    """Nor embeddings and norms; the head is still the plain matrix that scoring uses, tied where it was."""
    folder_of(tmp_path, architecture)
    plain, model = policy(tmp_path), frozen_policy(ModelChoice(name=str(tmp_path), quantization=kind), CPU)  # type: ignore[arg-type]
    found = {name for name, p in unwrap(model).named_parameters() if not p.is_floating_point()}
    linear = {f"{name}.weight" for name, m in plain.named_modules() if isinstance(m, nn.Linear)} - {"lm_head.weight"}
    assert found == linear and len(found) == 14
    kept = {name: p for name, p in plain.named_parameters() if name not in linear}
    assert all(torch.equal(p, dict(unwrap(model).named_parameters())[name]) for name, p in kept.items())
    tied = head(model).weight is unwrap(model).get_input_embeddings().weight
    assert tied == architecture.startswith("gemma")
    assert quantization(model) == kind and quantization(plain) is None
    assert num_parameters(model) == num_parameters(plain)  # two 4-bit weights lie in a byte, and count as two
    difference = (fixed_logits(unwrap(model)) - fixed_logits(plain)).abs().mean() / fixed_logits(plain).abs().mean()
    assert (0.01 if kind == "4bit" else 1e-4) < difference < (1.0 if kind == "4bit" else 0.05)


@pytest.mark.usefixtures("bitsandbytes")
@pytest.mark.parametrize("kind", KINDS)
def test_quantised_weights_drawn_at_random(base: Path, kind: str) -> None:
    drawn = {"weights": "random", "adapter": LORA, "overrides": {"num_hidden_layers": 1}}
    one, again, other = (policy(base, seed=seed, quantization=kind, **drawn) for seed in (1, 1, 2))
    assert same(weights(one), weights(again)) and not same(weights(one), weights(other))
    assert num_parameters(one, trained_only=True) == num_parameters(policy(base, **drawn), trained_only=True) > 0


@pytest.mark.usefixtures("bitsandbytes")
def test_what_cannot_be_quantised(base: Path, tmp_path: Path) -> None:
    refusal(lambda: policy(base, quantization="4bit"), "4bit weights cannot be trained", "set model.adapter", "drop")
    refusal(lambda: policy(base, quantization="8bit", adapter=LORA, dtype="float64"), "set model.dtype to float32")
    GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=2, n_positions=64).save_pretrained(str(tmp_path))
    drawn = {"weights": "random", "quantization": "4bit", "adapter": LORA}
    refusal(lambda: policy(tmp_path, **drawn), "GPT2LMHeadModel has layers that cannot be quantised", "drop")
    stored_adapter(base, tmp_path / "adapter")
    refusal(lambda: policy(tmp_path / "adapter", quantization="4bit"), "4bit weights cannot be trained")


def test_bitsandbytes_is_asked_for_by_name(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "alignlab.models.quantised", raising=False)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    line = refusal(lambda: policy(base, quantization="4bit", adapter=LORA), "4bit needs bitsandbytes")
    assert line.endswith("pip install 'alignlab[quant]'")


@pytest.mark.usefixtures("bitsandbytes")
@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_and_its_base_in_any_form(base: Path, kind: str, tmp_path: Path) -> None:
    """Trained on quantised weights it goes on plain ones of the same base, in any type, and the other way round."""
    for form, other in ((kind, None), (None, kind)):
        folder = tmp_path / str(form)
        stored = policy(base, quantization=form, adapter=LORA)
        nudge(stored)
        save_model(stored, folder)
        assert stored_quantization(folder) == form
        again = policy(folder, quantization=form, adapter=LORA)
        assert_close(logprobs(again), logprobs(stored), **EXACT)
        turned = policy(folder, quantization=other, adapter=LORA)
        assert quantization(turned) == other
        assert 1e-4 < (logprobs(turned) - logprobs(stored)).abs().max() < 2.0
        for dtype in ("bfloat16", "float32"):
            policy(folder, quantization=form, adapter=LORA, dtype=dtype)
            policy(folder, dtype=dtype)  # merged into plain weights


@pytest.mark.usefixtures("bitsandbytes")
@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_on_quantised_weights_of_another_base(copied: Path, kind: str, tmp_path: Path) -> None:
    """The comparison is with the weights before quantisation, so it misses nothing: here one layer, by 1 %."""
    stored = policy(copied, quantization=kind, adapter=LORA)
    save_model(stored, tmp_path / "adapter")
    rewrite(copied, lambda t: t[UP].mul_(1.01))
    for form in (kind, None):
        refusal(lambda form=form: policy(tmp_path / "adapter", quantization=form, adapter=LORA), "other base weights")
    refusal(lambda: load_weights(policy(copied, quantization=kind, adapter=LORA), tmp_path / "adapter"), "other base")


def test_a_base_is_known_in_every_type(tmp_path: Path) -> None:
    """Whichever type it was loaded in, here with weights so small that float16 has few digits for them; but not one
    that differs, were it by one rounding where both are of a type."""
    folder = folder_of(tmp_path / "base", "llama")
    rewrite(folder, lambda t: t[UP].mul_(3e-5))
    for trained in ("float32", "bfloat16", "float16"):
        save_model(policy(folder, adapter=LORA, dtype=trained), tmp_path / trained)
        for dtype in ("float32", "bfloat16", "float16", "float64"):
            policy(tmp_path / trained, adapter=LORA, dtype=dtype)
    rewrite(folder, lambda t: t["model.norm.weight"].mul_(1 + 3e-7))
    policy(tmp_path / "bfloat16", adapter=LORA, dtype="bfloat16")
    refusal(lambda: policy(tmp_path / "float32", adapter=LORA), "other base weights")
    rewrite(folder, lambda t: t["model.norm.weight"].mul_(1.02))
    for trained in ("float32", "bfloat16", "float16"):
        refusal(lambda trained=trained: policy(tmp_path / trained, adapter=LORA), "other base weights")


@pytest.mark.usefixtures("bitsandbytes")
@pytest.mark.parametrize("kind", KINDS)
def test_copies_share_quantised_weights(base: Path, kind: str) -> None:
    original = policy(base, quantization=kind, adapter=LORA)
    logprobs(original)
    for copier in (frozen_copy, trainable_copy):
        copy = copier(original)
        mine, theirs = dict(original.named_parameters()), dict(copy.named_parameters())
        assert all((mine[name] is theirs[name]) == (".lora_" not in name) for name in mine)
        scales = [[m.quant_state for m in x.modules() if hasattr(m, "quant_state")] for x in (original, copy)]
        assert all(one is other for one, other in zip(*scales, strict=True)) and bool(scales[0]) == (kind == "4bit")
        before = logprobs(copy)
        assert_close(before, logprobs(original), **EXACT)
        nudge(original)
        assert_close(logprobs(copy), before, **EXACT)
        assert (logprobs(original) - before).abs().max() > 0.01


@pytest.mark.usefixtures("bitsandbytes")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_reward_model_is_loaded_as_it_was_trained(base: Path, kind: str, dtype: str, tmp_path: Path) -> None:
    """Quantised or not is its own affair, not that of the policy that it judges: the scores are the same bits."""
    backbone = policy(base, quantization=kind, adapter=LORA, dtype=dtype)
    nudge(backbone)
    model = make_reward_model(backbone, seed=3)
    model.set_normalisation(0.3, 1.7)
    save_model(model, tmp_path / "quantised")
    for stage in (None, "4bit", "8bit"):
        loaded = load_reward_model(tmp_path / "quantised", ModelChoice(quantization=stage, dtype=dtype), device=CPU)  # type: ignore[arg-type]
        assert quantization(loaded) == kind and not any(p.requires_grad for p in loaded.parameters())
        assert_close(rewards(loaded, BATCH), rewards(model, BATCH), **EXACT)
    full = make_reward_model(policy(base), seed=3)
    save_model(full, tmp_path / "full")
    loaded = load_reward_model(tmp_path / "full", ModelChoice(quantization=kind, adapter=LORA), device=CPU)  # type: ignore[arg-type]
    assert quantization(loaded) is None
    assert_close(rewards(loaded, BATCH), rewards(full, BATCH), **EXACT)


# Merging --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["gemma3", "gemma2", "llama", "qwen2"])
def test_a_merged_model_is_the_adapter(architecture: str) -> None:
    """W + alpha / rank * B A; nothing of the adapter is left, and tied weights are still one."""
    adapter = adapted(tiny(architecture))
    expected, effect = logprobs(adapter), (logprobs(adapter) - logprobs(AdapterOff(adapter))).abs().max().item()
    layer = next(m for m in adapter.modules() if isinstance(m, BaseTunerLayer))
    product = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    weight = layer.get_base_layer().weight.detach() + 2.0 * product.detach()
    merged, check = merge_checked(adapter)
    assert type(merged) is type(tiny(architecture)) and not any("lora" in name for name, _ in merged.named_parameters())
    assert_close(logprobs(merged), expected, **MERGED32)
    assert any(torch.allclose(p, weight) for p in merged.parameters() if p.shape == weight.shape)
    tied = merged.get_output_embeddings().weight is merged.get_input_embeddings().weight
    assert tied == architecture.startswith("gemma")
    assert check.merging <= 1e-4 * check.largest_logit and check.rounding == check.merging
    assert check.adapter_effect > 0.1 and effect > 0.1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_merged_weights_are_rounded_once(dtype: torch.dtype) -> None:
    """Summed in float32, not in the type of the weights, in which B A would be rounded and the sum rounded again."""
    adapter = adapted(tiny("llama", dtype=dtype))
    layer = unwrap(adapter).model.layers[0].mlp.up_proj
    product = layer.lora_B["default"].weight.float() @ layer.lora_A["default"].weight.float()
    expected = (layer.get_base_layer().weight.float() + 2.0 * product).to(dtype)
    merged, check = merge_checked(adapter)
    assert merged.dtype == dtype and torch.equal(merged.model.layers[0].mlp.up_proj.weight, expected)
    assert check.merging < 1e-4 * check.largest_logit < check.rounding < 0.5 * check.adapter_effect


def test_a_merge_that_went_wrong_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Merged twice over, merged without its scale, a layer left out, or NaN: the logits tell."""
    right = LoraModel.merge_and_unload

    def doubled(self: Any) -> Any:
        return scaled(self, 2.0)

    def scaled(self: Any, factor: float, most: int | None = None) -> Any:
        layers = [m for m in self.modules() if isinstance(m, BaseTunerLayer)]
        for layer in layers[:most]:
            layer.lora_B["default"].weight.data *= factor
        return right(self)

    wrong: dict[str, Callable[[Any], Any]] = {
        "twice": doubled,
        "unscaled": lambda self: scaled(self, 0.5),
        "not at all": lambda self: scaled(self, 0.0),
        "one layer left out": lambda self: scaled(self, 0.0, most=1),
        "NaN": lambda self: scaled(self, float("nan")),
    }
    for merge in wrong.values():
        monkeypatch.setattr(LoraModel, "merge_and_unload", merge)
        for dtype in (torch.float32, torch.bfloat16):
            refusal(
                lambda dtype=dtype: merge_adapter(adapted(tiny(dtype=dtype))), "the merged model is not the adapter's"
            )


def test_rounding_may_not_lose_the_adapter() -> None:
    """Updates below the rounding of bfloat16 are gone in it, and stay in float32; an adapter that does nothing loses
    nothing."""
    adapter = adapted(tiny(dtype=torch.bfloat16), perturbed=False)
    merge_adapter(adapted(tiny(dtype=torch.bfloat16), perturbed=False))
    nudge(adapter, scale=3e-4)
    refusal(lambda: merge_adapter(trainable_copy(adapter)), "bfloat16 would lose the adapter", "use float32")
    merged, check = merge_checked(adapter, torch.float32)
    assert merged.dtype == torch.float32 and check.rounding < 0.1 * check.adapter_effect


@pytest.mark.usefixtures("bitsandbytes")
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_merged_into_quantised_weights(base: Path, kind: str) -> None:
    adapter = policy(base, quantization=kind, adapter=LORA)
    refusal(lambda: merge_adapter(adapter), f"cannot be merged into {kind} weights", "without model.quantization")


# A critic on the reward model's trunk ---------------------------------------------------------------------------------


@pytest.mark.parametrize("lora_policy", [True, False])
def test_a_critic_on_a_full_reward_model(lora_policy: bool) -> None:
    """It shares every weight and trains an adapter of its own, of the policy's rank (4) or 8; worth 0 at first."""
    reward_model = make_reward_model(tiny(seed=3), seed=0).requires_grad_(False)
    scores = rewards(reward_model, BATCH)
    start = adapted(tiny(), rank=4) if lora_policy else tiny()
    critic = make_value_model(start, "reward_model", reward_model, seed=5)
    config = critic.backbone.active_peft_config
    assert config.r == (4 if lora_policy else 8) and config.lora_alpha == 2 * config.r
    trained = {name for name, p in critic.named_parameters() if p.requires_grad}
    assert {n.split(".")[0] for n in trained} == {"head", "backbone"}
    assert all(".lora_" in n or n.startswith("head") for n in trained)
    shared = set(reward_model.backbone.parameters())
    assert all(p in shared for name, p in critic.backbone.named_parameters() if ".lora_" not in name)
    assert not critic.head.weight.any() and not critic.head.bias.any()
    nudge(critic)
    assert_close(rewards(reward_model, BATCH), scores, **EXACT)
    again = make_value_model(start, "reward_model", reward_model, seed=5)
    assert same(weights(again), weights(make_value_model(start, "reward_model", reward_model, seed=5)))
    assert not same(weights(again), weights(make_value_model(start, "reward_model", reward_model, seed=6)))


def test_a_critic_on_an_adapted_reward_model() -> None:
    """Its adapter is merged into copies of the weights under it; embeddings and norms are shared, and it stays."""
    reward_model = make_reward_model(adapted(tiny(seed=3)), seed=0).requires_grad_(False)
    scores, states = rewards(reward_model, BATCH), padded_states(reward_model, BATCH)
    critic = make_value_model(tiny(), "reward_model", reward_model)
    assert_close(padded_states(critic, BATCH), states, **MERGED32)  # the same trunk, whose fresh adapter does nothing
    assert_close(rewards(reward_model, BATCH), scores, **EXACT)
    theirs = set(reward_model.backbone.parameters())
    shared = {n.rsplit(".", 2)[-2] for n, p in critic.backbone.named_parameters() if p in theirs}
    assert {"embed_tokens", "norm", "q_norm"} <= shared and "up_proj" not in shared and "base_layer" not in shared
    nudge(critic)
    assert_close(rewards(reward_model, BATCH), scores, **EXACT)


@pytest.mark.usefixtures("bitsandbytes")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("adapter", [LORA, None], ids=["with adapter", "without"])
def test_a_critic_on_a_quantised_reward_model(base: Path, kind: str, adapter: LoraChoice | None) -> None:
    """An adapter that is there is trained on, as a copy; the quantised weights are shared."""
    backbone = load_stored(ModelChoice(name=str(base), quantization=kind, adapter=adapter), device=CPU)  # type: ignore[arg-type]
    if adapter:
        nudge(backbone)
    reward_model = make_reward_model(backbone, seed=0).requires_grad_(False)
    scores, states = rewards(reward_model, BATCH), padded_states(reward_model, BATCH)
    critic = make_value_model(tiny(), "reward_model", reward_model)
    assert_close(padded_states(critic, BATCH), states, **EXACT)
    theirs = set(reward_model.parameters())
    trained = {n for n, p in critic.named_parameters() if p.requires_grad}
    assert len([n for n in trained if ".lora_" in n]) == 28 and {"head.weight", "head.bias"} < trained
    assert all((p in theirs) == (n not in trained) for n, p in critic.named_parameters())
    nudge(critic)
    assert_close(rewards(reward_model, BATCH), scores, **EXACT)
    assert (padded_states(critic, BATCH) - states).abs().max() > 0.01


def test_a_stored_critic_on_a_reward_model(tmp_path: Path) -> None:
    reward_model = make_reward_model(adapted(tiny(seed=3)), seed=0).requires_grad_(False)
    critic, other = (make_value_model(tiny(), "reward_model", reward_model, seed=seed) for seed in (1, 2))
    nudge(critic)
    save_model(critic, tmp_path)
    load_weights(other, tmp_path)
    assert same(weights(other), weights(critic))


def test_what_no_critic_can_grow_from() -> None:
    refusal(lambda: make_value_model(tiny(), "reward_model"), "needs a reward model")
    reward_model = make_reward_model(tiny(vocab_size=80), seed=0)
    refusal(lambda: make_value_model(tiny(), "reward_model", reward_model), "80 embeddings in it and 64 in the policy")
