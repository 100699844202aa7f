"""Small corpora and prepared folders, made anew for every test."""

import hashlib
import random

import numpy as np
import pytest

from gdn2.data.shards import SPLITS, VERSION, Manifest, ShardWriter, Split, token_dtype

WORDS = [
    "the",
    "of",
    "and",
    "state",
    "memory",
    "gate",
    "erase",
    "write",
    "key",
    "value",
    "é",
    "世界",
    "decay",
    "token",
    "12",
    "for",
]


@pytest.fixture(scope="session")
def make_texts():
    """n different documents of about `words` words, the same for the same seed."""

    def make(n, words=60, seed=0):
        rng = random.Random(seed)
        return [
            f"Document {i}.\n" + " ".join(rng.choices(WORDS, k=rng.randint(1, 2 * words)))
            for i in range(n)
        ]

    return make


@pytest.fixture(scope="session")
def write_dataset():
    """Write token documents as the split `train` of a prepared folder, `per_shard` to a shard."""

    def write(folder, documents, *, vocab_size=100, separator=0, per_shard=3):
        (folder / "tokenizer").mkdir(parents=True)
        (folder / "tokenizer" / "tokenizer.json").write_text("{}")
        shards = []
        for first in range(0, len(documents), per_shard):
            chosen = documents[first : first + per_shard]
            writer = ShardWriter(folder, f"train/{len(shards):05d}.ds", token_dtype(vocab_size))
            writer.write(np.concatenate(chosen), np.array([len(d) for d in chosen]), 7)
            shards.append(writer.close())
        manifest = Manifest(
            version=VERSION,
            vocab_size=vocab_size,
            dtype=token_dtype(vocab_size).name,
            separator=separator,
            separator_token="<|endoftext|>",
            tokenizer_sha256=hashlib.sha256(b"{}").hexdigest(),
            sources=(),
            options={},
            skipped={},
            splits={s: Split.of(tuple(shards) if s == "train" else ()) for s in SPLITS},
        )
        manifest.save(folder)
        return folder

    return write
