"""One stream over many shards; what does not belong is refused by name."""

import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gdn2.data import TokenDataset

DOCUMENTS = st.lists(
    st.lists(st.integers(1, 70000), max_size=6).map(lambda ids: np.array([0, *ids])),
    min_size=1,
    max_size=12,
)


@settings(max_examples=40, deadline=None)
@given(documents=DOCUMENTS, per_shard=st.integers(1, 5), wide=st.booleans(), data=st.data())
def test_shards_read_as_one_stream(write_dataset, documents, per_shard, wide, data):
    if not wide:
        documents = [document % 60000 for document in documents]
    with tempfile.TemporaryDirectory() as folder:
        write_dataset(
            Path(folder) / "d",
            documents,
            vocab_size=70001 if wide else 60000,
            per_shard=per_shard,
        )
        dataset = TokenDataset(Path(folder) / "d")
        stream, ends = np.concatenate(documents), np.cumsum([len(d) for d in documents])
        assert (dataset.num_tokens, dataset.num_documents) == (len(stream), len(documents))
        np.testing.assert_array_equal(dataset.ends_within(0, len(stream)), ends[:-1])
        for i, document in enumerate(documents):
            np.testing.assert_array_equal(dataset.document(i), document)
        start = data.draw(st.integers(0, len(stream)))
        stop = data.draw(st.integers(start, len(stream)))
        assert dataset.read(start, stop).dtype == np.int64
        np.testing.assert_array_equal(dataset.read(start, stop), stream[start:stop])
        inside = ends[(start < ends) & (ends < stop)]
        np.testing.assert_array_equal(dataset.ends_within(start, stop), inside)


@pytest.fixture
def folder(tmp_path, write_dataset):
    documents = [np.array([0, *range(1, n + 1)]) for n in range(1, 8)]
    return write_dataset(tmp_path / "d", documents)


@pytest.mark.parametrize(("start", "stop"), [(-1, 2), (3, 2), (0, 10**6)])
def test_reading_outside_the_stream_is_refused(folder, start, stop):
    with pytest.raises(ValueError, match=r"0 <= start <= stop <= 35"):
        TokenDataset(folder).read(start, stop)


@pytest.mark.parametrize("index", [-1, 7])
def test_documents_outside_the_split_are_refused(folder, index):
    with pytest.raises(ValueError, match=r"document must be in 0..6"):
        TokenDataset(folder).document(index)


def test_unknown_split_is_refused(folder):
    with pytest.raises(ValueError, match="split must be one of train, validation, got 'test'"):
        TokenDataset(folder, "test")


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("name", ["00001.ds", "00001.ds.index"])
def test_truncated_file_is_named(folder, name, verify):
    path = folder / "train" / name
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(ValueError, match=rf"{name} has \d+ bytes, expected \d+"):
        TokenDataset(folder, verify=verify)


@pytest.mark.parametrize("name", ["00001.ds", "00001.ds.index"])
def test_missing_file_is_named(folder, name):
    (folder / "train" / name).unlink()
    with pytest.raises(ValueError, match=rf"{name} is missing"):
        TokenDataset(folder, verify=False)


def test_foreign_shard_of_the_same_size_is_named(folder):
    path = folder / "train" / "00002.ds"
    path.write_bytes(bytes(len(path.read_bytes())))
    TokenDataset(folder, verify=False)
    with pytest.raises(ValueError, match=r"00002\.ds is not the shard of the manifest"):
        TokenDataset(folder)


def test_foreign_index_of_the_same_size_is_named(folder):
    index = folder / "train" / "00000.ds.index"
    ends = np.frombuffer(index.read_bytes(), "<u8").copy()
    index.write_bytes(np.array([ends[0] + 1, *ends[1:]], "<u8").tobytes())
    with pytest.raises(ValueError, match=r"00000\.ds\.index is not the shard of the manifest"):
        TokenDataset(folder)
    index.write_bytes(np.array([*ends[:-1], ends[-1] + 1], "<u8").tobytes())
    with pytest.raises(ValueError, match=r"00000\.ds\.index ends at token 10, expected 9"):
        TokenDataset(folder, verify=False)


def test_another_tokenizer_is_named(folder):
    (folder / "tokenizer" / "tokenizer.json").write_text("{ }")
    with pytest.raises(ValueError, match=r"tokenizer\.json is missing or not the tokenizer"):
        TokenDataset(folder, verify=False)
    shutil.rmtree(folder / "tokenizer")
    with pytest.raises(ValueError, match=r"tokenizer\.json is missing or not the tokenizer"):
        TokenDataset(folder, verify=False)
