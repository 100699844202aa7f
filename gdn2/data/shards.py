"""The files of a prepared folder: token shards in datatrove's layout, and the manifest.

    NNNNN.ds        tokens, little-endian uint16 (uint32 from a vocabulary of 65,537 on)
    NNNNN.ds.index  little-endian uint64: after which token of the shard each document ends
    manifest.json   what the folder holds, with a checksum of every shard

A file has its final name only when it is complete. The manifest comes last.
"""

import hashlib
import json
import os
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from gdn2.data.durable import (
    commit,
    naming_full_disk,
    open_for_writing,
    write_file,
    write_json,
)

VERSION = 1
MANIFEST = "manifest.json"
SPLITS = ("train", "validation")
INDEX_DTYPE = np.dtype("<u8")


def token_dtype(vocab_size: int) -> np.dtype:
    return np.dtype("<u2" if vocab_size <= 2**16 else "<u4")


@dataclass(frozen=True)
class Shard:
    """One pair of files; `file` is relative to the prepared folder, `bytes` counts UTF-8 text."""

    file: str
    sha256: str
    index_sha256: str
    tokens: int
    documents: int
    bytes: int

    @property
    def index(self) -> str:
        return self.file + ".index"

    def check(self, folder: Path, dtype: np.dtype) -> None:
        """Raise ValueError naming a file that is missing, truncated or of other documents."""
        sizes = {
            self.file: self.tokens * dtype.itemsize,
            self.index: self.documents * INDEX_DTYPE.itemsize,
        }
        for path, expected in ((folder / file, size) for file, size in sizes.items()):
            if not path.is_file():
                raise ValueError(f"{path} is missing")
            if path.stat().st_size != expected:
                raise ValueError(f"{path} has {path.stat().st_size} bytes, expected {expected}")
        end = int(np.memmap(folder / self.index, INDEX_DTYPE, "r")[-1])
        if end != self.tokens:
            raise ValueError(f"{folder / self.index} ends at token {end}, expected {self.tokens}")

    def verify(self, folder: Path) -> None:
        """Read both files; raise ValueError naming one that is not what was written."""
        for file, expected in ((self.file, self.sha256), (self.index, self.index_sha256)):
            if sha256_of(folder / file) != expected:
                raise ValueError(f"{folder / file} is not the shard of the manifest: other sha256")


@dataclass(frozen=True)
class Split:
    documents: int
    tokens: int
    bytes: int
    shards: tuple[Shard, ...]

    @classmethod
    def of(cls, shards: tuple[Shard, ...]) -> "Split":
        return cls(
            documents=sum(shard.documents for shard in shards),
            tokens=sum(shard.tokens for shard in shards),
            bytes=sum(shard.bytes for shard in shards),
            shards=shards,
        )


@dataclass(frozen=True)
class Manifest:
    """Everything known about a prepared folder.

    `separator` is the token before every document, `options` what decides the folder's bytes
    beside the sources, `skipped` counts records without usable text by reason.
    """

    version: int
    vocab_size: int
    dtype: str
    separator: int
    separator_token: str
    tokenizer_sha256: str
    sources: tuple[dict, ...]
    options: dict
    skipped: dict[str, int]
    splits: dict[str, Split]

    def save(self, folder: Path) -> None:
        write_json(folder / MANIFEST, asdict(self))


def load_manifest(folder: str | os.PathLike) -> Manifest:
    """Read DIR/manifest.json. FileNotFoundError if nothing was prepared there (to the end)."""
    path = Path(folder) / MANIFEST
    if not path.is_file():
        raise FileNotFoundError(f"{folder} has no {MANIFEST}: not a folder that prepare finished")
    try:
        data = json.loads(path.read_bytes())
        if data["version"] != VERSION:
            raise ValueError(f"version {data['version']}, this gdn2 reads version {VERSION}")
        splits = {
            name: Split(**split | {"shards": tuple(Shard(**s) for s in split["shards"])})
            for name, split in data.pop("splits").items()
        }
        return Manifest(**data | {"sources": tuple(data["sources"]), "splits": splits})
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not a manifest of prepared data: {error}") from error


class ShardWriter:
    """Writes one shard: documents go in, `close` gives both files their names."""

    def __init__(self, folder: Path, file: str, dtype: np.dtype):
        self._path = folder / file
        self._file = file
        self._dtype = dtype
        self._stream = open_for_writing(self._path)
        self._digest = hashlib.sha256()
        self._lengths: list[np.ndarray] = []
        self._bytes = 0
        self.tokens = 0

    def write(self, tokens: np.ndarray, lengths: np.ndarray, num_bytes: int) -> None:
        """Add documents: tokens one after the other, the length of each, bytes of text."""
        data = tokens.astype(self._dtype, copy=False).tobytes()
        with naming_full_disk(self._path):
            self._stream.write(data)
        self._digest.update(data)
        self._lengths.append(lengths)
        self._bytes += num_bytes
        self.tokens += len(tokens)

    def close(self) -> Shard:
        index = self._path.with_name(self._path.name + ".index")
        ends = np.cumsum(np.concatenate(self._lengths), dtype=INDEX_DTYPE).tobytes()
        write_file(index, ends)
        commit(self._stream, self._path)
        return Shard(
            file=self._file,
            sha256=self._digest.hexdigest(),
            index_sha256=hashlib.sha256(ends).hexdigest(),
            tokens=self.tokens,
            documents=len(ends) // INDEX_DTYPE.itemsize,
            bytes=self._bytes,
        )

    def abandon(self) -> None:
        """Leave the unfinished file under its .tmp name."""
        with suppress(OSError):  # a full disk fails the last flush once more
            self._stream.close()


def sha256_of(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
