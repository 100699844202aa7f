"""The gated delta rule in chunks: matrix products in plain PyTorch, on any device (Eqs. 18-24).

With the rows E, Q and the columns k decayed within a chunk as `decayed_scores` does it,

    X = Z - E S_0        R = (I + T)^-1 X        O = Q S_0 + A_qk R        S_C = D S_0 + k~^T R

and backwards, from dO and dS_C, without forming the gradient of the inverse,

    dR = A_qk^T dO + k~ dS_C      dZ = (I + T)^-T dR      dS_0 = D dS_C + Q^T dO - E^T dZ
    dT = -tril(dZ R^T, -1)        dA_qk = tril(dO R^T)    dE = -dZ S_0^T    dQ = dO S_0^T    ...

E and Q are two kinds of row that lie one after the other, so that one product serves both.

Kept for the backward: the inputs and one state a segment; the rest is computed again. Sums and
states are float32, or float64 for float64 inputs.

Forward and backward are operators of `torch.library`: compilers see each as one node.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from gdn2.ops.chunk_schedule import Schedule, Segment, build_schedule, most_segment_starts
from gdn2.ops.chunks import Chunks, KeptChunks, Layout
from gdn2.ops.contract import (
    Operands,
    check_bounds,
    check_first_order,
    check_no_tangent,
    no_autocast,
)

CHUNK = 32  # a power of two
_SEGMENT_ELEMENTS = 2**18  # of one [M, C, K or W] buffer: about a megabyte, to stay in cache

_on_cpu = KeptChunks()


def gated_delta_rule(
    x: Operands, scale: float, state: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    """All sequences in chunks; see the public `gated_delta_rule`."""
    tensors = (*x, state)
    check_no_tangent(tensors)
    keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    out, state, _ = _forward(*tensors, cu_seqlens, scale, keep)
    return out, state


@torch.library.custom_op("gdn2::chunked_gated_delta_rule", mutates_args=())
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    erase: Tensor | None,
    write: Tensor | None,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns outputs, states, and (if `keep`) the states that segments start from, in order."""
    layout = Layout.of(q, v, log_decay, erase)
    schedule = _schedule(layout, q, cu_seqlens)
    inputs = layout.flat(Operands(q, k, v, log_decay, erase, write))
    out = torch.empty(v.shape, dtype=q.dtype, device=q.device)
    S = layout.state_in(state, schedule, q.device)
    starts = _empty_starts(layout, q, cu_seqlens, keep)
    chunks_of, kept = _chunks_of(schedule, layout, scale, q.device, keep=False), 0
    with no_autocast(q):
        for segment in schedule.segments:
            state = S[segment.sequences]
            if keep:
                starts[kept : kept + len(state)] = state
                kept += len(state)
            chunks = chunks_of(segment)
            chunks.load(segment, inputs)
            chunks.scan(state)
            chunks.store(segment, layout.values(out))
    starts[kept:] = 0
    return out, layout.state_out(S, schedule), starts


@_forward.register_fake
def _(q, k, v, log_decay, erase, write, state, cu_seqlens, scale, keep):  # noqa: ARG001
    layout = Layout.of(q, v, log_decay, erase)
    starts = _empty_starts(layout, q, cu_seqlens, keep)
    return q.new_empty(v.shape), _empty_states(layout, q, cu_seqlens), starts


@torch.library.custom_op("gdn2::chunked_gated_delta_rule_backward", mutates_args=())
def _backward(
    dout: Tensor,
    dstate: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    erase: Tensor | None,
    write: Tensor | None,
    cu_seqlens: Tensor | None,
    starts: Tensor,
    scale: float,
) -> list[Tensor]:
    """Returns the gradients of q, k, v, of those gates that there are, and of the state."""
    operands = Operands(q, k, v, log_decay, erase, write)
    layout = Layout.of(q, v, log_decay, erase)
    schedule = _schedule(layout, q, cu_seqlens)
    inputs = layout.flat(operands)
    grads = _empty_gradients(operands)
    dinputs, dvalues = layout.flat(grads), layout.values(dout)
    dS = layout.state_in(dstate, schedule, dout.device)
    chunks_of = _chunks_of(schedule, layout, scale, q.device, keep=True)
    kept = sum(segment.num_sequences for segment in schedule.segments)
    with no_autocast(dout):
        for segment in reversed(schedule.segments):
            S = starts[kept - segment.num_sequences : kept].clone()
            kept -= len(S)
            chunks = chunks_of(segment)
            chunks.load(segment, inputs)
            chunks.scan(S)
            chunks.backward(segment, inputs, dvalues, dS[segment.sequences], dinputs)
    return [*(g for g in grads if g is not None), layout.state_out(dS, schedule)]


@_backward.register_fake
def _(dout, dstate, q, k, v, log_decay, erase, write, cu_seqlens, starts, scale):  # noqa: ARG001
    grads = _empty_gradients(Operands(q, k, v, log_decay, erase, write))
    layout = Layout.of(q, v, log_decay, erase)
    return [*(g for g in grads if g is not None), _empty_states(layout, q, cu_seqlens)]


def _save(ctx, inputs, output):
    *operands, state, cu_seqlens, ctx.scale, _ = inputs
    ctx.has_state = state is not None
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[2])
    ctx.save_for_backward(*operands, cu_seqlens, output[2])


def _differentiate(ctx, dout, dstate, _):
    check_first_order()
    saved = ctx.saved_tensors  # once: an activation checkpoint computes them again at each access
    *operands, cu_seqlens, starts = saved
    x = Operands(*operands)
    return (
        *_gradients(x, ctx.scale, cu_seqlens, starts, dout, dstate, ctx.has_state),
        None,
        None,
        None,
    )


def gradients(
    x: Operands,
    scale: float,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    dout: Tensor | None,
    dstate: Tensor | None,
) -> list[Tensor | None]:
    """Those of the operands and the state, for a backend whose forward kept nothing else."""
    check_first_order()
    *_, starts = _forward(*x, state, cu_seqlens, scale, True)
    return _gradients(x, scale, cu_seqlens, starts, dout, dstate, state is not None)


def _gradients(
    x: Operands,
    scale: float,
    cu_seqlens: Tensor | None,
    starts: Tensor,
    dout: Tensor | None,
    dstate: Tensor | None,
    has_state: bool,
) -> list[Tensor | None]:
    if dout is None:
        dout = torch.zeros_like(x.v)
    grads = iter(_backward(dout, dstate, *x, cu_seqlens, starts, scale))
    of_operands = [None if t is None else next(grads) for t in x]
    return [*of_operands, next(grads) if has_state else None]


_forward.register_autograd(_differentiate, setup_context=_save)


def _schedule(layout: Layout, q: Tensor, cu_seqlens: Tensor | None) -> Schedule:
    B, T = q.shape[:2]
    if cu_seqlens is None:
        bounds = [b * T for b in range(B + 1)]
    else:
        bounds = cu_seqlens.tolist()
        check_bounds(bounds, T)
    return build_schedule(bounds, **_sizes(layout, cu_seqlens), device=q.device)


def _chunks_of(
    schedule: Schedule, layout: Layout, scale: float, device: torch.device, *, keep: bool
) -> Callable[[Segment], Chunks]:
    """New ones on an accelerator, where work on the last call's buffers may still be queued."""
    kept = _on_cpu if device.type == "cpu" else KeptChunks()
    return kept(schedule, layout, scale, device, keep=keep)


def _sizes(layout: Layout, cu_seqlens: Tensor | None) -> dict[str, int]:
    chunks = max(1, _SEGMENT_ELEMENTS // (layout.P * CHUNK * max(layout.K, layout.W)))
    side_by_side = max(1, chunks // 4) if cu_seqlens is None else 1
    return {"chunk": CHUNK, "chunks_per_segment": chunks, "side_by_side": side_by_side}


def _num_sequences(q: Tensor, cu_seqlens: Tensor | None) -> int:
    return q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1


def _empty_gradients(x: Operands) -> Operands:
    """Contiguous, whatever the operands are."""
    return x.map(lambda t: torch.empty(t.shape, dtype=t.dtype, device=t.device))


def _empty_states(layout: Layout, q: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    shape = (_num_sequences(q, cu_seqlens), layout.HV, layout.K, layout.V)
    return q.new_empty(shape, dtype=layout.dtype)


def _empty_starts(layout: Layout, q: Tensor, cu_seqlens: Tensor | None, keep: bool) -> Tensor:
    most = most_segment_starts(
        _num_sequences(q, cu_seqlens), q.shape[0] * q.shape[1], **_sizes(layout, cu_seqlens)
    )
    shape = (most if keep else 0, layout.P, layout.K, layout.W)
    return q.new_empty(shape, dtype=layout.dtype)
