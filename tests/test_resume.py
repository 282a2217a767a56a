"""A run broken off between two phases and resumed ends in the same checkpoint, byte for byte, as one that is not."""

import itertools
import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from alignlab.algorithms.dpo import DPO
from alignlab.algorithms.grpo import GRPO
from alignlab.algorithms.kto import KTO
from alignlab.algorithms.online_dpo import OnlineDPO
from alignlab.algorithms.orpo import ORPO
from alignlab.algorithms.ppo import PPO
from alignlab.algorithms.reward_model import RewardModel
from alignlab.algorithms.sft import SFT
from alignlab.algorithms.simpo import SimPO
from alignlab.checkpoint import find_checkpoint, load_checkpoint, save_checkpoint
from alignlab.models import frozen_copy
from alignlab.optim import Schedule
from alignlab.train import train, trained_modules
from tests.algorithms.world import Run, nudge, start_run

BROKEN_OFF, PHASES = 1, 3
CONTRACT = {"what": "test_resume"}
ADAPTIVE = {"prompts_per_phase": 6, "epochs": 2, "minibatches": 2, "learning_rate": 5e-3, "value_learning_rate": 1e-2,
            "kl_controller": "adaptive", "kl_horizon": 50, "value_warmup_steps": 4}  # fmt: skip
LORA = {"lora": True}
METHODS: dict[str, tuple[Any, dict[str, Any]]] = {
    "sft": (SFT(examples_per_step=6, learning_rate=1e-2), {"dropout": 0.2}),
    "sft lora": (SFT(examples_per_step=6, learning_rate=1e-2), {"dropout": 0.2, **LORA}),
    "sft float32": (SFT(examples_per_step=6, learning_rate=1e-2), {"dropout": 0.2, "dtype": torch.float32}),
    "reward_model": (RewardModel(pairs_per_step=6, learning_rate=1e-2), {}),
    "dpo": (DPO(pairs_per_step=6, learning_rate=1e-2), {}),
    "dpo lora": (DPO(pairs_per_step=6, learning_rate=1e-2), LORA),
    "dpo staged lora": (DPO(pairs_per_step=6, learning_rate=1e-2), {**LORA, "staged": True}),
    "simpo": (SimPO(pairs_per_step=6, learning_rate=1e-2), {}),
    "orpo lora": (ORPO(pairs_per_step=6, learning_rate=1e-2), LORA),
    "kto": (KTO(examples_per_step=6, learning_rate=1e-2), {}),
    "kto staged lora": (KTO(examples_per_step=6, learning_rate=1e-2), {**LORA, "staged": True}),
    "online dpo": (OnlineDPO(prompts_per_phase=3, group_size=3, epochs=2, learning_rate=5e-3), {}),
    "online dpo lora": (OnlineDPO(prompts_per_phase=3, group_size=3, score_normaliser="ema", learning_rate=5e-3), LORA),
    "ppo own": (PPO(**ADAPTIVE), {}),
    "ppo own lora": (PPO(**ADAPTIVE), LORA),
    "ppo shared": (PPO(**ADAPTIVE, critic="shared"), {}),
    "ppo shared lora": (PPO(**ADAPTIVE, critic="shared"), LORA),
    "grpo": (GRPO(prompts_per_phase=3, group_size=3, kl_coef=0.05, learning_rate=5e-3, epochs=2), {}),
    "grpo lora": (GRPO(prompts_per_phase=3, group_size=3, kl_coef=0.05, learning_rate=5e-3), LORA),
}


def build(name: str, seed: int = 42) -> Run:
    """Everything anew, as a new process would: nothing is left of an earlier run but what is on disk."""
    random.seed(os.urandom(8))
    np.random.seed(int.from_bytes(os.urandom(4), "little"))
    torch.manual_seed(int.from_bytes(os.urandom(7), "little"))
    algorithm, options = METHODS[name]
    staged = options.get("staged", False)
    run = start_run(algorithm, seed=seed, **{k: v for k, v in options.items() if k != "staged"})
    if staged:  # the run starts from a trained adapter, and its reference includes it
        nudge(run.models["policy"], 0.1)
        run.models["reference"] = frozen_copy(run.models["policy"])
    run.schedule = Schedule(shape="linear", warmup=0.3)
    return run


def go_on(run: Run, folder: Path, num_phases: int, *, save_every: bool = True) -> Path:
    """Trains until `num_phases` of the PHASES are finished, as if killed there; the newest checkpoint."""
    trained = trained_modules(run.models, run.algorithm.models())
    start = (run.algorithm, run.models, run.optimizers, run.source, run.state)
    loop = train(*start, num_phases=PHASES, schedule=run.schedule, tracker=run.recorder)  # type: ignore[arg-type]
    for finished in itertools.islice(loop, num_phases - run.state.phase):
        run.state = finished.state
        if save_every or run.state.phase == num_phases:
            save_checkpoint(
                folder, state=run.state, models=trained, optimizers=run.optimizers, contract=CONTRACT, keep=9
            )
    found = find_checkpoint(folder)
    assert found.folder is not None and not found.skipped
    return found.folder


def resume(run: Run, folder: Path) -> None:
    found = find_checkpoint(folder).folder
    assert found is not None
    trained = trained_modules(run.models, run.algorithm.models())
    run.state = load_checkpoint(found, models=trained, optimizers=run.optimizers, contract=CONTRACT)


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def rows(run: Run) -> list[dict[str, Any]]:
    """The log without its seconds."""
    return [{k: v for k, v in row.items() if not k.startswith("time/")} for row in run.recorder.rows]


@pytest.mark.parametrize("name", METHODS)
def test_resumed_is_uninterrupted(name: str, tmp_path: Path) -> None:
    straight = build(name)
    expected = contents(go_on(straight, tmp_path / "straight", PHASES, save_every=False))
    broken = build(name)
    go_on(broken, tmp_path / "broken", BROKEN_OFF)
    resumed = build(name)
    resume(resumed, tmp_path / "broken")
    found = contents(go_on(resumed, tmp_path / "broken", PHASES))

    assert found.keys() == expected.keys() and {"state.json", "rng.safetensors", "rng.json"} <= found.keys()
    assert [k for k in expected if found[k] != expected[k]] == []
    assert rows(broken) + rows(resumed) == rows(straight)

    # Not because nothing happens: a phase changes weights, optimiser and state.
    before = contents(tmp_path / "broken" / f"phase-{BROKEN_OFF:06d}")
    after = contents(tmp_path / "broken" / f"phase-{BROKEN_OFF + 1:06d}")
    changed = {k.split("/")[0].removesuffix(".safetensors") for k in before if before[k] != after[k]}
    trained = set(trained_modules(straight.models, straight.algorithm.models()))
    assert changed >= trained | {f"optimizer.{role}" for role in trained} | {"state.json"}


@pytest.mark.parametrize("name", ["sft", "ppo own", "grpo"])
def test_another_seed_is_another_run(name: str, tmp_path: Path) -> None:
    one, other = (contents(go_on(build(name, seed), tmp_path / str(seed), 1)) for seed in (42, 43))
    assert one["policy/model.safetensors"] != other["policy/model.safetensors"] or name == "ppo own"
    assert one["state.json"] != other["state.json"]
    assert any(one[k] != other[k] for k in one if k.startswith("optimizer."))


def test_the_adaptive_coefficient_is_part_of_the_state(tmp_path: Path) -> None:
    folder = go_on(build("ppo own"), tmp_path, PHASES)
    coefficient = json.loads((folder / "state.json").read_text())["state"]["algorithm"]["kl_coef"]
    assert coefficient not in (0.05, 0.0)


@pytest.mark.parametrize("forgotten", ["optimizer", "state", "weights", "critic"])
def test_a_resume_that_forgets_something_is_noticed(forgotten: str, tmp_path: Path) -> None:
    """The comparison has teeth: without one of its parts a resumed run ends elsewhere."""
    expected = contents(go_on(build("ppo own"), tmp_path / "straight", PHASES, save_every=False))
    go_on(build("ppo own"), tmp_path / "broken", BROKEN_OFF)
    run = build("ppo own")
    resume(run, tmp_path / "broken")
    if forgotten == "optimizer":
        run.optimizers = {k: torch.optim.AdamW(o.param_groups) for k, o in run.optimizers.items()}
    elif forgotten == "state":
        run.state = type(run.state)(seed=42, phase=run.state.phase, step=run.state.step)
    else:
        role = "policy" if forgotten == "weights" else "value_model"
        nudge(run.models[role], 1e-3)
    found = contents(go_on(run, tmp_path / "broken", PHASES))
    assert [k for k in expected if found.get(k) != expected[k]] != []


def test_resumed_in_another_process(tmp_path: Path) -> None:
    """With another hash seed, from nothing but the folder."""
    expected = contents(go_on(build("ppo shared lora"), tmp_path / "straight", PHASES, save_every=False))
    go_on(build("ppo shared lora"), tmp_path / "broken", BROKEN_OFF)
    code = (
        "import sys; from pathlib import Path; import torch; torch.set_num_threads(1)\n"
        "from tests.test_resume import PHASES, build, go_on, resume\n"
        "run, folder = build('ppo shared lora'), Path(sys.argv[1])\n"
        "resume(run, folder); go_on(run, folder, PHASES)"
    )
    root = Path(__file__).resolve().parents[1]
    environment = {
        **os.environ,
        "PYTHONHASHSEED": "12345",
        "PYTHONPATH": os.pathsep.join(map(str, (root, root / "src"))),
    }
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "broken")], check=True, env=environment, cwd=tmp_path)
    assert contents(tmp_path / "broken" / f"phase-{PHASES:06d}") == expected
