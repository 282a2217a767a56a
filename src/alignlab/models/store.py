"""Weights on disk: model <-> a folder of safetensors and JSON, bit for bit; no pickles, and nothing made up.

A weight that is missing, unknown or of another shape is an error. An adapter remembers which base weights it is for.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from alignlab.errors import UserError
from alignlab.models.explain import brief, listed, require_fit
from alignlab.models.roles import Quantization, ScalarModel, has_adapter, quantization

if TYPE_CHECKING:  # they take seconds to import
    from peft import PeftModel
    from transformers import PreTrainedModel

HEAD_FILE = "scalar_head.safetensors"
ADAPTER_FILE = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
BASE_FILE = "adapter_base.json"
"""Beside an adapter: name, quantisation and a few values of the base weights it was trained on."""
FEW = 8
"""Values that are remembered of each weight, at most."""


def save_model(model: nn.Module, folder: Path) -> None:
    """Writes safetensors and JSON: a full model or only its adapter; a scalar model's head beside its trunk."""
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(model, ScalarModel):
        save_model(model.backbone, folder)
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.head_tensors().items()}
        save_file(tensors, str(folder / HEAD_FILE))
    elif has_adapter(model):
        model.save_pretrained(str(folder), save_embedding_layers=False)  # "auto" would ask the hub about the base
        (folder / "README.md").unlink(missing_ok=True)  # peft's model-card template
        config = read_json(folder / ADAPTER_FILE)  # peft writes sets in hash order, which differs between processes
        ordered = {k: sorted(v) if isinstance(v, list) else v for k, v in sorted(config.items())}
        (folder / ADAPTER_FILE).write_text(json.dumps(ordered, indent=1) + "\n", "utf-8")
        base = {
            "name": model.active_peft_config.base_model_name_or_path,
            "quantization": quantization(model),
            "weights": base_values(model),
        }
        (folder / BASE_FILE).write_text(json.dumps(base, indent=1) + "\n", "utf-8")
    else:
        cast("PreTrainedModel", model).save_pretrained(str(folder))


def load_weights(model: nn.Module, folder: Path) -> None:
    """Puts saved weights into a model of the same structure, bit for bit.

    Raises:
        UserError: a file is missing or damaged, a key or shape differs, or an adapter is for other base weights.
    """
    if isinstance(model, ScalarModel):
        load_head(model, folder)
        load_weights(model.backbone, folder)
    elif has_adapter(model):
        base = read_json(folder / BASE_FILE) if (folder / BASE_FILE).is_file() else None
        if base is not None and not _same_base(base.get("weights"), base_values(model)):
            raise UserError(
                f"{folder}: trained on other base weights than {base.get('name')!r} has now; train it again"
            )
        from peft import get_peft_model_state_dict

        own = get_peft_model_state_dict(model, save_embedding_layers=False)
        _fill(own, _read_tensors(folder / ADAPTER_WEIGHTS), folder)
    else:
        saved = {name: tensor for file in weight_files(folder) for name, tensor in _read_tensors(file).items()}
        _fill(_stored_tensors(model), saved, folder)


def load_head(model: ScalarModel, folder: Path) -> None:
    """Puts a saved head and its normalisation into a scalar model.

    Raises:
        UserError: the folder has no trained head, or one of another shape.
    """
    if not (folder / HEAD_FILE).is_file():
        raise UserError(f"{folder}: no {HEAD_FILE}, so no trained reward or value model; train one first")
    _fill(model.head_tensors(), _read_tensors(folder / HEAD_FILE), folder)


def adapter_base(folder: Path) -> str:
    """The name of the model that a folder's adapter goes on."""
    base = read_json(folder / ADAPTER_FILE).get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise UserError(f"{folder / ADAPTER_FILE}: names no base model (base_model_name_or_path)")
    return base


def stored_quantization(folder: Path) -> Quantization | None:
    """How the base weights were quantised under which a folder's adapter was trained; None: not, or a full model."""
    kind = read_json(folder / BASE_FILE).get("quantization") if (folder / BASE_FILE).is_file() else None
    return cast(Quantization | None, kind)


def few_values(weight: Tensor) -> dict[str, Any]:
    """Shape, type and a few values of a weight: enough to tell it from another, as JSON."""
    few = weight.detach().flatten()[:: -(-weight.numel() // FEW)].cpu().double()
    return {"shape": list(weight.shape), "dtype": str(weight.dtype).removeprefix("torch."), "values": few.tolist()}


def base_values(model: PeftModel) -> dict[str, Any]:
    """Name -> `few_values` of every base weight; of quantised ones, as they were before."""
    base = model.get_base_model()
    remembered = {m.weight: m.original for m in base.modules() if hasattr(m, "original")}
    weights = {name: weight for name, weight in base.named_parameters() if ".lora_" not in name}
    return {name: remembered.get(weight) or few_values(weight) for name, weight in weights.items()}


def _same_base(saved: Any, own: Mapping[str, Any]) -> bool:
    """Whether these are the same weights, each maybe rounded to another type."""
    try:
        return saved.keys() == own.keys() and all(_same_weight(saved[name], own[name]) for name in own)
    except (AttributeError, KeyError, TypeError, ValueError):  # not as it was written
        return False


def _same_weight(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    if one["shape"] != other["shape"]:
        return False
    types = {getattr(torch, one["dtype"]), getattr(torch, other["dtype"])}
    rounded = [torch.finfo(t) for t in types] if len(types) > 1 else []  # of one type: to the bit
    relative, absolute = sum(r.eps for r in rounded) / 2, sum(r.smallest_normal * r.eps for r in rounded)
    pairs = zip(one["values"], other["values"], strict=True)
    return all(abs(a - b) <= relative * max(abs(a), abs(b)) + absolute for a, b in pairs)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a full model.

    Raises:
        UserError: some are missing, or there are only pickles.
    """
    index = folder / "model.safetensors.index.json"
    names = sorted(set(read_json(index).get("weight_map", {}).values())) if index.is_file() else ["model.safetensors"]
    missing = [name for name in names if not (folder / name).is_file()]
    if missing and (pickles := sorted(path.name for path in folder.glob("*.bin"))):
        raise UserError(f"{folder}: only pickles ({listed(pickles)}), which are refused; convert them to safetensors")
    if missing:
        raise UserError(f"{folder}: no {listed(missing)} in it; download or train it again")
    return [folder / name for name in names]


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        UserError: it is not one.
    """
    try:
        value = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({brief(error)}); download or write it again") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: not a JSON object; download or write it again")
    return value


def _stored_tensors(model: nn.Module) -> dict[str, Tensor]:
    """What a full model stores: its parameters, tied ones once, and persistent buffers."""
    names = {name for name, _ in model.named_parameters()}
    tied = {name for name, _ in model.named_parameters(remove_duplicate=False)} - names
    return {name: tensor for name, tensor in model.state_dict().items() if name not in tied}


def _fill(own: Mapping[str, Tensor], saved: Mapping[str, Tensor], folder: Path) -> None:
    """Copies every saved tensor over the model's own, if they are exactly those."""
    mismatched = [
        f"{name} {tuple(saved[name].shape)}, not {tuple(own[name].shape)}"
        for name in own.keys() & saved.keys()
        if saved[name].shape != own[name].shape
    ]
    require_fit(str(folder), own.keys() - saved.keys(), saved.keys() - own.keys(), mismatched)
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(saved[name])


def _read_tensors(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise UserError(f"{path.parent}: no {path.name} in it; download or train it again")
    try:
        return load_file(str(path))
    except SafetensorError as error:
        raise UserError(f"{path}: damaged ({brief(error)}); download or train it again") from error
