"""A study from plan to report: execute the nodes, collect the results, write and show them."""

from __future__ import annotations

import json
import time
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from alignlab.study.execute import execute
from alignlab.study.plan import Study, nodes
from alignlab.study.report import headline, terminal_table, verdict_lines, write_report
from alignlab.study.results import collect_results
from alignlab.tracking import write_json


def run_study(study: Study, folder: Path, console: Console) -> dict[str, str]:
    """Runs what is not finished, then writes `results.json` and `report.html` and prints the table.

    Returns:
        Node -> one line, for those that failed.
    """
    jobs = nodes(study)
    runs = sum(job.kind == "cell" for job in jobs)
    planned = f"{len(study.arms)} methods x {len(study.seeds)} seeds = {runs} runs"
    if not all(arm.train for arm in study.arms.values()):
        planned = f"{len(study.arms)} methods, {len(study.seeds)} seeds of each that is trained: {runs} runs"
    console.print(
        f"[bold]{escape(study.name)}[/bold]: {planned}, {len(jobs)} jobs, {study.workers} at a time "
        f"-> {escape(str(folder))}",
        highlight=False,
        soft_wrap=True,
    )
    started = time.monotonic()
    failed = execute(study, folder, console)
    seconds = _wall_seconds(folder, time.monotonic() - started)
    results = collect_results(study, folder, failed, seconds)
    write_json(folder / "results.json", results)
    write_report(results, folder / "report.html")
    console.print()
    console.print(terminal_table(results))
    console.print(headline(results), style="bold", markup=False, highlight=False)
    for line in verdict_lines(results):
        console.print(f"  {line}", markup=False, highlight=False)
    console.print(f"report: {(folder / 'report.html').resolve()}", markup=False, highlight=False, soft_wrap=True)
    return failed


def _wall_seconds(folder: Path, now: float) -> float:
    """Wall time of a study over all its restarts."""
    path = folder / "wall_seconds.json"
    before = float(json.loads(path.read_text("utf-8"))) if path.is_file() else 0.0
    write_json(path, before + now)
    return before + now
