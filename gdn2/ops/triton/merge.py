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


@triton.jit(do_not_specialize=["T"])
def merge(
    state,
    transfers,
    starts,
    first_segment,
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
    if PACKED:
        first = tl.load(first_segment + n).to(tl.int64)
        segments = (tl.load(first_segment + n + 1) - first).to(tl.int32)
    else:
        segments = tl.maximum(tl.cdiv(T, L), 1)
        first = n * segments
    kc = tl.arange(0, KP)
    vc = block * BV + tl.arange(0, BV)
    k_in = kc < K
    state_in = k_in[:, None] & (vc < V)[None, :]
    if HAS_STATE:
        at_state = ((n * HV + hv) * K + kc)[:, None] * V + vc[None, :]
        S = tl.load(state + at_state, mask=state_in, other=0.0)
    else:
        S = tl.zeros([KP, BV], tl.float32)
    for i in tl.range(0, segments - 1):
        segment = first + (segments - 1 - i if BACK else i)
        rows = (segment * HV + hv) * K + kc
        tl.store(starts + rows[:, None] * V + vc[None, :], S, mask=state_in)
        at_transfer = rows[:, None] * (V + K)
        new = tl.load(transfers + at_transfer + vc[None, :], mask=state_in, other=0.0)
        for first_channel in tl.range(0, K, BK, loop_unroll_factor=1):
            c = first_channel + tl.arange(0, BK)
            M = tl.load(transfers + at_transfer + (V + c)[None, :], mask=k_in[:, None], other=0.0)
            S_c = tl.gather(S, tl.broadcast_to(c[:, None], [BK, BV]), 0)
            new = tl.dot(M, S_c, acc=new, input_precision="tf32x3")
        S = new
    segment = first + (0 if BACK else segments - 1)
    rows = (segment * HV + hv) * K + kc
    tl.store(starts + rows[:, None] * V + vc[None, :], S, mask=state_in)
