"""The states that a sequence's segments start from, one after the other.

    S_{i+1} = M_i S_i + N_i

with the transfers (N, M) of `scan`; or, BACK, the gradients that its segments start from, from the
last segment to the first, with those of `scan_back`. One program a sequence, value head and block
of value channels, all in float32.

Axes: HV value heads, K key channels (KP: the next power of two, BK at a time), V value channels, BV
of them a program, segments of L tokens.
"""

import triton
import triton.language as tl

from gdn2.ops.triton.layout import first_piece, load_rows, load_start, store_rows


@triton.jit(do_not_specialize=["T"])
def merge(
    state,
    transfers,
    starts,
    cu_seqlens,
    T,
    HV: tl.constexpr,
    K: tl.constexpr,
    KP: tl.constexpr,
    V: tl.constexpr,
    L: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    HAS_STATE: tl.constexpr,
    BACK: tl.constexpr,
    PACKED: tl.constexpr,
):
    blocks: tl.constexpr = tl.cdiv(V, BV)
    block = tl.program_id(0) % blocks
    hv = tl.program_id(0) // blocks % HV
    n = (tl.program_id(0) // blocks // HV).to(tl.int64)
    start, length = n * T, T
    if PACKED:
        start = tl.load(cu_seqlens + n).to(tl.int64)
        length = (tl.load(cu_seqlens + n + 1) - start).to(tl.int32)
    first = first_piece(n, start, T, L, PACKED)
    segments = tl.maximum(tl.cdiv(length, L), 1)
    kc = tl.arange(0, KP)
    vc = block * BV + tl.arange(0, BV)
    k_in = kc < K
    state_in = k_in[:, None] & (vc < V)[None, :]
    S = load_start(state, (n * HV + hv) * K, kc, vc, V, state_in, False, HAS_STATE)
    for i in tl.range(0, segments - 1):
        segment = first + (segments - 1 - i if BACK else i)
        row = (segment * HV + hv) * K
        store_rows(starts, row, kc, V, vc, S, state_in)
        new = load_rows(transfers, row, kc, V + K, vc, state_in)
        for first_channel in tl.range(0, K, BK, loop_unroll_factor=1):
            c = first_channel + tl.arange(0, BK)
            M = load_rows(transfers, row, kc, V + K, V + c, k_in[:, None])
            S_c = tl.gather(S, tl.broadcast_to(c[:, None], [BK, BV]), 0)
            new = tl.dot(M, S_c, acc=new, input_precision="tf32x3")
        S = new
    segment = first + (0 if BACK else segments - 1)
    store_rows(starts, (segment * HV + hv) * K, kc, V, vc, S, state_in)
