"""The rewards of a recipe: options checked by name and type before anything is trained, time limits, identities."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from alignlab.errors import UserError
from alignlab.pipeline.identity import stage_key
from alignlab.pipeline.rewards import LONGEST_CALL, build_rewards, check_judged, check_rewards
from alignlab.recipe import Stage, load_recipe
from alignlab.rewards.code import SWITCH
from tests.rewards.samples import prompt, tiny_encoder
from tests.runs import RECIPES, alignlab, rows, small_model, write_rows

NEEDS_JUDGE = pytest.mark.skipif(
    importlib.util.find_spec("alignlab.judge") is None, reason="alignlab.judge is not there"
)


@pytest.fixture(autouse=True)
def without_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OPENAI_API_KEY", SWITCH):
        monkeypatch.delenv(name, raising=False)


def stage(folder: Path, reward: str) -> Stage:
    path = folder / "recipe.yaml"
    path.write_text(f"data: {{task: reasoning}}\nalgorithm: grpo\nreward: {reward}\n", "utf-8")
    return load_recipe(path).stages[0]


def said(folder: Path, reward: str) -> str:
    with pytest.raises(UserError) as caught:
        check_rewards(stage(folder, reward))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        ("{toxicity: {model: no/such/folder}}", "no such folder"),
        ("{toxicity: {modle: x}}", "reward.toxicity.modle: unknown option; did you mean 'model'?"),
        ("{toxicity: {threshold: 2, model: minilm}}", "reward.toxicity: needs 0 <= threshold < 1"),
        ("{similarity: {measure: cosine}}", "measure cosine needs `model`"),
        ("{similarity: {measure: cosin}}", "rouge_l or cosine or mean is needed, not 'cosin'"),
        ("{hybrid: 1}", "kind hybrid needs `model`"),
        ("{hybrid: {model: nowhere}}", "nowhere: no trained encoder reward"),
        ("{code: {seconds: 0}}", "reward.code: needs seconds > 0"),
        ("{code: {run: true}}", "reward.code.run: unknown option"),
        ("{format: {mode: loose}}", "strict or graded is needed, not 'loose'"),
        ("{overlap: {target: 1}}", "true or false is needed, not 1"),
        ("{exact: {timout: 3}}", "did you mean 'timeout'?"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_trained(reward: str, message: str, tmp_path: Path) -> None:
    assert message in said(tmp_path, reward)


@NEEDS_JUDGE
@pytest.mark.parametrize(
    ("reward", "message"),
    [
        ("{judged: 1}", "no key for 'gpt-4o-mini' in the environment variable OPENAI_API_KEY"),
        ("{judged: {base_ulr: x}}", "reward.judged.base_ulr: unknown option; did you mean 'base_url'?"),
        ("{judged: {max_calls: many}}", "reward.judged.max_calls: a whole number or null is needed, not 'many'"),
        ("{judged: {base_url: nowhere}}", "base_url 'nowhere' is no address"),
        ("{rubric: {file: no.yaml, base_url: 'http://localhost:1/v1'}}", "rubric.file 'no.yaml': cannot be read"),
    ],
)
def test_a_judge_that_cannot_be_asked(reward: str, message: str, tmp_path: Path) -> None:
    assert message in said(tmp_path, reward)


def test_a_timeout_is_a_positive_number(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="timeout"):
        stage(tmp_path, "{exact: {timeout: 0}}")


def test_functions_of_ones_own_have_a_time_limit(tmp_path: Path) -> None:
    limits = {
        "{exact: 1}": None,
        "{exact: {timeout: 5}}": 5.0,
        "{'tests.rewards.own:brief': 1}": LONGEST_CALL,
        "{'tests.rewards.own:brief': {timeout: 0.5}}": 0.5,
    }
    for reward, limit in limits.items():
        (built,) = build_rewards(stage(tmp_path, reward), dict)
        assert built.timeout == limit


# ---- what judges what ------------------------------------------------------------------------------------------------


def test_nothing_is_loaded_run_or_asked_to_see_what_is_judged(tmp_path: Path) -> None:
    folder = tiny_encoder(tmp_path / "m", labels=("fine", "toxic"))
    (tmp_path / "m" / "model.safetensors").unlink()  # it would not load
    check_judged(stage(tmp_path, f"{{toxicity: {{model: {folder}}}}}"), [prompt()])
    with pytest.raises(UserError, match=r"no function \('similarity'\) judges any of 1 prompts; .* `answer`"):
        check_judged(stage(tmp_path, "{similarity: 1}"), [prompt()])
    with pytest.raises(UserError, match=r"'overlap'.*`criteria` or `answer`"):
        check_judged(stage(tmp_path, "{overlap: 1}"), [prompt()])


def test_programs_are_not_run_unless_that_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = prompt(grading="tests", tests=["assert f(1) == 1"])
    for reward in ("{code: 1}", "{length: 1, code: 1}"):  # also where another component judges it
        with pytest.raises(UserError, match="ALIGNLAB_RUN_CODE=1 in the environment turns it on"):
            check_judged(stage(tmp_path, reward), [asked])
    monkeypatch.setenv(SWITCH, "1")
    check_judged(stage(tmp_path, "{code: 1}"), [asked])
    with pytest.raises(UserError, match="prompt 'q': `grading` is tests"):
        check_judged(stage(tmp_path, "{code: 1}"), [asked, prompt(id="q", grading="tests", tests="assert")])


# ---- identity --------------------------------------------------------------------------------------------------------


def key(folder: Path, reward: str) -> str:
    return stage_key(stage(folder, reward), 0, None, None)[0]


def test_files_that_options_name_are_known_by_their_content(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).write_text("criteria: [{name: a, description: b}]")
    one, two = (f"{{rubric: {{file: {tmp_path / name}}}}}" for name in ("one", "two"))
    before = key(tmp_path, one)
    assert before == key(tmp_path, two)
    (tmp_path / "one").write_text("criteria: [{name: a, description: c}]")
    assert key(tmp_path, one) != before == key(tmp_path, two)
    assert key(tmp_path, "{rubric: {file: nowhere}}") != key(tmp_path, "{rubric: {file: elsewhere}}")


def test_a_model_folder_is_known_by_its_files(tmp_path: Path) -> None:
    for name in ("a", "b"):
        tiny_encoder(tmp_path / name, labels=("fine", "toxic"))
    a, b = (f"{{toxicity: {{model: {tmp_path / name}}}}}" for name in ("a", "b"))
    assert key(tmp_path, a) == key(tmp_path, b)
    (tmp_path / "b" / "config.json").write_text((tmp_path / "a" / "config.json").read_text() + " ")
    assert key(tmp_path, a) != key(tmp_path, b)


def test_what_changes_no_value_is_no_part_of_it(tmp_path: Path) -> None:
    """A run whose budget was used up, or whose function was too slow, is resumed with more of it."""
    same = ("{judged: {max_calls: 5}}", "{judged: {max_calls: 50, cache: x, concurrency: 2}}", "{judged: {timeout: 9}}")
    assert len({key(tmp_path, reward) for reward in same}) == 1
    assert key(tmp_path, "{judged: {model: other}}") != key(tmp_path, same[0])


# ---- from the command line -------------------------------------------------------------------------------------------


def test_an_encoder_is_trained_and_used(tmp_path: Path) -> None:
    pairs = [
        {"prompt": f"say something {i}", "chosen": "you are so nice", "rejected": "you are so bad"} for i in range(40)
    ]
    write_rows(tmp_path / "pairs.jsonl", pairs)
    base, encoder = tiny_encoder(tmp_path / "base"), tmp_path / "encoder"
    trained = alignlab(
        "reward", "encoder", RECIPES / "starter" / "reward_model.yaml", f"data.path={tmp_path / 'pairs.jsonl'}",
        "data.task=[]", "--model", base, "--output", encoder, "--window", "32", "--learning-rate", "1e-3",
    )  # fmt: skip
    assert trained.code == 0, trained.err
    assert "held-out accuracy: 1.000" in trained.out and f"reward.hybrid={{weight: 1, model: {encoder}}}" in trained.out
    write_rows(tmp_path / "asked.jsonl", [{"prompt": f"{i} + 1", "answer": str(i + 1)} for i in range(8)])
    recipe = tmp_path / "grpo.yaml"
    recipe.write_text(
        f"model: {small_model(tmp_path / 'small')}\n"
        f"data: {{path: {tmp_path / 'asked.jsonl'}, task: reasoning, max_completion_tokens: 6}}\n"
        "algorithm: {name: grpo, prompts_per_phase: 2, group_size: 2}\n"
        "train: {num_phases: 1}\nevaluation: {prompts_per_task: 0}\n"
        f"reward: {{hybrid: {{kind: trainable, model: {encoder}, clip: 3}}, similarity: 0.5}}\n"
    )
    run = alignlab("train", recipe, "--output", tmp_path / "run")
    assert run.code == 0, run.err
    (row,) = rows(tmp_path / "run" / "log_history.jsonl")
    assert row["reward_judged/hybrid"] == row["reward_judged/similarity"] == 1.0
    assert row["reward/hybrid/model"] == pytest.approx(row["reward/hybrid"])


def test_training_an_encoder_says_what_is_missing(tmp_path: Path) -> None:
    for recipe, options, message in [
        ("starter/sft.yaml", (), "no stage is trained on pairs"),
        ("starter/reward_model.yaml", ("--model", "no/such/folder"), "no such folder"),
        ("starter/reward_model.yaml", ("--output", str(RECIPES)), "already there"),
    ]:
        asked = ("--output", str(tmp_path / "new"), *options)
        found = alignlab("reward", "encoder", RECIPES / recipe, *asked)
        assert found.code == 2 and message in found.err and len(found.errors) == 1
        assert not (tmp_path / "new").exists()
