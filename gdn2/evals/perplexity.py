"""Loss, bits per byte and perplexity by position of a model on held-out documents.

The protocol, the same for every model:

- A document is its separator followed by its text tokens. It is cut into pieces of at most
  `context` = 4 x `sequence_length` inputs, and every piece is scored on its own: fresh state,
  positions from 0, nothing seen but the piece.
- Every text token is predicted exactly once, and so is the separator that closes the document:
  the first token from the opening separator alone, the first target of a later piece from the
  one token before it.
- `bits_per_byte` = total loss / ln 2 / UTF-8 bytes of the text. The loss of the closing
  separators is in the numerator and adds no byte to the denominator, so the number is slightly
  higher than that of the text alone: it also pays for telling where a document ends.
- `by_position`: perplexity of the targets at `start` <= n < `end` of their pieces (the n-th has
  n + 1 inputs of context), in buckets that double up to `context`. Training showed no position
  in the last two; only longer documents reach them, so the buckets are not the same text.
"""

import math
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table

from gdn2.data import TokenDataset, load_encoder
from gdn2.data.durable import make_folder, read_json, write_file, write_json
from gdn2.data.shards import MANIFEST
from gdn2.models.configuration import LARGEST
from gdn2.models.loading import load_checkpoint

EXTRAPOLATION = 4  # longest context, in training lengths
SHORTEST_BUCKET = 16
ROW_TOKENS = 8192  # documents are packed to rows of about this many tokens


@torch.inference_mode()
def evaluate(model: Any, dataset: TokenDataset, *, sequence_length: int) -> dict[str, Any]:
    """Score every document of `dataset`; `sequence_length` is the length of training.

    Returns loss (mean, in nats), bits_per_byte, perplexity, tokens (predicted), bytes,
    by_position, documents, sequence_length and context. Matrix products are bf16 on CUDA, as in
    training, and of the model's own dtype elsewhere.
    """
    if sequence_length < 1:
        raise ValueError(f"sequence_length must be at least 1, got {sequence_length}")
    if dataset.vocab_size > model.config.vocab_size:
        raise ValueError(
            f"dataset must have at most the model's {model.config.vocab_size} token ids, "
            f"got {dataset.vocab_size}"
        )
    context = EXTRAPOLATION * sequence_length
    nats = np.zeros(context)
    targets = np.zeros(context, dtype=np.int64)
    device = model.device
    model.eval()
    for row in _rows(dataset, context):
        inputs = torch.from_numpy(np.concatenate([inputs for inputs, _ in row]))[None]
        labels = torch.from_numpy(np.concatenate([labels for _, labels in row]))[None]
        lengths = [len(inputs) for inputs, _ in row]
        cu_seqlens = torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            losses = model.token_losses(
                inputs.to(device), labels.to(device), cu_seqlens=cu_seqlens.to(device)
            )
        position = np.concatenate([np.arange(length) for length in lengths])
        longest = max(lengths)
        nats[:longest] += np.bincount(position, losses[0].double().cpu().numpy())
        targets[:longest] += np.bincount(position)
    loss = float(nats.sum() / targets.sum())
    if not math.isfinite(loss):
        raise RuntimeError(f"the mean loss is {loss}: the weights of this model are no good")
    return {
        "loss": loss,
        "bits_per_byte": float(nats.sum() / math.log(2) / dataset.num_bytes),
        "perplexity": math.exp(loss),
        "tokens": int(targets.sum()),
        "bytes": dataset.num_bytes,
        "by_position": [
            {
                "start": start,
                "end": end,
                "perplexity": math.exp(nats[start:end].sum() / targets[start:end].sum()),
            }
            for start, end in _buckets(context)
            if targets[start:end].any()
        ],
        "documents": dataset.num_documents,
        "sequence_length": sequence_length,
        "context": context,
    }


def evaluate_checkpoint(
    checkpoint: Path, *, out: Path, data: Path | None = None, device: str = "cpu"
) -> dict[str, Any]:
    """`evaluate` a checkpoint on a validation split; write eval.json and eval.png into `out`.

    Without `data` it is the folder that the run was trained on. A folder that another tokenizer
    encoded is refused: its ids mean other text.
    """
    model, chosen = load_checkpoint(checkpoint)
    trained_on, length = _training_record(chosen)
    sequence_length = length or model.config.max_position_embeddings
    data = data or _training_data(chosen, trained_on)
    dataset = TokenDataset(data, "validation")
    theirs, ours = load_encoder(data / "tokenizer"), load_encoder(chosen)
    if (theirs.separator, theirs.tokenizer.to_str()) != (ours.separator, ours.tokenizer.to_str()):
        raise ValueError(f"{data} was encoded with another tokenizer than that of {chosen}")
    make_folder(out)  # before all the work
    model.to(device)  # type: ignore[arg-type]  # the wrapper's annotation drops `self`
    result = evaluate(model, dataset, sequence_length=sequence_length)
    result |= {
        "checkpoint": str(chosen),
        "data": str(data),
        "tokenizer_sha256": dataset.manifest.tokenizer_sha256,
    }
    plot(result, out / "eval.png")
    write_json(out / "eval.json", result)
    return result


def show(result: dict[str, Any]) -> None:
    """Print a result of `evaluate_checkpoint` as tables."""
    scores = Table(box=box.SIMPLE)
    means, counts = ("loss", "bits_per_byte", "perplexity"), ("tokens", "bytes", "context")
    for name in (*means, *counts):
        scores.add_column(name.replace("_", " "), justify="right")
    scores.add_row(
        *(f"{result[name]:.4f}" for name in means),
        *(f"{result[name]:,}" for name in counts),
    )
    positions = Table(box=box.SIMPLE)
    positions.add_column("position", justify="right")
    positions.add_column("perplexity", justify="right")
    for bucket in result["by_position"]:
        span = f"{bucket['start']:,} to {bucket['end'] - 1:,}"
        positions.add_row(span, f"{bucket['perplexity']:.3f}")
    console = Console()
    console.print(result["checkpoint"], soft_wrap=True, markup=False, highlight=False)
    console.print(scores, positions)


def plot(result: dict[str, Any], path: Path) -> None:
    """Draw perplexity by position, with the length of training marked, as a PNG."""
    buckets = result["by_position"]
    ends = [bucket["end"] for bucket in buckets]
    edges = [ends[0] // 2, *ends]  # the first bucket begins at 0, which has no logarithm
    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.stairs([bucket["perplexity"] for bucket in buckets], edges, baseline=None, linewidth=2)
    axes.axvline(result["sequence_length"], color="gray", linestyle="--", linewidth=1)
    axes.annotate(
        " training length",
        (result["sequence_length"], 1),
        xycoords=("data", "axes fraction"),
        va="top",
        color="gray",
    )
    axes.set_xscale("log", base=2)
    axes.set_xticks(ends, [str(end) for end in ends])
    axes.set_xlabel("position (tokens of context, up to)")
    axes.set_ylabel("perplexity")
    axes.set_title(f"{result['bits_per_byte']:.3f} bits per byte, {result['tokens']:,} tokens")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    picture = BytesIO()
    figure.savefig(picture, format="png", dpi=150)
    write_file(path, picture.getvalue())


def _training_record(folder: Path) -> tuple[str | None, int | None]:
    """The data and the sequence length of the training; nothing for weights from elsewhere."""
    path = folder / "run.json"
    if not path.is_file():
        return None, None
    record = read_json(path)
    try:
        data, length = record["data"]["path"], record["run"]["data"]["sequence_length"]
    except (LookupError, TypeError):
        data, length = None, None
    if not (isinstance(data, str) and type(length) is int and 0 < length <= LARGEST):
        raise ValueError(
            f"{path} is damaged: it must have data.path and run.data.sequence_length, "
            f"got {data!r} and {length!r}"
        )
    return data, length


def _training_data(folder: Path, trained_on: str | None) -> Path:
    if trained_on is None:
        raise ValueError(f"{folder} does not say what it was trained on; give --data DIR")
    data = Path(trained_on)
    if not (data / MANIFEST).is_file():
        raise ValueError(f"{folder} was trained on {data}, which is not there now; give --data DIR")
    return data


Piece = tuple[NDArray[np.int64], NDArray[np.int64]]  # inputs, labels


def _pieces(dataset: TokenDataset, context: int) -> Iterator[Piece]:
    documents = range(dataset.num_documents)
    for index in track(documents, "scoring documents", console=Console(stderr=True)):
        tokens = dataset.document(index)
        labels = np.append(tokens[1:], dataset.separator)
        for start in range(0, len(tokens), context):
            yield tokens[start : start + context], labels[start : start + context]


def _rows(dataset: TokenDataset, context: int) -> Iterator[list[Piece]]:
    """Pieces in order, packed to rows of at most ROW_TOKENS where a piece is not longer."""
    row: list[Piece] = []
    size = 0
    for piece in _pieces(dataset, context):
        if row and size + len(piece[0]) > ROW_TOKENS:
            yield row
            row, size = [], 0
        row.append(piece)
        size += len(piece[0])
    if row:
        yield row


def _buckets(context: int) -> list[tuple[int, int]]:
    """[0, b), [b, 2b), [2b, 4b) ... up to context."""
    edges = [context]
    while edges[-1] % 2 == 0 and edges[-1] // 2 >= SHORTEST_BUCKET:
        edges.append(edges[-1] // 2)
    return list(zip([0, *edges[:0:-1]], edges[::-1], strict=True))
