import torch

from gdn2.modules.linear import OutputLinear, XavierLinear


def test_delta_maps_are_xavier_with_gain_two_to_the_minus_five_halves():
    torch.manual_seed(0)
    linear = XavierLinear(400, 200)
    bound = 2**-2.5 * (6 / 600) ** 0.5
    assert 0.99 * bound < linear.weight.abs().max() <= bound
    assert abs(linear.weight.std() / (bound / 3**0.5) - 1) < 0.02
    assert (linear.bias == 0).all()


def test_output_maps_are_torchs_law_times_a_scale():
    torch.manual_seed(0)
    linear = OutputLinear(400, 200, bias=False)
    assert 0.99 / 20 < linear.weight.abs().max() <= 1 / 20
    linear.reset_parameters(scale=0.1)
    assert 0.099 / 20 < linear.weight.abs().max() <= 0.1 / 20
