"""The recurrent layers, small: sizes that are all different, and weights that make gates matter."""

import torch

from gdn2.layers import (
    DeltaNet,
    GatedDeltaNet,
    GatedDeltaNet2,
    KimiDeltaAttention,
    Mamba2,
    Mamba3,
)

D, H, HV, K, V = 24, 2, 4, 8, 6
MAMBA = {"head_dim": V, "state_size": K, "num_groups": 2}
DELTA = {"num_v_heads": HV, "head_k_dim": K, "head_v_dim": V}
LAYERS = {
    "gdn2": (GatedDeltaNet2, H, DELTA),
    "gdn2_by_head": (GatedDeltaNet2, H, DELTA | {"erase_gate": "head", "write_gate": "head"}),
    "kda": (KimiDeltaAttention, H, DELTA),
    "kda_bounded": (KimiDeltaAttention, H, DELTA | {"decay_lower_bound": -5.0}),
    "gated_deltanet": (GatedDeltaNet, H, DELTA),
    "deltanet": (DeltaNet, H, DELTA),
    "mamba2": (Mamba2, HV * V, MAMBA),
    "mamba3_siso": (Mamba3, HV * V, MAMBA),
    "mamba3_mimo": (Mamba3, HV * V, MAMBA | {"mimo_rank": 3, "output_norm": True}),
}


def build(layer, size, options, **more):
    """Float64."""
    torch.manual_seed(0)
    mixer = layer(D, size, **options | more).double()
    for parameter in mixer.parameters():  # larger than at the start, so that every gate matters
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.5)
    return mixer


def inputs(*shape):
    return torch.randn(*shape, D, dtype=torch.float64)
