import pytest
import torch

from gdn2.models import MIXERS, Gdn2Config
from gdn2.models.configuration import NAMES, SHARED


def test_a_pattern_of_mixers_repeats_over_the_layers():
    config = Gdn2Config(mixers=["gdn2", "sliding_attention"], num_hidden_layers=4)
    assert config.mixers == ["gdn2", "sliding_attention"]
    assert config.layer_mixers == ["gdn2", "sliding_attention"] * 2
    assert config.layer_types == ["linear_attention", "sliding_attention"] * 2
    assert Gdn2Config(mixers="kda").layer_mixers == ["kda"] * 18


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hiden_size": 8}, "no key 'hiden_size': did you mean 'hidden_size'"),
        ({"frobnicate": 1}, "no key 'frobnicate'; its keys are"),
        ({"hidden_size": "abc"}, "hidden_size must be a positive integer, got 'abc'"),
        ({"hidden_size": 8.0}, "hidden_size must be a positive integer, got 8.0"),
        ({"num_heads": True}, "num_heads must be a positive integer, got True"),
        ({"num_heads": 0}, "num_heads must be a positive integer, got 0"),
        ({"num_v_heads": -1}, "num_v_heads must be a positive integer or None, got -1"),
        ({"num_v_heads": 8}, "num_v_heads must be a multiple of num_heads = 16, got 8"),
        ({"norm_eps": "small"}, "norm_eps must be a positive finite number, got 'small'"),
        ({"norm_eps": float("nan")}, "norm_eps must be a positive finite number, got nan"),
        ({"rope_theta": float("inf")}, "rope_theta must be a positive finite number, got inf"),
        ({"hidden_size": 10**18}, "hidden_size must be at most 268,435,456, got 1,000,000,"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers must be at most 10,000"),
        ({"num_heads": 2**16, "head_k_dim": 2**16}, "num_heads x head_k_dim must be at most"),
        ({"eos_token_id": [1, 32000]}, "eos_token_id must be a token below vocab_size = 32,000"),
        ({"pad_token_id": -1}, "pad_token_id must be a token below vocab_size .* got -1"),
        ({"erase_range": 1.5}, "erase_range must be 1.0 or 2.0, got 1.5"),
        ({"output_gate": "relu"}, "output_gate must be one of .* got 'relu'"),
        ({"output_gate_rank": 0}, "output_gate_rank must be .* got 0"),
        ({"attention_head_dim": 65}, "attention_head_dim must be even"),
        ({"intermediate_size": -1}, "intermediate_size must be an integer, 0 or more, got -1"),
        (
            {"mamba_inner_size": 100},
            "mamba_inner_size must be a multiple of mamba_head_dim x num_g",
        ),
        ({"num_groups": 7}, "must be a multiple of mamba_head_dim x num_groups = 64 x 7, got 4096"),
        ({"state_size": 2**27}, "mamba heads x mimo_rank x state_size must be at most"),
        ({"mimo_rank": 17}, "mimo_rank must be at most 16, got 17"),
        ({"rope_fraction": "half"}, "rope_fraction must be a number, got 'half'"),
        ({"rope_fraction": 0.0}, "rope_fraction must be in"),
        ({"rope_fraction": 0.5, "state_size": 2}, "rotate at least one pair of the state_size = 2"),
        ({"ssm_decay": "exp"}, r"ssm_decay must be one of \('softplus', 'rational'\), got 'exp'"),
        ({"conv_bias": 1}, "conv_bias must be true or false, got 1"),
        (
            {"decay_lower_bound": 0.0},
            "decay_lower_bound must be None or a negative number, got 0.0",
        ),
        (
            {"mixers": "kda", "erase_gate": "head"},
            r"erase_gate = 'head' is for gdn2, and mixers are \['kda'\]",
        ),
        (
            {"mixers": "deltanet", "decay_lower_bound": -5.0},
            "decay_lower_bound = -5.0 is for gdn2 or gated_deltanet or kda, and mixers are",
        ),
        ({"mixers": "mamba2", "mimo_rank": 4}, "mimo_rank = 4 is for mamba3"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings must be true or false, got 1"),
        ({"mixers": []}, "mixers must be a list of names"),
        ({"mixers": [["gdn2"]]}, r"mixers must be names of .* got \['gdn2'\]"),
        ({"state_size": 7}, r"state_size must be even \(rotary pairs\), got 7"),
        ({"rope_fraction": float("inf")}, "rope_fraction must be in .* got inf"),
        ({"rope_fraction": float("nan")}, "rope_fraction must be in .* got nan"),
        ({"mixers": ["gdn3"]}, "got 'gdn3': did you mean 'gdn2'"),
        (
            {"mixers": ["gdn2"] * 4},
            "mixers has 4 names, which do not divide num_hidden_layers = 18",
        ),
        ({"mixers": ["gdn2"] * 19}, "mixers has 19 names"),
        ({"layer_types": ["full_attention"] * 18}, "layer_types follows from mixers"),
    ],
)
def test_what_can_not_be_meant_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Gdn2Config(**options)


def another(name, value, mixer):
    """A value that a layer takes, and that is not this one."""
    choices = {
        "erase_range": 2.0,
        "erase_gate": "head",
        "write_gate": "head",
        "decay_lower_bound": -5.0,
        "output_gate": "silu" if mixer == "kda" else "sigmoid",
        "output_gate_rank": 3,
        "conv_bias": False,
        "rope_fraction": 1.0,
        "ssm_decay": "rational",
        "mamba3_output_norm": True,
        "norm_eps": 1e-2,
        "rope_theta": 100.0,
        "num_v_heads": 8,
        "head_v_dim": 16,
        "mimo_rank": 2,
    }
    return choices.get(name, 2 * (value or 4))


KEYS = sorted({key for mixer in MIXERS.values() for key in mixer.settings.values()})


def test_every_setting_is_read_by_a_layer_or_the_model():
    assert set(NAMES) - set(KEYS) == {
        *("vocab_size", "num_hidden_layers", "mixers", "intermediate_size", "initializer_range"),
        *("tie_word_embeddings", "max_position_embeddings", "use_cache"),
        *("bos_token_id", "eos_token_id", "pad_token_id"),
    }


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("key", KEYS)
def test_a_setting_changes_those_layers_that_read_it_and_others_refuse_it(mixer, key, make_config):
    sizes = {"num_v_heads": None, "head_v_dim": None, "hidden_size": 16, "rope_fraction": 0.5}
    plain = make_config([mixer], mimo_rank=1, **sizes)
    value = another(key, getattr(plain, key), mixer)
    read = key in MIXERS[mixer].settings.values()
    if not read and key not in SHARED:
        with pytest.raises(ValueError, match=f"{key} = .* is for .*, and mixers are .{mixer!r}"):
            make_config([mixer], **sizes | {"mimo_rank": 1, key: value})
        return
    changed = make_config([mixer], **sizes | {"mimo_rank": 1, key: value})
    assert (plain.traits != changed.traits) == read
    results = []
    for config in (plain, changed):
        torch.manual_seed(0)
        layer = MIXERS[mixer].build(config).double()
        for parameter in layer.parameters():
            torch.nn.init.normal_(parameter, std=0.5)
        x = torch.randn(1, 9, config.hidden_size, generator=torch.Generator().manual_seed(0))
        results.append(layer(x.double())[0])
    a, b = results
    assert (a.shape == b.shape and torch.equal(a, b)) != read


def test_a_saved_configuration_is_the_same_configuration(tmp_path):
    config = Gdn2Config(
        mixers=["kda", "full_attention"], output_gate_rank=None, num_v_heads=32, eos_token_id=0
    )
    config.save_pretrained(tmp_path)
    loaded = Gdn2Config.from_pretrained(tmp_path)
    assert loaded.mixers == ["kda", "full_attention"]
    assert loaded.output_gate_rank is None
    assert (loaded.num_v_heads, loaded.head_v_dim, loaded.eos_token_id) == (32, None, 0)
    first = (tmp_path / "config.json").read_text()
    loaded.save_pretrained(tmp_path)
    assert (tmp_path / "config.json").read_text() == first
