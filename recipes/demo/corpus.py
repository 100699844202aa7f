"""The text behind the tokens: of a split's documents, and of what a run was trained on."""

import numpy as np
from numpy.typing import NDArray

from gdn2.data import Encoder, Samples, TokenDataset
from gdn2.train import Run


def split_documents(dataset: TokenDataset, encoder: Encoder) -> list[bytes]:
    """UTF-8 text of every document of the split."""
    tokens = [dataset.document(index) for index in range(dataset.num_documents)]
    texts = _texts(np.concatenate(tokens), encoder)
    assert sum(map(len, texts)) == dataset.num_bytes, "a byte-level tokenizer keeps every byte"
    return texts


def seen_documents(dataset: TokenDataset, encoder: Encoder, run: Run) -> list[bytes]:
    """The text that the run trains on, every block of tokens once even if it comes back.

    A document that lies in several blocks is in as many pieces: the model saw it so too.
    """
    samples = Samples(dataset, seq_len=run.data.sequence_length, packing="concat", seed=run.seed)
    count = min(run.total_steps * run.sequences_per_step, samples.num_samples)
    rows = samples.batch(0, count).tokens.numpy()
    return [text for row in rows for text in _texts(row, encoder)]


def _texts(tokens: NDArray[np.int64], encoder: Encoder) -> list[bytes]:
    """The text between separators; what stands before the first one is a text too."""
    pieces = _token_bytes(encoder)
    texts = np.split(tokens, np.flatnonzero(tokens == encoder.separator))
    joined = [b"".join(pieces[token] for token in text.tolist()) for text in texts]
    return [text for text in joined if text]


def _token_bytes(encoder: Encoder) -> dict[int, bytes]:
    """The bytes of every token of a byte-level BPE; none for its separator.

    Such a tokenizer spells bytes as characters: a visible one of Latin-1 as itself, the others,
    in order, as those from U+0100 on.
    """
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in visible]
    spelled = {chr(byte): byte for byte in visible}
    spelled |= {chr(0x100 + rank): byte for rank, byte in enumerate(hidden)}
    vocabulary = encoder.tokenizer.get_vocab()
    return {
        token: b"" if token == encoder.separator else bytes(spelled[char] for char in text)
        for text, token in vocabulary.items()
    }
