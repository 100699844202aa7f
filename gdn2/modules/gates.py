"""What a recurrent layer decides per token: how much to keep, to erase and to write.

The formulas are in `gdn2.ops.gates`; here are their parameters.

Axes: H key heads, HV value heads, K key channels, V value channels. A gate's rank is its tie:
``[B, T, H]`` is one number per head, ``[B, T, H, K]`` one per channel.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from gdn2.modules.linear import XavierLinear

SAMPLE = 64  # tokens of a sequence that the means of gates look at


class Gates(NamedTuple):
    """The gates of `gdn2.ops.gated_delta_rule`.

    log_decay: ``[..., H or HV]`` or ``[..., H or HV, K]``, <= 0, float32 or better.
    erase: ``[..., H or HV]`` or ``[..., H or HV, K]``, in [0, erase_range].
    write: ``[..., HV]`` or ``[..., HV, V]``.
    """

    log_decay: Tensor | None
    erase: Tensor | None
    write: Tensor | None

    def means(self) -> dict[str, Tensor]:
        """The mean of each gate ``[B, T, ...]``, of the decay itself, over a sample of tokens.

        Without gradients.
        """
        means = {}
        for name, gate in self._asdict().items():
            if gate is not None:
                sample = gate.detach()[:, :: max(1, gate.shape[1] // SAMPLE)]
                decay = name == "log_decay"
                means["decay" if decay else name] = (sample.exp() if decay else sample).mean()
        return means


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """``[..., heads * channels] -> [..., heads, channels]``."""
    return x.unflatten(-1, (num_heads, -1))


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
