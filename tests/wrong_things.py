"""Files, prepared folders, runs and checkpoints with one flaw each: what wrong input is made of."""

import gzip
import json
import os
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.torch import load, save

from gdn2.data import packed

TEXT = "The gate opens and the state decays. The gate closes and the state remains.\n"
WORDS = {"long": "x" * 300, "deep": "[" * 100_000, "digits": "9" * 400}


class Things:
    """`things[name]` makes a file or folder once, from the prepared data and the finished run."""

    def __init__(self, root: Path, data: Path, run: Path) -> None:
        self.root = root
        self.made = {"data": data, "run": run, "texts": data.parent / "texts.jsonl"}

    def expand(self, line: str, out: Path) -> list[str]:
        """The words of a command line."""

        def replace(match: re.Match[str]) -> str:
            name = match[1]
            return WORDS[name] if name in WORDS else str(out if name == "out" else self[name])

        return [re.sub(r"\{([\w:.]+)\}", replace, word) for word in shlex.split(line)]

    def __getitem__(self, name: str) -> Path:
        if name not in self.made:
            kind, _, flaw = name.partition(":")
            self.made[name] = getattr(self, kind)(flaw) if flaw else self.file(name)
        return self.made[name]

    def file(self, name: str) -> Path:
        path = self.root / name
        content = FILES[name]
        if content is None:
            os.mkfifo(path)
        elif isinstance(content, pa.Table):
            pq.write_table(content, path)
        elif isinstance(content, bytes):
            path.write_bytes(content)
        else:
            path.mkdir()
            for file in content:
                (path / file).write_bytes(JUNK)
        return path

    def data(self, flaw: str) -> Path:
        folder = self.copy("data", flaw)
        spoil(folder, flaw, DATA_FLAWS)
        return folder

    def journal(self, flaw: str) -> Path:
        folder = self.root / f"journal-{flaw}"
        folder.mkdir()
        (folder / "journal.json.tmp").write_bytes(JOURNALS[flaw])
        return folder

    def tokenizer(self, flaw: str) -> Path:
        folder = self.copy("data/tokenizer", flaw)
        spoil(folder, flaw, TOKENIZER_FLAWS)
        return folder

    def run(self, flaw: str) -> Path:
        folder = self.copy("run", flaw)
        spoil(folder, flaw, RUN_FLAWS)
        return folder

    def hf(self, flaw: str) -> Path:
        folder = self.copy("run/final", flaw)
        spoil(folder, flaw, HF_FLAWS)
        return folder

    def step(self, flaw: str) -> Path:
        folder = self.copy(f"run/{STEP}", flaw)
        spoil(folder, flaw, STEP_FLAWS)
        return folder

    def copy(self, what: str, flaw: str) -> Path:
        first, *rest = what.split("/")
        source = self.made[first].joinpath(*rest)
        return Path(shutil.copytree(source, self.root / f"{what.replace('/', '-')}-{flaw}"))


def spoil(folder: Path, flaw: str, flaws: dict[str, dict[str, Any]]) -> None:
    """A flaw is {file: bytes, or None to delete it, or a function of its bytes, or of its JSON}."""
    for name, change in flaws[flaw].items():
        path = folder / name
        if change is None:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        elif isinstance(change, bytes):
            path.write_bytes(change)
        elif isinstance(change, dict):
            path.write_text(json.dumps(merge(json.loads(path.read_text()), change)))
        else:
            path.write_bytes(change(path.read_bytes()))


ABSENT = object()


def merge(tree: dict, change: dict) -> dict:
    """`tree` with the leaves of `change`; ABSENT deletes."""
    for name, value in change.items():
        if value is ABSENT:
            del tree[name]
        elif isinstance(value, dict) and isinstance(tree.get(name), dict):
            merge(tree[name], value)
        else:
            tree[name] = value
    return tree


JUNK = bytes(range(256)) * 8
LINES = b"".join(json.dumps({"text": f"{n}. {TEXT}"}).encode() + b"\n" for n in range(2000))
FILES: dict[str, object] = {
    "fifo": None,
    "folder": [],
    "pictures": ["a.png", "b"],
    "empty.txt": b"",
    "one.txt": TEXT.encode(),
    "junk.txt": JUNK,
    "utf16.txt": TEXT.encode("utf-16"),
    "junk.jsonl": JUNK,
    "utf16.jsonl": LINES.decode().encode("utf-16"),
    "deep.jsonl": b'{"text": ' + WORDS["deep"].encode() + b"\n",
    "digits.jsonl": b'{"text": ' + b"9" * 10_000 + b"}\n",
    "numbers.jsonl": b'{"text": 1}\n',
    "arrays.jsonl": b"[1]\n",
    "cut.jsonl": LINES[:-9],
    "junk.parquet": JUNK,
    "empty.parquet": b"",
    "body.parquet": pa.table({"body": ["a", "b"]}),
    "numbers.parquet": pa.table({"text": [1, 2]}),
    "norows.parquet": pa.table({"text": pa.array([], pa.string())}),
    "plain.txt.gz": b"text",
    "plain.txt.zst": b"text",
    "cut.jsonl.gz": gzip.compress(LINES)[:-100],
    "cut.jsonl.zst": packed.zstd.compress(LINES)[:-100],
}
JOURNALS = {
    "junk": JUNK,
    "empty": b"",
    "list": b"[]",
    "keys": b'{"request": {}, "sections": []}',
}


def first_shard(split: str, **changes: object) -> Callable[[bytes], bytes]:
    def change(text: bytes) -> bytes:
        tree = json.loads(text)
        tree["splits"][split]["shards"][0] |= changes
        return json.dumps(tree).encode()

    return change


DATA_FLAWS: dict[str, dict[str, Any]] = {
    "junk": {"manifest.json": JUNK},
    "empty": {"manifest.json": b""},
    "list": {"manifest.json": b"[]"},
    "deep": {"manifest.json": WORDS["deep"].encode()},
    "version": {"manifest.json": {"version": 2}},
    "missing": {"manifest.json": {"separator": ABSENT}},
    "types": {"manifest.json": {"vocab_size": "many"}},
    "splits": {"manifest.json": {"splits": []}},
    "split": {"manifest.json": {"splits": {"validation": ABSENT}}},
    "shards": {"manifest.json": {"splits": {"train": {"shards": [1]}}}},
    "negative": {"manifest.json": {"splits": {"train": {"tokens": -1}}}},
    "dtype": {"manifest.json": {"dtype": "object"}},
    "separator": {"manifest.json": {"separator": 10**6}},
    "extra": {"manifest.json": {"sauce": 1}},
    "outside": {"manifest.json": first_shard("train", file="../../../etc/passwd")},
    "outvalidation": {"manifest.json": first_shard("validation", tokens="5")},
    "noshard": {"train/00000.ds": None},
    "cutshard": {"train/00000.ds": lambda data: data[:-7]},
    "othershard": {"train/00000.ds": lambda data: bytes(len(data))},
    "noindex": {"train/00000.ds.index": None},
    "badindex": {"train/00000.ds.index": lambda data: bytes(len(data))},
    "novalidation": {"validation/00000.ds": None},
    "cutvalidation": {"validation/00000.ds": lambda data: data[:-7]},
    "notokenizer": {"tokenizer/tokenizer.json": None},
    "badsettings": {"tokenizer/tokenizer_config.json": b"{"},
    "othertokenizer": {"tokenizer/tokenizer.json": lambda data: data + b"\n"},
}
TOKENIZER_FLAWS: dict[str, dict[str, Any]] = {
    "nospecial": {"tokenizer_config.json": {"bos_token": None, "eos_token": None}},
    "list": {"tokenizer_config.json": b"[1]"},
    "junk": {"tokenizer_config.json": JUNK},
    "number": {"tokenizer_config.json": {"bos_token": 5}},
    "object": {"tokenizer_config.json": {"bos_token": {"x": 1}}},
    "absent": {"tokenizer_config.json": {"bos_token": "<nothing>"}},
    "slow": {"tokenizer.json": None, "vocab.json": b"{}"},
}
STEP = "checkpoints/step_00000002"
RUN_FLAWS: dict[str, dict[str, Any]] = {
    "nosteps": {f"{STEP}/config.json": None},
    "configjunk": {"config.json": JUNK},
    "configlist": {"config.json": b"[]"},
    "metrics": {"final": None, "metrics.jsonl": b"junk\n"},
    "stepdata": {"final": None, f"{STEP}/__0_0.distcp": lambda data: data[:1000]},
    "stepmetadata": {"final": None, f"{STEP}/.metadata": JUNK},
    "configshape": {"config.json": b'{"run": [], "data": 1}'},
}


def tensors(change: Callable[[dict], object]) -> Callable[[bytes], bytes]:
    def rewrite(data: bytes) -> bytes:
        state = load(data)
        change(state)
        return save(state, {"format": "pt"})

    return rewrite


def a_matrix(state: dict) -> str:
    return next(name for name in state if name.endswith("q_proj.weight"))


HF_FLAWS: dict[str, dict[str, Any]] = {
    "junk": {"config.json": JUNK},
    "empty": {"config.json": b""},
    "list": {"config.json": b"[]"},
    "number": {"config.json": b"5"},
    "binary": {"config.json": b"\x00" * 64},
    "deep": {"config.json": WORDS["deep"].encode()},
    "other": {"config.json": {"model_type": "llama"}},
    "typed": {"config.json": {"model_type": ["gdn2"]}},
    "key": {"config.json": {"hiden_size": 3}},
    "type": {"config.json": {"hidden_size": "wide"}},
    "zero": {"config.json": {"num_heads": 0}},
    "nan": {"config.json": {"norm_eps": float("nan")}},
    "mixers": {"config.json": {"mixers": ["lstm"]}},
    "huge": {"config.json": {"hidden_size": 10**18}},
    "layers": {"config.json": {"num_hidden_layers": 10**9}},
    "noweights": {"model.safetensors": None},
    "emptyweights": {"model.safetensors": b""},
    "junkweights": {"model.safetensors": JUNK},
    "cutweights": {"model.safetensors": lambda data: data[:-100]},
    "lessweights": {"model.safetensors": tensors(lambda state: state.pop(a_matrix(state)))},
    "moreweights": {"model.safetensors": tensors(lambda s: s.update(extra=torch.ones(3)))},
    "otherweights": {
        "model.safetensors": tensors(lambda s: s.update({a_matrix(s): torch.ones(3)}))
    },
    "nanweights": {"model.safetensors": tensors(lambda s: s[a_matrix(s)].fill_(float("nan")))},
    "wider": {"config.json": {"hidden_size": 64}},
    "notokenizer": {"tokenizer.json": None},
    "junktokenizer": {"tokenizer.json": JUNK},
    "junkconfig": {"tokenizer_config.json": JUNK},
    "norun": {"run.json": None},
    "runjunk": {"run.json": JUNK},
    "runlist": {"run.json": b"[1]"},
    "runkeys": {"run.json": b'{"run": {}}'},
    "rundeep": {"run.json": WORDS["deep"].encode()},
    "runlength": {"run.json": {"run": {"data": {"sequence_length": "long"}}}},
    "runnegative": {"run.json": {"run": {"data": {"sequence_length": -1}}}},
    "runhuge": {"run.json": {"run": {"data": {"sequence_length": 10**12}}}},
    "runpath": {"run.json": {"data": {"path": 7}}},
    "rungone": {"run.json": {"data": {"path": "/gone"}}},
}
STEP_FLAWS: dict[str, dict[str, Any]] = {
    "nometadata": {".metadata": None},
    "junkmetadata": {".metadata": JUNK},
    "emptymetadata": {".metadata": b""},
    "nodata": {"__0_0.distcp": None},
    "cutdata": {"__0_0.distcp": lambda data: data[:1000]},
    "junkdata": {"__0_0.distcp": lambda data: JUNK * (len(data) // len(JUNK))},
    "noconfig": {"config.json": None},
    "other": {"config.json": {"num_heads": 1, "num_v_heads": 1}},
    "wider": {"config.json": {"hidden_size": 64}},
}
