"""Tiny models with random weights for every kind of architecture, and batches for them; seed → the same model.

Weights are large enough that distributions are far from uniform, and no bias or norm is left at its neutral value, so
that forgetting one changes the numbers. Sliding windows are shorter than the prompts.
"""

import warnings
from collections.abc import Callable, Sequence
from typing import Any, Final, cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
)

from alignlab.types import Batch

VOCABULARY: Final = 64
WINDOW: Final = 4
"""Tokens a sliding layer sees, its own included."""
PROMPTS: Final = ((2, 9, 33), (2, 40, 41, 7, 12, 50, 18, 22, 31), (2, 5, 61, 13, 44, 8))
"""Ragged: shorter than the window, more than twice as long, and between."""

SHAPE: Final[dict[str, Any]] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 1,
}
SLIDING: Final[dict[str, Any]] = {
    "sliding_window": WINDOW,
    "query_pre_attn_scalar": 8,
    "layer_types": ["sliding_attention", "full_attention"],
}
UNPADDED: Final[dict[str, Any]] = {"pad_token_id": None}  # their embeddings would hold a pad row at 0

CONFIGS: Final[dict[str, Callable[[], PreTrainedConfig]]] = {
    "gemma3": lambda: Gemma3TextConfig(**SHAPE, **SLIDING),
    "gemma2": lambda: Gemma2Config(**SHAPE, **SLIDING, final_logit_softcapping=3.0, attn_logit_softcapping=2.0),
    "gemma": lambda: GemmaConfig(**{**SHAPE, "num_key_value_heads": 1}),
    "llama": lambda: LlamaConfig(**{**SHAPE, **UNPADDED}, tie_word_embeddings=False),
    "qwen2": lambda: Qwen2Config(**{k: v for k, v in {**SHAPE, **UNPADDED}.items() if k != "head_dim"}),
}
ARCHITECTURES: Final = tuple(CONFIGS)


def tiny(
    architecture: str = "gemma3", *, dtype: torch.dtype = torch.float32, seed: int = 0, **changes: Any
) -> PreTrainedModel:
    """A causal LM of that architecture in evaluation mode; `changes` are configuration values."""
    config = CONFIGS[architecture]()
    for key, value in changes.items():
        setattr(config, key, value)
    attention = "eager" if architecture == "gemma2" else "sdpa"
    model = cast(
        PreTrainedModel,
        AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention),  # type: ignore[no-untyped-call]
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            scale = 0.15 if "embed" in name else 0.3 if parameter.dim() > 1 else 0.1  # else: norms and biases
            parameter.copy_((parameter.double() if parameter.dim() == 1 else 0) + scale * noise)
    return model.eval()  # type: ignore[no-untyped-call, no-any-return]


def adapted(model: PreTrainedModel, *, rank: int = 4, perturbed: bool = True, seed: int = 1) -> PeftModel:
    """The model under a LoRA adapter on every linear layer; perturbed = as if trained for a while (B is not 0)."""
    torch.manual_seed(seed)
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    with warnings.catch_warnings(action="ignore"):
        policy = cast(PeftModel, get_peft_model(model, config))
    if perturbed:
        nudge(policy, seed=seed)
    return policy.eval()


def nudge(model: torch.nn.Module, *, scale: float = 0.1, seed: int = 1) -> None:
    """Adds noise to every trained weight, as an optimiser step would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(scale * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))


def policy_of(architecture: str, adapter: bool, dtype: torch.dtype = torch.float32) -> PreTrainedModel | PeftModel:
    model = tiny(architecture, dtype=dtype)
    return adapted(model) if adapter else model


def random_ids(*lengths: int, seed: int = 0) -> list[tuple[int, ...]]:
    """Token ids without the control tokens 0-4."""
    generator = torch.Generator().manual_seed(seed)
    return [tuple(torch.randint(5, VOCABULARY, (n,), generator=generator).tolist()) for n in lengths]


def batch_of(
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    *,
    left: bool = False,
    extra: int = 0,
    pad_id: int = 0,
) -> Batch:
    """Rows padded on the right (or left) to the longest of them and `extra` more."""
    lengths = [len(p) + len(c) for p, c in zip(prompts, completions, strict=True)]
    shape = len(lengths), max(lengths) + extra
    ids = torch.full(shape, pad_id)
    attended, completed = torch.zeros(shape, dtype=torch.bool), torch.zeros(shape, dtype=torch.bool)
    for i, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        start = shape[1] - lengths[i] if left else 0
        end, middle = start + lengths[i], start + len(prompt)
        ids[i, start:end] = torch.tensor([*prompt, *completion])
        attended[i, start:end] = True
        completed[i, middle:end] = True
    return Batch(input_ids=ids, attention_mask=attended, completion_mask=completed)


def plain_logits(model: Any, ids: Sequence[int]) -> Tensor:
    """(T, V): what transformers itself says about one row without padding, cache or masks."""
    return cast(Tensor, model(input_ids=torch.tensor([list(ids)])).logits[0])


def plain_logprobs(
    model: Any, prompt: Sequence[int], completion: Sequence[int], temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Logprobs and entropies (N,) of the completion's tokens, as the formula is written."""
    logs = (plain_logits(model, [*prompt, *completion]) / temperature).log_softmax(-1)[len(prompt) - 1 : -1]
    taken = logs.gather(-1, torch.tensor(list(completion))[:, None])[:, 0]
    return taken, -(logs.exp() * logs).sum(-1)


def plain_states(model: Any, ids: Sequence[int]) -> Tensor:
    """(T, H): the last hidden states of one row, after the final norm."""
    output = model(input_ids=torch.tensor([list(ids)]), output_hidden_states=True)
    return cast(Tensor, output.hidden_states[-1][0])
