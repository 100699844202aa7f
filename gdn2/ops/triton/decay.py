"""Decay: a factor a token, and blocks of 1, 2, 4 ... C/2 tokens that meet pairwise under it.

At the level of blocks of h tokens a block's rows are decayed from its start (`prefix`) and its
columns to its end (`suffix`), so that the scores of an upper block with the lower one before it are
plain products. All decays are products of factors <= 1; no sum of log-decays is ever subtracted
from another: nothing overflows or cancels, whatever the decay.
"""

import triton
import triton.language as tl

_INVERSE_LN2 = tl.constexpr(1.4426950408889634)
_LN2_HIGH = tl.constexpr(0.693145751953125)  # 15 bits: its product by an exponent is exact
_LN2_LOW = tl.constexpr(1.4286068203094172e-06)


@triton.jit
def exp(x):
    """e^x in float32, to the last bit or nearly; zero below -150.

    A GPU's own is off by a few units in the last place, and the same way at every token: after a
    thousand weakly decaying tokens that is a thousand times as much.
    """
    x = x.to(tl.float32)
    x = tl.where(x < -150.0, -150.0, x)
    n = tl.floor(x * _INVERSE_LN2 + 0.5)
    r = (x - n * _LN2_HIGH) - n * _LN2_LOW  # at most log(2) / 2
    series = 1 / 24 + r * (1 / 120 + r * (1 / 720 + r * (1 / 5040)))
    return (1.0 + r * (1.0 + r * (1 / 2 + r * (1 / 6 + r * series)))) * tl.exp2(n)


@triton.jit
def pairs(r, level):
    """Which of the tokens r are in upper blocks [C, 1], and which two are in one pair [C, C]."""
    block = r >> level
    return ((block & 1) == 1)[:, None], (block[:, None] >> 1) == (block[None, :] >> 1)


@triton.jit
def grow(prefix, suffix, r, level):
    """Those of blocks of twice as many tokens: times the total decay of the other block."""
    block = r >> level
    upper = ((block & 1) == 1)[:, None]
    # The other block's total stands in its last row.
    last = ((block ^ 1) << level) + (1 << level) - 1
    other = tl.gather(prefix, tl.broadcast_to(last[:, None], prefix.shape), 0)
    return tl.where(upper, prefix * other, prefix), tl.where(upper, suffix, suffix * other)
