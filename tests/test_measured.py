"""The measured tables in the docs are those of docs/measured.json."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]


def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("measure", ROOT / "recipes" / "starter" / "measure.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("method", script().PAGES)
def test_the_page_shows_what_was_measured(method: str) -> None:
    measure = script()
    found = json.loads((ROOT / "docs" / "measured.json").read_text("utf-8"))
    page = (ROOT / "docs" / "methods" / f"{method}.md").read_text("utf-8")
    assert measure.with_table(page, measure.table(method, found)) == page
    assert len(found["seeds"]) >= 5


def test_a_t_interval_over_five_runs_by_hand() -> None:
    """1..5: mean 3, sd sqrt(2.5), t(.975, 4) = 2.776: 3 +- 1.963."""
    found = script().spread([1.0, 2.0, 3.0, 4.0, 5.0])
    assert (found["mean"], found["low"], found["high"]) == pytest.approx((3, 1.037, 4.963), abs=1e-3)
