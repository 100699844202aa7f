"""Weights of other projects, in both directions, and other members of the family as GDN-2.

A form is a table of what things are called there; what a layer has beside has our name. A tensor of
theirs may hold several of ours, side by side or head by head.

Axes: D model width, H heads, K key channels, V value channels, R rank of the decay's map (V).
"""

import re
from collections.abc import Mapping
from copy import deepcopy
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gdn2.layers import (
    Attention,
    DeltaMixer,
    DeltaNet,
    GatedDeltaNet,
    GatedDeltaNet2,
    KimiDeltaAttention,
    Mamba2,
    Mamba3,
)
from gdn2.models.configuration import NAMES, Gdn2Config
from gdn2.models.modeling import Gdn2ForCausalLM
from gdn2.modules.linear import XavierLinear

BLOCK = re.compile(r"model\.layers\.(\d+)\.")
MIXER = "model.layers.{}.mixer"
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


class Rule(NamedTuple):
    """A tensor, or a module with all in it, of another name.

    theirs: "" if they have none, which is as if it were zero.
    ours: of several, their rows lie side by side.
    by_head: the rows of each head side by side, head after head.
    shape: theirs, if it is not that of our rows.
    """

    theirs: str
    ours: str | tuple[str, ...]
    by_head: bool = False
    shape: tuple[int, ...] | None = None

    @property
    def parts(self) -> tuple[str, ...]:
        return (self.ours,) if isinstance(self.ours, str) else self.ours


class Layer(NamedTuple):
    """rules: what is called differently in it. only: what its attributes must be, as theirs are."""

    rules: tuple[Rule, ...] = ()
    only: dict[str, Any] = {}  # noqa: RUF012


class Form(NamedTuple):
    """layers: those it has. model: all that is outside of them, "{}" for the number of a block.

    model is None where only the layers are like ours.
    """

    layers: dict[type[nn.Module], Layer]
    model: tuple[Rule, ...] | None = None


QKV = ("q_proj", "k_proj", "v_proj")
CONVOLUTIONS = ("q_conv1d", "k_conv1d", "v_conv1d")
SILU, SIGMOID = ({"o_norm.activation": gate} for gate in ("silu", "sigmoid"))
UNBOUNDED = {"decay_lower_bound": None}
BY_CHANNEL = {"erase_gate": "channel", "write_gate": "channel"}
LM_HEAD = Rule("lm_head", "lm_head")
MAMBA_BLOCKS = (
    LM_HEAD,
    Rule("backbone.norm_f", "model.norm"),
    Rule("backbone.layers.{}.norm", "model.layers.{}.mixer_norm"),
    Rule("backbone.layers.{}.mixer", MIXER),
)
FORMS = {
    "official": Form(
        layers={
            GatedDeltaNet2: Layer(only=SILU | UNBOUNDED | BY_CHANNEL),
            Attention: Layer((Rule("attn", QKV, by_head=True), Rule("proj", "o_proj"))),
        },
        model=(
            LM_HEAD,
            Rule("transformer.wte", "model.embed_tokens"),
            Rule("transformer.ln_f", "model.norm"),
            Rule("transformer.h.{}.norm_1", "model.layers.{}.mixer_norm"),
            Rule("transformer.h.{}.attn", MIXER),
            Rule("transformer.h.{}.norm_2", "model.layers.{}.mlp_norm"),
            Rule("transformer.h.{}.mlp.swiglu.w1", "model.layers.{}.mlp.gate_proj"),
            Rule("transformer.h.{}.mlp.swiglu.w2", "model.layers.{}.mlp.up_proj"),
            Rule("transformer.h.{}.mlp.swiglu.w3", "model.layers.{}.mlp.down_proj"),
        ),
    ),
    "fla": Form(
        layers={
            GatedDeltaNet2: Layer(only=SIGMOID | UNBOUNDED | BY_CHANNEL),
            KimiDeltaAttention: Layer(only=SIGMOID),
            GatedDeltaNet: Layer(only=UNBOUNDED),
            DeltaNet: Layer(only=SILU),
            Attention: Layer(),
        },
        model=(
            LM_HEAD,
            Rule("model.embeddings", "model.embed_tokens"),
            Rule("model.norm", "model.norm"),
            Rule("model.layers.{}.attn_norm", "model.layers.{}.mixer_norm"),
            Rule("model.layers.{}.attn", MIXER),
            Rule("model.layers.{}.mlp_norm", "model.layers.{}.mlp_norm"),
            Rule("model.layers.{}.mlp", "model.layers.{}.mlp"),
        ),
    ),
    "mamba_ssm": Form(
        layers={Mamba2: Layer(), Mamba3: Layer()},
        model=(
            Rule("backbone.embedding", "model.embed_tokens"),
            *MAMBA_BLOCKS,
            Rule("backbone.layers.{}.norm2", "model.layers.{}.mlp_norm"),
            Rule(
                "backbone.layers.{}.mlp.fc1",
                ("model.layers.{}.mlp.up_proj", "model.layers.{}.mlp.gate_proj"),
            ),
            Rule("backbone.layers.{}.mlp.fc2", "model.layers.{}.mlp.down_proj"),
        ),
    ),
    "transformers_mamba2": Form(
        layers={Mamba2: Layer()},
        model=(Rule("backbone.embeddings", "model.embed_tokens"), *MAMBA_BLOCKS),
    ),
    "qwen3_next": Form(
        layers={
            GatedDeltaNet: Layer(
                (
                    Rule("in_proj_qkvz", (*QKV, "g_proj"), by_head=True),
                    Rule("in_proj_ba", ("b_proj", "a_proj"), by_head=True),
                    Rule("conv1d", CONVOLUTIONS),
                    Rule("norm", "o_norm"),
                    Rule("out_proj", "o_proj"),
                ),
                only=SILU | UNBOUNDED | {"erase_range": 1.0},
            )
        }
    ),
    "kimi_linear": Form(
        layers={
            KimiDeltaAttention: Layer(
                (
                    Rule("conv1d", CONVOLUTIONS),
                    Rule("forget_gate.f_a_proj", "f_proj.0"),
                    Rule("forget_gate.f_b_proj", "f_proj.1"),
                    Rule("forget_gate.dt_bias", "dt_bias"),
                    Rule("forget_gate.A_log", "A_log", shape=(1, 1, -1, 1)),
                    Rule("g_a_proj", "g_proj.0"),
                    Rule("", "g_proj.1.bias"),
                    Rule("g_b_proj", "g_proj.1"),
                ),
                only=SIGMOID | UNBOUNDED | {"erase_range": 1.0},
            )
        }
    ),
}


@torch.no_grad()
def import_weights(module: nn.Module, weights: Mapping[str, Tensor], form: str) -> None:
    """Copy weights of another project into a model or a layer of ours.

    Args:
        module: a `Gdn2ForCausalLM` or a layer of `gdn2.layers`, whose dtype and device stay.
        weights: their tensors by their names; of a layer, by the names within it.
        form: a key of `FORMS`. "official": the models of arXiv 2605.22791. "fla": those of
            flash-linear-attention. "mamba_ssm" and "transformers_mamba2": of these packages.
            "qwen3_next" and "kimi_linear": the layers of transformers.

    Raises:
        ValueError: the form does not have such a module, a tensor is missing, left over or of
            another shape, or a tied output map differs from the embedding.
    """
    own, rest, new = module.state_dict(), dict(weights), dict[str, Tensor]()
    tied = isinstance(module, Gdn2ForCausalLM) and module.config.tie_word_embeddings
    for theirs, part in _plan(module, form).items():
        tensors = [own[name] for name in part.names]
        if not theirs:
            new |= {name: torch.zeros_like(own[name]) for name in part.names}
        elif theirs in rest:
            given, expected = rest.pop(theirs), part.join([t.to("meta") for t in tensors]).shape
            numbers = isinstance(given, Tensor) and given.is_floating_point() and not given.is_meta
            if not numbers or given.shape != expected:
                what = f"{list(given.shape)} {given.dtype}" if isinstance(given, Tensor) else given
                raise ValueError(f"{theirs} must be floating numbers {list(expected)}, got {what}")
            rows = part.split(given, [len(tensor) for tensor in tensors])
            new |= {n: x.view_as(own[n]) for n, x in zip(part.names, rows, strict=True)}
        elif not (part.names == [HEAD] and tied):
            raise ValueError(f"the weights lack {theirs}, our {' and '.join(part.names)}")
    if rest:
        others = ", ".join(sorted(map(str, rest)))
        raise ValueError(f"the weights also hold {others}, of which we have none")
    if tied and not torch.equal(new.setdefault(HEAD, new[EMBEDDING]), new[EMBEDDING]):
        raise ValueError("the output map must be the embedding, as tie_word_embeddings has it")
    module.load_state_dict(new)


@torch.no_grad()
def export_weights(module: nn.Module, form: str) -> dict[str, Tensor]:
    """The weights of a model or a layer as another project names and shapes them.

    Args: as in `import_weights`, which this is the inverse of.

    Returns:
        their tensors by their names, copied where they hold several of ours.

    Raises:
        ValueError: the form does not have such a module, or lacks a tensor that is not zero.
    """
    own, plan = module.state_dict(), _plan(module, form)
    for name in plan.pop("", Part([])).names:
        if own[name].any():
            raise ValueError(f"{form} has no {name}, which must be zero, and it is not")
    return {theirs: part.join([own[n] for n in part.names]) for theirs, part in plan.items()}


class Part(NamedTuple):
    """What one tensor of theirs is made of: rows of our `names` in turn, `groups` times."""

    names: list[str]
    groups: int = 1
    shape: tuple[int, ...] | None = None

    def join(self, tensors: list[Tensor]) -> Tensor:
        rows = tensors[0]
        if len(tensors) > 1:
            rows = torch.cat([t.unflatten(0, (self.groups, -1)) for t in tensors], 1).flatten(0, 1)
        return rows if self.shape is None else rows.reshape(self.shape)

    def split(self, rows: Tensor, sizes: list[int]) -> list[Tensor]:
        if len(sizes) == 1:
            return [rows]
        by_group = rows.unflatten(0, (self.groups, -1))
        parts = by_group.split([size // self.groups for size in sizes], 1)
        return [part.flatten(0, 1) for part in parts]


def _plan(module: nn.Module, form: str) -> dict[str, Part]:
    """What each tensor of theirs is made of; the key "" has what they lack."""
    if form not in FORMS:
        raise ValueError(f"form must be one of {list(FORMS)}, got {form!r}")
    outside = FORMS[form].model
    if outside is None and isinstance(module, Gdn2ForCausalLM):
        raise ValueError(f"{form} has layers like ours, and no model: give the layers one by one")
    plan: dict[str, Part] = {}
    for name in module.state_dict():
        layer, path, local = _locate(module, name)
        rules = outside or () if layer is None else _check_layer(layer, form).rules
        theirs, rule, place = _translate(local, rules)
        if layer is None and rule is None:
            raise ValueError(f"{form} has no {name}")
        if rule is not None and not theirs:
            plan.setdefault("", Part([])).names.append(name)
            continue
        if path:
            theirs = f"{_translate(path, outside or ())[0]}.{theirs}"
        number = BLOCK.match(name)
        theirs = theirs.replace("{}", number[1] if number else "")
        rule = rule or Rule(theirs, name)
        groups = int(getattr(layer, "num_heads", 1)) if rule.by_head else 1
        part = plan.setdefault(theirs, Part([""] * len(rule.parts), groups, rule.shape))
        part.names[place] = name
    for theirs, part in plan.items():
        if "" in part.names:
            others = " and ".join(filter(None, part.names))
            raise ValueError(f"{form} has no {theirs}, which {others} would be a part of")
    return plan


def _locate(module: nn.Module, name: str) -> tuple[nn.Module | None, str, str]:
    """The layer that owns a tensor, the path to it, and the name of the tensor within it."""
    if not isinstance(module, Gdn2ForCausalLM):
        return module, "", name
    path, _, local = BLOCK.sub("model.layers.{}.", name).partition(".mixer.")
    if not local:
        return None, "", path
    return module.get_submodule(name.partition(".mixer.")[0] + ".mixer"), MIXER, local


def _check_layer(layer: nn.Module, form: str) -> Layer:
    """What the form says of a layer; ValueError unless it has one that computes the same."""
    layers, kind = FORMS[form].layers, type(layer)
    if kind not in layers:
        known = " and ".join(other.__name__ for other in layers)
        raise ValueError(f"{form} has {known}, and no {kind.__name__}")
    for name, value in layers[kind].only.items():
        if attrgetter(name)(layer) != value:
            raise ValueError(
                f"{name} of {form}'s {kind.__name__} is {value!r}, got {attrgetter(name)(layer)!r}"
            )
    return layers[kind]


def _translate(name: str, rules: tuple[Rule, ...]) -> tuple[str, Rule | None, int]:
    """Their name, the rule that says so, and the place among those of ours that it holds."""
    for rule in rules:
        for place, ours in enumerate(rule.parts):
            if name == ours or name.startswith(ours + "."):
                return rule.theirs and rule.theirs + name[len(ours) :], rule, place
    return name, None, 0


TIED = ("kda", "gated_deltanet")
STAY = ("gdn2", "sliding_attention", "full_attention")


@torch.no_grad()
def to_gdn2(model: Gdn2ForCausalLM) -> Gdn2ForCausalLM:
    """The same function of the tokens, by GDN-2 layers: to be trained on from there.

    KDA and Gated DeltaNet are GDN-2 with tied gates (Eqs. 6, 7 and 10), and training unties them:

        erase, write    a row of b_proj, in all channels of its head
        decay of KDA    as it is
        decay of Gated DeltaNet    a_proj in the first H rows of f_proj.0; f_proj.1 gives each to
                        all channels of its head, and nothing yet to the other R - H, which are new

    Args:
        model: its recurrent layers are KDA, Gated DeltaNet or GDN-2, and attention layers stay. It
            is left as it is.

    Returns:
        a new model, of the same dtype and device.

    Raises:
        ValueError: there is nothing to convert, or a layer that is no special case of GDN-2.
    """
    config: Any = model.config
    _check_tied(config)
    mixers: list[Any] = [block.mixer for block in model.model.layers]
    gates = {_output_gate(layer) for layer in mixers if isinstance(layer, DeltaMixer)}
    if len(gates) > 1:
        raise ValueError(
            f"all layers must have one output gate, got activations and ranks {gates}: one "
            "configuration can not say them"
        )
    ((output_gate, rank),) = gates
    settings = {name: getattr(config, name) for name in NAMES} | {
        "mixers": ["gdn2" if name in TIED else name for name in config.mixers],
        "output_gate": output_gate,
        "output_gate_rank": rank,
    }
    with torch.device("meta"):
        new = Gdn2ForCausalLM(Gdn2Config(**settings))
    weights = model.state_dict()
    for i, layer in enumerate(mixers):
        if isinstance(layer, KimiDeltaAttention | GatedDeltaNet):
            path = f"model.layers.{i}.mixer."
            weights.pop(f"{path}a_proj.weight", None)
            weights |= {f"{path}{name}": x for name, x in _untied(layer).items()}
    new.load_state_dict({name: x.clone() for name, x in weights.items()}, assign=True)
    new.tie_weights()
    new.generation_config = deepcopy(model.generation_config)
    return new.train(model.training)


def _check_tied(config: Gdn2Config) -> None:
    """ValueError unless gates that are tied make GDN-2 the same as every recurrent layer."""
    H, R = config.num_heads, config.head_v_dim or config.head_k_dim
    for name in config.mixers:
        if name not in TIED + STAY:
            raise ValueError(
                f"{name} is no special case of gdn2, which always decays and erases, by normed keys"
            )
    if not set(TIED) & set(config.mixers):
        raise ValueError(f"mixers must have one of {TIED} to convert, got {config.mixers}")
    if config.num_v_heads not in (None, H):
        raise ValueError(
            f"num_v_heads must be num_heads = {H}, got {config.num_v_heads}: gdn2 decays and "
            "erases by key head, what is converted by value head"
        )
    if config.erase_range != 1.0:
        raise ValueError(
            f"erase_range must be 1.0, got {config.erase_range}: gdn2 has it of the erase gate "
            "alone, what is converted of both"
        )
    if "gated_deltanet" in config.mixers and H > R:
        raise ValueError(
            f"num_heads must be at most head_v_dim = {R}, the rank of gdn2's decay, got {H}"
        )


def _output_gate(layer: DeltaMixer) -> tuple[str, int | None]:
    """Its activation and rank, None for full."""
    low_rank = isinstance(layer.g_proj, nn.Sequential)
    rank = len(layer.get_parameter("g_proj.0.weight")) if low_rank else None
    return layer.o_norm.activation, rank


def _untied(layer: KimiDeltaAttention | GatedDeltaNet) -> dict[str, Tensor]:
    """The gates' weights of a GDN-2 layer that does the same."""
    H, K, R = layer.num_heads, layer.head_k_dim, layer.head_v_dim
    b = layer.b_proj.weight
    new = {"b_proj.weight": b.repeat_interleave(K, 0), "w_proj.weight": b.repeat_interleave(R, 0)}
    if isinstance(layer, GatedDeltaNet):
        a, spare = layer.a_proj.weight, XavierLinear(layer.hidden_size, R, bias=False).weight[H:]
        new["f_proj.0.weight"] = torch.cat([a, spare.to(a)])
        new["f_proj.1.weight"] = torch.eye(H, R).to(a).repeat_interleave(K, 0)
        new["dt_bias"] = layer.get_parameter("dt_bias").repeat_interleave(K, 0)
    return new
