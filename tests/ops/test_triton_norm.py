"""The gated RMS norm in Triton, interpreted or on a GPU, against float64 and PyTorch's form."""

from functools import partial

import pytest
import torch
from compilers import BACKENDS as COMPILERS
from fused_cases import assert_as_exact_as_composed, randn, results
from operator_cases import assert_same_bits
from triton_device import DEVICE, MARKS, ON_GPU

from gdn2.ops import gated_rms_norm

pytestmark = MARKS
ROWS = 128  # of a program that goes back
SHAPES = [(2, 37, 3, 24), (2 * ROWS + 45, 64), (3, 2, 600), (2, 1024), (7,), (4, 3)]
if ON_GPU:
    SHAPES += [(2, 4099, 16, 128), (1, 1000, 4, 256)]
ALL = ("x", "gate", "weight")


def inputs(*shape: int, seed: int = 0) -> dict:
    shapes = (shape, shape, shape[-1:])
    return {
        name: randn(*s, device=DEVICE, seed=seed + i)
        for i, (name, s) in enumerate(zip(ALL, shapes, strict=True))
    }


def projected(*leading: int) -> dict:
    """x and gate as slices of one projection: 4 heads of 32 channels."""
    wide = randn(*leading, 320, device=DEVICE)
    x, gate = (t.unflatten(-1, (4, 32)) for t in (wide[..., 32:160], wide[..., 160:288]))
    return {"x": x, "gate": gate, "weight": randn(32, device=DEVICE, seed=1)}


@pytest.mark.parametrize("activation", ["silu", "sigmoid"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_is_as_exact_as_the_composed_form(shape, activation):
    assert_as_exact_as_composed(gated_rms_norm, inputs(*shape), activation=activation, eps=1e-4)


@pytest.mark.parametrize("activation", ["silu", "sigmoid"])
def test_extremes_stay_right(activation):
    tensors = inputs(6, 5, 16)
    tensors["x"][:3, 2:] = 0.0
    tensors["x"][3] *= 1e6
    tensors["x"][4] *= 1e-6
    tensors["gate"][:, 1] = 100.0
    tensors["gate"][:, 3] = -100.0
    assert_as_exact_as_composed(gated_rms_norm, tensors, activation=activation)


@pytest.mark.parametrize("rounded", [ALL, ("x", "gate"), ("x",), ("gate",)], ids=str)
def test_half_precision_is_as_exact_as_the_composed_form(rounded, half):
    tensors = inputs(2, 40, 3, 64)
    tensors = {n: x.to(half) if n in rounded else x for n, x in tensors.items()}
    assert_as_exact_as_composed(gated_rms_norm, tensors)


@pytest.mark.parametrize("leading", [(2, 9), (9,)], ids=["sequences", "one token"])
def test_projections_are_read_where_they_are(leading):
    from gdn2.ops.triton.layout import matrix

    tensors = projected(*leading)
    for x in (tensors["x"], tensors["gate"], tensors["x"][..., 0, :]):
        assert matrix(x).data_ptr() == x.data_ptr()
    apart = {n: x.contiguous() for n, x in tensors.items()}
    want = results(gated_rms_norm, apart, backend="triton")
    for other in (tensors, {**apart, "gate": tensors["gate"]}, {**apart, "x": tensors["x"]}):
        for name, got in results(gated_rms_norm, other, backend="triton").items():
            assert_same_bits(got, want[name], name)


def test_any_strides_give_the_same():
    apart = inputs(3, 5, 4, 16)
    want = results(gated_rms_norm, apart, backend="triton")
    turned = {
        n: x.transpose(0, -2).contiguous().transpose(0, -2) for n, x in apart.items() if x.ndim > 1
    }
    inside = {n: torch.stack([x, x], -1)[..., 0] for n, x in apart.items()}
    for other in (apart | turned, inside):
        for name, got in results(gated_rms_norm, other, backend="triton").items():
            assert got.is_contiguous()
            assert_same_bits(got, want[name], name)


def test_a_row_is_the_same_whatever_is_beside_it():
    tensors = inputs(3 * ROWS + 5, 32)
    whole = results(gated_rms_norm, tensors, backend="triton")
    some = {n: x[200:217] if x.ndim > 1 else x for n, x in tensors.items()}
    alone = gated_rms_norm(**some, backend="triton")
    assert_same_bits(alone, whole["y"][200:217], "y")


@pytest.mark.parametrize("shape", [(0, 16), (2, 0, 3, 16)], ids=str)
def test_nothing_gives_nothing(shape):
    got = results(gated_rms_norm, inputs(*shape), backend="triton")
    assert got["y"].shape == got["d_x"].shape == got["d_gate"].shape == shape
    assert not got["d_weight"].any()


def test_no_result_comes_from_uninitialised_memory():
    torch.use_deterministic_algorithms(True)  # torch then fills every empty tensor with NaN
    try:
        got = [results(gated_rms_norm, inputs(ROWS + 3, 24), backend="triton") for _ in range(2)]
    finally:
        torch.use_deterministic_algorithms(False)
    for name, x in got[0].items():
        assert x.isfinite().all()
        assert_same_bits(x, got[1][name], name)


def test_is_a_proper_operator():
    for tensors in (inputs(5, 24), projected(2, 3)):
        results(gated_rms_norm, tensors, backend="triton")  # registers it
        x, gate, weight = (t.detach().requires_grad_() for t in tensors.values())
        forward = torch.ops.gdn2.triton_gated_rms_norm.default
        torch.library.opcheck(forward, (x, gate, weight, 1e-5, True))
        x, gate, weight = (t.detach() for t in (x, gate, weight))
        backward = torch.ops.gdn2.triton_gated_rms_norm_backward.default
        torch.library.opcheck(backward, (torch.ones_like(x), x, gate, weight, 1e-5, False))


@pytest.mark.parametrize("compiler", COMPILERS)
def test_compiles_whole(compiler):
    call = partial(gated_rms_norm, backend="triton")
    tensors = projected(2, 9)
    want = results(call, tensors)
    torch._dynamo.reset()
    got = results(torch.compile(call, backend=compiler, fullgraph=True), tensors)
    for name, x in want.items():
        assert_same_bits(got[name], x, name)


def test_other_derivatives_are_refused():
    tensors = inputs(3, 16)
    x = tensors.pop("x").requires_grad_()
    y = gated_rms_norm(x, **tensors, backend="triton")
    with pytest.raises(RuntimeError, match="no gradient of its own"):
        torch.autograd.grad(y.sum(), x, create_graph=True)
    call = partial(gated_rms_norm, **tensors, backend="triton")
    with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
        torch.func.jvp(call, (x.detach(),), (x.detach(),))


def test_too_many_channels_are_refused():
    with pytest.raises(NotImplementedError, match="up to 1024 channels, got 1025"):
        gated_rms_norm(**inputs(2, 1025), backend="triton")


def test_no_epsilon_and_rows_that_fill_no_tile():
    names = ("x", "gate", "weight")
    shapes = ((5, 16), (5, 16), (16,))
    tensors = {n: randn(*s, device=DEVICE) for n, s in zip(names, shapes, strict=True)}
    assert_as_exact_as_composed(gated_rms_norm, tensors, eps=0.0)
