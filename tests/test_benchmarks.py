"""The benchmark is fair and says what it found: the same tokens on both sides, the floor, the fits and the tables."""

from __future__ import annotations

import importlib.util
import json
import math
import resource
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from alignlab.kernels import ready
from alignlab.timing import span
from alignlab.types import Batch, LoopState
from benchmarks import report, results
from benchmarks.__main__ import chosen, main
from benchmarks.cases import BY_NAME, SEED, Case, config, data, lengths, make_model, peer_rows, reward_of, shorter
from benchmarks.floor import Machine, floor, mean_lengths, weights
from benchmarks.ours import gated, recipe, run, stage
from benchmarks.runner import Measured, Setting, Worker, WorkerFailed, compare, medians, opponent, visible
from benchmarks.runner import job as job_of
from benchmarks.scaling import AXES, cases, cheap, fit, growth, last_exponent
from benchmarks.worker import Job, peak_rss_mb

ROOT = Path(__file__).parents[1]
SMALL = {"items": 3, "prompt_tokens": 16, "completion_tokens": 16, "width": 32, "layers": 1}
needs_trl = pytest.mark.skipif(
    importlib.util.find_spec("trl") is None, reason="trl is not installed: pip install -e '.[conformance]'"
)


def small(name: str, **changes: Any) -> Case:
    return shorter(BY_NAME[name], **{**SMALL, **changes})


def job(case: Case, folder: Path, side: Any = "ours", steps: int = 3) -> Job:
    model = make_model(case, folder / "model")
    return Job(side=side, case=case, model=model, folder=folder / side.replace(" ", "-"), steps=steps)


# ---- the same work ---------------------------------------------------------------------------------------------------

Told = list[tuple[tuple[int, ...], tuple[bool, ...]]]
"""Rows of a step: ids, and which of them are trained."""


def rows_of(ids: torch.Tensor, attended: torch.Tensor, trained: torch.Tensor) -> Told:
    """(B, T) tensors -> the rows without padding."""
    return [
        (tuple(i[a.bool()].tolist()), tuple(bool(x) for x in t[a.bool()].tolist()))
        for i, a, t in zip(ids, attended, trained, strict=True)
    ]


def our_steps(case: Case, folder: Path, monkeypatch: pytest.MonkeyPatch, steps: int) -> list[Told]:
    """What our side trains on, from its recipe to its batches."""
    found: list[Any] = []

    def caught(algorithm: Any, models: Any, optimizers: Any, source: Any, *args: Any, **kwargs: Any) -> Iterator[Any]:
        found.append(source)
        raise StopAsyncIteration
        yield

    monkeypatch.setattr(stage, "train", caught)
    with pytest.raises(StopAsyncIteration):
        run(job(case, folder, steps=steps), lambda: False, lambda numbers, logged: None)
    (source,) = found

    def batches(step: int) -> tuple[Batch, ...]:
        state = LoopState(seed=SEED, phase=step)
        offline = source.example_batches if case.method == "sft" else source.pair_batches
        return offline(case.items, state)  # type: ignore[no-any-return]

    return [
        sorted(r for b in batches(step) for r in rows_of(b.input_ids, b.attention_mask, b.completion_mask))
        for step in range(steps)
    ]


def peer_steps(case: Case, folder: Path, steps: int) -> list[Told]:
    """What trl's trainer trains on, from its data set to what its loss is given."""
    from benchmarks.peer import reward, trainer

    loader = iter(trainer(job(case, folder, "trl", steps), reward).get_train_dataloader())
    found = []
    for _ in range(steps):
        batch = next(loader)
        if case.method == "sft":
            trained = batch["labels"] != -100
        elif case.method == "dpo":
            trained = batch["completion_mask"]
        else:  # nothing tells the reward model's trainer where the prompt ends, nor does it matter there
            trained = batch["attention_mask"]
        attended = batch["attention_mask"] if "attention_mask" in batch else batch["input_ids"] != 0
        found.append(sorted(rows_of(batch["input_ids"], attended, trained)))
    return found


@needs_trl
@pytest.mark.parametrize("name", ["sft-tiny-varied", "dpo-tiny-varied", "reward_model-tiny-varied"])
def test_every_step_trains_on_the_same_tokens_on_both_sides(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = small(name)
    ours, peer = our_steps(case, tmp_path, monkeypatch, 2), peer_steps(case, tmp_path, 2)
    if case.method == "reward_model":
        ours = [[(ids, (True,) * len(ids)) for ids, _ in step] for step in ours]
    assert ours == peer
    assert ours[0] != ours[1]
    for step, rows in enumerate(ours):  # and the peer's side counts those tokens
        expected = [lengths(row) for row in peer_rows(case, 2)[step * case.items :][: case.items]]
        if case.method != "reward_model":
            assert sum(sum(trained) for _, trained in rows) == sum(completion for _, completion in expected)


@needs_trl
def test_prompts_to_sample_from_are_the_same_on_both_sides(tmp_path: Path) -> None:
    """trl's trainer renders each prompt a group's number of times; ours reads the same words from its file."""
    from benchmarks.peer import reward, trainer

    case = small("grpo-tiny", group=2)
    batch = next(iter(trainer(job(case, tmp_path, "trl"), reward).get_train_dataloader()))
    given = [example["prompt"][0]["content"] for example in batch]
    assert given == [row["prompt"] for row in peer_rows(case, 1) for _ in range(case.group)]
    written = [json.loads(line) for line in recipe_rows(case, tmp_path)]
    assert written == data(case)


def recipe_rows(case: Case, folder: Path) -> list[str]:
    return (recipe(job(case, folder)).parent / "data.jsonl").read_text("utf-8").splitlines()


def test_lengths_are_those_that_the_case_names() -> None:
    alike, varied = small("sft-tiny-varied", varied=False), small("sft-tiny-varied")
    assert {lengths(row) for row in data(alike)} == {(16, 16)}
    prompts, completions = zip(*(lengths(row) for row in data(varied)), strict=True)
    assert (min(prompts), max(prompts)) == (2, 16)
    assert (min(completions), max(completions)) == (3, 16)


def test_the_reward_is_the_share_of_even_words() -> None:
    assert reward_of("w2 w3 w4 <eos>") == 0.5
    assert reward_of("") == 0.0


# ---- the floor -------------------------------------------------------------------------------------------------------

MACHINE = Machine(flops=120e9, bandwidth=11e9)


def test_the_floor_of_sft_by_hand() -> None:
    """tiny: a layer has 128 x (32 x 2 x 4 heads + 32 x 2 x 1) = 40,960 and 3 x 128 x 512 = 196,608 weights, four of
    them 950,272, the head 512 x 128 = 65,536. 2 examples of 10 + 6 tokens: 32 in the body, 12 in the head; a trained
    weight costs 3 products of 2 operations: 6 x (950,272 x 32 + 65,536 x 12) operations."""
    case = shorter(BY_NAME["sft-tiny-varied"], varied=False, items=2, prompt_tokens=10, completion_tokens=6)
    assert weights(case) == (950_272, 65_536)
    assert floor(case, MACHINE) == pytest.approx(6 * (950_272 * 32 + 65_536 * 12) / 120e9)


def test_the_floor_of_grpo_counts_a_prompt_once_a_group_and_reads_the_weights_for_every_token() -> None:
    """g270: a layer has 640 x 256 x (2 x 4 + 2) + 3 x 640 x 2048 = 5,570,560 weights, 18 of them 100,270,080, the head
    262,144 x 640 = 167,772,160. One prompt of 64 and 6 x 64 tokens: 448 in the body, 384 in the head, a frozen weight
    twice 2 operations; 64 reads of 4 bytes each, which take longer than the products of 6 rows; and the prefill."""
    body, head = 100_270_080, 167_772_160
    case = BY_NAME["grpo-g270"]
    assert weights(case) == (body, head)
    training = 2 * 2 * (body * 448 + head * 384) / 120e9
    sampling = 64 * 4 * (body + head) / 11e9 + 2 * body * 64 / 120e9
    assert floor(case, MACHINE) == pytest.approx(training + sampling)
    half = 2 * 2 * (body * (64 + 192) + head * 192) / 120e9 + 32 * 4 * (body + head) / 11e9 + 2 * body * 64 / 120e9
    assert floor(case, MACHINE, sampled=32) == pytest.approx(half)


def test_sampling_many_rows_is_bound_by_products_instead() -> None:
    case = BY_NAME["grpo-tiny"]
    (body, head), rows = weights(case), 64
    sampling = 64 * 2 * (body + head) * rows / 120e9 + 2 * body * 8 * 64 / 120e9
    training = 6 * (body * (8 * 64 + rows * 64) + head * rows * 64) / 120e9
    assert floor(case, MACHINE) == pytest.approx(training + sampling)


def test_the_floor_of_dpo_has_the_reference_and_shares_the_prompt_of_a_pair() -> None:
    """4 pairs of 128 + 128: 4 x 128 + 8 x 128 in the body, 8 x 128 in the head; policy 2 products, reference 1."""
    case = BY_NAME["dpo-g270"]
    body, head = weights(case)
    assert floor(case, MACHINE) == pytest.approx(3 * 2 * (body * 1536 + head * 1024) / 120e9)
    assert floor(BY_NAME["reward_model-g270"], MACHINE) == pytest.approx(2 * 2 * body * 1536 / 120e9)


def test_the_floor_takes_the_lengths_that_the_data_have() -> None:
    case = small("dpo-tiny-varied")
    rows = [lengths(row) for row in data(case)]
    prompt, completion = mean_lengths(case)
    assert prompt == pytest.approx(sum(p for p, _ in rows) / len(rows))
    assert completion == pytest.approx(sum(c for _, c in rows) / (2 * len(rows)))


# ---- sizes -----------------------------------------------------------------------------------------------------------


def test_a_case_changes_its_model_and_only_that() -> None:
    base = BY_NAME["grpo-tiny"]
    wide = shorter(base, width=256, layers=2, vocabulary=4096)
    found: Any = config(wide)
    assert (found.hidden_size, found.intermediate_size, found.num_attention_heads) == (256, 1024, 8)
    assert (found.num_hidden_layers, found.vocab_size) == (2, 4096)
    assert found.layer_types == ["sliding_attention", "full_attention"]
    assert (base.model, wide.model) == ("tiny", "tiny-vocabulary4096-width256-layers2")
    assert Case.from_json(wide.to_json()) == wide


@pytest.mark.parametrize("case", [shorter(BY_NAME["grpo-tiny"], width=40), shorter(BY_NAME["grpo-smol"], width=64)])
def test_a_width_that_no_model_has_is_refused(case: Case) -> None:
    with pytest.raises(ValueError, match="multiple of 32"):
        config(case)


def test_the_axes_change_one_thing_each_and_the_peer_is_spared_large_logits() -> None:
    for axis in AXES.values():
        for value, case in cases(axis).items():
            assert getattr(case, axis.field) == value
    kept = [value for value, case in cases(AXES["vocabulary"]).items() if cheap(case)]
    assert kept == [512, 4096, 32_768]


# ---- fits ------------------------------------------------------------------------------------------------------------


def test_an_exact_power_law_is_found_exactly() -> None:
    sizes = [1.0, 2.0, 4.0, 8.0]
    found = fit(sizes, [3 * s**1.5 for s in sizes])
    assert found.exponent == pytest.approx(1.5)
    assert found.error == pytest.approx(0, abs=1e-7)
    assert last_exponent(sizes, [9, 9, 5, 20]) == pytest.approx(2)


def test_an_exponent_and_its_error_by_hand() -> None:
    """Logarithms (base 2) 0, 1, 2 against 0, 1, 1: slope 1/2, residuals -1/6, 1/3, -1/6, so the variance is 1/6 with
    one degree of freedom, and over a spread of 2 the error is sqrt(1/12)."""
    found = fit([1, 2, 4], [1, 2, 2])
    assert found.exponent == pytest.approx(0.5)
    assert found.error == pytest.approx(math.sqrt(1 / 12))
    assert math.isnan(fit([1, 2], [1, 4]).error)


@pytest.mark.parametrize(("sizes", "costs"), [([1], [1]), ([2, 2], [1, 2]), ([1, 2], [0, 1]), ([1, 2, 3], [1, 2])])
def test_no_exponent_without_two_sizes(sizes: list[float], costs: list[float]) -> None:
    with pytest.raises(ValueError, match="at least two"):
        fit(sizes, costs)


def test_growth_of_the_last_doubling() -> None:
    """From 4 to 8 sizes 500 -> 540 MB; uneven sizes are put on the same line: 10 MB each, 15 of 30 are its doubling."""
    assert growth([2, 4, 8], [480, 500, 540]) == pytest.approx(40)
    assert growth([20, 30], [100, 200]) == pytest.approx(150)


# ---- results and page ------------------------------------------------------------------------------------------------


def side(seconds: float, memory: float, **more: Any) -> dict[str, Any]:
    return {
        "seconds": seconds, "split_seconds": seconds, "parts": {"loss": seconds / 4, "backward": seconds / 2},
        "trained_tokens": 600.0, "memory_mb": memory, "rounds": [seconds], "logged": ["loss/total"], **more,
    }  # fmt: skip


def record(**changes: Any) -> dict[str, Any]:
    about = {"machine": "a CPU", "threads": 1, "precision": "float32", "rounds": 7, "gflops": 120.0, "gbytes": 11.0,
             "versions": {"torch": "2.13.0"}}  # fmt: skip
    return {
        "against": "trl", "ours": side(2.0, 600), "peer": side(5.0, 1200, logged=["loss", "entropy"]), "ratio": 2.5,
        "ratios": [2.4, 2.5, 2.75], "memory_ratio": 0.5, "floor": 0.8, "kernels": True, "conditions": about, **changes,
    }  # fmt: skip


def test_a_case_as_a_row() -> None:
    (row,) = report.steps_table({"sft-g270": record()}).splitlines()[2:]
    assert row == (
        "| sft-g270 | 2.00 | 5.00 | **2.50** | 2.40 to 2.75 | 0.800 | 2.5 / 6.2 | 300 / 120 | – | 600 / 1200 | 0.50 |"
    )


def test_sampled_tokens_are_those_a_second_of_sampling() -> None:
    ours = side(2.0, 600, sampled_tokens=600.0, parts={"sampling": 0.5})
    peer = side(5.0, 1200, sampled_tokens=660.0, parts={"sampling": 2.0})
    (row,) = report.steps_table({"grpo-tiny": record(ours=ours, peer=peer)}).splitlines()[2:]
    assert "| 1200 / 330 |" in row


def test_the_parts_of_either_side_add_up_to_its_step() -> None:
    ours, peer = report.parts_table({"sft-g270": record()}).splitlines()[2:]
    assert ours == "| sft-g270 | ours | – | – | – | – | 0.500 | 1.00 | – | 0.500 |"
    assert peer == "| sft-g270 | trl | – | – | – | – | 1.25 | 2.50 | – | 1.25 |"


def test_the_other_tables() -> None:
    assert report.logged_table({"sft-g270": record()}).splitlines()[-1] == "| sft-g270 | 1 | 2 | no / yes |"
    assert report.defaults_table({"sft-g270": record()}).splitlines()[-1] == (
        "| sft-g270 | 2.00 | 5.00 | **2.50** | 2.40 to 2.75 | 600 / 1200 | 0.50 |"
    )
    sizes = ((512, 512.0), (4096, 4096.0), (2**21, 2.0**21))
    points = [{"value": v, "size": s, "seconds": s / 1000, "memory_mb": 500.0} for v, s in sizes]
    assert report.scaling_table({"vocabulary trl": {"points": points}}).splitlines()[-1] == (
        "| vocabulary, tokens | trl | 512, 4096, 2.1M | 0.512, 4.10, 2097 | 1.00 ± 0.00 | 1.00 | 500, 500, 500 | "
        "0.00 ± 0.00 | 0 |"
    )


def test_rows_stand_in_the_order_of_the_cases_and_conditions_once() -> None:
    found = {"sft-g270": record(), "grpo-tiny": record(), "ppo-tiny": record(against="ours, grpo-tiny")}
    names = [line.split(" | ")[0] for line in report.steps_table(found).splitlines()[2:]]
    assert names == ["| grpo-tiny", "| ppo-tiny (beside ours grpo-tiny)", "| sft-g270"]
    (line,) = report.conditions(found).splitlines()
    assert line == (
        "a CPU, 1 thread(s), float32, loops in C: 120 Gflop/s in matrix products, 11.0 GB/s read; torch 2.13.0; "
        "7 rounds in turn."
    )
    other = record(conditions={**record()["conditions"], "threads": 2})
    lines = report.conditions({**found, "dpo-g270": other}).splitlines()
    assert [line.partition(": ")[0] for line in lines] == ["* sft-g270, grpo-tiny, ppo-tiny", "* dpo-g270"]


def test_one_record_at_a_time_goes_into_the_file(tmp_path: Path) -> None:
    assert results.title("cpu", "bfloat16") == "cpu-bfloat16"  # a file of its own, not in place of float32's
    file = results.path(results.title("cuda:1", "bfloat16"), tmp_path)
    assert file.name == "results-cuda.json"
    results.save(file, "cases", "a", {"ratio": 1})
    results.save(file, "cases", "b", {"ratio": 2})
    results.save(file, "scaling", "group", {"points": []})
    results.save(file, "cases", "a", {"ratio": 3})
    assert results.load(file) == {
        "cases": {"a": {"ratio": 3}, "b": {"ratio": 2}}, "defaults": {}, "scaling": {"group": {"points": []}}
    }  # fmt: skip
    assert [p.name for p in tmp_path.iterdir()] == ["results-cuda.json"]


def test_the_page_is_what_the_results_say() -> None:
    page = report.PAGE.read_text("utf-8")
    assert report.fresh_page(page) == page, "run `python -m benchmarks page`"
    for title in report.SHOWN:
        for mark in report.blocks(results.load(results.path(title)), title):
            assert f"<!-- measured: {mark} -->" in page, f"the page has no place for {mark}"


def test_what_is_not_measured_is_said(tmp_path: Path) -> None:
    nothing = results.load(results.path("cuda", tmp_path))
    assert set(report.blocks(nothing, "cuda").values()) == {"not measured: no GPU was available"}
    page = "a\n<!-- measured: cuda steps -->\nold\n<!-- /measured: cuda steps -->\nb"
    assert report.rendered(page, {"cuda steps": r"\1 new"}) == page.replace("old", r"\1 new")


# ---- processes -------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="only Linux says the peak of this very process")
def test_peak_memory_is_the_process_own_and_not_its_parents() -> None:
    ballast = bytearray(400 * 2**20)  # a parent much larger than the child needs to be
    ballast[::4096] = b"x" * len(ballast[::4096])
    code = "import resource, re; print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024); " \
           "print(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1])"  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    inherited, own = (int(word) for word in done.stdout.split())
    assert own / 1024 < 100 < 400 < inherited, "the reason why VmHWM is read"
    assert peak_rss_mb() == pytest.approx(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, rel=0.5)


def test_peak_memory_without_proc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "is_file", lambda self: False)
    monkeypatch.setattr(resource, "getrusage", lambda who: SimpleNamespace(ru_maxrss=3 * 2**20))
    monkeypatch.setattr(sys, "platform", "linux")
    assert peak_rss_mb() == 3 * 1024
    monkeypatch.setattr(sys, "platform", "darwin")
    assert peak_rss_mb() == 3


def test_a_job_survives_the_way_to_its_process(tmp_path: Path) -> None:
    sent = Job(side="trl defaults", case=small("grpo-tiny"), model=tmp_path, folder=tmp_path, steps=4, precision="tf32")
    assert Job.from_json(sent.to_json()) == sent


def test_a_worker_sees_one_accelerator_or_none() -> None:
    assert visible("cpu", "0,1") == {"CUDA_VISIBLE_DEVICES": ""}
    assert visible("cuda", None) == {"CUDA_VISIBLE_DEVICES": "0"}
    assert visible("cuda:1", None) == {"CUDA_VISIBLE_DEVICES": "1"}
    assert visible("cuda:1", "3,5") == {"CUDA_VISIBLE_DEVICES": "5"}


def test_a_gpu_has_further_rounds_for_the_split_and_its_workers_one_device(tmp_path: Path) -> None:
    setting = Setting(folder=tmp_path, rounds=2, device="cuda:1", precision="bfloat16")
    assert (setting.exact_rounds, setting.steps) == (3, 7)
    made = job_of("ours", small("sft-tiny-varied"), "label", setting)
    assert made.device == "cuda"
    content = json.loads(recipe(made).read_text("utf-8"))
    assert content["model"]["dtype"] == "bfloat16"
    assert replace(setting, device="cpu").exact_rounds == 0


@needs_trl
def test_trl_gets_the_precision_and_is_left_alone_in_its_defaults(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from benchmarks import peer

    given: dict[str, Any] = {}
    monkeypatch.setattr(peer, "SFTConfig", lambda **options: given.update(options))
    monkeypatch.setattr(peer, "SFTTrainer", lambda *args, **options: None)
    tuned = job(small("sft-tiny-varied"), tmp_path, "trl")
    ours = {"bf16", "gradient_checkpointing", "model_init_kwargs"}
    expected = {
        "float32": (False, "float32", True), "tf32": (False, "float32", True), "bfloat16": (True, "bfloat16", True)
    }  # fmt: skip
    for precision, (brief, dtype, _) in expected.items():
        given.clear()
        peer.trainer(replace(tuned, precision=precision), peer.reward)
        assert (given["bf16"], given["gradient_checkpointing"], given["use_cpu"]) == (brief, False, True)
        assert given["model_init_kwargs"] == {"dtype": dtype}
    given.clear()
    peer.trainer(replace(tuned, side="trl defaults", device="cuda"), peer.reward)
    assert not ours & set(given)
    assert given["use_cpu"] is False


@needs_trl
def test_the_peers_stopwatch_waits_for_the_device_only_in_exact_rounds() -> None:
    from benchmarks.peer import Stopwatch

    waited: list[int] = []
    watch = Stopwatch(lambda: waited.append(1))
    work = watch.timed(lambda: 7, "loss")
    assert work() == 7 and not waited
    watch.exact = True
    assert work() == 7 and len(waited) == 2
    assert list(watch.parts) == ["loss"]


def test_our_side_reports_its_parts_and_waits_for_the_device_only_where_it_has_to(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A loop of two phases: the first turn is exact, so every span in it waits; after each step the device is waited
    for once; the reference's second, shared by four steps, is part of every step."""
    waited: list[int] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: waited.append(1))
    seen: list[int] = []

    def fill(*args: Any, num_phases: int, **kwargs: Any) -> Any:
        return SimpleNamespace(seconds=1.0)

    def train(*args: Any, **kwargs: Any) -> Iterator[Any]:
        for phase in (1, 2):
            before = len(waited)
            with span("loss"):
                pass
            seen.append(len(waited) - before)
            state = LoopState(seed=0, phase=phase, counters={"trained_tokens": 10.0 * phase})
            yield SimpleNamespace(state=state, metrics={"time/loss": 0.5, "time/step": 0.6, "time/collect": 0.1})

    monkeypatch.setattr(stage, "train", train)
    monkeypatch.setattr(stage, "fill_reference", fill)
    turns, told = iter([True, False, False]), list[dict[str, float]]()
    with gated(lambda: next(turns), lambda numbers, logged: told.append(numbers), "cuda"):
        stage.fill_reference(num_phases=4)
        assert len(list(stage.train())) == 2
    assert seen[0] > 0 and seen[1] == 0
    for numbers in told:
        assert {k: v for k, v in numbers.items() if k != "seconds"} == {
            "loss": 0.5, "reference": 0.25, "trained_tokens": 10.0
        }  # fmt: skip
        assert 0.25 < numbers["seconds"] < 0.5
    assert (stage.train, stage.fill_reference) == (train, fill)


def test_memory_of_a_gpu_is_the_worst_step_and_its_split_from_the_exact_rounds() -> None:
    found = Measured(
        rows=[{"seconds": 1.0, "loss": 0.1, "rss_mb": 900.0, "cuda_mb": m} for m in (50.0, 70.0, 60.0)],
        exact=[{"seconds": 2.0, "loss": 1.5, "rss_mb": 900.0, "cuda_mb": 80.0}],
    ).to_json()
    assert (found["seconds"], found["split_seconds"], found["parts"]) == (1.0, 2.0, {"loss": 1.5})
    assert found["memory_mb"] == 70.0


def test_medians_leave_out_what_a_row_does_not_have() -> None:
    assert medians([{"a": 1.0}, {"a": 3.0, "b": 5.0}, {"a": 2.0}]) == {"a": 2.0, "b": 5.0}


def test_a_worker_that_fails_says_where_its_log_is(tmp_path: Path) -> None:
    broken = Job(side="ours", case=small("sft-tiny-varied"), model=tmp_path / "none", folder=tmp_path / "x", steps=2)
    with pytest.raises(WorkerFailed, match=r"sft, ours failed \(.+\); its log is .*x\.log"):
        Worker(broken, "sft, ours", threads=1)


# ---- command line ----------------------------------------------------------------------------------------------------


def test_what_can_be_named() -> None:
    assert chosen([]) == (list(BY_NAME), [])
    assert chosen(["sft-g270", "grpo-tiny"]) == (["grpo-tiny", "sft-g270"], [])
    assert chosen(["scaling"]) == ([], list(AXES))
    assert chosen(["group", "ppo-tiny"]) == (["ppo-tiny"], ["group"])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["grpo-tny"], "no case 'grpo-tny'; did you mean 'grpo-tiny'?"),
        (["page", "scaling"], "page goes alone"),
        (["scaling", "--rounds", "0"], "--rounds has to be at least 1"),
        (["scaling", "--device", "tpu"], "no device 'tpu'; there are cpu and cuda"),
        (["scaling", "--precision", "tf32"], "tf32 is for GPUs"),
    ],
)
def test_what_cannot_be_measured_is_one_line(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("benchmarks: ") and said in line


def test_no_gpu_and_no_trl_are_said_before_anything_is_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for arguments, said in (
        (["--device", "cuda"], "no CUDA device"),
        (["sft-tiny-varied"], "pip install -e '.[conformance]'"),
    ):
        with pytest.raises(SystemExit) as stopped:
            main(arguments)
        assert stopped.value.code == 2
        assert said in capsys.readouterr().err


def test_ppo_is_held_against_our_own_grpo() -> None:
    assert opponent(BY_NAME["ppo-tiny"]) == (BY_NAME["grpo-tiny"], "ours")
    assert opponent(BY_NAME["sft-g270"]) == (BY_NAME["sft-g270"], "trl")
    assert opponent(BY_NAME["sft-g270"], defaults=True) == (BY_NAME["sft-g270"], "trl defaults")


# ---- all of it -------------------------------------------------------------------------------------------------------


@needs_trl
@pytest.mark.slow
@pytest.mark.parametrize("name", ["grpo-tiny", "dpo-tiny-varied", "reward_model-tiny-varied"])
def test_a_small_case_through_both_workers(name: str, tmp_path: Path) -> None:
    case = small(name, group=2 if name == "grpo-tiny" else 1)
    found = compare(case, MACHINE, Setting(folder=tmp_path, rounds=2))
    ours, peer = found["ours"], found["peer"]
    for one in (ours, peer):
        assert len(one["rounds"]) == 2 and min(one["rounds"]) > 0
        assert {"loss", "backward", "optimiser"} <= set(one["parts"])
        assert sum(one["parts"].values()) <= 1.2 * one["split_seconds"]
        assert 0 < one["memory_mb"] < 2000
        assert one["logged"]
    if case.sampled:
        assert {"sampling", "rewards"} <= set(ours["parts"]) & set(peer["parts"])
        assert ours["sampled_rows"] == peer["sampled_rows"] == 6
    else:  # the same rows in the same rounds
        assert ours["trained_tokens"] == peer["trained_tokens"] > 0
    assert found["floor"] > 0
    assert found["kernels"] == ready()
    about = record()["conditions"]
    assert f"| {name} | " in report.steps_table({name: {**found, "conditions": about}})
