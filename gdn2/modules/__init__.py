"""Parts that layers are built from: norms, gates, rotary embedding, SwiGLU."""

from gdn2.modules.gates import Gates
from gdn2.modules.mlp import SwiGLU
from gdn2.modules.norm import GatedRMSNorm, RMSNorm

__all__ = ["GatedRMSNorm", "Gates", "RMSNorm", "SwiGLU"]
