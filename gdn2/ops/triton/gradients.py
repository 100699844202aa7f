"""All chunks at once: the gradients of the operands, from what the scans there and back left.

One program a chunk and key-side head. With the states S before and the gradients dS after it, the
written R, and dX and dO, summed over the value heads of the key-side head,

    dA_qk = tril(dO R^T)      dT = -tril(dX R^T, -1)      d(w * v) = dX
    dQ = dO S^T               dE = -dX S^T                dK~ = R dS^T

The first line's go through the levels of blocks once more, as `prepare` went for the scores, and
together with the second line's they give the rows dq and d(b * k), and dk as a column. The
cumulative log-decay G multiplies row r and divides column r wherever they meet another token, so

    dG_r = q_r dq_r + (b_r * k_r) d(b * k)_r - k_r dk_r     dlog_decay_i = sum_{r >= i} dG_r + end

where end = sum_r K~_r dK~_r + D rowsum(S * dS) is what the chunk's end adds. Gradients are written
for each key-side head; heads that share an operand or gate are summed after the launch.

Axes: as in `prepare` and `scan`; BK key channels and BV value channels at a time.
"""

import triton
import triton.language as tl

from gdn2.ops.triton.decay import decay_at, decay_within, exp, halves, halves_of_decay, pairs
from gdn2.ops.triton.layout import (
    load_gate,
    load_rows,
    load_tokens,
    load_transposed,
    locate,
    store_rows,
    store_tokens,
)


@triton.jit
def among(x, r, level):
    """x [C, C] where a row and a column are in blocks that meet at a level, else zeros."""
    return tl.where(pairs(r, level), x, tl.zeros_like(x))


@triton.jit
def sum_from(x, r, DOT: tl.constexpr):
    """The sum over each token and those after it [BK, C]."""
    if DOT == tl.bfloat16:
        ones = tl.where(r[:, None] >= r[None, :], 1.0, 0.0).to(DOT)
        high, low = halves(x, DOT)
        x = tl.dot(high, ones, acc=tl.dot(low, ones))
    else:  # halves of other types would not have float32's range
        x = tl.cumsum(x, 1, reverse=True)
    return x


@triton.jit(do_not_specialize=["N", "T"])
def gradients(
    q,
    k,
    v,
    log_decay,
    erase,
    write,
    prefix,
    suffix,
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
    BK: tl.constexpr,
    BV: tl.constexpr,
    LEVELS: tl.constexpr,
    DECAY: tl.constexpr,
    ERASE: tl.constexpr,
    WRITE: tl.constexpr,
    PACKED: tl.constexpr,
    DOT: tl.constexpr,
):
    GROUP: tl.constexpr = HV // P
    chunk = tl.program_id(0).to(tl.int64)
    p = tl.program_id(1)
    _, start, length, before = locate(chunk, cu_seqlens, N, T, C, PACKED)
    left = length - before
    if left <= 0:
        return
    r = tl.arange(0, C)
    first = start + before
    live = r < left

    # What meets within the chunk, and the values' gradients.
    dA = tl.zeros([C, C], tl.float32)
    dT = tl.zeros([C, C], tl.float32)
    for hv in tl.range(p * GROUP, (p + 1) * GROUP, loop_unroll_factor=1):
        dgate = tl.zeros([C], tl.float32)
        for first_channel in tl.range(0, V, BV, loop_unroll_factor=1):
            c = first_channel + tl.arange(0, BV)
            rows = (chunk * HV + hv) * C
            value_in = live[:, None] & (c < V)[None, :]
            at = hv * V + c
            R = tl.trans(load_rows(written, rows, r, V, c, value_in))
            dO = load_rows(dout, first, r, dout_stride, at, value_in)
            dX = load_rows(dwritten, rows, r, V, c, value_in)
            dA = tl.dot(dO, R, acc=dA, input_precision="tf32x3")
            if ERASE:
                dT = tl.dot(dX, R, acc=dT, input_precision="tf32x3")
            dz = dX.to(tl.float32)
            if WRITE:
                value = load_rows(v, first, r, v_stride, at, value_in).to(tl.float32)
            if WRITE == 2:
                gate = load_rows(write, first, r, write_stride, at, value_in).to(tl.float32)
                store_rows(dwrite, first, r, HV * V, at, dz * value, value_in)
                dz *= gate
            elif WRITE == 1:
                dgate += tl.sum(dz * value, 1)
                dz *= load_tokens(write, first, r, write_stride, hv, live)[:, None]
            store_rows(dv, first, r, HV * V, at, dz, value_in)
        if WRITE == 1:
            store_tokens(dwrite, first, r, HV, hv, dgate, live)
    below = r[:, None] > r[None, :]
    dA_itself = tl.sum(tl.where(r[:, None] == r[None, :], dA, 0.0), 1)
    dA = tl.where(below, dA, 0.0)
    dT = tl.where(below, -dT, 0.0)

    prepared = (chunk * P + p) * C
    erase_head = p // (P // ERASE_HEADS)
    derase_of_head = tl.zeros([C], tl.float32)
    if DECAY < 2:
        from_start = tl.full([1, C], 1.0, tl.float32)
        to_end = tl.full([1, C], 1.0, tl.float32)
        if DECAY == 1:
            head = p // (P // LOG_DECAY_HEADS)
            decay = exp(load_tokens(log_decay, first, r, log_decay_stride, head, live))
            between = tl.cumprod(tl.where(below, decay[:, None], 1.0), 0)
            dA *= between
            dT *= between
            from_start = tl.load(prefix + prepared + r)[None, :]
            to_end = tl.load(suffix + prepared + r)[None, :]
            whole = tl.load(prefix + prepared + C - 1)
            dG_of_head = tl.zeros([C], tl.float32)
            end_of_head = 0.0
    dA = dA.to(DOT)
    dT = dT.to(DOT)

    for first_key in tl.range(0, K, BK, loop_unroll_factor=1):
        kc = first_key + tl.arange(0, BK)
        k_at = p // (P // H) * K + kc
        at = p * K + kc

        # Rows: what they meet of the state, then of the chunk.
        dquery = tl.zeros([BK, C], tl.float32)
        derased = tl.zeros([BK, C], tl.float32)
        for hv in tl.range(p * GROUP, (p + 1) * GROUP, loop_unroll_factor=1):
            for first_channel in tl.range(0, V, BV, loop_unroll_factor=1):
                c = first_channel + tl.arange(0, BV)
                c_in = (c < V)[None, :]
                S = load_rows(states, (chunk * HV + hv) * K, kc, V, c, c_in)
                dO = load_rows(dout, first, r, dout_stride, hv * V + c, live[:, None] & c_in)
                dquery = tl.dot(S, tl.trans(dO), acc=dquery, input_precision="tf32x3")
                if ERASE:
                    dX = load_rows(dwritten, (chunk * HV + hv) * C, r, V, c, c_in)
                    derased = tl.dot(S, tl.trans(dX), acc=derased, input_precision="tf32x3")
        if DECAY == 2:
            head = p // (P // LOG_DECAY_HEADS)
            decay = load_gate(log_decay, first, r, log_decay_stride, head, kc, live, K, DECAY)
            high, low = halves_of_decay(decay)
            from_start = decay_within(high, low, r, C, r >= 0, DOT)
        dquery *= from_start
        derased *= -from_start
        key = load_transposed(k, first, r, k_stride, k_at, live)
        if DECAY == 2:
            for level in tl.range(0, LEVELS, loop_unroll_factor=1):
                x = decay_at(high, low, r, level, DOT)
                lower_keys = (key * x).to(DOT)
                met = tl.trans(among(dA, r, level))
                dquery += x * tl.dot(lower_keys, met, input_precision="tf32x3")
                if ERASE:
                    met = tl.trans(among(dT, r, level))
                    derased += x * tl.dot(lower_keys, met, input_precision="tf32x3")
        else:
            keys = key.to(DOT)
            dquery = tl.dot(keys, tl.trans(dA), acc=dquery, input_precision="tf32x3")
            if ERASE:
                derased = tl.dot(keys, tl.trans(dT), acc=derased, input_precision="tf32x3")
        dq_rows = tl.trans((dquery + dA_itself[None, :] * key) * scale)
        store_rows(dq, first, r, P * K, at, dq_rows, live[:, None])
        dG = load_transposed(q, first, r, q_stride, k_at, live) * scale * dquery
        dkey = tl.zeros([BK, C], tl.float32)
        if ERASE:
            gate = load_gate(erase, first, r, erase_stride, erase_head, kc, live, K, ERASE)
            dkey = gate * derased
            dG += 2 * key * dkey  # once for its part of dkey, which is no column's
            derased *= key
        if ERASE == 2:
            store_rows(derase, first, r, P * K, at, tl.trans(derased), live[:, None])
        elif ERASE == 1:
            derase_of_head += tl.sum(derased, 0)
            if first_key + BK == K:
                store_tokens(derase, first, r, P, p, derase_of_head, live)

        # Columns, in the same order. Keys and queries are read again: there is no room for both.
        dcolumn = tl.zeros([BK, C], tl.float32)
        dtotal = tl.zeros([BK], tl.float32)
        for hv in tl.range(p * GROUP, (p + 1) * GROUP, loop_unroll_factor=1):
            for first_channel in tl.range(0, V, BV, loop_unroll_factor=1):
                c = first_channel + tl.arange(0, BV)
                c_in = (c < V)[None, :]
                at_state = (chunk * HV + hv) * K
                dS = load_rows(dstates, at_state, kc, V, c, c_in)
                R = load_rows(written, (chunk * HV + hv) * C, r, V, c, c_in)
                dcolumn = tl.dot(dS, tl.trans(R), acc=dcolumn, input_precision="tf32x3")
                if DECAY:
                    S = load_rows(states, at_state, kc, V, c, c_in)
                    dtotal += tl.sum(S.to(tl.float32) * dS.to(tl.float32), 1)
        if DECAY == 2:
            to_end = decay_within(high, low, r, C, r < 0, DOT)
        dcolumn *= to_end
        dkey += dcolumn
        key = load_transposed(k, first, r, k_stride, k_at, live)
        end = tl.sum(key * dcolumn, 1)
        query = load_transposed(q, first, r, q_stride, k_at, live) * scale
        if ERASE:
            gate = load_gate(erase, first, r, erase_stride, erase_head, kc, live, K, ERASE)
            erased = key * gate
        if DECAY == 2:
            for level in tl.range(0, LEVELS, loop_unroll_factor=1):
                x = decay_at(high, low, r, level, DOT)
                met = tl.dot((query * x).to(DOT), among(dA, r, level), input_precision="tf32x3")
                if ERASE:
                    rows_met = (erased * x).to(DOT)
                    met = tl.dot(rows_met, among(dT, r, level), acc=met, input_precision="tf32x3")
                dkey += x * met
        else:
            dkey = tl.dot(query.to(DOT), dA, acc=dkey, input_precision="tf32x3")
            if ERASE:
                dkey = tl.dot(erased.to(DOT), dT, acc=dkey, input_precision="tf32x3")
        dG -= key * dkey
        dk_rows = tl.trans(dkey + dA_itself[None, :] * query)
        store_rows(dk, first, r, P * K, at, dk_rows, live[:, None])
        if DECAY == 2:
            end += dtotal * tl.load(total + (chunk * P + p) * K + kc)
            dG = sum_from(dG, r, DOT) + end[:, None]
            store_rows(dlog_decay, first, r, P * K, at, tl.trans(dG), live[:, None])
        elif DECAY == 1:
            dG_of_head += tl.sum(dG, 0)
            end_of_head += tl.sum(end) + whole * tl.sum(dtotal)

    if DECAY == 1:
        dG_of_head = tl.cumsum(dG_of_head, 0, reverse=True) + end_of_head
        store_tokens(dlog_decay, first, r, P, p, dG_of_head, live)
