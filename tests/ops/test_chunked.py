"""The chunked backend against the token loop in float64: the operator's guarantees."""

from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from operator_cases import (
    EXTREMES,
    FORMS,
    GATE_FORMS,
    LAYOUTS,
    Case,
    assert_no_worse,
    assert_same_bits,
    cast,
    error,
    extreme_inputs,
    make_inputs,
    natural_sizes,
    run,
)

from gdn2.ops import chunked, gated_delta_rule, triangular
from gdn2.ops.chunks import KeptChunks

C = chunked.CHUNK


def compare_with_truth(case: Case, *, backend: str = "chunked", seed: int = 0) -> float:
    """Largest error of outputs, state and gradients in float64 against the token loop."""
    inputs = make_inputs(case, seed=seed)
    truth = run(inputs, case, backend="reference")
    got = run(inputs, case, backend=backend)
    return max(error(got[name], truth[name]) for name in truth)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("decay", "erase", "write"), GATE_FORMS)
def test_equals_the_token_loop(decay, erase, write, layout):
    assert compare_with_truth(Case(decay, erase, write, **LAYOUTS[layout])) < 1e-12


@pytest.mark.parametrize("T", [0, 1, C - 1, C, C + 1, 2 * C, 4 * C + 1])
def test_any_length(T):
    assert compare_with_truth(Case(T=T)) < 1e-12


@st.composite
def cases(draw) -> Case:
    H, packed = draw(st.integers(1, 3)), draw(st.booleans())
    lengths = draw(st.lists(st.integers(0, 50), min_size=0, max_size=6))
    bounds = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    return Case(
        *(draw(st.sampled_from(FORMS)) for _ in range(3)),
        B=1 if packed else draw(st.integers(0, 3)),
        T=bounds[-1] if packed else draw(st.integers(0, 3 * C)),
        H=H,
        HV=H * draw(st.integers(1, 3)),
        K=draw(st.integers(1, 20)),
        V=draw(st.integers(1, 20)),
        gates_on_value_heads=draw(st.booleans()),
        cu_seqlens=tuple(bounds) if packed else None,
    )


@settings(max_examples=60, deadline=None, derandomize=True)
@given(cases(), st.integers(1, 9))
def test_any_shape(case, chunks_per_segment):
    with pytest.MonkeyPatch.context() as patch:  # segments of a few chunks, so that there are many
        elements = chunks_per_segment * case.HV * C * max(case.K, case.V)
        patch.setattr(chunked, "_SEGMENT_ELEMENTS", elements)
        assert compare_with_truth(case) < 1e-11


@pytest.mark.parametrize("chunk", [1, 2, 16, 64, 128])
def test_chunk_size_does_not_matter(chunk, monkeypatch):
    monkeypatch.setattr(chunked, "CHUNK", chunk)
    assert compare_with_truth(Case(T=150)) < 1e-12


@pytest.mark.parametrize(("decay", "erase", "write"), GATE_FORMS)
def test_float32_is_as_exact_as_a_float32_token_loop(decay, erase, write):
    case = Case(decay, erase, write, B=1, T=300, K=32, V=32)
    inputs = make_inputs(case)
    single = cast(inputs, torch.float32)
    truth = run(cast(single, torch.float64), case, backend="reference")
    loop = run(single, case, backend="reference")
    assert_no_worse(run(single, case, backend="chunked"), than=loop, truth=truth, factor=2.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs_are_computed_in_float32(dtype):
    case = Case(T=150, K=32, V=32)
    inputs = cast(make_inputs(case), dtype)
    truth = run(cast(inputs, torch.float64), case, backend="reference")
    loop = run(inputs, case, backend="reference")
    got = run(inputs, case, backend="chunked")
    assert got["out"].dtype == got["d_q"].dtype == dtype
    assert got["new_state"].dtype == torch.float32
    assert_no_worse(got, than=loop, truth=truth, factor=1.5)


@pytest.mark.parametrize("decay", ["head", "channel"])
@pytest.mark.parametrize("extreme", EXTREMES)
def test_extreme_gates_stay_right(extreme, decay):
    case = Case(decay=decay, B=1, T=2 * C + 1, K=16, V=16)
    inputs = extreme_inputs(extreme, case)
    truth = run(inputs, case, backend="reference")
    got = run(inputs, case, backend="chunked")
    sizes = natural_sizes(truth, inputs)
    assert max(error(got[name], truth[name], sizes[name]) for name in truth) < 1e-11
    single = cast(inputs, torch.float32)
    truth = run(cast(single, torch.float64), case, backend="reference")
    loop = run(single, case, backend="reference")
    got = run(single, case, backend="chunked")
    # The inverse's entries alternate in sign where keys repeat: rounding grows with their sum.
    factor = 32.0 if extreme == "equal keys" else 4.0
    assert_no_worse(got, than=loop, truth=truth, factor=factor, sizes=natural_sizes(truth, single))


@pytest.mark.parametrize("layout", ["batch", "packed"])
@pytest.mark.parametrize("decay", FORMS)
@pytest.mark.parametrize("erase", FORMS)
def test_future_tokens_cannot_change_the_past(decay, erase, layout):
    case = Case(decay, erase, **LAYOUTS[layout])
    inputs = make_inputs(case, dtype=torch.float32)
    other = make_inputs(case, dtype=torch.float32, seed=1)
    P = C + C // 2 + 3
    edited = {
        n: x if x is None or n == "state" else torch.cat([x[:, :P], other[n][:, P:]], dim=1)
        for n, x in inputs.items()
    }
    a, b = (run(x, case, upstream_until=P) for x in (inputs, edited))
    assert_same_bits(a["out"][:, :P], b["out"][:, :P], "outputs")
    assert not torch.equal(a["out"][:, P:], b["out"][:, P:])
    for name in a:
        if name.startswith("d_") and name != "d_state":
            assert_same_bits(a[name][:, :P], b[name][:, :P], name)
            assert not b[name][:, P:].any(), f"{name} reaches into the future"
    assert_same_bits(a["d_state"], b["d_state"], "d_state")


@pytest.mark.parametrize("P", [0, 1, C - 1, C, C + 9])
@pytest.mark.parametrize("decay", FORMS)
def test_split_sequence_equals_whole(P, decay):
    case = Case(decay, T=2 * C + 3)
    inputs = make_inputs(case, dtype=torch.float32)
    whole, last = gated_delta_rule(**inputs)
    state, pieces = inputs.pop("state"), []
    for piece in (slice(0, P), slice(P, case.T)):
        tokens = {n: x if x is None else x[:, piece] for n, x in inputs.items()}
        out, state = gated_delta_rule(**tokens, state=state)
        pieces.append(out)
    assert error(torch.cat(pieces, dim=1), whole) < 2e-6
    assert error(state, last) < 2e-6


def test_packed_equals_separate():
    bounds = (0, 5, C + 5, C + 5, 3 * C)
    case = Case(B=1, T=3 * C, cu_seqlens=bounds)
    inputs = make_inputs(case, dtype=torch.float32)
    out, state = gated_delta_rule(**inputs, cu_seqlens=torch.tensor(bounds))
    for n, (start, stop) in enumerate(pairwise(bounds)):
        alone = {k: x[n : n + 1] if k == "state" else x[:, start:stop] for k, x in inputs.items()}
        alone_out, alone_state = gated_delta_rule(**alone)
        assert error(out[:, start:stop], alone_out) < 2e-6
        assert error(state[n : n + 1], alone_state) < 2e-6


@pytest.mark.parametrize("neighbours", ["other", "nan"])
@pytest.mark.parametrize("layout", ["batch", "packed"])
def test_neighbours_values_do_not_matter_to_the_bit(layout, neighbours):
    case = Case(**LAYOUTS[layout])
    inputs = make_inputs(case, dtype=torch.float32)
    other = make_inputs(case, dtype=torch.float32, seed=1)
    start, stop, n = (0, case.T, 0) if layout == "batch" else (C + 5, 2 * C, 3)
    edited = {}
    for name, x in inputs.items():
        edited[name] = other[name].clone() if neighbours == "other" else x * float("nan")
        if name == "state":
            edited[name][n] = x[n]
        else:
            edited[name][0, start:stop] = x[0, start:stop]
    a, b = run(inputs, case), run(edited, case)
    for name in a:
        if name in ("new_state", "d_state"):
            assert_same_bits(a[name][n], b[name][n], name)
        else:
            assert_same_bits(a[name][0, start:stop], b[name][0, start:stop], name)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_runs_are_bit_identical(layout):
    case = Case(**LAYOUTS[layout])
    inputs = make_inputs(case, dtype=torch.float32)
    a, b = run(inputs, case), run(inputs, case)
    for name in a:
        assert_same_bits(a[name], b[name], name)


@pytest.fixture
def new_buffers(monkeypatch):
    monkeypatch.setattr(chunked, "_on_cpu", KeptChunks())


@pytest.fixture
def uninitialised_memory_is_nan(new_buffers):
    torch.use_deterministic_algorithms(True)  # torch then fills every empty tensor with NaN
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("uninitialised_memory_is_nan")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("decay", "erase", "write"), [f for f in GATE_FORMS if len(set(f)) != 2])
def test_no_result_comes_from_uninitialised_memory(decay, erase, write, layout):
    assert compare_with_truth(Case(decay, erase, write, **LAYOUTS[layout])) < 1e-12


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("decay", "erase", "write"), [f for f in GATE_FORMS if len(set(f)) != 2])
def test_an_earlier_call_leaves_no_trace(decay, erase, write, layout):
    """Buffers are kept from call to call."""
    case = Case(decay, erase, write, **LAYOUTS[layout])
    inputs = make_inputs(case, dtype=torch.float32)
    clean = run(inputs, case)
    run({n: None if x is None else x * torch.nan for n, x in inputs.items()}, case)
    again = run(inputs, case)
    for name in clean:
        assert_same_bits(again[name], clean[name], name)


def test_threads_do_not_disturb_each_other():
    case = Case(B=1, T=300, H=2, HV=2, K=32, V=32)
    inputs = [make_inputs(case, seed=seed, dtype=torch.float32) for seed in range(4)]
    alone = [run(x, case) for x in inputs]
    with ThreadPoolExecutor(4) as threads:
        for _ in range(5):
            for got, want in zip(threads.map(lambda x: run(x, case), inputs), alone, strict=True):
                for name in want:
                    assert_same_bits(got[name], want[name], name)


def test_given_state_is_left_alone_and_never_returned():
    for T in (0, 40):
        inputs = make_inputs(Case(T=T))
        before = inputs["state"].clone()
        _, state = gated_delta_rule(**inputs)
        assert torch.equal(inputs["state"], before)
        state.zero_()
        assert torch.equal(inputs["state"], before)


def test_only_inputs_and_one_state_a_segment_are_kept_for_the_backward():
    case = Case(B=1, T=4096, H=4, HV=4, K=32, V=32)
    inputs = {n: x.requires_grad_() for n, x in make_inputs(case, dtype=torch.float32).items()}
    given = {x.untyped_storage().data_ptr() for x in inputs.values()}
    kept: list[int] = []

    def count(x):
        if x.untyped_storage().data_ptr() not in given:
            kept.append(x.numel())
        return x

    with torch.autograd.graph.saved_tensors_hooks(count, lambda x: x):
        gated_delta_rule(**inputs)
    segment = chunked._SEGMENT_ELEMENTS // (case.H * case.K)  # tokens
    states = -(-case.T // segment)
    assert sum(kept) <= (states + 1) * case.HV * case.K * case.V


def reordered(x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """The same numbers in memory of another order, with gaps."""
    order = torch.randperm(x.ndim, generator=generator).tolist()
    wide = torch.empty(*(x.shape[i] for i in order), 2, dtype=x.dtype)
    view = wide[..., 1].permute([order.index(i) for i in range(x.ndim)])
    return view.copy_(x)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("seed", range(6))
def test_memory_layout_does_not_matter(layout, seed):
    case = Case(**LAYOUTS[layout])
    generator = torch.Generator().manual_seed(seed)
    inputs = make_inputs(case)
    bounds = case.cu_seqlens and torch.tensor(case.cu_seqlens)

    def results(arrange):
        leaves = {n: x.clone().requires_grad_() for n, x in inputs.items()}
        views = {n: arrange(x) for n, x in leaves.items()}
        out, state = gated_delta_rule(**views, cu_seqlens=bounds)
        upstream = [
            arrange(torch.linspace(-1, 1, x.numel()).view(x.shape).to(x)) for x in (out, state)
        ]
        return [out, state, *torch.autograd.grad([out, state], list(leaves.values()), upstream)]

    plain = results(lambda x: x)
    other = results(lambda x: Reordered.apply(x, generator))
    for a, b in zip(plain, other, strict=True):
        assert error(b, a) < 1e-12


class Reordered(torch.autograd.Function):
    """`reordered`; so is the gradient, which then reaches the operator in that order."""

    @staticmethod
    def forward(ctx, x, generator):
        return reordered(x, generator)

    @staticmethod
    def backward(ctx, dx):
        return dx, None


def test_one_tensor_may_be_expanded_and_used_twice():
    k = torch.nn.functional.normalize(torch.randn(2, 70, 1, 8, dtype=torch.float64), dim=-1)
    gate = torch.rand(1, 70, 1, 1, dtype=torch.float64)
    results = []
    for backend in ("reference", "chunked"):
        x, w = k.clone().requires_grad_(), gate.clone().requires_grad_()
        wide, gates = x.expand(2, 70, 3, 8), w.expand(2, 70, 3, 8)
        out, state = gated_delta_rule(
            wide, wide, wide, log_decay=-gates, erase=gates, write=gates, backend=backend
        )
        results.append([out, *torch.autograd.grad(out.sum() + state.sum(), [x, w])])
    for true, got in zip(*results, strict=True):
        assert error(got, true) < 1e-12


def test_forward_mode_is_refused():
    x = make_inputs(Case(B=1, T=4))
    q, rest = x.pop("q"), x
    with pytest.raises(NotImplementedError, match="forward-mode"):
        torch.func.jvp(lambda q: gated_delta_rule(q, **rest)[0], (q,), (q,))


def test_gradients_of_gradients_are_refused():
    inputs = {n: x.requires_grad_() for n, x in make_inputs(Case(B=1, T=4)).items()}
    out, _ = gated_delta_rule(**inputs, backend="chunked")
    with pytest.raises(RuntimeError, match="no gradient of its own"):
        torch.autograd.grad(out.sum(), inputs["q"], create_graph=True)


@pytest.mark.parametrize("decay", FORMS)
def test_calls_after_a_first_one_in_inference_mode(decay, monkeypatch):
    """What the first call of a size makes may not be tensors of inference mode alone."""
    case = Case(decay, K=24)
    inputs = make_inputs(case, dtype=torch.float32)
    plain, (out, _) = run(inputs, case), gated_delta_rule(**inputs, scale=case.scale)
    triangular._constants.cache_clear()
    monkeypatch.setattr(chunked, "_on_cpu", KeptChunks())
    with torch.inference_mode():
        gated_delta_rule(**inputs, scale=case.scale)
    assert torch.equal(gated_delta_rule(**inputs, scale=case.scale)[0], out)
    got = run(inputs, case)
    assert all(torch.equal(got[name], plain[name]) for name in plain)
