import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from gdn2.data import TokenDataset, prepare
from gdn2.evals import perplexity
from gdn2.evals.perplexity import evaluate, plot
from gdn2.models import Gdn2Config, Gdn2ForCausalLM

VOCAB = 300


class RunningMean(nn.Module):
    """Predicts from the mean of everything since the sequence began: state that must reset."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Parameter(torch.randn(VOCAB, VOCAB))
        self.config = SimpleNamespace(vocab_size=VOCAB)
        self.rows: list[int] = []

    @property
    def device(self) -> torch.device:
        return self.table.device

    def token_losses(self, tokens: Tensor, labels: Tensor, cu_seqlens: Tensor) -> Tensor:
        self.rows.append(tokens.shape[1])
        losses = []
        for start, end in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True):
            count = torch.arange(1, end - start + 1)[:, None]
            logits = self.table[tokens[0, start:end]].cumsum(0) / count
            losses.append(
                nn.functional.cross_entropy(logits, labels[0, start:end], reduction="none")
            )
        return torch.cat(losses)[None]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> TokenDataset:
    folder = tmp_path_factory.mktemp("text")
    draw = np.random.default_rng(0)
    words = ["state ", "gate ", "δέλτα ", "erase\n", "write ", "."]
    texts = ["".join(draw.choice(words, size=draw.integers(1, 80))) for _ in range(40)]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (folder / "texts.jsonl").write_text(lines)
    out = folder / "out"
    prepare([folder / "texts.jsonl"], out, vocab_size=VOCAB, val_fraction=0.3, workers=1)
    return TokenDataset(out, "validation")


def losses_by_piece(model: RunningMean, dataset: TokenDataset, context: int) -> list[list[float]]:
    """Loss by position of every piece, one piece at a time and one prefix at a time."""
    pieces = []
    for index in range(dataset.num_documents):
        stream = [*dataset.document(index).tolist(), dataset.separator]
        for start in range(0, len(stream) - 1, context):
            losses = []
            for end in range(start + 1, min(start + context, len(stream) - 1) + 1):
                logits = model.table[torch.tensor(stream[start:end])].mean(0)
                losses.append(-logits.log_softmax(0)[stream[end]].item())
            pieces.append(losses)
    return pieces


@pytest.mark.parametrize("row_tokens", [1, 100, 8192])
def test_scores_equal_those_of_documents_one_by_one(
    dataset: TokenDataset, row_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(perplexity, "ROW_TOKENS", row_tokens)
    model, context = RunningMean(), 4 * 16
    result = evaluate(model, dataset, sequence_length=16)
    pieces = losses_by_piece(model, dataset, context)
    total, count = sum(map(sum, pieces)), sum(map(len, pieces))
    assert result["loss"] == pytest.approx(total / count, rel=1e-5)
    assert result["perplexity"] == pytest.approx(math.exp(total / count), rel=1e-4)
    assert result["bits_per_byte"] == pytest.approx(
        total / math.log(2) / dataset.num_bytes, rel=1e-5
    )
    # One target for every token: separators open documents, and close them as targets.
    assert result["tokens"] == count == dataset.num_tokens
    assert result["bytes"] == dataset.num_bytes
    assert context / 2 < max(model.rows) <= max(row_tokens, context)
    assert max(map(len, pieces)) == context, "some document must be cut"
    for bucket in result["by_position"]:
        inside = [x for piece in pieces for x in piece[bucket["start"] : bucket["end"]]]
        assert bucket["perplexity"] == pytest.approx(math.exp(np.mean(inside)), rel=1e-4)


def test_a_real_model_is_scored_as_by_its_own_logits(dataset: TokenDataset) -> None:
    torch.manual_seed(0)
    config = Gdn2Config(
        vocab_size=VOCAB,
        hidden_size=32,
        num_hidden_layers=2,
        mixers=["gdn2", "sliding_attention"],
        num_heads=2,
        head_k_dim=16,
        intermediate_size=32,
        num_attention_heads=2,
        attention_head_dim=16,
        sliding_window=20,
        initializer_range=0.5,
    )
    model = Gdn2ForCausalLM(config)
    result = evaluate(model, dataset, sequence_length=1024)
    total = 0.0
    for index in range(dataset.num_documents):
        tokens = torch.from_numpy(dataset.document(index))
        labels = torch.cat([tokens[1:], torch.tensor([dataset.separator])])
        with torch.no_grad():
            logits = model(tokens[None]).logits[0]
        total += nn.functional.cross_entropy(logits, labels, reduction="sum").item()
    assert result["loss"] == pytest.approx(total / dataset.num_tokens, rel=1e-5)


def test_buckets_double_up_to_four_training_lengths(dataset: TokenDataset) -> None:
    result = evaluate(RunningMean(), dataset, sequence_length=16)
    spans = [(bucket["start"], bucket["end"]) for bucket in result["by_position"]]
    assert spans == [(0, 16), (16, 32), (32, 64)]
    assert result["context"] == 64


def test_a_vocabulary_that_does_not_fit_is_refused(dataset: TokenDataset) -> None:
    model = RunningMean()
    model.config.vocab_size = dataset.vocab_size - 1
    with pytest.raises(ValueError, match=f"at most the model's {dataset.vocab_size - 1} token ids"):
        evaluate(model, dataset, sequence_length=16)


def test_the_plot_is_a_picture(dataset: TokenDataset, tmp_path: Path) -> None:
    plot(evaluate(RunningMean(), dataset, sequence_length=16), tmp_path / "eval.png")
    assert (tmp_path / "eval.png").read_bytes().startswith(b"\x89PNG")
