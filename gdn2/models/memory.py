"""What a model remembers of the tokens it has read: to go on from, to branch, to keep as a file.

A memory is the cache behind all tokens but the last, and that token, which the next forward reads:
``model.generate(memory.last, past_key_values=memory.cache)``. Its size does not depend on how many
tokens there were, full attention apart. Axes: N sequences, T time.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from gdn2.models.cache import Gdn2Cache
from gdn2.models.configuration import DEFAULTS
from gdn2.models.modeling import Gdn2ForCausalLM

PIECE = 1024  # tokens that are read at once
KIND = "memory of a gdn2 model, 1"
# What may differ between a model and the one that made a memory.
FREE = {"initializer_range", "max_position_embeddings", "use_cache"} | {
    f"{name}_token_id" for name in ("bos", "eos", "pad")
}


@dataclass
class Memory:
    """Of N sequences of one length.

    cache: what is left of all tokens but the last. Its columns count from here, so that `generate`
        takes `last` and what may follow it for the whole input.
    last: ``[N, 1]``, the last token. length: tokens in all.
    """

    cache: Gdn2Cache
    last: Tensor
    length: int

    def copy(self) -> "Memory":
        """Another memory of the same; going on from one of them leaves the other as it is."""
        everyone = torch.arange(len(self.last), device=self.last.device)
        return Memory(self.cache.select(everyone), self.last, self.length)

    def to_bytes(self, model: Gdn2ForCausalLM) -> bytes:
        """A safetensors file that `load_memory` reads; `model` is the one that made the memory."""
        tensors = {"last": self.last, "length": torch.tensor(self.length)}
        for i, state in enumerate(self.copy().cache.states):
            tensors |= {f"layers.{i}.{name}": x for name, x in _tensors(state).items()}
        metadata = {**_traits(model), "weights": _fingerprint(model)}
        return save({name: x.cpu().contiguous() for name, x in tensors.items()}, metadata)


@torch.no_grad()
def read_tokens(model: Gdn2ForCausalLM, tokens: Tensor, memory: Memory | None = None) -> Memory:
    """Read ``tokens [N, T]`` in pieces, after those of `memory`, which is used up.

    Whatever T is, no more than a piece is worked on at once. Without a memory, T must be positive.
    """
    rows = tokens.shape[0] if memory is None else memory.last.shape[0]
    if tokens.ndim != 2 or tokens.shape[0] != rows or (memory is None and not tokens.shape[1]):
        wanted = "[N, >= 1]" if memory is None else f"[{rows}, T], as the memory has {rows} rows"
        raise ValueError(f"tokens must be {wanted}, got {list(tokens.shape)}")
    length = tokens.shape[1]
    if memory is None:
        cache = Gdn2Cache(model.config.num_hidden_layers)
    else:
        cache, length = memory.cache, memory.length + length
        tokens = torch.cat([memory.last, tokens], 1)
    for piece in tokens[:, :-1].split(PIECE, dim=1):  # an empty one makes empty states
        model.model(piece, past_key_values=cache)
    cache.num_columns = 0
    return Memory(cache, tokens[:, -1:], length)


def load_memory(path: str | Path, model: Gdn2ForCausalLM) -> Memory:
    """Read what `Memory.to_bytes` wrote, on the device of `model`.

    Raises ValueError, saying why, if the file is damaged or no memory, or of another model: of
    another configuration, or of other weights.
    """
    if Path(path).is_dir():
        raise IsADirectoryError(f"{path} is a folder, not the memory of a model")
    try:
        with safe_open(path, framework="pt") as file:
            _refuse_another_model(path, file.metadata() or {}, model)

            def tensor(name: str) -> Tensor:
                return file.get_tensor(name).to(model.device, copy=True)

            last = tensor("last")
            # Its states say what there is to load.
            memory = read_tokens(model, torch.zeros_like(last))
            states = [
                state._replace(**{name: tensor(f"layers.{i}.{name}") for name in _tensors(state)})
                for i, state in enumerate(memory.cache.states)
            ]
            memory.cache.states = states
            return Memory(memory.cache, last, int(file.get_tensor("length")))
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or not the memory of a model: {error}") from error


def _tensors(state: Any) -> dict[str, Tensor]:
    return {name: x for name, x in state._asdict().items() if isinstance(x, Tensor)}


def _traits(model: Gdn2ForCausalLM) -> dict[str, str]:
    config = model.config
    traits = {name: str(value) for name, value in config.traits.items() if name not in FREE}
    return {"kind": KIND, **traits, "mixers": " ".join(config.layer_mixers)}


def _refuse_another_model(path: str | Path, found: dict[str, str], model: Gdn2ForCausalLM) -> None:
    if found.get("kind") != KIND:
        raise ValueError(f"{path} is not the memory of a model, as --save-state writes it")
    found = {name: str(value) for name, value in DEFAULTS.items()} | found  # older files lack some
    differences = [
        f"{name} is {found[name]} there and {value} here"
        for name, value in _traits(model).items()
        if found[name] != value
    ]
    if differences:
        raise ValueError(f"{path} is the memory of another model: {', '.join(differences)}")
    if found.get("weights") != _fingerprint(model):
        raise ValueError(
            f"{path} is the memory of a model of the same configuration with other weights: of "
            "another run, another step or another dtype"
        )


def _fingerprint(model: Gdn2ForCausalLM) -> str:
    """A hash of every parameter's name, dtype, shape and the sum of its bits as integers.

    Such a sum is exact in any order and on any device, and changes with training.
    """
    digest = hashlib.sha256()
    for name, x in model.named_parameters():
        bits = x.detach().flatten().view(torch.uint8)
        whole = bits.numel() // 8 * 8  # in 64-bit words: they need no copy to be added up
        total = int(bits[:whole].view(torch.int64).sum() + bits[whole:].sum())
        digest.update(f"{name} {x.dtype} {list(x.shape)} {total}\n".encode())
    return digest.hexdigest()
