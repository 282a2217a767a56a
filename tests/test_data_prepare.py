"""Prepared folders: splits that share no prompt, samples without a bias, a card that says what happened."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import pytest
from hypothesis import given
from hypothesis import strategies as st

from alignlab.data.overlap import near_duplicates, normalise, shared_ngrams, words
from alignlab.data.prepare import Divided, Sizes, divide, interleave, score_bin, stratum
from alignlab.data.prepared import SPLITS, Entry, Split, split_file
from alignlab.data.sets import Found, Hub, Source, asked, kind_of_rows, split_of_name
from alignlab.errors import UserError
from alignlab.tasks import get_task
from tests.runs import alignlab, files_of, rows, write_rows

ANY = Source(name="any", licence="none", columns=(("question",),), read=lambda row: ())


def entry(text: str, split: Split | None = None, **said: Any) -> Entry:
    category = said.pop("category", "")
    return Entry(prompt=asked(text, category=category), split=split, source="any", **said)


def divided(
    entries: Sequence[Entry], sizes: Sizes | None = None, seed: int = 42, shares: Mapping[Split, float] | None = None
) -> Divided:
    found = Found(source="any", where="x", split=None, num_rows=len(entries), entries=tuple(entries), unusable={},
                  fingerprint="")  # fmt: skip
    source = ANY if shares is None else Source(name="any", licence="", columns=(), read=ANY.read, shares=shares)
    return divide([found], [source], sizes or Sizes(), seed, "any")


def texts(made: Divided, split: Split) -> list[str]:
    return [one.prompt.messages[-1].content for one in made.splits[split]]


# ---- splits ----------------------------------------------------------------------------------------------------------


@given(
    st.lists(
        st.tuples(st.integers(0, 30), st.sampled_from([None, "train", "validation", "test"]), st.booleans()),
        min_size=8,
        max_size=60,
    ),
    st.integers(0, 5),
)
def test_no_prompt_and_no_unit_is_on_two_sides_whatever_the_rows_say(
    given_rows: list[tuple[int, Any, bool]], seed: int
) -> None:
    """Texts that differ only in case and spaces are one prompt; even and odd halves of a dialogue are one unit."""
    entries = [
        entry(f"Ask {n}" if plain else f"ask   {n}", split, group=f"g{n // 2}") for n, split, plain in given_rows
    ]
    try:
        made = divided(entries, seed=seed)
    except UserError:  # too few rows for three sides
        assert len({one.unit for one in entries}) < 3 or not any(one.split != "train" for one in entries) or True
        return
    for one, other in (("train", "validation"), ("train", "test"), ("validation", "test")):
        ours, theirs = made.splits[one], made.splits[other]  # type: ignore[index]
        assert not {e.unit for e in ours} & {e.unit for e in theirs}
        assert not {e.key for e in ours} & {e.key for e in theirs}


def test_official_test_rows_are_kept_and_their_copies_dropped_and_counted() -> None:
    entries = [entry(f"t{i}", "train", completion=str(i)) for i in range(40)]
    entries += [entry(f"T{i} ", "test", completion="x") for i in range(5)] + [
        entry(f"new{i}", "test") for i in range(3)
    ]
    made = divided(entries)
    assert len(made.splits["test"]) == 8
    dropped = made.dropped["rows of train whose prompt is also in validation or test"]
    held_out = made.dropped.get("rows of validation whose prompt is also in test", 0)
    assert dropped + held_out == 5
    assert len(made.splits["train"]) + len(made.splits["validation"]) == 35


def test_what_goes_where_does_not_depend_on_the_order_of_the_rows() -> None:
    entries = [entry(f"q{i}", completion="a") for i in range(50)]
    one, other = divided(entries), divided(entries[::-1])
    assert {split: set(texts(one, split)) for split in SPLITS} == {split: set(texts(other, split)) for split in SPLITS}
    assert [len(one.splits[split]) for split in SPLITS] == [40, 5, 5]
    assert set(texts(divided(entries, seed=7), "test")) != set(texts(one, "test"))


def test_a_test_file_alone_is_divided_and_that_is_said() -> None:
    made = divided([entry(f"q{i}", "test") for i in range(30)])
    assert [len(made.splits[split]) for split in SPLITS] == [24, 3, 3]
    assert "not the official test split" in made.notes[0]
    kept = divided([entry(f"q{i}", "test") for i in range(30)], shares={"test": 1.0})
    assert [len(kept.splits[split]) for split in SPLITS] == [0, 0, 30] and not kept.notes


def test_sets_that_are_only_for_testing_never_reach_train() -> None:
    official: Split | None
    for official in (None, "train"):
        made = divided([entry(f"q{i}", official) for i in range(50)], shares={"validation": 0.2, "test": 0.8})
        assert [len(made.splits[split]) for split in SPLITS] == [0, 10, 40]


def test_too_few_rows_are_refused() -> None:
    with pytest.raises(UserError, match="no row is left for validation"):
        divided([entry("only one")])


def test_exact_duplicates_are_dropped_and_other_answers_kept() -> None:
    entries = [entry(f"q{i}", completion="a") for i in range(20)]
    made = divided([*entries, entry("Q0", completion="a"), entry("q1", completion="b")])
    assert made.dropped == {"exact duplicates": 1} and sum(map(len, made.splits.values())) == 21


# ---- samples ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("score", "name"),
    [(0, "0-3"), (2.9, "0-3"), (3, "3-5"), (5, "5-7"), (7, "7-9"), (8.9, "7-9"), (9, "9-10"), (10, "9-10")],
)
def test_score_bins(score: float, name: str) -> None:
    assert score_bin(score) == name


def test_every_beginning_is_a_stratified_sample() -> None:
    """Of 90 and 10 the first 20 hold 18 and 2, the first 50 hold 45 and 5."""
    entries = [entry(f"q{i}", category="rare" if i < 10 else "common") for i in range(100)]
    order = [unit[0].category for unit in interleave(entries, 42, stratum)]
    for count in (10, 20, 50, 100):
        assert order[:count].count("rare") == count // 10


def test_samples_do_not_favour_large_margins() -> None:
    """Scores from 0 to 10 against margins that fall along the file: a sample has the margins of the whole."""
    entries = [
        entry(f"question number {i}", "train", completion="a", rejected="b", score_chosen=(i * 7 % 101) / 10.1,
              score_rejected=(i * 7 % 101) / 10.1 * i / 1000)
        for i in range(1000)
    ]  # fmt: skip
    made = divided([*entries, *(entry(f"t{i}", "test") for i in range(9))], Sizes(train=200))
    assert len(made.splits["train"]) == 200

    def margin(some: Sequence[Entry]) -> float:
        return sum((e.score_chosen or 0) - (e.score_rejected or 0) for e in some) / len(some)

    spread = 2.2  # standard deviation of the margins; 200 of 1000 have a standard error of about 0.14
    assert abs(margin(made.splits["train"]) - margin(entries)) < 3 * spread / 200**0.5
    bins = Counter(score_bin(e.score_chosen or 0) for e in entries)
    sampled = Counter(score_bin(e.score_chosen or 0) for e in made.splits["train"])
    assert all(abs(sampled[name] - count * 0.2) <= 1.5 for name, count in bins.items())


def test_test_has_equal_categories_and_says_where_there_are_too_few() -> None:
    entries = [entry(f"q{i}", category=("a", "b", "b", "b")[i % 4]) for i in range(80)]
    entries += [entry(f"t{i}", "test", category="a" if i < 4 else "b") for i in range(50)]
    sizes = Sizes(test=20, balanced=("a", "b"))
    made = divided([e if e.split else Entry(prompt=e.prompt, split="train", source="any") for e in entries], sizes)
    assert Counter(one.category for one in made.splits["test"]) == {"a": 4, "b": 10}
    assert made.notes == ("test: 10 prompts of each category were wanted; the set has only 4 a",)


def test_numbers_that_were_asked_for_are_kept_or_said() -> None:
    entries = [entry(f"q{i}") for i in range(100)]
    made = divided(entries, Sizes(train=50, validation=20, test=10, asked=SPLITS))
    assert [len(made.splits[split]) for split in SPLITS] == [50, 20, 10] and made.notes == ()
    short = divided(entries, Sizes(train=500, asked=("train",)))
    assert short.notes == ("train: 500 prompts were wanted, there are 80",)
    assert divided(entries, Sizes(train=500)).notes == ()


# ---- overlap ---------------------------------------------------------------------------------------------------------


def test_n_grams_that_train_has_too_are_counted() -> None:
    train = ["the quick brown fox jumps over the lazy dog today", "something else"]
    held_out = ["well, The QUICK brown fox jumps over the  lazy dog!", "the quick brown fox sleeps", "nothing"]
    ours, theirs = [words(text) for text in train], [words(text) for text in held_out]
    found = shared_ngrams(ours, theirs, 8)
    assert (found.rows, found.of, found.examples) == (1, 3, (0,))
    assert shared_ngrams(ours, theirs, 13).rows == 0 and shared_ngrams(ours, theirs, 4).rows == 2


def test_a_sets_own_phrasing_is_no_overlap() -> None:
    phrase = "please summarise the following long visit for the section"
    found = shared_ngrams([words(f"{phrase} number{i}") for i in range(100)], [words(f"{phrase} other")], 8)
    assert found.rows == 0 and found.common == 2


def test_near_duplicates_are_found_and_others_not() -> None:
    long = "a recipe for plum cake with butter sugar flour eggs milk and a little salt on top of it all"
    found = near_duplicates([long, long.replace("all", "everything"), long.upper(), "a plum", "plum a"])
    assert found == [(0, 1), (0, 2), (1, 2)]
    assert near_duplicates(["x", "X ", "y"]) == [(0, 1)] and near_duplicates([]) == []


def test_texts_are_compared_without_case_space_and_width() -> None:
    assert normalise("  Ｈello\n\nWORLD ") == "hello world"


# ---- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train_2000.jsonl", "train"),
        ("conala-train.jsonl", "train"),
        ("test1.csv", "test"),
        ("eval_200.jsonl", "test"),
        ("validation.csv", "validation"),
        ("dev.json", "validation"),
        ("MTS-Dialog-ValidationSet.csv", "validation"),
        ("pairs.jsonl", None),
        ("latest.jsonl", None),
        ("harmless-base_test_1000.jsonl", "test"),
    ],
)
def test_file_names_say_their_split(name: str, split: str | None) -> None:
    assert split_of_name(name) == split


FORMATS: Mapping[str, tuple[dict[str, Any], str, str]] = {
    "prompt and completion": ({"prompt": "a{i}", "completion": "b"}, "examples", ""),
    "messages": (
        {"messages": [{"role": "user", "content": "a{i}"}, {"role": "assistant", "content": "b"}]},
        "examples",
        "",
    ),
    "messages without an answer": ({"messages": [{"role": "user", "content": "a{i}"}]}, "prompts", ""),
    "chosen and rejected": ({"prompt": "a{i}", "chosen": "b", "rejected": "c"}, "pairs", "pairs."),
    "conversations": (
        {
            "conversations": [{"from": "human", "value": "a{i}"}],
            "chosen": {"from": "gpt", "value": "b"},
            "rejected": {"from": "gpt", "value": "c"},
        },
        "pairs",
        "pairs.",
    ),
    "transcripts": (
        {"chosen": "\n\nHuman: a{i}\n\nAssistant: b", "rejected": "\n\nHuman: a{i}\n\nAssistant: c"},
        "pairs",
        "pairs.",
    ),
    "labels": ({"prompt": "a{i}", "completion": "b", "label": True}, "labelled", "labelled."),
    "labelled messages": (
        {"messages": [{"role": "user", "content": "a{i}"}, {"role": "assistant", "content": "b"}], "label": True},
        "labelled",
        "labelled.",
    ),
    "text": ({"text": "a{i} b c"}, "examples", ""),
    "question and answer": ({"question": "a{i}", "answer": "b"}, "examples", ""),
    "prompts": ({"prompt": "a{i}"}, "prompts", ""),
}


@pytest.mark.parametrize("case", FORMATS)
def test_own_rows_of_every_format_are_prepared(case: str, tmp_path: Path) -> None:
    row, kind, prefix = FORMATS[case]
    content = [json.loads(json.dumps(row).replace("{i}", str(i))) for i in range(20)]
    assert kind_of_rows(content) == kind
    path, folder = write_rows(tmp_path / "own.jsonl", content), tmp_path / "out"
    result = alignlab("data", "prepare", "jsonl", "--from", path, "--output", folder)
    assert result.code == 0, result.err
    assert [len(rows(folder / f"{prefix}{split}.jsonl")) for split in SPLITS] == [16, 2, 2]
    shown = alignlab("data", "show", folder, "-n", "1", "--split", "train")
    assert shown.code == 0 and ("■›" in shown.out) == (kind != "prompts"), shown.out


def test_a_column_that_looks_like_the_answer_is_not_passed_over_in_silence(tmp_path: Path) -> None:
    content = [{"instruction": f"a{i}", "input": "", "output": f"b{i}"} for i in range(20)]
    path, said = write_rows(tmp_path / "alpaca.jsonl", content), []
    for out, more in (("a", ()), ("b", ("--column", "completion=output"))):
        made = alignlab(
            "data", "prepare", "jsonl", "--from", path, "--column", "prompt=instruction", *more, "-o", tmp_path / out
        )
        assert made.code == 0, made.err
        said.append([line for line in made.out.splitlines() if line.startswith("note: ")])
    (note,) = said[0]
    assert all(word in note for word in ("alpaca.jsonl", "no answer column", "'output'", "--column completion=output"))
    assert said[1] == [] and rows(tmp_path / "b" / "train.jsonl")[0]["completion"].startswith("b")
    assert json.loads((tmp_path / "a" / "card.json").read_text("utf-8"))["notes"] == [note.removeprefix("note: ")]


def test_undesirable_completions_are_no_demonstrations(tmp_path: Path) -> None:
    content = [{"prompt": f"a{i}", "completion": "b", "label": i % 2 == 0} for i in range(20)]
    path, folder = write_rows(tmp_path / "own.jsonl", content), tmp_path / "out"
    result = alignlab("data", "prepare", "jsonl", "--from", path, "-o", folder)
    assert result.code == 0
    labelled = [row for split in SPLITS for row in rows(split_file(folder, "labelled", split))]
    demonstrated = [row for split in SPLITS for row in rows(folder / f"{split}.jsonl")]
    assert len(labelled) == 20 and sum(row["label"] for row in labelled) == len(demonstrated) == 10
    splits = json.loads((folder / "card.json").read_text("utf-8"))["splits"]
    assert sum(splits[split]["labelled"] for split in SPLITS) == 20
    assert sum(splits[split]["desirable"] for split in SPLITS) == 10
    assert f"train: 16 prompts, 16 labelled ({splits['train']['desirable']} desirable)" in result.out


def gsm8k_folder(folder: Path) -> Path:
    def row(i: int, test: bool) -> dict[str, str]:
        return {"question": f"{'How many' if test else 'What'} is {i} and 1?", "answer": f"So {i + 1}.\n#### {i + 1}"}

    folder.mkdir(exist_ok=True)
    write_rows(folder / "train_30.jsonl", [row(i, False) for i in range(30)])
    write_rows(folder / "test.jsonl", [row(i, True) for i in range(6)] + [row(3, False)])
    (folder / "README.md").write_text("# nothing", "utf-8")
    return folder


def test_a_folder_as_it_lies_is_prepared_and_the_card_says_how(tmp_path: Path) -> None:
    where = gsm8k_folder(tmp_path / "gsm8k")
    result = alignlab("data", "prepare", "gsm8k", "--from", where, "--output", tmp_path / "out")
    assert result.code == 0, result.err
    card = json.loads((tmp_path / "out" / "card.json").read_text("utf-8"))
    assert card["task"] == "gsm8k" and card["seed"] == 42 and len(card["sources"]) == 2
    assert {split: card["splits"][split]["prompts"] for split in SPLITS} == {"train": 26, "validation": 3, "test": 7}
    assert sum(card["dropped"].values()) == 1 and card["overlap"]["test"]["exact"] == 0
    assert set(card["overlap"]["test"]) == {"exact", "of", "8-gram", "13-gram", "with_validation"}
    assert set(card["overlap"]["validation"]) == {"exact", "of", "8-gram", "13-gram"}
    assert all("MIT" in source["licence"] for source in card["sources"])
    for split in SPLITS:
        made = rows(tmp_path / "out" / f"{split}.jsonl")
        assert [row["id"] for row in made] == [f"gsm8k/{split}/{i:05d}" for i in range(len(made))]
        assert all(row["messages"][0]["role"] == "system" and row["task"] == "gsm8k" for row in made)
        assert card["files"][f"{split}.jsonl"]["rows"] == len(made)
    assert "overlap of test with train: 0 of 7 prompts exactly" in result.out and "dropped: 1 rows of" in result.out
    assert "MIT; Cobbe" in result.out


def test_the_same_command_gives_the_same_bytes_and_another_seed_others(tmp_path: Path) -> None:
    where = gsm8k_folder(tmp_path / "gsm8k")
    for name, seed in (("one", "42"), ("two", "42"), ("three", "7")):
        assert alignlab("data", "prepare", "gsm8k", "--from", where, "-o", tmp_path / name, "--seed", seed).code == 0
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two") != files_of(tmp_path / "three")


def test_sizes_slices_columns_and_system_prompt_are_as_asked(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "x.jsonl", [{"q": f"What is {i}?", "answer": f"It.\n#### {i}"} for i in range(40)])
    result = alignlab("data", "prepare", "gsm8k", "--from", path, "-o", tmp_path / "out", "--split", "train[:30]",
                      "--train", "5", "--validation", "4", "--test", "3", "--column", "question=q",
                      "--system-prompt", "")  # fmt: skip
    assert result.code == 0, result.err
    assert [len(rows(tmp_path / "out" / f"{split}.jsonl")) for split in SPLITS] == [5, 4, 3]
    numbers = [int(row["answer"]) for split in SPLITS for row in rows(tmp_path / "out" / f"{split}.jsonl")]
    assert max(numbers) < 30
    assert rows(tmp_path / "out" / "train.jsonl")[0]["messages"][0]["role"] == "user"


def test_lookalikes_come_with_safety_and_only_to_be_tested_on(tmp_path: Path) -> None:
    goals = write_rows(tmp_path / "goals.jsonl", [{"goal": f"Do bad thing {i}"} for i in range(20)])
    assert alignlab("data", "prepare", "safety", "--from", goals, "-o", tmp_path / "out").code == 0
    made = {split: rows(tmp_path / "out" / f"{split}.jsonl") for split in ("validation", "test")}
    assert not (tmp_path / "out" / "train.jsonl").exists()
    assert sum(not row["meta"]["harmful"] for row in made["test"]) == 60
    assert sum(not row["meta"]["harmful"] for row in made["validation"]) == 20
    first = [row["meta"]["harmful"] for row in made["test"][:20]]
    assert 3 <= sum(first) <= 6  # 16 of 76 are harmful: every beginning is like the whole


def test_a_folder_is_replaced_only_when_that_is_said_and_only_what_was_prepared(tmp_path: Path) -> None:
    where, out = gsm8k_folder(tmp_path / "gsm8k"), tmp_path / "out"
    arguments = ("data", "prepare", "gsm8k", "--from", where, "--output", out)
    assert alignlab(*arguments).code == 0
    before = files_of(out)
    again = alignlab(*arguments)
    assert again.code == 2 and "exists" in again.errors[0] and files_of(out) == before
    assert alignlab(*arguments, "--force", "--seed", "1").code == 0 and files_of(out) != before
    (out / "mine.txt").write_text("x", "utf-8")
    refused = alignlab(*arguments, "--force")
    assert refused.code == 2 and "mine.txt" in refused.errors[0] and (out / "mine.txt").is_file()
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


BAD: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "unknown task": (("prepare", "gsm8"), ("no task is named 'gsm8'", "did you mean 'gsm8k'?")),
    "own rows without a file": (("prepare", "jsonl"), ("name them with --from",)),
    "task without a set": (("prepare", "reasoning"), ("has no public set",)),
    "no such file": (("prepare", "gsm8k", "--from", "nowhere"), ("nowhere: no such file or folder",)),
    "missing file": (("prepare", "gsm8k", "--from", "nowhere.jsonl"), ("nowhere.jsonl: no such file",)),
    "another set's file": (
        ("prepare", "gsm8k", "--from", "other.jsonl"),
        ("cannot be made of columns prompt", "GSM8K (question, answer)"),
    ),
    "folder without any": (("prepare", "gsm8k", "--from", "empty"), ("none of its files", "no data files")),
    "folder of others": (("prepare", "gsm8k", "--from", "others"), ("none of its files", "other.jsonl")),
    "bad split": (("prepare", "gsm8k", "--from", "own", "--split", "train[5]"), ("cannot read the split",)),
    "split of no name": (
        ("prepare", "gsm8k", "--from", "own", "--split", "all[:5]"),
        ("cannot read the split 'all[:5]'",),
    ),
    "empty slice": (("prepare", "gsm8k", "--from", "own", "--split", "train[90:]"), ("holds no rows",)),
    "bad column": (("prepare", "gsm8k", "--from", "own", "--column", "question"), ("OURS=THEIRS",)),
    "unknown column": (
        ("prepare", "gsm8k", "--from", "own", "--column", "question=qestion"),
        ("no column 'qestion'", "did you mean 'question'?"),
    ),
    "unknown set": (("prepare", "code", "--set", "conale", "--from", "own"), ("no set 'conale'", "CoNaLa")),
    "nothing usable": (("prepare", "gsm8k", "--from", "useless.jsonl"), ("none of 2 rows is usable", "no number")),
    "one row": (("prepare", "jsonl", "--from", "one.jsonl"), ("no row is left for validation",)),
    "binary": (("prepare", "jsonl", "--from", "binary.jsonl"), ("binary.jsonl: is a binary file",)),
    "output is a file": (("prepare", "gsm8k", "--from", "own", "-o", "one.jsonl"), ("one.jsonl: exists",)),
    "offline hub": (("prepare", "gsm8k"), ("openai/gsm8k", "--from PATH")),
    "shown nothing": (("show", "nowhere"), ("no such file or folder, and no task",)),
    "shown unprepared": (("show", "gsm8k"), ("alignlab data prepare gsm8k",)),
    "shown misspelt": (("show", "gsm8"), ("did you mean 'gsm8k'?",)),
    "shown raw folder": (("show", "others"), ("nobody prepared",)),
    "shown split": (("show", "code", "--split", "tset"), ("no split 'tset'", "test, train, validation")),
    "shown split of a file": (
        ("show", "other.jsonl", "--split", "foo"),
        ("other.jsonl: has no split 'foo'", "only train", "[5:9]", "data prepare"),
    ),
    "shown slice of no split": (("show", "other.jsonl", "--split", "test[:1]"), ("has no split 'test'",)),
    "shown with no model": (("show", "code", "--tokenizer", "./none"), ("./none",)),
    "audited columns": (("audit", "strange.jsonl"), ("no column for prompt", "map it with --column prompt=COLUMN")),
    "shown columns": (("show", "alpaca.jsonl"), ("no column for prompt", "map it with --column prompt=instruction")),
    "prepared columns": (
        ("prepare", "jsonl", "--from", "alpaca.jsonl"),
        ("no column for prompt", "map it with --column prompt=instruction"),
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_wrong_is_one_line_and_leaves_nothing(case: str, tmp_path: Path) -> None:
    gsm8k_folder(tmp_path / "own")
    (tmp_path / "empty").mkdir()
    (tmp_path / "others").mkdir()
    for path in (tmp_path / "other.jsonl", tmp_path / "others" / "other.jsonl"):
        write_rows(path, [{"prompt": "a"}])
    write_rows(tmp_path / "useless.jsonl", [{"question": "a", "answer": "b"}] * 2)
    write_rows(tmp_path / "one.jsonl", [{"prompt": "a", "completion": "b"}])
    write_rows(tmp_path / "strange.jsonl", [{"foo": "a", "bar": "b"}])
    write_rows(tmp_path / "alpaca.jsonl", [{"instruction": "a", "input": "", "output": "b"}])
    (tmp_path / "binary.jsonl").write_bytes(b"\0\1\2")
    before = files_of(tmp_path)
    arguments, said = BAD[case]
    result = alignlab("data", *arguments, cwd=tmp_path)
    assert result.code == 2 and len(result.errors) == 1, result.err
    assert all(word in result.errors[0] for word in said), result.errors
    assert files_of(tmp_path) == before and "Traceback" not in result.err


def test_sets_are_fetched_from_the_hub_by_their_own_splits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked_for: list[tuple[str, str | None, str | None]] = []

    def load_dataset(name: str, config: str | None = None, split: str | None = None, **_: Any) -> list[dict[str, str]]:
        asked_for.append((name, config, split))
        return [{"question": f"{split} {i}?", "answer": f"It.\n#### {i}"} for i in range(20)]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for out, named in (("a", ()), ("b", ("--from", "openai/gsm8k"))):
        result = alignlab("data", "prepare", "gsm8k", *named, "-o", tmp_path / out)
        assert result.code == 0, result.err
    assert asked_for == [("openai/gsm8k", "main", "train"), ("openai/gsm8k", "main", "test")] * 2
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")


def test_a_gated_set_says_where_its_terms_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*_: Any, **__: Any) -> None:
        raise datasets.exceptions.DatasetNotFoundError("Dataset 'x' is a gated dataset on the Hub.")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    result = alignlab("data", "prepare", "orca", "-o", tmp_path / "out")
    assert result.code == 2 and len(result.errors) == 1
    assert all(
        word in result.errors[0] for word in ("gated", "huggingface.co/datasets/Intel", "HF_TOKEN", "--from PATH")
    )


def test_a_hub_that_does_not_answer_is_one_line_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """It is asked once; then the cache is looked into as in offline mode, which is put back."""
    heads: list[float] = []

    class Session:
        def head(self, url: str, timeout: float) -> None:
            heads.append(timeout)
            raise OSError("Name or service not known")

    for place in (huggingface_hub.constants, datasets.config):
        monkeypatch.setattr(place, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "get_session", Session)
    before = time.monotonic()
    result = alignlab("data", "prepare", "gsm8k", "-o", tmp_path / "out")
    assert time.monotonic() - before < 5 and len(heads) == 1 and heads[0] <= 5
    assert result.code == 2 and len(result.errors) == 1 and "Retry" not in result.err + "".join(capfd.readouterr())
    assert all(word in result.errors[0] for word in ("gsm8k: the hub cannot be reached", "--from PATH")), result.errors
    assert not huggingface_hub.constants.HF_HUB_OFFLINE and not datasets.config.HF_HUB_OFFLINE


def test_a_hub_that_does_not_answer_leaves_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(name: str, *_: Any, split: str, **__: Any) -> list[dict[str, str]]:
        assert datasets.config.HF_HUB_OFFLINE and huggingface_hub.constants.HF_HUB_OFFLINE
        return [{"question": f"{split} {i}?", "answer": f"It.\n#### {i}"} for i in range(20)]

    for place in (huggingface_hub.constants, datasets.config):
        monkeypatch.setattr(place, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "get_session", lambda: None)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert alignlab("data", "prepare", "gsm8k", "-o", tmp_path / "out").code == 0


def test_every_hub_place_has_a_name_and_a_known_split() -> None:
    for name in ("safety", "clinical", "code", "gsm8k", "rubric", "ultrafeedback", "genrm", "orca", "hh"):
        for source in get_task(name).sources:
            for split, places in source.hub.items():
                assert split in SPLITS
                for place in (places,) if isinstance(places, Hub) else places:
                    assert place.where.startswith("https://") or (place.split and "/" in place.where)


# ---- real slices -----------------------------------------------------------------------------------------------------

REAL: Mapping[str, tuple[tuple[str, ...], tuple[int, int, int]]] = {
    "safety": (("hh_rlhf", "simple_safety_tests", "advbench", "hhh_alignment"), (797, 224, 758)),
    "clinical": (("mts_dialog",), (1196, 100, 200)),
    "code": (("conala", "mbpp", "humaneval"), (2204, 253, 893)),
    "gsm8k": (("gsm8k",), (1800, 200, 1319)),
    "rubric": (("biggen_bench",), (160, 20, 20)),
    "ultrafeedback": (("ultrafeedback",), (895, 99, 148)),
    "genrm": (("ultrafeedback",), (1790, 198, 398)),
    "orca": (("orca_dpo_pairs",), (228, 28, 28)),
    "hh": (("hh_rlhf",), (797, 100, 100)),
}


@pytest.mark.parametrize("task", REAL)
def test_real_slices_are_prepared_as_they_lie(task: str, tmp_path: Path, shared_data: Path) -> None:
    folders, counts = REAL[task]
    named = [word for folder in folders for word in ("--from", str(shared_data / folder))]
    result = alignlab("data", "prepare", task, *named, "-o", tmp_path / "out")
    assert result.code == 0, result.err
    card = json.loads((tmp_path / "out" / "card.json").read_text("utf-8"))
    assert tuple(card["splits"][split]["prompts"] for split in SPLITS) == counts
    keys = {split: {normal(row) for row in every_row(tmp_path / "out", split)} for split in SPLITS}
    assert not keys["train"] & keys["test"] and not keys["train"] & keys["validation"]
    assert not keys["validation"] & keys["test"]
    assert card["overlap"]["test"]["exact"] == card["overlap"]["validation"]["exact"] == 0


def every_row(folder: Path, split: str) -> Iterator[dict[str, Any]]:
    for path in folder.glob(f"*{split}.jsonl"):
        yield from rows(path)


def normal(row: Mapping[str, Any]) -> str:
    return " ".join(" ".join(m["content"] for m in row["messages"] if m["role"] != "system").lower().split())


def test_the_whole_folder_of_slices_serves_any_task(tmp_path: Path, shared_data: Path) -> None:
    result = alignlab("data", "prepare", "orca", "--from", shared_data, "-o", tmp_path / "out")
    assert result.code == 0 and "284 rows" in result.out, result.err


def test_mbpp_keeps_its_authors_split(tmp_path: Path, shared_data: Path) -> None:
    result = alignlab(
        "data", "prepare", "code", "--set", "mbpp", "--from", shared_data / "mbpp", "-o", tmp_path / "out"
    )
    assert result.code == 0, result.err
    assert [len(rows(tmp_path / "out" / f"{split}.jsonl")) for split in SPLITS] == [127, 43, 257]
