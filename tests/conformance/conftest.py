"""`ALIGNLAB_CONFORMANCE=docs/conformance.md` makes the session write what it found into that page."""

import os
from pathlib import Path

import pytest

from tests.conformance import record


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workerinput"):  # under xdist each worker only knows a part
        return
    if record.FINDINGS and (page := os.environ.get("ALIGNLAB_CONFORMANCE")):
        record.write(Path(page))
