"""From a run folder to its examination: RUN -> reward model, held-out pairs, fresh reference outputs -> Examination."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch

from alignlab.conversation import Template
from alignlab.data import DataSource, load_examples, order
from alignlab.doctor.examination import Examination, Judge, examine
from alignlab.errors import UserError
from alignlab.forward import rewards
from alignlab.generate import Sampling
from alignlab.models import (
    ModelChoice,
    frozen_policy,
    hush_progress_bars,
    load_generation_config,
    load_reward_model,
    load_tokenizer,
    pick_device,
)
from alignlab.pipeline import default_cache
from alignlab.pipeline.finished import recipe_of, start_policy
from alignlab.pipeline.identity import DONE, StageResult, read_done
from alignlab.pipeline.items import limits_of, load_items
from alignlab.pipeline.stage import model_choice
from alignlab.recipe import Stage, read_mapping
from alignlab.rollout import Limits, fitting_prompts, sample_prompts
from alignlab.types import Pair, Row

SCHEMA = 1
TOLERANCES = {torch.bfloat16: 0.05, torch.float16: 0.02}
"""How far a score may move with its batch where products have few bits; 1e-4 in all wider types."""
REFERENCE_PROMPTS = 128
"""Prompts that the reference answers anew, to see whether its outputs still score mean 0 and sd 1."""
REFERENCE_PHASE = 2_000_000_000
"""Names the random numbers of these answers; no training and no evaluation uses them."""


@dataclass(frozen=True, kw_only=True)
class Examined:
    """An examination and what it was of."""

    examination: Examination
    stage: StageResult
    source: str
    """`validation`, or the file the pairs came from."""
    not_checked: str
    """Why the normalisation was not checked; empty where it was."""

    def to_json(self) -> dict[str, Any]:
        """The content of doctor.json; docs/methods/reward_model.md describes it."""
        about = {"schema": SCHEMA, "key": self.stage.key, "source": self.source, "not_checked": self.not_checked}
        return about | asdict(self.examination)


def examine_run(
    run: Path,
    *,
    pairs: Path | None = None,
    limit: int = 1000,
    seed: int = 0,
    device: str = "auto",
    cache: Path | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Examined:
    """Examines the reward model of a finished run (its last one) on held-out pairs.

    Args:
        pairs: a file of other pairs; None takes the validation pairs of the run.
        limit: the most pairs to score, chosen by the seed.

    Raises:
        UserError: no finished reward model there, or nothing to examine it on.
    """
    hush_progress_bars()
    stage_result = finished_reward_model(run)
    recipe, stage, start = recipe_of(stage_result.folder)
    folder, on = stage_result.model, pick_device(device)
    choice = replace(model_choice(stage.model, str(folder)), adapter=None)
    model = load_reward_model(folder, choice, device=on)
    template = Template.of(load_tokenizer(str(folder)), load_generation_config(str(folder)))
    limits = limits_of(stage)
    judge = Judge(
        score=lambda batch: rewards(model, batch),
        template=template,
        limits=limits,
        scale=model.scale.item(),
        tolerance=TOLERANCES.get(next(model.backbone.parameters()).dtype, 1e-4),
        device=str(on),
    )
    found = _pairs(stage, pairs)
    chosen = [found[i] for i in sorted(order(len(found), seed, 0)[:limit])]
    policy = start_policy(stage, start, stage_result.folder, cache or default_cache())
    reference: Sequence[Row] = ()
    if isinstance(policy, ModelChoice):
        say("sampling the policy it was trained from")
        reference = _reference_rows(frozen_policy(policy, on, seed=recipe.seed), chosen, template, limits)
    return Examined(
        examination=examine(judge, chosen, reference=reference, seed=seed, say=say),
        stage=stage_result,
        source="validation" if pairs is None else str(pairs),
        not_checked="" if isinstance(policy, ModelChoice) else policy,
    )


def finished_reward_model(run: Path) -> StageResult:
    """The last stage of a run that trained a reward model.

    Raises:
        UserError: there is none, or it is damaged.
    """
    recipe = run / "recipe.yaml"
    named = read_mapping(recipe).get("stages", []) if recipe.is_file() and not (run / DONE).is_file() else []
    for folder in [*(run / str(stage.get("name")) for stage in reversed(named)), run]:
        if (folder / DONE).is_file() and (folder / "reward_model").is_dir():
            return read_done(folder)
    raise UserError(f"{run}: not a finished run with a reward model; train one first (algorithm: reward_model)")


def _pairs(stage: Stage, file: Path | None) -> list[Pair]:
    if file is None:
        return cast(list[Pair], load_items(stage, "pairs", "validation"))
    task = stage.data.task[0] if len(stage.data.task) == 1 else ""
    everything = DataSource(path=str(file), validation_fraction=0.0, task=task)
    try:
        return list(load_examples(everything, "pairs", "train").items)
    except UserError as error:
        said, mapped, _ = str(error).partition("; map it with data.columns")  # which is a recipe's
        if not mapped:
            raise
        raise UserError(f"{said}; --pairs reads columns of these names only: rename those of the file") from error


def _reference_rows(policy: Any, pairs: Sequence[Pair], template: Template, limits: Limits) -> list[Row]:
    """Fresh completions of the pairs' prompts by the policy that the scores were normalised on."""
    prompts = list({pair.prompt.messages: pair.prompt for pair in pairs}.values())
    prompts = fitting_prompts(prompts[:: -(-len(prompts) // REFERENCE_PROMPTS)], template, limits)
    ids = [template.encode_prompt(prompt) for prompt in prompts]
    sampling = Sampling(max_completion_tokens=limits.max_completion_tokens)
    sampled = sample_prompts(
        policy, prompts, ids, template, sampling, num_samples=1, seed=0, phase=REFERENCE_PHASE,
        max_rows=limits.sampling_rows,
    )  # fmt: skip
    return [Row(prompt_ids=i, completion_ids=c[0].token_ids) for i, c in zip(ids, sampled, strict=True)]
