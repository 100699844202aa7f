import peers
import pytest
import torch
from torch import nn
from transformers import Mamba2Config

from gdn2.layers import GatedDeltaNet, GatedDeltaNet2, KimiDeltaAttention, Mamba2
from gdn2.models import (
    Gdn2ForCausalLM,
    export_weights,
    import_config,
    import_weights,
    to_gdn2,
)

EQUAL = {"num_v_heads": 2, "head_v_dim": 6}
CONVERTED = {
    "kda": (["kda"], {}),
    "kda with another gate": (["kda"], {"output_gate": "silu", "output_gate_rank": 3}),
    "kda with bounded decay": (["kda"], {"decay_lower_bound": -5.0}),
    "kda with a full gate": (["kda"], {"output_gate_rank": None}),
    "gated deltanet": (["gated_deltanet"], {}),
    "gated deltanet with another gate": (["gated_deltanet"], {"output_gate_rank": 3}),
    "tied embeddings": (["gated_deltanet"], {"tie_word_embeddings": True}),
    "hybrid": (["kda", "sliding_attention"], {}),
    "both": (["kda", "gated_deltanet"], {"output_gate": "silu", "output_gate_rank": 6}),
    "with gdn2 by head": (["gdn2", "kda"], {"output_gate": "silu", "write_gate": "head"}),
}
BRIEFLY = ("kda", "gated deltanet", "hybrid")


def weights_of(model):
    return {name: x.clone() for name, x in model.state_dict().items()}


def assert_same_weights(got, expected):
    assert got.keys() == expected.keys()
    for name, x in expected.items():
        assert torch.equal(got[name], x), name


@pytest.mark.parametrize(
    ("name", "dtype"),
    [*((name, torch.float64) for name in CONVERTED), *((name, torch.float32) for name in BRIEFLY)],
)
@torch.no_grad()
def test_gdn2_with_tied_gates_is_the_other_member(make_model, tokens, name, dtype):
    mixers, options = CONVERTED[name]
    model = make_model(mixers, **EQUAL, **options).to(dtype)
    before = weights_of(model)
    new = to_gdn2(model)
    exact = {"rtol": 1e-10, "atol": 1e-11} if dtype == torch.float64 else {}
    torch.testing.assert_close(new(tokens).logits, model(tokens).logits, **exact)
    assert set(new.config.layer_mixers) <= {"gdn2", "sliding_attention"}
    assert {p.dtype for p in new.parameters()} == {dtype}
    for parameter in new.parameters():
        parameter.zero_()
    assert_same_weights(weights_of(model), before)


@pytest.mark.parametrize("name", BRIEFLY)
def test_it_trains_on_and_the_gates_come_apart(make_model, tokens, name):
    mixers, options = CONVERTED[name]
    model = to_gdn2(make_model(mixers, **EQUAL, **options)).train()
    loss = model(tokens, labels=tokens).loss
    loss.backward()
    for path, parameter in model.named_parameters():
        assert parameter.grad.isfinite().all(), path
    layer = model.model.layers[0].mixer
    for gate in ("b_proj", "w_proj", "f_proj.1"):
        assert layer.get_parameter(f"{gate}.weight").grad.abs().min() > 0, gate
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= 1e-4 * parameter.grad
        assert model(tokens, labels=tokens).loss < loss
    rows = layer.b_proj.weight.view(2, 8, -1)
    assert (rows[:, 0] != rows[:, 1]).any()
    if name == "gated deltanet":  # what a head's decay leaves free
        assert (layer.f_proj[1].weight[:, 2:] != 0).all()


def test_it_is_saved_and_loaded_like_any_model(make_model, tokens, tmp_path):
    model = to_gdn2(make_model(["gated_deltanet", "sliding_attention"], **EQUAL))
    model.save_pretrained(tmp_path)
    again = Gdn2ForCausalLM.from_pretrained(tmp_path, dtype=torch.float64).eval()
    assert_same_weights(weights_of(again), weights_of(model))
    torch.testing.assert_close(again(tokens).logits, model(tokens).logits, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("mixers", "options", "message"),
    [
        (["gdn2"], EQUAL, r"mixers must have one of \('kda', 'gated_deltanet'\).* got \['gdn2'\]"),
        (["full_attention"], {}, r"mixers must have one of .* got \['full_attention'\]"),
        (["kda", "deltanet"], EQUAL, "deltanet is no special case of gdn2, which always decays"),
        (["mamba2"], {}, "mamba2 is no special case of gdn2, .* erases"),
        (["kda", "mamba3"], EQUAL, "mamba3 is no special case of gdn2, .* erases"),
        (["kda"], {"num_v_heads": 4}, "num_v_heads must be num_heads = 2, got 4"),
        (["kda"], EQUAL | {"erase_range": 2.0}, "erase_range must be 1.0, got 2.0"),
        (["gated_deltanet"], EQUAL | {"head_v_dim": 1}, "num_heads must be at most head_v_dim = 1"),
        (
            ["kda", "gated_deltanet"],
            EQUAL,
            "must have one output gate, got activations and ranks .*silu",
        ),
    ],
)
def test_what_gdn2_can_not_be_is_refused(make_model, mixers, options, message):
    with pytest.raises(ValueError, match=message):
        to_gdn2(make_model(mixers, **options))


def official_names(d, attention):
    """Of one block, [out, in] of what our `tiny_config` makes; the published models' names."""
    K, V, R = 16, 16, 4
    layer = {
        **{f"{x}_proj.weight": (n, d) for x, n in zip("qkvbw", (K, K, V, K, V), strict=True)},
        "o_proj.weight": (d, V),
        **{f"f_proj.{i}.weight": shape for i, shape in enumerate([(R, d), (K, R)])},
        **{f"g_proj.{i}.weight": shape for i, shape in enumerate([(R, d), (V, R)])},
        "g_proj.1.bias": (V,),
        **{f"{x}_conv1d.weight": (n, 1, 4) for x, n in zip("qkv", (K, K, V), strict=True)},
        "A_log": (2,),
        "dt_bias": (K,),
        "o_norm.weight": (R,),
    }
    if attention:
        layer = {"attn.weight": (3 * 16, d), "proj.weight": (d, 16)}
    block = {f"attn.{name}": shape for name, shape in layer.items()}
    for i, shape in enumerate([(32, d), (32, d), (d, 32)], 1):
        block[f"mlp.swiglu.w{i}.weight"] = shape
    return block | {"norm_1.weight": (d,), "norm_2.weight": (d,)}


def mamba_names(d, mlp):
    layer = {"in_proj.weight": (32 + 48 + 4, d), "conv1d.weight": (48, 1, 4)}
    layer |= {"A_log": (4,), "dt_bias": (4,), "D": (4,), "norm.weight": (32,)}
    layer |= {"conv1d.bias": (48,), "out_proj.weight": (d, 32)}
    block = {f"mixer.{name}": shape for name, shape in layer.items()} | {"norm.weight": (d,)}
    if mlp:
        block |= {"mlp.fc1.weight": (64, d), "mlp.fc2.weight": (d, 32), "norm2.weight": (d,)}
    return block


def checkpoint(blocks, names):
    torch.manual_seed(3)
    shapes = dict(names)
    for path, block in blocks.items():
        shapes |= {f"{path}{name}": shape for name, shape in block.items()}
    return {name: torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}


D = 24
GDN2 = {"num_v_heads": 4, "head_v_dim": 4}
OFFICIAL = {"transformer.wte.weight": (60, D), "transformer.ln_f.weight": (D,)}
MAMBA = {"backbone.embedding.weight": (60, D), "backbone.norm_f.weight": (D,)}
HEAD = {"lm_head.weight": (60, D)}
PUBLISHED = {
    "official recurrent": (
        "official",
        (["gdn2"], GDN2),
        checkpoint(
            {f"transformer.h.{i}.": official_names(D, attention=False) for i in (0, 1)},
            OFFICIAL | HEAD,
        ),
    ),
    "official hybrid": (
        "official",
        (["gdn2", "sliding_attention"], GDN2),
        checkpoint(
            {f"transformer.h.{i}.": official_names(D, attention=i == 1) for i in (0, 1)},
            OFFICIAL | HEAD,
        ),
    ),
    "mamba-ssm": (
        "mamba_ssm",
        (["mamba2"], {"intermediate_size": 0}),
        checkpoint(
            {f"backbone.layers.{i}.": mamba_names(D, mlp=False) for i in (0, 1)},
            MAMBA | HEAD,
        ),
    ),
    "mamba-ssm with an MLP": (
        "mamba_ssm",
        (["mamba2"], {}),
        checkpoint(
            {f"backbone.layers.{i}.": mamba_names(D, mlp=True) for i in (0, 1)},
            MAMBA | HEAD,
        ),
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_names_and_shapes_are_read_and_written(make_model, name):
    form, (mixers, options), weights = PUBLISHED[name]
    model = make_model(mixers, **options)
    import_weights(model, weights, form)
    assert_same_weights(export_weights(model, form), weights)
    used = sum(x.sum() for x in model.state_dict().values())
    assert used == pytest.approx(sum(x.sum().item() for x in weights.values()))


def test_official_attention_has_queries_keys_and_values_of_a_head_together(make_model):
    form, (mixers, options), weights = PUBLISHED["official hybrid"]
    model = make_model(mixers, **options)
    import_weights(model, weights, form)
    fused, layer = weights["transformer.h.1.attn.attn.weight"], model.model.layers[1].mixer
    for h in range(2):
        for i, proj in enumerate((layer.q_proj, layer.k_proj, layer.v_proj)):
            rows = 8 * (3 * h + i)
            assert torch.equal(proj.weight[8 * h : 8 * h + 8], fused[rows : rows + 8])


@pytest.mark.peer
def test_the_mlp_of_mamba_ssm_is_ours(make_model):
    model = make_model(["mamba2"])
    theirs = peers.load_file("mamba-ssm", "mamba_ssm/modules/mlp.py").GatedMLP(D, 32, multiple_of=1)
    path = "backbone.layers.1.mlp."
    weights = export_weights(model, "mamba_ssm")
    theirs.double().load_state_dict(
        {name.removeprefix(path): x for name, x in weights.items() if name.startswith(path)}
    )
    x = torch.randn(3, D, dtype=torch.float64)
    torch.testing.assert_close(model.model.layers[1].mlp(x), theirs(x))


@pytest.mark.peer
@pytest.mark.parametrize("options", [{}, {"mimo_rank": 1, "mamba3_output_norm": True}])
def test_mamba3_layers_of_mamba_ssm_have_our_names(make_model, options):
    """Theirs can not be built without a GPU: read what its constructor gives weights to."""
    theirs = peers.names_given_weights("mamba-ssm", "mamba_ssm/modules/mamba3.py", "Mamba3")
    model, other = (make_model(["mamba3"], **options) for _ in range(2))
    for parameter in other.parameters():
        nn.init.zeros_(parameter)
    weights = export_weights(model, "mamba_ssm")
    path = "backbone.layers.1.mixer."
    ours = {name[len(path) :].partition(".")[0] for name in weights if name.startswith(path)}
    absent = {"norm"} if not options else {"mimo_x", "mimo_z", "mimo_o"}
    assert ours == theirs - absent
    import_weights(other, weights, "mamba_ssm")
    assert_same_weights(weights_of(other), weights_of(model))


def transformers_config(**options):
    settings = {
        "vocab_size": 60,
        "hidden_size": D,
        "num_hidden_layers": 2,
        "num_heads": 4,
        "head_dim": 12,
        "state_size": 8,
        "n_groups": 2,
        "conv_kernel": 3,
        "chunk_size": 8,
    }
    return Mamba2Config(**settings | options)


@pytest.mark.parametrize("tied", [False, True])
@torch.no_grad()
def test_mamba2_of_transformers_has_the_same_logits(tokens, tied):
    config = transformers_config(tie_word_embeddings=tied, use_conv_bias=not tied)
    torch.manual_seed(0)
    theirs = peers.load_transformers("mamba2", double=True).Mamba2ForCausalLM(config)
    theirs = theirs.double().eval()
    ours = Gdn2ForCausalLM(import_config(config.to_dict(), "transformers_mamba2")).double().eval()
    import_weights(ours, theirs.state_dict(), "transformers_mamba2")
    expected = theirs(tokens).logits
    torch.testing.assert_close(ours(tokens).logits, expected, rtol=1e-9, atol=1e-10)
    back = export_weights(ours, "transformers_mamba2")
    assert_same_weights(back, theirs.state_dict())
    theirs.load_state_dict(back)
    del back["lm_head.weight"]  # as files leave it out
    if tied:
        import_weights(ours, back, "transformers_mamba2")
        torch.testing.assert_close(ours(tokens).logits, expected, rtol=1e-9, atol=1e-10)
    else:
        with pytest.raises(ValueError, match=r"lack lm_head.weight, our lm_head.weight"):
            import_weights(ours, back, "transformers_mamba2")


VALUE_GROUPS = {"num_v_heads": 4, "head_dim": 8, "expand_v": 0.5}
WINDOW = {"layers": [1], "num_heads": 2, "num_kv_heads": 2, "window_size": 5}
NO_GROUPS = {"expand_k": 16 / D, "expand_v": 8 / D, "use_gate": True, "attn": WINDOW}


def build_fla(name, options):
    models = pytest.importorskip("fla.models", reason="make peers installs it")
    sizes = {"hidden_size": D, "num_heads": 2, "num_hidden_layers": 2, "intermediate_size": 32}
    config = getattr(models, f"{name}Config")(vocab_size=60, **sizes, **options)
    return getattr(models, f"{name}ForCausalLM")(config)


@pytest.mark.peer
@pytest.mark.filterwarnings("ignore:Triton is not supported")
@pytest.mark.parametrize(
    ("name", "options", "mixers", "ours"),
    [
        ("KDA", VALUE_GROUPS, ["kda"], {}),
        ("GatedDeltaNet", VALUE_GROUPS, ["gated_deltanet"], {}),
        (
            "DeltaNet",
            NO_GROUPS,
            ["deltanet", "sliding_attention"],
            {"num_v_heads": 2, "attention_head_dim": 12},
        ),
    ],
)
def test_models_of_fla_are_read_and_written(make_model, monkeypatch, name, options, mixers, ours):
    if "attn" in options:  # it wants to find this, and then calls it on a GPU alone
        pytest.importorskip("fla.layers.attn", reason="make peers installs it")
        monkeypatch.setattr("fla.layers.attn.flash_attn_func", object())
    theirs, ours = build_fla(name, options), make_model(mixers, head_v_dim=4, **ours).float()
    import_weights(ours, theirs.state_dict(), "fla")
    back = export_weights(ours, "fla")
    assert_same_weights(back, theirs.state_dict())
    theirs.load_state_dict(back)


@pytest.mark.peer
@pytest.mark.filterwarnings("ignore:Triton is not supported")
def test_the_gdn2_layer_of_fla_has_our_names(make_model):
    layers = pytest.importorskip("fla.layers", reason="make peers installs it")
    theirs = layers.GatedDeltaNet2(D, expand_v=0.5, head_dim=8, num_heads=2, num_v_heads=4)
    ours = make_model(["gdn2"], head_v_dim=4, output_gate="sigmoid").model.layers[0].mixer.float()
    import_weights(ours, theirs.state_dict(), "fla")
    theirs.load_state_dict(export_weights(ours, "fla"))
    assert_same_weights(dict(ours.state_dict()), dict(theirs.state_dict()))


def test_qwen3_next_has_all_of_a_key_head_together():
    layer = GatedDeltaNet(D, 2, num_v_heads=4, head_k_dim=8, head_v_dim=6)
    weights = export_weights(layer, "qwen3_next")
    assert {name: tuple(x.shape) for name, x in weights.items()} == {
        "in_proj_qkvz.weight": (16 + 16 + 24 + 24, D),
        "in_proj_ba.weight": (8, D),
        "conv1d.weight": (16 + 16 + 24, 1, 4),
        "A_log": (4,),
        "dt_bias": (4,),
        "norm.weight": (6,),
        "out_proj.weight": (D, 24),
    }
    head = weights["in_proj_qkvz.weight"][40:]  # the second: q, k, then v and z of two value heads
    maps = (layer.q_proj, layer.k_proj, layer.v_proj, layer.g_proj)
    parts = [m.weight[len(m.weight) // 2 :] for m in maps]
    assert torch.equal(head, torch.cat(parts))
    assert torch.equal(weights["in_proj_ba.weight"][4:6], layer.b_proj.weight[2:])
    other = GatedDeltaNet(D, 2, num_v_heads=4, head_k_dim=8, head_v_dim=6)
    import_weights(other, weights, "qwen3_next")
    assert_same_weights(other.state_dict(), layer.state_dict())


def test_kimi_linear_has_no_bias_of_its_output_gate():
    layer, other = (KimiDeltaAttention(D, 2, head_k_dim=8) for _ in range(2))
    weights = export_weights(layer, "kimi_linear")
    assert weights["forget_gate.A_log"].shape == (1, 1, 2, 1)
    with torch.no_grad():
        other.g_proj[1].bias.fill_(1)
    with pytest.raises(ValueError, match=r"kimi_linear has no g_proj.1.bias, .* must be zero"):
        export_weights(other, "kimi_linear")
    import_weights(other, weights, "kimi_linear")
    assert_same_weights(other.state_dict(), layer.state_dict())


def test_weights_that_do_not_fit_are_refused(make_model):
    model = make_model(["mamba2"], tie_word_embeddings=True)
    weights = export_weights(model, "mamba_ssm")
    before = weights_of(model)
    path = "backbone.layers.1.mlp.fc1.weight"
    for wrong, message in (
        ({path: torch.zeros(64, D + 1)}, r"fc1.weight must be .* \[64, 24\], got \[64, 25\]"),
        ({path: torch.zeros(64, D, dtype=torch.int64)}, r"floating numbers .*24\] torch.int64"),
        ({path: torch.empty(64, D, device="meta")}, "must be floating numbers"),
        ({path: None}, "must be floating numbers .* got None"),
        ({"extra.weight": torch.zeros(3), 3: 4}, "the weights also hold 3, extra.weight"),
        ({"lm_head.weight": torch.zeros(60, D)}, "the output map must be the embedding"),
    ):
        with pytest.raises(ValueError, match=message):
            import_weights(model, weights | wrong, "mamba_ssm")
    del weights[path]
    with pytest.raises(
        ValueError,
        match=r"lack backbone.layers.1.mlp.fc1.weight, our model.layers.1.mlp.up_proj.weight and",
    ):
        import_weights(model, weights, "mamba_ssm")
    assert_same_weights(weights_of(model), before)


def test_a_form_that_has_no_such_module_is_refused(make_model):
    model = make_model(["kda"])
    for form, message in (
        ("gpt2", r"form must be one of \['official', .* got 'gpt2'"),
        ("official", "official has GatedDeltaNet2 and Attention, and no KimiDeltaAttention"),
        ("kimi_linear", "kimi_linear has layers like ours, and no model"),
    ):
        with pytest.raises(ValueError, match=message):
            export_weights(model, form)
    with pytest.raises(ValueError, match="qwen3_next has GatedDeltaNet, and no Mamba2"):
        import_weights(Mamba2(D, 48, head_dim=6), {}, "qwen3_next")
    with pytest.raises(ValueError, match=r"transformers_mamba2 has no model.layers.0.mlp_norm"):
        export_weights(make_model(["mamba2"]), "transformers_mamba2")


@pytest.mark.parametrize(
    ("form", "layer", "options", "message"),
    [
        ("official", GatedDeltaNet2, {"output_gate": "sigmoid"}, "is 'silu', got 'sigmoid'"),
        ("official", GatedDeltaNet2, {"erase_gate": "head"}, "erase_gate of official's"),
        ("official", GatedDeltaNet2, {"decay_lower_bound": -5.0}, "is None, got -5.0"),
        ("fla", GatedDeltaNet2, {}, "of fla's GatedDeltaNet2 is 'sigmoid', got 'silu'"),
        ("qwen3_next", GatedDeltaNet, {"erase_range": 2.0}, "erase_range .* is 1.0, got 2.0"),
        (
            "qwen3_next",
            GatedDeltaNet,
            {"output_gate_rank": 4},
            r"no in_proj_qkvz\.weight, which",
        ),
    ],
)
def test_a_layer_that_computes_otherwise_is_refused(form, layer, options, message):
    with pytest.raises(ValueError, match=message):
        export_weights(layer(D, 2, head_k_dim=8, **options), form)
