"""The layout on disk, and files that are complete or not there."""

import hashlib
import struct

import numpy as np
import pytest

from gdn2.data.shards import ShardWriter, load_manifest, token_dtype


def test_layout_is_that_of_datatrove(tmp_path):
    writer = ShardWriter(tmp_path, "train/00000.ds", token_dtype(65536))
    writer.write(np.array([0, 5, 65535]), np.array([3]), 11)
    writer.write(np.array([0, 7, 0, 1, 2, 3]), np.array([2, 4]), 22)
    shard = writer.close()
    # datatrove packs "<%sH" tokens and "<%sQ" cumulative ends in tokens, without headers.
    tokens = struct.pack("<9H", 0, 5, 65535, 0, 7, 0, 1, 2, 3)
    ends = struct.pack("<3Q", 3, 5, 9)
    assert (tmp_path / "train/00000.ds").read_bytes() == tokens
    assert (tmp_path / "train/00000.ds.index").read_bytes() == ends
    assert (shard.tokens, shard.documents, shard.bytes) == (9, 3, 33)
    assert shard.sha256 == hashlib.sha256(tokens).hexdigest()
    assert shard.index_sha256 == hashlib.sha256(ends).hexdigest()


@pytest.mark.parametrize(("vocab_size", "dtype"), [(65536, "<u2"), (65537, "<u4")])
def test_tokens_take_four_bytes_from_vocabulary_65537_on(vocab_size, dtype):
    assert token_dtype(vocab_size) == np.dtype(dtype)


def test_an_open_shard_has_no_final_name(tmp_path):
    writer = ShardWriter(tmp_path, "train/00000.ds", token_dtype(300))
    writer.write(np.array([0, 1]), np.array([2]), 1)
    writer.abandon()
    assert [f.name for f in (tmp_path / "train").iterdir()] == ["00000.ds.tmp"]


def test_manifest_round_trip(tmp_path, write_dataset):
    folder = write_dataset(tmp_path / "d", [np.array([0, 1]), np.array([0])], per_shard=1)
    manifest = load_manifest(folder)
    assert manifest.splits["train"].tokens == 3
    assert manifest.splits["train"].shards[1].file == "train/00001.ds"
    manifest.save(folder)
    assert load_manifest(folder) == manifest


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "must be a JSON object, got list"),
        ('{"version": 99}', "version must be 1, got 99"),
        ('{"version": 1}', "is damaged"),
    ],
)
def test_broken_manifest_is_named(tmp_path, contents, message):
    (tmp_path / "manifest.json").write_text(contents)
    with pytest.raises(ValueError, match=rf"manifest.json .*{message}"):
        load_manifest(tmp_path)


def test_missing_manifest_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="not a folder that prepare finished"):
        load_manifest(tmp_path)
