"""What a language model has to beat: two compressors and a byte 5-gram, in bits per byte.

All three read the same validation text as the models. The compressors see nothing else (their
dictionary starts empty); the 5-gram is trained on the bytes that the models were trained on.
"""

import gzip
import hashlib
import lzma
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

CONTEXT = 4  # bytes of context: a 5-gram


def compressed_bits_per_byte(documents: Sequence[bytes]) -> dict[str, float]:
    """gzip -9 and xz -9 of the documents concatenated in the order of their sha256."""
    text = b"".join(sorted(documents, key=lambda document: hashlib.sha256(document).digest()))
    if not text:
        raise ValueError("documents must hold at least one byte, got none")
    sizes = {
        "gzip": len(gzip.compress(text, compresslevel=9, mtime=0)),
        "xz": len(lzma.compress(text, preset=9)),
    }
    return {name: 8 * size / len(text) for name, size in sizes.items()}


class ByteNgram:
    """Interpolated Witten-Bell model of bytes given up to `CONTEXT` bytes before them.

    With h the last n bytes, h' the last n - 1 of them, c(h) the number of bytes seen after h,
    c(h, b) how many of these were b, and u(h) how many different ones there were,

        p_n(b | h) = (c(h, b) + u(h) p_{n-1}(b | h')) / (c(h) + u(h)),    p_{-1}(b) = 1 / 256,

    and p_n = p_{n-1} where h was never seen. Contexts end at the start of a document, so its
    first byte is predicted by p_0, the second by p_1 and so on. There is no symbol for the end
    of a document: the models pay for predicting it, the 5-gram does not.
    """

    def __init__(self, documents: Iterable[bytes]) -> None:
        text, position = _join(documents)
        self._orders = [_count(_codes(text, position, order)) for order in range(CONTEXT + 1)]

    def probabilities(self, document: bytes) -> NDArray[np.float64]:
        """p(byte | the bytes before it) for every byte of `document`."""
        return self._probabilities(*_join([document]))

    def bits_per_byte(self, documents: Iterable[bytes]) -> float:
        """Mean of -log2 p over all bytes of all documents."""
        return float(-np.log2(self._probabilities(*_join(documents))).mean())

    def _probabilities(
        self, text: NDArray[np.uint8], position: NDArray[np.int64]
    ) -> NDArray[np.float64]:
        p = np.full(len(text), 1 / 256)
        for order, (pairs, contexts) in enumerate(self._orders):
            codes = _codes(text, position, order)
            (count,) = _look_up(pairs, codes)
            seen, kinds = _look_up(contexts, codes >> 8)
            known = seen > 0
            at = np.flatnonzero(position >= order)[known]
            p[at] = (count[known] + kinds[known] * p[at]) / (seen[known] + kinds[known])
        return p


def _join(documents: Iterable[bytes]) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """All bytes end to end, and the position of each in its own document."""
    documents = list(documents)
    lengths = np.array([len(document) for document in documents], dtype=np.int64)
    starts = np.cumsum(lengths) - lengths
    text = np.frombuffer(b"".join(documents), dtype=np.uint8)
    return text, np.arange(len(text)) - np.repeat(starts, lengths)


def _codes(text: NDArray[np.uint8], position: NDArray[np.int64], order: int) -> NDArray[np.int64]:
    """The last `order` bytes and the byte itself as one integer, where there are that many."""
    at = np.flatnonzero(position >= order)
    code = np.zeros(len(at), dtype=np.int64)
    for back in range(order, -1, -1):
        code = code << 8 | text[at - back]
    return code


# Keys in ascending order, then one or more columns of numbers.
Table = tuple[NDArray[np.int64], ...]


def _count(codes: NDArray[np.int64]) -> tuple[Table, Table]:
    """(h b -> c(h, b)) and (h -> c(h), u(h))."""
    pairs, counts = np.unique(codes, return_counts=True)
    contexts, first, kinds = np.unique(pairs >> 8, return_index=True, return_counts=True)
    seen = np.diff(np.append(0, counts.cumsum())[np.append(first, len(counts))])
    return (pairs, counts), (contexts, seen, kinds)


def _look_up(table: Table, wanted: NDArray[np.int64]) -> list[NDArray[np.int64]]:
    """The columns at the wanted keys; 0 where there is no such key."""
    keys, *columns = table
    if not len(keys):
        return [np.zeros(len(wanted), dtype=np.int64) for _ in columns]
    index = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    found = keys[index] == wanted
    return [np.where(found, column[index], 0) for column in columns]
