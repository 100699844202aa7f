"""The scan back over a sequence's chunks: gradients of the states and of what is written.

One program a segment of a sequence, value head and block of value channels; it holds its part of
the gradient of the state, [K, BV] in float32, and goes from the last chunk to the first:

    dR = A_qk^T dO + K~ dS        dX = inverse^T dR        dS = D dS + Q^T dO - E^T dX

Without an erase gate dX = dR. Rows and columns, and the decay of each form, are as in `scan`; so
are segments: each maps the gradient dS after it to M^T dS + N before it, and where a sequence has
several, an earlier launch finds these "transfers", V + K columns, and `merge` goes back over them.

Axes as in `scan`.
"""

import triton
import triton.language as tl

from gdn2.ops.triton.layout import (
    first_piece,
    load_rows,
    load_start,
    load_tokens,
    locate,
    store_rows,
)


@triton.jit(do_not_specialize=["N", "T"])
def scan_back(
    q,
    k,
    erase,
    erased_rows,
    query_rows,
    columns,
    total,
    prefix,
    suffix,
    inverse,
    scores,
    dout,
    starts,
    dstates,
    dwritten,
    dstart,
    transfers,
    cu_seqlens,
    N,
    T,
    scale,
    q_stride,
    k_stride,
    erase_stride,
    dout_stride,
    H: tl.constexpr,
    HV: tl.constexpr,
    P: tl.constexpr,
    ERASE_HEADS: tl.constexpr,
    K: tl.constexpr,
    KP: tl.constexpr,
    V: tl.constexpr,
    C: tl.constexpr,
    L: tl.constexpr,
    BV: tl.constexpr,
    DECAY: tl.constexpr,
    ERASE: tl.constexpr,
    HAS_STARTS: tl.constexpr,
    FIND: tl.constexpr,
    PACKED: tl.constexpr,
    DOT: tl.constexpr,
):
    TRANSFER: tl.constexpr = FIND == "transfers"
    columns_of_state: tl.constexpr = V + K if TRANSFER else V
    blocks: tl.constexpr = tl.cdiv(columns_of_state, BV)
    block = tl.program_id(0) % blocks
    hv = tl.program_id(0) // blocks % HV
    segment = tl.program_id(0) // blocks // HV
    p = hv // (HV // P)
    n, start, length, before = locate(segment, cu_seqlens, N, T, L, PACKED)
    # Nothing comes before a sequence's first segment; surplus ones of a pack are empty.
    if (before == 0) | (before >= length) if TRANSFER else (before > 0) & (before >= length):
        return
    chunk_0 = first_piece(n, start, T, C, PACKED) + before // C
    start += before
    length -= before
    r = tl.arange(0, C)
    kc = tl.arange(0, KP)
    vc = block * BV + tl.arange(0, BV)
    k_in = kc < K
    v_in = vc < V
    state_in = k_in[:, None] & (vc < columns_of_state)[None, :]
    first_state = (segment.to(tl.int64) * HV + hv) * K
    dS = load_start(starts, first_state, kc, vc, V, state_in, TRANSFER, HAS_STARTS)
    chunks = tl.cdiv(tl.minimum(length, L), C)
    for j in tl.range(0, chunks):
        i = chunks - 1 - j
        first = start + i * C
        live = r < length - i * C
        first_row = ((chunk_0 + i) * P + p) * C
        in_chunk = first_row * C + r[:, None] * C + r[None, :]
        of_value_head = (chunk_0 + i) * HV + hv
        dO = load_rows(dout, first, r, dout_stride, hv * V + vc, live[:, None] & v_in[None, :])
        dS_read = dS.to(DOT)
        if DECAY == 2:
            rows_in = k_in[None, :]
            keys = load_rows(columns, first_row, r, K, kc, rows_in)
        else:
            rows_in = live[:, None] & k_in[None, :]
            keys = load_rows(k, first, r, k_stride, hv // (HV // H) * K + kc, rows_in)
        dR = tl.dot(keys, dS_read, input_precision="tf32x3")
        if DECAY == 1:
            dR *= tl.load(suffix + first_row + r)[:, None]
        dR = tl.dot(tl.trans(tl.load(scores + in_chunk)), dO, acc=dR, input_precision="tf32x3")
        if ERASE:
            A = tl.load(inverse + in_chunk)
            dX = tl.dot(tl.trans(A), dR.to(DOT), input_precision="tf32x3")
        else:
            dX = dR
        if not TRANSFER:
            store_rows(dstates, of_value_head * K, kc, V, vc, dS_read, state_in)
            store_rows(dwritten, of_value_head * C, r, V, vc, dX, v_in[None, :])
        if DECAY == 2:
            dS *= tl.load(total + ((chunk_0 + i) * P + p) * K + kc, mask=k_in, other=0.0)[:, None]
            queries = load_rows(query_rows, first_row, r, K, kc, rows_in)
            dS = tl.dot(tl.trans(queries), dO, acc=dS, input_precision="tf32x3")
            if ERASE:
                erased = load_rows(erased_rows, first_row, r, K, kc, rows_in)
        else:
            queries = load_rows(q, first, r, q_stride, hv // (HV // H) * K + kc, rows_in)
            read = dO.to(tl.float32) * scale
            if DECAY == 1:
                dS *= tl.load(prefix + ((chunk_0 + i) * P + p) * C + C - 1)
                decay = tl.load(prefix + first_row + r)[:, None]
                read *= decay
                dX *= decay
            dS = tl.dot(tl.trans(queries), read.to(DOT), acc=dS, input_precision="tf32x3")
            if ERASE == 2:
                at = hv // (HV // ERASE_HEADS) * K + kc
                gate = load_rows(erase, first, r, erase_stride, at, rows_in).to(tl.float32)
                erased = (keys.to(tl.float32) * gate).to(DOT)
            elif ERASE == 1:
                head = hv // (HV // ERASE_HEADS)
                dX *= load_tokens(erase, first, r, erase_stride, head, live)[:, None]
                erased = keys
        if ERASE:
            dS = tl.dot(tl.trans(erased), (-dX).to(DOT), acc=dS, input_precision="tf32x3")
    if TRANSFER:
        store_rows(transfers, first_state, kc, V + K, vc, dS, state_in)
    elif dstart is not None and before == 0:
        store_rows(dstart, (n * HV + hv) * K, kc, V, vc, dS, state_in)
