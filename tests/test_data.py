"""Files, hub sets and every usual format -> examples; order, split and batches; what bad data is answered with."""

from __future__ import annotations

import gzip
import http.server
import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from alignlab.data import (
    DataSource,
    collate,
    fingerprint,
    fit,
    left_pad,
    load_examples,
    order,
    plan_microbatches,
    read_rows,
    take,
)
from alignlab.errors import UserError
from alignlab.types import Labelled, Message, Pair, Prompt, Row

Write = Callable[[str, Any], str]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes text, bytes or rows (as JSONL) below a name and gives the path."""

    def do(name: str, content: Any) -> str:
        path = tmp_path / name
        if isinstance(content, list):
            content = "".join(json.dumps(row) + "\n" for row in content)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(path)

    return do


def refusal(call: Callable[[], object]) -> str:
    """The one line that a call is refused with."""
    with pytest.raises(UserError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- files -----------------------------------------------------------------------------------------------------------

ROWS = [{"prompt": f"p{i}", "completion": f"c{i}"} for i in range(10)]
TEXT = "".join(json.dumps(row) + "\n" for row in ROWS)
CSV = "prompt,completion\n" + "".join(f"p{i},c{i}\n" for i in range(10))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", TEXT),
        ("a.jsonl", TEXT.replace("\n", "\r\n")),
        ("a.jsonl", "\ufeff" + TEXT),
        ("a.jsonl", TEXT.replace("\n", "\n\n").rstrip()),
        ("a.json", json.dumps(ROWS, indent=1)),
        ("a.json", json.dumps({"data": ROWS})),
        ("a.json", TEXT),
        ("a.csv", CSV),
        ("a.csv", "\ufeff" + CSV.replace("\n", "\r\n")),
        ("a.csv", CSV.replace("\n", "\n\n").rstrip()),
        ("a.tsv", CSV.replace(",", "\t")),
        ("a.jsonl.gz", gzip.compress(TEXT.encode(), mtime=0)),
        ("a.json.gz", gzip.compress(json.dumps(ROWS).encode(), mtime=0)),
        ("a.csv.gz", gzip.compress(CSV.encode(), mtime=0)),
        ("with space and ümlaut.jsonl", TEXT),
    ],
    ids=lambda value: value if isinstance(value, str) and "." in value[:40] and len(value) < 40 else "",
)
def test_every_kind_of_file_is_read(write: Write, name: str, content: Any) -> None:
    assert read_rows(write(name, content)) == ROWS


def test_parquet_is_read(tmp_path: Path) -> None:
    rows = [{"messages": [{"role": "user", "content": "a"}], "answer": "b"}] * 3
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert read_rows(tmp_path / "a.parquet") == rows


def test_csv_fields_span_lines_and_are_text(write: Write) -> None:
    path = write("a.csv", 'id,text\r\n1,"He said ""hi"",\r\nthen left"\r\n007,NA\r\n')
    assert read_rows(path) == [{"id": "1", "text": 'He said "hi",\nthen left'}, {"id": "007", "text": "NA"}]


def test_long_csv_fields_are_read(write: Write) -> None:
    assert len(read_rows(write("a.csv", "text\n" + "x" * 300_000 + "\n"))[0]["text"]) == 300_000


def test_line_separators_within_json_strings_stay(write: Write) -> None:
    path = write("a.jsonl", '{"text": "a\u2028b\u0085c"}\n')
    assert read_rows(path) == [{"text": "a\u2028b\u0085c"}]


def test_home_and_file_names_are_expanded(write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write("a.jsonl", TEXT)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    assert read_rows("~/a.jsonl") == ROWS


@pytest.mark.parametrize(
    ("split", "expected"),
    [
        ("train", range(10)),
        ("train[:3]", range(3)),
        ("[5:9]", range(5, 9)),
        ("train[10%:20%]", range(1, 2)),
        ("test[-2:]", range(8, 10)),
        ("[:-50%]", range(5)),
        ("[:500]", range(10)),
        (None, range(10)),
    ],
)
def test_split_slices_of_files(write: Write, split: str | None, expected: range) -> None:
    assert read_rows(write("a.jsonl", TEXT), split=split) == [ROWS[i] for i in expected]


BAD_FILES = {
    "missing": ("b.jsonl", None, "no such file"),
    "empty": ("a.jsonl", "", "is empty"),
    "blank": ("a.csv", " \n\n", "is empty"),
    "no rows": ("a.json", "[]", "holds no rows"),
    "header alone": ("a.csv", "prompt,completion\n", "holds no rows"),
    "suffix": ("a.xlsx", "x", "cannot read .xlsx; there are: .jsonl"),
    "no suffix": ("a", "x", "cannot read a file without suffix"),
    "binary": ("a.jsonl", b"\x89PNG\r\n\x1a\n\x00\x00", "is a binary file"),
    "utf-16": ("a.csv", "prompt\nx\n".encode("utf-16"), "is UTF-16; save it as UTF-8"),
    "latin-1": ("a.jsonl", TEXT.encode() + "é".encode("latin-1"), "line 11: the byte 0xe9 is not UTF-8"),
    "not gzip": ("a.jsonl.gz", b"\x1f\x8bgarbage", "cannot be read"),
    "cut gzip": ("a.jsonl.gz", gzip.compress(TEXT.encode(), mtime=0)[:-12], "cannot be read"),
    "not parquet": ("a.parquet", b"PAR?", "is no parquet file"),
    "invalid line": ("a.jsonl", TEXT + '{"prompt": \n', "line 11: invalid JSON: Expecting value at column"),
    "list in jsonl": ("a.jsonl", '{"a": 1}\n[1, 2]\n', "line 2: expected an object, found a list"),
    "invalid json": ("a.json", '[\n{"a": 1},\n{"a" 2}\n]', "line 3: invalid JSON"),
    "object at the top": ("a.json", '{"rows": [], "x": 1}', "found an object with rows, x"),
    "number at the top": ("a.json", "5", "found a number"),
    "texts in a list": ("a.json", '[{"a": 1}, "x"]', "row 2: expected an object, found text"),
    "deep": ("a.json", "[" * 100_000, "is nested too deeply"),
    "deep line": ("a.jsonl", '{"a": 1}\n{"a": ' + "[" * 100_000, "line 2: is nested too deeply"),
    "ragged csv": ("a.csv", "a,b\n1,2\n1,2,3\n", "line 3: 3 fields, but 2 columns"),
    "short csv": ("a.csv", "a,b\n1\n", "line 2: 1 fields, but 2 columns"),
    "open quote": ("a.csv", 'a,b\n1,"2\n', "invalid CSV: unexpected end of data"),
    "same column": ("a.csv", "a,a\n1,2\n", "two columns are named 'a'"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_files_are_refused_in_one_line(write: Write, tmp_path: Path, case: str) -> None:
    name, content, said = BAD_FILES[case]
    if content is not None:
        write(name, content)
    message = refusal(lambda: read_rows(tmp_path / name))
    assert said in message
    assert message.startswith(str(tmp_path / name))


def test_a_misspelt_file_is_answered_with_the_nearest(write: Write, tmp_path: Path) -> None:
    write("train.jsonl", TEXT)
    assert "did you mean 'train.jsonl'?" in refusal(lambda: read_rows(tmp_path / "trian.jsonl"))


def test_a_folder_is_answered_with_its_files(write: Write, tmp_path: Path) -> None:
    write("train.jsonl", TEXT)
    assert "is a folder; name one file: train.jsonl" in refusal(lambda: read_rows(tmp_path))


@pytest.mark.parametrize("split", ["train[5]", "train[a:b]", "train[:5", "train+test", "[1:2:3]"])
def test_bad_splits_are_answered_with_good_ones(write: Write, split: str) -> None:
    path = write("a.jsonl", TEXT)
    assert "write train, train[:200], train[10%:20%] or [5:9]" in refusal(lambda: read_rows(path, split=split))


# ---- addresses and the hub -------------------------------------------------------------------------------------------


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    handler = partial(Quiet, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        thread = threading.Thread(target=running.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ALIGNLAB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.usefixtures("own_cache")
def test_files_behind_addresses_are_fetched_once(write: Write, server: str, tmp_path: Path) -> None:
    write("a.csv", CSV)
    assert read_rows(f"{server}/a.csv") == ROWS
    (tmp_path / "a.csv").unlink()
    assert read_rows(f"{server}/a.csv", split="[:2]") == ROWS[:2]
    assert "the server answers 404" in refusal(lambda: read_rows(f"{server}/b.csv"))


@pytest.mark.usefixtures("own_cache")
def test_an_address_nobody_answers_is_said() -> None:
    assert "cannot be reached" in refusal(lambda: read_rows("http://127.0.0.1:9/a.csv"))


def hub_raises(monkeypatch: pytest.MonkeyPatch, error: Exception) -> str:
    def load(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(datasets, "load_dataset", load)
    return refusal(lambda: load_examples(DataSource(hub="openai/gsm8k", hub_config="main"), "prompts"))


def test_hub_sets_are_read_with_their_own_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def load(*where: object, **how: object) -> datasets.Dataset:
        asked.append((where, how))
        return datasets.Dataset.from_list([{"question": f"q{i}", "answer": f"#### {i}"} for i in range(4)])

    monkeypatch.setattr(datasets, "load_dataset", load)
    source = DataSource(hub="openai/gsm8k", hub_config="main", split="train[:4]", validation_fraction=0.25)
    loaded = load_examples(source, "prompts")
    assert asked == [(("openai/gsm8k", "main"), {"split": "train[:4]"})]
    assert loaded.items[0].id == "openai/gsm8k/train[:4]/0"
    assert read_rows("openai/gsm8k", config="main")[3] == {"question": "q3", "answer": "#### 3"}


def test_hub_errors_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    missing = datasets.exceptions.DatasetNotFoundError("Dataset 'x' doesn't exist on the Hub or cannot be accessed.")
    gated = datasets.exceptions.DatasetNotFoundError("Dataset 'x' is a gated dataset on the Hub.")
    said = [
        hub_raises(monkeypatch, missing),
        hub_raises(monkeypatch, gated),
        hub_raises(monkeypatch, ConnectionError("Couldn't reach 'x' on the Hub (OfflineModeIsEnabled)")),
        hub_raises(monkeypatch, ConnectionError("Couldn't reach 'x' on the Hub (LocalEntryNotFoundError)")),
        hub_raises(monkeypatch, ValueError("Unknown split \"dev\". Should be one of ['train'].\nmore")),
    ]
    assert "no such data set" in said[0]
    assert "accept its terms at https://huggingface.co/datasets/openai/gsm8k and set HF_TOKEN" in said[1]
    assert "offline mode is on" in said[2]
    assert "is there a network?" in said[3]
    assert said[4].endswith("Should be one of ['train'].")
    assert len({message.split(":", 1)[1] for message in said}) == 5


def test_nothing_named_is_refused() -> None:
    assert "data.path" in refusal(lambda: load_examples(DataSource(), "prompts"))


# ---- formats ---------------------------------------------------------------------------------------------------------


def load(kind: Any, rows: list[dict[str, Any]], tmp_path: Path, **fields: Any) -> tuple[Any, ...]:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    items: tuple[Any, ...] = load_examples(DataSource(path=str(path), validation_fraction=0.0, **fields), kind).items
    return items


def turns(item: Any) -> list[tuple[str, str]]:
    prompt = item if isinstance(item, Prompt) else item.prompt
    return [(message.role, message.content) for message in prompt.messages]


USER, SYSTEM = {"role": "user", "content": "q"}, {"role": "system", "content": "s"}
ANSWER, OTHER = {"role": "assistant", "content": "a"}, {"role": "assistant", "content": "b"}
EXAMPLES: dict[str, tuple[dict[str, Any], list[tuple[str, str]]]] = {
    "prompt and completion": ({"prompt": "q", "completion": "a"}, [("user", "q")]),
    "question and answer": ({"question": "q", "answer": "a"}, [("user", "q")]),
    "messages": ({"messages": [SYSTEM, USER, ANSWER]}, [("system", "s"), ("user", "q")]),
    "starter row": ({"messages": [USER], "completion": "a", "answer": "12"}, [("user", "q")]),
    "message prompt": ({"prompt": [USER], "completion": "a"}, [("user", "q")]),
    "message completion": ({"prompt": [USER], "completion": [ANSWER]}, [("user", "q")]),
    "sharegpt": (
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        [("user", "q")],
    ),
    "chosen side": ({"prompt": "q", "chosen": "a", "rejected": "b"}, [("user", "q")]),
    "text": ({"text": "a"}, []),
}


@pytest.mark.parametrize("case", EXAMPLES)
def test_demonstrations_in_every_format(tmp_path: Path, case: str) -> None:
    row, expected = EXAMPLES[case]
    (item,) = load("examples", [row], tmp_path)
    assert turns(item) == expected
    assert item.completion == "a"
    assert item.prompt.id == "rows/0"


PAIRS: dict[str, tuple[dict[str, Any], list[tuple[str, str]]]] = {
    "prompt": ({"prompt": "q", "chosen": "a", "rejected": "b"}, [("user", "q")]),
    "orca": (
        {"system": "s", "question": "q", "chosen": "a", "rejected": "b"},
        [("system", "s"), ("user", "q")],
    ),
    "starter row": ({"messages": [USER], "chosen": "a", "rejected": "b"}, [("user", "q")]),
    "prompt and whole messages": (
        {"prompt": "q", "chosen": [USER, ANSWER], "rejected": [USER, OTHER]},
        [("user", "q")],
    ),
    "whole messages": (
        {"chosen": [SYSTEM, USER, ANSWER], "rejected": [SYSTEM, USER, OTHER]},
        [("system", "s"), ("user", "q")],
    ),
    "last messages": ({"prompt": [USER], "chosen": [ANSWER], "rejected": [OTHER]}, [("user", "q")]),
    "sharegpt": (
        {
            "conversations": [{"from": "human", "value": "q"}],
            "chosen": {"from": "gpt", "value": "a"},
            "rejected": {"from": "gpt", "value": "b"},
        },
        [("user", "q")],
    ),
    "zephyr": (
        {"prompt": "q", "messages": [USER, ANSWER], "chosen": [USER, ANSWER], "rejected": [USER, OTHER]},
        [("user", "q")],
    ),
    "transcripts": (
        {
            "chosen": "\n\nHuman: x\n\nAssistant: y\n\nHuman: q\n\nAssistant: a",
            "rejected": "\n\nHuman: x\n\nAssistant: y\n\nHuman: q\n\nAssistant: b",
        },
        [("user", "x"), ("assistant", "y"), ("user", "q")],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", PAIRS)
def test_pairs_in_every_format(tmp_path: Path, case: str) -> None:
    row, expected = PAIRS[case]
    (item,) = load("pairs", [row], tmp_path)
    assert turns(item) == expected
    assert (item.chosen, item.rejected) == ("a", "b")
    (asked,) = load("prompts", [row], tmp_path)
    assert turns(asked) == expected


LABELLED: dict[str, dict[str, Any]] = {
    "trl": {"prompt": "q", "completion": "a", "label": True},
    "trl's conversations": {"prompt": [USER], "completion": [ANSWER], "label": True},
    "question and answer": {"question": "q", "answer": "a", "label": 1},
    "messages": {"messages": [USER, ANSWER], "label": "true"},
    "sharegpt": {
        "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}],
        "label": 1,
    },
    "labels go before pairs": {"prompt": "q", "completion": "a", "label": 1, "chosen": "x", "rejected": "y"},
}


@pytest.mark.parametrize("case", LABELLED)
def test_labelled_completions_in_every_format(tmp_path: Path, case: str) -> None:
    (item,) = load("labelled", [LABELLED[case]], tmp_path)
    assert turns(item) == [("user", "q")]
    assert isinstance(item, Labelled) and (item.completion, item.label) == ("a", True)


@pytest.mark.parametrize("yes, no", [(True, False), (1, 0), (1, -1), ("true", "false"), ("True", "FALSE "), ("1", "0"),
                                     ("+1", "-1"), (1.0, -1.0)])  # fmt: skip
def test_labels_are_written_in_many_ways(tmp_path: Path, yes: Any, no: Any) -> None:
    rows = [{"prompt": "q", "completion": "a", "thumb": value} for value in (yes, no, no)]
    assert [i.label for i in load("labelled", rows, tmp_path, columns={"label": "thumb"})] == [True, False, False]


@pytest.mark.parametrize("value", [2, -2, 0.5, "yes", "", None, [True], 5.0])
def test_any_other_label_is_an_error_naming_row_and_value(tmp_path: Path, value: Any) -> None:
    rows = [{"prompt": "q", "completion": "a", "label": x} for x in (True, value)]
    message = refusal(lambda: load("labelled", rows, tmp_path))
    assert f"row 2: column 'label' holds {value!r}, expected true or false, 1 or 0, or 1 or -1" in message


def test_pairs_are_taken_apart_where_labels_are_wanted(write: Write) -> None:
    """chosen is desirable, rejected is not; the split is that of the pairs; the report and the limit count pairs."""
    rows = [{"prompt": f"q{i}", "chosen": f"good {i}", "rejected": f"bad {i}"} for i in range(40)]
    source = DataSource(path=write("a.jsonl", rows), limit=20)
    pairs, labelled = load_examples(source, "pairs"), load_examples(source, "labelled")
    expected = [(p.prompt, text, good) for p in pairs.items for text, good in ((p.chosen, True), (p.rejected, False))]
    assert [(i.prompt, i.completion, i.label) for i in labelled.items] == expected
    assert len(labelled.items) == 40 and labelled.report == pairs.report


def test_a_label_column_is_nothing_special_elsewhere(tmp_path: Path) -> None:
    (asked,) = load("prompts", [{"prompt": "q", "label": "toxic"}], tmp_path)
    assert asked.meta == {"label": "toxic"}
    (item,) = load("labelled", [{"prompt": "q", "completion": "a", "label": 1, "more": 2}], tmp_path)
    assert item.prompt.meta == {"more": 2}


def test_one_completion_with_both_labels_is_no_duplicate(write: Write) -> None:
    rows = [{"prompt": "q", "completion": "a", "label": x} for x in (1, 0, 0)]
    source = DataSource(path=write("a.jsonl", rows), validation_fraction=0.0)
    assert load_examples(source, "labelled").report.num_duplicates == 1


def test_prompts_lose_the_answer_at_the_end(tmp_path: Path) -> None:
    (asked,) = load("prompts", [{"messages": [USER, ANSWER]}], tmp_path)
    assert turns(asked) == [("user", "q")]


def test_transcripts_keep_odd_turns(tmp_path: Path) -> None:
    """hh-rlhf has turns of one speaker in a row, and names within sentences."""
    start = "\n\nHuman: one\n\nHuman: two\n\nAssistant: I am no Human: nor\n\nAssistant: three"
    said = f"{start}\n\nHuman:  q \n\nAssistant: a"
    (item,) = load("pairs", [{"chosen": said, "rejected": said[:-1] + "b"}], tmp_path)
    assert turns(item) == [("user", "one\n\ntwo"), ("assistant", "I am no Human: nor\n\nthree"), ("user", "q")]


def test_a_prompt_may_be_a_transcript(tmp_path: Path) -> None:
    row = {"prompt": "x\n\nAssistant: y\n\nHuman: q", "chosen": "a", "rejected": "b"}
    assert turns(load("pairs", [row], tmp_path)[0]) == [("user", row["prompt"])]
    expected = [("user", "x"), ("assistant", "y"), ("user", "q")]
    assert turns(load("pairs", [row], tmp_path, format="transcript")[0]) == expected
    row["prompt"] = "\n\nHuman: x\n\nAssistant: y\n\nHuman: q\n\nAssistant:"
    assert turns(load("pairs", [row], tmp_path, format="transcript")[0]) == expected


def test_completions_are_kept_as_given(tmp_path: Path) -> None:
    (item,) = load("examples", [{"prompt": " q\n", "completion": "  a \n"}], tmp_path)
    assert turns(item) == [("user", " q\n")]
    assert item.completion == "  a \n"


def test_worked_answers_keep_their_number_for_grading(tmp_path: Path) -> None:
    worked = "She has 1,200 + 34.\n#### 1,234"
    (asked,) = load("prompts", [{"question": "q", "answer": worked}], tmp_path)
    assert (asked.answer, asked.meta) == ("1234", {"grading": "number"})
    (shown,) = load("examples", [{"question": "q", "answer": worked}], tmp_path)
    assert shown.completion == worked
    assert shown.prompt.answer == "1234"
    (numbered,) = load("prompts", [{"question": "q", "answer": 7}], tmp_path)
    assert (numbered.answer, numbered.meta) == ("7", {})


def test_id_task_answer_and_meta_are_kept(tmp_path: Path) -> None:
    row = {"id": "r/1", "task": "reasoning", "messages": [USER], "answer": "12", "meta": {"key": "a"}, "extra": [1]}
    (asked,) = load("prompts", [row], tmp_path)
    assert (asked.id, asked.task, asked.answer) == ("r/1", "reasoning", "12")
    assert asked.meta == {"extra": [1], "key": "a"}
    assert load("prompts", [row], tmp_path, task="gsm8k")[0].task == "gsm8k"


def test_ids_are_unique_and_follow_the_file(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"id": 5, "prompt": "a"}, {"id": 5, "prompt": "b"}, {"prompt": "c"}]
    assert [item.id for item in load("prompts", rows, tmp_path)] == ["5", "5#2", "rows/2"]
    assert [item.id for item in load("prompts", rows[2:] * 4, tmp_path, split="[2:]")] == ["rows/2", "rows/3"]


def test_margins_come_from_the_scores(tmp_path: Path) -> None:
    pair = {"prompt": "q", "chosen": "a", "rejected": "b"}
    rows: list[dict[str, Any]] = [{**pair, "margin": 2}, {**pair, "score_chosen": 7.5, "score_rejected": "7"}, pair]
    assert [item.margin for item in load("pairs", rows, tmp_path)] == [2.0, 0.5, None]


def test_columns_are_mapped(tmp_path: Path) -> None:
    columns = {"prompt": "intent", "completion": "snippet"}
    (item,) = load(
        "examples", [{"intent": "q", "snippet": "a", "prompt": "other", "note": 1}], tmp_path, columns=columns
    )
    assert turns(item) == [("user", "q")]
    assert item.completion == "a"
    assert item.prompt.meta == {"note": 1}


def test_a_template_makes_the_prompt_of_columns(tmp_path: Path) -> None:
    row = {"dialogue": "Doctor: {hi} %s", "section text": "a", "n": 3}
    fields = {"columns": {"completion": "section text"}, "prompt_template": "Summarise {n}: {dialogue}"}
    (item,) = load("examples", [row], tmp_path, **fields)
    assert turns(item) == [("user", "Summarise 3: Doctor: {hi} %s")]
    assert item.prompt.meta == {}
    wrapped = load("prompts", [{"messages": [SYSTEM, USER]}], tmp_path, prompt_template="<{prompt}>")
    assert turns(wrapped[0]) == [("system", "s"), ("user", "<q>")]


def test_system_prompts_go_before_conversations_without_one(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"messages": [USER]},
        {"messages": [SYSTEM, USER]},
        {"messages": [{**SYSTEM, "content": " "}, USER]},
    ]
    first = [turns(item)[0] for item in load("prompts", rows, tmp_path, system_prompt="own")]
    assert first == [("system", "own"), ("system", "s"), ("system", "own")]
    assert turns(load("prompts", [{"prompt": "q", "system": ""}], tmp_path)[0]) == [("user", "q")]


# ---- what is dropped -------------------------------------------------------------------------------------------------


def dropped(kind: Any, bad: Sequence[dict[str, Any]], tmp_path: Path, good: dict[str, Any]) -> dict[str, int]:
    """Reasons why the bad rows were dropped; the good ones stay."""
    path = tmp_path / "rows.jsonl"
    rows = [good] * (len(bad) + 1) + list(bad)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    loaded = load_examples(DataSource(path=str(path), validation_fraction=0.0), kind)
    assert loaded.report.num_items == len(bad) + 1
    assert loaded.report.num_rows == len(rows)
    assert loaded.report.num_duplicates == len(bad)
    assert min(row for rows in loaded.report.shown.values() for row in rows) == len(bad) + 2
    return dict(loaded.report.dropped)


def test_unusable_demonstrations_are_dropped_and_counted(tmp_path: Path) -> None:
    good = {"prompt": "q", "completion": "a"}
    bad: list[dict[str, Any]] = [{**good, "prompt": value} for value in (None, "", " \n")]
    bad += [{**good, "completion": value} for value in (None, "", "\t")]
    bad += [{**good, "prompt": "\ud800"}]
    assert dropped("examples", bad, tmp_path, good) == {
        "empty prompt": 3,
        "empty completion": 3,
        "half of a surrogate pair": 1,
    }
    bad = [{"messages": [USER]}, {"messages": [USER, {**ANSWER, "content": ""}]}, {"messages": []}]
    assert dropped("examples", bad, tmp_path, {"messages": [USER, ANSWER]}) == {"no completion": 2, "empty prompt": 1}


def test_unusable_pairs_are_dropped_and_counted(tmp_path: Path) -> None:
    good = {"prompt": "q", "chosen": "a", "rejected": "b", "score_chosen": 2, "score_rejected": 1}
    bad: list[dict[str, Any]] = [
        {**good, "chosen": "b"},
        {**good, "chosen": " b\n"},
        {**good, "rejected": None},
        {**good, "score_chosen": 0},
    ]
    assert dropped("pairs", bad, tmp_path, good) == {
        "chosen equals rejected": 2,
        "empty rejected": 1,
        "chosen is scored below rejected": 1,
    }


def test_unusable_labelled_completions_are_dropped_and_counted(tmp_path: Path) -> None:
    good = {"prompt": "q", "completion": "a", "label": True}
    bad = [{**good, "completion": " "}, {**good, "completion": None}, {**good, "prompt": ""}]
    assert dropped("labelled", bad, tmp_path, good) == {"empty completion": 2, "empty prompt": 1}
    talk = {"messages": [USER, ANSWER], "label": True}
    assert dropped("labelled", [{"messages": [USER], "label": False}], tmp_path, talk) == {"no completion": 1}


def test_unusable_transcripts_are_dropped_and_counted(tmp_path: Path) -> None:
    start = "\n\nHuman: q\n\nAssistant:"
    good = {"chosen": f"{start} a", "rejected": f"{start} b"}
    bad = [
        {**good, "rejected": "\n\nHuman: other\n\nAssistant: b"},
        {**good, "chosen": f"{start} "},
        {**good, "chosen": f"{start} a\n\nHuman: z"},
        {key: value.replace("\n\nHuman: q", "\n\nAssistant: x\n\nHuman: q", 1) for key, value in good.items()},
    ]
    assert dropped("pairs", bad, tmp_path, good) == {
        "chosen and rejected have different prompts": 1,
        "empty chosen": 2,
        "turns do not alternate": 1,
    }


def test_too_many_unusable_rows_are_an_error(write: Write) -> None:
    good, bad = {"prompt": "q", "chosen": "a", "rejected": "b"}, {"prompt": "q", "chosen": "a", "rejected": "a"}
    path = write("a.jsonl", [good, bad, bad, bad, bad, bad])
    message = refusal(lambda: load_examples(DataSource(path=path), "pairs"))
    assert "5 of 6 rows are unusable, over 50%: 5 chosen equals rejected (row 2, 3, 4, ..)" in message
    source = DataSource(path=path, max_dropped_fraction=0.9)
    assert load_examples(source, "pairs").report.num_items == 1


def test_the_report_is_one_line(write: Write) -> None:
    rows = [{"prompt": f"q{i}", "chosen": "a", "rejected": "a" if i == 3 else "b"} for i in range(30)]
    source = DataSource(path=write("a.jsonl", rows), limit=20)
    report, held_out = (load_examples(source, "pairs", side).report for side in ("train", "validation"))
    dropped = "; dropped 1 chosen equals rejected (row 4)"
    assert str(report).endswith(
        f"a.jsonl (chat): 20 of 30 rows, 4 held back for validation, 5 beyond the limit{dropped}"
    )
    assert str(held_out).endswith(f"a.jsonl (chat): 4 of 30 rows, 25 for training{dropped}")
    whole = load_examples(replace(source, limit=None), "pairs").report
    assert str(whole).endswith(f": 25 of 30 rows, 4 held back for validation{dropped}")


def test_templates_with_literal_braces(write: Write) -> None:
    path = write("a.jsonl", [{"prompt": f"q{i}", "n": i} for i in range(4)])
    source = DataSource(path=path, prompt_template='Answer as {{"n": {n}}}: {prompt}')
    first = load_examples(source, "prompts").items[0]
    assert (
        first.messages[0].content
        == f'Answer as {{"n": {first.messages[0].content[-1]}}}: {first.messages[0].content[-2:]}'
    )
    for template, said in (
        ("Q: {prompt", "a literal brace is written twice"),
        ("Q: prompt}", "a literal brace is written twice"),
        ("Q: {}", "a literal brace is written twice"),
        ("Q: { } {prompt}", "a literal brace is written twice"),
        ("solve this", "does not name a {column}"),
        ("{{prompt}}", "does not name a {column}"),
    ):
        message = refusal(lambda t=template: load_examples(replace(source, prompt_template=t), "prompts"))  # type: ignore[misc]
        assert repr(template) in message and said in message


# ---- what is refused -------------------------------------------------------------------------------------------------

PAIR = {"prompt": "q", "chosen": "a", "rejected": "b"}
BAD_ROWS: dict[str, tuple[str, list[dict[str, Any]], dict[str, Any], str]] = {
    "missing column": ("examples", [{"instruction": "q", "output": "a"}], {}, "data.columns.prompt=instruction"),
    "missing completion": ("examples", [{"prompt": "q", "response": "a"}], {}, "data.columns.completion=response"),
    "renamed column": ("pairs", [{"prompt": "q", "choosen": "a", "rejected": "b"}], {}, "data.columns.chosen=choosen"),
    "what was found": ("pairs", [{"x": "q", "y": "a"}], {}, "pairs need chosen and rejected, and prompt"),
    "no pairs": ("pairs", [{"prompt": "q", "completion": "a"}], {}, "no column for chosen"),
    "pairs without prompt": ("pairs", [{"chosen": "a", "rejected": "b"}], {}, "no column for prompt"),
    "no label": ("labelled", [{"prompt": "q", "completion": "a"}], {}, "no column for label"),
    "another label": ("labelled", [{"prompt": "q", "completion": "a", "rating": 1}], {}, "data.columns.label=rating"),
    "label alone": ("labelled", [{"prompt": "q", "label": True}], {}, "no column for completion"),
    "labels of what": ("labelled", [{"x": "q"}], {}, "labelled need prompt, completion and label, or pairs: prompt"),
    "labels of text": ("labelled", [{"text": "a", "label": 1}], {}, "no labelled in plain text"),
    "half a pair": ("labelled", [{"prompt": "q", "chosen": "a", "label": 1}], {}, "no column for completion"),
    "prompts of text": ("prompts", [{"text": "a"}], {}, "no prompts in plain text"),
    "unknown field": ("pairs", [PAIR], {"columns": {"choosen": "chosen"}}, "did you mean 'chosen'?"),
    "unknown column": ("pairs", [PAIR], {"columns": {"prompt": "promt"}}, "did you mean 'prompt'?; found: prompt, ch"),
    "template": ("pairs", [PAIR], {"prompt_template": "{promt}"}, "no column 'promt' for prompt_template"),
    "format": ("pairs", [PAIR], {"format": "transcrpt"}, "did you mean 'transcript'?"),
    "one row differs": ("pairs", [PAIR, {"prompt": "q", "chosen": "a"}], {}, "row 2: has no column 'rejected'"),
    "number": ("pairs", [PAIR, {**PAIR, "chosen": 5}], {}, "row 2: column 'chosen' holds a number, expected text"),
    "list": ("examples", [{"prompt": "q", "completion": ["a"]}], {}, "row 1: a message is text, expected an object"),
    "flag": ("pairs", [{**PAIR, "rejected": True}], {}, "row 1: column 'rejected' holds true or false, expected text"),
    "prompt object": ("pairs", [{**PAIR, "prompt": {"a": 1}}], {}, "holds an object, expected a list of messages"),
    "messages as text": ("prompts", [{"messages": "[]"}], {}, "holds text, expected a list of messages"),
    "content parts": (
        "prompts",
        [{"messages": [{"role": "user", "content": [{"type": "text"}]}]}],
        {},
        "row 1: column 'content' holds a list, expected text",
    ),
    "unknown role": ("prompts", [{"messages": [{**USER, "role": "asistant"}]}], {}, "did you mean 'assistant'?"),
    "two users": ("prompts", [{"messages": [USER, USER]}], {}, "row 1: message 2 is from user, expected assistant"),
    "assistant first": ("prompts", [{"messages": [ANSWER, USER]}], {}, "row 1: message 1 is from assistant"),
    "late system": ("prompts", [{"messages": [USER, SYSTEM]}], {}, "row 1: message 2 is a system message"),
    "no dialogue": (
        "pairs",
        [{"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "b"}],
        {},
        "row 1: column 'rejected' has no Human: and Assistant: turns",
    ),
    "margin": ("pairs", [{**PAIR, "margin": "much"}], {}, "column 'margin' holds text, expected a finite number"),
    "infinite margin": ("pairs", [{**PAIR, "margin": float("inf")}], {}, "expected a finite number"),
    "meta": ("prompts", [{"prompt": "q", "meta": [1]}], {}, "column 'meta' holds a list, expected an object"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_ROWS)
def test_bad_rows_are_refused_in_one_line(write: Write, case: str) -> None:
    kind, rows, fields, said = BAD_ROWS[case]
    path = write("a.jsonl", rows)
    assert said in refusal(lambda: load_examples(DataSource(path=path, **fields), kind))  # type: ignore[call-overload]


# ---- train and validation --------------------------------------------------------------------------------------------


def texts(source: DataSource, side: Any) -> list[str]:
    return [item.messages[-1].content for item in load_examples(source, "prompts", side).items]


def test_one_file_is_split_by_the_text_of_its_prompts(write: Write) -> None:
    rows = [{"prompt": f"q{i % 500}", "n": i} for i in range(1000)]
    source = DataSource(path=write("a.jsonl", rows))
    train, held_out = texts(source, "train"), texts(source, "validation")
    assert len(train) + len(held_out) == 1000
    assert not set(train) & set(held_out)
    assert 60 <= len(held_out) <= 140  # 100 expected
    assert train == [row["prompt"] for row in rows if row["prompt"] in set(train)]  # in the order of the file
    again = DataSource(path=write("b.jsonl", rows[::-1]))
    assert set(texts(again, "validation")) == set(held_out)
    more = DataSource(path=write("c.jsonl", [*rows, *({"prompt": f"new{i}"} for i in range(300))]))
    assert {text for text in texts(more, "validation") if text.startswith("q")} == set(held_out)
    other = DataSource(path=source.path, split_seed=1)
    assert set(texts(other, "validation")) != set(held_out)


def test_pairs_and_prompts_of_one_file_are_split_alike(write: Write) -> None:
    rows = [{"prompt": f"q{i}", "chosen": "a", "rejected": "b"} for i in range(100)]
    source = DataSource(path=write("a.jsonl", rows))
    pairs = load_examples(source, "pairs", "validation").items
    assert [pair.prompt for pair in pairs] == list(load_examples(source, "prompts", "validation").items)


def test_small_files_have_both_sides(write: Write) -> None:
    for count in (2, 3, 5):
        source = DataSource(path=write("a.jsonl", [{"prompt": f"q{i}"} for i in range(count)]))
        assert texts(source, "train")
        assert texts(source, "validation")
        crowded = DataSource(path=source.path, validation_fraction=0.999999)
        assert texts(crowded, "train")


def test_a_side_without_rows_is_an_error(write: Write) -> None:
    source = DataSource(path=write("a.jsonl", [{"prompt": "q"}]))
    assert texts(source, "train") == ["q"]
    assert "no row is left for validation; of 1 rows 1 are usable" in refusal(lambda: texts(source, "validation"))
    emptied = DataSource(path=source.path, split="[5:]")
    assert "the split '[5:]' holds no rows" in refusal(lambda: texts(emptied, "train"))


def test_text_is_split_by_itself(write: Write) -> None:
    source = DataSource(path=write("a.jsonl", [{"text": f"t{i}"} for i in range(50)]), validation_fraction=0.2)
    sides = [
        {item.completion for item in load_examples(source, "examples", side).items} for side in ("train", "validation")
    ]
    assert sides[0] | sides[1] == {f"t{i}" for i in range(50)}
    assert not sides[0] & sides[1]


def test_validation_rows_of_its_own_never_show_a_train_prompt(write: Write) -> None:
    train = write("train.jsonl", [{"prompt": f"q{i}"} for i in range(10)])
    held_out = write("validation.jsonl", [{"prompt": f"q{i}"} for i in range(8, 14)])
    source = DataSource(path=train, validation_path=held_out)
    assert texts(source, "train") == [f"q{i}" for i in range(10)]
    loaded = load_examples(source, "prompts", "validation")
    assert [item.messages[0].content for item in loaded.items] == ["q10", "q11", "q12", "q13"]
    assert loaded.report.dropped == {"prompt is also in train": 2}
    assert loaded.report.shown == {"prompt is also in train": (1, 2)}
    same = DataSource(path=train, validation_path=train)
    assert "10 of 10 rows are unusable, over 50%: 10 prompt is also in train" in refusal(
        lambda: texts(same, "validation")
    )


def test_of_a_file_only_the_slices_of_splits_count(write: Write) -> None:
    path = write("a.jsonl", [{"prompt": f"q{i}"} for i in range(20)])
    sliced = DataSource(path=path, split="train[:15]", validation_split="train[15:]")
    assert texts(sliced, "train") == [f"q{i}" for i in range(15)]
    assert texts(sliced, "validation") == [f"q{i}" for i in range(15, 20)]
    named = DataSource(path=path, hub="openai/gsm8k", split="train[:15]", validation_split="test")  # data.path=FILE
    assert sorted(texts(named, "train") + texts(named, "validation")) == sorted(f"q{i}" for i in range(15))


def test_the_limit_holds_on_each_side(write: Write) -> None:
    source = DataSource(path=write("a.jsonl", [{"prompt": f"q{i}"} for i in range(200)]), limit=7)
    unlimited = DataSource(path=source.path)
    assert texts(source, "train") == texts(unlimited, "train")[:7]
    assert texts(source, "validation") == texts(unlimited, "validation")[:7]


# ---- order -----------------------------------------------------------------------------------------------------------


def test_order_is_a_permutation_fixed_for_ever() -> None:
    assert sorted(order(50, 3, 0)) == list(range(50))
    assert len({order(50, 3, 0), order(50, 3, 1), order(50, 4, 0)}) == 3
    # sha256sum of "1/0/0" .. "1/0/3" begins with 6cba, 1f74, 3eda and 92e8.
    assert order(4, 1, 0) == (1, 2, 0, 3)


@given(num_items=st.integers(1, 12), count=st.integers(0, 15), seed=st.integers(0, 3), phase=st.integers(0, 6))
def test_phases_walk_through_the_epochs(num_items: int, count: int, seed: int, phase: int) -> None:
    walk = [i for epoch in range((phase + 1) * count // num_items + 1) for i in order(num_items, seed, epoch)]
    assert list(take(num_items, count, seed, phase)) == walk[phase * count : (phase + 1) * count]


def test_every_item_is_taken_once_an_epoch() -> None:
    taken = [i for phase in range(12) for i in take(9, 3, 5, phase)]  # 4 epochs of 9
    assert set(Counter(taken).values()) == {4}
    with pytest.raises(ValueError, match="empty data set"):
        take(0, 1, 0, 0)


# ---- rows and batches ------------------------------------------------------------------------------------------------


def test_rows_are_made_to_fit() -> None:
    row = Row(prompt_ids=(2, 5, 6), completion_ids=(7, 8, 9, 1))
    assert fit(row, 3, 4) == row
    assert fit(row, 2, 4) is None  # prompts are never cut
    assert fit(row, 3, 3) == Row(prompt_ids=(2, 5, 6), completion_ids=(7, 8, 1))  # the stop token stays
    assert fit(row, 3, 1) == Row(prompt_ids=(2, 5, 6), completion_ids=(1,))


@given(lengths=st.lists(st.integers(1, 30), max_size=20), max_rows=st.integers(1, 6), max_tokens=st.integers(1, 90))
def test_microbatches_hold_every_row_once_within_the_limits(lengths: list[int], max_rows: int, max_tokens: int) -> None:
    plan = plan_microbatches(lengths, max_rows, max_tokens)
    assert sorted(i for group in plan for i in group) == list(range(len(lengths)))
    for group in plan:
        assert len(group) <= max_rows
        assert len(group) == 1 or len(group) * max(lengths[i] for i in group) <= max_tokens
    assert [lengths[i] for group in plan for i in group] == sorted(lengths, reverse=True)


def test_microbatches_are_few_and_deterministic() -> None:
    assert plan_microbatches([3, 9, 3, 8, 3], 2) == [[1, 3], [0, 2], [4]]
    assert plan_microbatches([3, 9, 3, 8, 3], 4, max_tokens=16) == [[1], [3, 0], [2, 4]]
    assert plan_microbatches([], 4) == []
    with pytest.raises(ValueError, match="max_rows"):
        plan_microbatches([1], 0)


def test_collate_pads_right_and_masks_by_length() -> None:
    rows = [Row(prompt_ids=(2, 5), completion_ids=(0, 7, 1)), Row(prompt_ids=(2,), completion_ids=(1,))]
    batch = collate(rows, pad_id=1, per_token={"old_logprobs": [[-1.0, -2.0, -3.0], [-4.0]]})
    assert batch.input_ids.tolist() == [[2, 5, 0, 7, 1], [2, 1, 1, 1, 1]]  # pad equals the stop id
    assert batch.attention_mask.int().tolist() == [[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]]
    assert batch.completion_mask.int().tolist() == [[0, 0, 1, 1, 1], [0, 1, 0, 0, 0]]
    assert batch.old_logprobs is not None
    assert batch.old_logprobs.tolist() == [[0, 0, -1, -2, -3], [0, -4, 0, 0, 0]]
    assert batch.old_logprobs.dtype == torch.float32
    assert batch.input_ids.dtype == torch.int64
    assert batch.attention_mask.dtype == batch.completion_mask.dtype == torch.bool
    assert batch.advantages is None


def test_collate_refuses_what_does_not_match() -> None:
    rows = [Row(prompt_ids=(2,), completion_ids=(3, 1))]
    with pytest.raises(ValueError, match="one number for each completion token"):
        collate(rows, per_token={"advantages": [[1.0]]})
    with pytest.raises(ValueError, match="one number for each completion token"):
        collate(rows, per_token={"advantages": [[1.0, 1.0], [1.0]]})
    with pytest.raises(ValueError, match="no per-token field"):
        collate(rows, per_token={"input_ids": [[1.0, 1.0]]})
    for empty in ([], [Row(prompt_ids=(), completion_ids=())]):
        with pytest.raises(ValueError, match="no rows or an empty row"):
            collate(empty)


def test_left_pad_counts_positions_from_each_rows_first_token() -> None:
    input_ids, attention_mask, position_ids = left_pad([(2, 5, 6), (2,)], pad_id=0)
    assert input_ids.tolist() == [[2, 5, 6], [0, 0, 2]]
    assert attention_mask.int().tolist() == [[1, 1, 1], [0, 0, 1]]
    assert position_ids.tolist() == [[0, 1, 2], [0, 0, 0]]
    assert input_ids.dtype == position_ids.dtype == torch.int64
    assert attention_mask.dtype == torch.bool
    for empty in ([], [()]):
        with pytest.raises(ValueError, match="cannot sample"):
            left_pad(empty, 0)


def test_fingerprints_tell_contents_apart(write: Write) -> None:
    path = write("a.jsonl", TEXT)
    assert fingerprint(path) == fingerprint(Path(path)) == fingerprint(write("b.jsonl", TEXT))
    assert fingerprint(path) != fingerprint(write("c.jsonl", TEXT + "\n"))
    assert fingerprint(ROWS) == fingerprint([dict(reversed(row.items())) for row in ROWS])
    assert len({fingerprint(ROWS), fingerprint(ROWS[::-1]), fingerprint(ROWS[1:]), fingerprint([])}) == 4
    pair = Pair(prompt=Prompt(messages=(Message("user", "q"),), id="1"), chosen="a", rejected="b")
    swapped = Pair(prompt=pair.prompt, chosen="b", rejected="a")
    assert fingerprint([pair]) != fingerprint([swapped])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.text(max_size=8), st.text(max_size=8)), min_size=1, max_size=12))
def test_any_text_survives_the_file(tmp_path_factory: pytest.TempPathFactory, said: list[tuple[str, str]]) -> None:
    path = tmp_path_factory.mktemp("any") / "a.jsonl"
    path.write_text("".join(json.dumps({"prompt": p, "completion": c}) + "\n" for p, c in [("q", "a"), *said]))
    source = DataSource(path=str(path), validation_fraction=0.0, max_dropped_fraction=1.0)
    kept = [(item.prompt.messages[0].content, item.completion) for item in load_examples(source, "examples").items]
    assert kept == [("q", "a"), *((p, c) for p, c in said if p.strip() and c.strip())]


# ---- real slices -----------------------------------------------------------------------------------------------------

MTS = {"columns": {"completion": "section_text"}, "prompt_template": "Summarise: {dialogue}"}
CONALA = {"columns": {"prompt": "intent", "completion": "snippet"}}
EMPTY, EQUAL, BLANK = "empty chosen", "chosen equals rejected", "empty rejected"
REAL: list[tuple[str, str, int, dict[str, int], dict[str, Any]]] = [
    ("hh_rlhf/harmless-base_test_1000.jsonl", "pairs", 997, {EMPTY: 3}, {}),
    ("hh_rlhf/harmless-base_test_1000.jsonl", "prompts", 997, {EMPTY: 3}, {}),
    ("ultrafeedback/train_1000.jsonl", "pairs", 994, {EQUAL: 4, EMPTY: 1, BLANK: 1}, {}),
    ("ultrafeedback/eval_200.jsonl", "pairs", 199, {EQUAL: 1}, {}),
    ("orca_dpo_pairs/orca_dpo_284.jsonl", "pairs", 284, {}, {}),
    ("hhh_alignment/pairs.jsonl", "pairs", 221, {}, {}),
    ("llamafactory_demos/dpo_en_demo.jsonl", "pairs", 299, {}, {}),
    ("llamafactory_demos/kto_en_demo.jsonl", "examples", 300, {}, {}),
    ("gsm8k/train_2000.jsonl", "prompts", 2000, {}, {}),
    ("gsm8k/train_2000.jsonl", "examples", 2000, {}, {}),
    ("gsm8k/test.jsonl", "prompts", 1319, {}, {}),
    ("mts_dialog/train.csv", "examples", 1201, {}, MTS),
    ("mts_dialog/validation.csv", "examples", 100, {}, MTS),
    ("mts_dialog/test1.csv", "examples", 200, {}, MTS),
    ("conala/conala-train.jsonl", "examples", 2378, {}, CONALA),
    ("conala/conala-test.jsonl", "examples", 500, {}, CONALA),
    ("mbpp/sanitized-mbpp.jsonl", "examples", 427, {}, {"columns": {"completion": "code"}}),
    ("humaneval/HumanEval.jsonl", "prompts", 164, {}, {}),
    ("advbench/harmful_behaviors_goals.csv", "prompts", 520, {}, {"columns": {"prompt": "goal"}}),
    ("simple_safety_tests/test_cases.csv", "prompts", 80, {}, {"columns": {"prompt": "prompts_final"}}),
    ("biggen_bench/rubrics_200.jsonl", "prompts", 200, {}, {"columns": {"prompt": "input"}}),
]


@pytest.mark.parametrize(("file", "kind", "count", "reasons", "fields"), REAL, ids=lambda value: str(value)[:40])
def test_real_files_load_with_the_expected_counts(
    shared_data: Path, file: str, kind: Any, count: int, reasons: dict[str, int], fields: dict[str, Any]
) -> None:
    source = DataSource(path=str(shared_data / file), **fields)
    train, held_out = (load_examples(source, kind, side) for side in ("train", "validation"))
    assert train.report.num_items + held_out.report.num_items == count
    assert train.report.num_items == held_out.report.num_other
    assert train.report.dropped == reasons
    assert 0.05 < held_out.report.num_items / count < 0.25
    prompts = [
        {str(item if kind == "prompts" else item.prompt.messages) for item in side.items} for side in (train, held_out)
    ]
    assert not prompts[0] & prompts[1]
    ids = [item.id if kind == "prompts" else item.prompt.id for side in (train, held_out) for item in side.items]
    assert len(set(ids)) == count


def test_real_rows_say_what_the_files_say(shared_data: Path) -> None:
    source = DataSource(path=str(shared_data / "hh_rlhf" / "harmless-base_test_1000.jsonl"), validation_fraction=0.0)
    pairs = load_examples(source, "pairs").items
    assert turns(pairs[0])[0] == ("user", "what are some pranks with a pen i can do?")
    assert [role for role, _ in turns(pairs[0])] == ["user", "assistant"] * 2 + ["user"]
    assert pairs[0].chosen.startswith("No, sorry!  All of these involve a pen")
    gsm8k = DataSource(path=str(shared_data / "gsm8k" / "train_2000.jsonl"), validation_fraction=0.0)
    prompts = load_examples(gsm8k, "prompts").items
    assert prompts[0].answer == "72"
    assert all(prompt.answer and prompt.answer.lstrip("-").replace(".", "").isdigit() for prompt in prompts)
    scored = DataSource(path=str(shared_data / "ultrafeedback" / "train_1000.jsonl"), validation_fraction=0.0)
    margins = [pair.margin for pair in load_examples(scored, "pairs").items]
    assert all(margin is not None and margin >= 0 for margin in margins)
    orca = DataSource(path=str(shared_data / "orca_dpo_pairs" / "orca_dpo_284.jsonl"), validation_fraction=0.0)
    assert {turns(pair)[0][0] for pair in load_examples(orca, "pairs").items} == {"system"}


def test_the_test_set_shows_no_train_prompt(shared_data: Path) -> None:
    gsm8k = shared_data / "gsm8k"
    source = DataSource(path=str(gsm8k / "train_2000.jsonl"), validation_path=str(gsm8k / "test.jsonl"))
    assert load_examples(source, "prompts", "train").report.num_items == 2000
    assert load_examples(source, "prompts", "validation").report.num_items == 1319


@pytest.mark.parametrize("max_tokens", [None, 20])
def test_siblings_stay_side_by_side(max_tokens: int | None) -> None:
    """The group of the longest row first; within it the longest first; a budget counts padded tokens."""
    lengths, prompts = [3, 9, 4, 8, 3, 5], [0, 1, 2, 0, 1, 2]
    plan = plan_microbatches(lengths, 4, max_tokens, prompts)
    assert plan == ([[1, 4, 3, 0], [5, 2]] if max_tokens is None else [[1, 4], [3, 0], [5, 2]])
    assert all(max_tokens is None or max(lengths[i] for i in group) * len(group) <= max_tokens for group in plan)
