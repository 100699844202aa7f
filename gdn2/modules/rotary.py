"""Rotation of pairs of channels, for positions that attention and Mamba-3 see.

Pairs lie half the channels apart, (i, i + D/2), or side by side, (2i, 2i + 1).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from gdn2.ops.precision import upcast


def rotary_angles(positions: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> Tensor:
    """Angles ``positions * theta^(-2i/D)`` for all heads alike, ``[..., 1, D/2]``.

    They are float32 or better (where `dtype` is).
    """
    dtype = torch.promote_types(dtype, torch.float32)
    pair = torch.arange(0, head_dim, 2, device=positions.device, dtype=dtype)
    return positions[..., None, None].to(dtype) * theta ** (-pair / head_dim)


def rotate(x: Tensor, angles: Tensor, *, adjacent: bool = False) -> Tensor:
    """Turn the first n pairs of channels of ``x [..., H, D]`` by ``angles [..., 1 or H, n]``.

    adjacent: pairs lie side by side. The result has x's dtype.
    """
    D = x.shape[-1]
    angles = F.pad(angles, (0, D // 2 - angles.shape[-1]))
    cos, sin = angles.cos(), angles.sin()
    apart, axis = ((D // 2, 2), -1) if adjacent else ((2, D // 2), -2)
    left, right = upcast(x).unflatten(-1, apart).unbind(axis)
    turned = torch.stack([left * cos - right * sin, right * cos + left * sin], axis)
    return turned.flatten(-2).to(x.dtype)
