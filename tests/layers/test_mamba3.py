import math

import pytest
import torch
import torch.nn.functional as F
from recurrent_layers import HV, MAMBA, D, K, V, build, inputs

from gdn2.layers import Mamba2, Mamba3
from gdn2.layers.mamba3 import accumulate

EXACT = {"rtol": 1e-9, "atol": 1e-10}
SHAPES = [
    pytest.param(R, options, id=f"rank {R}, {' '.join(map(str, options.values()))}")
    for R in (1, 2, 4)
    for options in (
        {"num_groups": 1, "rope_fraction": 0.5},
        {"num_groups": 2, "rope_fraction": 1.0, "output_norm": True},
        {"num_groups": 4, "rope_fraction": 0.75, "ssm_decay": "rational"},
    )
]


def token_loop(layer, x, ssm_decay="softplus", **_):
    """The recurrence as it is published, with both end points of each step written at once:

    S_t = alpha_t S_{t-1} + sum_r (alpha_t nu_t k_{t-1,r} v_{t-1,r}^T + zeta_t k_{t,r} v_{t,r}^T)
    """
    R, H, A, B = layer.mimo_rank, layer.num_heads, layer.num_angles, len(x)

    def turned(y, angle):
        channels = list(y.unbind(-1))
        for i in range(A):
            a, b = (2 * i, 2 * i + 1) if R == 1 else (i, i + K // 2)
            z = torch.complex(channels[a], channels[b]) * torch.exp(1j * angle[:, None, :, i])
            channels[a], channels[b] = z.real, z.imag
        return torch.stack(channels, -1)

    def per_head(y, norm, bias, angle):
        y = y.view(B, R, -1, K)
        y = y / (y.square().mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight
        return turned(y.repeat_interleave(H // y.shape[2], 2) + bias.transpose(0, 1), angle)

    def per_rank(y, name):
        y = y.view(B, 1, H, V)
        return y if R == 1 else y * getattr(layer, name).transpose(0, 1)

    state, angle = x.new_zeros(B, H, K, V), x.new_zeros(B, H, A)
    before = x.new_zeros(B, H, K, V)  # sum of k v^T of the token before
    out = []
    for t in range(x.shape[1]):
        maps = layer.in_proj(x[:, t])
        keys = (maps.shape[1] - 2 * H * V - 3 * H - A) // 2
        z, v, k, q, dt, a, trap, theta = maps.split([H * V, H * V, keys, keys, H, H, H, A], -1)
        dt = F.softplus(dt + layer.dt_bias)
        rate = F.softplus(a) if ssm_decay == "softplus" else torch.where(a < 0, 1 / (1 - a), 1 + a)
        alpha, share = torch.exp(-rate.clamp(min=1e-4) * dt), trap.sigmoid()
        angle = angle + math.pi * dt[..., None] * theta.tanh()[:, None]
        k = per_head(k, layer.B_norm, layer.B_bias, angle)
        q = per_head(q, layer.C_norm, layer.C_bias, angle)
        v = per_rank(v, "mimo_x")
        now = torch.einsum("brhk,brhv->bhkv", k, v)
        old, new = (alpha * (1 - share) * dt)[..., None, None], (share * dt)[..., None, None]
        state = alpha[..., None, None] * state + old * before + new * now
        before = now
        y = torch.einsum("bhkv,brhk->brhv", state, q) + layer.D[:, None] * v
        if layer.norm is not None:
            y = y / (y.square().mean(-1, keepdim=True) + 1e-5).sqrt()
            y = y * layer.norm.weight.view(H, V)
        y = y * F.silu(per_rank(z, "mimo_z"))
        y = y if R == 1 else y * layer.mimo_o.transpose(0, 1)
        out.append(layer.out_proj(y.sum(1).flatten(1)))
    return torch.stack(out, 1), state


@pytest.mark.parametrize(("R", "options"), SHAPES)
def test_layer_is_the_published_recurrence(R, options):
    layer, x = build(Mamba3, HV * V, MAMBA | options, mimo_rank=R), inputs(2, 70)
    truth, state = token_loop(layer, x, **options)
    y, end = layer(x)
    torch.testing.assert_close(y, truth, **EXACT)
    # what the layer has still to write of the last token
    v = end.value.unsqueeze(1)
    v = v if R == 1 else v * layer.mimo_x.transpose(0, 1)
    last = torch.einsum("nrhk,nrhv->nhkv", end.key, v) * end.weight[..., None, None]
    torch.testing.assert_close(end.state + last, state, **EXACT)


@pytest.mark.parametrize(("R", "options"), SHAPES)
def test_gradients_are_those_of_the_published_recurrence(R, options):
    layer, x = build(Mamba3, HV * V, MAMBA | options, mimo_rank=R), inputs(2, 9).requires_grad_()
    upstream, leaves = inputs(2, 9), [x, *layer.parameters()]
    ours, truth = (
        torch.autograd.grad((y * upstream).sum(), leaves)
        for y in (layer(x)[0], token_loop(layer, x, **options)[0])
    )
    for got, expected in zip(ours, truth, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-7, atol=1e-9)


def test_the_slowest_decay():
    layer, x = build(Mamba3, HV * V, MAMBA), inputs(2, 30)
    before = sum(layer.sizes[:5])
    with torch.no_grad():
        layer.in_proj.weight[before : before + HV] *= 20  # of a: half of the rates are next to 0
    rate = F.softplus(layer.in_proj(x)[..., before : before + HV])
    assert 0.2 < (rate < 1e-4).double().mean() < 0.8
    torch.testing.assert_close(layer(x)[0], token_loop(layer, x)[0], **EXACT)


def test_with_narrow_maps_weights_and_angles_are_float32():
    layer, x = build(Mamba3, HV * V, MAMBA).float(), inputs(1, 40).float()
    narrow = layer.in_proj(x).detach().bfloat16()
    for maps in (narrow, narrow.double()):
        layer.to(torch.float64 if maps.dtype == torch.float64 else torch.float32)
        layer.in_proj = torch.nn.Identity()
        layer.out_proj = torch.nn.Identity()
        _, state = layer(maps)
        if maps is narrow:
            got = state
    for name in ("weight", "angle"):
        value, truth = getattr(got, name), getattr(state, name)
        assert value.dtype == torch.float32
        torch.testing.assert_close(value.double(), truth, rtol=1e-6, atol=1e-5)


def test_every_norm_has_the_epsilon():
    layer = Mamba3(D, 48, head_dim=6, state_size=8, output_norm=True, norm_eps=0.1)
    assert layer.norm.eps == layer.B_norm.eps == layer.C_norm.eps == 0.1


def test_a_state_of_other_sequences_is_refused():
    layer = build(Mamba3, HV * V, MAMBA)
    _, state = layer(inputs(2, 3))
    with pytest.raises(ValueError, match="state must be that of 3 sequences, got 2"):
        layer(inputs(3, 1), state=state)
    with torch.no_grad(), pytest.raises(ValueError, match="that of 3 sequences, got 2"):
        layer.step(inputs(3), state)


def test_without_rotation_and_second_weight_it_is_mamba2s_recurrence():
    layer, x = build(Mamba3, HV * V, MAMBA), inputs(1, 20)
    H, A = layer.num_heads, layer.num_angles
    with torch.no_grad():
        layer.in_proj.weight[-A:] = 0  # no angle
        layer.in_proj.weight[-A - H : -A] = 0
        x = torch.cat([x[..., :-1], torch.ones_like(x[..., :1])], -1)
        layer.in_proj.weight[-A - H : -A, -1] = 50  # all weight on the token itself
        layer.in_proj.weight[-A - 2 * H : -A - H] = 0  # a rate of decay of log 2
    maps = layer.in_proj(x)
    _, v, k, q, dt, *_ = maps.split(layer.sizes, -1)
    v = v.view(1, 20, H, V)
    k, q = (
        (norm(y.view(1, 20, 2, K)).repeat_interleave(H // 2, 2) + bias[:, 0])
        for y, norm, bias in ((k, layer.B_norm, layer.B_bias), (q, layer.C_norm, layer.C_bias))
    )
    other = Mamba2(D, HV * V, **MAMBA).double()
    with torch.no_grad():
        other.dt_bias.copy_(layer.dt_bias)
        other.A_log.fill_(math.log(math.log(2)))
    gates, state = other.gates(dt), 0
    for t in range(20):
        state = gates.log_decay[:, t, :, None, None].exp() * state
        state = state + k[:, t, ..., None] * (gates.write[:, t, :, None] * v[:, t])[..., None, :]
    _, end = layer(x)
    last = (end.key[:, 0, ..., None] * end.value[..., None, :]) * end.weight[..., None, None]
    torch.testing.assert_close(end.state + last, state, **EXACT)


def test_it_has_the_official_parameter_names_and_shapes():
    layer = Mamba3(24, 48, head_dim=6, state_size=8, num_groups=2, mimo_rank=3, output_norm=True)
    mimo = dict.fromkeys(("mimo_x", "mimo_z", "mimo_o"), (8, 3, 6))
    assert {name: tuple(p.shape) for name, p in layer.named_parameters()} == mimo | {
        "in_proj.weight": (48 + 48 + 2 * 3 * 2 * 8 + 3 * 8 + 2, 24),
        "dt_bias": (8,),
        "B_bias": (8, 3, 8),
        "C_bias": (8, 3, 8),
        "B_norm.weight": (8,),
        "C_norm.weight": (8,),
        "D": (8,),
        "norm.weight": (48,),
        "out_proj.weight": (24, 48),
    }


@pytest.mark.parametrize(
    ("R", "parameters", "side"), [(1, 29_094_144, 9216), (4, 30_052_608, 21_504)]
)
def test_parameters_and_state_at_full_size(R, parameters, side):
    with torch.device("meta"):
        layer = Mamba3(2304, 4096, mimo_rank=R)
        _, state = layer(torch.empty(1, 5, 2304))
    assert sum(p.numel() for p in layer.parameters()) == parameters
    assert state.state.numel() == 262_144
    assert sum(state[i].numel() for i in (1, 2, 4)) == side
    assert state.weight.numel() == 64


def test_it_starts_from_the_published_laws():
    layer = Mamba3(D, 64 * 64, mimo_rank=4)
    step = F.softplus(layer.dt_bias)
    assert 0.99e-3 < step.min() < step.max() < 1.01e-1
    for parameter, start in (
        (layer.B_bias, 1),
        (layer.C_bias, 1),
        (layer.D, 1),
        (layer.mimo_x, 0.25),
        (layer.mimo_z, 1),
        (layer.mimo_o, 0.25),
    ):
        assert (parameter == start).all()


def test_angles_of_long_sequences_keep_their_digits():
    """Added one by one in float32, these turns would be wrong by 28."""
    turn = torch.full((1, 100_000, 1, 1), 0.3)
    angles, last = accumulate(turn, torch.zeros(1, 1, 1), None)
    truth = turn[0, :, 0, 0].double().cumsum(0).remainder(2 * math.pi)
    off = (angles[0, :, 0, 0] - truth).abs()
    assert torch.minimum(off, 2 * math.pi - off).max() < 1e-6
    assert angles.dtype == last.dtype == torch.float32
    assert angles.min() >= 0
    assert angles.max() <= 2 * math.pi
    for t in range(100):  # a token at a time: what is carried is rounded
        _, last = accumulate(turn[:, :1], last, None)
        off = (last - (truth[-1] + 0.3 * (t + 1)).remainder(2 * math.pi)).abs()
        assert torch.minimum(off, 2 * math.pi - off).max() < 1e-4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"inner_size": 50}, "inner_size must be a positive multiple of head_dim x num_groups"),
        ({"mimo_rank": 0}, "mimo_rank must be 1 to 16, got 0"),
        ({"mimo_rank": 17}, "mimo_rank must be 1 to 16, got 17"),
        ({"rope_fraction": 1.5}, r"rope_fraction must be in \(0, 1\] .* got 1.5"),
        ({"rope_fraction": 0.1}, "rotate at least one pair of the state_size = 8 .* got 0.1"),
        ({"ssm_decay": "exp"}, r"ssm_decay must be one of \('softplus', 'rational'\), got 'exp'"),
    ],
)
def test_wrong_settings_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Mamba3(D, **{"inner_size": 48, "head_dim": 6, "state_size": 8} | options)
