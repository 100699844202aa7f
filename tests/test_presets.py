import pytest
import torch
from transformers import AutoModelForCausalLM

from gdn2.models.accounting import account
from gdn2.presets import PRESETS, SIZES, SYSTEMS, load_preset
from gdn2.train import run_from_dict, run_to_dict

STATE = {"demo": 4096, "20m": 24_576, "125m": 98_304, "350m": 131_072, "1p3b": 262_144}


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


BLOCKS = {
    "gdn2_20m": 21_689_020,
    "gdn2_20m_hybrid": 21_723_230,
    "gdn2_125m": 121_284_436,
    "gdn2_125m_hybrid": 121_036_202,
    "gdn2_350m": 336_300_976,
    "gdn2_350m_hybrid": 336_502_232,
    "gdn2_1p3b": 1_302_638_112,  # as of the official code
    "gdn2_1p3b_hybrid": 1_300_314_384,  # as of the official code
    "gated_deltanet_1p3b": 1_302_417_216,
    "gated_deltanet_1p3b_hybrid": 1_304_185_248,
    "kda_1p3b": 1_300_647_456,
    "kda_1p3b_hybrid": 1_303_300_368,
    "mamba2_1p3b": 1_306_410_624,
    "mamba2_1p3b_hybrid": 1_302_200_640,
    "mamba3_siso_1p3b": 1_304_114_688,
    "mamba3_siso_1p3b_hybrid": 1_297_071_360,
    "mamba3_mimo_1p3b": 1_305_441_792,
    "mamba3_mimo_1p3b_hybrid": 1_297_734_912,
    "transformer_1p3b": 1_297_990_656,
    "sliding_window_1p3b": 1_297_990_656,
}


@pytest.mark.parametrize("name", BLOCKS)
def test_models_have_the_published_size(name):
    assert parameters(name, "model.layers.") == BLOCKS[name]


def twins(size: str) -> list[tuple[str, str]]:
    """Every preset of a size, with the GDN-2 that its parameters match."""
    pairs = []
    for system in SYSTEMS:
        for form in ("", "_hybrid"):
            attention = system in ("transformer", "sliding_window")
            if not (attention and form):
                twin = "_hybrid" if attention else form
                pairs.append((preset_name(system, size) + form, preset_name("gdn2", size) + twin))
    return pairs


def preset_name(system: str, size: str) -> str:
    return f"demo_{system}" if size == "demo" else f"{system}_{size}"


def test_every_system_is_there_in_every_size():
    names = [name for size in SIZES for name, _ in twins(size)]
    others = {"debug", "prose_gdn2", "prose_gdn2_hybrid"}
    assert len(names) == 5 * 16
    assert set(PRESETS) == {*names, *others}


@pytest.mark.parametrize("size", SIZES)
def test_a_twin_differs_in_its_mixers_and_the_width_behind_them_alone(size):
    for name, twin in twins(size):
        run, other = run_to_dict(load_preset(name)), run_to_dict(load_preset(twin))
        for key in ("mixers", "mimo_rank", "intermediate_size"):
            del run["model"][key], other["model"][key]
        assert run == other
        most = 0.01 if size == "demo" else 0.004
        expected = pytest.approx(parameters(twin, "model.layers."), rel=most)
        assert parameters(name, "model.layers.") == expected


@pytest.mark.parametrize("size", SIZES)
def test_all_systems_of_a_size_carry_the_same_recurrent_state(size):
    states = set()
    for name, _ in twins(size):
        model = load_preset(name).model
        bytes_ = account(model, length=1)["state_bytes"]["recurrent"]
        layers = model.layer_types.count("linear_attention")
        assert (bytes_ == 0) == (layers == 0)
        if layers:
            states.add(bytes_ // 4 // layers)
    assert states == {STATE[size]}


def test_the_papers_recipe():
    run = run_to_dict(load_preset("gdn2_1p3b"))
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


def test_smaller_models_have_their_own_schedule():
    shown = []
    for size in ("20m", "125m", "350m", "1p3b"):
        run = load_preset(f"gdn2_{size}")
        schedule = run.schedule
        assert schedule.warmup_tokens == schedule.total_tokens // 100
        assert schedule.min_lr_ratio == 0.1
        tokens = (schedule.total_tokens // 10**9, schedule.tokens_per_step)
        shown.append((*tokens, run.optim.lr, run.parallel.micro_batch_size))
    assert shown == [
        (1, 65_536, 2e-3, 4),
        (5, 524_288, 1e-3, 4),
        (15, 524_288, 6e-4, 4),
        (100, 524_288, 4e-4, 1),
    ]


def test_a_hybrid_alternates():
    assert load_preset("mamba3_mimo_350m_hybrid").model.mixers == ["mamba3", "sliding_attention"]
    assert load_preset("mamba3_mimo_350m_hybrid").model.mimo_rank == 4
    assert load_preset("mamba3_siso_350m").model.mimo_rank == 1
    assert load_preset("sliding_window_20m").model.mixers == ["sliding_attention"]
    assert load_preset("transformer_20m").model.mixers == ["full_attention"]


def test_the_prose_twins_share_their_recipe_and_match_in_parameters():
    recurrent, hybrid = "prose_gdn2", "prose_gdn2_hybrid"
    trees = [run_to_dict(load_preset(name)) for name in (recurrent, hybrid)]
    for tree in trees:
        del tree["model"]["mixers"], tree["model"]["intermediate_size"]
    assert trees[0] == trees[1]
    assert parameters(hybrid) == pytest.approx(parameters(recurrent), rel=0.02)


def test_an_unknown_preset_names_close_ones():
    with pytest.raises(ValueError, match="no preset 'demo_gdn'; close: demo_gdn2"):
        load_preset("demo_gdn")
    with pytest.raises(
        ValueError, match=r"'xyz'; SYSTEM_SIZE\[_hybrid\], .* debug; .*gdn2, .*1p3b"
    ):
        load_preset("xyz")
