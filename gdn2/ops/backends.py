"""Which implementation serves a call."""

from types import ModuleType

from torch import Tensor

from gdn2.ops import triton
from gdn2.ops.contract import Operands

BACKENDS = ("chunked", "reference", "triton")
FASTEST = {"cuda": "chunked"}  # by device; "triton" when a GPU has run its tests


def resolve_backend(request: str | None, x: Operands | Tensor, limit: str | None = None) -> str:
    """Name the backend that serves a call; a named request is returned or refused, never replaced.

    Args:
        request: one of `BACKENDS`, or None: the fastest that is known to serve the call.
        x: the operands of the gated delta rule, or the inputs of another operation.
        limit: why that operation's kernels in Triton can not serve the call, if they can not.

    Raises:
        ValueError: the name is unknown. NotImplementedError: that backend can not serve the call.
    """
    if request not in (None, *BACKENDS):
        raise ValueError(f"backend must be None or one of {BACKENDS}, got {request!r}")
    device = (x.q if isinstance(x, Operands) else x).device.type
    name = request or FASTEST.get(device, "chunked")
    if name == "triton" and (reason := limit or triton.problem(x)):
        if request is None:
            return "chunked"
        raise NotImplementedError(f"backend='triton' {reason}; the others can serve this call")
    return name


def triton_operators() -> ModuleType:
    """The registered kernels. Not imported before they are called: only they need triton."""
    from gdn2.ops.triton import register

    return register
