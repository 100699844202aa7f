"""Killed at any moment and started again, a run ends as if nothing had happened, to the bit."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from gdn2.presets import load_preset
from gdn2.train import Run, override_all, run_to_dict
from gdn2.train.loop import train


class Trainer:
    """One process that trains in children of its own."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("trainer.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def start(self, run: Run, data: Path, out: Path, *, die_at: int = 0) -> int:
        """Begin, or go on with, a run; returns the process id."""
        job = {
            "run": run_to_dict(run),
            "data": str(data),
            "out": str(out),
            "threads": self.threads,
            "die_at": die_at,
        }
        print(json.dumps(job), file=self.process.stdin, flush=True)
        return int(self.process.stdout.readline())

    def wait(self) -> int:
        """The exit code of what was started; until then its process id is its own."""
        print(file=self.process.stdin, flush=True)
        return int(self.process.stdout.readline())

    def train(self, run: Run, data: Path, out: Path, *, die_at: int = 0) -> int:
        self.start(run, data, out, die_at=die_at)
        return self.wait()

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


@pytest.fixture(scope="module")
def trainer() -> Iterator[Trainer]:
    """One thread: tensors this small gain nothing from more, and a busy machine loses much."""
    with closing(Trainer(threads=1)) as trainer:
        yield trainer


@pytest.fixture(scope="module")
def run(tiny_run: Run) -> Run:
    """16 steps with a checkpoint at every second one, so that much of the time is saving."""
    return override_all(
        tiny_run,
        [
            "schedule.total_tokens=2048",
            "checkpoint.every_tokens=256",
            "parallel.micro_batch_size=4",
        ],
    )


@pytest.fixture(scope="module")
def undisturbed(trainer, run, data, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed")
    assert trainer.train(run, data, out) == 0
    return out


def content(out: Path) -> tuple[bytes, list[dict], list[str]]:
    """Final weights, metrics but for the speed, and the names of what was left."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        del line["tokens_per_second"]
    names = sorted(str(path.relative_to(out)) for path in out.rglob("*"))
    return (out / "final" / "model.safetensors").read_bytes(), lines, names


def last_step(out: Path) -> int:
    path = out / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def until(condition: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "the trainer does not get there"
        time.sleep(0.002)


def kill_often(trainer, run, data, out, *, kills: int, seed: int) -> int:
    """Kill the run ``kills`` times, each time some random steps further on; then let it end."""
    generator = random.Random(seed)
    for _ in range(kills):
        child = trainer.start(run, data, out)
        target = last_step(out) + generator.randint(-1, 4)
        until(lambda: last_step(out) >= target or (out / "final").exists())  # noqa: B023
        time.sleep(generator.uniform(0, 0.05))
        os.kill(child, signal.SIGKILL)
        if trainer.wait() == 0:
            break
    return trainer.train(run, data, out)


def test_killed_at_random_moments(trainer, run, data, undisturbed, tmp_path):
    assert kill_often(trainer, run, data, tmp_path, kills=6, seed=0) == 0
    assert content(tmp_path) == content(undisturbed)


def test_killed_inside_saving(trainer, run, data, undisturbed, tmp_path):
    """At some of the changes to the disk, each in a run that goes on from the one before."""
    for die_at in (1, 9, 17, 26, 34):
        assert trainer.train(run, data, tmp_path, die_at=die_at) == -signal.SIGKILL
    assert trainer.train(run, data, tmp_path) == 0
    assert content(tmp_path) == content(undisturbed)


def test_a_signal_from_outside_saves_and_exits_130(trainer, run, data, undisturbed, tmp_path):
    child = trainer.start(run, data, tmp_path)
    until(lambda: last_step(tmp_path) >= 3)
    os.kill(child, signal.SIGINT)
    assert trainer.wait() == 130
    steps = sorted(int(path.name[5:]) for path in (tmp_path / "checkpoints").iterdir())
    assert steps[-1] == last_step(tmp_path) >= 3
    assert trainer.train(run, data, tmp_path) == 0
    assert content(tmp_path)[:2] == content(undisturbed)[:2]


def test_two_processes_do_not_share_a_run(trainer, run, data, tmp_path):
    child = trainer.start(run, data, tmp_path)
    until(lambda: last_step(tmp_path) >= 1)
    with pytest.raises(RuntimeError, match="in use by another process"):
        train(run, data=data, out=tmp_path)
    os.kill(child, signal.SIGKILL)
    trainer.wait()


def command(data: Path, out: Path) -> subprocess.Popen:
    """`gdn2 train`, 20 steps, as a user starts it who reads its output."""
    words = ["train", "debug", "--data", str(data), "--out", str(out), "log.every_steps=1"]
    return subprocess.Popen(
        [sys.executable, "-m", "gdn2.cli", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def test_the_command_outlives_its_reader_and_goes_on_after_a_ctrl_c(data, tmp_path):
    unread = command(data, tmp_path / "unread")
    unread.stdout.close()

    out = tmp_path / "interrupted"
    interrupted = command(data, out)
    for line in interrupted.stdout:
        if line.startswith("step 2/20"):
            interrupted.send_signal(signal.SIGINT)
            break
    last_line = interrupted.stdout.read().splitlines()[-1]
    assert interrupted.wait() == 130
    assert interrupted.stderr.read() == ""
    assert last_line == f"stopped and saved after step {last_step(out)}; the same command goes on"

    resumed = command(data, out)
    text, _ = resumed.communicate()
    assert resumed.returncode == 0
    assert text.startswith("going on after step")
    assert (unread.wait(), unread.stderr.read()) == (0, "")
    assert content(out)[:2] == content(tmp_path / "unread")[:2]


@pytest.mark.slow
def test_killed_at_very_many_random_moments(trainer, run, data, undisturbed, tmp_path):
    for seed in range(5):
        assert kill_often(trainer, run, data, tmp_path / str(seed), kills=10, seed=seed) == 0
        assert content(tmp_path / str(seed)) == content(undisturbed)


@pytest.mark.slow
def test_killed_at_every_change_to_the_disk(trainer, run, data, tmp_path):
    """Until one is so late that the run ends first; each run is then finished by another."""
    short = override_all(run, ["schedule.total_tokens=512", "checkpoint.keep=1"])
    assert trainer.train(short, data, tmp_path / "undisturbed") == 0
    die_at, code = 1, -signal.SIGKILL
    while code == -signal.SIGKILL:
        out = tmp_path / str(die_at)
        code = trainer.train(short, data, out, die_at=die_at)
        assert trainer.train(short, data, out) == 0
        assert content(out) == content(tmp_path / "undisturbed")
        die_at += 1
    assert code == 0
    assert die_at > 50


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["demo_gdn2", "demo_gdn2_hybrid"])
def test_two_threads_and_larger_tensors_change_nothing(preset, data, tmp_path):
    """Products and sums that threads share: their order must not depend on timing either."""
    run = override_all(
        load_preset(preset),
        [
            "schedule.total_tokens=10240",
            "schedule.warmup_tokens=1024",
            "schedule.tokens_per_step=1024",
            "parallel.micro_batch_size=4",
            "checkpoint.every_tokens=2048",
        ],
    )
    with closing(Trainer(threads=2)) as trainer:
        assert trainer.train(run, data, tmp_path / "undisturbed") == 0
        assert kill_often(trainer, run, data, tmp_path / "killed", kills=4, seed=0) == 0
    assert content(tmp_path / "killed") == content(tmp_path / "undisturbed")
