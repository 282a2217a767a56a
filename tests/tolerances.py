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
EPSILON: Final = Tolerance(rtol=2e-4, atol=1e-6)
"""The formula adds an epsilon of 1e-4 that the expected number leaves out."""
FINITE_DIFFERENCE: Final = Tolerance(rtol=1e-5, atol=1e-7)
"""`torch.autograd.gradcheck` in double precision, as `gradcheck(f, inputs, **FINITE_DIFFERENCE)`."""
