"""The scan over a sequence's chunks: outputs and states (Eqs. 23-25).

One program a value head and block of value channels; it holds its part of the state, [K, BV] in
float32, and goes from chunk to chunk:

    X = Z - E S        R = inverse X        O = Q S + scores R        S = D S + K~^T R

Without an erase gate R = Z. Under decay per head (or none) E, Q and K~ are the operands' own rows
and columns, and the decay scales rows of the products instead.

Axes: C tokens a chunk, HV value heads, P heads of prepared chunks, K key channels (KP: the next
power of two), V value channels, BV of them a program.
"""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["T"])
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
    state,
    out,
    new_state,
    cu_seqlens,
    first_chunk,
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
    BV: tl.constexpr,
    DECAY: tl.constexpr,
    ERASE: tl.constexpr,
    WRITE: tl.constexpr,
    HAS_STATE: tl.constexpr,
    PACKED: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    blocks: tl.constexpr = tl.cdiv(V, BV)  # neighbours, which read the same rows
    block = tl.program_id(0) % blocks
    hv = tl.program_id(0) // blocks % HV
    n = (tl.program_id(0) // blocks // HV).to(tl.int64)
    p = hv // (HV // P)
    if PACKED:
        start = tl.load(cu_seqlens + n).to(tl.int64)
        length = (tl.load(cu_seqlens + n + 1) - start).to(tl.int32)
        chunk_0 = tl.load(first_chunk + n).to(tl.int64)
    else:
        start = n * T
        length = T
        chunk_0 = n * tl.cdiv(T, C)
    r = tl.arange(0, C)
    kc = tl.arange(0, KP)
    vc = block * BV + tl.arange(0, BV)
    k_in = kc < K
    v_in = vc < V
    at_state = ((n * HV + hv) * K + kc)[:, None] * V + vc[None, :]
    state_in = k_in[:, None] & v_in[None, :]
    if HAS_STATE:
        S = tl.load(state + at_state, mask=state_in, other=0.0)
    else:
        S = tl.zeros([KP, BV], tl.float32)
    for i in tl.range(0, tl.cdiv(length, C)):
        token = start + i * C + r
        live = r < length - i * C
        prepared = ((chunk_0 + i) * P + p) * C + r
        in_chunk = prepared[:, None] * C + r[None, :]
        at_v = token[:, None] * v_stride + (hv * V + vc)[None, :]
        z_in = live[:, None] & v_in[None, :]
        z = tl.load(v + at_v, mask=z_in, other=0.0).to(tl.float32)
        if WRITE == 2:
            at_write = token[:, None] * write_stride + (hv * V + vc)[None, :]
            z *= tl.load(write + at_write, mask=z_in, other=0.0).to(tl.float32)
        elif WRITE == 1:
            at_write = token * write_stride + hv
            z *= tl.load(write + at_write, mask=live, other=0.0).to(tl.float32)[:, None]
        S_read = S.to(DOT)
        if DECAY == 2:
            at_rows = prepared[:, None] * K + kc[None, :]
            keys = tl.load(columns + at_rows, mask=k_in[None, :], other=0.0)
            queries = tl.load(query_rows + at_rows, mask=k_in[None, :], other=0.0)
            o = tl.dot(queries, S_read, input_precision=PRECISION)
            if ERASE:
                erased = tl.load(erased_rows + at_rows, mask=k_in[None, :], other=0.0)
                z -= tl.dot(erased, S_read, input_precision=PRECISION)
        else:
            rows_in = live[:, None] & k_in[None, :]
            head = hv // (HV // H)
            keys = tl.load(
                k + token[:, None] * k_stride + (head * K + kc)[None, :], mask=rows_in, other=0.0
            )
            queries = tl.load(
                q + token[:, None] * q_stride + (head * K + kc)[None, :], mask=rows_in, other=0.0
            )
            o = tl.dot(queries, S_read, input_precision=PRECISION) * scale
            if DECAY == 1:
                before = tl.load(prefix + prepared)
                o *= before[:, None]
            if ERASE == 2:
                at_erase = (
                    token[:, None] * erase_stride + (hv // (HV // ERASE_HEADS) * K + kc)[None, :]
                )
                gate = tl.load(erase + at_erase, mask=rows_in, other=0.0).to(tl.float32)
                read = tl.dot(
                    (keys.to(tl.float32) * gate).to(DOT), S_read, input_precision=PRECISION
                )
            elif ERASE == 1:
                at_erase = token * erase_stride + hv // (HV // ERASE_HEADS)
                gate = tl.load(erase + at_erase, mask=live, other=0.0).to(tl.float32)
                read = tl.dot(keys, S_read, input_precision=PRECISION) * gate[:, None]
            if ERASE:
                z -= read * before[:, None] if DECAY == 1 else read
        if ERASE:
            R = tl.dot(tl.load(inverse + in_chunk), z.to(DOT), input_precision=PRECISION)
        else:
            R = z
        o = tl.dot(tl.load(scores + in_chunk), R.to(DOT), acc=o, input_precision=PRECISION)
        tl.store(
            out + token[:, None] * (HV * V) + (hv * V + vc)[None, :],
            o.to(out.dtype.element_ty),
            mask=z_in,
        )
        if DECAY == 2:
            S *= tl.load(total + ((chunk_0 + i) * P + p) * K + kc, mask=k_in, other=0.0)[:, None]
        elif DECAY == 1:
            R *= tl.load(suffix + prepared)[:, None]
            S *= tl.load(prefix + ((chunk_0 + i) * P + p) * C + C - 1)
        S = tl.dot(tl.trans(keys), R.to(DOT), acc=S, input_precision=PRECISION)
    tl.store(new_state + at_state, S, mask=state_in)
