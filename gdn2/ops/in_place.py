"""What steps share, of the rule and of the convolution: they change a state in place."""

from collections.abc import Callable, Iterable

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


def refuse_gradients(step: str, rule: str, tensors: Iterable[Tensor | None]) -> None:
    """Raise RuntimeError where autograd would record `step`; `rule` is its form over sequences."""
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        raise RuntimeError(
            f"{step} updates the state in place and has no gradient: "
            f"call {rule}, or decode under torch.no_grad()"
        )


def on_slots(
    state: Tensor, state_indices: Tensor, advance: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """Advance the slots of a pool; where an index is negative the output is zero.

    `advance` is given the batch rows whose index is not, and their states, which it changes.
    """
    live = (state_indices >= 0).nonzero().squeeze(1)
    slots = state_indices[live].long()
    states = state[slots]
    of_live = advance(live, states)
    state[slots] = states
    out = of_live.new_zeros(len(state_indices), *of_live.shape[1:])
    out[live] = of_live
    return out
