"""Optimisers and schedules: roles and their models -> AdamW, a learning rate for every phase, clipped steps."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from alignlab.types import Role


@dataclass(frozen=True, kw_only=True)
class AdamWChoice:
    """AdamW (arXiv:1711.05101) for every trained role."""

    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    """Applied to matrices only, never to norms and biases."""


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Learning rate over a run as a factor on each role's peak; a pure function of the phase."""

    shape: Literal["constant", "linear", "cosine"] = "constant"
    warmup: float = 0.0
    """Share of all phases in which the factor rises linearly from 0."""
    floor: float = 0.0
    """Factor that `linear` and `cosine` would reach in the phase after the last, so that the last one still learns."""

    def factor(self, phase: int, num_phases: int) -> float:
        """The factor in `phase` (0-based); the first phase of a warm-up is not wasted on 0."""
        warm = self.warmup * num_phases
        if phase < warm:
            return (phase + 1) / (math.floor(warm) + 1)
        progress = min(1.0, (phase - warm) / max(1.0, num_phases - warm))
        if self.shape == "linear":
            return 1 - (1 - self.floor) * progress
        if self.shape == "cosine":
            return self.floor + (1 - self.floor) * 0.5 * (1 + math.cos(math.pi * progress))
        return 1.0


def build_optimizers(
    roles: Mapping[str, Role], models: Mapping[str, nn.Module], choice: AdamWChoice
) -> dict[str, torch.optim.AdamW]:
    """One AdamW for every trained role; a parameter that two roles share belongs to the first."""
    optimizers: dict[str, torch.optim.AdamW] = {}
    owned: set[int] = set()
    for name, role in roles.items():
        if not role.trained:
            continue
        parameters = [p for p in models[name].parameters() if p.requires_grad and id(p) not in owned]
        owned |= {id(p) for p in parameters}
        groups = [
            {"params": [p for p in parameters if p.dim() > 1], "weight_decay": choice.weight_decay},
            {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
        ]
        optimizers[name] = torch.optim.AdamW(
            [g for g in groups if g["params"]],
            lr=role.learning_rate,
            betas=(choice.beta1, choice.beta2),
            eps=choice.eps,
        )
    return optimizers


def parameters_of(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    """The parameters an optimiser steps, in its own order."""
    return [p for group in optimizer.param_groups for p in group["params"]]


def clipped_step(optimizer: torch.optim.Optimizer, max_norm: float, learning_rate: float) -> float:
    """Scales the gradient down to `max_norm`, steps at `learning_rate`, and returns the norm before scaling.

    A gradient with NaN or infinity is not applied; its norm is returned as it is, for the caller to judge.
    """
    norm = nn.utils.clip_grad_norm_(parameters_of(optimizer), max_norm).item()
    if math.isfinite(norm):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        optimizer.step()
    return norm
