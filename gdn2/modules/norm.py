"""Root-mean-square norms and the L2 norm of queries and keys; float32 inside, autocast or not."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gdn2.modules.precision import upcast

OUTPUT_GATES = ("silu", "sigmoid")


def l2_norm(x: Tensor, eps: float = 1e-6) -> Tensor:
    """Divide by ``sqrt(sum x^2 + eps)`` over the last axis (epsilon inside the root)."""
    y = upcast(x)
    return (y * torch.rsqrt(y.square().sum(-1, keepdim=True) + eps)).to(x.dtype)


class RMSNorm(nn.Module):
    """``weight * x / sqrt(mean x^2 + eps)`` over the last axis, in x's dtype."""

    def __init__(self, size: int, eps: float = 1e-5):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.normalize(x).to(x.dtype)

    def normalize(self, x: Tensor) -> Tensor:
        """The norm before it is rounded to x's dtype."""
        return F.rms_norm(upcast(x), self.weight.shape, upcast(self.weight), self.eps)

    def extra_repr(self) -> str:
        return f"{self.weight.numel()}, eps={self.eps}"


class GatedRMSNorm(RMSNorm):
    """``RMSNorm(x) * activation(gate)``: the norm comes first, the gate (x's shape) second."""

    def __init__(self, size: int, eps: float = 1e-5, *, activation: str = "silu"):
        if activation not in OUTPUT_GATES:
            raise ValueError(f"activation must be one of {OUTPUT_GATES}, got {activation!r}")
        super().__init__(size, eps)
        self.activation = activation

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:  # type: ignore[override]
        gate = upcast(gate)
        gate = F.silu(gate) if self.activation == "silu" else gate.sigmoid()
        return (self.normalize(x) * gate).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, activation={self.activation!r}"
