"""Models for other programs: a run that trained an adapter -> a folder with a plain model, the adapter merged into it.

The merge is checked on fixed prompts before and after writing; what was found stands in the folder's manifest.json.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import torch
from transformers import PreTrainedModel

from alignlab.checkpoint import seal
from alignlab.errors import UserError
from alignlab.models import (
    ADAPTER_FILE,
    HEAD_FILE,
    Dtype,
    ModelChoice,
    Quantization,
    fixed_logits,
    hush_progress_bars,
    load_generation_config,
    load_stored,
    load_tokenizer,
    merge_checked,
    stored_quantization,
    weights_dtype,
)
from alignlab.models.explain import listed
from alignlab.pipeline.identity import DONE, read_done
from alignlab.recipe import read_mapping

TYPES = ("auto", "float32", "bfloat16", "float16")


def merge_run(run: Path, output: Path, *, dtype: str = "auto", device: torch.device | None = None) -> dict[str, Any]:
    """Writes weights, tokenizer with chat template, generation config and a manifest; all of it or nothing.

    Args:
        run: a run folder, the folder of one of its stages, or one that holds an adapter.
        output: a folder that does not exist yet, or is empty.
        dtype: of the merged weights; `auto`: that of the base model's files.

    Returns:
        What the manifest says about the merge: `largest_logit_difference` between merged model and adapter on fixed
        prompts, in logits, after rounding to `dtype` and computed in float32; `MergeCheck`'s figures; and, where the
        adapter was trained on quantised weights, `difference_to_trained`, as the merged model is not quantised.

    Raises:
        UserError: no adapter there, something in the way, or a merge that would not be the trained model.
    """
    hush_progress_bars()
    if dtype not in TYPES:
        raise UserError(f"dtype {dtype!r}: one of {', '.join(TYPES)}")
    folder = _adapter_folder(run)
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise UserError(f"{output} is in the way; choose another --output")
    kind, trained_logits = stored_quantization(folder), None
    if kind:
        trained_logits = fixed_logits(_load(folder, "float32", kind, device)).cpu()
    target = cast(Dtype, dtype) if dtype != "auto" else weights_dtype(str(folder))
    merged, check = merge_checked(cast(Any, _load(folder, "float32", None, device)), getattr(torch, target))
    notes = {
        "dtype": target,
        "adapter": str(folder.resolve()),
        "trained_on": kind or "unquantised weights",
        "largest_logit_difference": check.rounding,
        **asdict(check),
    }
    if trained_logits is not None:
        notes["difference_to_trained"] = (fixed_logits(merged).cpu() - trained_logits).abs().max().item()
    partial = output.with_name(f".partial-{output.name}")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        _write(merged, folder, partial)
        _require_same_reloaded(merged, partial, target, device)
        seal(partial, merge=notes)
        if output.exists():
            output.rmdir()
        os.replace(partial, output)
    except OSError as error:
        raise UserError(f"{output}: cannot be written ({error}); nothing is left of it") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return notes


def _adapter_folder(run: Path) -> Path:
    """The folder with the adapter that a run ended with."""
    folder = run
    if not (run / ADAPTER_FILE).is_file():
        recipe = run / "recipe.yaml"
        stages = read_mapping(recipe).get("stages", []) if recipe.is_file() and not (run / DONE).is_file() else []
        finished = [f for f in (run, *(run / str(stage.get("name")) for stage in stages)) if (f / DONE).is_file()]
        if not finished:
            raise UserError(f"{run}: neither a finished run nor a folder with an adapter; train it first")
        folder = read_done(finished[-1]).model
    if not (folder / ADAPTER_FILE).is_file():
        raise UserError(f"{run}: nothing to merge, {folder} is a plain model already; copy it, or load it from there")
    return folder


def _load(folder: Path, dtype: Dtype, kind: Quantization | None, device: torch.device | None) -> Any:
    return load_stored(ModelChoice(name=str(folder), dtype=dtype, quantization=kind), device=device)


def _write(model: PreTrainedModel, adapter: Path, folder: Path) -> None:
    model.save_pretrained(str(folder))
    if (adapter / HEAD_FILE).is_file():
        shutil.copy(adapter / HEAD_FILE, folder)
    load_tokenizer(str(adapter)).save_pretrained(str(folder))
    generation = load_generation_config(str(adapter))
    if generation is not None:
        generation.save_pretrained(str(folder))


def _require_same_reloaded(model: PreTrainedModel, folder: Path, dtype: Dtype, device: torch.device | None) -> None:
    """What was written is what is here: every weight to the bit, and so the logits."""
    reloaded = _load(folder, dtype, None, device)
    ours, theirs = model.state_dict(), reloaded.state_dict()
    differing = [name for name in ours.keys() | theirs.keys() if not _same(ours.get(name), theirs.get(name))]
    if differing or not torch.equal(fixed_logits(model), fixed_logits(reloaded)):
        raise UserError(f"{folder}: reads back differently ({listed(differing) or 'its logits'}); is the disk damaged?")


def _same(one: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    return one is not None and other is not None and one.dtype == other.dtype and torch.equal(one, other)
