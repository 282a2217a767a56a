"""The real models' shapes, vocabularies and templates, with two layers and random weights: name -> model folder.

Numbers are those of the published configurations. The tokenizers have as many entries as the real ones and the control
tokens where these have them, and otherwise know bytes only; the templates are this project's own wording.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, Gemma3TextConfig, GemmaConfig, LlamaConfig, PreTrainedConfig

from tests.test_conversation import CHATML, CHATML_TOKENS, GEMMA, GEMMA1, GEMMA_TOKENS, wrap

LAYERS: Final = 2
GEMMA_IDS: Final = {"bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0}


def gemma3(**shape: Any) -> PreTrainedConfig:
    return Gemma3TextConfig(
        num_hidden_layers=LAYERS, head_dim=256, query_pre_attn_scalar=256, rms_norm_eps=1e-6, **GEMMA_IDS,
        layer_types=["sliding_attention", "full_attention"],
        rope_parameters={
            "full_attention": {"rope_type": "default", "rope_theta": 1_000_000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
        },
        **shape,
    )  # fmt: skip


CONFIGS: Final[Mapping[str, Callable[[], PreTrainedConfig]]] = {
    "gemma3-270m": lambda: gemma3(
        vocab_size=262_144, hidden_size=640, num_attention_heads=4, num_key_value_heads=1, intermediate_size=2048,
        max_position_embeddings=32_768, sliding_window=512,
    ),
    "gemma3-1b": lambda: gemma3(
        vocab_size=262_144, hidden_size=1152, num_attention_heads=4, num_key_value_heads=1, intermediate_size=6912,
        max_position_embeddings=32_768, sliding_window=512,
    ),
    "gemma3-4b": lambda: gemma3(
        vocab_size=262_208, hidden_size=2560, num_attention_heads=8, num_key_value_heads=4, intermediate_size=10_240,
        max_position_embeddings=131_072, sliding_window=1024,
    ),
    "gemma2b": lambda: GemmaConfig(
        vocab_size=256_000, hidden_size=2048, num_attention_heads=8, num_key_value_heads=1, intermediate_size=16_384,
        num_hidden_layers=LAYERS, head_dim=256, max_position_embeddings=8192, rms_norm_eps=1e-6, **GEMMA_IDS,
    ),
    "smollm2-135m": lambda: LlamaConfig(
        vocab_size=49_152, hidden_size=576, num_attention_heads=9, num_key_value_heads=3, intermediate_size=1536,
        num_hidden_layers=LAYERS, head_dim=64, max_position_embeddings=8192, rms_norm_eps=1e-5, rope_theta=100_000.0,
        tie_word_embeddings=True, initializer_range=1 / 24, bos_token_id=1, eos_token_id=2, pad_token_id=2,
    ),
}  # fmt: skip
PARAMETERS_PER_LAYER: Final = {
    "gemma3-270m": 5_573_632, "gemma3-1b": 26_842_112, "gemma2b": 110_104_576, "smollm2-135m": 3_540_096,
}  # fmt: skip
"""Of the published models; the 4B's is not among the checked facts."""
CONTROL: Final[Mapping[str, Mapping[str, int]]] = {
    "gemma3": {"<pad>": 0, "<eos>": 1, "<bos>": 2, "<unk>": 3, "<start_of_turn>": 105, "<end_of_turn>": 106},
    "gemma2b": {"<pad>": 0, "<eos>": 1, "<bos>": 2, "<unk>": 3, "<start_of_turn>": 106, "<end_of_turn>": 107},
    "smollm2": {"<|endoftext|>": 0, "<|im_start|>": 1, "<|im_end|>": 2},
}
STOPS: Final = {"gemma3": {1, 106}, "gemma2b": {1, 107}, "smollm2": {2}}


def family(name: str) -> str:
    return name.rsplit("-", 1)[0] if "-" in name else name


def true_tokenizer(name: str, size: int) -> Any:
    """`size` entries: control tokens at their real ids, the 256 bytes, and fillers that no text becomes."""
    control = CONTROL[family(name)]
    by_id = {i: token for token, i in control.items()}
    letters = iter(sorted(pre_tokenizers.ByteLevel.alphabet()))
    vocabulary = {by_id.get(i) or next(letters, f"<filler-{i}>"): i for i in range(size)}
    backend = Tokenizer(models.BPE(vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    if family(name) == "smollm2":
        return wrap(backend, CHATML, **CHATML_TOKENS)
    return wrap(backend, GEMMA1 if name == "gemma2b" else GEMMA, adds_bos=True, **GEMMA_TOKENS)


def make_true_model(name: str, folder: Path) -> Path:
    """Writes the model folder."""
    config = CONFIGS[name]()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    per_layer = sum(p.numel() for p in model.model.layers[0].parameters())
    assert per_layer == PARAMETERS_PER_LAYER.get(name, per_layer)
    model.save_pretrained(folder)
    tokenizer = true_tokenizer(name, config.vocab_size)
    assert len(tokenizer) == config.vocab_size
    tokenizer.save_pretrained(folder)
    generation = {
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_id,
        "pad_token_id": config.pad_token_id,
    }
    if family(name) == "gemma3":
        generation |= {"eos_token_id": [1, 106], "do_sample": True, "top_k": 64, "top_p": 0.95}
    (folder / "generation_config.json").write_text(json.dumps(generation), "utf-8")
    return folder
