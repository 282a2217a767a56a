"""What can be known to be wrong with a recipe before anything is loaded or trained; `train`, `explain` and studies ask.

Read are recipes, run folders, data files and the configurations of model folders, where they lie on this disk.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from alignlab import registry
from alignlab.algorithms._online import ScoreShaping
from alignlab.data.prepared import card_of, is_folder
from alignlab.errors import UserError
from alignlab.models import check_choice, location, require_same_adapter
from alignlab.pipeline.identity import DONE, finished_folder, makes, read_record, require_kind
from alignlab.pipeline.items import check_items, check_stage_measures
from alignlab.pipeline.rewards import check_judged, check_rewards, require_fit, uses_rewards
from alignlab.pipeline.stage import items_per_phase, model_choice, require_context, stage_choice
from alignlab.recipe import ModelSection, Recipe, Stage, load_recipe
from alignlab.tasks import get_task
from alignlab.tracking import check_mirrors


def check_recipe(recipe: Recipe, *, debug: bool = False) -> None:
    """Says what is wrong with any stage, or with a recipe that one needs.

    Args:
        debug: the recipes that stages need are made short too.

    Raises:
        UserError: an unknown task, reward or mirror; a start, reward model or teacher that is missing, of the wrong
            kind or trained later; data that are not here or unusable; settings that its model forbids; and the like.
    """
    check_mirrors(recipe.tracking)
    _Checked(debug=debug).recipe(recipe)


def is_model(reference: str) -> bool:
    """Whether a name that is no stage's is a model's: neither a recipe file nor a run folder."""
    path = Path(reference)
    if path.is_dir():
        return reference == "starter" or not any((path / name).is_file() for name in (DONE, "recipe.yaml"))
    return not path.is_file()


@dataclass(frozen=True, kw_only=True)
class _Policy:
    """What a stage starts from, made or not."""

    model: str
    """Whose configuration it has: a model, or the folder of a policy."""
    made: bool = False
    """Whether that is the policy itself."""
    overrides: Mapping[str, Any] = field(default_factory=dict)
    """Values of the configuration that are others."""
    adapted_by: Stage | None = None
    """The stage that will put an adapter on it."""
    judges: str = ""
    """The task that taught it to judge answers instead of giving any, if one did."""


@dataclass(frozen=True, kw_only=True)
class _Checked:
    """One check, in which every recipe is read once."""

    debug: bool
    recipes: dict[Path, tuple[Stage, _Policy | None] | None] = field(default_factory=dict)
    """Path -> its last stage and the policy that makes, if it does; None while it is being checked."""

    def recipe(self, recipe: Recipe) -> tuple[Stage, _Policy | None]:
        earlier: dict[str, Stage] = {}
        policies: dict[str, _Policy] = {}
        names = {stage.name for stage in recipe.stages}
        for stage in recipe.stages:
            for key in ("start", "reward_model", "teacher"):
                later = getattr(stage, key) in names - earlier.keys()
                if later:
                    raise UserError(f"stage {stage.name}: {key}: {getattr(stage, key)} is not trained before it")
            start = self._start(stage, earlier, policies)
            self._stage(stage, start, earlier)
            earlier[stage.name] = stage
            if makes(stage) == "policy":
                begun = start or _Policy(model=stage.model.name, overrides=stage.model.overrides)
                adapted_by = stage if stage.model.adapter else None
                judges = judging_task(stage) or begun.judges
                policies[stage.name] = replace(begun, made=False, adapted_by=adapted_by, judges=judges)
        return stage, policies.get(stage.name)

    def _stage(self, stage: Stage, start: _Policy | None, earlier: Mapping[str, Stage]) -> None:
        for task in stage.data.task:
            registry.resolve("tasks", task)
        if stage.method.data_kind == "prompts" or stage.evaluation.best_of > 1:
            check_rewards(stage)
        self._teacher(stage, earlier)
        self._reward_model(stage, earlier)
        check_stage_measures(stage)
        if stage.evaluation.best_of > 1 and makes(stage) == "reward_model":
            raise UserError(f"stage {stage.name}: evaluation.best_of samples a policy, but it trains a reward model")
        if isinstance(stage.algorithm, ScoreShaping):
            stage.algorithm.check_buffer(stage.data.max_completion_tokens)
        if stage.train.epochs is not None:
            items_per_phase(stage)
        _check_model(stage, start)
        items = check_items(stage)
        if items and stage.method.data_kind == "prompts" and stage.algorithm.needs_reward:
            check_judged(stage, items)

    # ---- what it needs -----------------------------------------------------------------------------------------------

    def _start(self, stage: Stage, earlier: Mapping[str, Stage], policies: Mapping[str, _Policy]) -> _Policy | None:
        """The policy that a stage starts from; None: the model of its own section."""
        start = stage.start or next(reversed(list(policies)), None)
        if start is None:
            return None
        named = ModelSection().name
        if start in earlier:
            require_kind(start, makes(earlier[start]), "policy")
            found, named = policies[start], earlier[start].model.name
        elif Path(start).is_dir():
            folder = finished_folder(Path(start), "policy")
            found = _Policy(model=str(folder / "policy"), made=True, judges=_judging_run(folder))
        else:
            last, policy = self._last_of(start, "policy")
            assert policy is not None
            found, named = policy, last.model.name
        if found.judges and stage.method.data_kind == "prompts" and not judging_task(stage):
            raise UserError(
                f"stage {stage.name}: {start} was trained on {found.judges}, so it writes verdicts and no answers; RL "
                "starts from a policy trained on answers (sft on ultrafeedback), and judges stay judges"
            )
        if stage.start and stage.model.name not in (ModelSection().name, named):  # the default is as good as not said
            raise UserError(
                f"stage {stage.name}: model.name has no effect, as start: {stage.start} decides the weights; drop one"
            )
        return found

    def _reward_model(self, stage: Stage, earlier: Mapping[str, Stage]) -> None:
        role, named = stage.method.models().get("reward_model"), stage.reward_model
        if role is not None and not role.trained and named is None:
            raise UserError(
                f"stage {stage.name}: with these settings of its algorithm a reward model is part of training; add "
                "reward_model: RECIPE or RUN"
            )
        if named is None:
            return
        folder = self._made(named, "reward_model", earlier)
        if folder is not None and uses_rewards(stage):
            require_fit(stage, folder, read_record(folder).key)

    def _teacher(self, stage: Stage, earlier: Mapping[str, Stage]) -> None:
        needed, method = "teacher" in stage.method.models(), type(stage.algorithm).__name__.lower()
        if needed and stage.teacher is None:
            raise UserError(f"stage {stage.name}: {method} needs `teacher: STAGE, RECIPE, RUN or MODEL`")
        if not needed and stage.teacher is not None:
            raise UserError(f"stage {stage.name}: {method} has no use for a teacher; drop `teacher`")
        if stage.teacher is None:
            return
        if stage.teacher not in earlier and is_model(stage.teacher):
            location(stage.teacher)
        else:
            self._made(stage.teacher, "policy", earlier)

    def _made(self, reference: str, kind: str, earlier: Mapping[str, Stage]) -> Path | None:
        """Refuses a stage, run folder or recipe that does not give what is needed of it; the folder if it is there."""
        if reference in earlier:
            require_kind(reference, makes(earlier[reference]), kind)
        elif Path(reference).is_dir():
            return finished_folder(Path(reference), kind)
        else:
            self._last_of(reference, kind)
        return None

    def _last_of(self, reference: str, kind: str) -> tuple[Stage, _Policy | None]:
        """The last stage of a recipe file, all of which is checked, and the policy it makes."""
        path = Path(reference).resolve()
        if path not in self.recipes:
            self.recipes[path] = None
            self.recipes[path] = self.recipe(load_recipe(path, debug=self.debug))
        found = self.recipes[path]
        if found is None:
            raise UserError(f"{path}: cannot be trained, as it needs itself (start, reward_model or teacher)")
        require_kind(reference, makes(found[0]), kind)
        return found


def judging_task(stage: Stage) -> str:
    """The task of a stage's data whose completions judge answers (`Task.starts_rl` is False); empty: there is none."""
    folder = stage.data.path if is_folder(stage.data.path) else None
    own = (str(card_of(Path(folder).expanduser()).get("task", "")),) if folder else ()
    for name in (*stage.data.task, *own):
        if name in registry.names("tasks") and not get_task(name).starts_rl:
            return str(name)
    return ""


def _judging_run(folder: Path) -> str:
    """The same of a finished run, and of the runs that it started from; what they were is in their recipes."""
    for recipe in (folder / "recipe.yaml", folder.parent / "recipe.yaml"):
        if recipe.is_file():
            for stage in reversed(load_recipe(recipe).stages):
                before = Path(stage.start) if stage.start else folder
                found = judging_task(stage)
                if not found and before.is_dir() and before != folder:
                    found = _judging_run(finished_folder(before, "policy"))
                if found:
                    return found
    return ""


def _check_model(stage: Stage, start: _Policy | None) -> None:
    """What the configuration of a stage's model forbids, where that is a folder or the starter."""
    choice = stage_choice(stage, start.model if start else None)
    if start is not None and start.adapted_by is not None and choice.adapter is not None:
        before = model_choice(start.adapted_by.model, start.model).adapter
        assert before is not None
        require_same_adapter(f"stage {stage.name}", choice.adapter, before.rank, before.alpha)
    text = check_choice(choice, made=start is None or start.made)
    context = {**text, **(start.overrides if start else {})}.get("max_position_embeddings")
    if isinstance(context, int):
        require_context(stage, choice.name, context)
