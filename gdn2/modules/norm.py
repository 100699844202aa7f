"""Root-mean-square norms and the L2 norm of queries and keys; float32 inside, autocast or not.

On a CPU they are one operator with a written-out gradient: autograd's own takes three times as many
passes over memory.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gdn2.modules.precision import upcast
from gdn2.ops.contract import check_first_order, check_no_tangent

OUTPUT_GATES = ("silu", "sigmoid")


def l2_norm(x: Tensor, eps: float = 1e-6) -> Tensor:
    """Divide by ``sqrt(sum x^2 + eps)`` over the last axis (epsilon inside the root)."""
    y = upcast(x)
    if y.device.type == "cpu":
        return _norm(y, None, 1.0, eps).to(x.dtype)
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
        x, weight = upcast(x), upcast(self.weight)
        if x.device.type == "cpu":
            return _norm(x, weight, 1 / weight.numel(), self.eps)
        return F.rms_norm(x, weight.shape, weight, self.eps)

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


def _norm(x: Tensor, weight: Tensor | None, share: float, eps: float) -> Tensor:
    """``weight * x / sqrt(share * sum x^2 + eps)`` over the last axis."""
    check_no_tangent((x, weight))
    tensors = [x] if weight is None else [x, weight]
    wanted = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    return (_norm_op if wanted else _forward)(x, weight, share, eps)[0]


def _forward(x: Tensor, weight: Tensor | None, share: float, eps: float) -> tuple[Tensor, Tensor]:
    """Also returns the inverse of the root, [..., 1]."""
    inverse = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    inverse = inverse.square_().mul_(share).add_(eps).rsqrt_()
    y = torch.mul(x, inverse, out=x.new_empty(x.shape))
    return (y if weight is None else y.mul_(weight)), inverse


_norm_op = torch.library.custom_op("gdn2::norm", _forward, mutates_args=())


@_norm_op.register_fake
def _(x, weight, share, eps):  # noqa: ARG001
    return x.new_empty(x.shape), x.new_empty(*x.shape[:-1], 1)


@torch.library.custom_op("gdn2::norm_backward", mutates_args=())
def _backward(
    dy: Tensor, x: Tensor, weight: Tensor | None, inverse: Tensor, share: float
) -> tuple[Tensor, Tensor]:
    """``dx = r weight dy - share r^3 x sum(weight dy x)``, r the inverse of the root."""
    product = dy * x
    if weight is None:
        total, dweight = product.sum(-1, keepdim=True), x.new_empty(0)
        dx = torch.mul(dy, inverse, out=x.new_empty(x.shape))
    else:
        total = (product @ weight).unsqueeze(-1)
        dweight = product.flatten(0, -2).mT @ inverse.flatten()
        dx = torch.mul(dy, weight, out=x.new_empty(x.shape)).mul_(inverse)
    return dx.addcmul_(x, total * inverse.pow(3), value=-share), dweight


@_backward.register_fake
def _(dy, x, weight, inverse, share):  # noqa: ARG001
    return x.new_empty(x.shape), x.new_empty(0) if weight is None else torch.empty_like(weight)


def _save(ctx, inputs, output):
    x, weight, ctx.share, _ = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(x, weight, output[1])


def _differentiate(ctx, dy, _):
    check_first_order()
    x, weight, inverse = ctx.saved_tensors
    dx, dweight = _backward(dy, x, weight, inverse, ctx.share)
    return dx, None if weight is None else dweight, None, None


_norm_op.register_autograd(_differentiate, setup_context=_save)
