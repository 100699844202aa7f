"""The token mixers a model can be made of, by name: the one list of them."""

from typing import TYPE_CHECKING, NamedTuple

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
    """A layer, and what it reads of a configuration.

    layer_type: Hugging Face's word for it. settings: argument of the layer -> key.
    """

    layer_type: str
    layer: type[Recurrent | Attention]
    settings: dict[str, str]

    def build(self, config: "Gdn2Config") -> Recurrent | Attention:
        """The layer that a configuration asks for."""
        return self.layer(**{name: getattr(config, key) for name, key in self.settings.items()})


def _same(*names: str) -> dict[str, str]:
    return {name: name for name in names}


DELTA = _same(
    *("hidden_size", "num_heads", "num_v_heads", "head_k_dim", "head_v_dim", "conv_size"),
    *("erase_range", "output_gate", "output_gate_rank", "norm_eps"),
)
DECAY = _same("decay_lower_bound")
MAMBA = _same("hidden_size", "state_size", "num_groups", "norm_eps") | {
    "inner_size": "mamba_inner_size",
    "head_dim": "mamba_head_dim",
}
ATTENTION = _same("hidden_size", "rope_theta") | {
    "num_heads": "num_attention_heads",
    "head_dim": "attention_head_dim",
}
MIXERS = {
    "gdn2": Mixer(
        "linear_attention", GatedDeltaNet2, DELTA | DECAY | _same("erase_gate", "write_gate")
    ),
    "gated_deltanet": Mixer("linear_attention", GatedDeltaNet, DELTA | DECAY),
    "kda": Mixer("linear_attention", KimiDeltaAttention, DELTA | DECAY),
    "deltanet": Mixer("linear_attention", DeltaNet, DELTA),
    "mamba2": Mixer("linear_attention", Mamba2, MAMBA | _same("conv_size", "conv_bias")),
    "mamba3": Mixer(
        "linear_attention",
        Mamba3,
        MAMBA
        | _same("mimo_rank", "rope_fraction", "ssm_decay")
        | {"output_norm": "mamba3_output_norm"},
    ),
    "sliding_attention": Mixer(
        "sliding_attention", Attention, ATTENTION | {"window": "sliding_window"}
    ),
    "full_attention": Mixer("full_attention", Attention, ATTENTION),
}
