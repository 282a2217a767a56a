"""What is said about a run: silence on healthy logs, the right name for each planted illness, each said once."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from alignlab.algorithms.grpo import GRPO
from alignlab.algorithms.ppo import PPO
from alignlab.diagnosis import IDS, MEDIAN_OF, RULES, Diagnosis, DiagnosisLimits, diagnose, score_noise, summarise
from alignlab.errors import UserError
from alignlab.pipeline import run_recipe
from alignlab.recipe import load_recipe
from alignlab.rollout import Reward
from alignlab.tracking import HISTORY, read_jsonl
from alignlab.types import Completion, Prompt
from tests.algorithms.world import Recorder, Run, start_run
from tests.recorded import record
from tests.runs import RECIPES

DOCS = Path(__file__).parents[1] / "docs" / "diagnosis.md"
HEALTHY = sorted(path.stem for path in record.FOLDER.glob("*.json"))
Row = Mapping[str, Any]
PHASES = 20


def watch(rows: Iterable[Row], **limits: Any) -> list[Diagnosis]:
    """The diagnosis of each row, each with the memory that the one before left."""
    memory: Mapping[str, float] = {}
    seen = []
    for row in rows:
        numbers = {k: v for k, v in row.items() if k not in ("phase", "phases_done", "step")}
        seen.append(diagnose(numbers, memory, DiagnosisLimits(**limits), phase=row["phase"]))
        memory = seen[-1].memory
    return seen


def appeared(rows: Iterable[Row], **limits: Any) -> list[tuple[int, str]]:
    """(row, id) of every finding that appeared."""
    return [(i, f.id) for i, seen in enumerate(watch(rows, **limits)) for f in seen.appeared]


def phases(count: int = PHASES, **columns: float | Callable[[int], float]) -> list[dict[str, Any]]:
    """One row a phase; a column is a number or a function of the phase. `a__b` means `a/b`."""
    return [
        {"phase": p} | {k.replace("__", "/"): v(p) if callable(v) else v for k, v in columns.items()}
        for p in range(count)
    ]


def evaluation(phase: int, **metrics: float) -> dict[str, Any]:
    return {"phase": phase, "phases_done": phase} | {
        f"evaluation/{k.replace('__', '/')}": v for k, v in metrics.items()
    }


# ---- healthy runs ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", HEALTHY)
def test_nothing_but_notes_on_a_healthy_run(name: str) -> None:
    found = [f for seen in watch(record.read(name)) for f in seen.appeared]
    assert [f.id for f in found if f.severity != "note"] == []
    assert [f.id for f in found] == (["loss_near_zero"] if "grpo" in name else [])


def test_every_starter_method_has_a_healthy_log_and_it_is_no_empty_one() -> None:
    assert {"sft", "dpo", "ppo", "grpo", "reward_model"} <= {name.split("-")[0] for name in HEALTHY}
    for name in HEALTHY:
        rows = record.read(name)
        assert len(rows) > 15 and any("policy/grad_norm" in row or "reward_model/grad_norm" in row for row in rows)
        if name.startswith(("ppo", "grpo")):
            needed = {"policy/entropy", "reward/std"} | ({"policy/kl_standard_error"} if "ppo" in name else set())
            assert needed <= rows[-2].keys() | rows[-3].keys()
            assert sum("evaluation/score_standard_error" in row for row in rows) >= 3


@pytest.mark.parametrize("name", HEALTHY)
def test_healthy_logs_with_an_illness_planted_late(name: str) -> None:
    """The silence is not deafness: the same logs, their gradient norms a hundredfold in the last row that has any."""
    rows = record.read(name)
    last = max(i for i, row in enumerate(rows) if any(k.endswith("/grad_norm") for k in row))
    rows[last] = {k: 100 * v if k.endswith("/grad_norm") else v for k, v in rows[last].items()}
    assert (last, "gradient_spike") in appeared(rows)


# ---- illnesses -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """Rows of a run that falls ill, where it is noticed, and the same run just inside the limit."""

    id: str
    ill: Sequence[Row]
    row: int
    """The row in which the finding appears."""
    fine: Sequence[Row]
    says: str
    """Part of the sentence: the number that is unusual."""


def online(change: Callable[[int], Mapping[str, float]] = lambda p: {}, count: int = PHASES) -> list[dict[str, Any]]:
    """An online run without illness, one step a phase; a change replaces its metrics."""
    usual = {"reward/mean": 0.5, "reward/std": 0.4, "policy/entropy": 0.5, "policy/kl_per_sequence": 0.4,
             "policy/kl_per_token": 0.02, "policy/kl_standard_error": 0.1, "policy/ratio": 1.0, "loss/total": 0.3,
             "policy/clip_fraction": 0.0, "group/constant_fraction": 0.2, "group/distinct_fraction": 0.6,
             "completion/length": 20.0, "completion/stop_fraction": 0.9, "policy/grad_norm": 1.0,
             "value/explained_variance": 0.3, "reward_share/a": 0.5, "reward_share/b": 0.5}  # fmt: skip
    return [{"phase": p, **usual, **change(p)} for p in range(count)]


def from_phase(first: int, **changes: float) -> Callable[[int], Mapping[str, float]]:
    return lambda p: {k.replace("__", "/"): v for k, v in changes.items()} if p >= first else {}


def evaluated(*evaluations: tuple[float, float], rise: float, error: float | None = 0.03) -> list[dict[str, Any]]:
    """An online run of 8 phases before each evaluation after the first, (score, length) each; the reward rises."""
    rows: list[dict[str, Any]] = []
    last = 8 * (len(evaluations) - 1)
    for i, (score, length) in enumerate(evaluations):
        if i:
            rows += online(lambda p: {"reward/mean": 0.5 + rise * p / last}, last)[8 * (i - 1) : 8 * i]
        noise = {} if error is None else {"score_standard_error": error}
        rows.append(evaluation(max(0, 8 * i - 1), score=score, completion__length=length, **noise))
    return rows


def two_steps(share: float) -> list[dict[str, Any]]:
    """Two optimiser steps a phase; in the second one `share` of the tokens are clipped."""
    return [
        {"phase": p, "policy/clip_fraction": s, "policy/ratio": 1.0, "policy/grad_norm": 1.0}
        for p in range(8)
        for s in (0.0, share)
    ]


def without_steps(best: float, *stepless: int) -> list[dict[str, Any]]:
    """Rejection sampling in which some phases keep nothing; the best score of phase 4 is `best`, of the others 0."""
    rows = online(lambda p: {"ledger/completions": 8.0, "rejection/best_score": best if p == 4 else 0.0,
                             "rejection/kept_fraction": 0.0 if p in stepless else 0.1})  # fmt: skip
    return [{k: v for k, v in row.items() if k != "loss/total" or row["phase"] not in stepless} for row in rows]


CASES = [
    Case("not_finite", online(from_phase(7, policy__ratio=math.inf)), 7, online(), "policy/ratio is not a finite"),
    # 3 standard errors of .1, three phases in a row
    Case("negative_kl", online(from_phase(7, policy__kl_per_sequence=-0.31, policy__kl_per_token=-0.01)), 9,
         online(from_phase(7, policy__kl_per_sequence=-0.29, policy__kl_per_token=-0.01)), "-0.31 nats"),
    Case("kl_over_limit", online(from_phase(7, policy__kl_per_token=0.51)), 9,
         online(from_phase(7, policy__kl_per_token=0.5)), "0.51 nats a token away from the reference"),
    # .5 -> .05 from phase 10 on: the running mean is .5 (.8^n) + .05 (1 - .8^n): .1088 at n = 9, .0971 at n = 10
    Case("entropy_collapse", online(from_phase(10, policy__entropy=0.05), 30), 21,
         online(from_phase(10, policy__entropy=0.1), 60), "entropy fell from 0.5 to"),
    Case("constant_groups", online(from_phase(7, group__constant_fraction=0.8)), 9,
         online(from_phase(7, group__constant_fraction=0.79)), "80% of the groups"),
    Case("constant_reward", online(from_phase(7, reward__std=0.0)), 9, online(from_phase(7, reward__std=1e-3)),
         "earned 0.5"),
    # -20 -> -40 from phase 8 on: now = -20 - 20 (1 - .8^n) is below -30 from n = 4 on
    Case("chosen_falling", phases(policy__logprobs_chosen=lambda p: -20.0 - 20.0 * (p >= 8)), 13,
         phases(60, policy__logprobs_chosen=lambda p: -20.0 - 10.0 * (p >= 8)), "fell from -20 to"),
    # of phases 0, 1, 2; a phase is judged when the next begins
    Case("clip_fraction", two_steps(0.31), 6, two_steps(0.3), "31% of the tokens were clipped"),
    Case("ratio_off", online(from_phase(7, policy__ratio=1.11)), 9, online(from_phase(7, policy__ratio=0.91)),
         "sampling policy is 1.11"),
    Case("critic_explains_nothing", online(lambda p: {"value/explained_variance": -0.2}), 12,
         online(lambda p: {"value/explained_variance": -0.2 if p < 10 else 0.01}), "-0.20 after 12 phases"),
    Case("gradient_spike", online(lambda p: {"policy/grad_norm": 10.1 if p == 17 else 1.0}), 17,
         online(lambda p: {"policy/grad_norm": 10.0 if p == 17 else 1.0}), "10 times its median"),
    Case("cut_off", online(from_phase(7, completion__stop_fraction=0.49)), 9,
         online(from_phase(7, completion__stop_fraction=0.5)), "51% of the completions"),
    # 20 -> 40 from phase 8 on: now = 20 + 20 (1 - .8^n) is above 30 from n = 4 on
    Case("length_growth", online(from_phase(8, completion__length=40.0)), 13,
         online(from_phase(8, completion__length=30.0), 40)[:40], "grew from 20 to"),
    # two evaluations of 24 tokens instead of 16 and no better score: the second of them (row 8 + 1 + 8 + 1 - 1 = 18)
    Case("length_hack", evaluated((0.5, 16.0), (0.505, 24.0), (0.5, 26.0), rise=0.0), 18,
         evaluated((0.5, 16.0), (0.51, 24.0), (0.51, 26.0), rise=0.0), "grew from 16 to 26 tokens"),
    Case("reward_hack", evaluated((0.5, 16.0), (0.5, 16.0), (0.5, 16.0), (0.49, 16.0), rise=0.6), 27,
         evaluated((0.5, 16.0), (0.5, 16.0), (0.52, 16.0), (0.55, 16.0), rise=0.6), "the held-out score is 0.490"),
    Case("component_dominates", online(from_phase(7, reward_share__a=0.95, reward_share__b=0.05)), 9,
         online(from_phase(7, reward_share__a=0.9, reward_share__b=0.1)), "95% of the reward's variance"),
    Case("silent_reward", online(lambda p: {"reward_judged/a": 0.25 * (p < 7), "reward_judged/b": 1.0}), 9,
         online(lambda p: {"reward_judged/a": 0.25 * (p % 3 == 0), "reward_judged/b": 1.0}), "'a' judged no"),
    Case("no_step", without_steps(0.7, *range(7, PHASES)), 9, without_steps(0.7, 7, 8, 10, 11),
         "no optimiser step for 3 phases: nothing was kept (best score seen 0.7)"),
    # .6 -> 0 from phase 6 on: .6 (.8^n) is below .18 from n = 6 on
    Case("same_completions", online(from_phase(6, group__distinct_fraction=0.0), 20), 13,
         online(from_phase(6, group__distinct_fraction=0.2), 60), "among siblings fell from 0.60 to"),
    Case("little_variety", [evaluation(p, completion__distinct_2=d) for p, d in ((0, 0.5), (4, 0.14), (8, 0.14))], 2,
         [evaluation(p, completion__distinct_2=d) for p, d in ((0, 0.5), (4, 0.16), (8, 0.16))], "from 0.50 to 0.14"),
    Case("loss_near_zero", online(from_phase(2, loss__total=1e-9)), 2, online(from_phase(2, loss__total=0.021)),
         "which is normal"),
]  # fmt: skip


def test_a_loss_of_nothing_is_no_comfort_where_every_group_agrees() -> None:
    rows = online(from_phase(2, loss__total=1e-9, group__constant_fraction=1.0))
    assert "loss_near_zero" not in [f.id for seen in watch(rows) for f in seen.appeared]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_an_illness_is_named_when_it_is_certain(case: Case) -> None:
    seen = watch(case.ill)
    assert [(i, f.id) for i, s in enumerate(seen) for f in s.appeared if f.id == case.id] == [(case.row, case.id)]
    (finding,) = (f for f in seen[case.row].appeared if f.id == case.id)
    assert case.says in finding.sentence and "\n" not in finding.sentence
    assert finding.severity == next(rule.severity for rule in RULES if rule.id == case.id)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_just_inside_the_limit_nothing_is_said(case: Case) -> None:
    assert appeared(case.fine) == []


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_no_illness_is_taken_for_another(case: Case) -> None:
    """What else a planted illness may rightly show is listed here."""
    also = {"length_hack": {"reward_hack"}, "reward_hack": set[str]()}
    assert {name for _, name in appeared(case.ill)} <= {case.id} | also.get(case.id, set())


def test_every_finding_has_a_case_and_a_page() -> None:
    assert [case.id for case in CASES] == list(IDS) and len(set(IDS)) == len(IDS)
    described = re.findall(r"^### `(\w+)`", DOCS.read_text("utf-8"), re.MULTILINE)
    assert described == list(IDS)


def test_every_limit_is_described() -> None:
    text = DOCS.read_text("utf-8")
    for name, field_ in DiagnosisLimits.model_fields.items():
        assert f"`{name}`" in text and field_.description, name


# ---- single rules ----------------------------------------------------------------------------------------------------


def test_a_negative_kl_without_a_standard_error_is_judged_by_how_it_jumps() -> None:
    """Steps of ±.02 around -.5: half their mean square is .0008, so .028 the noise of one value. ±1 is noise itself."""
    steady = phases(12, policy__kl_per_sequence=lambda p: -0.5 + 0.02 * (-1) ** p, policy__kl_per_token=-0.02)
    assert appeared(steady) == [(7, "negative_kl")]  # known from the sixth phase on, and then three in a row
    wild = phases(40, policy__kl_per_sequence=lambda p: -0.5 + 1.0 * (-1) ** p, policy__kl_per_token=-0.02)
    assert appeared(wild) == []


def test_rounding_below_zero_is_no_negative_kl() -> None:
    """Policy and reference are the same model: -5e-4 nats a token however exactly that is known."""
    assert appeared(online(lambda p: {"policy/kl_per_sequence": -0.01, "policy/kl_per_token": -5e-4,
                                      "policy/kl_standard_error": 1e-6})) == []  # fmt: skip


def test_one_in_seven_hundred_does_not_stop_a_run() -> None:
    """A KL of 0 measured with noise, 3000 phases long: no three in a row are three standard errors below."""
    noise = np.random.default_rng(0).normal(size=3000)
    assert (noise < -3).any()
    kl = {"policy__kl_per_sequence": lambda p: 0.1 * noise[p], "policy__kl_per_token": lambda p: 0.01 * noise[p]}
    rows = phases(3000, **kl, policy__kl_standard_error=0.1)
    assert appeared(rows) == []


def test_evaluations_speak_where_training_has_no_kl_and_at_once() -> None:
    only = [evaluation(p, policy__kl_per_token=0.6, policy__kl_per_sequence=9.0) for p in (5, 10)]
    assert appeared(only) == [(0, "kl_over_limit")]
    assert "away from the start" in watch(only)[0].appeared[0].sentence
    assert appeared([*online(count=5), *only]) == []


def test_cut_off_before_training_is_what_training_is_for() -> None:
    before, after = evaluation(0, completion__stop_fraction=0.0), evaluation(9, completion__stop_fraction=0.2)
    assert appeared([before]) == [] and appeared([before, after]) == [(1, "cut_off")]


def test_a_score_that_fell_by_more_than_noise_needs_no_second_look() -> None:
    """.7 -> .6 with standard errors of .03 each: 2 * .042 = .085 is less; with .04 each, .113 is more."""
    rows = evaluated((0.7, 16.0), (0.6, 16.0), rise=1.0)
    assert appeared(rows) == [(9, "reward_hack")] and "below its best, 0.700" in watch(rows)[9].appeared[0].sentence
    assert appeared(evaluated((0.7, 16.0), (0.6, 16.0), rise=1.0, error=0.04)) == []
    assert appeared(evaluated((0.7, 16.0), (0.6, 16.0), rise=1.0, error=None)) == []


def test_a_reward_that_goes_on_while_the_score_falls_from_its_best() -> None:
    """Over-optimisation: the score first rose to .8, and .6 is still better than the start."""
    rows = evaluated((0.5, 16.0), (0.8, 16.0), (0.6, 16.0), rise=1.0)
    assert appeared(rows) == [(18, "reward_hack")]
    assert appeared(evaluated((0.5, 16.0), (0.8, 16.0), (0.75, 16.0), rise=1.0)) == []


@pytest.mark.parametrize("rise", [0.0, -1.0, 0.1])
def test_a_flat_score_under_a_flat_reward_is_no_hack(rise: float) -> None:
    assert appeared(evaluated((0.7, 16.0), (0.3, 16.0), (0.3, 16.0), rise=rise)) == []


def test_the_logprobs_of_an_online_method_are_of_other_completions_every_time() -> None:
    """They fall as completions grow; the desirable ones of KTO stay the same and are watched."""
    fall = {"policy__logprobs_desirable": lambda p: -20.0 - 20.0 * (p >= 8)}
    assert appeared(phases(**fall)) == [(13, "chosen_falling")]
    assert appeared(phases(**fall, completion__length=20.0)) == []


def test_a_single_component_cannot_dominate() -> None:
    assert appeared(phases(reward_share__a=1.0)) == []


def test_components_that_are_silent_in_turns_are_not_off() -> None:
    rows = online(lambda p: {f"reward_judged/{name}": float(i == p % 3) for i, name in enumerate("abc")})
    assert appeared(rows) == []


def test_a_phase_without_a_step_where_nothing_is_kept_or_rejected() -> None:
    """Of a method on groups, with the number of phases counted on; an evaluation between does not count."""
    rows = [{"phase": p, "ledger/completions": 8.0} for p in range(4)]
    rows.insert(2, evaluation(1, score=0.5))
    seen = watch(rows)
    assert [(i, f.id) for i, s in enumerate(seen) for f in s.appeared] == [(3, "no_step")]
    assert "no optimiser step for 3 phases: no group says which" in seen[3].findings[0].sentence
    assert "for 4 phases" in seen[4].findings[0].sentence


def test_a_spike_is_one_of_fifteen_norms_and_said_each_time() -> None:
    rows = online(lambda p: {"policy/grad_norm": 50.0 if p in (18, 25) else 1.0 + 0.1 * (p % 3)}, 40)
    assert appeared(rows) == [(18, "gradient_spike"), (25, "gradient_spike")]
    assert all(seen.cleared == () for seen in watch(rows))
    early = online(lambda p: {"policy/grad_norm": 50.0 if p == MEDIAN_OF - 1 else 1.0})
    assert appeared(early) == []
    assert appeared(online(lambda p: {"policy/grad_norm": 0.0 if p < 17 else 5.0})) == []  # nothing to compare with


def test_a_missing_or_infinite_number_is_nothing_to_judge_by() -> None:
    assert appeared(online(lambda p: {"policy/kl_per_token": math.nan, "policy/entropy": 0.5, "reward/std": math.nan,
                                      "value/explained_variance": math.nan})) == []  # fmt: skip
    assert appeared([{"phase": p} for p in range(9)]) == []


# ---- patience and memory ---------------------------------------------------------------------------------------------


def test_said_once_when_it_appears_and_once_when_it_is_over() -> None:
    rows = online(lambda p: {"group/constant_fraction": 1.0 if 5 <= p < 12 else 0.0}, 20)
    seen = watch(rows)
    assert [i for i, s in enumerate(seen) if s.appeared] == [7] and [i for i, s in enumerate(seen) if s.cleared] == [14]
    assert [i for i, s in enumerate(seen) if s.row()] == list(range(7, 12))  # the rows in which it holds
    assert seen[7].lines() == [f"warning: constant_groups: {seen[7].appeared[0].sentence}"]
    assert seen[14].lines() == ["over: constant_groups"] and seen[8].lines() == []
    assert seen[8].row()["diagnosis"][0].keys() == {"id", "severity", "sentence"}


def test_a_single_good_or_bad_phase_changes_nothing() -> None:
    now_and_then = online(lambda p: {"group/constant_fraction": 1.0 if p % 3 else 0.0}, 60)
    assert appeared(now_and_then) == []
    mostly = online(lambda p: {"group/constant_fraction": 0.0 if p % 5 == 4 else 1.0}, 60)
    assert appeared(mostly) == [(2, "constant_groups")]


@pytest.mark.parametrize("name", ["ppo", "grpo", "dpo"])
def test_what_a_resumed_run_remembers_is_what_an_uninterrupted_one_does(name: str) -> None:
    """Through JSON, at every phase; every number of the memory is finite."""
    rows = record.read(next(n for n in HEALTHY if n.startswith(name)))
    whole = watch(rows)
    for cut in range(1, len(rows)):
        memory = json.loads(json.dumps(dict(whole[cut - 1].memory), allow_nan=False))
        numbers = {k: v for k, v in rows[cut].items() if k not in ("phase", "phases_done")}
        assert diagnose(numbers, memory, DiagnosisLimits(), phase=rows[cut]["phase"]) == whole[cut]
    assert all(isinstance(v, float) for v in whole[-1].memory.values()) and len(whole[-1].memory) < 150


def test_diagnosing_is_pure() -> None:
    memory: dict[str, float] = {"phase": 3.0, "kl.count": 1.0, "kl.last": 0.2}
    before, row = dict(memory), online()[0]
    first, second = (diagnose(row, memory, DiagnosisLimits(), phase=4) for _ in range(2))
    assert memory == before and first == second and row == online()[0]


def test_the_summary_of_a_run() -> None:
    rows = online(lambda p: {"group/constant_fraction": 1.0 if 5 <= p < 12 else 0.0})
    log = [{**row, **seen.row()} for row, seen in zip(rows, watch(rows), strict=True)]
    (entry,) = summarise(log)
    assert entry["id"] == "constant_groups" and entry["severity"] == "warning" and "100% of" in entry["sentence"]
    assert (entry["first_phase"], entry["last_phase"], entry["rows"]) == (7, 11, 5)
    assert summarise(online()) == []


def test_the_noise_of_a_score_is_that_of_a_mean_of_task_means() -> None:
    """Task a: 0, 1, 1, 0 has variance 1/3 over 4 prompts; b: .2, .4 has .02 over 2: sqrt(1/12 + .01) / 2."""
    scores = {"1": 0.0, "2": 1.0, "3": 1.0, "4": 0.0, "5": 0.2, "6": 0.4}
    tasks = dict.fromkeys("1234", "a") | dict.fromkeys("56", "b")
    found = score_noise(scores, tasks)
    assert found == pytest.approx(math.sqrt(1 / 12 + 0.01) / 2, rel=1e-12)
    assert (
        score_noise({"1": 1.0, "2": 0.0, "3": 1.0}, {"1": "a", "2": "a", "3": "b"}) is None
        and score_noise({}, {}) is None
    )


# ---- limits ----------------------------------------------------------------------------------------------------------


def test_stop_on_ends_with_its_reason_and_ignore_is_silent() -> None:
    ill = online(from_phase(7, group__constant_fraction=0.9, completion__stop_fraction=0.1))
    seen = watch(ill, stop_on=["cut_off"])
    assert [f.severity for f in seen[9].appeared] == ["warning", "stop"]
    assert seen[9].stop_reason.startswith("cut_off: 90% of the completions") and seen[10].stop_reason == ""
    assert all(s.stop_reason == "" for s in watch(ill))
    assert appeared(ill, ignore="cut_off") == [(9, "constant_groups")]


@pytest.mark.parametrize("key", ["stop_on", "ignore"])
def test_an_unknown_finding_is_an_error(key: str) -> None:
    with pytest.raises(ValidationError, match=r"no finding 'reward_hak'; did you mean 'reward_hack'\?"):
        DiagnosisLimits(**{key: ["reward_hak"]})


def test_limits_are_keys_of_a_recipe(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("algorithm: grpo\ntrain: {diagnosis: {stop_on: reward_hack, kl_per_token: 0.1}}\n", "utf-8")
    limits = load_recipe(path).stages[0].train.diagnosis
    assert limits.stop_on == ("reward_hack",) and limits.kl_per_token == 0.1 and limits.patience == 3
    for bad, message in (
        (
            "stop_on: [kl_over_limits]",
            r"train\.diagnosis\.stop_on: no finding 'kl_over_limits'; did you mean 'kl_over_",
        ),
        ("entropy_shares: 0.1", r"train\.diagnosis\.entropy_shares: unknown key; did you mean 'entropy_share'\?"),
        ("patience: 0", r"train\.diagnosis\.patience: .*greater than or equal to 1"),
    ):
        path.write_text(f"algorithm: grpo\ntrain: {{diagnosis: {{{bad}}}}}\n", "utf-8")
        with pytest.raises(UserError, match=message):
            load_recipe(path)


# ---- in the loop -----------------------------------------------------------------------------------------------------


@dataclass
class Spoken(Recorder):
    """A recorder that also keeps what people are told."""

    title: str = "test"
    said: list[str] = field(default_factory=list)

    def say(self, line: str) -> None:
        self.said.append(line)


def same(prompts: Sequence[Prompt], completions: Sequence[Completion]) -> list[float | None]:
    return [1.0 for _ in completions]


def spoken(algorithm: Any, **changes: Any) -> Run:
    run = start_run(algorithm, **changes)
    run.recorder = Spoken()
    return run


ONLINE: list[Callable[[], Any]] = [
    lambda: GRPO(prompts_per_phase=3, group_size=3),
    lambda: PPO(prompts_per_phase=6, minibatches=2),
]
"""Methods in the small world, each two phases in a moment."""


@pytest.mark.parametrize("make", ONLINE, ids=["grpo", "ppo"])
def test_the_loop_logs_says_and_stops(make: Callable[[], Any]) -> None:
    run = spoken(make(), rewards=[Reward(name="same", function=same, weight=1.0)])
    run.go(
        9, limits=DiagnosisLimits(stop_on=["constant_reward"], ignore=["constant_groups", "loss_near_zero", "cut_off"])
    )
    assert run.state.phase == 3 and run.state.stop_reason.startswith("constant_reward: every completion of the phase")
    (row,) = (row for row in run.recorder.rows if "diagnosis" in row)
    assert row["phase"] == 2 and [f["id"] for f in row["diagnosis"]] == ["constant_reward"]
    assert isinstance(run.recorder, Spoken)
    assert run.recorder.said == [f"test, phase 2: stop: {run.state.stop_reason}"]
    assert run.state.diagnosis["phase"] == 2.0
    assert run.recorder.rows[-1] is row and run.recorder.phases == [1, 2, 3]  # the phase is finished, not its steps
    run.go(9, limits=DiagnosisLimits())
    assert run.state.phase == 3


def test_diagnosing_changes_no_weight() -> None:
    with_it, without = spoken(ONLINE[0]()), spoken(ONLINE[0]())
    with_it.go(3, limits=DiagnosisLimits(window=1, patience=1))
    without.go(3)
    for a, b in zip(with_it.models["policy"].parameters(), without.models["policy"].parameters(), strict=True):
        assert torch.equal(a, b)
    assert with_it.state.diagnosis and not without.state.diagnosis


def test_what_an_evaluation_adds_to_the_state_reaches_the_loop() -> None:
    """Whoever drives the loop may send the state back: its memory is kept, and a stop reason ends the run."""
    from dataclasses import replace

    from alignlab.train import train

    run = spoken(ONLINE[0]())
    loop = train(run.algorithm, run.models, run.optimizers, run.source, run.state, num_phases=9,
                 schedule=run.schedule, tracker=run.recorder, limits=DiagnosisLimits())  # type: ignore[arg-type]  # fmt: skip
    first = next(loop)
    second = loop.send(replace(first.state, diagnosis={**first.state.diagnosis, "best.score": 0.25}))
    assert second.state.diagnosis["best.score"] == 0.25 and second.state.phase == 2
    with pytest.raises(StopIteration):
        loop.send(replace(second.state, stop_reason="enough"))


# ---- a planted broken reward, for real -------------------------------------------------------------------------------


def longer(prompts: Sequence[Prompt], completions: Sequence[Completion]) -> list[float | None]:
    """Pays for every token, whatever it says."""
    return [len(c.token_ids) / 40 for c in completions]


FAST = ("algorithm.learning_rate=6e-4", "algorithm.kl_coef=0")
EXPLOITERS: list[tuple[str, tuple[str, ...]]] = [
    ("grpo", FAST),
    ("ppo", (*FAST, "algorithm.value_warmup_steps=2", "algorithm.epochs=2")),
]
"""Starter recipes of the methods that follow a reward, and what makes them do so quickly."""


@pytest.fixture(scope="module")
def sft(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("diagnosis") / "sft"
    run_recipe(load_recipe(RECIPES / "starter" / "sft.yaml", ["evaluation.prompts_per_task=0"]), folder, quiet=True)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(("method", "overrides"), EXPLOITERS, ids=[name for name, _ in EXPLOITERS])
def test_a_reward_that_pays_for_length_is_exploited_and_said(
    method: str, overrides: tuple[str, ...], sft: Path, tmp_path: Path
) -> None:
    """Length goes up, the held-out score down, and the log, stage.json and evaluation.json call it by its name."""
    recipe = load_recipe(
        RECIPES / "starter" / f"{method}.yaml",
        [f"start={sft}", "reward_model=null", "train.num_phases=10", "evaluation.every=10",
         "train.schedule.shape=constant", f"reward={{{__name__}:longer: 1.0}}", *overrides],
    )  # fmt: skip
    run_recipe(recipe, tmp_path / "run", quiet=True)
    log = read_jsonl(tmp_path / "run" / HISTORY)
    evaluations = [row for row in log if "phases_done" in row]
    assert evaluations[-1]["evaluation/completion/length"] > 1.3 * evaluations[0]["evaluation/completion/length"]
    assert evaluations[-1]["evaluation/score"] < evaluations[0]["evaluation/score"]
    said = {finding["id"] for row in log for finding in row.get("diagnosis", ())}
    assert said & {"reward_hack", "length_hack"}
    for name in ("stage", "evaluation"):
        summary = json.loads((tmp_path / "run" / f"{name}.json").read_text("utf-8"))["diagnosis"]
        assert {entry["id"] for entry in summary} == said
