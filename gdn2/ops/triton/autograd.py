"""How the kernels' operators are differentiated: by another operator, from the inputs alone."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gdn2.ops.contract import check_first_order


def register_backward(operator: Any, backward: Any, *, outputs: int = 1, like: int = 0) -> None:
    """Differentiate `operator`, whose tensor inputs come before all others, by `backward`.

    Args:
        backward: takes the gradients of the outputs and then the operator's inputs; returns those
            of the floating inputs that there are, contiguous, and one by itself (inductor fails on
            lists of one). None comes only for the gradient of an output after the first.
        outputs: how many the operator has.
        like: the number of an input of the first output's shape and dtype.
    """

    def save(ctx: Any, inputs: Sequence[Any], output: Any) -> None:  # noqa: ARG001
        tensors = [x for x in inputs if x is None or isinstance(x, Tensor)]
        ctx.options = inputs[len(tensors) :]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)

    def differentiate(ctx: Any, first: Tensor | None, *others: Tensor | None) -> tuple:
        check_first_order()
        saved = ctx.saved_tensors  # once: an activation checkpoint makes them again at each access
        if first is None:
            first = torch.zeros_like(saved[like])
        grads = backward(first, *others, *saved, *ctx.options)
        grads = iter([grads] if isinstance(grads, Tensor) else grads)
        of_tensors = [next(grads) if _has_gradient(x) else None for x in saved]
        return *of_tensors, *(None for _ in ctx.options)

    def fake(*arguments: Any) -> Tensor | list[Tensor]:
        grads = [x.new_empty(x.shape) for x in arguments[outputs:] if _has_gradient(x)]
        return grads[0] if len(grads) == 1 else grads

    backward.register_fake(fake)
    operator.register_autograd(differentiate, setup_context=save)


def _has_gradient(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()
