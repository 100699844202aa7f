"""Decoding: up to a few tokens on states that are updated in place (Eq. 9).

One program a batch row, value head and block of value channels. It reads its part of the state
once, goes through the tokens in registers, and writes it back: the bytes of the state are all that
counts.

Axes: B batch rows, T tokens, H key heads, HV value heads, K key channels (KP: the next power of
two), V value channels, BV of them a program.
"""

import triton
import triton.language as tl

from gdn2.ops.triton.decay import exp


@triton.jit(do_not_specialize=["T"])
def step(
    q,
    k,
    v,
    log_decay,
    erase,
    write,
    state,
    state_indices,
    out,
    T,
    scale,
    q_stride,
    k_stride,
    v_stride,
    log_decay_stride,
    erase_stride,
    write_stride,
    H: tl.constexpr,
    HV: tl.constexpr,
    LOG_DECAY_HEADS: tl.constexpr,
    ERASE_HEADS: tl.constexpr,
    K: tl.constexpr,
    KP: tl.constexpr,
    V: tl.constexpr,
    BV: tl.constexpr,
    DECAY: tl.constexpr,
    ERASE: tl.constexpr,
    WRITE: tl.constexpr,
    INDEXED: tl.constexpr,
):
    blocks: tl.constexpr = tl.cdiv(V, BV)
    hv = tl.program_id(0) // blocks % HV
    b = tl.program_id(0) // blocks // HV
    kc = tl.arange(0, KP)
    vc = tl.program_id(0) % blocks * BV + tl.arange(0, BV)
    k_in = kc < K
    v_in = vc < V
    slot = tl.load(state_indices + b).to(tl.int64) if INDEXED else b.to(tl.int64)
    live = slot >= 0
    at_state = ((slot * HV + hv) * K + kc)[:, None] * V + vc[None, :]
    state_in = k_in[:, None] & v_in[None, :] & live
    S = tl.load(state + at_state, mask=state_in, other=0.0)
    for t in tl.range(0, T):
        token = (b * T + t).to(tl.int64)
        at_key = hv // (HV // H) * K + kc
        query = tl.load(q + token * q_stride + at_key, mask=k_in, other=0.0).to(tl.float32) * scale
        key = tl.load(k + token * k_stride + at_key, mask=k_in, other=0.0).to(tl.float32)
        change = tl.load(v + token * v_stride + hv * V + vc, mask=v_in, other=0.0).to(tl.float32)
        if WRITE == 2:
            gate = tl.load(write + token * write_stride + hv * V + vc, mask=v_in, other=0.0)
            change *= gate.to(tl.float32)
        elif WRITE == 1:
            change *= tl.load(write + token * write_stride + hv).to(tl.float32)
        if DECAY == 2:
            at_decay = token * log_decay_stride + hv // (HV // LOG_DECAY_HEADS) * K + kc
            S *= exp(tl.load(log_decay + at_decay, mask=k_in, other=0.0))[:, None]
        elif DECAY == 1:
            at_decay = token * log_decay_stride + hv // (HV // LOG_DECAY_HEADS)
            S *= exp(tl.load(log_decay + at_decay))
        if ERASE == 2:
            at_erase = token * erase_stride + hv // (HV // ERASE_HEADS) * K + kc
            gate = tl.load(erase + at_erase, mask=k_in, other=0.0).to(tl.float32)
            change -= tl.sum(S * (key * gate)[:, None], 0)
        elif ERASE == 1:
            gate = tl.load(erase + token * erase_stride + hv // (HV // ERASE_HEADS))
            change -= tl.sum(S * key[:, None], 0) * gate.to(tl.float32)
        S += key[:, None] * change[None, :]
        read = tl.where(live, tl.sum(S * query[:, None], 0), 0.0)
        at_out = (token * HV + hv) * V + vc
        tl.store(out + at_out, read.to(out.dtype.element_ty), mask=v_in)
    tl.store(state + at_state, S, mask=state_in)
