"""The gated RMS norm: forward, back and registered; float32 inside.

    n = x r,  r = 1 / sqrt(mean x^2 + eps)        y = weight * n * a(gate)
    dn = dy * weight * a(gate)                    dx = r (dn - n mean(n dn))
    dgate = dy * weight * n * a'(gate)            dweight = sum over rows of dy * n * a(gate)

Only x, gate and weight are kept for the way back. Each of its programs adds up dweight over rows of
its own, and torch the programs': no sum depends on which of them is first.

Axes: R rows of V channels (VP: the next power of two), BR of them a tile. HEADS of a token lie side
by side, tokens at any one stride.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gdn2.ops.contract import check_no_tangent
from gdn2.ops.triton.autograd import register_backward
from gdn2.ops.triton.launch import launch
from gdn2.ops.triton.layout import matrix
from gdn2.ops.triton.sigmoid import sigmoid

_BACK_ROWS = 128  # of a program that goes back: a number of dweight is stored for so many of dx


@triton.jit
def load_tile(x, r, v, stride, HEADS: tl.constexpr, V: tl.constexpr, inside):
    """Channels v of the rows r, zero where masked."""
    row = (r // HEADS).to(tl.int64) * stride + r % HEADS * V
    return tl.load(x + row[:, None] + v[None, :], inside, other=0.0).to(tl.float32)


@triton.jit
def store_tile(x, r, v, tile, V: tl.constexpr, inside):
    to = x + r.to(tl.int64)[:, None] * V + v[None, :]
    tl.store(to, tile.to(x.dtype.element_ty), inside)


@triton.jit
def inverse_root(x, eps, V: tl.constexpr):
    """``1 / sqrt(mean x^2 + eps)`` of each row, [BR, 1]."""
    return tl.rsqrt(tl.sum(x * x, 1, keep_dims=True) / V + eps)


@triton.jit(do_not_specialize=["R"])
def gated_norm(
    x,
    gate,
    weight,
    y,
    R,
    x_stride,
    gate_stride,
    eps,
    X_HEADS: tl.constexpr,
    GATE_HEADS: tl.constexpr,
    V: tl.constexpr,
    VP: tl.constexpr,
    BR: tl.constexpr,
    SILU: tl.constexpr,
):
    r = tl.program_id(0) * BR + tl.arange(0, BR)
    v = tl.arange(0, VP)
    inside = (r < R)[:, None] & (v < V)[None, :]
    tile = load_tile(x, r, v, x_stride, X_HEADS, V, inside)
    g = load_tile(gate, r, v, gate_stride, GATE_HEADS, V, inside)
    w = tl.load(weight + v, v < V, other=0.0).to(tl.float32)[None, :]
    act = sigmoid(g)
    if SILU:
        act *= g
    store_tile(y, r, v, tile * inverse_root(tile, eps, V) * w * act, V, inside)


@triton.jit(do_not_specialize=["R"])
def gated_norm_back(
    dy,
    x,
    gate,
    weight,
    dx,
    dgate,
    partial,
    R,
    x_stride,
    gate_stride,
    eps,
    X_HEADS: tl.constexpr,
    GATE_HEADS: tl.constexpr,
    V: tl.constexpr,
    VP: tl.constexpr,
    BR: tl.constexpr,
    ROWS: tl.constexpr,
    SILU: tl.constexpr,
):
    """`partial` [programs, V] takes dweight over the ROWS rows of each program."""
    v = tl.arange(0, VP)
    w = tl.load(weight + v, v < V, other=0.0).to(tl.float32)[None, :]
    dw = tl.zeros([BR, VP], tl.float32)
    for first in tl.range(0, ROWS, BR):
        r = tl.program_id(0) * ROWS + first + tl.arange(0, BR)
        inside = (r < R)[:, None] & (v < V)[None, :]
        tile = load_tile(x, r, v, x_stride, X_HEADS, V, inside)
        g = load_tile(gate, r, v, gate_stride, GATE_HEADS, V, inside)
        d = load_tile(dy, r, v, V, 1, V, inside)
        inverse = inverse_root(tile, eps, V)
        n = tl.where(inside, tile * inverse, 0.0)  # beyond the last row it may be 0 / 0
        act = sigmoid(g)
        slope = act * (1 - act)
        if SILU:
            slope = act + g * slope
            act *= g
        store_tile(dgate, r, v, d * w * n * slope, V, inside)
        d *= act
        dw += d * n
        d *= w
        mean = tl.sum(n * d, 1, keep_dims=True) / V
        store_tile(dx, r, v, inverse * (d - n * mean), V, inside)
    tl.store(partial + tl.program_id(0).to(tl.int64) * V + v, tl.sum(dw, 0), v < V)


def gated_rms_norm(x: Tensor, gate: Tensor, weight: Tensor, eps: float, silu: bool) -> Tensor:
    """See the public `gated_rms_norm`."""
    check_no_tangent((x, gate, weight))
    return _gated_rms_norm(x, gate, weight, eps, silu)


@torch.library.custom_op("gdn2::triton_gated_rms_norm", mutates_args=())
def _gated_rms_norm(x: Tensor, gate: Tensor, weight: Tensor, eps: float, silu: bool) -> Tensor:
    arguments = _describe(x, gate, weight, eps, silu)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    grid = (triton.cdiv(arguments["R"], arguments["BR"]),)
    launch(gated_norm, grid, {**arguments, "y": y}, warps=4)
    return y


@_gated_rms_norm.register_fake
def _(x, gate, weight, eps, silu):  # noqa: ARG001
    return x.new_empty(x.shape)


@torch.library.custom_op("gdn2::triton_gated_rms_norm_backward", mutates_args=())
def _backward(
    dy: Tensor, x: Tensor, gate: Tensor, weight: Tensor, eps: float, silu: bool
) -> list[Tensor]:
    """Returns the gradients of x, gate and weight."""
    arguments = _describe(x, gate, weight, eps, silu)
    dx, dgate = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (x, gate))
    programs = triton.cdiv(arguments["R"], _BACK_ROWS)
    partial = torch.empty(programs, len(weight), dtype=torch.float32, device=x.device)
    more = {"dy": dy.contiguous(), "dx": dx, "dgate": dgate, "partial": partial, "ROWS": _BACK_ROWS}
    launch(gated_norm_back, (programs,), {**arguments, **more}, warps=4)
    return [dx, dgate, partial.sum(0).to(weight.dtype)]


register_backward(_gated_rms_norm, _backward)


def _describe(x: Tensor, gate: Tensor, weight: Tensor, eps: float, silu: bool) -> dict[str, Any]:
    V, VP = len(weight), triton.next_power_of_2(len(weight))
    R, x, gate = x.numel() // V, matrix(x), matrix(gate)
    return {
        "x": x,
        "gate": gate,
        "weight": weight.contiguous(),
        "R": R,
        "x_stride": x.stride(0),
        "gate_stride": gate.stride(0),
        "eps": eps,
        "X_HEADS": x.shape[1] // V,
        "GATE_HEADS": gate.shape[1] // V,
        "V": V,
        "VP": VP,
        "BR": min(max(2048 // VP, 1), 16),
        "SILU": silu,
    }
