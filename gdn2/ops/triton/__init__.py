"""The operators in Triton; `problem` says, without importing that, what it can not serve."""

from importlib.util import find_spec

import torch
from torch import Tensor

from gdn2.ops.contract import Operands

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LARGEST = 256  # key or value channels that one program holds


def problem(x: Operands | Tensor) -> str | None:
    """What the kernels can not do about a call; None if they can serve it."""
    q = x.q if isinstance(x, Operands) else x
    if q.dtype not in DTYPES:
        return f"takes float32, float16 and bfloat16, got {q.dtype}"
    if isinstance(x, Operands):
        K, V = q.shape[-1], x.v.shape[-1]
        if K % 16 or V % 16 or max(K, V) > LARGEST:
            return f"needs K and V that are multiples of 16 up to {LARGEST}, got K={K}, V={V}"
    return _problem_here(q.device, q.dtype)


@torch.compiler.assume_constant_result  # a compiler can not look into what is installed
def _problem_here(device: torch.device, dtype: torch.dtype) -> str | None:
    if find_spec("triton") is None:
        return "needs triton (pip install 'gdn2[triton]')"
    if device.type == "cuda":
        old = torch.cuda.get_device_capability(device) < (8, 0)
        return "needs compute capability 8.0 (A100) or newer" if old else None
    from triton import knobs

    if device.type != "cpu" or not knobs.runtime.interpret:
        return f"needs a CUDA device, got {device.type}"
    if dtype == torch.bfloat16:
        return "has no bfloat16 in Triton's interpreter, which computes it wrongly"
    return None
