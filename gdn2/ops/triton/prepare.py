"""All chunks at once: what the scan over chunks needs of keys, queries and gates (Eqs. 18-22).

One program a chunk and key-side head. Under decay per key channel it writes

    E = b * k * prefix    Q = scale * q * prefix    K~ = k * suffix    D = total      [C, K], [K]

with the products of exp(log_decay) from the chunk's start (prefix, total) and to its end (suffix);
under decay per head prefix and suffix are columns that the scan applies itself. In both cases

    scores = A_qk        inverse = (I + T)^-1                                         [C, C]

Under decay per channel T and A_qk are made of pairs of blocks of 1, 2, 4 ... C/2 tokens (`decay`).
A row's decay serves it as an upper row or as a lower column, whichever it is at that level; pairs
that do not meet are dropped from the product.

Axes: C tokens a chunk, H key heads, P heads of prepared chunks (H, or HV where a gate has HV), K
key channels, BK of them at a time. Under decay per channel tiles are [BK, C], channels by tokens:
C rows are one warpgroup's, and Triton lets every other one compute all left factors too.
"""

import triton
import triton.language as tl

from gdn2.ops.triton.decay import (
    decay_at,
    decay_from_start,
    decay_within,
    exp,
    halves,
    load_decay,
    pairs,
)
from gdn2.ops.triton.layout import (
    load_gate,
    load_rows,
    load_tokens,
    locate,
    store_rows,
)


@triton.jit
def invert(t, C: tl.constexpr, LEVELS: tl.constexpr, DOT: tl.constexpr):
    """``(I + t)^-1`` for t [C, C] strictly lower triangular.

    By block substitution, A <- A - A t_h A for h = 1, 2, 4 ...: a Neumann series is wrong where
    keys repeat. Then Newton's steps; only their residuals need more than DOT's precision.
    """
    STEPS: tl.constexpr = 2 if DOT == tl.bfloat16 else 1
    r = tl.arange(0, C)
    eye = tl.where(r[:, None] == r[None, :], 1.0, 0.0)
    a = eye - tl.where(pairs(r, 0), t, 0.0)
    for level in tl.range(1, LEVELS, loop_unroll_factor=1):
        t_h = tl.where(pairs(r, level), -t, 0.0).to(DOT)
        rounded = a.to(DOT)
        part = tl.dot(rounded, t_h, input_precision="tf32x3").to(DOT)
        a = tl.dot(part, rounded, acc=a, input_precision="tf32x3")
    high, low = halves(t, DOT)
    for _ in tl.range(0, STEPS, loop_unroll_factor=1):
        rounded, rest = halves(a, DOT)
        product = tl.dot(high, rounded, input_precision="tf32x3")
        if DOT != tl.float32:
            product = tl.dot(low, rounded, acc=product)
            product = tl.dot(high, rest, acc=product)
        a = tl.dot(rounded, (eye - a - product).to(DOT), acc=a, input_precision="tf32x3")
    return a


@triton.jit(do_not_specialize=["N", "T"])
def prepare_under_channel_decay(
    q,
    k,
    log_decay,
    erase,
    erased_rows,
    query_rows,
    columns,
    total,
    inverse,
    scores,
    cu_seqlens,
    N,
    T,
    scale,
    q_stride,
    k_stride,
    log_decay_stride,
    erase_stride,
    H: tl.constexpr,
    LOG_DECAY_HEADS: tl.constexpr,
    ERASE_HEADS: tl.constexpr,
    P: tl.constexpr,
    K: tl.constexpr,
    C: tl.constexpr,
    BK: tl.constexpr,
    LEVELS: tl.constexpr,
    ERASE: tl.constexpr,
    PACKED: tl.constexpr,
    DOT: tl.constexpr,
):
    chunk = tl.program_id(0)
    p = tl.program_id(1)
    _, start, length, before = locate(chunk, cu_seqlens, N, T, C, PACKED)
    left = length - before
    if left <= 0:
        return
    r = tl.arange(0, C)
    first = start + before
    live = r < left
    first_row = (chunk.to(tl.int64) * P + p) * C  # of what is written
    a_qk = tl.zeros([C, C], tl.float32)
    t = tl.zeros([C, C], tl.float32)
    for first_channel in tl.range(0, K, BK, loop_unroll_factor=1):
        c = first_channel + tl.arange(0, BK)
        at = p // (P // H) * K + c
        query = load_rows(q, first, r, q_stride, at, live[:, None])
        key = tl.trans(load_rows(k, first, r, k_stride, at, live[:, None]))
        itself = tl.dot(query, key, input_precision="tf32x3")
        met_queries = tl.where(r[:, None] == r[None, :], itself, 0.0)
        query = tl.trans(query).to(tl.float32)
        key = key.to(tl.float32)
        head = p // (P // LOG_DECAY_HEADS)
        high, low = load_decay(log_decay, first, r, log_decay_stride, head, c, live, K)
        prefix, whole = decay_from_start(high, low, r, C)
        tl.store(total + (chunk.to(tl.int64) * P + p) * K + c, whole)
        store_rows(query_rows, first_row, r, K, c, tl.trans(query * (prefix * scale)), None)
        if ERASE:
            head = p // (P // ERASE_HEADS)
            erased = key * load_gate(erase, first, r, erase_stride, head, c, live, K, ERASE)
            store_rows(erased_rows, first_row, r, K, c, tl.trans(erased * prefix), None)
        suffix = decay_within(high, low, r, C, r < 0, DOT)
        store_rows(columns, first_row, r, K, c, tl.trans(key * suffix), None)
        met_erased = tl.zeros([C, C], tl.float32)
        for level in tl.range(0, LEVELS, loop_unroll_factor=1):
            x = decay_at(high, low, r, level, DOT)
            lower_keys = (key * x).to(DOT)
            if ERASE:
                rows = tl.trans((erased * x).to(DOT))
                met = tl.dot(rows, lower_keys, input_precision="tf32x3")
                met_erased = tl.where(pairs(r, level), met, met_erased)
            rows = tl.trans((query * x).to(DOT))
            met = tl.dot(rows, lower_keys, input_precision="tf32x3")
            met_queries = tl.where(pairs(r, level), met, met_queries)
        a_qk += tl.where(r[:, None] >= r[None, :], met_queries, 0.0)
        t += tl.where(r[:, None] > r[None, :], met_erased, 0.0)
    store_rows(scores, first_row, r, C, r, a_qk * scale, None)
    if ERASE:
        store_rows(inverse, first_row, r, C, r, invert(t, C, LEVELS, DOT), None)


@triton.jit(do_not_specialize=["N", "T"])
def prepare_under_head_decay(
    q,
    k,
    log_decay,
    erase,
    prefix,
    suffix,
    inverse,
    scores,
    cu_seqlens,
    N,
    T,
    scale,
    q_stride,
    k_stride,
    log_decay_stride,
    erase_stride,
    H: tl.constexpr,
    LOG_DECAY_HEADS: tl.constexpr,
    ERASE_HEADS: tl.constexpr,
    P: tl.constexpr,
    K: tl.constexpr,
    C: tl.constexpr,
    BK: tl.constexpr,
    LEVELS: tl.constexpr,
    DECAY: tl.constexpr,
    ERASE: tl.constexpr,
    PACKED: tl.constexpr,
    DOT: tl.constexpr,
):
    """DECAY 1: one decay a head; 0: none."""
    chunk = tl.program_id(0)
    p = tl.program_id(1)
    _, start, length, before = locate(chunk, cu_seqlens, N, T, C, PACKED)
    left = length - before
    if left <= 0:
        return
    r = tl.arange(0, C)
    first = start + before
    live = r < left
    a_qk = tl.zeros([C, C], tl.float32)
    t = tl.zeros([C, C], tl.float32)
    for first_channel in tl.range(0, K, BK, loop_unroll_factor=1):
        c = first_channel + tl.arange(0, BK)
        at = p // (P // H) * K + c
        key = load_rows(k, first, r, k_stride, at, live[:, None])
        keys = tl.trans(key)
        query = load_rows(q, first, r, q_stride, at, live[:, None])
        a_qk = tl.dot(query, keys, acc=a_qk, input_precision="tf32x3")
        if ERASE == 2:
            at = p // (P // ERASE_HEADS) * K + c
            gate = load_rows(erase, first, r, erase_stride, at, live[:, None]).to(tl.float32)
            erased = (key.to(tl.float32) * gate).to(DOT)
            t = tl.dot(erased, keys, acc=t, input_precision="tf32x3")
        elif ERASE == 1:
            t = tl.dot(key, keys, acc=t, input_precision="tf32x3")
    a_qk *= scale
    first_row = (chunk.to(tl.int64) * P + p) * C
    if DECAY:
        head = p // (P // LOG_DECAY_HEADS)
        decay = exp(load_tokens(log_decay, first, r, log_decay_stride, head, live))
        # between[r, s]: the product of decay over s < i <= r, and of nothing else
        between = tl.cumprod(tl.where(r[:, None] > r[None, :], decay[:, None], 1.0), 0)
        a_qk *= between
        t *= between
        tl.store(prefix + first_row + r, tl.cumprod(decay, 0))
        tl.store(suffix + first_row + r, tl.sum(tl.where(r[:, None] == C - 1, between, 0.0), 0))
    if ERASE == 1:
        head = p // (P // ERASE_HEADS)
        t *= load_tokens(erase, first, r, erase_stride, head, live)[:, None]
    a_qk = tl.where(r[:, None] >= r[None, :], a_qk, 0.0)
    store_rows(scores, first_row, r, C, r, a_qk, None)
    if ERASE:
        t = tl.where(r[:, None] > r[None, :], t, 0.0)
        store_rows(inverse, first_row, r, C, r, invert(t, C, LEVELS, DOT), None)
