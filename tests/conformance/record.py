"""Two measurements of one step -> how far apart they are; what was found, as the table of docs/conformance.md."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor

LOSS = 1e-5
"""Largest |ours - theirs| of a loss, relative to theirs where that is above 1."""
GRADIENT = 1e-4
"""Largest norm of the difference of the two gradients over the norm of theirs."""

BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"


@dataclass(frozen=True)
class Measured:
    """What one optimiser step says, before the update."""

    loss: float
    gradient: Mapping[str, Tensor] = field(default_factory=dict)  # parameter name -> gradient


@dataclass(frozen=True)
class Gap:
    """How far two measurements are from each other."""

    loss: float
    gradient: float

    @property
    def small(self) -> bool:
        return self.loss <= LOSS and self.gradient <= GRADIENT


@dataclass(frozen=True)
class Finding:
    """A row of the table."""

    method: str
    setting: str
    where: str
    peer: str
    gap: Gap
    note: str


FINDINGS: list[Finding] = []


def gap(ours: Measured, theirs: Measured) -> Gap:
    """|difference of losses| / max(1, |theirs|), and ||difference of gradients|| / ||theirs||, over the same names."""
    assert ours.gradient.keys() == theirs.gradient.keys(), sorted(set(ours.gradient) ^ set(theirs.gradient))
    names = sorted(ours.gradient)
    mine, other = (torch.cat([m.gradient[name].flatten().double() for name in names]) for m in (ours, theirs))
    assert other.norm() > 1e-3, "a gradient of nothing agrees with anything"
    loss = abs(ours.loss - theirs.loss) / max(1.0, abs(theirs.loss))
    return Gap(loss, float((mine - other).norm() / other.norm()))


def check(
    method: str, setting: str, ours: Measured, theirs: Measured, *, peer: str, where: str = "gemma3", note: str = ""
) -> None:
    """Asserts that both agree, and keeps by how much.

    Args:
        where: the model and their split (`split`); the table has one row for all of a setting's.
        note: what was converted, where the definitions differ.
    """
    found = gap(ours, theirs)
    named = f"{method}, {setting}, {where}"
    assert found.small, f"{named}: {found}; losses {ours.loss:.8f} (ours) and {theirs.loss:.8f} ({peer})"
    FINDINGS.append(Finding(method, setting, where, peer, found, note))


def scaled(measured: Measured, factor: float) -> Measured:
    """The same with another normaliser: loss and gradient times `factor`."""
    return Measured(measured.loss * factor, {k: g * factor for k, g in measured.gradient.items()})


def added(parts: list[Measured]) -> Measured:
    """Microbatches -> their sum."""
    names = parts[0].gradient.keys()
    return Measured(
        sum(p.loss for p in parts), {k: sum((p.gradient[k] for p in parts), torch.tensor(0.0)) for k in names}
    )


def split(model: str, microbatches: int, rows: int) -> str:
    """Where a comparison ran: the model, and their microbatches x rows (or pairs)."""
    return f"{model} {microbatches}×{rows // microbatches}"


def table() -> str:
    """The findings as Markdown, the largest gap of each setting, with the versions they hold for."""
    packages = ", ".join(f"{name} {version(name)}" for name in ("trl", "transformers", "torch", "peft", "numpy"))
    lines = [
        f"Measured with {packages}, Python {platform.python_version()}, one thread of a {platform.machine()} CPU.",
        "",
        "| Method | Setting | Compared with | Runs | Loss | Gradient | Converted |",
        "|---|---|---|---|---|---|---|",
    ]
    rows: dict[tuple[str, ...], list[Finding]] = {}
    for f in FINDINGS:
        rows.setdefault((f.method, f.setting, f.peer, f.note), []).append(f)
    for (method, setting, peer, note), found in sorted(rows.items(), key=lambda row: row[0][0]):
        loss, gradient = max(f.gap.loss for f in found), max(f.gap.gradient for f in found)
        runs = "; ".join(dict.fromkeys(f.where for f in found))
        lines.append(f"| {method} | {setting} | {peer} | {runs} | {loss:.0e} | {gradient:.0e} | {note} |")
    return "\n".join(lines)


def write(page: Path) -> None:
    """Puts the table between the page's marks."""
    text = page.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    page.write_text(f"{before}{BEGIN}\n{table()}\n{END}{after}", encoding="utf-8")
