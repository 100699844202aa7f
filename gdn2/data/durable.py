"""Files and folders that are whole or absent, whenever a process is killed or the power is cut.

Everything is written beside its final name with the suffix .tmp, flushed to disk and renamed.
"""

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

UNFINISHED = ".tmp"
FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other processes out of `folder`, made if absent; the system unlocks it at any death."""
    make_folder(folder)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise RuntimeError(f"{folder} is in use by another process") from None
    else:
        yield
    finally:
        os.close(descriptor)


def make_folder(folder: Path) -> None:
    """Make it, if absent; ValueError where none can be written, before there is work to lose."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise ValueError(f"{folder} can not be a folder: it is a file; choose another") from error
    except OSError as error:
        if error.errno in FULL_DISK:
            raise
        raise ValueError(f"{folder} can not be made: {error.strerror}; choose another") from error
    if not os.access(folder, os.W_OK):
        raise ValueError(f"{folder} is read-only; choose another")


def write_json(path: Path, data: object) -> None:
    """Bytes of file names that are not UTF-8 are surrogates, which get JSON's own escape."""
    text = json.dumps(data, indent=1, ensure_ascii=False)
    write_file(path, text.encode(errors="backslashreplace") + b"\n")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; ValueError names a file that holds anything else."""
    try:
        data = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(data, dict):
        raise ValueError(f"{path} must be a JSON object, got {type(data).__name__}")
    return data


def write_file(path: Path, data: bytes) -> None:
    """Write and rename: after a crash `path` is the old file or the new one, never a part."""
    stream = open_for_writing(path)
    with naming_full_disk(path):
        stream.write(data)
    commit(stream, path)


def open_for_writing(path: Path) -> BinaryIO:
    path.parent.mkdir(parents=True, exist_ok=True)
    return _temporary(path).open("wb")


def commit(stream: BinaryIO, path: Path) -> None:
    with naming_full_disk(path):
        with stream:
            stream.flush()
            os.fsync(stream.fileno())
        _temporary(path).replace(path)
        _sync(path.parent)


def write_folder(target: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a folder that is called `target` once it is complete."""
    unfinished = _temporary(target)
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        write(unfinished)
        with naming_full_disk(target):
            for path in (*unfinished.rglob("*"), unfinished):
                _sync(path)
            unfinished.rename(target)
            _sync(target.parent)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


@contextmanager
def naming_full_disk(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in FULL_DISK:
            raise
        raise OSError(
            error.errno, f"no room to write {path} ({error.strerror}); make room and run it again"
        ) from error


def _sync(path: Path) -> None:
    """Make a file's content, or the renames in a folder, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _temporary(path: Path) -> Path:
    return path.with_name(path.name + UNFINISHED)
