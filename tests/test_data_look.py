"""Data shown as a model reads them, and looked over: which tokens are trained, lengths, duplicates, ties, overlaps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from alignlab import starter
from alignlab.conversation import Template
from alignlab.data import DataSource
from alignlab.data.audit import audit, quantiles
from alignlab.data.parts import open_parts
from alignlab.data.show import LEGEND, STOP, TRAINED, coloured, pieces, plain, shown
from alignlab.models import load_generation_config, load_tokenizer
from alignlab.types import Example, Labelled, Message, Pair, Prompt
from tests.runs import alignlab, write_rows


@pytest.fixture(scope="module")
def template() -> Template:
    return Template.of(load_tokenizer("starter"), load_generation_config("starter"))


def asked(text: str) -> Prompt:
    return Prompt(messages=(Message("user", text),), id="p")


# ---- show ------------------------------------------------------------------------------------------------------------


def test_the_completion_and_its_stop_token_are_trained_and_nothing_else(template: Template) -> None:
    (row,) = shown(Example(prompt=asked("2+3?"), completion="It is 5."), template, 64, 32)
    assert (
        "".join(row.pieces[: row.num_masked]) == "<bos><start_of_turn>user\n2+3?<end_of_turn>\n<start_of_turn>model\n"
    )
    assert "".join(row.pieces[row.num_masked :]) == "It is 5.<end_of_turn>" and row.stops
    expected = template.row(asked("2+3?"), "It is 5.")
    assert (row.num_masked, row.num_trained) == (len(expected.prompt_ids), len(expected.completion_ids))
    assert plain(row).endswith("model\n‹It is 5.<end_of_turn>■›")


def test_a_cut_completion_keeps_its_stop_and_says_so(template: Template) -> None:
    (row,) = shown(Example(prompt=asked("a"), completion="one two three four five six"), template, 64, 4)
    assert row.num_trained == 4 and row.stops and "cut from" in row.title
    (row,) = shown(Example(prompt=asked("a " * 50), completion="b"), template, 20, 4)
    assert row.num_trained == 0 and not row.stops and "left out" in row.title and "‹" not in plain(row)


def test_pairs_are_two_rows_and_labels_and_prompts_say_what_they_are(template: Template) -> None:
    rows = shown(Pair(prompt=asked("a"), chosen="b", rejected="c"), template, 64, 32)
    assert [row.title for row in rows] == ["p (chosen)", "p (rejected)"]
    assert (
        shown(Labelled(prompt=asked("a"), completion="b", label=False), template, 64, 32)[0].title == "p (undesirable)"
    )
    (row,) = shown(asked("a"), template, 64, 32)
    assert row.num_trained == 0 and "‹" not in plain(row)


@pytest.mark.parametrize(
    "text", ["naïve café", "日本語 テスト", "🙂🙃", " leading and  double", "x = [\n\t1,\n]", "‹not ours›"]
)
def test_pieces_together_are_the_text(template: Template, text: str) -> None:
    ids = template.encode_completion(text, stop=False)
    assert "".join(pieces(ids, template)) == text and len(pieces(ids, template)) == len(ids)


def test_marks_in_a_text_are_not_taken_for_ours(template: Template) -> None:
    (row,) = shown(Example(prompt=asked("a"), completion="‹b›■"), template, 64, 32)
    assert plain(row).endswith("‹‹‹b››■■<end_of_turn>■›")


def test_in_a_terminal_trained_tokens_and_the_stop_have_colours_of_their_own(template: Template) -> None:
    (row,) = shown(Example(prompt=asked("a"), completion="one two"), template, 64, 32)
    styles = [str(span.style) for span in coloured(row).spans]
    assert set(styles[row.num_masked : -1]) <= set(TRAINED) and styles[-1] == STOP
    assert not set(styles[: row.num_masked]) & {*TRAINED, STOP}


def test_show_marks_tokens_without_a_terminal_and_colours_them_in_one(monkeypatch: pytest.MonkeyPatch) -> None:
    result = alignlab("data", "show", "code", "-n", "2", "--split", "validation")
    assert result.code == 0 and result.out.startswith(LEGEND)
    assert result.out.count("--- validation.jsonl: ") == 2 and result.out.count("--- pairs.validation.jsonl: ") == 4
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert Console().is_terminal
    result = alignlab("data", "show", "code", "-n", "1", "--split", "validation")
    assert "\x1b[" in result.out and LEGEND not in result.out


def test_any_file_that_a_recipe_may_name_is_shown(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "own.jsonl", [{"intent": f"sum {i}", "snippet": f"sum(x{i})"} for i in range(9)])
    result = alignlab("data", "show", path, "--column", "prompt=intent", "--column", "completion=snippet", "-n", "1",
                      "--split", "[4:6]", "--prompt-template", "Python: {intent}")  # fmt: skip
    assert result.code == 0, result.err
    assert "Python: sum 4" in result.out and "‹sum(x4)<end_of_turn>■›" in result.out and "sum 5" not in result.out


# ---- audit -----------------------------------------------------------------------------------------------------------


def pairs_file(folder: Path) -> Path:
    def row(prompt: str, chosen: str, rejected: str, better: float, worse: float) -> dict[str, Any]:
        scores = {"score_chosen": better, "score_rejected": worse}
        return {"prompt": prompt, "chosen": chosen, "rejected": rejected, **scores}

    long = "same words again and again " * 8
    return write_rows(folder / "pairs.jsonl", [
        row("first question here please", "a much longer answer than that", "short", 8, 3),
        row("First  question here please", "a much longer answer than that", "short", 8, 3),  # the same again
        row("second question", "yes", "no and no and no", 5, 5),  # a tie, rejected is longer
        row("third question", long + "a", long + "b", 5, 5),  # equal within 16 tokens
        row("fourth", "", "x", 5, 4),  # empty
        row("w " * 100, "a b c", "d", 5, 4),  # prompt too long
    ])  # fmt: skip


def test_an_audit_counts_what_is_there(tmp_path: Path, template: Template) -> None:
    (part,) = audit(open_parts(str(pairs_file(tmp_path))), template, 64, 16).parts
    assert (part["rows"], part["usable"], part["dropped"]) == (6, 5, {"empty chosen": 1})
    assert part["identical_after_truncation"] == 1 and (part["ties"], part["scored"]) == (2, 5)
    assert part["duplicate_rows"] == 1 and part["repeated_prompts"] == 1 and part["prompts_too_long"] == 1
    assert part["chosen_longer"] == pytest.approx(3 / 4) and part["equal_length"] == 1
    lengths = [len(template.encode_completion(text)) for text in ("short", "yes")]
    assert part["completion_tokens"]["min"] <= min(lengths) and part["completion_tokens"]["max"] > 16
    assert part["completions_cut"] == 2


def test_quantiles_are_lengths_that_occur() -> None:
    assert quantiles(range(1, 101)) == {"min": 1, "median": 50, "p90": 90, "p99": 99, "max": 100}
    assert quantiles([7]) == {"min": 7, "median": 7, "p90": 7, "p99": 7, "max": 7} and quantiles([]) == {}


def test_overlaps_between_splits_are_reported(tmp_path: Path, template: Template) -> None:
    sentence = "the quick brown fox jumps over the lazy dog near the old river bank at dawn"
    write_rows(tmp_path / "train.jsonl", [{"prompt": sentence, "completion": "a"}, {"prompt": "x", "completion": "b"}])
    held_out = [sentence.upper(), sentence + " today", "brown fox jumps over the lazy dog near me", "unrelated"]
    write_rows(tmp_path / "test.jsonl", [{"prompt": text, "completion": "c"} for text in held_out])
    (found,) = audit(open_parts(str(tmp_path)), template, 64, 16).overlaps
    assert found == {"of": "test", "in": "train", "prompts": 4, "exact": 1, "near": 1, "8-gram": 3, "13-gram": 2}


def test_an_audit_of_a_prepared_folder_says_what_prepare_said(tmp_path: Path) -> None:
    """A task's own line, "Summarise the visit ..", is no overlap; an edited folder is counted anew."""
    section = "FAMILY HISTORY AND SOCIAL HISTORY"
    talk = [
        f"Doctor: word{i} a{i} b{i} c{i}. Patient: d{i} e{i} f{i} g{i} h{i} i{i} j{i} k{i} l{i}." for i in range(60)
    ]
    content = [
        {"dialogue": text, "section_text": f"note {i}", "section_header": section} for i, text in enumerate(talk)
    ]
    content[0]["section_header"] = content[1]["section_header"] = "A RARE SECTION THAT TWO ROWS HAVE"
    (tmp_path / "raw").mkdir()
    for split, some in (
        ("train", content[1:40]),
        ("validation", content[40:50]),
        ("test", [content[0], *content[50:]]),
    ):
        write_rows(tmp_path / "raw" / f"{split}.jsonl", some)
    folder = tmp_path / "out"
    result = alignlab("data", "prepare", "clinical", "--from", tmp_path / "raw", "-o", folder)
    assert result.code == 0 and "overlap of test with train: 0 of 11 prompts exactly, 0 share an 8-gram" in result.out

    def grams() -> list[tuple[int, int]]:
        found = json.loads(alignlab("data", "audit", folder, "--json").out)["overlaps"]
        return [(row["8-gram"], row["13-gram"]) for row in found]

    assert grams() == [(0, 0)] * 3
    test = folder / "test.jsonl"
    test.write_text(test.read_text("utf-8").replace("word55", "another"), "utf-8")
    assert grams()[1][0] == 1  # of the whole prompt, as the rows no longer are those that were counted


def test_an_audit_for_machines_is_json(tmp_path: Path) -> None:
    result = alignlab("data", "audit", pairs_file(tmp_path), "--json", "--max-completion-tokens", "16")
    assert result.code == 0, result.err
    found = json.loads(result.out)
    assert found["schema"] == 1 and found["limits"] == {"max_prompt_tokens": 512, "max_completion_tokens": 16}
    assert found["parts"][0]["identical_after_truncation"] == 1


def test_an_audit_for_people_is_tables() -> None:
    result = alignlab("data", "audit", "code")
    assert result.code == 0 and "prompts too long" in result.out and "chosen longer" in result.out
    assert "the same prompts on two sides" in result.out


def test_the_starters_own_data_are_clean(template: Template) -> None:
    """No split shows another's prompts, no pair ties after truncation to the starter recipes' limits."""
    found = audit(open_parts(str(starter.DATA / "safety")), template, 128, 40)
    assert all(part["identical_after_truncation"] == 0 for part in found.parts if part["kind"] == "pairs")
    assert all(part["prompts_too_long"] == part["completions_cut"] == 0 for part in found.parts)
    assert [overlap["exact"] for overlap in found.overlaps] == [0, 0, 0]


def test_rows_are_read_as_a_recipe_would_read_them(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "x.jsonl", [{"q": "a", "good": "b", "bad": "c"}])
    columns = {"prompt": "q", "chosen": "good", "rejected": "bad"}
    (part,) = open_parts(str(path), source=DataSource(columns=columns))
    assert part.kind == "pairs" and part.items[0].chosen == "b"  # type: ignore[union-attr]


# ---- real slices -----------------------------------------------------------------------------------------------------


def test_ties_and_lengths_of_ultrafeedback_are_those_of_its_readme(shared_data: Path, template: Template) -> None:
    """Of the 1,000 train rows 111 tie; 6 have an empty answer or two equal ones and are dropped by us."""
    (part,) = open_parts(str(shared_data / "ultrafeedback" / "train_1000.jsonl"))
    ties = sum(scores is not None and scores[0] == scores[1] for scores in part.scores)
    assert len(part.items) + sum(part.dropped.values()) == 1000 and 105 <= ties <= 111
