"""The kernels of conv.py launched, and as operators of `torch.library`."""

from typing import Any

import torch
import triton
from torch import Tensor

from gdn2.ops.contract import check_no_tangent
from gdn2.ops.triton import conv
from gdn2.ops.triton.autograd import register_backward
from gdn2.ops.triton.launch import launch
from gdn2.ops.triton.layout import pieces, rows


def normed_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_channels: int,
    head_dim: int,
    eps: float,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """All sequences; see the public `normed_conv`."""
    check_no_tangent((x, weight, bias, state))
    state = None if state is None else state.to(x.dtype)
    return _normed_conv(x, weight, bias, state, cu_seqlens, norm_channels, head_dim, eps)


@torch.library.custom_op("gdn2::triton_normed_conv", mutates_args=())
def _normed_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    norm_channels: int,
    head_dim: int,
    eps: float,
) -> tuple[Tensor, Tensor]:
    arguments = _describe(x, weight, bias, state, cu_seqlens, norm_channels, head_dim, eps)
    y, last = x.new_empty(x.shape), _new_state(x, weight, cu_seqlens)
    programs = pieces(x.shape[0], x.shape[1], cu_seqlens, arguments["BT"])
    _launch(conv.normed_conv, arguments | {"y": y, "last": last}, programs, 8)
    return y, last


@_normed_conv.register_fake
def _(x, weight, bias, state, cu_seqlens, norm_channels, head_dim, eps):  # noqa: ARG001
    return x.new_empty(x.shape), _new_state(x, weight, cu_seqlens)


@torch.library.custom_op("gdn2::triton_normed_conv_backward", mutates_args=())
def _backward(
    dy: Tensor,
    dlast: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    norm_channels: int,
    head_dim: int,
    eps: float,
) -> list[Tensor]:
    """Returns the gradients of x and weight, and of bias and state if there are any."""
    arguments = _describe(x, weight, bias, state, cu_seqlens, norm_channels, head_dim, eps)
    dy, (D, W) = rows(dy), weight.shape
    tokens = arguments["R"] * arguments["RUN"]
    programs = pieces(x.shape[0], x.shape[1], cu_seqlens, tokens)
    arguments |= {
        "dy": dy,
        "dy_stride": dy.stride(1),
        "dlast": None if dlast is None else dlast.contiguous(),
        "dx": x.new_empty(x.shape),
        "dtaps": x.new_empty((programs, W + (bias is not None), D), dtype=torch.float32),
        "dstate": None if state is None else torch.empty_like(arguments["state"]),
        "HAS_DLAST": dlast is not None,
    }
    _launch(conv.normed_conv_backward, arguments, programs, 4)
    dtaps = arguments["dtaps"]
    dweight = dtaps[:, :W].sum(0).mT.to(weight.dtype).contiguous()
    dbias = None if bias is None else dtaps[:, W].sum(0).to(bias.dtype)
    grads = arguments["dx"], dweight, dbias, arguments["dstate"]
    return [x for x in grads if x is not None]


register_backward(_normed_conv, _backward, outputs=2)


def _new_state(x: Tensor, weight: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    N = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return x.new_empty((N, x.shape[2], weight.shape[1] - 1))


def _describe(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    norm_channels: int,
    head_dim: int,
    eps: float,
) -> dict[str, Any]:
    (D, W), tokens = weight.shape, rows(x)
    BD = max(triton.next_power_of_2(head_dim), 8)
    return {
        "x": tokens,
        "taps": weight.mT.contiguous(),
        "bias": None if bias is None else bias.contiguous(),
        "state": None if state is None else state.contiguous(),
        "cu_seqlens": cu_seqlens,
        "N": 0 if cu_seqlens is None else len(cu_seqlens) - 1,
        "T": x.shape[1],
        "x_stride": tokens.stride(1),
        "eps": eps,
        "D": D,
        "W": W,
        "WP": triton.next_power_of_2(W),
        "NORMED": norm_channels,
        "HEAD": head_dim,
        "BD": BD,
        **sizes(BD, x.device),
        "PACKED": cu_seqlens is not None,
        "HAS_BIAS": bias is not None,
        "HAS_STATE": state is not None,
    }


def sizes(BD: int, device: torch.device) -> dict[str, int]:
    """Tokens of a program: forward 16 numbers a thread, back 4, which spills no registers.

    The order of sums depends on them: they depend on channels and the device alone. In Triton's
    interpreter a token of every run takes as long however many runs there are.
    """
    if device.type == "cpu":
        return {"BT": 64, "R": 16, "RUN": 8}
    return {"BT": 4096 // BD, "R": 512 // BD, "RUN": 64}


def _launch(kernel: Any, arguments: dict[str, Any], pieces: int, warps: int) -> None:
    """One program for each piece of a sequence and each block of channels."""
    grid = (pieces * triton.cdiv(arguments["D"], arguments["HEAD"]),)
    launch(kernel, grid, arguments, warps)
