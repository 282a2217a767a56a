"""AdamW's state on a device of its own: the same bits as without it, through training, checkpoints and resumes."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from alignlab.algorithms.grpo import GRPO
from alignlab.algorithms.ppo import PPO
from alignlab.algorithms.sft import SFT
from alignlab.checkpoint import load_checkpoint, save_checkpoint
from alignlab.optim import AdamWChoice, MasterAdamW, build_optimizers, clipped_step, parameters_of
from alignlab.train import train, trained_modules
from alignlab.types import LoopState
from tests.algorithms.world import Run, build_models, policy, source
from tests.runs import RECIPES, alignlab, files_of, rows, small_model

CONTRACT = {"what": "test_offload"}
METHODS: dict[str, tuple[Any, dict[str, Any]]] = {
    "sft": (SFT(examples_per_step=6, learning_rate=1e-2), {"dtype": torch.float32}),
    "sft bfloat16": (SFT(examples_per_step=6, learning_rate=1e-3), {"dtype": torch.bfloat16}),
    "sft float16": (SFT(examples_per_step=6, learning_rate=1e-3), {"dtype": torch.float16}),
    "grpo lora": (GRPO(prompts_per_phase=3, group_size=3, epochs=2, learning_rate=5e-3), {"lora": True}),
    "ppo": (PPO(prompts_per_phase=4, minibatches=2, learning_rate=5e-3, value_learning_rate=1e-2), {}),
    "ppo shared": (PPO(prompts_per_phase=4, value_learning_rate=1e-2, critic="shared"), {}),
}


def started(name: str, offload: bool) -> Run:
    algorithm, options = METHODS[name]
    models = build_models(algorithm, policy(0, **options))
    choice, device = AdamWChoice(weight_decay=0.01), torch.device("cpu") if offload else None
    optimizers = build_optimizers(algorithm.models(), models, choice, device=device)
    return Run(algorithm, models, optimizers, source(), LoopState(seed=42))


def weights(run: Run) -> dict[str, torch.Tensor]:
    return {f"{role}.{name}": p for role, model in run.models.items() if isinstance(model, nn.Module)
            for name, p in model.state_dict().items()}  # fmt: skip


def moments(run: Run) -> list[torch.Tensor]:
    return [
        value
        for optimizer in run.optimizers.values()
        for parameter in parameters_of(optimizer)
        for _, value in sorted({**optimizer.state[parameter], "stepped": parameter.detach()}.items())
    ]


def assert_same(one: Run, other: Run) -> None:
    assert weights(one).keys() == weights(other).keys()
    assert all(torch.equal(w, weights(other)[name]) for name, w in weights(one).items())
    assert all(torch.equal(a, b) for a, b in zip(moments(one), moments(other), strict=True))


@pytest.mark.parametrize("name", METHODS)
def test_the_same_bits_and_the_same_norms(name: str) -> None:
    """With several microbatches a step, clipping, weight decay, several roles, and a loss scale in float16."""
    plain, offloaded = (started(name, offload) for offload in (False, True))
    for run in (plain, offloaded):
        run.go(3)
    assert_same(plain, offloaded)
    for role, optimizer in offloaded.optimizers.items():
        assert len(optimizer.masters) == len(parameters_of(optimizer))
        norms = offloaded.column(f"{role}/grad_norm")
        assert norms == plain.column(f"{role}/grad_norm") and norms
    assert offloaded.column("loss/total") == plain.column("loss/total")


def test_where_things_are() -> None:
    """The model's parameters hold no gradient after a backward pass; the copies do, and every weight has one."""
    weight = nn.Parameter(torch.ones(2, 2))
    optimizer = MasterAdamW([{"params": [weight]}], device=torch.device("cpu"), lr=1.0, eps=0.0, weight_decay=0.0)
    ((master, parameter),) = optimizer.masters
    assert parameter is weight and master is not weight and master.data_ptr() != weight.data_ptr()
    for slope in (1.0, 2.0):
        (weight * slope).sum().backward()  # type: ignore[no-untyped-call]
        assert weight.grad is None
    assert master.grad is not None and master.grad.eq(3).all()
    assert clipped_step(optimizer, 1.0, 0.25) == 6.0  # the norm of four gradients of 3
    assert weight.eq(0.75).all() and torch.equal(weight, master)
    assert not optimizer.param_groups[0]["fused"]


def save(run: Run, folder: Path) -> Path:
    trained = trained_modules(run.models, run.algorithm.models())
    return save_checkpoint(folder, state=run.state, models=trained, optimizers=run.optimizers, contract=CONTRACT)


@pytest.mark.parametrize("name", ["sft", "sft bfloat16", "ppo shared"])
@pytest.mark.parametrize("before, after", list(itertools.product((False, True), repeat=2)))
def test_a_run_resumes_with_it_and_without(name: str, before: bool, after: bool, tmp_path: Path) -> None:
    """One phase, a checkpoint, and two more, in any of the four ways, end in the same bits as three at once."""
    whole, broken, resumed = started(name, False), started(name, before), started(name, after)
    whole.go(3)
    loop = train(broken.algorithm, broken.models, broken.optimizers, broken.source, broken.state, num_phases=3,
                 schedule=broken.schedule, tracker=broken.recorder)  # type: ignore[arg-type]  # fmt: skip
    broken.state = next(loop).state
    folder = save(broken, tmp_path)
    stored = load_file(folder / "optimizer.policy.safetensors")
    assert any(key.endswith(".master") for key in stored) == ("bfloat16" in name)  # a plain copy is not stored twice
    for parameter in resumed.models["policy"].parameters():
        parameter.data.add_(1)
    trained = trained_modules(resumed.models, resumed.algorithm.models())
    resumed.state = load_checkpoint(folder, models=trained, optimizers=resumed.optimizers, contract=CONTRACT)
    resumed.go(3)
    assert_same(whole, resumed)


def test_as_a_recipe_has_it(tmp_path: Path) -> None:
    """`train.offload_optimizer` through the command line: the same policy, and a run that takes it up half-way."""
    model = small_model(tmp_path / "model")
    common = ["train", RECIPES / "starter" / "sft.yaml", "--debug", "--quiet", f"model={model}"]
    on = "train.offload_optimizer=true"
    folders = {name: tmp_path / name for name in ("off", "on", "both")}
    assert alignlab(*common, "--output", folders["off"]).code == 0
    assert alignlab(*common, on, "--output", folders["on"]).code == 0
    assert alignlab(*common, "--output", folders["both"]).code == 0
    (folders["both"] / "stage.json").unlink()
    for newest in sorted((folders["both"] / "checkpoints").glob("phase-*"))[1:]:
        for file in sorted(newest.rglob("*"), reverse=True):
            file.unlink() if file.is_file() else file.rmdir()
        newest.rmdir()
    resumed = alignlab(*common, on, "--resume", "--output", folders["both"])
    assert resumed.code == 0, resumed.err
    policies = [files_of(folder / "policy") for folder in folders.values()]
    assert policies[0] == policies[1] == policies[2]
    losses = [[row.get("loss/total") for row in rows(f / "log_history.jsonl")] for f in folders.values()]
    assert losses[0] == losses[1] == losses[2]


def test_explain_says_so() -> None:
    said = alignlab("explain", RECIPES / "starter" / "sft.yaml", "train.offload_optimizer=true")
    assert said.code == 0 and "state and steps in the CPU's memory" in " ".join(said.out.split())
