"""Train small models on this machine's own Python library, and compare them.

Everything that takes time is a `gdn2` command, called in this process: it is printed, the report
lists it, and it goes on where it was interrupted.
"""

import json
import math
import os
import platform
import shlex
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from gdn2 import cli
from gdn2.data import Encoder, TokenDataset, load_encoder
from gdn2.evals.sampling import Sampling, sample_text
from gdn2.models.accounting import account
from gdn2.models.loading import load_checkpoint
from gdn2.presets import PRESETS, load_preset
from gdn2.train import Run
from gdn2.train.record import commit
from recipes.demo.baselines import ByteNgram, compressed_bits_per_byte
from recipes.demo.corpus import seen_documents, split_documents
from recipes.demo.report import BASELINES, Report, Twin, write_report

TWINS = MappingProxyType(  # name in the report -> preset
    {
        "gdn2": "demo_gdn2",
        "kda": "demo_kda",
        "gated_deltanet": "demo_gated_deltanet",
        "gdn2_hybrid": "demo_gdn2_hybrid",
    }
)
ALL_TWINS = MappingProxyType(
    {name.removeprefix("demo_"): name for name in PRESETS if name.startswith("demo_")}
)
TITLES = {  # of the systems, each of which has a colour
    "gdn2": "GDN-2",
    "kda": "KDA",
    "gated_deltanet": "Gated DeltaNet",
    "deltanet": "DeltaNet",
    "mamba2": "Mamba-2",
    "mamba3_siso": "Mamba-3 SISO",
    "mamba3_mimo": "Mamba-3 MIMO",
    "transformer": "Transformer",
    "sliding_window": "Sliding window",
}
VALIDATION_FRACTION = 0.05  # the usual 1% is half a dozen files of the standard library
PROMPTS = ("import ", "def ")
SAMPLING = Sampling(max_new_tokens=160, temperature=0.8, top_p=0.95)
SMOOTHING = 0.05  # weight of one step in the running mean of the plotted loss
PLOTTED_POINTS = 400


class CommandFailed(Exception):
    """A command ended with this exit code; what is wrong has been said."""


def run_demo(out: Path, *, source: str = "stdlib", twins: Mapping[str, str] = TWINS) -> Report:
    """Prepare, train, evaluate, sample; write report.json and report.html into `out`."""
    console = Console()
    data = out / "data"
    runs = {name: load_preset(preset) for name, preset in twins.items()}
    first = next(iter(runs.values()))
    tokenizer = ["--vocab-size", first.model.vocab_size]
    commands = [
        (
            data,
            ["prepare", source, "--out", data, *tokenizer, "--val-fraction", VALIDATION_FRACTION],
        ),
        *(
            (out / name, ["train", twins[name], "--data", data, "--out", out / name])
            for name in runs
        ),
        *((out / name, ["eval", out / name]) for name in runs),
    ]
    origin = _origin([out / name for name in runs])
    lines = []
    for folder, command in commands:
        words = [str(word) for word in command]
        lines.append(shlex.join(["gdn2", *words]))
        console.print(f"\n[bold]$ {escape(lines[-1])}[/]", soft_wrap=True)
        begun = folder.exists()
        code = cli.main(words)
        if code == 2 and begun:
            _say(f"if the demo has changed since {folder} was begun, delete {folder}, run it again")
        if code:
            raise CommandFailed(code)

    console.print("\nsampling, gzip, xz and the 5-gram", soft_wrap=True)
    encoder = load_encoder(data / "tokenizer")
    training, validation = TokenDataset(data, "train"), TokenDataset(data, "validation")
    texts = split_documents(validation, encoder)
    seen = seen_documents(training, encoder, first)
    report = Report(
        twins=[_twin(name, run, out / name, training, encoder) for name, run in runs.items()],
        baselines={
            **compressed_bits_per_byte(texts),
            "ngram5": ByteNgram(seen).bits_per_byte(texts),
        },
        validation_bytes=validation.num_bytes,
        validation_documents=validation.num_documents,
        training_bytes=sum(map(len, seen)),
        sequence_length=first.data.sequence_length,
        sampling=f"temperature {SAMPLING.temperature}, top-p {SAMPLING.top_p}",
        machine=_machine(),
        versions=origin["versions"],
        commit=origin["commit"],
        commands=lines,
    )
    write_report(report, out)
    _show(report, console)
    console.print(f"report: {(out / 'report.html').resolve()}", soft_wrap=True)
    return report


def _origin(folders: Sequence[Path]) -> dict[str, Any]:
    """The commit and the versions that all twins come from: one of them, or nothing compares.

    A twin that is not finished will also come from the code that runs now.
    """
    packages = ("torch", "transformers", "numpy")
    versions = {name: metadata.version(name) for name in packages}
    now = {"python": platform.python_version(), **versions}, commit()
    origins = {}
    for folder in folders:
        records = [folder / "config.json", folder / "final" / "run.json"]
        origins[folder] = [_recorded(record) if record.is_file() else now for record in records]
    first, *others = [origin for both in origins.values() for origin in both]
    if any(origin != first for origin in others):
        old = [folder for folder, both in origins.items() if both != [now, now]]
        _say(
            "the twins would come from different commits or versions and could not be compared: "
            f"delete {' and '.join(map(str, old))}, run it again"
        )
        raise CommandFailed(2)
    return {"versions": first[0], "commit": first[1] or "unknown"}


def _recorded(path: Path) -> tuple[dict[str, str], str | None]:
    record = json.loads(path.read_text(encoding="utf-8"))
    return record["versions"], record["commit"]


def _say(what: str) -> None:
    print(f"demo: {what}", file=sys.stderr)


def _twin(name: str, run: Run, folder: Path, training: TokenDataset, encoder: Encoder) -> Twin:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    scores = json.loads((folder / "eval.json").read_text())
    sizes = account(run.model, length=run.data.sequence_length, dtype=torch.float32)
    model, _ = load_checkpoint(folder)
    samples = []
    for seed, prompt in enumerate(PROMPTS):
        text: list[str] = []
        sample_text(model, encoder, prompt, replace(SAMPLING, seed=seed), on_text=text.append)
        samples.append((prompt, "".join(text)))
    system = name.removesuffix("_hybrid")
    hybrid = system != name
    return Twin(
        name=name,
        title=TITLES[system] + " + window" * hybrid,
        color=list(TITLES).index(system),
        dashed=hybrid,
        parameters=sizes["parameters"]["total"],
        state_bytes=sizes["state_bytes"]["total"],
        bits_per_byte=scores["bits_per_byte"],
        perplexity=scores["perplexity"],
        by_position=scores["by_position"],
        tokens_per_second=statistics.median(row["tokens_per_second"] for row in rows),
        curve=_curve(rows, bits=training.num_tokens / training.num_bytes / math.log(2)),
        samples=samples,
    )


def _curve(rows: Sequence[dict[str, Any]], *, bits: float) -> list[tuple[float, float]]:
    """Running mean of the loss in bits per byte; `bits` of them are a nat per token."""
    points, total, weight = [], 0.0, 0.0
    for row in rows:
        total += SMOOTHING * (row["loss"] - total)
        weight += SMOOTHING * (1 - weight)  # the share of `total` that is not its initial zero
        points.append((row["tokens"], bits * total / weight))
    return points[:: -(-len(points) // PLOTTED_POINTS)]


def _machine() -> dict[str, Any]:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "processor": names[0] if names else platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "memory": f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB",
        "system": platform.platform(),
    }


def _show(report: Report, console: Console) -> None:
    """A table, the best first: what a model has passed stands below it."""
    rows = [
        (
            twin.bits_per_byte,
            twin.title,
            f"{twin.parameters:,}",
            f"{twin.tokens_per_second:,.0f}",
            f"{twin.perplexity:.2f}",
        )
        for twin in report.twins
    ]
    rows += [(value, BASELINES[name], "", "", "") for name, value in report.baselines.items()]
    table = Table(box=box.SIMPLE)
    table.add_column("model", no_wrap=True)
    for head in ("parameters", "tokens/s", "perplexity", "bits/byte"):
        table.add_column(head, justify="right", no_wrap=True)
    for bits_per_byte, title, *others in sorted(rows):
        style = None if others[0] else "dim"
        table.add_row(title, *others, f"{bits_per_byte:.3f}", style=style)
    console.print(table)
