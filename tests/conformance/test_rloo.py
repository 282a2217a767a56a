"""RLOO, `{name: grpo, variant: rloo}`, beside trl's RLOOTrainer: same policy, reference, completions and rewards.

What both share is the advantage (leave-one-out, the k1 of the whole completion in the reward) and, on the policy that
sampled, the gradient. The losses are two different functions with that gradient: theirs has one ratio a completion, the
product of its tokens', and divides by rows; ours has a ratio a token and divides by rows x the completion limit.
"""

from typing import Any

import pytest
import torch

from alignlab.algorithms.grpo import GRPO
from alignlab.forward import score
from alignlab.generate import Sampling
from alignlab.types import Phase
from tests.algorithms.world import Run, nudge

pytest.importorskip("trl", reason="the extra `conformance` is not installed")

from tests.conformance.peer import STARTS, Online, online_trainer, our_run, our_step, their_step
from tests.conformance.record import Measured, check, gap, scaled, split
from tests.conformance.test_grpo import advantages_agree

pytestmark = pytest.mark.slow

PEER = "RLOOTrainer"
LIMIT = 16


def ours(*, model: str = "gemma3", moved: float = 0.0, **options: Any) -> tuple[Run, Phase, Any]:
    start = STARTS[model]()
    algorithm = GRPO(**{"variant": "rloo", "prompts_per_phase": 4, "group_size": 3} | options)
    run = our_run(algorithm, start, microbatch_rows=5, sampling=Sampling(max_completion_tokens=LIMIT))
    nudge(run.models["policy"], 0.05, seed=6)
    phase, run.state = algorithm.collect(run.models, run.source, run.state)
    if moved:
        nudge(run.models["policy"], moved)
    return run, phase, start


def theirs(run: Run, phase: Phase, start: Any, accumulate: int = 1, recorded: bool = False, **options: Any) -> Online:
    beta = run.algorithm.kl_coef
    given = {"beta": beta, "reference": start} if beta else {"beta": 0.0}
    policy = run.models["policy"]
    return online_trainer(PEER, policy, phase.groups, accumulate=accumulate, limit=LIMIT, recorded=recorded,
                          **given | options)  # fmt: skip


def loss_of_rows(run: Run, phase: Phase) -> tuple[float, float]:
    """-mean A_i and -mean A_i n_i over the completions, from our advantages: both losses on the sampling policy."""
    pairs = [
        (float(a[c].mean()), int(c.sum()))
        for b in phase.steps[0].microbatches
        if b.advantages is not None
        for a, c in zip(b.advantages, b.completion_mask, strict=True)
    ]
    assert len(pairs) == 12
    return -sum(a for a, _ in pairs) / 12, -sum(a * n for a, n in pairs) / 12


@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize("kl_coef", [0.0, 0.05, 0.5])
@pytest.mark.parametrize("model", STARTS)
def test_on_the_policy_that_sampled(model: str, kl_coef: float, accumulate: int) -> None:
    run, phase, start = ours(model=model, kl_coef=kl_coef)
    online = theirs(run, phase, start, accumulate)
    found = their_step(online.trainer)
    advantages_agree(run, phase, online)
    mine = scaled(our_step(run, phase.steps[0]), float(LIMIT))
    their_value, our_value = loss_of_rows(run, phase)
    assert found.loss == pytest.approx(their_value, abs=1e-5) and mine.loss == pytest.approx(our_value, rel=1e-5)
    note = f"gradient: ours x {LIMIT} (the limit); loss: -mean A of our advantages, while ours is -mean A n"
    where = split(model, accumulate, 12)
    check("rloo", f"KL in the reward, {kl_coef:g}", Measured(their_value, mine.gradient), found, peer=PEER,
          where=where, note=note)  # fmt: skip


def test_away_from_the_policy_that_sampled() -> None:
    """Departure: with epochs > 1, theirs has the ratio of the whole completion, clipped; ours one a token."""
    run, phase, start = ours(moved=0.05, clip_low=0.2, clip_high=0.2, kl_coef=0.0)
    found = their_step(theirs(run, phase, start, recorded=True).trainer)
    assert not gap(scaled(our_step(run, phase.steps[0]), float(LIMIT)), found).small
    total = torch.zeros(())
    run.models["policy"].zero_grad()
    for batch in phase.steps[0].microbatches:  # their definition, with our forward pass and our advantages
        assert batch.old_logprobs is not None and batch.advantages is not None
        mask = batch.completion_mask
        new = score(run.models["policy"], batch).logprobs
        ratio = torch.where(mask, new - batch.old_logprobs, 0.0).sum(-1).exp()
        advantage = batch.advantages.sum(-1) / mask.sum(-1)
        total = total - torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage).sum() / 12
    total.backward()  # type: ignore[no-untyped-call]
    by_hand = Measured(
        total.item(), {name: p.grad for name, p in run.models["policy"].named_parameters() if p.grad is not None}
    )
    note = "their sequence ratio written out here: ours has a ratio a token once epochs > 1"
    check("rloo", "off policy, clipped", by_hand, found, peer=PEER, where=split("gemma3", 1, 12), note=note)


def test_mutants() -> None:
    """The group's mean as baseline; the KL forgotten, doubled, or of another estimator; token mean."""
    run, phase, start = ours(kl_coef=0.5)
    found = their_step(theirs(run, phase, start).trainer)
    right = Measured(0.0, found.gradient)

    def same(run: Run, phase: Phase) -> bool:
        return gap(Measured(0.0, scaled(our_step(run, phase.steps[0]), float(LIMIT)).gradient), right).small

    assert same(run, phase)
    for wrong in ({"baseline": "group"}, {"kl_coef": 0.0}, {"kl_coef": 1.0}, {"kl_estimator": "k3"},
                  {"aggregation": "token"}, {"scale": "group"}):  # fmt: skip
        run, phase, _ = ours(**{"kl_coef": 0.5} | wrong)
        assert not same(run, phase), wrong
