"""Cross entropy of a linear map's logits, a chunk of tokens at a time.

Axes: M tokens, D model width, V vocabulary.
"""

import torch
from torch import Tensor

from gdn2.ops.contract import check_first_order, check_no_tangent

IGNORED = -100
CHUNK = 1024  # tokens whose logits exist at a time


def linear_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """``sum_i logsumexp(W h_i) - (W h_i)[label_i]`` over the labels that are not -100, in float32.

    The gradient is computed beside the loss, while a chunk's logits exist: one [M, D] and one
    [V, D], which the backward only scales. Logits are never all in memory, nor computed twice.

    Args:
        hidden: ``[M, D]``. weight: ``[V, D]``. labels: ``[M]`` integers.
    """
    wanted = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    check_no_tangent((hidden, weight))
    total, *_ = _linear_cross_entropy(hidden, weight, labels, wanted)
    return total


@torch.no_grad()
def token_losses(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """The terms of `linear_cross_entropy`, ``[M]`` float32, zero where the label is -100."""
    parts = [
        _chunk_losses(h, weight, y)[0]
        for h, y in zip(hidden.split(CHUNK), labels.split(CHUNK), strict=True)
    ]
    return torch.cat(parts)


def _chunk_losses(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Losses [m], logits [m, V] and their logsumexp [m, 1], at least float32."""
    logits = hidden @ weight.mT
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    total = logits.logsumexp(1, keepdim=True)
    ignored = labels == IGNORED  # any other negative label fails in gather
    picked = logits.gather(1, labels.masked_fill(ignored, 0)[:, None])
    losses = (total - picked)[:, 0].masked_fill(ignored, 0.0)
    return losses, logits, total


@torch.library.custom_op("gdn2::linear_cross_entropy", mutates_args=())
def _linear_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, wanted: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The sum of losses and, if `wanted`, its gradients with respect to hidden and weight."""
    total, dhidden, dweight = _empty_results(hidden, weight, wanted)
    total.zero_()
    dweight_sum = torch.zeros_like(dweight, dtype=total.dtype)
    for start in range(0, len(hidden), CHUNK):
        now = slice(start, start + CHUNK)
        losses, logits, normaliser = _chunk_losses(hidden[now], weight, labels[now])
        total += losses.sum()
        if wanted:
            valid = labels[now, None] != IGNORED
            dlogits = logits.sub_(normaliser).exp_()  # softmax, then minus one at the label
            label = labels[now, None].where(valid, 0)
            dlogits.scatter_add_(1, label, -valid.to(logits.dtype))
            dlogits = dlogits.mul_(valid).to(hidden.dtype)
            dhidden[now] = dlogits @ weight
            dweight_sum += dlogits.mT @ hidden[now]
    return total, dhidden, dweight_sum.to(weight.dtype)


@_linear_cross_entropy.register_fake
def _(hidden, weight, labels, wanted):  # noqa: ARG001
    return _empty_results(hidden, weight, wanted)


def _empty_results(hidden: Tensor, weight: Tensor, wanted: bool) -> tuple[Tensor, Tensor, Tensor]:
    total = hidden.new_empty((), dtype=torch.promote_types(hidden.dtype, torch.float32))
    if not wanted:
        return total, hidden.new_empty(0), weight.new_empty(0)
    return total, hidden.new_empty(hidden.shape), weight.new_empty(weight.shape)


def _save(ctx, inputs, output):  # noqa: ARG001
    _, dhidden, dweight = output
    ctx.mark_non_differentiable(dhidden, dweight)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(dhidden, dweight)


def _differentiate(ctx, dtotal, *_):
    check_first_order()
    dhidden, dweight = ctx.saved_tensors
    return dhidden * dtotal, dweight * dtotal, None, None


_linear_cross_entropy.register_autograd(_differentiate, setup_context=_save)
