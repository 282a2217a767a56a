"""Entries of a task -> train, validation and test that share no prompt, each in an order whose every beginning is a
stratified sample -> a folder with a card.

Nothing here is drawn: what goes where is a function of the seed and of each prompt's text, so neither the order of the
rows nor a margin between two scores decides anything.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from alignlab.data.overlap import NGRAMS, shared_ngrams, words
from alignlab.data.prepared import CARD, SPLITS, Entry, Split, data_files, jsonl, to_rows
from alignlab.data.sets import SHARES, Found, Source
from alignlab.errors import UserError

BINS = (0.0, 3.0, 5.0, 7.0, 9.0)
"""Lower ends of the bins of `score_chosen` by which train is stratified."""
LARGEST_VALIDATION = 500
"""Prompts that validation takes from train at the most, where nobody says how many."""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """The most prompts of each split; None: all that there are (validation: at most LARGEST_VALIDATION of train)."""

    train: int | None = None
    validation: int | None = None
    test: int | None = None
    balanced: tuple[str, ...] = ()
    """Categories that have an equal share of test each, where `test` is a number."""
    asked: tuple[Split, ...] = ()
    """Splits whose number somebody asked for, so that fewer are worth a note."""

    def of(self, split: Split) -> int | None:
        return {"train": self.train, "validation": self.validation, "test": self.test}[split]


@dataclass(frozen=True, kw_only=True)
class Divided:
    """The entries of each split, and what happened on the way."""

    splits: Mapping[Split, tuple[Entry, ...]]
    dropped: Mapping[str, int]
    """Reason -> entries."""
    notes: tuple[str, ...]
    """What a reader has to know, in plain words."""


@dataclass
class _Log:
    dropped: Counter[str] = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)


def score_bin(score: float) -> str:
    """The bin of a score as text: `7-9`; each holds its lower end, the last one both."""
    bounds = (*BINS, 10.0)
    place = max((i for i, low in enumerate(BINS) if score >= low), default=0)
    return f"{bounds[place]:g}-{bounds[place + 1]:g}"


def stratum(entry: Entry) -> str:
    """What an entry of train is like: its score bin where it has a score, else its category."""
    return entry.category if entry.score_chosen is None else score_bin(entry.score_chosen)


def interleave(entries: Iterable[Entry], seed: int, kind: Callable[[Entry], str]) -> list[list[Entry]]:
    """The entries by unit, in an order in which every beginning holds each (source, kind) in its share of the whole.

    Within a kind the order is that of a hash of the seed and the unit's text.
    """
    units: dict[str, list[Entry]] = {}
    for entry in entries:
        units.setdefault(entry.unit, []).append(entry)
    strata: dict[tuple[str, str], list[str]] = {}
    for unit, members in units.items():
        strata.setdefault((members[0].source, kind(members[0])), []).append(unit)
    placed = []
    for of_kind in strata.values():
        drawn = sorted((_draw(seed, unit), unit) for unit in of_kind)
        placed += [((rank + 0.5) / len(drawn), draw, unit) for rank, (draw, unit) in enumerate(drawn)]
    return [units[unit] for _, _, unit in sorted(placed)]


def divide(found: Sequence[Found], sources: Sequence[Source], sizes: Sizes, seed: int, task: str) -> Divided:
    """Official splits are kept; rows without one are divided by their source's shares; then no prompt is on two sides.

    A prompt, or anything of its unit, that is in test is dropped from validation and train, and one in validation from
    train. Where a source has rows of a test split only, they are divided like rows without a split, and that is said.

    Raises:
        UserError: nothing is left to validate on, though not all of it is only for testing.
    """
    log = _Log()
    entries = _without_duplicates([entry for one in found for entry in one.entries], log)
    shares = {source.name: source.shares for source in sources}
    splits: dict[Split, list[Entry]] = {split: [] for split in SPLITS}
    for name in dict.fromkeys(entry.source for entry in entries):
        own = [entry for entry in entries if entry.source == name]
        for split, members in _of_source(name, own, shares.get(name, SHARES), sizes, seed, log).items():
            splits[split] += members
    _separate(splits, log)
    _sample(splits, sizes, seed, log)
    ordered: dict[Split, tuple[Entry, ...]] = {}
    for split in SPLITS:
        kind = stratum if split == "train" else _category
        ordered[split] = tuple(entry for unit in interleave(splits[split], seed, kind) for entry in unit)
    if not ordered["validation"] and any(shares.get(entry.source, SHARES).get("validation") for entry in entries):
        raise UserError(f"{task}: no row is left for validation of {len(entries)} that are usable; name more data")
    return Divided(splits=ordered, dropped=dict(log.dropped), notes=tuple(log.notes))


def _category(entry: Entry) -> str:
    return entry.category


def _without_duplicates(entries: Sequence[Entry], log: _Log) -> list[Entry]:
    """Each (prompt, answers, label) of a split once."""
    kept: dict[tuple[object, ...], Entry] = {}
    for entry in entries:
        said = (entry.completion, entry.rejected, entry.label, entry.prompt.answer)
        kept.setdefault((entry.split, entry.key, *said), entry)
    if len(kept) < len(entries):
        log.dropped["exact duplicates"] += len(entries) - len(kept)
    return list(kept.values())


def _of_source(
    name: str, entries: Sequence[Entry], shares: Mapping[Split, float], sizes: Sizes, seed: int, log: _Log
) -> dict[Split, list[Entry]]:
    """The splits of one source."""
    given: dict[Split, list[Entry]] = {s: [entry for entry in entries if entry.split == s] for s in SPLITS}
    pool = [entry for entry in entries if entry.split is None or not shares.get(entry.split)]
    given = {split: members if shares.get(split) else [] for split, members in given.items()}
    if shares.get("train") and not given["train"] and not pool and (given["test"] or given["validation"]):
        there = " and ".join(split for split in SPLITS if given[split])
        pool = [entry for split in SPLITS for entry in given[split]]
        given = {split: [] for split in SPLITS}
        log.notes.append(
            f"{name}: only rows of its {there} split are here; they are divided by hash, so this is not the official "
            f"{there} split"
        )
    open_splits = [split for split in SPLITS if shares.get(split) and (split == "train" or not given[split])]
    if "train" in open_splits:
        pool += given["train"]
        given["train"] = []
    if not open_splits:  # each split has official rows; what says nothing goes to the first
        given[next(split for split in SPLITS if shares.get(split))] += pool
        return given
    units = interleave(pool, seed, stratum)
    taken = 0
    for left, split in reversed(list(enumerate(open_splits))):  # test first: it does not depend on validation's size
        rest = len(units) - taken
        most = rest if not left else min(_count(split, shares, sizes, len(units)), max(rest - left, 0))
        if split == "test" and sizes.test is not None and sizes.balanced:
            units = _balanced_first(units, most, sizes.balanced)
        for unit in units[taken : taken + most]:
            given[split] += unit
        taken += most
    return given


def _count(split: Split, shares: Mapping[Split, float], sizes: Sizes, total: int) -> int:
    """Units that a split would take of undivided ones: the number that was asked for, else its share."""
    wanted = sizes.of(split)
    if wanted is not None and split in sizes.asked:
        return wanted
    most = LARGEST_VALIDATION if split == "validation" and wanted is None else wanted
    count = max(1, round(shares[split] * total))
    return count if most is None else min(count, most)


def _balanced_first(units: list[list[Entry]], count: int, categories: Sequence[str]) -> list[list[Entry]]:
    """The units reordered so that the first `count` have an equal share of each category, as far as there are any."""
    share = count // len(categories)
    first = [unit for category in categories for unit in [u for u in units if u[0].category == category][:share]]
    chosen = set(map(id, first))
    return first + [unit for unit in units if id(unit) not in chosen]


def _separate(splits: dict[Split, list[Entry]], log: _Log) -> None:
    """Takes out of train what validation or test have, and out of validation what test has."""
    seen: set[str] = set()
    for split in reversed(SPLITS):
        kept = [entry for entry in splits[split] if entry.unit not in seen and entry.key not in seen]
        if len(kept) < len(splits[split]):
            other = "test" if split == "validation" else "validation or test"
            log.dropped[f"rows of {split} whose prompt is also in {other}"] += len(splits[split]) - len(kept)
        splits[split] = kept
        seen |= {key for entry in kept for key in (entry.unit, entry.key)}


def _sample(splits: dict[Split, list[Entry]], sizes: Sizes, seed: int, log: _Log) -> None:
    """The beginning of each split's stratified order, where there is more than is wanted."""
    for split in SPLITS:
        wanted = sizes.of(split)
        if wanted is None or not splits[split]:
            continue
        units = interleave(splits[split], seed, stratum if split == "train" else _category)
        if split == "test" and sizes.balanced:
            share = wanted // len(sizes.balanced)
            units = _balanced_first(units, wanted, sizes.balanced)
            there = Counter(unit[0].category for unit in units)
            got = {category: min(share, there[category]) for category in sizes.balanced}
            units = units[: sum(got.values())]
            short = [f"{count} {category}" for category, count in got.items() if count < share]
            if short:
                log.notes.append(
                    f"test: {share} prompts of each category were wanted; the set has only {', '.join(short)}"
                )
        elif split in sizes.asked and len(units) < wanted:
            log.notes.append(f"{split}: {wanted} prompts were wanted, there are {len(units)}")
        splits[split] = [entry for unit in units[:wanted] for entry in unit]


def _draw(seed: int, unit: str) -> str:
    return hashlib.sha256(f"{seed}/{unit}".encode("utf-8", "replace")).hexdigest()


# ---- the folder ------------------------------------------------------------------------------------------------------


def make_card(
    task: str, found: Sequence[Found], sources: Sequence[Source], divided: Divided, seed: int, system_prompt: str
) -> tuple[dict[str, Any], dict[str, str]]:
    """What the folder says about itself, and its files: name -> text."""
    licences = {source.name: source.licence for source in sources}
    files = {
        name: jsonl(rows) for split in SPLITS for name, rows in to_rows(task, split, divided.splits[split]).items()
    }
    card = {
        "schema": 1,
        "task": task,
        "seed": seed,
        "system_prompt": system_prompt,
        "sources": [
            {
                "name": one.source,
                "licence": licences.get(one.source, "unknown: these are your own data"),
                "where": one.where,
                "split": one.split,
                "rows": one.num_rows,
                "entries": len(one.entries),
                "unusable": dict(one.unusable),
                "fingerprint": one.fingerprint,
            }
            for one in found
        ],
        "splits": {split: _counts(divided.splits[split]) for split in SPLITS},
        "dropped": dict(divided.dropped),
        "overlap": overlap(divided.splits),
        "notes": [*(note for one in found for note in one.notes), *divided.notes],
        "files": {
            name: {"rows": text.count("\n"), "sha256": hashlib.sha256(text.encode()).hexdigest()}
            for name, text in files.items()
        },
    }
    return card, files


def _counts(entries: Sequence[Entry]) -> dict[str, Any]:
    by_prompt = {entry.key: entry for entry in entries}
    counts: dict[str, Any] = {
        "prompts": len(by_prompt),
        "pairs": sum(entry.rejected is not None for entry in entries),
        "labelled": sum(entry.label is not None for entry in entries),
        "desirable": sum(entry.label is True for entry in entries),
    }
    for name, kind in (("sources", lambda e: e.source), ("categories", _category)):
        counts[name] = dict(sorted(Counter(kind(entry) for entry in by_prompt.values()).items()))
    scored = Counter(score_bin(e.score_chosen) for e in entries if e.score_chosen is not None)
    return counts | ({"score_chosen": dict(sorted(scored.items()))} if scored else {})


def overlap(splits: Mapping[Split, Sequence[Entry]]) -> dict[str, Any]:
    """Held-out split -> prompts that train has too (exactly), and those that share n-grams of words with train.

    What test shares with validation stands below test's, under `with_validation`.
    """
    found: dict[str, Any] = {}
    for split in ("validation", "test"):
        if splits["train"] and splits[split]:
            found[split] = _shared(splits["train"], splits[split])
    if "test" in found and splits["validation"]:
        found["test"]["with_validation"] = _shared(splits["validation"], splits["test"])
    return found


def _shared(one: Sequence[Entry], other: Sequence[Entry]) -> dict[str, Any]:
    """Prompts of the second that the first has too, word by word of what their authors wrote."""
    before, after = ({entry.key: words(entry.text) for entry in some} for some in (one, other))
    told: dict[str, Any] = {"exact": len(after.keys() & before.keys()), "of": len(after)}
    for n in NGRAMS:
        shared = shared_ngrams(list(before.values()), list(after.values()), n)
        told[f"{n}-gram"] = {"rows": shared.rows, "common_phrases_left_out": shared.common}
    return told


def write_folder(output: Path, card: Mapping[str, Any], files: Mapping[str, str], *, force: bool = False) -> None:
    """The folder at once or not at all.

    Raises:
        UserError: it is there already and `force` is not given, or holds what nobody prepared, or cannot be written.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        if not force:
            raise UserError(f"{output}: exists; choose another --output, or --force replaces it")
        if not (output / CARD).is_file():
            raise UserError(f"{output}: has no {CARD}, so it is not replaced; choose another --output")
        strange = {path.name for path in output.iterdir()} - {CARD, *(path.name for path in data_files(output))}
        if strange:
            raise UserError(f"{output}: holds {min(strange)} too, so it is not replaced; choose another --output")
    partial = output.with_name(f".{output.name}.{os.getpid()}")
    try:
        partial.mkdir(parents=True)
        for name, text in files.items():
            (partial / name).write_text(text, "utf-8")
        (partial / CARD).write_text(json.dumps(card, indent=1, ensure_ascii=False) + "\n", "utf-8")
        if output.exists():
            shutil.rmtree(output)
        partial.rename(output)
    except OSError as error:
        raise UserError(f"{output}: cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def with_system(found: Sequence[Found], system_prompt: str) -> list[Found]:
    return [replace(one, entries=tuple(entry.under(system_prompt) for entry in one.entries)) for one in found]
