"""The token before each: what a recurrence that writes a token late reads.

Axes: B batch, T time, N sequences.
"""

import torch
from torch import Tensor

from gdn2.ops.contract import check_boundaries


def shift(x: Tensor, state: Tensor, cu_seqlens: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Move every sequence on by one token.

        y_t = x_{t-1},    y_1 = state

    Args:
        x: ``[B, T, ...]``.
        state: ``[N, ...]``, the token before each sequence.
        cu_seqlens: ``[N + 1]`` boundaries of packed sequences; B must then be 1.

    Returns:
        ``(y, state)``: of x's shape and dtype, and the last token of each sequence (that of an
        empty one is the given state).

    Raises:
        ValueError: a shape breaks the contract.
    """
    N = check_boundaries(cu_seqlens, x)
    if state.shape != (N, *x.shape[2:]):
        raise ValueError(f"state must be {[N, *x.shape[2:]]}, got {list(state.shape)}")
    state = state.to(x.dtype)
    if cu_seqlens is None:
        seen = torch.cat([state.unsqueeze(1), x], 1)
        return seen[:, :-1], seen[:, -1].clone()  # not a view, which would keep all alive
    T, seen = x.shape[1], torch.cat([x[0], state])
    start, end = cu_seqlens[:-1], cu_seqlens[1:]
    token = torch.arange(T, device=x.device)
    sequence = torch.searchsorted(end, token, right=True)
    before = torch.where(token == start[sequence], T + sequence, token - 1)
    last = torch.where(end > start, end - 1, T + torch.arange(N, device=x.device))
    return seen[before].unsqueeze(0), seen[last]
