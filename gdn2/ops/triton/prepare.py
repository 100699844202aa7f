"""All chunks at once: what the scan over chunks needs of keys, queries and gates (Eqs. 18-22).

One program a chunk and key-side head. Under decay per key channel it writes

    E = b * k * prefix    Q = scale * q * prefix    K~ = k * suffix    D = total      [C, K], [K]

with the products of exp(log_decay) from the chunk's start (prefix, total) and to its end (suffix);
under decay per head prefix and suffix are columns that the scan applies itself. In both cases

    scores = A_qk        inverse = (I + T)^-1                                         [C, C]

Under decay per channel T and A_qk are made pairwise, of blocks of h = 1, 2, 4 ... C/2 tokens: where
an upper block meets the lower one before it, the score is a row decayed from the start of its block
times a column decayed to the end of its own. All decays are products of factors <= 1; no sum of
log-decays is ever subtracted from another: nothing overflows or cancels, whatever the decay.

Axes: C tokens a chunk, H key heads, P heads of prepared chunks (H, or HV where a gate has HV), K
key channels, BK of them at a time.
"""

import triton
import triton.language as tl

from gdn2.ops.triton.layout import load_rows, locate


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
    token = start + before + r
    live = (r < left)[:, None]
    prepared = (chunk.to(tl.int64) * P + p) * C + r  # rows of what is written
    a_qk = tl.zeros([C, C], tl.float32)
    t = tl.zeros([C, C], tl.float32)
    for first_channel in tl.range(0, K, BK, loop_unroll_factor=1):
        c = first_channel + tl.arange(0, BK)
        at = p // (P // H) * K + c
        query = load_rows(q, token, q_stride, at, live).to(tl.float32) * scale
        key = load_rows(k, token, k_stride, at, live).to(tl.float32)
        at = p // (P // LOG_DECAY_HEADS) * K + c
        prefix = tl.exp(load_rows(log_decay, token, log_decay_stride, at, live).to(tl.float32))
        suffix = tl.full([C, BK], 1.0, tl.float32)
        if ERASE == 2:
            at = p // (P // ERASE_HEADS) * K + c
            erased = key * load_rows(erase, token, erase_stride, at, live).to(tl.float32)
        elif ERASE == 1:
            gate = tl.load(
                erase + token * erase_stride + p // (P // ERASE_HEADS), mask=r < left, other=0.0
            )
            erased = key * gate.to(tl.float32)[:, None]
        a_qk += tl.where(r[:, None] == r[None, :], tl.sum(query * key, 1)[:, None], 0.0)
        for level in tl.range(0, LEVELS, loop_unroll_factor=1):
            block = r >> level
            upper = ((block & 1) == 1)[:, None]
            pair = (block[:, None] >> 1) == (block[None, :] >> 1)
            lower_keys = tl.trans(tl.where(upper, 0.0, key * suffix).to(DOT))
            decayed = tl.where(upper, prefix, 0.0)
            met = tl.dot((query * decayed).to(DOT), lower_keys, input_precision=PRECISION)
            a_qk += tl.where(pair, met, 0.0)
            if ERASE:
                met = tl.dot((erased * decayed).to(DOT), lower_keys, input_precision=PRECISION)
                t += tl.where(pair, met, 0.0)
            # The other block's total stands in its last row.
            last = ((block ^ 1) << level) + (1 << level) - 1
            other = tl.gather(prefix, tl.broadcast_to(last[:, None], [C, BK]), 0)
            prefix = tl.where(upper, prefix * other, prefix)
            suffix = tl.where(upper, suffix, suffix * other)
        to = prepared[:, None] * K + c[None, :]
        tl.store(query_rows + to, (query * prefix).to(DOT))
        tl.store(columns + to, (key * suffix).to(DOT))
        if ERASE:
            tl.store(erased_rows + to, (erased * prefix).to(DOT))
        end = tl.sum(tl.where(r[:, None] == C - 1, prefix, 0.0), 0)
        tl.store(total + (chunk.to(tl.int64) * P + p) * K + c, end)
    to = prepared[:, None] * C + r[None, :]
    tl.store(scores + to, a_qk.to(DOT))
    if ERASE:
        tl.store(inverse + to, invert(t, C, LEVELS, PRECISION).to(DOT))


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
    token = start + before + r
    live = r < left
    a_qk = tl.zeros([C, C], tl.float32)
    t = tl.zeros([C, C], tl.float32)
    for first_channel in tl.range(0, K, BK, loop_unroll_factor=1):
        c = first_channel + tl.arange(0, BK)
        at = p // (P // H) * K + c
        key = load_rows(k, token, k_stride, at, live[:, None])
        keys = tl.trans(key)
        query = load_rows(q, token, q_stride, at, live[:, None])
        a_qk = tl.dot(query, keys, acc=a_qk, input_precision=PRECISION)
        if ERASE == 2:
            at = p // (P // ERASE_HEADS) * K + c
            gate = load_rows(erase, token, erase_stride, at, live[:, None]).to(tl.float32)
            erased = (key.to(tl.float32) * gate).to(DOT)
            t = tl.dot(erased, keys, acc=t, input_precision=PRECISION)
        elif ERASE == 1:
            t = tl.dot(key, keys, acc=t, input_precision=PRECISION)
    a_qk *= scale
    prepared = (chunk.to(tl.int64) * P + p) * C + r
    if DECAY:
        at_decay = token * log_decay_stride + p // (P // LOG_DECAY_HEADS)
        decay = tl.exp(tl.load(log_decay + at_decay, mask=live, other=0.0).to(tl.float32))
        # between[r, s]: the product of decay over s < i <= r, and of nothing else
        between = tl.cumprod(tl.where(r[:, None] > r[None, :], decay[:, None], 1.0), 0)
        a_qk *= between
        t *= between
        tl.store(prefix + prepared, tl.cumprod(decay, 0))
        tl.store(suffix + prepared, tl.sum(tl.where(r[:, None] == C - 1, between, 0.0), 0))
    if ERASE == 1:
        at_erase = token * erase_stride + p // (P // ERASE_HEADS)
        t *= tl.load(erase + at_erase, mask=live, other=0.0).to(tl.float32)[:, None]
    to = prepared[:, None] * C + r[None, :]
    tl.store(scores + to, tl.where(r[:, None] >= r[None, :], a_qk, 0.0).to(DOT))
    if ERASE:
        t = tl.where(r[:, None] > r[None, :], t, 0.0)
        tl.store(inverse + to, invert(t, C, LEVELS, PRECISION).to(DOT))
