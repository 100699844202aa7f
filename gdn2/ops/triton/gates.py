"""The log-decay and the sigmoid gate: forward, back and registered; float32 inside.

    y = -exp(A_log) softplus(f + dt_bias)         y = maximum s,  s = sigmoid(x)
    df = -exp(A_log) sigmoid(f + dt_bias) dy      dx = maximum s (1 - s) dy
    dA_log = sum y dy,  ddt_bias = sum df

Only the inputs are kept for the way back. Each of its programs adds up over tokens of its own, and
torch the programs': no sum depends on which of them is first.

Axes: M tokens at any one stride, D channels of all heads (CHANNELS of each, 1 where a head has one
decay) side by side; a tile is BM tokens by BD channels.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gdn2.ops.contract import check_no_tangent
from gdn2.ops.triton.autograd import register_backward
from gdn2.ops.triton.decay import exp
from gdn2.ops.triton.launch import launch
from gdn2.ops.triton.layout import load_rows, matrix, store_rows
from gdn2.ops.triton.sigmoid import sigmoid

_BACK_TOKENS = 128  # of a program that goes back: two sums are stored for so many of df


@triton.jit
def softplus(x):
    """``log(1 + e^x)`` and its derivative, without a loss where they are small."""
    e = exp(-tl.abs(x))
    # log(1 + e) is twice the inverse hyperbolic tangent of s, at most 1/3: a short series.
    s = e / (2.0 + e)
    t = s * s
    series = 1 / 7 + t * (1 / 9 + t * (1 / 11 + t * (1 / 13 + t * (1 / 15))))
    more = 2.0 * s * (1.0 + t * (1 / 3 + t * (1 / 5 + t * series)))
    return tl.where(x > 0.0, x, 0.0) + more, tl.where(x > 0.0, 1.0, e) / (1.0 + e)


@triton.jit
def place(D: tl.constexpr, BD: tl.constexpr, TOKENS: tl.constexpr):
    """The first of a program's TOKENS tokens, and its channels."""
    blocks: tl.constexpr = tl.cdiv(D, BD)
    d = tl.program_id(0) % blocks * BD + tl.arange(0, BD)
    return (tl.program_id(0) // blocks).to(tl.int64) * TOKENS, d


@triton.jit
def load_parameters(A_log, dt_bias, d, CHANNELS: tl.constexpr, D: tl.constexpr):
    """The rate ``exp(A_log)`` and the bias of channels, [1, BD]."""
    rate = exp(tl.load(A_log + d // CHANNELS, d < D, other=0.0))
    return rate[None, :], tl.load(dt_bias + d, d < D, other=0.0).to(tl.float32)[None, :]


@triton.jit(do_not_specialize=["M"])
def decay(
    x,
    A_log,
    dt_bias,
    y,
    M,
    stride,
    D: tl.constexpr,
    CHANNELS: tl.constexpr,
    BM: tl.constexpr,
    BD: tl.constexpr,
):
    first, d = place(D, BD, BM)
    t = tl.arange(0, BM)
    inside = (first + t < M)[:, None] & (d < D)[None, :]
    rate, bias = load_parameters(A_log, dt_bias, d, CHANNELS, D)
    step, _ = softplus(load_rows(x, first, t, stride, d, inside).to(tl.float32) + bias)
    store_rows(y, first, t, D, d, -rate * step, inside)


@triton.jit(do_not_specialize=["M", "P"])
def decay_back(
    dy,
    x,
    A_log,
    dt_bias,
    dx,
    partial,
    M,
    P,
    stride,
    D: tl.constexpr,
    CHANNELS: tl.constexpr,
    BM: tl.constexpr,
    BD: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """`partial` [2, P, D] takes the sums of y dy and of df over each program's TOKENS tokens."""
    first, d = place(D, BD, TOKENS)
    rate, bias = load_parameters(A_log, dt_bias, d, CHANNELS, D)
    dA = tl.zeros([BM, BD], tl.float32)
    ddt = tl.zeros([BM, BD], tl.float32)
    for start in tl.range(0, TOKENS, BM):
        t = start + tl.arange(0, BM)
        inside = (first + t < M)[:, None] & (d < D)[None, :]
        step, slope = softplus(load_rows(x, first, t, stride, d, inside).to(tl.float32) + bias)
        g = -rate * load_rows(dy, first, t, D, d, inside)
        slope *= g
        store_rows(dx, first, t, D, d, slope, inside)
        dA += g * step
        ddt += slope
    p = first // TOKENS
    tl.store(partial + p * D + d, tl.sum(dA, 0), d < D)
    tl.store(partial + (P + p) * D + d, tl.sum(ddt, 0), d < D)


@triton.jit(do_not_specialize=["M"])
def sigmoid_gate(x, y, M, stride, maximum, D: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr):
    first, d = place(D, BD, BM)
    t = tl.arange(0, BM)
    inside = (first + t < M)[:, None] & (d < D)[None, :]
    s = sigmoid(load_rows(x, first, t, stride, d, inside).to(tl.float32))
    store_rows(y, first, t, D, d, maximum * s, inside)


@triton.jit(do_not_specialize=["M"])
def sigmoid_gate_back(
    dy, x, dx, M, stride, maximum, D: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr
):
    first, d = place(D, BD, BM)
    t = tl.arange(0, BM)
    inside = (first + t < M)[:, None] & (d < D)[None, :]
    s = sigmoid(load_rows(x, first, t, stride, d, inside).to(tl.float32))
    slope = maximum * s * (1 - s)
    store_rows(dx, first, t, D, d, slope * load_rows(dy, first, t, D, d, inside), inside)


def log_decay(f: Tensor, A_log: Tensor, dt_bias: Tensor) -> Tensor:
    """See the public `log_decay`."""
    check_no_tangent((f, A_log, dt_bias))
    return _log_decay(f, A_log, dt_bias)


def gate(x: Tensor, maximum: float) -> Tensor:
    """See the public `gate`."""
    check_no_tangent((x,))
    return _gate(x, maximum)


@torch.library.custom_op("gdn2::triton_log_decay", mutates_args=())
def _log_decay(f: Tensor, A_log: Tensor, dt_bias: Tensor) -> Tensor:
    y = torch.empty(f.shape, dtype=torch.float32, device=f.device)
    _launch(decay, matrix(f, dt_bias.numel()), **_parameters(A_log, dt_bias), y=y)
    return y


@_log_decay.register_fake
def _(f, A_log, dt_bias):  # noqa: ARG001
    return f.new_empty(f.shape, dtype=torch.float32)


@torch.library.custom_op("gdn2::triton_log_decay_backward", mutates_args=())
def _log_decay_backward(dy: Tensor, f: Tensor, A_log: Tensor, dt_bias: Tensor) -> list[Tensor]:
    """Returns the gradients of f, A_log and dt_bias."""
    x = matrix(f, dt_bias.numel())
    df = torch.empty(f.shape, dtype=f.dtype, device=f.device)
    P = triton.cdiv(len(x), _BACK_TOKENS)
    partial = torch.empty(2, P, x.shape[1], dtype=torch.float32, device=f.device)
    more = {"dy": dy.contiguous(), "dx": df, "partial": partial, "P": P, "TOKENS": _BACK_TOKENS}
    _launch(decay_back, x, **_parameters(A_log, dt_bias), **more)
    dA = partial[0].sum(0).view(A_log.numel(), -1).sum(1).view(A_log.shape)
    ddt = partial[1].sum(0).view(dt_bias.shape)
    return [df, dA.to(A_log.dtype), ddt.to(dt_bias.dtype)]


register_backward(_log_decay, _log_decay_backward)


@torch.library.custom_op("gdn2::triton_gate", mutates_args=())
def _gate(x: Tensor, maximum: float) -> Tensor:
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _launch(sigmoid_gate, matrix(x), y=y, maximum=maximum)
    return y


@_gate.register_fake
def _(x, maximum):  # noqa: ARG001
    return x.new_empty(x.shape)


@torch.library.custom_op("gdn2::triton_gate_backward", mutates_args=())
def _gate_backward(dy: Tensor, x: Tensor, maximum: float) -> Tensor:
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _launch(sigmoid_gate_back, matrix(x), dy=dy.contiguous(), dx=dx, maximum=maximum)
    return dx


register_backward(_gate, _gate_backward)


def _parameters(A_log: Tensor, dt_bias: Tensor) -> dict[str, Any]:
    return {
        "A_log": A_log.contiguous(),
        "dt_bias": dt_bias.contiguous(),
        "CHANNELS": dt_bias.numel() // A_log.numel(),
    }


def _launch(kernel: Any, x: Tensor, **arguments: Any) -> None:
    """A program every tile of x [M, D], or every TOKENS tokens of it."""
    M, D = x.shape
    if D == 0:
        return
    BD = min(triton.next_power_of_2(D), 256)
    BM = min(2048 // BD, 32)
    described = {"x": x, "M": M, "stride": x.stride(0), "D": D, "BM": BM, "BD": BD}
    grid = (triton.cdiv(M, arguments.get("TOKENS", BM)) * triton.cdiv(D, BD),)
    launch(kernel, grid, {**described, **arguments}, warps=4)
