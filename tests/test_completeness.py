"""A method is one file, and a test, a recipe, a page, a golden trajectory and a learning test of the same name."""

from __future__ import annotations

from pathlib import Path

import pytest

from alignlab import registry
from alignlab.recipe import algorithm_class, load_recipe
from tests.algorithms.test_microbatches import CASES
from tests.golden.record import METHODS

ROOT = Path(__file__).parents[1]
ALGORITHMS = registry.names("algorithms")
LEARNING = (ROOT / "tests" / "test_learning.py").read_text("utf-8")


def of_method(names: object, method: str) -> list[str]:
    """`ppo_shared` and `ppo/own` belong to `ppo`, unless a method is called `ppo_shared`."""
    return [n for n in map(str, names) if _owner(n.split("/")[0]) == method]  # type: ignore[call-overload]


def _owner(name: str) -> str:
    return max((m for m in ALGORITHMS if name == m or name.startswith(f"{m}_")), key=len, default="")


@pytest.mark.parametrize("method", ALGORITHMS)
def test_a_method_is_complete(method: str) -> None:
    missing = [
        path
        for path in (
            f"tests/algorithms/test_{method}.py",
            f"recipes/starter/{method}.yaml",
            f"docs/methods/{method}.md",
        )
        if not (ROOT / path).is_file()
    ]
    missing += [] if of_method(METHODS, method) else ["a golden trajectory in tests/golden/record.py"]
    missing += [] if of_method(CASES, method) else ["a case in tests/algorithms/test_microbatches.py"]
    missing += [] if f'"{method}"' in LEARNING else ["a learning test in tests/test_learning.py"]
    assert not missing, f"{method} lacks {', '.join(missing)}"


@pytest.mark.parametrize("method", ALGORITHMS)
def test_the_recipe_of_a_name_is_of_that_method_and_the_formula_ends_with_the_loss(method: str) -> None:
    recipe = load_recipe(ROOT / "recipes" / "starter" / f"{method}.yaml")
    assert recipe.stages[-1].algorithm.name == method  # type: ignore[attr-defined]
    assert recipe.stages[-1].method.formula()[-1].startswith("loss = ")


@pytest.mark.parametrize("method", ALGORITHMS)
def test_every_hyperparameter_says_what_it_is_and_stands_on_the_page(method: str) -> None:
    fields = algorithm_class(method).model_fields
    own = {name for name in fields if name not in ("name", "variant", "preset")}
    shared = {"max_grad_norm"}
    silent = [n for n in own - shared if not fields[n].description and n not in ("clip_low",)]
    assert not silent, f"{method}: no docstring under {silent}"
    page = (ROOT / "docs" / "methods" / f"{method}.md").read_text("utf-8")
    unmentioned = [n for n in own if f"`{n}`" not in page]
    assert not unmentioned, f"docs/methods/{method}.md does not mention {unmentioned}"


@pytest.mark.parametrize("kind", ["rewards", "tasks"])
def test_a_reward_or_task_has_a_test(kind: str) -> None:
    tested = "".join(path.read_text("utf-8") for path in (ROOT / "tests" / kind).glob("test_*.py"))
    assert not [name for name in registry.names(kind) if name not in tested]  # type: ignore[arg-type]
