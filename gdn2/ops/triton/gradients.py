"""All chunks at once: the gradients of the operands, from what the scans there and back left.

One program a chunk and key-side head. With the states S before and the gradients dS after it, the
written R, and dX and dO, summed over the value heads of the key-side head,

    dA_qk = tril(dO R^T)      dT = -tril(dX R^T, -1)      d(w * v) = dX
    dQ = dO S^T               dE = -dX S^T                dK~ = R dS^T

dA_qk and dT, the gradients of scores, are multiplied by keys and by rows at the level of blocks
where two tokens meet, as `prepare` made the scores. With the second line, decayed, that gives the
rows dq and d(b * k), and dk as a column. The cumulative log-decay G multiplies row r and divides
column r wherever they meet another token; so without what a token's query has of its own key, and
before dk gets its part b * d(b * k),

    dG_r = q_r dq_r + (b_r * k_r) d(b * k)_r - k_r dk_r     dlog_decay_i = sum_{r >= i} dG_r + end

where end = sum_r K~_r dK~_r + total rowsum(S * dS) is what the chunk's end adds. Gradients are
written for each key-side head; heads that share an operand or gate are summed after the launch.

Axes: as in `prepare` and `scan`; BK key channels and BV value channels at a time.
"""

import triton
import triton.language as tl

from gdn2.ops.triton.decay import decay_at, decay_of_all, decay_within, exp, halves, load_decay
from gdn2.ops.triton.gradients_shared import (
    gradients_at_states,
    gradients_of_scores,
    store_key_side,
)
from gdn2.ops.triton.layout import (
    load_gate,
    load_tokens,
    load_transposed,
    locate,
    store_rows,
    store_tokens,
)


@triton.jit
def among(x, r, level, LOWER: tl.constexpr):
    """x [D, D] where its row and its column are in blocks that meet at a level, else zeros.

    LOWER: of its lower triangle, or of the upper one.
    """
    block = r >> level
    above = tl.where(block & 1 == 0, block + 1, -1)
    if LOWER:
        meet = block[:, None] == above[None, :]
    else:
        meet = above[:, None] == block[None, :]
    return tl.where(meet, x, tl.zeros_like(x))


@triton.jit
def quarters(x, D: tl.constexpr):
    """x [2 D, 2 D]: above on the left, below it; above on the right, below it."""
    x = tl.permute(tl.reshape(x, [2, D, 2, D]), [1, 3, 0, 2])
    left, right = tl.split(x)
    above_left, below_left = tl.split(left)
    above_right, below_right = tl.split(right)
    return above_left, below_left, above_right, below_right


@triton.jit
def sum_from(x, r, DOT: tl.constexpr):
    """The sum over each token and those after it [BK, D]."""
    if DOT == tl.bfloat16:
        ones = tl.where(r[:, None] >= r[None, :], 1.0, 0.0).to(DOT)
        high, low = halves(x, DOT)
        x = tl.dot(high, ones, acc=tl.dot(low, ones))
    else:  # halves of other types would not have float32's range
        x = tl.cumsum(x, 1, reverse=True)
    return x


@triton.jit(do_not_specialize=["N", "T"])
def gradients_under_channel_decay(
    q,
    k,
    v,
    log_decay,
    erase,
    write,
    total,
    states,
    written,
    dout,
    dstates,
    dwritten,
    dq,
    dk,
    dv,
    dlog_decay,
    derase,
    dwrite,
    cu_seqlens,
    N,
    T,
    scale,
    q_stride,
    k_stride,
    v_stride,
    log_decay_stride,
    erase_stride,
    write_stride,
    dout_stride,
    H: tl.constexpr,
    HV: tl.constexpr,
    P: tl.constexpr,
    LOG_DECAY_HEADS: tl.constexpr,
    ERASE_HEADS: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    C: tl.constexpr,
    D: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    LEVELS: tl.constexpr,
    ERASE: tl.constexpr,
    WRITE: tl.constexpr,
    PACKED: tl.constexpr,
    DOT: tl.constexpr,
):
    """D = 2^LEVELS tokens at a time: a chunk, or its later half and then the earlier one.

    Tiles of half as many tokens let rows and columns share the decays of a level: for a whole
    chunk of 64 there are no registers for both.
    """
    HALVES: tl.constexpr = C // D
    tl.static_assert(HALVES <= 2)
    chunk = tl.program_id(0).to(tl.int64)
    p = tl.program_id(1)
    _, start, length, before = locate(chunk, cu_seqlens, N, T, C, PACKED)
    left = length - before
    if left <= 0:
        return
    first = start + before
    r = tl.arange(0, C)
    dscores = gradients_of_scores(
        v, write, written, dout, dwritten, dv, dwrite, chunk, p, first, r, r < left, scale,
        v_stride, write_stride, dout_stride, HV, P, V, C, BV, ERASE, WRITE,
    ).to(DOT)  # fmt: skip
    if HALVES == 2:
        early_scores, across, across_upper, late_scores = quarters(dscores, D)
    else:
        early_scores = dscores

    d = tl.arange(0, D)
    decay_head = p // (P // LOG_DECAY_HEADS)
    erase_head = p // (P // ERASE_HEADS)
    derase_early = tl.zeros([D], tl.float32)
    derase_late = tl.zeros([D], tl.float32)
    for first_key in tl.range(0, K, BK, loop_unroll_factor=1):
        c = first_key + tl.arange(0, BK)
        k_at = p // (P // H) * K + c
        late_queries = None  # rows of the later half
        late_erased = None
        for half in tl.static_range(HALVES - 1, -1, -1):
            t = half * D + d
            live = t < left
            dquery, derased, dkey, dkey_early, dtotal = gradients_at_states(
                states, dstates, written, dwritten, dout, chunk, p, first, t, live, c, scale,
                dout_stride, HV, P, K, V, C, BV, ERASE, half == HALVES - 1, half == 1,
            )  # fmt: skip
            if half:
                # Rows are further from the state, and meet the keys of the earlier half.
                high, low = load_decay(
                    log_decay, first, d, log_decay_stride, decay_head, c, d < left, K
                )
                whole = decay_of_all(high, low)[:, None]
                early = load_transposed(k, first, d, k_stride, k_at, d < left)
                early *= decay_within(high, low, d, D, d < 0, DOT)
                early_end = tl.sum(early * dkey_early, 1)
                early = early.to(DOT)
                dquery *= whole
                dquery = tl.dot(early, tl.trans(across), acc=dquery, input_precision="tf32x3")
                if ERASE:
                    derased *= whole
                    derased = tl.dot(early, across_upper, acc=derased, input_precision="tf32x3")
            high, low = load_decay(log_decay, first, t, log_decay_stride, decay_head, c, live, K)
            x = decay_within(high, low, d, D, d >= 0, DOT)
            dquery *= x
            derased *= x
            query = load_transposed(q, first, t, q_stride, k_at, live)
            key = load_transposed(k, first, t, k_stride, k_at, live)
            gate = key
            if ERASE:
                gate = load_gate(erase, first, t, erase_stride, erase_head, c, live, K, ERASE)
            x = decay_within(high, low, d, D, d < 0, DOT)
            if half == HALVES - 1:
                end = tl.sum(key * x * dkey, 1)
                end += dtotal * tl.load(total + (chunk * P + p) * K + c)
            if half:
                whole = decay_of_all(high, low)
                end += whole * early_end
            elif HALVES == 2:
                dkey *= whole[:, None]
                dkey = tl.dot(late_queries, across, acc=dkey, input_precision="tf32x3")
                if ERASE:
                    upper = tl.trans(across_upper)
                    dkey = tl.dot(late_erased, upper, acc=dkey, input_precision="tf32x3")
            dkey *= x

            own_scores = early_scores if half == 0 else late_scores
            for level in tl.range(0, LEVELS, loop_unroll_factor=1):
                x = decay_at(high, low, d, level, DOT)
                keys = key * x
                lower_keys = keys.to(DOT)
                below = among(own_scores, d, level, True)
                columns = tl.dot((query * x).to(DOT), below, input_precision="tf32x3")
                dquery += x * tl.dot(lower_keys, tl.trans(below), input_precision="tf32x3")
                if ERASE:
                    above = among(own_scores, d, level, False)
                    derased += x * tl.dot(lower_keys, above, input_precision="tf32x3")
                    erased = (keys * gate).to(DOT)
                    columns = tl.dot(erased, tl.trans(above), acc=columns, input_precision="tf32x3")
                dkey += x * columns

            alone = tl.where(d[:, None] == d[None, :], own_scores, tl.zeros_like(own_scores))
            dG, dgate = store_key_side(
                dq, dk, derase, first, t, live, p, c, query, key, gate,
                dquery, derased, dkey, alone, P, K, ERASE, DOT,
            )  # fmt: skip
            if half:
                # For the earlier half. The decay is made again: the levels leave no room for it.
                x = decay_within(high, low, d, D, d < D, DOT)
                late_queries = (query * x).to(DOT)
                late_erased = (key * x * gate).to(DOT)
            sums = sum_from(dG, d, DOT) + end[:, None]
            store_rows(dlog_decay, first, t, P * K, p * K + c, tl.trans(sums), live[:, None])
            end = tl.sum(tl.where((d == 0)[None, :], sums, 0.0), 1)
            if ERASE == 1:
                if half:
                    derase_late += dgate
                    dgate = derase_late
                else:
                    derase_early += dgate
                    dgate = derase_early
                if first_key + BK == K:
                    store_tokens(derase, first, t, P, p, dgate, live)


@triton.jit(do_not_specialize=["N", "T"])
def gradients_under_head_decay(
    q,
    k,
    v,
    log_decay,
    erase,
    write,
    prefix,
    suffix,
    states,
    written,
    dout,
    dstates,
    dwritten,
    dq,
    dk,
    dv,
    dlog_decay,
    derase,
    dwrite,
    cu_seqlens,
    N,
    T,
    scale,
    q_stride,
    k_stride,
    v_stride,
    log_decay_stride,
    erase_stride,
    write_stride,
    dout_stride,
    H: tl.constexpr,
    HV: tl.constexpr,
    P: tl.constexpr,
    LOG_DECAY_HEADS: tl.constexpr,
    ERASE_HEADS: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    C: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    DECAY: tl.constexpr,
    ERASE: tl.constexpr,
    WRITE: tl.constexpr,
    PACKED: tl.constexpr,
    DOT: tl.constexpr,
):
    """DECAY 1: one decay a head; 0: none."""
    chunk = tl.program_id(0).to(tl.int64)
    p = tl.program_id(1)
    _, start, length, before = locate(chunk, cu_seqlens, N, T, C, PACKED)
    left = length - before
    if left <= 0:
        return
    first = start + before
    r = tl.arange(0, C)
    live = r < left
    dscores = gradients_of_scores(
        v, write, written, dout, dwritten, dv, dwrite, chunk, p, first, r, live, scale,
        v_stride, write_stride, dout_stride, HV, P, V, C, BV, ERASE, WRITE,
    )  # fmt: skip
    if DECAY:
        head = p // (P // LOG_DECAY_HEADS)
        decay = exp(load_tokens(log_decay, first, r, log_decay_stride, head, live))
        between = tl.cumprod(tl.where(r[:, None] > r[None, :], decay[:, None], 1.0), 0)
        dscores *= between * tl.trans(between)
        prepared = (chunk * P + p) * C
        from_start = tl.load(prefix + prepared + r)[None, :]
        to_end = tl.load(suffix + prepared + r)[None, :]
        whole = tl.load(prefix + prepared + C - 1)
    dscores = dscores.to(DOT)
    nothing = tl.zeros_like(dscores)
    alone = tl.where(r[:, None] == r[None, :], dscores, nothing)
    above = tl.where(r[:, None] < r[None, :], dscores, nothing)
    dscores = tl.where(r[:, None] > r[None, :], dscores, nothing)

    erase_head = p // (P // ERASE_HEADS)
    derase_of_head = tl.zeros([C], tl.float32)
    dG_of_head = tl.zeros([C], tl.float32)
    end = 0.0
    for first_key in tl.range(0, K, BK, loop_unroll_factor=1):
        c = first_key + tl.arange(0, BK)
        k_at = p // (P // H) * K + c
        dquery, derased, dkey, _none, dtotal = gradients_at_states(
            states, dstates, written, dwritten, dout, chunk, p, first, r, live, c, scale,
            dout_stride, HV, P, K, V, C, BV, ERASE, DECAY, False,
        )  # fmt: skip
        query = load_transposed(q, first, r, q_stride, k_at, live)
        key = load_transposed(k, first, r, k_stride, k_at, live)
        if DECAY:
            dquery *= from_start
            derased *= from_start
            dkey *= to_end
            end += tl.sum(key * dkey) + whole * tl.sum(dtotal)
        keys = key.to(DOT)
        dquery = tl.dot(keys, tl.trans(dscores), acc=dquery, input_precision="tf32x3")
        dkey = tl.dot(query.to(DOT), dscores, acc=dkey, input_precision="tf32x3")
        gate = key
        if ERASE:
            gate = load_gate(erase, first, r, erase_stride, erase_head, c, live, K, ERASE)
            derased = tl.dot(keys, above, acc=derased, input_precision="tf32x3")
            rows = (key * gate).to(DOT)
            dkey = tl.dot(rows, tl.trans(above), acc=dkey, input_precision="tf32x3")
        dG, dgate = store_key_side(
            dq, dk, derase, first, r, live, p, c, query, key, gate,
            dquery, derased, dkey, alone, P, K, ERASE, DOT,
        )  # fmt: skip
        derase_of_head += dgate
        dG_of_head += tl.sum(dG, 0)
    if ERASE == 1:
        store_tokens(derase, first, r, P, p, derase_of_head, live)
    if DECAY:
        dG_of_head = tl.cumsum(dG_of_head, 0, reverse=True) + end
        store_tokens(dlog_decay, first, r, P, p, dG_of_head, live)
