import pytest
import torch

from gdn2.models import Gdn2Config, Gdn2ForCausalLM

MODELS = {
    "gdn2": ["gdn2"],
    "gated_deltanet": ["gated_deltanet"],
    "kda": ["kda"],
    "deltanet": ["deltanet"],
    "mamba2": ["mamba2"],
    "mamba3": ["mamba3"],
    "hybrid": ["gdn2", "sliding_attention"],
    "transformer": ["full_attention"],
}


def tiny_config(mixers, **options):
    options = {
        "vocab_size": 60,
        "hidden_size": 24,
        "num_hidden_layers": 2,
        "num_heads": 2,
        "num_v_heads": 4,
        "head_k_dim": 8,
        "head_v_dim": 4,
        "mamba_inner_size": 32,
        "mamba_head_dim": 8,
        "state_size": 8,
        "intermediate_size": 32,
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "sliding_window": 5,
    } | options
    if "mamba3" in mixers:
        options = {"mimo_rank": 2} | options
    return Gdn2Config(mixers=mixers, **options)


def tiny_model(mixers, **options):
    """Float64, in evaluation mode, with weights large enough that every layer matters."""
    torch.manual_seed(0)
    model = Gdn2ForCausalLM(tiny_config(mixers, **options)).double()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.4)
    return model.eval()


@pytest.fixture(params=MODELS)
def model(request):
    return tiny_model(MODELS[request.param])


@pytest.fixture
def hybrid():
    return tiny_model(MODELS["hybrid"])


@pytest.fixture
def make_config():
    return tiny_config


@pytest.fixture
def make_model():
    return tiny_model


@pytest.fixture
def tokens():
    torch.manual_seed(1)
    return torch.randint(1, 60, (3, 21))
