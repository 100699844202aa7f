"""Launches of the steps: of the rule, and of the short convolution."""

import torch
import triton
from torch import Tensor

from gdn2.ops.contract import Operands
from gdn2.ops.triton.conv_step import conv_step
from gdn2.ops.triton.launch import describe, launch, sizes_for
from gdn2.ops.triton.layout import rows
from gdn2.ops.triton.step import step

_CONV_BD = 128


def gated_delta_step(
    x: Operands, scale: float, state: Tensor, state_indices: Tensor | None
) -> Tensor:
    """`state` is updated in place, through a copy where it does not lie side by side."""
    B, T, HV, V = x.v.shape
    states = state.contiguous()
    out = torch.empty(x.v.shape, dtype=x.q.dtype, device=x.q.device)
    sizes = sizes_for(x)
    KP, BV = triton.next_power_of_2(x.k.shape[-1]), min(sizes.step_BV, triton.next_power_of_2(V))
    warps = min(sizes.step_warps, KP * BV // 32)  # no two threads have one number of the state
    arguments = {
        **describe(x),
        "state": states,
        "state_indices": state_indices,
        "out": out,
        "T": T,
        "scale": scale,
        "KP": KP,
        "BV": BV,
        "INDEXED": state_indices is not None,
    }
    launch(step, (B * HV * triton.cdiv(V, BV),), arguments, warps)
    if states is not state:
        state.copy_(states)
    return out


def causal_conv_step(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    silu: bool,
    state: Tensor,
    state_indices: Tensor | None,
) -> Tensor:
    """Outputs for x [B, T, D]; `state` is updated in place, as in `gated_delta_step`."""
    (B, T, D), W = x.shape, weight.shape[1]
    tokens, states = rows(x), state.contiguous()
    arguments = {
        "x": tokens,
        "weight": weight.contiguous(),
        "bias": None if bias is None else bias.contiguous(),
        "state": states,
        "state_indices": state_indices,
        "out": torch.empty(x.shape, dtype=x.dtype, device=x.device),
        "T": T,
        "x_stride": tokens.stride(1),
        "D": D,
        "W": W,
        "WP": triton.next_power_of_2(W),
        "BD": _CONV_BD,
        "SILU": silu,
        "HAS_BIAS": bias is not None,
        "INDEXED": state_indices is not None,
    }
    launch(conv_step, (B * triton.cdiv(D, _CONV_BD),), arguments, warps=4)
    if states is not state:
        state.copy_(states)
    return arguments["out"]
