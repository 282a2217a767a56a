"""The other side of the comparison: token rows and weights -> a real trl trainer -> the loss and gradient of its step.

Nothing of trl is computed again here. A trainer is built as its users build it (text in, its own tokenising, collating
and loss), runs one optimiser step, and a callback takes the gradients just before the update. Only what cannot be
compared is replaced: sampling, by the completions our side drew.
"""

from __future__ import annotations

import copy
import dataclasses
import importlib
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import datasets
import pytest
import torch
import trl
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, PrinterCallback, TrainerCallback

from alignlab.optim import AdamWChoice, build_optimizers
from alignlab.types import Batch, Group, LoopState, Step
from tests.algorithms.world import Run, build_models, fill, policy, source, template
from tests.conformance.record import Measured

datasets.disable_progress_bars()

SCRATCH = tempfile.TemporaryDirectory(prefix="alignlab-conformance-")
"""Where trainers may write and references are loaded from; gone when the session ends."""


# ---- ours ------------------------------------------------------------------------------------------------------------


def llama() -> Any:
    """A two-layer Llama over the world's tokens, with untied embeddings; float32."""
    like = policy(dtype=torch.float32).config
    config = LlamaConfig(
        vocab_size=like.vocab_size,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=2,
        eos_token_id=1,
    )
    model = LlamaForCausalLM(config)
    fill(model, 11)
    return model


def gemma() -> Any:
    """The world's two-layer Gemma 3 with a sliding window; float32."""
    return policy(dtype=torch.float32)


STARTS: dict[str, Callable[[], Any]] = {"gemma3": gemma, "llama": llama}


def our_run(algorithm: Any, start: Any, **of_source: Any) -> Run:
    """A run of ours on a copy of the starting model."""
    models = build_models(algorithm, copy.deepcopy(start))
    optimizers = build_optimizers(algorithm.models(), models, AdamWChoice())
    return Run(algorithm, models, optimizers, source(**of_source), LoopState(seed=42))


def our_step(run: Run, step: Step, role: str = "policy") -> Measured:
    """Loss and gradient of one optimiser step of ours, microbatch by microbatch, as the loop adds them up."""
    model = run.models[role]
    model.zero_grad()
    total = 0.0
    for batch in step.microbatches:
        output = run.algorithm.loss(run.models, batch, run.state)
        (output.total / step.normaliser).backward()
        total += output.total.item() / step.normaliser
    return Measured(total, gradients(model))


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Name -> gradient of each trained parameter, zero where the loss does not reach it."""
    return {
        name: torch.zeros_like(p) if p.grad is None else p.grad.detach().clone()
        for name, p in model.named_parameters()
        if p.requires_grad
    }


def texts(step: Step) -> list[tuple[str, str]]:
    """(prompt, completion) of every row, microbatch after microbatch, as text that trl tokenises to the same ids."""
    rows = []
    for batch in step.microbatches:
        for ids, attended, completion in zip(batch.input_ids, batch.attention_mask, batch.completion_mask, strict=True):
            tokens = ids[attended].tolist()
            first = int(completion.int().argmax())
            prompt, answer = (peer_tokenizer().decode(part) for part in (tokens[:first], tokens[first:]))
            assert peer_tokenizer()(prompt)["input_ids"] == tokens[:first]
            assert peer_tokenizer()(prompt + answer)["input_ids"] == tokens
            rows.append((prompt, answer))
    return rows


def paired_texts(step: Step) -> list[dict[str, str]]:
    """prompt, chosen and rejected of every pair, microbatch after microbatch."""
    pairs = []
    for batch in step.microbatches:
        rows = texts(Step((batch,), 1.0))
        half = len(rows) // 2
        for (prompt, chosen), (same, rejected) in zip(rows[:half], rows[half:], strict=True):
            assert prompt == same
            pairs.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    return pairs


def without_last_token(batch: Batch) -> Batch:
    """A mutant's batch: the completion's last token, the stop, is not trained."""
    mask = batch.completion_mask
    ends = mask & ~torch.cat([mask[:, 1:], torch.zeros_like(mask[:, :1])], 1)
    return dataclasses.replace(batch, completion_mask=mask & ~ends)


# ---- theirs ----------------------------------------------------------------------------------------------------------


@cache
def peer_tokenizer() -> PreTrainedTokenizerFast:
    """The world's tokenizer with the end of a turn as its end of sequence, which trl appends to plain text."""
    tokenizer = copy.deepcopy(template().tokenizer)
    tokenizer.eos_token = "<end_of_turn>"
    return tokenizer


def entry(name: str) -> Any:
    """A class of trl, from where this version has it; a skip where it has none."""
    for place in ("trl", f"trl.experimental.{name.removesuffix('Trainer').removesuffix('Config').lower()}"):
        try:
            return getattr(importlib.import_module(place), name)
        except (ModuleNotFoundError, AttributeError):
            continue
    pytest.skip(f"trl {trl.__version__} has no {name}")


def arguments(config: str, **options: Any) -> Any:
    """A trl configuration for one exact step on the CPU; a skip where this version does not know an option."""
    made = entry(config)
    known = {field.name for field in dataclasses.fields(made)}
    if missing := sorted(set(options) - known):
        pytest.skip(f"{config} of trl {trl.__version__} has no {', '.join(missing)}")
    usual: dict[str, Any] = {
        "output_dir": tempfile.mkdtemp(dir=SCRATCH.name),
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "max_steps": 1,
        "learning_rate": 0.0,
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "logging_strategy": "no",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "disable_dropout": True,
    }
    return made(**{k: v for k, v in usual.items() if k in known} | options)


class TakeGradient(TrainerCallback):
    """Copies the gradients of a step where they are complete and nothing has used them."""

    gradient: Mapping[str, Tensor] | None = None

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, *, model: Any = None, **_: Any) -> None:
        self.gradient = gradients(model)


def their_step(trainer: Any, seen: list[Any] | None = None) -> Measured:
    """One optimiser step of a trl trainer: the sum of the losses it steps on, and the gradient they add up to.

    Args:
        seen: is given each microbatch that the trainer's collator made.
    """
    taken, losses = TakeGradient(), []
    trainer.add_callback(taken)
    trainer.remove_callback(PrinterCallback)
    step = trainer.training_step

    def training_step(*given: Any, **options: Any) -> Tensor:
        if seen is not None:
            seen.append({k: v for k, v in given[1].items() if isinstance(v, Tensor)})
        loss: Tensor = step(*given, **options)
        losses.append(loss.item())
        return loss

    trainer.training_step = training_step
    trainer.train()
    assert taken.gradient is not None and len(losses) == trainer.args.gradient_accumulation_steps
    return Measured(sum(losses), dict(taken.gradient))


def offline_trainer(
    name: str, model: Any, rows: Sequence[Mapping[str, Any]], *, accumulate: int = 1, **given: Any
) -> Any:
    """A trainer whose one step takes all the rows, in `accumulate` microbatches; its reference is `ref_model`."""
    config = f"{name.removesuffix('Trainer')}Config"
    assert len(rows) % accumulate == 0
    models = {k: given.pop(k) for k in ("ref_model",) if k in given}
    return entry(name)(
        model=model,
        args=arguments(
            config,
            per_device_train_batch_size=len(rows) // accumulate,
            gradient_accumulation_steps=accumulate,
            **given,
        ),
        train_dataset=datasets.Dataset.from_list([dict(row) for row in rows]),
        processing_class=peer_tokenizer(),
        **models,
    )


@dataclasses.dataclass(frozen=True)
class Sampled:
    """One completion as both sides learn from it."""

    ids: tuple[int, ...]
    reward: float
    components: tuple[float, ...]
    old_logprobs: tuple[float, ...]


@dataclasses.dataclass
class Online:
    """A trl trainer whose sampler hands out given completions, and what it made of them."""

    trainer: Any
    prompts: dict[tuple[int, ...], list[Sampled]]
    scored: dict[str, Any] = dataclasses.field(default_factory=dict)

    def by_row(self, batch: Mapping[str, Tensor]) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
        """(prompt ids, completion ids) of the rows of a batch of theirs."""
        return [
            (tuple(p[m.bool()].tolist()), self._completion(c))
            for p, m, c in zip(batch["prompt_ids"], batch["prompt_mask"], batch["completion_ids"], strict=True)
        ]

    def _completion(self, ids: Tensor) -> tuple[int, ...]:
        tokens = tuple(ids.tolist())
        known = {s.ids for siblings in self.prompts.values() for s in siblings}
        (found,) = {t for n in range(1, len(tokens) + 1) if (t := tokens[:n]) in known and not any(tokens[n:])}
        return found


def online_trainer(
    name: str,
    model: Any,
    groups: Sequence[Group],
    *,
    reference: Any = None,
    accumulate: int = 1,
    limit: int,
    components: Sequence[str] = (),
    recorded: bool = True,
    **options: Any,
) -> Online:
    """A trainer of an online method that meets the groups' completions and rewards instead of sampling.

    Args:
        model: the policy as it is now.
        reference: the starting policy; what trl loads from the folder the policy came from.
        limit: completion limit in tokens.
        components: names of reward components to hand over one by one; none for the one reward of each rollout.
        recorded: whether the logprobs of the sampling policy are the recorded ones, and not computed anew.
    """
    size = len(groups[0].rollouts)
    rows = sum(len(group.rollouts) for group in groups)
    table: dict[tuple[int, ...], list[Sampled]] = {}
    for group in groups:
        assert group.rollouts[0].prompt_ids not in table, "one group a prompt"
        table[group.rollouts[0].prompt_ids] = [
            Sampled(
                r.completion.token_ids,
                r.reward,
                tuple(r.breakdown.get(c, float("nan")) for c in components),
                r.completion.logprobs,
            )
            for r in group.rollouts
        ]
    online = Online(None, table)

    def find(prompt: str, ids: Sequence[int]) -> Sampled:
        siblings = table[tuple(peer_tokenizer()(prompt)["input_ids"])]
        return next(s for s in siblings if s.ids == tuple(ids))

    def reward_of(value: Callable[[Sampled], float], called: str) -> Callable[..., list[float | None]]:
        def judge(prompts: list[str], completion_ids: list[list[int]], **_: Any) -> list[float | None]:
            values = [value(find(p, ids)) for p, ids in zip(prompts, completion_ids, strict=True)]
            return [None if v != v else v for v in values]

        judge.__name__ = called
        return judge

    class Given(entry(name)):  # type: ignore[misc]
        """The trainer, but for the sampler."""

        def _generate_single_turn(self, prompt_ids: list[list[int]], *_: Any, **__: Any) -> Any:
            seen: Counter[tuple[int, ...]] = Counter()
            drawn = []
            for ids in map(tuple, prompt_ids):
                drawn.append(list(table[ids][seen[ids]].ids))
                seen[ids] += 1
            return (drawn, None) if name == "GRPOTrainer" else drawn

        def _generate_and_score_completions(self, inputs: Any) -> Any:
            found = super()._generate_and_score_completions(inputs)
            if recorded:
                logprobs = torch.zeros(found["completion_ids"].shape)
                for row, (prompt, completion) in enumerate(online.by_row(found)):
                    known = next(s for s in table[prompt] if s.ids == completion).old_logprobs
                    logprobs[row, : len(known)] = torch.tensor(known)
                if name == "GRPOTrainer":
                    found["old_per_token_logps"] = logprobs
                else:
                    found["old_logps"] = (logprobs * found["completion_mask"]).sum(1)
            online.scored = dict(found)
            return found

    policy_of_theirs = copy.deepcopy(model)
    if reference is not None:
        folder = tempfile.mkdtemp(dir=SCRATCH.name)
        reference.save_pretrained(folder)
        policy_of_theirs.config._name_or_path = folder
    functions = [reward_of(lambda s, i=i: s.components[i], c) for i, c in enumerate(components)] or [
        reward_of(lambda s: s.reward, "reward")
    ]
    online.trainer = Given(
        model=policy_of_theirs,
        reward_funcs=functions,
        args=arguments(
            f"{name.removesuffix('Trainer')}Config",
            per_device_train_batch_size=rows // accumulate,
            gradient_accumulation_steps=accumulate,
            num_generations=size,
            max_completion_length=limit,
            **options,
        ),
        train_dataset=datasets.Dataset.from_list([{"prompt": peer_tokenizer().decode(ids)} for ids in table]),
        processing_class=peer_tokenizer(),
    )
    return online
