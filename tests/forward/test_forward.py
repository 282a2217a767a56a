"""What `forward` says about a padded batch against what transformers itself says about each row alone."""

import sys
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from alignlab import forward as module
from alignlab.models import AdapterOff, ScalarModel, freeze, make_reward_model, make_value_model, trunk
from alignlab.types import Batch
from tests.stand_ins import (
    ARCHITECTURES,
    PROMPTS,
    WINDOW,
    adapted,
    batch_of,
    nudge,
    plain_logprobs,
    plain_states,
    policy_of,
    random_ids,
    tiny,
)
from tests.statistics.mutants import mutated
from tests.tolerances import EXACT, FLOAT32, Tolerance

COMPLETIONS = tuple(random_ids(7, 2, 1))
TRUNK32 = Tolerance(rtol=2e-5, atol=2e-5)
"""Two single-precision passes through a tiny trunk that group their sums differently, after a log-softmax."""
TRUNK64 = Tolerance(rtol=1e-5, atol=1e-6)
"""The same with double-precision weights; the norms and rotary tables of transformers stay in single precision."""


@pytest.fixture
def forward() -> ModuleType:
    return module


def scattered(rows: list[Tensor], batch: Batch) -> Tensor:
    """One (N,) tensor a row -> (B, T), 0 outside the completion."""
    return torch.zeros(batch.input_ids.shape, dtype=rows[0].dtype).masked_scatter(
        batch.completion_mask, torch.cat(rows)
    )


def wide(architecture: str) -> torch.dtype:
    """float64, except where eager attention (Gemma 2) takes its softmax in float32: float64's mask overflows there."""
    return torch.float32 if architecture == "gemma2" else torch.float64


def scalar_model(policy: Any, seed: int = 3) -> ScalarModel:
    """A scalar model with a head and a bias that are not 0, sharing the policy's trunk."""
    model = make_reward_model(policy, seed=seed)
    torch.nn.init.constant_(model.head.bias, 0.5)
    return model


# Logprobs and entropies -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@torch.no_grad()
def test_scores_are_those_of_the_plain_model(architecture: str, adapter: bool) -> None:
    """log softmax(logits / T)[token] and its entropy, at the completion's tokens and nowhere else."""
    policy, batch = policy_of(architecture, adapter), batch_of(PROMPTS, COMPLETIONS)
    for temperature in (1.0, 0.7):
        rows = [plain_logprobs(policy, p, c, temperature) for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]
        scores = module.score(policy, batch, temperature=temperature, entropy=True)
        assert scores.entropy is not None
        assert_close(scores.logprobs, scattered([taken for taken, _ in rows], batch), **TRUNK32)
        assert_close(scores.entropy, scattered([entropy for _, entropy in rows], batch), **TRUNK32)
        assert_close(module.score(policy, batch, temperature=temperature).logprobs, scores.logprobs, **FLOAT32)


@torch.no_grad()
def test_the_stand_ins_would_notice() -> None:
    """The window, the soft-caps, the biases and the adapter matter, so the test above tests them."""
    batch = batch_of(PROMPTS, COMPLETIONS)
    for architecture, change in (
        ("gemma3", {"sliding_window": 1000}),
        ("gemma2", {"final_logit_softcapping": None}),
        ("gemma2", {"attn_logit_softcapping": None}),
    ):
        other = tiny(architecture, **change)
        difference = module.score(tiny(architecture), batch).logprobs - module.score(other, batch).logprobs
        assert difference.abs().max() > 100 * TRUNK32["atol"], change
    for architecture in ARCHITECTURES:
        with_adapter, without = policy_of(architecture, True), policy_of(architecture, False)
        difference = module.score(with_adapter, batch).logprobs - module.score(without, batch).logprobs
        assert difference.abs().max() > 100 * TRUNK32["atol"], architecture


@torch.no_grad()
def test_index_t_belongs_to_token_t(forward: ModuleType) -> None:
    """A mask with holes that starts at index 0: every scored entry is that of its own token, index 0 is 0."""
    policy, ids = tiny(), random_ids(9)[0]
    batch = batch_of([()], [ids])
    mask = torch.tensor([[1, 1, 0, 0, 1, 1, 0, 1, 0]], dtype=torch.bool)
    logs = policy(input_ids=batch.input_ids).logits[0].log_softmax(-1)
    expected = torch.zeros(1, 9)
    for t in (1, 4, 5, 7):
        expected[0, t] = logs[t - 1, ids[t]]
    scores = forward.score(policy, replace(batch, completion_mask=mask), entropy=True)
    assert_close(scores.logprobs, expected, **TRUNK32)
    assert scores.logprobs[0, 0] == 0 and scores.entropy[0, 0] == 0


@torch.no_grad()
def test_nothing_to_score() -> None:
    batch = batch_of(PROMPTS, COMPLETIONS)
    empty = replace(batch, completion_mask=torch.zeros_like(batch.completion_mask))
    scores = module.score(tiny(), empty, entropy=True)
    assert_close(scores.logprobs, torch.zeros(batch.input_ids.shape), **EXACT)
    assert scores.entropy is not None and not scores.entropy.any()


@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("architecture", ["gemma3", "gemma2", "llama"])
def test_gradients_are_those_of_the_plain_model(architecture: str, adapter: bool) -> None:
    """d sum logprobs / d weights of the ragged batch = the sum of the rows' own, for trained, tied and frozen heads."""
    policy, batch = policy_of(architecture, adapter, wide(architecture)), batch_of(PROMPTS, COMPLETIONS)
    trained = {n: p for n, p in policy.named_parameters() if p.requires_grad}
    total = sum(plain_logprobs(policy, p, c)[0].sum() for p, c in zip(PROMPTS, COMPLETIONS, strict=True))
    expected = torch.autograd.grad(total, list(trained.values()), allow_unused=True)  # type: ignore[arg-type]
    own = torch.autograd.grad(module.score(policy, batch).logprobs.sum(), list(trained.values()), allow_unused=True)
    for name, mine, plain in zip(trained, own, expected, strict=True):
        scale = plain.abs().max().item()
        assert_close(mine, plain, rtol=0.0, atol=TRUNK32["rtol"] * scale, msg=lambda m, n=name: f"{n}: {m}")


# Invariances ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@torch.no_grad()
def test_padding_and_neighbours_change_nothing(architecture: str) -> None:
    """Side and length of the padding, order of rows, and being alone; for rows shorter and longer than the window."""
    policy = policy_of(architecture, True, wide(architecture))
    tolerance = TRUNK32 if architecture == "gemma2" else TRUNK64
    values, rewarder = make_value_model(policy, "shared"), scalar_model(policy)
    torch.nn.init.normal_(values.head.weight)

    def all_of(batch: Batch) -> list[Tensor]:
        scores = module.score(policy, batch, entropy=True)
        assert scores.entropy is not None
        flat = [x[batch.completion_mask] for x in (scores.logprobs, scores.entropy, module.values(values, batch))]
        return [*flat, module.rewards(rewarder, batch), module.final_values(values, batch)]

    expected = all_of(batch_of(PROMPTS, COMPLETIONS))
    for left in (False, True):
        for extra in (0, 3, 3 * WINDOW):
            for own, plain in zip(
                all_of(batch_of(PROMPTS, COMPLETIONS, left=left, extra=extra)), expected, strict=True
            ):
                assert_close(own, plain, **tolerance)
    backwards = all_of(batch_of(PROMPTS[::-1], COMPLETIONS[::-1], left=True))
    alone = [all_of(batch_of([p], [c])) for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]
    lengths = [len(c) for c in COMPLETIONS]
    for k, plain in enumerate(expected):
        assert_close(torch.cat([one[k] for one in alone]), plain, **tolerance)
        pieces = backwards[k].split(lengths[::-1] if k < 3 else 1)
        assert_close(torch.cat(list(pieces)[::-1]), plain, **tolerance)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@torch.no_grad()
def test_no_state_is_nan_where_all_is_padding(architecture: str) -> None:
    """Left padding longer than the window: its positions attend to nothing, and stay finite all the same."""
    batch = batch_of(PROMPTS, COMPLETIONS, left=True, extra=3 * WINDOW)
    for dtype in (torch.float32, torch.bfloat16):
        assert module.padded_states(policy_of(architecture, False, dtype), batch).isfinite().all()


def test_nan_in_unscored_states_reaches_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither values nor gradients: unscored states are never multiplied by 0, they are left out."""
    policy, batch = tiny("llama"), batch_of(PROMPTS, COMPLETIONS, left=True)
    values = make_value_model(policy, "shared")
    torch.nn.init.normal_(values.head.weight)

    def loss() -> Tensor:
        scores, value = module.score_and_values(policy, values, batch, entropy=True)
        assert scores.entropy is not None
        return (scores.logprobs + 0.1 * scores.entropy + value).sum()

    parameters = [p for p in values.parameters() if p.requires_grad]
    expected = torch.autograd.grad(loss(), parameters)
    clean = module.padded_states
    needed = batch.completion_mask.roll(-1, 1)
    monkeypatch.setattr(module, "padded_states", lambda *args: torch.where(needed[..., None], clean(*args), torch.nan))
    poisoned = loss()
    assert poisoned.isfinite()
    for own, plain in zip(torch.autograd.grad(poisoned, parameters), expected, strict=True):
        assert_close(own, plain, **FLOAT32)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")
def test_training_mode_changes_nothing_without_dropout() -> None:
    policy, batch = tiny(), batch_of(PROMPTS, COMPLETIONS)
    with torch.no_grad():
        expected = module.score(policy, batch).logprobs
    policy.gradient_checkpointing_enable()
    policy.train()
    assert_close(module.score(policy, batch).logprobs, expected, **FLOAT32)


# Values and rewards ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_values_are_read_before_the_action(forward: ModuleType) -> None:
    """V at index t = head(state at t - 1), the state that the action at t was drawn from; left and right padded."""
    policy = tiny()
    model = scalar_model(policy)
    rows = []
    for prompt, completion in zip(PROMPTS, COMPLETIONS, strict=True):
        states = plain_states(policy, [*prompt, *completion])[len(prompt) - 1 : -1]
        rows.append(states @ model.head.weight[0] + 0.5)
    for left in (False, True):
        batch = batch_of(PROMPTS, COMPLETIONS, left=left, extra=2)
        assert_close(forward.values(model, batch), scattered(rows, batch), **TRUNK32)


@torch.no_grad()
def test_rewards_are_read_at_the_last_attended_token(forward: ModuleType) -> None:
    """Pad id = stop id = 0, rows that end with the stop token, and padding behind it: the mask decides, not the id."""
    policy = tiny()
    model = scalar_model(policy)
    model.set_normalisation(0.25, 2.0)
    completions = [(*c, 0) for c in COMPLETIONS]
    last = torch.stack([plain_states(policy, [*p, *c])[-1] for p, c in zip(PROMPTS, completions, strict=True)])
    raw = last @ model.head.weight[0] + 0.5
    for left, extra in ((False, 0), (False, 5), (True, 5)):
        batch = batch_of(PROMPTS, completions, left=left, extra=extra, pad_id=0)
        assert_close(forward.rewards(model, batch), (raw - 0.25) / 2.0, **TRUNK32)
        assert_close(forward.final_values(model, batch), raw, **TRUNK32)


@torch.no_grad()
def test_a_row_of_one_token() -> None:
    policy = tiny()
    model = scalar_model(policy)
    expected = plain_states(policy, [7])[-1:] @ model.head.weight[0] + 0.5
    assert_close(module.rewards(model, batch_of([(7,), (2, 3)], [(), ()]))[:1], expected, **TRUNK32)


@torch.no_grad()
def test_scalar_heads_stay_in_single_precision() -> None:
    """A bfloat16 trunk: the head's product and the score are float32."""
    policy = tiny(dtype=torch.bfloat16)
    model, batch = scalar_model(policy), batch_of(PROMPTS, COMPLETIONS)
    states = module.padded_states(model, batch)
    assert states.dtype == torch.bfloat16
    assert module.rewards(model, batch).dtype == module.values(model, batch).dtype == torch.float32
    assert_close(model(states), states.float() @ model.head.weight[0] + 0.5, **FLOAT32)
    assert scalar_model(tiny(dtype=torch.float64)).head.weight.dtype == torch.float64


@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
def test_a_shared_trunk_is_passed_once(adapter: bool) -> None:
    """score_and_values = score and values, in one pass where the trunk is the same and in two where it is not."""
    policy, batch = policy_of("gemma3", adapter), batch_of(PROMPTS, COMPLETIONS)
    for backbone, passes in (("shared", 1), ("own", 2)):
        model = make_value_model(policy, backbone)  # type: ignore[arg-type]
        torch.nn.init.normal_(model.head.weight)
        if backbone == "own":
            nudge(model.backbone)
        calls: list[int] = []
        hooks = [trunk(m).register_forward_hook(lambda *_, c=calls: c.append(1)) for m in {policy, model.backbone}]
        scores, values = module.score_and_values(policy, model, batch, temperature=0.7, entropy=True)
        for hook in hooks:
            hook.remove()
        assert len(calls) == passes
        expected = module.score(policy, batch, temperature=0.7, entropy=True)
        assert_close(scores.logprobs, expected.logprobs, **EXACT)
        assert_close(scores.entropy, expected.entropy, **EXACT)
        assert_close(values, module.values(model, batch), **EXACT)
        policy.zero_grad(set_to_none=True)
        values.sum().backward()  # type: ignore[no-untyped-call]
        reached = [p.grad is not None for n, p in policy.named_parameters() if "k_proj" in n and p.requires_grad]
        assert all(reached) if backbone == "shared" else not any(reached)


# The reference view ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_adapter_off_is_the_base_model() -> None:
    """Off inside, on again outside; before the adapter is trained both are the same."""
    batch = batch_of(PROMPTS, COMPLETIONS)
    base = module.score(tiny(), batch).logprobs
    policy = adapted(tiny(), perturbed=False)
    reference = AdapterOff(policy)
    assert_close(module.score(policy, batch).logprobs, base, **EXACT)
    nudge(policy)
    after = module.score(policy, batch).logprobs
    assert (after - base).abs().max() > 0.01
    assert_close(module.score(reference, batch).logprobs, base, **EXACT)
    assert_close(module.score(policy, batch).logprobs, after, **EXACT)


def test_adapter_off_leaves_gradients_as_they_were() -> None:
    """The policy's graph survives a reference pass in its middle, and a frozen policy does not become trainable."""
    batch, policy = batch_of(PROMPTS, COMPLETIONS), adapted(tiny())
    trained = {n: p for n, p in policy.named_parameters() if p.requires_grad}
    expected = torch.autograd.grad(module.score(policy, batch).logprobs.sum(), list(trained.values()))
    logprobs = module.score(policy, batch).logprobs
    reference = module.score(AdapterOff(policy), batch).logprobs
    assert not reference.requires_grad
    own = torch.autograd.grad((logprobs - reference).sum(), list(trained.values()))
    for mine, plain in zip(own, expected, strict=True):
        assert_close(mine, plain, **EXACT)
    assert {n for n, p in policy.named_parameters() if p.requires_grad} == set(trained)
    freeze(policy)
    module.score(AdapterOff(policy), batch)
    assert not any(p.requires_grad for p in policy.parameters())


def test_adapter_is_on_again_after_an_error() -> None:
    policy, batch = adapted(tiny()), batch_of(PROMPTS, COMPLETIONS)
    with torch.no_grad():
        before = module.score(policy, batch).logprobs
        with pytest.raises(RuntimeError, match="inside"), AdapterOff(policy).active():
            raise RuntimeError("inside")
        assert_close(module.score(policy, batch).logprobs, before, **EXACT)


# Mutants --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, replacement, test",
    [
        ("hidden, token_ids, top = states.at(rows, columns - 1)", "hidden, token_ids, top = states.at(rows, columns)",
         test_index_t_belongs_to_token_t),
        ("batch.input_ids[rows, columns], head", "batch.input_ids[rows, columns - 1], head",
         test_index_t_belongs_to_token_t),
        ("keep = columns > 0", "keep = columns >= 0", test_index_t_belongs_to_token_t),
        ("rows, columns = batch.completion_mask", "rows, columns = batch.attention_mask",
         test_index_t_belongs_to_token_t),
        ("model(states.at(rows, columns - 1))", "model(states.at(rows, columns))",
         test_values_are_read_before_the_action),
        ("(batch.attention_mask * columns)", "((batch.input_ids != 0) * columns)",
         test_rewards_are_read_at_the_last_attended_token),
        ("(batch.attention_mask * columns).argmax(-1)", "batch.attention_mask.sum(-1) - 1",
         test_rewards_are_read_at_the_last_attended_token),
        ("batch) - reward_model.shift)", "batch))", test_rewards_are_read_at_the_last_attended_token),
        ("shift) / reward_model.scale\n", "shift)\n", test_rewards_are_read_at_the_last_attended_token),
    ],
)  # fmt: skip
def test_mutants_are_noticed(text: str, replacement: str, test: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, f"{module.__name__}_mutant", module)  # where dataclasses look names up
    with pytest.raises(AssertionError):
        test(mutated(module, text, replacement))
