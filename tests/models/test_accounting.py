import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from gdn2.models import Gdn2Config, Gdn2ForCausalLM
from gdn2.models.accounting import account
from gdn2.models.mixers import MIXERS
from gdn2.presets import load_preset

LENGTH = 48


def small(mixers: list[str], **settings: object) -> Gdn2Config:
    sizes = {
        "vocab_size": 160,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_heads": 2,
        "num_v_heads": 4,
        "head_k_dim": 8,
        "head_v_dim": 16,
        "intermediate_size": 40,
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "sliding_window": 12,
    }
    return Gdn2Config(mixers=mixers, **{**sizes, **settings})


CONFIGS = [
    *(small([name]) for name in MIXERS),
    small(["gdn2", "sliding_attention"]),
    small(["kda", "full_attention"], tie_word_embeddings=True),
]


def names(config: Gdn2Config) -> str:
    return "+".join(config.mixers)


@pytest.mark.parametrize(
    ("preset", "blocks"),
    [("gdn2_1p3b", 1_302_638_112), ("gdn2_1p3b_hybrid", 1_300_314_384)],
)
def test_published_models_have_their_size(preset: str, blocks: int) -> None:
    config = load_preset(preset).model
    assert account(config, length=4096)["parameters"]["blocks"] == blocks


@pytest.mark.parametrize("config", CONFIGS, ids=names)
def test_the_parts_are_the_model(config: Gdn2Config) -> None:
    parameters = account(config, length=LENGTH)["parameters"]
    with torch.device("meta"):
        model = Gdn2ForCausalLM(config)
    model.tie_weights()
    embeddings = (model.get_input_embeddings(), model.get_output_embeddings())
    outside = {id(weight) for module in embeddings for weight in module.parameters()}
    inside = sum(weight.numel() for weight in model.parameters() if id(weight) not in outside)
    assert parameters["total"] == sum(weight.numel() for weight in model.parameters())
    assert parameters["blocks"] + parameters["final_norm"] == inside
    assert list(parameters["mixers"]) == config.mixers


@pytest.mark.parametrize("config", CONFIGS, ids=names)
def test_products_with_weights_cost_what_torch_counts(config: Gdn2Config) -> None:
    flops = account(config, length=LENGTH)["flops_per_token"]
    model = Gdn2ForCausalLM(config)
    linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
    counted = 0

    def count(module: nn.Linear, inputs: tuple[Tensor], output: Tensor) -> None:
        nonlocal counted
        with FlopCounterMode(display=False) as counter:
            nn.functional.linear(inputs[0], module.weight)
        counted += counter.get_total_flops()

    for module in linear:
        module.register_forward_hook(count)
    model(torch.zeros(1, LENGTH, dtype=torch.long))
    assert LENGTH * (flops["projections"] + flops["head"]) == counted


@pytest.mark.parametrize(
    ("mixer", "settings", "flops"),
    [
        # 2 layers of 4 heads of 8 x 16 entries: decay 1, read to erase 2, write 2, read 2
        *((name, {}, 2 * 4 * 8 * 16 * 7) for name in ("gdn2", "kda", "gated_deltanet")),
        ("deltanet", {}, 2 * 4 * 8 * 16 * 6),
        ("mamba2", {}, 2 * 4 * 16 * 8 * 5),
        # beside the state, its own pair: 2 (16 + 8) for scores and values
        ("mamba3", {}, 2 * 4 * (16 * 8 * 5 + 1 * 2 * 24)),
        # 3 writes, 3 reads and one decay; 9 pairs of the token itself, 3 that the operator lacks
        ("mamba3", {"mimo_rank": 3}, 2 * 4 * (16 * 8 * 13 + 12 * 2 * 24)),
    ],
)
def test_the_operator_costs_what_its_recurrence_does(mixer, settings, flops):
    sizes = {"mamba_inner_size": 32, "mamba_head_dim": 8, "state_size": 16}
    costs = account(small([mixer], **sizes, **settings), length=LENGTH)
    assert costs["flops_per_token"]["operator"] == flops


@pytest.mark.parametrize("window", [1, 5, 12, 48, 100])
def test_attention_costs_the_tokens_it_sees(window: int) -> None:
    config = small(["sliding_attention"], sliding_window=window)
    seen = sum(min(t + 1, window) for t in range(LENGTH)) / LENGTH
    expected = round(2 * 4 * 32 * seen)  # layers x (scores and values) x channels x tokens
    assert account(config, length=LENGTH)["flops_per_token"]["attention"] == expected


def test_full_attention_costs_a_window_as_long_as_the_sequence() -> None:
    full = account(small(["full_attention"]), length=LENGTH)
    window = account(small(["sliding_attention"], sliding_window=LENGTH), length=LENGTH)
    assert full["flops_per_token"] == window["flops_per_token"]
    assert full["state_bytes"] == window["state_bytes"]


def test_totals_are_sums() -> None:
    costs = account(small(["gdn2", "sliding_attention"]), length=LENGTH)
    *parts, forward, training = costs["flops_per_token"].values()
    assert sum(parts) == forward
    assert training == 3 * forward
    *parts, total = costs["state_bytes"].values()
    assert sum(parts) == total
    assert all(parts)


@pytest.mark.parametrize("config", CONFIGS, ids=names)
def test_state_bytes_are_those_of_the_layers(config: Gdn2Config) -> None:
    measured = 0
    for name in config.layer_mixers:
        layer = MIXERS[name].build(config)
        _, state = layer(torch.randn(1, LENGTH, config.hidden_size))
        tensors = state[:2] if "attention" in name else state
        measured += sum(tensor.nbytes for tensor in tensors)
    costs = account(config, length=LENGTH, dtype=torch.float32)
    assert costs["state_bytes"]["total"] == measured
