"""Look-ups over results.json, comparisons turned round, and numbers as words."""

import pytest

from alignlab.study.reading import (
    StudyResults,
    bracket,
    count,
    duration,
    fixed,
    gain,
    join,
    number,
    short,
    turned,
    visible,
)

from .fake_results import failed, fake_results

ROW = {
    "arm": "dpo",
    "against": "ppo",
    "metric": "score",
    "task": None,
    "mean": -0.069,
    "low": -0.118,
    "high": -0.02,
    "verdict": "worse",
    "every_seed_above": False,
    "per_seed": {"42": -0.05, "123": -0.09},
    "note": "",
    "effect": {"d": -3.41, "g": -2.73, "low": -6.14, "high": -0.58, "note": ""},
}


def test_a_comparison_turned_round_has_every_sign_changed_and_its_limits_swapped() -> None:
    assert turned(ROW) == {
        "arm": "ppo",
        "against": "dpo",
        "metric": "score",
        "task": None,
        "mean": 0.069,
        "low": 0.02,
        "high": 0.118,
        "verdict": "better",
        "every_seed_above": True,
        "per_seed": {"42": 0.05, "123": 0.09},
        "note": "",
        "effect": {"d": 3.41, "g": 2.73, "low": 0.58, "high": 6.14, "note": ""},
    }
    assert turned(turned(ROW)) == ROW


def test_a_turned_comparison_is_above_in_every_seed_only_where_every_seed_was_below() -> None:
    assert not turned({**ROW, "per_seed": {"42": -0.05, "123": 0.0}})["every_seed_above"]
    assert not turned({**ROW, "per_seed": {}})["every_seed_above"]


def test_comparisons_are_found_in_both_directions() -> None:
    study = StudyResults(fake_results())
    dpo, ppo, _ = study.methods
    forward, backward = study.comparison(dpo, ppo), study.comparison(ppo, dpo)
    assert forward is not None and backward is not None and forward["mean"] == -backward["mean"]


def test_arms_count_their_runs_and_spread() -> None:
    results = failed()
    ppo, grpo = StudyResults(results).methods[1:]
    assert ppo.shortfall == "0 of 3 runs" and ppo.mean("score") is None
    assert ppo.failures == (
        "none of 3 runs finished (seed 42, seed 123 and seed 777 failed: the ratio at the first step was 1.3, not 1)"
    )
    assert grpo.failures == "only 2 of 3 runs finished (seed 777 failed: killed for memory at phase 12)"
    a, b = grpo.values("score")
    assert grpo.spread("score") == pytest.approx(abs(a - b) / 2**0.5)  # sd of two values, ddof 1


def test_methods_are_ranked_by_gain_and_those_without_a_comparison_left_out() -> None:
    assert [arm.name for arm in StudyResults(fake_results()).ranked] == ["grpo", "ppo", "dpo"]
    assert [arm.name for arm in StudyResults(failed()).ranked] == ["grpo", "dpo"]


def test_another_schema_or_no_baseline_is_one_clear_line() -> None:
    with pytest.raises(ValueError, match="schema 2, this version reads 1"):
        StudyResults({**fake_results(), "schema": 2})
    results = fake_results()
    with pytest.raises(ValueError, match="no baseline"):
        StudyResults({**results, "arms": results["arms"][2:]})


def test_the_last_baseline_stands_in_where_no_arm_is_called_sft() -> None:
    results = fake_results()
    results["arms"] = [arm for arm in results["arms"] if arm["name"] != "sft"]
    assert StudyResults(results).reference.name == "start"


@pytest.mark.parametrize("value", [None, float("nan"), float("inf"), "1", True, [1]])
def test_only_finite_numbers_are_numbers(value: object) -> None:
    assert number(value) is None


def test_numbers_as_words() -> None:
    assert fixed(-3.14159, 1) == "−3.1" and fixed(-0.04, 1, "+") == "+0.0" and fixed(-0.04, 1) == "0.0"
    assert gain({"mean": 0.155, "low": 0.12, "high": 0.19}) == "+15.5 [12.0,\N{NO-BREAK SPACE}19.0]"
    assert gain({"mean": 1.0, "low": 1.0, "high": 1.0}) == "+100.0 [no spread]"
    assert gain({"mean": 0.155, "low": None, "high": float("nan")}) == "+15.5 [no interval]"
    assert bracket({"low": -0.69, "high": 1.69}, 1.0, 2) == " [−0.69,\N{NO-BREAK SPACE}1.69]"
    assert count(204800) == "204\N{NARROW NO-BREAK SPACE}800" and count(0) == "0"
    assert short(1_234_567) == "1.2\N{NO-BREAK SPACE}M" and short(12) == "12"
    assert duration(812.4).split() == ["13", "min", "32", "s"] and duration(59.6).split() == ["1", "min", "0", "s"]
    assert duration(41.2).split() == ["41", "s"]
    assert [join(words) for words in ([], ["a"], ["a", "b"], ["a", "b", "c"])] == ["", "a", "a and b", "a, b and c"]


def test_control_characters_become_visible_everywhere() -> None:
    hidden = {"a\x00": ["\x1b[31m", {"b": "left\u202eright"}], "c": "\ud800", "kept": "line\n\tnext é 漢 🙂", "n": 1.5}
    assert visible(hidden) == {
        "a␀": ["␛[31m", {"b": "left⟨U+202E⟩right"}],
        "c": "⟨U+D800⟩",
        "kept": "line\n\tnext é 漢 🙂",
        "n": 1.5,
    }
