"""Killed at any moment, run again: the same bytes, and at most one shard done twice."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

SCRIPT = """  # without `if __name__ == "__main__"`, as scripts and notebooks are
import sys
from gdn2.data import pipeline
pipeline.BYTES_PER_WORKER = 1
pipeline.prepare([sys.argv[1]], sys.argv[2], vocab_size=400, workers=int(sys.argv[3]),
                 val_fraction=0.1, shard_tokens=6_000)
"""


@pytest.fixture(autouse=True)
def _ctrl_c_is_not_ignored():
    """A shell starts what runs in the background with it ignored, and children inherit that."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory, make_texts):
    path = tmp_path_factory.mktemp("corpus") / "a.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in make_texts(1200)))
    return path


def start(corpus, out, workers):
    script = corpus.with_name("script.py")
    script.write_text(SCRIPT)
    command = [sys.executable, str(script), str(corpus), str(out), str(workers)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)


@pytest.fixture(scope="module")
def whole(corpus, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "out"
    process = start(corpus, out, 1)
    assert process.wait(60) == 0
    return files_of(out)


def files_of(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def finished(out):
    """Inodes of the shards that the journal or the manifest names: they are never written again."""
    journal = out / "journal.json.tmp"
    if not journal.exists():
        return {}
    sections = json.loads(journal.read_text())["sections"]
    files = [shard["file"] for section in sections for shard in section["shards"].values()]
    return {file: (out / file).stat().st_ino for file in files}


def wait_for(condition, process):
    while process.poll() is None and not condition():
        time.sleep(0.001)


@pytest.mark.parametrize(("workers", "kills"), [(1, 4), (2, 2)])
def test_killed_at_random_moments_gives_the_same_bytes(corpus, whole, tmp_path, workers, kills):
    rng, out, kept = random.Random(workers), tmp_path / "out", {}
    assert len(whole) > 20
    for _ in range(kills):
        process = start(corpus, out, workers)
        known = len(finished(out))
        wait_for(lambda known=known: out.exists() and len(finished(out)) > known + 2, process)
        time.sleep(rng.random() * 0.05)
        process.kill()
        process.communicate()
        part = files_of(out)
        assert all(part[name] == whole[name] for name in part if not name.endswith(".tmp"))
        now = finished(out)
        if now:
            assert now.items() >= kept.items()
            assert len(now) > len(kept)
            kept = now
    last = start(corpus, out, 1)
    message = last.communicate()[1]
    assert last.returncode == 0, message
    assert "shards are finished" in message or "complete already" in message
    assert files_of(out) == whole
    assert {file: (out / file).stat().st_ino for file in kept} == kept


def test_killed_before_the_first_shard_starts_over(corpus, whole, tmp_path):
    out = tmp_path / "out"
    process = start(corpus, out, 1)
    wait_for((out / "journal.json.tmp").exists, process)
    process.kill()
    process.communicate()
    assert start(corpus, out, 1).wait(60) == 0
    assert files_of(out) == whole


def test_interrupted_says_how_to_go_on_and_leaves_no_process(corpus, whole, tmp_path):
    out = tmp_path / "out"
    process = start(corpus, out, 2)
    wait_for(lambda: out.exists() and finished(out), process)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: workers get it too
    message = process.communicate(timeout=30)[1]
    assert process.returncode == -signal.SIGINT
    assert "stopped: the same command continues" in message
    # Of this script alone: workers are silent. It may come with what was handled at that moment.
    assert message.count("Traceback") - message.count("During handling of the above") == 1
    assert members(process.pid) == []
    assert start(corpus, out, 1).wait(60) == 0
    assert files_of(out) == whole


def test_the_command_says_how_to_go_on_after_a_ctrl_c_and_does(make_texts, tmp_path):
    text = "\n".join(make_texts(1000))
    lines = [json.dumps({"text": f"{number} {text}"}) + "\n" for number in range(8)]
    (tmp_path / "a.jsonl").write_text("".join(lines))
    out, options = tmp_path / "out", ["--vocab-size", "400", "--workers", "1"]
    command = [sys.executable, "-m", "gdn2.cli", "prepare", tmp_path / "a.jsonl", "--out", out]

    def prepare():
        return subprocess.Popen([*command, *options], stderr=subprocess.PIPE, text=True)

    process = prepare()
    wait_for((out / "train/00000.ds.tmp").exists, process)
    process.send_signal(signal.SIGINT)
    message = process.communicate()[1]
    assert process.returncode == 130
    assert message.splitlines()[-1] == f"stopped: the same command continues {out}"
    assert not (out / "manifest.json").exists()
    process = prepare()
    message = process.communicate()[1]
    assert process.returncode == 0, message
    assert (out / "manifest.json").exists()


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds processes in /proc")
def test_workers_end_with_a_killed_parent(corpus, tmp_path):
    out = tmp_path / "out"
    process = start(corpus, out, 2)
    wait_for(lambda: out.exists() and finished(out), process)
    assert len(members(process.pid)) >= 3
    process.kill()
    process.communicate()
    deadline = time.monotonic() + 20
    while members(process.pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert members(process.pid) == []


def members(session):
    """Ids of the processes of a session."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == session and fields[0] != "Z":
            found.append(int(stat.parent.name))
    return found
