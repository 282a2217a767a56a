"""What the doctor says: Examined → tables for the terminal, doctor.json, and one self-contained doctor.html."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import jinja2
from rich.table import Table
from rich.text import Text

from alignlab.doctor.examination import LEAST_ACCURACY, MOST_ERROR, Examination
from alignlab.doctor.measures import Accuracy, Correlation, Robustness
from alignlab.doctor.plots import length_plot, margin_plot, reliability_plot
from alignlab.doctor.runs import Examined
from alignlab.pipeline.rewards import DOCTOR_FILE
from alignlab.tracking import write_json

PAGE_FILE = "doctor.html"
NONE = "—"
ROBUSTNESS = ("small change", "texts", "mean", "sd", "variation", "largest", "flips", "tau", "stability")
"""Columns of the table of perturbations, as in `Robustness`."""


def write(examined: Examined, folder: Path) -> tuple[Path, Path]:
    """Writes doctor.json and doctor.html; their paths. The JSON is what counts, so it comes last."""
    page, numbers = folder / PAGE_FILE, folder / DOCTOR_FILE
    folder.mkdir(parents=True, exist_ok=True)
    page.write_text(render(examined), encoding="utf-8", newline="\n")
    write_json(numbers, examined.to_json())
    return numbers, page


def terminal_tables(examined: Examined) -> Iterator[Table]:
    """The measures, then accuracy by group, then the perturbations."""
    examination = examined.examination
    found = _table("", "", title="reward model")
    for name, value in facts(examined):
        found.add_row(name, value)
    yield found
    if len(examination.accuracy) > 1:
        groups = _table("accuracy of", "pairs", "accuracy", "95 % interval")
        for group in examination.accuracy:
            groups.add_row(*accuracy_cells(group))
        yield groups
    perturbed = _table(*ROBUSTNESS)
    for name, measured in examination.perturbations.items():
        perturbed.add_row(*robustness_cells(name, measured))
    yield perturbed


def _table(*columns: str, title: str | None = None) -> Table:
    shown = Text(title) if title else None
    table = Table(title=shown, title_justify="left", box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for i, column in enumerate(columns):
        table.add_column(Text(column), justify="left" if i == 0 or title else "right", overflow="fold", no_wrap=not i)
    return table


def facts(examined: Examined) -> list[tuple[str, str]]:
    """The measures that are one line each, with what they have to be."""
    examination = examined.examination
    accuracy, calibration = examination.accuracy[0], examination.calibration
    length, invariance, normalisation = examination.length, examination.invariance, examination.normalisation
    ties = f", {accuracy.ties} ties" if accuracy.ties else ""
    left_out = f", {examination.left_out} left out" if examination.left_out else ""
    fresh = f"not checked: {examined.not_checked or 'too few prompts'}"
    if normalisation:
        fresh = f"mean {normalisation.mean:+.2f}, sd {normalisation.sd:.2f} over {normalisation.completions}"
        fresh += "; should be 0 and 1"
    return [
        ("pairs", f"{accuracy.pairs} of {examined.source}, {examination.prompts} prompts{ties}{left_out}"),
        ("accuracy", f"{accuracy.value:.3f} [{accuracy.low:.3f}, {accuracy.high:.3f}]; fit: ≥ {LEAST_ACCURACY:.2f}"),
        (
            "calibration error",
            f"{calibration.error:.3f}, or {calibration.error_at_temperature:.3f} at temperature "
            f"{calibration.temperature:.2f}; fit: one < {MOST_ERROR:.2f}; by chance {calibration.error_by_chance:.3f}",
        ),
        ("margin", f"{examination.margins.mean:.2f} ± {examination.margins.sd:.2f} sd of reference scores"),
        (
            "score and length",
            f"correlation {_pair(length.overall)} overall, {_pair(length.within_prompt)} within prompts "
            f"(the labels': {_pair(length.labels_within_prompt)})",
        ),
        ("batch and padding", f"move a score by at most {invariance.largest:.1e}; fit: ≤ {invariance.tolerance:g}"),
        ("reference outputs", fresh),
    ]


def accuracy_cells(group: Accuracy) -> list[str]:
    return [group.name, str(group.pairs), f"{group.value:.3f}", f"{group.low:.3f}–{group.high:.3f}"]


def robustness_cells(name: str, measured: Robustness) -> list[str]:
    return [
        name.replace("_", " "),
        str(measured.completions),
        _number(measured.mean_change, "+.2f"),
        _number(measured.sd_change),
        _number(measured.variation),
        _number(measured.max_change),
        _number(measured.flip_rate),
        _number(measured.kendall_tau),
        _number(measured.stability),
    ]


def _pair(correlation: Correlation) -> str:
    """Pearson's and Spearman's coefficient."""
    return f"{_number(correlation.pearson, '+.2f')}/{_number(correlation.spearman, '+.2f')}"


def _number(value: float | None, form: str = ".2f") -> str:
    return NONE if value is None else format(value, form)


# ---- the page --------------------------------------------------------------------------------------------------------


def render(examined: Examined) -> str:
    """The page as text; it needs no network and no script, and every name in it is escaped."""
    examination = examined.examination
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html.j2").render(
        name=examined.stage.folder.name,
        source=examined.source,
        examination=examination,
        facts=facts(examined),
        groups=[accuracy_cells(group) for group in examination.accuracy],
        columns=ROBUSTNESS,
        perturbations=[robustness_cells(*item) for item in examination.perturbations.items()],
        plots=_plots(examination),
    )


def _plots(examination: Examination) -> list[tuple[str, str]]:
    points = [
        point
        for pair in examination.pairs
        for point in ((pair.chosen_tokens, pair.chosen, True), (pair.rejected_tokens, pair.rejected, False))
    ]
    return [
        ("Reliability", reliability_plot(examination.calibration)),
        ("Margins", margin_plot(examination.margins)),
        ("Score and length", length_plot(points)),
    ]
