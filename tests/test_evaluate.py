"""`alignlab evaluate` on runs of a second: side by side on the same prompts and dice; every wrong word in a line."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from alignlab.evaluation.schema import check_record
from tests.runs import Finished, alignlab, rows, small_model, strict_json, write_rows

SUMS = [
    {
        "id": f"sum/{a}-{b}",
        "prompt": f"What is {a} plus {b}?",
        "completion": f"It is {a + b}.",
        "answer": str(a + b),
        "meta": {"grading": "number", "category": "even" if (a + b) % 2 == 0 else "odd"},
    }
    for a in range(6)
    for b in range(4)
]
PAIRS = [{**row, "chosen": row["completion"], "rejected": "no idea at all"} for row in SUMS]
LENGTHS = "max_prompt_tokens: 64, max_completion_tokens: 8"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, sums to train on and others to be asked, and two finished runs: sft, and grpo from it."""
    folder = tmp_path_factory.mktemp("evaluate")
    model = small_model(folder / "model")
    write_rows(folder / "sums.jsonl", SUMS[:16])
    (folder / "held-out").mkdir()
    write_rows(folder / "held-out" / "test.jsonl", SUMS[16:])
    write_rows(folder / "held-out" / "pairs.test.jsonl", PAIRS[16:])
    (folder / "sft.yaml").write_text(
        f"model: {model}\ndata: {{path: sums.jsonl, task: reasoning, {LENGTHS}}}\n"
        "algorithm: {name: sft, examples_per_step: 4, learning_rate: 1e-2}\n"
        "train: {num_phases: 3}\n"
        "evaluation: {prompts_per_task: 2, measures: [rouge, exact_match, verbosity], every: 2}\n"
    )
    (folder / "grpo.yaml").write_text(
        f"start: sft\ndata: {{path: sums.jsonl, task: reasoning, {LENGTHS}}}\n"
        "algorithm: {name: grpo, prompts_per_phase: 4, group_size: 4, learning_rate: 1e-2}\n"
        "reward: {length: {weight: -1, limit: 0, buffer: 8}}\ntrain: {num_phases: 2}\n"
        "evaluation: {prompts_per_task: 2}\n"
    )
    for name in ("sft", "grpo"):
        trained = alignlab("train", folder / f"{name}.yaml", "--output", folder / name, "-q", cwd=folder)
        assert trained.code == 0, trained.err
    return folder


def evaluate(place: Path, *arguments: str | Path) -> Finished:
    return alignlab("evaluate", *arguments, cwd=place)


def content(place: Path, *arguments: str | Path) -> Any:
    result = evaluate(place, *arguments, "--json", "-q")
    assert result.code == 0, result.err
    return strict_json(result.out)


# ---- what a stage writes ---------------------------------------------------------------------------------------------


def test_a_stage_measures_what_its_recipe_names(place: Path) -> None:
    found = strict_json((place / "sft" / "evaluation.json").read_text())
    record = check_record(found)
    assert record.measures == ["rouge", "exact_match", "verbosity"] and record.kind == "policy"
    assert {"rouge/1", "rouge/L", "exact_match/rate", "verbosity/within_limit"} <= set(record.metrics)
    assert {"rouge/1", "exact_match/rate", "completion/length"} <= set(record.intervals)
    assert record.decoding is not None and record.decoding.name == "sampled" and record.data is not None
    assert record.data.prompts == 2 and len(record.scores) == 2
    logged = [row for row in rows(place / "sft" / "log_history.jsonl") if "evaluation/rouge/1" in row]
    assert [row["phases_done"] for row in logged] == [0, 2, 3]
    samples = json.loads((place / "sft" / "evaluation_samples.json").read_text())
    assert set(samples[0]["measures"]) >= {"rouge/1", "exact_match/rate", "verbosity/words"}


def test_every_evaluation_json_is_of_the_one_form(place: Path, tmp_path: Path) -> None:
    write_rows(tmp_path / "pairs.jsonl", PAIRS)
    (tmp_path / "rm.yaml").write_text(
        f"model: {place / 'model'}\ndata: {{path: pairs.jsonl, {LENGTHS}}}\n"
        "algorithm: {name: reward_model, pairs_per_step: 4}\ntrain: {num_phases: 2}\n"
    )
    assert alignlab("train", tmp_path / "rm.yaml", "--output", tmp_path / "rm", "-q").code == 0
    silent = ("evaluation.prompts_per_task=0", "evaluation.measures=[]", "evaluation.every=0")
    assert alignlab("train", place / "sft.yaml", *silent, "--output", tmp_path / "none", "-q").code == 0
    for folder in (place / "sft", place / "grpo", tmp_path / "rm", tmp_path / "none"):
        record = check_record(strict_json((folder / "evaluation.json").read_text()))
        assert record.ledger["optimizer_steps"]
    refused = evaluate(tmp_path, "rm", "--data", place / "held-out")
    assert refused.code == 2 and "made a reward model" in refused.err and "alignlab doctor reward" in refused.err
    with pytest.raises(ValueError, match="extra"):
        check_record({"schema": 2, "metrix": {}})
    with pytest.raises(ValueError, match="schema"):
        check_record({"schema": 1})


# ---- one and several -------------------------------------------------------------------------------------------------


def test_one_run_with_intervals_categories_and_its_kl_to_the_start(place: Path, tmp_path: Path) -> None:
    found = content(place, "grpo", "--data", "held-out", "-t", "reasoning", "--samples", "4", "-o", tmp_path / "out")
    assert found == strict_json((tmp_path / "out" / "evaluation.json").read_text())
    record = check_record(found)
    assert set(record.categories) == {"reasoning/even", "reasoning/odd"}
    assert record.categories["reasoning/even"]["reasoning/score"].prompts == 4
    assert {"policy/kl_per_sequence", "policy/kl_per_token"} <= set(record.intervals)
    assert {"verbosity/words", "distinct/1", "reasoning/score", "score"} <= set(record.metrics)
    for name, (low, high) in record.intervals.items():
        value = record.metrics[name]
        assert low is not None and high is not None and value is not None and low <= value <= high, name
    assert record.data is not None and record.data.overlap is not None
    assert (record.data.overlap.known, record.data.overlap.exact, record.data.prompts) == (True, 0, 8)
    samples = json.loads((tmp_path / "out" / "evaluation_samples.json").read_text())["sampled"]
    assert len(samples) == 32


def test_a_run_against_itself_differs_in_nothing(place: Path) -> None:
    """The policy's folder is its run, and the dice are those of the prompt, not of the model."""
    found = content(
        place, "sft", "sft/policy", "--data", "held-out", "-t", "reasoning", "-m", "rouge", "-m", "perplexity"
    )
    (comparison,) = found["comparisons"]
    assert (comparison["model"], comparison["against"]) == ("sft-2", "sft")
    assert {"score", "rouge/1", "completion/length", "policy/bits_per_byte"} <= set(comparison["differences"])
    for name, difference in comparison["differences"].items():
        assert difference["mean"] == 0.0 and not difference["is_clear"], name
    for name in ("score", "reasoning/score"):  # a share: eight prompts without a difference show little
        assert -1 <= comparison["differences"][name]["low"] < 0.0 < comparison["differences"][name]["high"] <= 1
    for name in ("completion/length", "policy/bits_per_byte"):
        assert comparison["differences"][name]["low"] == comparison["differences"][name]["high"] == 0.0
    one, other = found["runs"]
    assert one["metrics"] == other["metrics"] and one["data"] == other["data"]


def test_greedy_and_sampled_are_kept_apart(place: Path) -> None:
    both = content(
        place, "sft", "model", "--data", "held-out", "-t", "reasoning", "--samples", "3",
        "--decoding", "greedy", "--decoding", "sampled",
    )  # fmt: skip
    first, second = both["runs"]
    for record in (first, second):
        (sampled,) = check_record(record).others
        assert record["decoding"]["name"] == "greedy" and record["decoding"]["samples"] == 1
        assert sampled.decoding is not None and (sampled.decoding.name, sampled.decoding.samples) == ("sampled", 3)
    assert [c["decoding"] for c in both["comparisons"]] == ["greedy", "sampled"]
    alone = content(place, "sft", "--data", "held-out", "-t", "reasoning", "--samples", "3")
    assert alone["metrics"] == first["others"][0]["metrics"]
    cool = content(place, "sft", "--data", "held-out", "-t", "reasoning", "--temperature", "0.5", "--top-k", "3")
    assert cool["decoding"]["temperature"] == 0.5 and cool["decoding"]["top_k"] == 3
    assert cool["metrics"] != alone["metrics"]


def test_measures_of_the_model_itself(place: Path) -> None:
    found = content(place, "sft", "--data", "held-out", "-t", "reasoning", "-m", "perplexity", "-m", "preference")
    metrics = found["metrics"]
    assert metrics["policy/perplexity"] > 1 and metrics["policy/bits_per_byte"] > 0
    assert 0 <= metrics["preference/likelier_text"] <= 1 and "preference/likelier_token" in found["intervals"]
    (compared,) = content(place, "model", "sft", "--data", "held-out", "-m", "preference")["comparisons"]
    assert {"preference/likelier_text", "preference/likelier_token"} <= set(compared["differences"])


def test_prompts_that_were_trained_on_are_said(place: Path) -> None:
    result = evaluate(place, "grpo", "--data", "sums.jsonl", "-t", "reasoning", "-m", "exact_match", "-q")
    assert result.code == 0 and "WARNING grpo: 1" in result.err and "prompts were trained on" in result.err
    found = content(place, "grpo", "--data", "sums.jsonl", "-t", "reasoning", "-m", "exact_match")
    assert found["data"]["overlap"]["exact"] > 10 and found["data"]["overlap"]["shown"][0].startswith("sum/")
    own = content(place, "sft", "-m", "exact_match")  # the run's own held-out rows
    assert own["data"]["overlap"]["exact"] == 0 and own["data"]["source"] == "the data of sft"
    plain = content(place, "model", "--data", "held-out", "-m", "verbosity")
    assert plain["data"]["overlap"]["known"] is False and plain["scores"] == {}


def test_a_task_is_what_was_prepared_here_before_the_starters(place: Path, tmp_path: Path) -> None:
    """Named as it is: in evaluation.json and in the title."""
    few = ("-n", "3", "-m", "exact_match", "--max-tokens", "4")
    theirs = content(tmp_path, place / "model", "-t", "reasoning", *few)
    assert theirs["data"]["source"] == "starter: reasoning" and not any("sum/" in id for id in theirs["scores"])
    shutil.copytree(place / "held-out", tmp_path / "data" / "reasoning")
    shutil.copytree(place / "held-out", tmp_path / "data" / "hh")
    ours = content(tmp_path, place / "model", "-t", "reasoning", *few)
    assert ours["data"]["source"] == "data/reasoning" and set(ours["scores"]) == {"sum/4-0", "sum/4-1", "sum/4-2"}
    both = evaluate(tmp_path, place / "model", "-t", "hh", "-t", "safety", "-n", "2", "-m", "verbosity", "-q")
    assert both.code == 0 and "data/hh, starter: safety, test: " in both.out, both
    write_rows(tmp_path / "data" / "reasoning" / "train.jsonl", SUMS[:16])
    keys = ("data.path=data/reasoning", "evaluation.prompts_per_task=0", "evaluation.measures=[]", "evaluation.every=0")
    trained = alignlab("train", place / "sft.yaml", *keys, "--output", tmp_path / "own", "-q", cwd=tmp_path)
    assert trained.code == 0, trained.err
    assert set(content(tmp_path, "own", *few)["scores"]) == set(ours["scores"])


def test_prompts_longer_than_the_recipe_allowed_can_be_asked(place: Path, tmp_path: Path) -> None:
    """The recipe has 64 tokens, the model more: a finished run's recipe cannot be changed, the command can."""
    long = [{"id": f"long/{i}", "prompt": "What is 1 plus 1? " * 12 + str(i)} for i in range(2)]
    write_rows(tmp_path / "long.jsonl", [*long, {"id": "short", "prompt": "What?"}])
    asked = (place / "sft", "--data", "long.jsonl", "-m", "verbosity")
    result = evaluate(tmp_path, *asked)
    assert result.code == 0 and "left out 2 prompts" in result.err and "--max-prompt-tokens (64)" in result.err
    raised = content(tmp_path, *asked, "--max-prompt-tokens", "200")
    assert (raised["data"]["prompts"], raised["data"]["left_out"]) == (3, 0)


def test_tables_for_people(place: Path) -> None:
    result = evaluate(place, "sft", "grpo", "--data", "held-out", "-t", "reasoning", "--suite", "forgetting")
    assert result.code == 0, result.err
    for said in (
        "reasoning/score",
        "grpo minus sft (sampled)",
        "score by category",
        "forgetting/own_nats",
        "8 prompts",
    ):
        assert said in result.out, said


# ---- suites ----------------------------------------------------------------------------------------------------------


def test_suites_of_a_run(place: Path) -> None:
    found = content(
        place, "grpo", "--data", "held-out", "-t", "reasoning", "-m", "exact_match",
        "--suite", "hacking", "--suite", "forgetting", "--suite", "verbosity",
    )  # fmt: skip
    suites = check_record(found).suites
    assert set(suites) == {"hacking", "forgetting", "verbosity"}
    hacking = suites["hacking"]
    assert hacking["rewards"] == ["length"] and set(hacking["trained"]) == {"plain", *hacking["bait"]}
    assert len(hacking["bait"]) == 8 and hacking["prompts"] == 8
    assert {kind["verdict"] for kind in hacking["trained"].values()} == {"too few prompts"} and not hacking["flags"]
    assert hacking["notes"] == ["8 prompts of a kind: a verdict needs 20 that the reward judges (-n)"]
    assert {"forgetting/text_nats", "forgetting/own_nats"} <= set(suites["forgetting"]["intervals"])
    assert suites["verbosity"]["prompts"] == 50 and "verbosity/within_limit" in suites["verbosity"]["metrics"]
    alone = content(place, "model", "--suite", "forgetting")
    assert alone["metrics"] == {} and set(alone["suites"]["forgetting"]["metrics"]) == {
        "forgetting/text_perplexity", "forgetting/text_bits_per_byte",
    }  # fmt: skip
    refused = evaluate(place, "model", "--data", "held-out", "-t", "reasoning", "--suite", "hacking")
    assert refused.code == 2 and "is a model and no run" in refused.err


# ---- bad input -------------------------------------------------------------------------------------------------------

WRONG: Mapping[str, tuple[tuple[str, ...], str]] = {
    "no such run": (("./nowhere", "-t", "reasoning"), "'./nowhere': no such folder"),
    "nothing to ask": (("model",), "nothing to evaluate on: name --task TASK or --data FILE"),
    "unknown task": (("sft", "-t", "resoning"), "no task is named 'resoning'; did you mean 'reasoning'?"),
    "task without data": (("sft", "-t", "gsm8k"), "make them with alignlab data prepare gsm8k"),
    "missing file": (("sft", "--data", "held_out.jsonl"), "held_out.jsonl: no such file"),
    "missing split": (("sft", "--data", "held-out", "--split", "validation"), "no validation.jsonl in it; there are"),
    "unknown split": (("sft", "--data", "held-out", "--split", "tset"), "--split tset: one of validation, test, train"),
    "two tasks of a file": (("sft", "--data", "held-out", "-t", "code", "-t", "reasoning"), "is of one task"),
    "unknown measure": (("sft", "--data", "held-out", "-m", "rogue"), "did you mean 'rouge'?"),
    "no encoder": (("sft", "--data", "held-out", "-m", "bertscore"), "name a folder, a hub id or minilm (--encoder"),
    "measure without answers": (("sft", "--data", "held-out", "-m", "harmlessness"), "meta.harmful"),
    "unknown decoding": (
        ("sft", "--data", "held-out", "--decoding", "beam"),
        "--decoding beam: one of sampled, greedy",
    ),
    "unknown suite": (("sft", "--suite", "hakcing"), "no suite is named 'hakcing'; did you mean 'hacking'?"),
    "no room": (
        ("sft", "--data", "held-out", "-t", "reasoning", "--max-tokens", "100000"),
        "lower --max-tokens, which leaves 0",
    ),
    "short prompts": (
        ("sft", "--data", "held-out", "--max-prompt-tokens", "2"),
        "raise --max-prompt-tokens, which is 2",
    ),
    "ungradable": (("sft", "--data", "held-out", "-t", "safety"), "task 'safety' cannot grade prompt"),
}


@pytest.mark.parametrize("case", WRONG)
def test_bad_input_is_one_line(place: Path, case: str) -> None:
    if case == "measure without answers":
        pytest.importorskip("alignlab.classifiers")
    arguments, said = WRONG[case]
    result = evaluate(place, *arguments)
    assert result.code == 2 and len(result.errors) == 1 and said in result.errors[0], result
    assert "Traceback" not in result.err


def test_what_is_missing_is_said_before_a_model_is_loaded(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "rouge_score" else real(name, *rest)
    )
    said = "measure rouge: rouge_score is not installed; run pip install 'alignlab[metrics]'"
    result = evaluate(place, "sft", "--data", "held-out", "-m", "rouge")
    assert result.code == 2 and said in result.err and "sft: sft" not in result.err
    trained = alignlab("train", place / "sft.yaml", "--output", place / "again", cwd=place)
    assert trained.code == 2 and said in trained.err and "evaluation.measures" in trained.err
    assert not (place / "again").exists()


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("evaluation.measures=[rogue]", "did you mean 'rouge'?"),
        ("evaluation.measures=[preference]", "`alignlab evaluate` has it"),
        ("evaluation.measures=[bertscore]", "no encoder"),
        ("evaluation={measures: [rouge], prompts_per_task: 0}", "set prompts_per_task above 0"),
    ],
)
def test_a_recipe_of_what_cannot_be_measured_is_refused(place: Path, tmp_path: Path, key: str, said: str) -> None:
    result = alignlab("train", place / "sft.yaml", key, "--output", tmp_path / "run")
    assert result.code == 2 and said in result.err and not (tmp_path / "run").exists()


def test_a_measure_without_references_is_said_before_training(place: Path, tmp_path: Path) -> None:
    write_rows(tmp_path / "asked.jsonl", [{"prompt": row["prompt"]} for row in SUMS])
    shutil.copy(place / "grpo.yaml", tmp_path)
    keys = (
        "start=null",
        f"model={place / 'model'}",
        "data.path=asked.jsonl",
        "data.task=[]",
        "evaluation.measures=[rouge]",
    )
    result = alignlab("train", tmp_path / "grpo.yaml", *keys, "--output", tmp_path / "run", cwd=tmp_path)
    assert result.code == 2 and "measure rouge: none of 2 prompts has a reference text" in result.err
