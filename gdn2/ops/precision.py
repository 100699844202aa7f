"""The one rule of mixed precision: what is delicate is computed in float32 or better."""

import torch
from torch import Tensor


def upcast(x: Tensor) -> Tensor:
    """Return x in float32 if its dtype is narrower; float64 stays float64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
