"""The pure half of the recipe: from the members of an archive to documents."""

import gzip
import io
import json
import sys
import tarfile
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from recipes import prose_corpus
from recipes.prose_corpus import (
    addresses,
    brown,
    chapters,
    collect,
    essays,
    main,
    members,
    without_markdown,
    without_tags,
)


def archive(files: dict[str, bytes]) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as tar:
        folder = tarfile.TarInfo("package/empty")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return stream.getvalue()


def test_members_are_files_by_name_whatever_the_order_in_the_archive():
    files = {"package/b/2.json": b"two", "package/a/1.json": b"one"}
    assert list(members(archive(files))) == [("1.json", b"one"), ("2.json", b"two")]


@pytest.mark.parametrize(
    ("tagged", "plain"),
    [
        ("\tThe/at jury/nn said/vbd ./.", "The jury said."),
        ("\tOne/cd\ntwo/cd\n\n\tThree/cd", "One two\n\nThree"),
        ("\t1/2/cd and/cc either/or/cc", "1/2 and either/or"),
        ("\t``/`` Stop/vb !/. !/. ''/'' he/pps said/vbd", '"Stop!" he said'),
        ("\ta/at (/( b/nn )/) ,/, c/nn ;/. ;/.", "a (b), c;"),
        ("", ""),
    ],
)
def test_brown_loses_its_tags_and_its_spaces_before_marks(tagged, plain):
    assert without_tags(tagged) == plain


@pytest.mark.parametrize(
    ("markdown", "plain"),
    [
        ("# Title\n\nSome *text*\nhere", "Title\n\nSome *text* here"),
        ("> quoted\n> twice", "quoted twice"),
        ("**bold** and _slanted_, snake_case", "bold and slanted, snake_case"),
        ("see [the page](http://a.b/c) .", "see the page."),
        ("they co-\noperate", "they co-operate"),
        ("text\n\n| a | b |\n\n\u2039 back\n\n***\n\nmore", "text\n\nmore"),
        (r"an escaped \[mark\]", "an escaped [mark]"),
    ],
)
def test_markdown_becomes_prose(markdown, plain):
    assert without_markdown(markdown) == plain


def test_each_source_takes_its_documents_and_nothing_else():
    speech = json.dumps({"text": "Fellow citizens"}).encode()
    files = [("1790_washington.json", speech), ("package.json", b"{}")]
    assert list(addresses(iter(files))) == [("1790_washington", "Fellow citizens")]

    chapter = json.dumps({"title": "Loomings", "text": "Call me Ishmael."}).encode()
    files = [("chapter_1.json", chapter), ("package.json", b"{}")]
    assert list(chapters(iter(files))) == [("chapter_1", "Loomings\n\nCall me Ishmael.")]

    files = [("ca01", b"\tThe/at jury/nn"), ("cats.txt", b"x/nn"), ("cz01", b"x/nn")]
    assert list(brown(iter(files))) == [("ca01", "The jury")]

    long = "An essay. " * 200
    files = [
        ("short.md", b"too short"),
        ("links.md", long.encode()),
        ("one.md", long.encode()),
        ("two.md.gz", gzip.compress(long.encode())),
        ("three.html", long.encode()),
    ]
    assert list(essays(iter(files))) == [("one", long.strip()), ("two", long.strip())]


@pytest.fixture
def two_sources(monkeypatch):
    """One that answers with five documents and one that can not be had."""

    def there(package):
        return f"npm:{package}", iter([(str(n), b"Four words are here.") for n in range(5)])

    def gone(package):
        raise RuntimeError("404")

    def parse(files):
        return ((name, data.decode()) for name, data in files)

    sources = [(there, "@a/b@1.0", "https://x/", parse), (gone, "c", "https://y/", parse)]
    monkeypatch.setattr(prose_corpus, "SOURCES", sources)


def test_rows_are_those_that_can_be_had_in_the_order_of_their_ids(two_sources, capsys):
    rows = collect()
    assert "left out c: 404" in capsys.readouterr().err
    assert [row["id"] for row in rows] == sorted({row["id"] for row in rows})
    assert {row["url"] for row in rows} == {f"https://x/@a/b#{n}" for n in range(5)}
    assert {(row["dump"], row["token_count"]) for row in rows} == {("npm:@a/b@1.0", 5)}


def test_the_files_have_every_row_once_and_the_columns(two_sources, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["prose_corpus.py", str(tmp_path / "out")])
    assert main() == 1, "too little text"
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(prose_corpus, "MIN_BYTES", 100)
    assert main() == 0
    tables = [pq.read_table(path) for path in sorted(Path(tmp_path / "out").iterdir())]
    assert [table.num_rows for table in tables] == [2, 2, 1, 0]
    assert all(table.schema == prose_corpus.SCHEMA for table in tables)
    assert [row for table in tables for row in table.to_pylist()] == collect()
