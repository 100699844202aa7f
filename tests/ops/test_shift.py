import pytest
import torch

from gdn2.ops import shift


def test_every_sequence_moves_on_by_one_token():
    x, state = torch.arange(1.0, 7).view(2, 3, 1), torch.tensor([[-1.0], [-2.0]])
    y, last = shift(x, state)
    assert y.tolist() == [[[-1], [1], [2]], [[-2], [4], [5]]]
    assert last.tolist() == [[3], [6]]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_packed_sequences_start_from_their_own_state(dtype):
    x, state = torch.arange(1.0, 6).view(1, 5), torch.tensor([-1.0, -2.0, -3.0, -4.0, -5.0])
    y, last = shift(x, state, torch.tensor([0, 0, 2, 2, 5, 5], dtype=dtype))
    assert y.tolist() == [[-2, 1, -4, 3, 4]]
    assert last.tolist() == [-1, 2, -3, 5, -5]


def test_no_tokens_change_nothing():
    state = torch.randn(2, 3)
    y, last = shift(torch.empty(2, 0, 3), state)
    assert y.shape == (2, 0, 3)
    assert torch.equal(last, state)
    y, last = shift(torch.empty(1, 0, 3), state, torch.tensor([0, 0, 0]))
    assert y.shape == (1, 0, 3)
    assert torch.equal(last, state)


@pytest.mark.parametrize("bounds", [None, [0, 2, 2, 7]])
def test_gradients(bounds):
    cu_seqlens = None if bounds is None else torch.tensor(bounds)
    x = torch.randn(1, 7, 2, dtype=torch.float64, requires_grad=True)
    state = torch.randn(1 if bounds is None else 3, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, s: shift(x, s, cu_seqlens), (x, state))


def test_the_last_tokens_do_not_keep_all_others_alive():
    _, last = shift(torch.randn(1, 100), torch.zeros(1))
    assert last.untyped_storage().nbytes() == last.nbytes


def test_a_state_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"state must be \[2, 5\], got \[2, 4\]"):
        shift(torch.zeros(2, 3, 5), torch.zeros(2, 4))
