"""Documents to batches to tokens, in worker processes, in an order that no worker can change."""

import hashlib
import os
import pickle
import subprocess
import sys
from collections import Counter, deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue
from typing import NamedTuple

import numpy as np

from gdn2.data.shards import SPLITS, token_dtype
from gdn2.data.sources import START, Document, Position
from gdn2.data.tokenize import Encoder, load_encoder


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
        yield from ((batch, encode(encoder, batch.texts, limit)) for batch in batches)
        return
    idle: SimpleQueue[_Worker] = SimpleQueue()

    def encode_somewhere(texts: list[str]) -> dict[str, Encoded]:
        worker = idle.get()
        try:
            return worker.encode(texts)
        finally:
            idle.put(worker)

    with ThreadPoolExecutor(workers) as threads, ExitStack() as stack:
        for _ in range(workers):
            idle.put(stack.enter_context(_Worker(tokenizer, limit)))
        waiting: deque[tuple[TextBatch, Future]] = deque()
        for batch in batches:
            waiting.append((batch, threads.submit(encode_somewhere, batch.texts)))
            if len(waiting) == 2 * workers:
                done, future = waiting.popleft()
                yield done, future.result()
        for done, future in waiting:
            yield done, future.result()


def encode(encoder: Encoder, texts: list[str], limit: int) -> dict[str, Encoded]:
    """Texts whose hash is below `limit` are for validation, the others for training."""
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


class _Worker:
    """A process that encodes what it is sent and ends when nobody is there to send more.

    It is a plain interpreter: multiprocessing would import the caller's main module again, and
    its workers outlive a parent that is killed. In its own process group, a Ctrl-C is not for it.
    """

    def __init__(self, tokenizer: Path, limit: int):
        command = "from gdn2.data.encode import serve; serve()"
        self._process = subprocess.Popen(
            [sys.executable, "-c", command, str(tokenizer), str(limit)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ
            | {"TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": os.pathsep.join(sys.path)},
            process_group=0,
        )

    def encode(self, texts: list[str]) -> dict[str, Encoded]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            pickle.dump(texts, self._process.stdin)
            self._process.stdin.flush()
            return pickle.load(self._process.stdout)
        except (BrokenPipeError, EOFError, pickle.UnpicklingError) as error:
            raise RuntimeError(
                f"a worker process ended with status {self._process.wait()}, perhaps for want of "
                "memory: run again with fewer workers"
            ) from error

    def __enter__(self) -> "_Worker":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        with suppress(BrokenPipeError):  # what was sent to a dead worker
            self._process.communicate()


def serve() -> None:
    """The worker's side: texts come in, `encode` of them goes out, until the input ends."""
    encoder, limit = load_encoder(sys.argv[1]), int(sys.argv[2])
    with suppress(EOFError, BrokenPipeError):
        while True:
            texts = pickle.load(sys.stdin.buffer)
            pickle.dump(encode(encoder, texts, limit), sys.stdout.buffer)
            sys.stdout.buffer.flush()
