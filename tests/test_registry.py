"""Names are files; dotted paths lead anywhere; unknown names are answered with the nearest."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import alignlab
from alignlab import registry
from alignlab.errors import UserError


def test_names_are_the_files_of_the_package() -> None:
    for kind in ("algorithms", "rewards", "tasks"):
        files = {path.stem for path in (Path(alignlab.__file__).parent / kind).glob("*.py")}
        assert registry.names(kind) == sorted(name for name in files if not name.startswith("_"))


def test_names_import_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("imported")

    monkeypatch.setattr("alignlab.registry.importlib.import_module", refuse)
    assert "reasoning" in registry.names("tasks")


def test_a_name_gives_its_module() -> None:
    assert registry.resolve("tasks", "reasoning").__name__ == "alignlab.tasks.reasoning"


def test_underscored_files_are_no_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "rewards").mkdir()
    for name in ("b", "a", "_helper", "__init__"):
        (tmp_path / "rewards" / f"{name}.py").touch()
    monkeypatch.setattr(registry, "__file__", str(tmp_path / "registry.py"))
    assert registry.names("rewards") == ["a", "b"]


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    package = tmp_path / "ownthings"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "mine.py").write_text("class Outer:\n    inner = 5\n\ndef reward():\n    return 7\n")
    (package / "broken.py").write_text("import no_such_package_at_all\n")
    (package / "fails.py").write_text("raise RuntimeError('boom')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    for name in [name for name in sys.modules if name.startswith("ownthings")]:
        del sys.modules[name]


@pytest.mark.usefixtures("own")
def test_dotted_paths_lead_to_outside_things() -> None:
    assert registry.resolve("rewards", "ownthings.mine:reward")() == 7
    assert registry.resolve("rewards", "ownthings.mine.reward")() == 7
    assert registry.resolve("rewards", "ownthings.mine:Outer.inner") == 5
    assert registry.resolve("rewards", "ownthings.mine").__name__ == "ownthings.mine"


@pytest.mark.usefixtures("own")
@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("ownthings.mine:rewrad", "did you mean 'reward'?"),
        ("ownthings.broken:x", "no_such_package_at_all"),
        ("ownthings.broken.x", "no_such_package_at_all"),
        ("ownthings.fails:x", "RuntimeError: boom"),
        ("no_such_package_at_all.thing", "no_such_package_at_all"),
        (":x", "cannot import"),
    ],
)
def test_wrong_paths_are_said_in_one_line(path: str, said: str) -> None:
    with pytest.raises(UserError) as caught:
        registry.resolve("rewards", path)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_unknown_name_is_answered_with_the_nearest_and_all() -> None:
    with pytest.raises(
        UserError, match=r"no task is named 'reasonin'; did you mean 'reasoning'\?; there are: .*safety"
    ):
        registry.resolve("tasks", "reasonin")


def test_did_you_mean() -> None:
    assert registry.did_you_mean("learning_rte", ["learning_rate", "beta"]) == "did you mean 'learning_rate'?"
    assert registry.did_you_mean("GRPO", ["grpo", "ppo"]) == "did you mean 'grpo'?"
    assert registry.did_you_mean("zzzz", ["grpo", "ppo"]) == ""
    assert registry.did_you_mean("x", []) == ""
