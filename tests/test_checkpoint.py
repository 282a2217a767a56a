"""Checkpoints: everything comes back bit for bit, nothing half-written counts, what was tampered with is refused."""

import json
import os
import random
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from alignlab import checkpoint
from alignlab.algorithms.ppo import PPO
from alignlab.algorithms.reward_model import RewardModel
from alignlab.algorithms.sft import SFT
from alignlab.checkpoint import find_checkpoint, load_checkpoint, save_checkpoint, seal, verify
from alignlab.errors import UserError
from alignlab.train import trained_modules
from alignlab.types import LoopState
from tests.algorithms.world import Run, start_run

CONTRACT = {"seed": 42, "train.microbatch_rows": 4, "data": "abc", "names": ["a", "b"]}
STATE = LoopState(
    seed=42,
    phase=3,
    step=7,
    algorithm={"kl_coef": 0.1 + 0.2},
    learning_rate_factor={"policy": 1 / 3},
    counters={"trained_tokens": 1e15 + 1},
    stop_reason="",
    scaler={"scale": 2.0**-3, "good_steps": 1999.0, "skipped_steps": 19.0},
)


def save(run: Run, folder: Path, phase: int = 3, **options: Any) -> Path:
    trained = trained_modules(run.models, run.algorithm.models())
    state = replace(STATE, phase=phase)
    options = {"contract": CONTRACT, **options}
    return save_checkpoint(folder, state=state, models=trained, optimizers=run.optimizers, **options)


def load(run: Run, folder: Path, contract: Any = None) -> LoopState:
    trained = trained_modules(run.models, run.algorithm.models())
    return load_checkpoint(
        folder, models=trained, optimizers=run.optimizers, contract=CONTRACT if contract is None else contract
    )


def sft_run(seed: int = 42) -> Run:
    run = start_run(SFT(examples_per_step=4, learning_rate=1e-2), seed=seed)
    run.go(2)
    return run


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with checkpoints of phases 1, 2 and 3; tests work on copies."""
    folder, run = tmp_path_factory.mktemp("three"), sft_run()
    for phase in (1, 2, 3):
        save(run, folder, phase, keep=3)
    return folder


@pytest.fixture
def checkpoints(three: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(three, tmp_path / "checkpoints", symlinks=True))


# ---- there and back --------------------------------------------------------------------------------------------------


def tensors_of(run: Run) -> dict[str, torch.Tensor]:
    weights = {
        f"{r}.{k}": v
        for r, m in trained_modules(run.models, run.algorithm.models()).items()
        for k, v in m.state_dict().items()
    }
    states = {
        f"{role}.{i}.{k}": v
        for role, optimizer in run.optimizers.items()
        for i, p in enumerate(p for g in optimizer.param_groups for p in g["params"])
        for k, v in {**optimizer.state[p], "stepped": p.detach()}.items()
    }
    return weights | states


@pytest.mark.parametrize(
    "algorithm, options",
    [
        (SFT(examples_per_step=4, learning_rate=1e-2), {}),
        (SFT(examples_per_step=4, learning_rate=1e-2), {"lora": True}),
        (SFT(examples_per_step=4, learning_rate=1e-2), {"dtype": torch.bfloat16}),
        (RewardModel(pairs_per_step=4), {"lora": True}),
        (PPO(prompts_per_phase=4, value_learning_rate=1e-2), {}),
        (PPO(prompts_per_phase=4, value_learning_rate=1e-2, critic="shared"), {}),
        (PPO(prompts_per_phase=4, value_learning_rate=1e-2, critic="shared"), {"lora": True}),
    ],
    ids=["sft", "sft lora", "sft bfloat16", "reward model lora", "ppo own", "ppo shared", "ppo shared lora"],
)
def test_everything_comes_back_bit_for_bit(algorithm: Any, options: dict[str, Any], tmp_path: Path) -> None:
    run = start_run(algorithm, **options)
    run.go(2)
    if "reward_model" in run.models:
        run.models["reward_model"].set_normalisation(0.25, 3.0)
    folder = save(run, tmp_path)
    fresh = start_run(algorithm, start=0 if options.get("lora") else 1, **options)
    assert load(fresh, folder) == STATE
    expected, found = tensors_of(run), tensors_of(fresh)
    assert expected.keys() == found.keys() and len(expected) > 20
    for name, tensor in expected.items():
        assert torch.equal(tensor, found[name]) and tensor.dtype == found[name].dtype, name
    for role, optimizer in run.optimizers.items():
        ours, theirs = optimizer.state_dict()["param_groups"], fresh.optimizers[role].state_dict()["param_groups"]
        assert ours == theirs and all(type(g["betas"]) is tuple for g in theirs)


def test_masters_are_part_of_it(tmp_path: Path) -> None:
    """They hold what their weights in bfloat16 cannot, and a resume does not take the rounded weights for them."""
    run = start_run(SFT(examples_per_step=4, learning_rate=1e-4), dtype=torch.bfloat16)
    run.go(2)
    folder = save(run, tmp_path)
    stored = load_file(folder / "optimizer.policy.safetensors")
    assert sum(name.endswith(".master") for name in stored) == len(run.optimizers["policy"].masters) > 20
    fresh = start_run(SFT(examples_per_step=4, learning_rate=1e-4), dtype=torch.bfloat16, start=1)
    load(fresh, folder)
    pairs = list(zip(run.optimizers["policy"].masters, fresh.optimizers["policy"].masters, strict=True))
    for (master, weight), (same_master, same_weight) in pairs:
        assert torch.equal(master, same_master) and torch.equal(weight, same_weight)
        assert torch.equal(master.to(torch.bfloat16), weight)
    assert any(not torch.equal(master, weight.float()) for (master, weight), _ in pairs)
    assert not any(
        name.endswith(".master")
        for name in load_file(save(sft_run(), tmp_path / "full") / "optimizer.policy.safetensors")
    )


def test_a_role_that_has_not_started_has_an_empty_optimiser(tmp_path: Path) -> None:
    algorithm = PPO(prompts_per_phase=4, epochs=1, value_warmup_steps=100)
    run = start_run(algorithm)
    run.go(1)
    fresh = start_run(algorithm)
    load(fresh, save(run, tmp_path))
    assert not fresh.optimizers["policy"].state and fresh.optimizers["value_model"].state


def test_a_shared_trunk_is_saved_once(tmp_path: Path) -> None:
    run = start_run(PPO(prompts_per_phase=4, critic="shared"))
    run.go(1)
    folder = save(run, tmp_path)
    (head,) = (folder / "value_model").iterdir()
    with safe_open(str(head), "pt") as file:
        assert sorted(file.keys()) == ["bias", "scale", "shift", "weight"]


def test_only_safetensors_and_json(checkpoints: Path) -> None:
    assert {p.suffix for p in checkpoints.rglob("*") if p.is_file()} == {".safetensors", ".json"}


def draws() -> tuple[list[float], ...]:
    return [random.random(), random.gauss(0, 1)], [np.random.rand(), np.random.normal()], torch.rand(3).tolist()


def test_every_generator_goes_on_where_it_was(tmp_path: Path) -> None:
    """Saved between the two halves of a Box-Muller pair, of which Python and numpy keep the second one."""
    random.seed(1)
    np.random.seed(2)
    torch.manual_seed(3)
    draws()
    run = sft_run()
    random.gauss(0, 1)
    np.random.normal()
    folder = save(run, tmp_path)
    expected = draws()
    fresh = sft_run()
    draws()
    load(fresh, folder)
    assert draws() == expected
    assert draws() != expected


def test_saving_and_loading_draw_nothing(tmp_path: Path) -> None:
    run = sft_run()
    torch.manual_seed(0)
    before = torch.get_rng_state()
    folder = save(run, tmp_path)
    assert torch.equal(before, torch.get_rng_state())
    load(run, folder)
    assert torch.equal(before, torch.get_rng_state())


# ---- the contract ----------------------------------------------------------------------------------------------------


def test_tuples_are_lists_to_json(checkpoints: Path) -> None:
    assert load(sft_run(), checkpoints / "phase-000003", {**CONTRACT, "names": ("a", "b")}) == STATE


def test_differences_from_the_saved_run_are_named(checkpoints: Path) -> None:
    other = {"seed": 43, "data": "abc", "names": ["a", "b"], "model": "gemma"}
    with pytest.raises(UserError) as caught:
        load(sft_run(), checkpoints / "phase-000003", other)
    message = str(caught.value)
    assert "cannot resume" in message and "\n" not in message
    assert (
        "seed: 42 -> 43" in message
        and "train.microbatch_rows: 4 -> None" in message
        and "model: None -> 'gemma'" in message
    )
    assert "data" not in message.split("(")[1]


def test_a_refused_checkpoint_changes_nothing(checkpoints: Path) -> None:
    run = sft_run(seed=43)
    before = {k: v.clone() for k, v in tensors_of(run).items()}
    with pytest.raises(UserError):
        load(run, checkpoints / "phase-000003", {})
    assert all(torch.equal(v, before[k]) for k, v in tensors_of(run).items())


def test_another_format_is_refused(checkpoints: Path) -> None:
    path = checkpoints / "phase-000003" / "state.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 99}))
    with pytest.raises(UserError, match="checkpoint format 99, this version reads 1"):
        load(sft_run(), checkpoints / "phase-000003")


def test_weights_of_another_model_are_refused(checkpoints: Path) -> None:
    with pytest.raises(UserError):
        load(start_run(SFT(), lora=True), checkpoints / "phase-000003")


# ---- finding ---------------------------------------------------------------------------------------------------------


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


def replace_by_link(path: Path) -> None:
    elsewhere = path.parent.parent / "elsewhere"
    path.rename(elsewhere)
    path.symlink_to(elsewhere)


def edit_manifest(edit: Callable[[Any], Any]) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        manifest = path.parents[1] / "manifest.json"
        manifest.write_text(json.dumps(edit(json.loads(manifest.read_text()))))

    return damage


def escape(manifest: Any) -> Any:
    outside = {"size": 1, "sha256": "0"}
    return {**manifest, "files": {**manifest["files"], "../phase-000002/state.json": outside}}


WEIGHTS = "policy/model.safetensors"


@pytest.mark.parametrize(
    "damage, reason",
    [
        (lambda p: p.write_bytes(p.read_bytes()[:-100]), rf"{WEIGHTS} has \d+ bytes instead of \d+"),
        (lambda p: p.write_bytes(b""), rf"{WEIGHTS} has 0 bytes instead of"),
        (flip_a_bit, rf"{WEIGHTS} is damaged \(its sha256 differs\)"),
        (Path.unlink, rf"{WEIGHTS} is missing"),
        (replace_by_link, rf"{WEIGHTS} points outside the folder"),
        (lambda p: (p.parents[1] / "manifest.json").unlink(), r"no readable manifest.json \(FileNotFoundError\)"),
        (lambda p: (p.parents[1] / "manifest.json").write_text("{"), r"no readable manifest.json \(JSONDecodeError\)"),
        (edit_manifest(lambda m: []), r"no readable manifest.json \(TypeError\)"),
        (edit_manifest(lambda m: {}), r"no readable manifest.json \(KeyError\)"),
        (edit_manifest(lambda m: {"files": ["a"]}), r"no readable manifest.json \(AttributeError\)"),
        (edit_manifest(lambda m: {"files": {"a": {}}}), r"no readable manifest.json \(KeyError\)"),
        (edit_manifest(escape), "../phase-000002/state.json points outside the folder"),
        (edit_manifest(lambda m: {"files": {"/etc/passwd": {"size": 1, "sha256": "0"}}}), "/etc/passwd points outside"),
        (lambda p: (p.parent / "model-2.safetensors").write_bytes(b"x"), "policy/model-2.safetensors does not belong"),
        (lambda p: (p.parents[1] / "optimizer.pkl").write_bytes(b"x"), "optimizer.pkl does not belong to it"),
    ],
)  # fmt: skip
def test_a_damaged_checkpoint_is_skipped_with_its_reason(
    checkpoints: Path, damage: Callable[[Path], Any], reason: str
) -> None:
    """The one before it is used, and nothing is deleted."""
    damage(checkpoints / "phase-000003" / WEIGHTS)
    found = find_checkpoint(checkpoints)
    assert found.folder == checkpoints / "phase-000002"
    (skipped,) = found.skipped
    assert re.search(f"^phase-000003: {reason}", skipped), skipped
    assert (checkpoints / "phase-000003").is_dir()
    assert load(sft_run(), found.folder).phase == 2


def test_a_checkpoint_that_is_a_link_is_refused(checkpoints: Path) -> None:
    (checkpoints / "phase-000003").rename(checkpoints.parent / "elsewhere")
    (checkpoints / "phase-000003").symlink_to(checkpoints.parent / "elsewhere")
    found = find_checkpoint(checkpoints)
    assert found.folder == checkpoints / "phase-000002" and found.skipped == ("phase-000003: is a symbolic link",)


def test_all_damaged(checkpoints: Path) -> None:
    for phase in (1, 2, 3):
        flip_a_bit(checkpoints / f"phase-00000{phase}" / WEIGHTS)
    found = find_checkpoint(checkpoints)
    assert found.folder is None and [s[:12] for s in found.skipped] == ["phase-000003", "phase-000002", "phase-000001"]
    assert len(list(checkpoints.iterdir())) == 3


def test_nothing_there(tmp_path: Path) -> None:
    assert find_checkpoint(tmp_path / "none") == checkpoint.Found(None)


def test_what_is_no_checkpoint_is_not_looked_at(checkpoints: Path) -> None:
    (checkpoints / "phase-000003").rename(checkpoints / "phase-000003.bak")
    (checkpoints / ".partial-phase-000009").mkdir()
    (checkpoints / "phase-000002" / ".DS_Store").write_bytes(b"left by a file manager")
    found = find_checkpoint(checkpoints)
    assert found.folder == checkpoints / "phase-000002" and found.skipped == ()


def test_phases_are_numbers(checkpoints: Path) -> None:
    (checkpoints / "phase-000003").rename(checkpoints / "phase-1000000")
    (checkpoints / "phase-000002").rename(checkpoints / "phase-999999")
    assert find_checkpoint(checkpoints).folder == checkpoints / "phase-1000000"


def test_seal_and_verify_any_folder(tmp_path: Path) -> None:
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "a.json").write_text("{}")
    assert verify(tmp_path).startswith("no readable manifest.json")
    seal(tmp_path)
    assert verify(tmp_path) == ""
    (tmp_path / "README.md").write_text("a note of one's own does no harm")
    assert verify(tmp_path) == ""
    (tmp_path / "below" / "a.json").write_text("[]")
    assert verify(tmp_path) == "below/a.json is damaged (its sha256 differs)"


# ---- writing ---------------------------------------------------------------------------------------------------------

BREAKS = ("save_model", "_save_optimizer", "_save_rng", "_write_json", "seal", "file_hash", "_fsync")


@pytest.mark.parametrize("place", BREAKS)
@pytest.mark.parametrize("kind", ["kill", "disk"])
def test_a_failure_while_saving_leaves_the_previous_one(
    checkpoints: Path, monkeypatch: pytest.MonkeyPatch, place: str, kind: str
) -> None:
    """A kill leaves a partial folder, which the next save clears; a full disk leaves none and gets one clear line."""
    real = getattr(checkpoint, place)

    def breaks(*args: Any, **kwargs: Any) -> Any:
        real(*args, **kwargs)
        raise KeyboardInterrupt if kind == "kill" else OSError(28, "No space left on device")

    run, before = sft_run(), sorted(p.name for p in checkpoints.iterdir())
    monkeypatch.setattr(checkpoint, place, breaks)
    if kind == "kill":
        with pytest.raises(KeyboardInterrupt):
            save(run, checkpoints, 4, keep=1)
        assert ".partial-phase-000004" in os.listdir(checkpoints)
    else:
        with pytest.raises(
            UserError, match=r"phase-000004: cannot write .*No space left.*earlier ones are intact.*MiB"
        ):
            save(run, checkpoints, 4, keep=1)
        assert sorted(p.name for p in checkpoints.iterdir()) == before
    monkeypatch.undo()
    assert find_checkpoint(checkpoints) == checkpoint.Found(checkpoints / "phase-000003")
    save(run, checkpoints, 4, keep=9)
    assert sorted(p.name for p in checkpoints.iterdir()) == [*before, "phase-000004"]
    assert find_checkpoint(checkpoints).folder == checkpoints / "phase-000004"


def test_everything_is_on_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every file and folder is flushed, the manifest after what it lists; then the rename, and the folder around it."""
    events: list[str] = []
    fsync, rename = checkpoint._fsync, os.replace
    monkeypatch.setattr(checkpoint, "_fsync", lambda p: (events.append(p.name), fsync(p)))
    monkeypatch.setattr(os, "replace", lambda a, b: (events.append("rename"), rename(a, b)))
    folder = save(sft_run(), tmp_path / "checkpoints")
    files = {p.name for p in folder.rglob("*") if p.is_file()}
    at = events.index("rename")
    assert files <= set(events[:at]) and "policy" in events[:at] and ".partial-phase-000003" in events[:at]
    assert max(events.index(f) for f in files - {"manifest.json"}) < events.index("manifest.json")
    assert events[at + 1 :] == ["checkpoints"]


@pytest.mark.parametrize("keep, left", [(1, [5]), (2, [4, 5]), (0, [5]), (9, [1, 2, 3, 4, 5])])
def test_retention(checkpoints: Path, keep: int, left: list[int]) -> None:
    run = sft_run()
    for phase in (4, 5):
        save(run, checkpoints, phase, keep=9 if phase == 4 else keep)
    assert sorted(p.name for p in checkpoints.iterdir()) == [f"phase-00000{i}" for i in left]
    assert find_checkpoint(checkpoints).folder == checkpoints / "phase-000005"


def test_retention_never_counts_what_comes_later(checkpoints: Path) -> None:
    """Phase 3 is damaged, so the run went on from 2 and saves 2 again with keep=1: 3 must not push 2 out."""
    flip_a_bit(checkpoints / "phase-000003" / WEIGHTS)
    save(sft_run(), checkpoints, 2, keep=1)
    assert sorted(p.name for p in checkpoints.iterdir()) == ["phase-000002", "phase-000003"]
    assert find_checkpoint(checkpoints).folder == checkpoints / "phase-000002"


def test_a_damaged_one_is_replaced(checkpoints: Path) -> None:
    flip_a_bit(checkpoints / "phase-000003" / WEIGHTS)
    save(sft_run(), checkpoints, 3)
    assert find_checkpoint(checkpoints) == checkpoint.Found(checkpoints / "phase-000003")


def test_same_state_same_bytes(tmp_path: Path) -> None:
    a, b = (save(sft_run(), tmp_path / name) for name in "ab")
    files = sorted(p.relative_to(a) for p in a.rglob("*") if p.is_file())
    assert files == sorted(p.relative_to(b) for p in b.rglob("*") if p.is_file()) and len(files) > 6
    assert all((a / f).read_bytes() == (b / f).read_bytes() for f in files)
