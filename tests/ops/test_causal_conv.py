"""The short convolution against torch's own, packed, split and stepped."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from gdn2.ops import causal_conv, causal_conv_step


def make(B, T, D, W, *, bias=True, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    x, weight = (torch.randn(s, generator=g, dtype=dtype) for s in ((B, T, D), (D, W)))
    return x, weight, torch.randn(D, generator=g, dtype=dtype) if bias else None


@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("T", "W"), [(1, 4), (2, 4), (9, 4), (9, 1), (9, 2)])
def test_equals_a_grouped_convolution(T, W, bias, activation):
    x, weight, b = make(2, T, 5, W, bias=bias)
    y, state = causal_conv(x, weight, b, activation=activation)
    padded = F.pad(x.transpose(1, 2), (W - 1, 0))
    truth = F.conv1d(padded, weight[:, None], b, groups=5).transpose(1, 2)
    truth = F.silu(truth) if activation else truth
    torch.testing.assert_close(y, truth, rtol=1e-13, atol=1e-13)
    assert torch.equal(state, padded[..., padded.shape[-1] - (W - 1) :])


def test_gradients_are_those_of_finite_differences():
    x, weight, bias = (t.requires_grad_() for t in make(1, 7, 3, 4))
    state = torch.randn(3, 3, 3, dtype=torch.float64, requires_grad=True)
    cu_seqlens = torch.tensor([0, 2, 2, 7])

    def function(x, weight, bias, state):
        return causal_conv(x, weight, bias, state=state, cu_seqlens=cu_seqlens)

    assert torch.autograd.gradcheck(function, (x, weight, bias, state))


@pytest.mark.parametrize("one_dnn", [True, False])
@pytest.mark.parametrize("D", [5, 64])
def test_float32_is_exact_with_and_without_onednn(D, one_dnn):
    double = make(1, 300, D, 4)
    cu_seqlens, results = torch.tensor([0, 2, 2, 130, 300]), []
    with torch.backends.mkldnn.flags(enabled=one_dnn):
        for dtype in (torch.float64, torch.float32):
            leaves = [t.to(dtype).requires_grad_() for t in double]
            y, _ = causal_conv(*leaves, cu_seqlens=cu_seqlens)
            results.append((y, *torch.autograd.grad(y.square().sum(), leaves)))
    for want, got in zip(*results, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=0, atol=2e-6 * want.abs().max().item())


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=6), st.integers(1, 5))
def test_packed_equals_separate(lengths, W):
    bounds = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    x, weight, bias = make(1, bounds[-1], 4, W, dtype=torch.float32)
    history = torch.randn(len(lengths), 4, W - 1)
    y, state = causal_conv(x, weight, bias, state=history, cu_seqlens=torch.tensor(bounds))
    for n, (start, stop) in enumerate(pairwise(bounds)):
        alone = causal_conv(x[:, start:stop], weight, bias, state=history[n : n + 1])
        torch.testing.assert_close(y[:, start:stop], alone[0])
        assert torch.equal(state[n : n + 1], alone[1])


@pytest.mark.parametrize("P", [0, 1, 2, 3, 4, 8])
def test_split_sequence_equals_whole(P):
    x, weight, bias = make(2, 8, 4, 4, dtype=torch.float32)
    whole, last = causal_conv(x, weight, bias)
    first, state = causal_conv(x[:, :P], weight, bias)
    second, state = causal_conv(x[:, P:], weight, bias, state=state)
    torch.testing.assert_close(torch.cat([first, second], dim=1), whole)
    assert torch.equal(state, last)


def test_neighbours_values_do_not_matter_to_the_bit():
    x, weight, bias = make(1, 20, 4, 4, dtype=torch.float32)
    cu_seqlens = torch.tensor([0, 7, 15, 20])
    y, state = causal_conv(x, weight, bias, cu_seqlens=cu_seqlens)
    edited = torch.cat([x[:, :7] * float("nan"), x[:, 7:15], -x[:, 15:]], dim=1)
    other, other_state = causal_conv(edited, weight, bias, cu_seqlens=cu_seqlens)
    assert torch.equal(y[:, 7:15], other[:, 7:15])
    assert torch.equal(state[1], other_state[1])


@pytest.mark.parametrize("bias", [False, True])
def test_half_precision_gradients_are_summed_in_float32(bias):
    operands = [t for t in make(2, 50, 8, 4, dtype=torch.bfloat16, bias=bias) if t is not None]
    upstream, grads = torch.randn(2, 50, 8), []
    for dtype in (torch.bfloat16, torch.float64):
        leaves = [t.to(dtype).requires_grad_() for t in operands]
        y, _ = causal_conv(*leaves)
        grads.append(torch.autograd.grad(y, leaves, upstream.bfloat16().to(dtype)))
    for got, truth in zip(*grads, strict=True):
        assert got.dtype == torch.bfloat16
        assert (got - truth).abs().max() <= 2**-8 * truth.abs().max()


def test_step_equals_sequence():
    x, weight, bias = make(2, 8, 4, 4)
    whole, last = causal_conv(x, weight, bias)
    state = torch.zeros(2, 4, 3, dtype=x.dtype)
    for t in range(8):
        y, same = causal_conv_step(x[:, t], weight, bias, state=state)
        assert same is state
        torch.testing.assert_close(y, whole[:, t], rtol=1e-13, atol=1e-13)
    assert torch.equal(state, last)


@pytest.mark.parametrize("T", [0, 1, 2, 7])
@pytest.mark.parametrize("W", [1, 2, 4])
def test_step_of_a_few_tokens_on_a_pool(T, W):
    x, weight, bias = make(3, T, 5, W)
    pool = torch.randn(6, 5, W - 1, dtype=x.dtype)
    before, indices = pool.clone(), torch.tensor([4, -1, 1], dtype=torch.int32)
    y, same = causal_conv_step(x, weight, bias, state=pool, state_indices=indices)
    assert same is pool
    assert not y[1].any()
    for row, slot in ((0, 4), (2, 1)):
        truth, state = causal_conv(x[row, None], weight, bias, state=before[slot, None])
        torch.testing.assert_close(y[row, None], truth, rtol=1e-13, atol=1e-13)
        assert torch.equal(pool[slot, None], state)
    assert torch.equal(pool[[0, 2, 3, 5]], before[[0, 2, 3, 5]])


def test_step_has_no_gradient():
    x, weight, bias = make(2, 1, 4, 4)
    with pytest.raises(RuntimeError, match=r"causal_conv_step .* has no gradient"):
        causal_conv_step(x, weight.requires_grad_(), bias, state=torch.zeros(2, 4, 3).double())


def test_half_precision_is_summed_in_float32():
    x, weight, bias = make(1, 50, 8, 4, dtype=torch.bfloat16)
    y, state = causal_conv(x, weight, bias)
    truth, _ = causal_conv(x.double(), weight.double(), bias.double())
    assert y.dtype == state.dtype == torch.bfloat16
    torch.testing.assert_close(y.double(), truth, rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 8)}, "x and weight must be"),
        ({"weight": torch.zeros(3, 4)}, "x and weight must be"),
        ({"bias": torch.zeros(5)}, r"bias must be \[D\] = \[4\]"),
        ({"activation": "relu"}, "activation must be one of"),
        ({"state": torch.zeros(2, 4, 4)}, r"state must be \[N, D, W - 1\] = \[2, 4, 3\]"),
        ({"cu_seqlens": torch.tensor([0, 8])}, "needs B == 1"),
    ],
)
def test_broken_contract_is_named(change, message):
    arguments = {"x": torch.zeros(2, 8, 4), "weight": torch.zeros(4, 4), **change}
    with pytest.raises(ValueError, match=message):
        causal_conv(**arguments)


def test_broken_contract_of_a_step_is_named():
    x, weight, bias = make(2, 1, 4, 4)
    state = torch.zeros(2, 4, 3).double()
    for change, message in (
        ({"state": state[:1]}, r"state must be \[N, D, W - 1\] = \[2, 4, 3\]"),
        ({"state_indices": torch.zeros(3, dtype=torch.int32)}, r"state_indices must be \[B\]"),
        ({"x": x[..., :3]}, r"x and weight must be \[B, D\] or \[B, T, D\]"),
        ({"backend": "cuda"}, "backend must be None or one of"),
    ):
        arguments = {"x": x, "weight": weight, "bias": bias, "state": state, **change}
        with pytest.raises(ValueError, match=message):
            causal_conv_step(**arguments)


def test_autocast_does_not_narrow_the_sums():
    x, weight = torch.randn(2, 50, 16), torch.randn(16, 4)
    y, _ = causal_conv(x, weight)
    with torch.autocast("cpu", torch.bfloat16):
        got, _ = causal_conv(x, weight)
        back = torch.autograd.functional.vjp(lambda x: causal_conv(x, weight)[0], x, y)[1]
    assert torch.equal(got, y)
    assert torch.equal(
        back, torch.autograd.functional.vjp(lambda x: causal_conv(x, weight)[0], x, y)[1]
    )
