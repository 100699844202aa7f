"""Linear maps: laws that their weights are drawn from, and several maps as one product."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

XAVIER_GAIN = 2**-2.5  # the official GDN-2 training code


class XavierLinear(nn.Linear):
    """Every map of a delta mixer: Xavier uniform with a small gain, zero bias."""

    def reset_parameters(self) -> None:
        nn.init.xavier_uniform_(self.weight, gain=XAVIER_GAIN)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class OutputLinear(nn.Linear):
    """A map back to the residual stream: torch's law, which a deep model scales down."""

    @torch.no_grad()
    def reset_parameters(self, scale: float = 1.0) -> None:
        super().reset_parameters()
        self.weight.mul_(scale)


JOINT_TOKENS = 1024  # fewer: to lay the weights side by side would take a GPU what it saves


def map_jointly(maps: Sequence[nn.Module], x: Tensor) -> list[Tensor]:
    """``[m(x) for m in maps]``; what is linear in x, of all of them, as one product if it pays.

    A map is an `XavierLinear` without bias, or a sequence that begins with one. Where any was
    replaced (adapters, other number formats) or is hooked, each is called by itself.
    """
    if not _pays(x):
        return [m(x) for m in maps]
    firsts: list[nn.Module] = [m[0] if isinstance(m, nn.Sequential) else m for m in maps]
    if not all(_plain(m) for m in (*maps, *firsts)):
        return [m(x) for m in maps]
    weights: list[Tensor] = [first.get_parameter("weight") for first in firsts]
    parts = F.linear(x, torch.cat(weights)).split([len(w) for w in weights], -1)
    return [
        m[1:](part) if isinstance(m, nn.Sequential) else part
        for m, part in zip(maps, parts, strict=True)
    ]


def _pays(x: Tensor) -> bool:
    """On a CPU the parts would have to be copied."""
    return x.device.type != "cpu" and x.shape[:-1].numel() >= JOINT_TOKENS


def _plain(m: nn.Module) -> bool:
    kinds = (m._forward_hooks, m._forward_pre_hooks, m._backward_hooks, m._backward_pre_hooks)
    if any(kinds) or "forward" in vars(m):
        return False
    return type(m) is nn.Sequential or (type(m) is XavierLinear and m.bias is None)
