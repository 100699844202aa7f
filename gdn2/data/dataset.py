"""Read a split of a prepared folder as one stream of tokens, without loading it."""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from gdn2.data.shards import INDEX_DTYPE, SPLITS, load_manifest, sha256_of


class TokenDataset:
    """The tokens of all shards of DIR's split, one after the other.

    Opening checks the tokenizer's checksum and every file's size against the manifest, and with
    `verify` (one read of the whole split) the shards' checksums: a truncated or foreign shard or
    another tokenizer raises ValueError with its name. Shards are memory-mapped.
    """

    def __init__(self, folder: str | os.PathLike, split: str = "train", *, verify: bool = True):
        self.folder = Path(folder)
        self.split = split
        self.manifest = load_manifest(folder)
        if split not in self.manifest.splits:
            raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
        self._shards = self.manifest.splits[split].shards
        self._dtype = np.dtype(self.manifest.dtype).newbyteorder("<")
        self._check(verify)
        self._tokens = [self._map(shard.file, self._dtype) for shard in self._shards]
        # Signed, because searching uint64 for Python integers would convert the whole index.
        self._ends = [self._map(shard.index, INDEX_DTYPE).view("<i8") for shard in self._shards]
        # Where shards begin: in tokens and in documents, and where the last one ends.
        self._first_token = np.cumsum([0] + [shard.tokens for shard in self._shards])
        self._first_document = np.cumsum([0] + [shard.documents for shard in self._shards])

    @property
    def num_tokens(self) -> int:
        return self.manifest.splits[self.split].tokens

    @property
    def num_documents(self) -> int:
        return self.manifest.splits[self.split].documents

    @property
    def num_bytes(self) -> int:
        """UTF-8 bytes of the documents' text; separators count nothing."""
        return self.manifest.splits[self.split].bytes

    @property
    def vocab_size(self) -> int:
        return self.manifest.vocab_size

    @property
    def separator(self) -> int:
        return self.manifest.separator

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens start..stop-1 of the stream, as int64."""
        if not 0 <= start <= stop <= self.num_tokens:
            raise ValueError(
                f"read needs 0 <= start <= stop <= {self.num_tokens} tokens, got {start}, {stop}"
            )
        out = np.empty(stop - start, dtype=np.int64)
        for shard, low, high in self._overlaps(start, stop):
            first = self._first_token[shard]
            out[low - start : high - start] = self._tokens[shard][low - first : high - first]
        return out

    def ends_within(self, start: int, stop: int) -> np.ndarray:
        """Document ends e with start < e < stop, that is, the documents that begin in between."""
        ends = [np.empty(0, dtype=np.int64)]
        for shard, low, high in self._overlaps(start, stop):
            first = int(self._first_token[shard])
            index = self._ends[shard]
            begin, end = np.searchsorted(index, (low - first, high - first), side="right")
            ends.append(index[begin:end] + first)
        found = np.concatenate(ends)
        return found[found < stop]

    def document(self, index: int) -> np.ndarray:
        """Tokens of one document, its separator first."""
        if not 0 <= index < self.num_documents:
            raise ValueError(f"document must be in 0..{self.num_documents - 1}, got {index}")
        shard = int(np.searchsorted(self._first_document, index, side="right")) - 1
        row = index - int(self._first_document[shard])
        start = int(self._ends[shard][row - 1]) if row else 0
        return self._tokens[shard][start : int(self._ends[shard][row])].astype(np.int64)

    def _overlaps(self, start: int, stop: int):
        """(shard, low, high) of every shard that has tokens in start..stop-1."""
        if start == stop:
            return
        shard = int(np.searchsorted(self._first_token, start, side="right")) - 1
        while start < stop:
            high = min(stop, int(self._first_token[shard + 1]))
            yield shard, start, high
            start, shard = high, shard + 1

    def _map(self, file: str, dtype: np.dtype) -> np.ndarray:
        return np.memmap(self.folder / file, dtype=dtype, mode="r")

    def _check(self, verify: bool) -> None:
        tokenizer = self.folder / "tokenizer" / "tokenizer.json"
        if not tokenizer.is_file() or sha256_of(tokenizer) != self.manifest.tokenizer_sha256:
            raise ValueError(
                f"{tokenizer} is missing or not the tokenizer that encoded {self.folder} "
                f"(sha256 {self.manifest.tokenizer_sha256[:16]}...)"
            )
        for shard in self._shards:
            shard.check(self.folder, self._dtype)
        if verify:
            with ThreadPoolExecutor() as pool:  # hashing releases the interpreter lock
                list(pool.map(lambda shard: shard.verify(self.folder), self._shards))
