"""Log-probabilities and entropies against hand-made softmaxes, the plain formula, and what a tile may hold."""

import math
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from alignlab.functional import logprobs as module
from tests.statistics.mutants import mutated
from tests.tolerances import BFLOAT16, EXACT, FINITE_DIFFERENCE, FLOAT32, FLOAT64, TWO_DIGITS

LN2, LN3, LN6 = math.log(2), math.log(3), math.log(6)


@pytest.fixture
def logprobs() -> ModuleType:
    return module


@pytest.fixture(params=["one tile", "many tiles"])
def tiling(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything in one tile, or tiles of two rows by three columns that neither rows nor vocabulary fill evenly."""
    if request.param == "many tiles":
        monkeypatch.setattr(module, "TILE_ROWS", 2)
        monkeypatch.setattr(module, "TILE_BYTES", 2 * 3 * 8)


def doubles(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def three_words() -> tuple[Tensor, Tensor, Tensor]:
    """Logits (ln 2, ln 3, 0), so probabilities (2, 3, 1) / 6, scored for each of the three words."""
    hidden = doubles([[LN2, LN3]]).expand(1, 3, 2).clone()
    return hidden, doubles([[1, 0], [0, 1], [0, 0]]), torch.tensor([[0, 1, 2]])


def plain(
    hidden: Tensor, weight: Tensor, token_ids: Tensor, temperature: float = 1.0, softcap: float | None = None
) -> tuple[Tensor, Tensor]:
    """The formula as it is written, with all the logits there are."""
    logits = hidden @ weight.T
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logs = (logits / temperature).log_softmax(-1)
    return logs.gather(-1, token_ids.unsqueeze(-1)).squeeze(-1), -(logs.exp() * logs).sum(-1)


def random_case(
    shape: tuple[int, ...] = (2, 4), width: int = 5, words: int = 11, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(*shape, width, generator=generator, dtype=torch.float64)
    weight = torch.randn(words, width, generator=generator, dtype=torch.float64)
    return hidden, weight, torch.randint(words, shape, generator=generator)


# Numbers --------------------------------------------------------------------------------------------------------------


def test_logprobs_and_entropy(logprobs: ModuleType) -> None:
    """ln 2/6, ln 3/6, ln 1/6; entropy (1/3) ln 3 + (1/2) ln 2 + (1/6) ln 6."""
    expected = doubles([[-LN3, -LN2, -LN6]])
    assert_close(logprobs.token_logprobs(*three_words()), expected, **FLOAT64)
    values, entropy = logprobs.token_logprobs_and_entropy(*three_words())
    assert_close(values, expected, **FLOAT64)
    assert_close(entropy, doubles([[LN3 / 3 + LN2 / 2 + LN6 / 6] * 3]), **FLOAT64)


def test_temperature(logprobs: ModuleType) -> None:
    """At temperature 1/2 the odds are squared: (4, 9, 1) / 14."""
    expected = doubles([[math.log(4 / 14), math.log(9 / 14), math.log(1 / 14)]])
    assert_close(logprobs.token_logprobs(*three_words(), temperature=0.5), expected, **FLOAT64)


def test_softcap_comes_before_temperature(logprobs: ModuleType) -> None:
    """tanh(ln x) = (x^2 - 1) / (x^2 + 1): capped at 1 the logits are (.6, .8, 0), at temperature 1/2 (1.2, 1.6, 0)."""
    logits = doubles([1.2, 1.6, 0.0])
    expected = (logits - math.log(math.exp(1.2) + math.exp(1.6) + 1)).unsqueeze(0)
    assert_close(logprobs.token_logprobs(*three_words(), temperature=0.5, logit_softcap=1.0), expected, **FLOAT64)


def gradients(
    function: Callable[[Tensor, Tensor, Tensor], Tensor], *, trained: bool, word: int = 0
) -> tuple[Tensor, Tensor | None]:
    """d function / d (hidden, weight) for one of `three_words` alone."""
    hidden, weight, token_ids = three_words()
    hidden, token_ids = hidden[:, :1].requires_grad_(), token_ids[:, word : word + 1]
    function(hidden, weight.requires_grad_(trained), token_ids).sum().backward()
    assert hidden.grad is not None
    return hidden.grad.flatten(), weight.grad


def test_gradient_of_the_logprob(logprobs: ModuleType) -> None:
    """By hidden: W_0 - sum_v p_v W_v = (1 - 1/3, -1/2); by weight: (1 - 1/3, -1/2, -1/6) times hidden; for the third
    word, whose W is 0, only the sum; temperature 1/2 doubles the slope and has p = (4, 9, 1) / 14."""
    for trained in (False, True):
        by_hidden, by_weight = gradients(logprobs.token_logprobs, trained=trained)
        assert_close(by_hidden, doubles([2 / 3, -1 / 2]), **FLOAT64)
        if trained:
            assert_close(by_weight, doubles([[2 / 3], [-1 / 2], [-1 / 6]]) * doubles([LN2, LN3]), **FLOAT64)
        by_hidden, _ = gradients(logprobs.token_logprobs, trained=trained, word=2)
        assert_close(by_hidden, doubles([-1 / 3, -1 / 2]), **FLOAT64)
        by_hidden, _ = gradients(lambda *x: logprobs.token_logprobs(*x, temperature=0.5), trained=trained)
        assert_close(by_hidden, doubles([2 * 10 / 14, -2 * 9 / 14]), **FLOAT64)


def test_gradient_through_the_softcap(logprobs: ModuleType) -> None:
    """Slopes of the cap: 1 - .6^2 = .64, 1 - .8^2 = .36 and 1; probabilities: e^.6, e^.8 and 1 over their sum."""
    total = math.exp(0.6) + math.exp(0.8) + 1
    by_logit = doubles([0.64 * (1 - math.exp(0.6) / total), -0.36 * math.exp(0.8) / total, -1 / total])
    for trained in (False, True):
        by_hidden, by_weight = gradients(lambda *x: logprobs.token_logprobs(*x, logit_softcap=1.0), trained=trained)
        assert_close(by_hidden, by_logit[:2], **FLOAT64)
        if trained:
            assert_close(by_weight, by_logit[:, None] * doubles([LN2, LN3]), **FLOAT64)


def test_gradient_of_the_entropy(logprobs: ModuleType) -> None:
    """By the logit of v: -p_v (ln p_v + H), here (ln 3 - H) / 3, (ln 2 - H) / 2 and (ln 6 - H) / 6."""
    entropy = LN3 / 3 + LN2 / 2 + LN6 / 6
    by_logit = doubles([(LN3 - entropy) / 3, (LN2 - entropy) / 2, (LN6 - entropy) / 6])
    for trained in (False, True):
        by_hidden, by_weight = gradients(lambda *x: logprobs.token_logprobs_and_entropy(*x)[1], trained=trained)
        assert_close(by_hidden, by_logit[:2], **FLOAT64)
        if trained:
            assert_close(by_weight, by_logit[:, None] * doubles([LN2, LN3]), **FLOAT64)


# Against the plain formula --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("temperature, softcap", [(1.0, None), (0.7, None), (1.0, 2.0), (1.3, 0.8)])
@pytest.mark.usefixtures("tiling")
def test_values_and_gradients_are_those_of_log_softmax(
    trained: bool, temperature: float, softcap: float | None
) -> None:
    hidden, weight, token_ids = random_case()
    upstream = torch.randn(2, 2, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    results = []
    for function in (
        plain,
        lambda h, w, i, t, c: module.token_logprobs_and_entropy(h, w, i, temperature=t, logit_softcap=c),
    ):
        inputs = [hidden.clone().requires_grad_(), weight.clone().requires_grad_(trained)]
        values, entropy = function(*inputs, token_ids, temperature, softcap)
        (upstream[0] * values + upstream[1] * entropy).sum().backward()
        results.append([values.detach(), entropy.detach(), *(x.grad for x in inputs)])
    for actual, expected in zip(results[1], results[0], strict=True):
        assert_close(actual, expected, **FLOAT64)


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("temperature, softcap", [(1.0, None), (0.7, 1.5)])
@pytest.mark.usefixtures("tiling")
def test_finite_differences(trained: bool, temperature: float, softcap: float | None) -> None:
    hidden, weight, token_ids = random_case((3,), 2, 7)
    inputs = (hidden.requires_grad_(), weight.requires_grad_(trained))
    options: Any = {"temperature": temperature, "logit_softcap": softcap}
    assert torch.autograd.gradcheck(
        lambda h, w: module.token_logprobs(h, w, token_ids, **options), inputs, **FINITE_DIFFERENCE
    )
    assert torch.autograd.gradcheck(
        lambda h, w: module.token_logprobs_and_entropy(h, w, token_ids, **options), inputs, **FINITE_DIFFERENCE
    )


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    rows=st.integers(0, 6),
    words=st.integers(1, 12),
    tile_rows=st.integers(1, 4),
    tile_bytes=st.integers(1, 400),
    seed=st.integers(0, 99),
)
def test_no_tiling_changes_the_result(rows: int, words: int, tile_rows: int, tile_bytes: int, seed: int) -> None:
    hidden, weight, token_ids = random_case((rows,), 3, words, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "TILE_ROWS", tile_rows)
        patch.setattr(module, "TILE_BYTES", tile_bytes)
        values, entropy = module.token_logprobs_and_entropy(8 * hidden, weight, token_ids, temperature=0.5)
    expected, expected_entropy = plain(8 * hidden, weight, token_ids, 0.5)
    assert_close(values, expected, **FLOAT64)
    assert_close(entropy, expected_entropy, **FLOAT64)
    assert (values <= 0).all() and (entropy >= 0).all()


def test_any_leading_shape_and_any_company() -> None:
    """A token's logprob does not depend on the rows, the padding or the order around it."""
    hidden, weight, token_ids = random_case((3, 4))
    expected = module.token_logprobs(hidden, weight, token_ids)
    flat = module.token_logprobs(hidden.view(12, -1), weight, token_ids.view(12))
    assert_close(flat.view(3, 4), expected, **FLOAT64)
    assert_close(module.token_logprobs(hidden[1, 2], weight, token_ids[1, 2]), expected[1, 2], **FLOAT64)
    padded = module.token_logprobs(
        torch.nn.functional.pad(hidden, (0, 0, 2, 3)).flip(0),
        weight,
        torch.nn.functional.pad(token_ids, (2, 3)).flip(0),
    )
    assert_close(padded.flip(0)[:, 2:-3], expected, **FLOAT64)


# Precision ------------------------------------------------------------------------------------------------------------


def test_dtypes() -> None:
    """float32 results from float32 and lower, float64 from float64; gradients in the dtype of what they belong to."""
    for dtype, expected in (
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ):
        for trained in (False, True):
            hidden, weight, token_ids = random_case()
            hidden, weight = hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(trained)
            values, entropy = module.token_logprobs_and_entropy(hidden, weight, token_ids)
            assert values.dtype == entropy.dtype == expected
            (values.sum() + entropy.sum()).backward()
            assert hidden.grad is not None and hidden.grad.dtype == dtype
            assert not trained or (weight.grad is not None and weight.grad.dtype == dtype)


def test_autocast_does_not_lower_the_precision() -> None:
    hidden, weight, token_ids = (x.float() if x.is_floating_point() else x for x in random_case())
    expected = module.token_logprobs(hidden, weight, token_ids)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_close(module.token_logprobs(hidden, weight, token_ids), expected, **EXACT)


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.usefixtures("tiling")
def test_bfloat16_is_float32_behind_the_product(trained: bool) -> None:
    """Close to the double-precision numbers of the same rounded inputs, in value and in gradient."""
    hidden, weight, token_ids = (x.bfloat16() if x.is_floating_point() else x for x in random_case((4, 8), 16, 50))
    low = [hidden.clone().requires_grad_(), weight.clone().requires_grad_(trained)]
    high = [hidden.double().requires_grad_(), weight.double().requires_grad_(trained)]
    values, expected = module.token_logprobs(*low, token_ids), plain(*high, token_ids)[0]
    assert_close(values.double(), expected, **BFLOAT16)
    values.sum().backward()
    expected.sum().backward()
    for x, y in zip(low, high, strict=True):
        if x.grad is not None:
            assert y.grad is not None
            scale = y.grad.abs().max()
            assert_close(x.grad.double() / scale, y.grad / scale, **BFLOAT16)


def test_a_confident_token_keeps_its_small_gradient(logprobs: ModuleType) -> None:
    """Logits (18, 0): 1 - p = 1 / (1 + e^18) = 1.5e-8, a quarter of float32's rounding at 1, is minus the logprob (to
    first order) and the gradient (1 - p) (W_0 - W_1)."""
    for dtype in (torch.float32, torch.bfloat16):
        hidden = torch.tensor([[18.0, 0.0]], dtype=dtype, requires_grad=True)
        value = logprobs.token_logprobs(hidden, torch.eye(2, dtype=dtype), torch.tensor([0]))
        value.sum().backward()
        assert hidden.grad is not None
        others = 1 / (1 + math.exp(18))
        assert_close(value.detach().double(), doubles([-others]), **TWO_DIGITS)
        assert_close(hidden.grad.double(), doubles([[others, -others]]), **TWO_DIGITS)


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.usefixtures("tiling")
def test_absurd_logits_stay_finite(trained: bool) -> None:
    """Logits of +-1e30, and one of -inf: where a probability vanishes, p log p is 0 and not 0 * inf."""
    hidden = torch.tensor([[1e30], [-1e30]], requires_grad=True)
    weight = torch.tensor([[1.0], [0.5], [0.0], [-1.0]]).requires_grad_(trained)
    values, entropy = module.token_logprobs_and_entropy(hidden, weight, torch.tensor([0, 3]))
    assert_close(values.detach(), torch.zeros(2), **EXACT)
    assert_close(entropy.detach(), torch.zeros(2), **EXACT)
    (values + entropy).sum().backward()
    assert hidden.grad is not None and hidden.grad.isfinite().all()
    assert not trained or (weight.grad is not None and weight.grad.isfinite().all())

    overflow = torch.tensor([[3e38], [0.0]])
    values, entropy = module.token_logprobs_and_entropy(overflow, torch.tensor([[0.0], [-2.0]]), torch.tensor([0, 0]))
    assert_close(values, torch.tensor([0.0, -LN2]), **FLOAT32)
    assert_close(entropy, torch.tensor([0.0, LN2]), **FLOAT32)


@pytest.mark.parametrize("with_entropy", [False, True])
@pytest.mark.parametrize("trained", [False, True])
def test_a_row_of_nan_stays_where_it_is(trained: bool, with_entropy: bool) -> None:
    """A masked position may hold NaN: its neighbours' values and every gradient are what they would be without it."""
    hidden, weight, token_ids = random_case((3,))
    weight.requires_grad_(trained)
    mask = torch.tensor([True, False, True])
    found: list[list[Tensor | None]] = []
    for bad in (0.0, math.nan):
        states = torch.where(mask[:, None], hidden, bad).requires_grad_()
        values, entropy = module.token_logprobs_and_entropy(states, weight, token_ids)
        loss = torch.where(mask, values + entropy if with_entropy else values, 0).sum()
        loss.backward()
        found.append([loss.detach(), states.grad, weight.grad])
        weight.grad = None
    for actual, expected in zip(found[1], found[0], strict=True):
        assert_close(actual, expected, **FLOAT64)


# Cost -----------------------------------------------------------------------------------------------------------------


class Watch(TorchDispatchMode):
    """Sees every operation, forward and backward: the largest result, and how many matrix products there were."""

    largest_bytes = 0
    products = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(x, Tensor):
                self.largest_bytes = max(self.largest_bytes, x.numel() * x.element_size())
        self.products += func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_)
        return result


def wide_case(trained: bool) -> tuple[Tensor, Tensor, Tensor]:
    """64 tokens of a vocabulary of 20,000: the logits would take 5.1 MB, the weight takes .3 MB."""
    hidden, weight, token_ids = random_case((2, 32), 4, 20_000)
    return hidden.float().requires_grad_(), weight.float().requires_grad_(trained), token_ids


@pytest.mark.parametrize("with_entropy", [False, True])
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("limit", ["TILE_BYTES", "CPU_TILE_BYTES"])
def test_nothing_is_larger_than_a_tile(
    trained: bool, with_entropy: bool, limit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, limit, 400_000)
    case = wide_case(trained)
    with Watch() as watch:
        if with_entropy:
            sum(module.token_logprobs_and_entropy(*case)).sum().backward()
        else:
            module.token_logprobs(*case, logit_softcap=3.0).sum().backward()
    assert 200_000 < watch.largest_bytes <= 400_000
    with Watch() as watch:
        plain(*case)
    assert watch.largest_bytes == 64 * 20_000 * 4  # the watch does see logits


def test_default_tiles_hold_at_most_32_megabytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gemma 3's vocabulary, float32: on a CPU less, and without the CPU's own limit still no more."""
    hidden, weight = torch.empty(1000, 1), torch.empty(262_144, 1)
    for patch in (False, True):
        if patch:
            monkeypatch.setattr(module, "CPU_TILE_BYTES", 10**12)
        rows, columns = module._tiles(hidden, weight)
        largest = max(r.stop - r.start for r in rows) * max(c.stop - c.start for c in columns) * 4
        assert largest <= 32_000_000
        assert sum(r.stop - r.start for r in rows) == 1000
        assert sum(c.stop - c.start for c in columns) == 262_144


@pytest.fixture
def watched() -> Iterator[Watch]:
    with Watch() as watch:
        yield watch


def test_a_frozen_head_is_not_seen_again_in_the_backward_pass(watched: Watch) -> None:
    values, entropy = module.token_logprobs_and_entropy(*wide_case(trained=False))
    in_forward = watched.products
    assert in_forward > 0
    values.sum().backward()
    assert watched.products == in_forward
    assert entropy.requires_grad


def test_without_gradient_no_gradient_is_computed(watched: Watch) -> None:
    hidden, weight, token_ids = wide_case(trained=False)
    module.token_logprobs(hidden, weight, token_ids)
    with_gradient, watched.products = watched.products, 0
    with torch.no_grad():
        assert not module.token_logprobs(hidden, weight, token_ids).requires_grad
    assert watched.products == with_gradient / 2
    watched.products = 0
    module.token_logprobs(hidden.detach(), weight, token_ids)
    assert watched.products == with_gradient / 2


# Errors ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change, message",
    [
        ({"hidden": torch.zeros(1, 3, 4)}, r"hidden must be \(\.\.\., H\) and weight \(V, H\)"),
        ({"weight": torch.zeros(2, dtype=torch.float64)}, r"hidden must be \(\.\.\., H\) and weight \(V, H\)"),
        ({"token_ids": torch.zeros(1, 2, dtype=torch.long)}, r"leading shape \(1, 3\)"),
        ({"weight": torch.zeros(3, 2)}, "one floating dtype"),
        ({"token_ids": torch.zeros(1, 3)}, "must be integers"),
        ({"token_ids": torch.tensor([[0, 1, 3]])}, r"must lie in \[0, 3\); got 0 to 3"),
        ({"token_ids": torch.tensor([[0, 1, -100]])}, r"got -100 to 1"),
        ({"temperature": 0.0}, "temperature must be > 0"),
        ({"temperature": math.nan}, "temperature must be > 0"),
        ({"logit_softcap": 0.0}, "logit_softcap must be > 0, or None"),
    ],
)
def test_errors(change: Any, message: str) -> None:
    hidden, weight, token_ids = three_words()
    with pytest.raises(ValueError, match=message):
        module.token_logprobs(**{"hidden": hidden, "weight": weight, "token_ids": token_ids, **change})


def test_second_derivatives_are_refused() -> None:
    hidden, weight, token_ids = three_words()
    values = module.token_logprobs(hidden.requires_grad_(), weight, token_ids)
    (gradient,) = torch.autograd.grad(values.square().sum(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def many_tiles(test: Callable[[ModuleType], None]) -> Callable[[ModuleType], None]:
    """A test of the numbers, with tiles of a single logit."""

    def tiled(mutant: ModuleType) -> None:
        mutant.TILE_BYTES = 8  # type: ignore[attr-defined]
        test(mutant)

    return tiled


ALL_NUMBERS = (
    test_logprobs_and_entropy,
    test_temperature,
    test_softcap_comes_before_temperature,
    test_gradient_of_the_logprob,
    test_gradient_through_the_softcap,
    test_gradient_of_the_entropy,
)


@pytest.mark.parametrize("test", ALL_NUMBERS)
def test_numbers_with_a_logit_a_tile(test: Any) -> None:
    many_tiles(test)(mutated(module, "TILE_ROWS = 256", "TILE_ROWS = 1"))


@pytest.mark.parametrize(
    "text, replacement, test",
    [
        ("logprobs = distance - log_mass", "logprobs = log_mass - distance", test_logprobs_and_entropy),
        ("logprobs = distance - log_mass", "logprobs = distance", test_logprobs_and_entropy),
        ("entropy = log_mass - (mom", "entropy = log_mass + (mom", test_logprobs_and_entropy),
        ("(moment + own * distance.clamp(min=_VANISHED))", "moment", test_logprobs_and_entropy),
        ("raw if self.temperature == 1 else raw.div_(self.temperature)", "raw", test_temperature),
        ("div_(self.softcap)", "div_(self.softcap * self.temperature)", test_softcap_comes_before_temperature),
        ("self.softcap / self.temperature", "self.softcap", test_softcap_comes_before_temperature),
        ("gradient.sub_(pull", "gradient.add_(pull", test_gradient_of_the_logprob),
        (".div_(scaling.temperature)", "", test_gradient_of_the_logprob),
        ("from_logprobs[used] / -scaling.temperature", "-from_logprobs[used]", test_gradient_of_the_logprob),
        ("from_logprobs[used] / -scaling", "from_logprobs[used] / scaling", test_gradient_of_the_logprob),
        ("weights.scatter_(1, local", "weights.clone().scatter_(1, local", test_gradient_of_the_logprob),
        ("rest / mass * taken_slope", "taken_slope", test_gradient_of_the_logprob),
        ("local, -down_logprobs", "local, down_logprobs", test_gradient_of_the_logprob),
        ("grad_logits.T, states", "grad_logits.T.flip(0), states", test_gradient_of_the_logprob),
        ("if slope is None else weights.mul_(slope)", "", test_gradient_through_the_softcap),
        ("slope.gather(1, local), taken_slope", "taken_slope, taken_slope", test_gradient_through_the_softcap),
        ("grad_logits.mul_(slope)", "pass", test_gradient_through_the_softcap),
        (".add_(entropy[rows])", "", test_gradient_of_the_entropy),
        ("from_entropy[used] / -scaling", "from_entropy[used] / scaling", test_gradient_of_the_entropy),
        ("torch.log1p(rest + torch.expm1(distance))", "mass.log()", test_a_confident_token_keeps_its_small_gradient),
        ("rest / mass", "(1 - own / mass)", test_a_confident_token_keeps_its_small_gradient),
        ("decay * (moment + drop * rest)", "decay * moment", many_tiles(test_logprobs_and_entropy)),
        ("rest = decay * rest", "rest = rest", many_tiles(test_logprobs_and_entropy)),
        ("pull.mul_(decay)", "pull", many_tiles(test_gradient_of_the_logprob)),
        ("logits.gather(1, local), taken)", "taken, taken)", many_tiles(test_logprobs_and_entropy)),
        ("masked_fill(~inside, 0.0)", "clone()", many_tiles(test_gradient_of_the_logprob)),
    ],
)
def test_mutants_are_noticed(text: str, replacement: str, test: Any) -> None:
    with pytest.raises(AssertionError):
        test(mutated(module, text, replacement))
