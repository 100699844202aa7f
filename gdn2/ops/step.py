"""Decoding in plain PyTorch: one token at a time on a state that is updated in place (Eq. 9).

The state is read and written by whole-tensor operations; nothing else of its size is allocated.
Axes: B batch, T time, H key heads, HV value heads, G = HV / H, K key channels, V value channels.
"""

import torch
from torch import Tensor

from gdn2.ops.contract import Operands, no_autocast, state_dtype


def gated_delta_step(
    x: Operands, scale: float, state: Tensor, state_indices: Tensor | None
) -> Tensor:
    """Advance `state` in place over the T tokens and return the outputs [B, T, HV, V]."""
    return _step(*x, scale, state, state_indices)


@torch.library.custom_op("gdn2::gated_delta_step", mutates_args={"state"})
def _step(
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
    x = Operands(q, k, v, log_decay, erase, write)
    with no_autocast(q):
        if state_indices is None:
            return _advance(x, scale, state)
        return _advance_slots(x, scale, state, state_indices)


@_step.register_fake
def _(q, k, v, log_decay, erase, write, scale, state, state_indices):  # noqa: ARG001
    return v.new_empty(v.shape, dtype=state_dtype(q.dtype))


def _advance_slots(x: Operands, scale: float, state: Tensor, state_indices: Tensor) -> Tensor:
    live = (state_indices >= 0).nonzero().squeeze(1)
    slots = state_indices[live].long()
    rows = state[slots]
    out = torch.zeros_like(x.v, dtype=state.dtype)
    out[live] = _advance(x.map(lambda t: t[live]), scale, rows)
    state[slots] = rows
    return out


def _advance(x: Operands, scale: float, state: Tensor) -> Tensor:
    H, HV = x.q.shape[2], x.v.shape[2]
    S = state.unflatten(1, (H, HV // H))  # [B, H, G, K, V], a view
    # [B, T, H, G or 1, ...]
    q, k, v, log_decay, erase, write = x.map(lambda t: t.to(S.dtype).unflatten(2, (H, -1)))
    if log_decay is not None:
        log_decay = log_decay.unsqueeze(-1) if log_decay.ndim == 4 else log_decay
    if erase is not None:
        erase = k * (erase.unsqueeze(-1) if erase.ndim == 4 else erase)  # Eq. 8
    if write is not None:
        v = v * (write.unsqueeze(-1) if write.ndim == 4 else write)
    out = torch.empty_like(v)
    for t in range(v.shape[1]):
        if log_decay is not None:
            S.mul_(log_decay[:, t].exp().unsqueeze(-1))
        change = v[:, t]
        if erase is not None:
            change = change - (erase[:, t].unsqueeze(-2) @ S).squeeze(-2)
        S.addcmul_(k[:, t].unsqueeze(-1), change.unsqueeze(-2))
        torch.mul((q[:, t].unsqueeze(-2) @ S).squeeze(-2), scale, out=out[:, t])
    return out.flatten(2, 3)
