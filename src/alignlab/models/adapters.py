"""Low-rank adapters and the weights under them: put on a model, merged into it (and checked), grown into a critic."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, cast

import torch
from torch import Tensor, nn

from alignlab.errors import UserError
from alignlab.models.roles import (
    ScalarModel,
    copy_sharing,
    has_adapter,
    hidden_size,
    quantization,
    seeded,
    trainable_copy,
    unwrap,
)

if TYPE_CHECKING:  # they take seconds to import
    from peft import LoraConfig, PeftModel
    from transformers import PreTrainedModel

MERGE_TOLERANCE = 1e-4
"""How far the logits of a merged model may be from its adapter's, as a share of the largest: rounding in float32."""
MOST_LOST = 0.5
"""Share of what the adapter does to the logits that may be lost by rounding the merged weights to the model's type."""
CRITIC_RANK = 8
"""Rank of an adapter that makes a critic, where the policy has none to take it from."""


def with_adapter(model: PreTrainedModel, config: LoraConfig, seed: int) -> PeftModel:
    """The model under an adapter drawn from `seed`, in float32 or wider, which changes nothing yet (B = 0)."""
    from peft import get_peft_model

    base = config.base_model_name_or_path
    with seeded(seed), warnings.catch_warnings(action="ignore"):
        adapted = get_peft_model(model, config, autocast_adapter_dtype=True)
    config.base_model_name_or_path = base  # peft puts the folder in its place, and warns of it
    return cast("PeftModel", adapted.eval())


# ---- merging ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class MergeCheck:
    """What a merge did to the logits of fixed prompts: largest absolute values, all computed in float32 or wider."""

    largest_logit: float
    adapter_effect: float
    """Between the model with its adapter and without."""
    merging: float
    """Between the model with its adapter and the merged one, before rounding: what the check is about."""
    rounding: float
    """The same after the merged weights were rounded to the type in which they are kept."""


def merge_adapter(policy: PeftModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """The policy as a plain model: W + alpha / rank * B A, summed in float32 (or wider) and rounded once. Tied weights
    stay tied. The policy is used up; for a while its weights take four bytes each.

    Checked on fixed prompts: in float32 the logits may differ from those of the adapter by `MERGE_TOLERANCE` (1e-4) of
    the largest logit, and after rounding by `MOST_LOST` (half) of what the adapter changes in them, or by the former.

    Args:
        dtype: of the merged weights; None: that of the policy's own.

    Raises:
        UserError: the weights are quantised, the logits differ, or rounding would lose the adapter.
    """
    return merge_checked(policy, dtype)[0]


def merge_checked(policy: PeftModel, dtype: torch.dtype | None = None) -> tuple[PreTrainedModel, MergeCheck]:
    """`merge_adapter`, and the differences found."""
    if kind := quantization(policy):
        raise UserError(
            f"an adapter cannot be merged into {kind} weights, which would be rounded anew; load the base model "
            "without model.quantization first"
        )
    kept = {parameter: dtype or parameter.dtype for parameter in policy.parameters()}
    policy.eval()
    with _widened(kept), torch.no_grad():
        with policy.disable_adapter():
            without = fixed_logits(policy)
        adapted = fixed_logits(policy)
        merged = cast("PreTrainedModel", policy.merge_and_unload())
        plain = fixed_logits(merged)
        for parameter in merged.parameters():
            parameter.copy_(parameter.to(kept[parameter]))
        rounded = fixed_logits(merged)
    check = MergeCheck(
        largest_logit=_largest(adapted),
        adapter_effect=_largest(adapted - without),
        merging=_largest(adapted - plain),
        rounding=_largest(adapted - rounded),
    )
    _require_same(check, merged.dtype)
    return merged, check


def fixed_logits(model: PreTrainedModel | PeftModel) -> Tensor:
    """(4, 16, V) logits, in float32 or wider, of prompts that are spread over the vocabulary."""
    vocabulary = int(unwrap(model).config.get_text_config().vocab_size)
    ids = (torch.arange(64, device=unwrap(model).device) * 7919 + 1).remainder(vocabulary).view(4, 16)
    with torch.no_grad():
        logits = cast(Tensor, model(input_ids=ids, use_cache=False).logits)
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _require_same(check: MergeCheck, dtype: torch.dtype) -> None:
    rounding = MERGE_TOLERANCE * check.largest_logit
    if not check.merging <= rounding:
        raise UserError(
            f"the merged model is not the adapter's: logits of fixed prompts differ by {check.merging:.2g}, of at most "
            f"{check.largest_logit:.3g}; go on with the adapter, unmerged"
        )
    if not check.rounding <= max(rounding, MOST_LOST * check.adapter_effect):
        raise UserError(
            f"merged weights in {str(dtype).removeprefix('torch.')} would lose the adapter: rounding changes logits by "
            f"{check.rounding:.2g}, the adapter by {check.adapter_effect:.2g}; use float32 (model.dtype, merge --dtype)"
        )


@contextmanager
def _widened(types: Mapping[nn.Parameter, torch.dtype]) -> Iterator[None]:
    """Inside, the parameters are in float32 or wider; afterwards, in the given types."""
    try:
        for parameter in types:
            parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))
        yield
    finally:
        for parameter, dtype in types.items():
            parameter.data = parameter.data.to(dtype)


def _largest(tensor: Tensor) -> float:
    return tensor.abs().max().item()


# ---- critics ---------------------------------------------------------------------------------------------------------


def make_value_model(
    policy: PreTrainedModel | PeftModel,
    backbone: Literal["own", "shared", "reward_model"],
    reward_model: ScalarModel | None = None,
    *,
    seed: int = 0,
) -> ScalarModel:
    """A critic, worth 0 everywhere at first.

    Args:
        backbone: `own`: a copy of the policy's trunk; `shared`: the policy's trunk itself; `reward_model`: a trained
            adapter on the reward model's trunk, of the policy's rank (8 where it has none) and alpha = 2 rank.
        reward_model: for the last. It stays as it is, and frozen weights are shared with it. An adapter that it has is
            first merged into a copy of the weights under it; where these are quantised, a copy of it is trained on.
        seed: what a fresh adapter is drawn from.

    Raises:
        UserError: there is no reward model, or it reads other tokens than the policy writes.
    """
    if backbone != "reward_model":
        own = policy if backbone == "shared" else trainable_copy(policy)
        return ScalarModel(own, hidden_size(policy))
    if reward_model is None:
        raise UserError("a critic on the reward model's trunk needs a reward model: name one in reward_model")
    rows, own_rows = (unwrap(m).config.get_text_config().vocab_size for m in (policy, reward_model))
    if rows != own_rows:
        raise UserError(
            f"a critic on the reward model's trunk reads the policy's tokens, but there are {own_rows} embeddings in "
            f"it and {rows} in the policy; give the critic a trunk of its own"
        )
    rank = getattr(policy.active_peft_config, "r", CRITIC_RANK) if has_adapter(policy) else CRITIC_RANK
    return ScalarModel(_adapted_trunk(reward_model, rank, seed), hidden_size(reward_model))


def _adapted_trunk(reward_model: ScalarModel, rank: int, seed: int) -> PeftModel:
    """A copy of a reward model's trunk under an adapter that is trained."""
    from peft import LoraConfig
    from peft.tuners.tuners_utils import BaseTunerLayer

    trunk = cast("PreTrainedModel | PeftModel", reward_model.backbone)
    if has_adapter(trunk) and quantization(trunk):
        copied = copy_sharing(trunk, [p for name, p in trunk.named_parameters() if ".lora_" not in name])
        for name, parameter in copied.named_parameters():
            if ".lora_" in name:
                parameter.requires_grad_(True)
        return copied
    if has_adapter(trunk):
        changed = {p for m in trunk.modules() if isinstance(m, BaseTunerLayer) for p in m.parameters()}
        copied = copy_sharing(trunk, [p for p in trunk.parameters() if p not in changed])
        base, name = merge_adapter(copied), str(trunk.active_peft_config.base_model_name_or_path)
    else:
        plain = cast("PreTrainedModel", trunk)
        base, name = copy_sharing(plain, list(plain.parameters())), str(plain.config.name_or_path)
    return with_adapter(
        base,
        LoraConfig(
            r=rank,
            lora_alpha=2 * rank,
            target_modules="all-linear",
            task_type="CAUSAL_LM",
            base_model_name_or_path=name,
        ),
        seed,
    )
