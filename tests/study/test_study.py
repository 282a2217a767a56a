"""A study from plan to report: every number is in the per-prompt scores, nothing is done twice, a failure is shown."""

from __future__ import annotations

import html
import io
import json
import re
import shutil
import signal
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from filelock import FileLock
from rich.console import Console

from alignlab.errors import UserError
from alignlab.recipe import load_recipe
from alignlab.statistics.inference import EQUIVALENCE_CONFIDENCE, crossed_interval, prompt_interval, verdict
from alignlab.study import execute
from alignlab.study.cell import run_node
from alignlab.study.plan import Node, Study, load_study, nodes, plan_hash, teachers
from alignlab.study.report import headline, render_report, terminal_table, verdict_lines
from alignlab.study.results import collect_results, compare, graded_choice, trained_on
from tests.runs import (
    RECIPES,
    Finished,
    alignlab,
    rows,
    run_alignlab,
    shared_folder,
    small_model,
    start_alignlab,
    strict_json,
    write_rows,
)
from tests.tolerances import FLOAT64

ARMS, SEEDS = ("dpo", "ppo", "grpo"), (42, 123, 777)
TASKS = ("reasoning", "safety", "clinical", "code")
CELLS = [f"{arm}-{seed}" for seed in SEEDS for arm in ARMS]
LEDGER = {"prompts", "completions", "generated_tokens", "trained_rows", "trained_tokens", "optimizer_steps", "phases",
          "seconds", "peak_memory_bytes"}  # fmt: skip
EVALUATED = {"evaluation_completions", "evaluation_generated_tokens"}


# ---- the demo --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def demo() -> tuple[Path, Finished]:
    """`alignlab demo --debug` in a process of its own, as a user starts it; its folder, and what it said.

    Of several workers of one test run, the first makes it and the others wait.
    """
    folder, said = shared_folder() / "demo", shared_folder() / "demo.json"
    with FileLock(f"{folder}.lock"):
        if not said.is_file():
            done = run_alignlab("demo", "--debug", "--output", folder)
            said.write_text(json.dumps(asdict(done)), "utf-8")
    return folder, Finished(**json.loads(said.read_text("utf-8")))


def records(demo: tuple[Path, Finished], folder: Path) -> Path:
    """A copy of a study without its models."""
    for path in [*demo[0].glob("*.json"), *demo[0].glob("cells/*.json")]:
        copy = folder / path.relative_to(demo[0])
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, copy)
    return folder


@pytest.fixture(scope="module")
def results(demo: tuple[Path, Finished]) -> dict[str, Any]:
    folder, done = demo
    assert done.code == 0, done.out + done.err
    found = strict_json((folder / "results.json").read_text("utf-8"))
    assert isinstance(found, dict)
    return found


def arm_of(results: dict[str, Any], name: str) -> dict[str, Any]:
    (arm,) = [arm for arm in results["arms"] if arm["name"] == name]
    return dict(arm)


def test_the_terminal_ends_with_the_table_and_the_report(demo: tuple[Path, Finished]) -> None:
    folder, done = demo
    assert done.code == 0 and "Traceback" not in done.err
    lines = [line for line in done.out.splitlines() if line.strip()]
    assert lines[0].startswith("starter-four-ways: 3 methods x 3 seeds = 9 runs, 12 jobs")
    progress = [line.split()[0] for line in lines if re.search(r" finished in +\d+ s +\d+/12", line)]
    assert sorted(progress) == sorted(["start", "sft", "reward_model", *CELLS])
    after = lines[1 + len(progress) :]
    for label in ("untrained model", "SFT", "DPO", "PPO", "GRPO"):
        assert any(line.startswith(label) for line in after), label
    assert (
        re.sub(r"\s", "", lines[-1]) == f"report:{(folder / 'report.html').resolve()}"
        and (folder / "report.html").is_file()
    )


def test_the_results_are_complete(results: dict[str, Any]) -> None:
    assert [(arm["name"], arm["kind"]) for arm in results["arms"]] == [
        ("start", "baseline"), ("sft", "baseline"), *((name, "arm") for name in ARMS),
    ]  # fmt: skip
    prompts: set[frozenset[str]] = set()
    for arm in results["arms"]:
        assert [run["seed"] for run in arm["runs"]] == ([None] if arm["kind"] == "baseline" else list(SEEDS))
        for run in arm["runs"]:
            assert run["status"] == "finished" and run["error"] is None
            scores = run["scores"]["score"]
            prompts.add(frozenset(scores))
            assert len(scores) == 8 and all(0 <= value <= 1 for value in scores.values())
            assert sorted(run["tasks"].values()) == sorted(TASKS * 2) and run["tasks"].keys() == scores.keys()
            assert run["metrics"]["score"] == pytest.approx(np.mean(list(scores.values())))
            assert {f"{task}/score" for task in TASKS} <= run["metrics"].keys()
            assert run["ledger"].keys() == (EVALUATED if arm["name"] == "start" else LEDGER | EVALUATED)
            assert run["ledger"]["evaluation_completions"] == 8
            assert run["ledger"]["evaluation_generated_tokens"] == pytest.approx(
                8 * run["metrics"]["completion/length"]
            )
        if arm["kind"] == "arm":
            assert all("policy/kl_per_sequence" in run["metrics"] for run in arm["runs"])
    assert len(prompts) == 1  # all arms and seeds answered the same held-out prompts
    assert all("/test/" in name for name in next(iter(prompts)))
    plan = results["plan"]
    assert plan["seeds"] == list(SEEDS) and plan["tasks"] == list(TASKS) and plan["split"] == "test"
    assert (plan["prompts_per_task"], plan["samples_per_prompt"]) == (2, 1)  # what was done, not what the plan says
    assert plan["trained_on"] == {"reasoning": ["ppo", "grpo"], "code": ["ppo", "grpo"]}
    limit = load_recipe(RECIPES / "starter" / "sft.yaml").stages[0].data.max_completion_tokens
    assert plan["num_parameters"] > 10**6 and plan["max_completion_tokens"] == limit
    assert "--debug" in results["notes"][0] and results["environment"]["wall_seconds"] > 0
    shared = results["shared"]
    assert shared["reward_model"]["metrics"]["preference/accuracy"] >= 0
    assert shared["sft"]["ledger"].keys() == LEDGER | EVALUATED and shared["reward_model"]["ledger"].keys() == LEDGER


def test_learning_curves_come_from_the_logs_and_reach_the_end(
    demo: tuple[Path, Finished], results: dict[str, Any]
) -> None:
    for arm in ARMS:
        for run in arm_of(results, arm)["runs"]:
            log = rows(demo[0] / run["folder"] / "log_history.jsonl")
            ends = [row["evaluation/score"] for row in log if "evaluation/score" in row]
            assert run["curves"]["score"][-1] == [2, ends[-1]]
            expected = [[row["phase"] + 1, row["reward/mean"]] for row in log if "reward/mean" in row]
            assert run["curves"]["reward/mean"] == expected and (arm == "dpo") == (expected == [])


def matrix(results: dict[str, Any], arm: str, task: str | None) -> np.ndarray:
    """(seeds, prompts) scores as they stand in results.json."""
    runs = arm_of(results, arm)["runs"]
    names = sorted(name for name, of in runs[0]["tasks"].items() if task in (None, of))
    return np.array([[run["scores"]["score"][name] for name in names] for run in runs])


def test_every_comparison_is_recomputed_from_the_scores(results: dict[str, Any]) -> None:
    compared = {(c["arm"], c["against"], c["task"]) for c in results["comparisons"]}
    pairs = [*((arm, "sft") for arm in ARMS), ("sft", "start"), ("dpo", "ppo"), ("dpo", "grpo"), ("ppo", "grpo")]
    assert compared == {(*pair, task) for pair in pairs for task in (None, *TASKS)}
    for c in results["comparisons"]:
        differences = matrix(results, c["arm"], c["task"]) - matrix(results, c["against"], c["task"])
        assert differences.shape == (1 if c["arm"] == "sft" else 3, 2 if c["task"] else 8)
        np.testing.assert_allclose(c["mean"], differences.sum() / differences.size, **FLOAT64)
        single = differences.shape[0] == 1
        interval = prompt_interval(differences[0]) if single else crossed_interval(differences)
        np.testing.assert_allclose(
            [c["low"], c["high"], c["df"]], [interval.low, interval.high, interval.df], **FLOAT64
        )
        assert c["low"] <= c["mean"] <= c["high"] and c["confidence"] == 0.95 and c["note"] == interval.note
        by_seed = [float(row.sum() / row.size) for row in differences]
        np.testing.assert_allclose(list(c["per_seed"].values()), by_seed, **FLOAT64)
        assert list(c["per_seed"]) == (["None"] if single else [str(seed) for seed in SEEDS])
        assert c["every_seed_above"] == all(value > 0 for value in by_seed)
        expected = "better" if c["low"] > 0 else "worse" if c["high"] < 0 else "inconclusive"
        assert c["verdict"] == expected and c["primary"] == (c["task"] is None)
        assert ("effect" in c) == (c["arm"] in ARMS and c["against"] in ARMS)


def test_all_arms_share_one_start_and_one_reward_model(demo: tuple[Path, Finished], results: dict[str, Any]) -> None:
    shared = {name: entry["hash"] for name, entry in results["shared"].items()}
    assert all(re.fullmatch("[0-9a-f]{64}", key) for key in shared.values())
    keys = []
    for arm in ARMS:
        for run in arm_of(results, arm)["runs"]:
            assert run["hashes"]["start"] == shared["sft"]
            assert run["hashes"].get("reward_model") == (None if arm == "dpo" else shared["reward_model"])
            provenance = strict_json((demo[0] / run["folder"] / "provenance.json").read_text("utf-8"))
            assert provenance["start"] == shared["sft"] and provenance["seed"] == run["seed"]
            keys.append(run["hashes"]["key"])
    assert len(set(keys)) == 9
    folders = {p.name.rsplit("-", 1)[0] for p in (demo[0] / "shared").iterdir() if p.is_dir()}
    assert folders == {"starter-sft", "starter-reward-model", "reference"}  # each trained once


def test_the_report_shows_the_completions_escaped(demo: tuple[Path, Finished], results: dict[str, Any]) -> None:
    page = (demo[0] / "report.html").read_text("utf-8")
    texts = [c["text"] for s in results["samples"] for runs in s["completions"].values() for c in runs]
    assert {sample["task"] for sample in results["samples"]} == set(TASKS)
    assert any("<reasoning>" in text for text in texts)
    assert "<reasoning>" not in page and html.escape("<reasoning>") in page
    assert "http://" not in re.sub(r'xmlns(:\w+)?="[^"]*"', "", page) and "<script src" not in page
    assert "--debug study" in page


def test_a_restart_does_nothing_again(demo: tuple[Path, Finished], results: dict[str, Any], tmp_path: Path) -> None:
    folder = records(demo, tmp_path / "study")
    before = {p: p.stat().st_mtime_ns for p in (folder / "cells").rglob("*") if p.is_file()}
    result = alignlab("demo", "--debug", "--output", folder)
    assert result.code == 0, result.err
    skipped = [line.split()[0] for line in result.out.splitlines() if line.endswith("already finished")]
    assert sorted(skipped) == sorted(["start", "sft", "reward_model", *CELLS]) and " finished in " not in result.out
    assert {p: p.stat().st_mtime_ns for p in (folder / "cells").rglob("*") if p.is_file()} == before
    again = strict_json((folder / "results.json").read_text("utf-8"))
    assert {**again, "environment": None} == {**results, "environment": None}


@pytest.mark.parametrize(
    "command",
    [
        ("demo",),  # the same plan for real: cells of --debug must not be taken for it
        ("study", "recipes/studies/starter.yaml", "--debug", "seeds=[42, 123]"),
        ("study", "recipes/studies/starter.yaml", "--debug", "arms.dpo.set=[algorithm.beta=0.5]"),
    ],
)
def test_another_plan_in_the_same_folder_is_refused(demo: tuple[Path, Finished], command: tuple[str, ...]) -> None:
    before = (demo[0] / "results.json").read_bytes()
    result = alignlab(*command, "--output", demo[0])
    assert result.code == 2 and len(result.errors) == 1
    assert "another plan" in result.errors[0] and "another --output" in result.errors[0]
    assert (demo[0] / "results.json").read_bytes() == before


def test_a_cell_from_another_start_is_not_compared(demo: tuple[Path, Finished], tmp_path: Path) -> None:
    folder = records(demo, tmp_path / "study")
    cell = folder / "cells" / "dpo-42.json"
    cell.write_text(json.dumps({**strict_json(cell.read_text("utf-8")), "start": "0" * 64}), "utf-8")
    study = load_study(RECIPES / "studies" / "starter.yaml", debug=True)
    found = collect_results(study, folder, {}, 1.0)
    (bad, *good) = arm_of(found, "dpo")["runs"]
    assert bad["status"] == "failed" and "not the one the study shares" in bad["error"]
    assert all(run["status"] == "finished" for run in good)
    assert next(c for c in found["comparisons"] if c["arm"] == "dpo")["per_seed"].keys() == {"123", "777"}


# ---- a study of a second ---------------------------------------------------------------------------------------------

SUMS = [
    {"id": f"sum/{a}{b}", "task": "reasoning", "prompt": f"{a} + {b}", "answer": str(a + b), "completion": str(a + b),
     "chosen": str(a + b), "rejected": "many"}
    for a in range(6) for b in range(5)
]  # fmt: skip
BASE = """
data: {path: sums.jsonl, task: reasoning, max_completion_tokens: 8}
train: {num_phases: 2}
evaluation: {prompts_per_task: 2}
"""
PLAN = """
seeds: [1, 2]
start: sft.yaml
tasks: [reasoning]
evaluation: {split: validation, prompts_per_task: 3, samples: 2}
arms:
  good: {recipe: dpo.yaml, label: "<b>good</b>"}
  broken: {recipe: dpo.yaml, set: [data.max_prompt_tokens=1]}
"""


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a plan `study.yaml` of a tiny model, whose second arm must fail."""
    folder = tmp_path_factory.mktemp("small")
    write_rows(folder / "sums.jsonl", SUMS)
    model = small_model(folder / "model")
    (folder / "base.yaml").write_text(BASE, "utf-8")
    (folder / "sft.yaml").write_text(
        f"extends: base.yaml\nmodel: {model}\nalgorithm: {{name: sft, examples_per_step: 4}}\n", "utf-8"
    )
    (folder / "dpo.yaml").write_text(
        "extends: base.yaml\nstart: sft.yaml\nalgorithm: {name: dpo, pairs_per_step: 4, learning_rate: 1e-3}\n", "utf-8"
    )
    (folder / "study.yaml").write_text(PLAN, "utf-8")
    return folder


def test_a_failed_arm_is_shown_and_the_others_survive(small: Path) -> None:
    command = ("study", small / "study.yaml", "seeds=[1]", "--output", small / "out")
    result = alignlab(*command)
    assert result.code == 1 and "Traceback" not in result.out + result.err
    told = re.sub(r"\s+", " ", result.out)
    assert "none of" in told and "raise data.max_prompt_tokens" in told
    found = strict_json((small / "out" / "results.json").read_text("utf-8"))
    assert [run["status"] for run in arm_of(found, "good")["runs"]] == ["finished"]
    for run in arm_of(found, "broken")["runs"]:
        assert run["status"] == "failed" and "max_prompt_tokens" in run["error"] and "scores" not in run
    assert {c["arm"] for c in found["comparisons"]} == {"good", "sft"}
    assert sum("max_prompt_tokens" in note for note in found["notes"]) == 1
    page = (small / "out" / "report.html").read_text("utf-8")
    assert "failed" in page and "<b>good</b>" not in page and html.escape("<b>good</b>") in page
    assert not list((small / "out" / "cells").glob("*.traceback.txt"))  # the user's mistake, not ours

    again = alignlab(*command)
    assert again.code == 1 and again.out.count("already finished") == 3  # start, sft and the good cell
    assert len(re.findall(r"^ +broken-1 +failed: ", again.out, re.MULTILINE)) == 1  # what failed is tried again


@pytest.mark.slow
def test_a_study_that_is_ended_ends_its_jobs_and_goes_on(small: Path) -> None:
    """SIGTERM while jobs run: none of them is left, and the same command finishes the rest."""
    output = small / "ended"
    process = start_alignlab("study", small / "study.yaml", "--output", output)
    jobs: list[psutil.Process] = []
    deadline = time.monotonic() + 120
    while not jobs:
        assert process.poll() is None and time.monotonic() < deadline
        jobs = psutil.Process(process.pid).children()
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert not any(job.is_running() for job in jobs) and not (output / "results.json").exists()
    again = alignlab("study", small / "study.yaml", "--output", output)
    assert again.code == 1 and arm_of(strict_json((output / "results.json").read_text("utf-8")), "good")


RIVALS = """
seeds: [1, 2]
start: sft.yaml
tasks: [reasoning]
evaluation: {split: validation, prompts_per_task: 3, samples: 2}
arms:
  best: {recipe: rejection.yaml, best_of: 3, train: false, label: best of 3}
  rejection: {recipe: rejection.yaml}
  distill: {recipe: distill.yaml}
  both: {recipe: rejection.yaml, best_of: 2}
"""


@pytest.fixture(scope="module")
def rivals(small: Path) -> tuple[Study, Path, dict[str, Any]]:
    """A study with a teacher and an untrained arm, its jobs run one after the other in this process."""
    for name, rest in {
        "rejection": "reward: {repetition: 1.0}\n"
        "algorithm: {name: rejection, prompts_per_phase: 4, group_size: 4, learning_rate: 1e-3}\n",
        "distill": "teacher: dpo.yaml\nalgorithm: {name: distill, prompts_per_phase: 4, learning_rate: 1e-3}\n",
    }.items():
        (small / f"{name}.yaml").write_text(f"extends: base.yaml\nstart: sft.yaml\n{rest}", "utf-8")
    (small / "rivals.yaml").write_text(RIVALS, "utf-8")
    study, folder = load_study(small / "rivals.yaml"), small / "rivals"
    for node in nodes(study):
        run_node(study, node, folder)
    return study, folder, collect_results(study, folder, {}, 1.0)


def test_an_untrained_arm_is_the_shared_policy_sampled_more_often(
    rivals: tuple[Study, Path, dict[str, Any]],
) -> None:
    """Nothing is trained or counted as training; every answer costs three completions, and the choice is by reward."""
    _, folder, found = rivals
    (run,) = arm_of(found, "best")["runs"]
    (sft,) = arm_of(found, "sft")["runs"]
    assert run["seed"] is None and run["hashes"]["key"] == run["hashes"]["start"] == sft["hashes"]["key"]
    training = {k: v for k, v in run["ledger"].items() if k not in EVALUATED | {"peak_memory_bytes"}}
    assert training.keys() == LEDGER - {"peak_memory_bytes"} and not any(training.values())
    assert run["ledger"]["evaluation_completions"] == 3 * sft["ledger"]["evaluation_completions"]
    assert run["ledger"]["evaluation_generated_tokens"] > 2 * sft["ledger"]["evaluation_generated_tokens"]
    assert run["metrics"]["inference/candidates"] == 3 and run["metrics"]["inference/reward_gain"] >= 0
    assert run["curves"] == {} and "policy/kl_per_sequence" not in run["metrics"]
    assert not (folder / "cells" / "best").exists() and run["parameters"] == sft["parameters"]
    assert (
        run["metrics"]["inference/reward"]
        >= run["metrics"]["inference/reward"] - run["metrics"]["inference/reward_gain"]
    )


def test_a_trained_arm_may_choose_as_well(rivals: tuple[Study, Path, dict[str, Any]]) -> None:
    """The same weights as without: only the answers of the evaluation are others, and cost more."""
    _, folder, found = rivals
    for plain, chosen in zip(arm_of(found, "rejection")["runs"], arm_of(found, "both")["runs"], strict=True):
        policies = [(folder / run["folder"] / "policy" / "model.safetensors").read_bytes() for run in (plain, chosen)]
        assert policies[0] == policies[1]
        assert plain["ledger"]["completions"] == chosen["ledger"]["completions"] > 0
        assert chosen["ledger"]["evaluation_completions"] == 2 * plain["ledger"]["evaluation_completions"]
        assert chosen["metrics"]["policy/kl_per_sequence"] == plain["metrics"]["policy/kl_per_sequence"]


def test_a_teacher_is_trained_once_and_stands_with_what_is_shared(
    rivals: tuple[Study, Path, dict[str, Any]],
) -> None:
    study, folder, found = rivals
    assert teachers(study) == {"teacher": str(Path(study.start).with_name("dpo.yaml"))}
    teacher = found["shared"]["teacher"]
    assert teacher["ledger"].keys() == LEDGER and teacher["ledger"]["optimizer_steps"] == 2
    runs = arm_of(found, "distill")["runs"]
    assert [run["hashes"]["teacher"] for run in runs] == [teacher["hash"]] * 2
    assert len(list((folder / "shared").glob("dpo-*/stage.json"))) == 1
    cell = folder / "cells" / "distill-1.json"
    before = cell.read_text("utf-8")
    cell.write_text(json.dumps({**strict_json(before), "teacher": "0" * 64}), "utf-8")
    other = arm_of(collect_results(study, folder, {}, 1.0), "distill")["runs"][0]
    cell.write_text(before, "utf-8")
    assert other["status"] == "failed" and "its teacher is not the one the study shares" in other["error"]


def test_the_report_says_what_choosing_costs(rivals: tuple[Study, Path, dict[str, Any]]) -> None:
    _, _, found = rivals
    (note,) = [note for note in found["notes"] if note.startswith("best of 3")]
    assert "3 times the tokens" in note and "pass@" not in note
    assert found["plan"]["trained_on"] == {}
    page = render_report(found)
    assert " sampled</small>" in page and "An answer costs 3 times the tokens" in page and "of 2 runs" not in page
    assert "One seed only" not in headline(found)
    lines = [str(line) for line in verdict_lines(found)]
    assert any("best of 3" in line and "no training seed varies" in line for line in lines)
    assert all(len(line) <= 80 for line in _table(found).splitlines())


def _table(found: dict[str, Any]) -> str:
    stream = io.StringIO()
    Console(file=stream, width=80).print(terminal_table(found))
    return stream.getvalue()


@pytest.mark.slow
def test_the_study_of_rivals_runs(tmp_path: Path) -> None:
    done = run_alignlab("study", RECIPES / "studies" / "rivals.yaml", "--debug", "--output", tmp_path / "out")
    assert done.code == 0, done.out + done.err
    assert "5 methods, 3 seeds of each that is trained: 11 runs, 15 jobs" in done.out
    found = strict_json((tmp_path / "out" / "results.json").read_text("utf-8"))
    for name in ("best_of_8", "best_of_8_learned"):
        (run,) = arm_of(found, name)["runs"]
        assert run["status"] == "finished" and run["hashes"]["reward_model"] == found["shared"]["reward_model"]["hash"]
        assert run["metrics"]["inference/candidates"] == 8
    notes = {note.split(":")[0]: note for note in found["notes"]}
    assert "pass@8" in notes["best of 8"] and "pass@8" not in notes["best of 8 (reward model)"]
    compared = {(c["arm"], c["against"]) for c in found["comparisons"]}
    assert {("best_of_8", "sft"), ("best_of_8", "grpo"), ("rejection", "distill"), ("distill", "grpo")} <= compared


# ---- the plan --------------------------------------------------------------------------------------------------------


def plan_error(small: Path, *overrides: str) -> str:
    with pytest.raises(UserError) as found:
        load_study(small / "study.yaml", overrides)
    return str(found.value)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (("sedes=[1]", "arms.good.lable=x"), ("sedes", "did you mean 'seeds'?", "did you mean 'label'?")),
        (("seeds=[1, 1]",), ("the same seed twice",)),
        (("seeds=[]",), ("seeds",)),
        (("arms={}",), ("arms",)),
        (("arms={sft: dpo.yaml}",), ("sft", "name of a baseline")),
        (("arms={a/b: dpo.yaml}",), ("'a/b'", "cannot be a folder name")),
        (("name=../../elsewhere",), ("cannot be a folder name",)),
        (("arms.good.recipe=nowhere.yaml",), ("'nowhere.yaml'",)),
        (("arms.good.set=[algorithm.betta=1]",), ("algorithm.betta", "did you mean 'beta'?")),
        (("arms.good.set=[start=null]",), ("arm good starts from None", "not from the shared")),
        (("arms={rl: rl.yaml}",), ("arm rl uses", "not the shared None")),
        (("tasks=[resoning]",), ("'resoning'", "did you mean 'reasoning'?")),
        (("evaluation.prompts_per_task=1",), ("evaluation.prompts_per_task", "2")),
        (("equivalence_margin=0",), ("equivalence_margin",)),
        (("arms={teacher: dpo.yaml}",), ("teacher", "name of a shared stage")),
        (("arms.good.train=false",), ("arms.good", "train: false without best_of is the shared policy itself")),
        (("arms.good.best_of=0",), ("arms.good.best_of",)),
        (
            ("arms.good.best_of=2", "arms.good.set=[data.task=safety, evaluation.prompts_per_task=0]"),
            ("`learned` needs `reward_model",),
        ),
        (
            ("arms={own: {recipe: own.yaml, train: false, best_of: 2}}",),
            ("arm own is not trained", "no judge of its own"),
        ),
    ],
)
def test_a_bad_plan_is_refused_before_anything_runs(
    small: Path, overrides: tuple[str, ...], said: tuple[str, ...]
) -> None:
    (small / "judge.yaml").write_text("extends: base.yaml\nstart: sft.yaml\nalgorithm: reward_model\n", "utf-8")
    (small / "rl.yaml").write_text(
        "extends: base.yaml\nstart: sft.yaml\nreward_model: judge.yaml\nreward: {learned: 1}\nalgorithm: grpo\n",
        "utf-8",
    )
    (small / "own.yaml").write_text(
        "extends: base.yaml\nstages:\n- {name: judge, start: sft.yaml, algorithm: reward_model}\n"
        "- {name: rl, start: sft.yaml, reward_model: judge, reward: {learned: 1}, algorithm: grpo}\n",
        "utf-8",
    )
    message = plan_error(small, *overrides)
    for part in said:
        assert part in message, message


def test_a_recipe_is_no_study_in_one_line() -> None:
    with pytest.raises(UserError, match=r"^.*sft.yaml: this is a recipe, not a study.* alignlab train .*sft.yaml$"):
        load_study(RECIPES / "starter" / "sft.yaml")


def test_nodes_wait_for_what_they_need() -> None:
    found = nodes(load_study(RECIPES / "studies" / "starter.yaml"))
    assert [node.name for node in found] == ["start", "sft", "reward_model", *CELLS]
    needs = {node.name: node.needs for node in found}
    assert needs["start"] == needs["sft"] == () and needs["reward_model"] == ("sft",)
    assert needs["dpo-42"] == ("sft",) and needs["ppo-42"] == needs["grpo-777"] == ("sft", "reward_model")
    place = {node.name: i for i, node in enumerate(found)}
    assert all(place[needed] < place[node.name] for node in found for needed in node.needs)


def test_an_untrained_arm_has_one_node_and_a_teacher_one_for_all() -> None:
    study = load_study(RECIPES / "studies" / "rivals.yaml")
    found = {node.name: node for node in nodes(study)}
    assert found["teacher"].kind == "teacher" and found["teacher"].needs == ("sft", "reward_model")
    for name in ("best_of_8", "best_of_8_learned"):
        assert found[name].seed is None and found[name].needs == ("sft", "reward_model")
    assert found["distill-123"].needs == ("sft", "reward_model", "teacher") and found["rejection-42"].seed == 42
    assert len(found) == len(nodes(study)) == 4 + 2 + 3 * 3
    order = list(found)
    assert all(order.index(needed) < order.index(node.name) for node in found.values() for needed in node.needs)
    assert teachers(study) == {"teacher": str(RECIPES / "starter" / "grpo.yaml")}


def test_a_plan_is_known_by_everything_but_its_workers(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also by the recipe of the shared start, in which the plan names a file only, and by the code."""
    same, study = load_study(small / "study.yaml", ("workers=1",)), load_study(small / "study.yaml")
    assert plan_hash(same) == plan_hash(study) and same.workers != study.workers
    hashes = {
        "plan": plan_hash(study),
        "seeds": plan_hash(load_study(small / "study.yaml", ("seeds=[1, 3]",))),
        "arm": plan_hash(load_study(small / "study.yaml", ("arms.good.set=[algorithm.beta=0.3]",))),
        "debug": plan_hash(load_study(small / "study.yaml", debug=True)),
    }
    before = (small / "sft.yaml").read_text("utf-8")
    (small / "sft.yaml").write_text(before + "seed: 9\n", "utf-8")
    hashes["start"] = plan_hash(load_study(small / "study.yaml"))
    (small / "sft.yaml").write_text(before, "utf-8")
    monkeypatch.setattr("alignlab.study.plan.code_fingerprint", lambda: "other code")
    hashes["code"] = plan_hash(study)
    assert len(set(hashes.values())) == len(hashes)


def test_debug_asks_little_and_says_so(small: Path) -> None:
    study = load_study(small / "study.yaml", debug=True)
    assert study.debug and (study.evaluation.prompts_per_task, study.evaluation.samples) == (2, 1)
    assert load_study(small / "study.yaml").evaluation.prompts_per_task == 3
    assert Study.model_validate(study.model_dump(mode="json")) == study  # what the jobs read


def test_what_an_arm_was_trained_on_is_found_in_its_reward(tmp_path: Path) -> None:
    """Named, by default, by weight 0, on another task, and where a method does not use rewards at all."""
    data = "data: {task: [reasoning, code, safety]}\nstart: sft.yaml\n"
    recipes = {
        "sft": "data: {task: [reasoning, code, safety]}\nalgorithm: sft\n",
        "judge": f"{data}algorithm: reward_model\n",
        "named": f"{data}algorithm: grpo\nreward: {{exact: 1.0}}\n",
        "default": f"{data}reward_model: judge.yaml\nalgorithm: ppo\n",
        "weightless": f"{data}algorithm: grpo\nreward: {{exact: 0.0, code: {{weight: 1, tasks: code}}}}\n",
        "elsewhere": f"{data}algorithm: grpo\nreward: {{exact: {{weight: 1.0, tasks: gsm8k}}, format: 1}}\n",
        "pairs": f"{data}algorithm: dpo\nreward: {{exact: 1.0}}\n",
        "pupil": f"{data}algorithm: distill\nteacher: weightless.yaml\nreward: {{exact: 1.0}}\n",
        "grandpupil": f"{data}algorithm: distill\nteacher: pupil.yaml\n",
        "of_pairs": f"{data}algorithm: distill\nteacher: pairs.yaml\n",
    }
    for name, text in recipes.items():
        (tmp_path / f"{name}.yaml").write_text(text, "utf-8")
    arms = "".join(f"  {name}: {name}.yaml\n" for name in recipes if name not in ("sft", "judge"))
    path = tmp_path / "study.yaml"
    arms += "  chosen: {recipe: named.yaml, best_of: 3, train: false}\n"
    arms += "  chosen_learned: {recipe: default.yaml, best_of: 3, train: false, set: ['reward={learned: 1}']}\n"
    arms += "  chosen_pairs: {recipe: pairs.yaml, best_of: 3}\n"
    path.write_text(f"start: sft.yaml\nreward_model: judge.yaml\narms:\n{arms}", "utf-8")
    study = load_study(path)
    assert trained_on(study) == {
        "reasoning": ["named", "default", "chosen", "chosen_pairs"],
        "code": ["default", "weightless", "pupil", "grandpupil"],
    }
    assert graded_choice(study, "chosen") == ["reasoning"] and graded_choice(study, "chosen_learned") == []
    assert graded_choice(study, "named") == []


# ---- comparisons and words -------------------------------------------------------------------------------------------


def hand_made(name: str, kind: str, scores: dict[int | None, list[float]]) -> dict[str, Any]:
    tasks = {"a": "x", "b": "x", "c": "y", "d": "y"}
    runs = [
        {"seed": s, "status": "finished", "scores": {"score": dict(zip(tasks, row, strict=True))}, "tasks": tasks}
        for s, row in scores.items()
    ]
    return {"name": name, "kind": kind, "runs": [*runs, {"seed": 99, "status": "failed"}]}


def test_arms_are_paired_by_the_seeds_both_finished(small: Path) -> None:
    """Arm: seeds 1, 2, 3; other: 2, 3, 4. Compared: seeds 2 and 3, in this order, on the prompts of the task."""
    study = load_study(small / "study.yaml")
    first = hand_made("f", "arm", {1: [1, 1, 1, 1], 2: [0.5, 0.75, 0.0, 1.0], 3: [0.25, 0.5, 0.25, 0.5]})
    second = hand_made("s", "arm", {2: [0.25, 0.25, 0.5, 0.0], 3: [0.0, 0.5, 0.75, 0.5], 4: [0, 0, 0, 0]})
    found = compare(study, first, second, "x")
    assert found is not None and found["per_seed"] == {"2": 0.375, "3": 0.125} and found["mean"] == 0.25
    interval = crossed_interval([[0.25, 0.5], [0.25, 0.0]])
    assert (found["low"], found["high"]) == (interval.low, interval.high) and found["every_seed_above"]
    assert found["effect"]["d"] is not None
    assert compare(study, first, hand_made("n", "arm", {}), None) is None
    assert compare(study, first, hand_made("o", "arm", {7: [0, 0, 0, 0]}), None) is None


def test_one_run_stands_against_every_seed(small: Path) -> None:
    study = load_study(small / "study.yaml", ("equivalence_margin=0.9",))
    sft = hand_made("sft", "baseline", {None: [0.5, 0.5, 0.0, 0.0]})
    arm = hand_made("f", "arm", {1: [1.0, 0.5, 0.5, 0.0], 2: [0.5, 0.5, 0.0, 0.0]})
    found = compare(study, arm, sft, None)
    assert found is not None and found["per_seed"] == {"1": 0.25, "2": 0.0} and not found["every_seed_above"]
    assert "effect" not in found
    narrow = crossed_interval([[0.5, 0, 0.5, 0], [0, 0, 0, 0]], EQUIVALENCE_CONFIDENCE)
    wide = crossed_interval([[0.5, 0, 0.5, 0], [0, 0, 0, 0]])
    assert found["verdict"] == verdict(wide, 0.9, narrow)


def test_an_untrained_arm_varies_with_no_seed(small: Path) -> None:
    """One run against three seeds of the other, in both directions; against the shared policy, over prompts, with words
    that promise nothing about seeds; no effect size anywhere."""
    study = load_study(small / "study.yaml", ("equivalence_margin=0.9",))
    best = {**hand_made("best", "arm", {None: [1.0, 0.5, 1.0, 0.0]}), "trained": False}
    sft = hand_made("sft", "baseline", {None: [0.5, 0.5, 0.0, 0.0]})
    arm = hand_made("f", "arm", {1: [1.0, 0.5, 0.5, 0.0], 2: [0.5, 0.5, 0.0, 0.0], 3: [0.0, 0.5, 0.0, 0.0]})
    forth, back = compare(study, arm, best, None), compare(study, best, arm, None)
    assert forth is not None and back is not None
    assert forth["per_seed"] == {"1": -0.125, "2": -0.375, "3": -0.5}
    assert back["per_seed"] == {"1": 0.125, "2": 0.375, "3": 0.5} and back["every_seed_above"]
    rows = [[0, 0, -0.5, 0], [-0.5, 0, -1, 0], [-1, 0, -1, 0]]
    interval = crossed_interval(rows)
    assert (forth["low"], forth["high"], forth["df"]) == (interval.low, interval.high, interval.df)
    assert (back["low"], back["high"]) == pytest.approx((-interval.high, -interval.low))
    assert forth["note"] == back["note"] == interval.note
    shared = compare(study, best, sft, None)
    assert shared is not None and list(shared["per_seed"].values()) == [0.375]
    over_prompts = prompt_interval([0.5, 0, 1.0, 0])
    assert (shared["low"], shared["high"]) == (over_prompts.low, over_prompts.high)
    assert shared["note"].startswith("not trained: no training seed varies") and "another seed" not in shared["note"]
    both = compare(study, best, {**best, "name": "other"}, None)
    assert both is not None and both["mean"] == 0 and both["note"].startswith("not trained")
    one_seed = compare(study, hand_made("f", "arm", {1: [1.0, 0.5, 0.5, 0.0]}), best, None)
    assert one_seed is not None and "another seed" in one_seed["note"]
    baseline = compare(study, sft, hand_made("start", "baseline", {None: [0.0] * 4}), None)
    assert baseline is not None and "another seed" in baseline["note"]
    assert not any("effect" in found for found in (forth, back, shared, both, one_seed, baseline))


def test_an_error_with_brackets_is_told_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    job = execute._Running(Node("dpo-1", "cell"), None, tmp_path, time.monotonic())  # type: ignore[arg-type]
    execute._tell(Console(file=stream, width=200), job, "no [/reasoning] in [red]text[/red]", 1, 2, 10.0)
    assert "failed: no [/reasoning] in [red]text[/red]" in stream.getvalue()
