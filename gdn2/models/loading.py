"""Find and load a checkpoint: a training run, one of its steps, or a Hugging Face folder."""

import json
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import PickleError
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch.distributed.checkpoint.api import CheckpointException

from gdn2.models.configuration import Gdn2Config
from gdn2.models.modeling import Gdn2ForCausalLM

STEP = re.compile(r"step_\d+")
DAMAGE = (  # how torch's reader fails on a broken file
    *(OSError, EOFError, RuntimeError, ValueError, LookupError),
    *(TypeError, AttributeError, AssertionError, PickleError),
)


def load_checkpoint(path: str | Path) -> tuple[Gdn2ForCausalLM, Path]:
    """Load a model on the CPU, ready for evaluation.

    Args:
        path: a run (its newest complete step, or ``final/`` where there is no step), a step
            folder, or a Hugging Face folder.

    Returns:
        ``(model, folder that was chosen)``. The folder may hold a tokenizer too.

    Raises:
        FileNotFoundError: there is no such folder. ValueError: it holds no checkpoint of ours.
        RuntimeError: it holds one that is damaged.
    """
    folder = find_checkpoint(Path(path))
    config = Gdn2Config.from_pretrained(folder)
    if (folder / ".metadata").is_file():
        with torch.device("meta"):
            model = Gdn2ForCausalLM(config)
        model.to_empty(device="cpu")
        model.tie_weights()
        read_step(folder, {"model": model.state_dict()})
    else:
        try:
            model = Gdn2ForCausalLM.from_pretrained(folder, config=config)
        except (OSError, RuntimeError, SafetensorError) as error:
            raise RuntimeError(f"cannot read {folder}: {error}") from error
    return model.eval(), folder


def read_step(folder: Path, state: dict[str, Any]) -> None:
    """Read what a training step saved under the keys of `state` into the tensors of `state`.

    Raises RuntimeError, naming `folder`, if it is damaged or does not hold them.
    """
    try:
        with one_process():
            dcp.load(state, checkpoint_id=folder, no_dist=True)
    except DAMAGE as error:
        raise RuntimeError(f"cannot read {folder}: {error!r}") from error


@contextmanager
def one_process() -> Iterator[None]:
    """No process group is meant, and an error is the one that happened, not a report of ranks."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        try:
            yield
        except CheckpointException as error:  # a BaseException
            ((reason, _),) = error.failures.values()
            raise reason from error


def find_checkpoint(path: Path) -> Path:
    """The folder that `path` stands for: the newest step of a run, or the folder itself."""
    if not path.is_dir():
        raise FileNotFoundError(f"no checkpoint at {path}: there is no such folder")
    steps = [step for step in (path / "checkpoints").glob("step_*") if STEP.fullmatch(step.name)]
    if steps:
        path = max(steps, key=lambda step: int(step.name.removeprefix("step_")))
    elif (path / "final").is_dir():
        path = path / "final"
    config = path / "config.json"
    try:
        model_type = json.loads(config.read_text()).get("model_type") if config.is_file() else None
    except ValueError as error:
        raise ValueError(f"{config} is not JSON: {error}") from error
    if model_type is None:
        raise ValueError(
            f"no checkpoint in {path}: expected a run with checkpoints/step_* or final/, "
            "a step folder, or a Hugging Face folder with config.json"
        )
    if model_type != Gdn2Config.model_type:
        raise ValueError(f"{config} must have model_type 'gdn2', got {model_type!r}")
    return path
