"""All chunks at once: what the scan over chunks needs of keys, queries and gates (Eqs. 18-22).

One program a chunk and key-side head. Under decay per key channel it writes

    E = b * k * prefix    Q = scale * q * prefix    K~ = k * suffix    D = total      [C, K], [K]

with the products of exp(log_decay) from the chunk's start (prefix, total) and to its end (suffix);
under decay per head prefix and suffix are columns that the scan applies itself. In both cases

    scores = A_qk        inverse = (I + T)^-1                                         [C, C]

Under decay per channel T and A_qk are made of pairs of blocks of 1, 2, 4 ... C/2 tokens (`decay`).

Axes: C tokens a chunk, H key heads, P heads of prepared chunks (H, or HV where a gate has HV), K
key channels, BK of them at a time.
"""

import triton
import triton.language as tl

from gdn2.ops.triton.decay import exp, grow, pairs
from gdn2.ops.triton.layout import load_rows, load_tokens, locate, store_rows


@triton.jit
def invert(t, C: tl.constexpr, LEVELS: tl.constexpr, PRECISION: tl.constexpr):
    """``(I + t)^-1`` for t [C, C] strictly lower triangular.

    By block substitution, A <- A - A t_h A for h = 1, 2, 4 ...: a Neumann series is wrong where
    keys repeat. Then one Newton step; only its residual needs full precision.
    """
    r = tl.arange(0, C)
    apart = r[:, None] ^ r[None, :]
    eye = tl.where(apart == 0, 1.0, 0.0)
    a = eye - tl.where(apart == 1, t, 0.0)
    for level in tl.range(1, LEVELS, loop_unroll_factor=1):
        t_h = tl.where((apart >> level) == 1, t, 0.0)
        part = tl.dot(a, t_h, input_precision=PRECISION)
        a -= tl.dot(part, a, input_precision=PRECISION)
    residual = eye - a - tl.dot(t, a, input_precision="tf32x3")
    return a + tl.dot(a, residual, input_precision=PRECISION)


@triton.jit(do_not_specialize=["T"])
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
    chunk_sequence,
    first_chunk,
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
    PRECISION: tl.constexpr,
):
    chunk = tl.program_id(0)
    p = tl.program_id(1)
    _, start, length, before = locate(chunk, cu_seqlens, chunk_sequence, first_chunk, T, C, PACKED)
    left = length - before
    if left <= 0:
        return
    r = tl.arange(0, C)
    first = start + before
    live = (r < left)[:, None]
    first_row = (chunk.to(tl.int64) * P + p) * C  # of what is written
    a_qk = tl.zeros([C, C], tl.float32)
    t = tl.zeros([C, C], tl.float32)
    for first_channel in tl.range(0, K, BK, loop_unroll_factor=1):
        c = first_channel + tl.arange(0, BK)
        at = p // (P // H) * K + c
        query = load_rows(q, first, r, q_stride, at, live).to(tl.float32) * scale
        key = load_rows(k, first, r, k_stride, at, live).to(tl.float32)
        at = p // (P // LOG_DECAY_HEADS) * K + c
        prefix = exp(load_rows(log_decay, first, r, log_decay_stride, at, live))
        suffix = tl.full([C, BK], 1.0, tl.float32)
        if ERASE == 2:
            at = p // (P // ERASE_HEADS) * K + c
            erased = key * load_rows(erase, first, r, erase_stride, at, live).to(tl.float32)
        elif ERASE == 1:
            head = p // (P // ERASE_HEADS)
            erased = key * load_tokens(erase, first, r, erase_stride, head, r < left)[:, None]
        a_qk += tl.where(r[:, None] == r[None, :], tl.sum(query * key, 1)[:, None], 0.0)
        for level in tl.range(0, LEVELS, loop_unroll_factor=1):
            upper, pair = pairs(r, level)
            lower_keys = tl.trans(tl.where(upper, 0.0, key * suffix).to(DOT))
            decayed = tl.where(upper, prefix, 0.0)
            met = tl.dot((query * decayed).to(DOT), lower_keys, input_precision=PRECISION)
            a_qk += tl.where(pair, met, 0.0)
            if ERASE:
                met = tl.dot((erased * decayed).to(DOT), lower_keys, input_precision=PRECISION)
                t += tl.where(pair, met, 0.0)
            prefix, suffix = grow(prefix, suffix, r, level)
        store_rows(query_rows, first_row, r, K, c, query * prefix, None)
        store_rows(columns, first_row, r, K, c, key * suffix, None)
        if ERASE:
            store_rows(erased_rows, first_row, r, K, c, erased * prefix, None)
        end = tl.sum(tl.where(r[:, None] == C - 1, prefix, 0.0), 0)
        tl.store(total + (chunk.to(tl.int64) * P + p) * K + c, end)
    store_rows(scores, first_row, r, C, r, a_qk, None)
    if ERASE:
        store_rows(inverse, first_row, r, C, r, invert(t, C, LEVELS, PRECISION), None)


@triton.jit(do_not_specialize=["T"])
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
    chunk_sequence,
    first_chunk,
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
    PRECISION: tl.constexpr,
):
    """DECAY 1: one decay a head; 0: none."""
    chunk = tl.program_id(0)
    p = tl.program_id(1)
    _, start, length, before = locate(chunk, cu_seqlens, chunk_sequence, first_chunk, T, C, PACKED)
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
        a_qk = tl.dot(query, keys, acc=a_qk, input_precision=PRECISION)
        if ERASE == 2:
            at = p // (P // ERASE_HEADS) * K + c
            gate = load_rows(erase, first, r, erase_stride, at, live[:, None]).to(tl.float32)
            erased = (key.to(tl.float32) * gate).to(DOT)
            t = tl.dot(erased, keys, acc=t, input_precision=PRECISION)
        elif ERASE == 1:
            t = tl.dot(key, keys, acc=t, input_precision=PRECISION)
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
        store_rows(inverse, first_row, r, C, r, invert(t, C, LEVELS, PRECISION), None)
