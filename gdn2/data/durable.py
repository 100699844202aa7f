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
from typing import BinaryIO

UNFINISHED = ".tmp"


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other processes out of `folder`, made if absent; the system unlocks it at any death."""
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise RuntimeError(f"{folder} is in use by another process") from None
    else:
        yield
    finally:
        os.close(descriptor)


def write_json(path: Path, data: object) -> None:
    write_file(path, json.dumps(data, indent=1, ensure_ascii=False).encode() + b"\n")


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
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
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
