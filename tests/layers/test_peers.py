"""Whole layers and Mamba's cores against other projects' implementations (`make peers`).

In float64 the numbers are equal to rounding; theirs then run with float64 where they say float32.
"""

import math

import peers
import pytest
import torch
import torch.nn.functional as F
from operator_cases import error
from recurrent_layers import HV, LAYERS, MAMBA, D, H, K, V, build, inputs
from transformers import DynamicCache

from gdn2.layers import KimiDeltaAttention, Mamba2, Mamba3
from gdn2.models import export_weights
from gdn2.ops import gated_delta_rule, gated_delta_step

pytestmark = pytest.mark.peer

T, STEPS = 70, 3  # longer than a chunk of theirs and ours
LIMIT = {torch.float64: 1e-12, torch.float32: 1e-5}
DTYPES = pytest.mark.parametrize("dtype", LIMIT, ids=str)


def qwen3_next():
    config = peers.load_config("Qwen3NextConfig")(
        hidden_size=D,
        num_hidden_layers=1,
        layer_types=["linear_attention"],
        linear_num_key_heads=H,
        linear_num_value_heads=HV,
        linear_key_head_dim=K,
        linear_value_head_dim=V,
        rms_norm_eps=1e-5,
    )
    return build(*LAYERS["gated_deltanet"]), config, "Qwen3NextGatedDeltaNet"


def kimi_linear():
    config = peers.load_config("KimiLinearConfig")(
        hidden_size=D,
        num_hidden_layers=1,
        layer_types=["linear_attention"],
        linear_num_heads=H,
        linear_head_dim=K,
        rms_norm_eps=1e-5,
    )
    return build(KimiDeltaAttention, H, {"head_k_dim": K}), config, "KimiLinearDeltaAttention"


def mamba2(groups):
    config = peers.load_config("Mamba2Config")(
        hidden_size=D,
        num_hidden_layers=1,
        num_heads=2 * HV,
        head_dim=V,
        state_size=K,
        n_groups=groups,
        chunk_size=32,
    )
    options = MAMBA | {"num_groups": groups}
    return build(Mamba2, 2 * D, options), config, "Mamba2Mixer"


LAYER_PEERS = {
    "qwen3_next": ("qwen3_next", qwen3_next),
    "kimi_linear": ("kimi_linear", kimi_linear),
    "mamba2": ("mamba2", lambda: mamba2(1)),
    "mamba2_groups": ("mamba2", lambda: mamba2(2)),
}


def pair(name, dtype):
    """Our layer and theirs, with the same weights, and a cache of theirs."""
    module, make = LAYER_PEERS[name]
    ours, config, kind = make()
    theirs = getattr(peers.load_transformers(module, dtype == torch.float64), kind)
    theirs = theirs(config, layer_idx=0).to(dtype).eval()
    form = "transformers_mamba2" if module == "mamba2" else module
    theirs.load_state_dict(export_weights(ours.to(dtype), form))
    return ours, theirs, DynamicCache(config=config)


def assert_close(got, expected):
    worst = error(got, expected)
    assert got.dtype == expected.dtype
    assert worst <= LIMIT[expected.dtype], worst


def assert_same_memory(state, cache):
    """Of the convolutions theirs keeps one token more than is ever read."""
    layer = cache.layers[0]
    memory, conv = layer.recurrent_states[0], layer.conv_states[0]
    assert_close(state[0], memory.mT if len(state) == 2 else memory)  # Mamba-2's is [HV, V, K]
    assert_close(torch.cat(state[1:], 1), conv[..., 1:])


@DTYPES
@pytest.mark.parametrize("name", LAYER_PEERS)
def test_layer_and_its_gradient_are_theirs(name, dtype):
    ours, theirs, _ = pair(name, dtype)
    x = inputs(2, T).to(dtype).requires_grad_()
    got, expected = ours(x)[0], theirs(x)
    assert_close(got, expected)
    upstream = torch.randn_like(x)
    (d_got,), (d_expected,) = (
        torch.autograd.grad((y * upstream).sum(), x) for y in (got, expected)
    )
    assert_close(d_got, d_expected)


@DTYPES
@pytest.mark.parametrize("name", LAYER_PEERS)
@torch.no_grad()
def test_prefill_and_decoding_are_theirs(name, dtype):
    ours, theirs, cache = pair(name, dtype)
    x = inputs(2, T + STEPS).to(dtype)
    y, state = ours(x[:, :T])
    assert_close(y, theirs(x[:, :T], cache_params=cache))
    assert_same_memory(state, cache)
    for t in range(T, T + STEPS):
        y, state = ours.step(x[:, t], state)
        assert_close(y, theirs(x[:, t : t + 1], cache_params=cache)[:, 0])
    assert_same_memory(state, cache)


SSD = "mamba_ssm/ops/triton/"


def mamba2_core(dtype):
    """q, k ``[2, T, 2, K]``, v ``[2, T, HV, V]``, dt ``[2, T, HV]``, rates ``[HV]``."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 96, heads, n) for heads, n in ((2, K), (2, K), (HV, V)))
    dt = F.softplus(torch.randn(2, 96, HV) - 2)
    rate = 1 + 4 * torch.rand(HV)
    state = torch.randn(2, HV, K, V)
    return [x.to(dtype) for x in (q, k, v, dt, rate, state)]


@DTYPES
def test_core_is_the_listing_of_mamba2(dtype):
    peer = peers.load_functions(
        "mamba-ssm",
        dtype == torch.float64,
        "mamba_ssm/modules/ssd_minimal.py:segsum",
        "mamba_ssm/modules/ssd_minimal.py:ssd_minimal_discrete",
    )
    q, k, v, dt, rate, state = mamba2_core(dtype)
    per_head = (x.repeat_interleave(HV // 2, 2) for x in (k, q))
    expected, expected_state = peer.ssd_minimal_discrete(
        v * dt[..., None], -rate * dt, *per_head, 32, initial_states=state.mT[:, None]
    )
    got, got_state = gated_delta_rule(q, k, v, log_decay=-rate * dt, write=dt, state=state)
    assert_close(got, expected)
    assert_close(got_state, expected_state.mT)


@DTYPES
def test_core_is_the_reference_of_mamba2(dtype):
    peer = peers.load_functions(
        "mamba-ssm",
        dtype == torch.float64,
        f"{SSD}ssd_chunk_state.py:chunk_state_ref",
        f"{SSD}ssd_state_passing.py:state_passing_ref",
        f"{SSD}ssd_chunk_scan.py:chunk_scan_ref",
        f"{SSD}ssd_combined.py:ssd_chunk_scan_combined_ref",
    )
    q, k, v, dt, rate, _ = mamba2_core(dtype)
    got, _ = gated_delta_rule(q, k, v, log_decay=-rate * dt, write=dt)
    assert_close(got, peer.ssd_chunk_scan_combined_ref(v, dt, -rate, k, q, 32))


@DTYPES
def test_step_is_the_reference_of_mamba2(dtype):
    peer = peers.load_functions(
        "mamba-ssm",
        dtype == torch.float64,
        f"{SSD}selective_state_update.py:selective_state_update_ref",
    )
    q, k, v, dt, rate, state = mamba2_core(dtype)
    expected_state = state.mT.clone()
    for t in range(5):
        expected = peer.selective_state_update_ref(
            expected_state,
            v[:, t],
            dt[:, t, :, None].expand(2, HV, V),
            -rate[:, None, None].expand(HV, V, K),
            k[:, t],
            q[:, t],
        )
        got, state = gated_delta_step(
            q[:, t], k[:, t], v[:, t], log_decay=-rate * dt[:, t], write=dt[:, t], state=state
        )
        assert_close(got, expected)
    assert_close(state, expected_state.mT)


def mamba3_tokens(layer, x, peer):
    """Mamba-3 by its two references of mamba-ssm; between them what its layer does, written here.

    Returns outputs, the state with the last token written, its key and value, and the angle.
    """
    R, H, N, dtype = layer.mimo_rank, layer.num_heads, len(x), x.dtype
    by_rank = {
        name: getattr(layer, name).transpose(0, 1) if R > 1 else x.new_ones(R, H, V)
        for name in ("mimo_x", "mimo_z", "mimo_o")
    }
    state, angle = x.new_zeros(N, H, V, K), x.new_zeros(N, H, layer.num_angles)
    key, value, out = x.new_zeros(N, R, H, K), x.new_zeros(N, H, V), []

    def normed(y, norm):
        y = y.view(N, R, -1, K)
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + 1e-5) * norm.weight
        return y.repeat_interleave(H // y.shape[2], 2)

    for t in range(x.shape[1]):
        keys = R * layer.num_groups * K
        sizes = [H * V, H * V, keys, keys, H, H, H, layer.num_angles]
        z, v, k, q, dt, a, trap, theta = layer.in_proj(x[:, t]).split(sizes, -1)
        z, v = z.view(N, H, V), v.view(N, H, V)
        dt = F.softplus(dt + layer.dt_bias)
        q, k, angle = peer.apply_rotary_qk_inference_reference(
            normed(q, layer.C_norm),
            normed(k, layer.B_norm),
            angle,
            theta[:, None].expand(N, H, -1),
            dt,
            bias_q=layer.C_bias.transpose(0, 1),
            bias_k=layer.B_bias.transpose(0, 1),
            rotate_pairwise=R == 1,
        )
        last = layer.norm is None  # or the norm comes between
        y, state = peer.selective_state_update_fused_ref_v2(
            *(state, -F.softplus(a).clamp(min=1e-4), k, q, by_rank["mimo_x"], v),
            *(by_rank["mimo_z"], z if last else None, dt, key, value, trap.sigmoid(), layer.D),
            by_rank["mimo_o"] if last else None,
            compute_dtype=dtype,
        )
        if not last:
            y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + 1e-5)
            y = y * layer.norm.weight.view(H, V) * F.silu(z[:, None] * by_rank["mimo_z"])
            y = (y * by_rank["mimo_o"]).sum(1)
        out.append(layer.out_proj(y.flatten(1)))
        key, value = k, v
    return torch.stack(out, 1), state.mT, key, value, angle


@DTYPES
@pytest.mark.parametrize("R", [1, 4])
@pytest.mark.parametrize(
    "options",
    [
        {"num_groups": 1, "rope_fraction": 0.5},
        {"num_groups": 4, "rope_fraction": 1.0, "output_norm": True},
    ],
    ids=["plain", "groups_and_norm"],
)
@torch.no_grad()
def test_mamba3_is_the_references_token_by_token(R, options, dtype):
    peer = peers.load_functions(
        "mamba-ssm",
        dtype == torch.float64,
        f"{SSD}mamba3/mamba3_mimo_rotary_step.py:apply_rotary_qk_inference_reference",
        "mamba_ssm/ops/cute/mamba3/mamba3_step_fn.py:selective_state_update_fused_ref_v2",
    )
    layer = build(Mamba3, HV * V, MAMBA | options, mimo_rank=R).to(dtype)
    x = inputs(2, 12).to(dtype)
    expected, *memory = mamba3_tokens(layer, x, peer)
    y, state = layer(x)
    assert_close(y, expected)
    y, state = layer(x[:, :7])
    for t in range(7, 12):
        y, state = layer.step(x[:, t], state)
        assert_close(y, expected[:, t])
    values = state.value[:, None] * (layer.mimo_x.transpose(0, 1) if R > 1 else 1)
    last = torch.einsum("nrhk,nrhv,nh->nhkv", state.key, values, state.weight)
    angle = memory.pop().remainder(2 * math.pi)  # ours is kept there
    got = (state.state + last, state.key, state.value, state.angle)
    for mine, other in zip(got, (*memory, angle), strict=True):
        assert_close(mine, other)
