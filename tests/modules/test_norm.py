import pytest
import torch
import torch.nn.functional as F

from gdn2.modules import GatedRMSNorm, RMSNorm
from gdn2.modules.norm import GroupedRMSNorm


def test_rms_norm_is_its_formula():
    norm = RMSNorm(8, eps=1e-3).double()
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(3, 8, dtype=torch.float64)
    expected = norm.weight * x / (x.square().mean(-1, keepdim=True) + 1e-3).sqrt()
    torch.testing.assert_close(norm(x), expected)


@pytest.mark.parametrize(("activation", "function"), [("silu", F.silu), ("sigmoid", torch.sigmoid)])
def test_gated_norm_gates_after_the_norm(activation, function):
    norm, plain = GatedRMSNorm(8, 1e-3, activation=activation).double(), RMSNorm(8, 1e-3).double()
    torch.nn.init.normal_(norm.weight)
    plain.load_state_dict(norm.state_dict())
    x, gate = torch.randn(2, 3, 8, dtype=torch.float64)
    torch.testing.assert_close(norm(x, gate), plain(x) * function(gate))


def test_an_unknown_output_gate_is_refused():
    with pytest.raises(ValueError, match=r"activation must be one of .*'relu'"):
        GatedRMSNorm(8, activation="relu")


@pytest.mark.parametrize("groups", [1, 3])
def test_a_grouped_norm_of_narrow_weights_scales_in_float32(groups):
    torch.manual_seed(0)
    norm = GroupedRMSNorm(384, groups).bfloat16()
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(5, 384)
    y = x.double().unflatten(-1, (groups, -1))
    y = y / (y.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    truth = y.flatten(-2) * norm.weight.double()
    torch.testing.assert_close(norm(x).double(), truth, rtol=1e-5, atol=1e-6)
