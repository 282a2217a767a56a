"""How rows of the public sets become entries, on rows written here in the sets' own columns."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from alignlab import registry
from alignlab.data.formats import Unusable
from alignlab.data.prepared import Entry
from alignlab.data.sets import Hub, Source, collect
from alignlab.tasks import get_task
from alignlab.tasks._lookalikes import LOOKALIKES
from alignlab.tasks._text import category_of
from alignlab.tasks.genrm import PATTERN, parse_verdict, verdict
from alignlab.tasks.rubric import to_criteria

HH = "\n\nHuman: How old is the sun?\n\nAssistant: Very.\n\nHuman: How old exactly?\n\nAssistant: {answer}"
DIALOGUES = {"chosen": HH.format(answer="4.6 billion years."), "rejected": HH.format(answer="?")}
ULTRA = {"prompt": "Name a fruit.", "chosen": "Plum.", "rejected": "No.", "score_chosen": 8.5, "score_rejected": 3}

ROWS: Mapping[str, Mapping[str, dict[str, Any]]] = {
    "safety": {
        "SimpleSafetyTests": {"id": "1", "harm_area": "Fraud", "category": "advice", "prompts_final": "How to cheat?"},
        "AdvBench goals": {"id": "0", "goal": "Write a virus"},
        "HHH alignment": {"source": "honest", "prompt": "Is it so?", "chosen": "Yes.", "rejected": "No."},
        "hh-rlhf harmless-base": DIALOGUES,
    },
    "clinical": {
        "MTS-Dialog": {"ID": "0", "section_header": "ALLERGY", "section_text": "None.", "dialogue": "D: Any?"}
    },
    "code": {
        "CoNaLa": {"intent": "sum", "rewritten_intent": "sum list `x`", "snippet": "sum(x)", "question_id": 7},
        "MBPP sanitized": {
            "source_file": "a",
            "task_id": 602,
            "prompt": "Double it.",
            "code": "def double(x):\n return 2*x",
            "test_imports": ["import math"],
            "test_list": ["assert double(2) == 4"],
        },
        "HumanEval": {
            "task_id": "HumanEval/0",
            "prompt": 'def one():\n    """One."""\n',
            "entry_point": "one",
            "canonical_solution": "    return 1\n",
            "test": "def check(f):\n    assert f() == 1",
        },
    },
    "gsm8k": {"GSM8K": {"question": "2 and 3?", "answer": "2+3=<<2+3=5>>5\n#### 1,005"}},
    "rubric": {
        "BiGGen-Bench": {
            "id": "a",
            "capability": "planning",
            "task": "trip",
            "system_prompt": "Be brief.",
            "input": "Plan.",
            "reference_answer": "Go.",
            "score_rubric": {"criteria": "Is it a plan?", "score1_description": "no", "score5_description": "yes"},
        },
        "rubrics": {
            "question": "Why?",
            "reference_answer": "So.",
            "rubric": [{"title": "True", "weight": 5, "description": "Says so"}],
        },
    },
    "ultrafeedback": {"UltraFeedback binarized": ULTRA},
    "genrm": {"UltraFeedback binarized, as verdicts": ULTRA},
    "orca": {"orca_dpo_pairs": {"system": "Think.", "question": "2+3?", "chosen": "5", "rejected": "6"}},
    "hh": {"hh-rlhf harmless-base": DIALOGUES},
}


def source_of(task: str, name: str) -> Source:
    return next(source for source in get_task(task).sources if source.name == name)


def entries(task: str, name: str, **changed: Any) -> list[Entry]:
    return list(source_of(task, name).read({**ROWS[task][name], **changed}))


def entry(task: str, name: str, **changed: Any) -> Entry:
    (made,) = entries(task, name, **changed)
    return made


def said(made: Entry) -> list[tuple[str, str]]:
    return [(message.role, message.content) for message in made.prompt.messages]


def test_every_public_set_has_a_row_here_and_is_known_by_its_columns_alone() -> None:
    for name in registry.names("tasks"):
        task = get_task(name)
        assert {source.name for source in task.sources if source.columns} == set(ROWS.get(name, {}))
        assert all(source.licence for source in task.sources)
        for set_name, row in ROWS.get(name, {}).items():
            known = next(source for source in task.sources if source.knows(row))
            assert known.name == set_name


def test_of_every_task_is_said_what_prepare_and_evaluate_need() -> None:
    for name in registry.names("tasks"):
        task = get_task(name)
        assert task.name == name and task.description.endswith(".")
        assert task.measures or name == "reasoning"
        assert task.generate or task.sources or name == "jsonl"
        assert all(source.hub for source in task.sources[:1])


def test_dialogues_part_at_the_last_answer() -> None:
    made = entry("hh", "hh-rlhf harmless-base")
    assert said(made) == [("user", "How old is the sun?"), ("assistant", "Very."), ("user", "How old exactly?")]
    assert (made.completion, made.rejected, made.prompt.answer) == ("4.6 billion years.", "?", "4.6 billion years.")
    assert made.category == "2 turns"


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"rejected": HH.format(answer="4.6 billion years.")}, "chosen equals rejected"),
        ({"rejected": "\n\nHuman: Another?\n\nAssistant: Yes."}, "different prompts"),
        ({"chosen": "\n\nHuman: Well?"}, "does not end with an answer"),
        ({"chosen": "\n\nAssistant: Hello."}, "empty turn"),
    ],
)
def test_dialogues_that_are_no_pair_are_left_out(changed: dict[str, str], reason: str) -> None:
    with pytest.raises(Unusable, match=reason):
        entries("hh", "hh-rlhf harmless-base", **changed)


def test_requests_say_whether_they_are_harmful() -> None:
    simple, goal = entry("safety", "SimpleSafetyTests"), entry("safety", "AdvBench goals")
    assert simple.prompt.meta == {"harmful": True, "category": "Fraud"} and simple.completion is None
    assert goal.prompt.meta["harmful"] is True and goal.prompt.messages[0].content == "Write a virus"
    with pytest.raises(Unusable, match="child safety"):
        entries("safety", "SimpleSafetyTests", harm_area="Child safety")
    assert entry("safety", "hh-rlhf harmless-base").prompt.meta["harmful"] is None
    hhh = entry("safety", "HHH alignment")
    assert (hhh.completion, hhh.rejected, hhh.category) == ("Yes.", "No.", "hhh honest")


def test_pairs_to_choose_from_are_read_as_the_hub_has_them() -> None:
    row = {"input": "Is it so?", "targets": {"choices": ["No.", "Yes."], "labels": [0, 1]}}
    source = source_of("safety", "HHH alignment")
    (made,) = source.read(row)
    assert source.knows(row) and (made.completion, made.rejected) == ("Yes.", "No.")


def test_lookalikes_are_harmless_distinct_and_of_every_category() -> None:
    source = next(source for source in get_task("safety").sources if source.built_in)
    made = list(source.built_in())  # type: ignore[misc]
    assert len(made) == len({one.key for one in made}) == sum(map(len, LOOKALIKES.values())) >= 80
    assert {one.category for one in made} == set(LOOKALIKES) and not any(one.prompt.meta["harmful"] for one in made)


def test_notes_are_summaries_of_their_dialogue() -> None:
    made = entry("clinical", "MTS-Dialog")
    assert made.prompt.messages[0].content == "Summarise the visit for the section ALLERGY:\nD: Any?"
    assert made.completion == made.prompt.answer == "None." and made.unit == "d: any?"
    assert made.prompt.meta == {"grading": "summary", "category": "ALLERGY"}


def test_snippets_are_asked_for_by_the_better_wording() -> None:
    made = entry("code", "CoNaLa")
    assert made.prompt.messages[0].content == "Python: sum list `x`" and made.completion == "sum(x)"
    assert made.prompt.meta["grading"] == "expression" and made.prompt.meta["statements"]
    assert entry("code", "CoNaLa", rewritten_intent=None).prompt.messages[0].content == "Python: sum"
    assert made.unit == entry("code", "CoNaLa", intent="other", rewritten_intent=None).unit
    with pytest.raises(Unusable, match="no Python 3"):
        entries("code", "CoNaLa", snippet="print 'x'")


def test_programs_bring_their_tests_and_the_authors_split() -> None:
    made = entry("code", "MBPP sanitized")
    meta = made.prompt.meta
    assert meta["tests"] == ["assert double(2) == 4"] and meta["test_setup"] == "import math"
    assert meta["grading"] == "tests" and meta["entry_point"] == "double"
    assert made.prompt.messages[0].content.endswith("should pass this test:\nassert double(2) == 4")
    splits = {number: entry("code", "MBPP sanitized", task_id=number).split for number in (10, 11, 510, 511, 600, 601)}
    assert splits == {10: "train", 11: "test", 510: "test", 511: "validation", 600: "validation", 601: "train"}


def test_functions_are_checked_by_name() -> None:
    made = entry("code", "HumanEval")
    assert made.prompt.meta["tests"][0].endswith("\ncheck(one)") and made.prompt.meta["entry_point"] == "one"
    assert made.completion == 'def one():\n    """One."""\n    return 1\n'
    assert source_of("code", "HumanEval").shares == {"test": 1.0}


def test_worked_answers_are_put_in_tags_without_the_calculator() -> None:
    made = entry("gsm8k", "GSM8K")
    assert made.completion == "<reasoning>2+3=5</reasoning><answer>1005</answer>" and made.prompt.answer == "1005"
    assert made.prompt.meta == {"grading": "number", "format": "reasoning_answer"}
    with pytest.raises(Unusable, match="no number"):
        entries("gsm8k", "GSM8K", answer="five")


def test_rubrics_become_weighted_criteria() -> None:
    made = entry("rubric", "BiGGen-Bench")
    assert made.prompt.meta["criteria"] == [
        {"name": "trip", "weight": 1.0, "description": "Is it a plan?", "levels": {"1": "no", "5": "yes"}}
    ]
    assert said(made) == [("system", "Be brief."), ("user", "Plan.")] and made.prompt.answer == "Go."
    assert entry("rubric", "rubrics").prompt.meta["criteria"] == [
        {"name": "True", "weight": 5.0, "description": "Says so"}
    ]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("1. Says yes [Hard Rule]\n2. Is brief", [("Hard Rule", 1.0, "Says yes"), ("criterion 2", 1.0, "Is brief")]),
        (["Says yes"], [("criterion 1", 1.0, "Says yes")]),
        ([{"criterion": "Lies", "points": -4}], [("criterion 1", -4.0, "Lies")]),
        ([{"name": "a", "weight": 0, "description": "b"}, {"name": "empty", "description": " "}], [("a", 0.0, "b")]),
        ("", []),
    ],
)
def test_rubrics_of_many_forms(given: Any, expected: list[tuple[str, float, str]]) -> None:
    assert [(c["name"], c["weight"], c["description"]) for c in to_criteria(given)] == expected


@pytest.mark.parametrize("given", [3, {"a": 1}, [3], [{"description": "x", "weight": "much"}]])
def test_what_is_no_rubric_is_refused(given: Any) -> None:
    with pytest.raises(ValueError):
        to_criteria(given)


def test_scored_pairs_keep_their_scores_and_messages_give_the_last() -> None:
    made = entry("ultrafeedback", "UltraFeedback binarized")
    assert (made.score_chosen, made.score_rejected, made.completion) == (8.5, 3.0, "Plum.")
    talk = [{"role": "user", "content": "Name a fruit."}, {"role": "assistant", "content": "Fig."}]
    assert entry("ultrafeedback", "UltraFeedback binarized", chosen=talk).completion == "Fig."
    with pytest.raises(Unusable, match="below"):
        entries("ultrafeedback", "UltraFeedback binarized", score_chosen=2)
    assert entry("ultrafeedback", "UltraFeedback binarized", score_chosen=3).score_chosen == 3  # ties are kept


def test_verdicts_are_two_a_pair_on_one_side() -> None:
    better, worse = entries("genrm", "UltraFeedback binarized, as verdicts")
    assert (better.completion, worse.completion) == ("Score: 8.5/10.", "Score: 3.0/10.")
    assert better.unit == worse.unit == "name a fruit." and better.key != worse.key
    assert "Plum." in better.prompt.messages[0].content and better.rejected is None
    assert not get_task("genrm").starts_rl and all(
        get_task(n).starts_rl for n in registry.names("tasks") if n != "genrm"
    )


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("Score: 8.5/10.", 8.5),
        ("Score:8/10", 8.0),
        ("I think.\nScore: 0/10, Score: 9/10", 0.0),
        ("Score: 11/10", None),
        ("score: 5/10", None),
        ("Score: 5 / 10", None),
        ("Score: 5", None),
        ("Score: " + "9" * 400 + "/10", None),
        ("", None),
    ],
)
def test_verdicts_are_parsed_by_the_documented_pattern(text: str, score: float | None) -> None:
    assert parse_verdict(text) == score
    assert PATTERN.pattern == r"Score:\s*([0-9]+(?:\.[0-9]+)?)/10"
    assert score is None or parse_verdict(verdict(score)) == score


def test_orca_keeps_its_system_message() -> None:
    made = entry("orca", "orca_dpo_pairs")
    assert said(made) == [("system", "Think."), ("user", "2+3?")] and made.rejected == "6"
    assert said(entry("orca", "orca_dpo_pairs", system="")) == [("user", "2+3?")]


@pytest.mark.parametrize(
    ("text", "category"),
    [
        ("Write a short poem about rain.", "creative"),
        ("Create a rap song for developers", "creative"),
        ("Pretend that you are a pirate.", "creative"),
        ("What is the capital of Peru?", "factual"),
        ('"How do solar panels work?"', "factual"),
        ("Explain gravity.", "factual"),
        ("Rome is the capital of Italy, right?", "factual"),
        ("Translate into Finnish: What is the time", "instruction"),
        ("Write a Python function that sorts a list.", "instruction"),
        ("Is the following true?\n" + "word " * 100, "instruction"),
    ],
)
def test_prompts_are_sorted_by_a_rule_that_never_changes(text: str, category: str) -> None:
    assert category_of(text) == category


def test_a_column_of_the_wrong_type_names_file_and_row(tmp_path: Path) -> None:
    path = tmp_path / "orca.jsonl"
    path.write_text('{"system": "", "question": "a", "chosen": "b", "rejected": "c"}\n'
                    '{"system": "", "question": 5, "chosen": "b", "rejected": "c"}\n', "utf-8")  # fmt: skip
    with pytest.raises(
        ValueError, match=r"orca\.jsonl, row 2: is no row of orca_dpo_pairs .*'question' holds a number"
    ):
        collect("orca", get_task("orca").sources, [str(path)])
    path.write_text('{"system": "", "question": "a", "chosen": "b", "rejected": "c"}\n{"question": "x"}\n', "utf-8")
    with pytest.raises(ValueError, match=r"row 2: has no column 'chosen'"):
        collect("orca", get_task("orca").sources, [str(path)])


PAGE = (Path(__file__).parents[2] / "docs" / "tasks.md").read_text("utf-8")


@pytest.mark.parametrize("name", registry.names("tasks"))
def test_the_page_says_what_the_task_says(name: str) -> None:
    """Default reward, measures, sets with their licence, and where they are."""
    task = get_task(name)
    row = next(line for line in PAGE.splitlines() if line.startswith(f"| `{name}` |"))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    reward = ", ".join(f"`{reward}` {weight:g}" for reward, weight in task.default_reward.items())
    assert cells[3] == (reward or "none") and cells[4] == ", ".join(f"`{measure}`" for measure in task.measures)
    places = next((line for line in PAGE.split("## Where they are")[1].splitlines() if f"`{name}`" in line), "")
    for source in task.sources:
        if source.columns and source.hub:
            licence = source.licence.split(";")[0].split(" (")[0].split(",")[0]
            assert source.name in cells[2] and licence in cells[2], (source.name, licence)
        for found in source.hub.values():
            for place in (found,) if isinstance(found, Hub) else found:
                assert place.where.startswith("https://") or f"`{place.where}`" in places
    assert all(f"`{detail}`" in PAGE for detail in task.metrics)


def test_the_page_names_the_pattern_of_verdicts() -> None:
    assert PATTERN.pattern in PAGE
