import pytest
import torch

from gdn2.ops import gated_rms_norm, l2_norm
from gdn2.ops import norm as norm_module
from gdn2.ops.norm import rms_norm


def test_l2_norm_has_its_epsilon_inside_the_root():
    x = torch.tensor([[3e-3, 4e-3], [0.0, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(l2_norm(x), x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt())


@pytest.mark.parametrize("autocast", [False, True])
def test_norms_round_once_at_the_end(autocast):
    x, gate = (10 * torch.randn(2, 64, 32)).bfloat16()
    weight = torch.randn(32)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        got = rms_norm(x, weight), gated_rms_norm(x, gate, weight), l2_norm(x)
    y, g = x.float(), gate.float()
    exact = rms_norm(y, weight), gated_rms_norm(y, g, weight), l2_norm(y)
    for mine, truth in zip(got, exact, strict=True):
        assert mine.dtype == torch.bfloat16
        torch.testing.assert_close(mine, truth.bfloat16(), rtol=0, atol=0)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("shape", [(5,), (3, 5), (2, 3, 4, 5), (0, 5)])
def test_gradients_are_those_of_finite_differences(shape, weighted):
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(5, dtype=torch.float64, requires_grad=True)
    if weighted:
        assert torch.autograd.gradcheck(rms_norm, (x, weight))
    else:
        assert torch.autograd.gradcheck(l2_norm, x)


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "sliced"])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_norm_is_a_proper_operator(weighted, layout):
    x = torch.randn(4, 6, 10)
    x = {"contiguous": x[..., :5].clone(), "transposed": x.transpose(0, 1)[..., :5]}.get(
        layout, x[..., :5]
    )
    weight = torch.randn(5, requires_grad=True) if weighted else None
    torch.library.opcheck(norm_module._norm_op, (x.requires_grad_(), weight, 0.2, 1e-5))


def test_numbers_are_the_same_with_and_without_gradients():
    x, weight = torch.randn(3, 7, 64), torch.randn(64, requires_grad=True)
    with torch.no_grad():
        plain = rms_norm(x, weight), l2_norm(x)
    assert torch.equal(rms_norm(x, weight), plain[0])
    assert torch.equal(l2_norm(x.requires_grad_()), plain[1])


def test_a_second_derivative_is_refused():
    x = torch.randn(3, 5, requires_grad=True)
    with pytest.raises(RuntimeError, match="no gradient of its own"):
        torch.autograd.grad(l2_norm(x).sum(), x, create_graph=True)


def test_broken_contracts_of_the_gated_norm_are_refused():
    x, weight = torch.randn(3, 5), torch.ones(5)
    with pytest.raises(ValueError, match=r"got \[3, 5\], \[1, 5\], \[5\]"):
        gated_rms_norm(x, x[:1], weight)
    with pytest.raises(ValueError, match=r"weight \[V\], got \[3, 5\], \[3, 5\], \[1\]"):
        gated_rms_norm(x, x, weight[:1])
    with pytest.raises(ValueError, match=r"activation must be one of .*'relu'"):
        gated_rms_norm(x, x, weight, activation="relu")
    with pytest.raises(ValueError, match="backend must be None or one of"):
        gated_rms_norm(x, x, weight, backend="cuda")
    with pytest.raises(NotImplementedError, match="takes float32, float16 and bfloat16"):
        gated_rms_norm(x.double(), x, weight, backend="triton")
