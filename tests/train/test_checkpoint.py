import resource
from pathlib import Path

import pytest
import torch
from torch import nn

from gdn2.train import OptimConfig
from gdn2.train.checkpoint import Checkpoints
from gdn2.train.optim import build_optimizer


class Tied(nn.Module):
    """Two names for one weight, and a vector that does not decay."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 5)
        self.norm = nn.RMSNorm(5)
        self.head = nn.Linear(5, 7, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.embedding(tokens)))


def build(seed: int = 0) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = Tied()
    return model, build_optimizer(model, OptimConfig(lr=0.1))


def advance(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    model(torch.randint(7, (3, 4))).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def save(checkpoints: Checkpoints, step: int, model: nn.Module, optimizer) -> None:
    checkpoints.save(
        step,
        model,
        optimizer,
        tokens=10 * step,
        write_more=lambda folder: (folder / "note.txt").write_text(str(step)),
    )


def state(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    moments = [v for entry in optimizer.state_dict()["state"].values() for v in entry.values()]
    return [*(p.detach().clone() for p in model.parameters()), *moments]


def test_a_loaded_step_goes_on_to_the_bit(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=1)
    model, optimizer = build()
    advance(model, optimizer)
    save(checkpoints, 1, model, optimizer)
    for _ in range(3):
        advance(model, optimizer)  # draws its tokens from torch's generator

    again, its_optimizer = build(seed=9)
    checkpoints.load(1, again, its_optimizer)
    assert again.head.weight is again.embedding.weight
    for _ in range(3):
        advance(again, its_optimizer)
    pairs = zip(state(model, optimizer), state(again, its_optimizer), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)


def test_saving_changes_nothing(tmp_path):
    runs = []
    for saves in (True, False):
        model, optimizer = build()
        for step in (1, 2, 3):
            advance(model, optimizer)
            if saves:
                save(Checkpoints(tmp_path, keep=1), step, model, optimizer)
        runs.append(state(model, optimizer))
    assert all(torch.equal(one, other) for one, other in zip(*runs, strict=True))


def test_the_newest_steps_are_kept_and_whole(tmp_path):
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=2)
    assert checkpoints.newest() is None
    model, optimizer = build()
    for step in (3, 6, 9, 123_456_789):
        save(checkpoints, step, model, optimizer)
    assert checkpoints.steps() == [9, 123_456_789]
    assert sorted(path.name for path in checkpoints.folder.iterdir()) == [
        "step_00000009",
        "step_123456789",
    ]
    assert sorted(path.name for path in checkpoints.path(9).iterdir()) == [
        ".metadata",
        "__0_0.distcp",
        "note.txt",
    ]


def test_unfinished_steps_do_not_count_and_are_removed(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    save(checkpoints, 3, *build())
    checkpoints.path(3).rename(tmp_path / "step_00000006.tmp")
    (tmp_path / "notes.tmp").write_text("not ours")
    assert checkpoints.newest() is None
    checkpoints.tidy()
    assert [path.name for path in tmp_path.iterdir()] == ["notes.tmp"]


def test_steps_beyond_those_to_keep_go_also_when_nothing_is_saved(tmp_path):
    for step in (3, 6, 9):
        save(Checkpoints(tmp_path, keep=3), step, *build())
    Checkpoints(tmp_path, keep=1).tidy()
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000009"]


def test_a_step_that_is_there_is_not_written_again(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    model, optimizer = build()
    save(checkpoints, 3, model, optimizer)
    written = (checkpoints.path(3) / ".metadata").stat().st_mtime_ns
    save(checkpoints, 3, model, optimizer)
    assert (checkpoints.path(3) / ".metadata").stat().st_mtime_ns == written


def test_a_broken_step_is_an_error_not_a_fresh_start(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    save(checkpoints, 3, *build())
    (checkpoints.path(3) / "__0_0.distcp").write_bytes(b"")
    with pytest.raises(RuntimeError, match=r"cannot read .*step_00000003: EOFError"):
        checkpoints.load(3, *build())


@pytest.mark.parametrize("part", ["tensors", "files"])
def test_a_disk_that_takes_no_more_leaves_the_last_good_step(tmp_path, part):
    checkpoints = Checkpoints(tmp_path, keep=1)
    model, optimizer = build()
    save(checkpoints, 3, model, optimizer)
    files = {path.name: path.read_bytes() for path in checkpoints.path(3).iterdir()}

    def fill(folder: Path) -> None:
        (folder / "big").write_bytes(bytes(1_000_000))

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    room = 500 if part == "tensors" else 500_000  # as a full disk: writes fail beyond it
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
        with pytest.raises(RuntimeError, match=r"cannot write .*step_00000006.*File too large"):
            checkpoints.save(6, model, optimizer, tokens=60, write_more=fill)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000003"]
    assert {path.name: path.read_bytes() for path in checkpoints.path(3).iterdir()} == files
    checkpoints.load(3, *build())
