"""Documents to batches to tokens, in worker processes, in an order that no worker can change."""

import hashlib
import multiprocessing
import os
import signal
import threading
from collections import Counter, deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from .shards import SPLITS, token_dtype
from .sources import START, Document, Position
from .tokenize import Encoder, load_encoder


@dataclass
class TextBatch:
    """Texts to encode; `next` and `offset` are those of the last document, skipped or not."""

    texts: list[str] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)
    next: Position = START
    offset: int = 0


class Encoded(NamedTuple):
    """A split's documents: their tokens in one array, the length of each, bytes of text."""

    tokens: np.ndarray
    lengths: np.ndarray
    num_bytes: int


def text_hash(text: str) -> int:
    """The first 8 bytes of the text's sha256: they decide on the split."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def batch_documents(documents: Iterable[Document], characters: int) -> Iterator[TextBatch]:
    """Cut where `characters` are reached: a batch depends on its own documents alone."""
    batch, size = TextBatch(), 0
    for document in documents:
        batch.next, batch.offset = document.next, document.offset
        if document.text is None:
            batch.skipped[document.skipped or "null"] += 1
        else:
            batch.texts.append(document.text)
            size += len(document.text)
        if size >= characters:
            yield batch
            batch, size = TextBatch(), 0
    if batch.texts or batch.skipped:
        yield batch


def encode_batches(
    batches: Iterable[TextBatch], tokenizer: Path, limit: int, workers: int
) -> Generator[tuple[TextBatch, dict[str, Encoded]], None, None]:
    """Every batch with its documents by split, in order; two batches per worker are in memory."""
    if workers == 1:
        encoder = load_encoder(tokenizer)
        yield from ((batch, _encode(encoder, batch.texts, limit)) for batch in batches)
        return
    spawn = multiprocessing.get_context("spawn")  # the parent has threads: forking is not safe
    pool = ProcessPoolExecutor(workers, spawn, _start_worker)
    waiting: deque[tuple[TextBatch, Future]] = deque()
    try:
        for batch in batches:
            waiting.append((batch, pool.submit(_encode_in_worker, tokenizer, batch.texts, limit)))
            if len(waiting) == 2 * workers:
                done, future = waiting.popleft()
                yield done, future.result()
        for done, future in waiting:
            yield done, future.result()
    except BrokenProcessPool as error:
        raise RuntimeError(
            "a worker process died, perhaps for want of memory: run again with fewer workers"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _encode(encoder: Encoder, texts: list[str], limit: int) -> dict[str, Encoded]:
    members: dict[str, list[str]] = {split: [] for split in SPLITS}
    for text in texts:
        members["validation" if text_hash(text) < limit else "train"].append(text)
    dtype = token_dtype(encoder.vocab_size)
    result = {}
    for split, chosen in members.items():
        if chosen:
            ids = [np.array(row, dtype) for row in encoder.encode_batch(chosen)]
            lengths = np.array([len(row) for row in ids], np.int64)
            num_bytes = sum(len(text.encode()) for text in chosen)
            result[split] = Encoded(np.concatenate(ids), lengths, num_bytes)
    return result


def _start_worker() -> None:
    """One thread, Ctrl-C left to the parent, gone when the parent is."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


_load_once = lru_cache(maxsize=1)(load_encoder)  # a worker lives for one tokenizer


def _encode_in_worker(tokenizer: Path, texts: list[str], limit: int) -> dict[str, Encoded]:
    return _encode(_load_once(tokenizer), texts, limit)
