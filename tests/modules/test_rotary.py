import pytest
import torch

from gdn2.modules.rotary import rotary_angles, rotate


def test_channel_i_turns_with_channel_i_plus_half_as_a_complex_number():
    T, H, D = 7, 2, 6
    x = torch.randn(T, H, D, dtype=torch.float64)
    position = torch.arange(T) + 100
    (got,) = rotate([x], rotary_angles(position, D, 10000.0, x.dtype))
    frequency = 10000.0 ** (-torch.arange(D // 2, dtype=torch.float64) * 2 / D)
    turn = torch.polar(torch.ones(T, D // 2, dtype=torch.float64), position[:, None] * frequency)
    z = torch.complex(x[..., : D // 2], x[..., D // 2 :]) * turn[:, None]
    torch.testing.assert_close(got, torch.cat([z.real, z.imag], -1))


def test_scores_depend_on_the_distance_alone():
    q, k = torch.randn(2, 1, 1, 8, dtype=torch.float64)

    def score(t, s):
        angles = rotary_angles(torch.tensor([[t], [s]]), 8, 10000.0, q.dtype)
        return (rotate([q], angles[0])[0] * rotate([k], angles[1])[0]).sum()

    torch.testing.assert_close(score(10, 3), score(1007, 1000))


def test_angles_are_float32_for_narrow_activations():
    angles = rotary_angles(torch.tensor([70_001]), 8, 10000.0, torch.bfloat16)
    assert angles.dtype == torch.float32
    assert rotate([torch.randn(1, 1, 8).bfloat16()], angles)[0].dtype == torch.bfloat16


@pytest.mark.parametrize("pairs", [1, 2, 4])
@pytest.mark.parametrize("adjacent", [False, True])
def test_some_pairs_turn_and_the_others_stay(pairs, adjacent):
    x, angles = torch.randn(5, 3, 8).double(), torch.randn(5, 3, pairs).double()
    (got,) = rotate([x], angles, adjacent=adjacent)
    expected = x.clone()
    for i in range(pairs):
        a, b = (2 * i, 2 * i + 1) if adjacent else (i, i + 4)
        z = torch.complex(x[..., a], x[..., b]) * torch.exp(1j * angles[..., i])
        expected[..., a], expected[..., b] = z.real, z.imag
    torch.testing.assert_close(got, expected)
