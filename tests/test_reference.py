"""Reference logprobs computed once: right, the same however and whenever they are asked for, and kept under all that
decides them; a damaged or missing file costs time and nothing else."""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from alignlab.algorithms.dpo import DPO
from alignlab.algorithms.kto import KTO, mismatched
from alignlab.algorithms.simpo import SimPO
from alignlab.data import collate
from alignlab.models import frozen_copy, make_reference
from alignlab.pipeline import reference as module
from alignlab.pipeline import run_recipe
from alignlab.pipeline.reference import (
    Filled,
    UsesReference,
    fill_reference,
    reference_key,
    run_rows,
    weights_fingerprint,
)
from alignlab.pipeline.stage import StageRun
from alignlab.recipe import load_recipe
from alignlab.types import LoopState
from tests.algorithms.world import nudge, numbers, policy, raw_logprobs, source, start_run
from tests.runs import alignlab, files_of, rows, small_model, write_rows
from tests.statistics.mutants import mutated
from tests.tolerances import FLOAT64

METHODS: dict[str, Any] = {"dpo": DPO(pairs_per_step=3), "kto": KTO(examples_per_step=3)}
SEED, PHASES = 42, 2


def fill(cache: Path, method: str = "dpo", *, model: Any = None, said: list[str] | None = None) -> Filled:
    lines: list[str] = [] if said is None else said
    return fill_reference(
        source(), METHODS[method], model if model is not None else policy(),
        seed=SEED, num_phases=PHASES, cache=cache, say=lines.append,
    )  # fmt: skip


def logprobs_in(path: Path) -> Any:
    """A copy, for what safetensors gives is a window on the file."""
    return load_file(path)["logprobs"].clone()


def file_of(cache: Path) -> Path:
    (path,) = (cache / "reference").iterdir()
    return path


def same(a: Filled, b: Filled) -> bool:
    one, other = a.source.reference, b.source.reference
    return one.keys() == other.keys() and all(torch.equal(one[row], other[row]) for row in one)


# ---- what is computed ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_every_row_of_the_run_has_its_logprobs(tmp_path: Path, method: str) -> None:
    """Each is the log-softmax of its completion's tokens, the row by itself; the microbatches bring them along."""
    filled, algorithm, model = fill(tmp_path, method), METHODS[method], policy()
    needed = {
        row for phase in range(PHASES) for row in algorithm.reference_rows(source(), LoopState(seed=SEED, phase=phase))
    }
    assert filled.source.reference.keys() == needed and 6 < len(needed) <= 12
    for row, found in filled.source.reference.items():
        assert_close(found.numpy(), numbers(raw_logprobs(model, collate([row])))[0], **FLOAT64)
    for phase in range(PHASES):
        run = start_run(algorithm)
        del run.models["reference"]
        run.source, run.state = filled.source, LoopState(seed=SEED, phase=phase)
        ((step,), _) = run.algorithm.collect(run.models, run.source, run.state)[0].steps, None
        for batch in step.microbatches:
            assert batch.reference_logprobs is not None
            for found_row, expected in zip(batch.reference_logprobs, raw_logprobs(model, batch), strict=True):
                assert_close(found_row[found_row != 0], expected.detach(), **FLOAT64)


def test_kto_needs_its_mismatched_rows_too(tmp_path: Path) -> None:
    algorithm, state = METHODS["kto"], LoopState(seed=SEED, phase=1)
    own = [item.row for item in source().phase_labelled(3, state)]
    assert {*own, *mismatched(own)} <= fill(tmp_path, "kto").source.reference.keys()
    assert isinstance(algorithm, UsesReference) and not isinstance(SimPO(), UsesReference)


def test_rows_are_in_an_order_of_their_own() -> None:
    """Whatever the phases' order is: two seeds whose phases use up all pairs have the same rows in the same order."""
    orders = [run_rows(source(), DPO(pairs_per_step=8), seed, 1) for seed in (1, 2)]
    assert orders[0] == orders[1] and len(orders[0]) == 16
    lengths = [len(row) for row in orders[0]]
    assert lengths == sorted(lengths, reverse=True)
    batches = source().plan_rows(orders[0])
    pieces = [row for b in batches for row in zip(b.input_ids, b.attention_mask, strict=True)]
    taken = [tuple(ids[mask].tolist()) for ids, mask in pieces]
    assert taken == [row.prompt_ids + row.completion_ids for row in orders[0]]


def test_the_view_with_the_adapter_off_is_the_reference_of_a_fresh_adapter(tmp_path: Path) -> None:
    """Numbers are the base model's, whatever the adapter has learned since; so a resumed run finds the same file."""
    adapted, said = policy(lora=True), list[str]()
    fresh = fill(tmp_path, model=make_reference(adapted, fresh_adapter=True))
    nudge(adapted, 0.3)
    later = fill(tmp_path, model=make_reference(adapted, fresh_adapter=True), said=said)
    assert same(fresh, later) and "are from" in said[0]
    for row, found in itertools.islice(fresh.source.reference.items(), 3):
        assert_close(found, raw_logprobs(policy(), collate([row]))[0].detach(), **FLOAT64)
    trained = fill(tmp_path, model=frozen_copy(adapted))
    assert not same(fresh, trained) and len(list((tmp_path / "reference").iterdir())) == 2


# ---- the file --------------------------------------------------------------------------------------------------------


def test_what_was_computed_is_found_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    first = fill(tmp_path, said=said)
    path = file_of(tmp_path)
    assert said[0] == f"reference: computing its logprobs of {len(first.source.reference)} rows"
    assert said[1].startswith("reference: took ") and said[1].endswith(f"kept in {path}") and len(said) == 2
    monkeypatch.setattr(module, "compute", lambda *_: pytest.fail("computed again"))
    again = fill(tmp_path, said=said)
    assert said[2] == f"reference: its logprobs of {len(first.source.reference)} rows are from {path}"
    assert same(first, again) and again.seconds == first.seconds > 0
    assert [p.name for p in path.parent.iterdir()] == [path.name]  # nothing half-written is left


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


def one_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def other_metadata(path: Path) -> None:
    save_file({"logprobs": logprobs_in(path)}, str(path))


def other_type(path: Path) -> None:
    save_file({"logprobs": logprobs_in(path).float()}, str(path), metadata={"key": path.stem, "seconds": "1"})


@pytest.mark.parametrize("damage", [cut_short, one_byte, emptied, other_metadata, other_type])
def test_a_damaged_file_is_computed_again(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    first, said = fill(tmp_path), list[str]()
    path = file_of(tmp_path)
    whole = logprobs_in(path)
    damage(path)
    again = fill(tmp_path, said=said)
    assert f"{path} is damaged" in said[0] and "computing" in said[0] and same(first, again)
    assert torch.equal(logprobs_in(path), whole)
    fill(tmp_path, said=said)
    assert "are from" in said[-1]


def test_the_file_of_something_else_is_not_believed(tmp_path: Path) -> None:
    """Two runs' files swapped by hand: the key inside tells."""
    fill(tmp_path)
    path = file_of(tmp_path)
    fill(tmp_path, model=policy(1))
    (other,) = set(path.parent.iterdir()) - {path}
    shutil.copy(other, path)
    said: list[str] = []
    fill(tmp_path, said=said)
    assert "is damaged" in said[0]


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path: Path) -> None:
    (tmp_path / "reference").write_text("a file where the folder should be")
    said: list[str] = []
    filled = fill(tmp_path, said=said)
    assert "cannot be written" in said[1] and "\n" not in said[1] and filled.source.reference


def test_the_key_holds_everything_that_decides_the_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    world = source()
    needed = run_rows(world, METHODS["dpo"], SEED, PHASES)
    moved, other_config = policy(), policy()
    with torch.no_grad():
        moved.model.norm.weight[3] += 1e-9
    other_config.config.sliding_window = 7
    keys = [
        reference_key(world, policy(), needed),
        reference_key(world, moved, needed),
        reference_key(world, other_config, needed),
        reference_key(world, policy(dtype=torch.float32), needed),
        reference_key(world, policy(), needed[1:]),
        reference_key(source(microbatch_rows=6), policy(), needed),
        reference_key(replace(world, template=replace(world.template, pad_id=1)), policy(), needed),
    ]
    monkeypatch.setattr(module, "code_fingerprint", lambda: "other code")
    keys.append(reference_key(world, policy(), needed))
    monkeypatch.undo()
    assert len(set(keys)) == len(keys)
    elsewhere = policy()
    elsewhere.config._name_or_path = "/somewhere/else"
    assert reference_key(world, elsewhere, needed) == keys[0]


def test_the_fingerprint_sees_every_weight_but_an_adapter_that_is_off() -> None:
    adapted = policy(lora=True)
    off, on = (make_reference(adapted, fresh_adapter=fresh) for fresh in (True, False))
    before = weights_fingerprint(off), weights_fingerprint(on)
    nudge(adapted, 0.1)
    assert weights_fingerprint(off) == before[0] != before[1]
    assert weights_fingerprint(frozen_copy(adapted)) != before[1]
    with torch.no_grad():
        adapted.get_base_model().model.norm.weight[0] += 1e-9
    assert weights_fingerprint(off) != before[0]


def test_two_processes_at_once_leave_one_good_file(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; import torch; torch.set_num_threads(1)\n"
        "from tests.test_reference import fill\n"
        "fill(Path(sys.argv[1]), 'kto')"
    )
    root = Path(__file__).resolve().parents[1]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (root, root / "src")))}
    command = [sys.executable, "-c", code, str(tmp_path)]
    both = [subprocess.Popen(command, env=environment, cwd=tmp_path, stderr=subprocess.PIPE) for _ in range(2)]
    for process in both:
        _, errors = process.communicate(timeout=240)
        assert process.returncode == 0, errors.decode()
    said: list[str] = []
    assert same(fill(tmp_path, "kto", said=said), fill(tmp_path / "own", "kto")) and "are from" in said[0]
    assert file_of(tmp_path)


# ---- runs ------------------------------------------------------------------------------------------------------------

SUMS = [
    {"prompt": f"{a} + {b}", "answer": str(a + b), "chosen": str(a + b), "rejected": "many " * (1 + b)}
    for a in range(5)
    for b in range(4)
]
RECIPE = """
model: {{name: {model}{adapter}}}
data: {{path: sums.jsonl, task: reasoning, max_completion_tokens: 8}}
algorithm: {{name: {method}, learning_rate: 1e-3}}
train: {{num_phases: 4, save_every: 1, keep_checkpoints: 9, microbatch_rows: 6}}
evaluation: {{prompts_per_task: 0}}
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_model(tmp_path_factory.mktemp("models") / "small")


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ALIGNLAB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def recipe_file(folder: Path, model: Path, method: str, adapter: str = "") -> Path:
    write_rows(folder / "sums.jsonl", SUMS)
    path = folder / "recipe.yaml"
    path.write_text(RECIPE.format(model=model, method=method, adapter=adapter), "utf-8")
    return path


SIZES = {"dpo": "algorithm.pairs_per_step=6", "kto": "algorithm.examples_per_step=9"}


@pytest.mark.parametrize("adapter", ["", ", adapter: lora"], ids=["full", "lora"])
@pytest.mark.parametrize("method", SIZES)
def test_a_resumed_run_is_the_uninterrupted_one(
    method: str, adapter: str, tmp_path: Path, model: Path, own_cache: Path
) -> None:
    """Byte for byte; with the cache at hand, and with the cache lost in between."""
    path, size = recipe_file(tmp_path, model, method, adapter), SIZES[method]
    whole = tmp_path / "whole"
    result = alignlab("train", path, size, "--output", whole)
    assert result.code == 0, result.err
    assert "reference: computing its logprobs of" in result.err
    expected = files_of(whole / "checkpoints" / "phase-000004")
    for lost in (False, True):
        broken = tmp_path / f"broken-{lost}"
        shutil.copytree(whole, broken)
        shutil.rmtree(broken / "policy")
        (broken / "stage.json").unlink()
        for phase in (3, 4):
            shutil.rmtree(broken / "checkpoints" / f"phase-{phase:06d}")
        if lost:
            shutil.rmtree(own_cache / "reference")
        result = alignlab("train", path, size, "--resume", "--output", broken)
        assert result.code == 0, result.err
        assert "resumed after phase 2 of 4" in result.err and ("are from" in result.err) == (not lost)
        assert files_of(broken / "checkpoints" / "phase-000004") == expected


def test_the_reference_leaves_memory_when_nothing_asks_for_it(
    tmp_path: Path, model: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[set[str]] = []
    loop = StageRun._loop

    def look(self: StageRun, models: Any, *arguments: Any) -> Any:
        seen.append(set(models))
        return loop(self, models, *arguments)

    monkeypatch.setattr(StageRun, "_loop", look)
    run_recipe(load_recipe(recipe_file(tmp_path, model, "kto"), [SIZES["kto"]]), tmp_path / "run", quiet=True)
    assert seen == [{"policy"}]


def test_the_first_loss_is_that_of_policy_and_reference_as_one(tmp_path: Path, model: Path, own_cache: Path) -> None:
    """Cached in other microbatches than trained in: rounding shows in neither the loss nor the accuracy."""
    for method, key, accuracy in (("dpo", 0.6931472, "preference/accuracy"), ("kto", 0.5, "kto/accuracy")):
        output = tmp_path / method
        run_recipe(load_recipe(recipe_file(tmp_path, model, method), [SIZES[method]]), output, quiet=True)
        first = rows(output / "log_history.jsonl")[0]
        assert first["loss/total"] == pytest.approx(key, abs=1e-6) and first[accuracy] == 0.5


def test_seconds_of_the_reference_are_in_the_ledger(tmp_path: Path, model: Path, own_cache: Path) -> None:
    """Also where they were found: a method costs what it costs, whoever ran before."""
    path = recipe_file(tmp_path, model, "dpo")
    for name in ("first", "second"):
        (result,) = run_recipe(load_recipe(path, [SIZES["dpo"]]), tmp_path / name, quiet=True)
        log = rows(tmp_path / name / "log_history.jsonl")
        inside = sum((row.get("time/collect") or 0) + (row.get("time/step") or 0) for row in log)
        (file,) = (own_cache / "reference").iterdir()
        with module.safe_open(str(file), framework="pt") as content:
            cost = float(content.metadata()["seconds"])
        assert result.ledger["seconds"] == pytest.approx(inside + cost) and cost > 0


@pytest.mark.parametrize(
    "text, replacement, test",
    [
        ('"weights": weights_fingerprint(reference),', "", "key"),
        ('"rows": digest.hexdigest(),', "", "key"),
        ('"microbatch_rows": source.limits.microbatch_rows,', "", "key"),
        ('"pad_id": source.template.pad_id,', "", "key"),
        ('"config": config,', "", "key"),
        ('"code": code_fingerprint(),', "", "key"),
        ("and ADAPTER_PARAMETER in name", "and False", "adapter"),
        ("(isinstance(model, AdapterOff) and ADAPTER_PARAMETER in name)", "(ADAPTER_PARAMETER in name)", "fingerprint"),
        ("row: (-len(row), row.prompt_ids, row.completion_ids)", "row: (len(row), row.prompt_ids)", "order"),
        ('said["sha256"] == hashlib.sha256(_bytes(logprobs)).hexdigest()', "True", "damage"),
        ('said.get("key") != key or', "", "swapped"),
    ],
)
def test_mutants_are_noticed(
    text: str, replacement: str, test: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed = mutated(module, text, replacement)
    for name in ("fill_reference", "reference_key", "run_rows", "weights_fingerprint"):
        monkeypatch.setitem(globals(), name, getattr(changed, name))
    monkeypatch.setitem(globals(), "module", changed)
    with pytest.raises(AssertionError):
        if test == "key":
            test_the_key_holds_everything_that_decides_the_numbers(monkeypatch)
        elif test == "adapter":
            test_the_view_with_the_adapter_off_is_the_reference_of_a_fresh_adapter(tmp_path)
        elif test == "fingerprint":
            test_the_fingerprint_sees_every_weight_but_an_adapter_that_is_off()
        elif test == "order":
            test_rows_are_in_an_order_of_their_own()
        elif test == "damage":
            test_a_damaged_file_is_computed_again(tmp_path, one_byte)
        else:
            test_the_file_of_something_else_is_not_believed(tmp_path)
