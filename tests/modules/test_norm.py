import pytest
import torch
import torch.nn.functional as F

from gdn2.modules import GatedRMSNorm, RMSNorm, l2_norm
from gdn2.modules import norm as norm_module


def test_l2_norm_has_its_epsilon_inside_the_root():
    x = torch.tensor([[3e-3, 4e-3], [0.0, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(l2_norm(x), x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt())


def test_rms_norm_is_its_formula():
    norm = RMSNorm(8, eps=1e-3).double()
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(3, 8, dtype=torch.float64)
    expected = norm.weight * x / (x.square().mean(-1, keepdim=True) + 1e-3).sqrt()
    torch.testing.assert_close(norm(x), expected)


@pytest.mark.parametrize(("activation", "function"), [("silu", F.silu), ("sigmoid", torch.sigmoid)])
def test_gated_norm_gates_after_the_norm(activation, function):
    norm = GatedRMSNorm(8, activation=activation).double()
    x, gate = torch.randn(2, 3, 8, dtype=torch.float64)
    torch.testing.assert_close(norm(x, gate), norm.normalize(x) * function(gate))


def test_an_unknown_output_gate_is_refused():
    with pytest.raises(ValueError, match=r"activation must be one of .*'relu'"):
        GatedRMSNorm(8, activation="relu")


@pytest.mark.parametrize("autocast", [False, True])
def test_norms_round_once_at_the_end(autocast):
    x, gate = (10 * torch.randn(2, 64, 32)).bfloat16()
    norm, gated = RMSNorm(32), GatedRMSNorm(32)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        got = norm(x), gated(x, gate), l2_norm(x)
    exact = norm(x.float()), gated(x.float(), gate.float()), l2_norm(x.float())
    for y, truth in zip(got, exact, strict=True):
        assert y.dtype == torch.bfloat16
        torch.testing.assert_close(y, truth.bfloat16(), rtol=0, atol=0)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("shape", [(3, 5), (2, 3, 4, 5), (0, 5)])
def test_gradients_are_those_of_finite_differences(shape, weighted):
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    norm = RMSNorm(5).double()
    torch.nn.init.normal_(norm.weight)
    if weighted:
        assert torch.autograd.gradcheck(lambda x, _: norm(x), (x, norm.weight))
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
    norm, x = RMSNorm(64), torch.randn(3, 7, 64)
    with torch.no_grad():
        plain = norm(x), l2_norm(x)
    assert torch.equal(norm(x), plain[0])
    assert torch.equal(l2_norm(x.requires_grad_()), plain[1])


def test_a_second_derivative_is_refused():
    x = torch.randn(3, 5, requires_grad=True)
    with pytest.raises(RuntimeError, match="no gradient of its own"):
        torch.autograd.grad(l2_norm(x).sum(), x, create_graph=True)
