"""Laws that every recurrent layer keeps, whatever it computes."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from recurrent_layers import LAYERS, build, inputs
from torch import nn

EXACT = {"rtol": 1e-9, "atol": 1e-11}  # float64: only the order of sums differs


@pytest.fixture(params=LAYERS)
def mixer(request):
    return build(*LAYERS[request.param])


def assert_states_close(state, expected):
    for name, x in state._asdict().items():
        y = getattr(expected, name)
        if name == "angle":  # a full turn more or less is the same angle
            x, y = torch.stack([x.cos(), x.sin()]), torch.stack([y.cos(), y.sin()])
        torch.testing.assert_close(x, y, **EXACT)


@pytest.mark.parametrize("split", [0, 1, 2, 40, 69, 70])
def test_split_sequence_equals_whole(mixer, split):
    x = inputs(2, 70)
    y, state = mixer(x)
    first, middle = mixer(x[:, :split])
    before = [s.clone() for s in middle]
    second, end = mixer(x[:, split:], state=middle)
    torch.testing.assert_close(torch.cat([first, second], 1), y, **EXACT)
    assert_states_close(end, state)
    assert all(torch.equal(s, old) for s, old in zip(middle, before, strict=True))


@pytest.mark.parametrize("prefill", [0, 1, 65])
@torch.no_grad()
def test_step_equals_sequence(mixer, prefill):
    x = inputs(2, prefill + 6)
    y, expected = mixer(x)
    _, state = mixer(x[:, :prefill])
    for t in range(prefill, x.shape[1]):
        out, new = mixer.step(x[:, t], state)
        torch.testing.assert_close(out, y[:, t], **EXACT)
        assert all(a is b for a, b in zip(new, state, strict=True))  # in place
    assert_states_close(state, expected)


def test_packed_equals_separate(mixer):
    lengths = [3, 0, 70, 1]
    x, before = inputs(1, sum(lengths)), mixer(inputs(4, 5))[1]
    cu_seqlens = torch.tensor([0, 3, 3, 73, 74])
    y, state = mixer(x, state=before, cu_seqlens=cu_seqlens)
    fresh, _ = mixer(x, cu_seqlens=cu_seqlens)
    for i, (start, length) in enumerate(zip(cu_seqlens, lengths, strict=False)):
        row = slice(int(start), int(start) + length)
        alone, end = mixer(x[:, row], state=before.select(torch.tensor([i])))
        torch.testing.assert_close(y[:, row], alone, **EXACT)
        assert_states_close(type(state)(*(s[i : i + 1] for s in state)), end)
        torch.testing.assert_close(fresh[:, row], mixer(x[:, row])[0], **EXACT)


def test_gradients_of_packed_sequences_are_those_of_separate_ones(mixer):
    x, upstream = inputs(1, 40).requires_grad_(), inputs(1, 40)
    bounds = (0, 7, 7, 8, 40)
    y, _ = mixer(x, cu_seqlens=torch.tensor(bounds))
    packed = torch.autograd.grad((y * upstream).sum(), [x, *mixer.parameters()])
    total = sum((mixer(x[:, a:b])[0] * upstream[:, a:b]).sum() for a, b in pairwise(bounds))
    for got, truth in zip(
        packed, torch.autograd.grad(total, [x, *mixer.parameters()]), strict=True
    ):
        torch.testing.assert_close(got, truth, rtol=1e-7, atol=1e-9)


def test_gradients_are_right(mixer):
    """Central differences of a loss on outputs and state, along a random direction."""
    x, upstream = inputs(2, 9), inputs(2, 9)
    parameters = list(mixer.parameters())
    directions = [torch.randn_like(p) for p in parameters]

    def loss():
        y, state = mixer(x)
        return (y * upstream).sum() + state.state.square().sum()

    grads = torch.autograd.grad(loss(), parameters)
    slope = sum((g * d).sum() for g, d in zip(grads, directions, strict=True))
    moved = []
    with torch.no_grad():
        for step in (1e-6, -2e-6):
            for p, d in zip(parameters, directions, strict=True):
                p += step * d
            moved.append(loss())
    assert abs((moved[0] - moved[1]) / 2e-6 / slope - 1) < 1e-6


def test_future_tokens_cannot_change_past_outputs(mixer):
    mixer, x = mixer.float(), inputs(1, 80).float()
    changed = x.clone()
    changed[:, 37:] = 5.0
    assert torch.equal(mixer(x)[0][:, :37], mixer(changed)[0][:, :37])


def test_future_tokens_cannot_change_gradients_of_past_losses(mixer):
    mixer, x = mixer.float(), inputs(1, 80).float()
    changed = x.clone()
    changed[:, 37:] = 5.0

    def gradient(x):
        x = x.clone().requires_grad_()
        return torch.autograd.grad(mixer(x)[0][:, :37].square().sum(), x)[0][:, :37]

    assert torch.equal(gradient(x), gradient(changed))


def test_other_sequences_of_a_pack_cannot_change_a_bit(mixer):
    mixer, x = mixer.float(), inputs(1, 60).float()
    changed, cu_seqlens = x.clone(), torch.tensor([0, 20, 41, 60])
    changed[:, :20], changed[:, 41:] = 5.0, -3.0
    y, other = (mixer(t, cu_seqlens=cu_seqlens)[0][:, 20:41] for t in (x, changed))
    assert torch.equal(y, other)


def test_autocast_narrows_the_maps_and_nothing_else(mixer, monkeypatch):
    """The same bits as of a layer whose maps alone are bfloat16."""
    mixer, x = mixer.float().requires_grad_(requires_grad=False), inputs(2, 20).float()
    with torch.autocast("cpu", torch.bfloat16):
        y, state = mixer(x)

    def narrow(linear, x):
        bias = None if linear.bias is None else linear.bias.bfloat16()
        return F.linear(x.bfloat16(), linear.weight.bfloat16(), bias)

    monkeypatch.setattr(nn.Linear, "forward", narrow)
    expected, end = mixer(x)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, expected)
    assert state.state.dtype == torch.float32
    assert all(torch.equal(got, truth) for got, truth in zip(state, end, strict=True))


def test_gradients_reach_tokens_before_through_the_state(mixer):
    x, upstream = inputs(2, 30).requires_grad_(), inputs(2, 30)
    leaves = [x, *mixer.parameters()]
    whole, _ = mixer(x)
    first, state = mixer(x[:, :11])
    second, state = mixer(x[:, 11:12], state=state)
    third, _ = mixer(x[:, 12:], state=state)
    parts = torch.cat([first, second, third], 1)
    grads = (torch.autograd.grad((y * upstream).sum(), leaves) for y in (whole, parts))
    for truth, got in zip(*grads, strict=True):
        torch.testing.assert_close(got, truth, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("bounds", [None, [0], [0, 0, 0]])
def test_no_sequences_or_no_tokens(mixer, bounds):
    cu_seqlens = None if bounds is None else torch.tensor(bounds)
    y, state = mixer(inputs(0, 5) if bounds is None else inputs(1, 0), cu_seqlens=cu_seqlens)
    assert y.numel() == 0
    assert state.num_sequences == (0 if bounds is None else len(bounds) - 1)
    assert all((x == 0).all() for x in state)


def test_a_state_survives_a_change_of_dtype(mixer):
    """Prompts read under autocast, decoding without it, and the other way round."""
    mixer, x = mixer.float().requires_grad_(requires_grad=False), inputs(2, 20).float()
    with torch.autocast("cpu", torch.bfloat16):
        _, state = mixer(x)
    y, after = mixer(x, state=state)
    assert y.dtype == torch.float32
    mixer.step(x[:, 0], state)
    with torch.autocast("cpu", torch.bfloat16):
        assert mixer.step(x[:, 0], after)[0].dtype == torch.bfloat16


def test_gate_means_are_recorded_in_training_alone(mixer):
    x = inputs(2, 10)
    mixer(x)
    recorded = dict(mixer.gate_means)
    assert recorded
    assert not any(mean.requires_grad for mean in recorded.values())
    mixer.eval()(2 * x)
    assert mixer.gate_means == recorded
