"""AdamW with weight decay by rule, and the learning rate as a function of the step."""

from __future__ import annotations

import math

import torch
from torch import nn

from gdn2.train.config import OptimConfig

# Read off names, because marks on parameters are lost by to_empty() and fully_shard().
NO_DECAY = ("A_log", "dt_bias", ".D", "B_bias", "C_bias", "norm.weight", ".bias")


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """AdamW with two groups: decayed, and plain (``NO_DECAY``, unless ``decay_all``)."""
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        skip = name.endswith(NO_DECAY) and not config.decay_all
        (plain if skip else decayed).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.lr,
        betas=config.betas,
        eps=config.eps,
        fused=True,
    )


def learning_rate(
    step: int, *, peak: float, warmup_steps: int, total_steps: int, min_ratio: float
) -> float:
    """Rate of step 1 ... ``total_steps``: linear up to ``peak``, then half a cosine down.

    The last warm-up step has ``peak``; the last step has ``min_ratio * peak``.
    """
    if step <= warmup_steps:
        return peak * step / warmup_steps
    progress = (step - warmup_steps) / (total_steps - warmup_steps)
    return peak * (min_ratio + (1 - min_ratio) * (1 + math.cos(math.pi * progress)) / 2)
