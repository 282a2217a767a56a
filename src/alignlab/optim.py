"""Optimisers and schedules: roles and their models -> AdamW, a learning rate for every phase, clipped steps.

Parameters in half precision are stepped as float32 copies, their gradients added up in float32 (arXiv:1710.03740).
Copies, gradients and moments may live on another device than the model (arXiv:2101.06840).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import nn

from alignlab.types import Role

HALF = (torch.bfloat16, torch.float16)
FIRST_SCALER: Mapping[str, float] = {"scale": 2.0**16, "good_steps": 0.0, "skipped_steps": 0.0}
"""The loss scale that float16 training starts with, the steps it has held, and the steps skipped so far."""
GOOD_STEPS = 2000
"""Steps without overflow after which the loss scale is doubled."""
LEAST_SCALE = 1e-4
"""A loss scale below this means that it is not the scale that overflows."""


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


class MasterAdamW(torch.optim.AdamW):
    """AdamW that steps a float32 copy (the master) of every parameter in half precision, and rounds it back.

    An update smaller than the rounding of a half-precision weight (1/256 of it in bfloat16) would be lost each time; in
    the master such updates add up. What a backward pass leaves in the parameter's gradient goes to the master's, in
    float32, and is dropped there and then. `param_groups` and `state` are those of the masters.

    Args:
        device: where masters, their gradients and moments live and steps are taken; every parameter then has a master,
            in its own type if that is not half precision. None: where the parameters are.
    """

    def __init__(
        self, groups: Iterable[Mapping[str, Any]], *, device: torch.device | None = None, **options: Any
    ) -> None:
        self.masters: list[tuple[nn.Parameter, nn.Parameter]] = []
        """(master, the model's parameter) pairs."""
        stepped = [{**g, "params": [self._stepped(p, device) for p in g["params"]]} for g in groups]
        # One pass over memory instead of ten, where it is the CPU that steps an accelerator's weights. Its rounding is
        # not the plain loop's, which stays wherever nothing has to move.
        moves = any(p.is_cuda and not master.is_cuda for master, p in self.masters)
        super().__init__(stepped, **{**options, "fused": True} if moves else options)

    def _stepped(self, parameter: nn.Parameter, device: torch.device | None) -> nn.Parameter:
        if parameter.dtype not in HALF and device is None:
            return parameter
        master = nn.Parameter(_copied(parameter.detach(), device or parameter.device))
        parameter.register_post_accumulate_grad_hook(partial(_hand_over, master))  # type: ignore[no-untyped-call]
        self.masters.append((master, parameter))
        return master

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        result = super().step(closure)
        for master, parameter in self.masters:
            parameter.copy_(master)
        return result


def _copied(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """On the device, in float32 if it is in half precision; in pinned memory, which moves fastest, if it comes from an
    accelerator."""
    dtype = torch.promote_types(tensor.dtype, torch.float32)
    pinned = tensor.is_cuda and device.type == "cpu"
    return torch.empty_like(tensor, dtype=dtype, device=device, pin_memory=pinned).copy_(tensor)


def _hand_over(master: nn.Parameter, parameter: torch.Tensor) -> None:
    """After each backward pass: the gradient moves to the master."""
    gradient = parameter.grad
    assert gradient is not None, "a parameter with a master has two optimisers"
    if gradient.dtype != master.dtype or gradient.device != master.device:
        gradient = _copied(gradient, master.device)
    master.grad = gradient if master.grad is None else master.grad.add_(gradient)
    parameter.grad = None


def build_optimizers(
    roles: Mapping[str, Role],
    models: Mapping[str, nn.Module],
    choice: AdamWChoice,
    *,
    device: torch.device | None = None,
) -> dict[str, MasterAdamW]:
    """One AdamW for every trained role; a parameter that two roles share belongs to the first.

    Args:
        device: where the optimisers keep what is theirs; None: with the models.
    """
    optimizers: dict[str, MasterAdamW] = {}
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
        optimizers[name] = MasterAdamW(
            [g for g in groups if g["params"]],
            lr=role.learning_rate,
            betas=(choice.beta1, choice.beta2),
            eps=choice.eps,
            device=device,
        )
    return optimizers


def parameters_of(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    """The parameters an optimiser steps (masters where it has some), in its own order."""
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


def unscale(optimizers: Iterable[torch.optim.Optimizer], scale: float) -> bool:
    """Divides all gradients by the loss scale, in place; False if one of them is infinite or NaN."""
    gradients = [p.grad for o in optimizers for p in parameters_of(o) if p.grad is not None]
    for gradient in gradients:
        gradient.div_(scale)
    return not gradients or bool(torch.stack([g.isfinite().all() for g in gradients]).all())


def next_scaler(scaler: Mapping[str, float], finite: bool) -> dict[str, float]:
    """The loss scaler after a step: halved by an overflow, doubled after every `GOOD_STEPS` steps without one."""
    if not finite:
        return {"scale": scaler["scale"] / 2, "good_steps": 0.0, "skipped_steps": scaler["skipped_steps"] + 1}
    good = scaler["good_steps"] + 1
    grown = good == GOOD_STEPS
    return {**scaler, "scale": scaler["scale"] * (2 if grown else 1), "good_steps": 0.0 if grown else good}
