"""What is measured: method x model shape x lengths; and the models and data themselves, made from nothing."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, Gemma3TextConfig, LlamaConfig, PreTrainedConfig, PreTrainedTokenizerFast

Method = Literal["sft", "reward_model", "dpo", "grpo", "ppo"]
Shape = Literal["tiny", "g270", "smol"]
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m.content }}{% if m.role == 'assistant' %} <eos>{% endif %} {% endfor %}"
    "{% if add_generation_prompt %}{% endif %}"
)


@dataclass(frozen=True, kw_only=True)
class Case:
    """One row of the table: a training step, the same for both sides."""

    method: Method
    shape: Shape
    items: int
    """Prompts, pairs or examples of an optimiser step."""
    group: int = 1
    """Completions a prompt, where they are sampled."""
    prompt_tokens: int = 64
    completion_tokens: int = 64
    varied: bool = False
    """Lengths between an eighth of the given ones and these, uniformly; else all alike."""
    ours: tuple[str, ...] = ()
    """Settings of ours beyond the defaults."""

    @property
    def name(self) -> str:
        return f"{self.method}-{self.shape}" + ("-varied" if self.varied else "")

    @property
    def adapter(self) -> bool:
        return self.shape != "tiny"

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Case:
        content = json.loads(text)
        return cls(**{**content, "ours": tuple(content["ours"])})


CASES = (
    Case(method="grpo", shape="tiny", items=8, group=8),
    Case(method="grpo", shape="g270", items=1, group=6),
    Case(method="grpo", shape="smol", items=1, group=6),
    Case(method="ppo", shape="tiny", items=8, group=8),
    Case(method="sft", shape="tiny", items=16, prompt_tokens=128, completion_tokens=128, varied=True),
    Case(method="dpo", shape="tiny", items=16, prompt_tokens=128, completion_tokens=128, varied=True),
    Case(method="reward_model", shape="tiny", items=16, prompt_tokens=128, completion_tokens=128, varied=True),
    Case(method="sft", shape="g270", items=4, prompt_tokens=128, completion_tokens=128),
    Case(method="dpo", shape="g270", items=4, prompt_tokens=128, completion_tokens=128),
    Case(method="reward_model", shape="g270", items=4, prompt_tokens=128, completion_tokens=128),
)
BY_NAME = {case.name: case for case in CASES}
STEPS_OF_DATA = 64
"""Steps for which there is data: more than any measurement takes."""


def config(shape: Shape) -> PreTrainedConfig:
    """The shape's configuration; true sizes of Gemma 3 270M and SmolLM2 135M."""
    ids: dict[str, Any] = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
    if shape == "smol":
        return LlamaConfig(
            vocab_size=49_152, hidden_size=576, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3,
            intermediate_size=1536, max_position_embeddings=8192, rms_norm_eps=1e-5, tie_word_embeddings=True, **ids,
        )  # fmt: skip
    small = {"vocab_size": 512, "hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 4,
             "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 32}  # fmt: skip
    large = {"vocab_size": 262_144, "hidden_size": 640, "intermediate_size": 2048, "num_hidden_layers": 18,
             "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 256}  # fmt: skip
    sizes: dict[str, Any] = small if shape == "tiny" else large
    layers = sizes["num_hidden_layers"]
    kinds = [
        "full_attention" if (i + 1) % 6 == 0 or i + 1 == layers == 4 else "sliding_attention" for i in range(layers)
    ]
    return Gemma3TextConfig(
        **sizes, **ids, query_pre_attn_scalar=sizes["head_dim"], sliding_window=512, layer_types=kinds,
        max_position_embeddings=32_768,
        rope_parameters={
            "full_attention": {"rope_type": "default", "rope_theta": 1_000_000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
        },
    )  # fmt: skip


def make_model(shape: Shape, folder: Path) -> Path:
    """A model folder with random weights and a tokenizer of one token a word: w2, w3, ... have ids 2, 3, ..."""
    if (folder / "tokenizer.json").is_file():
        return folder
    torch.manual_seed(0)
    shaped = config(shape)
    model = AutoModelForCausalLM.from_config(shaped, dtype=torch.float32)  # type: ignore[no-untyped-call]
    model.save_pretrained(folder)
    vocabulary = {"<pad>": 0, "<eos>": 1, **{f"w{i}": i for i in range(2, shaped.vocab_size)}}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="w2"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens([AddedToken(token, special=True) for token in ("<pad>", "<eos>")])
    PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", chat_template=CHAT_TEMPLATE
    ).save_pretrained(folder)
    return folder


def data(case: Case) -> list[dict[str, Any]]:
    """Rows with `prompt` and, as the method needs, `completion` or `chosen` and `rejected`: words, one token each."""
    random = np.random.default_rng(0)
    vocabulary = config(case.shape).vocab_size

    def words(most: int) -> str:
        length = int(random.integers(max(2, most // 8), most + 1)) if case.varied else most
        return " ".join(f"w{i}" for i in random.integers(2, vocabulary, length))

    def row() -> dict[str, Any]:
        # the stop token is the last of the completion's
        prompt = words(case.prompt_tokens)
        if case.method == "sft":
            return {"prompt": prompt, "completion": words(case.completion_tokens - 1)}
        if case.method in ("dpo", "reward_model"):
            chosen, rejected = words(case.completion_tokens - 1), words(case.completion_tokens - 1)
            return {"prompt": prompt, "chosen": chosen, "rejected": rejected}
        return {"prompt": prompt, "answer": ""}

    return [row() for _ in range(case.items * STEPS_OF_DATA)]


def reward_of(text: str) -> float:
    """What sampled completions earn, on both sides: the share of words with an even number."""
    words = text.split()
    return sum(int(word[1:]) % 2 == 0 for word in words if word[1:].isdigit()) / max(1, len(words))


def shorter(case: Case, **changes: Any) -> Case:
    """The case with other lengths or sizes: for scaling, and for quick tests of the benchmark itself."""
    return replace(case, **changes)
