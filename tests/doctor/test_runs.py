"""`alignlab doctor reward RUN`: what it prints and writes, what it refuses, and what training heeds of it."""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints
from unittest import mock

import pytest

from alignlab.doctor import Examination, Examined
from alignlab.doctor.runs import finished_reward_model
from alignlab.errors import UserError
from alignlab.pipeline.rewards import DOCTOR_FILE, FIT, check_rewards, require_fit
from alignlab.recipe import load_recipe
from tests.runs import RECIPES, ROOT, Finished, alignlab, debug_cache, debug_run, strict_json, write_rows

PAGE = ROOT / "docs" / "methods" / "reward_model.md"
ONLINE = ("algorithm.prompts_per_phase=2", "algorithm.group_size=2", "train.num_phases=1")
UNFIT = {"verdict": "not fit for RL", "reasons": ["accuracy 0.500 is below 0.70"]}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A finished reward model of two steps, in a folder of this test."""
    return Path(shutil.copytree(debug_run("starter/reward_model.yaml"), tmp_path / "judge"))


def doctor(*arguments: str | Path, cache: Path | None = None) -> Finished:
    """The command where the stages that the run started from are found."""
    with mock.patch.dict(os.environ, {"ALIGNLAB_CACHE": str(cache or debug_cache())}):
        return alignlab("doctor", "reward", *arguments)


def keys_of(kind: Any) -> set[str]:
    """The names of all fields of a dataclass and of the dataclasses in it."""
    found = set()
    for field, hint in ((f.name, get_type_hints(kind)[f.name]) for f in fields(kind)):
        found.add(field)
        for inner in (hint, *get_args(hint), *(x for arg in get_args(hint) for x in get_args(arg))):
            if is_dataclass(inner):
                found |= keys_of(inner)
    return found


def test_what_is_said_and_written(run: Path) -> None:
    result = doctor(run, "--limit", "40")
    found = strict_json((run / "doctor.json").read_text("utf-8"))
    assert result.code == (0 if found["verdict"] == "fit for RL" else 1), result
    assert result.out.rstrip().splitlines()[-1].startswith(found["verdict"])
    assert "scoring 80 completions" in result.err and not doctor(run, "--limit", "4", "-q").err
    assert len(found["pairs"]) == 40 and found["source"] == "validation" and found["schema"] == 1
    assert found["key"] == json.loads((run / "stage.json").read_text("utf-8"))["key"]
    assert found["normalisation"]["completions"] == 40 and found["not_checked"] == ""
    right = sum((p["chosen"] > p["rejected"]) + 0.5 * (p["chosen"] == p["rejected"]) for p in found["pairs"])
    assert found["accuracy"][0]["value"] == pytest.approx(right / 40)
    assert f"{right / 40:.3f}" in result.out
    assert found["invariance"]["differences"]["padding on the left"] < 1e-4


def test_every_key_of_the_file_is_documented(run: Path) -> None:
    doctor(run, "--limit", "8", "-q")
    found = strict_json((run / "doctor.json").read_text("utf-8"))
    assert set(found) == {"schema", "key", "source", "not_checked"} | {f.name for f in fields(Examination)}
    text = PAGE.read_text("utf-8")
    undocumented = {name for name in keys_of(Examination) | set(found) if f"`{name}`" not in text}
    assert not undocumented


def test_the_page_needs_nothing_and_runs_nothing(run: Path) -> None:
    odd = run.with_name("<b>odd & end")
    run.rename(odd)
    doctor(odd, "--limit", "12", "-q")
    page = (odd / "doctor.html").read_text("utf-8")
    assert "<script" not in page and not re.search(r"(?:src|href)=", page) and "default-src 'none'" in page
    assert "&lt;b&gt;odd &amp; end" in page and "<b>odd" not in page
    assert page.count("<svg") == 3 == page.count('aria-label="Reliability') + 2


def test_the_same_command_writes_the_same(run: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        doctor(run, "--limit", "12", "-q", "--output", tmp_path / name)
    for file in ("doctor.json", "doctor.html"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    assert not (run / "doctor.json").exists()  # only the run's own findings are heeded


def test_pairs_of_ones_own(run: Path, tmp_path: Path) -> None:
    rows = [{"prompt": f"What is {i}?", "chosen": f"It is {i}.", "rejected": "No."} for i in range(6)]
    doctor(run, "--pairs", write_rows(tmp_path / "own.jsonl", rows), "-q")
    found = strict_json((run / "doctor.json").read_text("utf-8"))
    assert found["source"].endswith("own.jsonl") and found["prompts"] == len(found["pairs"]) == 6


def test_a_start_that_is_gone_is_said(run: Path, tmp_path: Path) -> None:
    result = doctor(run, "--limit", "8", "-q", cache=tmp_path / "empty")
    found = strict_json((run / "doctor.json").read_text("utf-8"))
    assert found["normalisation"] is None and "no longer" in found["not_checked"] and "not checked" in result.out


def test_a_stage_of_a_pipeline(run: Path) -> None:
    """The last reward model among the stages; its findings lie beside it."""
    whole = run.parent / "whole"
    whole.mkdir()
    run.rename(whole / "judge")
    (whole / "recipe.yaml").write_text("stages: [{name: sft}, {name: judge}, {name: grpo}]\n", "utf-8")
    assert finished_reward_model(whole).folder == whole / "judge"
    assert doctor(whole, "--limit", "8", "-q").code in (0, 1)
    assert (whole / "judge" / "doctor.json").is_file() and not (whole / "doctor.json").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("nowhere",), "not a finished run with a reward model"),
        (("{sft}",), "not a finished run with a reward model"),
        (("{run}", "--pairs", "nowhere.jsonl"), "no such file"),
        (("{run}", "--pairs", "{rows}"), "found: prompt, completion; --pairs reads columns of these names only"),
    ],
)
def test_what_cannot_be_examined_is_one_line(run: Path, tmp_path: Path, arguments: tuple[str, ...], said: str) -> None:
    rows = write_rows(tmp_path / "sft.jsonl", [{"prompt": "1 + 1", "completion": "2"}])
    given = [text.format(run=run, rows=rows, sft=debug_run("starter/sft.yaml")) for text in arguments]
    result = doctor(*given, "-q")
    assert result.code == 2 and len(result.errors) == 1 and said in result.errors[0], result
    assert "data.columns" not in result.err
    assert not (run / "doctor.json").exists()
    assert doctor(run, "--limit", "1").code == 2


def test_a_head_that_is_gone_is_an_error(run: Path) -> None:
    (run / "reward_model" / "scalar_head.safetensors").unlink()
    result = doctor(run, "-q")
    assert result.code == 2 and "scalar_head.safetensors" in result.errors[0]


# ---- what training heeds ---------------------------------------------------------------------------------------------


def write_findings(run: Path, **changes: Any) -> None:
    key = json.loads((run / "stage.json").read_text("utf-8"))["key"]
    (run / "doctor.json").write_text(json.dumps({"key": key, **UNFIT, **changes}), "utf-8")


def train(run: Path, *overrides: str, entry: str = "{weight: 1}") -> Finished:
    recipe = RECIPES / "starter" / "grpo.yaml"
    given = (f"reward={{learned: {entry}}}", f"reward_model={run}", *ONLINE, *overrides)
    with mock.patch.dict(os.environ, {"ALIGNLAB_CACHE": str(debug_cache())}):
        return alignlab("train", recipe, *given, "--debug", "--output", run.parent / "online")


def test_a_reward_model_that_is_not_fit_is_refused(run: Path) -> None:
    write_findings(run)
    result = train(run)
    assert result.code == 2 and len(result.errors) == 1, result.err
    for part in ("not fit for RL", "accuracy 0.500 is below 0.70", "doctor.json", "force: true"):
        assert part in result.errors[0]
    forced = train(run, entry="{weight: 1, force: true}")
    assert forced.code == 0, forced.err


def test_what_is_said_about_another_reward_model(tmp_path: Path) -> None:
    """Fit: nothing. Never examined, or trained anew since: a note."""
    stage = load_recipe(RECIPES / "starter" / "grpo.yaml").stages[0]
    assert "never examined; `alignlab doctor reward" in require_fit(stage, tmp_path, "k")
    for said, key, note in ((FIT, "k", ""), (UNFIT["verdict"], "other", "about another training")):
        findings = {"key": key, "verdict": said, "reasons": []}
        (tmp_path / DOCTOR_FILE).write_text(json.dumps(findings), "utf-8")
        assert note in require_fit(stage, tmp_path, "k") and bool(note) == bool(require_fit(stage, tmp_path, "k"))
    with pytest.raises(UserError, match=r"not fit for RL .*force: true"):
        require_fit(stage, tmp_path, "other")


def test_an_unexamined_one_is_used_with_a_note(run: Path) -> None:
    result = train(run)
    assert result.code == 0 and "never examined; `alignlab doctor reward" in result.err


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"key": 1}'])
def test_findings_that_cannot_be_read_are_an_error(tmp_path: Path, content: str) -> None:
    (tmp_path / DOCTOR_FILE).write_text(content, "utf-8")
    with pytest.raises(UserError, match=r"doctor\.json: damaged; delete it"):
        require_fit(load_recipe(RECIPES / "starter" / "grpo.yaml").stages[0], tmp_path, "k")


def test_force_is_true_or_false(tmp_path: Path) -> None:
    for entry, said in (("{force: please}", "reward.learned.force"), ("{fors: true}", "fors")):
        given = [f"reward={{learned: {entry}}}", f"reward_model={tmp_path}"]
        recipe = load_recipe(RECIPES / "starter" / "grpo.yaml", given)
        with pytest.raises(UserError, match=said):
            check_rewards(recipe.stages[0])


@pytest.mark.slow
def test_an_adapter_is_examined_as_well(tmp_path: Path) -> None:
    run = Path(shutil.copytree(debug_run("starter/reward_model.yaml", "model.adapter=lora"), tmp_path / "judge"))
    result = doctor(run, "--limit", "12", "-q")
    assert result.code in (0, 1), result.err
    assert strict_json((run / "doctor.json").read_text("utf-8"))["invariance"]["rows"] == 24


def test_the_file_has_what_the_page_is_made_of() -> None:
    assert {f.name for f in fields(Examined)} == {"examination", "stage", "source", "not_checked"}
