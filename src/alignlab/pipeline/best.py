"""The best policy of a run: evaluations -> those near the start compete -> the winner's weights become the result.

What decides is in `LoopState.best`, so a resumed run keeps what an uninterrupted one does; the weights lie in
`best/phase-NNNNNN` of the run folder, sealed like a checkpoint, until the run is finished.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from safetensors import SafetensorError
from torch import nn

from alignlab.checkpoint import seal, verify
from alignlab.errors import UserError
from alignlab.models import load_weights, save_model
from alignlab.recipe import BestSection
from alignlab.types import LoopState

METRICS = {"score": ("score", True), "perplexity": ("policy/perplexity", False)}
"""What may decide -> its name in an evaluation, and whether more is better."""


def considered(state: LoopState, metrics: Mapping[str, float], section: BestSection) -> LoopState:
    """The state, with this evaluation as its best if it passes the gate and beats the best so far.

    Raises:
        UserError: the evaluation does not measure what is to decide.
    """
    name, more = METRICS[section.metric]
    if name not in metrics or "policy/kl_per_token" not in metrics:
        missing = name if name not in metrics else "policy/kl_per_token"
        raise UserError(f"evaluation.best: the evaluation has no {missing}; choose another evaluation.best.metric")
    value, kl = metrics[name], metrics["policy/kl_per_token"]
    if not kl <= section.kl_per_token_limit or value != value:  # the gate comes first, and no number passes nothing
        return state
    before = state.best.get(section.metric)
    if before is not None and not (value > before if more else value < before):
        return state
    return replace(state, best={"phase": float(state.phase), section.metric: value, "kl_per_token": kl})


def best_phase(state: LoopState) -> int | None:
    """The number of finished phases of the best policy; None where none has passed the gate."""
    return int(state.best["phase"]) if state.best else None


def keep_best(folder: Path, state: LoopState, policy: nn.Module) -> None:
    """Writes the policy as that of the best phase.

    Raises:
        UserError: the disk is full or cannot be written.
    """
    final = _place(folder, state)
    partial = final.with_name(f".partial-{final.name}")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        save_model(policy, partial)
        seal(partial)
        shutil.rmtree(final, ignore_errors=True)  # of a run that was killed before its next checkpoint
        os.replace(partial, final)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise UserError(
            f"{final}: cannot write the best policy ({error}); checkpoints are intact. Make room, then go on with "
            "--resume"
        ) from error


def prune_best(folder: Path, checkpoints: Path) -> None:
    """Removes the policies that no checkpoint on disk calls its best."""
    named = set()
    for state in checkpoints.glob("phase-*/state.json"):
        try:
            named.add(json.loads(state.read_text("utf-8"))["state"]["best"].get("phase"))
        except (ValueError, KeyError, TypeError, AttributeError):
            return  # a damaged checkpoint: whoever looks into it may still need them
    for old in (folder / "best").glob("phase-*"):
        if float(old.name.removeprefix("phase-")) not in named:
            shutil.rmtree(old)


def restore_best(folder: Path, state: LoopState, policy: nn.Module) -> None:
    """Puts the best policy's weights into `policy`, bit for bit.

    Raises:
        UserError: they are missing or damaged.
    """
    place = _place(folder, state)
    if problem := verify(place):
        raise UserError(
            f"{place}: {problem}, so the best policy is lost; train the stage again, or leave out its `best`"
        )
    load_weights(policy, place)


def _place(folder: Path, state: LoopState) -> Path:
    return folder / "best" / f"phase-{best_phase(state):06d}"
