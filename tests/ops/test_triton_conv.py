"""The convolution with normed heads in Triton: it keeps the guarantees of the PyTorch form."""

from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch
from compilers import BACKENDS as COMPILERS
from operator_cases import assert_no_worse, assert_rounded_no_worse, assert_same_bits
from triton_device import DEVICE, MARKS

from gdn2.ops import normed_conv

pytest.importorskip("triton")
from gdn2.ops.triton.normed_conv import sizes

pytestmark = MARKS
SIZES = sizes(16, torch.device(DEVICE))
BT, PIECE = SIZES["BT"], SIZES["R"] * SIZES["RUN"]  # tokens of a program, forward and back
PACK = (0, 0, 1, 3, 6, 10, BT + 40, BT + 40)


@dataclass(frozen=True)
class Case:
    """The last block of channels is not whole."""

    B: int = 2
    T: int = BT + 40
    W: int = 4
    D: int = 24
    norm_channels: int = 16
    head_dim: int = 16
    cu_seqlens: tuple[int, ...] | None = None
    bias: bool = True
    state: bool = True

    @property
    def N(self) -> int:
        return self.B if self.cu_seqlens is None else len(self.cu_seqlens) - 1


BATCH, PACKED = Case(bias=False), Case(B=1, cu_seqlens=PACK)


def make(case: Case, dtype: torch.dtype = torch.float32, seed: int = 0) -> dict:
    """x, weight, bias, state, and the gradients that reach the outputs and the returned state."""
    g = torch.Generator().manual_seed(seed)
    x, state = (case.B, case.T, case.D), (case.N, case.D, case.W - 1)
    shapes = {"x": x, "weight": (case.D, case.W), "bias": (case.D,), "state": state}
    shapes |= {"dy": x, "dlast": state}
    tensors = {n: torch.randn(s, generator=g).to(DEVICE, dtype) for n, s in shapes.items()}
    absent = {n: None for n in ("bias", "state") if not getattr(case, n)}
    return tensors | absent


def run(inputs: dict, case: Case, backend: str | None = "triton", call=normed_conv) -> dict:
    """Outputs and gradients; without `dlast` the loss does not see the returned state."""
    names = [n for n in ("x", "weight", "bias", "state") if inputs[n] is not None]
    leaves = {n: inputs[n].detach().requires_grad_() for n in names}
    cu_seqlens = case.cu_seqlens and torch.tensor(case.cu_seqlens, device=DEVICE)
    y, last = call(
        **leaves,
        norm_channels=case.norm_channels,
        head_dim=case.head_dim,
        cu_seqlens=cu_seqlens,
        backend=backend,
    )
    outputs, upstream = [y, last], [inputs["dy"], inputs["dlast"]]
    if upstream[1] is None:
        del outputs[1], upstream[1]
    grads = torch.autograd.grad(outputs, list(leaves.values()), upstream)
    named = {f"d_{name}": grad for name, grad in zip(leaves, grads, strict=True)}
    return {"y": y.detach(), "last": last.detach(), **named}


def double(inputs: dict) -> dict:
    return {n: x if x is None else x.double() for n, x in inputs.items()}


def assert_as_exact_as_pytorch(inputs: dict, case: Case) -> None:
    truth, plain = run(double(inputs), case, None), run(inputs, case, None)
    assert_no_worse(run(inputs, case), than=plain, truth=truth, factor=2.0)


@pytest.mark.parametrize("state", [True, False])
@pytest.mark.parametrize("W", [2, 3, 4])
@pytest.mark.parametrize("case", [BATCH, PACKED], ids=["batch", "packed"])
def test_equals_the_pytorch_form(case, W, state):
    case = replace(case, W=W, state=state)
    assert_as_exact_as_pytorch(make(case), case)


@pytest.mark.parametrize("T", [0, 1, 2, 3, BT, PIECE + 1, 2 * PIECE + 5])
def test_any_length(T):
    case = Case(B=1, T=T)
    inputs = make(case)
    assert_as_exact_as_pytorch(inputs, case)
    assert_as_exact_as_pytorch(inputs | {"dlast": None}, case)


@pytest.mark.parametrize(
    ("norm_channels", "D", "head_dim", "W"),
    [(0, 24, 16, 4), (32, 32, 16, 4), (48, 56, 24, 4), (8, 20, 8, 1), (16, 24, 16, 8)],
)
def test_any_channels_and_taps(norm_channels, D, head_dim, W):
    case = Case(1, 20, W, D, norm_channels, head_dim)
    assert_as_exact_as_pytorch(make(case), case)


@pytest.mark.parametrize("case", [BATCH, PACKED], ids=["batch", "packed"])
def test_half_precision_is_no_worse(case, half):
    inputs = make(case, half)
    got, plain = run(inputs, case), run(inputs, case, None)
    assert all(x.dtype == half for x in got.values())
    assert_rounded_no_worse(got, than=plain, truth=run(double(inputs), case, None))


def test_parameters_may_be_float32(half):
    """As under autocast, where the projection alone is rounded."""
    case = Case(B=1, T=20)
    inputs = make(case) | {n: x.to(half) for n, x in make(case).items() if n in ("x", "dy")}
    inputs["dlast"] = inputs["dlast"].to(half)
    got = run(inputs, case)
    assert {n for n, x in got.items() if x.dtype == half} == {"y", "last", "d_x"}
    truth = run(double(inputs), case, None) | {"last": run(inputs, case, None)["last"]}
    assert_rounded_no_worse(got, than=run(inputs, case, None), truth=truth)


@pytest.mark.parametrize("P", [1, 3, BT + 1, PIECE - 2])
def test_appended_tokens_change_no_bit(P):
    case = Case(T=PIECE + 20)
    inputs = make(case) | {"dlast": None}
    inputs["dy"][:, P:] = 0
    whole, start = run(inputs, case), run(first_tokens(inputs, P), replace(case, T=P))
    for name in ("y", "d_x"):
        assert_same_bits(start[name], whole[name][:, :P], name)
    for name in ("d_weight", "d_state"):
        torch.testing.assert_close(start[name], whole[name])
    assert not whole["d_x"][:, P:].any()


def first_tokens(inputs: dict, P: int) -> dict:
    return inputs | {n: inputs[n][:, :P] for n in ("x", "dy")}


def test_other_batches_and_packs_change_no_bit():
    case = Case(B=3, T=BT + 21)
    inputs = make(case)
    whole = run(inputs, case)
    one = {n: x if n in ("weight", "bias") else x[1:2] for n, x in inputs.items()}
    alone = run(one, replace(case, B=1))
    pack = (0, 9, 9 + case.T, 14 + case.T)
    row = {
        n: torch.cat([x[:1, :9], x[1:2], x[2:, :5]], 1) for n, x in inputs.items() if n[-1] in "xy"
    }
    row["x"][:, :9] = row["x"][:, -5:] = float("nan")
    packed = run(inputs | row, replace(case, B=1, cu_seqlens=pack))
    for name in ("y", "d_x"):
        assert_same_bits(alone[name], whole[name][1:2], name)
        assert_same_bits(packed[name][:, 9:-5], alone[name], f"packed {name}")
    for name in ("last", "d_state"):
        assert_same_bits(alone[name], whole[name][1:2], name)
        assert_same_bits(packed[name][1:2], alone[name], f"packed {name}")


def test_two_parts_of_a_sequence_equal_the_whole():
    case = Case(T=20)
    inputs = make(case) | {"dlast": None}
    parts = [first_tokens(inputs, 7), {n: x if n != "x" else x[:, 7:] for n, x in inputs.items()}]
    whole, first = run(inputs, case), run(parts[0], case)
    options = {"norm_channels": 16, "head_dim": 16, "backend": "triton"}
    weights = inputs["weight"], inputs["bias"]
    y, last = normed_conv(parts[1]["x"], *weights, state=first["last"], **options)
    torch.testing.assert_close(torch.cat([first["y"], y], 1), whole["y"])
    assert_same_bits(last, whole["last"], "returned state")


def test_strided_inputs_are_read_where_they_are():
    case = Case(T=20)
    inputs = make(case)
    want = run(inputs, case)
    wide = torch.cat([inputs["x"]] * 2, -1)[..., : case.D]  # as one projection gives them
    turned = inputs["x"].transpose(0, 1).contiguous().transpose(0, 1)
    state = inputs["state"].transpose(1, 2).contiguous().transpose(1, 2)
    for x in (wide, turned):
        got = run(inputs | {"x": x, "state": state, "dy": inputs["dy"].mT.contiguous().mT}, case)
        for name in want:
            assert_same_bits(got[name], want[name], name)


def test_the_same_call_gives_the_same_bits():
    case = Case(B=1, T=20, cu_seqlens=(0, 3, 20))
    inputs = make(case)
    first, again = run(inputs, case), run(inputs, case)
    for name in first:
        assert_same_bits(first[name], again[name], name)


def test_no_result_comes_from_uninitialised_memory():
    torch.use_deterministic_algorithms(True)  # torch then fills every empty tensor with NaN
    try:
        for case in (BATCH, PACKED, Case(T=0)):
            assert all(x.isfinite().all() for x in run(make(case), case).values())
    finally:
        torch.use_deterministic_algorithms(False)


def test_zero_inputs_have_finite_gradients():
    case = Case(T=20, bias=False)
    inputs = make(case)
    inputs["x"][:, 3:12] = 0
    inputs["state"][:] = 0
    assert_as_exact_as_pytorch(inputs, case)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of rows behind the last token
def test_epsilon_may_be_zero():
    case = Case(B=1, T=5, bias=False)
    call = partial(normed_conv, eps=0.0)
    inputs = make(case)
    got, plain = run(inputs, case, call=call), run(inputs, case, None, call)
    truth = run(double(inputs), case, None, call)
    assert_no_worse(got, than=plain, truth=truth, factor=2.0)


def test_a_loss_on_the_returned_state_alone():
    case = Case(T=20)
    inputs = make(case)
    x = inputs["x"].requires_grad_()
    options = {"norm_channels": 16, "head_dim": 16, "backend": "triton"}
    _, last = normed_conv(x, inputs["weight"], **options)
    (dx,) = torch.autograd.grad(last.sum(), x)
    assert not dx[:, :17].any()
    assert (dx[:, 17:] == 1).all()


def test_second_derivatives_and_tangents_are_refused():
    case = Case(T=5)
    inputs = make(case)
    options = {"norm_channels": 16, "head_dim": 16, "backend": "triton"}
    y, _ = normed_conv(inputs["x"].requires_grad_(), inputs["weight"], **options)
    with pytest.raises(RuntimeError, match="create_graph=True"):
        torch.autograd.grad(y.sum(), inputs["x"], create_graph=True)
    function = partial(normed_conv, weight=inputs["weight"], **options)
    with pytest.raises(NotImplementedError, match="forward-mode"):
        torch.func.jvp(function, (inputs["x"].detach(),), (inputs["dy"],))


def test_what_it_can_not_serve_is_refused():
    x = torch.zeros(1, 4, 272, device=DEVICE)
    for W, head_dim in ((4, 272), (9, 16)):
        weight = torch.zeros(272, W, device=DEVICE)
        with pytest.raises(NotImplementedError, match=f"got head_dim={head_dim}, W={W}"):
            normed_conv(x, weight, norm_channels=272, head_dim=head_dim, backend="triton")


def test_registered_operators_pass_opcheck():
    packed = Case(B=1, T=3, D=16, cu_seqlens=(0, 1, 3), bias=False, state=False)
    for case in (Case(B=1, T=2, D=16), packed):
        inputs = make(case)
        operands = [inputs[n] for n in ("x", "weight", "bias", "state")]
        bounds = case.cu_seqlens and torch.tensor(case.cu_seqlens, device=DEVICE)
        others = (bounds, 16, 16, 1e-6)
        operator, backward = (
            getattr(torch.ops.gdn2, f"triton_normed_conv{name}").default
            for name in ("", "_backward")
        )
        torch.library.opcheck(backward, (inputs["dy"], inputs["dlast"], *operands, *others))
        leaves = [x if x is None else x.requires_grad_() for x in operands]
        torch.library.opcheck(operator, (*leaves, *others))


@pytest.mark.parametrize("compiler", COMPILERS)
def test_compiles_whole_with_its_gradients(compiler):
    case = replace(PACKED, T=20, cu_seqlens=(0, 2, 20))
    inputs = make(case)
    want = run(inputs, case)
    torch._dynamo.reset()
    got = run(inputs, case, call=torch.compile(normed_conv, backend=compiler, fullgraph=True))
    for name in want:
        assert_same_bits(got[name], want[name], name)
