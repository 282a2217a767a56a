"""The embedded starter: a model, a tokenizer and data that everything runs on without a download.

name -> path inside the package. Made by `recipes/starter/build.py` and `recipes/starter/pretrain.yaml`.
"""

from __future__ import annotations

from pathlib import Path

ASSETS = Path(__file__).parent / "assets"
"""Folder of the model (config.json, model.safetensors) and its tokenizer: give it to any `from_pretrained`."""

DATA = ASSETS / "data"
"""Folder of the data: `TASK/{train,validation,test}.jsonl` and `TASK/pairs.{train,validation}.jsonl`."""
