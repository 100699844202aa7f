"""Samples: a pure function of seed and index; every token once; labels and boundaries exact."""

import numpy as np
import pytest
import torch

from gdn2.data import Samples, TokenDataset


@pytest.fixture
def stream():
    """61 tokens in documents that begin with the separator 0 and have no other 0."""
    lengths = [1, 5, 9, 2, 17, 3, 8, 1, 1, 14]
    rng = np.random.default_rng(0)
    return [np.array([0, *rng.integers(1, 90, n - 1)]) for n in lengths]


@pytest.fixture
def dataset(tmp_path, write_dataset, stream):
    return TokenDataset(write_dataset(tmp_path / "d", stream))


def rows_of(batch, seq_len):
    return batch.tokens.view(-1, seq_len), batch.labels.view(-1, seq_len)


@pytest.mark.parametrize("packing", ["packed", "concat"])
@pytest.mark.parametrize("seq_len", [1, 4, 7, 61])
def test_an_epoch_shows_every_block_once_with_the_next_token_as_label(
    dataset, stream, packing, seq_len
):
    tokens = np.concatenate(stream)
    followers = np.append(tokens[1:], 0)  # after the last token of the split: the separator
    samples = Samples(dataset, seq_len=seq_len, packing=packing, seed=3)
    assert samples.num_samples == 61 // seq_len
    kept = samples.num_samples * seq_len
    expected = np.stack([tokens[:kept], followers[:kept]], 1).reshape(-1, seq_len, 2)
    for epoch in range(2):
        batch = samples.batch(epoch * samples.num_samples, samples.num_samples)
        seen = np.stack([rows.numpy() for rows in rows_of(batch, seq_len)], 2)
        assert sorted(seen.tolist()) == sorted(expected.tolist())


def test_epochs_and_seeds_differ_in_order(dataset):
    samples = Samples(dataset, seq_len=2, packing="concat", seed=0)
    epochs = [samples.batch(epoch * 30, 30).tokens for epoch in range(2)]
    other = Samples(dataset, seq_len=2, packing="concat", seed=1).batch(0, 30).tokens
    assert not torch.equal(epochs[0], epochs[1])
    assert not torch.equal(epochs[0], other)


@pytest.mark.parametrize("packing", ["packed", "concat"])
def test_a_sample_depends_on_its_index_alone(dataset, packing):
    whole = Samples(dataset, seq_len=4, packing=packing, seed=5).batch(0, 50)
    for count in (1, 3, 7):
        fresh = Samples(dataset, seq_len=4, packing=packing, seed=5)
        first = 50 - 50 % count
        parts = [fresh.batch(i, count) for i in reversed(range(0, first, count))][::-1]
        for k in range(2):
            joined = torch.cat([rows_of(part, 4)[k] for part in parts])
            assert torch.equal(joined, rows_of(whole, 4)[k][:first])


@pytest.mark.parametrize("seq_len", [1, 4, 7, 61])
def test_sequences_begin_at_rows_and_at_documents(dataset, seq_len):
    samples = Samples(dataset, seq_len=seq_len, seed=1)
    batch = samples.batch(0, samples.num_samples)
    assert batch.tokens.shape == batch.labels.shape == (1, samples.num_samples * seq_len)
    separators = (batch.tokens[0] == 0).nonzero()[:, 0].tolist()
    rows = range(0, samples.num_samples * seq_len + 1, seq_len)
    assert batch.cu_seqlens.tolist() == sorted({*separators, *rows})
    assert batch.cu_seqlens.dtype == torch.int32


def test_concat_has_rows_and_no_boundaries(dataset):
    batch = Samples(dataset, seq_len=5, packing="concat", seed=1).batch(2, 3)
    assert batch.tokens.shape == batch.labels.shape == (3, 5)
    assert batch.tokens.dtype == batch.labels.dtype == torch.int64
    assert batch.cu_seqlens is None


@pytest.mark.parametrize("seq_len", [0, 62])
def test_seq_len_beyond_the_split_is_refused(dataset, seq_len):
    with pytest.raises(ValueError, match=rf"seq_len must be in 1\.\.61, .*/train, got {seq_len}"):
        Samples(dataset, seq_len=seq_len)


def test_unknown_packing_is_refused(dataset):
    with pytest.raises(ValueError, match="packing must be one of packed, concat, got 'pad'"):
        Samples(dataset, seq_len=4, packing="pad")


@pytest.mark.parametrize(("first", "count"), [(-1, 1), (0, 0)])
def test_batches_outside_the_stream_are_refused(dataset, first, count):
    with pytest.raises(ValueError, match="first >= 0 and count >= 1"):
        Samples(dataset, seq_len=4).batch(first, count)
