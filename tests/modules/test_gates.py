import math

import torch

from gdn2.modules.gates import low_rank, reset_rate, reset_step_bias, split_heads


def test_heads_are_the_slow_axis_of_a_projection():
    assert split_heads(torch.arange(6), 2).tolist() == [[0, 1, 2], [3, 4, 5]]


def test_rates_are_uniform_and_step_sizes_log_uniform():
    torch.manual_seed(0)
    A_log, dt_bias = torch.empty(20_000), torch.empty(20_000)
    reset_rate(A_log, 1.0, 16.0)
    rate = A_log.exp()
    assert 1 <= rate.min() < 1.01
    assert 15.99 < rate.max() <= 16.001
    assert abs(rate.mean() - 8.5) < 0.1
    reset_step_bias(dt_bias)
    log_dt = torch.nn.functional.softplus(dt_bias).log()
    assert math.log(1e-3) - 1e-3 <= log_dt.min()
    assert log_dt.max() <= math.log(1e-1) + 1e-3
    assert abs(log_dt.mean() - math.log(1e-2)) < 0.05


def test_low_rank_maps_have_a_bias_on_the_second_half_only():
    names = dict(low_rank(8, 2, 6, bias=True).named_parameters())
    assert {name: tuple(p.shape) for name, p in names.items()} == {
        "0.weight": (2, 8),
        "1.weight": (6, 2),
        "1.bias": (6,),
    }
    assert list(dict(low_rank(8, None, 6, bias=True).named_parameters())) == ["weight"]
