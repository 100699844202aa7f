import pytest
import torch
import torch.nn.functional as F

from gdn2.layers import GatedDeltaNet, GatedDeltaNet2, KimiDeltaAttention
from gdn2.ops import gated_delta_rule

FAMILY = (GatedDeltaNet2, GatedDeltaNet, KimiDeltaAttention)
D, H, HV, K, V = 24, 2, 4, 8, 6
EXACT = {"rtol": 1e-10, "atol": 1e-12}  # float64: only the order of sums differs


def build(layer, **options):
    torch.manual_seed(0)
    options = {"num_v_heads": HV, "head_k_dim": K, "head_v_dim": V} | options
    mixer = layer(D, H, **options).double()
    for parameter in mixer.parameters():  # larger than at the start, so that every gate matters
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.5)
    return mixer


def inputs(*shape):
    return torch.randn(*shape, D, dtype=torch.float64)


def assert_states_close(state, expected):
    for x, y in zip(state, expected, strict=True):
        torch.testing.assert_close(x, y, **EXACT)


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
    rate = mixer.A_log.exp()
    b = mixer.b_proj(x).sigmoid()
    if layer is GatedDeltaNet2:
        decay = -rate[:, None] * F.softplus(mixer.f_proj(x) + mixer.dt_bias).view(2, 9, H, K)
        erase, write = b.view(2, 9, H, K), mixer.w_proj(x).sigmoid().view(2, 9, HV, V)
    elif layer is KimiDeltaAttention:
        decay = -rate[:, None] * F.softplus(mixer.f_proj(x) + mixer.dt_bias).view(2, 9, HV, K)
        erase, write = b, b
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
@pytest.mark.parametrize("split", [0, 1, 2, 40, 69, 70])
def test_split_sequence_equals_whole(layer, split):
    mixer, x = build(layer), inputs(2, 70)
    y, state = mixer(x)
    first, middle = mixer(x[:, :split])
    before = [s.clone() for s in middle]
    second, end = mixer(x[:, split:], state=middle)
    torch.testing.assert_close(torch.cat([first, second], 1), y, **EXACT)
    assert_states_close(end, state)
    assert all(torch.equal(s, old) for s, old in zip(middle, before, strict=True))


@pytest.mark.parametrize("layer", FAMILY)
@pytest.mark.parametrize("prefill", [0, 1, 65])
@torch.no_grad()
def test_step_equals_sequence(layer, prefill):
    mixer, x = build(layer), inputs(2, prefill + 6)
    y, expected = mixer(x)
    _, state = mixer(x[:, :prefill])
    for t in range(prefill, x.shape[1]):
        out, state = mixer.step(x[:, t], state)
        torch.testing.assert_close(out, y[:, t], **EXACT)
    assert_states_close(state, expected)


@pytest.mark.parametrize("layer", FAMILY)
def test_packed_equals_separate(layer):
    mixer, lengths = build(layer), [3, 0, 70, 1]
    x, before = inputs(1, sum(lengths)), mixer(inputs(4, 5))[1]
    cu_seqlens = torch.tensor([0, 3, 3, 73, 74])
    y, state = mixer(x, state=before, cu_seqlens=cu_seqlens)
    for i, (start, length) in enumerate(zip(cu_seqlens, lengths, strict=False)):
        row = slice(int(start), int(start) + length)
        alone, end = mixer(x[:, row], state=before.select(torch.tensor([i])))
        torch.testing.assert_close(y[:, row], alone, **EXACT)
        assert_states_close([s[i : i + 1] for s in state], end)


@pytest.mark.parametrize("layer", FAMILY)
def test_future_tokens_cannot_change_past_outputs(layer):
    mixer, x = build(layer).float(), inputs(1, 80).float()
    changed = x.clone()
    changed[:, 37:] = 5.0
    assert torch.equal(mixer(x)[0][:, :37], mixer(changed)[0][:, :37])


@pytest.mark.parametrize("layer", FAMILY)
def test_under_autocast_decay_and_state_stay_float32(layer):
    mixer, x = build(layer).float(), inputs(2, 20).float()
    with torch.autocast("cpu", torch.bfloat16):
        y, state = mixer(x)
        gates = mixer.gates(mixer.project(x))
    assert y.dtype == torch.bfloat16
    assert [gate.dtype for gate in gates] == [torch.float32, torch.bfloat16, torch.bfloat16]
    assert state.state.dtype == torch.float32
    exact = mixer.gates(mixer.project(x))
    for gate, truth in zip(gates, exact, strict=True):  # not more than the bf16 products cost
        assert (gate - truth).abs().max() / truth.abs().max() < 0.02


def test_erase_range_doubles_the_erase_gate():
    x = inputs(1, 5)
    one, two = build(GatedDeltaNet2), build(GatedDeltaNet2, erase_range=2.0)
    torch.testing.assert_close(two.gates(two.project(x)).erase, 2 * one.gates(one.project(x)).erase)
    torch.testing.assert_close(two.gates(two.project(x)).write, one.gates(one.project(x)).write)


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
    ],
)
def test_wrong_sizes_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        GatedDeltaNet2(D, H, **options)


def test_gate_means_are_recorded():
    mixer, x = build(GatedDeltaNet2), inputs(2, 10)
    mixer(x)
    gates = mixer.gates(mixer.project(x))
    expected = {
        "decay": gates.log_decay.exp().mean(),
        "erase": gates.erase.mean(),
        "write": gates.write.mean(),
    }
    torch.testing.assert_close(mixer.gate_means, expected)
    assert not any(mean.requires_grad for mean in mixer.gate_means.values())
    recorded = dict(mixer.gate_means)
    mixer.eval()(2 * x)
    assert mixer.gate_means == recorded
