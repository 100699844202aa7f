"""Decoding in plain PyTorch: one token at a time on a state that is updated in place (Eq. 9).

The state is read and written by whole-tensor operations; nothing else of its size is allocated.
Axes: B batch, T time, H key heads, HV value heads, G = HV / H, K key channels, V value channels.
"""

import torch
from torch import Tensor

from gdn2.ops.contract import Operands


@torch.no_grad()
def gated_delta_step(
    x: Operands, scale: float, state: Tensor, state_indices: Tensor | None
) -> Tensor:
    """Advance `state` in place over the T tokens and return the outputs [B, T, HV, V]."""
    if state_indices is None:
        return _advance(x, scale, state)
    live = (state_indices >= 0).nonzero().squeeze(1)
    slots = state_indices[live].long()
    rows = state[slots]
    out = torch.zeros_like(x.v)
    out[live] = _advance(x.map(lambda t: t[live]), scale, rows).to(out.dtype)
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
