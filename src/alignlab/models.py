"""The models of a run: a name and a few choices -> policy, reference, reward model and value model on a device.

A policy is a `transformers` causal LM or a `peft` model around one. A reward or value model is a `ScalarModel`: a policy's
trunk with one scalar head. Loading never runs code from a model folder and never reads pickles.
"""

from __future__ import annotations

import copy
import json
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers.utils import logging as transformers_logging

from alignlab import starter
from alignlab.errors import UserError

M = TypeVar("M", bound=nn.Module)
Dtype = Literal["auto", "float32", "bfloat16", "float16", "float64"]
HEAD_FILE = "scalar_head.safetensors"
ADAPTER_FILE = "adapter_config.json"


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
    """`auto`: bfloat16 on an accelerator that has it, float32 elsewhere."""
    attention: Literal["auto", "sdpa", "eager"] = "auto"
    """`auto`: eager for Gemma 2 (whose attention soft-cap sdpa lacks), sdpa elsewhere."""
    adapter: LoraChoice | None = None
    """None trains every weight."""
    overrides: dict[str, Any] = field(default_factory=dict)
    """Configuration values to replace when `weights: random` (e.g. fewer layers of a true-size shape)."""


class AdapterOff:
    """The reference policy as a view: the policy's own weights with its (fresh) adapter switched off."""

    def __init__(self, policy: PeftModel) -> None:
        self.policy = policy

    def active(self) -> AbstractContextManager[Any]:
        return cast(AbstractContextManager[Any], self.policy.disable_adapter())


class ScalarModel(nn.Module):
    """A causal LM's trunk with one fp32 scalar head: (B, T, H) -> (B, T); reward models and critics.

    `shift` and `scale` normalise a reward model's scores: score = (head - shift) / scale. They are saved with the head and
    set after training so that reference outputs score mean 0 and standard deviation 1.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, backbone: nn.Module, hidden_size: int, init_std: float = 0.0) -> None:
        super().__init__()
        self.backbone = backbone
        parameter = next(backbone.parameters())
        head_dtype = torch.float64 if parameter.dtype == torch.float64 else torch.float32
        self.head = nn.Linear(hidden_size, 1, dtype=head_dtype, device=parameter.device)
        nn.init.normal_(self.head.weight, std=init_std) if init_std else nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        self.register_buffer("shift", torch.zeros((), dtype=head_dtype, device=parameter.device))
        self.register_buffer("scale", torch.ones((), dtype=head_dtype, device=parameter.device))

    def forward(self, hidden: Tensor) -> Tensor:  # (..., H) -> (...)
        return cast(Tensor, self.head(hidden.to(self.head.weight.dtype))).squeeze(-1)

    def set_normalisation(self, shift: float, scale: float) -> None:
        self.shift.fill_(shift)
        self.scale.fill_(scale)


Model = PreTrainedModel | PeftModel | AdapterOff | ScalarModel


def hush_progress_bars() -> None:
    """Switches off the loaders' own progress bars; a run has one of its own."""
    transformers_logging.disable_progress_bar()


# ---- inspecting ------------------------------------------------------------------------------------------------------


def unwrap(model: object) -> PreTrainedModel:
    """The `transformers` causal LM inside a policy, reference view or scalar model (adapter layers stay in place)."""
    if isinstance(model, AdapterOff):
        model = model.policy
    if isinstance(model, ScalarModel):
        model = model.backbone
    if isinstance(model, PeftModel):
        model = model.get_base_model()
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"expected a transformers model, got {type(model).__name__}")
    return model


def active(model: object) -> AbstractContextManager[Any]:
    """The context in which the model's trunk means this model (an adapter-off view switches the adapter off)."""
    return model.active() if isinstance(model, AdapterOff) else nullcontext()


def hidden_size(model: object) -> int:
    return int(unwrap(model).config.get_text_config().hidden_size)


def num_parameters(model: object, trained_only: bool = False) -> int:
    module = model if isinstance(model, nn.Module) else unwrap(model)
    return sum(p.numel() for p in module.parameters() if p.requires_grad or not trained_only)


def has_adapter(model: object) -> bool:
    return isinstance(model, PeftModel)


def freeze(model: M) -> M:
    return model.requires_grad_(False)


def disable_dropout(model: nn.Module) -> None:
    """Turns every dropout off for good, so that training mode does not bring it back."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0


# ---- loading ---------------------------------------------------------------------------------------------------------


def pick_device(name: str = "auto") -> torch.device:
    """`auto`: CUDA, then Apple's MPS, then the CPU."""
    if name != "auto":
        return torch.device(name)
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def location(name: str) -> str:
    """Where a model name points: the embedded starter's folder, an existing folder, or a hub id."""
    if name == "starter":
        return str(starter.ASSETS)
    path = Path(name).expanduser()
    if path.is_dir():
        return str(path)
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name:
        raise UserError(f"model {name!r}: no such folder. Give an existing folder, a hub id like owner/name, or 'starter'")
    return name


def load_tokenizer(name: str, revision: str | None = None) -> Tokenizer:
    """The tokenizer of a model; for a folder that holds only an adapter, its base model's."""
    with _explained(name):
        return cast(Tokenizer, AutoTokenizer.from_pretrained(location(name), revision=revision))


def load_generation_config(name: str, revision: str | None = None) -> GenerationConfig | None:
    """The model's generation defaults (its stop ids live there), None where it ships none."""
    try:
        return GenerationConfig.from_pretrained(location(name), revision=revision)
    except OSError:
        return None


def load_policy(choice: ModelChoice, *, seed: int = 0, device: torch.device | None = None) -> PreTrainedModel | PeftModel:
    """A trainable policy. Weights drawn at random (a fresh adapter, `weights: random`) come from `seed` alone.

    A folder that holds an adapter is loaded as its base model with that adapter, which then goes on being trained; asked
    for without an adapter, it is merged into the (unquantised) weights.

    Raises:
        UserError: the model cannot be found, reached or used, with what to do about it.
    """
    device = device or pick_device()
    folder = Path(location(choice.name))
    base, adapter = choice.name, None
    if (folder / ADAPTER_FILE).is_file():
        base, adapter = json.loads((folder / ADAPTER_FILE).read_text("utf-8"))["base_model_name_or_path"], folder
        base = "starter" if base == "starter" else base
    model = _load_base(choice, base, seed, device)
    if adapter is not None:
        with _explained(choice.name):
            loaded = PeftModel.from_pretrained(model, str(adapter), is_trainable=choice.adapter is not None)
        return loaded if choice.adapter is not None else cast(PreTrainedModel, loaded.merge_and_unload())
    if choice.adapter is None:
        return model
    return _add_adapter(model, choice.adapter, base, seed)


def frozen_policy(choice: ModelChoice, device: torch.device | None = None) -> PreTrainedModel | PeftModel:
    """A policy that is only sampled or scored: no gradients, no dropout."""
    policy = load_policy(choice, device=device)
    disable_dropout(policy)
    policy.requires_grad_(False)
    return policy


def _load_base(choice: ModelChoice, name: str, seed: int, device: torch.device) -> PreTrainedModel:
    where = location(name)
    with _explained(name):
        config = AutoConfig.from_pretrained(where, revision=choice.revision)
    text = config.get_text_config()
    is_gemma = str(text.model_type).startswith("gemma")
    dtype = _dtype(choice.dtype, device)
    if dtype == torch.float16 and is_gemma:
        raise UserError(f"model {name!r}: Gemma overflows in float16; set model.dtype to bfloat16 or float32")
    attention = choice.attention
    if attention == "auto":
        attention = "eager" if text.model_type == "gemma2" else "sdpa"
    if choice.weights == "random":
        for key, value in choice.overrides.items():
            setattr(text, key, value)
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(text, dtype=dtype, attn_implementation=attention)
    else:
        with _explained(name):
            model = AutoModelForCausalLM.from_pretrained(
                where, revision=choice.revision, dtype=dtype, attn_implementation=attention, use_safetensors=True
            )
    broken = [n for n, p in model.named_parameters() if not torch.isfinite(p).all()]
    if broken:
        raise UserError(f"model {name!r}: NaN or infinite weights in {', '.join(broken[:5])}; download it again")
    return cast(PreTrainedModel, model.to(device))


def _dtype(name: Dtype, device: torch.device) -> torch.dtype:
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported() else torch.float32
    return cast(torch.dtype, getattr(torch, name))


def _add_adapter(model: PreTrainedModel, lora: LoraChoice, base: str, seed: int) -> PeftModel:
    targets: str | list[str] = "all-linear" if "all-linear" in lora.target_modules else list(lora.target_modules)
    linear = {name.rsplit(".", 1)[-1] for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    missing = [t for t in lora.target_modules if t != "all-linear" and t not in linear]
    if missing:
        raise UserError(f"adapter.target_modules: {', '.join(missing)} match nothing; this model has {sorted(linear)}")
    if "lm_head" in lora.target_modules and model.config.get_text_config().tie_word_embeddings:
        raise UserError("adapter.target_modules: lm_head is tied to the embedding here; leave it out")
    torch.manual_seed(seed)
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=cast(int, lora.alpha),
        lora_dropout=lora.dropout,
        target_modules=targets,
        task_type="CAUSAL_LM",
        base_model_name_or_path=base,
    )
    adapted = get_peft_model(model, config, autocast_adapter_dtype=False)
    adapted.peft_config["default"].base_model_name_or_path = base
    return cast(PeftModel, adapted)


class _explained:
    """Turns the loader's exceptions into one line: not found, no network, gated, pickles only, or broken files."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is None or not isinstance(error, (OSError, ValueError, KeyError)) or isinstance(error, UserError):
            return
        text, name = str(error), self.name
        first = text.strip().splitlines()[0] if text.strip() else type(error).__name__
        if "gated" in text.lower() or "401" in text or "403" in text:
            advice = f"is gated: accept its licence at https://huggingface.co/{name}, then log in with `hf auth login`"
        elif "couldn't connect" in text.lower() or "offline" in text.lower() or "cannot find" in text.lower():
            advice = "is not here and the model hub cannot be reached; download it elsewhere and give its folder"
        elif "trust_remote_code" in text:
            advice = "needs code from its own repository, which alignlab never runs; choose a model that transformers knows"
        elif "safetensors" in text.lower():
            advice = "has no safetensors weights (pickles are refused); convert it to safetensors first"
        elif "not a valid model identifier" in text or "404" in text:
            advice = "was not found: neither a folder nor a model on the hub; check the spelling"
        else:
            advice = f"could not be loaded: {first}"
        raise UserError(f"model {name!r} {advice}") from error


# ---- reference, reward and value models -------------------------------------------------------------------------------


def frozen_copy(model: M) -> M:
    """A frozen copy; weights that are frozen in the original (under an adapter) are shared, not copied."""
    shared: dict[int, Any] = {id(p): p for p in model.parameters() if not p.requires_grad}
    return freeze(copy.deepcopy(model, shared))


def trainable_copy(model: M) -> M:
    """A copy that can be trained by itself: trained weights are copied, frozen ones shared."""
    shared: dict[int, Any] = {id(p): p for p in model.parameters() if not p.requires_grad}
    return copy.deepcopy(model, shared)


def make_reference(policy: PreTrainedModel | PeftModel, *, fresh_adapter: bool) -> Model:
    """The frozen starting policy: the adapter-off view where the adapter is fresh, else a frozen copy with its adapter."""
    if fresh_adapter and isinstance(policy, PeftModel):
        return AdapterOff(policy)
    return cast(Model, frozen_copy(policy))


def make_reward_model(trunk: PreTrainedModel | PeftModel, *, seed: int) -> ScalarModel:
    """A reward model grown from a policy: its trunk, and a head drawn from N(0, 1/(H+1)) (arXiv:2009.01325)."""
    torch.manual_seed(seed)
    size = hidden_size(trunk)
    return ScalarModel(trunk, size, init_std=(size + 1) ** -0.5)


def make_value_model(policy: PreTrainedModel | PeftModel, backbone: Literal["own", "shared"]) -> ScalarModel:
    """A critic on a copy of the policy's trunk, or on the policy's own; its head starts at zero."""
    trunk = policy if backbone == "shared" else trainable_copy(policy)
    return ScalarModel(cast(nn.Module, trunk), hidden_size(policy))


# ---- saving ----------------------------------------------------------------------------------------------------------


def save_model(model: nn.Module, folder: Path) -> None:
    """Writes safetensors and JSON: a full model or only its adapter; a scalar model's head beside its trunk."""
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(model, ScalarModel):
        save_model(model.backbone, folder)
        head = {"weight": model.head.weight, "bias": model.head.bias, "shift": model.shift, "scale": model.scale}
        save_file({k: v.detach().cpu().contiguous() for k, v in head.items()}, str(folder / HEAD_FILE))
        return
    cast(PreTrainedModel, model).save_pretrained(str(folder), safe_serialization=True)
    (folder / "README.md").unlink(missing_ok=True)  # peft's model-card template


def load_weights(model: nn.Module, folder: Path) -> None:
    """Puts saved weights into a model of the same structure, bit for bit.

    Raises:
        UserError: a key or shape differs, or a scalar head is missing; nothing is left to chance.
    """
    if isinstance(model, ScalarModel):
        if not (folder / HEAD_FILE).is_file():
            raise UserError(f"{folder}: no {HEAD_FILE}; this is not a trained reward or value model")
        head = load_file(str(folder / HEAD_FILE))
        with torch.no_grad():
            for name, tensor in head.items():
                target = getattr(model, name) if name in ("shift", "scale") else getattr(model.head, name)
                target.copy_(tensor)
        load_weights(model.backbone, folder)
        return
    if isinstance(model, PeftModel):
        saved = load_file(str(folder / "adapter_model.safetensors"))
        own = {n.replace(".default", ""): p for n, p in model.named_parameters() if ".lora_" in n}
    else:
        saved = _load_sharded(folder)
        own = dict(model.named_parameters()) | {
            n: b for n, b in model.named_buffers() if n in saved and n not in dict(model.named_parameters())
        }
    missing, unexpected = sorted(own.keys() - saved.keys()), sorted(saved.keys() - own.keys())
    if missing or unexpected:
        raise UserError(f"{folder}: weights do not fit this model; missing {missing[:3]}, unexpected {unexpected[:3]}")
    with torch.no_grad():
        for name, parameter in own.items():
            if parameter.shape != saved[name].shape:
                raise UserError(f"{folder}: {name} is {tuple(saved[name].shape)}, expected {tuple(parameter.shape)}")
            parameter.copy_(saved[name])


def _load_sharded(folder: Path) -> dict[str, Tensor]:
    files = sorted(folder.glob("model*.safetensors"))
    if not files:
        raise UserError(f"{folder}: no model.safetensors in it")
    return {k: v for file in files for k, v in load_file(str(file)).items()}


def load_reward_model(folder: Path, choice: ModelChoice, *, device: torch.device | None = None) -> ScalarModel:
    """A trained reward model from its folder, frozen.

    Raises:
        UserError: the folder has no trained head.
    """
    if not (folder / HEAD_FILE).is_file():
        raise UserError(f"{folder}: no {HEAD_FILE}; train a reward model first (algorithm: reward_model)")
    trunk = load_policy(ModelChoice(**{**_fields(choice), "name": str(folder), "weights": "pretrained"}), device=device)
    model = ScalarModel(trunk, hidden_size(trunk))
    head = load_file(str(folder / HEAD_FILE))
    with torch.no_grad():
        model.head.weight.copy_(head["weight"])
        model.head.bias.copy_(head["bias"])
        model.shift.copy_(head["shift"])
        model.scale.copy_(head["scale"])
    disable_dropout(model)
    return freeze(model).eval()


def _fields(choice: ModelChoice) -> dict[str, Any]:
    return {**asdict(choice), "adapter": choice.adapter}
