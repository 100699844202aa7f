import csv

import pytest
import torch
from torch import nn

from benchmarks import training
from benchmarks.training import MODELS, Plan, build_sized, count, main, step, time_compiled
from gdn2.models import Gdn2Config
from gdn2.train.optim import build_optimizer

TINY = Gdn2Config(
    vocab_size=50,
    hidden_size=32,
    num_hidden_layers=4,
    num_heads=2,
    head_k_dim=8,
    num_attention_heads=2,
    attention_head_dim=8,
    sliding_window=16,
    intermediate_size=64,
)
SIZE = 31_000


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr(training, "SIZES", TINY)
    monkeypatch.setattr(training, "apart", lambda function, *args: function(*args))


@pytest.mark.parametrize("name", MODELS)
def test_models_are_of_one_size(name):
    width = 16 * 3 * TINY.hidden_size * TINY.num_hidden_layers
    model = build_sized(TINY, name, SIZE)
    assert abs(count(model) - SIZE) <= width / 2
    kinds = [type(module).__name__ for module in model.modules()]
    assert not any("SparseMoe" in kind for kind in kinds)
    attentions = {"hybrid": 2, "qwen3_next": 1, "llama": 4}
    assert sum(kind.endswith("Attention") for kind in kinds) == attentions.get(name, 0)


@pytest.mark.parametrize("name", MODELS)
def test_a_step_trains(name):
    torch.manual_seed(0)
    model = build_sized(TINY, name, SIZE).train()
    optimizer = build_optimizer(model, training.OPTIM)
    tokens = torch.randint(TINY.vocab_size, (2, 24))

    def loss() -> float:
        logits = model(input_ids=tokens, use_cache=False).logits[:, :-1]
        return nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).item()

    before = loss()
    for _ in range(3):
        step(model, optimizer, tokens)
    assert loss() < before


@pytest.mark.usefixtures("tiny")
def test_rows_of_every_model_and_direction(tmp_path, capsys):
    path = tmp_path / "results.csv"
    words = ["--lengths", "20", "40", "--tokens", "40", "--rounds", "1", "--csv", str(path)]
    assert main(["models", "attention", *words]) == 0
    text = capsys.readouterr().out
    assert "window=16, B 1, M 0.00, model sliding_attention" in text
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["script"] for row in rows} == {"training.py"}
    found = [(row["case"].partition(" parameters")[0], row["backend"]) for row in rows[:10]]
    cases = ("20m: B=2 T=20", "20m: B=1 T=40")
    assert found == [(case, name) for case in cases for name in MODELS]
    assert [row["direction"] for row in rows[10:]] == 2 * ["forward", "forward+backward"]
    assert all(int(row["case"].partition("peak=")[2]) >= 0 for row in rows[10:])


def test_the_first_step_is_timed_apart(monkeypatch):
    compiled = []
    monkeypatch.setattr(nn.Module, "compile", lambda block: compiled.append(block))
    timings = time_compiled(Plan("tiny", TINY, (24,), 24, 1))
    assert len(compiled) == TINY.num_hidden_layers
    assert [(t.direction, t.backend) for t in timings] == [
        (direction, name) for direction in ("first step", "step") for name in ("eager", "compiled")
    ]


def test_compiling_asks_for_a_compiler(monkeypatch, capsys):
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert main([]) == 1
    assert capsys.readouterr().err == (
        "compile needs a C++ compiler, and there is no no-such-compiler\n"
    )


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["modles"], "no suite 'modles', only models, attention, compile"),
        (["models", "--lengths", "3000"], "models: every length must divide the tokens of a step"),
        (["--rounds", "0"], "must be at least 1"),
        (["--threads", "0"], "must be at least 1"),
    ],
)
def test_what_can_not_be_timed_is_refused(words, error, capsys):
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 2
    assert error in capsys.readouterr().err
