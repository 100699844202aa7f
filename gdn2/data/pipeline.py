"""`prepare`: documents to token shards, in parallel, resumable, the same bytes every time.

One process reads documents in order and cuts them into batches; workers hash, split and encode
them; the results are written in order. A section is a run of batches that fills a train shard,
with the validation shard of the same number. After each section the journal notes its shards
and where the next one begins to read; a later run starts there. Batches are cut by size alone
and a section ends with a batch, so neither the number of workers nor an interruption can move a
boundary.
"""

import os
from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import numpy as np

from gdn2.data.dataset import TokenDataset
from gdn2.data.durable import locked, write_folder
from gdn2.data.encode import Encoded, TextBatch, batch_documents, encode_batches, text_hash
from gdn2.data.journal import Journal, refuse_differences
from gdn2.data.progress import ProgressBar, say
from gdn2.data.shards import (
    MANIFEST,
    SPLITS,
    VERSION,
    Manifest,
    ShardWriter,
    Split,
    load_manifest,
    sha256_of,
    token_dtype,
)
from gdn2.data.sources import Corpus, Position, find_source
from gdn2.data.tokenize import (
    DEFAULT_VOCAB_SIZE,
    MAX_VOCAB_SIZE,
    MIN_VOCAB_SIZE,
    SEPARATOR_TOKEN,
    TOKENIZER,
    copy_tokenizer,
    find_tokenizer,
    load_encoder,
    save_tokenizer,
    train_tokenizer,
)

SHARD_TOKENS = 2**28
BATCH_CHARACTERS = 2**20
TRAINING_TEXT = 200 * 10**6  # bytes of text that a tokenizer is trained on at most
BYTES_PER_WORKER = 4 * 2**20  # less input than this is not worth another process


def prepare(
    sources: str | os.PathLike | Sequence[str | os.PathLike],
    out: str | os.PathLike,
    *,
    tokenizer: str | os.PathLike | None = None,
    vocab_size: int | None = None,
    text_column: str = "text",
    val_fraction: float = 0.01,
    workers: int | None = None,
    shard_tokens: int = SHARD_TOKENS,
) -> Manifest:
    """Tokenize `sources` into the folder `out`; a second call continues it or finds it complete.

    A source is a file (Parquet, JSONL, otherwise text: one document), a folder of them, or
    `stdlib`, the running interpreter's standard library. A document is in validation if the
    first 8 bytes of its text's sha256, as a fraction of 2^64, lie below `val_fraction` (where
    that leaves a split empty, it gets one text), so equal texts are in the same split. Without
    `tokenizer` (folder or tokenizer.json) a byte-level BPE of `vocab_size` tokens is trained on
    training documents.

    Raises ValueError or FileNotFoundError for wrong input, also where `out` was begun with other
    sources or options; OSError for a full disk. What was finished by then stays usable.
    """
    sources = [sources] if isinstance(sources, str | os.PathLike) else sources
    out = Path(out)
    if not sources:
        raise ValueError("sources must name at least one file or folder, or stdlib")
    if out.exists() and not out.is_dir():
        raise ValueError(f"out must be a folder, but {out} is a file")
    if not 0 < val_fraction < 1:
        raise ValueError(f"val_fraction must lie between 0 and 1, got {val_fraction}")
    for name, value in (("workers", workers), ("shard_tokens", shard_tokens)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    options = _tokenizer_options(tokenizer, vocab_size) | {
        "text_column": text_column,
        "val_fraction": val_fraction,
        "shard_tokens": shard_tokens,
    }
    corpus = Corpus([find_source(source, out) for source in sources], text_column)
    request = {"sources": [s.fingerprint() for s in corpus.sources], "options": options}
    for source in request["sources"]:
        checksum = f", sha256 {source['sha256']}" if "sha256" in source else ""
        say(f"{source['name']}: {source['files']:,} files, {source['bytes']:,} bytes{checksum}")
    if (out / MANIFEST).is_file():
        return _confirm(out, request)

    with locked(out):
        journal = Journal.open(out, request)
        if journal.sections:
            say(f"continuing {out}: {len(journal.sections)} shards are finished")
        workers = min(workers or os.cpu_count() or 1, 1 + corpus.num_bytes // BYTES_PER_WORKER)
        try:
            limit = _validation_limit(corpus, val_fraction)
            _provide_tokenizer(out, corpus, tokenizer, options["vocab_size"], limit)
            _write_sections(out, corpus, journal, limit, workers)
        except KeyboardInterrupt:
            say(f"stopped: the same command continues {out}")
            raise
        manifest = _finish(out, journal)
    for name, split in manifest.splits.items():
        say(
            f"{name}: {split.documents:,} documents, {split.bytes:,} bytes, {split.tokens:,} tokens"
        )
    return manifest


def _tokenizer_options(tokenizer: str | os.PathLike | None, vocab_size: int | None) -> dict:
    """What a resumed run compares: the given tokenizer, or the size of the one to be trained."""
    if tokenizer is not None:
        if vocab_size is not None:
            raise ValueError("vocab_size is that of a new tokenizer: give tokenizer or vocab_size")
        separator_token = load_encoder(tokenizer).separator_token
        checksum = sha256_of(find_tokenizer(tokenizer))
        return {"tokenizer": checksum, "separator": separator_token, "vocab_size": None}
    vocab_size = DEFAULT_VOCAB_SIZE if vocab_size is None else vocab_size
    if not MIN_VOCAB_SIZE <= vocab_size <= MAX_VOCAB_SIZE:
        raise ValueError(
            f"vocab_size must be at least {MIN_VOCAB_SIZE} (256 bytes and the separator) and at "
            f"most {MAX_VOCAB_SIZE:,}, got {vocab_size}"
        )
    return {"tokenizer": None, "separator": SEPARATOR_TOKEN, "vocab_size": vocab_size}


def _confirm(out: Path, request: dict) -> Manifest:
    """The manifest of a complete folder, if that is what was asked for."""
    manifest = load_manifest(out)
    old = {"sources": list(manifest.sources), "options": manifest.options}
    refuse_differences(out, old, request)
    for split in SPLITS:
        TokenDataset(out, split, verify=False)
    Journal(out, request).remove()  # left if a run was killed between its last two steps
    say(f"{out} is complete already")
    return manifest


def _validation_limit(corpus: Corpus, val_fraction: float) -> int:
    """Texts whose hash is below this are in validation; each split gets one at least.

    Reads until both have one: some 1 / val_fraction documents, or a tiny corpus to its end.
    """
    limit = int(val_fraction * 2**64)
    low, high = 2**64, -1
    skipped: Counter[str] = Counter()
    for document in corpus.documents():
        if document.text is None:
            skipped[document.skipped or "null"] += 1
            continue
        low, high = min(low, text_hash(document.text)), max(high, text_hash(document.text))
        if low < limit <= high:
            return limit
    if low >= high:
        reasons = ", ".join(f"{count} {reason}" for reason, count in skipped.items()) or "none"
        raise ValueError(
            f"a training and a validation split need two different documents, found "
            f"{0 if high < 0 else 1} (skipped: {reasons}); a text file is one document, as is a "
            "line of JSONL or a row of Parquet"
        )
    return low + 1 if low >= limit else high


def _provide_tokenizer(
    out: Path, corpus: Corpus, given: str | os.PathLike | None, vocab_size: int | None, limit: int
) -> None:
    """Make out/tokenizer, which has its name only when it is whole."""

    def fill(folder: Path) -> None:
        if given is not None:
            copy_tokenizer(given, folder)
        else:
            assert vocab_size is not None
            say(f"training a tokenizer of {vocab_size:,} tokens")
            texts = (text for text in corpus.sample(TRAINING_TEXT) if text_hash(text) >= limit)
            save_tokenizer(train_tokenizer(texts, vocab_size), folder)

    if not (out / "tokenizer").is_dir():
        write_folder(out / "tokenizer", fill)


def _write_sections(out: Path, corpus: Corpus, journal: Journal, limit: int, workers: int) -> None:
    shard_tokens = journal.request["options"]["shard_tokens"]
    tokenizer = out / "tokenizer" / TOKENIZER
    documents = corpus.documents(journal.next)
    batches = batch_documents(documents, min(BATCH_CHARACTERS, shard_tokens))
    section = _Section(journal, token_dtype(load_encoder(tokenizer).vocab_size))
    with (
        ProgressBar(corpus.num_bytes, sum(corpus.sizes[: journal.next.file])) as bar,
        closing(section),
        closing(encode_batches(batches, tokenizer, limit, workers)) as results,
    ):
        for batch, encoded in results:
            section.add(batch, encoded)
            bar.update(batch.offset, f"shard {len(journal.sections)}, {section.tokens:,} tokens")
            if section.tokens >= shard_tokens:
                section.finish()
        section.finish()


class _Section:
    """The shards of a section, one per split that has documents; reused for the next section."""

    def __init__(self, journal: Journal, dtype: np.dtype):
        self._journal = journal
        self._dtype = dtype
        self._begin()

    def _begin(self) -> None:
        self._writers: dict[str, ShardWriter] = {}
        self._skipped: Counter[str] = Counter()
        self._next: Position | None = None

    @property
    def tokens(self) -> int:
        return sum(writer.tokens for writer in self._writers.values())

    def add(self, batch: TextBatch, encoded: dict[str, Encoded]) -> None:
        for split, documents in encoded.items():
            if split not in self._writers:
                file = f"{split}/{len(self._journal.sections):05d}.ds"
                self._writers[split] = ShardWriter(self._journal.folder, file, self._dtype)
            self._writers[split].write(*documents)
        self._skipped += batch.skipped
        self._next = batch.next

    def finish(self) -> None:
        """Complete the shards, note them and begin the next section."""
        if self._next is not None:
            shards = {split: writer.close() for split, writer in self._writers.items()}
            self._journal.add(self._next, self._skipped, shards)
            self._begin()

    def close(self) -> None:
        """Abandon what is not finished."""
        for writer in self._writers.values():
            writer.abandon()


def _finish(out: Path, journal: Journal) -> Manifest:
    encoder = load_encoder(out / "tokenizer")
    dtype = token_dtype(encoder.vocab_size)
    skipped: Counter[str] = Counter()
    for section in journal.sections:
        skipped.update(section["skipped"])
    manifest = Manifest(
        version=VERSION,
        vocab_size=encoder.vocab_size,
        dtype=dtype.name,
        separator=encoder.separator,
        separator_token=encoder.separator_token,
        tokenizer_sha256=sha256_of(out / "tokenizer" / TOKENIZER),
        sources=tuple(journal.request["sources"]),
        options=journal.request["options"],
        skipped=dict(sorted(skipped.items())),
        splits={split: Split.of(journal.shards(split)) for split in SPLITS},
    )
    for split in manifest.splits.values():
        for shard in split.shards:
            shard.check(out, dtype)
    manifest.save(out)
    journal.remove()
    return manifest
