"""Decay: a factor a token, and blocks of 1, 2, 4 ... C/2 tokens that meet pairwise under it.

At the level of blocks of h tokens, a row of an upper block is decayed from the block's start and a
column of a lower block to that block's end: the scores of the two are plain products then. Each
decay is the exponential of a sum of log-decays over an interval of tokens, and each such sum one
product with zeros and ones: none is the difference of two others, so nothing overflows or cancels.
"""

import triton
import triton.language as tl

from gdn2.ops.triton.layout import load_gate

_INVERSE_LN2 = tl.constexpr(1.4426950408889634)
_LN2 = tl.constexpr(0.6931471805599453)
_LN2_HIGH = tl.constexpr(0.693145751953125)  # 15 bits: its product by an exponent is exact
_LN2_LOW = tl.constexpr(1.4286068203094172e-06)


@triton.jit
def _exp(r, n):
    """``e^r 2^n`` for r of at most log(2) / 2, to the last bit or nearly.

    A GPU's own is off by a few units in the last place, and the same way at every token: after a
    thousand weakly decaying tokens that is a thousand times as much.
    """
    series = 1 / 24 + r * (1 / 120 + r * (1 / 720 + r * (1 / 5040)))
    return (1.0 + r * (1.0 + r * (1 / 2 + r * (1 / 6 + r * series)))) * tl.exp2(n)


@triton.jit
def exp(x):
    """e^x in float32; zero below -150."""
    x = x.to(tl.float32)
    x = tl.where(x < -150.0, -150.0, x)
    n = tl.floor(x * _INVERSE_LN2 + 0.5)
    return _exp((x - n * _LN2_HIGH) - n * _LN2_LOW, n)


@triton.jit
def halves(x, DTYPE: tl.constexpr):
    """x in float32 as the sum of two numbers of a dtype: as many bits again as it has."""
    high = x.to(DTYPE)
    return high, (x - high.to(tl.float32)).to(DTYPE)


@triton.jit
def halves_of_decay(log_decay):
    """The logarithm of a decay to the base 2, in float16: 22 bits."""
    x = log_decay.to(tl.float32)
    return halves(tl.where(x < -150.0, -150.0, x) * _INVERSE_LN2, tl.float16)


@triton.jit
def load_decay(log_decay, first, r, stride, head, c, live, K: tl.constexpr):
    """`halves_of_decay` of a head's channels c [BK, C]."""
    return halves_of_decay(load_gate(log_decay, first, r, stride, head, c, live, K, 2))


@triton.jit
def decay_from_start(high, low, r, C: tl.constexpr):
    """The decay of each token from the chunk's start, itself included, [BK, C]; and of all [BK].

    The last is made of the sums of both halves. The larger ones are so short that their sum is
    exact, or nearly: the sum of whole log-decays would lose the bits that its size takes, from a
    decay that a state meets in every chunk.
    """
    summed = tl.where(r[:, None] <= r[None, :], 1.0, 0.0).to(tl.float16)
    log, rest = tl.dot(high, summed), tl.dot(low, summed)
    last = (r == C - 1)[None, :]
    log_of_all = tl.sum(tl.where(last, log, 0.0), 1)
    rest_of_all = tl.sum(tl.where(last, rest, 0.0), 1)
    n = tl.floor(log_of_all + 0.5)
    return tl.exp2(log + rest), _exp((log_of_all - n) * _LN2 + rest_of_all * _LN2, n)


@triton.jit
def decay_within(high, low, r, size, from_start, DOT: tl.constexpr):
    """The decay of each token r within its block of `size` tokens, [BK, C].

    From the block's start to the token, itself included, where `from_start`; else from the token,
    itself not included, to the block's end. high, low: `halves_of_decay` [BK, C]. The lower
    is nothing to bfloat16: at most 1e-4 of what is not decayed.
    """
    before = r & (size - 1)
    first = tl.where(from_start, r - before, r + 1)
    count = tl.where(from_start, before + 1, size - 1 - before)
    after_first = (tl.arange(0, r.shape[0])[:, None] - first[None, :]).to(tl.uint32)
    summed = tl.where(after_first < count.to(tl.uint32)[None, :], 1.0, 0.0).to(tl.float16)
    log = tl.dot(high, summed)
    if DOT != tl.bfloat16:
        log = tl.dot(low, summed, acc=log)
    return tl.exp2(log)


@triton.jit
def decay_of_all(high, low):
    """The decay of all tokens [BK]."""
    return tl.exp2(tl.sum(high.to(tl.float32) + low.to(tl.float32), 1))


@triton.jit
def decay_at(high, low, r, level, DOT: tl.constexpr):
    """The decay of each token where blocks of 2^level meet: as a row if upper, or as a column."""
    upper = ((r >> level) & 1) == 1
    return decay_within(high, low, r, 1 << level, upper, DOT)


@triton.jit
def pairs(r, level):
    """Whether two tokens are in two blocks of 2^level that meet [C, C], whichever is the upper."""
    block = r >> level
    return block[:, None] == (block ^ 1)[None, :]
