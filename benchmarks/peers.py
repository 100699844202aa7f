"""Other projects' forms of the operator, in plain PyTorch and for a GPU, under one signature.

Each takes q, k, v, log_decay, erase, write of a member of the family and returns the outputs, with
the read scaled by ``K^-0.5``. `make peers` installs flash-linear-attention; its plain files are
loaded by location, because the package's own imports may want a GPU.
"""

import importlib.metadata
import importlib.util
import inspect
from collections.abc import Callable
from functools import partial
from types import ModuleType

from torch import Tensor, nn

from gdn2.models import Gdn2Config

Rule = Callable[..., Tensor]
FLA_LAYERS = {
    "gdn2": "GatedDeltaNet2",
    "kda": "KimiDeltaAttention",
    "gated_deltanet": "GatedDeltaNet",
}


def load_peers(member: str) -> dict[str, Rule]:
    """By project and function, those of `member` ("gdn2", "kda", "gated_deltanet") found here."""
    rules: dict[str, Rule] = {}
    for load in (_load_fla, _load_transformers):
        try:
            rules |= load(member)
        except ImportError:
            continue
    return rules


def load_kernels(member: str) -> dict[str, Rule]:
    """flash-linear-attention's kernels for a GPU; empty if it is not installed."""
    operator, gates = FLA_FORMS[member]
    try:
        version = importlib.metadata.version("fla-core")
        module = importlib.import_module(f"fla.ops.{operator}")
    except ImportError:
        return {}
    name = f"chunk_{operator}"
    return {f"fla {version} {name}": gates(getattr(module, name))}


def load_step_kernel() -> dict[str, Callable]:
    """flash-linear-attention's decoding kernel of GDN-2, in place; empty if not installed."""
    try:
        version = importlib.metadata.version("fla-core")
        from fla.ops.gdn2.fused_recurrent import fused_recurrent_gdn2_fwd
    except ImportError:
        return {}
    step = partial(fused_recurrent_gdn2_fwd, inplace_final_state=True)
    return {f"fla {version} fused_recurrent_gdn2": step}


def load_layer(member: str, config: Gdn2Config) -> dict[str, nn.Module]:
    """flash-linear-attention's layer with the sizes of `config`; empty if it is not installed."""
    try:
        version = importlib.metadata.version("flash-linear-attention")
        layers = importlib.import_module("fla.layers")
    except ImportError:
        return {}
    V = config.head_v_dim or config.head_k_dim
    layer = getattr(layers, FLA_LAYERS[member])(
        hidden_size=config.hidden_size,
        num_heads=config.num_heads,
        head_dim=config.head_k_dim,
        expand_v=V / config.head_k_dim,
        conv_size=config.conv_size,
        layer_idx=0,
    )
    return {f"fla {version} {FLA_LAYERS[member]}": layer}


def _load_fla(member: str) -> dict[str, Rule]:
    operator, gates = FLA_FORMS[member]
    naive = _load_file("fla-core", f"fla/ops/{operator}/naive.py")
    names = (f"naive_recurrent_{operator}", f"naive_chunk_{operator}")
    return {f"fla {name}": gates(getattr(naive, name)) for name in names}


def _load_transformers(member: str) -> dict[str, Rule]:
    if member == "gated_deltanet":
        from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule

        return {"transformers torch_chunk_gated_delta_rule": _tied(torch_chunk_gated_delta_rule)}
    if member == "kda":
        from transformers.models.kimi_linear.modeling_kimi_linear import chunk_kimi_delta_attention

        return {"transformers chunk_kimi_delta_attention": _tied(chunk_kimi_delta_attention)}
    return {}


def _untied(function: Callable) -> Rule:
    def rule(q, k, v, log_decay, erase, write):
        return function(q, k, v, g=log_decay, b=erase, w=write)[0]

    return rule


def _tied(function: Callable) -> Rule:
    function = inspect.unwrap(function)  # transformers puts fla's kernels around its own, if found

    def rule(q, k, v, log_decay, erase, write):  # noqa: ARG001
        # Erase and write are one gate.
        return function(q, k, v, g=log_decay, beta=erase)[0]

    return rule


def _without_decay(function: Callable) -> Rule:
    def rule(q, k, v, log_decay, erase, write):  # noqa: ARG001
        return function(q, k, v, beta=erase)[0]

    return rule


def _without_erase(function: Callable) -> Rule:
    def rule(q, k, v, log_decay, erase, write):  # noqa: ARG001
        return function(q, k, v * write.unsqueeze(-1), g=log_decay)[0]

    return rule


# What flash-linear-attention calls the operator of a member, and how its gates are passed.
FLA_FORMS: dict[str, tuple[str, Callable[[Callable], Rule]]] = {
    "gdn2": ("gdn2", _untied),
    "kda": ("kda", _tied),
    "gated_deltanet": ("gated_delta_rule", _tied),
    "deltanet": ("delta_rule", _without_decay),
    "mamba2": ("simple_gla", _without_erase),
}


def _load_file(distribution: str, file: str) -> ModuleType:
    try:
        path = importlib.metadata.distribution(distribution).locate_file(file)
    except importlib.metadata.PackageNotFoundError as error:
        raise ImportError(f"{distribution} is not installed") from error
    spec = importlib.util.spec_from_file_location(f"peer_{distribution}", str(path))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
