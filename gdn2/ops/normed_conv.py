"""The short convolution of queries, keys and values with SiLU, and the norm of queries and keys."""

import torch
from torch import Tensor

from gdn2.ops.backends import resolve_backend
from gdn2.ops.causal_conv import causal_conv, check_sequences
from gdn2.ops.norm import l2_norm
from gdn2.ops.triton import LARGEST

MOST_TAPS = 8  # that the kernels take


def normed_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    norm_channels: int,
    head_dim: int,
    eps: float = 1e-6,
    state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Convolve as `causal_conv` does, with SiLU, and scale the first heads to unit length.

        s_t = silu(sum_{j<W} weight[:, j] * x_{t-W+1+j} + bias)
        y_t = s_t / sqrt(sum s_t^2 + eps)    per head of the first norm_channels channels
        y_t = s_t                            in all others

    Float32 inside (float64 for float64 inputs). The kernels round once; in PyTorch half precision
    is also rounded between the convolution and the norm.

    Args:
        x: ``[B, T, D]``, any floating dtype: queries and keys, then values.
        weight: ``[D, W]``. bias: ``[D]``.
        norm_channels: how many channels are normed, a multiple of `head_dim` from 0 to D.
        head_dim: channels of a head.
        eps: under the root, at least 0.
        state, cu_seqlens: as in `causal_conv`.
        backend: "triton" for its kernels: float32, float16 and bfloat16, `head_dim` up to 256 and W
            up to 8. All others: PyTorch.

    Returns:
        ``(y, state)``: ``[B, T, D]`` in x's dtype, and the last ``W - 1`` inputs of each sequence,
        ``[N, D, W - 1]`` in x's dtype.

    Raises:
        ValueError: a shape or the channels break the contract. NotImplementedError: the backend
            that is named can not serve the call.
    """
    check_sequences(x, weight, bias, "silu", state, cu_seqlens)
    D, W = weight.shape
    if head_dim < 1 or not 0 <= norm_channels <= D or norm_channels % head_dim:
        raise ValueError(
            f"norm_channels must be a multiple of head_dim from 0 to D={D}, got "
            f"norm_channels={norm_channels}, head_dim={head_dim}"
        )
    if eps < 0:
        raise ValueError(f"eps must be at least 0, got {eps}")
    limit = f"needs head_dim up to {LARGEST} and W up to {MOST_TAPS}, got {head_dim=}, {W=}"
    fits = head_dim <= LARGEST and W <= MOST_TAPS
    if resolve_backend(backend, x, None if fits else limit) == "triton":
        from gdn2.ops.triton import normed_conv as kernels  # only they need triton

        options = norm_channels, head_dim, eps
        return kernels.normed_conv(x, weight, bias, *options, state, cu_seqlens)
    y, last = causal_conv(x, weight, bias, state=state, cu_seqlens=cu_seqlens)
    heads, others = y.split([norm_channels, D - norm_channels], -1)
    if norm_channels:
        heads = l2_norm(heads.unflatten(-1, (-1, head_dim)), eps).flatten(-2)
    # Layers norm all channels or none: nothing is to be copied.
    if norm_channels in (0, D):
        return (heads if norm_channels else y), last
    return torch.cat([heads, others], -1), last
