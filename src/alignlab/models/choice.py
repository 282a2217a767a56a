"""Which weights, and how: a name and a few choices; and what is wrong with them, said before anything is loaded.

What the functions below refuse, loading refuses with the same words, as it calls them too.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from alignlab import starter
from alignlab.errors import UserError
from alignlab.models.explain import explained, listed
from alignlab.models.roles import Quantization
from alignlab.models.store import ADAPTER_FILE, adapter_base, read_json, weight_files

Dtype = Literal["auto", "float32", "bfloat16", "float16", "float64"]


@dataclass(frozen=True, kw_only=True)
class LoraChoice:
    """A low-rank adapter (arXiv:2106.09685): W + alpha / rank * B A, with A (rank, in) and B (out, rank) trained."""

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    target_modules: tuple[str, ...] = ("all-linear",)
    """Names of the linear layers to adapt; `all-linear` is every one except the head."""


@dataclass(frozen=True, kw_only=True)
class ModelChoice:
    """Which weights to load, and how."""

    name: str = "starter"
    """`starter`, a folder, or a hub id."""
    revision: str | None = None
    weights: Literal["pretrained", "random"] = "pretrained"
    """`random` takes only the configuration and draws the weights from the seed."""
    dtype: Dtype = "auto"
    """`auto`: bfloat16 on a CUDA device that has it, float32 elsewhere. Adapters are float32 or wider."""
    attention: Literal["auto", "sdpa", "eager"] = "auto"
    """`auto`: eager for Gemma 2 (whose attention soft-cap sdpa lacks), sdpa elsewhere."""
    adapter: LoraChoice | None = None
    """None trains every weight."""
    quantization: Quantization | None = None
    """The linear layers' weights, the head's left out, in few bits: `4bit` (NF4, arXiv:2305.14314) or `8bit`. They
    cannot be trained, so a policy needs an adapter on them."""
    overrides: dict[str, Any] = field(default_factory=dict)
    """Configuration values to replace when `weights: random` (e.g. fewer layers of a true-size shape)."""


def location(name: str) -> str:
    """Where a model name points: the embedded starter's folder, an existing folder, or a hub id.

    Raises:
        UserError: it is none of these.
    """
    if name == "starter":
        return str(starter.ASSETS)
    path = Path(name).expanduser()
    if name and path.is_dir():
        return str(path)
    if path.exists() or not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name):
        raise UserError(f"model {name!r}: no such folder; give an existing folder, a hub id as owner/name, or starter")
    return name


def location_of(file: str, name: str) -> str:
    """Where a model's `file` is to be found: its own location, or its base's where the folder is a bare adapter."""
    folder = Path(where := location(name))
    if (folder / ADAPTER_FILE).is_file() and not (folder / file).is_file():
        return location(adapter_base(folder))
    return where


# ---- what is refused -------------------------------------------------------------------------------------------------


def check_choice(choice: ModelChoice, *, made: bool = True) -> Mapping[str, Any]:
    """Says what files and configuration of a model folder forbid; nothing of a model on the hub, which is not asked.

    Args:
        made: false where training will make other weights of this configuration before they are loaded.

    Returns:
        The configuration of its text model, as its file has it; empty where the model is on the hub.

    Raises:
        UserError: what loading it would raise.
    """
    folder, base = Path(location(choice.name)), choice.name
    if folder.is_dir():
        require_tokenizer(choice.name)
    if (folder / ADAPTER_FILE).is_file():
        if made:
            require_no_random(choice)
            stored = read_json(folder / ADAPTER_FILE)
            require_same_adapter(f"model {choice.name!r}", choice.adapter, stored.get("r"), stored.get("lora_alpha"))
        base = adapter_base(folder)
        folder = Path(location(base))
    if not folder.is_dir():
        return {}
    require_config(base, folder)
    config = read_json(folder / "config.json")
    text = {**config, **(config.get("text_config") or {})}
    require_settings(choice, base, str(text.get("model_type")))
    if made and choice.weights == "pretrained":
        weight_files(folder)
    if choice.adapter is not None and set(choice.adapter.target_modules) != {"all-linear"}:
        require_targets(choice.adapter, *_linear_layers(base, folder))
    return {**text, **choice.overrides}


def require_tokenizer(name: str) -> str:
    """Where a model's tokenizer is; a folder has its files."""
    where = location_of("tokenizer_config.json", name)
    kinds = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
    if Path(where).is_dir() and not any((Path(where) / kind).is_file() for kind in kinds):
        raise UserError(f"model {name!r}: {where} has no tokenizer.json; put the model's tokenizer files there")
    return where


def require_no_random(choice: ModelChoice) -> None:
    if choice.weights == "random":
        raise UserError(
            f"model {choice.name!r} is an adapter, which means nothing on random weights; drop model.weights"
        )


def require_same_adapter(whose: str, asked: LoraChoice | None, rank: object, alpha: object) -> None:
    """A stored adapter goes on as it is; without an adapter in the recipe it is merged, and anything will do."""
    if asked is not None and (asked.rank, asked.alpha) != (rank, alpha):
        raise UserError(
            f"{whose} goes on with an adapter of rank {rank}, alpha {alpha}: set adapter.rank and adapter.alpha to "
            f"these (now {asked.rank}, {asked.alpha})"
        )


def require_config(name: str, where: Path) -> None:
    if where.is_dir() and not (where / "config.json").is_file():
        raise UserError(f"model {name!r}: {where} has no config.json; it is no model folder, or its download broke off")


def require_settings(choice: ModelChoice, name: str, model_type: str) -> str:
    """Refuses settings that give wrong numbers with this type of model, or cannot be had; the attention to use."""
    if choice.dtype == "float16" and model_type.startswith("gemma"):
        raise UserError(f"model {name!r}: Gemma overflows in float16; set model.dtype to bfloat16 or float32")
    attention: str = choice.attention
    if attention == "auto":
        attention = "eager" if model_type == "gemma2" else "sdpa"
    if choice.dtype == "float64" and attention == "eager":  # its softmax is float32, where the mask's -1e308 overflows
        raise UserError(f"model {name!r}: eager attention gives NaN in float64; set model.dtype to float32")
    if choice.overrides and choice.weights != "random":
        raise UserError("model.overrides: they change the shape of a model, so they need model.weights: random")
    if choice.quantization and choice.dtype == "float64":
        raise UserError(
            f"model {name!r}: {choice.quantization} weights stand for float32 at best; set model.dtype to float32"
        )
    if choice.quantization and importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(f"model.quantization: {choice.quantization} needs bitsandbytes: pip install 'alignlab[quant]'")
    return attention


def require_targets(lora: LoraChoice, layers: Collection[str], tied: bool) -> None:
    """Every name of a new adapter's layers is that of a linear layer, the head left out.

    Args:
        layers: the linear layers of the model; `tied`: its head is its embedding.
    """
    targets = [t for t in lora.target_modules if t != "all-linear"]
    if any(is_called("lm_head", target) for target in targets):
        reason = "is tied to the embedding here" if tied else "stays frozen"
        raise UserError(f"adapter.target_modules: lm_head {reason}; leave it out")
    useless = [t for t in targets if not any(is_called(layer, t) for layer in layers)]
    if useless:
        known = sorted({layer.rsplit(".", 1)[-1] for layer in layers})
        raise UserError(f"adapter.target_modules: {listed(useless)} match nothing; this model has {', '.join(known)}")


def is_called(layer: str, target: str) -> bool:
    return layer == target or layer.endswith(f".{target}")


def _linear_layers(name: str, folder: Path) -> tuple[Collection[str], bool]:
    """Those of a model without its weights, which is made in no time, and whether its head is tied."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from alignlab.models.load import linear_layers

    with explained(name), torch.device("meta"):
        config = AutoConfig.from_pretrained(str(folder), trust_remote_code=False).get_text_config()
        model = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    return linear_layers(model), bool(config.tie_word_embeddings)
