"""Operators of `torch.library` that change a state."""

from collections.abc import Callable

import torch
from torch import Tensor


def register_step(name: str, step: Callable[..., Tensor], fake: Callable) -> Callable[..., Tensor]:
    """Make `step`, which changes its argument `state`, the operator ``gdn2::name``.

    As `torch.library.custom_op` does, without its 40 us a call: a step may take 100.
    """
    qualified = f"gdn2::{name}"
    torch.library.define(qualified, torch.library.infer_schema(step, mutates_args={"state"}))
    torch.library.impl(qualified, "CompositeExplicitAutograd", step)
    torch.library.register_fake(qualified, fake)
    return getattr(torch.ops.gdn2, name).default
