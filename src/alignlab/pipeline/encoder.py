"""The pairs of a recipe and a text encoder -> a trained encoder reward, for the reward `hybrid`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from alignlab.errors import UserError
from alignlab.pipeline.items import load_items
from alignlab.recipe import Recipe
from alignlab.rewards.hybrid import train_encoder


def train_encoder_reward(
    recipe: Recipe,
    output: Path,
    *,
    model: str,
    epochs: int,
    learning_rate: float,
    window: int,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Trains on the pairs of the recipe's last stage that has pairs; its held-out pairs say how good it is.

    Returns:
        What was trained and how, with `accuracy` on the held-out pairs.

    Raises:
        UserError: no stage is trained on pairs; the folder is in use; data or model cannot be used.
    """
    stages = [stage for stage in recipe.stages if stage.method.data_kind == "pairs"]
    if not stages:
        raise UserError(
            f"recipe {recipe.name}: no stage is trained on pairs; name one such as starter/reward_model.yaml"
        )
    train, held_out = (load_items(stages[-1], "pairs", split) for split in ("train", "validation"))
    return train_encoder(
        train, held_out, model=model, output=output, epochs=epochs, learning_rate=learning_rate, window=window,
        seed=recipe.seed, device=recipe.device, say=say,
    )  # fmt: skip
