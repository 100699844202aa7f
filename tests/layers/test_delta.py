import pytest
import torch
import torch.nn.functional as F
from recurrent_layers import DELTA, HV, D, H, K, V, inputs
from recurrent_layers import build as build_layer

from gdn2.layers import DeltaNet, GatedDeltaNet, GatedDeltaNet2, KimiDeltaAttention
from gdn2.ops import gated_delta_rule

FAMILY = (GatedDeltaNet2, GatedDeltaNet, KimiDeltaAttention, DeltaNet)
EXACT = {"rtol": 1e-10, "atol": 1e-12}  # float64: only the order of sums differs


def build(layer, **options):
    return build_layer(layer, H, DELTA, **options)


def test_gdn2_has_the_official_parameter_names_and_shapes():
    layer = GatedDeltaNet2(24, 2, head_k_dim=8, head_v_dim=6)
    assert {name: tuple(p.shape) for name, p in layer.named_parameters()} == {
        "q_proj.weight": (16, 24),
        "k_proj.weight": (16, 24),
        "v_proj.weight": (12, 24),
        "b_proj.weight": (16, 24),
        "w_proj.weight": (12, 24),
        "o_proj.weight": (24, 12),
        "f_proj.0.weight": (6, 24),
        "f_proj.1.weight": (16, 6),
        "g_proj.0.weight": (6, 24),
        "g_proj.1.weight": (12, 6),
        "g_proj.1.bias": (12,),
        "q_conv1d.weight": (16, 1, 4),
        "k_conv1d.weight": (16, 1, 4),
        "v_conv1d.weight": (12, 1, 4),
        "A_log": (2,),
        "dt_bias": (16,),
        "o_norm.weight": (6,),
    }


@pytest.mark.parametrize(
    ("layer", "parameters"),
    [
        # d=2304, 16 heads, K = V = 128: the formulas of a published comparison
        (GatedDeltaNet2, 29_454_480),
        (GatedDeltaNet, 23_691_424),
        (KimiDeltaAttention, 20_054_160),
        (DeltaNet, 23_691_424 - 2304 * 16 - 2 * 16),  # Gated DeltaNet's without its decay
    ],
)
def test_parameter_counts_at_full_size(layer, parameters):
    with torch.device("meta"):
        mixer = layer(2304, 16)
    assert sum(p.numel() for p in mixer.parameters()) == parameters


@pytest.mark.parametrize("layer", FAMILY)
def test_layer_is_its_equations(layer):
    """Written once more, one line per step, over the reference operator."""
    mixer, x = build(layer), inputs(2, 9)

    def convolved(projection, conv):
        y = F.pad(projection(x).mT, (3, 0))
        return F.silu(F.conv1d(y, conv.weight, groups=conv.groups)).mT

    def l2(y):
        return y / (y.square().sum(-1, keepdim=True) + 1e-6).sqrt()

    q = l2(convolved(mixer.q_proj, mixer.q_conv1d).view(2, 9, H, K)) / K**0.5
    k = l2(convolved(mixer.k_proj, mixer.k_conv1d).view(2, 9, H, K))
    v = convolved(mixer.v_proj, mixer.v_conv1d).view(2, 9, HV, V)
    rate = None if layer is DeltaNet else mixer.A_log.exp()
    b = mixer.b_proj(x).sigmoid()
    if layer is GatedDeltaNet2:
        decay = -rate[:, None] * F.softplus(mixer.f_proj(x) + mixer.dt_bias).view(2, 9, H, K)
        erase, write = b.view(2, 9, H, K), mixer.w_proj(x).sigmoid().view(2, 9, HV, V)
    elif layer is KimiDeltaAttention:
        decay = -rate[:, None] * F.softplus(mixer.f_proj(x) + mixer.dt_bias).view(2, 9, HV, K)
        erase, write = b, b
    elif layer is DeltaNet:
        decay, erase, write = None, b, b
    else:
        decay, erase, write = -rate * F.softplus(mixer.a_proj(x) + mixer.dt_bias), b, b
    gates = {"log_decay": decay, "erase": erase, "write": write}
    out, state = gated_delta_rule(q, k, v, **gates, backend="reference")
    gate = mixer.g_proj(x).view(2, 9, HV, V)
    gate = gate.sigmoid() if layer is KimiDeltaAttention else F.silu(gate)
    out = out / (out.square().mean(-1, keepdim=True) + 1e-5).sqrt() * mixer.o_norm.weight * gate
    y, got = mixer(x)
    torch.testing.assert_close(y, mixer.o_proj(out.flatten(2)), **EXACT)
    torch.testing.assert_close(got.state, state, **EXACT)


@pytest.mark.parametrize("layer", FAMILY)
def test_under_autocast_the_decay_stays_float32(layer):
    mixer, x = build(layer).float(), inputs(2, 20).float()
    with torch.autocast("cpu", torch.bfloat16):
        gates = mixer.gates(mixer.project(x))
    dtypes = [torch.float32, torch.bfloat16, torch.bfloat16]
    exact = mixer.gates(mixer.project(x))
    for gate, truth, dtype in zip(gates, exact, dtypes, strict=True):
        assert (gate is None) == (truth is None)
        if gate is not None:  # wrong by not more than the bf16 products cost
            assert gate.dtype == dtype
            assert (gate - truth).abs().max() / truth.abs().max() < 0.02


def test_erase_range_doubles_the_erase_gate():
    x = inputs(1, 5)
    one, two = build(GatedDeltaNet2), build(GatedDeltaNet2, erase_range=2.0)
    torch.testing.assert_close(two.gates(two.project(x)).erase, 2 * one.gates(one.project(x)).erase)
    torch.testing.assert_close(two.gates(two.project(x)).write, one.gates(one.project(x)).write)


@pytest.mark.parametrize("gate", ["erase", "write"])
def test_a_gate_by_head_is_its_mean_over_channels_broadcast_back(gate):
    by_head, x = build(GatedDeltaNet2, **{f"{gate}_gate": "head"}), inputs(2, 9)
    by_channel = build(GatedDeltaNet2)
    by_channel.load_state_dict(by_head.state_dict())  # the same parameters
    gates = by_channel.gates(by_channel.project(x))._asdict()
    tied = by_head.gates(by_head.project(x))._asdict()
    mean = gates[gate].mean(-1)
    torch.testing.assert_close(tied[gate], mean, **EXACT)
    assert all(torch.equal(tied[name], gates[name]) for name in gates if name != gate)
    other = {name: value for name, value in gates.items() if name != gate}
    q, k, v = (torch.randn(2, 9, heads, size).double() for heads, size in ((H, K), (H, K), (HV, V)))
    short, _ = gated_delta_rule(q, k, v, **tied)
    broadcast = {gate: mean.unsqueeze(-1).expand_as(gates[gate])}
    whole, _ = gated_delta_rule(q, k, v, **other, **broadcast)
    torch.testing.assert_close(short, whole, **EXACT)


@pytest.mark.parametrize("layer", [GatedDeltaNet2, GatedDeltaNet, KimiDeltaAttention])
def test_a_bounded_decay_stays_above_its_bound(layer):
    mixer, x = build(layer, decay_lower_bound=-0.5), 100 * inputs(2, 9)
    decay = mixer.gates(mixer.project(x)).log_decay
    assert (decay >= -0.5).all()
    assert decay.min() < -0.49
    assert (decay <= 0).all()


@pytest.mark.parametrize(
    ("layer", "slowest"),
    [(GatedDeltaNet2, 1.0), (KimiDeltaAttention, 1.0), (GatedDeltaNet, 0.01)],
)
def test_rates_of_decay_start_from_the_members_range(layer, slowest):
    torch.manual_seed(0)
    rate = layer(D, 400, head_k_dim=2).A_log.exp()
    assert slowest <= rate.min() < slowest + 0.2
    assert 15.8 < rate.max() <= 16.001


def test_output_gate_and_its_rank_are_choices():
    layer = build(GatedDeltaNet2, output_gate="sigmoid", output_gate_rank=None)
    assert layer.g_proj.weight.shape == (HV * V, D)
    assert layer.o_norm.activation == "sigmoid"
    assert build(GatedDeltaNet, output_gate_rank=3).g_proj[0].weight.shape == (3, D)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_v_heads": 1}, "num_v_heads must be a multiple of num_heads 2, got 1"),
        ({"num_v_heads": 3}, "num_v_heads must be a multiple of num_heads 2, got 3"),
        ({"erase_range": 1.5}, "erase_range must be 1.0 or 2.0, got 1.5"),
        ({"output_gate": "relu"}, "must be one of"),
        ({"erase_gate": "token"}, r"erase_gate must be one of \('channel', 'head'\), got 'token'"),
        ({"write_gate": None}, "write_gate must be one of .*, got None"),
        ({"decay_lower_bound": 0.5}, "decay_lower_bound must be None or negative, .* got 0.5"),
    ],
)
def test_wrong_settings_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        GatedDeltaNet2(D, H, **options)


def test_gate_means_are_those_of_the_gates():
    mixer, x = build(GatedDeltaNet2), inputs(2, 10)
    mixer(x)
    gates = mixer.gates(mixer.project(x))
    expected = {
        "decay": gates.log_decay.exp().mean(),
        "erase": gates.erase.mean(),
        "write": gates.write.mean(),
    }
    torch.testing.assert_close(mixer.gate_means, expected)


def test_what_does_not_decay_has_no_bound_of_its_decay():
    with pytest.raises(ValueError, match="of a layer that decays, got -5"):
        DeltaNet(D, H, decay_lower_bound=-5)
