"""What a delta-rule layer decides per token: how much to keep, to erase and to write.

Axes: H key heads, HV value heads, K key channels, V value channels. A gate's rank is its tie:
``[B, T, H]`` is one number per head, ``[B, T, H, K]`` one per channel. Equation numbers are those
of docs/math.md.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gdn2.modules.linear import XavierLinear
from gdn2.modules.precision import upcast


class Gates(NamedTuple):
    """The gates of `gdn2.ops.gated_delta_rule`, float32 or better.

    log_decay: ``[..., H or HV]`` or ``[..., H or HV, K]``, <= 0.
    erase: ``[..., H or HV]`` or ``[..., H or HV, K]``, in [0, erase_range].
    write: ``[..., HV]`` or ``[..., HV, V]``.
    """

    log_decay: Tensor | None
    erase: Tensor | None
    write: Tensor | None


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """``[..., heads * channels] -> [..., heads, channels]``."""
    return x.unflatten(-1, (num_heads, -1))


def log_decay(f: Tensor, A_log: Tensor, dt_bias: Tensor) -> Tensor:
    """``-exp(A_log) * softplus(f + dt_bias)`` in float32, whatever autocast says; shapes broadcast.

    The step size ``dt = softplus(f + dt_bias)`` depends on the token, the rate ``exp(A_log)`` does
    not (Eq. 11).
    """
    return -upcast(A_log).exp() * F.softplus(upcast(f) + upcast(dt_bias))


def gate(x: Tensor, maximum: float = 1.0) -> Tensor:
    """``maximum * sigmoid(x)`` in float32, whatever autocast says (Eq. 12)."""
    y = upcast(x).sigmoid()
    return y if maximum == 1.0 else maximum * y


@torch.no_grad()
def reset_rate(A_log: Tensor, low: float, high: float) -> None:
    """Draw the decay rate ``exp(A_log)`` uniformly from [low, high]."""
    A_log.copy_(torch.empty_like(A_log, dtype=torch.float32).uniform_(low, high).log())


@torch.no_grad()
def reset_step_bias(dt_bias: Tensor, low: float = 1e-3, high: float = 1e-1) -> None:
    """Draw the step size at ``f = 0``, ``softplus(dt_bias)``, log-uniformly from [low, high]."""
    dt = torch.empty_like(dt_bias, dtype=torch.float32).uniform_(math.log(low), math.log(high))
    dt = dt.exp().clamp(min=1e-4)
    dt_bias.copy_(dt + (-torch.expm1(-dt)).log())  # inverse softplus


def low_rank(size_in: int, rank: int | None, size_out: int, *, bias: bool = False) -> nn.Module:
    """A linear map through `rank` channels, `bias` on its second half; full rank, no bias: None."""
    if rank is None:
        return XavierLinear(size_in, size_out, bias=False)
    return nn.Sequential(
        XavierLinear(size_in, rank, bias=False), XavierLinear(rank, size_out, bias=bias)
    )
