import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from gdn2.layers import Attention, attention

D, H, HEAD = 12, 2, 4
EXACT = {"rtol": 1e-10, "atol": 1e-12}  # float64: only the order of sums differs
# One below, one inside and one above a block of queries (128), and a window of several blocks.
WINDOWS = (None, 1, 5, 200)


def build(window):
    torch.manual_seed(0)
    return Attention(D, H, head_dim=HEAD, window=window).double()


def inputs(*shape):
    return torch.randn(*shape, D, dtype=torch.float64)


def attend_ref(layer, x):
    """One sequence ``[T, D]`` with a T x T mask, rotations as complex numbers."""
    T = x.shape[0]
    t = torch.arange(T)
    half = HEAD // 2
    frequency = 10000.0 ** (-torch.arange(half, dtype=x.dtype) / half)
    turn = torch.polar(torch.ones(T, half, dtype=x.dtype), t[:, None] * frequency)

    def heads(linear):
        return linear(x).view(T, H, HEAD).transpose(0, 1)

    def rotated(linear):
        y = heads(linear)
        z = torch.complex(y[..., :half], y[..., half:]) * turn
        return torch.cat([z.real, z.imag], -1)

    distance = t[:, None] - t
    mask = (distance >= 0) & (distance < (layer.window or T))
    scores = rotated(layer.q_proj) @ rotated(layer.k_proj).mT / HEAD**0.5
    out = scores.masked_fill(~mask, -torch.inf).softmax(-1) @ heads(layer.v_proj)
    return layer.o_proj(out.transpose(0, 1).flatten(1))


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("T", [1, 5, 6, 127, 300, 520])
def test_equals_masked_softmax(window, T):
    layer, x = build(window), inputs(2, T).requires_grad_()
    y, _ = layer(x)
    expected = torch.stack([attend_ref(layer, row) for row in x])
    torch.testing.assert_close(y, expected, **EXACT)
    (grad,) = torch.autograd.grad(y.sin().sum(), x)
    torch.testing.assert_close(grad, torch.autograd.grad(expected.sin().sum(), x)[0], **EXACT)


@pytest.mark.parametrize("window", WINDOWS)
def test_packed_equals_separate(window):
    layer, lengths = build(window), [3, 0, 270, 1, 4, 130]
    x = inputs(1, sum(lengths)).requires_grad_()
    cu_seqlens = F.pad(torch.tensor(lengths).cumsum(0), (1, 0))
    y, state = layer(x, cu_seqlens=cu_seqlens)
    expected = torch.cat([attend_ref(layer, row) for row in x[0].split(lengths)])
    torch.testing.assert_close(y[0], expected, **EXACT)
    (grad,) = torch.autograd.grad(y.sin().sum(), x)
    torch.testing.assert_close(grad, torch.autograd.grad(expected.sin().sum(), x)[0], **EXACT)
    assert state.length.tolist() == lengths
    assert len(state.keys) == sum(min(length, window or 999) for length in lengths)


@pytest.mark.parametrize("window", WINDOWS)
@torch.no_grad()
def test_any_mix_of_prefill_step_and_continuation_equals_the_whole(window):
    """Three sequences of different lengths go through every pair of state layouts."""
    layer = build(window)
    x = [inputs(T) for T in (290, 22, 33)]
    whole = [attend_ref(layer, row) for row in x]
    got = [[] for _ in x]
    at = [0, 0, 0]

    def take(counts):
        pieces = [row[i : i + n] for row, i, n in zip(x, at, counts, strict=True)]
        for i, n in enumerate(counts):
            at[i] += n
        return pieces

    def put(ys):
        for row, y in zip(got, ys, strict=True):
            row.append(y)

    state = None
    for counts in ([250, 3, 0], "step", "step", [2, 0, 4], [9, 1, 3], *["step"] * 7, [4, 1, 7]):
        if counts == "step":
            y, state = layer.step(torch.cat(take([1, 1, 1])), state)
            put(y.split(1))
        else:
            cu_seqlens = F.pad(torch.tensor(counts).cumsum(0), (1, 0))
            y, state = layer(torch.cat(take(counts))[None], state=state, cu_seqlens=cu_seqlens)
            put(y[0].split(counts))
    for pieces, expected in zip(got, whole, strict=True):
        y = torch.cat(pieces)
        torch.testing.assert_close(y, expected[: len(y)], **EXACT)
    rest = min(len(row) - i for row, i in zip(x, at, strict=True))
    y, _ = layer(torch.stack([p[:rest] for p in take([rest] * 3)]), state=state)
    for row, expected, end in zip(y, whole, at, strict=True):
        torch.testing.assert_close(row, expected[end - rest : end], **EXACT)


@torch.no_grad()
def test_ring_wraps_around_in_place_and_keeps_its_size():
    layer, x = build(5), inputs(1, 30)
    y, _ = layer(x)
    _, state = layer(x[:, :2])
    _, state = layer.step(x[:, 2], state)
    keys = state.keys
    assert keys.shape == (1, 5, H, HEAD)
    for t in range(3, 30):
        out, state = layer.step(x[:, t], state)
        torch.testing.assert_close(out, y[:, t], **EXACT)
    assert state.keys is keys


@torch.no_grad()
def test_forward_leaves_the_given_state_as_it_is():
    layer, x = build(5), inputs(2, 8)
    _, state = layer.step(x[:, 0], layer(x)[1])
    before = [t.clone() for t in state[:3]]
    layer(x, state=state)
    layer(x[:, :0], state=state)
    assert all(torch.equal(t, old) for t, old in zip(state[:3], before, strict=True))


@torch.no_grad()
def test_a_step_of_full_attention_leaves_the_given_state_as_it_is():
    layer, x = build(None), inputs(2, 8)
    state = layer(x[:, :6])[1].rings()
    before = [t.clone() for t in state[:3]]
    first, _ = layer.step(x[:, 6], state)
    again, _ = layer.step(x[:, 6], state)
    assert torch.equal(first, again)
    assert all(torch.equal(t, old) for t, old in zip(state[:3], before, strict=True))


def test_future_tokens_cannot_change_past_outputs():
    layer, x = build(50).float(), inputs(1, 300).float()
    changed = x.clone()
    changed[:, 200:] = 7.0
    assert torch.equal(layer(x)[0][:, :200], layer(changed)[0][:, :200])


def test_select_copies_the_chosen_sequences():
    layer, x = build(4), inputs(3, 6)
    _, state = layer(x)
    chosen = torch.tensor([2, 0, 2])
    y, _ = layer.step(x[chosen, 0], state.select(chosen))
    z, _ = layer.step(x[:, 0], state)
    torch.testing.assert_close(y, z[chosen], **EXACT)


class LargestTensor(TorchDispatchMode):
    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, tuple | list) else [out]:
            if isinstance(t, torch.Tensor):
                self.numel = max(self.numel, t.numel())
        return out


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("window", [None, 64])
def test_no_tensor_is_quadratic_in_the_length(window, packed):
    T = 4096
    layer, x = build(window).float(), inputs(1, T).float().requires_grad_()
    cu_seqlens = torch.tensor([0, 3000, T]) if packed else None
    with LargestTensor() as largest:
        layer(x, cu_seqlens=cu_seqlens)[0].sum().backward()
    assert largest.numel <= 16 * T * D


def test_thousands_of_documents_are_a_few_calls(monkeypatch):
    calls = []
    attend = attention.causal_attention
    monkeypatch.setattr(
        attention, "causal_attention", lambda *a, **kw: calls.append(1) or attend(*a, **kw)
    )
    lengths = torch.randint(0, 9, (2000,))
    layer = build(64)
    layer(inputs(1, int(lengths.sum())), cu_seqlens=F.pad(lengths.cumsum(0), (1, 0)))
    assert len(calls) <= 4


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match="head_dim must be even"):
        Attention(D, H, head_dim=3)
    with pytest.raises(ValueError, match="window must be None or at least 1, got 0"):
        Attention(D, H, window=0)
    with pytest.raises(ValueError, match="needs B == 1, got B=2"):
        build(4)(inputs(2, 3), cu_seqlens=torch.tensor([0, 3]))
    with pytest.raises(ValueError, match="cu_seqlens must rise from 0 to T=10"):
        build(4)(inputs(1, 10), cu_seqlens=torch.tensor([0, 5]))
