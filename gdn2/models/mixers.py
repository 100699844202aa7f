"""The token mixers a model can be made of, by name: the one list of them."""

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from gdn2.layers import (
    Attention,
    DeltaMixer,
    GatedDeltaNet,
    GatedDeltaNet2,
    KimiDeltaAttention,
)

if TYPE_CHECKING:
    from gdn2.models.configuration import Gdn2Config


class Mixer(NamedTuple):
    """layer_type: Hugging Face's word for it. build: the layer that a configuration asks for."""

    layer_type: str
    build: Callable[["Gdn2Config"], DeltaMixer | Attention]


def _delta(layer: type[DeltaMixer]) -> Mixer:
    def build(config: "Gdn2Config") -> DeltaMixer:
        return layer(
            config.hidden_size,
            config.num_heads,
            num_v_heads=config.num_v_heads,
            head_k_dim=config.head_k_dim,
            head_v_dim=config.head_v_dim,
            conv_size=config.conv_size,
            erase_range=config.erase_range,
            output_gate=config.output_gate,
            output_gate_rank=config.output_gate_rank,
            norm_eps=config.norm_eps,
        )

    return Mixer("linear_attention", build)


def _attention(layer_type: str) -> Mixer:
    def build(config: "Gdn2Config") -> Attention:
        return Attention(
            config.hidden_size,
            config.num_attention_heads,
            head_dim=config.attention_head_dim,
            window=config.sliding_window if layer_type == "sliding_attention" else None,
            rope_theta=config.rope_theta,
        )

    return Mixer(layer_type, build)


MIXERS = {
    "gdn2": _delta(GatedDeltaNet2),
    "gated_deltanet": _delta(GatedDeltaNet),
    "kda": _delta(KimiDeltaAttention),
    "sliding_attention": _attention("sliding_attention"),
    "full_attention": _attention("full_attention"),
}
