"""The states of all layers between two calls of a model, in the form that `generate` wants."""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache


class Gdn2Cache(Cache):
    """One state per layer, whatever its kind; of constant size, full attention apart.

    A delta state or a ring of the last keys can not forget its last tokens, so there is no `crop`,
    and `generate` refuses what needs one (assisted decoding).
    """

    is_compileable = False
    is_croppable = False

    def __init__(self, num_layers: int):
        super().__init__(layers=[])
        self.states: list[Any] = [None] * num_layers
        self.num_columns = 0

    def __len__(self) -> int:
        return len(self.states)

    def __repr__(self) -> str:
        return f"Gdn2Cache(num_layers={len(self)}, num_columns={self.num_columns})"

    @property
    def is_initialized(self) -> bool:
        return self.num_columns > 0

    @property
    def batch_size(self) -> int:
        return next((s.num_sequences for s in self.states if s is not None), -1)

    def get_seq_length(self, layer_idx: int = 0) -> int:  # noqa: ARG002
        """Columns of `input_ids` seen so far, padding included."""
        return self.num_columns

    def get_max_length(self, layer_idx: int | None = None) -> int:  # noqa: ARG002
        return -1  # no limit

    def reset(self) -> None:
        self.states, self.num_columns = [None] * len(self), 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def select(self, indices: Tensor) -> "Gdn2Cache":
        """The states of the rows `indices`, copied; attention's as rings."""
        cache = Gdn2Cache(len(self))
        cache.states = [state and state.select(indices) for state in self.states]
        cache.num_columns = self.num_columns
        return cache

    def batch_select_indices(self, indices: Tensor) -> None:
        self.states = self.select(indices).states

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.batch_select_indices(torch.arange(self.batch_size).repeat_interleave(repeats))

    def crop(self, tokens_to_remove: int) -> None:
        raise NotImplementedError("a recurrent state can not forget its last tokens")
