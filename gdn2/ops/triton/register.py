"""The kernels as operators of `torch.library`: compilers see each as one node."""

import torch
from torch import Tensor

from gdn2.ops.contract import Operands, check_no_tangent
from gdn2.ops.in_place import register_step
from gdn2.ops.step import register_advance
from gdn2.ops.triton import decode, sequences
from gdn2.ops.triton.autograd import register_backward


def gated_delta_rule(
    x: Operands, scale: float, state: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    """All sequences; see the public `gated_delta_rule`."""
    check_no_tangent((*x, state))
    return _rule(*x, state, cu_seqlens, scale)


def gated_delta_step(
    x: Operands, scale: float, state: Tensor, state_indices: Tensor | None
) -> Tensor:
    """Advance `state` in place over the T tokens and return the outputs [B, T, HV, V]."""
    return _step(*x, scale, state, state_indices)


@torch.library.custom_op("gdn2::triton_gated_delta_rule", mutates_args=())
def _rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    erase: Tensor | None,
    write: Tensor | None,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    return sequences.gated_delta_rule(
        Operands(q, k, v, log_decay, erase, write), scale, state, cu_seqlens
    )


@_rule.register_fake
def _(q, k, v, log_decay, erase, write, state, cu_seqlens, scale):  # noqa: ARG001
    N = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    states = q.new_empty((N, v.shape[2], q.shape[3], v.shape[3]), dtype=torch.float32)
    return q.new_empty(v.shape), states


@torch.library.custom_op("gdn2::triton_gated_delta_rule_backward", mutates_args=())
def _backward(
    dout: Tensor,
    dstate: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    erase: Tensor | None,
    write: Tensor | None,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
) -> list[Tensor]:
    """Returns the gradients of q, k, v, and of those gates and that state that there are."""
    x = Operands(q, k, v, log_decay, erase, write)
    grads, dstart = sequences.gated_delta_rule_backward(x, scale, state, cu_seqlens, dout, dstate)
    return [t for t in (*grads, dstart) if t is not None]


register_backward(_rule, _backward, outputs=2, like=2)

_step = register_advance("triton_gated_delta_step", decode.gated_delta_step)
causal_conv_step = register_step(
    "triton_causal_conv_step",
    decode.causal_conv_step,
    lambda x, *_: x.new_empty(x.shape),
)
