"""On-policy distillation, `objective: full`, beside the divergence of trl's GKDTrainer (experimental) at beta 1.

Theirs is given the logits of both models on the samples of our student; the rest of its trainer samples for itself.
"""

import copy
from typing import Any

import pytest
import torch

from alignlab.algorithms.distill import Distill
from alignlab.generate import Sampling
from tests.algorithms.world import collect, nudge, policy

pytest.importorskip("trl", reason="the extra `conformance` is not installed")

from tests.conformance.peer import entry, gradients, our_run, our_step
from tests.conformance.record import Measured, check, gap

pytestmark = pytest.mark.slow

PEER = "GKDTrainer.generalized_jsd_loss"


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_full(temperature: float) -> None:
    student, teacher = policy(dtype=torch.float32), policy(3, dtype=torch.float32)
    algorithm = Distill(objective="full", prompts_per_phase=5, group_size=2, temperature=temperature)
    run = our_run(
        algorithm, student, microbatch_rows=3, sampling=Sampling(max_completion_tokens=12, temperature=temperature)
    )
    run.models["teacher"] = teacher
    (step,) = collect(run)
    nudge(run.models["policy"], 0.05)
    mine = our_step(run, step)
    theirs = {beta: jensen_shannon(run.models["policy"], teacher, step, temperature, beta) for beta in (0, 1)}
    check("distill", f"full, temperature {temperature:g}", mine, theirs[1], peer=PEER, where="gemma3, 4 microbatches")
    assert not gap(mine, theirs[0]).small  # the other direction


def jensen_shannon(student: Any, teacher: Any, step: Any, temperature: float, beta: float) -> Measured:
    divergence = entry("GKDTrainer").generalized_jsd_loss
    student = copy.deepcopy(student)
    student.zero_grad()
    total = 0.0
    for batch in step.microbatches:
        given = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask.long()}
        with torch.no_grad():
            judged = teacher(**given).logits[:, :-1]
        labels = batch.input_ids.masked_fill(~batch.completion_mask, -100)[:, 1:]
        loss = divergence(
            student(**given).logits[:, :-1], judged, labels=labels, beta=beta, temperature=temperature,
            num_items_in_batch=step.normaliser,
        )  # fmt: skip
        loss.backward()
        total += loss.item()
    return Measured(total, gradients(student))
