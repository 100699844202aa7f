"""What a run folder says about itself: the resolved run, its data, versions and commit."""

from __future__ import annotations

import platform
import subprocess
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import gdn2
from gdn2.data import Manifest
from gdn2.data.durable import UNFINISHED, read_json
from gdn2.models import Gdn2Config
from gdn2.train.config import Run, run_to_dict

# A resumed run may change these: none changes what a step computes, beyond its rounding.
# The schedule is not among them: the learning rate of every step depends on the total.
FREE_SECTIONS = ("parallel", "checkpoint", "log")


def describe_run(run: Run, manifest: Manifest, data: Path) -> dict[str, Any]:
    """The content of RUN/config.json, as the run began, and of a checkpoint's run.json, as it is.

    The two differ after a resumption by other code: only the same torch and the same commit give
    the same bits.
    """
    shards = [shard for split in manifest.splits.values() for shard in split.shards]
    return {
        "run": run_to_dict(run),
        "data": {
            "path": str(data.resolve()),
            "tokenizer_sha256": manifest.tokenizer_sha256,
            "shards": {
                shard.file: [shard.tokens, shard.sha256, shard.index_sha256] for shard in shards
            },
        },
        "versions": {
            "python": platform.python_version(),
            **{name: metadata.version(name) for name in ("torch", "transformers", "numpy")},
        },
        "commit": commit(),
    }


def read_record(out: Path) -> dict[str, Any] | None:
    """What the run in ``out`` began as; None if ``out`` is empty, ValueError if it is not a run."""
    path = out / "config.json"
    if path.is_file():
        with suppress(ValueError):
            record = read_json(path)
            if isinstance(record.get("run"), dict) and isinstance(record.get("data"), dict):
                return record
    elif all(file.name.endswith(UNFINISHED) for file in out.iterdir()):  # left by a kill
        return None
    raise ValueError(f"{out} is not empty and was not begun by train: choose another --out")


def refuse_another_run(out: Path, began: dict[str, Any], record: dict[str, Any]) -> None:
    """Raise ValueError, saying what differs, unless ``record`` goes on with the run in ``out``."""
    old, new = _identity(began), _identity(record)
    changed = differences(old["run"], new["run"])
    if changed:
        raise ValueError(
            f"{out} holds another run, and a run goes on as it began. Choose another "
            f"--out, or undo: {'; '.join(changed)}"
        )
    if old["data"] != new["data"]:
        what = [name for name in new["data"] if old["data"].get(name) != new["data"][name]]
        raise ValueError(
            f"{out} was trained on other data (different {' and '.join(what)}) than "
            f"{record['data']['path']}. Choose another --out, or give it the data it began with"
        )


def differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """One line, ``path: old -> new``, for every leaf in which two nested dicts differ."""
    lines = []
    for name in dict.fromkeys([*old, *new]):
        before, after = old.get(name, "absent"), new.get(name, "absent")
        if isinstance(before, dict) and isinstance(after, dict):
            lines += differences(before, after, f"{prefix}{name}.")
        elif before != after:
            lines.append(f"{prefix}{name} {before} -> {after}")
    return lines


def commit() -> str | None:
    """The commit of the checkout that gdn2 runs from, ``-dirty`` if changed; None elsewhere."""
    git = ["git", "-C", str(Path(gdn2.__file__).parent)]
    tracked = [*git, "ls-files", "--error-unmatch", "__init__.py"]
    describe = [*git, "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty"]
    try:
        subprocess.run(tracked, check=True, capture_output=True)
        done = subprocess.run(describe, check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def _identity(record: dict[str, Any]) -> dict[str, Any]:
    """The part of a record that a resumed run must share.

    Of the model what it reads: an older record lacks settings that came later, at their defaults.
    """
    run = {name: value for name, value in record["run"].items() if name not in FREE_SECTIONS}
    with suppress(KeyError, ValueError, TypeError):  # else all that differs is named
        run["model"] = Gdn2Config(**run["model"]).traits
    data = {name: value for name, value in record["data"].items() if name != "path"}
    return {"run": run, "data": data}
