"""What a recipe does, in numbers, before it does it: Recipe -> the loss of every stage with all that goes into it.

Nothing is loaded and nothing is downloaded: an explanation follows from the recipe, its method's own formula, and the
sizes of data files that are already here.
"""

from __future__ import annotations

from alignlab.explain.batch import batch_of, batch_section
from alignlab.explain.differences import changed, differences
from alignlab.explain.facts import Facts, facts_of
from alignlab.explain.idle import idle
from alignlab.explain.kl import kl_section
from alignlab.explain.loss import inputs_of, loss_section
from alignlab.explain.origins import credit_section, mask_section, models_section, reward_section
from alignlab.explain.section import Differences, Explained, Line, Section, StageExplained
from alignlab.explain.text import as_json, render
from alignlab.pipeline import check_recipe
from alignlab.recipe import Recipe, Stage


def explain(recipe: Recipe, *, debug: bool = False) -> Explained:
    """Every stage of a recipe, explained.

    Args:
        debug: it was made short, as are then the recipes that it needs.

    Raises:
        UserError: what training would refuse before it loads anything (see `check_recipe`).
    """
    check_recipe(recipe, debug=debug)
    earlier: dict[str, Stage] = {}
    stages = []
    for stage in recipe.stages:
        stages.append(explain_stage(facts_of(stage, earlier), earlier))
        earlier[stage.name] = stage
    return Explained(name=recipe.name, seed=recipe.seed, stages=tuple(stages))


def explain_stage(facts: Facts, earlier: dict[str, Stage]) -> StageExplained:
    """One stage, the others before it."""
    method, batch = facts.method, batch_of(facts)
    arithmetic, numbers = batch_section(facts)
    phases = numbers["phases"]
    sections = {
        "loss": loss_section(facts, batch),
        "models": models_section(facts, earlier),
        "reward": reward_section(facts),
        "credit": credit_section(facts),
        "kl": kl_section(facts, batch, phases if isinstance(phases, int) else None),
        "masks": mask_section(facts, batch),
        "batch": arithmetic,
    }
    return StageExplained(
        name=facts.stage.name,
        method=str(facts.get("name", type(method).__name__)),
        summary=(type(method).__doc__ or "").strip().partition("\n")[0],
        preset=method.preset,
        variant=method.variant,
        changed=changed(method),
        idle=idle(facts, batch),
        formula=facts.formula,
        inputs=inputs_of(facts),
        sections={name: section for name, section in sections.items() if section is not None},
        numbers=numbers,
        differences=differences(method),
    )


__all__ = [
    "Differences",
    "Explained",
    "Line",
    "Section",
    "StageExplained",
    "as_json",
    "explain",
    "explain_stage",
    "render",
]
