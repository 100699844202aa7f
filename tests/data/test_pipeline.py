"""`prepare`: every byte of text arrives, the same files every time, nothing but what was asked."""

import errno
import fcntl
import hashlib
import json
import os
import shutil
import threading

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gdn2.data import TokenDataset, load_encoder, load_manifest, pipeline, prepare


@pytest.fixture
def corpus(tmp_path, make_texts):
    """Parquet of 300 documents, some twice, with a null, an empty one and a tricky one."""
    texts = make_texts(250)
    texts += [*texts[:47], None, "", "a<|endoftext|>b"]
    folder = tmp_path / "corpus"
    folder.mkdir()
    pq.write_table(pa.table({"text": texts, "id": range(300)}), folder / "a.parquet", 64)
    return folder


def run(sources, out, **options):
    return prepare(sources, out, **{"vocab_size": 300, "val_fraction": 0.1, "workers": 1} | options)


def files_of(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def decoded(folder, split):
    dataset, encoder = TokenDataset(folder, split), load_encoder(folder / "tokenizer")
    documents = [dataset.document(i).tolist() for i in range(dataset.num_documents)]
    assert all(document[0] == encoder.separator for document in documents)
    assert all(encoder.separator not in document[1:] for document in documents)
    return [encoder.tokenizer.decode(document[1:]) for document in documents]


def test_every_text_comes_back_from_the_split_of_its_hash(corpus, tmp_path):
    out = tmp_path / "out"
    manifest = run([corpus], out, shard_tokens=3000)
    assert manifest == load_manifest(out)
    assert len(manifest.splits["train"].shards) > 3
    assert manifest.skipped == {"empty": 1, "null": 1}
    texts = [t for t in pq.read_table(corpus)["text"].to_pylist() if t]
    for split in ("train", "validation"):
        expected = [t for t in texts if (_fraction(t) < 0.1) == (split == "validation")]
        assert decoded(out, split) == expected
        assert manifest.splits[split].documents == len(expected)
        assert manifest.splits[split].bytes == sum(len(t.encode()) for t in expected)


def _fraction(text):
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64


def test_folder_holds_what_the_manifest_says_and_no_more(corpus, tmp_path):
    out = tmp_path / "out"
    run([corpus], out, shard_tokens=3000)
    manifest = json.loads((out / "manifest.json").read_text())
    expected = {"manifest.json", "tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json"}
    for split in manifest["splits"].values():
        for shard in split["shards"]:
            expected |= {shard["file"], shard["file"] + ".index"}
            data = (out / shard["file"]).read_bytes()
            assert hashlib.sha256(data).hexdigest() == shard["sha256"]
            assert len(data) == 2 * shard["tokens"]
        for total in ("tokens", "documents", "bytes"):
            assert split[total] == sum(shard[total] for shard in split["shards"])
    assert set(files_of(out)) == expected
    assert (manifest["version"], manifest["vocab_size"], manifest["dtype"]) == (1, 300, "uint16")
    assert (manifest["separator"], manifest["separator_token"]) == (0, "<|endoftext|>")
    tokenizer = (out / "tokenizer/tokenizer.json").read_bytes()
    assert manifest["tokenizer_sha256"] == hashlib.sha256(tokenizer).hexdigest()


def test_workers_do_not_change_a_byte(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, "BYTES_PER_WORKER", 1)
    for workers in (1, 3):
        run([corpus], tmp_path / str(workers), workers=workers, shard_tokens=3000)
    assert files_of(tmp_path / "1") == files_of(tmp_path / "3")


def test_shards_end_soon_after_their_size(corpus, tmp_path):
    manifest = run([corpus], tmp_path / "out", shard_tokens=3000)
    sizes = [shard.tokens for shard in manifest.splits["train"].shards]
    assert all(2000 < size < 6000 for size in sizes[:-1])


def test_a_complete_folder_is_left_alone_and_said_so(corpus, tmp_path, capfd):
    out = tmp_path / "out"
    first = run([corpus], out)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    (out / "journal.json.tmp").write_text("{}")  # a run killed between its last two steps
    assert run([corpus], out) == first
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*") if path != out} == {
        path: time for path, time in before.items() if path != out
    }
    assert "is complete already" in capfd.readouterr().err


def test_a_complete_folder_with_a_damaged_shard_is_not_called_complete(corpus, tmp_path):
    run([corpus], tmp_path / "out")
    (tmp_path / "out/train/00000.ds").write_bytes(b"")
    with pytest.raises(ValueError, match=r"00000\.ds has 0 bytes"):
        run([corpus], tmp_path / "out")


@pytest.mark.parametrize("complete", [True, False])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocab_size": 301}, "vocab_size was 300 and is 301"),
        ({"val_fraction": 0.2}, "val_fraction was 0.1 and is 0.2"),
        ({"text_column": "body"}, "text_column was 'text' and is 'body'"),
    ],
)
def test_other_options_for_a_begun_folder_are_refused(
    tmp_path, monkeypatch, change, message, complete
):
    lines = [json.dumps({"text": f"{i} text", "body": "b" * i}) for i in range(1, 50)]
    source, out = tmp_path / "a.jsonl", tmp_path / "out"
    source.write_text("\n".join(lines))
    with monkeypatch.context() as patch:
        if not complete:
            patch.setattr(pipeline, "_write_sections", _interrupt)
        _run_to_the_end_or_interrupt([source], out)
    with pytest.raises(ValueError, match=message):
        run([source], out, **change)


def _interrupt(*_):
    raise KeyboardInterrupt


def _run_to_the_end_or_interrupt(sources, out):
    try:
        run(sources, out)
    except KeyboardInterrupt:
        assert not (out / "manifest.json").exists()


def test_changed_sources_are_refused_and_moved_ones_are_not(corpus, tmp_path):
    run([corpus], tmp_path / "out")
    moved = shutil.move(corpus, tmp_path / "moved")
    run([moved], tmp_path / "out")
    (tmp_path / "moved" / "more.txt").write_text("more")
    with pytest.raises(ValueError, match=r"sources were .*corpus, are .*moved"):
        run([moved], tmp_path / "out")
    shutil.move(moved, corpus)
    with pytest.raises(ValueError, match="corpus has changed"):
        run([corpus], tmp_path / "out")


def test_another_given_tokenizer_is_refused(corpus, tmp_path):
    for size in (280, 290):
        run([corpus], tmp_path / str(size), vocab_size=size)
    given = {"tokenizer": tmp_path / "280" / "tokenizer", "vocab_size": None}
    manifest = run([corpus], tmp_path / "out", **given)
    assert manifest.vocab_size == 280
    with pytest.raises(ValueError, match=r"tokenizer was '.*' and is '.*'"):
        run([corpus], tmp_path / "out", **given | {"tokenizer": tmp_path / "290" / "tokenizer"})
    own, same = files_of(tmp_path / "280"), files_of(tmp_path / "out")
    assert own.pop("manifest.json") != same.pop("manifest.json")
    assert own == same


def test_a_vocabulary_beyond_16_bits_takes_32(corpus, tmp_path):
    run([corpus], tmp_path / "small")
    wide = json.loads((tmp_path / "small/tokenizer/tokenizer.json").read_text())
    wide["model"]["vocab"]["far"] = 70000
    (tmp_path / "wide.json").write_text(json.dumps(wide))
    manifest = run([corpus], tmp_path / "out", tokenizer=tmp_path / "wide.json", vocab_size=None)
    assert manifest.vocab_size == 70001
    assert manifest.dtype == "uint32"
    assert decoded(tmp_path / "out", "train") == decoded(tmp_path / "small", "train")


@pytest.mark.parametrize(
    ("texts", "val_fraction", "sizes"),
    [
        (["a", "b"], 1e-9, (1, 1)),
        (["a", "b", "c", "a"], 1e-9, None),
        (["a", "b", "c"], 1 - 1e-9, (1, 2)),
    ],
)
def test_a_tiny_corpus_gets_both_splits(tmp_path, texts, val_fraction, sizes):
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in texts))
    out = tmp_path / "out"
    run([tmp_path / "a.jsonl"], out, val_fraction=val_fraction)
    train, validation = decoded(out, "train"), decoded(out, "validation")
    assert sorted(train + validation) == sorted(texts)
    assert not set(train) & set(validation)
    assert sizes in (None, (len(train), len(validation)))


@pytest.mark.parametrize(("texts", "found"), [(["a", "a", ""], 1), (["", " "], 0)])
def test_a_corpus_that_cannot_be_split_is_refused(tmp_path, texts, found):
    for i, text in enumerate(texts):
        (tmp_path / f"{i}.txt").write_text(text)
    with pytest.raises(ValueError, match=rf"two different documents, found {found} .*empty"):
        run([tmp_path / f"{i}.txt" for i in range(len(texts))], tmp_path / "out")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sources": []}, "sources must name at least one"),
        ({"vocab_size": 0}, r"vocab_size must be at least 257 .*got 0"),
        ({"vocab_size": 256}, "vocab_size must be at least 257 .*got 256"),
        ({"val_fraction": 0.0}, "val_fraction must lie between 0 and 1, got 0.0"),
        ({"val_fraction": 1.0}, "val_fraction must lie between 0 and 1, got 1.0"),
        ({"val_fraction": float("nan")}, "val_fraction must lie between 0 and 1, got nan"),
        ({"workers": 0}, "workers must be at least 1, got 0"),
        ({"shard_tokens": 0}, "shard_tokens must be at least 1, got 0"),
        ({"tokenizer": "t"}, "give tokenizer or vocab_size"),
    ],
)
def test_bad_options_are_named_before_anything_is_written(corpus, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        run(**{"sources": [corpus], "out": tmp_path / "out"} | options)
    assert not (tmp_path / "out").exists()


def test_bad_output_is_named(corpus, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"out must be a folder, but .*file is a file"):
        run([corpus], tmp_path / "file")
    with pytest.raises(ValueError, match="is not empty and was not begun by prepare"):
        run([corpus], _home(tmp_path / "home"))


def _home(folder):
    folder.mkdir()
    (folder / "photo.jpg").write_text("")
    return folder


def test_a_second_run_in_the_same_folder_is_refused(corpus, tmp_path):
    (tmp_path / "out").mkdir()
    descriptor = os.open(tmp_path / "out", os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    try:
        with pytest.raises(RuntimeError, match="in use by another process"):
            run([corpus], tmp_path / "out")
    finally:
        os.close(descriptor)
    run([corpus], tmp_path / "out")


def test_a_full_disk_leaves_nothing_half_written_and_can_go_on(corpus, tmp_path, monkeypatch):
    run([corpus], tmp_path / "whole", shard_tokens=3000)
    synced = []

    def fsync(descriptor):
        synced.append(descriptor)
        if len(synced) == 20:
            raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        with pytest.raises(OSError, match=r"no room to write .*No space left"):
            run([corpus], tmp_path / "out", shard_tokens=3000)
    whole, part = files_of(tmp_path / "whole"), files_of(tmp_path / "out")
    assert all(part[name] == whole[name] for name in part if not name.endswith(".tmp"))
    assert "manifest.json" not in part
    run([corpus], tmp_path / "out", shard_tokens=3000)
    assert files_of(tmp_path / "out") == whole


def test_prepare_works_outside_the_main_thread(corpus, tmp_path):
    thread = threading.Thread(target=run, args=([corpus], tmp_path / "out"))
    thread.start()
    thread.join()
    assert load_manifest(tmp_path / "out").splits["train"].documents > 200
