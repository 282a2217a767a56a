"""Texts that any model is measured on: fifty open questions, and a page of plain English; both written for alignlab."""

from __future__ import annotations

import json
from pathlib import Path

from alignlab.types import Message, Prompt

ASSETS = Path(__file__).parent / "assets"


def open_prompts() -> list[Prompt]:
    """Fifty questions that have no right answer and no natural length; no task grades them."""
    lines = (ASSETS / "open_prompts.jsonl").read_text("utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    return [Prompt(messages=(Message("user", row["prompt"]),), id=row["id"]) for row in rows]


def reference_paragraphs() -> list[str]:
    """The fixed reference text, paragraph by paragraph: dialogue, report, instruction, proof, story."""
    return [part.strip() for part in (ASSETS / "reference.txt").read_text("utf-8").split("\n\n") if part.strip()]
