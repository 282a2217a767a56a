"""Files, URLs and hub data sets as rows.

path | URL | hub name, split -> [{column: value}, ..]; what is wrong with a file is said in one line, with its line.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import importlib
import io
import json
import os
import re
import urllib.error
import urllib.request
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlparse

from alignlab.errors import UserError
from alignlab.registry import did_you_mean

Record = dict[str, Any]

SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
"""What can be read; also with .gz."""
HUB_TIMEOUT = 5.0
"""Seconds in which the hub has to say anything."""


def read_rows(where: str | Path, *, config: str | None = None, split: str | None = None) -> list[Record]:
    """The rows of a file, a URL of a file, or a hub data set, in order.

    `split` is `train`, `train[:200]`, `train[10%:20%]` or `[5:9]`; of a file only the slice counts.

    Raises:
        UserError: one line with the path and, where there is one, the line.
    """
    if _is_url(where) or Path(where).expanduser().exists() or str(where).removesuffix(".gz").endswith(SUFFIXES):
        rows = read_file(where)
        return rows[slice_of(split, len(rows), str(where))]
    return read_hub(str(where), config, split)


def read_file(where: str | Path) -> list[Record]:
    """All rows of a file or of the file behind a URL."""
    path = _download(str(where)) if _is_url(where) else Path(where).expanduser()
    name = str(where)
    if path.is_dir():
        files = sorted(f.name for f in path.iterdir() if f.name.removesuffix(".gz").endswith(SUFFIXES))
        raise UserError(f"{name}: is a folder; name one file" + (f": {', '.join(files)}" if files else ""))
    if not path.exists():
        beside = [f.name for f in path.parent.iterdir()] if path.parent.is_dir() else []
        raise UserError(joined(f"{name}: no such file", did_you_mean(path.name, beside)))
    suffix = Path(path.name.removesuffix(".gz")).suffix.lower()
    if suffix not in SUFFIXES:
        raise UserError(f"{name}: cannot read {suffix or 'a file without suffix'}; there are: {', '.join(SUFFIXES)}")
    try:
        data = path.read_bytes()
        data = gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{name}: cannot be read: {error}") from error
    rows = _parse_parquet(data, name) if suffix == ".parquet" else _PARSERS[suffix](_decode(data, name), name)
    if not rows:
        raise UserError(f"{name}: holds no rows")
    return rows


def _decode(data: bytes, name: str) -> str:
    if not data.strip():
        raise UserError(f"{name}: is empty")
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise UserError(f"{name}: is UTF-16; save it as UTF-8")
    if b"\0" in data:
        raise UserError(f"{name}: is a binary file, not text")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        byte = f"0x{data[error.start]:02x}"
        raise UserError(f"{name}, line {line}: the byte {byte} is not UTF-8; save the file as UTF-8") from error


def _parse_json(text: str, name: str) -> list[Record]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data" and text.lstrip().startswith("{"):
            return _parse_jsonl(text, name)  # one object a line under the other name
        raise UserError(f"{name}, line {error.lineno}: invalid JSON: {error.msg}") from error
    except RecursionError as error:
        raise UserError(f"{name}: is nested too deeply") from error
    if isinstance(value, dict) and isinstance(value.get("data"), list):
        value = value["data"]
    if not isinstance(value, list):
        found = f"an object with {', '.join(value)}" if isinstance(value, dict) else kind_of(value)
        raise UserError(f'{name}: expected a list of objects, or {{"data": [..]}}, at the top; found {found}')
    for i, row in enumerate(value):
        if not isinstance(row, dict):
            raise UserError(f"{name}, row {i + 1}: expected an object, found {kind_of(row)}")
    return value


def _parse_jsonl(text: str, name: str) -> list[Record]:
    rows = []
    for number, line in enumerate(text.split("\n"), 1):  # not splitlines: JSON strings may hold U+2028
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{name}, line {number}: invalid JSON: {error.msg} at column {error.colno}") from error
        except RecursionError as error:
            raise UserError(f"{name}, line {number}: is nested too deeply") from error
        if not isinstance(row, dict):
            raise UserError(f"{name}, line {number}: expected an object, found {kind_of(row)}")
        rows.append(row)
    return rows


def _parse_csv(text: str, name: str, delimiter: str = ",") -> list[Record]:
    csv.field_size_limit(2**31 - 1)  # the default ends fields at 128 KiB
    text = text.replace("\r\n", "\n")  # inside fields too, where it is how the file was saved, not what was said
    lines = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    rows: list[Record] = []
    try:
        header = [column.strip() for column in next(lines)]
        if twice := [column for column, count in Counter(header).items() if count > 1]:
            raise UserError(f"{name}, line 1: two columns are named {twice[0]!r}")
        for cells in lines:
            if cells and len(cells) != len(header):
                raise UserError(f"{name}, line {lines.line_num}: {len(cells)} fields, but {len(header)} columns")
            rows += [dict(zip(header, cells, strict=True))] if cells else []
    except csv.Error as error:
        raise UserError(f"{name}, line {lines.line_num}: invalid CSV: {error}") from error
    return rows


def _parse_tsv(text: str, name: str) -> list[Record]:
    return _parse_csv(text, name, "\t")


_PARSERS: Mapping[str, Callable[[str, str], list[Record]]] = {
    ".jsonl": _parse_jsonl,
    ".json": _parse_json,
    ".csv": _parse_csv,
    ".tsv": _parse_tsv,
}


def _parse_parquet(data: bytes, name: str) -> list[Record]:
    try:
        table = importlib.import_module("pyarrow.parquet").read_table(io.BytesIO(data))
    except (ValueError, OSError) as error:
        raise UserError(f"{name}: is no parquet file: {_first_line(error)}") from error
    return cast(list[Record], table.to_pylist())


def read_hub(name: str, config: str | None, split: str | None) -> list[Record]:
    """The rows of a hub data set's split (`train` if not said); `owner/name/folder` is one folder of its repository."""
    import datasets

    local, reached = "; a local copy can be named in data.path", _hub_answers()
    owner, _, rest = name.partition("/")
    dataset, _, folder = rest.partition("/")
    where = f"{owner}/{dataset}" if rest else owner
    try:
        inside = {"data_dir": folder} if folder else {}
        with nullcontext() if reached else _offline():
            rows = datasets.load_dataset(where, config, split=split or "train", **inside)
            return [dict(row) for row in rows]
    except datasets.exceptions.DatasetNotFoundError as error:
        if "gated" in str(error):
            page = f"https://huggingface.co/datasets/{name}"
            raise UserError(f"{name}: is gated; accept its terms at {page} and set HF_TOKEN{local}") from error
        raise UserError(f"{name}: the hub has no such data set, or it is private and HF_TOKEN is not set") from error
    except ConnectionError as error:
        if reached and "Offline" in f"{type(error).__name__} {error}":
            raise UserError(f"{name}: offline mode is on (HF_HUB_OFFLINE) and it is not in the cache{local}") from error
        raise UserError(f"{name}: the hub cannot be reached, is there a network?{local}") from error
    except (ValueError, OSError, RuntimeError) as error:  # an unknown config or split, a script, a broken file
        raise UserError(f"{name}: {_first_line(error)}") from error


def _hub_answers() -> bool:
    """Whether the hub says anything at all; not asked in offline mode, whose cache is looked into either way.

    `datasets` would try six times, in half a minute, and say so each time.
    """
    import huggingface_hub

    if huggingface_hub.constants.HF_HUB_OFFLINE:
        return True
    try:
        huggingface_hub.get_session().head(huggingface_hub.constants.ENDPOINT, timeout=HUB_TIMEOUT)
    except Exception:  # of whichever client the hub's library has
        return False
    return True


@contextmanager
def _offline() -> Iterator[None]:
    """The hub's libraries as with HF_HUB_OFFLINE=1: from the cache or not at all."""
    import datasets
    import huggingface_hub

    places: tuple[Any, ...] = (huggingface_hub.constants, datasets.config)
    before = [place.HF_HUB_OFFLINE for place in places]
    try:
        for place in places:
            place.HF_HUB_OFFLINE = True
        yield
    finally:
        for place, was in zip(places, before, strict=True):
            place.HF_HUB_OFFLINE = was


def _is_url(where: str | Path) -> bool:
    return str(where).startswith(("http://", "https://"))


def _download(url: str) -> Path:
    """The file's copy in the cache, fetched once; delete it there to fetch it again."""
    folder = Path(os.environ.get("ALIGNLAB_CACHE", "~/.cache/alignlab")).expanduser() / "downloads"
    path = folder / f"{hashlib.sha256(url.encode()).hexdigest()[:16]}-{Path(urlparse(url).path).name}"
    if path.exists():
        return path
    try:
        with urllib.request.urlopen(url, timeout=30) as response:
            data = response.read()
    except urllib.error.HTTPError as error:
        raise UserError(f"{url}: the server answers {error.code} {error.reason}") from error
    except OSError as error:
        reason = getattr(error, "reason", error)
        raise UserError(f"{url}: cannot be reached ({reason}); a local copy can be named in data.path") from error
    folder.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}")
    partial.write_bytes(data)
    return partial.replace(path)


_SPLIT = re.compile(r"(?P<name>[\w.-]*)(?:\[(?P<start>-?\d+%?)?:(?P<stop>-?\d+%?)?\])?")


def slice_of(split: str | None, size: int, name: str) -> slice:
    """The rows that `train[10%:20%]` asks for; percentages are rounded to the nearest row."""
    match = _SPLIT.fullmatch(split or "")
    if match is None:
        raise UserError(f"{name}: cannot read the split {split!r}; write train, train[:200], train[10%:20%] or [5:9]")

    def bound(text: str | None) -> int | None:
        if text is None or not text.endswith("%"):
            return None if text is None else int(text)
        return round(size * int(text[:-1]) / 100)

    return slice(bound(match["start"]), bound(match["stop"]))


# ---- words -----------------------------------------------------------------------------------------------------------


def kind_of(value: object) -> str:
    """A JSON value's type in words."""
    words = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}
    return words.get(type(value), "a number" if isinstance(value, int | float) else f"a {type(value).__name__}")


def joined(*parts: str) -> str:
    """The parts of a message that have something to say, in one line."""
    return "; ".join(filter(None, parts))


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
