"""Decoding in plain PyTorch: one token at a time on a state that is updated in place (Eq. 9).

The state is read and written by whole-tensor operations, as many matrices at a time as stay in
cache; nothing else of its size is allocated.
Axes: B batch, T time, H key heads, HV value heads, G = HV / H, K key channels, V value channels.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from gdn2.ops.contract import Operands, in_parts, no_autocast
from gdn2.ops.in_place import on_slots, register_step

_CACHED = 3 * 2**17  # numbers of the states that operations take turns on: a megabyte and a half
Advance = Callable[[Operands, float, Tensor, Tensor | None], Tensor]


def register_advance(name: str, advance: Advance) -> Callable[..., Tensor]:
    """Make `advance` (operands, scale, state, state_indices) the operator ``gdn2::name``.

    It changes the state, and returns outputs [B, T, HV, V] in q's dtype.
    """

    def step(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        log_decay: Tensor | None,
        erase: Tensor | None,
        write: Tensor | None,
        scale: float,
        state: Tensor,
        state_indices: Tensor | None,
    ) -> Tensor:
        return advance(Operands(q, k, v, log_decay, erase, write), scale, state, state_indices)

    def fake(q, k, v, log_decay, erase, write, scale, state, state_indices):  # noqa: ARG001
        return v.new_empty(v.shape)

    return register_step(name, step, fake)


def gated_delta_step(
    x: Operands, scale: float, state: Tensor, state_indices: Tensor | None
) -> Tensor:
    """Advance `state` in place over the T tokens and return the outputs [B, T, HV, V]."""
    return _step(*x, scale, state, state_indices)


def _advance_all(x: Operands, scale: float, state: Tensor, state_indices: Tensor | None) -> Tensor:
    with no_autocast(x.q):
        if state_indices is None:
            out = _advance(x, scale, state)
        else:
            out = on_slots(
                state,
                state_indices,
                lambda live, states: _advance(x.map(lambda t: t[live]), scale, states),
            )
    return out.to(x.q.dtype)


_step = register_advance("gated_delta_step", _advance_all)


def _advance(x: Operands, scale: float, state: Tensor) -> Tensor:
    B, T, HV, V = x.v.shape
    S = state.flatten(0, 1)  # [N, K, V], N = B HV

    def by_token(y: Tensor) -> Sequence[Tensor]:  # T times [N, channels or 1]
        y = y if y.dtype == S.dtype else y.to(S.dtype)
        y = y if y.shape[2] == HV else y.repeat_interleave(HV // y.shape[2], 2)
        channels = y.shape[3] if y.ndim == 4 else 1
        if T == 1:  # nearly always: two operations less, of tens in all
            return (y.reshape(B * HV, channels),)
        return y.transpose(0, 1).reshape(T, B * HV, channels).unbind()

    out = S.new_empty(T, B * HV, V)
    for token, to in zip(in_parts(x, by_token), out.unbind(), strict=True):
        _advance_token(Operands(*token), scale, S, to)
    if S.data_ptr() != state.data_ptr():  # a copy, because the state lies otherwise
        state.copy_(S.view_as(state))
    return out.view(T, B, HV, V).transpose(0, 1).contiguous()


def _advance_token(x: Operands, scale: float, S: Tensor, out: Tensor) -> None:
    """Erase and query rows read the old S together: ``o = S^T (exp(g) q) + (q^T k) change``.

    Only four operations see S, and a group of states stays in cache from one to the next.
    """
    q, k, v, log_decay, erase, write = x
    q = q * scale
    itself = torch.linalg.vecdot(q, k).unsqueeze(1)
    change = v.clone() if write is None else v * write
    rows = q.unsqueeze(1) if erase is None else torch.stack((k * erase, q), 1)  # Eq. 8
    read, decay = S.new_empty(*rows.shape[:2], S.shape[2]), None
    if log_decay is not None:
        decay = log_decay.exp().unsqueeze(2)
        rows.mul_(decay.mT)
    erased = None if erase is None else read[:, 0]
    operands = S, rows, read, erased, change, decay, k.unsqueeze(2), change.unsqueeze(1)
    groups = -(-S.numel() // _CACHED)
    each = in_parts(operands, lambda y: y.chunk(groups)) if groups > 1 else (operands,)
    for states, row, to, old, new, factor, column, change_row in each:
        torch.bmm(row, states, out=to)
        if old is not None:
            new.sub_(old)
        if factor is not None:
            states.mul_(factor)
        states.baddbmm_(column, change_row)
    torch.addcmul(read[:, -1], itself, change, out=out)
