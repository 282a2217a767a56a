"""Which models are relatives; a model's name -> its family, empty where it is not known."""

from __future__ import annotations

import re
from collections.abc import Mapping

FAMILIES: Mapping[str, tuple[str, ...]] = {
    "OpenAI": ("gpt", "chatgpt", "o1", "o3", "o4", "davinci", "openai"),
    "Anthropic": ("claude", "anthropic"),
    "Google": ("gemma", "gemini", "palm", "google"),
    "Meta": ("llama", "vicuna", "alpaca", "tulu"),
    "Mistral": ("mistral", "mixtral", "ministral", "zephyr", "codestral"),
    "Qwen": ("qwen", "qwq"),
    "DeepSeek": ("deepseek",),
    "Microsoft": ("phi",),
    "SmolLM": ("smollm", "smollm2", "smollm3"),
    "AllenAI": ("olmo",),
    "TII": ("falcon",),
    "01.AI": ("yi",),
    "Cohere": ("command", "aya"),
    "xAI": ("grok",),
    "Zhipu": ("glm", "chatglm"),
}
"""Beginnings of a part of a name. Descendants count: Vicuna and Tulu are Llama, Zephyr is Mistral."""


def family(model: str) -> str:
    """The family of `google/gemma-3-270m-it`, `gpt-4o-mini` or a folder's name; "" where no part of it is known."""
    parts = re.split(r"[^a-z0-9]+", model.rpartition("/")[2].lower()) + re.split(r"[^a-z0-9]+", model.lower())
    for part in parts:
        for name, beginnings in FAMILIES.items():
            if any(re.fullmatch(rf"{start}[\d.]*[a-z]?", part) for start in beginnings):
                return name
    return ""
