"""What a model costs: parameters by part, FLOPs per token, bytes of state per sequence.

Everything is counted from the layers themselves, built without memory on the meta device.
"""

from typing import Any

import torch
from torch import nn

from gdn2.layers import Attention
from gdn2.models.configuration import Gdn2Config
from gdn2.models.mixers import MIXERS, Recurrent
from gdn2.modules.mlp import SwiGLU


def account(
    config: Gdn2Config, *, length: int, dtype: torch.dtype = torch.bfloat16
) -> dict[str, dict[str, Any]]:
    """Parameters, FLOPs per token and state bytes of a model, as nested dicts of integers.

    parameters: embedding, mixers (by name), mlps, norms (of the blocks), final_norm, head (0 if
        tied to the embedding); blocks = mixers + mlps + norms; total.

    flops_per_token: of the forward pass, averaged over a sequence of `length`, a multiply-add as
        two. projections: 2 per weight of a linear map. convolutions: 2 per tap. operator: the token
        recurrence (`operator_flops` of a layer), which is not what a chunked algorithm spends.
        attention: 4 per channel and visible token (scores 2, values 2). head: 2 per weight. Norms,
        gates and activations count nothing. training = 3 x forward: the backward pass does every
        product twice.

    state_bytes: what generation carries from token to token for one sequence. recurrent: the
        operator's state, fp32. last_tokens: inputs of the short convolutions in `dtype`, and
        Mamba-3's last key, value and angle. attention: keys and values, in `dtype`, of the window,
        or of `length` tokens with full attention.
    """
    with torch.device("meta"):
        built = {name: MIXERS[name].build(config) for name in dict.fromkeys(config.layer_mixers)}
        mlp: nn.Module = nn.Identity()
        if config.intermediate_size:
            mlp = SwiGLU(config.hidden_size, config.intermediate_size)
    depth = config.num_hidden_layers
    mixers = [built[name] for name in config.layer_mixers]
    recurrent = [layer for layer in mixers if not isinstance(layer, Attention)]
    attention = [layer for layer in mixers if isinstance(layer, Attention)]

    by_name = {
        name: config.layer_mixers.count(name) * _weights(layer) for name, layer in built.items()
    }
    embedding = config.vocab_size * config.hidden_size
    parameters: dict[str, Any] = {
        "embedding": embedding,
        "mixers": by_name,
        "mlps": depth * _weights(mlp),
        "norms": (2 if config.intermediate_size else 1) * depth * config.hidden_size,
        "final_norm": config.hidden_size,
        "head": 0 if config.tie_word_embeddings else embedding,
    }
    parameters["blocks"] = sum(by_name.values()) + parameters["mlps"] + parameters["norms"]
    outside = ("embedding", "final_norm", "head")
    parameters["total"] = parameters["blocks"] + sum(parameters[part] for part in outside)

    linear = sum(_weights(layer, nn.Linear) for layer in mixers) + depth * _weights(mlp, nn.Linear)
    flops = {
        "projections": 2 * linear,
        "convolutions": 2 * sum(_weights(layer, nn.Conv1d) for layer in recurrent),
        "operator": sum(layer.operator_flops for layer in recurrent),
        "attention": round(sum(4 * _channels(x) * _visible(x, length) for x in attention)),
        "head": 2 * embedding,
    }
    flops["forward"] = sum(flops.values())
    flops["training"] = 3 * flops["forward"]

    carried = {layer: _state_bytes(layer, config.hidden_size, dtype) for layer in set(recurrent)}
    state = {
        "recurrent": sum(carried[layer][0] for layer in recurrent),
        "last_tokens": sum(carried[layer][1] for layer in recurrent),
        "attention": dtype.itemsize
        * sum(2 * _channels(x) * (x.window or length) for x in attention),
    }
    state["total"] = sum(state.values())
    return {"parameters": parameters, "flops_per_token": flops, "state_bytes": state}


def _weights(module: nn.Module, kind: type[nn.Module] | None = None) -> int:
    """Parameters of a module, or only the weight matrices of its parts of one kind."""
    if kind is None:
        return sum(parameter.numel() for parameter in module.parameters())
    return sum(
        part.get_parameter("weight").numel() for part in module.modules() if isinstance(part, kind)
    )


def _state_bytes(layer: Recurrent, hidden_size: int, dtype: torch.dtype) -> tuple[int, int]:
    """Of the operator's state, and of all else that the layer, in `dtype`, returns."""
    _, state = layer.to(dtype)(torch.empty(1, 0, hidden_size, dtype=dtype, device="meta"))
    return state.state.nbytes, sum(tensor.nbytes for tensor in state) - state.state.nbytes


def _channels(layer: Attention) -> int:
    return layer.num_heads * layer.head_dim


def _visible(layer: Attention, length: int) -> float:
    """Mean number of tokens that a token of a sequence sees, itself included."""
    window = min(layer.window or length, length)
    return (window * (window + 1) / 2 + (length - window) * window) / length
