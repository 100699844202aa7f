"""The files of a prepared folder: token shards in datatrove's layout, and the manifest.

    NNNNN.ds        tokens, little-endian uint16 (uint32 from a vocabulary of 65,537 on)
    NNNNN.ds.index  little-endian uint64: after which token of the shard each document ends
    manifest.json   what the folder holds, with a checksum of every shard

A file has its final name only when it is complete. The manifest comes last.
"""

import hashlib
import os
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from gdn2.data.durable import (
    commit,
    naming_full_disk,
    open_for_writing,
    read_json,
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

    def is_plausible(self) -> bool:
        """Whether the types are right, no count is negative, and the file lies in the folder."""
        texts = (self.file, self.sha256, self.index_sha256)
        counts = (self.tokens, self.documents, self.bytes)
        return (
            all(isinstance(text, str) for text in texts)
            and all(type(count) is int and count >= 0 for count in counts)
            and self.documents > 0
            and not Path(self.file).is_absolute()
            and ".." not in Path(self.file).parts
        )

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

    def implausible(self) -> str | None:
        """What can not be, in words; checksums of the files are another matter."""
        if not (type(self.vocab_size) is int and 0 < self.vocab_size <= 2**32):
            return f"vocab_size is {self.vocab_size!r}"
        if self.dtype != token_dtype(self.vocab_size).name:
            return f"dtype is {self.dtype!r}, for a vocab_size of {self.vocab_size}"
        if not (type(self.separator) is int and 0 <= self.separator < self.vocab_size):
            return f"separator is {self.separator!r}, of {self.vocab_size} tokens"
        if not isinstance(self.tokenizer_sha256, str):
            return f"tokenizer_sha256 is {self.tokenizer_sha256!r}"
        if not (isinstance(self.options, dict) and isinstance(self.skipped, dict)):
            return "options and skipped are not both objects"
        if any(not isinstance(source, dict) or "name" not in source for source in self.sources):
            return "sources are not all named"
        if set(self.splits) != set(SPLITS):
            return f"splits are {', '.join(self.splits) or 'none'}, not {', '.join(SPLITS)}"
        for name, split in self.splits.items():
            if not all(shard.is_plausible() for shard in split.shards):
                return f"shards of {name} are not all files with a size"
            if split != Split.of(split.shards):
                return f"totals of {name} are not the sums of its shards"
        return None

    def save(self, folder: Path) -> None:
        write_json(folder / MANIFEST, asdict(self))


def load_manifest(folder: str | os.PathLike) -> Manifest:
    """Read DIR/manifest.json. FileNotFoundError if nothing was prepared there (to the end)."""
    path = Path(folder) / MANIFEST
    if not path.is_file():
        raise FileNotFoundError(f"{folder} has no {MANIFEST}: not a folder that prepare finished")
    data = read_json(path)
    if data.get("version") != VERSION:
        raise ValueError(
            f"{path} is not a manifest of prepared data: version must be {VERSION}, "
            f"got {data.get('version')}"
        )
    try:
        splits = {
            name: Split(**split | {"shards": tuple(Shard(**s) for s in split["shards"])})
            for name, split in data["splits"].items()
        }
        manifest = Manifest(**data | {"sources": tuple(data["sources"]), "splits": splits})
    except (AttributeError, LookupError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error}). Prepare the folder again") from error
    wrong = manifest.implausible()
    if wrong:
        raise ValueError(f"{path} is damaged: its {wrong}. Prepare the folder again")
    return manifest


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
