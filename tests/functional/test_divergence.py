"""The exact divergence of two heads against hand-made distributions, the plain formula, and what a tile may hold."""

import math
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from alignlab.functional import divergence as module
from alignlab.functional import logprobs as tiles
from tests.statistics.mutants import mutated
from tests.tolerances import EXACT, FINITE_DIFFERENCE, FLOAT32, FLOAT64

LN2, LN3 = math.log(2), math.log(3)
PAIR = ("hidden", "weight", "teacher_hidden", "teacher_weight")


@pytest.fixture
def divergence() -> ModuleType:
    return module


@pytest.fixture(params=["one tile", "many tiles"])
def tiling(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything in one tile, or tiles of two rows by three columns that neither rows nor vocabulary fill evenly."""
    if request.param == "many tiles":
        monkeypatch.setattr(tiles, "TILE_ROWS", 2)
        monkeypatch.setattr(tiles, "TILE_BYTES", 2 * 3 * 8)


def doubles(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def by_hand() -> dict[str, Tensor]:
    """Student: logits (ln 2, ln 3, 0), p = (2, 3, 1) / 6; teacher, less wide: (0, 0, ln 2), q = (1, 1, 2) / 4."""
    return {
        "hidden": doubles([[LN2, LN3]]),
        "weight": doubles([[1, 0], [0, 1], [0, 0]]),
        "teacher_hidden": doubles([[LN2]]),
        "teacher_weight": doubles([[0], [0], [1]]),
    }


P, Q = doubles([2, 3, 1]) / 6, doubles([1, 1, 2]) / 4
KL = math.log(4 / 3) / 3 + math.log(2) / 2 + math.log(1 / 3) / 6
"""p log(p / q): 2/6 log(8/6), 3/6 log(12/6), 1/6 log(4/12)."""


def plain(
    hidden: Tensor,
    weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    temperature: float = 1.0,
    softcap: float | None = None,
    teacher_softcap: float | None = None,
) -> Tensor:
    """The formula as it is written, with all the logits there are."""
    logs = []
    for states, head, cap in ((hidden, weight, softcap), (teacher_hidden, teacher_weight, teacher_softcap)):
        logits = states @ head.T
        if cap is not None:
            logits = cap * torch.tanh(logits / cap)
        logs.append((logits / temperature).log_softmax(-1))
    return (logs[0].exp() * (logs[0] - logs[1])).sum(-1)


def random_case(shape: tuple[int, ...] = (2, 4), words: int = 11, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    sizes = ((*shape, 5), (words, 5), (*shape, 3), (words, 3))
    return [torch.randn(*size, generator=generator, dtype=torch.float64) for size in sizes]


# Numbers --------------------------------------------------------------------------------------------------------------


def test_value(divergence: ModuleType) -> None:
    """And not the forward one, which is (1/4) log(3/4) + (1/4) log(1/2) + (1/2) log 3."""
    found = divergence.reverse_kl(**by_hand())
    assert_close(found, doubles([KL]), **FLOAT64)
    assert abs(KL - (math.log(3 / 4) / 4 + math.log(1 / 2) / 4 + LN3 / 2)) > 0.01


def test_temperature(divergence: ModuleType) -> None:
    """At temperature 1/2 the odds of both are squared: p = (4, 9, 1) / 14, q = (1, 1, 4) / 6."""
    p, q = doubles([4, 9, 1]) / 14, doubles([1, 1, 4]) / 6
    found = divergence.reverse_kl(**by_hand(), temperature=0.5)
    assert_close(found, (p * (p / q).log()).sum()[None], **FLOAT64)


def test_each_model_has_its_own_softcap(divergence: ModuleType) -> None:
    """tanh(ln x) = (x^2 - 1) / (x^2 + 1): the student's logits capped at 1 are (.6, .8, 0), the teacher's at 1/2 are
    (0, 0, .5 tanh(2 ln 2)) = (0, 0, .5 * 15 / 17)."""
    p, q = (doubles(x).softmax(-1) for x in ([0.6, 0.8, 0.0], [0.0, 0.0, 7.5 / 17]))
    found = divergence.reverse_kl(**by_hand(), logit_softcap=1.0, teacher_logit_softcap=0.5)
    assert_close(found, (p * (p / q).log()).sum()[None], **FLOAT64)


def gradients(function: Callable[..., Tensor], **options: Any) -> tuple[Tensor, Tensor]:
    case = by_hand()
    for tensor in case.values():
        tensor.requires_grad_()
    function(**case, **options).sum().backward()
    assert case["teacher_hidden"].grad is None and case["teacher_weight"].grad is None
    assert case["hidden"].grad is not None and case["weight"].grad is not None
    return case["hidden"].grad.flatten(), case["weight"].grad


def test_gradient(divergence: ModuleType) -> None:
    """By the student's logit of v: p_v (log(p_v / q_v) - KL); by hidden its first two (W is the identity there), by
    weight times hidden; the teacher has none."""
    by_logit = P * ((P / Q).log() - KL)
    by_hidden, by_weight = gradients(divergence.reverse_kl)
    assert_close(by_hidden, by_logit[:2], **FLOAT64)
    assert_close(by_weight, by_logit[:, None] * doubles([LN2, LN3]), **FLOAT64)


def test_gradient_at_a_temperature_and_through_the_softcap(divergence: ModuleType) -> None:
    """Temperature 1/2 doubles the slope; the cap's slopes are 1 - .6^2, 1 - .8^2 and 1."""
    p, q = doubles([4, 9, 1]) / 14, doubles([1, 1, 4]) / 6
    by_logit = 2 * p * ((p / q).log() - (p * (p / q).log()).sum())
    assert_close(gradients(divergence.reverse_kl, temperature=0.5)[0], by_logit[:2], **FLOAT64)
    p = doubles([0.6, 0.8, 0.0]).softmax(-1)
    by_logit = doubles([0.64, 0.36, 1.0]) * p * ((p / Q).log() - (p * (p / Q).log()).sum())
    by_hidden, by_weight = gradients(divergence.reverse_kl, logit_softcap=1.0)
    assert_close(by_hidden, by_logit[:2], **FLOAT64)
    assert_close(by_weight, by_logit[:, None] * doubles([LN2, LN3]), **FLOAT64)


# Against the plain formula --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("temperature, caps", [(1.0, (None, None)), (0.7, (None, 2.0)), (1.3, (0.8, None))])
@pytest.mark.usefixtures("tiling")
def test_values_and_gradients_are_those_of_log_softmax(
    trained: bool, temperature: float, caps: tuple[float | None, float | None]
) -> None:
    upstream = torch.randn(2, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    results = []
    for function in (
        lambda *x: plain(*x, temperature, *caps),
        lambda *x: module.reverse_kl(*x, temperature=temperature, logit_softcap=caps[0], teacher_logit_softcap=caps[1]),
    ):
        inputs = random_case()
        inputs[0].requires_grad_()
        inputs[1].requires_grad_(trained)
        values = function(*inputs)
        (upstream * values).sum().backward()
        results.append([values.detach(), inputs[0].grad, inputs[1].grad])
    for actual, expected in zip(results[1], results[0], strict=True):
        assert_close(actual, expected, **FLOAT64)


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("temperature, softcap", [(1.0, None), (0.7, 1.5)])
@pytest.mark.usefixtures("tiling")
def test_finite_differences(trained: bool, temperature: float, softcap: float | None) -> None:
    hidden, weight, *teacher = random_case((3,), 7)
    assert torch.autograd.gradcheck(
        lambda h, w: module.reverse_kl(h, w, *teacher, temperature=temperature, logit_softcap=softcap),
        (hidden.requires_grad_(), weight.requires_grad_(trained)),
        **FINITE_DIFFERENCE,
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
    hidden, *rest = random_case((rows,), words, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiles, "TILE_ROWS", tile_rows)
        patch.setattr(tiles, "TILE_BYTES", tile_bytes)
        found = module.reverse_kl(8 * hidden, *rest, temperature=0.5)
    assert_close(found, plain(8 * hidden, *rest, 0.5), **FLOAT64)
    assert (found >= 0).all()


def test_any_leading_shape_and_any_company() -> None:
    hidden, weight, teacher_hidden, teacher_weight = random_case((3, 4))
    expected = module.reverse_kl(hidden, weight, teacher_hidden, teacher_weight)
    flat = module.reverse_kl(hidden.view(12, -1), weight, teacher_hidden.view(12, -1), teacher_weight)
    assert_close(flat.view(3, 4), expected, **FLOAT64)
    assert_close(module.reverse_kl(hidden[1, 2], weight, teacher_hidden[1, 2], teacher_weight), expected[1, 2])


# Identities and precision ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_model_does_not_diverge_from_itself(dtype: torch.dtype) -> None:
    """Value and gradient are exactly 0, whatever the tiles."""
    hidden, weight, *_ = (x.to(dtype) for x in random_case((40,), 300))
    inputs = [(8 * hidden).requires_grad_(), weight.requires_grad_()]
    found = module.reverse_kl(*inputs, inputs[0], inputs[1], temperature=0.8, logit_softcap=3, teacher_logit_softcap=3)
    found.sum().backward()
    for tensor in (found, *(x.grad for x in inputs)):
        assert_close(tensor, torch.zeros_like(tensor), **EXACT)


def test_a_shift_of_all_logits_changes_nothing_and_both_directions_differ() -> None:
    """A column of ones in both heads, with any state on it, adds a constant to the logits."""
    hidden, weight, teacher_hidden, teacher_weight = random_case((6,))
    expected = module.reverse_kl(hidden, weight, teacher_hidden, teacher_weight)
    ones, shift = torch.ones(11, 1, dtype=torch.float64), doubles([[5.0], [-3], [0], [2], [9], [-30]])
    found = module.reverse_kl(
        torch.cat([hidden, shift], 1), torch.cat([weight, ones], 1), teacher_hidden, teacher_weight
    )
    assert_close(found, expected, **FLOAT64)
    assert (module.reverse_kl(teacher_hidden, teacher_weight, hidden, weight) - expected).abs().min() > 1e-3


def test_the_sampled_log_ratio_has_this_mean_and_this_gradient() -> None:
    """Over all words: sum_v p_v (log p_v - log q_v) is it, and the policy gradient sum_v p_v A_v grad log p_v with
    A = log q - log p is minus its gradient: what `objective: sampled` estimates."""
    hidden, weight, teacher_hidden, teacher_weight = random_case((1,))
    hidden.requires_grad_()
    module.reverse_kl(hidden, weight, teacher_hidden, teacher_weight).sum().backward()
    exact, hidden.grad = hidden.grad, None
    words = torch.arange(11)[None]
    logs = tiles.token_logprobs(hidden[:, None].expand(1, 11, -1), weight, words)
    teacher = tiles.token_logprobs(teacher_hidden[:, None].expand(1, 11, -1), teacher_weight, words)
    (logs.exp() * (teacher - logs)).detach().mul(logs).sum().backward()
    assert exact is not None and hidden.grad is not None and exact.norm() > 0.1
    assert_close(-hidden.grad, exact, **FLOAT64)


def test_small_divergences_keep_their_digits_in_float32() -> None:
    """The error is that of a logit, about 1e-6 nats here, however small the divergence is."""
    hidden, weight, *_ = random_case((50,), 2000)
    near = hidden + 1e-2 * torch.randn(hidden.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    exact = plain(hidden, weight, near, weight)
    assert exact.min() > 1e-6 and exact.max() < 1e-2
    found = module.reverse_kl(*(x.float() for x in (hidden, weight, near, weight)))
    assert found.dtype == torch.float32 and (found >= 0).all()
    assert_close(found.double(), exact, rtol=0, atol=2e-6)


def test_bfloat16_logits_are_summed_in_float32() -> None:
    """Products are taken in the models' own types, here two; what is done with them is exact to float32."""
    hidden, weight, teacher_hidden, teacher_weight = random_case((5,), 2000)
    coarse, fine = (hidden.bfloat16(), weight.bfloat16()), (teacher_hidden.float(), teacher_weight.float())
    logits = (coarse[0] @ coarse[1].T).double(), (fine[0] @ fine[1].T).double()
    words = torch.eye(2000, dtype=torch.float64)
    found = module.reverse_kl(*coarse, *fine)
    assert found.dtype == torch.float32
    assert_close(found.double(), plain(logits[0], words, logits[1], words), **FLOAT32)


def test_certain_and_impossible_words() -> None:
    """Logits of +-1000: p is 1 or 0 to the last bit, and 0 log 0 is 0."""
    head = torch.eye(3, dtype=torch.float64)
    student, teacher = doubles([[1000.0, -1000.0, 0.0]]), doubles([[0.0, 1000.0, 0.0]])
    hidden = student.clone().requires_grad_()
    found = module.reverse_kl(hidden, head, teacher, head)
    assert_close(found, doubles([1000.0]), **FLOAT64)
    found.sum().backward()
    assert hidden.grad is not None and hidden.grad.isfinite().all()


def test_rows_that_nobody_used_spread_no_nan() -> None:
    hidden, weight, *teacher = random_case((3,))
    hidden[1] = math.nan
    hidden.requires_grad_()
    weight.requires_grad_()
    values = module.reverse_kl(hidden, weight, *teacher)
    torch.where(torch.tensor([True, False, True]), values, 0.0).sum().backward()
    assert hidden.grad is not None and weight.grad is not None
    assert hidden.grad.isfinite().all() and weight.grad.isfinite().all() and not hidden.grad[1].any()


class Watch(TorchDispatchMode):
    """The largest tensor that any operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.largest_bytes = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.largest_bytes = max(self.largest_bytes, result.numel() * result.itemsize)
        return result


@pytest.mark.parametrize("trained", [False, True])
def test_nothing_is_larger_than_a_tile(trained: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "TILE_BYTES", 400_000)
    hidden, weight, *teacher = (x.float() for x in random_case((64,), 20_000))
    with Watch() as watch:
        module.reverse_kl(hidden.requires_grad_(), weight.requires_grad_(trained), *teacher).sum().backward()
    assert 200_000 < watch.largest_bytes <= 400_000


# Errors ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change, message",
    [
        ({"hidden": torch.zeros(1, 3, dtype=torch.float64)}, r"reverse_kl: hidden must be \(\.\.\., H\)"),
        ({"teacher_hidden": torch.zeros(1, 3, dtype=torch.float64)}, r"teacher_hidden must be \(\.\.\., H\)"),
        ({"teacher_hidden": torch.zeros(2, 1, dtype=torch.float64)}, r"same positions; got \(1,\) and \(2,\)"),
        ({"teacher_weight": torch.zeros(4, 1, dtype=torch.float64)}, "heads have 3 and 4 entries"),
        ({"weight": torch.zeros(3, 2)}, "hidden and weight must have one floating dtype"),
        ({"teacher_weight": torch.zeros(3, 1)}, "teacher_hidden and teacher_weight must have one floating dtype"),
        ({"temperature": 0.0}, "temperature must be > 0"),
        ({"temperature": math.nan}, "temperature must be > 0"),
        ({"logit_softcap": 0.0}, "logit_softcap must be > 0, or None"),
        ({"teacher_logit_softcap": -1.0}, "logit_softcap must be > 0, or None"),
    ],
)
def test_errors(change: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        module.reverse_kl(**{**by_hand(), **change})


def many_tiles(test: Callable[[ModuleType], None]) -> Callable[[ModuleType], None]:
    """A test of the numbers, with tiles of a single logit."""

    def tiled(changed: ModuleType) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(tiles, "TILE_ROWS", 1)
            patch.setattr(tiles, "TILE_BYTES", 8)
            test(changed)

    return tiled


NUMBERS = (
    test_value,
    test_temperature,
    test_each_model_has_its_own_softcap,
    test_gradient,
    test_gradient_at_a_temperature_and_through_the_softcap,
)


@pytest.mark.parametrize("test", NUMBERS)
def test_numbers_with_a_logit_a_tile(test: Any) -> None:
    many_tiles(test)(module)


@pytest.mark.parametrize(
    "text, replacement, test",
    [
        ("excess / mass - offset[rows]", "excess / mass + offset[rows]", test_value),
        ("excess / mass - offset[rows]", "excess / mass", test_value),
        ("excess / mass - offset[rows]", "offset[rows] - excess / mass", test_value),
        ("logits.sub_(others)).sum(1", "others.sub_(logits)).sum(1", test_value),
        ("_Scaling(temperature, teacher_logit_softcap)", "_Scaling(1.0, teacher_logit_softcap)", test_temperature),
        (
            "_Scaling(temperature, teacher_logit_softcap)",
            "_Scaling(temperature, logit_softcap)",
            test_each_model_has_its_own_softcap,
        ),
        ("log_ratio.sub_(kl[rows])", "log_ratio", test_gradient),
        (".sub_(offset[rows])", "", test_gradient),
        ("(logits - logsumexp[rows]).exp_()", "torch.ones_like(logits)", test_gradient),
        (".mul_(down[rows])", ".mul_(-down[rows])", test_gradient),
        ("grad_logits.T, states", "grad_logits.T.flip(0), states", test_gradient),
        ("wants_weight = kl.dtype, ctx.needs_input_grad[1]", "wants_weight = kl.dtype, False", test_gradient),
        ("teacher_weight.detach(),", "teacher_weight.detach() * 2,", test_value),
        ("/ scaling.temperature", "", test_gradient_at_a_temperature_and_through_the_softcap),
        ("grad_logits.mul_(slope)", "pass", test_gradient_at_a_temperature_and_through_the_softcap),
        ("mass = decay * mass", "mass = mass", many_tiles(test_value)),
        ("excess = decay * excess", "excess = excess", many_tiles(test_value)),
        ("(previous - teacher_top).exp() * teacher_mass", "teacher_mass", many_tiles(test_value)),
    ],
)
def test_mutants_are_noticed(text: str, replacement: str, test: Any) -> None:
    with pytest.raises((AssertionError, RuntimeError)):
        test(mutated(module, text, replacement))
