"""What a model is to a method: a causal LM -> policy, reference view, reward model; and what is in one.

A policy is a `transformers` causal LM or a `peft` model around one. A reward or value model is a `ScalarModel`: a
policy's trunk with one scalar head.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Collection, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypeGuard, TypeVar, cast

import torch
from torch import Tensor, nn

if TYPE_CHECKING:  # both take seconds to import, and what only talks about models needs neither
    from peft import PeftModel
    from transformers import PreTrainedModel

M = TypeVar("M", bound=nn.Module)
Quantization = Literal["4bit", "8bit"]


class AdapterOff:
    """The reference policy as a view: the policy's own weights with its (fresh) adapter switched off."""

    def __init__(self, policy: PeftModel) -> None:
        self.policy = policy

    @contextmanager
    def active(self) -> Iterator[None]:
        frozen = [p for p in self.policy.parameters() if not p.requires_grad]
        try:
            with self.policy.disable_adapter():
                yield
        finally:
            for parameter in frozen:  # peft makes every adapter that it switches on again trainable
                parameter.requires_grad_(False)


class ScalarModel(nn.Module):
    """A causal LM's trunk with one scalar head in fp32 (or wider): (B, T, H) -> (B, T); reward models and critics.

    `shift` and `scale` normalise a reward model's scores: score = (head - shift) / scale. They are saved with the head
    and set after training so that reference outputs score mean 0 and standard deviation 1.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, backbone: nn.Module, hidden_size: int, init_std: float = 0.0) -> None:
        super().__init__()
        self.backbone = backbone
        like = next(backbone.parameters())
        dtype = torch.promote_types(like.dtype, torch.float32)
        head = nn.Linear(hidden_size, 1, dtype=dtype)  # drawn on the CPU: the same numbers for every device
        nn.init.normal_(head.weight, std=init_std) if init_std else nn.init.zeros_(head.weight)
        nn.init.zeros_(head.bias)
        self.head = head.to(like.device)
        self.register_buffer("shift", torch.zeros((), dtype=dtype, device=like.device))
        self.register_buffer("scale", torch.ones((), dtype=dtype, device=like.device))

    def forward(self, hidden: Tensor) -> Tensor:  # (..., H) -> (...)
        return cast(Tensor, self.head(hidden.to(self.head.weight.dtype))).squeeze(-1)

    def set_normalisation(self, shift: float, scale: float) -> None:
        """Makes a raw score of `shift` 0 and one of `shift + scale` 1.

        Raises:
            ValueError: scale is not positive (all reference outputs scored the same).
        """
        if not scale > 0:
            raise ValueError(f"cannot normalise scores by a standard deviation of {scale}")
        self.shift.fill_(shift)
        self.scale.fill_(scale)

    def head_tensors(self) -> dict[str, Tensor]:
        """What is stored beside the trunk."""
        return {"weight": self.head.weight, "bias": self.head.bias, "shift": self.shift, "scale": self.scale}


Model: TypeAlias = "PreTrainedModel | PeftModel | AdapterOff | ScalarModel"


# ---- what is in a model ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Head:
    """The output head of a causal LM: logits = hidden @ weight.T, then an optional soft-cap."""

    weight: Tensor  # (V, H)
    softcap: float | None


def unwrap(model: object) -> PreTrainedModel:
    """The `transformers` causal LM inside a policy, reference view or scalar model (adapter layers stay in place)."""
    from transformers import PreTrainedModel

    if isinstance(model, AdapterOff):
        model = model.policy
    if isinstance(model, ScalarModel):
        model = model.backbone
    if has_adapter(model):
        model = model.get_base_model()
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"expected a transformers model, got {type(model).__name__}")
    return model


def active(model: object) -> AbstractContextManager[Any]:
    """The context in which the model's trunk means this model (an adapter-off view switches the adapter off)."""
    return model.active() if isinstance(model, AdapterOff) else nullcontext()


def trunk(model: object) -> nn.Module:
    """The decoder of a model: token ids -> last hidden states, after the final norm and before the head."""
    return cast(nn.Module, unwrap(model).get_decoder())  # type: ignore[no-untyped-call]


def head(model: object) -> Head:
    """The head of a policy.

    Raises:
        TypeError: the head is more than one matrix: it has a bias or an adapter.
    """
    inner = unwrap(model)
    layer = inner.get_output_embeddings()  # type: ignore[no-untyped-call]
    if not isinstance(layer, nn.Linear) or layer.bias is not None:
        raise TypeError(f"the head of {type(inner).__name__} is not a plain matrix (a bias or an adapter on it)")
    return Head(layer.weight, getattr(inner.config.get_text_config(), "final_logit_softcapping", None))


def hidden_size(model: object) -> int:
    return int(unwrap(model).config.get_text_config().hidden_size)


def num_parameters(model: object, trained_only: bool = False) -> int:
    """Weights of a model, tied ones once, and quantised ones as many as they stand for."""
    module = model if isinstance(model, nn.Module) else unwrap(model)
    return sum(_count(p) for p in module.parameters() if p.requires_grad or not trained_only)


def _count(parameter: nn.Parameter) -> int:
    packed = getattr(parameter, "quant_state", None)  # 4-bit weights lie two in a byte
    return parameter.numel() if packed is None else math.prod(packed.shape)


def quantization(model: object) -> Quantization | None:
    """How the frozen linear layers of a model are quantised."""
    return cast(Quantization | None, getattr(unwrap(model), "quantization", None))


def has_adapter(model: object) -> TypeGuard[PeftModel]:
    from peft import PeftModel

    return isinstance(model, PeftModel)


# ---- making roles ----------------------------------------------------------------------------------------------------


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Inside, torch's CPU generator starts at `seed`; outside, nothing has happened."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


def freeze(model: M) -> M:
    return model.requires_grad_(False)


def disable_dropout(model: nn.Module) -> None:
    """Turns dropout off for good, in layers, attention and adapters: training mode does not bring it back."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if "drop" in name and isinstance(value, float):
                setattr(module, name, 0.0)


def recompute_activations(model: nn.Module) -> None:
    """Keeps no activations between forward and backward pass but the layers' inputs; the rest is computed anew.

    It happens in training mode only, into which this switches the model; dropout that was disabled stays off. Sampling
    is done in evaluation mode, with its cache.
    """
    with warnings.catch_warnings(action="ignore"):  # a later name is not in every release that alignlab admits
        unwrap(model).gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[no-untyped-call]
    model.train()


def keep_activations(model: nn.Module, *, training: bool) -> None:
    """Undoes `recompute_activations`; `training`: whether the model stays in training mode, for its dropout."""
    with warnings.catch_warnings(action="ignore"):
        unwrap(model).gradient_checkpointing_disable()  # type: ignore[no-untyped-call]
    model.train(training)


def trainable_copy(model: M) -> M:
    """A copy that can be trained by itself: trained weights are copied, frozen ones (under an adapter) shared."""
    return copy_sharing(model, {p for p in model.parameters() if not p.requires_grad})


def copy_sharing(model: M, shared: Collection[nn.Parameter]) -> M:
    """A copy in which the given parameters are those of the original."""
    known: dict[int, Any] = {id(parameter): parameter for parameter in shared}
    states = (getattr(parameter, "quant_state", None) for parameter in shared)
    known |= {id(state): state for state in states if state is not None}  # a layer refers to it a second time
    return copy.deepcopy(model, known)


def frozen_copy(model: M) -> M:
    """A frozen copy without dropout; weights that are frozen in the original are shared, not copied."""
    copied = freeze(trainable_copy(model))
    disable_dropout(copied)
    return copied.eval()


def make_reference(policy: PreTrainedModel | PeftModel, *, fresh_adapter: bool) -> Model:
    """The frozen starting policy: the adapter-off view where the adapter is fresh, else a copy with its adapter."""
    if fresh_adapter and has_adapter(policy):
        return AdapterOff(policy)
    return cast(Model, frozen_copy(policy))


def make_reward_model(trunk: PreTrainedModel | PeftModel, *, seed: int) -> ScalarModel:
    """A reward model grown from a policy: its trunk, and a head drawn from N(0, 1/(H+1)) (arXiv:2009.01325)."""
    size = hidden_size(trunk)
    with seeded(seed):
        return ScalarModel(trunk, size, init_std=(size + 1) ** -0.5)
