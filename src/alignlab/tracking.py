"""What a run leaves behind while it runs: metrics -> log_history.jsonl (the record), mirrors, a line for people.

JSONL files are append-only and strict: NaN and infinity become null. TensorBoard and Weights & Biases only mirror the
record.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from alignlab.errors import UserError
from alignlab.registry import did_you_mean

HISTORY = "log_history.jsonl"
COMPLETIONS = "completions.jsonl"
SHOWN = {
    "reward/mean": "reward",
    "policy/kl_per_sequence": "KL",
    "preference/accuracy": "accuracy",
    "loss/total": "loss",
}
"""Metrics beside the progress bar, in this order, those that exist, and their names in its little room."""
MIRRORS = ("tensorboard", "wandb")
"""What else a log can be written to."""


def strict(value: Any) -> Any:
    """The value with NaN and infinity replaced by None, so that it is JSON everywhere."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {k: strict(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [strict(v) for v in value]
    return value


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file beside its place and renames it, so that a reader never sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(json.dumps(strict(value), indent=1, ensure_ascii=False, allow_nan=False) + "\n", "utf-8")
    os.replace(partial, path)


def append_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Appends one JSON object a line and flushes."""
    with path.open("a", encoding="utf-8") as stream:
        for row in rows:
            stream.write(json.dumps(strict(row), ensure_ascii=False, allow_nan=False) + "\n")
        stream.flush()


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSONL file; a torn last line (a kill while writing) is left out."""
    if not path.is_file():
        return []
    rows = []
    for line in path.read_bytes().split(b"\n"):  # not splitlines: JSON text may hold U+2028; bytes: a torn character
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


def rewind(path: Path, phase: int) -> None:
    """Drops rows logged after the given number of finished phases, so that a resumed run logs nothing twice."""
    if path.is_file():
        rows = [row for row in read_jsonl(path) if row.get("phase", 0) < phase]
        partial = path.with_name(f".{path.name}.{os.getpid()}")
        partial.unlink(missing_ok=True)
        append_jsonl(partial, rows)
        os.replace(partial, path)


class Tracker:
    """One run's log: the record, its mirrors, and the progress bar (plain lines where there is no terminal)."""

    def __init__(
        self,
        folder: Path,
        *,
        num_phases: int,
        title: str,
        metrics_file: str | None = None,
        mirrors: Sequence[str] = (),
        config: Mapping[str, Any] | None = None,
        quiet: bool = False,
        stream: TextIO | None = None,
    ) -> None:
        self.folder, self.num_phases, self.title = folder, num_phases, title
        self.files = [folder / HISTORY] + ([folder / metrics_file] if metrics_file else [])
        self._mirrors = [_mirror(name, folder, title, config or {}) for name in mirrors]
        self._quiet = quiet
        self._console = Console(file=stream or sys.stderr)
        self._progress: Progress | None = None
        self._plain_every = max(1, num_phases // 10)

    def expect(self, num_phases: int) -> None:
        """Says how many phases there will be, where that is known only once the data are read."""
        self.num_phases, self._plain_every = num_phases, max(1, num_phases // 10)
        if self._progress is not None:
            self._progress.update(self._task, total=num_phases)

    def __enter__(self) -> Tracker:
        if self._console.is_terminal and not self._quiet:
            self._progress = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                TaskProgressColumn(),
                TextColumn("{task.fields[rate]}"),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[numbers]}"),
                console=self._console,
                transient=False,
            )
            self._task = self._progress.add_task(self.title, total=self.num_phases, numbers="", rate="")
            self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._progress is not None:
            self._progress.stop()
        for mirror in self._mirrors:
            mirror.finish()

    def rewind(self, phase: int) -> None:
        """Forgets what was logged after `phase` finished phases, in every file."""
        for path in [*self.files, self.folder / COMPLETIONS]:
            rewind(path, phase)

    def log(self, row: Mapping[str, Any]) -> None:
        """Records one optimiser step (or one evaluation) in every file and mirror."""
        for path in self.files:
            append_jsonl(path, [row])
        numbers = {k: v for k, v in row.items() if isinstance(v, int | float) and not isinstance(v, bool)}
        for mirror in self._mirrors:
            mirror.log({k: v for k, v in numbers.items() if k not in ("phase", "step")}, step=int(row["step"]))

    def completions(self, rows: Iterable[Mapping[str, Any]]) -> None:
        append_jsonl(self.folder / COMPLETIONS, rows)

    def advance(self, phase: int, metrics: Mapping[str, float], seconds: float) -> None:
        """Shows that `phase` phases are finished, with the numbers people look at."""
        numbers = "  ".join(f"{name} {metrics[metric]:.3f}" for metric, name in SHOWN.items() if metric in metrics)
        rate = f"{seconds:.2f} s/phase"
        if self._progress is not None:
            self._progress.update(self._task, completed=phase, numbers=numbers, rate=rate)
        elif not self._quiet and (phase % self._plain_every == 0 or phase == self.num_phases):
            left = (self.num_phases - phase) * seconds
            self.say(f"{self.title}  {phase}/{self.num_phases}  {rate}, {left:.0f} s left  {numbers}".rstrip())

    def say(self, line: str) -> None:
        """A line for people, in the terminal only."""
        if not self._quiet:
            self._console.print(line, markup=False, highlight=False, soft_wrap=True)


class _Mirror:
    """A tracker of `accelerate` behind two calls."""

    def __init__(self, tracker: Any) -> None:
        self._tracker = tracker
        tracker.start()

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._tracker.log({k: v for k, v in values.items() if math.isfinite(v)}, step=step)

    def finish(self) -> None:
        self._tracker.finish()


def check_mirrors(names: Iterable[str]) -> None:
    """Refuses a mirror that is not known."""
    for name in names:
        if name not in MIRRORS:
            parts = (f"tracking: {name!r} is not known", did_you_mean(name, MIRRORS))
            raise UserError("; ".join((*filter(None, parts), f"choose from {', '.join(MIRRORS)}")))


def _mirror(name: str, folder: Path, title: str, config: Mapping[str, Any]) -> _Mirror:
    check_mirrors([name])
    from accelerate import PartialState
    from accelerate import tracking as trackers

    try:
        PartialState(cpu=True) if not PartialState._shared_state else None
        if name == "tensorboard":
            return _Mirror(trackers.TensorBoardTracker(run_name="tensorboard", logging_dir=str(folder)))
        tracker = trackers.WandBTracker(run_name="alignlab", name=title, dir=str(folder), config=dict(config))
        return _Mirror(tracker)
    except ImportError as error:
        raise UserError(f"tracking: {name} is not installed ({error}); run `pip install alignlab[tracking]`") from error
