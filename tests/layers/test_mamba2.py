import pytest
import torch
import torch.nn.functional as F
from recurrent_layers import HV, MAMBA, D, K, V, build, inputs

from gdn2.layers import Mamba2

EXACT = {"rtol": 1e-10, "atol": 1e-12}


def test_it_has_the_official_parameter_names_and_shapes():
    layer = Mamba2(24, 48, head_dim=6, state_size=8, num_groups=2)
    assert {name: tuple(p.shape) for name, p in layer.named_parameters()} == {
        "in_proj.weight": (48 + 48 + 2 * 2 * 8 + 8, 24),
        "conv1d.weight": (48 + 2 * 2 * 8, 1, 4),
        "conv1d.bias": (48 + 2 * 2 * 8,),
        "A_log": (8,),
        "dt_bias": (8,),
        "D": (8,),
        "norm.weight": (48,),
        "out_proj.weight": (24, 48),
    }
    assert Mamba2(24, 48, head_dim=6, conv_bias=False).conv1d.bias is None


def test_parameters_and_state_at_full_size():
    with torch.device("meta"):
        layer = Mamba2(2304, 4096)
        _, state = layer(torch.empty(1, 5, 2304))
    assert sum(p.numel() for p in layer.parameters()) == 28_779_328
    assert state.state.numel() == 262_144
    assert state.conv.numel() == 12_672


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_layer_is_its_equations(groups):
    """Written once more, token by token."""
    layer, x = build(Mamba2, HV * V, MAMBA | {"num_groups": groups}), inputs(2, 9)
    z, vkq, dt = layer.in_proj(x).split([HV * V, HV * V + 2 * groups * K, HV], -1)
    padded = F.pad(vkq.mT, (3, 0))
    conv = layer.conv1d
    vkq = F.silu(F.conv1d(padded, conv.weight, conv.bias, groups=conv.groups)).mT
    v, k, q = vkq.split([HV * V, groups * K, groups * K], -1)
    v = v.view(2, 9, HV, V)
    k, q = (
        y.view(2, 9, groups, K).repeat_interleave(HV // groups, 2)  # consecutive heads
        for y in (k, q)
    )
    dt = F.softplus(dt + layer.dt_bias)
    state, out = torch.zeros(2, HV, K, V, dtype=x.dtype), []
    for t in range(9):
        state = torch.exp(-layer.A_log.exp() * dt[:, t])[..., None, None] * state
        state = state + k[:, t, ..., None] * (dt[:, t, :, None] * v[:, t])[..., None, :]
        out.append(torch.einsum("bhkv,bhk->bhv", state, q[:, t]) + layer.D[:, None] * v[:, t])
    y = torch.stack(out, 1).flatten(2) * F.silu(z)
    y = y.unflatten(2, (groups, -1))
    y = (y / (y.square().mean(-1, keepdim=True) + 1e-5).sqrt()).flatten(2) * layer.norm.weight
    got, end = layer(x)
    torch.testing.assert_close(got, layer.out_proj(y), **EXACT)
    torch.testing.assert_close(end.state, state, **EXACT)


def test_with_narrow_maps_gates_and_skip_are_float32():
    layer = build(Mamba2, HV * V, MAMBA).float()
    dt = torch.randn(2, 9, HV).bfloat16()
    for gate, truth in zip(layer.gates(dt), layer.double().gates(dt.double()), strict=True):
        if gate is not None:
            torch.testing.assert_close(gate.double(), truth, rtol=1e-6, atol=1e-6)
    out, v = torch.randn(2, 50, 9, HV, V).bfloat16()
    z = torch.randn(50, 9, HV * V).bfloat16()
    layer.out_proj = torch.nn.Identity()
    truth = layer._read_out(out.double(), v.double(), z.double()).bfloat16()
    equal = layer.float()._read_out(out, v, z) == truth
    assert equal.float().mean() > 0.99  # rounded once


def test_it_starts_from_the_published_laws():
    torch.manual_seed(0)
    layer = Mamba2(D, 64 * 64)
    rate, step = layer.A_log.exp(), F.softplus(layer.dt_bias)
    assert rate.min() >= 1
    assert 15 < rate.max() <= 16
    assert 0.99e-3 < step.min() < 5e-3 < 5e-2 < step.max() < 1.01e-1
    assert (layer.D == 1).all()
    assert 0.48 < layer.conv1d.weight.abs().max() <= 0.5


@pytest.mark.parametrize(
    "options", [{"inner_size": 50}, {"inner_size": 48, "num_groups": 3}, {"inner_size": 2}]
)
def test_heads_that_do_not_fit_are_refused(options):
    with pytest.raises(ValueError, match="inner_size must be a positive multiple of head_dim x"):
        Mamba2(D, head_dim=6, **options)
