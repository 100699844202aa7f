"""The short convolution of sequences with SiLU, and the L2 norm of each head behind it.

With the W taps w of a channel, its inputs x, and sums over the head of every normed channel:

    a_t = sum_{j<W} w_j x_{t-W+1+j} + bias        s = silu(a)        r = 1 / sqrt(sum s^2 + eps)
    y = r s where normed, s elsewhere

and back, from dy, where `a` is computed again:

    ds = r (dy - r^2 s sum(s dy)) where normed, dy elsewhere
    da = ds sigmoid(a) (1 + a (1 - sigmoid(a)))
    dx_t = sum_j w_j da_{t+W-1-j}        dw_j = sum_t da_t x_{t-W+1+j}        dbias = sum_t da_t

Inputs before the first token are those of the state, whose gradient is what dx says there. All is
float32 and rounded at the store. A program takes one head of HEAD channels, or as many of those
that are not normed. Forward it computes BT tokens at a time. Back it goes through R runs of RUN
tokens side by side, a token of each at a time, and keeps the last W inputs and gradients `da` in
registers: to pass `da` through memory would take 8 bytes a number beside the 6 of x, dy and dx.

Axes: D channels, BD the next power of two of HEAD, W taps (WP: the next power of two). `taps` is
the weight as [W, D]: neighbouring threads read neighbouring numbers.
"""

import triton
import triton.language as tl

from gdn2.ops.triton.layout import load_rows, locate, store_rows
from gdn2.ops.triton.sigmoid import sigmoid


@triton.jit
def channels(block, D: tl.constexpr, HEAD: tl.constexpr, BD: tl.constexpr):
    """The channels of a block, and which of them there are, as a row."""
    i = tl.arange(0, BD)
    d = block * HEAD + i
    return d, ((i < HEAD) & (d < D))[None, :]


@triton.jit
def load_inputs(x, start, length, token, r, d, inside, stride):
    """``x[token + r]`` of a sequence, counted from its start; zero where it has no such token."""
    there = ((token + r >= 0) & (token + r < length))[:, None] & inside
    return load_rows(x, start + token, r, stride, d, there)


@triton.jit
def load_tap(taps, j, d, inside, D: tl.constexpr):
    return tl.load(taps + j * D + d[None, :], inside, other=0.0).to(tl.float32)


@triton.jit
def load_columns(x, d, i, inside, width: tl.constexpr):
    """``x[d, i]`` as a tile [i, d], as states lie; zero where there is no column i."""
    there = ((i >= 0) & (i < width))[:, None] & inside
    return tl.load(x + d[None, :] * width + i[:, None], there, other=0.0).to(tl.float32)


@triton.jit
def store_columns(x, d, i, tile, inside, width: tl.constexpr):
    at = x + d[None, :] * width + i[:, None]
    tl.store(at, tile.to(x.dtype.element_ty), (i < width)[:, None] & inside)


@triton.jit(do_not_specialize=["N", "T"])
def normed_conv(
    x,
    taps,
    bias,
    state,
    cu_seqlens,
    N,
    y,
    last,
    T,
    x_stride,
    eps,
    D: tl.constexpr,
    W: tl.constexpr,
    WP: tl.constexpr,
    NORMED: tl.constexpr,
    HEAD: tl.constexpr,
    BD: tl.constexpr,
    BT: tl.constexpr,
    PACKED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_STATE: tl.constexpr,
):
    blocks: tl.constexpr = tl.cdiv(D, HEAD)
    piece, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    n, start, length, before = locate(piece, cu_seqlens, N, T, BT, PACKED)
    d, inside = channels(block, D, HEAD, BD)
    r, k = tl.arange(0, BT), tl.arange(0, WP)
    last += n * D * (W - 1)
    a = tl.zeros([BT, BD], tl.float32)
    if HAS_BIAS:
        a += load_tap(bias, 0, d, inside, D)
    if HAS_STATE:
        state += n * D * (W - 1)
        if before == 0:
            for i in tl.static_range(W - 1):
                past = tl.load(state + d[None, :] * (W - 1) + i, inside, other=0.0).to(tl.float32)
                for j in tl.static_range(i + 1):
                    part = past * load_tap(taps, j, d, inside, D)
                    a += tl.where((r == i - j)[:, None], part, 0.0)
    for j in tl.static_range(W):
        seen = load_inputs(x, start, length, before, r - (W - 1) + j, d, inside, x_stride)
        a += seen.to(tl.float32) * load_tap(taps, j, d, inside, D)
    s = a * sigmoid(a)
    if block < NORMED // HEAD:
        s *= tl.rsqrt(tl.sum(s * s, 1) + eps)[:, None]
    store_rows(y, start + before, r, D, d, s, (before + r < length)[:, None] & inside)
    if (before + BT >= length) & ((before < length) | (before == 0)):  # the sequence ends here
        inputs = load_inputs(x, start, length, length, k - (W - 1), d, inside, x_stride)
        inputs = inputs.to(tl.float32)
        if HAS_STATE:
            inputs += load_columns(state, d, length + k, inside, W - 1)
        store_columns(last, d, k, inputs, inside, W - 1)


@triton.jit
def with_tile(tiles, tile):
    return tiles + (tile,)  # noqa: RUF005  Triton compiles no starred tuples


@triton.jit(do_not_specialize=["N", "T"])
def normed_conv_backward(
    dy,
    dlast,
    x,
    taps,
    bias,
    state,
    cu_seqlens,
    N,
    dx,
    dtaps,
    dstate,
    T,
    x_stride,
    dy_stride,
    eps,
    D: tl.constexpr,
    W: tl.constexpr,
    NORMED: tl.constexpr,
    HEAD: tl.constexpr,
    BD: tl.constexpr,
    R: tl.constexpr,
    RUN: tl.constexpr,
    PACKED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_STATE: tl.constexpr,
    HAS_DLAST: tl.constexpr,
):
    """`dtaps` [pieces, W, D] is each piece's part of the gradient of `taps`, then of the bias.

    A run needs `da` of the W - 1 tokens behind it: it goes on so far, and its dx is that far late.
    """
    blocks: tl.constexpr = tl.cdiv(D, HEAD)
    piece, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    n, start, length, first = locate(piece, cu_seqlens, N, T, R * RUN, PACKED)
    d, inside = channels(block, D, HEAD, BD)
    run = tl.arange(0, R) * RUN
    if HAS_STATE:
        state += n * D * (W - 1)
        dstate += n * D * (W - 1)
    if HAS_DLAST:
        dlast += n * D * (W - 1)
    zeros = tl.zeros([R, BD], tl.float32)
    das, sums = (zeros,) * W, (zeros,) * W
    sum_of_bias = zeros
    if HAS_BIAS:
        shift = load_tap(bias, 0, d, inside, D)
    w = ()
    for j in tl.static_range(W):
        w = with_tile(w, load_tap(taps, j, d, inside, D))
    seen = (zeros,)
    for j in tl.static_range(W - 1):
        past = load_inputs(x, start, length, first, run - (W - 1) + j, d, inside, x_stride)
        past = past.to(tl.float32)
        if HAS_STATE:
            past += load_columns(state, d, first + run + j, inside, W - 1)
        seen = with_tile(seen, past)
    # The next token's rows are on their way while one is computed.
    x_next = load_inputs(x, start, length, first, run, d, inside, x_stride)
    dy_next = load_inputs(dy, start, length, first, run, d, inside, dy_stride)
    for i in tl.range(0, tl.maximum(tl.minimum(length - first, RUN), 0) + W - 1):
        seen = with_tile(seen[1:], x_next.to(tl.float32))
        da = dy_next.to(tl.float32)
        x_next = load_inputs(x, start, length, first + i + 1, run, d, inside, x_stride)
        dy_next = load_inputs(dy, start, length, first + i + 1, run, d, inside, dy_stride)
        a = zeros
        if HAS_BIAS:
            a += shift
        for j in tl.static_range(W):
            a += seen[j] * w[j]
        act = sigmoid(a)
        if block < NORMED // HEAD:
            s = a * act
            square = 1 / (tl.sum(s * s, 1) + eps)
            da -= s * (square * tl.sum(s * da, 1))[:, None]
            da *= tl.sqrt(square)[:, None]
        da *= act * (1 + a * (1 - act))
        da = tl.where((first + i + run < length)[:, None], da, 0.0)
        own = tl.where(i < RUN, da, 0.0)
        if HAS_BIAS:
            sum_of_bias += own
        das = with_tile(das[1:], da)
        dx_late, before = zeros, sums
        sums = ()
        for j in tl.static_range(W):
            dx_late += das[W - 1 - j] * w[j]
            sums = with_tile(sums, before[j] + own * seen[j])
        late = first + i - (W - 1)
        if HAS_DLAST and first + R * RUN >= length - (W - 1):
            dx_late += load_columns(dlast, d, late + run - length + (W - 1), inside, W - 1)
        stored = ((i >= W - 1) & (late + run < length))[:, None] & inside
        store_rows(dx, start + late, run, D, d, dx_late, stored)
        if HAS_STATE and first + i < W - 1:
            store_columns(dstate, d, i + run, dx_late, inside, W - 1)
    dtaps += piece.to(tl.int64) * (W + HAS_BIAS) * D + d
    for j in tl.static_range(W):
        tl.store((dtaps + j * D)[None, :], tl.sum(sums[j], 0)[None, :], inside)
    if HAS_BIAS:
        tl.store((dtaps + W * D)[None, :], tl.sum(sum_of_bias, 0)[None, :], inside)
