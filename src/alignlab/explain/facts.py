"""What is known of a stage without loading anything: Stage, the stages before it -> its start, roles and fields."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alignlab.algorithms import Hyperparameters
from alignlab.errors import UserError
from alignlab.models import ADAPTER_FILE, location
from alignlab.pipeline.identity import makes
from alignlab.pipeline.reference import UsesReference
from alignlab.recipe import Stage, load_recipe
from alignlab.types import Role


@dataclass(frozen=True, kw_only=True)
class Facts:
    """A stage, and what follows from its place in the recipe."""

    stage: Stage
    start: str
    """The policy it starts from, in words."""
    start_has_adapter: bool
    """Whether that policy comes with an adapter of its own, which training would go on with."""

    @property
    def method(self) -> Hyperparameters:
        return self.stage.algorithm

    @property
    def roles(self) -> Mapping[str, Role]:
        return self.stage.method.models()

    @property
    def kind(self) -> str:
        """What the method learns from: examples, pairs, labelled or prompts."""
        return self.stage.method.data_kind

    @property
    def samples(self) -> bool:
        return self.kind == "prompts"

    def get(self, field: str, otherwise: Any = None) -> Any:
        """A hyperparameter, where the method has it."""
        return getattr(self.method, field, otherwise)

    @property
    def formula(self) -> tuple[str, ...]:
        """The loss as assignments; nothing where a method of the user's own does not say it.

        Raises:
            UserError: a line is no assignment to a name in Python's syntax.
        """
        say = getattr(self.method, "formula", None)
        found = tuple(str(line) for line in say()) if say is not None else ()
        for line in found:
            if not _is_assignment(line):
                raise UserError(
                    f"algorithm {self.get('name', '')!r}: its formula() has {line!r}; `name = ...` is needed"
                )
        return found

    @property
    def policy_is_adapted(self) -> bool:
        return self.stage.model.adapter is not None

    @property
    def reference_is_cached(self) -> bool:
        """Whether the reference's logprobs are computed before training, as the method's rows are known by then."""
        return isinstance(self.method, UsesReference)


def _is_assignment(line: str) -> bool:
    try:
        body = ast.parse(line).body
    except SyntaxError:
        return False
    return len(body) == 1 and isinstance(body[0], ast.Assign) and isinstance(body[0].targets[0], ast.Name)


def facts_of(stage: Stage, earlier: Mapping[str, Stage]) -> Facts:
    """A stage between the stages before it (name -> stage, in their order).

    Raises:
        UserError: the model's folder, or the recipe it starts from, cannot be used.
    """
    policies = [name for name, before in earlier.items() if makes(before) == "policy"]
    start = stage.start or (policies[-1] if policies else None)
    if start is None:
        folder = Path(location(stage.model.name))
        text = "random weights in the shape of " if stage.model.weights == "random" else ""
        return Facts(
            stage=stage, start=f"{text}{stage.model.name}", start_has_adapter=(folder / ADAPTER_FILE).is_file()
        )
    text, adapted = _origin(start, earlier)
    return Facts(stage=stage, start=text, start_has_adapter=adapted)


def in_words(reference: str | None, earlier: Mapping[str, Stage]) -> str:
    """A stage, recipe, run folder or model that a recipe names, without the path of this machine."""
    if reference is None:
        return "none is named"
    if reference in earlier:
        return f"the result of stage {reference}"
    path = Path(reference)
    if path.suffix in (".yaml", ".yml", ".json"):
        return f"{load_recipe(path).name} ({path.name}, trained first if it is not in the cache)"
    return f"the run {path.name}" if path.is_dir() else reference


def _origin(start: str, earlier: Mapping[str, Stage]) -> tuple[str, bool]:
    if start in earlier:
        adapted = earlier[start].model.adapter is not None
    elif Path(start).is_dir():
        adapted = any((Path(start) / folder / ADAPTER_FILE).is_file() for folder in ("policy", "."))
    else:
        adapted = load_recipe(Path(start)).stages[-1].model.adapter is not None
    return in_words(start, earlier), adapted
