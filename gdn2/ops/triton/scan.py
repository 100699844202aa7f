"""The scan over a sequence's chunks: outputs and states (Eqs. 23-25).

One program a segment of a sequence, value head and block of value channels; it holds its part of
the state, [K, BV] in float32, and goes from chunk to chunk:

    X = Z - E S        R = inverse X        O = Q S + scores R        S = D S + K~^T R

Without an erase gate R = Z. Under decay per head (or none) E, Q and K~ are the operands' own rows
and columns, and the decay scales rows of the products instead.

Segments of L tokens are scanned at the same time, each from its own starting state. FIND is what a
launch is for: "outputs" and the last states; "states" before every chunk and what each writes (R),
for the gradients; or "transfers", where a sequence is longer than a segment. A segment maps a state
S to M S + N, and the same scan finds both, N from a state of zeros and M from the identity with
Z = 0, as V + K columns of one state; from them `merge` makes the starting states.

Axes: C tokens a chunk, HV value heads, P heads of prepared chunks, K key channels (KP: the next
power of two), V value channels, BV of them a program.
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
def scan(
    q,
    k,
    v,
    erase,
    write,
    erased_rows,
    query_rows,
    columns,
    total,
    prefix,
    suffix,
    inverse,
    scores,
    starts,
    out,
    new_state,
    transfers,
    states,
    written,
    cu_seqlens,
    N,
    T,
    scale,
    q_stride,
    k_stride,
    v_stride,
    erase_stride,
    write_stride,
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
    WRITE: tl.constexpr,
    HAS_STARTS: tl.constexpr,
    FIND: tl.constexpr,
    PACKED: tl.constexpr,
    DOT: tl.constexpr,
):
    TRANSFER: tl.constexpr = FIND == "transfers"
    columns_of_state: tl.constexpr = V + K if TRANSFER else V
    blocks: tl.constexpr = tl.cdiv(columns_of_state, BV)  # neighbours, which read the same rows
    block = tl.program_id(0) % blocks
    hv = tl.program_id(0) // blocks % HV
    segment = tl.program_id(0) // blocks // HV
    p = hv // (HV // P)
    n, start, length, before = locate(segment, cu_seqlens, N, T, L, PACKED)
    last = before + L >= length
    # Nothing follows a sequence's last segment; surplus ones of a pack are empty.
    if last if TRANSFER else (before > 0) & (before >= length):
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
    S = load_start(starts, first_state, kc, vc, V, state_in, TRANSFER, HAS_STARTS)
    for i in tl.range(0, tl.cdiv(tl.minimum(length, L), C)):
        first = start + i * C
        live = r < length - i * C
        first_row = ((chunk_0 + i) * P + p) * C
        in_chunk = first_row * C + r[:, None] * C + r[None, :]
        z_in = live[:, None] & v_in[None, :]
        z = load_rows(v, first, r, v_stride, hv * V + vc, z_in).to(tl.float32)
        if WRITE == 2:
            z *= load_rows(write, first, r, write_stride, hv * V + vc, z_in).to(tl.float32)
        elif WRITE == 1:
            z *= load_tokens(write, first, r, write_stride, hv, live)[:, None]
        S_read = S.to(DOT)
        if DECAY == 2:
            rows_in = k_in[None, :]
            keys = load_rows(columns, first_row, r, K, kc, rows_in)
            if ERASE:
                erased = load_rows(erased_rows, first_row, r, K, kc, rows_in)
                z -= tl.dot(erased, S_read, input_precision="tf32x3")
        else:
            rows_in = live[:, None] & k_in[None, :]
            keys = load_rows(k, first, r, k_stride, hv // (HV // H) * K + kc, rows_in)
            if DECAY == 1:
                decay = tl.load(prefix + first_row + r)[:, None]
            if ERASE == 2:
                at = hv // (HV // ERASE_HEADS) * K + kc
                gate = load_rows(erase, first, r, erase_stride, at, rows_in).to(tl.float32)
                erased = (keys.to(tl.float32) * gate).to(DOT)
                read = tl.dot(erased, S_read, input_precision="tf32x3")
            elif ERASE == 1:
                head = hv // (HV // ERASE_HEADS)
                gate = load_tokens(erase, first, r, erase_stride, head, live)
                read = tl.dot(keys, S_read, input_precision="tf32x3") * gate[:, None]
            if ERASE:
                z -= read * decay if DECAY == 1 else read
        if ERASE:
            R = tl.dot(tl.load(inverse + in_chunk), z.to(DOT), input_precision="tf32x3")
        else:
            R = z
        if FIND == "states":
            of_value_head = (chunk_0 + i) * HV + hv
            store_rows(states, of_value_head * K, kc, V, vc, S_read, state_in)
            store_rows(written, of_value_head * C, r, V, vc, R, v_in[None, :])
        elif FIND == "outputs":
            if DECAY == 2:
                queries = load_rows(query_rows, first_row, r, K, kc, rows_in)
                o = tl.dot(queries, S_read, input_precision="tf32x3")
            else:
                queries = load_rows(q, first, r, q_stride, hv // (HV // H) * K + kc, rows_in)
                o = tl.dot(queries, S_read, input_precision="tf32x3") * scale
                if DECAY == 1:
                    o *= decay
            o = tl.dot(tl.load(scores + in_chunk), R.to(DOT), acc=o, input_precision="tf32x3")
            store_rows(out, first, r, HV * V, hv * V + vc, o, z_in)
        if DECAY == 2:
            S *= tl.load(total + ((chunk_0 + i) * P + p) * K + kc, mask=k_in, other=0.0)[:, None]
        elif DECAY == 1:
            R *= tl.load(suffix + first_row + r)[:, None]
            S *= tl.load(prefix + ((chunk_0 + i) * P + p) * C + C - 1)
        S = tl.dot(tl.trans(keys), R.to(DOT), acc=S, input_precision="tf32x3")
    if TRANSFER:
        store_rows(transfers, first_state, kc, V + K, vc, S, state_in)
    elif last and FIND == "outputs":
        store_rows(new_state, (n * HV + hv) * K, kc, V, vc, S, state_in)
