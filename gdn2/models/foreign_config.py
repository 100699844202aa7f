"""Other projects' configurations of what their weights are read into (`gdn2.models.convert`)."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from transformers import Mamba2Config

from gdn2.models.configuration import HF_KEYS, Gdn2Config


class Settings(NamedTuple):
    """Another project's settings, by its names; those of a nested table have a dot.

    names: ours. fixed: what there must be, for there is nothing else here. defaults: of what a file
    may leave out. required: what it may not, whatever the defaults are. unread: what changes no
    number.
    """

    names: dict[str, str]
    fixed: dict[str, Any]
    defaults: dict[str, Any]
    required: tuple[str, ...]
    unread: tuple[str, ...] = ()


SAME = (
    *("vocab_size", "hidden_size", "num_hidden_layers", "state_size", "expand", "use_cache"),
    *("tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id"),
)
NUMBERS = {
    *("hidden_size", "num_hidden_layers", "intermediate_size", "vocab_size", "vocab_multiple"),
    *("expand", "num_heads", "mamba_head_dim", "state_size", "num_groups", "conv_size"),
}
SETTINGS = {
    "mamba_ssm": Settings(
        names={
            "d_model": "hidden_size",
            "n_layer": "num_hidden_layers",
            "d_intermediate": "intermediate_size",
            "vocab_size": "vocab_size",
            "pad_vocab_size_multiple": "vocab_multiple",
            "tie_embeddings": "tie_word_embeddings",
            "ssm_cfg.expand": "expand",
            "ssm_cfg.headdim": "mamba_head_dim",
            "ssm_cfg.d_state": "state_size",
            "ssm_cfg.ngroups": "num_groups",
            "ssm_cfg.d_conv": "conv_size",
            "ssm_cfg.conv_bias": "conv_bias",
        },
        fixed={
            "rms_norm": True,
            "attn_layer_idx": [],
            "attn_cfg": {},
            "ssm_cfg.layer": "Mamba2",
            "ssm_cfg.d_ssm": None,
            "ssm_cfg.D_has_hdim": False,
            "ssm_cfg.rmsnorm": True,
            "ssm_cfg.norm_before_gate": False,
            "ssm_cfg.dt_limit": [0.0, math.inf],
            "ssm_cfg.bias": False,
        },
        defaults={
            "d_intermediate": 0,
            "pad_vocab_size_multiple": 8,
            "tie_embeddings": True,
            "ssm_cfg.layer": "Mamba1",
            "ssm_cfg.expand": 2,
            "ssm_cfg.headdim": 64,
            "ssm_cfg.d_state": 128,
            "ssm_cfg.ngroups": 1,
            "ssm_cfg.d_conv": 4,
            "ssm_cfg.conv_bias": True,
        },
        required=("d_model", "n_layer", "vocab_size"),
        unread=(
            *("residual_in_fp32", "fused_add_norm", "ssm_cfg.chunk_size", "ssm_cfg.conv_init"),
            *("ssm_cfg.use_mem_eff_path", "ssm_cfg.A_init_range", "ssm_cfg.dt_init_floor"),
            *("ssm_cfg.dt_min", "ssm_cfg.dt_max"),
        ),
    ),
    "transformers_mamba2": Settings(
        names={
            "num_heads": "num_heads",
            "head_dim": "mamba_head_dim",
            "n_groups": "num_groups",
            "conv_kernel": "conv_size",
            "use_conv_bias": "conv_bias",
            "layer_norm_epsilon": "norm_eps",
        }
        | dict(zip(SAME, SAME, strict=True)),
        fixed={
            "use_bias": False,
            "hidden_act": "silu",
            "rms_norm": True,
            "norm_before_gate": False,
            "time_step_limit": [0.0, math.inf],
        },
        defaults=Mamba2Config().to_dict(),
        required=("hidden_size", "num_hidden_layers", "vocab_size", "num_heads"),
    ),
}


def import_config(settings: Mapping[str, Any], form: str) -> Gdn2Config:
    """Our configuration of a model of Mamba-2 layers of another project.

    That of mamba-ssm's Mamba-3 is to be written by hand: its file does not tell by which of two
    laws the model decays (`ssm_decay`).

    Args:
        settings: what their config.json holds. form: "mamba_ssm" or "transformers_mamba2".

    Returns:
        the configuration. Rows that pad their vocabulary are tokens of ours.

    Raises:
        ValueError: a setting is missing or unknown, or asks for what there is not here.
    """
    if form not in SETTINGS:
        raise ValueError(f"form must be one of {list(SETTINGS)}, got {form!r}")
    names, fixed, defaults, required, unread = SETTINGS[form]
    given = defaults | _flat(settings)
    for name, value in given.items():
        if name in fixed and _plain(value) != fixed[name]:
            raise ValueError(f"{name} must be {fixed[name]!r}, got {value!r}")
        if name not in {*names, *fixed, *defaults, *unread, *HF_KEYS} and not name.startswith("_"):
            raise ValueError(f"{form} has no setting {name!r} that is known here, got {value!r}")
    missing = [name for name in required if name not in settings]
    if missing:
        raise ValueError(f"the settings of {form} must have {', '.join(missing)}")
    for theirs, name in names.items():
        whole = float if name == "expand" else int
        least = 0 if name == "intermediate_size" else 1
        if name in NUMBERS and not (type(given[theirs]) in (int, whole) and given[theirs] >= least):
            raise ValueError(
                f"{theirs} must be a number of at least {least}, got {given[theirs]!r}"
            )
    ours = {name: given[theirs] for theirs, name in names.items()}
    inner = ours.pop("expand") * ours["hidden_size"]
    heads = inner / ours["mamba_head_dim"]
    if heads % 1 or ours.pop("num_heads", heads) != heads:
        raise ValueError(
            f"expand times the width, {inner}, must be a whole number of heads of "
            f"{ours['mamba_head_dim']} channels, and as many as the settings say"
        )
    for name, multiple in (  # 128: of mamba-ssm's GatedMLP
        ("vocab_size", ours.pop("vocab_multiple", 1)),
        ("intermediate_size", 128),
    ):
        ours[name] = math.ceil(ours.get(name, 0) / multiple) * multiple
    return Gdn2Config(mixers="mamba2", mamba_inner_size=int(inner), **ours)


def _flat(settings: Any) -> dict[str, Any]:
    """Without the nested table, whose names get its name and a dot."""
    flat: dict[str, Any] = {}
    for name, value in _table("the settings", settings).items():
        nested = _table(name, value or {}) if name == "ssm_cfg" else {}
        flat |= {f"{name}.{key}": x for key, x in nested.items()}
        flat |= {} if name == "ssm_cfg" else {name: value}
    return flat


def _table(name: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise ValueError(f"{name} must be a table of names and values, got {value!r}")
    return dict(value)


def _plain(value: Any) -> Any:
    """As JSON has it, with infinity a number; transformers writes it in a way of its own."""
    if isinstance(value, Mapping) and "__float__" in value:
        return float(value["__float__"])
    return [_plain(x) for x in value] if isinstance(value, list | tuple) else value
