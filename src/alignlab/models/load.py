"""From a name to a model: ModelChoice -> tokenizer, policy, frozen policy, reward model on a device.

Loading runs no code of a model folder, reads no pickles and accepts no weights that do not fit.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
import transformers
from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import logging as hub_logging
from torch import nn
from transformers.utils import logging as transformers_logging

from alignlab.errors import UserError
from alignlab.models.adapters import merge_adapter, with_adapter
from alignlab.models.choice import (
    Dtype,
    LoraChoice,
    ModelChoice,
    is_called,
    location,
    location_of,
    require_config,
    require_no_random,
    require_same_adapter,
    require_settings,
    require_targets,
    require_tokenizer,
)
from alignlab.models.explain import brief, explained, listed, require_fit
from alignlab.models.roles import (
    Quantization,
    ScalarModel,
    disable_dropout,
    freeze,
    has_adapter,
    head,
    hidden_size,
    seeded,
    trunk,
    unwrap,
)
from alignlab.models.store import (
    ADAPTER_FILE,
    HEAD_FILE,
    adapter_base,
    load_head,
    load_weights,
    stored_quantization,
    weight_files,
)

if TYPE_CHECKING:  # they take seconds to import; `transformers` itself finds its classes when they are asked for
    from peft import LoraConfig, PeftModel
    from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel
    from transformers import PreTrainedTokenizerBase as Tokenizer

HEAD_TOLERANCE = 0.02
"""How far a model's own logits may be from trunk times head, as a share of the largest: rounding in bfloat16."""


# ---- finding ---------------------------------------------------------------------------------------------------------


def hush_progress_bars() -> None:
    """Switches off the loaders' own progress bars, as a run has one of its own, and what they say of every retry."""
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    hub_logging.set_verbosity_error()  # type: ignore[no-untyped-call]


def pick_device(name: str = "auto") -> torch.device:
    """`auto`: CUDA, then Apple's MPS, then the CPU.

    Raises:
        UserError: this machine, or this build of torch, has no such device.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device {name!r} cannot be used here ({brief(error)}); try auto or cpu") from error


def load_tokenizer(name: str, revision: str | None = None) -> Tokenizer:
    """The tokenizer of a model; of a folder that holds an adapter and no tokenizer, its base model's."""
    where = require_tokenizer(name)
    with explained(name):
        if not Path(where).is_dir():
            _ask_hub(where, revision)
        tokenizer = transformers.AutoTokenizer.from_pretrained(where, revision=revision, trust_remote_code=False)
    return cast("Tokenizer", tokenizer)


def _ask_hub(name: str, revision: str | None) -> None:
    """Whether the hub answers, and has such a model: asked once, where loading would ask again for most of a minute.

    Raises:
        HfHubHTTPError: it says no; ConnectionError: it cannot be reached.
    """
    if try_to_load_from_cache(name, "config.json", revision=revision) is not None:
        return
    try:
        get_hf_file_metadata(hf_hub_url(name, "config.json", revision=revision))
    except (GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError, OfflineModeIsEnabled):
        raise
    except HfHubHTTPError:  # no such file, or a busy hub: loading knows what to do
        return
    except Exception as error:  # of whatever library the hub is asked with
        raise ConnectionError(brief(error)) from error


def load_generation_config(name: str, revision: str | None = None) -> GenerationConfig | None:
    """The model's generation defaults (its stop ids live there), None where it ships none."""
    where = location_of("generation_config.json", name)
    if not Path(where).is_dir():
        try:
            return transformers.GenerationConfig.from_pretrained(where, revision=revision or "main")
        except OSError:
            return None
    if not (Path(where) / "generation_config.json").is_file():
        return None
    with explained(name):
        return transformers.GenerationConfig.from_pretrained(where)


def weights_dtype(name: str, revision: str | None = None) -> Dtype:
    """The type in which a model's files hold its weights; of a folder with an adapter, its base model's."""
    where = location_of("config.json", name)
    with explained(name):
        config = transformers.AutoConfig.from_pretrained(where, revision=revision, trust_remote_code=False)
    known = str(config.get_text_config().dtype or config.dtype or torch.float32).removeprefix("torch.")
    return cast(Dtype, known)


# ---- policies and reward models --------------------------------------------------------------------------------------


def load_policy(
    choice: ModelChoice, *, seed: int = 0, device: torch.device | None = None
) -> PreTrainedModel | PeftModel:
    """A trainable policy, in evaluation mode.

    What is drawn at random (a fresh adapter, `weights: random`) comes from `seed` alone, and torch's own generator
    stays as it was. A folder that holds an adapter is loaded as its base model with that adapter, which then goes on
    being trained; asked for without an adapter, it is merged into the weights, and all of them are trained.

    Raises:
        UserError: the model cannot be found, reached or used, with what to do about it.
    """
    if choice.quantization and choice.adapter is None:
        raise UserError(
            f"model {choice.name!r}: {choice.quantization} weights cannot be trained; set model.adapter (lora) or drop "
            "model.quantization"
        )
    model = load_stored(choice, seed=seed, device=device)
    if choice.adapter is None and has_adapter(model):
        with explained(choice.name):
            return merge_adapter(model).requires_grad_(True)
    return model


def frozen_policy(
    choice: ModelChoice, device: torch.device | None = None, *, seed: int = 0
) -> PreTrainedModel | PeftModel:
    """A policy that is only sampled or scored, without gradients and dropout; quantised, it keeps its adapter apart."""
    policy = (load_stored if choice.quantization else load_policy)(choice, seed=seed, device=device)
    disable_dropout(policy)
    return freeze(policy)


def load_reward_model(folder: Path, choice: ModelChoice, *, device: torch.device | None = None) -> ScalarModel:
    """A trained reward model from its folder, frozen. It scores as it did after training, bit for bit: its adapter
    stays in place, and its weights are quantised if they were so in training, whatever `choice` says of these two.

    Raises:
        UserError: the folder has no trained head, or weights that do not fit.
    """
    if not (folder / HEAD_FILE).is_file():
        raise UserError(f"{folder}: no {HEAD_FILE}; train a reward model first (algorithm: reward_model)")
    as_trained = {"name": str(folder), "quantization": stored_quantization(folder)}
    own = replace(choice, **as_trained, weights="pretrained", revision=None, overrides={}, adapter=None)  # type: ignore[arg-type]
    backbone = load_stored(own, device=device)
    model = ScalarModel(backbone, hidden_size(backbone))
    load_head(model, folder)
    disable_dropout(model)
    return freeze(model).eval()


def load_stored(
    choice: ModelChoice, *, seed: int = 0, device: torch.device | None = None
) -> PreTrainedModel | PeftModel:
    """The model as it is stored, an adapter in place; where an adapter is asked for and none stored, with a fresh one.

    Raises:
        UserError: the model cannot be found, reached or used, with what to do about it.
    """
    folder = Path(location(choice.name))
    if not (folder / ADAPTER_FILE).is_file():
        model = _load_base(choice, choice.name, seed, device or pick_device())
        return model if choice.adapter is None else _add_adapter(model, choice, choice.adapter, seed)
    require_no_random(choice)
    config = _read_adapter(folder, choice)
    base = _load_base(replace(choice, revision=config.revision), adapter_base(folder), seed, device or pick_device())
    linear = linear_layers(base)
    adapted = with_adapter(base, config, seed)
    _require_layers(adapted, choice, linear)
    load_weights(adapted, folder)
    return adapted


def _load_base(choice: ModelChoice, name: str, seed: int, device: torch.device) -> PreTrainedModel:
    where = location(name)
    require_config(name, Path(where))
    with explained(name):
        config = transformers.AutoConfig.from_pretrained(where, revision=choice.revision, trust_remote_code=False)
    text = config.get_text_config()
    dtype = _dtype(choice.dtype, device)
    attention = require_settings(choice, name, str(text.model_type))
    if choice.weights == "random":
        with explained(name), seeded(seed):
            model = transformers.AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
                _overridden(text, choice.overrides), dtype=dtype, attn_implementation=attention
            )
    else:
        model = _read_pretrained(where, name, choice.revision, config, dtype, attention)
    _require_usable(model, name)
    if choice.quantization:
        _quantise(model, name, choice.quantization, device)
    return cast("PreTrainedModel", model.to(device))


def _quantise(model: PreTrainedModel, name: str, kind: Quantization, device: torch.device) -> None:
    try:
        from alignlab.models.quantised import quantise
    except ImportError as error:
        raise UserError(f"model.quantization: {kind} needs bitsandbytes: pip install 'alignlab[quant]'") from error
    try:
        quantise(model, kind, device)
    except TypeError as error:
        raise UserError(f"model {name!r}: {error}; drop model.quantization") from error
    except (RuntimeError, NotImplementedError) as error:
        raise UserError(
            f"model.quantization: bitsandbytes cannot make {kind} weights on {device} ({brief(error)}); drop it, or "
            "take another device"
        ) from error


def _dtype(name: Dtype, device: torch.device) -> torch.dtype:
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported() else torch.float32
    return cast(torch.dtype, getattr(torch, name))


def _overridden(config: PreTrainedConfig, overrides: Mapping[str, Any]) -> PreTrainedConfig:
    """The configuration with other values; the pattern of layer types is cut or repeated to the number of layers."""
    unknown = [key for key in overrides if not hasattr(config, key)]
    if unknown:
        known = ", ".join(sorted(config.to_dict()))
        raise UserError(f"model.overrides: {type(config).__name__} has no {listed(unknown)}; it has {known}")
    values = {**config.to_dict(), **overrides}
    types = values.get("layer_types")
    if types and "layer_types" not in overrides:
        values["layer_types"] = [types[i % len(types)] for i in range(values["num_hidden_layers"])]
    return type(config).from_dict(values)


def _read_pretrained(
    where: str, name: str, revision: str | None, config: PreTrainedConfig, dtype: torch.dtype, attention: str
) -> PreTrainedModel:
    """The text model of that name; of an image-and-text model, its text part."""
    if Path(where).is_dir():
        weight_files(Path(where))
    text = config.get_text_config()
    with explained(name):
        model, report = cast(
            "tuple[PreTrainedModel, dict[str, Any]]",
            transformers.AutoModelForCausalLM.from_pretrained(
                where,
                revision=revision,
                config=text,
                dtype=dtype,
                attn_implementation=attention,
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are refused below, by name
                key_mapping=None if text is config else {r"^language_model\.": ""},
            ),
        )
    mismatched = [f"{key} {tuple(saved)}, not {tuple(own)}" for key, saved, own in report["mismatched_keys"]]
    unexpected = report["unexpected_keys"] if text is config else ()
    require_fit(f"model {name!r}", report["missing_keys"], unexpected, mismatched)
    return model


def _require_usable(model: PreTrainedModel, name: str) -> None:
    """No broken weights, and a head that is understood: anything else gives wrong numbers that look right."""
    broken = [n for n, p in model.named_parameters() if not torch.isfinite(p).all()]
    if broken:
        raise UserError(f"model {name!r}: NaN or infinite weights in {listed(broken)}; download it again")
    try:
        top = head(model)
    except TypeError as error:
        raise UserError(f"model {name!r} cannot be used: {error}; choose another architecture") from error
    model.eval()  # type: ignore[no-untyped-call]
    few = torch.arange(4)[None]
    with torch.no_grad():
        logits = model(input_ids=few).logits.float()
        own = (trunk(model)(input_ids=few).last_hidden_state @ top.weight.T).float()
    own = own if top.softcap is None else top.softcap * torch.tanh(own / top.softcap)
    if not (own - logits).abs().max() <= HEAD_TOLERANCE * logits.abs().max():
        raise UserError(f"model {name!r} cannot be used: {type(model).__name__} scales its logits; choose another one")


# ---- adapters --------------------------------------------------------------------------------------------------------


def _add_adapter(model: PreTrainedModel, choice: ModelChoice, lora: LoraChoice, seed: int) -> PeftModel:
    """A fresh adapter, which changes nothing yet (B = 0)."""
    from peft import LoraConfig

    tied = bool(model.config.get_text_config().tie_word_embeddings)
    require_targets(lora, linear_layers(model), tied)
    folder = Path(choice.name).expanduser()
    is_folder = choice.name != "starter" and folder.is_dir()
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=cast(int, lora.alpha),
        lora_dropout=lora.dropout,
        target_modules="all-linear" if "all-linear" in lora.target_modules else list(lora.target_modules),
        task_type="CAUSAL_LM",
        revision=choice.revision,
        base_model_name_or_path=str(folder.resolve()) if is_folder else choice.name,
    )
    return with_adapter(model, config, seed)


def _read_adapter(folder: Path, choice: ModelChoice) -> LoraConfig:
    """A stored adapter's configuration, made trainable.

    Raises:
        UserError: it is more than a plain LoRA adapter, or not the adapter that was asked for.
    """
    from peft import LoraConfig, PeftConfig

    with explained(choice.name), warnings.catch_warnings(action="ignore"):
        config = PeftConfig.from_pretrained(str(folder))
    beyond = ("modules_to_save", "trainable_token_indices", "target_parameters", "layer_replication")
    if (
        not isinstance(config, LoraConfig)
        or any(getattr(config, key, None) for key in beyond)
        or config.init_lora_weights not in (True, False, "gaussian")
    ):
        raise UserError(f"model {choice.name!r}: its adapter is not plain LoRA; merge it into its base model first")
    asked = choice.adapter
    require_same_adapter(f"model {choice.name!r}", asked, config.r, config.lora_alpha)
    config.inference_mode = False
    config.lora_dropout = 0.0 if asked is None else asked.dropout
    return config


def _require_layers(model: PeftModel, choice: ModelChoice, linear: set[str]) -> None:
    """A stored adapter is on linear layers only, and on those that the recipe names."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = {name for name, module in unwrap(model).named_modules() if isinstance(module, BaseTunerLayer)}
    if stray := sorted(layers - linear):
        raise UserError(f"model {choice.name!r}: its adapter is on {listed(stray)}; merge it into its base model first")
    if choice.adapter is not None and (differing := sorted(layers ^ _selected(linear, choice.adapter))):
        raise UserError(
            f"model {choice.name!r} goes on with its adapter, which is on other layers than adapter.target_modules: "
            f"{listed(differing)}; name the same"
        )


def linear_layers(model: PreTrainedModel) -> set[str]:
    """Names of the layers that an adapter may go on: the linear ones, without the head."""
    from transformers.pytorch_utils import Conv1D

    top = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    return {name for name, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D) and m is not top}


def _selected(layers: set[str], lora: LoraChoice) -> set[str]:
    every = "all-linear" in lora.target_modules
    return {layer for layer in layers if every or any(is_called(layer, t) for t in lora.target_modules)}
