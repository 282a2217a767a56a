"""People as judges: answers of several systems -> a blinded sheet and its key; filled sheets -> agreement and wins.

A sheet shows every prompt once, its answers in slots A, B, .. that the systems take in turn; some prompts come again
with other slots, to see whether a person agrees with themself. Which system sat in which slot stands in the key, whose
hash is in the manifest. A prompt that all answered with the same text is a tie that nobody is asked about.
"""

from __future__ import annotations

import csv
import hashlib
import io
import itertools
import json
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from alignlab.data.files import read_file
from alignlab.errors import UserError
from alignlab.judge.agreement import Vote, agreement, majority, vote
from alignlab.judge.answers import Answers, common_prompts
from alignlab.judge.pairwise import Game, Winner, numbers
from alignlab.statistics.agreement import alpha_interval, cohens_kappa, kappa_interval, krippendorff_alpha
from alignlab.statistics.inference import wilson_interval
from alignlab.statistics.wins import win_rate
from alignlab.types import Prompt

SHEET, MANIFEST, KEY = "sheet.csv", "manifest.json", "key.json"
SLOTS = "ABCDEFGH"
"""Names of slots, and so the most systems on a sheet."""
LONGEST_CELL = 32_767
"""Characters that spreadsheet programs keep of a cell; sheet.jsonl has all of them."""
TIES = ("TIE", "T", "DRAW", "EQUAL", "=", "NONE", "SAME")
"""Words for a tie, in capitals."""
MOST_PROBLEMS = 20
"""Lines that say what is wrong with filled sheets; the rest is counted."""
_FORMULA = "=+-@\t\r\n＝＋－＠"
_UNSURE = re.compile(r"(?:[^!-~]|\?)+")
"""What an encoding without a letter may have changed, and white space."""
_NOT_PLAIN = re.compile(r"[^\t\n\r -~]")
_NUMBER = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d{1,3})?", re.ASCII)
_DATE = re.compile(
    r"(?=.*\d)[\d\s/:.,-]*(?:(?:jan(?:uary)?|feb(?:ruary)?|mar(?:ch)?|apr(?:il)?|may|june?|july?|aug(?:ust)?|"
    r"sep(?:t(?:ember)?)?|oct(?:ober)?|nov(?:ember)?|dec(?:ember)?)[\d\s/:.,-]*)?(?:[ap]m)?",
    re.IGNORECASE | re.ASCII,
)
"""What spreadsheets take for a date or time; which one they then show depends on the country."""


@dataclass(frozen=True, slots=True)
class Choice:
    """One person's word on one row of the sheet."""

    annotator: str
    item: str
    slot: str
    """`tie` where none was best."""
    system: str
    """The system in that slot, the first of those with the same text; or `tie`."""


# ---- making ----------------------------------------------------------------------------------------------------------


def make_sheet(
    systems: Sequence[Answers], folder: Path, *, num_prompts: int = 200, seed: int = 42, duplicates: float = 0.1
) -> dict[str, Any]:
    """Writes sheet.csv (for spreadsheets), sheet.jsonl (the same, exact), manifest.json and key.json; the manifest.

    Prompts are drawn in proportion to the categories (or tasks) they belong to. The same arguments give the same bytes.

    Args:
        num_prompts: at most; all that the systems share where they are fewer.
        duplicates: share of the prompts that come a second time, with other slots and at another place.

    Raises:
        UserError: too few or too many systems, equal names, a folder that holds a sheet already, no shared prompts, or
            all systems answered each of them with the same text.
    """
    names = [system.name for system in systems]
    if not 2 <= len(systems) <= len(SLOTS) or len(set(names)) < len(names):
        raise UserError(
            f"human: a sheet compares 2 to {len(SLOTS)} different systems, not {', '.join(names) or 'none'}"
        )
    if num_prompts < 1 or not 0 <= duplicates <= 1:
        raise UserError(f"human: {num_prompts} prompts with a share of {duplicates} duplicates make no sheet")
    if (folder / MANIFEST).exists():
        raise UserError(f"{folder}: holds a sheet already, which people may be filling in; choose another --output")
    random = np.random.Generator(np.random.Philox(seed))
    drawn = stratified(common_prompts(systems), num_prompts, random)
    prompts = [p for p in drawn if len({system.completions[p.id] for system in systems}) > 1]
    if not prompts:
        raise UserError(f"human: to all {len(drawn)} prompts {', '.join(names)} gave the same answers; nothing to ask")
    identical = [p for p in drawn if len({system.completions[p.id] for system in systems}) == 1]
    again = sorted(random.permutation(len(prompts))[: round(duplicates * len(prompts))].tolist())
    orders = _rotations(len(systems))
    start = {i: k for k, i in enumerate(random.permutation(len(prompts)).tolist())}
    # Half of the sheet lies between a prompt and its duplicate: nobody remembers it by then.
    early, late = ([(i, True) for i in again if (i < len(prompts) // 2) == side] for side in (True, False))
    rows = [*late, *((i, False) for i in range(len(prompts))), *early]
    slots = SLOTS[: len(systems)]
    listed = []
    for prompt_number, second in rows:
        turn = start[prompt_number] + (1 + start[prompt_number] % (len(orders) - 1) if second else 0)
        order = orders[turn % len(orders)]
        listed.append((prompts[prompt_number], second, {slot: names[k] for slot, k in zip(slots, order, strict=True)}))
    texts = [[p.id, _category(p), *(system.completions[p.id] for system in systems)] for p, _, _ in listed]
    identity = _hash(json.dumps([names, seed, [placed for *_, placed in listed], texts], ensure_ascii=True))[:8]
    items = [f"{identity}-{number:04d}" for number in range(1, len(listed) + 1)]
    item_of = {(p.id, second): item for item, (p, second, _) in zip(items, listed, strict=True)}
    key = {
        "schema": 1,
        "manifest": identity,
        "systems": names,
        "items": {
            item: {
                "prompt_id": p.id,
                "category": _category(p),
                "slots": placed,
                "characters": {system.name: len(system.completions[p.id]) for system in systems},
                "same_text": _same_text(systems, p),
                "duplicate_of": item_of[p.id, False] if second else None,
            }
            for item, (p, second, placed) in zip(items, listed, strict=True)
        },
        "identical": [
            {"prompt_id": p.id, "category": _category(p), "characters": len(systems[0].completions[p.id])}
            for p in identical
        ],
    }
    completions = {system.name: system.completions for system in systems}
    sheet = [
        {"item": item, "conversation": _conversation(p)}
        | {slot: completions[name][p.id] for slot, name in placed.items()}
        | {"best": "", "comment": ""}
        for item, (p, _, placed) in zip(items, listed, strict=True)
    ]
    key_text = json.dumps(key, ensure_ascii=False, indent=1) + "\n"
    manifest = {
        "schema": 1,
        "manifest": identity,
        "rows": len(listed),
        "prompts": len(prompts),
        "duplicates": len(again),
        "identical": len(identical),
        "seed": seed,
        "slots": list(slots),
        "answers": [*slots, "tie"],
        "strata": dict(sorted(Counter(map(_category, prompts)).items())),
        "longest_cell": max(len(str(value)) for row in sheet for value in row.values()),
        "key_sha256": _hash(_clean(key_text)),
        "sheet_sha256": _texts_hash(sheet, slots),
    }
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / "sheet.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in sheet))
    (folder / SHEET).write_bytes(_csv(sheet).encode("utf-8-sig"))
    _write(folder / KEY, key_text)
    _write(folder / MANIFEST, json.dumps(manifest, ensure_ascii=False, indent=1) + "\n")
    return manifest


def stratified(prompts: Sequence[Prompt], count: int, random: np.random.Generator) -> list[Prompt]:
    """`count` prompts in a random order, drawn in proportion to their categories; all of them where they are fewer."""
    strata: dict[str, list[Prompt]] = {}
    for prompt in prompts:
        strata.setdefault(_category(prompt), []).append(prompt)
    count = min(count, len(prompts))
    exact = {name: count * len(members) / len(prompts) for name, members in strata.items()}
    taken = {name: int(share) for name, share in exact.items()}
    for name in sorted(exact, key=lambda name: (taken[name] - exact[name], name))[: count - sum(taken.values())]:
        taken[name] += 1  # the largest remainders
    drawn = []
    for name in sorted(strata):
        members = strata[name]
        drawn += [members[i] for i in random.permutation(len(members))[: taken[name]].tolist()]
    return [drawn[i] for i in random.permutation(len(drawn)).tolist()]


def safe_cell(text: str) -> str:
    """A text that no spreadsheet takes for a formula: with an apostrophe before it where it begins like one."""
    text = text.replace("\0", "\N{REPLACEMENT CHARACTER}")
    return f"'{text}" if any(c in _FORMULA for c in text[:1] + text.lstrip()[:1]) else text


def _rotations(count: int) -> list[tuple[int, ...]]:
    """Orders of the systems in which each sits in each slot equally often: all of them, or a cycle of many."""
    if count <= 4:
        return list(itertools.permutations(range(count)))
    return [tuple((i + shift) % count for i in range(count)) for shift in range(count)]


def _same_text(systems: Sequence[Answers], prompt: Prompt) -> dict[str, str]:
    """System -> the first one that answered the same; only those that are not the first themselves."""
    first: dict[str, str] = {}
    same = {system.name: first.setdefault(system.completions[prompt.id], system.name) for system in systems}
    return {name: other for name, other in same.items() if name != other}


def _category(prompt: Prompt) -> str:
    return str(prompt.meta.get("category") or prompt.task)


def _conversation(prompt: Prompt) -> str:
    if len(prompt.messages) == 1:
        return prompt.messages[0].content
    return "\n\n".join(f"[{message.role}]\n{message.content}" for message in prompt.messages)


def _csv(rows: Sequence[Mapping[str, str]]) -> str:
    stream = io.StringIO(newline="")
    writer = csv.writer(stream, quoting=csv.QUOTE_ALL, lineterminator="\r\n")
    writer.writerow(rows[0])
    writer.writerows([safe_cell(value) for value in row.values()] for row in rows)
    return _clean(stream.getvalue())


def _write(path: Path, text: str) -> None:
    path.write_bytes(_clean(text).encode())


def _clean(text: str) -> str:
    """Without halves of surrogate pairs, which no file can hold."""
    return text.encode("utf-8", "replace").decode()


def _texts_hash(rows: Sequence[Mapping[str, Any]], slots: Sequence[str]) -> str:
    """The hash of what stands on a sheet, whatever was filled in."""
    texts = [[_clean(str(row[column])) for column in ("item", "conversation", *slots)] for row in rows]
    return _hash(json.dumps(texts, ensure_ascii=True))


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()


# ---- reading ---------------------------------------------------------------------------------------------------------


def read_filled(
    files: Sequence[Path], folder: Path, key: Path | None = None, *, partial: bool = False
) -> tuple[list[Choice], dict[str, Any]]:
    """The choices on filled sheets, one file a person (named after it), and the key.

    Args:
        folder: where the manifest is.
        key: None = key.json beside the manifest.
        partial: rows without an answer are left out instead of refused.

    Raises:
        UserError: the key is not the manifest's, or sheets are wrong: one line for each row that is.
    """
    if absent := [path for path in files if not path.exists()]:
        raise UserError("\n".join(f"{path}: no such file" for path in absent[:MOST_PROBLEMS]))
    manifest = _manifest(folder)
    known = _key(key or folder / KEY, manifest)
    texts = _texts(folder, manifest)
    problems: list[str] = []
    choices: list[Choice] = []
    seen: dict[str, Path] = {}
    for path in files:
        annotator = path.name.partition(".")[0]
        if annotator in seen:
            problems.append(f"{path}: {seen[annotator]} is of {annotator!r} too; name each file after its person")
            continue
        seen[annotator] = path
        choices += _choices(path, annotator, known, manifest, texts, partial, problems)
    if problems:
        shown = problems[:MOST_PROBLEMS]
        more = len(problems) - len(shown)
        raise UserError("\n".join(shown + ([f"and {more} more like these"] if more else [])))
    if not choices:
        raise UserError(f"{files[0] if files else folder}: no row has an answer yet")
    return choices, known


def results(choices: Sequence[Choice], key: Mapping[str, Any], judge: Sequence[Vote] | None = None) -> dict[str, Any]:
    """Agreement, self-consistency, position bias and wins of the choices; beside a judge's verdicts where given."""
    originals = [c for c in choices if key["items"][c.item]["duplicate_of"] is None]
    systems: list[str] = key["systems"]
    found: dict[str, Any] = {
        "schema": 1,
        "manifest": key["manifest"],
        "systems": systems,
        "annotators": dict(Counter(choice.annotator for choice in originals)),
        "between": _between(originals, key),
        "self_consistency": _self_consistency(choices, key),
        "position": _position([c for c in choices if not key["items"][c.item].get("same_text")], len(systems)),
        "wins": {},
    }
    votes = people_votes(originals, key)
    for a, b in itertools.combinations(systems, 2):
        games = _games([v for v in votes if set(v.item[2:]) == {a, b}], a, b, key)
        games += _known_ties(originals, key, a, b)
        if games:
            found["wins"][f"{a} / {b}"] = {"a": a, "b": b, **numbers(games)}
    if judge is not None:
        found["judge"] = agreement(votes, judge)
    return found


def people_votes(choices: Sequence[Choice], key: Mapping[str, Any]) -> list[Vote]:
    """A vote for every pair of systems that a choice says something about: the best one beats all the others, but for
    those with its very text; of two with the same text nobody says anything."""
    votes = []
    for choice in choices:
        item = key["items"][choice.item]
        same = item.get("same_text", {})
        for a, b in itertools.combinations(key["systems"], 2):
            one, other = same.get(a, a), same.get(b, b)
            if one != other and choice.system in (one, other, "tie"):
                winner = "tie" if choice.system == "tie" else "a" if choice.system == one else "b"
                row = {"prompt": item["prompt_id"], "a": a, "b": b, "winner": winner, "rater": choice.annotator}
                votes.append(vote(row | {"category": item["category"]}, choice.item))
    return votes


def vote_rows(choices: Sequence[Choice], key: Mapping[str, Any]) -> list[dict[str, str]]:
    """The votes as rows that `alignlab judge agreement --human` reads."""
    return [
        {
            "prompt_id": v.item[0],
            "system_a": v.item[2],
            "system_b": v.item[3],
            "winner": {"first": "a", "second": "b", "tie": "tie"}[v.side],
            "annotator": v.rater,
            "category": v.category,
        }
        for v in people_votes([c for c in choices if key["items"][c.item]["duplicate_of"] is None], key)
    ]


def _between(choices: Sequence[Choice], key: Mapping[str, Any]) -> dict[str, Any]:
    """Agreement of people with each other on which system is best."""
    said: dict[str, dict[str, str]] = {}
    for choice in choices:
        said.setdefault(choice.annotator, {})[choice.item] = choice.system
    pairs = []
    for one, other in itertools.combinations(said, 2):
        common = [item for item in said[one] if item in said[other]]
        if not common:
            continue
        a, b = [said[one][item] for item in common], [said[other][item] for item in common]
        same = sum(x == y for x, y in zip(a, b, strict=True))
        pairs.append(
            {
                "annotators": [one, other],
                "n": len(common),
                "agreement": same / len(common),
                "agreement_interval": list(wilson_interval(same, len(common))),
                "kappa": cohens_kappa(a, b),
                "kappa_interval": list(kappa_interval(a, b)),
            }
        )
    items = list(dict.fromkeys(choice.item for choice in choices))
    ratings = [[by_item.get(item) for item in items] for by_item in said.values()]
    several = sum(sum(row[i] is not None for row in ratings) > 1 for i in range(len(items)))
    return {
        "pairs": pairs,
        "items_with_several": several,
        "alpha": krippendorff_alpha(ratings) if several else None,
        "alpha_interval": list(alpha_interval(ratings)) if several else None,
    }


def _self_consistency(choices: Sequence[Choice], key: Mapping[str, Any]) -> dict[str, Any]:
    """How often people choose the same system when a prompt comes again in other slots."""
    said = {(choice.annotator, choice.item): choice for choice in choices}
    by_annotator: dict[str, list[bool]] = {}
    slots = []
    prompts = []
    for (annotator, item), choice in said.items():
        original = key["items"][item]["duplicate_of"]
        first = said.get((annotator, original)) if original else None
        if first is not None:
            by_annotator.setdefault(annotator, []).append(first.system == choice.system)
            slots.append(first.slot == choice.slot != "tie")
            prompts.append(original)
    flat = [same for found in by_annotator.values() for same in found]
    if not flat:
        return {"n": 0, "rate": None, "interval": None, "same_slot": None, "annotators": {}}
    rate = win_rate([float(same) for same in flat], prompts)
    return {
        "n": len(flat),
        "rate": rate.rate,
        "interval": [rate.low, rate.high],
        "same_slot": sum(slots) / len(slots),
        "annotators": {
            name: {"n": len(found), "rate": sum(found) / len(found),
                   "interval": list(wilson_interval(sum(found), len(found)))}
            for name, found in by_annotator.items()
        },
    }  # fmt: skip


def _position(choices: Sequence[Choice], count: int) -> dict[str, Any]:
    """How often each slot was best; every system sits in each equally often, so without bias each has 1 / count."""
    chosen = Counter(choice.slot for choice in choices if choice.slot != "tie")
    total = sum(chosen.values())
    return {
        "slots": {slot: chosen.get(slot, 0) for slot in SLOTS[:count]},
        "ties": len(choices) - total,
        "first_rate": chosen["A"] / total if total else None,
        "first_rate_interval": list(wilson_interval(chosen["A"], total)) if total else None,
        "expected": 1 / count,
        "p": float(stats.binomtest(chosen["A"], total, 1 / count).pvalue) if total else None,
    }


def _games(votes: Sequence[Vote], a: str, b: str, key: Mapping[str, Any]) -> list[Game]:
    """One game a prompt, won by the system that most people prefer."""
    by_prompt: dict[str, list[Vote]] = {}
    for one in votes:
        by_prompt.setdefault(one.item[0], []).append(one)
    lengths = {item["prompt_id"]: item["characters"] for item in key["items"].values()}
    games = []
    for prompt_id, found in by_prompt.items():
        side = majority(found)
        winner: Winner = "tie" if side == "tie" else "a" if (side == "first") == (a < b) else "b"
        games.append(
            Game(
                prompt_id=prompt_id,
                category=found[0].category,
                winner=winner,
                verdicts=(winner,),
                replies=(),
                lengths=(lengths[prompt_id][a], lengths[prompt_id][b]),
            )
        )
    return games


def _known_ties(choices: Sequence[Choice], key: Mapping[str, Any], a: str, b: str) -> list[Game]:
    """Games of the prompts that both answered with the same text.

    Of those that are on no sheet, as all systems said the same, a sheet that is filled in part counts that part, so
    that they do not outweigh the prompts that people were asked about.
    """
    off_sheet: list[dict[str, Any]] = key.get("identical", [])
    asked = {item["prompt_id"] for item in key["items"].values()}
    answered = {key["items"][choice.item]["prompt_id"]: key["items"][choice.item] for choice in choices}
    known = [(item, item["characters"]) for item in off_sheet[: round(len(off_sheet) * len(answered) / len(asked))]]
    for item in answered.values():
        same = item.get("same_text", {})
        if same.get(a, a) == same.get(b, b):
            known.append((item, item["characters"][a]))
    return [
        Game(
            prompt_id=item["prompt_id"], category=item["category"], winner="tie", verdicts=(), replies=(),
            lengths=(length, length),
        )
        for item, length in known
    ]  # fmt: skip


def _choices(
    path: Path,
    annotator: str,
    key: Mapping[str, Any],
    manifest: Mapping[str, Any],
    texts: Mapping[str, Mapping[str, str]],
    partial: bool,
    problems: list[str],
) -> list[Choice]:
    try:
        rows = _rows(path)
    except UserError as error:
        problems.append(str(error))
        return []
    identity, items = str(manifest["manifest"]), key["items"]
    if "item" not in rows[0] or "best" not in rows[0]:
        problems.append(
            f"{path}: no columns item and best, so it is no filled sheet; it has {', '.join(rows[0])[:100]}"
        )
        return []
    ids = [str(row.get("item") or "").strip() for row in rows]
    if not any(item.startswith(f"{identity}-") for item in ids):
        problems.append(f"{path}: is a sheet of another manifest ({ids[0].partition('-')[0][:20]!r}, not {identity!r})")
        return []
    found: list[Choice] = []
    first: dict[str, int] = {}
    for number, (item, row) in enumerate(zip(ids, rows, strict=True), 2):
        where, said = f"{path}, row {number}", unicodedata.normalize("NFKC", str(row.get("best") or "")).strip().upper()
        if item not in items:
            problems.append(f"{where}: there is no item {item[:40]!r} on this sheet")
        elif column := _other_text(row, rows[0], texts.get(item, {})):
            problems.append(
                f"{where}, column {column}: item {item} has another text there than the sheet that was handed out; "
                "restore it, and fill in best and comment only" + "; save the file as UTF-8" * _is_lossy(row)
            )
        elif item in first:
            problems.append(f"{where}: item {item} was answered in row {first[item]} already")
        elif not said:
            first[item] = number
            if not partial:
                problems.append(
                    f"{where}: item {item} has no answer; write {_answers(manifest)}, or read with --partial"
                )
        elif said in TIES:
            first[item] = number
            found.append(Choice(annotator, item, "tie", "tie"))
        elif said not in items[item]["slots"]:
            both = len(set(said) & set(items[item]["slots"])) > 1
            what = "names several answers" if both else f"says {said[:20]!r}"
            problems.append(f"{where}: item {item} {what}; write one of {_answers(manifest)}")
        else:
            first[item] = number
            system = items[item]["slots"][said]
            found.append(Choice(annotator, item, said, items[item].get("same_text", {}).get(system, system)))
    if not partial and (missing := [item for item in items if item not in ids]):
        problems.append(f"{path}: {len(missing)} rows of the sheet are missing, {missing[0]} first; or use --partial")
    return found


def _other_text(row: Mapping[str, Any], header: Mapping[str, Any], texts: Mapping[str, str]) -> str | None:
    """The first column whose text is not the sheet's; a file may lack columns of texts as a whole."""
    for column, text in texts.items():
        name = column if column in header else column.lower()
        if name not in header:
            continue
        cell = str(row.get(name) or "")
        others = {_bare(safe) for other in texts.values() for safe in (other, safe_cell(other))}
        others -= {_bare(text), _bare(safe_cell(text))}
        if _bare(cell) in others or not same_cell(cell, text):
            return column
    return None


def same_cell(cell: str, text: str) -> bool:
    """Whether a cell holds this text, after whatever spreadsheets do to it.

    They change line endings and white space at the ends of lines, drop control characters and what is beyond
    `LONGEST_CELL`, add or drop the apostrophe of `safe_cell`, write numbers, dates and truth values their own way, and
    put question marks for letters that their encoding lacks.
    """
    found, meant = _bare(cell), _bare(text)
    cut = len(text) > LONGEST_CELL and len(cell) > 0.9 * LONGEST_CELL
    lossy = ("?" in found or "\ufffd" in found) and bool(_NOT_PLAIN.search(text))
    for wanted in (meant, _bare(safe_cell(text)), meant.removeprefix("'")):
        if found == wanted or (cut and wanted.startswith(found)):
            return True
    if lossy and any(_sure(cell) == _sure(wanted) for wanted in (text, safe_cell(text))):
        return True
    close = 1e-5 if "e" in found.lower() else 1e-12
    return (
        any(math.isclose(x, y, rel_tol=close) for x in _numbers(found) for y in _numbers(meant))
        or bool(_DATE.fullmatch(found) and _DATE.fullmatch(meant) and not (_numbers(found) and _numbers(meant)))
        or found.lower() == meant.lower() in ("true", "false")
    )


def _bare(text: str) -> str:
    """What spreadsheets keep of a text: no control characters, line feeds only, no white space at ends of lines."""
    text = unicodedata.normalize("NFC", _clean(text)).replace("\r\n", "\n").replace("\r", "\n")
    text = "".join(c for c in text if c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cf"))
    return "\n".join(line.rstrip() for line in text.split("\n")).strip()


def _sure(text: str) -> str:
    return _UNSURE.sub("?", text).strip("?")


def _numbers(text: str) -> list[float]:
    """What a number may mean: commas are for decimals in some countries and for thousands in others."""
    found = [text.replace(",", "")] + [text.replace(",", ".")] * (text.count(",") == 1 and "." not in text)
    return [float(number) for number in found if _NUMBER.fullmatch(number)]


def _is_lossy(row: Mapping[str, Any]) -> bool:
    return any("\ufffd" in str(value) for value in row.values())


def _answers(manifest: Mapping[str, Any]) -> str:
    *slots, tie = manifest["answers"]
    return f"{', '.join(slots)} or {tie}"


def _rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a filled sheet, saved by whatever program: commas, semicolons or tabs, UTF-8, UTF-16 or older."""
    if path.suffix.lower() in (".jsonl", ".json"):
        return read_file(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or type(error).__name__})") from error
    wide = data[:2] in (b"\xff\xfe", b"\xfe\xff")
    # Ids and answers are ASCII, so a byte that some old encoding left in a text does no harm here.
    text = data.decode("utf-16" if wide else "utf-8-sig", errors="replace").replace("\0", "")
    head = text.partition("\n")[0]
    delimiter = max(",;\t", key=head.count)
    csv.field_size_limit(2**31 - 1)
    try:
        lines = [line for line in csv.reader(io.StringIO(text, newline=""), delimiter=delimiter) if any(line)]
    except csv.Error as error:
        raise UserError(f"{path}: cannot be read as CSV ({error})") from error
    if len(lines) < 2:
        raise UserError(f"{path}: holds no rows")
    names = [name.strip().lower() for name in lines[0]]
    return [dict(zip(names, line, strict=False)) for line in lines[1:]]


def _manifest(folder: Path) -> dict[str, Any]:
    try:
        found = json.loads((folder / MANIFEST).read_text("utf-8"))
        if {"manifest", "answers", "key_sha256"} <= set(found):
            return dict(found)
    except (OSError, ValueError, TypeError):
        pass
    raise UserError(f"{folder / MANIFEST}: missing or damaged; name the folder that `alignlab human make` wrote")


def _texts(folder: Path, manifest: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """What was handed out: item -> column -> text.

    Raises:
        UserError: sheet.jsonl is missing, damaged or another.
    """
    path, (*slots, _) = folder / "sheet.jsonl", manifest["answers"]
    try:
        rows = [json.loads(line) for line in path.read_text("utf-8").split("\n") if line.strip()]
        same = _texts_hash(rows, slots) == manifest.get("sheet_sha256", _texts_hash(rows, slots))
        texts = {str(row["item"]): {column: str(row[column]) for column in ("conversation", *slots)} for row in rows}
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path}: missing or damaged, and filled sheets are compared with it; restore it") from error
    if not same:
        raise UserError(f"{path}: was changed after manifest {manifest['manifest']} was written; restore it")
    return texts


def _key(path: Path, manifest: Mapping[str, Any]) -> dict[str, Any]:
    try:
        text = path.read_bytes().decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: the key is missing or damaged; name it with --key") from error
    if _hash(text) != manifest["key_sha256"]:
        raise UserError(f"{path}: is not the key of manifest {manifest['manifest']}, or was changed")
    return dict(json.loads(text))
