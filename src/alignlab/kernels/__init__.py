"""Optional loops in C for the CPU: built once by the machine's own compiler, and never needed.

float32 tensors on the CPU -> the same results as PyTorch's operations up to rounding, in one pass over memory where
those take several. `ready()` says whether they are there; every caller has its way without. `ALIGNLAB_KERNELS=off` in
the environment keeps them away.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

SOURCE = Path(__file__).with_name("cpu.c")
FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-shared", "-fPIC")
KINDS = {"p": ctypes.c_void_p, "n": ctypes.c_long, "x": ctypes.c_float}
ARGUMENTS = {
    "norm_forward": "pppppnnnxx",
    "norm_backward": "ppppppnnnx",
    "gate_forward": "pppnnxx",
    "gate_backward": "pppppnnxx",
    "rotate": "ppppnnnnx",
    "product": "pppnnnnn",
    "attention": "pppppnnnnnnnnnxx",
    "draw": "ppppnnnxx",
    "decode_step": "pppppppnnnnnnnnnnxxxx",
}
"""Of every function in C: pointers, whole numbers, floats."""
PRODUCT_ROWS = 16
"""Rows up to which a product is bound by reading the weight, which `product` does once."""
SPLIT = 1 << 18
"""Numbers below which a second thread is not worth waking."""


@lru_cache(maxsize=1)
def _library() -> ctypes.CDLL | None:
    """The compiled loops; None where they are switched off or cannot be built."""
    if os.environ.get("ALIGNLAB_KERNELS", "").lower() in ("off", "0", "no"):
        return None
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if not compiler or sys.platform not in ("linux", "darwin") or sys.byteorder != "little":
        return None
    try:
        library = ctypes.CDLL(str(_built(compiler)))
    except (OSError, subprocess.SubprocessError):
        return None
    for name, kinds in ARGUMENTS.items():
        getattr(library, name).argtypes = [KINDS[kind] for kind in kinds]
        getattr(library, name).restype = None
    return library


def _built(compiler: str) -> Path:
    """The path of the library, made if it is not there: one for each source, compiler and processor."""
    told = subprocess.run([compiler, "--version"], capture_output=True, check=True, timeout=30).stdout
    what = "\0".join([SOURCE.read_text("utf-8"), *FLAGS, told.hex(), platform.machine(), _processor()])
    cache = Path(os.environ.get("ALIGNLAB_CACHE") or Path.home() / ".cache" / "alignlab") / "kernels"
    library = cache / f"{hashlib.sha256(what.encode()).hexdigest()[:16]}.so"
    if not library.is_file():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            made = Path(folder) / "cpu.so"
            command = [compiler, *FLAGS, "-o", str(made), str(SOURCE), "-lm"]
            subprocess.run(command, capture_output=True, check=True, timeout=120)
            made.replace(library)
    return library


def _processor() -> str:
    """What -march=native depends on, so that a cache shared by several machines serves each its own."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())


def ready(*tensors: Tensor | None) -> bool:
    """Whether the loops are there, and take these tensors: float32, on the CPU, without gaps."""
    for x in tensors:
        if x is not None and (x.dtype != torch.float32 or x.device.type != "cpu" or not x.is_contiguous()):
            return False
    return _library() is not None


@lru_cache(maxsize=1)
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(torch.get_num_threads(), thread_name_prefix="alignlab-kernels")


if hasattr(os, "register_at_fork"):  # a forked process has no threads, and would wait for them for ever
    os.register_at_fork(after_in_child=_threads.cache_clear)


def _shared(work: int, rows: int, function: Callable[[int, int], object], multiple: int = 1) -> None:
    """Calls function(first, last) for all rows, split among threads where it is enough work."""
    count = min(torch.get_num_threads(), max(1, work // SPLIT), max(1, rows // multiple))
    if count == 1:
        function(0, rows)
        return
    step = -(-rows // (count * multiple)) * multiple
    list(_threads().map(lambda at: function(at, min(rows, at + step)), range(0, rows, step)))


def _call(name: str, *arguments: Tensor | float | None) -> None:
    """Tensors go as their addresses."""
    given = [x.data_ptr() if isinstance(x, Tensor) else x for x in arguments]
    getattr(_library(), name)(*given)


def norm(x: Tensor, weight: Tensor, eps: float, offset: float, residual: Tensor | None) -> tuple[Tensor, Tensor]:
    """x * factor * (offset + weight) [+ residual] with factor = 1 / sqrt(mean x^2 + eps): x (..., H), weight (H,) ->
    (..., H) and the factors (..., 1)."""
    y, factors = torch.empty_like(x), x.new_empty((*x.shape[:-1], 1))
    size = x.shape[-1]
    _shared(x.numel(), factors.numel(), lambda first, last: _call(
        "norm_forward", x, weight, residual, y, factors, first, last, size, eps, offset))  # fmt: skip
    return y, factors


def norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, factors: Tensor, offset: float, wants_weight: bool
) -> tuple[Tensor, Tensor | None]:
    """The gradients of `norm` by x (..., H) and, where wanted, by the weight (H,)."""
    grad_x, size, rows = torch.empty_like(x), x.shape[-1], factors.numel()
    if not wants_weight:
        _shared(x.numel(), rows, lambda first, last: _call(
            "norm_backward", grad, x, weight, factors, grad_x, None, first, last, size, offset))  # fmt: skip
        return grad_x, None
    total = torch.zeros(size, dtype=torch.float64)  # one thread: the order of the sum is always the same
    _call("norm_backward", grad, x, weight, factors, grad_x, total, 0, rows, size, offset)
    return grad_x, total.float()


def gate(gate: Tensor, up: Tensor, a: float, b: float) -> Tensor:
    """gate * sigmoid(a gate + b gate^3) * up, all of one shape: SiLU with (1, 0), GELU by tanh otherwise."""
    y = torch.empty_like(gate)
    _shared(4 * y.numel(), y.numel(), lambda first, last: _call(
        "gate_forward", gate, up, y, first, last, a, b), 16)  # fmt: skip
    return y


def gate_backward(grad: Tensor, gate: Tensor, up: Tensor, a: float, b: float) -> tuple[Tensor, Tensor]:
    """The gradients of `gate` by gate and up."""
    by_gate, by_up = torch.empty_like(gate), torch.empty_like(up)
    _shared(4 * grad.numel(), grad.numel(), lambda first, last: _call(
        "gate_backward", grad, gate, up, by_gate, by_up, first, last, a, b), 16)  # fmt: skip
    return by_gate, by_up


def rotate(x: Tensor, cos: Tensor, sin: Tensor, sign: float) -> Tensor:
    """x cos + sign (x with its halves exchanged) sin: x (N, heads, D), cos and sin (N, 1, D)."""
    y = torch.empty_like(x)
    rows, heads, size = x.shape
    _shared(x.numel(), rows, lambda first, last: _call(
        "rotate", x, cos, sin, y, first, last, heads, size, sign))  # fmt: skip
    return y


def product(x: Tensor, weight: Tensor) -> Tensor:
    """x (R, in) @ weight.T, weight (out, in), out a multiple of 4 -> (R, out); reads the weight once."""
    y = x.new_empty(len(x), len(weight))
    rows, inner = x.shape
    _shared(weight.numel() * rows // 4, len(weight), lambda first, last: _call(
        "product", x, weight, y, first, last, rows, inner, len(weight)), 4)  # fmt: skip
    return y


def attention(
    query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scaling: float, softcap: float | None
) -> Tensor:
    """One token a row: query (R, heads, D), keys and values (R, key heads, K, D) with rows of D without gaps and equal
    strides, mask (R, K) bool, True = attended, or None -> (R, heads, D)."""
    y = torch.empty_like(query)
    rows, heads, size = query.shape
    key_heads, count = keys.shape[1], keys.shape[2]
    stride = 0 if mask is None else mask.stride(0)
    _shared(2 * heads * keys.shape[0] * count * size, rows, lambda first, last: _call(
        "attention", query, keys, values, mask, y, first, last, key_heads, heads // key_heads, count, size,
        keys.stride(0), keys.stride(1), stride, scaling, softcap or 0.0))  # fmt: skip
    return y


def decode_step(
    layers: Tensor,
    numbers: Tensor,
    norm_last: Tensor,
    hidden: Tensor,
    positions: Tensor,
    mask: Tensor | None,
    sizes: tuple[int, int, int, int],
    seen: int,
    norms: tuple[float, float],
    form: tuple[float, float],
    weights: int,
) -> Tensor:
    """All layers of a decoder for one token a row, and its final norm: hidden (R, H), in place -> (R, H).

    Args:
        layers: (depth, fields) int64, what `Layer` in the source says; keys and values are written where it points.
        numbers: (depth, 2) scaling and cap (0 = none) of the attention.
        positions: (R,) int64.
        mask: (R, columns) bool, True = attended, the last `seen` of them; None = all.
        sizes: heads, key heads, size of a head, intermediate size.
        seen: columns so far, with the one that is written now.
        norms: eps, and what is added to a norm's weight; form: of the gate, as in `gate`.
        weights: how many there are, which tells how much work it is.
    """
    rows, size = hidden.shape
    stride = 0 if mask is None else mask.stride(0)
    heads, key_heads, head, inner = sizes
    asked = heads * head
    wide, narrow = max(asked + 2 * key_heads * head, 2 * inner), max(size, asked, inner)
    scratch = hidden.new_empty(rows, wide + 2 * narrow)
    _shared(weights * rows, rows, lambda first, last: _call(
        "decode_step", layers, numbers, norm_last, hidden, scratch, positions, mask, first, last, len(layers), size,
        *sizes, seen, stride, *norms, *form))  # fmt: skip
    return hidden


def draw(logits: Tensor, uniforms: Tensor, temperature: float, softcap: float | None) -> tuple[Tensor, Tensor]:
    """The first token whose cumulative probability exceeds the row's number: logits (R, V), which are written over, and
    uniforms (R,) float64 in [0, 1) -> (R,) tokens, and (R,) their logprobs at that temperature."""
    tokens, logprobs = logits.new_empty(len(logits), dtype=torch.long), logits.new_empty(len(logits))
    rows, size = logits.shape
    numbers = uniforms.double().contiguous()
    _shared(4 * logits.numel(), rows, lambda first, last: _call(
        "draw", logits, numbers, tokens, logprobs, first, last, size, temperature, softcap or 0.0))  # fmt: skip
    return tokens, logprobs
