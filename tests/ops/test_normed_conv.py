"""The convolution with normed heads in PyTorch: it is `causal_conv` and the L2 norm."""

import pytest
import torch

from gdn2.ops import causal_conv, l2_norm, normed_conv

BOUNDS = (0, 0, 1, 3, 9, 9)


def make(B, T, D, W, dtype=torch.float64):
    g = torch.Generator().manual_seed(0)
    N = len(BOUNDS) - 1 if B == 1 else B
    shapes = (B, T, D), (D, W), (N, D, W - 1)
    x, weight, state = (torch.randn(s, generator=g, dtype=torch.float64).to(dtype) for s in shapes)
    return x, weight, state, torch.tensor(BOUNDS) if B == 1 else None


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", [None, "chunked", "reference"])
@pytest.mark.parametrize("norm_channels", [0, 8, 12])
@pytest.mark.parametrize(("B", "T"), [(2, 9), (1, 9), (2, 2), (2, 0)])
def test_is_the_convolution_and_the_norm(B, T, norm_channels, backend, dtype):
    x, weight, state, cu_seqlens = make(B, T, 12, 4, dtype)
    y, last = normed_conv(
        x,
        weight,
        norm_channels=norm_channels,
        head_dim=4,
        eps=1e-3,
        state=state,
        cu_seqlens=cu_seqlens,
        backend=backend,
    )
    want, want_last = causal_conv(x, weight, state=state, cu_seqlens=cu_seqlens)
    heads = want.unflatten(-1, (3, 4)).to(torch.promote_types(dtype, torch.float32))
    normed = heads / (heads.square().sum(-1, keepdim=True) + 1e-3).sqrt()
    normed = normed.flatten(-2)[..., :norm_channels].to(dtype)
    assert y.dtype == last.dtype == dtype
    torch.testing.assert_close(y[..., :norm_channels], normed)
    assert torch.equal(y[..., norm_channels:], want[..., norm_channels:])
    assert torch.equal(last, want_last)


def test_a_bias_is_the_convolutions():
    x, weight, state, cu_seqlens = make(1, 9, 8, 4)
    bias, options = weight[:, 0] + 1, {"state": state, "cu_seqlens": cu_seqlens}
    y, _ = normed_conv(x, weight, bias, norm_channels=0, head_dim=8, **options)
    assert torch.equal(y, causal_conv(x, weight, bias, **options)[0])


def test_epsilon_is_that_of_the_norm():
    x, weight, _, _ = make(2, 5, 8, 4)
    y, _ = normed_conv(1e-3 * x, weight, norm_channels=8, head_dim=8)
    assert torch.equal(y, l2_norm(causal_conv(1e-3 * x, weight)[0]))


def test_gradients_are_those_of_finite_differences():
    *leaves, cu_seqlens = make(1, 9, 6, 3)
    options = {"norm_channels": 4, "head_dim": 2, "cu_seqlens": cu_seqlens}

    def function(x, weight, state):
        return normed_conv(x, weight, state=state, **options)

    assert torch.autograd.gradcheck(function, tuple(t.requires_grad_() for t in leaves))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 8)}, r"x and weight must be .* got \[2, 8\], \[8, 4\]"),
        ({"weight": torch.zeros(3, 4)}, "x and weight must be"),
        ({"state": torch.zeros(2, 8, 4)}, r"state must be \[N, D, W - 1\] = \[2, 8, 3\]"),
        ({"cu_seqlens": torch.tensor([0, 8])}, "needs B == 1"),
        ({"norm_channels": 6}, "from 0 to D=8, got norm_channels=6, head_dim=4"),
        ({"norm_channels": 12}, "got norm_channels=12, head_dim=4"),
        ({"norm_channels": -4}, "got norm_channels=-4, head_dim=4"),
        ({"norm_channels": 0, "head_dim": 0}, "got norm_channels=0, head_dim=0"),
        ({"eps": -1e-6}, "eps must be at least 0, got -1e-06"),
        ({"backend": "cuda"}, "backend must be None or one of .* got 'cuda'"),
    ],
)
def test_broken_contract_is_named(change, message):
    x, weight = torch.zeros(2, 5, 8), torch.zeros(8, 4)
    arguments = {"x": x, "weight": weight, "norm_channels": 4, "head_dim": 4, **change}
    with pytest.raises(ValueError, match=message):
        normed_conv(**arguments)


def test_kernels_refuse_what_they_can_not_serve():
    x, weight, state, _ = make(2, 5, 8, 4)
    with pytest.raises(NotImplementedError, match=r"backend='triton' .*float64"):
        normed_conv(x, weight, norm_channels=8, head_dim=8, state=state, backend="triton")
