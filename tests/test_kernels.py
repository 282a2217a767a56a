"""The loops in C say what PyTorch says, whatever the sizes and threads, and nothing needs them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.testing import assert_close

from alignlab import kernels

pytestmark = pytest.mark.skipif(not kernels.ready(), reason="there is no C compiler")
CLOSE = {"rtol": 2e-6, "atol": 2e-6}
SIZES = (1, 15, 16, 17, 32, 50)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=[1, 3], ids=["one thread", "three threads"])
def threads(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    monkeypatch.setattr(kernels, "SPLIT", 8)
    kernels._threads.cache_clear()
    yield
    torch.set_num_threads(before)
    kernels._threads.cache_clear()


def norms(size: int, rows: int = 37) -> None:
    x, weight, residual, grad = (drawn(rows, size, seed=i) for i in range(4))
    weight = weight[0]
    for offset in (0.0, 1.0):
        x.requires_grad_(), weight.requires_grad_()
        plain = F.rms_norm(x, (size,), weight + offset, 0.1)
        by_x, by_weight = torch.autograd.grad(plain, (x, weight), grad)
        with torch.no_grad():
            y, factors = kernels.norm(x, weight, 0.1, offset, None)
            assert_close(y, plain, **CLOSE)
            assert_close(kernels.norm(x, weight, 0.1, offset, residual)[0], plain + residual, **CLOSE)
            found, total = kernels.norm_backward(grad, x, weight, factors, offset, True)
            assert total is not None
            assert_close(found, by_x, rtol=1e-5, atol=1e-5)
            assert_close(total, by_weight, rtol=1e-5, atol=1e-5)
            assert torch.equal(kernels.norm_backward(grad, x, weight, factors, offset, False)[0], found)


@pytest.mark.parametrize("size", SIZES)
def test_norms(size: int, threads: None) -> None:
    norms(size)


def gates(count: int) -> None:
    a = 2 * 0.7978845608028654
    for form, plain in (((1.0, 0.0), F.silu), ((a, a * 0.044715), lambda x: F.gelu(x, approximate="tanh"))):
        gate, up, grad = (4 * drawn(count, seed=i) for i in range(3))
        gate[:2] = torch.tensor([60.0, -60.0])[: len(gate)]
        gate.requires_grad_(), up.requires_grad_()
        expected = plain(gate) * up  # type: ignore[operator]
        by_gate, by_up = torch.autograd.grad(expected, (gate, up), grad)
        with torch.no_grad():
            assert_close(kernels.gate(gate, up, *form), expected, rtol=1e-5, atol=1e-5)
            found = kernels.gate_backward(grad, gate, up, *form)
            assert_close(found[0], by_gate, rtol=1e-5, atol=2e-5)
            assert_close(found[1], by_up, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("count", [*SIZES, 1000])
def test_gates(count: int, threads: None) -> None:
    gates(count)


def rotations(size: int) -> None:
    x, cos, sin = drawn(9, 3, size), drawn(9, 1, size, seed=1), drawn(9, 1, size, seed=2)
    for sign in (1.0, -1.0):
        expected = x * cos + sign * x.roll(size // 2, -1) * sin
        assert_close(kernels.rotate(x, cos, sin, sign), expected, **CLOSE)


@pytest.mark.parametrize("size", [2, 30, 32, 40, 64])
def test_rotations(size: int, threads: None) -> None:
    rotations(size)


def products(rows: int, inner: int, outer: int = 20) -> None:
    x, weight = drawn(rows, inner), drawn(outer, inner, seed=1)
    assert_close(kernels.product(x, weight), x @ weight.T, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rows", [*range(1, 14), 16, 40])
@pytest.mark.parametrize("inner", [3, 16, 50])
def test_products(rows: int, inner: int, threads: None) -> None:
    products(rows, inner)


def attentions(size: int = 32, softcap: float | None = None, masked: bool = True, shared: int = 3) -> None:
    rows, key_heads, count = 5, 2, 21
    query = drawn(rows, key_heads * shared, size)
    keys, values = (drawn(rows, key_heads, 30, size, seed=i)[:, :, 4 : 4 + count] for i in (1, 2))
    mask = drawn(rows, 30, seed=3)[:, 2 : 2 + count] > 0
    mask[:, -1] = True
    logits = query.view(rows, key_heads, shared, size) @ keys.transpose(-1, -2) * 0.3
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if masked:
        logits = logits.masked_fill(~mask[:, None, None], -torch.inf)
    expected = (logits.softmax(-1) @ values).view_as(query)
    found = kernels.attention(query, keys, values, mask if masked else None, 0.3, softcap)
    assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("size", [8, 16, 32, 40])
def test_attention(size: int, softcap: float | None, masked: bool, threads: None) -> None:
    for shared in (1, 2, 3, 4, 6):
        attentions(size, softcap, masked, shared)


def draws(size: int, softcap: float | None = None, spread: float = 3.0) -> None:
    logits = spread * drawn(40, size)
    uniforms = torch.rand(40, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    uniforms[0] = 0.0
    scaled = (logits if softcap is None else softcap * torch.tanh(logits / softcap)).double() / 0.7
    ends = scaled.softmax(-1).cumsum(-1)
    expected = torch.searchsorted(ends / ends[:, -1:], uniforms[:, None], right=True).clamp(max=size - 1)
    tokens, logprobs = kernels.draw(logits.clone(), uniforms, 0.7, softcap)
    assert torch.equal(tokens[:, None], expected)
    assert_close(logprobs.double(), scaled.log_softmax(-1).gather(-1, expected)[:, 0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("size", [1, 9, 50, 255, 256, 257, 1000])
def test_draws(size: int, softcap: float | None, threads: None) -> None:
    draws(size, softcap)


def test_a_token_without_weight_is_never_drawn(threads: None) -> None:
    logits = torch.full((3, 600), -1e4)
    logits[:, 17] = 1.0
    uniforms = torch.tensor([0.0, 0.5, 1 - 2**-53], dtype=torch.float64)
    tokens, logprobs = kernels.draw(logits, uniforms, 1.0, None)
    assert tokens.tolist() == [17] * 3 and logprobs.abs().max() < 1e-6


@pytest.mark.skipif(not hasattr(os, "register_at_fork"), reason="this system does not fork")
def test_a_forked_process_has_threads_of_its_own() -> None:
    code = (
        "import os, torch; from alignlab import kernels;"
        "torch.set_num_threads(3); kernels.SPLIT = 8; x = torch.ones(64, 32);"
        "kernels.gate(x, x, 1.0, 0.0); child = os.fork();"
        "os._exit(0) if child == 0 and kernels.gate(x, x, 1.0, 0.0) is not None else print(os.waitpid(child, 0)[1])"
    )
    ran = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=60)
    assert ran.stdout.strip() == "0", ran.stderr


def test_what_they_take() -> None:
    x = drawn(4, 8)
    assert kernels.ready(x, None)
    assert not kernels.ready(x, x.double()) and not kernels.ready(x.T) and not kernels.ready(x.bfloat16())


@pytest.mark.parametrize(
    "environment, there",
    [({}, True), ({"ALIGNLAB_KERNELS": "off"}, False), ({"CC": "/nowhere/cc"}, False), ({"CC": "false"}, False)],
)
def test_without_them_nothing_is_missing(environment: dict[str, str], there: bool, tmp_path: Path) -> None:
    """A compiler that is not there, or fails, is no error."""
    code = "from alignlab import kernels; print(kernels.ready())"
    cache = {"ALIGNLAB_CACHE": str(tmp_path)} if environment else {}
    ran = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **cache, **environment}, capture_output=True, text=True
    )
    assert (ran.returncode, ran.stdout.strip(), ran.stderr) == (0, str(there), "")


@pytest.mark.parametrize(
    "text, replacement, test",
    [
        ("load(add + i) + v : v", "v : v", lambda: norms(32)),
        ("v * pull) * factor);", "v) * factor);", lambda: norms(32)),
        ("in[i] * pull) * factor", "in[i]) * factor", lambda: norms(17)),
        ("% 16 == 15 || row + 1 == last", "% 16 == 15", lambda: norms(32)),
        ("(a + 3.0f * b * g * g)", "(a + b * g * g)", lambda: gates(50)),
        ("store_part(grad_gate + i, by_gate, count)", "store_part(grad_gate + i, by_up, count)", lambda: gates(17)),
        ("load(s + at + i) * sign", "load(s + at + i)", lambda: rotations(32)),
        ("y[r * outer + at + o] = sum", "y[r * outer + at] = sum", lambda: products(6, 16)),
        ("i = inner - inner % LANES", "i = inner", lambda: products(6, 50)),
        ("i < padded; i++) own[i] = -INFINITY", "i < padded; i++) own[i] = 0.0f", lambda: attentions()),
        ("if (!mask[i]) own[i]", "if (0) own[i]", lambda: attentions()),
        ("exponential(v * (2.0f / cap))", "exponential(v / cap)", lambda: attentions(softcap=2.0)),
        ("left -= masses[b]; continue", "continue", lambda: draws(1000)),
        ("own[token] - top - (float)log(total)", "own[token] - top", lambda: draws(50)),
        ("for (long k = count - i; k < LANES; k++) rest[k] = 0.0f;", "", lambda: draws(9, spread=100.0)),
        ("own[i] /= temperature", "own[i] *= temperature", lambda: draws(50)),
        ("odd = {1, 5, 3, 7}", "odd = {1, 5, 3, 6}", lambda: attentions()),
        ("for (long e = d; e < size; e++)", "for (long e = size; e < size; e++)", lambda: attentions(40)),
    ],
)
def test_mutants_are_noticed(
    text: str, replacement: str, test: Callable[[], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = kernels.SOURCE.read_text("utf-8")
    assert source.count(text) == 1, "update the mutant"
    mutant = tmp_path / "cpu.c"
    mutant.write_text(source.replace(text, replacement), "utf-8")
    monkeypatch.setattr(kernels, "SOURCE", mutant)
    monkeypatch.setattr(kernels, "FLAGS", ("-O1", "-march=native", "-shared", "-fPIC"))
    monkeypatch.setenv("ALIGNLAB_CACHE", str(tmp_path))
    kernels._library.cache_clear()
    try:
        assert kernels.ready()
        with pytest.raises(AssertionError):
            test()
    finally:
        kernels._library.cache_clear()
