"""What this machine cannot beat: its measured matrix products and reads -> the least seconds of a case's step.

The floor counts matrix products with the weights, and of sampling one read of all weights for every token of the mean
length, or the products if they take longer. The prompt counts once a group, the head on completion tokens only and
never again in the backward pass; no attention, no optimiser, no adapter. The body counts in full for every token,
though of a prompt the last layer's queries and MLP are not needed, and an implementation may skip them (ours does).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from benchmarks.cases import Case, config, data, lengths

DTYPES = {"float32": torch.float32, "tf32": torch.float32, "bfloat16": torch.bfloat16}
"""Precision -> type of the weights; tf32 is how an accelerator may multiply float32."""


@dataclass(frozen=True)
class Machine:
    """Rates of one device in one precision."""

    flops: float
    """Floating-point operations a second in large matrix products."""
    bandwidth: float
    """Bytes a second that are read from memory."""
    weight_bytes: int = 4
    """Bytes of a weight."""


def measure(device: torch.device, precision: str = "float32", seconds: float = 2.0) -> Machine:
    """The best of several tries of each, so that what else runs on the machine does not count."""
    allow(precision)
    dtype = DTYPES[precision]
    side = 1024 if device.type == "cpu" else 8192
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    product = _best(lambda: a @ b, device, seconds)
    x = torch.randn(2**26 if device.type == "cpu" else 2**28, device=device)  # 256 MB, 1 GB: beyond any cache
    read = _best(x.sum, device, seconds)
    return Machine(2 * side**3 / product, x.numel() * 4 / read, dtype.itemsize)


def allow(precision: str) -> None:
    """Lets float32 products round their factors to TF32, or not; for this process, whatever the side."""
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")


def _best(function: Callable[[], object], device: torch.device, seconds: float) -> float:
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        started = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - started)
    return best


def mean_lengths(case: Case, sampled: float | None = None) -> tuple[float, float]:
    """Mean tokens of a prompt and of a completion of the data; of a sampled one as was measured, else the limit."""
    found = [lengths(row) for row in data(case)]
    prompt = sum(p for p, _ in found) / len(found)
    if case.sampled:
        return prompt, case.completion_tokens if sampled is None else sampled
    return prompt, sum(c for _, c in found) / len(found) / (case.rows / case.items)


def floor(case: Case, machine: Machine, sampled: float | None = None) -> float:
    """Least seconds of a mean step of the case; see the module.

    Args:
        sampled: mean tokens of the completions that were sampled.
    """
    body, head = weights(case)
    prompt, completion = mean_lengths(case, sampled)
    in_body = case.items * prompt + case.rows * completion
    in_head = 0 if case.method == "reward_model" else case.rows * completion
    # a frozen weight costs one product forward and one backward, a trained one two backward
    backward = 1 if case.adapter else 2
    passes = (2 if case.method == "ppo" else 1) * (1 + backward)
    flops = 2 * body * in_body * passes + 2 * head * in_head * (1 + backward)
    if case.method == "dpo":  # the reference
        flops += 2 * body * in_body + 2 * head * in_head
    sampling = 0.0
    if case.sampled:
        read = machine.weight_bytes * (body + head) / machine.bandwidth
        each = max(read, 2 * (body + head) * case.rows / machine.flops)
        sampling = completion * each + 2 * body * case.items * prompt / machine.flops
        if case.method == "ppo":  # values and the reference of what was sampled
            flops += 2 * (2 * body * in_body) + 2 * head * in_head
    return flops / machine.flops + sampling


def weights(case: Case) -> tuple[int, int]:
    """Weights in the matrix products of all layers, and in the head."""
    c = config(case)
    dim = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    attention = c.hidden_size * dim * (2 * c.num_attention_heads + 2 * c.num_key_value_heads)
    return c.num_hidden_layers * (attention + 3 * c.hidden_size * c.intermediate_size), c.vocab_size * c.hidden_size
