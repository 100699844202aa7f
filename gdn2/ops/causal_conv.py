"""Short causal depthwise convolution over sequences, and one token of it for decoding.

Axes: B batch, T time, D channels, W taps (the last one meets the current token), N sequences.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from gdn2.ops.contract import check_boundaries, check_first_order, check_no_tangent

ACTIVATIONS = (None, "silu")


def causal_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = "silu",
    state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Convolve every channel with its own W taps, looking back only.

        y_t = activation(bias + sum_{j<W} weight[:, j] * x_{t-W+1+j})

    Sums are float32 (float64 for float64 inputs); inputs before a sequence come from `state`.

    Args:
        x: ``[B, T, D]``, any floating dtype.
        weight: ``[D, W]``. bias: ``[D]``.
        activation: "silu" or None.
        state: ``[N, D, W - 1]``, the inputs that precede each sequence, oldest first. None: zeros.
        cu_seqlens: ``[N + 1]`` boundaries of packed sequences; B must then be 1.

    Returns:
        ``(y, state)``: ``[B, T, D]`` in x's dtype, and the last ``W - 1`` inputs (before the
        activation) of each sequence, ``[N, D, W - 1]`` in x's dtype.

    Raises:
        ValueError: a shape or the activation breaks the contract.
    """
    if x.ndim != 3 or weight.ndim != 2 or weight.shape[0] != x.shape[-1]:
        raise ValueError(
            f"x and weight must be [B, T, D] and [D, W], got {list(x.shape)}, {list(weight.shape)}"
        )
    N, W = check_boundaries(cu_seqlens, x), weight.shape[1]
    _check(weight, N, bias, activation, state)
    check_no_tangent((x, weight, bias, state))
    history = (
        x.new_zeros(N, W - 1, x.shape[2]) if state is None else state.to(x.dtype).transpose(1, 2)
    )
    if cu_seqlens is None:
        padded = torch.cat([history, x], dim=1)  # [B, W - 1 + T, D]
        y = _convolve(padded, weight, bias)
        last = padded[:, padded.shape[1] - (W - 1) :]
    else:
        padded, rows, last_rows = _interleave_history(x[0], history, cu_seqlens)
        y = _convolve(padded[None], weight, bias)[:, rows]
        last = padded[last_rows]
    y = F.silu(y) if activation == "silu" else y
    return y.to(x.dtype), last.transpose(1, 2).contiguous()


def causal_conv_step(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = "silu",
    state: Tensor,
) -> tuple[Tensor, Tensor]:
    """One token of `causal_conv`: x ``[B, D]``; state ``[B, D, W - 1]`` is updated in place.

    Returns:
        ``(y, state)``: ``[B, D]`` in x's dtype and the given state.

    Raises:
        ValueError: a shape or the activation breaks the contract.
    """
    if x.ndim != 2 or weight.shape[:1] != x.shape[1:] or weight.ndim != 2:
        raise ValueError(
            f"x and weight must be [B, D] and [D, W], got {list(x.shape)}, {list(weight.shape)}"
        )
    _check(weight, x.shape[0], bias, activation, state)
    window = torch.cat([state, x.unsqueeze(-1).to(state.dtype)], dim=-1)  # [B, D, W]
    dtype = torch.promote_types(x.dtype, torch.float32)
    y = (window.to(dtype) * weight.to(dtype)).sum(-1)
    y = y if bias is None else y + bias.to(dtype)
    y = F.silu(y) if activation == "silu" else y
    state.copy_(window[..., 1:])
    return y.to(x.dtype), state


def _check(
    weight: Tensor, N: int, bias: Tensor | None, activation: str | None, state: Tensor | None
) -> None:
    D, W = weight.shape
    if bias is not None and bias.shape != (D,):
        raise ValueError(f"bias must be [D] = [{D}], got {list(bias.shape)}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {ACTIVATIONS}, got {activation!r}")
    if state is not None and state.shape != (N, D, W - 1):
        raise ValueError(f"state must be [N, D, W - 1] = {[N, D, W - 1]}, got {list(state.shape)}")


def _interleave_history(
    x: Tensor, history: Tensor, cu_seqlens: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Put each sequence's history in front of it: no tap can then reach another sequence.

    Returns the [T + N (W - 1), D] rows; for each token, the position of its convolution's result;
    and [N, W - 1] positions of each sequence's last inputs.
    """
    N, H, D = history.shape  # H = W - 1 rows of history
    sequence = torch.arange(N, device=x.device)
    token = torch.arange(x.shape[0], device=x.device)
    # The number of boundaries at or before a token tells its sequence, empty ones skipped.
    results = token + H * (torch.searchsorted(cu_seqlens, token, right=True) - 1)
    first = cu_seqlens[:-1] + H * sequence
    offsets = torch.arange(H, device=x.device)
    padded = x.new_empty(x.shape[0] + N * H, D)
    padded = padded.index_copy(0, (first[:, None] + offsets).flatten(), history.flatten(0, 1))
    padded = padded.index_copy(0, results + H, x)
    return padded, results, (cu_seqlens[1:] + H * sequence)[:, None] + offsets


def _convolve(padded: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    dtype = torch.promote_types(padded.dtype, torch.float32)
    y = _convolve_taps(padded.to(dtype), weight.to(dtype))
    return y if bias is None else y + bias.to(dtype)


@torch.library.custom_op("gdn2::convolve_taps", mutates_args=())
def _convolve_taps(padded: Tensor, weight: Tensor) -> Tensor:
    """``y_t = sum_j weight[:, j] * padded_{t+j}``: W passes over contiguous channels.

    Written out because autograd would give every tap a zero-filled gradient of the whole input.
    """
    W = weight.shape[1]
    T = padded.shape[1] - W + 1
    y = padded[:, :T] * weight[:, 0]
    for j in range(1, W):
        y.addcmul_(padded[:, j : j + T], weight[:, j])
    return y


@_convolve_taps.register_fake
def _(padded, weight):
    B, T, D = padded.shape
    return padded.new_empty(B, T - weight.shape[1] + 1, D)


@torch.library.custom_op("gdn2::convolve_taps_backward", mutates_args=())
def _convolve_taps_backward(dy: Tensor, padded: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    W = weight.shape[1]
    T = padded.shape[1] - W + 1
    dpadded = torch.zeros_like(padded)
    taps = []
    for j in range(W):
        dpadded[:, j : j + T].addcmul_(dy, weight[:, j])
        taps.append((dy * padded[:, j : j + T]).sum((0, 1)))
    return dpadded, torch.stack(taps, dim=1)


@_convolve_taps_backward.register_fake
def _(dy, padded, weight):  # noqa: ARG001
    return torch.empty_like(padded), weight.new_empty(weight.shape)


def _save(ctx, inputs, output):  # noqa: ARG001
    ctx.save_for_backward(*inputs)


def _differentiate(ctx, dy):
    check_first_order()
    return _convolve_taps_backward(dy, *ctx.saved_tensors)


_convolve_taps.register_autograd(_differentiate, setup_context=_save)
