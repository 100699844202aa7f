"""What both kernels of `gradients` do: with values and states, and with what they found."""

import triton
import triton.language as tl

from gdn2.ops.triton.layout import (
    load_rows,
    load_tokens,
    store_rows,
    store_tokens,
)


@triton.jit
def gradients_of_scores(
    v,
    write,
    written,
    dout,
    dwritten,
    dv,
    dwrite,
    chunk,
    p,
    first,
    r,
    live,
    scale,
    v_stride,
    write_stride,
    dout_stride,
    HV: tl.constexpr,
    P: tl.constexpr,
    V: tl.constexpr,
    C: tl.constexpr,
    BV: tl.constexpr,
    ERASE: tl.constexpr,
    WRITE: tl.constexpr,
):
    """[C, C]: dA_qk in the lower triangle and the diagonal, and dT transposed in the upper one.

    Writes the gradients of the values and of their gate.
    """
    dA = tl.zeros([C, C], tl.float32)
    dT = tl.zeros([C, C], tl.float32)
    for hv in tl.range(p * (HV // P), (p + 1) * (HV // P), loop_unroll_factor=1):
        dgate = tl.zeros([C], tl.float32)
        for first_channel in tl.range(0, V, BV, loop_unroll_factor=1):
            c = first_channel + tl.arange(0, BV)
            rows = (chunk * HV + hv) * C
            value_in = live[:, None] & (c < V)[None, :]
            at = hv * V + c
            R = load_rows(written, rows, r, V, c, value_in)
            dO = load_rows(dout, first, r, dout_stride, at, value_in)
            dX = load_rows(dwritten, rows, r, V, c, value_in)
            dA = tl.dot(dO, tl.trans(R), acc=dA, input_precision="tf32x3")
            if ERASE:
                dT = tl.dot(R, tl.trans(dX), acc=dT, input_precision="tf32x3")
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
    return tl.where(r[:, None] >= r[None, :], dA * scale, -dT)


@triton.jit
def gradients_at_states(
    states,
    dstates,
    written,
    dwritten,
    dout,
    chunk,
    p,
    first,
    t,
    live,
    c_key,
    scale,
    dout_stride,
    HV: tl.constexpr,
    P: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    C: tl.constexpr,
    BV: tl.constexpr,
    ERASE: tl.constexpr,
    TOTAL: tl.constexpr,
    BEFORE: tl.constexpr,
):
    """dQ, dE and dK~ of the chunk's tokens t, no decays yet [channels c_key, tokens].

    TOTAL: also rowsum(S * dS); BEFORE: also dK~ of as many tokens before them. Else zeros.
    """
    tile: tl.constexpr = [c_key.shape[0], t.shape[0]]
    dquery = tl.zeros(tile, tl.float32)
    derased = tl.zeros(tile, tl.float32)
    dkey = tl.zeros(tile, tl.float32)
    dkey_before = tl.zeros(tile, tl.float32)
    dtotal = tl.zeros([c_key.shape[0]], tl.float32)
    for hv in tl.range(p * (HV // P), (p + 1) * (HV // P), loop_unroll_factor=1):
        for first_channel in tl.range(0, V, BV, loop_unroll_factor=1):
            c = first_channel + tl.arange(0, BV)
            c_in = (c < V)[None, :]
            of_state = (chunk * HV + hv) * K
            rows = (chunk * HV + hv) * C
            S = load_rows(states, of_state, c_key, V, c, c_in)
            dO = load_rows(dout, first, t, dout_stride, hv * V + c, live[:, None] & c_in)
            dquery = tl.dot(S, tl.trans(dO), acc=dquery, input_precision="tf32x3")
            if ERASE:
                dX = load_rows(dwritten, rows, t, V, c, c_in)
                derased = tl.dot(S, tl.trans(dX), acc=derased, input_precision="tf32x3")
            dS = load_rows(dstates, of_state, c_key, V, c, c_in)
            R = load_rows(written, rows, t, V, c, c_in)
            dkey = tl.dot(dS, tl.trans(R), acc=dkey, input_precision="tf32x3")
            if BEFORE:
                R = load_rows(written, rows, t - t.shape[0], V, c, c_in)
                dkey_before = tl.dot(dS, tl.trans(R), acc=dkey_before, input_precision="tf32x3")
            if TOTAL:
                dtotal += tl.sum(S.to(tl.float32) * dS.to(tl.float32), 1)
    return dquery * scale, -derased, dkey, dkey_before, dtotal


@triton.jit
def store_key_side(
    dq,
    dk,
    derase,
    first,
    t,
    live,
    p,
    c,
    query,
    key,
    gate,
    dquery,
    derased,
    dkey,
    alone,
    P: tl.constexpr,
    K: tl.constexpr,
    ERASE: tl.constexpr,
    DOT: tl.constexpr,
):
    """Writes the gradients of q, k and an erase gate per channel; returns dG [BK, D].

    Also returns that of an erase gate per head, these channels' part of it [D].
    alone: what tokens have of themselves, on a diagonal; it takes no part in dG.
    """
    at = p * K + c
    dG = query * dquery - key * dkey
    dquery = tl.dot(key.to(DOT), alone, acc=dquery, input_precision="tf32x3")
    store_rows(dq, first, t, P * K, at, tl.trans(dquery), live[:, None])
    dgate = tl.zeros([t.shape[0]], tl.float32)
    if ERASE:
        unfolded = gate * derased
        dkey += unfolded
        dG += key * unfolded
        derased *= key
        if ERASE == 2:
            store_rows(derase, first, t, P * K, at, tl.trans(derased), live[:, None])
        else:
            dgate = tl.sum(derased, 0)
    dkey = tl.dot(query.to(DOT), alone, acc=dkey, input_precision="tf32x3")
    store_rows(dk, first, t, P * K, at, tl.trans(dkey), live[:, None])
    return dG, dgate
