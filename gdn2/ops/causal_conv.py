"""Short causal depthwise convolution over sequences, and a few tokens of it for decoding.

Axes: B batch, T time, D channels, W taps (the last one meets the current token), N sequences, which
lie one after the other along the tokens: M = B T or, packed, T. R are those first W - 1 tokens of
every sequence that look back beyond it.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from gdn2.ops.backends import resolve_backend, triton_operators
from gdn2.ops.contract import (
    check_boundaries,
    check_first_order,
    check_no_tangent,
    check_state_indices,
    no_autocast,
)
from gdn2.ops.in_place import on_slots, refuse_gradients

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
    N, W = check_sequences(x, weight, bias, activation, state, cu_seqlens), weight.shape[1]
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
    state_indices: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Go on with `causal_conv` by one token, or by a few; no autograd.

    Args:
        x: ``[B, D]``, or ``[B, T, D]``.
        weight, bias, activation: as in `causal_conv`.
        state: ``[B, D, W - 1]``, updated in place; with `state_indices` a pool
            ``[slots, D, W - 1]``.
        state_indices: as in `gated_delta_step`.
        backend: "triton" for its kernel. All others: PyTorch.

    Returns:
        ``(y, state)``: of x's shape and dtype, and the given state.

    Raises:
        ValueError: a shape or the activation breaks the contract. RuntimeError: a gradient is
            asked for. NotImplementedError: the backend that is named can not serve the call.
    """
    refuse_gradients("causal_conv_step", "causal_conv", (x, weight, bias, state))
    if x.ndim not in (2, 3) or weight.ndim != 2 or weight.shape[0] != x.shape[-1]:
        raise ValueError(
            "x and weight must be [B, D] or [B, T, D] and [D, W], got "
            f"{list(x.shape)}, {list(weight.shape)}"
        )
    if state_indices is not None:
        check_state_indices(state_indices, x)
    _check(weight, len(x if state_indices is None else state), bias, activation, state)
    if resolve_backend(backend, x) == "triton":
        tokens = x.unsqueeze(1) if x.ndim == 2 else x
        run = triton_operators().causal_conv_step
        y = run(tokens, weight, bias, activation == "silu", state, state_indices).view(x.shape)
    elif state_indices is None:
        y = _advance(x, weight, bias, activation, state)
    else:
        y = on_slots(
            state,
            state_indices,
            lambda live, states: _advance(x[live], weight, bias, activation, states),
        )
    return y, state


def _advance(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, state: Tensor
) -> Tensor:
    if x.numel() == 0:
        return x.clone()
    new = x.unsqueeze(2) if x.ndim == 2 else x.mT
    dtype = torch.promote_types(x.dtype, torch.float32)
    seen = torch.cat([state, new.to(state.dtype)], dim=-1)  # [B, D, W - 1 + T]
    if x.ndim == 2:
        y = (seen.to(dtype) * weight.to(dtype)).sum(-1)
    else:
        windows = seen.to(dtype).unfold(2, weight.shape[1], 1)  # [B, D, T, W]
        y = (windows * weight.to(dtype).unsqueeze(1)).sum(-1).mT
    y = y if bias is None else y + bias.to(dtype)
    y = F.silu(y) if activation == "silu" else y
    state.copy_(seen[..., new.shape[2] :])
    return y.to(x.dtype)


def check_sequences(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> int:
    """Return the number of sequences; ValueError unless all is as `causal_conv` wants it."""
    if x.ndim != 3 or weight.ndim != 2 or weight.shape[0] != x.shape[-1]:
        raise ValueError(
            f"x and weight must be [B, T, D] and [D, W], got {list(x.shape)}, {list(weight.shape)}"
        )
    N = check_boundaries(cu_seqlens, x)
    _check(weight, N, bias, activation, state)
    return N


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
    taps = torch.arange(W, device=bounds.device)
    token = bounds[:-1].unsqueeze(1) + taps[: W - 1]
    sequence, place = (token < bounds[1:].unsqueeze(1)).nonzero(as_tuple=True)
    token = token[sequence, place]
    return sequence.unsqueeze(1), token, token.unsqueeze(1) + taps - (W - 1)


def _filter(x: Tensor, weight: Tensor, padding: int = 0) -> Tensor:
    """``y[:, t] = sum_j weight[:, j] * x[:, t + j - padding]`` for x [any, L, D] amid zeros."""
    L, W = x.shape[1], weight.shape[1]
    if _in_one_pass(x):
        image = x.unsqueeze(2).permute(0, 3, 1, 2)  # [any, D, L, 1], in memory as it is
        with no_autocast(x):
            y = F.conv2d(image, weight.view(-1, 1, W, 1), padding=(padding, 0), groups=len(weight))
        return y.permute(0, 2, 3, 1).squeeze(2)
    x = F.pad(x, (0, 0, padding, padding))
    now = [x[:, j : L + 2 * padding - W + 1 + j] for j in range(W)]
    y = now[0] * weight[:, 0]
    for j in range(1, W):
        y.addcmul_(now[j], weight[:, j])
    return y


def _in_one_pass(x: Tensor) -> bool:
    """oneDNN takes channels that lie side by side; torch's own loops would take 20 times longer."""
    one_dnn = torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled
    return bool(one_dnn) and x.device.type == "cpu" and x.dtype == torch.float32 and x.numel() > 0


@torch.library.custom_op("gdn2::causal_conv", mutates_args=())
def _convolve(x: Tensor, weight: Tensor, history: Tensor, bounds: Tensor) -> Tensor:
    """All tokens as if they were one sequence, then those at the start of each once more.

    Written out because autograd would take the gradient of the weight from oneDNN, which needs
    longer for it than for all else.
    """
    y = _filter(x.unsqueeze(0), weight, weight.shape[1] - 1)[0, : len(x)]
    sequence, token, seen = _first_tokens(bounds, weight.shape[1])
    y[token] = _filter(_inputs(x, history, bounds, sequence, seen), weight)[:, 0]
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
    dx = _filter(dy.unsqueeze(0), weight.flip(1), W - 1)[0, W - 1 :]
    dweight, product = torch.empty_like(weight), torch.empty_like(x)
    for j in range(W):
        back = W - 1 - j
        later, now = dy[min(back, M) :], slice(max(M - back, 0))
        torch.sum(torch.mul(later, x[now], out=product[now]), 0, out=dweight[:, j])
        dweight[:, j] += (dfirst * inputs[:, j]).sum(0)
    dinputs = dfirst.unsqueeze(1) * weight.mT
    before = seen < bounds[sequence]
    dx.index_put_((seen[~before],), dinputs[~before], accumulate=True)
    dhistory = torch.zeros_like(history)
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
