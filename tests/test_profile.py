"""Where time and memory go: parts add up, advice reacts to what is wrong, and nothing is touched or left behind."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from alignlab.algorithms.grpo import GRPO as GRPOMethod
from alignlab.profile import Profiled, as_json, profile, tables
from alignlab.profile.advice import Facts, Suggestion, candidates, suggestions, worth
from alignlab.profile.measure import Change, Counting, Lap, Still, Tried, Work, threads
from alignlab.profile.report import parts_of, render, size_of, time_of
from alignlab.types import RowShapes
from tests.algorithms.world import start_run
from tests.runs import alignlab, files_of, small_model, strict_json, write_rows
from tests.stand_ins import batch_of, tiny

CPU = torch.device("cpu")
MODELS = {"policy": tiny()}
GRPO_METHOD = GRPOMethod(prompts_per_phase=3, group_size=3, learning_rate=1e-2)
SUMS = [
    {"id": f"sum/{a}{b}", "task": "reasoning", "prompt": f"{a} + {b}", "answer": str(a + b), "completion": str(a + b),
     "chosen": f"{a} + {b} = {a + b}", "rejected": "no"}
    for a in range(6)
    for b in range(6)
]  # fmt: skip
GRPO = """
model: {model}
data: {{path: sums.jsonl, task: reasoning, max_completion_tokens: 8}}
algorithm: {{name: grpo, learning_rate: 1e-3, kl_coef: 0.05, prompts_per_phase: 4, group_size: 4, epochs: 2}}
reward: {{length: {{limit: 2, buffer: 4}}, exact: 1}}
train: {{num_phases: 20, save_every: 2, microbatch_rows: 2}}
evaluation: {{every: 1, prompts_per_task: 4}}
"""
DPO = """
model: {model}
data: {{path: sums.jsonl, max_completion_tokens: 16}}
algorithm: {{name: dpo, learning_rate: 1e-3, pairs_per_step: 6}}
train: {{num_phases: 9, microbatch_rows: 4}}
evaluation: {{prompts_per_task: 0}}
"""
STAGES = """
stages:
  - {name: first, algorithm: {name: sft, examples_per_step: 4}}
  - {name: second, algorithm: {name: dpo, pairs_per_step: 4}}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Recipes, data and a tiny model."""
    folder = tmp_path_factory.mktemp("profile")
    model = small_model(folder / "model")
    write_rows(folder / "sums.jsonl", SUMS)
    for name, text in (("grpo", GRPO), ("dpo", DPO)):
        (folder / f"{name}.yaml").write_text(text.format(model=model), "utf-8")
    return folder


@pytest.fixture(scope="module")
def online(folder: Path) -> Profiled:
    return profile(folder / "grpo.yaml", [], folder / "out-grpo", phases=2)[0]


@pytest.fixture(scope="module")
def offline(folder: Path) -> Profiled:
    return profile(folder / "dpo.yaml", [], folder / "out-dpo", phases=2, try_changes=False)[0]


@pytest.fixture(params=["online", "offline"])
def profiled(request: pytest.FixtureRequest) -> Profiled:
    found: Profiled = request.getfixturevalue(request.param)
    return found


def test_parts_add_up_to_the_whole(profiled: Profiled) -> None:
    parts, facts = parts_of(profiled), profiled.facts
    assert all(p.seconds > 0 and min(p.by_phase) >= 0 for p in parts)
    assert sum(p.seconds for p in parts) == pytest.approx(facts.phase) and sum(p.share for p in parts) == pytest.approx(
        1
    )
    for part in parts:
        assert sum(seconds for _, seconds in part.details) <= part.seconds * (1 + 1e-9)
    for index, lap in enumerate(profiled.measured.laps):
        assert sum(p.by_phase[index] for p in parts) == pytest.approx(lap.total)


def test_what_a_method_does_is_what_is_charged(online: Profiled, offline: Profiled) -> None:
    def seconds(profiled: Profiled) -> dict[str, float]:
        return {part.name: part.seconds for part in parts_of(profiled)}

    training = {"collect", "body", "head", "loss", "backward", "optimiser", "logging", "checkpoint", "other"}
    assert seconds(offline).keys() == training
    assert seconds(online).keys() == training | {"sampling", "rewards", "reference", "evaluation"}
    (sampling,) = (part for part in parts_of(online) if part.name == "sampling")
    assert {name for name, _ in sampling.details} == {"prefill", "decode", "draw"}
    assert offline.measured.once.reference > 0 and offline.measured.once.evaluation is None
    assert [line for line in offline.notes if "short" in line] == []


def test_what_a_phase_had_to_do(online: Profiled, offline: Profiled) -> None:
    """16 rollouts in two steps, 2 rows at a time; 6 pairs, 2 at a time."""
    for lap in online.measured.laps:
        assert lap.work.rows == (2,) * 16 and lap.work.steps == 2 and len(lap.work.lengths) == 16
        assert lap.counted["generated_tokens"] == sum(lap.work.lengths)
        assert lap.counted["trained_tokens"] == 2 * sum(lap.work.lengths)
        assert all(c <= t for c, t in zip(lap.work.computed, lap.work.tokens, strict=True))
    assert [lap.work.rows for lap in offline.measured.laps] == [(4, 4, 4)] * 2
    found = as_json(online)
    assert found["batches"]["rows_per_microbatch"] == 2 and found["batches"]["microbatches_per_phase"] == 16
    assert found["sampled_tokens_per_second"] > 0 and as_json(offline)["sampled_tokens_per_second"] is None


def test_padding_where_rows_are_not_packed() -> None:
    """Two rows of 3 and 5 tokens, padded to 5: 2 of 10 positions are padding. Packed, a prompt of 2 in common: 6."""
    batch = batch_of([(2, 9), (2, 9)], [(5,), (6, 7, 8)])
    shaped = replace(batch, shapes=RowShapes((3, 5), (2, 2), (0, 0)))
    counting = Counting(None, {"policy": tiny()})  # type: ignore[arg-type]
    assert counting._positions(batch) == 10 and counting._positions(shaped) == 6


def test_memory(profiled: Profiled) -> None:
    memory = profiled.measured.memory
    assert memory.before > 0 and max(memory.before, memory.loaded) <= memory.capacity and memory.peak <= memory.capacity
    assert min(memory.parts.values()) >= 0 and memory.peak <= sum(memory.parts.values()) * (1 + 1e-9)
    weights = 4 * profiled.measured.parameters
    assert memory.parts["gradients"] == 4 * profiled.measured.trained
    assert weights <= memory.parts["weights of the policy"] < 1.2 * weights + 4096  # and its buffers
    assert 2 * weights <= memory.parts["optimiser"] < 2 * weights + 10_000  # and its counts of steps
    assert memory.course == tuple(sorted(memory.course))


def test_what_it_says_as_json(profiled: Profiled, folder: Path) -> None:
    found = strict_json(json.dumps(as_json(profiled), allow_nan=False))
    assert found["schema"] == 1 and found["device"] == "cpu" and found["threads"] == 1
    assert found["phases"] == {"warm_up": 1, "measured": 2, "in_run": 20 if found["method"] == "grpo" else 9}
    assert {"seconds", "by_phase", "warm_up", "parts"} == found["phase"].keys()
    assert all(p.keys() == {"name", "seconds", "share", "by_phase", "details"} for p in found["phase"]["parts"])
    assert found["run_seconds"] > found["phases"]["in_run"] * found["phase"]["seconds"]
    assert len(found["suggestions"]) <= 3
    page = render(profiled)
    assert "<script" not in page and "http" not in re.sub(r"<meta[^>]*>", "", page) and page.count("<svg") >= 2
    assert len(list(tables(profiled))) >= 5


# ---- advice ----------------------------------------------------------------------------------------------------------


def test_changes_were_tried_beside_the_phase_as_it_is(online: Profiled, offline: Profiled) -> None:
    tried = {t.change.override: t for t in online.tried}
    assert "train.microbatch_rows=8" in tried and not offline.tried
    assert all(t.seconds > 0 and t.base > 0 and t.noise >= 0 and t.peak > 0 for t in tried.values())
    best = tried["train.microbatch_rows=8"]
    assert best.seconds < best.base  # sixteen passes of two rows, or four of eight


def advised(profiled: Profiled, tried: list[Tried] | None = None) -> list[Suggestion]:
    return suggestions(profiled.facts, list(profiled.tried) if tried is None else tried, MODELS)


def result(profiled: Profiled, override: str, seconds: float, noise: float = 0.0, saved: int = 0) -> Tried:
    """A change that makes a second `seconds`, and the peak so much lower."""
    full = profiled.measured.memory.peak
    change = Change(override=override)
    return Tried(change=change, seconds=seconds, base=1.0, noise=noise, peak=full - saved, base_peak=full)


def with_phase(profiled: Profiled, **seconds: float) -> Profiled:
    """The same with phases that took so long, and evaluations and checkpoints that took no time."""
    work, measured = profiled.measured.laps[-1].work, profiled.measured
    lap = Lap(seconds=seconds, details={}, work=work, counted={}, peak=1)
    once = replace(measured.once, evaluation=None, checkpoint=0.0)
    measured = replace(measured, laps=(lap,), once=once, memory=replace(measured.memory, capacity=2**60))
    return replace(profiled, measured=measured, facts=replace(profiled.facts, measured=measured))


def test_nothing_is_worth_changing(offline: Profiled) -> None:
    found = with_phase(offline, body=0.5, backward=0.5)
    assert advised(found, [result(found, "train.microbatch_rows=2", 0.98)]) == []
    nothing = replace(found, suggestions=())
    assert "nothing is worth changing" in str(list(tables(nothing))[-1])
    assert "Nothing is worth changing" in render(nothing)


def test_what_is_within_the_noise_is_not_suggested(offline: Profiled) -> None:
    found = with_phase(offline, body=0.5, backward=0.5)
    assert advised(found, [result(found, "train.microbatch_rows=2", 0.8, noise=0.3)]) == []
    (one,) = advised(found, [result(found, "train.microbatch_rows=2", 0.8, noise=0.1)])
    assert one.override == "train.microbatch_rows=2" and one.seconds == pytest.approx(0.2) and one.basis == "tried"


def test_of_two_values_of_a_key_the_better_and_at_most_three(offline: Profiled) -> None:
    found = with_phase(offline, body=0.5, backward=0.5)
    tried = [result(found, f"{key}={value}", seconds) for key, value, seconds in
             (("a", 1, 0.9), ("a", 2, 0.5), ("b", 1, 0.8), ("c", 1, 0.7), ("d", 1, 0.6))]  # fmt: skip
    assert [s.override for s in advised(found, tried)] == ["a=2", "d=1", "c=1"]


def test_memory_counts_where_it_is_scarce(offline: Profiled) -> None:
    plenty = with_phase(offline, body=0.5, backward=0.5)
    memory = replace(plenty.measured.memory, capacity=int(1.2 * plenty.measured.memory.peak))
    measured = replace(plenty.measured, memory=memory)
    scarce = replace(plenty, measured=measured, facts=replace(plenty.facts, measured=measured))
    saving = [result(plenty, "train.gradient_checkpointing=true", 1.2, saved=plenty.measured.memory.peak // 2)]
    assert advised(plenty, saving) == [] and "train.gradient_checkpointing=true" in {
        s.override for s in advised(scarce, saving)
    }
    assert any(c.recompute for c in candidates(scarce.facts, MODELS)) and not any(
        c.recompute for c in candidates(plenty.facts, MODELS)
    )
    assert worth(scarce.facts, advised(scarce, saving)[0]) > worth(plenty.facts, advised(scarce, saving)[0])


def test_estimates_follow_from_measured_seconds(online: Profiled) -> None:
    """A reference that takes 4 of 10 seconds, an optimiser that takes 5, and evaluations of 3 every second phase."""
    found = with_phase(online, reference=4.0, optimiser=5.0, body=1.0)
    by_key = {s.override: s for s in advised(found, [])}
    assert by_key["algorithm.kl_coef=0"].seconds == 4.0 and by_key["algorithm.kl_coef=0"].learns
    assert 0 < by_key["model.adapter=lora"].seconds <= 5.0
    assert all(s.basis == "estimated" for s in by_key.values())
    once = replace(found.measured.once, evaluation=3.0)
    stage = found.stage.model_copy(update={"evaluation": found.stage.evaluation.model_copy(update={"every": 2})})
    facts = Facts(
        stage=stage, measured=replace(found.measured, once=once), device=torch.device("cpu"), prefix="stages.x."
    )
    assert facts.evaluation == 1.5 and facts.phase == 11.5
    (evaluation,) = (s for s in suggestions(facts, [], MODELS)
                     if "evaluation" in s.override)  # fmt: skip
    assert evaluation.override == "stages.x.evaluation.every=8" and evaluation.seconds == pytest.approx(0.75 * 1.5)


def test_what_is_tried_follows_from_the_recipe(online: Profiled) -> None:
    def tried(**train: Any) -> set[str]:
        stage = online.stage.model_copy(update={"train": online.stage.train.model_copy(update=train)})
        return {c.override for c in candidates(replace(online.facts, stage=stage), MODELS) if "OMP" not in c.override}

    assert tried() == {"train.microbatch_rows=8"}  # 16 rows a step, 2 at a time: fewer cannot be
    assert tried(microbatch_rows=64) == {"train.microbatch_rows=4"}
    assert tried(microbatch_rows=8) == {"train.microbatch_rows=16", "train.microbatch_rows=2"}
    assert tried(sampling_rows=4) == {"train.microbatch_rows=8", "train.sampling_rows=16"}
    assert tried(gradient_checkpointing=True) == {"train.microbatch_rows=8", "train.gradient_checkpointing=false"}


def test_a_few_long_completions(online: Profiled) -> None:
    """Of 40 completions, 38 of 10 tokens and 2 of 100: 11 tokens are enough for 19 of 20."""
    lap = online.measured.laps[-1]
    work = replace(lap.work, lengths=(10,) * 38 + (100,) * 2)
    facts = replace(online.facts, measured=replace(online.measured, laps=(replace(lap, work=work),)))
    (change,) = (c for c in candidates(facts, MODELS) if c.completion_tokens)
    assert change.override == "data.max_completion_tokens=11" and change.completion_tokens == 11
    even = replace(facts, measured=replace(facts.measured, laps=(replace(lap, work=Work(lengths=(10,) * 40)),)))
    assert not any(c.completion_tokens for c in candidates(even, MODELS))


def test_a_repeat_moves_nothing() -> None:
    """At the schedule of repeats no weight moves, weight decay included, so that the same phase can be had again."""
    run = start_run(GRPO_METHOD, weight_decay=0.5)
    run.schedule = Still()
    before = {name: p.clone() for name, p in run.models["policy"].state_dict().items()}
    run.go(2)
    assert run.state.step == 2 and all(torch.equal(before[n], p) for n, p in run.models["policy"].state_dict().items())


def test_threads_are_put_back() -> None:
    before = torch.get_num_threads()
    with pytest.raises(KeyError), threads(before + 1):
        assert torch.get_num_threads() == before + 1
        raise KeyError
    assert torch.get_num_threads() == before


# ---- the command -----------------------------------------------------------------------------------------------------


def test_the_command_leaves_its_two_files_and_nothing_else(folder: Path, tmp_path: Path, cache: Path) -> None:
    before, cached = files_of(folder), files_of(cache)
    found = alignlab("profile", folder / "dpo.yaml", "--phases", "1", "--no-try", "data.limit=20", cwd=tmp_path)
    assert found.code == 0, found.err
    assert "Settings most worth changing" in found.out or "nothing is worth changing" in found.out
    left = files_of(tmp_path)
    assert left.keys() == {"runs/profile/dpo/profile.json", "runs/profile/dpo/profile.html"}
    assert strict_json(left["runs/profile/dpo/profile.json"].decode())["phases"]["measured"] == 1
    assert files_of(folder) == before and files_of(cache) == cached  # the model's weights too
    again = alignlab("profile", folder / "dpo.yaml", "--phases", "1", "--no-try", "--quiet", cwd=tmp_path)
    assert again.code == 0 and again.err == ""


def test_a_stage_after_others_starts_from_short_ones(folder: Path, tmp_path: Path) -> None:
    text = re.sub("algorithm: .*\n", STAGES, (folder / "dpo.yaml").read_text("utf-8"))
    recipe = folder / "staged.yaml"
    recipe.write_text(text, "utf-8")
    found, output = profile(recipe, [], tmp_path / "out", phases=1, try_changes=False)
    assert found.stage.name == "second" and found.facts.prefix == "stages.second." and "first" in found.notes[0]
    assert not any((tmp_path / "out").iterdir()) and output == tmp_path / "out"
    assert profile(recipe, [], tmp_path / "out", stage="first", phases=1, try_changes=False)[0].notes == ()
    recipe.unlink()


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["nothing.yaml"], "nothing.yaml: no such recipe file"),
        (["dpo.yaml", "train.microbatchrows=2"], "unknown key; did you mean 'microbatch_rows'?"),
        (["dpo.yaml", "--stage", "sft"], "--stage sft: there is none of that name; choose from dpo"),
        (["dpo.yaml", "--output", "model"], "model: holds something else than a profile; choose another --output"),
        (["dpo.yaml", "--output", "sums.jsonl"], "sums.jsonl: cannot be a folder for a profile"),
    ],
)
def test_what_cannot_be_profiled_is_one_line(arguments: list[str], said: str, folder: Path) -> None:
    before = files_of(folder)
    found = alignlab("profile", *arguments, cwd=folder)
    assert found.code == 2 and len(found.errors) == 1 and said in found.errors[0], found.err
    assert files_of(folder) == before


def test_no_phases_are_refused(folder: Path) -> None:
    assert alignlab("profile", folder / "dpo.yaml", "--phases", "0").code == 2


def test_numbers_in_words() -> None:
    assert [time_of(s) for s in (0.0012, 1.5, 120.0, 7200.0)] == ["1.2 ms", "1.50 s", "2.0 min", "2.0 h"]
    assert [size_of(s) for s in (2**18, 99 * 2**20, 3 * 2**30)] == ["0.2 MiB", "99 MiB", "3.00 GiB"]
