import math

import pytest
import torch
from transformers import AutoModelForCausalLM

from gdn2.models.configuration import MIXERS
from gdn2.train import OptimConfig
from gdn2.train.optim import build_optimizer, learning_rate

SCHEDULE = {"peak": 4e-4, "warmup_steps": 10, "total_steps": 110, "min_ratio": 0.1}


def test_the_rate_rises_linearly_to_its_peak():
    rates = [learning_rate(step, **SCHEDULE) for step in range(1, 11)]
    assert rates == pytest.approx([4e-4 * step / 10 for step in range(1, 11)])
    assert rates[-1] == 4e-4


def test_the_rate_falls_along_half_a_cosine_to_a_tenth():
    rates = [learning_rate(step, **SCHEDULE) for step in range(10, 111)]
    assert rates == sorted(rates, reverse=True)
    assert learning_rate(60, **SCHEDULE) == pytest.approx(4e-4 * (0.1 + 0.9 / 2))
    assert learning_rate(35, **SCHEDULE) == pytest.approx(
        4e-4 * (0.1 + 0.9 * (1 + math.sqrt(0.5)) / 2)
    )
    assert rates[-1] == pytest.approx(4e-5)


@pytest.mark.parametrize(("warmup", "total"), [(0, 1), (1, 1), (5, 5), (0, 5)])
def test_the_rate_is_finite_at_the_corners(warmup, total):
    rates = [
        learning_rate(step, peak=1.0, warmup_steps=warmup, total_steps=total, min_ratio=0.1)
        for step in range(1, total + 1)
    ]
    assert all(0 < rate <= 1 for rate in rates)


@pytest.mark.parametrize("mixer", MIXERS)
def test_matrices_decay_and_vectors_do_not_in_every_mixer(mixer, tiny_model):
    model = AutoModelForCausalLM.from_config(tiny_model(mixers=[mixer]))
    decayed, plain = build_optimizer(model, OptimConfig(lr=1.0, weight_decay=0.1)).param_groups
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.1, 0.0)
    names = {parameter: name for name, parameter in model.named_parameters()}
    assert [names[p] for p in decayed["params"] if p.ndim < 2] == []
    matrices = [names[p] for p in plain["params"] if p.ndim > 1]
    assert all(name.endswith(("mixer.B_bias", "mixer.C_bias")) for name in matrices)
    assert len(decayed["params"]) + len(plain["params"]) == len(names)


def test_the_official_way_decays_everything(tiny_model):
    model = AutoModelForCausalLM.from_config(tiny_model())
    (group,) = build_optimizer(model, OptimConfig(lr=1.0, decay_all=True)).param_groups
    assert group["weight_decay"] == 0.1
    assert len(group["params"]) == len(list(model.parameters()))


def test_no_decay_means_that_a_zero_gradient_changes_nothing(tiny_model):
    model = AutoModelForCausalLM.from_config(tiny_model())
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = build_optimizer(model, OptimConfig(lr=0.5, weight_decay=0.1))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        factor = 1.0 if parameter.ndim < 2 else 0.95
        torch.testing.assert_close(parameter.detach(), before[name] * factor, msg=name)
