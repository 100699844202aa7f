"""Decoding in plain PyTorch: one token at a time on a state that is updated in place (Eq. 9).

The state is read and written by whole-tensor operations; nothing else of its size is allocated.
Axes: B batch, T time, H key heads, HV value heads, G = HV / H, K key channels, V value channels.
"""

import torch
from torch import Tensor


@torch.no_grad()
def gated_delta_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    log_decay: Tensor | None,
    erase: Tensor | None,
    write: Tensor | None,
    scale: float,
    state: Tensor,
    state_indices: Tensor | None,
) -> Tensor:
    """Advance `state` in place over the T tokens and return the outputs [B, T, HV, V]."""
    inputs = (q, k, v, log_decay, erase, write)
    if state_indices is None:
        return _advance(*inputs, scale, state)
    live = (state_indices >= 0).nonzero().squeeze(1)
    slots = state_indices[live].long()
    rows = state[slots]
    out = torch.zeros_like(v)
    out[live] = _advance(*(None if x is None else x[live] for x in inputs), scale, rows)
    state[slots] = rows
    return out


def _advance(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    erase: Tensor | None,
    write: Tensor | None,
    scale: float,
    state: Tensor,
) -> Tensor:
    H, HV = q.shape[2], v.shape[2]
    S = state.unflatten(1, (H, HV // H))  # [B, H, G, K, V], a view
    q, k, v, log_decay, erase, write = (  # [B, T, H, G or 1, ...]
        None if x is None else x.to(S.dtype).unflatten(2, (H, -1))
        for x in (q, k, v, log_decay, erase, write)
    )
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
