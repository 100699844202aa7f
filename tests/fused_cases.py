"""What is asked of every fused operation: tensors by name in, one tensor out."""

from collections.abc import Callable, Sequence

import torch
from operator_cases import assert_no_worse, assert_rounded_no_worse
from torch import Tensor

Operation = Callable[..., Tensor]


def randn(*shape: int, device: str, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device)


def upstream(shape: Sequence[int], device: str) -> Tensor:
    return 1 + randn(*shape, device=device, seed=99).double()


def results(operation: Operation, tensors: dict[str, Tensor], **options) -> dict[str, Tensor]:
    """The output, and every tensor's gradient of a fixed random loss; strides are kept.

    The loss has a mean slope: errors of a parameter's gradient are measured against its largest
    number, which would be luck where a few sums cancel.
    """
    leaves = {name: x.detach().requires_grad_() for name, x in tensors.items()}
    y = operation(**leaves, **options)
    dy = upstream(y.shape, str(y.device))
    grads = torch.autograd.grad((y.double() * dy).sum(), list(leaves.values()))
    return {"y": y.detach()} | {f"d_{n}": g for n, g in zip(leaves, grads, strict=True)}


def assert_as_exact_as_composed(
    operation: Operation, tensors: dict[str, Tensor], **options
) -> None:
    """Against float64: float32 results within twice the error of PyTorch's form, half 1.5 times."""
    exact = {name: x.double() for name, x in tensors.items()}
    truth = results(operation, exact, **options)
    composed = results(operation, tensors, **options)
    got = results(operation, tensors, backend="triton", **options)
    for name, x in composed.items():
        assert got[name].dtype == x.dtype
        assert got[name].shape == x.shape
        assert got[name].is_contiguous()
        one = [{name: r[name]} for r in (got, composed, truth)]
        if x.dtype == torch.float32:
            assert_no_worse(one[0], than=one[1], truth=one[2], factor=2.0)
        else:
            assert_rounded_no_worse(one[0], than=one[1], truth=one[2])
