"""The Triton backend, forward and decoding: the operator's guarantees, interpreted or on a GPU.

What test_triton_gradients.py asks of outputs on its way is not asked again.

`make test` runs these apart, with TRITON_INTERPRET=1, on tensors of the CPU. The interpreter, with
the roundings of tensor_cores.py, knows nothing of threads; `make test-gpu` runs the same tests on a
CUDA device, at larger sizes where they take a size.
"""

from functools import partial

import pytest
import torch
from compilers import BACKENDS as COMPILERS
from operator_cases import (
    GATE_FORMS,
    LAYOUTS,
    Case,
    assert_no_worse,
    assert_same_bits,
    cast,
    error,
    make_inputs,
    put,
)
from triton_device import CHANNELS, DEVICE, MARKS, ON_GPU, SMALL, C, L, forms_and_layouts, inputs_of

from gdn2.ops import causal_conv_step, gated_delta_rule, gated_delta_step

pytestmark = MARKS


def forward(inputs: dict, case: Case, backend: str = "triton") -> dict:
    cu_seqlens = case.cu_seqlens and torch.tensor(case.cu_seqlens, dtype=torch.int32, device=DEVICE)
    names = ("out", "new_state")
    results = gated_delta_rule(**inputs, scale=case.scale, cu_seqlens=cu_seqlens, backend=backend)
    return dict(zip(names, results, strict=True))


def assert_as_exact_as_chunked(inputs: dict, case: Case) -> None:
    truth = forward(cast(inputs, torch.float64), case, "reference")
    chunked = forward(inputs, case, "chunked")
    assert_no_worse(forward(inputs, case), than=chunked, truth=truth, factor=2.0)


@pytest.mark.parametrize(("form", "layout"), forms_and_layouts(2), ids=str)
def test_equals_the_token_loop(form, layout):
    case = Case(*form, **LAYOUTS[layout], **SMALL)
    assert_as_exact_as_chunked(inputs_of(case), case)


@pytest.mark.parametrize("T", [0, 1, C - 1, C, C + 1, 2 * C])
def test_any_length(T):
    case = Case(T=T, **SMALL)
    assert_as_exact_as_chunked(inputs_of(case), case)


@pytest.mark.parametrize(("K", "V"), [(32, 16), (16, 48), (48, 80), (80, 32), *CHANNELS[1:]])
@pytest.mark.parametrize("decay", ["channel", "head"])
def test_any_channels(decay, K, V):
    case = Case(decay, B=1, T=C + 3, K=K, V=V)
    assert_as_exact_as_chunked(inputs_of(case), case)


@pytest.mark.parametrize("layout", ["batch", "gates_on_value_heads"])
@pytest.mark.parametrize(("decay", "erase"), [("channel", "channel"), ("head", "head")])
def test_future_tokens_cannot_change_the_past(decay, erase, layout):
    case = Case(decay, erase, **LAYOUTS[layout], **SMALL)
    inputs = inputs_of(case)
    before = forward(inputs, case)["out"]
    for P in [P for P in (1, C - 2, C + 5, L + 3) if P < case.T]:
        other = inputs_of(case, seed=1)
        edited = {
            n: x if n == "state" else torch.cat([x[:, :P], other[n][:, P:]], 1)
            for n, x in inputs.items()
        }
        after = forward(edited, case)["out"]
        assert_same_bits(after[:, :P], before[:, :P], f"P={P}")
        assert not torch.equal(after[:, P:], before[:, P:])


@pytest.mark.parametrize("decay", ["channel", "head"])
def test_appended_tokens_and_other_batches_change_no_bit(decay):
    case = Case(decay, B=3, T=2 * L + C + 5, **SMALL)
    inputs = inputs_of(case)
    whole = forward(inputs, case)["out"]
    one = {n: x[1:2] for n, x in inputs.items()}
    assert_same_bits(forward(one, case)["out"], whole[1:2], "alone")
    for T in (C + 7, L, L + 1):
        start = {n: x if n == "state" else x[:, :T] for n, x in one.items()}
        assert_same_bits(forward(start, case)["out"], whole[1:2, :T], f"appended to {T}")
    # The same sequence as the second of a pack.
    packed = {n: torch.cat([x[:1], x[1:2]]) if n == "state" else x for n, x in inputs.items()}
    packed = {
        n: x if n == "state" else torch.cat([x[:1, :9], x[1:2]], 1) for n, x in packed.items()
    }
    pack = Case(decay, cu_seqlens=(0, 9, 9 + case.T), **SMALL)
    assert_same_bits(forward(packed, pack)["out"][:, 9:], whole[1:2], "packed")


def test_split_sequence_equals_whole():
    case = Case(T=60, **SMALL)
    inputs = inputs_of(case)
    whole = forward(inputs, case)
    first = {n: x if n == "state" else x[:, :37] for n, x in inputs.items()}
    second = {n: x if n == "state" else x[:, 37:] for n, x in inputs.items()}
    a = forward(first, case)
    b = forward(second | {"state": a["new_state"]}, case)
    assert error(torch.cat([a["out"], b["out"]], 1), whole["out"]) < 1e-6
    assert error(b["new_state"], whole["new_state"]) < 1e-6


def test_strided_operands_are_read_where_they_are():
    case = Case(**SMALL)
    inputs = inputs_of(case)
    want = forward(inputs, case)
    wide = torch.cat([inputs["q"], inputs["k"], inputs["v"]], -2).contiguous()
    q, k, v = wide.split(2, dim=-2)  # as one projection gives them
    turned = {n: inputs[n].transpose(0, 1).contiguous().transpose(0, 1) for n in ("erase", "state")}
    got = forward(inputs | {"q": q, "k": k, "v": v} | turned, case)
    for name in want:
        assert_same_bits(got[name], want[name], name)


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize(("decay", "erase", "write"), GATE_FORMS)
def test_step_equals_the_token_loop(decay, erase, write, grouped):
    heads = {"HV": 4, "gates_on_value_heads": decay == "head"} if grouped else {}
    case = Case(decay, erase, write, T=3, **SMALL, **heads)
    inputs = inputs_of(case)
    truth = forward(cast(inputs, torch.float64), case, "reference")
    loop = forward(inputs, case, "reference")
    out, state = gated_delta_step(**inputs, scale=case.scale, backend="triton")
    assert state is inputs["state"]
    assert_no_worse({"out": out, "new_state": state}, than=loop, truth=truth, factor=2.0)


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_step_on_a_pool_touches_only_its_slots(index_dtype):
    inputs = inputs_of(Case(B=3, T=1, **SMALL))
    rows = inputs.pop("state")
    pool = torch.randn(6, *rows.shape[1:], device=DEVICE)
    strided = pool.transpose(1, 2).contiguous().transpose(1, 2)
    alone = pool[[4, 1]].clone()
    indices = torch.tensor([4, -1, 1], dtype=index_dtype, device=DEVICE)
    live = {n: x[[0, 2], 0] for n, x in inputs.items()}
    want, _ = gated_delta_step(**live, state=alone, backend="triton")
    for states in (pool, strided):
        before = states.clone()
        out, _ = gated_delta_step(
            **{n: x[:, 0] for n, x in inputs.items()},
            state=states,
            state_indices=indices,
            backend="triton",
        )
        assert_same_bits(out[[0, 2]], want, "out")
        assert not out[1].any()
        assert_same_bits(states[[4, 1]], alone, "slots")
        assert_same_bits(states[[0, 2, 3, 5]], before[[0, 2, 3, 5]], "others")


@pytest.mark.parametrize("activation", ["silu", None])
@pytest.mark.parametrize(("T", "W", "D"), [(1, 4, 130), (3, 4, 20), (7, 2, 20), (2, 1, 20)])
def test_conv_step_equals_the_convolution(T, W, D, activation):
    shapes = (3, T, D), (6, D, W - 1), (D, W), (D,)
    x, pool, weight, bias = (torch.randn(shape, device=DEVICE) for shape in shapes)
    bias = bias if activation else None
    double = None if bias is None else bias.double()
    step = partial(causal_conv_step, weight=weight, bias=bias, activation=activation)
    exact = partial(step, weight=weight.double(), bias=double)
    for states in (pool, pool.transpose(1, 2).contiguous().transpose(1, 2)):
        for indices in (None, torch.tensor([4, -1, 1], device=DEVICE)):
            before = states[: 3 if indices is None else 6]
            mine, theirs = before.clone(), before.clone()
            y, _ = step(x, state=mine, state_indices=indices, backend="triton")
            want, _ = step(x, state=theirs, state_indices=indices)
            true, _ = exact(x.double(), state=before.double(), state_indices=indices)
            assert_no_worse({"y": y}, than={"y": want}, truth={"y": true}, factor=2.0)
            assert_same_bits(mine, theirs, "state")


def test_conv_step_reads_strided_inputs_and_half_precision(half):
    shapes = (2, 2, 48), (16, 4), (2, 16, 3)
    wide, weight, state = (torch.randn(shape, device=DEVICE).to(half) for shape in shapes)
    x = wide[..., 16:32]
    states = [state.clone() for _ in range(2)]
    y, _ = causal_conv_step(x, weight, state=states[0], backend="triton")
    want, _ = causal_conv_step(x, weight, state=states[1])
    assert y.dtype == half
    torch.testing.assert_close(y, want, rtol=torch.finfo(half).eps, atol=1e-6)
    assert_same_bits(*states, "state")


def test_registered_operators_pass_opcheck():
    inputs = inputs_of(Case(B=1, T=C, **SMALL))
    state = inputs.pop("state")
    operands = tuple(x.requires_grad_() for x in inputs.values())
    gated_delta_rule(**inputs, state=state, backend="triton")  # registers them
    torch.library.opcheck(
        torch.ops.gdn2.triton_gated_delta_rule.default, (*operands, state, None, 1.0)
    )
    detached = tuple(x.detach()[:, :1] for x in operands)
    torch.library.opcheck(
        torch.ops.gdn2.triton_gated_delta_step.default, (*detached, 1.0, state, None)
    )
    shapes = (2, 1, 16), (16, 4), (2, 16, 3)
    x, weight, state = (torch.randn(shape, device=DEVICE) for shape in shapes)
    torch.library.opcheck(
        torch.ops.gdn2.triton_causal_conv_step.default, (x, weight, None, True, state, None)
    )


@pytest.mark.parametrize("compiler", COMPILERS)
def test_operators_compile_whole(compiler):
    inputs = inputs_of(Case(T=C + 3, **SMALL))
    tokens = {n: x[:, :1] for n, x in inputs.items() if n != "state"}
    shapes = (2, 1, 16), (16, 4), (2, 16, 3)
    x, weight, last = (torch.randn(shape, device=DEVICE) for shape in shapes)
    for function, arguments, state in (
        (gated_delta_rule, inputs, inputs.pop("state")),
        (gated_delta_step, tokens, inputs_of(Case(**SMALL))["state"]),
        (causal_conv_step, {"x": x, "weight": weight}, last),
    ):
        states = [state.clone() for _ in range(2)]
        call = partial(function, **arguments, backend="triton")
        torch._dynamo.reset()
        with torch.no_grad():
            want, returned = call(state=states[0])
            out, again = torch.compile(call, backend=compiler, fullgraph=True)(state=states[1])
        assert_same_bits(out, want, "out")
        assert_same_bits(again, returned, "returned state")
        assert_same_bits(*states, "given state")


REFUSED = {
    "float64": (Case(**SMALL), torch.float64, "takes float32, float16 and bfloat16"),
    **({} if ON_GPU else {"bfloat16": (Case(**SMALL), torch.bfloat16, "interpreter")}),
    "channels": (Case(K=24, V=16), torch.float32, "multiples of 16 up to 256, got K=24, V=16"),
    "many channels": (Case(T=1, K=16, V=272), torch.float32, "got K=16, V=272"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_it_can_not_serve_is_refused_with_the_reason(name):
    case, dtype, reason = REFUSED[name]
    inputs = put(cast(make_inputs(case), dtype), DEVICE)
    with pytest.raises(NotImplementedError, match=f"backend='triton' .*{reason}"):
        gated_delta_rule(**inputs, backend="triton")


def test_chunked_still_serves_calls_that_name_no_backend():
    inputs = inputs_of(Case(**SMALL))
    case = Case(**SMALL)
    assert torch.equal(forward(inputs, case, None)["out"], forward(inputs, case, "chunked")["out"])
