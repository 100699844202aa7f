"""The sigmoid of every gate and activation."""

import triton
import triton.language as tl

_INVERSE_LN2 = tl.constexpr(1.4426950408889634)


@triton.jit
def sigmoid(x):
    """1 / (1 + e^-x) in float32. Where e^-x is below 1e-38, which 1 hides, it is zero.

    `tl.sigmoid` keeps such powers, in four more instructions. The square of `tl.rsqrt` would save
    the division's scaling too, but is not exact at 0.
    """
    return 1.0 / (1.0 + tl.exp2(x * -_INVERSE_LN2))
