"""The Triton backend under autograd: outputs, states and gradients, interpreted or on a GPU."""

from functools import partial

import pytest
import torch
from compilers import BACKENDS as COMPILERS
from operator_cases import (
    EXTREMES,
    LAYOUTS,
    MEMBERS,
    Case,
    assert_no_worse,
    assert_rounded_no_worse,
    assert_same_bits,
    cast,
    error,
    extreme_inputs,
    natural_sizes,
    put,
    rounded_products,
    run,
)
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)
from triton_device import (
    CAPABILITY,
    CHANNELS,
    DEVICE,
    MARKS,
    SMALL,
    C,
    L,
    forms_and_layouts,
    inputs_of,
)

from gdn2.ops import gated_delta_rule
from gdn2.ops.triton import launch
from gdn2.ops.triton.sizes import sizes_of

pytestmark = MARKS
triton = partial(run, backend="triton")


def assert_as_exact_as_chunked(inputs: dict, case: Case) -> None:
    truth = run(cast(inputs, torch.float64), case, backend="reference")
    chunked = run(inputs, case, backend="chunked")
    assert_no_worse(triton(inputs, case), than=chunked, truth=truth, factor=2.0)


@pytest.mark.parametrize(("form", "layout"), forms_and_layouts(0), ids=str)
def test_equal_those_of_the_token_loop(form, layout):
    case = Case(*form, **LAYOUTS[layout], **SMALL)
    assert_as_exact_as_chunked(inputs_of(case), case)


@pytest.mark.parametrize("T", [1, C - 1, C, C + 1])
def test_any_length(T):
    case = Case(T=T, **SMALL)
    assert_as_exact_as_chunked(inputs_of(case), case)


def test_without_tokens_the_state_alone_has_a_gradient():
    leaves = {n: x.requires_grad_() for n, x in inputs_of(Case(T=0, **SMALL)).items()}
    out, state = gated_delta_rule(**leaves, backend="triton")
    d_state = torch.randn_like(state)
    *grads, d_start = torch.autograd.grad([out, state], list(leaves.values()), [out, d_state])
    assert [g.shape for g in grads] == [x.shape for n, x in leaves.items() if n != "state"]
    assert_same_bits(d_start, d_state, "gradient of the state")


@pytest.mark.parametrize(("K", "V"), [(32, 16), (48, 80), *CHANNELS[1:]])
@pytest.mark.parametrize("decay", ["channel", "head"])
def test_any_channels(decay, K, V):
    case = Case(decay, B=1, T=C + 3, K=K, V=V)
    assert_as_exact_as_chunked(inputs_of(case), case)


@pytest.mark.parametrize("member", ["gdn2", "kda"])
@pytest.mark.parametrize("tokens", [C // 2, C])
def test_chunks_are_differentiated_whole_or_by_halves(tokens, member, monkeypatch):
    sizes = partial(sizes_of, capability=CAPABILITY)
    monkeypatch.setattr(
        launch, "sizes_of", lambda *key: sizes(*key[:4])._replace(gradients_C=tokens)
    )
    case = Case(*MEMBERS[member], B=1, T=2 * C - 3, K=48, V=32)
    assert_as_exact_as_chunked(inputs_of(case), case)


@pytest.mark.parametrize("decay", ["channel", "head"])
def test_weak_decays_stay_exact(decay):
    """An error in the last bits of exp(-1e-6) counts once a token."""
    case = Case(decay, None, B=1, T=L + 20, **SMALL)
    inputs = inputs_of(case)
    inputs["log_decay"].fill_(-1e-6)
    assert_as_exact_as_chunked(inputs, case)


@pytest.mark.parametrize("cu_seqlens", [None, (0, L + 2, L + 6, 3 * L + 5)])
@pytest.mark.parametrize(("decay", "erase"), [("channel", "channel"), ("head", None)])
def test_long_sequences_are_scanned_in_segments(decay, erase, cu_seqlens):
    case = Case(decay, erase, B=1, T=3 * L + 5, K=16, V=48, cu_seqlens=cu_seqlens)
    assert_as_exact_as_chunked(inputs_of(case), case)


@pytest.mark.parametrize("decay", ["channel", "head"])
@pytest.mark.parametrize("extreme", EXTREMES)
def test_extreme_gates_stay_right(extreme, decay):
    case = Case(decay, B=1, T=L + 4 if decay == "channel" else 2 * C + 1, **SMALL)
    inputs = put(cast(extreme_inputs(extreme, case), torch.float32), DEVICE)
    truth = run(cast(inputs, torch.float64), case, backend="reference")
    loop, got = run(inputs, case, backend="reference"), triton(inputs, case)
    factor = 32.0 if extreme == "equal keys" else 4.0
    assert_no_worse(got, than=loop, truth=truth, factor=factor, sizes=natural_sizes(truth, inputs))


@pytest.mark.parametrize(("K", "V"), CHANNELS)
@pytest.mark.parametrize("layout", ["gates_on_value_heads", "packed"])
@pytest.mark.parametrize("member", MEMBERS)
def test_half_precision_is_no_worse_than_rounded_operands(member, layout, K, V, half):
    case = Case(*MEMBERS[member], **LAYOUTS[layout], K=K, V=V)
    inputs = inputs_of(case)
    inputs = {n: x.to(half) if n in ("q", "k", "v") else x for n, x in inputs.items()}
    truth = run(cast(inputs, torch.float64), case, backend="reference")
    with rounded_products(half):
        rounded = run(inputs, case, backend="chunked")
    got = triton(inputs, case)
    assert [got[n].dtype for n in ("out", "d_q", "d_k", "d_v")] == [half] * 4
    assert_rounded_no_worse(got, than=rounded, truth=truth)
    plain = run(inputs, case, backend="chunked")
    assert not torch.equal(plain["d_state"], rounded["d_state"])


@pytest.mark.parametrize("layout", ["batch", "gates_on_value_heads"])
@pytest.mark.parametrize(("decay", "erase"), [("channel", "channel"), ("head", "head")])
def test_a_loss_on_the_past_gives_the_future_none(decay, erase, layout):
    case = Case(decay, erase, **LAYOUTS[layout], **SMALL)
    inputs, other = inputs_of(case), inputs_of(case, seed=1)
    P = min(L + 3, case.T - C + 2)
    edited = {
        n: x if n == "state" else torch.cat([x[:, :P], other[n][:, P:]], 1)
        for n, x in inputs.items()
    }
    a, b = (triton(x, case, upstream_until=P) for x in (inputs, edited))
    for name in a:
        if name.startswith("d_") and name != "d_state":
            assert_same_bits(a[name][:, :P], b[name][:, :P], name)
            assert not b[name][:, P:].any(), f"{name} reaches into the future"
    assert_same_bits(a["d_state"], b["d_state"], "d_state")


@pytest.mark.parametrize("decay", ["channel", "head"])
def test_other_batches_and_packs_change_no_bit(decay):
    case = Case(decay, B=2, T=L + C + 5, **SMALL)
    inputs = inputs_of(case)
    whole, again = triton(inputs, case), triton(inputs, case)
    for name in whole:
        assert_same_bits(again[name], whole[name], f"{name}, twice,")
    one = {n: x[1:2] for n, x in inputs.items()}
    pack = {n: x if n == "state" else torch.cat([x[:1, :9], x[1:2]], 1) for n, x in inputs.items()}
    bounds = torch.tensor([0, 9, 9 + case.T], device=DEVICE)
    d_out = torch.linspace(-1, 1, one["v"].numel(), device=DEVICE).view_as(one["v"])
    results = []
    for given, cu_seqlens, first in ((one, None, 0), (pack, bounds, 9)):
        leaves = {n: x.clone().requires_grad_() for n, x in given.items()}
        out, _ = gated_delta_rule(**leaves, cu_seqlens=cu_seqlens, backend="triton")
        loss = (out[:, first:] * d_out).sum() + out[:, :first].square().sum()
        results.append([x[:, first:] for x in torch.autograd.grad(loss, list(leaves.values())[:6])])
    for name, alone, packed in zip(inputs, *results, strict=False):
        assert_same_bits(packed, alone, name)


@pytest.mark.parametrize("decay", ["channel", "head", None])
@pytest.mark.parametrize("layout", ["value_groups", "packed"])
def test_no_result_comes_from_uninitialised_memory(layout, decay):
    torch.use_deterministic_algorithms(True)  # torch then fills every empty tensor with NaN
    try:
        case = Case(decay, **LAYOUTS[layout], **SMALL)
        assert all(x.isfinite().all() for x in triton(inputs_of(case), case).values())
    finally:
        torch.use_deterministic_algorithms(False)


def test_strided_operands_and_upstream_gradients():
    case = Case(B=2, T=C + 3, **SMALL)
    inputs = inputs_of(case)
    wide = torch.cat([inputs["q"], inputs["k"], inputs["v"]], -2).contiguous()
    q, k, v = wide.split(2, dim=-2)  # as one projection gives them
    names = ("q", "k", "v", "erase")
    results = []
    for given in (inputs, inputs | {"q": q, "k": k, "v": v}):
        leaves = {n: x.detach().requires_grad_() for n, x in given.items()}
        out, state = gated_delta_rule(**leaves, backend="triton")
        d_out = torch.ones((), device=DEVICE).expand_as(out)  # as sum() gives it
        d_state = torch.ones_like(state).mT
        results.append(
            torch.autograd.grad([out, state], [leaves[n] for n in names], [d_out, d_state])
        )
    for name, plain, strided in zip(names, *results, strict=True):
        assert_same_bits(strided, plain, name)


def test_only_what_is_asked_for():
    """The outputs alone, or the states alone; some operands, or all."""
    case = Case(T=C + 3, **SMALL)
    inputs = inputs_of(case)
    want = {}
    for backend in ("chunked", "triton"):
        leaves = {n: x.clone().requires_grad_(n in ("k", "state")) for n, x in inputs.items()}
        out, state = gated_delta_rule(**leaves, backend=backend)
        ask = [leaves["k"], leaves["state"]]
        want[backend] = [
            *torch.autograd.grad(out.sum(), ask, retain_graph=True),
            *torch.autograd.grad(state.sum(), ask),
        ]
    for a, b in zip(*want.values(), strict=True):
        assert error(a, b) < 1e-5


def test_a_second_derivative_is_refused():
    leaves = {n: x.requires_grad_() for n, x in inputs_of(Case(T=3, **SMALL)).items()}
    out, _ = gated_delta_rule(**leaves, backend="triton")
    with pytest.raises(RuntimeError, match="create_graph"):
        torch.autograd.grad(out.square().sum(), leaves["v"], create_graph=True)


def test_registered_operators_pass_opcheck():
    inputs = inputs_of(Case(B=1, T=C, **SMALL))
    out, state = gated_delta_rule(**inputs, backend="triton")  # registers them
    operands = (*(x for n, x in inputs.items() if n != "state"), inputs["state"])
    backward = torch.ops.gdn2.triton_gated_delta_rule_backward.default
    torch.library.opcheck(backward, (out, state, *operands, None, 1.0))


@pytest.mark.parametrize("compiler", COMPILERS)
def test_compile_whole(compiler):
    inputs = inputs_of(Case(T=C + 3, **SMALL))
    call = partial(gated_delta_rule, backend="triton")
    torch._dynamo.reset()
    results = []
    for f in (call, torch.compile(call, backend=compiler, fullgraph=True)):
        leaves = {n: x.clone().requires_grad_() for n, x in inputs.items()}
        out, state = f(**leaves)
        loss = out.square().sum() + state.square().sum()
        results.append([out, state, *torch.autograd.grad(loss, list(leaves.values()))])
    for plain, compiled in zip(*results, strict=True):
        assert error(compiled, plain) < 1e-5


@pytest.mark.parametrize("save", [None, False, True])
def test_activation_checkpoints(save):
    """Full, and selective: the operator computed again, or its outputs saved."""
    case = Case(T=C + 3, **SMALL)
    inputs = inputs_of(case)
    want = triton(inputs, case)
    calls = []

    def policy(_, op, *arguments, **options):
        rule = op == torch.ops.gdn2.triton_gated_delta_rule.default
        calls.append(rule)
        return CheckpointPolicy.MUST_SAVE if rule and save else CheckpointPolicy.PREFER_RECOMPUTE

    options = (
        {}
        if save is None
        else {"context_fn": partial(create_selective_checkpoint_contexts, policy)}
    )

    def rule(**arguments):
        call = partial(gated_delta_rule, **arguments)
        return checkpoint(call, use_reentrant=False, **options)

    got = run(inputs, case, backend="triton", rule=rule)
    for name in want:
        assert_same_bits(got[name], want[name], name)
    assert save is None or any(calls)
