"""KTO beside trl's KTOTrainer: same policy, same reference, same labelled completions, one optimiser step.

Both put every completion behind the prompt of the next one to see how far the policy has drifted (z0).
"""

import copy
import dataclasses
from typing import Any

import pytest
import torch

from alignlab.algorithms._preference import referenced
from alignlab.algorithms.kto import KTO, log_ratios
from alignlab.forward import score
from alignlab.rollout import Limits, encode_labelled
from alignlab.types import Batch, Labelled, Step
from tests.algorithms.world import MAX_TOKENS, PAIRS, Run, collect, nudge, template

pytest.importorskip("trl", reason="the extra `conformance` is not installed")

from tests.conformance.peer import STARTS, offline_trainer, our_run, our_step, peer_tokenizer, their_step
from tests.conformance.record import Measured, added, check, gap, split

pytestmark = pytest.mark.slow

PEER = "KTOTrainer"
BETA = 0.3
LIMITS = Limits(max_prompt_tokens=32, max_completion_tokens=MAX_TOKENS + 8, microbatch_rows=3)
ITEMS = [
    Labelled(prompt=pair.prompt, completion=pair.chosen if good else pair.rejected, label=good)
    for pair, good in zip(PAIRS, (True, False, True, True, False, True, True, False), strict=True)
]
"""Eight prompts, five good completions."""


def ours(start: Any, moved: float = 0.1, **options: Any) -> tuple[Run, Step]:
    """A step whose policy has left the reference before its reference point is measured."""
    run = our_run(
        KTO(**{"examples_per_step": 8, "beta": BETA} | options), start,
        microbatch_rows=3, labelled=encode_labelled(ITEMS, template(), LIMITS),
    )  # fmt: skip
    nudge(run.models["policy"], moved)
    (step,) = collect(run)
    return run, step


def theirs(run: Run, start: Any, accumulate: int = 1, seen: list[Any] | None = None, **options: Any) -> Measured:
    """Their step on the completions in the order our phase takes them."""
    items = run.source.phase_labelled(8, run.state)
    decode = peer_tokenizer().decode
    rows = [
        {"prompt": decode(i.row.prompt_ids), "completion": decode(i.row.completion_ids), "label": i.label}
        for i in items
    ]
    trainer = offline_trainer(
        PEER,
        copy.deepcopy(run.models["policy"]),
        rows,
        accumulate=accumulate,
        ref_model=copy.deepcopy(start),
        **{"beta": BETA} | options,
    )
    return their_step(trainer, seen=seen)


def reference_point(step: Step) -> float:
    found = step.microbatches[0].reference_point
    assert found is not None
    return float(found[0])


@pytest.mark.parametrize("model", STARTS)
@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.6, 1.5)], ids=str)
def test_losses(model: str, weights: tuple[float, float]) -> None:
    start = STARTS[model]()
    desirable, undesirable = weights
    run, step = ours(start, desirable_weight=desirable, undesirable_weight=undesirable)
    found = theirs(run, start, desirable_weight=desirable, undesirable_weight=undesirable)
    setting = f"weights {desirable:g} and {undesirable:g}"
    check("kto", setting, our_step(run, step), found, peer=PEER, where=split(model, 1, 8))


def test_a_drift_above_zero() -> None:
    """With a policy that likes what it is asked about better than the reference does, z0 is not held at 0."""
    for seed in range(20, 60):
        start = STARTS["gemma3"]()
        run = our_run(KTO(examples_per_step=8, beta=BETA), start, microbatch_rows=3,
                      labelled=encode_labelled(ITEMS, template(), LIMITS))  # fmt: skip
        nudge(run.models["policy"], 0.1, seed=seed)
        (step,) = collect(run)
        if reference_point(step) > 0.3:
            break
    assert reference_point(step) > 0.3
    found = theirs(run, start)
    where = split("gemma3", 1, 8)
    check("kto", f"z0 = {reference_point(step):.2g}", our_step(run, step), found, peer=PEER, where=where)
    forgotten = tuple(
        dataclasses.replace(b, reference_point=torch.zeros_like(b.reference_point))  # type: ignore[arg-type]
        for b in step.microbatches
    )
    assert not gap(our_step(run, dataclasses.replace(step, microbatches=forgotten)), found).small


def test_the_reference_point_is_the_steps() -> None:
    """Departure: theirs takes z0 from each microbatch, so it depends on the split; ours from the whole step."""
    start = STARTS["gemma3"]()
    run, step = ours(start)
    seen: list[dict[str, torch.Tensor]] = []
    found = theirs(run, start, accumulate=4, seen=seen)
    assert len(seen) == 4 and not gap(our_step(run, step), found).small
    parts = []
    for inputs in seen:  # ours with the reference points of their microbatches
        rows, others = (
            Batch(
                input_ids=inputs[f"{kind}input_ids"],
                attention_mask=inputs[f"{kind}attention_mask"].bool(),
                completion_mask=inputs[f"{kind}completion_mask"].bool(),
                labels=inputs["label"].bool(),
            )
            for kind in ("", "KL_")
        )
        rows, others = referenced(run.models, (rows, others))
        with torch.no_grad():
            drift = log_ratios(score(run.models["policy"], others).logprobs, others).mean().clamp(min=0)
        parts.append(our_step(run, Step((dataclasses.replace(rows, reference_point=drift.expand(len(rows))),), 8.0)))
    note = "ours with the z0 of each of their microbatches; ours of the step differs"
    check("kto", "z0 of each microbatch", added(parts), found, peer=PEER, where=split("gemma3", 4, 8), note=note)


def test_neighbours_of_one_prompt() -> None:
    """Departure: where the next row has the same prompt, ours takes the next other one; theirs that prompt itself."""
    start = STARTS["gemma3"]()
    both = [
        Labelled(prompt=p.prompt, completion=answer, label=good)
        for p in PAIRS[:4]
        for answer, good in ((p.chosen, True), (p.rejected, False))
    ]
    run = our_run(KTO(examples_per_step=8, beta=BETA), start, microbatch_rows=8,
                  labelled=encode_labelled(both, template(), LIMITS))  # fmt: skip
    nudge(run.models["policy"], 0.1, seed=21)
    (step,) = collect(run)
    rows = [item.row for item in run.source.phase_labelled(8, run.state)]
    assert any(a.prompt_ids == b.prompt_ids for a, b in zip(rows, rows[1:] + rows[:1], strict=True))
    found = theirs(run, start)
    assert not gap(our_step(run, step), found).small
    rotated = [dataclasses.replace(a, prompt_ids=b.prompt_ids) for a, b in zip(rows, rows[1:] + rows[:1], strict=True)]
    (others,) = referenced(run.models, run.source.plan_rows(rotated))
    with torch.no_grad():
        drift = log_ratios(score(run.models["policy"], others).logprobs, others).mean().clamp(min=0)
    pieces = tuple(dataclasses.replace(b, reference_point=drift.expand(len(b))) for b in step.microbatches)
    mine = our_step(run, dataclasses.replace(step, microbatches=pieces))
    note = "ours with the z0 of plain rotation, matching prompts included"
    check("kto", "neighbours of one prompt", mine, found, peer=PEER, where=split("gemma3", 1, 8), note=note)


def test_mutants() -> None:
    """Labels turned round; another weight or beta; the sum instead of the mean; no reference."""
    start = STARTS["gemma3"]()
    run, step = ours(start, undesirable_weight=1.5)
    right = theirs(run, start, undesirable_weight=1.5)
    assert gap(our_step(run, step), right).small

    def changed(**fields: Any) -> Measured:
        pieces = tuple(dataclasses.replace(b, **{k: f(b) for k, f in fields.items()}) for b in step.microbatches)
        return our_step(run, dataclasses.replace(step, microbatches=pieces))

    assert not gap(changed(labels=lambda b: ~b.labels), right).small
    assert not gap(changed(reference_point=lambda b: b.reference_point + 0.1), right).small
    assert not gap(changed(reference_logprobs=lambda b: torch.zeros_like(b.reference_logprobs)), right).small
    assert not gap(our_step(*ours(start)), right).small
    assert not gap(our_step(*ours(start, undesirable_weight=1.5, beta=0.2)), right).small
    assert not gap(our_step(run, dataclasses.replace(step, normaliser=1.0)), right).small
