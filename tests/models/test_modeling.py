import math
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from gdn2.models import Gdn2Config, Gdn2ForCausalLM, modeling
from gdn2.models import loss as loss_module

EXACT = {"rtol": 1e-9, "atol": 1e-10}  # float64: only the order of sums differs


def blocks(model):
    return sum(p.numel() for p in model.model.layers.parameters())


@pytest.mark.parametrize(
    ("mixers", "intermediate_size", "parameters"),
    [
        (["gdn2"], 6208, 1_302_638_112),
        (["gdn2", "sliding_attention"], 6784, 1_300_314_384),
    ],
)
def test_the_large_models_have_the_official_number_of_parameters(
    mixers, intermediate_size, parameters
):
    config = Gdn2Config(mixers=mixers, intermediate_size=intermediate_size)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert isinstance(model, Gdn2ForCausalLM)
    assert blocks(model) == parameters
    outside = 2 * 32000 * 2304 + 2304
    assert sum(p.numel() for p in model.parameters()) == parameters + outside


def test_parameter_names_outside_the_layers(make_config):
    names = {
        n.replace("layers.0.", "layers.i.")
        for n, _ in Gdn2ForCausalLM(
            make_config(["full_attention"], num_hidden_layers=1)
        ).named_parameters()
    }
    layer = {
        *(f"mixer.{x}_proj.weight" for x in "qkvo"),
        *(f"mlp.{x}_proj.weight" for x in ("gate", "up", "down")),
        "mixer_norm.weight",
        "mlp_norm.weight",
    }
    assert names == {
        "model.embed_tokens.weight",
        "model.norm.weight",
        "lm_head.weight",
        *(f"model.layers.i.{name}" for name in layer),
    }


# Initialisation


def drawn(config, on_meta):
    """A new model, or one without memory that is given some, filled with NaN, and then drawn."""
    with torch.device("meta" if on_meta else "cpu"):
        model = Gdn2ForCausalLM(config)
    if on_meta:
        model.to_empty(device="cpu")
        for parameter in model.parameters():
            parameter.data.fill_(torch.nan)
        model.init_weights()
    return model


@pytest.mark.parametrize("on_meta", [False, True])
def test_every_parameter_is_drawn_from_its_law(make_config, on_meta):
    torch.manual_seed(0)
    L, D = 2, 96
    config = make_config(
        ["gdn2", "sliding_attention"], hidden_size=D, vocab_size=500, intermediate_size=400
    )
    model = drawn(config, on_meta)
    delta, attention = (layer.mixer for layer in model.model.layers)

    def is_uniform(weight, bound):
        assert weight.abs().max() <= bound
        assert abs(weight.std() * 3**0.5 / bound - 1) < 0.1

    for name, weight in delta.named_parameters():
        if "proj" in name and weight.ndim == 2:
            is_uniform(weight, 2**-2.5 * (6 / sum(weight.shape)) ** 0.5)
        elif "conv" in name:
            is_uniform(weight, 0.5)
    assert (delta.g_proj[1].bias == 0).all()
    assert (delta.A_log >= 0).all()
    assert (delta.A_log <= math.log(16.001)).all()
    dt = F.softplus(delta.dt_bias)
    assert 0.99e-3 < dt.min() < dt.max() < 1.01e-1
    mlp = model.model.layers[0].mlp
    for linear in (attention.q_proj, attention.k_proj, mlp.gate_proj, mlp.up_proj, model.lm_head):
        is_uniform(linear.weight, linear.in_features**-0.5)
    for linear in (attention.o_proj, mlp.down_proj):
        is_uniform(linear.weight, linear.in_features**-0.5 / (2 * L) ** 0.5)
    assert abs(model.model.embed_tokens.weight.std() / 0.02 - 1) < 0.05
    for name, weight in model.named_parameters():
        if "norm" in name:
            assert (weight == 1).all()


@pytest.mark.parametrize("on_meta", [False, True])
def test_mambas_parameters_are_drawn_from_their_laws(make_config, on_meta):
    torch.manual_seed(0)
    sizes = {"mamba_inner_size": 128, "hidden_size": 96, "mimo_rank": 4}
    config = make_config(["mamba2", "mamba3"], **sizes)
    model = drawn(config, on_meta)
    for mixer in (layer.mixer for layer in model.model.layers):
        for linear, scale in ((mixer.in_proj, 1), (mixer.out_proj, 0.5)):  # 1 / sqrt(2 layers)
            bound = scale * linear.in_features**-0.5
            assert 0.9 * bound < linear.weight.abs().max() <= bound
        dt = F.softplus(mixer.dt_bias)
        assert 0.99e-3 < dt.min() < dt.max() < 1.01e-1
        ones = [mixer.D, mixer.norm.weight] if mixer.norm is not None else [mixer.D]
        if hasattr(mixer, "mimo_x"):
            ones += [mixer.B_bias, mixer.C_bias, mixer.B_norm.weight, mixer.C_norm.weight]
            ones += [mixer.mimo_z, 4 * mixer.mimo_x, 4 * mixer.mimo_o]
        else:
            assert (mixer.A_log >= 0).all()
            assert (mixer.A_log <= math.log(16.001)).all()
            for parameter in (mixer.conv1d.weight, mixer.conv1d.bias):
                assert 0.4 < parameter.abs().max() <= 0.5
        assert all((parameter == 1).all() for parameter in ones)


def test_a_model_without_feed_forward_parts(make_config, tokens):
    model = Gdn2ForCausalLM(make_config(["mamba2"], intermediate_size=0))
    assert not any("mlp" in name for name, _ in model.named_parameters())
    layers = model.model.layers
    x = model.model.embed_tokens(tokens)
    for layer in layers:
        x = x + layer.mixer(layer.mixer_norm(x))[0]
    torch.testing.assert_close(model(tokens).logits, model.lm_head(model.model.norm(x)))


def test_no_parameter_is_drawn_twice(make_config, monkeypatch):
    drawn = []
    reset = modeling.OutputLinear.reset_parameters
    monkeypatch.setattr(
        modeling.OutputLinear, "reset_parameters", lambda *a, **k: drawn.append(k) or reset(*a, **k)
    )
    Gdn2ForCausalLM(make_config(["gdn2"]))
    assert [k for k in drawn if k] == [{"scale": 0.5}] * 2


def test_tied_embeddings_share_one_tensor_drawn_as_the_embedding(make_config):
    config = make_config(["gdn2"], tie_word_embeddings=True, vocab_size=500, hidden_size=64)
    model = Gdn2ForCausalLM(config)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert abs(model.lm_head.weight.std() / 0.02 - 1) < 0.05
    with torch.device("meta"):
        model = Gdn2ForCausalLM(config)
    model.to_empty(device="cpu")
    model.tie_weights()
    model.init_weights()
    assert abs(model.lm_head.weight.std() / 0.02 - 1) < 0.05


# Padding and packing


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(model, tokens, side):
    lengths = [21, 4, 0]
    mask = torch.zeros_like(tokens)
    for row, length in zip(mask, lengths, strict=True):
        row[21 - length :] = 1 if side == "left" else 0
        row[:length] |= int(side == "right")
    out = model(tokens, attention_mask=mask)
    for i in range(3):
        real = mask[i].bool()
        alone = model(tokens[i][real][None]).logits[0]
        torch.testing.assert_close(out.logits[i][real], alone, **EXACT)
    assert (out.logits[~mask.bool()] == 0).all()
    for i, length in enumerate(lengths):  # no padding in any state
        expected = model(tokens[i][mask[i].bool()][None]).past_key_values
        for state, truth in zip(out.past_key_values.states, expected.states, strict=True):
            if hasattr(state, "length"):
                assert state.length[i] == length
            else:
                for x, y in zip(state, truth, strict=True):
                    torch.testing.assert_close(x[i : i + 1], y, **EXACT)


def test_packing_changes_nothing(model, tokens):
    cu_seqlens = torch.tensor([0, 7, 7, 8, 21])
    packed = model(tokens[:1], cu_seqlens=cu_seqlens).logits[0]
    for start, end in pairwise(cu_seqlens):
        if start < end:
            alone = model(tokens[:1, start:end]).logits[0]
            torch.testing.assert_close(packed[start:end], alone, **EXACT)


def test_float32_models_agree_to_float32_rounding(hybrid, tokens):
    model = hybrid.float()
    mask = torch.ones_like(tokens)
    mask[1, :9] = 0
    padded = model(tokens, attention_mask=mask).logits[1, 9:]
    alone = model(tokens[1:2, 9:]).logits[0]
    assert (padded - alone).abs().max() < 1e-5 * alone.abs().max()


def test_masks_with_holes_and_foreign_shapes_are_refused(hybrid, tokens):
    mask = torch.ones_like(tokens)
    mask[0, 3] = 0
    with pytest.raises(ValueError, match="must be contiguous in each row"):
        hybrid(tokens, attention_mask=mask)
    with pytest.raises(ValueError, match=r"must be \[B, >= T\] = \[3, >= 21\], got \[3, 20\]"):
        hybrid(tokens, attention_mask=mask[:, :20])
    with pytest.raises(ValueError, match="exclude each other"):
        hybrid(
            tokens[:1],
            attention_mask=torch.tensor([[0] + [1] * 20]),
            cu_seqlens=torch.tensor([0, 21]),
        )
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        hybrid()


def test_future_tokens_cannot_change_past_logits(model, tokens):
    model, changed = model.float(), tokens.clone()
    changed[:, 13:] = 5
    assert torch.equal(model(tokens).logits[:, :13], model(changed).logits[:, :13])


# Loss and gradients


def test_loss_is_the_cross_entropy_in_value_and_gradient(model, tokens, monkeypatch):
    monkeypatch.setattr(loss_module, "CHUNK", 16)
    labels = tokens.roll(-1, 1)
    labels[0, :5] = labels[2, -1] = -100
    total, count = model.loss(tokens, labels)
    expected = F.cross_entropy(
        model(tokens).logits.flatten(0, 1), labels.flatten(), reduction="sum"
    )
    assert count == 57
    torch.testing.assert_close(total, expected, **EXACT)
    parameters = list(model.parameters())
    for got, truth in zip(
        torch.autograd.grad(total, parameters),
        torch.autograd.grad(expected, parameters),
        strict=True,
    ):
        torch.testing.assert_close(got, truth, rtol=1e-7, atol=1e-9)


def test_a_label_outside_the_vocabulary_is_an_error(hybrid, tokens):
    labels = tokens.clone()
    labels[0, 3] = -1
    with pytest.raises(RuntimeError, match="out of bounds"):
        hybrid.loss(tokens, labels)


def test_loss_of_a_narrow_model_is_float32(hybrid, tokens):
    total, count = hybrid.bfloat16().loss(tokens, tokens)
    assert total.dtype == torch.float32
    assert count == tokens.numel()


def test_token_losses_are_the_terms_of_the_loss(hybrid, tokens):
    labels = tokens.roll(-1, 1)
    labels[1, 3:7] = -100
    losses = hybrid.token_losses(tokens, labels)
    assert losses.shape == tokens.shape
    assert (losses[1, 3:7] == 0).all()
    torch.testing.assert_close(losses.sum(), hybrid.loss(tokens, labels)[0])
    with pytest.raises(ValueError, match=r"one shape \[B, T\], got \[3, 21\] and \[3, 20\]"):
        hybrid.loss(tokens, labels[:, 1:])


def test_loss_of_packed_documents_is_the_sum_of_their_losses(model, tokens):
    row, labels, cu_seqlens = tokens[:1], tokens[1:2], torch.tensor([0, 4, 21])
    total, count = model.loss(row, labels, cu_seqlens)
    a, b = model.loss(row[:, :4], labels[:, :4]), model.loss(row[:, 4:], labels[:, 4:])
    torch.testing.assert_close(total, a[0] + b[0], **EXACT)
    assert count == a[1] + b[1]


def test_huggingface_labels_are_shifted_inside(hybrid, tokens):
    out = hybrid(tokens, labels=tokens)
    expected = F.cross_entropy(out.logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    torch.testing.assert_close(out.loss, expected, **EXACT)


class NoTensorOver(torch.utils._python_dispatch.TorchDispatchMode):
    def __init__(self, numel):
        super().__init__()
        self.numel = numel

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, tuple | list) else [out]:
            assert not isinstance(t, torch.Tensor) or t.numel() <= self.numel, func
        return out


def test_loss_never_holds_all_logits(make_model, monkeypatch):
    monkeypatch.setattr(loss_module, "CHUNK", 32)
    T, V = 256, 16000
    model, tokens = make_model(["gdn2"], vocab_size=V), torch.randint(0, V, (1, T))
    saved = []

    def pack(x):
        saved.append(x.numel())
        return x

    with NoTensorOver(T * V // 4), torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        loss, _ = model.loss(tokens, tokens)
        assert sum(saved) < T * V // 4
        loss.backward()


def test_gradients_flow_to_every_parameter(model, tokens):
    model.loss(tokens, tokens.roll(-1, 1))[0].backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


def test_gradient_checkpointing_changes_nothing(model, tokens):
    model.train()
    parameters = list(model.parameters())
    plain = torch.autograd.grad(model.loss(tokens, tokens)[0], parameters)
    model.gradient_checkpointing_enable()
    calls = []
    for block in model.model.layers:
        block.register_forward_pre_hook(lambda *_: calls.append(1))
    again = torch.autograd.grad(model.loss(tokens, tokens)[0], parameters)
    assert len(calls) == 4  # both blocks, both times
    for x, y in zip(plain, again, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0)
    with pytest.raises(ValueError, match="can not keep a cache"):
        model(tokens, use_cache=True)


def test_under_autocast_recurrent_states_stay_float32(make_model, tokens):
    model = make_model(["gdn2", "gated_deltanet", "kda", "sliding_attention"], num_hidden_layers=4)
    with torch.autocast("cpu", torch.bfloat16):
        out = model.float()(tokens)
    states = out.past_key_values.states
    assert {state.state.dtype for state in states[:3]} == {torch.float32}
    assert states[3].keys.dtype == torch.bfloat16


@pytest.mark.parametrize("padded", [False, True])
@torch.no_grad()
def test_hidden_states_are_the_embeddings_and_the_output_of_every_block(hybrid, tokens, padded):
    mask = torch.ones_like(tokens)
    mask[0, :3] = 1 - padded
    out = hybrid(tokens, mask, output_hidden_states=True)
    model, real = hybrid.model, mask.bool()
    assert len(out.hidden_states) == len(model.layers) + 1
    assert torch.equal(out.hidden_states[0][real], model.embed_tokens(tokens)[real])
    between, _ = model.layers[0](model.embed_tokens(tokens[1:]))
    torch.testing.assert_close(out.hidden_states[1][1:], between)
    last = model(tokens, mask).last_hidden_state
    assert torch.equal(out.hidden_states[-1], last)
    assert all(not x[~real].any() for x in out.hidden_states)
    assert hybrid(tokens).hidden_states is None


def test_positions_of_others_are_refused(hybrid, tokens):
    with pytest.raises(ValueError, match="counted from attention_mask or cu_seqlens"):
        hybrid(tokens, position_ids=torch.arange(tokens.shape[1])[None])


def test_statistics_are_the_mean_gates_of_the_last_forward_in_training(make_model, tokens):
    model = make_model(["gdn2", "sliding_attention"])
    model(tokens)
    assert model.statistics() == {}
    model.train()(tokens)
    statistics = model.statistics()
    assert set(statistics) == {"decay", "erase", "write"}
    assert all(0 < value < 1 for value in statistics.values())
    model.eval()(tokens)
    assert model.statistics() == statistics
    transformer = make_model(["full_attention"]).train()
    transformer(tokens)
    assert transformer.statistics() == {}
