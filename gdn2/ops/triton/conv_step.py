"""The short convolution in decoding: up to a few tokens, its last inputs updated in place.

One program a batch row and block of channels:

    y_t = activation(bias + sum_{j<W} weight[:, j] * x_{t-W+1+j})

where inputs before the first token are those of the state.

Axes: B batch rows, T tokens, D channels, BD of them a program, W taps (WP: the next power of two).
"""

import triton
import triton.language as tl

from gdn2.ops.triton.sigmoid import sigmoid


@triton.jit
def load_inputs(x, state, token, channel, i, x_stride, W: tl.constexpr, mask):
    """Input i of a row, whose first one now is `token`; the state's where i < 0."""
    then = tl.load(state + channel * (W - 1) + (i + W - 1), mask=mask & (i < 0), other=0.0)
    now = tl.load(x + (token + i) * x_stride + channel, mask=mask & (i >= 0), other=0.0)
    return tl.where(i < 0, then, now.to(then.dtype))


@triton.jit(do_not_specialize=["T"])
def conv_step(
    x,
    weight,
    bias,
    state,
    state_indices,
    out,
    T,
    x_stride,
    D: tl.constexpr,
    W: tl.constexpr,
    WP: tl.constexpr,
    BD: tl.constexpr,
    SILU: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    INDEXED: tl.constexpr,
):
    blocks: tl.constexpr = tl.cdiv(D, BD)
    b = tl.program_id(0) // blocks
    d = tl.program_id(0) % blocks * BD + tl.arange(0, BD)
    j = tl.arange(0, WP)[None, :]
    slot = tl.load(state_indices + b).to(tl.int64) if INDEXED else b.to(tl.int64)
    live = slot >= 0
    inside = d < D
    state += slot * D * (W - 1)
    token = (b * T).to(tl.int64)
    kept = (inside & live)[:, None] & (j < W - 1)
    last = load_inputs(x, state, token, d[:, None], T - (W - 1) + j, x_stride, W, kept)
    taps = inside[:, None] & (j < W)
    filters = tl.load(weight + d[:, None] * W + j, mask=taps, other=0.0).to(tl.float32)
    for t in tl.range(0, T):
        seen = load_inputs(x, state, token, d[:, None], t - (W - 1) + j, x_stride, W, taps & live)
        y = tl.sum(seen.to(tl.float32) * filters, 1)
        if HAS_BIAS:
            y += tl.load(bias + d, mask=inside, other=0.0).to(tl.float32)
        if SILU:
            y *= sigmoid(y)
        y = tl.where(live, y, 0.0).to(out.dtype.element_ty)
        tl.store(out + (token + t) * D + d, y, mask=inside)
    tl.debug_barrier()  # all threads have read what is overwritten now
    tl.store(state + d[:, None] * (W - 1) + j, last, mask=kept)
