"""Token mixers: ``layer(x, state=None, cu_seqlens=None)`` and ``layer.step(x, state)``."""

from gdn2.layers.attention import Attention, AttentionState
from gdn2.layers.delta import (
    DeltaMixer,
    DeltaNet,
    DeltaState,
    GatedDeltaNet,
    GatedDeltaNet2,
    KimiDeltaAttention,
)
from gdn2.layers.mamba2 import Mamba2, Mamba2State
from gdn2.layers.mamba3 import Mamba3, Mamba3State

__all__ = [
    "Attention",
    "AttentionState",
    "DeltaMixer",
    "DeltaNet",
    "DeltaState",
    "GatedDeltaNet",
    "GatedDeltaNet2",
    "KimiDeltaAttention",
    "Mamba2",
    "Mamba2State",
    "Mamba3",
    "Mamba3State",
]
