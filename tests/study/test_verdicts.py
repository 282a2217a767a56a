"""What the words say, case by case: results with chosen verdicts -> headline and lines."""

from __future__ import annotations

from typing import Any

import pytest

from alignlab.study.verdicts import VerdictLine, headline, verdict_lines

from .fake_results import TASKS, bare, failed, fake_results

Results = dict[str, Any]
MEANS = {"better": 0.10, "worse": -0.10, "equivalent": 0.005, "inconclusive": 0.02}


def study(pairs: dict[tuple[str, str], str] | None = None, **arms: str | dict[str, str]) -> Results:
    """Results in which arms have these verdicts against SFT: one word for all tasks, or a word a task and `all`."""
    results = fake_results()
    results["arms"] = [arm for arm in results["arms"] if arm["kind"] == "baseline" or arm["name"] in arms]
    results["comparisons"] = []
    for rank, (name, given) in enumerate(arms.items()):
        words = dict.fromkeys(("all", *TASKS), given) if isinstance(given, str) else given
        for task in ("all", *TASKS):
            word = words.get(task, words["all"])
            results["comparisons"].append(row(name, "sft", None if task == "all" else task, word, -0.01 * rank))
    for (arm, against), word in (pairs or {}).items():
        results["comparisons"].append(row(arm, against, None, word, 0.0))
    for arm in results["arms"]:  # equal lengths: nothing to remark
        for run in arm["runs"]:
            run["metrics"]["completion/length"] = 40.0
    return results


def row(arm: str, against: str, task: str | None, word: str, shift: float) -> dict[str, Any]:
    mean = MEANS[word] + shift
    seeds = {"42": mean + 0.01, "123": mean, "777": mean - 0.01}
    limits = {"low": mean - 0.015, "high": mean + 0.015}
    numbers = {"mean": mean, **limits, "every_seed_above": all(v > 0 for v in seeds.values()), "per_seed": seeds}
    return {"arm": arm, "against": against, "metric": "score", "task": task, "verdict": word, "note": "", **numbers}


def plain(line: VerdictLine) -> VerdictLine:
    """The line with ordinary spaces."""
    text, detail = (part.replace("\N{NO-BREAK SPACE}", " ") for part in (line.text, line.detail))
    return VerdictLine(label=line.label, tone=line.tone, text=text, detail=detail)


MIXED = {"all": "inconclusive", "reasoning": "worse", "safety": "better"}


@pytest.mark.parametrize(
    ("results", "expected"),
    [
        (study(grpo="better", ppo="better"), "GRPO and PPO beat SFT"),
        (
            study({("grpo", "ppo"): "inconclusive"}, grpo="better", ppo="better"),
            "GRPO and PPO beat SFT; which of the two is better is still open",
        ),
        (
            study({("ppo", "grpo"): "worse"}, grpo="better", ppo="better"),
            "GRPO and PPO beat SFT; GRPO beats PPO too",
        ),
        (
            study({("ppo", "grpo"): "equivalent"}, grpo="better", ppo="better"),
            "GRPO and PPO beat SFT; GRPO and PPO are equivalent",
        ),
        (
            study({("ppo", "grpo"): "inconclusive"}, grpo="better", ppo="better", dpo="better"),
            "GRPO, PPO and DPO beat SFT; GRPO against PPO is still open",
        ),
        (
            study(grpo="better", dpo=MIXED),
            "GRPO beats SFT; DPO helps on safety and hurts on reasoning",
        ),
        (
            study(grpo="better", dpo={"all": "better", "reasoning": "worse"}),
            "GRPO and DPO beat SFT overall; DPO hurts on reasoning",
        ),
        (
            study(dpo=MIXED, ppo=MIXED),
            "No method is shown to beat SFT; DPO and PPO help on some tasks and hurt on others",
        ),
        (study(grpo="better", dpo="worse"), "GRPO beats SFT; DPO is worse than it"),
        (study(grpo="better", dpo="inconclusive"), "GRPO beats SFT; for DPO that is still open"),
        (study(grpo="better", dpo="equivalent"), "GRPO beats SFT; DPO is equivalent to it"),
        (study(grpo="inconclusive"), "No method is shown to beat SFT; for GRPO that is still open"),
        (study(dpo="worse", ppo="worse"), "No method is shown to beat SFT; DPO and PPO are worse than it"),
    ],
)
def test_headline(results: Results, expected: str) -> None:
    assert headline(results) == expected


def test_headline_of_studies_that_went_wrong() -> None:
    results = study(grpo="better", ppo="better")
    for run in results["arms"][2]["runs"]:
        run["status"] = "failed"
    results["comparisons"] = [c for c in results["comparisons"] if c["arm"] != results["arms"][2]["name"]]
    assert headline(results) == "GRPO beats SFT; PPO failed"
    results["comparisons"] = []
    assert headline(results) == "No method could be compared with SFT"
    for run in results["arms"][3]["runs"]:
        run["status"] = "failed"
    assert headline(results) == "No method finished: there is nothing to compare"


def test_headline_says_when_there_is_only_one_seed() -> None:
    assert headline(bare()).startswith("One seed only: ")


def test_a_better_arm() -> None:
    (line,) = verdict_lines(study(grpo="better"))
    assert plain(line) == VerdictLine(
        label="BETTER",
        tone="good",
        text="GRPO than SFT: +10.0 points [8.5, 11.5]",
        detail="better on every task; every seed above SFT",
    )


def test_a_mixed_arm_names_its_tasks_and_says_what_happens_overall() -> None:
    (line,) = verdict_lines(study(dpo=MIXED))
    assert plain(line) == VerdictLine(
        label="MIXED",
        tone="bad",
        text="DPO against SFT: better on safety +10.0 [8.5, 11.5]; worse on reasoning −10.0 [−11.5, −8.5]",
        detail="overall +2.0 [0.5, 3.5], inconclusive; inconclusive on clinical and code; every seed above SFT",
    )


def test_better_on_some_tasks_and_open_on_others_is_not_mixed() -> None:
    (line,) = verdict_lines(study(dpo={"all": "inconclusive", "safety": "better"}))
    assert line.label == "INCONCLUSIVE"
    assert line.detail.startswith("better on safety, inconclusive on reasoning, clinical and code; ")


def test_a_worse_arm_has_no_seed_above() -> None:
    (line,) = verdict_lines(study(dpo="worse"))
    assert (line.label, line.tone) == ("WORSE", "bad") and line.detail.endswith("; no seed above SFT")


def test_an_equivalent_arm_names_the_declared_margin() -> None:
    (line,) = verdict_lines(study(dpo="equivalent"))
    assert line.text.startswith("DPO and SFT: +0.5 points")
    assert line.detail == (
        "equivalent on every task; 2 of 3 seeds above SFT; within ±2.0 points, the margin declared before the runs"
    )


def test_much_longer_completions_are_named() -> None:
    results = study(dpo="better")
    for run in results["arms"][2]["runs"]:
        run["metrics"]["completion/length"] = 50.0
    assert plain(verdict_lines(results)[0]).detail.endswith("completions 25 % longer than SFT")
    for run in results["arms"][2]["runs"]:
        run["metrics"]["completion/length"] = 45.0  # 12 % is not remarkable
    assert "longer" not in verdict_lines(results)[0].detail


def test_lines_are_ordered_by_gain_then_failures_then_the_leaders_then_sft() -> None:
    assert [(line.label, line.text.split(":")[0]) for line in verdict_lines(failed())] == [
        ("BETTER", "GRPO than SFT"),
        ("MIXED", "DPO against SFT"),
        ("FAILED", "PPO has no finished run"),
        ("BETTER", "GRPO than DPO"),
        ("BETTER", "SFT than untrained starter"),
    ]


def test_leaders_carry_their_effect_size_in_their_own_direction() -> None:
    results = study({("ppo", "grpo"): "worse"}, grpo="better", ppo="better")
    results["comparisons"][-1]["effect"] = {"d": -0.96, "g": -0.77, "low": -2.63, "high": 0.82, "note": ""}
    line = plain(verdict_lines(results)[-1])
    assert line.label == "BETTER"
    assert line.text == "GRPO than PPO: +10.0 points [8.5, 11.5]; d = 0.96 [−0.82, 2.63], g = 0.77"


def test_a_single_run_says_what_its_interval_leaves_out() -> None:
    lines = verdict_lines(bare())
    assert all("one run: the interval is over prompts only" in line.detail for line in lines)
    assert not any("every seed" in line.detail for line in lines)


def test_a_finished_arm_without_a_comparison_is_still_listed() -> None:
    results = study(grpo="better", ppo="better")
    results["comparisons"] = [c for c in results["comparisons"] if c["arm"] != "ppo"]
    assert [line.label for line in verdict_lines(results)] == ["BETTER", "NOT COMPARED"]


def test_a_line_prints_as_text() -> None:
    line = VerdictLine(label="BETTER", tone="good", text="GRPO than SFT", detail="every seed above SFT")
    assert str(line) == "BETTER        GRPO than SFT (every seed above SFT)"
