"""`Gdn2Config`: what a model is, and nothing about how it is trained."""

import dataclasses
import inspect
import math
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

from transformers import AutoConfig, PretrainedConfig

from gdn2.layers.delta import GATE_FORMS
from gdn2.layers.mamba3 import MOST_RANKS, SSM_DECAYS, count_angles
from gdn2.models.mixers import MIXERS
from gdn2.ops.norm import OUTPUT_GATES

REMOTE_CODE = "modeling_gdn2"
AUTO_MAP = {
    "AutoConfig": f"{REMOTE_CODE}.Gdn2Config",
    "AutoModel": f"{REMOTE_CODE}.Gdn2Model",
    "AutoModelForCausalLM": f"{REMOTE_CODE}.Gdn2ForCausalLM",
}
# Sizes beyond these are typing errors. The bytes of a weight still fit into 64 bits.
LARGEST = 2**28
MOST_LAYERS = 10_000
# What transformers itself passes beside its dataclass fields, or writes into a config.json.
HF_KEYS = {f.name for f in dataclasses.fields(PretrainedConfig)} | {
    "attn_implementation",
    "experts_implementation",
    "model_type",
    "name_or_path",
    "num_labels",
    "output_attentions",
    "quantization_config",
    "torch_dtype",
}


class Gdn2Config(PretrainedConfig):
    """Configuration of a language model of recurrent and attention layers.

    Args:
        mixers: a name of `MIXERS` per layer, or a pattern that is repeated over the layers, such
            as ``["gdn2", "sliding_attention"]``. `layer_types` follows from it.
        num_heads, num_v_heads, head_k_dim, head_v_dim, erase_range, decay_lower_bound, output_gate,
            output_gate_rank: of the delta family, as `gdn2.layers.DeltaMixer` has them.
        erase_gate, write_gate: of gdn2, as `gdn2.layers.GatedDeltaNet2` has them.
        conv_size: of the short convolutions of the delta family and of mamba2.
        mamba_inner_size, mamba_head_dim, state_size, num_groups: of both Mamba layers.
        conv_bias: of mamba2, as `gdn2.layers.Mamba2` has it.
        mimo_rank, rope_fraction, ssm_decay, mamba3_output_norm: of mamba3, as `gdn2.layers.Mamba3`
            has them.
        num_attention_heads, attention_head_dim, rope_theta, sliding_window: of the attention
            layers.
        intermediate_size: of the SwiGLU behind every mixer. 0: there is none.
        max_position_embeddings: no position is ever embedded; the length that evaluations cut at.

    The defaults are the 1.3B model. Raises ValueError, with the name, for a key that does not
    exist and for a value of the wrong type or outside its range.
    """

    model_type = "gdn2"

    def __init__(
        self,
        vocab_size: int = 32000,
        hidden_size: int = 2304,
        num_hidden_layers: int = 18,
        mixers: list[str] | str = "gdn2",
        num_heads: int = 16,
        num_v_heads: int | None = None,
        head_k_dim: int = 128,
        head_v_dim: int | None = None,
        conv_size: int = 4,
        erase_range: float = 1.0,
        erase_gate: str = "channel",
        write_gate: str = "channel",
        decay_lower_bound: float | None = None,
        output_gate: str | None = None,
        output_gate_rank: int | Literal["native"] | None = "native",
        mamba_inner_size: int = 4096,
        mamba_head_dim: int = 64,
        state_size: int = 64,
        num_groups: int = 1,
        conv_bias: bool = True,
        mimo_rank: int = 1,
        rope_fraction: float = 0.5,
        ssm_decay: str = "softplus",
        mamba3_output_norm: bool = False,
        intermediate_size: int = 6208,
        num_attention_heads: int = 18,
        attention_head_dim: int = 128,
        rope_theta: float = 10000.0,
        sliding_window: int = 2048,
        norm_eps: float = 1e-5,
        initializer_range: float = 0.02,
        tie_word_embeddings: bool = False,
        max_position_embeddings: int = 4096,
        use_cache: bool = True,
        bos_token_id: int | None = None,
        eos_token_id: int | list[int] | None = None,
        pad_token_id: int | None = None,
        **kwargs: Any,
    ):
        values = {name: value for name, value in locals().items() if name in NAMES}
        layer_types = kwargs.pop("layer_types", None)
        kwargs.pop("auto_map", None)
        _check_names(kwargs)
        for name, value in values.items():
            setattr(self, name, value)
        self.mixers = [mixers] if isinstance(mixers, str) else mixers
        self._check_values()
        if layer_types is not None and list(layer_types) != self.layer_types:
            raise ValueError(
                f"layer_types follows from mixers and would be {self.layer_types}, "
                f"got {layer_types}: set mixers"
            )
        super().__init__(**kwargs)

    @property
    def layer_mixers(self) -> list[str]:
        """The mixer of each layer: `mixers`, repeated if it is a pattern."""
        return self.mixers * (self.num_hidden_layers // len(self.mixers))

    @property
    def layer_types(self) -> list[str]:
        """Hugging Face's word for each layer's mixer."""
        return [MIXERS[name].layer_type for name in self.layer_mixers]

    @property
    def traits(self) -> dict[str, Any]:
        """The settings that this model reads: two models that share them compute alike."""
        return {name: getattr(self, name) for name in NAMES if name not in self._unread}

    @property
    def _unread(self) -> set[str]:
        """Settings of mixers that this model has none of."""
        read = {name: set(mixer.settings.values()) for name, mixer in MIXERS.items()}
        return set[str]().union(*read.values()) - set().union(*(read[m] for m in self.mixers))

    def _check_values(self) -> None:
        for name in SIZES:
            value, least = getattr(self, name), int(name != "intermediate_size")
            optional = name in ("num_v_heads", "head_v_dim")
            if not (_is_int(value) and value >= least) and not (optional and value is None):
                kind = "a positive integer" if least else "an integer, 0 or more"
                also = " or None" if optional else ""
                raise ValueError(f"{name} must be {kind}{also}, got {value!r}")
            largest = MOST_LAYERS if name == "num_hidden_layers" else LARGEST
            if value is not None and value > largest:
                raise ValueError(f"{name} must be at most {largest:,}, got {value:,}")
        for name in ("rope_theta", "norm_eps", "initializer_range"):
            value = getattr(self, name)
            if not (_is_number(value) and 0 < value < math.inf):
                raise ValueError(f"{name} must be a positive finite number, got {value!r}")
        for name in ("tie_word_embeddings", "use_cache", "conv_bias", "mamba3_output_norm"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be true or false, got {getattr(self, name)!r}")
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {choices}, got {getattr(self, name)!r}")
        self._check_mixers()
        self._check_delta()
        self._check_mamba()
        self._check_widths()
        self._check_token_ids()
        if self.attention_head_dim % 2:
            raise ValueError(
                f"attention_head_dim must be even (rotary pairs), got {self.attention_head_dim}"
            )
        for name in sorted(self._unread - SHARED):
            if getattr(self, name) != DEFAULTS[name]:
                readers = [mixer for mixer in MIXERS if name in MIXERS[mixer].settings.values()]
                raise ValueError(
                    f"{name} = {getattr(self, name)!r} is for {' or '.join(readers)}, and mixers "
                    f"are {self.mixers}"
                )

    def _check_delta(self) -> None:
        if self.num_v_heads is not None and self.num_v_heads % self.num_heads:
            raise ValueError(
                f"num_v_heads must be a multiple of num_heads = {self.num_heads}, "
                f"got {self.num_v_heads}"
            )
        if isinstance(self.erase_range, bool) or self.erase_range not in (1.0, 2.0):
            raise ValueError(f"erase_range must be 1.0 or 2.0, got {self.erase_range!r}")
        bound = self.decay_lower_bound
        if bound is not None and not (_is_number(bound) and -math.inf < bound < 0):
            raise ValueError(f"decay_lower_bound must be None or a negative number, got {bound!r}")
        rank = self.output_gate_rank
        if rank not in (None, "native") and not (_is_int(rank) and 0 < rank <= LARGEST):
            raise ValueError(
                'output_gate_rank must be "native" (the mixer\'s own), None (full) or a positive '
                f"integer up to {LARGEST:,}, got {rank!r}"
            )

    def _check_mamba(self) -> None:
        if self.mamba_inner_size % (self.mamba_head_dim * self.num_groups):
            raise ValueError(
                "mamba_inner_size must be a multiple of mamba_head_dim x num_groups = "
                f"{self.mamba_head_dim} x {self.num_groups}, got {self.mamba_inner_size}"
            )
        if self.mimo_rank > MOST_RANKS:
            raise ValueError(f"mimo_rank must be at most {MOST_RANKS}, got {self.mimo_rank}")
        if not _is_number(self.rope_fraction):
            raise ValueError(f"rope_fraction must be a number, got {self.rope_fraction!r}")
        count_angles(self.state_size, self.rope_fraction)

    def _check_widths(self) -> None:
        v_heads, v_dim = self.num_v_heads or self.num_heads, self.head_v_dim or self.head_k_dim
        mamba_heads = self.mamba_inner_size // self.mamba_head_dim
        keys = self.mimo_rank * self.state_size
        for names, heads, dim in (
            ("num_heads x head_k_dim", self.num_heads, self.head_k_dim),
            ("num_v_heads x head_v_dim", v_heads, v_dim),
            ("mamba heads x mimo_rank x state_size", mamba_heads, keys),
            (
                "num_attention_heads x attention_head_dim",
                self.num_attention_heads,
                self.attention_head_dim,
            ),
        ):
            if heads * dim > LARGEST:
                raise ValueError(f"{names} must be at most {LARGEST:,}, got {heads:,} x {dim:,}")

    def _check_token_ids(self) -> None:
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            value = getattr(self, name)
            ids = value if name == "eos_token_id" and isinstance(value, list) else [value]
            for token in ids:
                if token is not None and not (_is_int(token) and 0 <= token < self.vocab_size):
                    raise ValueError(
                        f"{name} must be a token below vocab_size = {self.vocab_size:,} or None, "
                        f"got {value!r}"
                    )

    def _check_mixers(self) -> None:
        if not isinstance(self.mixers, list | tuple) or not self.mixers:
            raise ValueError(f"mixers must be a list of names, got {self.mixers!r}")
        self.mixers = list(self.mixers)
        for name in self.mixers:
            if not isinstance(name, str) or name not in MIXERS:
                hint = get_close_matches(str(name), MIXERS, n=1)
                raise ValueError(
                    f"mixers must be names of {sorted(MIXERS)}, got {name!r}"
                    + (f": did you mean {hint[0]!r}?" if hint else "")
                )
        if self.num_hidden_layers % len(self.mixers):
            raise ValueError(
                f"mixers has {len(self.mixers)} names, which do not divide "
                f"num_hidden_layers = {self.num_hidden_layers}"
            )

    def save_pretrained(self, save_directory: Any, push_to_hub: bool = False, **kwargs: Any) -> Any:
        """Write config.json, and the module that ``trust_remote_code=True`` reads our classes from.

        See `PretrainedConfig.save_pretrained`.
        """
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        classes = ", ".join(path.split(".")[1] for path in AUTO_MAP.values())
        (folder / f"{REMOTE_CODE}.py").write_text(
            '"""The code of this model is the package gdn2."""\n\n'
            f"from gdn2.models import {classes}  # noqa: F401\n"
        )
        self.auto_map = dict(AUTO_MAP)
        return super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoConfig") -> None:
        """Do nothing: saving again must write the same files, not copies of this package."""


DEFAULTS = {
    name: parameter.default
    for name, parameter in inspect.signature(Gdn2Config).parameters.items()
    if name != "kwargs"
}
NAMES = list(DEFAULTS)
SIZES = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_heads",
    "num_v_heads",
    "head_k_dim",
    "head_v_dim",
    "conv_size",
    "mamba_inner_size",
    "mamba_head_dim",
    "state_size",
    "num_groups",
    "mimo_rank",
    "intermediate_size",
    "num_attention_heads",
    "attention_head_dim",
    "sliding_window",
    "max_position_embeddings",
)
CHOICES = {
    "erase_gate": GATE_FORMS,
    "write_gate": GATE_FORMS,
    "output_gate": (None, *OUTPUT_GATES),
    "ssm_decay": SSM_DECAYS,
}
# Sizes that the presets of a comparison state alike, whichever of them a model reads. All else that
# none of its mixers reads must keep its default.
SHARED = {
    *("hidden_size", "norm_eps", "num_heads", "num_v_heads", "head_k_dim", "head_v_dim"),
    *("mamba_inner_size", "mamba_head_dim", "state_size"),
    *("num_attention_heads", "attention_head_dim", "sliding_window"),
}


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _check_names(kwargs: dict[str, Any]) -> None:
    for name in kwargs:
        if name not in HF_KEYS and not name.startswith("_"):
            hint = get_close_matches(name, [*NAMES, "layer_types"], n=1)
            raise ValueError(
                f"Gdn2Config has no key {name!r}"
                + (f": did you mean {hint[0]!r}?" if hint else f"; its keys are {NAMES}")
            )


AutoConfig.register("gdn2", Gdn2Config, exist_ok=True)
