"""Token mixers: ``layer(x, state=None, cu_seqlens=None)`` and ``layer.step(x, state)``."""

from gdn2.layers.attention import Attention, AttentionState
from gdn2.layers.delta import (
    DeltaMixer,
    DeltaState,
    GatedDeltaNet,
    GatedDeltaNet2,
    KimiDeltaAttention,
)

__all__ = [
    "Attention",
    "AttentionState",
    "DeltaMixer",
    "DeltaState",
    "GatedDeltaNet",
    "GatedDeltaNet2",
    "KimiDeltaAttention",
]
