"""Logs of healthy runs, on which the diagnosis has to stay silent: run folder -> NAME.json, what its rules read.

Made from the starter recipes; how each was run stands in its file. To make one anew:
`python -m tests.recorded.record RUN NAME COMMAND`, with RUN the folder that COMMAND left.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from alignlab.diagnosis import DiagnosisLimits, diagnose
from alignlab.tracking import read_jsonl

FOLDER = Path(__file__).parent


class _Noting(dict[str, float]):
    """Metrics that remember which of them were asked for."""

    asked: set[str]

    def get(self, key: str, default: Any = None) -> Any:  # type: ignore[override]
        self.asked.add(key)
        return super().get(key, default)


def read(name: str) -> list[dict[str, Any]]:
    """The rows of a recorded log."""
    rows: list[dict[str, Any]] = json.loads((FOLDER / f"{name}.json").read_text("utf-8"))["rows"]
    return rows


def write(run: Path, name: str, command: str) -> None:
    rows = read_jsonl(run / "log_history.jsonl")
    _Noting.asked = {"phase", "phases_done"}
    memory: dict[str, float] = {}
    for row in rows:
        numbers = _Noting({k: v for k, v in row.items() if isinstance(v, int | float)})
        memory = dict(diagnose(numbers, memory, DiagnosisLimits(), phase=row["phase"]).memory)
    kept = [
        {k: float(f"{v:.5g}") if isinstance(v, float) else v for k, v in row.items()
         if k in _Noting.asked or k.endswith("/grad_norm") or k.startswith("reward_share/")}
        for row in rows
    ]  # fmt: skip
    lines = ",\n".join(json.dumps(row) for row in kept)
    (FOLDER / f"{name}.json").write_text(f'{{"command": {json.dumps(command)}, "rows": [\n{lines}\n]}}\n', "utf-8")


if __name__ == "__main__":
    write(Path(sys.argv[1]), sys.argv[2], sys.argv[3])
