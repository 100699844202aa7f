"""The kernels as operators of `torch.library`: compilers see each as one node."""

import logging
from functools import cache

import torch
from torch import Tensor

from gdn2.ops import chunked
from gdn2.ops.contract import Operands, check_no_tangent
from gdn2.ops.in_place import register_step
from gdn2.ops.step import register_advance
from gdn2.ops.triton import launch

_log = logging.getLogger(__name__)


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
    return launch.gated_delta_rule(
        Operands(q, k, v, log_decay, erase, write), scale, state, cu_seqlens
    )


@_rule.register_fake
def _(q, k, v, log_decay, erase, write, state, cu_seqlens, scale):  # noqa: ARG001
    N = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    states = q.new_empty((N, v.shape[2], q.shape[3], v.shape[3]), dtype=torch.float32)
    return q.new_empty(v.shape), states


def _save(ctx, inputs, output):  # noqa: ARG001
    *tensors, ctx.scale = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors)


def _differentiate(ctx, dout, dstate):
    _announce()
    *operands, state, cu_seqlens = ctx.saved_tensors
    x = Operands(*operands)
    return *chunked.gradients(x, ctx.scale, state, cu_seqlens, dout, dstate), None, None


@cache
def _announce() -> None:
    _log.warning("backend='triton' has no backward of its own yet: it runs in chunks of PyTorch")


_rule.register_autograd(_differentiate, setup_context=_save)


_step = register_advance("triton_gated_delta_step", launch.gated_delta_step)
causal_conv_step = register_step(
    "triton_causal_conv_step",
    launch.causal_conv_step,
    lambda x, *_: x.new_empty(x.shape),
)
