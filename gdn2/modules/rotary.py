"""Rotary position embedding, half-split pairing: channel i turns with channel i + D/2."""

import torch
from torch import Tensor

from gdn2.ops.precision import upcast


def rotary_angles(positions: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> Tensor:
    """Angles ``positions * theta^(-2i/D)``, ``[..., D/2]``, float32 or better (wider `dtype`)."""
    dtype = torch.promote_types(dtype, torch.float32)
    pair = torch.arange(0, head_dim, 2, device=positions.device, dtype=dtype)
    return positions.unsqueeze(-1).to(dtype) * theta ** (-pair / head_dim)


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Rotate ``x [..., T, H, D]`` by ``angles [..., T, D/2]``, all heads alike; x's dtype."""
    cos, sin = angles.cos().unsqueeze(-2), angles.sin().unsqueeze(-2)
    left, right = upcast(x).chunk(2, dim=-1)
    return torch.cat([left * cos - right * sin, right * cos + left * sin], dim=-1).to(x.dtype)
