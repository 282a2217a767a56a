"""A world small enough to check by hand: 46 tokens, a two-layer Gemma 3 in float64, a few prompts, pairs and rewards.

Weights come from a counter-based generator and plain arithmetic, so they are the same on every machine.
"""

from __future__ import annotations

import inspect
import string
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from types import ModuleType
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers import models as tokenizer_models
from torch import Tensor, nn
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, PreTrainedTokenizerFast
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm, Gemma3RotaryEmbedding

from alignlab.conversation import Template
from alignlab.generate import Sampling
from alignlab.models import (
    ScalarModel,
    disable_dropout,
    has_adapter,
    make_reference,
    make_reward_model,
    make_value_model,
    unwrap,
)
from alignlab.optim import AdamWChoice, Schedule, build_optimizers
from alignlab.rollout import Limits, Reward, Source, encode_examples, encode_labelled, encode_pairs
from alignlab.train import Finished, train
from alignlab.types import Batch, Completion, Example, Group, Labelled, LoopState, Message, Pair, Prompt, Rollout, Step

CONTROL = ["<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"]
CHARACTERS = string.ascii_lowercase + string.digits + " +=?\n"
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else 'user' }}\n"
    "{{ m.content }}<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
MAX_TOKENS = 8
TEACHER = 9
"""Seed of the teacher's weights: another model with the same tokenizer."""
REWARD_MODEL = 13
"""Seed of the weights of the reward model that was trained before."""


# ---- the parts -------------------------------------------------------------------------------------------------------


@cache
def template() -> Template:
    """A template of Gemma's shape over a tokenizer that knows single characters only."""
    vocabulary = {token: i for i, token in enumerate([*CONTROL, *CHARACTERS])}
    backend = Tokenizer(tokenizer_models.BPE(vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens([AddedToken(token, special=True) for token in CONTROL])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>", chat_template=CHAT_TEMPLATE
    )
    return Template.of(tokenizer)


class ExactNorm(Gemma3RMSNorm):
    """Gemma's norm without its detour through float32."""

    def forward(self, x: Tensor) -> Tensor:
        return self._norm(x) * (1.0 + self.weight)


class ExactRotary(Gemma3RotaryEmbedding):
    """Gemma's rotary angles without their detour through float32."""

    def forward(self, x: Tensor, position_ids: Tensor, layer_type: str) -> tuple[Tensor, Tensor]:
        halves = torch.arange(0, self.config.head_dim, 2, dtype=x.dtype) / self.config.head_dim
        angles = position_ids[..., None].to(x.dtype) * self.config.rope_parameters[layer_type]["rope_theta"] ** -halves
        angles = torch.cat([angles, angles], -1)
        return angles.cos(), angles.sin()


def in_double_precision(model: nn.Module) -> None:
    """Makes a float64 Gemma compute in float64 throughout, so that hand computations agree to twelve digits."""
    for module in model.modules():
        if isinstance(module, Gemma3RMSNorm):
            module.__class__ = ExactNorm
        if isinstance(module, Gemma3RotaryEmbedding):
            module.__class__ = ExactRotary


def fill(model: nn.Module, seed: int, spread: float = 0.3) -> None:
    """Gives every trained parameter uniform values in +- spread; the norms' offsets are smaller."""
    with torch.no_grad():
        for i, (name, parameter) in enumerate(model.named_parameters()):
            if parameter.requires_grad:
                uniform = np.random.Generator(np.random.Philox(key=[seed, i])).random(tuple(parameter.shape))
                width = spread / 3 if "norm" in name else spread
                parameter.copy_(torch.from_numpy((2 * uniform - 1) * width))


def policy(seed: int = 0, *, dropout: float = 0.0, lora: bool = False, dtype: torch.dtype = torch.float64) -> Any:
    """A policy; with `lora`, a fresh adapter (it changes nothing yet) around frozen weights."""
    config = Gemma3TextConfig(
        vocab_size=len(CONTROL) + len(CHARACTERS),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        sliding_window=6,
        layer_types=["sliding_attention", "full_attention"],
        max_position_embeddings=64,
        query_pre_attn_scalar=8,
        attention_dropout=dropout,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=2,
    )
    model = Gemma3ForCausalLM(config).to(dtype)
    fill(model, seed)
    with torch.no_grad():  # loud stop tokens, so that lengths vary
        model.get_input_embeddings().weight[[1, 4]] *= 3
    if dtype == torch.float64:
        in_double_precision(model)
    if not lora:
        return model
    adapter = LoraConfig(
        r=2,
        lora_alpha=4,
        lora_dropout=dropout,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    adapted = get_peft_model(model, adapter, autocast_adapter_dtype=False)
    adapted.peft_config["default"].base_model_name_or_path = "world"
    with torch.no_grad():
        fill(adapted, seed + 1)
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.zero_()
    return adapted


def prompt(text: str, task: str = "sums") -> Prompt:
    return Prompt(messages=(Message("user", text),), id=f"{task}/{text}", task=task, answer=text[-1])


PROMPTS = tuple(prompt(text) for text in ("1+1", "2+23", "3", "14+1", "5+5+5", "7+", "8+18", "9"))
ANSWERS = ("2", "twenty five", "3", "is 15", "15 or so", "no", "26", "9 it is")
EXAMPLES = tuple(Example(prompt=p, completion=a) for p, a in zip(PROMPTS, ANSWERS, strict=True))
PAIRS = tuple(
    Pair(prompt=p, chosen=a, rejected=b, margin=0.25 * i)
    for i, (p, a, b) in enumerate(
        zip(PROMPTS, ANSWERS, ("x", "23", "what", "1", "no idea", "9 9 9", "6", "?"), strict=True)
    )
)

LABELLED = tuple(
    Labelled(prompt=p, completion=a, label=good)
    for p, a, good in zip(
        PROMPTS,
        ("2", "twenty", "what", "is 15", "15 or so", "9 9 9 9", "26", "?"),
        (True, False, False, True, True, False, True, False),
        strict=True,
    )
)
"""Single completions with a verdict, good and bad ones of unequal lengths."""


def digit_share(prompts: Sequence[Prompt], completions: Sequence[Completion]) -> list[float | None]:
    """A reward that varies among siblings: the share of digits, plus a little for length."""
    return [sum(c.isdigit() for c in x.text) / (1 + len(x.text)) + 0.01 * len(x.token_ids) for x in completions]


@cache
def world_source(microbatch_rows: int) -> Source:
    limits = Limits(max_prompt_tokens=32, max_completion_tokens=MAX_TOKENS + 8, microbatch_rows=microbatch_rows)
    return Source(
        template=template(),
        device=torch.device("cpu"),
        limits=limits,
        sampling=Sampling(max_completion_tokens=MAX_TOKENS),
        examples=encode_examples(EXAMPLES, template(), limits),
        pairs=encode_pairs(PAIRS, template(), limits),
        labelled=encode_labelled(LABELLED, template(), limits),
        prompts=PROMPTS,
        rewards=[Reward(name="digits", function=digit_share, weight=1.0)],
    )


def source(*, microbatch_rows: int = 4, **changes: Any) -> Source:
    """The world's data; `changes` replace fields of the Source."""
    return replace(world_source(microbatch_rows), **changes)


# ---- a run -----------------------------------------------------------------------------------------------------------


def build_models(algorithm: Any, start: Any) -> dict[str, Any]:
    """The roles of a method around a starting policy (whose adapter, if any, is fresh), as the pipeline builds them."""
    if not algorithm.dropout:
        disable_dropout(start)
    models: dict[str, Any] = {"policy": start}
    roles = algorithm.models()
    for name, role in roles.items():
        if name == "reference":
            models[name] = make_reference(start, fresh_adapter=has_adapter(start))
        elif name == "reward_model" and role.trained:
            models[name] = make_reward_model(models.pop("policy"), seed=0)
            fill(models[name].head, 77)
        elif name == "reward_model":
            models[name] = frozen_reward_model(next(start.parameters()).dtype)
        elif name == "teacher":
            models[name] = policy(TEACHER, dtype=next(start.parameters()).dtype).requires_grad_(False)
    if "value_model" in roles:  # last, as it may grow from the reward model
        models["value_model"] = make_value_model(start, roles["value_model"].backbone, models.get("reward_model"))
    for name, role in roles.items():
        if isinstance(models[name], nn.Module):
            models[name].train(role.trained and algorithm.dropout)
    return models


def frozen_reward_model(dtype: torch.dtype = torch.float64) -> ScalarModel:
    """A reward model as it comes out of training: weights of its own, normalised scores, nothing trained any more."""
    model = make_reward_model(policy(REWARD_MODEL, dtype=dtype), seed=0)
    fill(model.head, 77)
    model.set_normalisation(0.3, 0.5)
    disable_dropout(model)
    return model.requires_grad_(False).eval()


@dataclass
class Recorder:
    """Stands in for the run's tracker and keeps everything in memory."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    samples: list[dict[str, Any]] = field(default_factory=list)
    phases: list[int] = field(default_factory=list)

    def log(self, row: Mapping[str, Any]) -> None:
        self.rows.append(dict(row))

    def completions(self, rows: Iterable[Mapping[str, Any]]) -> None:
        self.samples += [dict(row) for row in rows]

    def advance(self, phase: int, metrics: Mapping[str, float], seconds: float) -> None:
        self.phases.append(phase)


@dataclass
class Run:
    """One run of a method in the world: its models, optimisers, state and log."""

    algorithm: Any
    models: dict[str, Any]
    optimizers: dict[str, torch.optim.AdamW]
    source: Source
    state: LoopState
    recorder: Recorder = field(default_factory=Recorder)
    schedule: Schedule = field(default_factory=Schedule)

    def go(self, num_phases: int, **options: Any) -> list[Finished]:
        """Trains until `num_phases` phases are finished."""
        arguments = (self.algorithm, self.models, self.optimizers, self.source, self.state)
        finished = list(
            train(*arguments, num_phases=num_phases, schedule=self.schedule, tracker=self.recorder, **options)  # type: ignore[arg-type]
        )
        self.state = finished[-1].state if finished else self.state
        return finished

    def column(self, name: str) -> list[Any]:
        return [row[name] for row in self.recorder.rows if name in row]


def start_run(algorithm: Any, *, seed: int = 42, weight_decay: float = 0.01, **changes: Any) -> Run:
    """A new run; `changes` go to `policy` (start, dropout, lora, dtype) and to `source` (anything else)."""
    of_policy = {k: changes.pop(k) for k in ("dropout", "lora", "dtype") if k in changes}
    models = build_models(algorithm, policy(changes.pop("start", 0), **of_policy))
    optimizers = build_optimizers(algorithm.models(), models, AdamWChoice(weight_decay=weight_decay))
    return Run(algorithm, models, optimizers, source(**changes), LoopState(seed=seed))


def collect(run: Run) -> tuple[Step, ...]:
    """The steps of the run's next phase."""
    phase, run.state = run.algorithm.collect(run.models, run.source, run.state)
    return tuple(phase.steps)


def loss_and_gradient(run: Run, step: Step) -> tuple[float, dict[str, Tensor]]:
    """The loss of one optimiser step and its gradient by every trained parameter, as the loop adds them up."""
    parameters = {
        f"{role}.{name}": p
        for role, optimizer in run.optimizers.items()
        for name, p in run.models[role].named_parameters()
        if any(p is q for group in optimizer.param_groups for q in group["params"])
    }
    for parameter in parameters.values():
        parameter.grad = None
    total = 0.0
    for batch in step.microbatches:
        output = run.algorithm.loss(run.models, batch, run.state)
        (output.total / step.normaliser).backward()
        total += output.total.item() / step.normaliser
    gradient = {k: torch.zeros_like(p) if p.grad is None else p.grad.clone() for k, p in parameters.items()}
    for parameter in parameters.values():
        parameter.grad = None
    return total, gradient


FORMULA_NAMES: dict[str, Any] = {
    "abs": np.abs, "exp": np.exp, "log": np.log, "sqrt": np.sqrt, "clip": np.clip, "where": np.where, "sum": np.sum,
    "maximum": np.maximum, "minimum": np.minimum, "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    "log_sigmoid": lambda x: -np.logaddexp(0, -x), "log1mexp": lambda x: np.log1p(-np.exp(x)),
}  # fmt: skip
"""What a formula may call, as far as losses of whole completions need it."""


def formula_value(lines: Sequence[str], inputs: Mapping[str, Any]) -> float:
    """`loss` after the assignments of a formula, evaluated with NumPy over the given inputs."""
    names = {**FORMULA_NAMES, **inputs}
    for line in lines:
        exec(line, {"__builtins__": {}}, names)
    return float(names["loss"])


def flat(gradient: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([g.flatten() for g in gradient.values()])


# ---- an independent view ---------------------------------------------------------------------------------------------


def raw_states(model: Any, batch: Batch) -> list[Tensor]:
    """Last hidden states of each row by itself, without padding: (T_i, H)."""
    inner = unwrap(model)
    return [
        inner.get_decoder()(input_ids=ids[mask][None]).last_hidden_state[0]
        for ids, mask in zip(batch.input_ids, batch.attention_mask, strict=True)
    ]


def raw_logprobs(model: Any, batch: Batch, temperature: float = 1.0) -> list[Tensor]:
    """Log-softmax of each row's logits at its completion tokens, (N_i,) a row; differentiable."""
    inner = unwrap(model)
    rows = []
    for ids, attended, completion in zip(batch.input_ids, batch.attention_mask, batch.completion_mask, strict=True):
        tokens, first = ids[attended], int(completion.int().argmax())
        logits = inner(input_ids=tokens[None]).logits[0] / temperature
        rows.append(torch.stack([logits[t - 1].log_softmax(-1)[tokens[t]] for t in range(first, len(tokens))]))
    return rows


def raw_entropies(model: Any, batch: Batch, temperature: float = 1.0) -> list[Tensor]:
    """-sum p log p before each completion token, (N_i,) a row; differentiable."""
    rows = []
    for ids, attended, completion in zip(batch.input_ids, batch.attention_mask, batch.completion_mask, strict=True):
        tokens, first = ids[attended], int(completion.int().argmax())
        logs = (unwrap(model)(input_ids=tokens[None]).logits[0] / temperature).log_softmax(-1)
        rows.append(-(logs.exp() * logs).sum(-1)[first - 1 : len(tokens) - 1])
    return rows


def raw_values(value_model: Any, batch: Batch) -> list[Tensor]:
    """The critic's value of the state before each completion token, (N_i,) a row."""
    weight, bias = value_model.head.weight[0], value_model.head.bias[0]
    firsts = batch.completion_mask.int().argmax(-1).tolist()
    return [
        states[first - 1 : len(states) - 1] @ weight + bias
        for states, first in zip(raw_states(value_model, batch), firsts, strict=True)
    ]


def pair_inputs(run: Run, step: Step) -> dict[str, Any]:
    """What a formula over pairs reads, from raw log-softmaxes: (B,) sums over tokens, and how many these are."""
    of_batches = []
    for batch in step.microbatches:
        policy, reference = (
            [x.sum() for x in numbers(raw_logprobs(run.models[role], batch))] if role in run.models else []
            for role in ("policy", "reference")
        )
        tokens, half = batch.completion_mask.sum(-1).tolist(), len(batch) // 2
        named = {"": policy, "reference_": reference}
        found = {f"{prefix}chosen": v[:half] for prefix, v in named.items()}
        found |= {f"{prefix}rejected": v[half:] for prefix, v in named.items()}
        of_batches.append({**found, "chosen_tokens": tokens[:half], "rejected_tokens": tokens[half:]})
    joined = {name: np.concatenate([np.array(b[name]) for b in of_batches]) for name in of_batches[0]}
    return {**joined, "pairs": len(joined["chosen"])}


def rows_of(tensor: Tensor | None, batch: Batch) -> list[np.ndarray]:
    """A (B, T) tensor as one NumPy array of completion entries a row."""
    assert tensor is not None
    return [x[m].detach().numpy() for x, m in zip(tensor, batch.completion_mask, strict=True)]


def numbers(rows: Iterable[Tensor]) -> list[np.ndarray]:
    return [row.detach().numpy() for row in rows]


# ---- doctored worlds -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class FixedSource(Source):
    """Answers every phase with the same groups."""

    groups: tuple[Group, ...] = ()

    def rollouts(
        self, policy: Any, num_prompts: int, group_size: int, state: LoopState, **options: Any
    ) -> tuple[Group, ...]:
        return self.groups


@dataclass(frozen=True, kw_only=True)
class SlippingSource(Source):
    """Moves the policy's weights a little after sampling: what was sampled is no longer what is trained."""

    def rollouts(
        self, policy: Any, num_prompts: int, group_size: int, state: LoopState, **options: Any
    ) -> tuple[Group, ...]:
        groups = super().rollouts(policy, num_prompts, group_size, state, **options)
        nudge(policy, 0.01)
        return groups


def fixed(groups: Sequence[Group], **changes: Any) -> FixedSource:
    """The world's source, but for the rollouts."""
    usual = source(**changes)
    return FixedSource(**{name: getattr(usual, name) for name in usual.__dataclass_fields__}, groups=tuple(groups))


def slipping(usual: Source) -> SlippingSource:
    return SlippingSource(**{name: getattr(usual, name) for name in usual.__dataclass_fields__})


def nudge(model: nn.Module, size: float, seed: int = 5) -> None:
    """Adds uniform noise of the given size to every trained parameter."""
    with torch.no_grad():
        for i, parameter in enumerate(p for p in model.parameters() if p.requires_grad):
            noise = np.random.Generator(np.random.Philox(key=[seed, i])).random(tuple(parameter.shape))
            parameter += torch.from_numpy((2 * noise - 1) * size).to(parameter.dtype)


def rollout(
    model: Any, text: str, completion: str, *, reward: float, shift: Sequence[float], stop: bool = True
) -> Rollout:
    """A rollout made by hand; its recorded logprobs are the model's, each moved by `shift` (so the KL is `shift`)."""
    asked = prompt(text)
    ids = template().encode_prompt(asked)
    tokens = template().encode_completion(completion, stop=stop)
    bare = Completion(
        token_ids=tokens, logprobs=(0.0,) * len(tokens), finish_reason="stop" if stop else "length", text=completion
    )
    made = Rollout(prompt=asked, prompt_ids=ids, completion=bare, reward=reward, breakdown={"digits": reward})
    batch = source().batch([Group(rollouts=(made,))], torch.float64)
    with torch.no_grad():
        (logprobs,) = raw_logprobs(model, batch)
    recorded = tuple(float(x) + s for x, s in zip(logprobs, shift, strict=True))
    return replace(made, completion=replace(bare, logprobs=recorded))


def mutant(module: ModuleType, text: str, replacement: str, *, used: ModuleType | None = None) -> Any:
    """The algorithm of a fresh copy of `module` in whose source the only occurrence of `text` is replaced; with `used`,
    of a copy that imports from a copy of `used` with that replacement."""
    if used is None:
        return _changed(module, text, replacement).ALGORITHM
    original = sys.modules[used.__name__]
    sys.modules[used.__name__] = _changed(used, text, replacement)
    try:
        return _changed(module, "", "").ALGORITHM
    finally:
        sys.modules[used.__name__] = original


def _changed(module: ModuleType, text: str, replacement: str) -> ModuleType:
    code = inspect.getsource(module)
    if text:
        assert code.count(text) == 1, f"{text!r} occurs {code.count(text)} times in {module.__name__}: update it"
        code = code.replace(text, replacement)
    copied = ModuleType(f"{module.__name__}_mutant")
    sys.modules[copied.__name__] = copied  # where pydantic looks the annotations up
    exec(compile(code, str(module.__file__), "exec"), copied.__dict__)
    return copied
