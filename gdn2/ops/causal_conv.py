"""Short causal depthwise convolution over sequences, and one token of it for decoding.

Axes: B batch, T time, D channels, W taps (the last one meets the current token), N sequences, which
lie one after the other along the tokens: M = B T or, packed, T. R are those first W - 1 tokens of
every sequence that look back beyond it.
"""

from collections.abc import Sequence

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
    tokens, dtype = x.flatten(0, 1), torch.promote_types(x.dtype, torch.float32)
    history = tokens.new_zeros(N, x.shape[2], W - 1) if state is None else state.to(x.dtype)
    history = history.transpose(1, 2)
    bounds = cu_seqlens
    if bounds is None:
        bounds = torch.arange(N + 1, device=x.device) * x.shape[1]
    y = _convolve(tokens.to(dtype), weight.to(dtype), history.to(dtype), bounds)
    y = y if bias is None else y + bias.to(dtype)
    y = F.silu(y) if activation == "silu" else y
    sequence = torch.arange(N, device=x.device).unsqueeze(1)
    ends = bounds[1:].unsqueeze(1) - torch.arange(W - 1, 0, -1, device=x.device)
    last = _inputs(tokens, history, bounds, sequence, ends)
    return y.view(x.shape).to(x.dtype), last.transpose(1, 2).contiguous()


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


def _inputs(x: Tensor, history: Tensor, bounds: Tensor, sequence: Tensor, token: Tensor) -> Tensor:
    """x [M, D] at the positions `token`, or the sequence's history [N, W - 1, D] where before it.

    `sequence` [..., 1] says whose token it is: `token` [..., any].
    """
    H = history.shape[1]
    if H == 0:
        return x[token]
    start = bounds[sequence]
    before = history[sequence, (token - start + H).clamp(0, H - 1)]
    if len(x) == 0:
        return before
    return torch.where((token < start).unsqueeze(-1), before, x[token.clamp(min=0)])


def _first_tokens(bounds: Tensor, W: int) -> tuple[Tensor, Tensor, Tensor]:
    """Sequence [R, 1] and position [R] of all tokens R, and the positions [R, W] that they see."""
    back = torch.arange(W, device=bounds.device)
    token = bounds[:-1].unsqueeze(1) + back[: W - 1]
    sequence, place = (token < bounds[1:].unsqueeze(1)).nonzero(as_tuple=True)
    token = token[sequence, place]
    return sequence.unsqueeze(1), token, token.unsqueeze(1) - back


def _add_taps(x: Sequence[Tensor], weight: Tensor) -> Tensor:
    """``sum_o weight[:, W - 1 - o] * x[o]``, where x[o] are the inputs o tokens before.

    Those that are fewer lack tokens at the start.
    """
    y = x[0] * weight[:, -1]
    for o in range(1, weight.shape[1]):
        y[len(y) - len(x[o]) :].addcmul_(x[o], weight[:, -1 - o])
    return y


@torch.library.custom_op("gdn2::causal_conv", mutates_args=())
def _convolve(x: Tensor, weight: Tensor, history: Tensor, bounds: Tensor) -> Tensor:
    """W passes over all tokens as if they were one sequence, then its first tokens R once more.

    Written out because autograd would give every tap a zero-filled gradient of the whole input.
    """
    W = weight.shape[1]
    y = _add_taps([x[: max(len(x) - o, 0)] for o in range(W)], weight)
    sequence, token, seen = _first_tokens(bounds, W)
    y[token] = _add_taps(_inputs(x, history, bounds, sequence, seen).unbind(1), weight)
    return y


@_convolve.register_fake
def _(x, weight, history, bounds):  # noqa: ARG001
    return torch.empty_like(x)


@torch.library.custom_op("gdn2::causal_conv_backward", mutates_args=())
def _convolve_backward(
    dy: Tensor, x: Tensor, weight: Tensor, history: Tensor, bounds: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The first tokens' gradient is zero on the way of all tokens, and is added apart.

    To subtract what went to a neighbour's tokens would leave a rounding error there.
    """
    W, M = weight.shape[1], len(x)
    sequence, token, seen = _first_tokens(bounds, W)
    dfirst, inputs = dy[token], _inputs(x, history, bounds, sequence, seen)  # [R, D], [R, W, D]
    dy = dy.index_fill(0, token, 0.0)
    dx, dhistory = dy * weight[:, -1], torch.zeros_like(history)
    dweight, product = torch.empty_like(weight), torch.empty_like(x)
    for o in range(W):
        later, now = dy[min(o, M) :], slice(max(M - o, 0))
        if o:
            dx[now].addcmul_(later, weight[:, -1 - o])
        torch.sum(torch.mul(later, x[now], out=product[now]), 0, out=dweight[:, -1 - o])
        dweight[:, -1 - o] += (dfirst * inputs[:, o]).sum(0)
    dinputs = dfirst.unsqueeze(1) * weight.mT.flip(0)
    before = seen < bounds[sequence]
    dx.index_put_((seen[~before],), dinputs[~before], accumulate=True)
    place = (seen - bounds[sequence] + W - 1)[before]
    sequence = sequence.expand_as(seen)[before]
    dhistory.index_put_((sequence, place), dinputs[before], accumulate=True)
    return dx, dweight, dhistory


@_convolve_backward.register_fake
def _(dy, x, weight, history, bounds):  # noqa: ARG001
    return torch.empty_like(x), torch.empty_like(weight), torch.empty_like(history)


def _save(ctx, inputs, output):  # noqa: ARG001
    ctx.save_for_backward(*inputs)


def _differentiate(ctx, dy):
    check_first_order()
    return *_convolve_backward(dy, *ctx.saved_tensors), None


_convolve.register_autograd(_differentiate, setup_context=_save)
