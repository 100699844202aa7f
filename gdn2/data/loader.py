"""Training samples as a pure function of (seed, index): resuming needs a count and nothing else."""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from gdn2.data.dataset import TokenDataset

PACKINGS = ("packed", "concat")


@dataclass(frozen=True)
class Batch:
    """`tokens` and `labels` are int64, [count, seq_len], or [1, count * seq_len] when packed.

    Packed rows have `cu_seqlens` (int32): every row and every document in it begins a sequence.
    """

    tokens: Tensor
    labels: Tensor
    cu_seqlens: Tensor | None


class Samples:
    """An endless stream of samples: block after block of the split, shuffled anew every epoch.

    Block b is tokens [b * seq_len, (b + 1) * seq_len) of the split; labels are the tokens that
    follow. Documents begin with the separator, so a document's last token has the label
    separator, and so has the last token of the split. An epoch shows every block once; the
    fewer than seq_len tokens after the last whole block are not seen.
    """

    def __init__(
        self, dataset: TokenDataset, *, seq_len: int, packing: str = "packed", seed: int = 0
    ):
        if packing not in PACKINGS:
            raise ValueError(f"packing must be one of {', '.join(PACKINGS)}, got {packing!r}")
        if not 1 <= seq_len <= dataset.num_tokens:
            raise ValueError(
                f"seq_len must be in 1..{dataset.num_tokens}, the tokens of "
                f"{dataset.folder / dataset.split}, got {seq_len}: take shorter sequences or "
                "prepare more text"
            )
        self.dataset = dataset
        self.seq_len = seq_len
        self.packing = packing
        self.seed = seed
        self.num_samples = dataset.num_tokens // seq_len

    def batch(self, first: int, count: int) -> Batch:
        """Samples first .. first + count - 1; sample i belongs to epoch i // num_samples."""
        if first < 0 or count < 1:
            raise ValueError(f"batch needs first >= 0 and count >= 1, got {first}, {count}")
        blocks = [self._block(index) for index in range(first, first + count)]
        rows = np.stack([self._row(block) for block in blocks])
        tokens, labels = torch.from_numpy(rows[:, :-1].copy()), torch.from_numpy(rows[:, 1:].copy())
        if self.packing == "concat":
            return Batch(tokens, labels, None)
        return Batch(tokens.view(1, -1), labels.view(1, -1), self._cu_seqlens(blocks))

    def _block(self, index: int) -> int:
        epoch, position = divmod(index, self.num_samples)
        return int(_permutation(self.seed, epoch, self.num_samples)[position])

    def _row(self, block: int) -> np.ndarray:
        """The block's tokens and the one after them."""  # [seq_len + 1]
        start, stop = block * self.seq_len, (block + 1) * self.seq_len
        if stop == self.dataset.num_tokens:
            return np.append(self.dataset.read(start, stop), self.dataset.separator)
        return self.dataset.read(start, stop + 1)

    def _cu_seqlens(self, blocks: list[int]) -> Tensor:
        starts = []
        for row, block in enumerate(blocks):
            start = block * self.seq_len
            inside = self.dataset.ends_within(start, start + self.seq_len)
            starts += [row * self.seq_len, *(inside - start + row * self.seq_len)]
        return torch.tensor([*starts, len(blocks) * self.seq_len], dtype=torch.int32)


@lru_cache(maxsize=4)  # two epochs of the training split and of another one
def _permutation(seed: int, epoch: int, size: int) -> np.ndarray:
    return np.random.Generator(np.random.PCG64([seed, epoch])).permutation(size)
