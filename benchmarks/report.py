"""Results -> the tables of docs/performance.md, between its marks; nothing but the JSON decides what they say."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.cases import BY_NAME
from benchmarks.results import load, path
from benchmarks.runner import PARTS, ROOT
from benchmarks.scaling import AXES, fit, growth, last_exponent

PAGE = ROOT / "docs" / "performance.md"
SHOWN = {
    "cpu": ("steps", "defaults", "scaling"),
    "cpu-bfloat16": ("steps",),
    "cuda": ("steps", "defaults", "scaling"),
}
"""Results -> the tables of them that the page has."""
MISSING = {"cpu": "not measured yet on this version", "cuda": "not measured: no GPU was available"}
NONE = "–"


def steps_table(records: dict[str, Any]) -> str:
    """One row a case: time, ratio, floor, tokens and memory of either side."""
    head = ["step", "ours, s", "peer, s", "**ratio**", "range", "floor, s", "times the floor", "trained tokens/s",
            "sampled tokens/s", "memory, MB", "memory ratio"]  # fmt: skip
    return _table(head, [step_row(name, record) for name, record in ordered(records)])


def step_row(name: str, r: dict[str, Any]) -> list[str]:
    """A case's cells; `a / b` is ours / the peer's."""
    o, p = r["ours"], r["peer"]
    title = name if r["against"].startswith("trl") else f"{name} (beside {r['against'].replace(', ', ' ')})"
    return [
        title,
        _short(o["seconds"]),
        _short(p["seconds"]),
        f"**{r['ratio']:.2f}**",
        f"{min(r['ratios']):.2f} to {max(r['ratios']):.2f}",
        _short(r["floor"]),
        f"{o['seconds'] / r['floor']:.1f} / {p['seconds'] / r['floor']:.1f}",
        _both(o, p, lambda side: side["trained_tokens"] / side["seconds"] if side.get("trained_tokens") else None),
        _both(o, p, sampled_rate),
        f"{o['memory_mb']:.0f} / {p['memory_mb']:.0f}",
        f"{r['memory_ratio']:.2f}",
    ]


def sampled_rate(side: dict[str, Any]) -> float | None:
    """Sampled tokens a second of sampling."""
    seconds = side["parts"].get("sampling")
    return side["sampled_tokens"] / seconds if seconds and side.get("sampled_tokens") else None


def parts_table(records: dict[str, Any]) -> str:
    """Two rows a case: seconds of either side by part, and what is in no part."""
    rows = []
    for name, r in ordered(records):
        for who, side in (("ours", r["ours"]), (r["against"], r["peer"])):
            parts = side["parts"]
            rest = side["split_seconds"] - sum(parts.values())
            cells = [_short(parts[part]) if part in parts else NONE for part in PARTS]
            rows.append([name, who, *cells, _short(max(rest, 0.0))])
    return _table(["step", "side", *PARTS, "rest"], rows)


def logged_table(records: dict[str, Any]) -> str:
    """How many numbers either side logs of a step, and whether the entropy, which needs every logit, is one of them."""
    rows = []
    for name, r in ordered(records):
        names = [r["ours"]["logged"], r["peer"]["logged"]]
        entropy = ["yes" if any("entropy" in one for one in logged) else "no" for logged in names]
        rows.append([name, *(str(len(logged)) for logged in names), " / ".join(entropy)])
    return _table(["step", "numbers that ours logs", "that the peer logs", "the entropy"], rows)


def defaults_table(records: dict[str, Any]) -> str:
    """One row a case: the peer as it comes."""
    rows = [[*step_row(name, r)[:5], *step_row(name, r)[-2:]] for name, r in ordered(records)]
    head = ["step", "ours, s", "peer as it comes, s", "**ratio**", "range", "memory, MB", "memory ratio"]
    return _table(head, rows)


def scaling_table(records: dict[str, Any]) -> str:
    """One row a series: sizes, seconds and memory at each, exponents with their standard error."""
    head = ["against", "side", "sizes", "seconds", "exponent", "of the last step", "memory, MB", "exponent",
            "MB of the last doubling"]  # fmt: skip
    rows = []
    for name in sorted(records, key=lambda name: list(AXES).index(name.partition(" ")[0])):
        axis, _, side = name.partition(" ")
        points = records[name]["points"]
        if len(points) < 2:
            continue
        sizes, seconds, memory = ([point[key] for point in points] for key in ("size", "seconds", "memory_mb"))
        rows.append([
            AXES[axis].title, side or "ours", ", ".join(map(_count, sizes)), ", ".join(map(_short, seconds)),
            _exponent(sizes, seconds), f"{last_exponent(sizes, seconds):.2f}",
            ", ".join(f"{m:.0f}" for m in memory), _exponent(sizes, memory), f"{growth(sizes, memory):.0f}",
        ])  # fmt: skip
    return _table(head, rows)


def conditions(records: dict[str, Any]) -> str:
    """A line for every machine and setting that the records are from, with their names where there are several."""
    lines: dict[str, list[str]] = {}
    for name, r in records.items():
        c = r["conditions"]
        about = ", ".join(f"{k} {v}" for k, v in c["versions"].items())
        side = f"{c['machine']}, {c['threads']} thread(s), {c['precision']}" + (", loops in C" if r["kernels"] else "")
        rates = f"{c['gflops']:.0f} Gflop/s in matrix products, {c['gbytes']:.1f} GB/s read"
        line = f"{side}: {rates}; {about}; {c['rounds']} rounds in turn."
        lines.setdefault(line, []).append(name)
    if len(lines) == 1:
        return next(iter(lines))
    return "\n".join(f"* {', '.join(names)}: {line}" for line, names in lines.items())


def blocks(results: dict[str, Any], title: str) -> dict[str, str]:
    """Mark on the page -> what stands there; only what the page shows of these results."""
    cases, defaults, scaling = results["cases"], results["defaults"], results["scaling"]
    absent = MISSING[title.partition("-")[0]]
    steps = [steps_table(cases), parts_table(cases), logged_table(cases), conditions(cases)]
    apart = [defaults_table(defaults), conditions(defaults)]
    grown = [scaling_table(scaling), conditions(scaling)]
    found = {
        "steps": "\n\n".join(steps) if cases else absent,
        "defaults": "\n\n".join(apart) if defaults else absent,
        "scaling": "\n\n".join(grown) if scaling else absent,
    }
    return {f"{title} {kind}": found[kind] for kind in SHOWN[title]}


def rendered(page: str, found: dict[str, str]) -> str:
    """The page with each block between its marks, where it has those marks."""
    for mark, text in found.items():
        begin, end = f"<!-- measured: {mark} -->", f"<!-- /measured: {mark} -->"
        pattern = f"{re.escape(begin)}.*?{re.escape(end)}"
        block = f"{begin}\n{text}\n{end}"
        page = re.sub(pattern, lambda _, block=block: block, page, flags=re.S)  # type: ignore[misc]
    return page


def fresh_page(page: str, folder: Path | None = None) -> str:
    """The page as all results have it."""
    for title in SHOWN:
        page = rendered(page, blocks(load(path(title, folder)), title))
    return page


def write_page() -> None:
    PAGE.write_text(fresh_page(PAGE.read_text("utf-8")), "utf-8")


def ordered(records: dict[str, Any]) -> list[tuple[str, Any]]:
    """In the order of the cases, whenever they were measured."""
    places = {name: place for place, name in enumerate(BY_NAME)}
    return sorted(records.items(), key=lambda item: places.get(item[0], len(places)))


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" if i != 1 else f"|{'|'.join(cells)}|" for i, cells in enumerate(lines))


def _short(seconds: float) -> str:
    """Three digits, never with an exponent: 12.3, 0.0123, and 0 below a tenth of a millisecond."""
    if seconds < 1e-4:
        return "0"
    digits = max(0, 3 - len(f"{seconds:.0f}")) if seconds >= 1 else 3 if seconds >= 0.1 else 4
    return f"{seconds:.{digits}f}"


def _count(size: float) -> str:
    return f"{size / 1e6:.1f}M" if size >= 1e6 else f"{size:.0f}"


def _both(ours: dict[str, Any], peer: dict[str, Any], rate: Any) -> str:
    found = [rate(side) for side in (ours, peer)]
    return NONE if found == [None, None] else " / ".join(NONE if x is None else f"{x:.0f}" for x in found)


def _exponent(sizes: Sequence[float], costs: Sequence[float]) -> str:
    found = fit(sizes, costs)
    return f"{round(found.exponent, 2) + 0.0:.2f}" + (f" ± {found.error:.2f}" if found.error == found.error else "")
