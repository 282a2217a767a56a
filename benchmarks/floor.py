"""What this machine cannot beat: its measured matrix products and reads -> the least seconds of a case's step.

The floor counts matrix products with the weights and one read of them for every sampled token; the prompt once a group,
the head on completion tokens only and never recomputed, no attention, no optimiser: what any exact implementation does.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from benchmarks.cases import Case, config


@dataclass(frozen=True)
class Machine:
    """Rates of one device in float32."""

    flops: float
    """Floating-point operations a second in large matrix products."""
    bandwidth: float
    """Bytes a second that are read from memory."""


def measure(device: torch.device, seconds: float = 2.0) -> Machine:
    """The best of several tries of each, so that what else runs on the machine does not count."""
    side = 1024 if device.type == "cpu" else 8192
    a, b = (torch.randn(side, side, device=device) for _ in range(2))
    product = _best(lambda: a @ b, device, seconds)
    x = torch.randn(2**26, device=device)  # 256 MB: beyond any cache
    read = _best(lambda: x.sum(), device, seconds)
    return Machine(flops=2 * side**3 / product, bandwidth=x.numel() * 4 / read)


def _best(function: object, device: torch.device, seconds: float) -> float:
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        started = time.perf_counter()
        function()  # type: ignore[operator]
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - started)
    return best


def floor(case: Case, machine: Machine) -> float:
    """Least seconds of one step of the case with mean lengths; see the module."""
    body, head = _weights(case)
    share = 9 / 16 if case.varied else 1.0  # mean of the uniform lengths over their maximum
    prompt, completion = share * case.prompt_tokens, share * case.completion_tokens
    rows = case.items * (2 if case.method in ("dpo", "reward_model") else case.group)
    in_body = case.items * prompt + rows * completion
    in_head = 0 if case.method == "reward_model" else rows * completion
    # a frozen weight costs one product forward and one backward, a trained one two backward
    backward = 1 if case.adapter else 2
    passes = (2 if case.method == "ppo" else 1) * (1 + backward)
    flops = 2 * body * in_body * passes + 2 * head * in_head * (1 + backward)
    if case.method == "dpo":  # the reference
        flops += 2 * body * in_body + 2 * head * in_head
    sampling = 0.0
    if case.method in ("grpo", "ppo"):
        each = max(4 * (body + head) / machine.bandwidth, 2 * (body + head) * rows / machine.flops)
        sampling = completion * each + 2 * body * case.items * prompt / machine.flops
        if case.method == "ppo":  # values and the reference of what was sampled
            flops += 2 * (2 * body * in_body) + 2 * head * in_head
    return flops / machine.flops + sampling


def _weights(case: Case) -> tuple[int, int]:
    """Weights in the matrix products of all layers, and in the head."""
    c = config(case.shape)
    dim = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    attention = c.hidden_size * dim * (2 * c.num_attention_heads + 2 * c.num_key_value_heads)
    return c.num_hidden_layers * (attention + 3 * c.hidden_size * c.intermediate_size), c.vocab_size * c.hidden_size
