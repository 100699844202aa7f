import pytest
import torch
import torch.nn.functional as F

from gdn2.modules import GatedRMSNorm, RMSNorm, l2_norm


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
