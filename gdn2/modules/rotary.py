"""Rotation of pairs of channels, for positions that attention and Mamba-3 see.

Pairs lie half the channels apart, (i, i + D/2), or side by side, (2i, 2i + 1).
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from gdn2.ops.precision import upcast


def rotary_angles(positions: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> Tensor:
    """Angles ``positions * theta^(-2i/D)`` for all heads alike, ``[..., 1, D/2]``.

    They are float32 or better (where `dtype` is).
    """
    dtype = torch.promote_types(dtype, torch.float32)
    pair = torch.arange(0, head_dim, 2, device=positions.device, dtype=dtype)
    return positions[..., None, None].to(dtype) * theta ** (-pair / head_dim)


def rotate(
    tensors: Iterable[Tensor],
    angles: Tensor,
    *,
    adjacent: bool = False,
    dtype: torch.dtype | None = None,
) -> list[Tensor]:
    """Turn the first n pairs of channels of each ``x [..., H, D]`` by ``angles [..., 1 or H, n]``.

    adjacent: pairs lie side by side. The results have x's dtype, or `dtype`.
    """
    cos, sin, n = angles.cos(), angles.sin(), angles.shape[-1]
    turned = []
    for x in tensors:
        y = upcast(x)
        halves = y[..., : 2 * n].unflatten(-1, (n, 2)).unbind(-1) if adjacent else y.chunk(2, -1)
        left, right = (half[..., :n] for half in halves)
        left, right = left * cos - right * sin, right * cos + left * sin
        if adjacent:
            parts = [torch.stack([left, right], -1).flatten(-2), y[..., 2 * n :]]
        else:
            parts = [left, halves[0][..., n:], right, halves[1][..., n:]]
        turned.append(torch.cat(parts, -1).to(dtype or x.dtype))
    return turned
