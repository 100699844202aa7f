"""The operator as compilers see it: registered, with shapes known in advance."""

import importlib

import pytest
import torch
from compilers import BACKENDS
from operator_cases import LAYOUTS, Case, cast, error, make_inputs, run

from gdn2.layers import GatedDeltaNet2
from gdn2.ops import chunked, gated_delta_rule, gated_delta_step

causal_conv = importlib.import_module("gdn2.ops.causal_conv")  # the function has the same name
FORMS = [("channel", "channel", "channel"), ("head", "head", None), (None, None, "head")]


def leaves(case: Case, **changes) -> dict:
    inputs = cast(make_inputs(case), torch.float32) | changes
    return {n: x if x is None else x.requires_grad_() for n, x in inputs.items()}


@pytest.mark.parametrize("layout", ["batch", "gates_on_value_heads", "packed"])
@pytest.mark.parametrize("form", FORMS)
def test_forward_and_backward_are_proper_operators(form, layout):
    case = Case(*form, **LAYOUTS[layout])
    bounds = None if case.cu_seqlens is None else torch.tensor(case.cu_seqlens)
    torch.library.opcheck(chunked._forward, (*leaves(case).values(), bounds, 0.5, True))
    x = [None if t is None else t.detach() for t in leaves(case).values()]
    out, state, starts = chunked._forward(*x, bounds, 0.5, True)
    torch.library.opcheck(chunked._backward, (out, state, *x[:6], bounds, starts, 0.5))
    torch.library.opcheck(chunked._backward, (out, None, *x[:6], bounds, starts, 0.5))


@pytest.mark.parametrize("pool", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_step_is_a_proper_operator(form, pool):
    case = Case(*form, T=3)
    *x, state = [None if t is None else t.detach() for t in leaves(case).values()]
    slots = torch.tensor([1, -1], dtype=torch.int32) if pool else None
    torch.library.opcheck(torch.ops.gdn2.gated_delta_step.default, (*x, 0.5, state, slots))


def test_the_short_convolution_is_a_proper_operator():
    x, weight, history = (
        torch.randn(shape, requires_grad=True) for shape in ((13, 5), (5, 4), (3, 3, 5))
    )
    bounds = torch.tensor([0, 2, 9, 13])
    torch.library.opcheck(causal_conv._convolve, (x, weight, history, bounds))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", ["batch", "packed"])
def test_compiled_operator_equals_itself(layout, backend):
    case = Case(**LAYOUTS[layout])
    inputs = make_inputs(case, dtype=torch.float32)
    plain = run(inputs, case)
    torch._dynamo.reset()
    compiled = torch.compile(gated_delta_rule, backend=backend, fullgraph=True)
    got = run(inputs, case, rule=compiled)
    assert max(error(got[name], plain[name]) for name in plain) < 1e-6


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled_step_advances_the_given_state(backend):
    inputs = cast(make_inputs(Case(T=1)), torch.float32)
    tokens = {n: x[:, 0] for n, x in inputs.items() if n != "state"}
    states = [inputs["state"].clone() for _ in range(2)]
    out, _ = gated_delta_step(**tokens, state=states[0])
    torch._dynamo.reset()
    compiled = torch.compile(gated_delta_step, backend=backend, fullgraph=True)
    got, same = compiled(**tokens, state=states[1])
    assert same is states[1]
    assert error(got, out) < 1e-6
    assert error(states[1], states[0]) < 1e-6


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_layer_compiles_whole(backend):
    torch.manual_seed(0)
    layer = GatedDeltaNet2(32, num_heads=2, head_k_dim=16, head_v_dim=16)
    x = torch.randn(2, 40, 32, requires_grad=True)
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend=backend, fullgraph=True)
    results = []
    for f in (layer, compiled):
        y, _ = f(x)
        results.append([y, *torch.autograd.grad(y.square().sum(), [x, *layer.parameters()])])
    for plain, got in zip(*results, strict=True):
        assert error(got, plain) < 1e-4
