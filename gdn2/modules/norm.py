"""Root-mean-square norms, plain and gated: the weights of `gdn2.ops.norm`."""

import torch
from torch import Tensor, nn

from gdn2.ops.norm import OUTPUT_GATES, gated_rms_norm, l2_norm, rms_norm
from gdn2.ops.precision import upcast


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
        return rms_norm(x, self.weight, eps=self.eps)

    def extra_repr(self) -> str:
        return f"{self.weight.numel()}, eps={self.eps}"


class GroupedRMSNorm(RMSNorm):
    """The same with a mean over each of equal groups of the last axis; float32 or better."""

    def __init__(self, size: int, groups: int, eps: float = 1e-5):
        super().__init__(size, eps)
        self.groups = groups

    def forward(self, x: Tensor) -> Tensor:
        size = x.shape[-1] // self.groups
        unit = l2_norm(x.unflatten(-1, (self.groups, size)), size * self.eps)
        return unit.flatten(-2) * (size**0.5 * upcast(self.weight))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, groups={self.groups}"


class GatedRMSNorm(RMSNorm):
    """``RMSNorm(x) * activation(gate)``: the norm comes first, the gate (x's shape) second."""

    def __init__(self, size: int, eps: float = 1e-5, *, activation: str = "silu"):
        if activation not in OUTPUT_GATES:
            raise ValueError(f"activation must be one of {OUTPUT_GATES}, got {activation!r}")
        super().__init__(size, eps)
        self.activation = activation

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:  # type: ignore[override]
        return gated_rms_norm(x, gate, self.weight, eps=self.eps, activation=self.activation)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, activation={self.activation!r}"
