"""Peak memory does not grow with vocabulary x length: whole processes, measured by the kernel."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM, Gemma3TextConfig, PreTrainedModel

from alignlab.data import collate
from alignlab.forward import score, trunk_states
from alignlab.generate import Sampling, SamplingKey, generate
from alignlab.models import head
from alignlab.types import Batch, Row
from tests.stand_ins import random_ids

ROOT = Path(__file__).resolve().parents[1]
STATUS = Path("/proc/self/status")
VOCABULARY, WIDTH, ROWS, SHORT = 262_144, 32, 4, 48
LOGITS_MB = ROWS * SHORT * VOCABULARY * 4 / 2**20
"""What the logits of the tokens that are added would take: 192."""
KINDS = {"a trained head": False, "a frozen head": True}

pytestmark = pytest.mark.skipif(not STATUS.exists(), reason="the peak of a process is read from /proc")


def peak_mb() -> float:
    """Of this process since it began. (The usual ru_maxrss is also the parent's, from before the program began.)"""
    line = next(line for line in STATUS.read_text("utf-8").splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def model(frozen_head: bool) -> PreTrainedModel:
    torch.manual_seed(0)
    made = AutoModelForCausalLM.from_config(
        Gemma3TextConfig(
            vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=64, num_hidden_layers=2, head_dim=16,
            num_attention_heads=2, num_key_value_heads=1, sliding_window=16,
            layer_types=["sliding_attention", "full_attention"],
        )
    )  # fmt: skip
    made.get_output_embeddings().weight.requires_grad_(not frozen_head)
    return made


def batch(length: int) -> Batch:
    prompt = tuple(random_ids(8, seed=0)[0])
    rows = [Row(prompt_ids=prompt, completion_ids=tuple(random_ids(length, seed=i)[0])) for i in range(ROWS)]
    return collate(rows)


def train(policy: PreTrainedModel, length: int) -> None:
    policy.zero_grad()
    scores = score(policy, batch(length), entropy=True)
    assert scores.entropy is not None
    (scores.logprobs.sum() + 0.0 * scores.entropy.sum()).backward()


def train_with_logits(policy: PreTrainedModel, length: int) -> None:
    """The same as everybody writes it."""
    some = batch(length)
    states, top = trunk_states(policy, some), head(policy)
    rows, columns = some.completion_mask.nonzero(as_tuple=True)
    logits: Tensor = states.at(rows, columns - 1) @ top.weight.T
    F.cross_entropy(logits, some.input_ids[rows, columns], reduction="sum").backward()


def sample(policy: PreTrainedModel, length: int) -> None:
    generate(
        policy,
        [[1, 2, 3]],
        [SamplingKey(0, 0, "prompt")],
        Sampling(max_completion_tokens=length),
        num_samples=ROWS,
        stop_ids=frozenset(),
        pad_id=0,
    )


def main(work: str, frozen_head: str) -> None:
    """What the process of its own does: prints the peak after one length and after twice that."""
    torch.set_num_threads(1)
    policy = model(frozen_head == "True")
    for length in (SHORT, 2 * SHORT):
        globals()[work](policy, length)
        print(peak_mb())


def growth_mb(work: Callable[[PreTrainedModel, int], None], frozen_head: bool) -> float:
    """How much doubling the length adds to the peak of a new process."""
    command = [sys.executable, "-m", __name__, work.__name__, str(frozen_head)]
    ran = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert not ran.returncode, ran.stderr
    once, twice = map(float, ran.stdout.split())
    return twice - once


@pytest.mark.parametrize("kind", KINDS)
def test_a_training_step_holds_no_logits(kind: str) -> None:
    assert growth_mb(train, KINDS[kind]) < LOGITS_MB / 8


def test_sampling_holds_one_tokens_logits() -> None:
    assert growth_mb(sample, True) < LOGITS_MB / 8


def test_what_logits_would_take_is_seen() -> None:
    assert growth_mb(train_with_logits, True) > LOGITS_MB


if __name__ == "__main__":
    main(*sys.argv[1:])
