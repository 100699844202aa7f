"""All chunks at once: the gradients of the operands, from what the scans there and back left.

One program a chunk and key-side head. With the states S before and the gradients dS after it, the
written R, and dX and dO, summed over the value heads of the key-side head,

    dA_qk = tril(dO R^T)      dT = -tril(dX R^T, -1)      d(w * v) = dX
    dQ = dO S^T               dE = -dX S^T                dK~ = R dS^T

The first line's go through the scores once more, as `prepare` made them, and together with the
second line's they give dq, d(b * k) and, as a column, dk. The cumulative log-decay G multiplies row
r and divides column r wherever they meet another token, so

    dG_r = q_r dq_r + (b_r * k_r) d(b * k)_r - k_r dk_r     dlog_decay_i = sum_{r >= i} dG_r + end

where end = sum_r K~_r dK~_r + D rowsum(S * dS) is what the chunk's end adds. Gradients are written
for each key-side head; heads that share an operand or gate are summed after the launch.

Axes: as in `prepare` and `scan`; BK key channels and BV value channels at a time.
"""

import triton
import triton.language as tl

from gdn2.ops.triton.decay import exp, grow, pairs
from gdn2.ops.triton.layout import load_rows, load_tokens, locate, store_rows, store_tokens


@triton.jit(do_not_specialize=["T"])
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
    chunk_sequence,
    first_chunk,
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
    PRECISION: tl.constexpr,
):
    GROUP: tl.constexpr = HV // P
    chunk = tl.program_id(0).to(tl.int64)
    p = tl.program_id(1)
    _, start, length, before = locate(chunk, cu_seqlens, chunk_sequence, first_chunk, T, C, PACKED)
    left = length - before
    if left <= 0:
        return
    r = tl.arange(0, C)
    first = start + before
    live = r < left
    itself = r[:, None] == r[None, :]

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
            dA = tl.dot(dO, R, acc=dA, input_precision=PRECISION)
            if ERASE:
                dT = tl.dot(dX, R, acc=dT, input_precision=PRECISION)
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
    dA_itself = tl.sum(tl.where(itself, dA, 0.0), 1)[:, None]
    below = r[:, None] > r[None, :]
    dA = tl.where(below, dA, 0.0)
    dT = tl.where(below, -dT, 0.0)

    prepared = (chunk * P + p) * C
    if ERASE == 1:
        head = p // (P // ERASE_HEADS)
        erase_gate = load_tokens(erase, first, r, erase_stride, head, live)[:, None]
        derase_of_head = tl.zeros([C], tl.float32)
    if DECAY < 2:
        before_row = tl.full([C, 1], 1.0, tl.float32)
        after_row = tl.full([C, 1], 1.0, tl.float32)
        if DECAY == 1:
            head = p // (P // LOG_DECAY_HEADS)
            decay = exp(load_tokens(log_decay, first, r, log_decay_stride, head, live))
            between = tl.cumprod(tl.where(below, decay[:, None], 1.0), 0)
            dA *= between
            dT *= between
            before_row = tl.load(prefix + prepared + r)[:, None]
            after_row = tl.load(suffix + prepared + r)[:, None]
            whole = tl.load(prefix + prepared + C - 1)
            dG_of_head = tl.zeros([C], tl.float32)
            end_of_head = 0.0
    dA = dA.to(DOT)
    dT = dT.to(DOT)

    for first_key in tl.range(0, K, BK, loop_unroll_factor=1):
        kc = first_key + tl.arange(0, BK)
        at = p // (P // H) * K + kc
        query = load_rows(q, first, r, q_stride, at, live[:, None]).to(tl.float32) * scale
        key = load_rows(k, first, r, k_stride, at, live[:, None]).to(tl.float32)
        if ERASE == 2:
            at = p // (P // ERASE_HEADS) * K + kc
            gate = load_rows(erase, first, r, erase_stride, at, live[:, None]).to(tl.float32)
            erased = key * gate
        elif ERASE == 1:
            gate = erase_gate
            erased = key * gate
        if DECAY == 2:
            at = p // (P // LOG_DECAY_HEADS) * K + kc
            decay = load_rows(log_decay, first, r, log_decay_stride, at, live[:, None])
            before_row = exp(decay)
            after_row = tl.full([C, BK], 1.0, tl.float32)
            dquery = tl.zeros([C, BK], tl.float32)
            derase_row = tl.zeros([C, BK], tl.float32)
            dkey = tl.zeros([C, BK], tl.float32)
            for level in tl.range(0, LEVELS, loop_unroll_factor=1):
                upper, pair = pairs(r, level)
                met = tl.where(pair, dA, 0.0)
                lower_keys = tl.where(upper, 0.0, key * after_row).to(DOT)
                decayed = tl.where(upper, before_row, 0.0)
                dquery += decayed * tl.dot(met, lower_keys, input_precision=PRECISION)
                rows_met = (query * decayed).to(DOT)
                by_column = tl.dot(tl.trans(met), rows_met, input_precision=PRECISION)
                if ERASE:
                    met = tl.where(pair, dT, 0.0)
                    derase_row += decayed * tl.dot(met, lower_keys, input_precision=PRECISION)
                    rows_met = (erased * decayed).to(DOT)
                    by_column = tl.dot(
                        tl.trans(met), rows_met, acc=by_column, input_precision=PRECISION
                    )
                dkey += tl.where(upper, 0.0, after_row) * by_column
                before_row, after_row = grow(before_row, after_row, r, level)
        else:
            keys = key.to(DOT)
            dquery = tl.dot(dA, keys, input_precision=PRECISION)
            dkey = tl.dot(tl.trans(dA), query.to(DOT), input_precision=PRECISION)
            if ERASE:
                derase_row = tl.dot(dT, keys, input_precision=PRECISION)
                dkey = tl.dot(tl.trans(dT), erased.to(DOT), acc=dkey, input_precision=PRECISION)

        # What meets the state.
        drow = tl.zeros([C, BK], tl.float32)
        derased = tl.zeros([C, BK], tl.float32)
        dcolumn = tl.zeros([C, BK], tl.float32)
        dtotal = tl.zeros([BK], tl.float32)
        for hv in tl.range(p * GROUP, (p + 1) * GROUP, loop_unroll_factor=1):
            for first_channel in tl.range(0, V, BV, loop_unroll_factor=1):
                c = first_channel + tl.arange(0, BV)
                c_in = (c < V)[None, :]
                rows = (chunk * HV + hv) * C
                at_state = (chunk * HV + hv) * K
                S = load_rows(states, at_state, kc, V, c, c_in)
                dS = load_rows(dstates, at_state, kc, V, c, c_in)
                R = load_rows(written, rows, r, V, c, c_in)
                dO = load_rows(dout, first, r, dout_stride, hv * V + c, live[:, None] & c_in)
                drow = tl.dot(dO, tl.trans(S), acc=drow, input_precision=PRECISION)
                if ERASE:
                    dX = load_rows(dwritten, rows, r, V, c, c_in)
                    derased = tl.dot(dX, tl.trans(S), acc=derased, input_precision=PRECISION)
                dcolumn = tl.dot(R, tl.trans(dS), acc=dcolumn, input_precision=PRECISION)
                if DECAY:
                    dtotal += tl.sum(S.to(tl.float32) * dS.to(tl.float32), 1)
        dcolumn *= after_row
        dquery += before_row * drow
        dkey += dcolumn
        if ERASE:
            derase_row -= before_row * derased
        if DECAY:
            dG = query * dquery - key * dkey
            if ERASE:
                dG += erased * derase_row
            end = tl.sum(key * dcolumn, 0)
        if DECAY == 2:
            end += dtotal * tl.load(total + (chunk * P + p) * K + kc)
            dG = tl.cumsum(dG, 0, reverse=True) + end[None, :]
            store_rows(dlog_decay, first, r, P * K, p * K + kc, dG, live[:, None])
        elif DECAY == 1:
            dG_of_head += tl.sum(dG, 1)
            end_of_head += tl.sum(end) + whole * tl.sum(dtotal)
        dquery += dA_itself * key
        dkey += dA_itself * query
        at = p * K + kc
        if ERASE:
            dkey += gate * derase_row
            derase_row *= key
        if ERASE == 2:
            store_rows(derase, first, r, P * K, at, derase_row, live[:, None])
        elif ERASE == 1:
            derase_of_head += tl.sum(derase_row, 1)
        store_rows(dq, first, r, P * K, at, dquery * scale, live[:, None])
        store_rows(dk, first, r, P * K, at, dkey, live[:, None])

    if ERASE == 1:
        store_tokens(derase, first, r, P, p, derase_of_head, live)
    if DECAY == 1:
        dG_of_head = tl.cumsum(dG_of_head, 0, reverse=True) + end_of_head
        store_tokens(dlog_decay, first, r, P, p, dG_of_head, live)
