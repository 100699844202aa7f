"""Root-mean-square norms and the L2 norm of queries and keys; float32 inside, autocast or not.

On a CPU they are one operator with a written-out gradient: autograd's own takes three times as many
passes over memory.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from gdn2.ops.backends import resolve_backend
from gdn2.ops.contract import check_first_order, check_no_tangent
from gdn2.ops.precision import upcast

LARGEST = 1024  # channels that a tile of the kernels holds without spilling registers
OUTPUT_GATES = ("silu", "sigmoid")


def l2_norm(x: Tensor, eps: float = 1e-6) -> Tensor:
    """Divide by ``sqrt(sum x^2 + eps)`` over the last axis (epsilon inside the root).

    Any floating dtype, which the result has; float32 inside (float64 for float64).
    """
    y = upcast(x)
    if y.device.type == "cpu":
        return _norm(y, None, 1.0, eps).to(x.dtype)
    return (y * torch.rsqrt(y.square().sum(-1, keepdim=True) + eps)).to(x.dtype)


def rms_norm(x: Tensor, weight: Tensor, *, eps: float = 1e-5) -> Tensor:
    """``weight * x / sqrt(mean x^2 + eps)`` over the last axis (arXiv 1910.07467), in x's dtype.

    Args:
        x: ``[..., V]``, any floating dtype; float32 inside (float64 for float64).
        weight: ``[V]``.
    """
    return _rms_norm(x, weight, eps).to(x.dtype)


def gated_rms_norm(
    x: Tensor,
    gate: Tensor,
    weight: Tensor,
    *,
    eps: float = 1e-5,
    activation: str = "silu",
    backend: str | None = None,
) -> Tensor:
    """The norm first, the output gate second.

        y = weight * x / sqrt(mean x^2 + eps) * activation(gate)

    over the last axis (as in Gated DeltaNet, arXiv 2412.06464).

    Args:
        x, gate: ``[..., V]``, each of any floating dtype; float32 inside (float64 for float64).
        weight: ``[V]``.
        activation: "silu" or "sigmoid".
        backend: "triton" for its kernels: float32, float16 and bfloat16, V up to 1024. All others:
            PyTorch.

    Returns:
        y of x's shape and dtype.

    Raises:
        ValueError: a shape or the activation breaks the contract. NotImplementedError: the backend
            that is named can not serve the call.
    """
    if activation not in OUTPUT_GATES:
        raise ValueError(f"activation must be one of {OUTPUT_GATES}, got {activation!r}")
    if gate.shape != x.shape or weight.shape != x.shape[-1:]:
        raise ValueError(
            "x and gate must be [..., V] and weight [V], got "
            f"{list(x.shape)}, {list(gate.shape)}, {list(weight.shape)}"
        )
    V = x.shape[-1]
    limit = f"takes up to {LARGEST} channels, got {V}" if V > LARGEST else None
    if resolve_backend(backend, x, limit) == "triton":
        from gdn2.ops.triton import norm as kernels  # only they need triton

        return kernels.gated_rms_norm(x, gate, weight, eps, activation == "silu")
    gate = upcast(gate)
    gate = F.silu(gate) if activation == "silu" else gate.sigmoid()
    return (_rms_norm(x, weight, eps) * gate).to(x.dtype)


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The norm before it is rounded to x's dtype."""
    x, weight = upcast(x), upcast(weight)
    if x.device.type == "cpu":
        return _norm(x, weight, 1 / weight.numel(), eps)
    return F.rms_norm(x, weight.shape, weight, eps)


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
        dweight = product.reshape(-1, len(weight)).mT @ inverse.flatten()
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
