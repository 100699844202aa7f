"""A prepared folder and a run that take a second on a CPU."""

import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from gdn2.data import prepare
from gdn2.models import Gdn2Config
from gdn2.train import (
    CheckpointConfig,
    DataConfig,
    LogConfig,
    OptimConfig,
    ParallelConfig,
    Run,
    ScheduleConfig,
)

WORDS = [
    "the",
    "a",
    "cat",
    "dog",
    "runs",
    "sits",
    "on",
    "mat",
    "far",
    "away",
    "under",
    "over",
    "house",
    "tree",
    "and",
    "then",
]


def write_data(folder: Path, *, seed: int) -> Path:
    """Nonsense of a few words, prepared: 40 documents, a vocabulary of 300."""
    generator = random.Random(seed)
    text = folder / "text"
    text.mkdir(parents=True)
    for index in range(40):
        words = generator.choices(WORDS, k=generator.randint(20, 120))
        (text / f"{index}.txt").write_text(" ".join(words))
    prepare([str(text)], folder / "data", vocab_size=300, val_fraction=0.2, workers=1)
    return folder / "data"


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Tensors this small gain nothing from more, and a busy machine loses much."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("prepared"), seed=0)


@pytest.fixture(scope="session")
def other_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("prepared"), seed=1)


@pytest.fixture(scope="session")
def tiny_model() -> Callable[..., Gdn2Config]:
    def build(**changes) -> Gdn2Config:
        settings = {
            "vocab_size": 300,
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "mixers": ["gdn2", "sliding_attention"],
            "num_heads": 2,
            "num_v_heads": 2,
            "head_k_dim": 8,
            "head_v_dim": 8,
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "sliding_window": 16,
            "intermediate_size": 32,
        }
        return Gdn2Config(**settings | changes)

    return build


@pytest.fixture(scope="session")
def tiny_run(tiny_model) -> Run:
    """8 steps of 4 sequences of 32 tokens; a checkpoint every 3 steps."""
    return Run(
        model=tiny_model(),
        data=DataConfig(sequence_length=32),
        optim=OptimConfig(lr=1e-2),
        schedule=ScheduleConfig(total_tokens=1000, warmup_tokens=200, tokens_per_step=128),
        parallel=ParallelConfig(micro_batch_size=2),
        checkpoint=CheckpointConfig(every_tokens=384),
        log=LogConfig(every_steps=3, validate_every_tokens=512, validation_tokens=128),
        seed=5,
    )
