import json

import pytest
from transformers import Mamba2Config

from gdn2.models import import_config

TRANSFORMERS = {
    "vocab_size": 60,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_heads": 4,
    "head_dim": 12,
    "state_size": 8,
    "n_groups": 2,
    "conv_kernel": 3,
}
MAMBA_SSM = {
    "d_model": 24,
    "d_intermediate": 0,
    "n_layer": 2,
    "vocab_size": 57,
    "ssm_cfg": {"layer": "Mamba2", "headdim": 12},
    "attn_layer_idx": [],
    "attn_cfg": {},
    "rms_norm": True,
    "residual_in_fp32": True,
    "fused_add_norm": True,
    "pad_vocab_size_multiple": 16,
    "tie_embeddings": True,
}


def test_configuration_of_mamba_ssm():
    config = import_config(MAMBA_SSM, "mamba_ssm")
    assert config.mixers == ["mamba2"]
    assert (config.vocab_size, config.intermediate_size) == (64, 0)  # rows that pad are tokens
    assert (config.mamba_inner_size, config.mamba_head_dim) == (48, 12)
    assert (config.state_size, config.num_groups, config.conv_size) == (128, 1, 4)
    assert config.tie_word_embeddings
    assert config.conv_bias
    ssm = {"layer": "Mamba2", "headdim": 12, "d_state": 16, "ngroups": 2, "conv_bias": False}
    other = MAMBA_SSM | {"d_intermediate": 100, "tie_embeddings": False, "ssm_cfg": ssm}
    config = import_config(other, "mamba_ssm")
    assert (config.state_size, config.num_groups, config.conv_bias) == (16, 2, False)
    assert (config.intermediate_size, config.tie_word_embeddings) == (128, False)  # their GatedMLP


def test_configuration_of_transformers(tmp_path):
    theirs = Mamba2Config(**TRANSFORMERS, layer_norm_epsilon=1e-6, tie_word_embeddings=True)
    theirs.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    for settings in (theirs.to_dict(), saved):
        config = import_config(settings, "transformers_mamba2")
        assert (config.mamba_inner_size, config.mamba_head_dim) == (48, 12)
        assert (config.state_size, config.num_groups, config.conv_size) == (8, 2, 3)
        assert (config.norm_eps, config.tie_word_embeddings) == (1e-6, True)
        assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (0, 2, 1)
        assert config.intermediate_size == 0


@pytest.mark.parametrize(
    ("form", "settings", "message"),
    [
        ("official", {}, r"form must be one of \['mamba_ssm', 'transformers_mamba2'\]"),
        ("mamba_ssm", {"ssm_cfg": {}}, "ssm_cfg.layer must be 'Mamba2', got 'Mamba1'"),
        ("mamba_ssm", {"ssm_cfg": {"layer": "Mamba3"}}, "ssm_cfg.layer must be 'Mamba2'"),
        ("mamba_ssm", {"rms_norm": False}, "rms_norm must be True, got False"),
        ("mamba_ssm", {"attn_layer_idx": [1]}, r"attn_layer_idx must be \[\], got \[1\]"),
        ("mamba_ssm", {"sparse": True}, "mamba_ssm has no setting 'sparse'"),
        *(
            (
                "mamba_ssm",
                {"ssm_cfg": {"layer": "Mamba2"} | wrong},
                f"ssm_cfg.{next(iter(wrong))} must",
            )
            for wrong in (
                {"dt_limit": [0.0, 1.0]},
                {"norm_before_gate": True},
                {"bias": True},
                {"rmsnorm": False},
                {"D_has_hdim": True},
                {"d_ssm": 12},
            )
        ),
        ("transformers_mamba2", {"time_step_limit": [0.0, 0.1]}, "time_step_limit must be"),
        ("transformers_mamba2", {"use_bias": True}, "use_bias must be False, got True"),
        ("transformers_mamba2", {"norm_before_gate": True}, "norm_before_gate must be False"),
        ("transformers_mamba2", {"hidden_act": "gelu"}, "hidden_act must be 'silu', got 'gelu'"),
        ("transformers_mamba2", {"norm": "layer"}, "transformers_mamba2 has no setting 'norm'"),
    ],
)
def test_settings_that_are_not_ours_are_refused(form, settings, message):
    whole = MAMBA_SSM if form == "mamba_ssm" else TRANSFORMERS
    with pytest.raises(ValueError, match=message):
        import_config(whole | settings, form)
    if form == "mamba_ssm":
        with pytest.raises(ValueError, match="the settings of mamba_ssm must have n_layer"):
            import_config({"d_model": 24, "ssm_cfg": {"layer": "Mamba2"}}, form)


@pytest.mark.parametrize(
    ("form", "wrong", "message"),
    [
        *(
            ("mamba_ssm", {name: value}, f"{name} must be a number of at least")
            for name, value in (
                ("d_model", None),
                ("d_model", "x"),
                ("vocab_size", "57"),
                ("n_layer", True),
                ("d_intermediate", -5),
                ("pad_vocab_size_multiple", 0),
            )
        ),
        ("mamba_ssm", {"ssm_cfg": "Mamba2"}, "ssm_cfg must be a table of names and values"),
        ("mamba_ssm", {"ssm_cfg": [1]}, "ssm_cfg must be a table of names and values"),
        ("mamba_ssm", {"": 3}, "mamba_ssm has no setting ''"),
        ("mamba_ssm", {3: 3}, "the settings must be a table of names and values"),
        ("mamba_ssm", {"ssm_cfg": {"layer": "Mamba2", "expand": 1.3}}, "must be a whole number"),
        ("transformers_mamba2", {"num_heads": 8}, "expand times the width, 48, must be .* heads"),
        ("transformers_mamba2", {"expand": None}, "expand must be a number of at least 1, got N"),
        ("transformers_mamba2", {"n_groups": 3}, "mamba_inner_size must be a multiple of"),
    ],
)
def test_settings_that_make_no_sense_are_refused(form, wrong, message):
    whole = MAMBA_SSM if form == "mamba_ssm" else TRANSFORMERS
    with pytest.raises(ValueError, match=message):
        import_config(whole | wrong, form)


def test_settings_are_not_guessed():
    with pytest.raises(ValueError, match="must have hidden_size, num_hidden_layers, vocab_size"):
        import_config({}, "transformers_mamba2")
    with pytest.raises(ValueError, match="the settings must be a table of names and values"):
        import_config([], "mamba_ssm")
