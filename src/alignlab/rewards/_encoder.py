"""A small reward model: a text encoder that reads prompt and completion together, and a scalar head on it.

Pairs -> Bradley-Terry training -> a folder of safetensors and JSON -> scores, normalised by what they were in training.

loss = - mean log sigmoid(s(prompt, chosen) - s(prompt, rejected)), with s = w . mean token vector + b. Only the order
of two scores is trained, so after training a shift and a scale, kept with the head, give those of the training
completions mean 0 and standard deviation 1, once and for all.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from random import Random
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from alignlab.errors import UserError
from alignlab.models import HEAD_FILE, pick_device
from alignlab.models.roles import seeded
from alignlab.rewards import _texts
from alignlab.types import Pair, Prompt

RECORD = "encoder_reward.json"
"""Says that a folder holds a trained encoder reward, and how it was trained."""
COMPLETION_SHARE = 0.75
"""Of the window, for the completion, where both together are too long."""
WARMUP = 0.1
HEAD_RATE = 20.0
"""The head starts at 0 and learns so many times as fast as the encoder."""


class EncoderReward(nn.Module):
    """An encoder with a scalar head. It reads the end of a prompt and the beginning of a completion that do not fit."""

    shift: Tensor
    scale: Tensor

    def __init__(self, reader: _texts.Reader, window: int) -> None:
        super().__init__()
        self.tokenizer, self.encoder, self.window = reader.tokenizer, reader.model, min(window, reader.window)
        self.head = nn.Linear(self.encoder.config.hidden_size, 1)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        self.register_buffer("shift", torch.zeros(()))
        self.register_buffer("scale", torch.ones(()))
        self.to(reader.device)

    def forward(self, prompts: Sequence[str], completions: Sequence[str]) -> Tensor:  # (n,)
        pairs = [self.fit(_texts.clean(p), _texts.clean(c)) for p, c in zip(prompts, completions, strict=True)]
        batch = self.tokenizer(
            [p for p, _ in pairs], [c for _, c in pairs], padding=True, truncation=True, max_length=self.window,
            return_tensors="pt",
        ).to(self.head.weight.device)  # fmt: skip
        hidden = self.encoder(**batch).last_hidden_state
        raw: Tensor = self.head(_texts.mean_tokens(hidden, batch["attention_mask"])).squeeze(-1)
        return (raw - self.shift) / self.scale

    def fit(self, prompt: str, completion: str) -> tuple[str, str]:
        """The two texts cut to the window: of the prompt its end stays, of the completion its beginning."""
        room = self.window - 4  # special tokens
        places = [self._places(text) for text in (prompt, completion)]
        for_completion = min(len(places[1]), max(room - len(places[0]), int(COMPLETION_SHARE * room)))
        for_prompt = room - for_completion
        if len(places[0]) > for_prompt:
            prompt = prompt[places[0][-for_prompt][0] :]
        if len(places[1]) > for_completion:
            completion = completion[: places[1][for_completion - 1][1]]
        return prompt, completion

    def _places(self, text: str) -> list[tuple[int, int]]:
        found = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        return list(found["offset_mapping"])

    def head_tensors(self) -> dict[str, Tensor]:
        return {"weight": self.head.weight, "bias": self.head.bias, "shift": self.shift, "scale": self.scale}


def text_of(prompt: Prompt) -> str:
    """A conversation as one text, a turn a line: `user: What is 2 + 3?`."""
    return "\n".join(f"{message.role}: {message.content}" for message in prompt.messages)


@torch.no_grad()
def scores(model: EncoderReward, prompts: Sequence[Prompt], completions: Sequence[str]) -> list[float]:
    """Normalised scores; those of similar length meet the model together."""
    order = sorted(range(len(completions)), key=lambda i: len(completions[i]))
    found = [0.0] * len(order)
    for start in range(0, len(order), _texts.ROWS):
        rows = order[start : start + _texts.ROWS]
        values = model([text_of(prompts[i]) for i in rows], [completions[i] for i in rows]).tolist()
        for i, value in zip(rows, values, strict=True):
            found[i] = value
    return found


# ---- on disk ---------------------------------------------------------------------------------------------------------


def check(folder: str) -> Path:
    """The folder of a trained encoder reward.

    Raises:
        UserError: it is none; nothing untrained is ever used.
    """
    path = Path(folder).expanduser()
    missing = [name for name in (RECORD, HEAD_FILE, "config.json", "model.safetensors") if not (path / name).is_file()]
    if missing:
        raise UserError(
            f"{folder}: no trained encoder reward ({missing[0]} is missing); train one with `alignlab reward encoder`"
        )
    return path


@lru_cache(maxsize=2)
def load(folder: str, device: str = "auto") -> EncoderReward:
    """A trained encoder reward, frozen; loaded once a process.

    Raises:
        UserError: the folder holds none, or its files are damaged.
    """
    path = check(folder)
    try:
        record = json.loads((path / RECORD).read_text("utf-8"))
        model = EncoderReward(_texts.read(str(path), "encoder", device), int(record["window"]))
        saved = load_file(str(path / HEAD_FILE))
        for name, tensor in model.head_tensors().items():
            tensor.data.copy_(saved[name].reshape(tensor.shape))
    except (ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{folder}: damaged ({type(error).__name__}: {error}); train it again") from error
    return model.requires_grad_(False).eval()


def save(model: EncoderReward, folder: Path, record: dict[str, Any]) -> None:
    """Writes encoder, tokenizer, head and record; the record last, as it says that all is there."""
    folder.mkdir(parents=True, exist_ok=True)
    model.encoder.save_pretrained(str(folder))
    model.tokenizer.save_pretrained(str(folder))
    save_file({k: v.detach().cpu().contiguous() for k, v in model.head_tensors().items()}, str(folder / HEAD_FILE))
    (folder / RECORD).write_text(json.dumps({**record, "window": model.window}, indent=1) + "\n", "utf-8")


# ---- training --------------------------------------------------------------------------------------------------------


def train_encoder(
    pairs: Sequence[Pair],
    held_out: Sequence[Pair],
    *,
    model: str = _texts.MINILM,
    output: Path,
    epochs: int = 2,
    batch_pairs: int = 16,
    learning_rate: float = 5e-5,
    window: int = 256,
    seed: int = 0,
    device: str = "auto",
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Trains an encoder reward on preference pairs and writes it to a new folder.

    Args:
        held_out: pairs that are only scored; their accuracy is part of the record.
        model: the encoder to start from: a folder, a hub id, or `minilm`.
        learning_rate: peak, of AdamW; rises over the first tenth of the steps and falls to 0 in a straight line.
        window: tokens that it reads at once.

    Returns:
        The record: counts, `accuracy` on the held-out pairs (of equal scores half count), and settings.

    Raises:
        UserError: the folder is in use, there are no pairs, or the model cannot be used or has learned nothing.
    """
    if output.exists() and any(output.iterdir()):
        raise UserError(f"{output}: already there; choose another --output")
    if not pairs or not held_out:
        raise UserError("encoder reward: needs pairs to train on, and others to hold out")
    reader = _texts.read.__wrapped__(_texts.find(model), "encoder", str(pick_device(device)))  # a copy to be trained
    reward = EncoderReward(reader, window).requires_grad_(True)
    groups = [
        {"params": list(reward.encoder.parameters()), "lr": learning_rate},
        {"params": list(reward.head.parameters()), "lr": HEAD_RATE * learning_rate},
    ]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.01)
    steps = epochs * math.ceil(len(pairs) / batch_pairs)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / max(1, WARMUP * steps), (steps - step) / max(1, steps * (1 - WARMUP)))
    )
    rng = Random(seed)
    reward.train()
    with seeded(seed):  # dropout
        for epoch in range(epochs):
            order, losses = rng.sample(range(len(pairs)), len(pairs)), []
            for start in range(0, len(order), batch_pairs):
                batch = [pairs[i] for i in order[start : start + batch_pairs]]
                asked = [text_of(pair.prompt) for pair in batch]
                values = reward([*asked, *asked], [*(p.chosen for p in batch), *(p.rejected for p in batch)])
                chosen, rejected = values.chunk(2)
                loss = -nn.functional.logsigmoid(chosen - rejected).mean()
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                nn.utils.clip_grad_norm_(reward.parameters(), 1.0)
                optimizer.step()
                schedule.step()
                losses.append(loss.item())
            say(f"epoch {epoch + 1} of {epochs}: loss {sum(losses) / len(losses):.4f} (ln 2 = {math.log(2):.4f}: none)")
    reward.requires_grad_(False).eval()
    _normalise(reward, pairs)
    accuracy = accuracy_of(reward, held_out)
    record = {
        "encoder": model, "pairs": len(pairs), "held_out": len(held_out), "accuracy": accuracy, "epochs": epochs,
        "batch_pairs": batch_pairs, "learning_rate": learning_rate, "seed": seed,
    }  # fmt: skip
    save(reward, output, record)
    return record


def _normalise(reward: EncoderReward, pairs: Sequence[Pair]) -> None:
    prompts = [pair.prompt for pair in pairs] * 2
    raw = torch.tensor(scores(reward, prompts, [*(p.chosen for p in pairs), *(p.rejected for p in pairs)]))
    scale = raw.std().item()
    if not (math.isfinite(scale) and scale > 1e-6):
        raise UserError("encoder reward: every training completion has the same score, so nothing was learned")
    reward.shift.fill_(raw.mean().item())
    reward.scale.fill_(scale)


def accuracy_of(reward: EncoderReward, pairs: Sequence[Pair]) -> float:
    """Share of pairs whose chosen completion scores higher; equal scores count half."""
    prompts = [pair.prompt for pair in pairs]
    chosen, rejected = (
        scores(reward, prompts, texts) for texts in ([p.chosen for p in pairs], [p.rejected for p in pairs])
    )
    return sum((c > r) + 0.5 * (c == r) for c, r in zip(chosen, rejected, strict=True)) / len(pairs)
