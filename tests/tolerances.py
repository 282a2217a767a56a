"""How close is close enough, in one place: `assert_close(actual, expected, **FLOAT32)`."""

from typing import Final, TypedDict


class Tolerance(TypedDict):
    """Keyword arguments of `torch.testing.assert_close` and, with the same meaning, of `numpy.testing`."""

    rtol: float
    atol: float


EXACT: Final = Tolerance(rtol=0.0, atol=0.0)
"""The same bits: resumes, invariances that reorder nothing, zeros that must be zeros."""
FLOAT64: Final = Tolerance(rtol=1e-10, atol=1e-12)
"""One formula against another in double precision."""
FLOAT32: Final = Tolerance(rtol=1e-5, atol=1e-6)
"""One formula against another in single precision."""
BFLOAT16: Final = Tolerance(rtol=2e-2, atol=2e-2)
"""The products were taken with eight bits of mantissa."""
TWO_DIGITS: Final = Tolerance(rtol=5e-3, atol=0.0)
"""What is left after a cancellation that the code cannot avoid; the careless form has no digit right."""
FINITE_DIFFERENCE: Final = Tolerance(rtol=1e-5, atol=1e-7)
"""`torch.autograd.gradcheck` in double precision, as `gradcheck(f, inputs, **FINITE_DIFFERENCE)`."""
