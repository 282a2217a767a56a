"""Every way of holding weights with every kind of method and every type: it trains, and resumes to the byte."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from transformers import LlamaConfig, LlamaForCausalLM

from alignlab import forward, kernels
from alignlab.algorithms.dpo import DPO
from alignlab.algorithms.grpo import GRPO
from alignlab.algorithms.ppo import PPO
from alignlab.algorithms.reward_model import RewardModel
from alignlab.algorithms.sft import SFT
from alignlab.checkpoint import load_checkpoint, save_checkpoint
from alignlab.data import collate
from alignlab.forward import score
from alignlab.forward.packed import runs_packed
from alignlab.generate import Sampling, SamplingKey, generate
from alignlab.models import (
    LoraChoice,
    ModelChoice,
    disable_dropout,
    load_policy,
    quantization,
    recompute_activations,
    trunk,
    unwrap,
)
from alignlab.optim import AdamWChoice, Schedule, build_optimizers, parameters_of
from alignlab.train import train, trained_modules
from alignlab.types import LoopState, Row
from tests.algorithms.world import Run, build_models, collect, loss_and_gradient, nudge, source, template
from tests.stand_ins import adapted, batch_of, random_ids, tiny
from tests.tolerances import BFLOAT16, EXACT, FLOAT32, Tolerance

CPU = torch.device("cpu")
LORA = LoraChoice(rank=2, alpha=4.0)
HOLDING: dict[str, dict[str, Any]] = {
    "full": {},
    "lora": {"adapter": LORA},
    "qlora 4bit": {"adapter": LORA, "quantization": "4bit"},
    "lora 8bit": {"adapter": LORA, "quantization": "8bit"},
}
METHODS: dict[str, Any] = {
    "sft": SFT(examples_per_step=4, learning_rate=1e-2),
    "reward_model": RewardModel(pairs_per_step=4, learning_rate=1e-2),
    "dpo": DPO(pairs_per_step=4, learning_rate=1e-2),
    "ppo": PPO(prompts_per_phase=4, epochs=1, minibatches=2, learning_rate=5e-3, value_learning_rate=1e-2),
    "ppo shared": PPO(prompts_per_phase=4, epochs=1, minibatches=2, learning_rate=5e-3, critic="shared"),
    "grpo": GRPO(prompts_per_phase=2, group_size=3, kl_coef=0.05, learning_rate=5e-3),
}
TYPES = ("float32", "bfloat16", "float16")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama over the tokens of the world, as a folder: float16 is for it as good as any type."""
    return llama(tmp_path_factory.mktemp("llama"))


def llama(folder: Path, seed: int = 0) -> Path:
    config = LlamaConfig(
        vocab_size=len(template().tokenizer), hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=8, max_position_embeddings=64, pad_token_id=None,
        eos_token_id=1, bos_token_id=2,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
        for parameter in model.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.25)
    model.save_pretrained(str(folder))
    return folder


def build(base: Path, method: str, holding: str, dtype: str, *, checkpointing: bool = False) -> Run:
    """A run from nothing but the folder, as a new process would build it."""
    if "bit" in holding:
        pytest.importorskip("bitsandbytes")
    algorithm, choice = METHODS[method], ModelChoice(name=str(base), dtype=dtype, **HOLDING[holding])  # type: ignore[arg-type]
    models = build_models(algorithm, load_policy(choice, seed=5, device=CPU))
    for model in trained_modules(models, algorithm.models()).values() if checkpointing else ():
        recompute_activations(model)
    optimizers = build_optimizers(algorithm.models(), models, AdamWChoice())
    return Run(algorithm, models, optimizers, source(microbatch_rows=3 if method == "sft" else 4), LoopState(seed=42))


def advance(run: Run, folder: Path, phases: range, total: int = 2) -> Path:
    """Trains the given phases of a run of `total` and saves after each; the last checkpoint."""
    trained = trained_modules(run.models, run.algorithm.models())
    loop = train(run.algorithm, run.models, run.optimizers, run.source, run.state, num_phases=total,
                 schedule=Schedule(shape="linear"), tracker=run.recorder)  # type: ignore[arg-type]  # fmt: skip
    saved = folder
    for finished in itertools.islice(loop, len(phases)):
        run.state = finished.state
        saved = save_checkpoint(folder, state=run.state, models=trained, optimizers=run.optimizers, contract={})
    return saved


def resume(run: Run, folder: Path) -> None:
    trained = trained_modules(run.models, run.algorithm.models())
    run.state = load_checkpoint(folder, models=trained, optimizers=run.optimizers, contract={})


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def trained_weights(run: Run) -> list[torch.Tensor]:
    return [p.detach().clone() for o in run.optimizers.values() for p in parameters_of(o)]


FAST = {
    ("sft", "full", "float16"), ("sft", "lora 8bit", "float32"), ("reward_model", "qlora 4bit", "float32"),
    ("dpo", "lora", "float16"), ("ppo", "qlora 4bit", "bfloat16"), ("grpo", "full", "bfloat16"),
    ("grpo", "lora 8bit", "float16"), ("ppo shared", "lora 8bit", "float32"),
}  # fmt: skip


COMBINATIONS = [
    pytest.param(*case, id=" ".join(case), marks=() if case in FAST else pytest.mark.slow)
    for case in itertools.product(METHODS, HOLDING, TYPES)
]


@pytest.mark.parametrize("method, holding, dtype", COMBINATIONS)
def test_it_trains_and_resumes_to_the_byte(method: str, holding: str, dtype: str, base: Path, tmp_path: Path) -> None:
    """Two phases, in which every identity holds; after the first, another process goes on."""
    straight = build(base, method, holding, dtype)
    before = trained_weights(straight)
    first = advance(straight, tmp_path / "run", range(1))
    last = advance(straight, tmp_path / "run", range(1))
    expected = contents(last)
    assert straight.state.phase == 2
    assert (dtype == "float16") == bool(straight.state.scaler)
    assert straight.state.scaler.get("skipped_steps", 0.0) <= 1.0  # one is what finding the loss scale may take
    after = trained_weights(straight)
    assert all(a.dtype == torch.float32 for a in after)  # adapters, heads and masters
    assert any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert all(torch.isfinite(a).all() for a in after)

    resumed = build(base, method, holding, dtype)
    resume(resumed, first)
    found = contents(advance(resumed, tmp_path / "resumed", range(1)))
    assert found.keys() == expected.keys()
    assert [name for name in expected if found[name] != expected[name]] == []


# ---- quantised weights -----------------------------------------------------------------------------------------------


def quantised(folder: Path, kind: str, **choice: Any) -> Any:
    pytest.importorskip("bitsandbytes")
    choice = {"dtype": "float32", "adapter": LORA, **choice}
    policy = load_policy(ModelChoice(name=str(folder), quantization=kind, **choice), seed=1, device=CPU)  # type: ignore[arg-type]
    nudge(policy, 0.1)
    return policy


def plain_twin(policy: Any, folder: Path, **choice: Any) -> Any:
    """The same policy with ordinary layers that hold what the quantised ones stand for, as bitsandbytes reckons it."""
    import bitsandbytes as bnb

    twin = load_policy(ModelChoice(name=str(folder), **{"dtype": "float32", "adapter": LORA, **choice}), device=CPU)
    weights = dict(unwrap(policy).named_modules())
    with torch.no_grad():
        for name, module in unwrap(twin).named_modules():
            other = weights[name]
            if isinstance(other, bnb.nn.Linear4bit):
                weight = bnb.functional.dequantize_4bit(other.weight.data, other.weight.quant_state)
                module.weight.copy_(weight)
            elif isinstance(other, bnb.nn.Linear8bitLt):
                module.weight.copy_(bnb.functional.int8_vectorwise_dequant(other.weight.data, other.scales))
        for own, other in zip(trainable(twin), trainable(policy), strict=True):
            own.copy_(other)
    return twin


def trainable(policy: Any) -> list[nn.Parameter]:
    return [p for p in policy.parameters() if p.requires_grad]


BATCH = batch_of([(2, 9, 33), (2, 40, 41, 7, 12, 5)], random_ids(7, 2, seed=3))
WORLD_BATCH = batch_of([(2, 9, 33), (2, 40, 41, 7, 12, 5)], [(7, 8, 9, 30), (11, 12)])


def gradients(policy: Any) -> list[torch.Tensor]:
    policy.zero_grad()
    score(policy, WORLD_BATCH).logprobs.sum().backward()
    return [p.grad.clone() for p in trainable(policy) if p.grad is not None]


@pytest.mark.parametrize("kind", ["4bit", "8bit"])
@pytest.mark.parametrize(
    "dtype, tolerance", [("float32", FLOAT32), ("bfloat16", BFLOAT16)], ids=["float32", "bfloat16"]
)
def test_quantised_layers_compute_with_what_they_stand_for(
    kind: str, dtype: str, tolerance: Tolerance, base: Path
) -> None:
    """Values and gradients are those of ordinary layers, in training and evaluation mode, and stay so after sampling:
    on some CPUs bitsandbytes itself repacks its weights then, and from there on gradients end, with no error."""
    policy = quantised(base, kind, dtype=dtype)
    twin = plain_twin(policy, base, dtype=dtype)
    values, expected = score(twin, WORLD_BATCH).logprobs.detach(), gradients(twin)
    assert len(expected) == len(trainable(policy)) == 28 and all(g.any() for g in expected)
    for mode in (True, False, False, True):
        policy.train(mode)
        with torch.no_grad():
            assert_close(score(policy, WORLD_BATCH).logprobs, values, **tolerance)
        for one, other in zip(gradients(policy), expected, strict=True):  # peft rounds once more on quantised layers
            assert (one - other).norm() <= 5 * tolerance["rtol"] * other.norm()


@pytest.mark.parametrize("kind", ["4bit", "8bit"])
def test_a_row_of_a_quantised_policy_depends_on_no_other(kind: str, base: Path) -> None:
    """An outlier in a neighbour changes nothing, as it would where activations are quantised by the batch."""
    policy = quantised(base, kind)
    with torch.no_grad():
        unwrap(policy).get_input_embeddings().weight[41] *= 50
        both = score(policy, WORLD_BATCH).logprobs
        for row in (0, 1):
            alone = score(policy, WORLD_BATCH.select(torch.tensor([row]))).logprobs[0]
            assert_close(both[row, : len(alone)], alone, **FLOAT32)


# ---- activations computed anew ---------------------------------------------------------------------------------------

QUICK = {("sft", "full"), ("ppo", "qlora 4bit"), ("ppo shared", "lora")}

RECOMPUTED = [
    pytest.param(method, holding, marks=() if (method, holding) in QUICK else pytest.mark.slow)
    for method, holding in itertools.product(("sft", "ppo", "ppo shared", "reward_model"), HOLDING)
]


@pytest.mark.parametrize("method, holding", RECOMPUTED)
def test_recomputed_activations_give_the_same_gradients(method: str, holding: str, base: Path) -> None:
    found = []
    for checkpointing in (False, True):
        run = build(base, method, holding, "float32", checkpointing=checkpointing)
        for model in trained_modules(run.models, run.algorithm.models()).values():
            assert model.training == (checkpointing or run.algorithm.dropout)
        torch.manual_seed(0)
        (step, *_) = collect(run)
        found.append(loss_and_gradient(run, step))
    (loss, plain), (same_loss, recomputed) = found
    assert_close(same_loss, loss, **FLOAT32)
    assert plain.keys() == recomputed.keys() and any(g.any() for g in plain.values())
    for name, gradient in plain.items():
        assert_close(recomputed[name], gradient, rtol=1e-5, atol=1e-6 * max(1.0, gradient.abs().max().item()))


@pytest.fixture
def by_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    """Activations are their modules' own, which can be watched."""
    monkeypatch.setattr(kernels, "ready", lambda *_: False)


def counted(module: nn.Module) -> Callable[[], list[int]]:
    """With how many tokens a module is called from now on."""
    tokens: list[int] = []
    module.register_forward_pre_hook(lambda _, given: tokens.append(given[0].shape[:-1].numel()))
    return lambda: tokens


def test_activations_are_recomputed_and_dropout_stays_off(by_modules: None) -> None:
    """Each layer runs twice in a step; attention and adapter dropout that were disabled do not come back with it."""
    policy = adapted(tiny(attention_dropout=0.5))
    for module in policy.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.5
    disable_dropout(policy)
    expected = score(policy, BATCH).logprobs
    recompute_activations(policy)
    runs_packed(trunk(policy), unwrap(policy))
    calls = counted(unwrap(policy).model.layers[0].mlp.act_fn)
    policy.train()
    assert policy.training
    found = score(policy, BATCH).logprobs
    assert_close(found, expected, **EXACT)
    assert len(calls()) == 1
    found.sum().backward()
    assert len(calls()) == 2


def test_dropout_that_is_wanted_falls_the_same_way_twice() -> None:
    """Supervised fine-tuning keeps it: the recomputed activations are those of the first pass."""
    found = []
    for recomputed in (False, True):
        policy = tiny(attention_dropout=0.5).train()
        if recomputed:
            recompute_activations(policy)
        torch.manual_seed(3)
        score(policy, BATCH).logprobs.sum().backward()
        found.append([p.grad for p in policy.parameters()])
    for one, other in zip(*found, strict=True):
        assert_close(one, other, **FLOAT32)


def test_sampling_keeps_its_cache(by_modules: None) -> None:
    """Prefill once, then one token a pass, as without: in training mode transformers would drop the cache."""
    sampled = []
    for recomputed in (False, True):
        policy = adapted(tiny())
        if recomputed:
            recompute_activations(policy)
        runs_packed(trunk(policy), unwrap(policy))
        calls = counted(trunk(policy).layers[0].mlp.act_fn)
        keys = [SamplingKey(1, 0, "a"), SamplingKey(1, 0, "b")]
        sampling = Sampling(max_completion_tokens=6)
        sampled.append(
            generate(policy, [(2, 9, 33), (2, 5)], keys, sampling, num_samples=2, stop_ids=frozenset(), pad_id=0)
        )
        assert calls() == [5, 4, 4, 4, 4, 4]  # both prompts without padding, then one token of each row
        assert policy.training == recomputed
    assert sampled[0] == sampled[1]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("holding", ["full", "lora", "qlora 4bit", "lora 8bit"])
def test_packed_rows_are_padded_rows_in_every_precision(
    base: Path, holding: str, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A quantised layer is its module's own; 8-bit products round a token by its largest number, and those in bfloat16
    are of other shapes."""
    if "bit" in holding:
        pytest.importorskip("bitsandbytes")
    choice = ModelChoice(name=str(base), dtype=dtype, **HOLDING[holding])  # type: ignore[arg-type]
    policy = load_policy(choice, seed=5, device=CPU)
    size = unwrap(policy).config.get_text_config().vocab_size
    rows = [((2, 9, 8), 7), ((2, 9, 8), 3), ((2, 5, 8, 11), 12)]
    ids = [tuple(5 + i % (size - 5) for i in random_ids(n, seed=n)[0]) for _, n in rows]
    batch = collate([Row(prompt_ids=p, completion_ids=c) for (p, _), c in zip(rows, ids, strict=True)])
    found = []
    for pack in (True, False):
        monkeypatch.setattr(forward, "PACK", pack)
        policy.zero_grad()
        logprobs = score(policy, batch).logprobs
        logprobs.sum().backward()
        gradients = [p.grad.flatten().float() for p in policy.parameters() if p.grad is not None]
        found.append((logprobs.detach(), torch.cat(gradients)))
    (own, gradient), (plain, expected) = found
    coarse = dtype == "bfloat16" or "8bit" in holding
    assert_close(own, plain, rtol=0.0, atol=0.1 if coarse else 1e-5)
    assert expected.norm() > 0 and (gradient - expected).norm() <= (0.1 if coarse else 1e-4) * expected.norm()


def test_frozen_trunks_are_quantised_in_every_role(base: Path) -> None:
    """The critic's own trunk shares the policy's quantised weights; heads and adapters are full."""
    run = build(base, "ppo", "qlora 4bit", "bfloat16")
    policy, critic = run.models["policy"], run.models["value_model"]
    assert quantization(policy) == quantization(critic) == "4bit"
    mine, theirs = dict(policy.named_parameters()), dict(critic.backbone.named_parameters())
    assert all((mine[name] is theirs[name]) == (".lora_" not in name) for name in mine)
    assert critic.head.weight.dtype == torch.float32
