"""Where documents come from: text files, JSONL, Parquet, folders of them, the standard library.

A corpus is an ordered list of files; a document is (file, item) of it, and reading can start at
any such position. Order depends on names alone, so the same input gives the same documents.
"""

import codecs
import hashlib
import json
import os
import platform
import sysconfig
from collections import Counter
from collections.abc import Iterable, Iterator, Set
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from gdn2.data.packed import DAMAGE, check_packed, unpack, unpacked_name

STDLIB = "stdlib"
STDLIB_FOLDERS_LEFT_OUT = {"test", "tests", "idlelib", "site-packages"}
TEXT_SUFFIXES = {".txt", ".md", ".rst", ".py"}
JSONL_SUFFIXES = {".jsonl", ".ndjson"}
PARQUET_SUFFIXES = {".parquet"}
FOLDER_SUFFIXES = TEXT_SUFFIXES | JSONL_SUFFIXES | PARQUET_SUFFIXES
HASHED_BYTES = 2**30  # contents of larger sources are not hashed, only their names and sizes
PARQUET_ROWS = 512


class Position(NamedTuple):
    """The item-th record of the file-th file of a corpus."""

    file: int
    item: int


START = Position(0, 0)


class Document(NamedTuple):
    """One record. `text` is None where `skipped` says why ("null", "empty", "not_utf8").

    `next` is the position after it, `offset` how many bytes of the corpus' files lie before that.
    """

    text: str | None
    skipped: str | None
    next: Position
    offset: int


@dataclass(frozen=True)
class Source:
    """One argument of `prepare`, resolved to files (relative to `root`) and their sizes."""

    name: str
    root: Path
    files: tuple[str, ...]
    sizes: tuple[int, ...]

    @property
    def paths(self) -> list[Path]:
        return [self.root / file for file in self.files]

    def fingerprint(self) -> dict:
        """What the manifest keeps: enough to see that a source is no longer the same."""
        listing = "".join(f"{f}\0{s}\n" for f, s in zip(self.files, self.sizes, strict=True))
        result: dict = {
            "name": self.name,
            "files": len(self.files),
            "bytes": sum(self.sizes),
            "listing_sha256": hashlib.sha256(os.fsencode(listing)).hexdigest(),
        }
        if result["bytes"] <= HASHED_BYTES:
            digest = hashlib.sha256()
            for path in self.paths:
                with path.open("rb") as stream:
                    while block := stream.read(2**20):
                        digest.update(block)
            result["sha256"] = digest.hexdigest()  # of the files' bytes, one after the other
        if self.name == STDLIB:
            result["python"] = platform.python_version()
        return result


def find_source(name: str | os.PathLike, out: Path) -> Source:
    """Resolve `stdlib`, a file or a folder. `out` must not lie inside the folder."""
    name = os.fspath(name)
    if not name:
        raise ValueError("a source must be a file, a folder or stdlib, got an empty name")
    if name == STDLIB:
        root = Path(sysconfig.get_paths()["stdlib"])
        files = [f for f in _walk(root, without=STDLIB_FOLDERS_LEFT_OUT) if f.endswith(".py")]
    elif Path(name).is_file():
        root, files = Path(name).parent, [Path(name).name]
    elif Path(name).is_dir():
        root = Path(name)
        if out.resolve().is_relative_to(root.resolve()):
            raise ValueError(f"the output folder {out} lies inside the source folder {name}")
        found = _walk(root)
        files = [f for f in found if _suffix(f) in FOLDER_SUFFIXES]
        if not files:
            kinds = Counter(_suffix(f) or "no suffix" for f in found).most_common(5)
            ignored = ", ".join(f"{count} x {suffix}" for suffix, count in kinds) or "nothing"
            raise ValueError(
                f"{name} has no file that ends in {', '.join(sorted(FOLDER_SUFFIXES))} (or those "
                f"with .gz or .zst); found: {ignored}"
            )
    elif os.path.lexists(name):
        raise ValueError(
            f"source {name} must be a file or a folder: a pipe or a device can not be read twice"
        )
    else:
        raise FileNotFoundError(f"source {name} does not exist")
    for file in files:
        if not os.access(root / file, os.R_OK):
            raise ValueError(f"{root / file} is not readable: permission denied")
    return Source(name, root, tuple(files), tuple((root / f).stat().st_size for f in files))


def _walk(root: Path, without: Set[str] = frozenset()) -> list[str]:
    """Files below root that are not hidden, as sorted POSIX paths."""
    found = []
    left_out = {"__pycache__", *without}
    for folder, folders, files in os.walk(root):
        folders[:] = [d for d in folders if not d.startswith(".") and d not in left_out]
        relative = Path(folder).relative_to(root)
        found += [(relative / f).as_posix() for f in files if not f.startswith(".")]
    return sorted(f for f in found if (root / f).is_file())


def _suffix(file: str) -> str:
    return Path(unpacked_name(file)).suffix.lower()


class Corpus:
    """All documents of several sources, in order."""

    def __init__(self, sources: Iterable[Source], text_column: str):
        self.sources = tuple(sources)
        self.text_column = text_column
        self.paths = [path for source in self.sources for path in source.paths]
        self.sizes = [size for source in self.sources for size in source.sizes]
        resolved = Counter(path.resolve() for path in self.paths)
        twice = [path for path in self.paths if resolved[path.resolve()] > 1]
        if twice:
            raise ValueError(f"{twice[0]} is given twice")
        for path in self.paths:
            if _suffix(path.name) in PARQUET_SUFFIXES:
                _check_parquet(path, text_column)
            else:
                with _naming(path):
                    check_packed(path)

    @cached_property
    def num_bytes(self) -> int:
        return sum(self.sizes)

    def documents(self, start: Position = START) -> Iterator[Document]:
        before = sum(self.sizes[: start.file])
        for file in range(start.file, len(self.paths)):
            first = start.item if file == start.file else 0
            for item, value, offset in _records(self.paths[file], self.text_column, first):
                text, skipped = _as_text(value)
                yield Document(text, skipped, Position(file, item + 1), before + offset)
            before += self.sizes[file]

    def sample(self, limit: int) -> Iterator[str]:
        """About `limit` bytes of text, from the beginnings of files all over the corpus.

        After each file no more has been taken than its share by size, so a corpus of few large
        files gives the beginning of each and one of many small files gives some of them whole.
        """
        taken, before = 0, 0
        for path, size in zip(self.paths, self.sizes, strict=True):
            before += size
            share = limit * before / self.num_bytes
            if taken >= share:
                continue
            for _, value, _ in _records(path, self.text_column, 0):
                text, _ = _as_text(value)
                if text is not None:
                    yield text
                    taken += len(text.encode())
                if taken >= share:
                    break


def _as_text(value: bytes | str | None) -> tuple[str | None, str | None]:
    """Text, or the reason for skipping. JSON can hold lone surrogates, which UTF-8 cannot."""
    if value is None:
        return None, "null"
    try:
        text = value.decode() if isinstance(value, bytes) else value
        if isinstance(value, str):
            value.encode()
    except UnicodeError:
        return None, "not_utf8"
    return (None, "empty") if not text or text.isspace() else (text, None)


Record = tuple[int, bytes | str | None, int]  # item, value, bytes of the file read so far


def _records(path: Path, column: str, start: int) -> Iterator[Record]:
    suffix = _suffix(path.name)
    if suffix in PARQUET_SUFFIXES:
        return _read_parquet(path, column, start)
    if suffix in JSONL_SUFFIXES | {".json"}:
        return _read_jsonl(path, column, start)
    return _read_text(path, start)


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Errors about a file's contents, as ValueErrors that name the file."""
    try:
        yield
    except (OSError, *DAMAGE, pa.ArrowException) as error:
        if isinstance(error, OSError) and error.errno is not None:  # the system's, not a format's
            raise
        raise ValueError(f"{path} is broken: {str(error).splitlines()[0]}") from error


def _read_text(path: Path, start: int) -> Iterator[Record]:
    if start == 0:
        with _naming(path), path.open("rb") as raw, unpack(raw) as stream:
            yield 0, stream.read().removeprefix(codecs.BOM_UTF8), path.stat().st_size


def _read_jsonl(path: Path, column: str, start: int) -> Iterator[Record]:
    with _naming(path), path.open("rb") as raw, unpack(raw) as stream:
        for item, line in enumerate(stream):
            if item < start or not line.strip():
                continue
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{path}:{item + 1} is not JSON: {error}") from error
            if not isinstance(record, dict) or column not in record:
                has = ", ".join(record) if isinstance(record, dict) else type(record).__name__
                raise ValueError(f"{path}:{item + 1} has no column {column!r}; it has: {has}")
            value = record[column]
            if not isinstance(value, str | None):
                kind = type(value).__name__
                raise ValueError(f"{path}:{item + 1}: column {column!r} is {kind}, expected text")
            yield item, value, raw.tell()


def _read_parquet(path: Path, column: str, start: int) -> Iterator[Record]:
    with _naming(path), pq.ParquetFile(path) as file:
        rows, size, item = file.metadata.num_rows, path.stat().st_size, 0
        for group in range(file.num_row_groups):
            group_rows = file.metadata.row_group(group).num_rows
            if item + group_rows <= start:
                item += group_rows
                continue
            for batch in file.iter_batches(PARQUET_ROWS, row_groups=[group], columns=[column]):
                values = batch.column(0)
                if pa.types.is_dictionary(values.type):
                    values = values.dictionary_decode()
                for value in values.cast(pa.large_binary()).to_pylist():  # UTF-8 is checked later
                    if item >= start:
                        yield item, value, size * (item + 1) // rows
                    item += 1


def _check_parquet(path: Path, column: str) -> None:
    try:
        schema = pq.read_schema(path)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path} is not Parquet: {str(error).splitlines()[0]}") from error
    if column not in schema.names:
        raise ValueError(f"{path} has no column {column!r}; it has: {', '.join(schema.names)}")
    kind = schema.field(column).type
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        raise ValueError(f"{path}: column {column!r} is {kind}, expected string")
