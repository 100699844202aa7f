"""The gates in Triton, interpreted or on a GPU, against float64 and PyTorch's form."""

from functools import partial

import pytest
import torch
from compilers import BACKENDS as COMPILERS
from fused_cases import assert_as_exact_as_composed, randn, results, upstream
from operator_cases import assert_same_bits
from triton_device import DEVICE, MARKS, ON_GPU

from gdn2.ops.gates import gate, log_decay

pytestmark = MARKS
TOKENS = 128  # of a program that goes back
CHANNELS = [(2, 37, 3, 24), (1, 2 * TOKENS + 9, 2, 20), (1, 9, 4, 100), (5, 3, 8), (2, 1)]
HEADS = [(2, 300, 5), (4, 6), (3,)]
if ON_GPU:
    CHANNELS += [(2, 4099, 16, 128)]
    HEADS += [(2, 4099, 16)]
EPS = torch.finfo(torch.float32).eps


def decay_inputs(*shape: int, per_channel: bool = True) -> dict:
    heads = shape[-2] if per_channel else shape[-1]
    shapes = {
        "f": shape,
        "A_log": (heads, 1) if per_channel else (heads,),
        "dt_bias": shape[-2:] if per_channel else (heads,),
    }
    return {n: randn(*s, device=DEVICE, seed=i) for i, (n, s) in enumerate(shapes.items())}


def projected(*leading: int) -> dict:
    """f as a slice of one projection: 4 heads of 32 channels."""
    wide = randn(*leading, 320, device=DEVICE)
    return decay_inputs(1, 4, 32) | {"f": wide[..., 32:160].unflatten(-1, (4, 32))}


OPERATIONS = {
    "log_decay": (log_decay, lambda *shape: decay_inputs(*shape)),
    "gate": (partial(gate, maximum=2.0), lambda *shape: {"x": randn(*shape, device=DEVICE)}),
}
BOTH = pytest.mark.parametrize(("operation", "inputs"), OPERATIONS.values(), ids=OPERATIONS)


@pytest.mark.parametrize("shape", [*CHANNELS, *HEADS], ids=str)
def test_log_decay_is_as_exact_as_the_composed_form(shape):
    assert_as_exact_as_composed(log_decay, decay_inputs(*shape, per_channel=shape in CHANNELS))


@pytest.mark.parametrize("maximum", [1.0, 2.0])
@pytest.mark.parametrize("shape", [*CHANNELS, *HEADS], ids=str)
def test_gate_is_as_exact_as_the_composed_form(shape, maximum):
    assert_as_exact_as_composed(gate, {"x": 3 * randn(*shape, device=DEVICE)}, maximum=maximum)


def test_small_steps_keep_their_digits():
    """Relative to each number: from -80 on, where float32 has all of its digits."""
    f = torch.linspace(-80, 100, 1801, device=DEVICE)[:, None]
    tensors = {"f": f, "A_log": torch.full((1,), 0.3, device=DEVICE)}
    tensors["dt_bias"] = torch.zeros(1, device=DEVICE)
    got = results(log_decay, tensors, backend="triton")
    x, rate = f.double(), tensors["A_log"].double().exp()
    y = -rate * (x.clamp(min=0) + (-x.abs()).exp().log1p())
    dy = upstream(f.shape, DEVICE)
    for mine, true in ((got["y"], y), (got["d_f"], -rate * x.sigmoid() * dy)):
        assert ((mine - true) / true).abs().max() < 12 * EPS


def test_extremes_stay_right():
    edges = [-1e4, -200.0, -100.0, -20.0, 0.0, 20.0, 100.0, 200.0, 1e4]
    tensors = decay_inputs(9, 3, 16)
    tensors["f"] = tensors["f"] + torch.tensor(edges, device=DEVICE)[:, None, None]
    assert_as_exact_as_composed(log_decay, tensors)
    assert_as_exact_as_composed(gate, {"x": tensors["f"]})
    nonfinite = torch.tensor([[float("inf")], [-float("inf")], [float("nan")]], device=DEVICE)
    zero = torch.zeros(1, device=DEVICE)
    for call in (partial(log_decay, nonfinite, zero, zero), partial(gate, nonfinite)):
        torch.testing.assert_close(call(backend="triton"), call(), equal_nan=True)


@BOTH
@pytest.mark.parametrize("rounded", ["all", "inputs"])
def test_half_precision_is_as_exact_as_the_composed_form(operation, inputs, rounded, half):
    tensors = inputs(2, 40, 3, 24)
    tensors = {n: x.to(half) if rounded == "all" or x.ndim > 2 else x for n, x in tensors.items()}
    assert_as_exact_as_composed(operation, tensors)


@pytest.mark.parametrize("leading", [(2, 9), (9,)], ids=["sequences", "one token"])
def test_projections_are_read_where_they_are(leading):
    from gdn2.ops.triton.layout import matrix

    tensors = projected(*leading)
    f = tensors["f"]
    assert matrix(f).data_ptr() == matrix(f, 128).data_ptr() == f.data_ptr()
    want = results(log_decay, tensors | {"f": f.contiguous()}, backend="triton")
    for name, got in results(log_decay, tensors, backend="triton").items():
        assert_same_bits(got, want[name], name)
    head = f[..., 0]  # every 32nd number
    for x in (f, head):
        want = results(gate, {"x": x.contiguous()}, backend="triton")
        for name, got in results(gate, {"x": x}, backend="triton").items():
            assert got.is_contiguous()
            assert_same_bits(got, want[name], name)


@BOTH
def test_a_token_is_the_same_whatever_is_beside_it(operation, inputs):
    tensors = inputs(2 * TOKENS + 5, 2, 16)
    whole = results(operation, tensors, backend="triton")
    some = {n: x[100:150] if x.ndim > 2 else x for n, x in tensors.items()}
    assert_same_bits(operation(**some, backend="triton"), whole["y"][100:150], "y")


@BOTH
@pytest.mark.parametrize("shape", [(0, 3, 16), (2, 0, 3, 16)], ids=str)
def test_nothing_gives_nothing(operation, inputs, shape):
    got = results(operation, inputs(*shape), backend="triton")
    assert got["y"].shape == shape
    assert not any(x.any() for x in got.values())


@BOTH
def test_no_result_comes_from_uninitialised_memory(operation, inputs):
    torch.use_deterministic_algorithms(True)  # torch then fills every empty tensor with NaN
    try:
        got = [results(operation, inputs(TOKENS + 3, 2, 10), backend="triton") for _ in range(2)]
    finally:
        torch.use_deterministic_algorithms(False)
    for name, x in got[0].items():
        assert x.isfinite().all()
        assert_same_bits(x, got[1][name], name)


def test_they_are_proper_operators():
    for tensors in (decay_inputs(5, 3, 8), projected(2, 3)):
        results(log_decay, tensors, backend="triton")  # registers them
        f, A_log, dt_bias = (t.detach().requires_grad_() for t in tensors.values())
        ops = torch.ops.gdn2
        torch.library.opcheck(ops.triton_log_decay.default, (f, A_log, dt_bias))
        torch.library.opcheck(ops.triton_gate.default, (f, 2.0))
        f, A_log, dt_bias = (t.detach() for t in (f, A_log, dt_bias))
        dy = torch.ones_like(f)
        torch.library.opcheck(ops.triton_log_decay_backward.default, (dy, f, A_log, dt_bias))
        torch.library.opcheck(ops.triton_gate_backward.default, (dy, f, 2.0))


@BOTH
@pytest.mark.parametrize("compiler", COMPILERS)
def test_they_compile_whole(operation, inputs, compiler):
    call, tensors = partial(operation, backend="triton"), inputs(2, 9, 3, 8)
    want = results(call, tensors)
    torch._dynamo.reset()
    got = results(torch.compile(call, backend=compiler, fullgraph=True), tensors)
    for name, x in want.items():
        assert_same_bits(got[name], x, name)


@BOTH
def test_other_derivatives_are_refused(operation, inputs):
    tensors = inputs(4, 3, 8)
    name, x = next(iter(tensors.items()))
    y = operation(**tensors | {name: x.requires_grad_()}, backend="triton")
    with pytest.raises(RuntimeError, match="no gradient of its own"):
        torch.autograd.grad(y.sum(), x, create_graph=True)
    x = x.detach()
    with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
        torch.func.jvp(lambda x: operation(**tensors | {name: x}, backend="triton"), (x,), (x,))


@pytest.mark.parametrize("shape", [(), (3, 0), (0, 3), (2, 0, 3)])
def test_gates_of_any_shape(shape):
    x = torch.zeros(shape, device=DEVICE, requires_grad=True)
    y = gate(x, 2.0, backend="triton")
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(y, torch.ones_like(x))
    assert torch.equal(dx, torch.full_like(x, 0.5))
