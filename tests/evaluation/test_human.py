"""Human evaluation: sheets that hide who is who, survive spreadsheets, and are read back without mercy."""

from __future__ import annotations

import csv
import io
import itertools
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from alignlab.errors import UserError
from alignlab.evaluation.human import (
    Choice,
    make_sheet,
    people_votes,
    read_filled,
    results,
    safe_cell,
    same_cell,
    stratified,
    vote_rows,
)
from alignlab.judge.agreement import Vote, vote
from alignlab.judge.answers import Answers, answers_from_rows
from alignlab.statistics import cohens_kappa, krippendorff_alpha
from alignlab.types import Message, Prompt
from tests.runs import alignlab, files_of, rows, strict_json, write_rows

HOSTILE = [
    "=cmd|' /C calc'!A0", "+1+1", "-2", "@SUM(A1)", "\t=1", "  =1", "＝1", 'say "hi", then\r\n"leave"', "a\nb\rc",
    ";x;", "Größe 🦊 \u2028 \u202e", "\ufeffbom", "", " ", "x" * 40_000, "nul \0 byte", "<script>alert(1)</script>",
    "'quoted'", "half \ud800",
]  # fmt: skip


def systems(count: int = 2, prompts: int = 20, texts: Any = None) -> list[Answers]:
    known = {
        f"p{i}": Prompt(messages=(Message("user", f"question {i}"),), id=f"p{i}", meta={"category": "xy"[i % 4 == 0]})
        for i in range(prompts)
    }
    return [
        Answers(
            name=f"system-{k}",
            prompts=known,
            completions={name: texts(k, i) if texts else f"answer {i} of {k}" for i, name in enumerate(known)},
        )
        for k in range(count)
    ]


def key_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "key.json").read_text("utf-8"))  # type: ignore[no-any-return]


def sheet(folder: Path) -> list[dict[str, str]]:
    text = (folder / "sheet.csv").read_bytes().decode("utf-8-sig")
    return list(csv.DictReader(io.StringIO(text, newline="")))


def fill(folder: Path, name: str, choose: Any, *, delimiter: str = ",", encoding: str = "utf-8-sig") -> Path:
    """A filled copy as a spreadsheet saves it; `choose(row, key of the item)` gives what stands under best."""
    key = key_of(folder)["items"]
    stream = io.StringIO(newline="")
    filled = [{**row, "best": choose(row, key[row["item"]])} for row in sheet(folder)]
    writer = csv.DictWriter(stream, filled[0].keys(), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(filled)
    path = folder / f"{name}.csv"
    path.write_bytes(stream.getvalue().encode(encoding))
    return path


def prefers(name: str) -> Any:
    """A person who always knows the system of that name."""
    return lambda row, item: next(slot for slot, system in item["slots"].items() if system == name)


# ---- making ----------------------------------------------------------------------------------------------------------


def test_a_sheet_says_nothing_of_who_is_who(tmp_path: Path) -> None:
    make_sheet(systems(), tmp_path, num_prompts=20)
    for name in ("sheet.csv", "sheet.jsonl", "manifest.json"):
        assert "system-" not in (tmp_path / name).read_text("utf-8"), name
    assert list(sheet(tmp_path)[0]) == ["item", "conversation", "A", "B", "best", "comment"]
    assert all(row["best"] == "" for row in sheet(tmp_path))


@pytest.mark.parametrize("count", [2, 3, 5])
def test_every_system_sits_in_every_slot_equally_often(count: int, tmp_path: Path) -> None:
    make_sheet(systems(count, 60), tmp_path, num_prompts=60, duplicates=0)
    items = key_of(tmp_path)["items"].values()
    seats = Counter((slot, name) for item in items for slot, name in item["slots"].items())
    assert set(seats.values()) == {60 // count}
    assert len(seats) == count * count


def test_texts_are_whole_and_in_their_slots(tmp_path: Path) -> None:
    make_sheet(systems(2, len(HOSTILE), lambda k, i: f"{HOSTILE[i]}{k}"), tmp_path, num_prompts=99)
    key = key_of(tmp_path)["items"]
    cleaned = [text.encode("utf-8", "replace").decode() for text in HOSTILE]
    for exact, shown in zip(rows(tmp_path / "sheet.jsonl"), sheet(tmp_path), strict=True):
        item = key[exact["item"]]
        i = int(item["prompt_id"][1:])
        for slot, name in item["slots"].items():
            text = f"{cleaned[i]}{name[-1]}"
            assert exact[slot] == text
            assert shown[slot].removeprefix("'") == text.replace("\0", "\ufffd").removeprefix("'")


def test_no_cell_is_a_formula(tmp_path: Path) -> None:
    make_sheet(systems(2, len(HOSTILE), lambda k, i: HOSTILE[i] + "x" * k), tmp_path, num_prompts=99)
    for row in sheet(tmp_path):
        for cell in row.values():
            assert cell[:1] not in tuple("=+-@\t\r\n＝＋－＠") or not cell
            assert cell.lstrip()[:1] not in tuple("=+-@＝") or not cell.strip()
    assert safe_cell("=1") == "'=1" and safe_cell("a=1") == "a=1" and safe_cell("") == "" and safe_cell("  ") == "  "
    assert (tmp_path / "sheet.csv").read_bytes().startswith(b"\xef\xbb\xbf")


def test_duplicates_come_with_other_slots_and_far_away(tmp_path: Path) -> None:
    manifest = make_sheet(systems(3, 40), tmp_path, num_prompts=40, duplicates=0.25)
    assert manifest["duplicates"] == 10 and manifest["rows"] == 50
    items = key_of(tmp_path)["items"]
    places = {item: i for i, item in enumerate(row["item"] for row in sheet(tmp_path))}
    again = [(item, held) for item, held in items.items() if held["duplicate_of"]]
    assert len(again) == 10
    for item, held in again:
        first = items[held["duplicate_of"]]
        assert first["prompt_id"] == held["prompt_id"] and first["slots"] != held["slots"]
        assert abs(places[item] - places[held["duplicate_of"]]) >= 20


def test_prompts_are_drawn_in_proportion_to_their_categories(tmp_path: Path) -> None:
    manifest = make_sheet(systems(2, 40), tmp_path, num_prompts=20)
    assert manifest["strata"] == {"x": 15, "y": 5}
    few = [Prompt(messages=(), id=f"{k}{i}", task=k) for k, n in (("a", 7), ("b", 2), ("c", 1)) for i in range(n)]
    drawn = Counter(p.task for p in stratified(few, 5, np.random.default_rng(0)))
    assert sum(drawn.values()) == 5 and drawn["a"] in (3, 4) and drawn["b"] == 1
    assert len(stratified(few, 99, np.random.default_rng(0))) == 10


def test_the_same_seed_gives_the_same_bytes(tmp_path: Path) -> None:
    for name, seed in (("one", 42), ("two", 42), ("three", 43)):
        make_sheet(systems(), tmp_path / name, num_prompts=10, seed=seed)
    one, two, three = (files_of(tmp_path / name) for name in ("one", "two", "three"))
    assert one == two
    assert one["key.json"] != three["key.json"]
    assert json.loads(one["manifest.json"])["manifest"] != json.loads(three["manifest.json"])["manifest"]


@pytest.mark.parametrize(
    ("given", "changes", "said"),
    [
        (lambda: systems(1), {}, "2 to 8 different systems"),
        (lambda: systems(9), {}, "2 to 8 different systems"),
        (lambda: systems(1) * 2, {}, "2 to 8 different systems"),
        (lambda: systems(2), {"num_prompts": 0}, "make no sheet"),
        (lambda: systems(2), {"duplicates": 1.5}, "make no sheet"),
    ],
)
def test_what_makes_no_sheet_is_said(given: Any, changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=said):
        make_sheet(given(), tmp_path, **changes)


def test_a_sheet_is_never_overwritten(tmp_path: Path) -> None:
    make_sheet(systems(), tmp_path)
    with pytest.raises(UserError, match="holds a sheet already"):
        make_sheet(systems(), tmp_path)


# ---- reading ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("delimiter", "encoding"),
    [(",", "utf-8-sig"), (",", "utf-8"), (";", "utf-8-sig"), ("\t", "utf-16"), (";", "cp1252")],
)
def test_sheets_come_back_from_any_spreadsheet(delimiter: str, encoding: str, tmp_path: Path) -> None:
    make_sheet(systems(2, 12, lambda k, i: f'Größe "{i}", {k};\nx'), tmp_path, num_prompts=12)
    path = fill(tmp_path, "ann", prefers("system-1"), delimiter=delimiter, encoding=encoding)
    choices, _ = read_filled([path], tmp_path)
    assert {choice.system for choice in choices} == {"system-1"} and len(choices) == 13
    assert {choice.annotator for choice in choices} == {"ann"}


def test_answers_may_be_written_in_any_way(tmp_path: Path) -> None:
    make_sheet(systems(2, 6), tmp_path, num_prompts=6, duplicates=0)
    words = iter(["a", " B ", "Ｂ", "TIE", "draw", "="])
    choices, _ = read_filled([fill(tmp_path, "ann", lambda row, item: next(words))], tmp_path)
    assert [choice.slot for choice in choices] == ["A", "B", "B", "tie", "tie", "tie"]


def test_filled_json_lines_are_read_too(tmp_path: Path) -> None:
    make_sheet(systems(2, 6), tmp_path, num_prompts=6, duplicates=0)
    filled = [{**row, "best": "A"} for row in rows(tmp_path / "sheet.jsonl")]
    choices, _ = read_filled([write_rows(tmp_path / "bob.jsonl", filled)], tmp_path)
    assert len(choices) == 6


def test_every_wrong_row_has_its_line(tmp_path: Path) -> None:
    make_sheet(systems(2, 8), tmp_path, num_prompts=8, duplicates=0)
    path = fill(tmp_path, "ann", prefers("system-0"))
    table = list(csv.reader(io.StringIO(path.read_text("utf-8-sig"), newline="")))
    best = table[0].index("best")
    table[1][best] = ""
    table[2][best] = "A and B"
    table[3][best] = "C"
    table[4] = list(table[5])
    table[6][0] = f"{table[6][0][:8]}-9999"
    stream = io.StringIO(newline="")
    csv.writer(stream).writerows(table)
    path.write_text(stream.getvalue(), "utf-8")
    with pytest.raises(UserError) as caught:
        read_filled([path], tmp_path)
    lines = str(caught.value).split("\n")
    assert [line.split(": ", 1)[0].removeprefix(f"{path}, ") for line in lines[:-1]] == [
        f"row {n}" for n in (2, 3, 4, 6, 7)
    ]
    for line, said in zip(
        lines,
        ["has no answer; write A, B or tie", "names several answers; write one of A, B or tie", "says 'C'",
         "was answered in row 5 already", "there is no item", "2 rows of the sheet are missing"],
        strict=True,
    ):  # fmt: skip
        assert said in line
    choices, _ = read_filled([fill(tmp_path, "bob", lambda row, item: "" if row["item"][-1] == "1" else "A")], tmp_path,
                             partial=True)  # fmt: skip
    assert len(choices) == 7


def test_wrong_files_are_named(tmp_path: Path) -> None:
    for name, seed in (("one", 1), ("two", 2)):
        make_sheet(systems(2, 8), tmp_path / name, seed=seed)
    other = fill(tmp_path / "two", "ann", prefers("system-0"))
    with pytest.raises(UserError, match="is a sheet of another manifest"):
        read_filled([other], tmp_path / "one")
    mine = fill(tmp_path / "one", "ann", prefers("system-0"))
    with pytest.raises(UserError, match="name each file after its person"):
        read_filled([mine, other], tmp_path / "one")
    with pytest.raises(UserError, match="is not the key of manifest"):
        read_filled([mine], tmp_path / "one", tmp_path / "two" / "key.json")
    with pytest.raises(UserError, match="the key is missing"):
        read_filled([mine], tmp_path / "one", tmp_path / "none.json")
    with pytest.raises(UserError, match=r"none/nofile.csv: no such file$"):
        read_filled([tmp_path / "none" / "nofile.csv"], tmp_path / "none")
    with pytest.raises(UserError, match="name the folder that"):
        read_filled([mine], tmp_path)
    for name, content, said in (
        ("empty.csv", b"", "holds no rows"),
        ("other.csv", b"x,y\n1,2\n", "no columns item and best"),
        ("missing.csv", None, "missing.csv: no such file"),
        ("binary.csv", bytes(range(256)) * 20, "no columns item and best"),
    ):
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=said):
            read_filled([tmp_path / name], tmp_path / "one")


def test_a_changed_key_is_refused(tmp_path: Path) -> None:
    make_sheet(systems(2, 8), tmp_path)
    path = fill(tmp_path, "ann", prefers("system-0"))
    key = (tmp_path / "key.json").read_text("utf-8")
    (tmp_path / "key.json").write_text(key.replace("system-0", "system-x"), "utf-8")
    with pytest.raises(UserError, match="or was changed"):
        read_filled([path], tmp_path)


def change(path: Path, edit: Any, header: list[str] | None = None) -> None:
    """Rewrites a filled sheet with every row as `edit` makes it."""
    with path.open(encoding="utf-8-sig", newline="") as stream:
        table = list(csv.DictReader(stream))
    with path.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, header or table[0].keys(), extrasaction="ignore")
        writer.writeheader()
        writer.writerows([edit(number, row) for number, row in enumerate(table, 2)])


def test_texts_that_were_not_handed_out_are_refused_by_row_and_column(tmp_path: Path) -> None:
    make_sheet(systems(2, 8), tmp_path, num_prompts=8, duplicates=0)
    swapped = fill(tmp_path, "ann", lambda row, item: "A")
    change(swapped, lambda number, row: row | {"A": row["B"], "B": row["A"]})
    with pytest.raises(UserError) as caught:
        read_filled([swapped], tmp_path)
    lines = str(caught.value).split("\n")
    assert len(lines) == 8
    for number, line in enumerate(lines, 2):
        assert line.startswith(f"{swapped}, row {number}, column A: item ") and "another text" in line
    for column in ("conversation", "A", "B"):
        one = fill(tmp_path, "bob", lambda row, item: "A")
        change(one, lambda number, row: row | ({column: f"{row[column]}!"} if number == 5 else {}))  # noqa: B023
        with pytest.raises(UserError, match=rf"row 5, column {column}: item \S+ has another text there") as caught:
            read_filled([one], tmp_path)
        assert "\n" not in str(caught.value)
    emptied = fill(tmp_path, "cid", lambda row, item: "A")
    change(emptied, lambda number, row: row | {"B": ""})
    with pytest.raises(UserError, match="row 2, column B"):
        read_filled([emptied], tmp_path)
    renamed = write_rows(
        tmp_path / "dan.jsonl", [r | {"A": r["B"], "B": r["A"], "best": "A"} for r in rows(tmp_path / "sheet.jsonl")]
    )
    with pytest.raises(UserError, match="row 2, column A"):
        read_filled([renamed], tmp_path)
    without = fill(tmp_path, "eve", lambda row, item: "A")
    change(without, lambda number, row: row, ["item", "best"])
    assert len(read_filled([without], tmp_path)[0]) == 8


def test_what_spreadsheets_do_to_texts_is_no_other_text(tmp_path: Path) -> None:
    make_sheet(systems(2, len(HOSTILE), lambda k, i: f"{HOSTILE[i]}{k}"), tmp_path, num_prompts=99)
    for name, touch in (
        ("feeds", lambda text: text.replace("\r\n", "\n").replace("\r", "\n")),
        ("crlf", lambda text: text.replace("\r\n", "\n").replace("\n", "\r\n")),
        ("blanks", lambda text: f"{text} \n"),
        ("unguarded", lambda text: text.removeprefix("'")),
        ("cut", lambda text: text[:32_767]),
        ("ascii", lambda text: text.encode("ascii", "replace").decode()),
    ):
        path = fill(tmp_path, name, lambda row, item: "A")
        change(path, lambda number, row: row | {slot: touch(row[slot]) for slot in "AB"})  # noqa: B023
        assert len(read_filled([path], tmp_path)[0]) == len(sheet(tmp_path)), name


@pytest.mark.parametrize(
    ("cell", "text", "same"),
    [
        ("42.5", "42.50", True), ("42,5", "42.50", True), ("1234", "1,234", True), ("1.23E+11", "123456789012", False),
        ("1.23457E+11", "123456789012", True), ("42", "43", False), ("TRUE", "true", True), ("Yes", "yes", False),
        ("02. Jan", "1/2", True), ("two 3", "one 3", False), ("'=1", "=1", True), ("=1", "=1", True), ("", "x", False),
        ("caf? au lait", "café au lait", True), ("caf? au thé", "café au lait", False), ("What?", "What", False),
    ],
)  # fmt: skip
def test_the_same_cell(cell: str, text: str, same: bool) -> None:
    assert same_cell(cell, text) is same


def test_numbers_and_dates_that_changed_places_are_seen(tmp_path: Path) -> None:
    for kind, texts in (("dates", ("1/2", "3/4")), ("case", ("TRUE", "true")), ("lossy", ("你好?", "再见?"))):
        folder = tmp_path / kind
        make_sheet(systems(2, 4, lambda k, i: texts[k]), folder, num_prompts=4, duplicates=0)  # noqa: B023
        path = fill(folder, "ann", lambda row, item: "A")
        assert len(read_filled([path], folder)[0]) == 4
        change(path, lambda number, row: row | {"A": row["B"], "B": row["A"]})
        with pytest.raises(UserError, match="row 2, column A"):
            read_filled([path], folder)


def test_the_sheet_beside_the_manifest_must_be_the_one_it_was_made_with(tmp_path: Path) -> None:
    make_sheet(systems(2, 4), tmp_path, num_prompts=4, duplicates=0)
    path = fill(tmp_path, "ann", lambda row, item: "A")
    kept = tmp_path / "sheet.jsonl"
    handed_out = rows(kept)
    write_rows(kept, [row | {"best": "A"} for row in handed_out])  # filled in where it lies
    assert len(read_filled([path, kept], tmp_path)[0]) == 8
    write_rows(kept, [row | {"A": row["B"], "B": row["A"]} for row in handed_out])
    with pytest.raises(UserError, match=r"sheet.jsonl: was changed after manifest \w+ was written"):
        read_filled([path], tmp_path)
    kept.unlink()
    with pytest.raises(UserError, match=r"sheet.jsonl: missing or damaged"):
        read_filled([path], tmp_path)


def test_many_problems_are_counted(tmp_path: Path) -> None:
    make_sheet(systems(2, 60), tmp_path, num_prompts=60)
    with pytest.raises(UserError) as caught:
        read_filled([fill(tmp_path, "ann", lambda row, item: "?")], tmp_path)
    lines = str(caught.value).split("\n")
    assert len(lines) == 21 and lines[-1] == "and 46 more like these"


# ---- what they say ---------------------------------------------------------------------------------------------------


def test_wins_agreement_and_consistency_by_hand(tmp_path: Path) -> None:
    """Ann prefers system 1 always; Bob prefers it for even prompts and calls the others ties; Cid takes slot A."""
    make_sheet(systems(2, 20), tmp_path, num_prompts=20, duplicates=0.5)
    better = prefers("system-1")

    def bob(row: Any, item: Any) -> str:
        return str(better(row, item)) if int(item["prompt_id"][1:]) % 2 == 0 else "tie"

    files = [fill(tmp_path, "ann", better), fill(tmp_path, "bob", bob), fill(tmp_path, "cid", lambda r, i: "A")]
    choices, key = read_filled(files, tmp_path)
    found = results(choices, key)
    assert found["annotators"] == {"ann": 20, "bob": 20, "cid": 20}
    pair = found["between"]["pairs"][0]
    assert pair["annotators"] == ["ann", "bob"] and pair["n"] == 20 and pair["agreement"] == 0.5
    assert found["between"]["items_with_several"] == 20
    own = found["self_consistency"]
    assert own["n"] == 30
    assert (own["annotators"]["ann"]["rate"], own["annotators"]["bob"]["rate"]) == (1.0, 1.0)
    assert own["annotators"]["cid"]["rate"] == 0.0  # the same slot, so never the same system
    assert own["same_slot"] == pytest.approx(10 / 30)
    # Cid says system 1 where it sits in A; the majority does for even prompts, and for odd ones where Cid does.
    said = {(c.annotator, key["items"][c.item]["prompt_id"]): c.system for c in choices
            if not key["items"][c.item]["duplicate_of"]}  # fmt: skip
    wins = found["wins"]["system-0 / system-1"]
    odd = [f"p{i}" for i in range(1, 20, 2)]
    lost = 10 + sum(said["cid", p] == "system-1" for p in odd)
    assert (wins["wins"], wins["ties"], wins["losses"]) == (0, 20 - lost, lost)
    assert wins["flip_rate"] is None and wins["prompts"] == 20
    alone = results([c for c in choices if c.annotator == "cid"], key)
    assert alone["position"]["first_rate"] == 1.0 and alone["position"]["p"] < 1e-8
    assert alone["between"]["alpha"] is None and alone["between"]["pairs"] == []
    fair = results([c for c in choices if c.annotator == "ann"], key)["position"]
    assert abs(fair["slots"]["A"] - fair["slots"]["B"]) <= 2 and fair["p"] > 0.5
    json.dumps(found)


def test_agreement_between_people_is_that_of_the_statistics(tmp_path: Path) -> None:
    make_sheet(systems(3, 30), tmp_path, num_prompts=30, duplicates=0.2)
    rng = np.random.default_rng(0)
    files = [fill(tmp_path, name, lambda r, i: rng.choice(["A", "B", "C", "tie"])) for name in ("ann", "bob", "cid")]
    choices, key = read_filled(files, tmp_path)
    found = results(choices, key)
    items = [item for item, held in key["items"].items() if not held["duplicate_of"]]
    said = {(c.annotator, c.item): c.system for c in choices}
    rated = [[said[name, item] for item in items] for name in ("ann", "bob", "cid")]
    assert found["between"]["alpha"] == pytest.approx(krippendorff_alpha(rated))
    for pair, (i, j) in zip(found["between"]["pairs"], itertools.combinations(range(3), 2), strict=True):
        assert pair["kappa"] == pytest.approx(cohens_kappa(rated[i], rated[j]))
    assert found["position"]["expected"] == pytest.approx(1 / 3)


def test_the_best_of_three_beats_the_others_and_says_nothing_about_them(tmp_path: Path) -> None:
    make_sheet(systems(3, 6), tmp_path, num_prompts=6, duplicates=0)
    choices, key = read_filled([fill(tmp_path, "ann", prefers("system-2"))], tmp_path)
    wins = results(choices, key)["wins"]
    assert set(wins) == {"system-0 / system-2", "system-1 / system-2"}
    assert all(part["losses"] == 6 for part in wins.values())
    votes = people_votes([Choice("ann", choices[0].item, "tie", "tie")], key)
    assert [v.side for v in votes] == ["tie"] * 3


def test_the_same_text_from_all_is_a_tie_that_nobody_is_asked_about(tmp_path: Path) -> None:
    """Of 20 prompts 5 have one text: 15 rows, and over all 20 the better system has (15 + 5 / 2) / 20."""
    same = lambda k, i: "the same" if i % 4 == 0 else f"answer {i} of {k}"  # noqa: E731
    manifest = make_sheet(systems(2, 20, same), tmp_path, num_prompts=20, duplicates=0)
    assert (manifest["rows"], manifest["prompts"], manifest["identical"]) == (15, 15, 5)
    assert all("the same" not in row.values() for row in rows(tmp_path / "sheet.jsonl"))
    better = prefers("system-0")
    choices, key = read_filled([fill(tmp_path, "ann", better), fill(tmp_path, "bob", better)], tmp_path)
    wins = results(choices, key)["wins"]["system-0 / system-1"]
    assert (wins["wins"], wins["ties"], wins["losses"], wins["identical"]) == (15, 5, 0, 5)
    assert wins["win_rate"] == pytest.approx(17.5 / 20)
    assert len(vote_rows(choices, key)) == 30  # nobody voted on the others
    first = set(list(key["items"])[:6])
    part = results([c for c in choices if c.item in first], key)["wins"]["system-0 / system-1"]
    assert (part["wins"], part["ties"]) == (6, 2)  # 6 of 15 rows, so 2 of 5 known ties
    with pytest.raises(UserError, match="to all 20 prompts system-0, system-1 gave the same answers"):
        make_sheet(systems(2, 20, lambda k, i: "x"), tmp_path / "none")


def test_two_of_three_with_the_same_text_win_and_tie_together(tmp_path: Path) -> None:
    """Systems 0 and 1 say the same: whichever of their slots is chosen, both beat system 2, and they tie."""
    make_sheet(systems(3, 12, lambda k, i: f"{i} {k // 2}"), tmp_path, num_prompts=12, duplicates=0.5)
    files = [fill(tmp_path, f"p{k}", prefers(f"system-{k}")) for k in (0, 1)]
    choices, key = read_filled(files, tmp_path)
    found = results(choices, key)
    for pair, expected in (("0 / system-1", (0, 12, 0)), ("0 / system-2", (12, 0, 0)), ("1 / system-2", (12, 0, 0))):
        part = found["wins"][f"system-{pair}"]
        assert (part["wins"], part["ties"], part["losses"]) == expected, pair
    assert found["between"]["pairs"][0]["agreement"] == 1 and found["self_consistency"]["rate"] == 1
    assert found["position"]["first_rate"] is None  # which of two equal texts is chosen says nothing about a slot
    assert {(row["system_a"], row["system_b"]) for row in vote_rows(choices, key)} == {
        ("system-0", "system-2"), ("system-1", "system-2")
    }  # fmt: skip


def test_beside_a_judge(tmp_path: Path) -> None:
    make_sheet(systems(2, 10), tmp_path, num_prompts=10)
    choices, key = read_filled([fill(tmp_path, "ann", prefers("system-1"))], tmp_path)
    judge: list[Vote] = [
        vote({"prompt": f"p{i}", "a": "system-0", "b": "system-1", "winner": "ba"[i < 3]}, "row") for i in range(10)
    ]
    found = results(choices, key, judge)["judge"]
    assert found["with_ties"]["n"] == 10 and found["with_ties"]["agreement"] == pytest.approx(0.7)


# ---- the command line ------------------------------------------------------------------------------------------------


def completions(path: Path, who: str, count: int = 12) -> Path:
    return write_rows(
        path, [{"prompt_id": f"p{i}", "prompt": f"question {i}", "completion": f"{who} {i}"} for i in range(count)]
    )


def test_make_and_read(tmp_path: Path) -> None:
    one, two = completions(tmp_path / "one.jsonl", "one"), completions(tmp_path / "two.jsonl", "two", 15)
    folder = tmp_path / "sheet"
    made = alignlab("human", "make", one, two, "--output", folder, "-n", "20")
    assert made.code == 0, made.err
    assert "there are not 20" in made.err and "3 prompts of two" in made.err
    assert "keep back" in made.out
    file = fill(folder, "ann", prefers("two"))
    read = alignlab("human", "read", file)
    assert read.code == 0, read.err
    assert "one / two: 0 won, 0 tied, 12 lost" in read.out
    found = strict_json((folder / "human.json").read_text("utf-8"))
    assert found["wins"]["one / two"]["win_rate"] == 0
    votes = rows(folder / "votes.jsonl")
    assert len(votes) == 12 and votes[0]["winner"] == "b" and votes[0]["annotator"] == "ann"
    again = alignlab("human", "read", file, "--judge", folder / "votes.jsonl")
    assert again.code == 0 and "100.0 %" in again.out
    file.write_text(file.read_text("utf-8-sig").replace("question", "question"), "utf-8")
    wrong = alignlab("human", "read", fill(folder, "bob", lambda r, i: "both"))
    assert wrong.code == 2 and len(wrong.errors) == 13
    assert all("write one of A, B or tie" in line for line in wrong.errors)


def test_votes_round_trip(tmp_path: Path) -> None:
    make_sheet(systems(2, 6), tmp_path, num_prompts=6)
    choices, key = read_filled([fill(tmp_path, "ann", prefers("system-0"))], tmp_path)
    assert all(row["winner"] == "a" for row in vote_rows(choices, key)) and len(vote_rows(choices, key)) == 6


def test_rows_without_an_id_are_known_by_their_prompt() -> None:
    one = answers_from_rows([{"prompt": "q", "completion": "x"}], "one", "f")
    two = answers_from_rows([{"prompt": "q", "text": "y"}, {"prompt": "q", "text": "z"}], "two", "f")
    assert one.prompts.keys() == two.prompts.keys()
    assert list(two.completions.values()) == ["y"]


def test_make_and_read_say_how_many_have_the_same_text(tmp_path: Path) -> None:
    one = completions(tmp_path / "one.jsonl", "one")
    two = write_rows(tmp_path / "two.jsonl", [
        row | {"completion": row["completion"] if i < 4 else f"two {i}"} for i, row in enumerate(rows(one))
    ])  # fmt: skip
    made = alignlab("human", "make", one, two, "--output", tmp_path / "sheet", "--duplicates", "0")
    assert made.code == 0 and "8 rows, 0 of them" in made.out, made.err
    assert "4 of the 12 prompts drawn have the same answer from all systems" in made.out
    assert "the systems share 12 prompts, so" in made.err
    read = alignlab("human", "read", fill(tmp_path / "sheet", "ann", prefers("two")))
    assert "one / two: 0 won, 4 tied (4 of them the same text), 8 lost" in read.out, read.err
    missing = alignlab("human", "read", tmp_path / "nofile.csv")
    assert missing.code == 2 and len(missing.errors) == 1
    assert "nofile.csv: no such file" in missing.errors[0] and "manifest" not in missing.errors[0]
