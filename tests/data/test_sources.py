"""Every kind of source gives the same documents, from any position; bad input names its place."""

import gzip
import hashlib
import json
import random
import subprocess
import sys
import sysconfig
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gdn2.data import packed
from gdn2.data.sources import START, Corpus, Position, find_source

TEXTS = ["first", "zwei \u00e9\u4e16\r\n", "x" * 5000, "<|endoftext|>", "last\n"]


def write_text(folder, texts):
    for i, text in enumerate(texts):
        (folder / f"{i}.txt").write_bytes(text.encode())


def write_text_gz(folder, texts):
    for i, text in enumerate(texts):
        (folder / f"{i}.md.gz").write_bytes(gzip.compress(text.encode()))


def write_jsonl(folder, texts):
    lines = [json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(texts)]
    (folder / "a.jsonl").write_text("".join(lines))


def write_jsonl_gz(folder, texts):
    data = "\n\n".join(json.dumps({"text": text}) for text in texts)  # blank lines, no last newline
    (folder / "a.jsonl.gz").write_bytes(gzip.compress(data.encode()))


def write_text_zst(folder, texts):
    for i, text in enumerate(texts):
        (folder / f"{i}.py.ZST").write_bytes(packed.zstd.compress(text.encode()))


def write_jsonl_zst(folder, texts):
    """In frames that lines do not respect, as a parallel compressor writes them."""
    data = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    frames = [packed.zstd.compress(data[i : i + 1000]) for i in range(0, len(data), 1000)]
    (folder / "a.jsonl.zst").write_bytes(b"".join(frames))


def write_parquet(folder, texts):
    table = pa.table({"id": list(range(len(texts))), "text": texts, "score": [0.5] * len(texts)})
    pq.write_table(table.slice(0, 3), folder / "a.parquet", row_group_size=2)
    pq.write_table(table.slice(3), folder / "b.parquet")


def write_dictionary_parquet(folder, texts):
    column = pa.array(texts, pa.large_string()).dictionary_encode()
    pq.write_table(pa.table({"text": column}), folder / "a.parquet", row_group_size=2)


WRITERS = [
    write_text,
    write_text_gz,
    write_jsonl,
    write_jsonl_gz,
    write_text_zst,
    write_jsonl_zst,
    write_parquet,
    write_dictionary_parquet,
]


def corpus_of(*names, column="text"):
    return Corpus([find_source(name, Path("nowhere")) for name in names], column)


@pytest.mark.parametrize("write", WRITERS)
def test_every_format_gives_the_same_documents_from_every_position(tmp_path, write):
    write(tmp_path, TEXTS)
    corpus = corpus_of(tmp_path)
    documents = list(corpus.documents())
    assert [d.text for d in documents] == TEXTS
    assert [d.text for d in corpus.documents()] == TEXTS
    for i, document in enumerate(documents):
        assert [d.text for d in corpus.documents(document.next)] == TEXTS[i + 1 :]
    offsets = [d.offset for d in documents]
    assert offsets == sorted(offsets)
    assert offsets[-1] == corpus.num_bytes


def test_a_file_and_several_sources_keep_their_order(tmp_path):
    for name in ("b", "a"):
        (tmp_path / name).mkdir()
        write_jsonl(tmp_path / name, [name + "1", name + "2"])
    (tmp_path / "notes").write_text("any suffix")
    corpus = corpus_of(tmp_path / "b", tmp_path / "notes", tmp_path / "a")
    assert [d.text for d in corpus.documents()] == ["b1", "b2", "any suffix", "a1", "a2"]


def test_a_folder_is_read_by_name_without_hidden_and_unknown_files(tmp_path):
    for name in ("z.txt", "sub/a.py", "a.rst", ".hidden.txt", ".git/c.txt", "img.png", "m.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "link.md").symlink_to(tmp_path / "a.rst")
    (tmp_path / "broken.md").symlink_to(tmp_path / "nowhere")
    source = find_source(tmp_path, Path("nowhere"))
    assert source.files == ("a.rst", "link.md", "sub/a.py", "z.txt")


def test_records_without_text_are_skipped_and_counted(tmp_path):
    table = pa.table({"text": pa.array([b"ok", None, b"", b" \n", b"\xff"]).cast(pa.binary())})
    broken = table.column("text").combine_chunks().view(pa.string())
    pq.write_table(pa.table({"text": broken}), tmp_path / "a.parquet")
    (tmp_path / "b.jsonl").write_text('{"text": null}\n{"text": "\\ud800"}\n{"text": "fine"}\n')
    (tmp_path / "c.txt").write_bytes(b"caf\xe9")
    (tmp_path / "d.txt").write_bytes(b"\xef\xbb\xbfwith a byte order mark")
    found = [d.text or d.skipped for d in corpus_of(tmp_path).documents()]
    parquet = ["ok", "null", "empty", "empty", "not_utf8"]
    assert found == [*parquet, "null", "not_utf8", "fine", "not_utf8", "with a byte order mark"]


def test_stdlib_is_the_interpreters_own_without_tests():
    source = find_source("stdlib", Path("nowhere"))
    root = Path(sysconfig.get_paths()["stdlib"])
    excluded = {"test", "tests", "idlelib", "site-packages", "__pycache__"}
    expected = [p for p in root.rglob("*.py") if not excluded & set(p.relative_to(root).parts)]
    assert "argparse.py" in source.files
    assert source.paths == sorted(expected, key=lambda p: p.relative_to(root).as_posix())
    fingerprint = source.fingerprint()
    data = b"".join(path.read_bytes() for path in source.paths)
    assert fingerprint["bytes"] == len(data)
    assert fingerprint["sha256"] == hashlib.sha256(data).hexdigest()


def test_a_folder_called_stdlib_is_dot_slash_stdlib(tmp_path, monkeypatch):
    (tmp_path / "stdlib").mkdir()
    (tmp_path / "stdlib" / "mine.txt").write_text("mine")
    monkeypatch.chdir(tmp_path)
    assert find_source("./stdlib", Path("out")).files == ("mine.txt",)
    assert "argparse.py" in find_source("stdlib", Path("out")).files


def test_fingerprint_sees_names_sizes_and_contents(tmp_path):
    (tmp_path / "a.txt").write_text("one")
    first = find_source(tmp_path, Path("nowhere")).fingerprint()
    (tmp_path / "a.txt").write_text("two")
    other = find_source(tmp_path, Path("nowhere")).fingerprint()
    assert other["listing_sha256"] == first["listing_sha256"]
    assert other["sha256"] != first["sha256"]
    (tmp_path / "a.txt").rename(tmp_path / "b.txt")
    renamed = find_source(tmp_path, Path("nowhere")).fingerprint()
    assert renamed["listing_sha256"] != other["listing_sha256"]


@pytest.mark.parametrize("limit", [200, 1000, 10**6])
def test_a_sample_takes_its_share_of_every_file(tmp_path, limit):
    for name in "abc":
        lines = [json.dumps({"text": f"{name}{i:08d}"}) for i in range(100)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    sample = list(corpus_of(tmp_path).sample(limit))
    size = sum(map(len, sample))
    assert size == 2700 if limit > 2700 else limit <= size < limit + 9
    for name in "abc":
        own = sum(len(text) for text in sample if text.startswith(name))
        assert abs(own - size / 3) <= 9


def test_many_small_files_do_not_exceed_the_sample(tmp_path):
    for i in range(50):
        (tmp_path / f"{i:02d}.txt").write_text("x" * 100)
    assert len(list(corpus_of(tmp_path).sample(1000))) == 10


def lines(path, *texts):
    path.write_text("\n".join(texts))
    return path


def parquet(path, **columns):
    pq.write_table(pa.table(columns), path)
    return path


def contents(path, data):
    path.write_bytes(data)
    return path


def bad_parquet_page(path):
    parquet(path, text=[str(i) * 50 for i in range(1000)])
    data = bytearray(path.read_bytes())
    data[8:2000] = bytes(1992)
    return contents(path, bytes(data))


def bad_zst_block(path):
    """A header that is right, and a body that is not."""
    data = bytearray(packed.zstd.compress(random.Random(0).randbytes(10**5).hex().encode()))
    data[len(data) // 2 :] = bytes(len(data) - len(data) // 2)
    return contents(path, bytes(data))


BAD = {
    "json": (lambda d: lines(d / "a.jsonl", '{"text": "a"}', "{"), r"a\.jsonl:2 is not JSON"),
    "json_utf8": (
        lambda d: contents(d / "a.jsonl", b'{"text": "\xff"}'),
        r"a\.jsonl:1 is not JSON",
    ),
    "json_list": (lambda d: lines(d / "a.json", "["), r"a\.json:1 is not JSON"),
    "json_column": (
        lambda d: lines(d / "a.jsonl", '{"body": "a"}'),
        r"a\.jsonl:1 has no column 'text'; it has: body",
    ),
    "json_array": (lambda d: lines(d / "a.jsonl", "[1]"), r"a\.jsonl:1 has no .* it has: list"),
    "json_number": (lambda d: lines(d / "a.jsonl", '{"text": 1}'), r"'text' is int, expected text"),
    "gzip": (lambda d: contents(d / "a.jsonl.gz", b"no gzip"), r"a\.jsonl\.gz is broken"),
    "gzip_cut": (
        lambda d: contents(d / "a.txt.gz", gzip.compress(bytes(range(256)) * 9)[:-20]),
        r"a\.txt\.gz is broken",
    ),
    "gzip_body": (
        lambda d: contents(d / "a.txt.gz", gzip.compress(b"")[:10] + b"\xff" * 50),
        r"a\.txt\.gz is broken",
    ),
    "zst": (lambda d: contents(d / "a.jsonl.zst", b"no zstd at all"), r"a\.jsonl\.zst is broken"),
    "zst_is_gzip": (
        lambda d: contents(d / "a.txt.zst", gzip.compress(b"text")),
        r"a\.txt\.zst is broken",
    ),
    "zst_cut": (
        lambda d: contents(d / "a.txt.zst", packed.zstd.compress(bytes(range(256)) * 9)[:-20]),
        r"a\.txt\.zst is broken: Compressed file ended",
    ),
    "zst_empty": (lambda d: contents(d / "a.txt.zst", b""), r"a\.txt\.zst is broken"),
    "zst_body": (lambda d: bad_zst_block(d / "a.jsonl.zst"), r"a\.jsonl\.zst is broken"),
    "parquet": (lambda d: contents(d / "a.parquet", b"PAR1 not"), r"a\.parquet is not Parquet"),
    "parquet_page": (lambda d: bad_parquet_page(d / "a.parquet"), r"a\.parquet is broken"),
    "parquet_column": (
        lambda d: parquet(d / "a.parquet", body=["a"], id=[1]),
        r"a\.parquet has no column 'text'; it has: body, id",
    ),
    "parquet_type": (
        lambda d: parquet(d / "a.parquet", text=[1]),
        r"a\.parquet: column 'text' is int64, expected string",
    ),
    "empty_folder": (lambda d: d, r"has no file that ends in .*found: nothing"),
    "other_folder": (lambda d: contents(d / "a.png", b"").parent, r"found: 1 x \.png"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named_in_one_line(tmp_path, case):
    make, message = BAD[case]
    with pytest.raises(ValueError, match=message) as raised:
        list(corpus_of(make(tmp_path)).documents())
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", ["b.txt.gz", "b.jsonl.zst"])
def test_what_is_not_compressed_is_refused_before_anything_is_read(tmp_path, name):
    (tmp_path / "a.txt").write_text("fine")
    (tmp_path / name).write_text("plain text")
    with pytest.raises(ValueError, match=f"{name} is broken"):
        corpus_of(tmp_path)


def test_a_missing_zstd_package_is_named_before_anything_is_read(tmp_path, monkeypatch):
    write_jsonl_zst(tmp_path, TEXTS)
    monkeypatch.setattr(packed, "zstd", None)
    with pytest.raises(ImportError, match=r"a\.jsonl\.zst needs .* pip install 'gdn2\[data\]'"):
        corpus_of(tmp_path)


def test_missing_source_is_named():
    with pytest.raises(FileNotFoundError, match="source nothing/here does not exist"):
        find_source("nothing/here", Path("out"))


def test_unreadable_file_is_named(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("secret")
    monkeypatch.setattr("os.access", lambda *_: False)  # root may read everything
    with pytest.raises(ValueError, match=r"a\.txt is not readable: permission denied"):
        find_source(tmp_path, Path("out"))


def test_a_file_given_twice_is_named(tmp_path):
    write_text(tmp_path, ["a", "b"])
    with pytest.raises(ValueError, match=r"1\.txt is given twice"):
        corpus_of(tmp_path, tmp_path / "1.txt")


def test_output_inside_a_source_folder_is_refused(tmp_path):
    write_text(tmp_path, ["a"])
    with pytest.raises(ValueError, match="lies inside the source folder"):
        find_source(tmp_path, tmp_path / "out")


def test_parquet_skips_row_groups_before_the_position(tmp_path):
    pq.write_table(pa.table({"text": list("abcdef")}), tmp_path / "a.parquet", row_group_size=2)
    corpus = corpus_of(tmp_path)
    assert [d.text for d in corpus.documents(Position(0, 3))] == ["d", "e", "f"]
    assert next(corpus.documents(START)).next == Position(0, 1)


def test_data_imports_neither_torch_nor_a_model():
    """Workers import this package: torch there would cost seconds and memory each."""
    code = "import gdn2.data, sys; print('torch' in sys.modules, 'transformers' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["False", "False"]
