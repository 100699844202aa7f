"""The definition of correct: the gated delta rule as a loop over tokens (Eq. 9 of docs/math.md).

Float64 inputs are computed in float64, everything else in float32. Autograd differentiates it.
Axes: B batch, T time, H key heads, HV value heads, G = HV / H, K key channels, V value channels.
"""

from itertools import pairwise
from operator import itemgetter

import torch
from torch import Tensor

from gdn2.ops.contract import Operands, no_autocast, state_dtype
from gdn2.ops.in_place import on_slots


def gated_delta_rule(
    x: Operands, scale: float, state: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Token loop over every sequence; see the public `gated_delta_rule`."""
    if cu_seqlens is None:
        return _token_loop(x, scale, state)
    # The empty first piece gives the results their shape where there is no sequence at all.
    empty = _token_loop(x.map(lambda t: t[:, :0]), scale, None)
    outs, states = [empty[0]], [empty[1][:0]]
    for n, (start, stop) in enumerate(pairwise(cu_seqlens.tolist())):
        sequence = x.map(itemgetter((slice(None), slice(start, stop))))
        out, last = _token_loop(sequence, scale, None if state is None else state[n : n + 1])
        outs.append(out)
        states.append(last)
    return torch.cat(outs, dim=1), torch.cat(states)


def gated_delta_step(
    x: Operands, scale: float, state: Tensor, state_indices: Tensor | None
) -> Tensor:
    """The token loop from the given state, which its result replaces; returns the outputs."""
    if state_indices is None:
        out, last = _token_loop(x, scale, state)
        state.copy_(last)
        return out
    return on_slots(
        state,
        state_indices,
        lambda live, states: gated_delta_step(x.map(lambda t: t[live]), scale, states, None),
    )


def _token_loop(x: Operands, scale: float, state: Tensor | None) -> tuple[Tensor, Tensor]:
    with no_autocast(x.q):
        return _exact_token_loop(x, scale, state)


def _exact_token_loop(x: Operands, scale: float, state: Tensor | None) -> tuple[Tensor, Tensor]:
    H, HV = x.q.shape[2], x.v.shape[2]
    dtype = state_dtype(x.q.dtype)
    # [B, T, H, G or 1, ...]
    q, k, v, log_decay, erase, write = x.map(lambda t: t.to(dtype).unflatten(2, (H, -1)))
    erased = _fold_gate(erase, k, absent=0.0)  # Eq. 8
    written = _fold_gate(write, v, absent=1.0)
    if state is None:
        S = v.new_zeros(v.shape[0], H, HV // H, k.shape[-1], v.shape[-1])
    else:
        S = state.clone().unflatten(1, (H, HV // H))
    outs = []
    for t in range(v.shape[1]):
        if log_decay is not None:
            decay = log_decay[:, t].exp()
            S = S * (decay[..., None, None] if decay.ndim == 3 else decay[..., None])
        change = written[:, t] - _read(S, erased[:, t])
        S = S + k[:, t].unsqueeze(-1) * change.unsqueeze(-2)
        outs.append(scale * _read(S, q[:, t]))
    out = torch.stack(outs, dim=1) if outs else v
    return out.flatten(2, 3).to(x.q.dtype), S.flatten(1, 2)


def _fold_gate(gate: Tensor | None, x: Tensor, *, absent: float) -> Tensor:
    if gate is None:
        return x * absent
    return x * (gate.unsqueeze(-1) if gate.ndim == x.ndim - 1 else gate)


def _read(S: Tensor, row: Tensor) -> Tensor:
    """``S^T row``: [B, H, G, K, V] and [B, H, G or 1, K] -> [B, H, G, V]."""
    return (row.unsqueeze(-2) @ S).squeeze(-2)
