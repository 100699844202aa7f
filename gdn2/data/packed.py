"""Compressed text, .gz and .zst, read as if it were not."""

import gzip
import io
import sys
import zlib
from pathlib import Path

try:
    if sys.version_info >= (3, 14):
        from compression import zstd
    else:
        from backports import zstd
except ImportError:  # missed only where there is a .zst to read
    zstd = None  # type: ignore[assignment]

SUFFIXES = (".gz", ".zst")
# How the readers fail on what is truncated or not theirs, beside an OSError without a number.
DAMAGE: tuple[type[Exception], ...] = (EOFError, zlib.error)
if zstd is not None:
    DAMAGE += (zstd.ZstdError,)


def unpacked_name(file: str) -> str:
    """The name without the suffix of its compression."""
    suffix = _packing(file)
    return file[: -len(suffix)] if suffix else file


def unpack(raw: io.BufferedReader) -> io.BufferedIOBase:
    """The contents of a file; ImportError where the package that reads it is missing."""
    packing = _packing(raw.name)
    if packing == ".gz":
        return gzip.GzipFile(fileobj=raw)
    if packing == ".zst":
        if zstd is None:
            raise ImportError(f"{raw.name} needs backports.zstd: pip install 'gdn2[data]'")
        return zstd.ZstdFile(raw)
    return raw


def check_packed(path: Path) -> None:
    """Read the beginning of a compressed file, so that a wrong one is known before the others."""
    if _packing(path.name):
        with path.open("rb") as raw, unpack(raw) as stream:
            stream.read(1)


def _packing(file: str) -> str:
    return next((suffix for suffix in SUFFIXES if file.lower().endswith(suffix)), "")
