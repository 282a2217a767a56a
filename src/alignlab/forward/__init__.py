"""The one place where a Batch meets a model: (model, Batch) -> (B, T) logprobs, entropies, values, KL, or (B,) scores.

The shift by one happens here and nowhere else: the state at index t - 1 predicts token t, is the state before action t,
and so gives both the logprob and the value at index t. Only completion positions are scored; elsewhere tensors hold 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
from torch import Tensor

from alignlab.forward.decoder import decode
from alignlab.forward.packed import Wanted, attend, make_layout, runs_packed
from alignlab.functional.divergence import reverse_kl
from alignlab.functional.logprobs import token_logprobs, token_logprobs_and_entropy
from alignlab.models import Model, ScalarModel, active, head, trunk, unwrap
from alignlab.timing import span
from alignlab.types import Batch

PACK = True
"""Whether models that can are run on packed rows. The plain way is the reference that tests compare with."""


@dataclass(frozen=True, slots=True)
class States:
    """The trunk's last hidden states of a batch, after its final norm, wherever they were computed."""

    flat: Tensor  # (N, H)
    place: Tensor  # (B, T) index into them; out of their range where no state was wanted

    def at(self, rows: Tensor, columns: Tensor) -> Tensor:
        """(M, H)

        Raises:
            IndexError: of a token whose state was not wanted.
        """
        try:
            return self.flat[self.place[rows, columns]]
        except IndexError as error:
            raise IndexError(
                "a state that was not computed: the batch's masks name other tokens than its `shapes`; replace both "
                "(shapes None: nothing is known of the rows)"
            ) from error


@dataclass(frozen=True, slots=True)
class Scores:
    """Logprobs of the taken tokens and, where asked for, the entropy of the distribution they were drawn from."""

    logprobs: Tensor  # (B, T) nats
    entropy: Tensor | None = None  # (B, T) nats


@span("body")
def trunk_states(model: Model, batch: Batch, wanted: Wanted = "all") -> States:
    """The trunk's states of a batch: packed into one row where the model can, else padded; see `packed`."""
    inner = unwrap(model)
    if PACK and batch.shapes is not None and runs_packed(trunk(model), inner):
        layout = make_layout(batch.shapes, batch.input_ids.shape[1], batch.input_ids.device, wanted)
        ids = batch.input_ids.flatten()[layout.tokens]
        with active(model):
            states = decode(trunk(model), ids, layout.positions, partial(attend, layout), layout.kept)
        return States(states, layout.state)
    states = padded_states(model, batch)
    place = torch.arange(states.shape[0] * states.shape[1], device=states.device).view(states.shape[:2])
    return States(states.flatten(0, 1), place)


def padded_states(model: Model, batch: Batch) -> Tensor:
    """The plain way: rows as they are, padding and all. (B, T, H); what padding holds means nothing."""
    mask = batch.attention_mask
    # Causal attention keeps what is padded on the right from being seen, so it needs no mask, which saves time, and no
    # position that attends to nothing, which some kernels answer with NaN.
    right_padded = bool((mask[:, 1:] <= mask[:, :-1]).all())
    with active(model):
        output = trunk(model)(
            input_ids=batch.input_ids,
            attention_mask=None if right_padded else mask,
            position_ids=torch.arange(mask.shape[1], device=mask.device)[None] if right_padded else positions(mask),
            use_cache=False,
        )
    return cast(Tensor, output.last_hidden_state)


def positions(attention_mask: Tensor) -> Tensor:
    """(B, T) mask -> (B, T) position ids that count attended tokens from 0, wherever they start."""
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)


def score(model: Model, batch: Batch, *, temperature: float = 1.0, entropy: bool = False) -> Scores:
    """Logprobs (and entropies) of the completion tokens at the given temperature; (B, T) each, 0 elsewhere."""
    return _score(model, trunk_states(model, batch, "actions"), batch, temperature, entropy)


def values(value_model: ScalarModel, batch: Batch) -> Tensor:
    """V of the state before each completion token, (B, T), 0 elsewhere."""
    return _values(value_model, trunk_states(value_model, batch, "actions"), batch)


def score_and_values(
    policy: Model, value_model: ScalarModel, batch: Batch, *, temperature: float = 1.0, entropy: bool = False
) -> tuple[Scores, Tensor]:
    """Both at once; one pass through the trunk where critic and policy share it."""
    states = trunk_states(policy, batch, "actions")
    value_states = states if value_model.backbone is policy else trunk_states(value_model, batch, "actions")
    return _score(policy, states, batch, temperature, entropy), _values(value_model, value_states, batch)


def score_and_divergence(
    policy: Model, teacher: Model, batch: Batch, *, temperature: float = 1.0, entropy: bool = False
) -> tuple[Scores, Tensor]:
    """The policy's scores, and KL(policy || teacher) of the next-token distribution before each completion token,
    (B, T), 0 elsewhere; the teacher gets no gradient. Both heads must have the same number of entries."""
    states = trunk_states(policy, batch, "actions")
    with torch.no_grad():
        teacher_states = trunk_states(teacher, batch, "actions")
    rows, columns = _scored(batch)
    top, teacher_top = head(policy), head(teacher)
    with span("head"):
        flat = reverse_kl(
            states.at(rows, columns - 1),
            top.weight,
            teacher_states.at(rows, columns - 1),
            teacher_top.weight,
            temperature=temperature,
            logit_softcap=top.softcap,
            teacher_logit_softcap=teacher_top.softcap,
        )
    return _score(policy, states, batch, temperature, entropy), _scatter(flat, rows, columns, batch)


def final_values(value_model: ScalarModel, batch: Batch) -> Tensor:
    """V of the state after the last attended token, (B,): what a cut-off completion is bootstrapped with."""
    return _at_last(value_model, batch)


def rewards(reward_model: ScalarModel, batch: Batch) -> Tensor:
    """Normalised scores, (B,), read at the last attended token by the attention mask, never by a pad id."""
    return (_at_last(reward_model, batch) - reward_model.shift) / reward_model.scale


def prefix_rewards(reward_model: ScalarModel, batch: Batch) -> Tensor:
    """Normalised scores of the prompt and the completion up to, not including, each completion token; (B, T), 0
    elsewhere. Of a model that was trained on whole completions, so it extrapolates."""
    raw = values(reward_model, batch)
    return torch.where(batch.completion_mask, (raw - reward_model.shift) / reward_model.scale, 0.0)


def _at_last(model: ScalarModel, batch: Batch) -> Tensor:
    columns = torch.arange(batch.attention_mask.shape[1], device=batch.attention_mask.device)
    last = (batch.attention_mask * columns).argmax(-1)
    states = trunk_states(model, batch, "last")
    return cast(Tensor, model(states.at(torch.arange(len(batch), device=last.device), last)))


def _scored(batch: Batch) -> tuple[Tensor, Tensor]:
    """Row and column indices of the scored tokens; index 0 has no predecessor and keeps logprob 0."""
    rows, columns = batch.completion_mask.nonzero(as_tuple=True)
    keep = columns > 0
    return rows[keep], columns[keep]


@span("head")
def _score(model: Model, states: States, batch: Batch, temperature: float, entropy: bool) -> Scores:
    rows, columns = _scored(batch)
    hidden, token_ids, top = states.at(rows, columns - 1), batch.input_ids[rows, columns], head(model)
    if not entropy:
        flat = token_logprobs(hidden, top.weight, token_ids, temperature=temperature, logit_softcap=top.softcap)
        return Scores(_scatter(flat, rows, columns, batch))
    flat, flat_entropy = token_logprobs_and_entropy(
        hidden, top.weight, token_ids, temperature=temperature, logit_softcap=top.softcap
    )
    return Scores(_scatter(flat, rows, columns, batch), _scatter(flat_entropy, rows, columns, batch))


@span("head")
def _values(model: ScalarModel, states: States, batch: Batch) -> Tensor:
    rows, columns = _scored(batch)
    return _scatter(model(states.at(rows, columns - 1)), rows, columns, batch)


def _scatter(flat: Tensor, rows: Tensor, columns: Tensor, batch: Batch) -> Tensor:
    """(N,) values -> (B, T), 0 where nothing was scored."""
    return flat.new_zeros(batch.input_ids.shape).index_put((rows, columns), flat)
