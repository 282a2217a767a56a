"""Golden trajectories: twenty optimiser steps of each method in the small float64 world -> tests/golden/METHOD.json.

    python -m tests.golden.record            # from the repository root; rewrites all files

Only a change that is meant to change the numbers rewrites them, and its commit says why. Losses and weight checksums
are kept to ten digits; sampled token ids must be the same, for float64 leaves a token no room to flip on another CPU.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from alignlab.algorithms.distill import Distill
from alignlab.algorithms.dpo import DPO
from alignlab.algorithms.grpo import GRPO
from alignlab.algorithms.kto import KTO
from alignlab.algorithms.online_dpo import OnlineDPO
from alignlab.algorithms.orpo import ORPO
from alignlab.algorithms.ppo import PPO
from alignlab.algorithms.rejection import Rejection
from alignlab.algorithms.reward_model import RewardModel
from alignlab.algorithms.sft import SFT
from alignlab.algorithms.simpo import SimPO
from alignlab.optim import Schedule
from alignlab.train import trained_modules
from tests.algorithms.world import Run, start_run

FOLDER = Path(__file__).parent
STEPS = 20
ONLINE = {"prompts_per_phase": 3, "group_size": 3, "learning_rate": 2e-3}
CRITIC = {"value_learning_rate": 5e-3, "epochs": 2, "minibatches": 2, "kl_controller": "adaptive", "kl_horizon": 200}
METHODS: dict[str, Any] = {
    "sft": SFT(examples_per_step=6, learning_rate=5e-3),
    "reward_model": RewardModel(pairs_per_step=6, learning_rate=2e-3, use_margin=True),
    "dpo": DPO(pairs_per_step=6, learning_rate=2e-3),
    "simpo": SimPO(pairs_per_step=6, learning_rate=2e-3),
    "orpo": ORPO(pairs_per_step=6, learning_rate=2e-3, odds_ratio_coef=0.5),
    "kto": KTO(examples_per_step=6, learning_rate=2e-3, beta=0.3, desirable_weight=1.2),
    "online_dpo": OnlineDPO(**ONLINE, beta=0.3, rpo_alpha=0.2),
    "ppo": PPO(**ONLINE, **CRITIC, value_warmup_steps=4),
    "ppo_shared": PPO(**ONLINE, **CRITIC, critic="shared", reward_placement="dense", entropy_coef=0.01),
    "ppo_potential": PPO(
        **ONLINE, **CRITIC, critic="reward_model", reward_placement="dense", dense_reward="potential", dual_clip=3.0
    ),
    "ppo_kl_loss": PPO(
        **ONLINE, **CRITIC, kl_placement="loss", kl_estimator="k2", score_normaliser="ema", whiten_rewards=True
    ),
    "grpo": GRPO(**ONLINE, kl_coef=0.04),
    "grpo_dr_grpo": GRPO(**ONLINE, variant="dr_grpo"),
    "grpo_dapo": GRPO(**ONLINE, variant="dapo", epochs=2, mask_truncated=False),  # else some phases have no steps
    "grpo_gspo": GRPO(**ONLINE, variant="gspo", epochs=2),
    "grpo_cispo": GRPO(**ONLINE, variant="cispo", epochs=2),
    "grpo_rloo": GRPO(**ONLINE, variant="rloo"),
    "grpo_components": GRPO(**ONLINE, normalise_components=True, missing_stop_penalty=0.5),
    "rejection": Rejection(**ONLINE),
    "distill": Distill(**ONLINE, gamma=0.9),
    "distill_full": Distill(**ONLINE, objective="full"),
}


def trajectory(name: str, disturb: Callable[[Run], None] = lambda run: None) -> dict[str, Any]:
    """Losses and checksums of every step, and the token ids sampled in every phase.

    Args:
        disturb: what to do to the run before it starts.
    """
    run = start_run(METHODS[name], microbatch_rows=8)
    run.schedule = Schedule(shape="cosine", warmup=0.2, floor=0.1)
    disturb(run)
    modules = trained_modules(run.models, run.algorithm.models())
    steps_a_phase = getattr(METHODS[name], "epochs", 1) * getattr(METHODS[name], "minibatches", 1)
    finished = run.go(STEPS // steps_a_phase, log_completions=10**6)
    assert len(finished) * steps_a_phase == STEPS == len(run.recorder.rows)
    return {
        "loss": [digits(loss) for loss in run.column("loss/total")],
        "grad_norm": [digits(norm) for norm in run.column(f"{next(reversed(modules))}/grad_norm")],
        "weights": {role: [digits(x) for x in checksums(module)] for role, module in modules.items()},
        "token_ids": [row["token_ids"] for row in run.recorder.samples],
    }


def digits(value: float) -> float:
    return float(f"{value:.10g}")


def checksums(module: torch.nn.Module) -> Iterator[float]:
    """The sum of sizes, and a sum in which places count differently, of all weights that are trained."""
    weights = torch.cat([p.detach().flatten() for p in module.parameters() if p.requires_grad])
    places = (torch.arange(len(weights), dtype=torch.float64) * 7919) % 1009 / 1009
    yield from (weights.abs().sum().item(), (weights * places).sum().item())


def main() -> None:
    torch.set_num_threads(1)
    for name in METHODS:
        text = json.dumps(trajectory(name), separators=(",", ":")).replace('],"', '],\n"')
        (FOLDER / f"{name}.json").write_text(text + "\n", "utf-8")
        print(f"wrote {name}.json, {len(text)} bytes")


if __name__ == "__main__":
    main()
