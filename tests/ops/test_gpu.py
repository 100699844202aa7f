"""What only a CUDA device can show (`make test-gpu`, with the tests of test_triton.py)."""

from functools import partial

import pytest
import torch
from operator_cases import (
    GATE_FORMS,
    LAYOUTS,
    MEMBERS,
    Case,
    assert_no_worse,
    assert_rounded_no_worse,
    assert_same_bits,
    cast,
    error,
    make_inputs,
    put,
    rounded_products,
    run,
)

from benchmarks.peers import load_kernels
from gdn2.layers import GatedDeltaNet2
from gdn2.ops import BACKENDS, causal_conv, causal_conv_step, gated_delta_rule, gated_delta_step

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]
REAL = {"K": 128, "V": 128}


def on_device(case: Case, dtype: torch.dtype = torch.float32) -> dict:
    """Operands of `dtype`, but log_decay in float32 at least, as a layer gives it."""
    inputs = put(cast(make_inputs(case), dtype), "cuda")
    if case.decay and dtype != torch.float64:
        inputs["log_decay"] = inputs["log_decay"].float()
    return inputs


def forward(inputs: dict, case: Case, backend: str = "triton") -> dict:
    bounds = None if case.cu_seqlens is None else torch.tensor(case.cu_seqlens, device="cuda")
    with torch.no_grad():
        results = gated_delta_rule(**inputs, scale=case.scale, cu_seqlens=bounds, backend=backend)
    return dict(zip(("out", "new_state"), results, strict=True))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("decay", "erase", "write"), GATE_FORMS)
def test_chunked_equals_the_token_loop(decay, erase, write, layout):
    case = Case(decay, erase, write, K=32, V=32, **LAYOUTS[layout])
    inputs = cast(make_inputs(case), torch.float32)
    truth = run(cast(inputs, torch.float64), case, backend="reference")
    loop = run(inputs, case, backend="reference")
    results = run(put(inputs, "cuda"), case, backend="chunked")
    got = {name: x.cpu() for name, x in results.items()}
    assert_no_worse(got, than=loop, truth=truth, factor=2.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("member", MEMBERS)
def test_a_long_sequence(member, dtype):
    """Of several segments; the truth is the chunked rule in float64, which the loop has shown."""
    case = Case(*MEMBERS[member], B=1, T=20_011, H=2, HV=2, **REAL)
    inputs = on_device(case, dtype)
    truth = forward(cast(inputs, torch.float64), case, "chunked")
    got = forward(inputs, case)
    if dtype == torch.float32:
        assert_no_worse(got, than=forward(inputs, case, "chunked"), truth=truth, factor=2.0)
    else:
        with rounded_products(dtype):
            rounded = forward(inputs, case, "chunked")
        assert_rounded_no_worse(got, than=rounded, truth=truth)


@pytest.mark.peer
@pytest.mark.parametrize("channels", [64, 128])
@pytest.mark.parametrize("member", MEMBERS)
def test_no_worse_than_the_peers_kernel(member, channels):
    kernels = load_kernels(member)
    if not kernels:
        pytest.skip("flash-linear-attention is not installed")
    case = Case(
        *MEMBERS[member], B=2, T=257, H=4, HV=4, K=channels, V=channels, scale=channels**-0.5
    )
    inputs = on_device(case, torch.bfloat16)
    inputs.pop("state")
    if case.erase == "head":
        inputs["write"] = inputs["erase"] = inputs["erase"] / 2
    truth = forward(cast(inputs, torch.float64), case, "chunked")["out"]
    ours = forward(inputs, case)["out"].double()
    for name, kernel in kernels.items():
        theirs = kernel(*inputs.values()).double()
        root_mean_square = [(x - truth).square().mean().sqrt().item() for x in (ours, theirs)]
        assert root_mean_square[0] <= 1.05 * root_mean_square[1], name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("member", MEMBERS)
def test_bits_at_real_sizes(member, dtype):
    """The same twice; and whatever is appended, beside it in the batch, or packed with it."""
    case = Case(*MEMBERS[member], B=3, T=9_001, H=2, HV=2, **REAL)
    inputs = on_device(case, dtype)
    whole = forward(inputs, case)
    for name, again in forward(inputs, case).items():
        assert_same_bits(again, whole[name], f"{name}, twice,")
    inputs = {n: x for n, x in inputs.items() if x is not None}
    one = {n: x[1:2] for n, x in inputs.items()}
    assert_same_bits(forward(one, case)["out"], whole["out"][1:2], "alone")
    for T in (100, 8192, 8193):
        start = {n: x if n == "state" else x[:, :T] for n, x in one.items()}
        assert_same_bits(forward(start, case)["out"], whole["out"][1:2, :T], f"up to {T}")
    pack = {
        n: x[:2] if n == "state" else torch.cat([x[:1, :77], x[1:2]], 1) for n, x in inputs.items()
    }
    packed = Case(*MEMBERS[member], cu_seqlens=(0, 77, 77 + case.T), **REAL)
    assert_same_bits(forward(pack, packed)["out"][:, 77:], whole["out"][1:2], "packed")


@pytest.mark.parametrize("backend", BACKENDS)
def test_step_on_a_pool(backend):
    case = Case(B=3, T=2, K=16, V=16)
    inputs = on_device(case)
    pool = inputs.pop("state")
    indices = torch.tensor([2, -1, 0], dtype=torch.int32, device="cuda")
    out, _ = gated_delta_step(**inputs, state=pool, state_indices=indices, backend=backend)
    assert not out[1].any()
    assert out[[0, 2]].isfinite().all()


def test_the_convolution_equals_that_of_the_cpu():
    x, weight = torch.randn(1, 50, 24), torch.randn(24, 4)
    bounds = torch.tensor([0, 3, 3, 50])
    want = causal_conv(x, weight, cu_seqlens=bounds)
    got = causal_conv(x.cuda(), weight.cuda(), cu_seqlens=bounds.cuda())
    for mine, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(mine.cpu(), theirs)


def replayed(call, inputs: dict[str, torch.Tensor], others: dict[str, torch.Tensor]):
    """What a CUDA graph of `call(**inputs)` gives when `others` are put where the inputs were."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), torch.no_grad():
        call(**{n: x.clone() for n, x in inputs.items()})  # compiles
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        results = call(**inputs)
    for name, x in others.items():
        inputs[name].copy_(x)
    graph.replay()
    return results


@pytest.mark.parametrize("packed", [False, True])
def test_cuda_graphs_of_a_sequence(packed):
    case = Case(B=1, T=300, K=64, V=64, cu_seqlens=(0, 80, 300) if packed else None)
    bounds = {"cu_seqlens": torch.tensor([0, 80, 300], device="cuda")} if packed else {}
    inputs, others = (on_device(case) for _ in range(2))
    others = {n: x.flip(0) * 0.5 for n, x in others.items()}
    others |= {"cu_seqlens": torch.tensor([0, 131, 300], device="cuda")} if packed else {}
    call = partial(gated_delta_rule, backend="triton")
    want = call(**others)
    for got, true in zip(replayed(call, inputs | bounds, others), want, strict=True):
        assert_same_bits(got, true, "replayed")


def test_cuda_graphs_of_decoding():
    """The state is where it was; slots are read when the graph is replayed."""
    inputs = on_device(Case(B=4, T=1, K=64, V=64))
    pool = torch.cat([inputs.pop("state")] * 2)
    indices = torch.tensor([0, 1, 2, 3], device="cuda")
    others = {n: x * 0.5 for n, x in inputs.items()} | {
        "state": pool.clone() * 2,
        "state_indices": torch.tensor([7, -1, 2, 4], device="cuda"),
    }
    call = partial(gated_delta_step, backend="triton")
    given = inputs | {"state": pool, "state_indices": indices}
    got, state = replayed(call, given, others)
    want, true_state = call(**others)
    assert_same_bits(got, want, "replayed")
    assert_same_bits(state, true_state, "state")
    assert state is pool


def test_cuda_graphs_of_the_convolution_step():
    shapes = {"x": (4, 1, 64), "weight": (64, 4), "state": (4, 64, 3)}
    inputs, others = (
        {n: torch.randn(shape, device="cuda") for n, shape in shapes.items()} for _ in range(2)
    )
    call = partial(causal_conv_step, backend="triton")
    got, state = replayed(call, inputs, others)
    want, true_state = call(**others)
    assert_same_bits(got, want, "replayed")
    assert_same_bits(state, true_state, "state")


def test_a_layer_trains_and_decodes():
    """In bfloat16, beside itself in float64 on the CPU."""
    torch.manual_seed(0)
    layer = GatedDeltaNet2(128, num_heads=2, head_k_dim=64, head_v_dim=64)
    x = torch.randn(2, 70, 128)
    want, _ = layer.double()(x.double())
    layer = layer.to("cuda", torch.bfloat16)
    got, _ = layer(x.cuda().bfloat16())
    got.float().square().mean().backward()
    assert all(p.grad.isfinite().all() for p in layer.parameters())
    with torch.no_grad():
        _, state = layer(x[:, :69].cuda().bfloat16())
        last, _ = layer.step(x[:, 69].cuda().bfloat16(), state)
    assert error(got.cpu(), want) < 0.05
    assert error(last.cpu(), want[:, 69]) < 0.05
