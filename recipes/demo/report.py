"""What the demo found: report.json for programs, report.html for people."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path
from typing import Any

from gdn2.data.durable import write_file, write_json
from recipes.demo.chart import Axis, Level, Point, Series, line_chart

BASELINES = {"gzip": "gzip -9", "xz": "xz -9", "ngram5": "byte 5-gram"}


@dataclass(frozen=True, kw_only=True)
class Twin:
    """One trained model and its scores. `curve` is training loss: (tokens, bits per byte)."""

    name: str
    title: str
    color: int
    dashed: bool
    parameters: int
    state_bytes: int
    bits_per_byte: float
    perplexity: float
    by_position: Sequence[dict[str, Any]]
    tokens_per_second: float
    curve: Sequence[Point]
    samples: Sequence[tuple[str, str]]
    """(prompt, text that begins with it)."""


@dataclass(frozen=True, kw_only=True)
class Report:
    twins: Sequence[Twin]
    baselines: dict[str, float]
    """Bits per byte; the keys of BASELINES."""
    validation_bytes: int
    validation_documents: int
    training_bytes: int
    """What the 5-gram was trained on."""
    sequence_length: int
    sampling: str
    machine: dict[str, Any]
    versions: dict[str, str]
    commit: str
    commands: Sequence[str]


def write_report(report: Report, out: Path) -> None:
    """Write report.json and report.html into `out`."""
    summary = {
        "twins": [
            {
                "name": twin.name,
                "parameters": twin.parameters,
                "bits_per_byte": twin.bits_per_byte,
                "tokens_per_second": twin.tokens_per_second,
            }
            for twin in report.twins
        ],
        "baselines": report.baselines,
        "validation_bytes": report.validation_bytes,
        "machine": report.machine,
        "versions": report.versions,
        "commit": report.commit,
    }
    write_file(out / "report.html", render_html(report).encode())
    write_json(out / "report.json", summary)


def render_html(report: Report) -> str:
    """The report as one page that needs nothing else, in the reader's light or dark mode."""
    report = replace(report, twins=best_first(report.twins))
    sections = [
        _head(report),
        _scores(report),
        _learning(report),
        _positions(report),
        _samples(report),
        _provenance(report),
    ]
    body = "\n".join(f"<section>{section}</section>" for section in sections)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>gdn2 demo</title>\n<style>{_style()}</style>\n</head>\n"
        f"<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def best_first(twins: Sequence[Twin]) -> list[Twin]:
    return sorted(twins, key=lambda twin: twin.bits_per_byte)


def passed(twin: Twin, baselines: dict[str, float]) -> list[str]:
    """The baselines that need more bits per byte than `twin`."""
    return [name for name, value in baselines.items() if twin.bits_per_byte < value]


def _head(report: Report) -> str:
    best = report.twins[0]
    beaten = [BASELINES[name] for name in passed(best, report.baselines)]
    missed = [BASELINES[name] for name in report.baselines if BASELINES[name] not in beaten]
    verdict = f"Passed: {', '.join(beaten) or 'no baseline yet'}."
    if missed:
        verdict += f" Not passed: {', '.join(missed)}."
    return (
        "<h1>Small language models, one recipe</h1>"
        "<p class=lead>The same text, the same number of tokens, nearly the same number of "
        "parameters; what differs is the mixer. Trained from nothing on this machine's own Python "
        "library, scored on files that no model has seen. "
        f"Best: <b>{escape(best.title)}</b> with <b>{best.bits_per_byte:.3f}</b> bits per byte. "
        f"{verdict}</p>"
    )


def _scores(report: Report) -> str:
    heads = ["model", "parameters", "state", "perplexity", "tokens/s", "bits per byte"]
    rows = []
    best = min(twin.bits_per_byte for twin in report.twins)
    for twin in report.twins:
        cells = [
            f"<td>{_swatch(twin)}{escape(twin.title)}</td>",
            f"<td>{twin.parameters:,}</td>",
            f"<td>{twin.state_bytes / 1024:,.0f} KiB</td>",
            f"<td>{twin.perplexity:.2f}</td>",
            f"<td>{twin.tokens_per_second:,.0f}</td>",
            f'<td class="{"best" if twin.bits_per_byte == best else ""}">'
            f"{twin.bits_per_byte:.3f}</td>",
        ]
        for name in report.baselines:
            won = name in passed(twin, report.baselines)
            cells.append(f'<td class="{"yes" if won else "no"}">{"yes" if won else "no"}</td>')
        rows.append(f"<tr>{''.join(cells)}</tr>")
    for name, value in report.baselines.items():
        blank = "<td></td>" * 4
        rows.append(
            f"<tr class=baseline><td>{BASELINES[name]}</td>{blank}<td>{value:.3f}</td>"
            f"<td colspan={len(report.baselines)}></td></tr>"
        )
    header = "".join(f"<th>{head}</th>" for head in heads)
    header += "".join(
        f"<th>passes<br><span>{BASELINES[name]}</span></th>" for name in report.baselines
    )
    return (
        "<h2>Scores</h2><div class=wide><table><thead><tr>"
        f"{header}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
        f"<p class=note>On {report.validation_documents:,} files, "
        f"{report.validation_bytes:,} bytes of text. Lower is better. The models also pay for "
        "predicting where a file ends, the baselines do not. gzip and xz compress the files joined "
        "in the order of their sha256; the 5-gram (Witten-Bell, four bytes of context) was "
        f"trained on the {report.training_bytes:,} bytes that the models were trained on. The "
        "models' tokenizer knows more: it was trained on all the text that is not for validation. "
        "State: what a model carries from token to token while it writes one text, behind "
        f"{report.sequence_length:,} tokens.</p>"
    )


def _swatch(twin: Twin) -> str:
    kind = " class=dashed" if twin.dashed else ""
    return f'<i{kind} style="--color:var(--series-{twin.color})"></i>'


def _learning(report: Report) -> str:
    ends = [twin.bits_per_byte for twin in report.twins]
    values = [*ends, *report.baselines.values()]
    # The first steps are far above everything: the plot begins where a sixth is done.
    early = [
        next((bits for tokens, bits in twin.curve if tokens >= twin.curve[-1][0] / 6), ends[0])
        for twin in report.twins
    ]
    chart = line_chart(
        "Bits per byte over training tokens",
        [
            Series(
                name=twin.title,
                points=twin.curve,
                color=twin.color,
                dashed=twin.dashed,
                dot=(twin.curve[-1][0], twin.bits_per_byte),
            )
            for twin in report.twins
        ],
        x=Axis(
            label="training tokens", low=0, high=max(twin.curve[-1][0] for twin in report.twins)
        ),
        y=Axis(label="bits per byte", low=min(values) - 0.2, high=max(*early, *values) + 0.2),
        levels=[Level(name=BASELINES[name], value=v) for name, v in report.baselines.items()],
    )
    return (
        f"<h2>Learning</h2><div class=wide>{chart}</div>"
        "<p class=note>Curves: training loss, a running mean over steps, in bits "
        "per byte of the training text. Dots: the validation score of the finished model. "
        "Gray: the baselines on the validation text. Dashed curves: every other layer is "
        "window attention.</p>"
    )


def _positions(report: Report) -> str:
    curves = []
    for twin in report.twins:
        points = [(bucket["end"], bucket["perplexity"]) for bucket in twin.by_position]
        curve = Series(name=twin.title, points=points, color=twin.color, dashed=twin.dashed)
        curves.append(curve)
    values = [y for curve in curves for _, y in curve.points]
    places = [x for curve in curves for x, _ in curve.points]
    chart = line_chart(
        "Perplexity by position",
        curves,
        x=Axis(label="tokens of context (up to)", low=min(places), high=max(places), log2=True),
        y=Axis(label="perplexity", low=min(values) * 0.95, high=max(values) * 1.02),
        mark=(report.sequence_length, "training length"),
    )
    return (
        f"<h2>Use of context</h2><div class=wide>{chart}</div>"
        "<p class=note>Perplexity of the tokens that have this much text before them. "
        "Right of the mark lie lengths that training never showed.</p>"
    )


def _samples(report: Report) -> str:
    blocks = []
    for twin in report.twins:
        texts = "".join(
            f"<pre><b>{escape(prompt)}</b>{escape(text[len(prompt) :])}</pre>"
            for prompt, text in twin.samples
        )
        blocks.append(f"<div><h3>{_swatch(twin)}{escape(twin.title)}</h3>{texts}</div>")
    return (
        f"<h2>What they write</h2><div class=samples>{''.join(blocks)}</div>"
        f"<p class=note>After the prompt in bold: {escape(report.sampling)}, not chosen by "
        "hand.</p>"
    )


def _provenance(report: Report) -> str:
    facts = {**report.machine, **report.versions, "commit": report.commit}
    items = "".join(
        f"<dt>{escape(str(name))}</dt><dd>{escape(str(value))}</dd>"
        for name, value in facts.items()
    )
    commands = escape("\n".join(report.commands))
    return f"<h2>How it was made</h2><dl>{items}</dl><pre>{commands}</pre>"


def _style() -> str:
    return (Path(__file__).parent / "report.css").read_text(encoding="utf-8")
