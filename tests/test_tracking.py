"""The record of a run: strict JSON that survives a kill, mirrors that say the same, and a terminal not flooded."""

from __future__ import annotations

import io
import json
import math
import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from alignlab import registry
from alignlab.errors import UserError
from alignlab.tasks import get_task
from alignlab.tracking import COMPLETIONS, HISTORY, SHOWN, Tracker, append_jsonl, read_jsonl, rewind, write_json
from tests.runs import debug_run, metric_keys, rows

GLOSSARY = Path(__file__).parents[1] / "docs" / "metrics.md"
SOURCES = Path(__file__).parents[1] / "src" / "alignlab"
STARTER = ("sft", "reward_model", "dpo", "ppo", "grpo", "rejection", "distill", "pipeline")


def tracker(folder: Path, **options: Any) -> Tracker:
    return Tracker(folder, **{"num_phases": 4, "title": "grpo", "stream": io.StringIO(), **options})


def run_phases(log: Tracker, phases: range) -> None:
    """What the loop does: two steps a phase, a completion a phase, an evaluation after phase 1."""
    for phase in phases:
        for step in (2 * phase + 1, 2 * phase + 2):
            log.log({"phase": phase, "step": step, "loss/total": 0.5})
        log.completions([{"phase": phase, "completion": "text"}])
        if phase == 1:
            log.log({"phase": phase, "step": 4, "phases_done": 2, "evaluation/score": 0.25})


# ---- the record ------------------------------------------------------------------------------------------------------


def test_nan_and_infinity_become_null_at_any_depth(tmp_path: Path) -> None:
    tracker(tmp_path).log(
        {"phase": 0, "step": 1, "a": math.nan, "b": [math.inf, 1.0], "c": {"d": -math.inf}, "e": 0.1, "f": "NaN"}
    )
    (row,) = rows(tmp_path / HISTORY)
    assert row == {"phase": 0, "step": 1, "a": None, "b": [None, 1.0], "c": {"d": None}, "e": 0.1, "f": "NaN"}


def test_json_files_are_strict_and_replaced_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "new" / "evaluation.json"
    write_json(path, {"score": math.nan, "text": "é \u2028"})
    assert json.loads(path.read_text("utf-8")) == {"score": None, "text": "é \u2028"}
    before = path.read_bytes()
    with pytest.raises(TypeError):
        write_json(path, {"score": object()})
    assert path.read_bytes() == before


SEPARATORS = "a\nb\r\nc\u2028d\u2029e\x85f\x0bg\x0ch\x1ci"
"""Everything that `str.splitlines` takes for the end of a line."""


def test_a_text_with_line_separators_is_one_row(tmp_path: Path) -> None:
    path = tmp_path / COMPLETIONS
    append_jsonl(path, [{"phase": 0, "completion": SEPARATORS}, {"phase": 1, "completion": "Grüße 👋"}])
    assert [row["completion"] for row in read_jsonl(path)] == [SEPARATORS, "Grüße 👋"]
    rewind(path, 1)
    assert [row["completion"] for row in read_jsonl(path)] == [SEPARATORS]
    assert path.read_bytes().count(b"\n") == 1


@pytest.mark.parametrize("lost", range(1, 12))
def test_a_torn_last_line_is_left_out_wherever_it_is_torn(tmp_path: Path, lost: int) -> None:
    """Also in the middle of a character of several bytes; what is appended after a rewind stands on its own line."""
    path = tmp_path / HISTORY
    append_jsonl(path, [{"phase": 0, "x": "é"}, {"phase": 1, "x": "👋é"}])
    path.write_bytes(path.read_bytes()[: -lost - 1])  # the line end goes first, then the brace, the quote, the é, ...
    assert read_jsonl(path) == [{"phase": 0, "x": "é"}]
    rewind(path, 1)
    append_jsonl(path, [{"phase": 1, "x": "again"}])
    assert rows(path) == [{"phase": 0, "x": "é"}, {"phase": 1, "x": "again"}]


def test_a_last_line_without_its_end_is_whole(tmp_path: Path) -> None:
    path = tmp_path / HISTORY
    path.write_bytes(b'{"phase": 0}\n{"phase": 1}')
    rewind(path, 2)
    append_jsonl(path, [{"phase": 2}])
    assert [row["phase"] for row in rows(path)] == [0, 1, 2]


def test_no_file_has_no_rows(tmp_path: Path) -> None:
    assert read_jsonl(tmp_path / HISTORY) == []
    rewind(tmp_path / HISTORY, 3)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("resumed_at", [0, 1, 2, 3, 4])
def test_a_resumed_run_logs_nothing_twice_and_loses_nothing(tmp_path: Path, resumed_at: int) -> None:
    """Killed in phase 3 after a checkpoint at `resumed_at`, resumed: every file as if it had not been killed."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for folder in (whole, killed):
        folder.mkdir()
        run_phases(tracker(folder, metrics_file="ppo_metrics.jsonl"), range(4))
    again = tracker(killed, metrics_file="ppo_metrics.jsonl")
    again.rewind(resumed_at)
    assert all(row["phase"] < resumed_at for row in read_jsonl(killed / HISTORY))
    run_phases(again, range(resumed_at, 4))
    for name in (HISTORY, "ppo_metrics.jsonl", COMPLETIONS):
        assert (killed / name).read_bytes() == (whole / name).read_bytes()
    assert sorted(p.name for p in killed.iterdir()) == sorted([HISTORY, "ppo_metrics.jsonl", COMPLETIONS])


# ---- for people ------------------------------------------------------------------------------------------------------


def test_plain_lines_where_there_is_no_terminal(tmp_path: Path) -> None:
    stream = io.StringIO()
    with tracker(tmp_path, num_phases=100, stream=stream) as log:
        for phase in range(1, 101):
            log.advance(phase, {"loss/total": 1.25, "reward/mean": 0.5, "policy/entropy": 9.0}, seconds=2.0)
    lines = stream.getvalue().splitlines()
    assert len(lines) == 10 and not re.search(r"[\x1b\r]", stream.getvalue())
    assert lines[0] == "grpo  10/100  2.00 s/phase, 180 s left  reward 0.500  loss 1.250"
    assert lines[-1].startswith("grpo  100/100")


def test_the_names_of_the_progress_line_are_explained() -> None:
    page = (Path(__file__).parents[1] / "docs" / "metrics.md").read_text("utf-8")
    assert all(f"`{name}` is `{metric}`" in page for metric, name in SHOWN.items())


def test_what_is_said_is_not_wrapped_and_not_taken_for_markup(tmp_path: Path) -> None:
    stream = io.StringIO()
    line = f"sft: {'long/' * 60}data[train][/b].jsonl: 3 of 4 rows"
    with tracker(tmp_path, stream=stream) as log:
        log.say(line)
    assert stream.getvalue() == line + "\n"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_a_bar_with_rate_and_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"TERM": "xterm", "COLUMNS": "160"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("NO_COLOR", raising=False)
    stream = Terminal()
    with tracker(tmp_path, stream=stream) as log:
        for phase in range(1, 5):
            log.advance(phase, {"reward/mean": 0.5, "policy/kl_per_sequence": 0.125}, seconds=2.0)
    for shown in ("grpo", "100%", "2.00 s/phase", "reward 0.500", "KL 0.125", "0:00:00"):
        assert shown in stream.getvalue()


def test_quiet_is_quiet(tmp_path: Path) -> None:
    stream = io.StringIO()
    with tracker(tmp_path, stream=stream, quiet=True) as log:
        log.say("something")
        log.advance(4, {"loss/total": 1.0}, seconds=1.0)
    assert stream.getvalue() == ""


# ---- mirrors ---------------------------------------------------------------------------------------------------------


def test_tensorboard_shows_what_the_log_holds(tmp_path: Path) -> None:
    with tracker(tmp_path, mirrors=("tensorboard",)) as log:
        log.log({"phase": 0, "step": 1, "reward/mean": 0.5, "reward/odd": math.nan, "ended": "a word"})
        log.log({"phase": 1, "step": 2, "reward/mean": 0.75})
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(next(tmp_path.rglob("events.out.tfevents.*")).parent))
    found.Reload()
    assert found.Tags()["scalars"] == ["reward/mean"]
    assert [(e.step, e.value) for e in found.Scalars("reward/mean")] == [(1, 0.5), (2, 0.75)]


def test_wandb_writes_an_offline_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path / "cache"))
    with tracker(tmp_path, mirrors=("wandb",), config={"seed": 42}) as log:
        log.log({"phase": 0, "step": 1, "reward/mean": 0.5, "reward/odd": math.inf})
    import wandb

    wandb.teardown()  # its service writes the end of the file when the process ends
    (record,) = (tmp_path / "wandb").glob("offline-run-*/run-*.wandb")
    assert b"reward/mean" in record.read_bytes() and b"reward/odd" not in record.read_bytes()
    assert len(rows(tmp_path / HISTORY)) == 1


def test_an_unknown_mirror_names_those_there_are(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="'mlflow' is not known; choose from tensorboard, wandb"):
        tracker(tmp_path, mirrors=("mlflow",))


def test_a_mirror_that_is_not_installed_says_how_to_install_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=re.escape("pip install alignlab[tracking]")):
        tracker(tmp_path, mirrors=("wandb",))


# ---- the glossary ----------------------------------------------------------------------------------------------------


def glossary() -> dict[str, tuple[str, ...]]:
    """Metric -> the other cells of its row in docs/metrics.md."""
    found: dict[str, tuple[str, ...]] = {}
    for line in GLOSSARY.read_text("utf-8").splitlines():
        if line.startswith("| `"):
            name, *cells = [cell.strip() for cell in line.strip("|").split("|")]
            for metric in re.findall(r"`([^`]+)`", name):
                assert metric not in found, f"{metric} stands twice in {GLOSSARY.name}"
                found[metric] = tuple(cells)
    return found


def test_every_row_of_the_glossary_has_a_unit_and_a_meaning() -> None:
    assert glossary() and all(len(cells) == 2 and all(cells) for cells in glossary().values())
    assert all(
        "estimator" in cells[1] for name, cells in glossary().items() if "/kl_per" in name or "/approx_kl" in name
    )


def explained(metric: str, known: dict[str, tuple[str, ...]]) -> bool:
    """Whether the glossary has the metric: as it is, by its part after `evaluation/`, or with TASK or NAME in it."""
    candidates = {metric, metric.removeprefix("evaluation/")}
    candidates |= {re.sub(r"^(reasoning|safety|clinical|code|gsm8k)/", "TASK/", name) for name in candidates}
    candidates |= {re.sub(r"^(reward|reward_share|reward_judged)/\w+$", r"\1/NAME", name) for name in candidates}
    return any(name in known for name in candidates)


@pytest.mark.parametrize("recipe", STARTER)
def test_every_logged_metric_is_in_the_glossary(recipe: str) -> None:
    known = glossary()
    missing = {key for key in metric_keys(debug_run(f"starter/{recipe}.yaml")) if not explained(key, known)}
    assert not missing, f"explain them in {GLOSSARY.relative_to(GLOSSARY.parents[1])}"


AREAS = "loss|policy|preference|kto|reward|reward_model|value|completion|group|rejection|distill|inference|time|ledger"
MEASURES = "rouge|bertscore|bleu|exact_match|verbosity|distinct|gsm8k|harmlessness|calibration|forgetting"
ROLES = ("policy", "value_model", "reward_model")


def written() -> set[str]:
    """Every metric that a line of the source or a task writes, whatever the options."""
    readers = ("study", "diagnosis.py")  # they only read what others write
    paths = (path for path in SOURCES.rglob("*.py") if not set(readers) & set(path.parts))
    source = "\n".join(path.read_text("utf-8") for path in paths)
    found = set(re.findall(rf'"((?:{AREAS}|{MEASURES})/[a-zL_0-9]+)"', source))
    found |= {f"{role}/{what}" for role in ROLES for what in ("grad_norm", "learning_rate")}
    return found | {f"TASK/{name}" for task in registry.names("tasks") for name in get_task(task).metrics}


def test_every_metric_of_the_source_is_in_the_glossary() -> None:
    assert {"policy/kl_per_token", "value/clip_fraction", "TASK/refused"} <= written()
    assert not written() - glossary().keys()


def test_what_the_diagnosis_reads_is_written_by_somebody() -> None:
    text = (SOURCES / "diagnosis.py").read_text("utf-8")
    read = set(re.findall(rf'"(?:evaluation/)?((?:{AREAS})/[a-z_0-9]+)"', text))
    assert len(read) > 15 and not read - written()


def test_the_glossary_has_nothing_that_is_never_written() -> None:
    named_otherwise = {"phase", "step", "phases_done", "ended", "diagnosis", "score", "score_standard_error",
                       "reward/NAME", "reward_share/NAME", "reward_judged/NAME", "TASK/accuracy",
                       "pass/at_K"}  # fmt: skip
    totals = ("trained_rows", "trained_tokens", "optimizer_steps", "phases", "seconds", "peak_memory_bytes",
              "evaluation_completions", "evaluation_generated_tokens")  # fmt: skip
    assert not glossary().keys() - written() - named_otherwise - {f"ledger/{name}" for name in totals}


def test_the_glossary_check_fails_on_an_unknown_metric() -> None:
    known = glossary()
    assert explained("evaluation/reasoning/score", known) and not explained("evaluation/reasoning/vibes", known)
    assert explained("reward/my_own", known) and not explained("policy/vibes", known)
    assert os.environ["WANDB_MODE"] == "offline"
