"""The GRPO family beside trl's GRPOTrainer: same policy, reference, completions and rewards, one optimiser step.

Theirs forms its own advantages from the rewards. The logprobs of the sampling policy are those that our side recorded;
both policies have moved since, so ratios are not 1, some are clipped, and the KL to the reference is not 0.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from alignlab.algorithms.grpo import GRPO
from alignlab.forward import score
from alignlab.generate import Sampling
from alignlab.rollout import Reward
from alignlab.types import Completion, Phase, Prompt, Step
from tests.algorithms.world import Run, digit_share, nudge

pytest.importorskip("trl", reason="the extra `conformance` is not installed")

from tests.conformance.peer import STARTS, Online, online_trainer, our_run, our_step, their_step
from tests.conformance.record import Measured, added, check, gap, scaled, split

pytestmark = pytest.mark.slow

PEER = "GRPOTrainer"
LIMIT = 16
EPSILON = {"clip_low": 0.1, "clip_high": 0.05}
THEIR_EPSILON = {"epsilon": 0.1, "epsilon_high": 0.05}


def ours(
    *,
    model: str = "gemma3",
    temperature: float = 1.0,
    moved: float = 0.05,
    rewards: Sequence[Reward] = (),
    seed: int = 6,
    **options: Any,
) -> tuple[Run, Phase, Any]:
    """A phase of 4 x 3 completions, the policy having left the reference before it and the samples after it."""
    start = STARTS[model]()
    algorithm = GRPO(**{"prompts_per_phase": 4, "group_size": 3, "temperature": temperature} | EPSILON | options)
    sampling = Sampling(max_completion_tokens=LIMIT, temperature=temperature)
    given = {"rewards": list(rewards)} if rewards else {}
    run = our_run(algorithm, start, microbatch_rows=5, sampling=sampling, **given)
    nudge(run.models["policy"], 0.05, seed=seed)
    phase, run.state = algorithm.collect(run.models, run.source, run.state)
    nudge(run.models["policy"], moved)
    return run, phase, start


def theirs(run: Run, phase: Phase, start: Any, accumulate: int = 1, **options: Any) -> Online:
    given: dict[str, Any] = {"loss_type": "grpo", "temperature": run.algorithm.temperature} | THEIR_EPSILON | options
    if run.algorithm.kl_coef:
        given |= {"beta": run.algorithm.kl_coef, "reference": start}
    return online_trainer(PEER, run.models["policy"], phase.groups, accumulate=accumulate, limit=LIMIT, **given)


def advantages_agree(run: Run, phase: Phase, online: Online) -> None:
    """Ours, row by row, and those theirs made from the same rewards."""
    mine = {}
    for batch in phase.steps[0].microbatches:
        assert batch.advantages is not None
        for ids, attended, completion, advantage in zip(
            batch.input_ids, batch.attention_mask, batch.completion_mask, batch.advantages, strict=True
        ):
            mine[tuple(ids[attended].tolist())] = advantage[completion].mean()
    rows = online.by_row(online.scored)
    assert len(mine) >= 4
    for (prompt, completion), advantage in zip(rows, online.scored["advantages"], strict=True):
        if (row := (*prompt, *completion)) in mine:  # rows without a token in the loss are not in our batches
            torch.testing.assert_close(mine[row], advantage, rtol=1e-5, atol=1e-5)


NO_CORRECTION = {"use_bias_correction_kl": False}
"""trl multiplies the k3 of the loss by the ratio unless told otherwise (`test_kl_times_the_ratio`)."""
SEQUENCE = {"aggregation": "sequence"}
TOKEN = {"aggregation": "token"}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "sequence mean": (SEQUENCE, {"loss_type": "grpo"}, ""),
    "token mean": (TOKEN, {"loss_type": "dapo"}, ""),
    "constant (Dr. GRPO)": ({"variant": "dr_grpo"}, {"loss_type": "dr_grpo", "scale_rewards": "none"}, ""),
    "sequence mean, KL": (SEQUENCE | {"kl_coef": 0.1}, NO_CORRECTION, "trl: use_bias_correction_kl=False"),
    "token mean, KL": (
        TOKEN | {"kl_coef": 0.1}, NO_CORRECTION | {"loss_type": "dapo"}, "trl: use_bias_correction_kl=False"
    ),
    "constant, KL": (
        {"aggregation": "constant", "kl_coef": 0.1},
        NO_CORRECTION | {"loss_type": "dr_grpo"},
        "trl: use_bias_correction_kl=False",
    ),
    "scale batch": ({"scale": "batch"}, {"scale_rewards": "batch"}, ""),
    "scale none": ({"scale": "none"}, {"scale_rewards": "none"}, ""),
    "two-sided clip": ({"dual_clip": 1.1}, {"delta": 1.1}, "our dual_clip is trl's delta"),
    "DAPO": (
        {"variant": "dapo", "mask_truncated": False},
        {"loss_type": "dapo", "epsilon_high": 0.05},
        "the loss; truncated completions below",
    ),
    "GSPO": (
        {"variant": "gspo", "clip_low": 0.02, "clip_high": 0.01},
        {"importance_sampling_level": "sequence", "epsilon": 0.02, "epsilon_high": 0.01},
        "",
    ),
    "GSPO, token mean": (
        {"surrogate": "sequence", "clip_low": 0.02, "clip_high": 0.01} | TOKEN,
        {"importance_sampling_level": "sequence", "epsilon": 0.02, "epsilon_high": 0.01, "loss_type": "dapo"},
        "",
    ),
    "CISPO": (
        {"variant": "cispo", "clip_high": 0.1},
        {"loss_type": "cispo", "epsilon_high": 1.1},
        "trl's epsilon_high is the ceiling itself, ours 1 + clip_high",
    ),
    "temperature 0.7": ({"temperature": 0.7}, {}, ""),
}  # fmt: skip


@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize("case", CASES)
def test_losses(case: str, accumulate: int) -> None:
    options, peer_options, note = CASES[case]
    run, phase, start = ours(**options)
    online = theirs(run, phase, start, accumulate, **peer_options)
    found = their_step(online.trainer)
    (step,) = phase.steps
    advantages_agree(run, phase, online)
    where = split("gemma3", accumulate, 12)
    check("grpo", case, our_step(run, step), found, peer=PEER, where=where, note=note)


def test_llama() -> None:
    run, phase, start = ours(model="llama", kl_coef=0.1)
    found = their_step(theirs(run, phase, start, 2, **NO_CORRECTION).trainer)
    where, note = split("llama", 2, 12), "trl: use_bias_correction_kl=False"
    check("grpo", "sequence mean, KL", our_step(run, phase.steps[0]), found, peer=PEER, where=where, note=note)


def test_enough_is_clipped() -> None:
    """The comparisons above meet clipped ratios at both ends, and above the second bound."""
    run, phase, _ = ours(dual_clip=1.1)
    low = high = above = total = 0
    for batch in phase.steps[0].microbatches:
        with torch.no_grad():
            new = score(run.models["policy"], batch).logprobs
        assert batch.old_logprobs is not None and batch.advantages is not None
        mask, advantage = batch.completion_mask, batch.advantages
        ratio = torch.where(mask, (new - batch.old_logprobs).exp(), 1.0)
        low += int(((ratio < 0.9) & (advantage < 0)).sum())
        high += int(((ratio > 1.05) & (advantage > 0)).sum())
        above += int(((ratio > 1.1) & (advantage < 0)).sum())
        total += int(mask.sum())
    assert min(low, high, above) > 2 and low + high < 0.8 * total, (low, high, above, total)


def test_llama_and_gemma_differ() -> None:
    """The second model is another one."""
    first, second = (ours(model=m) for m in STARTS)
    assert our_step(first[0], first[1].steps[0]).loss != our_step(second[0], second[1].steps[0]).loss


# ---- advantages ------------------------------------------------------------------------------------------------------


def length(prompts: Sequence[Prompt], completions: Sequence[Completion]) -> list[float | None]:
    return [0.1 * len(x.token_ids) for x in completions]


def only_some(prompts: Sequence[Prompt], completions: Sequence[Completion]) -> list[float | None]:
    """Nobody's judge where a completion has an odd number of tokens."""
    return [None if len(x.token_ids) % 2 else len(x.text) / 10 for x in completions]


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_unjudged_completions(scale: str) -> None:
    """Without a reward: left out of means and deviations, advantage 0, still in the denominator."""
    rewards = [Reward(name="some", function=only_some, weight=1.0)]
    run, phase, start = ours(scale=scale, rewards=rewards)
    online = theirs(run, phase, start, scale_rewards=scale)
    found = their_step(online.trainer)
    assert int((online.scored["advantages"] == 0).sum()) >= 2
    advantages_agree(run, phase, online)
    check(
        "grpo",
        f"scale {scale}, some completions without a reward",
        our_step(run, phase.steps[0]),
        found,
        peer=PEER,
        where=split("gemma3", 1, 12),
    )


def test_components_normalised_one_by_one() -> None:
    """GDPO; the weights differ."""
    rewards = [
        Reward(name="digits", function=digit_share, weight=1.0),
        Reward(name="length", function=length, weight=0.3),
    ]
    run, phase, start = ours(normalise_components=True, rewards=rewards)
    peer = {"multi_objective_aggregation": "normalize_then_sum", "reward_weights": [1.0, 0.3]}
    online = theirs(run, phase, start, components=("digits", "length"), **peer)
    found = their_step(online.trainer)
    advantages_agree(run, phase, online)
    check("grpo", "GDPO, two components", our_step(run, phase.steps[0]), found, peer=PEER, where=split("gemma3", 1, 12))


def test_equal_rewards() -> None:
    """Departure: a group of equal rewards gives exactly 0 here; theirs divides the rounding of its mean by 1e-4."""
    rewards = [Reward(name="same", function=lambda p, c: [0.1 + 0.2] * len(c), weight=1.0)]
    run, phase, start = ours(rewards=rewards, group_size=6, prompts_per_phase=2)
    online = theirs(run, phase, start)
    their_step(online.trainer)
    assert 1e-5 < online.scored["advantages"].abs().max() < 1e-3
    for batch in phase.steps[0].microbatches:
        assert batch.advantages is not None and not batch.advantages.any()


def test_soft_overlong_penalty() -> None:
    """DAPO's penalty on length, beside trl's reward function of that name; ours is subtracted from the score."""
    run, phase, _ = ours(overlong_buffer=5)
    rollouts = [r for g in phase.groups for r in g.rollouts]
    costs = run.algorithm.penalties(phase.groups, torch.zeros(1), LIMIT)
    peer = pytest.importorskip("trl.rewards", reason="this trl has no rewards")
    penalty = peer.get_soft_overlong_punishment(max_completion_len=LIMIT, soft_punish_cache=5)
    theirs_of = penalty(completion_ids=[r.completion.token_ids for r in rollouts])
    assert len(set(theirs_of)) >= 3
    torch.testing.assert_close(-costs, torch.tensor(theirs_of), rtol=1e-6, atol=1e-6)


# ---- where the definitions differ ------------------------------------------------------------------------------------


@pytest.mark.parametrize("aggregation, loss_type", [("sequence", "grpo"), ("token", "dapo"), ("constant", "dr_grpo")])
def test_truncated_completions_masked(aggregation: str, loss_type: str) -> None:
    """Departure: ours leaves them out of the row counts too; theirs counts them as rows of zeros."""
    run, phase, start = ours(mask_truncated=True, aggregation=aggregation)
    kept = sum(len(b) for b in phase.steps[0].microbatches)
    assert 3 <= kept <= 9
    found = their_step(theirs(run, phase, start, loss_type=loss_type, mask_truncated_completions=True).trainer)
    mine = our_step(run, phase.steps[0])
    factor = 1.0 if aggregation == "token" else kept / 12
    assert gap(mine, found).small == (factor == 1)
    note = "" if factor == 1 else f"ours x {kept}/12: trl divides by all rows, ours by those in the loss"
    check("grpo", f"truncated masked, {aggregation}", scaled(mine, factor), found, peer=PEER,
          where=split("gemma3", 1, 12), note=note)  # fmt: skip


def test_kl_times_the_ratio() -> None:
    """Departure: by default theirs multiplies the KL of the loss by the ratio (DeepSeek-V3.2); ours is the paper's."""
    run, phase, start = ours(kl_coef=0.1)
    found = their_step(theirs(run, phase, start).trainer)
    assert not gap(our_step(run, phase.steps[0]), found).small


def test_bnpo_depends_on_the_split() -> None:
    """Departure: the token mean of each microbatch, averaged; ours is that of the step. One microbatch: the same."""
    run, phase, start = ours(aggregation="token")
    (step,) = phase.steps
    whole = their_step(theirs(run, phase, start, loss_type="bnpo").trainer)
    check("grpo", "`bnpo`", our_step(run, step), whole, peer=PEER, where=split("gemma3", 1, 12))
    online = theirs(run, phase, start, 4, loss_type="bnpo")
    found = their_step(online.trainer)
    assert not gap(our_step(run, step), found).small
    batch = run.source.batch(phase.groups)
    assert batch.old_logprobs is not None
    order = [(r.prompt_ids, r.completion.token_ids) for g in phase.groups for r in g.rollouts]
    parts = []
    for piece in online.trainer._buffered_inputs:
        rows = torch.tensor([order.index(row) for row in online.by_row(piece)])
        part = batch.select(rows)
        part = dataclasses.replace(part, advantages=piece["advantages"][:, None].expand_as(part.completion_mask))
        parts.append(our_step(run, Step((part,), 4.0 * float(part.completion_mask.sum()))))
    note = "ours with the mean of each microbatch as trl drew them; ours of the step differs"
    check("grpo", "`bnpo`", added(parts), found, peer=PEER, where=split("gemma3", 4, 12), note=note)


def test_entropy_bonus() -> None:
    """Theirs is always a token mean; ours is aggregated as the rest, so they meet at `aggregation: token`."""
    run, phase, start = ours(aggregation="token", entropy_coef=0.05)
    found = their_step(theirs(run, phase, start, loss_type="dapo", entropy_coef=0.05).trainer)
    check(
        "grpo",
        "token mean, entropy bonus",
        our_step(run, phase.steps[0]),
        found,
        peer=PEER,
        where=split("gemma3", 1, 12),
    )
    run, phase, start = ours(aggregation="sequence", entropy_coef=0.05)
    found = their_step(theirs(run, phase, start, entropy_coef=0.05).trainer)
    assert not gap(our_step(run, phase.steps[0]), found).small


# ---- the comparison can fail -----------------------------------------------------------------------------------------


def test_mutants() -> None:
    """Another aggregation, scale or clip; the KL forgotten; the ratio inverted; the stop token left out."""
    run, phase, start = ours(kl_coef=0.1, dual_clip=1.1)
    right = their_step(theirs(run, phase, start, delta=1.1, **NO_CORRECTION).trainer)
    (step,) = phase.steps
    assert gap(our_step(run, step), right).small
    for wrong in ({"aggregation": "token"}, {"aggregation": "constant"}, {"scale": "none"}, {"scale": "batch"},
                  {"clip_low": 0.2}, {"clip_high": 0.2, "dual_clip": 1.3}, {"dual_clip": None}, {"kl_coef": 0.0},
                  {"kl_estimator": "k2"}, {"baseline": "leave_one_out"}, {"surrogate": "sequence"}):  # fmt: skip
        other, fresh, _ = ours(**{"kl_coef": 0.1, "dual_clip": 1.1} | wrong)
        assert not gap(our_step(other, fresh.steps[0]), right).small, wrong

    def changed(**fields: Any) -> Measured:
        pieces = tuple(dataclasses.replace(b, **{k: f(b) for k, f in fields.items()}) for b in step.microbatches)
        return our_step(run, dataclasses.replace(step, microbatches=pieces))

    assert not gap(changed(old_logprobs=lambda b: 1.01 * b.old_logprobs), right).small
    assert not gap(changed(reference_logprobs=lambda b: b.old_logprobs), right).small
    prompts_too = {"completion_mask": lambda b: b.attention_mask, "shapes": lambda b: b.as_text().shapes}
    assert not gap(changed(**prompts_too), right).small
    assert not gap(our_step(run, dataclasses.replace(step, normaliser=11.0)), right).small
