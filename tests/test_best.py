"""The result is the best policy near the start: the gate first, then the metric; a kill anywhere changes nothing."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import pytest

from alignlab.errors import UserError
from alignlab.pipeline import best, stage
from alignlab.pipeline.best import best_phase, considered
from alignlab.recipe import BestSection, load_recipe
from alignlab.types import LoopState
from tests.runs import Finished, alignlab, files_of, rows, small_model, strict_json, write_rows

SUMS = [
    {"id": f"sum/{a}{b}", "task": "reasoning", "prompt": f"{a} + {b}", "answer": str(a + b), "completion": str(a + b)}
    for a in range(5)
    for b in range(4)
]
SFT = """
model: {model}
data: {{path: sums.jsonl, max_completion_tokens: 8}}
algorithm: {{name: sft, examples_per_step: 4, learning_rate: 3e-2}}
train: {{num_phases: 10, save_every: 3, keep_checkpoints: 2}}
evaluation: {{prompts_per_task: 4, every: 2, perplexity: true}}
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_model(tmp_path_factory.mktemp("models") / "small")


@pytest.fixture
def recipe(tmp_path: Path, model: Path) -> Path:
    write_rows(tmp_path / "sums.jsonl", SUMS)
    path = tmp_path / "sft.yaml"
    path.write_text(SFT.format(model=model), "utf-8")
    return path


def gate(limit: float, metric: str = "perplexity") -> str:
    return f"evaluation.best={{kl_per_token_limit: {limit!r}, metric: {metric}}}"


def train(recipe: Path, output: str, *overrides: str) -> Finished:
    return alignlab("train", recipe, *overrides, "--output", recipe.parent / output)


def record(run: Path, name: str = "stage") -> Any:
    return strict_json((run / f"{name}.json").read_text("utf-8"))


def logged(run: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if not k.startswith("time/")} for row in rows(run / "log_history.jsonl")]


def evaluations(run: Path) -> dict[int, tuple[float, float]]:
    """Finished phases -> (KL per token, perplexity) of every evaluation of a trained policy."""
    return {
        row["phases_done"]: (row["evaluation/policy/kl_per_token"], row["evaluation/policy/perplexity"])
        for row in rows(run / "log_history.jsonl")
        if row.get("phases_done")
    }


# ---- who wins --------------------------------------------------------------------------------------------------------

SCORE, SURPRISE = BestSection(kl_per_token_limit=0.1), BestSection(kl_per_token_limit=0.1, metric="perplexity")


def tried(section: BestSection, *candidates: tuple[float, float]) -> LoopState:
    """The state after candidates of (KL, metric), at phases 1, 2, ..."""
    state = LoopState(seed=1)
    name = "score" if section.metric == "score" else "policy/perplexity"
    for phase, (kl, value) in enumerate(candidates, start=1):
        state = considered(
            LoopState(seed=1, phase=phase, best=state.best), {"policy/kl_per_token": kl, name: value}, section
        )
    return state


@pytest.mark.parametrize(
    ("section", "candidates", "winner"),
    [
        (SCORE, [(0.01, 0.5), (0.05, 0.7), (0.09, 0.6)], 2),  # the highest score
        (SURPRISE, [(0.01, 5.0), (0.05, 3.0), (0.09, 4.0)], 2),  # the lowest perplexity
        (SCORE, [(0.01, 0.5), (0.11, 0.9), (0.05, 0.6)], 3),  # the gate is asked first
        (SCORE, [(0.1, 0.5)], 1),  # and lets its own limit through
        (SCORE, [(-0.01, 0.5)], 1),  # an estimate below 0 is near
        (SCORE, [(0.01, 0.5), (0.02, 0.5)], 1),  # of equals the earlier
        (SURPRISE, [(0.01, 3.0), (0.02, 3.0)], 1),
        (SCORE, [(0.01, 0.0)], 1),
        (SCORE, [(0.2, 0.5), (0.3, 0.6)], None),
        (SCORE, [(math.nan, 0.9), (0.01, math.nan)], None),
        (SURPRISE, [(0.01, math.nan), (0.05, 9.0)], 2),
    ],
)  # fmt: skip
def test_the_gate_first_then_the_metric(
    section: BestSection, candidates: list[tuple[float, float]], winner: int | None
) -> None:
    state = tried(section, *candidates)
    assert best_phase(state) == winner
    if winner is not None:
        kl, value = candidates[winner - 1]
        assert state.best == {"phase": float(winner), section.metric: value, "kl_per_token": kl}


def test_what_is_not_measured_cannot_decide() -> None:
    with pytest.raises(UserError, match=r"evaluation\.best: the evaluation has no policy/perplexity"):
        considered(LoopState(seed=1), {"policy/kl_per_token": 0.0, "score": 1.0}, SURPRISE)
    with pytest.raises(UserError, match="no policy/kl_per_token"):
        considered(LoopState(seed=1), {"score": 1.0}, SCORE)


# ---- in a run --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("adapter", ["", pytest.param("model.adapter=lora", marks=pytest.mark.slow)])
def test_the_result_is_the_winner_bit_for_bit(recipe: Path, adapter: str) -> None:
    """Which phase has to win follows from the log of a run without `best`, whose checkpoints are compared with."""
    extra = [adapter, "algorithm.learning_rate=0.1"] if adapter else []
    keep_all = ["train.save_every=1", "train.keep_checkpoints=99", *extra]
    assert train(recipe, "plain", gate(99.0), *keep_all).code == 0
    plain, run = recipe.parent / "plain", recipe.parent / "run"
    seen = evaluations(plain)
    assert list(seen) == [2, 4, 6, 8, 10]
    best_of_all = min(seen, key=lambda p: seen[p][1])
    limit = max(kl for kl, _ in seen.values() if kl < seen[best_of_all][0])
    winner = min((p for p, (kl, _) in seen.items() if kl <= limit), key=lambda p: seen[p][1])
    assert winner != best_of_all and limit > 0  # the gate decides

    result = train(recipe, "run", gate(limit), *keep_all)
    assert result.code == 0, result.err
    assert f"the one after phase {winner} has the best policy/perplexity, {seen[winner][1]:.4g}" in result.err
    assert evaluations(run) == seen
    assert record(run)["best_phase"] == record(run, "evaluation")["best_phase"] == winner
    weights = "adapter_model.safetensors" if adapter else "model.safetensors"
    ours = (run / "policy" / weights).read_bytes()
    assert ours == (run / f"checkpoints/phase-{winner:06d}/policy" / weights).read_bytes()
    assert ours != (plain / "policy" / weights).read_bytes()
    assert record(run, "evaluation")["metrics"]["policy/perplexity"] == pytest.approx(seen[winner][1], rel=1e-12)
    assert not (run / "best").exists()


def test_the_last_policy_may_win(recipe: Path) -> None:
    """Fine-tuning lowers the perplexity to the end; every policy passes."""
    result = train(recipe, "run", gate(99.0))
    assert result.code == 0, result.err
    run = recipe.parent / "run"
    seen = evaluations(run)
    assert min(seen, key=lambda p: seen[p][1]) == 10 == record(run)["best_phase"]
    newest = run / "checkpoints/phase-000010/policy/model.safetensors"
    assert (run / "policy/model.safetensors").read_bytes() == newest.read_bytes()


def test_where_none_passes_the_last_is_kept_and_it_is_said(recipe: Path) -> None:
    result = train(recipe, "run", gate(1e-9, "score"))
    assert result.code == 0, result.err
    run = recipe.parent / "run"
    assert "no evaluated policy was within 1e-09 nats a token of the start; the result is the last one" in result.err
    assert record(run)["best_phase"] is None and not (run / "best").exists()
    newest = run / "checkpoints/phase-000010/policy/model.safetensors"
    assert (run / "policy/model.safetensors").read_bytes() == newest.read_bytes()


def test_the_policy_before_training_is_no_candidate(recipe: Path) -> None:
    """Its KL is 0 and its score no worse than any: it would win every time."""
    result = train(recipe, "run", gate(99.0, "score"))
    assert result.code == 0, result.err
    run = recipe.parent / "run"
    scores = {r["phases_done"]: r["evaluation/score"] for r in rows(run / "log_history.jsonl") if "phases_done" in r}
    trained = {p: s for p, s in scores.items() if p > 0}
    assert 0 in scores and record(run)["best_phase"] == max(trained, key=lambda p: trained[p])


# ---- killed ----------------------------------------------------------------------------------------------------------


class Killed(Exception):
    """Stands in for a process that is gone."""


def killed_at(monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    """Breaks a run off at a point that a signal would hit by luck only."""

    def at_checkpoint(*arguments: Any, state: LoopState, **options: Any) -> Any:
        if state.phase == 6:  # the evaluation is done, its winner written, and nothing of it checkpointed
            raise Killed
        return real_save(*arguments, state=state, **options)

    def while_writing(folder: Path, state: LoopState, policy: Any) -> None:
        if state.phase == 6:
            (folder / "best" / ".partial-phase-000006").mkdir(parents=True)
            raise Killed
        real_keep(folder, state, policy)

    def at_the_end(*arguments: Any) -> None:
        raise Killed

    real_save, real_keep = stage.save_checkpoint, stage.keep_best
    name, broken = {
        "before the checkpoint": ("save_checkpoint", at_checkpoint),
        "while the winner is written": ("keep_best", while_writing),
        "at the end": ("restore_best", at_the_end),
    }[where]
    monkeypatch.setattr(stage, name, broken)


@pytest.fixture
def limit(recipe: Path) -> float:
    """A gate that the policies of phases 2 to 6 pass, each with a better perplexity, and later ones do not."""
    assert train(recipe, "tried", gate(99.0)).code == 0
    seen = evaluations(recipe.parent / "tried")
    shutil.rmtree(recipe.parent / "tried")
    value = max(kl for phase, (kl, _) in seen.items() if phase <= 6)
    assert all(kl > value for phase, (kl, _) in seen.items() if phase > 6) and seen[2][1] > seen[4][1] > seen[6][1]
    return value


@pytest.mark.parametrize("where", ["before the checkpoint", "while the winner is written", "at the end"])
def test_a_killed_run_resumed_is_the_uninterrupted_run(
    recipe: Path, limit: float, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert train(recipe, "whole", gate(limit)).code == 0
    whole, run = recipe.parent / "whole", recipe.parent / "run"
    with monkeypatch.context() as patch:
        killed_at(patch, where)
        with pytest.raises(Killed):
            load = load_recipe(recipe, [gate(limit)])
            from alignlab.pipeline import run_recipe

            run_recipe(load, run, quiet=True)
    assert not (run / "stage.json").exists() and (run / "best").is_dir()
    if where == "before the checkpoint":
        assert {p.name for p in (run / "best").iterdir()} == {"phase-000002", "phase-000006"} or {
            p.name for p in (run / "best").iterdir()
        } == {"phase-000002", "phase-000004", "phase-000006"}
    result = train(recipe, "run", gate(limit), "--resume")
    assert result.code == 0, result.err
    assert record(run)["best_phase"] == record(whole)["best_phase"] == 6
    for folder in ("checkpoints", "policy"):
        assert files_of(run / folder) == files_of(whole / folder)
    assert logged(run) == logged(whole)
    for key in ("metrics", "scores", "diagnosis", "best_phase"):
        assert record(run, "evaluation")[key] == record(whole, "evaluation")[key]
    assert not (run / "best").exists()


def test_a_winner_that_is_damaged_is_not_taken(recipe: Path, limit: float, monkeypatch: pytest.MonkeyPatch) -> None:
    from alignlab.pipeline import run_recipe

    run = recipe.parent / "run"
    with monkeypatch.context() as patch:
        killed_at(patch, "at the end")
        with pytest.raises(Killed):
            run_recipe(load_recipe(recipe, [gate(limit)]), run, quiet=True)
    (file,) = (run / "best").glob("phase-000006/model.safetensors")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    result = train(recipe, "run", gate(limit), "--resume")
    assert result.code == 2 and "is damaged (its sha256 differs), so the best policy is lost" in result.errors[0]
    assert not (run / "policy").exists() and not (run / "stage.json").exists()


def test_a_full_disk_says_what_to_do(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(best, "seal", full)
    result = train(recipe, "run", gate(99.0))
    assert result.code == 2 and "cannot write the best policy" in result.errors[0] and "--resume" in result.errors[0]
    assert list((recipe.parent / "run" / "best").iterdir()) == []


# ---- what cannot work is said before training ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("evaluation.best={metric: score}", "evaluation.best.kl_per_token_limit: missing"),
        ("evaluation.best={kl_per_token_limit: 0}", "best.kl_per_token_limit: input should be greater"),
        ("evaluation.best={kl_per_token_limit: 1, metric: reward}", "best.metric: input should be 'perplexity'"),
        ("evaluation={every: 0, best: {kl_per_token_limit: 1}}", "set every to the phases between them"),
        ("evaluation={every: 1, greedy: true, best: {kl_per_token_limit: 1}}", "leave out greedy"),
        ("evaluation={every: 1, kl_to_start: false, best: {kl_per_token_limit: 1}}", "and kl_to_start: false"),
        ("evaluation={prompts_per_task: 0, perplexity: true}", "set prompts_per_task above 0"),
    ],
)  # fmt: skip
def test_settings_that_contradict_each_other(recipe: Path, override: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        load_recipe(recipe, [override])
    assert message in str(caught.value)


def test_a_reward_model_has_no_best_policy(recipe: Path) -> None:
    with pytest.raises(UserError, match=r"evaluation\.best and evaluation\.perplexity are of a policy"):
        load_recipe(recipe, ["algorithm={name: reward_model}"])


def test_debug_chooses_too(recipe: Path) -> None:
    assert load_recipe(recipe, [gate(0.1)], debug=True).stages[0].evaluation.every == 1


def test_data_without_demonstrations_have_no_perplexity(recipe: Path) -> None:
    write_rows(recipe.parent / "sums.jsonl", [{"prompt": row["prompt"]} for row in SUMS])
    grpo = "algorithm={name: grpo, prompts_per_phase: 2, group_size: 2}"
    result = train(recipe, "run", grpo, "reward={length: 1.0}")
    assert result.code == 2 and "evaluation: perplexity needs held-out demonstrations: " in result.errors[0]
    assert "evaluation.best.metric=score" in result.errors[0]
    ungraded = train(recipe, "other", grpo, "reward={length: 1.0}", gate(1.0, "score"), "evaluation.perplexity=false")
    assert ungraded.code == 2 and "best.metric=score has nothing to go by" in ungraded.errors[0]
