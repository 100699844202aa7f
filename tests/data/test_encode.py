"""Batches depend on their own documents; a dead worker is an error, not a wait."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gdn2.data.encode import batch_documents, encode, encode_batches, text_hash
from gdn2.data.sources import Document, Position
from gdn2.data.tokenize import load_encoder, save_tokenizer, train_tokenizer

TEXTS = st.lists(st.none() | st.text(min_size=1, max_size=8), max_size=20)


def documents_of(texts):
    return [
        Document(text, None if text else "null", Position(0, i + 1), 10 * i)
        for i, text in enumerate(texts)
    ]


@given(texts=TEXTS, size=st.integers(1, 20))
def test_reading_on_after_a_batch_gives_the_batches_that_followed(texts, size):
    documents = documents_of(texts)
    batches = list(batch_documents(documents, size))
    assert [text for batch in batches for text in batch.texts] == [t for t in texts if t]
    assert sum(batch.skipped["null"] for batch in batches) == texts.count(None)
    for number, batch in enumerate(batches):
        rest = documents[batch.next.item :]
        assert list(batch_documents(rest, size)) == batches[number + 1 :]
    assert all(sum(map(len, batch.texts)) >= size for batch in batches[:-1])


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory, make_texts):
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(train_tokenizer(make_texts(50), 300), folder)
    return folder


def test_the_split_is_by_hash_and_keeps_the_order(tokenizer, make_texts):
    encoder, texts, limit = load_encoder(tokenizer), make_texts(40), 2**63
    result = encode(encoder, texts, limit)
    for split, below in (("validation", True), ("train", False)):
        chosen = [text for text in texts if (text_hash(text) < limit) == below]
        rows = [encoder.encode(text) for text in chosen]
        np.testing.assert_array_equal(result[split].tokens, np.concatenate(rows))
        np.testing.assert_array_equal(result[split].lengths, [len(row) for row in rows])
        assert result[split].num_bytes == sum(len(text.encode()) for text in chosen)
    assert set(encode(encoder, texts, 0)) == {"train"}


def test_workers_give_the_results_of_this_process_in_order(tokenizer, make_texts):
    def results(workers):
        batches = batch_documents(documents_of(make_texts(60)), 100)
        return list(encode_batches(batches, tokenizer, 2**62, workers))

    for (batch, alone), (other, helped) in zip(results(1), results(3), strict=True):
        assert batch == other
        assert set(alone) == set(helped)
        for split, encoded in alone.items():
            np.testing.assert_array_equal(encoded.tokens, helped[split].tokens)


def test_a_dead_worker_is_an_error(tmp_path):
    batches = batch_documents(documents_of(["a", "b"]), 1)
    with pytest.raises(RuntimeError, match="worker process ended with status 1"):
        list(encode_batches(batches, tmp_path / "no tokenizer here", 2**63, 2))
