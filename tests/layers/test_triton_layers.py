"""Whole layers on the Triton kernels, in their interpreter or on a GPU."""

from functools import partial
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from operator_cases import assert_same_bits
from torch.utils.checkpoint import checkpoint
from triton_device import DEVICE, MARKS

from gdn2.layers import (
    DeltaNet,
    GatedDeltaNet,
    GatedDeltaNet2,
    KimiDeltaAttention,
    Mamba2,
    Mamba3,
)
from gdn2.modules import linear
from gdn2.ops.backends import FASTEST

pytestmark = MARKS
D, T = 48, 23
DELTA = {"num_v_heads": 2, "head_k_dim": 16, "head_v_dim": 16}
MAMBA = {"head_dim": 16, "state_size": 16}
FAMILY = {
    "gdn2": (GatedDeltaNet2, 1, DELTA),
    "kda": (KimiDeltaAttention, 1, DELTA),
    "gated_deltanet": (GatedDeltaNet, 1, DELTA),
    "deltanet": (DeltaNet, 1, DELTA),
    "mamba2": (Mamba2, 32, MAMBA),
    "mamba3": (Mamba3, 32, MAMBA | {"mimo_rank": 2}),
}
BOUNDS = (0, 5, 5, T)


@pytest.fixture
def kernels(monkeypatch):
    """The layers then ask for them, and join their maps."""
    monkeypatch.setitem(FASTEST, DEVICE, "triton")
    monkeypatch.setattr(linear, "_pays", lambda _: True)


def build(name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    layer, size, options = FAMILY[name]
    return layer(D, size, **options).to(DEVICE)


def results(layer: torch.nn.Module, x: torch.Tensor, *, packed: bool, call=None) -> dict:
    """Outputs, states and gradients; the sequence goes on from a state."""
    layer.zero_grad()
    x = x.detach().requires_grad_()
    bounds = torch.tensor(BOUNDS, device=DEVICE) if packed else None
    batch = len(BOUNDS) - 1 if packed else len(x)
    with torch.no_grad():
        _, state = layer(x.detach()[:1, :4].expand(batch, 4, D))
    y, end = (layer if call is None else call)(x, state=state, cu_seqlens=bounds)
    # With a mean: sums over all tokens would be luck where they cancel.
    slopes = torch.linspace(0, 2, y.numel(), device=DEVICE, dtype=torch.float64).view_as(y)
    (y.double() * slopes).sum().backward()
    grads = {f"d_{n}": p.grad for n, p in layer.named_parameters()}
    return {"y": y.detach(), **end._asdict(), "d_x": x.grad, **grads}


def rms(x: torch.Tensor) -> float:
    return x.double().square().mean().sqrt().item()


def true_results(layer: torch.nn.Module, x: torch.Tensor, *, packed: bool) -> tuple[dict, float]:
    """In float64; and how large the terms are that gradients of a number a head are sums of."""
    steps = []

    def softplus(x: torch.Tensor) -> torch.Tensor:  # of step sizes, and of Mamba-3's rates
        if x.requires_grad:
            x.retain_grad()
            steps.append(x)
        return plain(x)

    plain = F.softplus
    with mock.patch.object(F, "softplus", softplus):
        truth = results(layer.double(), x.double(), packed=packed)
    return truth, max((step.grad.abs().sum().item() for step in steps), default=0.0)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("layer", FAMILY)
def test_a_layer_is_as_exact_as_in_pytorch(layer, packed, request):
    torch.manual_seed(1)
    x = torch.randn(1 if packed else 2, T, D, device=DEVICE)
    plain = results(build(layer), x, packed=packed)
    truth, terms = true_results(build(layer), x, packed=packed)
    request.getfixturevalue("kernels")
    got = results(build(layer), x, packed=packed)
    for name, true in truth.items():
        one_a_head = name in ("d_A_log", "d_dt_bias") and true.numel() <= 2  # their terms cancel
        size = terms if one_a_head else rms(true)
        allowed = 2 * max(rms(plain[name] - true), 4 * torch.finfo(torch.float32).eps * size)
        assert rms(got[name] - true) <= allowed, name
    assert not torch.equal(got["y"], plain["y"])  # other kernels


@pytest.mark.parametrize("mode", ["autocast", "cast"])
@pytest.mark.parametrize("layer", FAMILY)
def test_a_layer_in_mixed_precision(layer, mode, kernels):
    """Under autocast, or with its parameters in half precision as FSDP2 gives them."""
    torch.manual_seed(1)
    x = torch.randn(2, T, D, device=DEVICE)
    mixed = build(layer)
    if mode == "cast":
        x, mixed = x.half(), mixed.half()
    truth = results(build(layer).double(), x.double(), packed=False)
    with torch.autocast(DEVICE, torch.float16, enabled=mode == "autocast"):
        got = results(mixed, x, packed=False)
    assert (got["y"].dtype, got["state"].dtype) == (torch.float16, torch.float32)
    for name, true in truth.items():
        if name != "d_A_log":  # terms that may cancel
            assert rms(got[name].double() - true) < 6e-3 * rms(true), name


def test_a_layer_asks_for_every_kernel(kernels, monkeypatch):
    from gdn2.ops.triton import launch

    launched = set()
    record = launch.launch

    def spy(kernel, *arguments, **options):
        launched.add(kernel.__name__)
        record(kernel, *arguments, **options)

    for module in ("sequences", "normed_conv", "gates", "norm"):
        monkeypatch.setattr(f"gdn2.ops.triton.{module}.launch", spy)
    results(build("gdn2"), torch.randn(2, T, D, device=DEVICE), packed=False)
    assert launched >= {
        *("prepare_under_channel_decay", "scan", "scan_back", "gradients_under_channel_decay"),
        *("normed_conv", "normed_conv_backward", "decay", "decay_back"),
        *("sigmoid_gate", "sigmoid_gate_back", "gated_norm", "gated_norm_back"),
    }
    launched.clear()
    results(build("mamba2"), torch.randn(2, T, D, device=DEVICE), packed=False)
    assert launched >= {"prepare_under_head_decay", "normed_conv", "normed_conv_backward"}


def test_a_checkpointed_layer_gives_the_same_bits(kernels):
    layer, x = build("gdn2"), torch.randn(2, T, D, device=DEVICE)
    want = results(layer, x, packed=False)
    got = results(layer, x, packed=False, call=partial(checkpoint, layer, use_reentrant=False))
    for name in want:
        assert_same_bits(got[name], want[name], name)


def test_a_compiled_layer(kernels):
    layer, x = build("gdn2"), torch.randn(2, T, D, device=DEVICE)
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    want = results(layer, x, packed=False)
    got = results(layer, x, packed=False, call=compiled)
    for name, x in want.items():
        torch.testing.assert_close(got[name], x, rtol=1e-4, atol=1e-5)
