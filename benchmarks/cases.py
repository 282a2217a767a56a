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
from transformers.utils.logging import disable_progress_bar

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
    vocabulary: int | None = None
    """Tokens of the vocabulary, where not the shape's own."""
    width: int | None = None
    """Width of the hidden states in place of the tiny shape's: a multiple of 32, the MLP 4 times as wide."""
    layers: int | None = None
    """Layers, where not the shape's own."""
    ours: tuple[str, ...] = ()
    """Settings of ours beyond the defaults."""

    @property
    def name(self) -> str:
        return f"{self.method}-{self.shape}" + ("-varied" if self.varied else "")

    @property
    def model(self) -> str:
        """Name of its model's folder: cases with the same name train the same model."""
        changed = {"vocabulary": self.vocabulary, "width": self.width, "layers": self.layers}
        return "-".join([self.shape, *(f"{name}{value}" for name, value in changed.items() if value is not None)])

    @property
    def adapter(self) -> bool:
        return self.shape != "tiny"

    @property
    def sampled(self) -> bool:
        """Whether a step samples its completions."""
        return self.method in ("grpo", "ppo")

    @property
    def rows(self) -> int:
        """Completions of an optimiser step."""
        return self.items * (2 if self.method in ("dpo", "reward_model") else self.group)

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
"""Steps for which there is data; a longer measurement begins again."""
SEED = 42


def config(case: Case) -> PreTrainedConfig:
    """The configuration of the case's model; g270 and smol have the true sizes of Gemma 3 270M and SmolLM2 135M.

    Raises:
        ValueError: a width that is not a multiple of 32, or for a shape other than tiny.
    """
    shape = case.shape
    changed = {"vocab_size": case.vocabulary, "num_hidden_layers": case.layers}
    if case.width is not None:
        if shape != "tiny" or case.width % 32:
            raise ValueError(f"only the tiny shape has another width, a multiple of 32; not {case.width} for {shape}")
        changed |= {"hidden_size": case.width, "intermediate_size": 4 * case.width,
                    "num_attention_heads": case.width // 32}  # fmt: skip
    changes: dict[str, Any] = {name: value for name, value in changed.items() if value is not None}
    sizes: dict[str, Any]
    ids: dict[str, Any] = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
    if shape == "smol":
        sizes = {"vocab_size": 49_152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
                 "num_attention_heads": 9, "num_key_value_heads": 3}  # fmt: skip
        return LlamaConfig(
            **{**sizes, **changes}, max_position_embeddings=8192, rms_norm_eps=1e-5, tie_word_embeddings=True, **ids
        )
    small = {"vocab_size": 512, "hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 4,
             "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 32}  # fmt: skip
    large = {"vocab_size": 262_144, "hidden_size": 640, "intermediate_size": 2048, "num_hidden_layers": 18,
             "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 256}  # fmt: skip
    sizes = {**(small if shape == "tiny" else large), **changes}
    layers = sizes["num_hidden_layers"]
    full = [(i + 1) % 6 == 0 or i + 1 == layers < 6 for i in range(layers)]
    kinds = ["full_attention" if yes else "sliding_attention" for yes in full]
    return Gemma3TextConfig(
        **sizes, **ids, query_pre_attn_scalar=sizes["head_dim"], sliding_window=512, layer_types=kinds,
        max_position_embeddings=32_768,
        rope_parameters={
            "full_attention": {"rope_type": "default", "rope_theta": 1_000_000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
        },
    )  # fmt: skip


def make_model(case: Case, folder: Path) -> Path:
    """The case's model: a folder with random weights and a tokenizer of one token a word, w2, w3 being 2, 3"""
    if (folder / "tokenizer.json").is_file():
        return folder
    disable_progress_bar()  # type: ignore[no-untyped-call]
    torch.manual_seed(0)
    shaped = config(case)
    model = AutoModelForCausalLM.from_config(shaped, dtype=torch.float32)  # type: ignore[no-untyped-call]
    model.save_pretrained(folder)
    vocabulary = {"<pad>": 0, "<eos>": 1, **{f"w{i}": i for i in range(2, shaped.vocab_size)}}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="w2"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens([AddedToken(token, special=True) for token in ("<pad>", "<eos>")])
    tokenizer = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", chat_template=CHAT_TEMPLATE
    )
    tokenizer.save_pretrained(folder)
    return folder


def data(case: Case) -> list[dict[str, Any]]:
    """Rows with `prompt` and, as the method needs, `completion` or `chosen` and `rejected`: words, one token each."""
    random = np.random.default_rng(0)
    vocabulary = config(case).vocab_size

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


def peer_rows(case: Case, steps: int) -> list[dict[str, Any]]:
    """The rows of `data` in the order in which our side takes them, for a trainer that reads from first to last: every
    step has the same rows on both sides."""
    from alignlab.data import take

    rows = data(case)
    return [rows[i] for step in range(steps) for i in take(len(rows), case.items, SEED, step)]


def lengths(row: dict[str, Any]) -> tuple[int, int]:
    """Tokens of a row's prompt and of all its completions, stop tokens included; sampled completions are not known."""
    said = [row[key] for key in ("completion", "chosen", "rejected") if key in row]
    return len(row["prompt"].split()), sum(len(words.split()) + 1 for words in said)


def reward_of(text: str) -> float:
    """What sampled completions earn, on both sides: the share of words with an even number."""
    words = text.split()
    return sum(int(word[1:]) % 2 == 0 for word in words if word[1:].isdigit()) / max(1, len(words))


def shorter(case: Case, **changes: Any) -> Case:
    """The case with other lengths or sizes: for scaling, and for quick tests of the benchmark itself."""
    return replace(case, **changes)
