"""Which implementation serves a call."""

from types import ModuleType

from torch import Tensor

from gdn2.ops import triton
from gdn2.ops.contract import Operands

BACKENDS = ("chunked", "reference", "triton")


def resolve_backend(request: str | None, x: Operands | Tensor) -> str:
    """Name the backend that serves a call; a named request is returned or refused, never replaced.

    Args:
        request: one of `BACKENDS`, or None: the fastest that is known to serve the call.
        x: the operands of the gated delta rule, or the inputs of the convolution.

    Raises:
        ValueError: the name is unknown. NotImplementedError: that backend can not serve the call.
    """
    if request not in (None, *BACKENDS):
        raise ValueError(f"backend must be None or one of {BACKENDS}, got {request!r}")
    if request == "triton" and (reason := triton.problem(x)):
        raise NotImplementedError(f"backend='triton' {reason}; the others can serve this call")
    return request or "chunked"


def triton_operators() -> ModuleType:
    """The registered kernels. Not imported before they are called: only they need triton."""
    from gdn2.ops.triton import register

    return register
