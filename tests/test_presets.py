import pytest
import torch
from transformers import AutoModelForCausalLM

from gdn2.presets import PRESETS, gdn2_1p3b, gdn2_1p3b_hybrid, load_preset
from gdn2.train import run_from_dict, run_to_dict


def parameters(name: str, part: str = "") -> int:
    """Counted on the meta device, where nothing is allocated."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(PRESETS[name]().model)
    return sum(p.numel() for n, p in model.named_parameters() if n.startswith(part))


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_survives_json_and_builds_its_model(name):
    run = load_preset(name)
    tree = run_to_dict(run)
    assert run_to_dict(run_from_dict(tree)) == tree
    assert run.warmup_steps < run.total_steps
    assert run.model.vocab_size > 0
    assert parameters(name) > 0


def test_the_1p3b_models_have_the_published_size():
    assert parameters("gdn2_1p3b", "model.layers.") == 1_302_638_112
    assert parameters("gdn2_1p3b_hybrid", "model.layers.") == 1_300_314_384


def test_the_papers_recipe():
    run = run_to_dict(gdn2_1p3b())
    assert run["data"] == {"sequence_length": 4096, "packing": "concat"}
    assert run["schedule"] == {
        "total_tokens": 100_000_000_000,
        "warmup_tokens": 1_000_000_000,
        "tokens_per_step": 524_288,
        "min_lr_ratio": 0.1,
    }
    optim = {name: run["optim"][name] for name in ("lr", "betas", "weight_decay", "max_grad_norm")}
    assert optim == {"lr": 4e-4, "betas": [0.9, 0.95], "weight_decay": 0.1, "max_grad_norm": 1.0}
    assert run["optim"]["decay_all"] is False
    model = run["model"]
    assert (model["num_heads"], model["head_k_dim"], model["head_v_dim"]) == (16, 128, 128)
    assert (model["num_attention_heads"], model["attention_head_dim"]) == (18, 128)
    assert (model["sliding_window"], model["vocab_size"]) == (2048, 32_000)


def test_the_hybrid_differs_in_its_layers_and_their_width_alone():
    recurrent, hybrid = run_to_dict(gdn2_1p3b()), run_to_dict(gdn2_1p3b_hybrid())
    assert hybrid["model"].pop("mixers") == ["gdn2", "sliding_attention"]
    assert recurrent["model"].pop("mixers") == ["gdn2"]
    assert hybrid["model"].pop("intermediate_size") == 6784
    assert recurrent["model"].pop("intermediate_size") == 6208
    assert recurrent == hybrid


@pytest.mark.parametrize("family", ["demo", "prose"])
def test_twins_share_their_recipe_and_match_in_parameters(family):
    names = [name for name in PRESETS if name.startswith(family + "_")]
    assert len(names) >= 2
    trees = []
    for name in names:
        tree = run_to_dict(load_preset(name))
        del tree["model"]["mixers"], tree["model"]["intermediate_size"]
        trees.append(tree)
        assert parameters(name) == pytest.approx(parameters(names[0]), rel=0.02)
    assert all(tree == trees[0] for tree in trees)


def test_an_unknown_preset_names_close_ones():
    with pytest.raises(ValueError, match="no preset 'demo_gdn'; close: demo_gdn2"):
        load_preset("demo_gdn")
    with pytest.raises(ValueError, match=r"no preset 'xyz'; close: gdn2_1p3b, .*debug"):
        load_preset("xyz")
