"""What a token's decay and gates are made from; float32 inside or better, autocast or not.

Equation numbers are those of docs/math.md.
"""

import torch.nn.functional as F
from torch import Tensor

from gdn2.ops.backends import resolve_backend
from gdn2.ops.precision import upcast


def log_decay(
    f: Tensor,
    A_log: Tensor,
    dt_bias: Tensor,
    *,
    lower_bound: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """The logarithm of a decay in (0, 1), as in Mamba-2 (arXiv 2405.21060), or a bounded one:

        log_decay = -exp(A_log) * softplus(f + dt_bias)                                (Eq. 11)
        log_decay = lower_bound * sigmoid(exp(A_log) * (f + dt_bias))

    The step size ``dt = softplus(f + dt_bias)`` depends on the token, the rate ``exp(A_log)`` does
    not.

    Args:
        f: ``[..., heads, channels]`` or ``[..., heads]``, any floating dtype.
        A_log: ``[heads, 1]`` or ``[heads]``. dt_bias: ``[heads, channels]`` or ``[heads]``.
        lower_bound: None for the first form, a negative number for the second.
        backend: "triton" for its kernels: the first form in float32, float16 and bfloat16. All
            others: PyTorch.

    Returns:
        float32 of f's shape (float64 for float64), <= 0.

    Raises:
        ValueError: a shape or the bound breaks the contract. NotImplementedError: the backend that
            is named can not serve the call.
    """
    per_channel = dt_bias.ndim == 2
    if f.shape[-1 - per_channel :] != dt_bias.shape or A_log.shape != (
        (len(dt_bias), 1) if per_channel else dt_bias.shape
    ):
        raise ValueError(
            "f, A_log and dt_bias must be [..., heads, channels], [heads, 1] and [heads, channels] "
            "or [..., heads], [heads] and [heads], got "
            f"{list(f.shape)}, {list(A_log.shape)}, {list(dt_bias.shape)}"
        )
    if lower_bound is not None and not lower_bound < 0:
        raise ValueError(f"lower_bound must be None or negative, got {lower_bound}")
    limit = None if lower_bound is None else "takes no lower bound of a decay"
    if resolve_backend(backend, f, limit) == "triton":
        from gdn2.ops.triton import gates as kernels  # only they need triton

        return kernels.log_decay(f, A_log, dt_bias)
    rate, x = upcast(A_log).exp(), upcast(f) + upcast(dt_bias)
    return -rate * F.softplus(x) if lower_bound is None else lower_bound * (rate * x).sigmoid()


def gate(x: Tensor, maximum: float = 1.0, *, backend: str | None = None) -> Tensor:
    """How much to erase or to write (Eq. 12):

        gate = maximum * sigmoid(x)

    Args:
        x: any shape and floating dtype.
        backend: as in `log_decay`.

    Returns:
        x's shape and dtype, in [0, maximum]: an operand, which products round like keys and values.

    Raises:
        NotImplementedError: the backend that is named can not serve the call.
    """
    if resolve_backend(backend, x) == "triton":
        from gdn2.ops.triton import gates as kernels  # only they need triton

        return kernels.gate(x, maximum)
    y = upcast(x).sigmoid()
    return (y if maximum == 1.0 else maximum * y).to(x.dtype)
