"""The token mixers a model can be made of, by name: the one list of them."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from gdn2.layers import (
    Attention,
    DeltaMixer,
    DeltaNet,
    GatedDeltaNet,
    GatedDeltaNet2,
    KimiDeltaAttention,
    Mamba2,
    Mamba3,
)

if TYPE_CHECKING:
    from gdn2.models.configuration import Gdn2Config

Recurrent = DeltaMixer | Mamba2 | Mamba3


class Mixer(NamedTuple):
    """layer_type: Hugging Face's word for it. build: the layer that a configuration asks for."""

    layer_type: str
    build: Callable[["Gdn2Config"], Recurrent | Attention]


def _delta(layer: type[DeltaMixer], *settings: str) -> Mixer:
    """`settings` are keys of the configuration that this member has alone."""

    def build(config: "Gdn2Config") -> DeltaMixer:
        more: dict[str, Any] = {name: getattr(config, name) for name in settings}
        return layer(
            config.hidden_size,
            config.num_heads,
            num_v_heads=config.num_v_heads,
            head_k_dim=config.head_k_dim,
            head_v_dim=config.head_v_dim,
            conv_size=config.conv_size,
            erase_range=config.erase_range,
            decay_lower_bound=config.decay_lower_bound,
            output_gate=config.output_gate,
            output_gate_rank=config.output_gate_rank,
            norm_eps=config.norm_eps,
            **more,
        )

    return Mixer("linear_attention", build)


def _mamba2(config: "Gdn2Config") -> Mamba2:
    return Mamba2(
        config.hidden_size,
        config.mamba_inner_size,
        head_dim=config.mamba_head_dim,
        state_size=config.state_size,
        num_groups=config.num_groups,
        conv_size=config.conv_size,
        conv_bias=config.conv_bias,
        norm_eps=config.norm_eps,
    )


def _mamba3(config: "Gdn2Config") -> Mamba3:
    return Mamba3(
        config.hidden_size,
        config.mamba_inner_size,
        head_dim=config.mamba_head_dim,
        state_size=config.state_size,
        num_groups=config.num_groups,
        mimo_rank=config.mimo_rank,
        rope_fraction=config.rope_fraction,
        ssm_decay=config.ssm_decay,
        output_norm=config.mamba3_output_norm,
        norm_eps=config.norm_eps,
    )


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
    "gdn2": _delta(GatedDeltaNet2, "erase_gate", "write_gate"),
    "gated_deltanet": _delta(GatedDeltaNet),
    "kda": _delta(KimiDeltaAttention),
    "deltanet": _delta(DeltaNet),
    "mamba2": Mixer("linear_attention", _mamba2),
    "mamba3": Mixer("linear_attention", _mamba3),
    "sliding_attention": _attention("sliding_attention"),
    "full_attention": _attention("full_attention"),
}
